"""Job ids: UUIDv7, known before the flush and ordered by time."""

from __future__ import annotations

import os
import sys
import threading
import time
import uuid


def earlier(job_id: uuid.UUID, milliseconds: int) -> uuid.UUID:
    """Return an id that is less than all that were made so long before another one, or later."""
    return uuid.UUID(int=max((job_id.int >> 80) - milliseconds, 0) << 80)


if sys.version_info >= (3, 14):
    from uuid import uuid7 as uuid7
else:
    _lock = threading.Lock()
    _last_ms = 0
    _counter = 0

    def uuid7() -> uuid.UUID:
        """Return an id greater than every id made before it in this process.

        48 bits of milliseconds, a 42-bit counter that starts at random in each millisecond, 32
        random bits. When the clock steps back, the last millisecond goes on.

        Source: RFC 9562, section 6.2, method 1, as the standard library has it from 3.14 on.
        """
        global _last_ms, _counter
        random = int.from_bytes(os.urandom(10), "big")
        now = time.time_ns() // 1_000_000
        with _lock:
            if now > _last_ms:
                _last_ms, _counter = now, random >> 39  # 41 of the 80 bits: room to count up
            else:
                _counter += 1
                if _counter >> 42:
                    _last_ms, _counter = _last_ms + 1, random >> 39
            ms, counter = _last_ms, _counter
        return uuid.UUID(
            int=ms << 80
            | 0x7 << 76
            | (counter >> 30) << 64
            | 0x2 << 62
            | (counter & 0x3FFFFFFF) << 32
            | random & 0xFFFFFFFF
        )

    def _forget_lock() -> None:
        """Give a forked child a lock that no thread of its parent holds."""
        global _lock
        _lock = threading.Lock()

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_forget_lock)
