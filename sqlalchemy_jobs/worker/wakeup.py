"""How long an idle worker may sleep: until its next poll, or until the bell rings."""

from __future__ import annotations

import time
from collections.abc import Callable

LISTENING = 15.0
"""Seconds between two polls of an idle worker that hears the bell. They find what no bell is rung for: a job whose
transaction had begun before the bell was on, or that came by other means."""
LONGEST_LISTENING = 60.0
"""The same at most, whatever poll interval was asked for: see ``inserts.RUNG_AHEAD``."""
BUSY = 1.0
"""Seconds of claims that come back full, after which nobody need ring: a commit that notifies waits for others."""


class Wakeup:
    """Decides whether the bell is to be on, and knows whether it is.

    It is on when the worker's row says so and that is committed. ``changed`` is called when the row should say
    something else.
    """

    def __init__(self, poll: float, changed: Callable[[], None]) -> None:
        self._poll = poll
        self._changed = changed
        self._hears = False
        self._full_since: float | None = None
        self._is_busy = False
        self._is_on = False
        self._was_turned_on = False

    @property
    def wanted(self) -> bool:
        """Whether the row should say that the bell is on."""
        return self._hears and not self._is_busy

    @property
    def is_on(self) -> bool:
        """Whether the row says that the bell is on, and it is heard."""
        return self._is_on

    def hears(self, hears: bool) -> None:
        """Take note that notifications arrive, or that they do not any more."""
        has_changed = hears != self._hears
        self._hears = hears
        self._is_on = self._is_on and hears
        if has_changed:
            self._changed()

    def announced(self, on: bool) -> bool:
        """Take note of what the row says; True when the bell was turned on: one is to look now, and often at first.

        Who has begun before that does not ring.
        """
        turned_on = on and not self._is_on
        self._is_on = on and self._hears
        self._was_turned_on |= turned_on
        if on != self.wanted:
            self._changed()
        return turned_on

    def was_turned_on(self) -> bool:
        """Tell whether the bell was turned on since the last call."""
        was, self._was_turned_on = self._was_turned_on, False
        return was

    def claimed(self, *, full: bool) -> None:
        """Take note of a claim: ``full`` when there may be more jobs than the worker has room for."""
        now = time.monotonic()
        if not full:
            self._full_since = None
        elif self._full_since is None:
            self._full_since = now
        is_busy = self._full_since is not None and now - self._full_since >= BUSY
        if is_busy != self._is_busy:
            self._is_busy = is_busy
            if self._hears:
                self._changed()

    def longest_sleep(self, polls: int) -> float:
        """Return how many seconds to sleep after so many polls in vain beyond the quick ones.

        Longer and longer, for a transaction that is open for long may have begun before the bell was on.
        """
        if not self._is_on:
            return self._poll
        longest = min(max(self._poll, LISTENING), LONGEST_LISTENING)
        return float(min(self._poll * 2 ** min(polls, 30), longest))
