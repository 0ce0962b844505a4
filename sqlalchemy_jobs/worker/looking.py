"""Looks for what counts against limits, for the next claims while those before are made."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sqlalchemy_jobs.claims import LimitedLane
from sqlalchemy_jobs.worker.loops import Loop

BELIEVED = 1.0
"""Seconds for which one goes by what was found ahead."""


class Found(NamedTuple):
    """What a look behind a key has found."""

    after: str
    last: str
    """The last key that it has looked at; "": there is none behind."""
    lanes: Sequence[LimitedLane]
    is_held: bool
    """Whether something that ends elsewhere untold holds up a key."""
    began_at: float


class Ahead:
    """One look at a time, in a thread of its own that begins with the first one. Only one other asks and takes."""

    def __init__(self, look: Callable[[str], Found]) -> None:
        self._look = look
        self._asked: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Found | None] = queue.SimpleQueue()
        self._is_asked = False
        self.loop = Loop("look", self._step)

    def ask(self, after: str) -> None:
        """Have it look behind a key, for the next ``take``."""
        self._is_asked = True
        self._asked.put(after)
        self.loop.start()
        self.loop.wake()

    def take(self, after: str) -> Found | None:
        """Wait for what was asked for; None: nothing was, or something else, or it failed, or is not believed any more."""
        if not self._is_asked:
            return None
        self._is_asked = False
        found = self._answers.get()
        if found is None or found.after != after or time.monotonic() > found.began_at + BELIEVED:
            return None
        return found

    def _step(self) -> None:
        while not self._asked.empty():
            found = None
            try:
                found = self._look(self._asked.get())
            finally:
                self._answers.put(found)
