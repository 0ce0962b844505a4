"""How long a worker waits that has found nothing to claim."""

from __future__ import annotations

import math
import time

from sqlalchemy_jobs.worker.slots import Slots
from sqlalchemy_jobs.worker.wakeup import Wakeup

IDLE_WAITS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Seconds an idle worker waits before it looks again; then its poll interval, which also bounds these, or longer where
it is told of new jobs."""
SHORTEST_WAIT = 0.001
"""Seconds to wait at least for a job that is about to fall due: SQLite's clock has no finer grain."""


class Idling:
    """Longer and longer waits, until something is claimed."""

    def __init__(self, poll: float, slots: Slots, wakeup: Wakeup) -> None:
        self._poll = poll
        self._slots = slots
        self._wakeup = wakeup
        self._polls = 0
        """How many times in a row it found nothing."""
        self._looked_at = -math.inf
        self._asleep_until = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether nothing was found the last time."""
        return self._polls > 0

    @property
    def shortest(self) -> float:
        """The wait after something was claimed."""
        return min(IDLE_WAITS[0], self._poll)

    def end(self) -> None:
        """Look often again."""
        self._polls = 0

    def too_early(self) -> float:
        """Return for how long not to look: others were quicker than this one each time that it was woken."""
        if self._polls <= len(IDLE_WAITS):
            return 0.0
        return self.shortest + self._looked_at - time.monotonic()

    def was_woken(self) -> bool:
        """Tell whether its last wait was cut short, once."""
        was_woken = time.monotonic() < self._asleep_until
        self._asleep_until = 0.0
        return was_woken

    def looked(self) -> None:
        """Take note that it has looked for jobs."""
        self._looked_at = time.monotonic()

    def wait(self, due_in: float) -> float:
        """Take note that there was nothing; return how long to sleep: ``due_in``, when the next job falls due, at most."""
        self._polls += 1
        if self._polls < len(IDLE_WAITS):
            wait = min(IDLE_WAITS[self._polls], self._poll)
        elif self._slots.is_idle():
            wait = self._wakeup.longest_sleep(self._polls - len(IDLE_WAITS))
        else:  # what it runs may become due again, and nobody rings for that
            wait = self._poll
        wait = min(wait, max(due_in, SHORTEST_WAIT))
        self._asleep_until = time.monotonic() + wait
        return wait
