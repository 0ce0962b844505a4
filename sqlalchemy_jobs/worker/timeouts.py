"""Interrupts the runs whose deadline has passed or that are called off; gives up those that do not come back."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from sqlalchemy_jobs.worker.handling import Handling

GRACE = 10.0
"""Seconds that a run is given to come back once its time is over."""


class Timeouts:
    """The step of a loop, one for all runs; it sleeps until the next deadline.

    A run whose time is over is interrupted, if it is in its handler just then; it may as well be waiting for a
    locked row, or for the reply to its COMMIT. ``give_up`` is given each run that did not come back, and hands
    it on.
    """

    def __init__(self, wake: Callable[[], None], give_up: Callable[[Handling], None]) -> None:
        self._wake = wake
        self._give_up = give_up
        self._lock = threading.Lock()
        self._watched: dict[Handling, float] = {}
        self._leaving: set[Handling] = set()
        """Those whose time is over."""
        self._next = math.inf

    def watch(self, handling: Handling) -> None:
        with self._lock:
            self._watched[handling] = handling.deadline
            earlier = handling.deadline < self._next
        if earlier:
            self._wake()

    def call_off(self, handling: Handling) -> None:
        """End the time of a run now, whatever its deadline is."""
        with self._lock:
            if handling not in self._leaving:
                self._watched[handling] = time.monotonic()
        self._wake()

    def forget(self, handling: Handling) -> None:
        if handling not in self._watched and handling not in self._leaving:
            return  # if it is called off just now: whoever has ended is not reached any more
        with self._lock:
            self._watched.pop(handling, None)
            self._leaving.discard(handling)

    def step(self) -> float | None:
        now = time.monotonic()
        with self._lock:
            due = [handling for handling, at in self._watched.items() if at <= now]
        for handling in due:
            self._on_due(handling)
        with self._lock:
            self._next = min(self._watched.values(), default=math.inf)
        return None if self._next == math.inf else max(self._next - time.monotonic(), 0.0)

    def _on_due(self, handling: Handling) -> None:
        if handling in self._leaving:
            self._give_up(handling)
            self.forget(handling)
            return
        handling.interrupt(timed_out=handling.is_overdue)
        with self._lock:
            if handling in self._watched:
                self._watched[handling] = time.monotonic() + GRACE
                self._leaving.add(handling)
