"""Makes the jobs of schedules when their ticks have come."""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Sequence

from sqlalchemy_jobs.schedules import ticks
from sqlalchemy_jobs.schedules.ticks import Firing, Known
from sqlalchemy_jobs.worker.availability import is_lost
from sqlalchemy_jobs.worker.control import Control
from sqlalchemy_jobs.worker.leases import Lease
from sqlalchemy_jobs.worker.loops import SHORTEST_PAUSE
from sqlalchemy_jobs.worker.wakeup import Wakeup

log = logging.getLogger("sqlalchemy_jobs")

LOOK = 5.0
"""Seconds between two looks for schedules that are new or were changed, where nobody tells of them."""
LISTENING_LOOK = 60.0
"""The same for a worker that hears the bell. And between two comparisons with the schedules of the code."""
BUSY_PAUSE = 0.1
"""Seconds until the next look where all that was due is being seen to, or changed, by somebody else."""


class Scheduler:
    """The step of a loop."""

    def __init__(self, control: Control, lease: Lease, known: Known, wakeup: Wakeup) -> None:
        self._control = control
        self._lease = lease
        self._known = known
        self._wakeup = wakeup
        self._next_sync = -math.inf
        self._has_started = False
        self.is_idle = False
        """Whether no tick had come when it last looked."""

    def step(self) -> float:
        worker_id = self._lease.worker_id
        if worker_id is None:
            return SHORTEST_PAUSE
        if time.monotonic() >= self._next_sync:
            self._sync(worker_id)
        if not self._has_started:
            starts = self._control.transaction(
                lambda session: ticks.starts(session, worker_id, self._known)
            )
            if self._fire(starts) < len(starts):
                return SHORTEST_PAUSE
            self._has_started = True
        return self._see_to_next()

    def _see_to_next(self) -> float:
        """Make the jobs of the ticks that have come; return for how many seconds there is nothing to do."""
        longest = LISTENING_LOOK if self._wakeup.is_on else LOOK
        rows, now = self._control.statements(lambda session: ticks.upcoming(session, self._known))
        due = [row for row in rows if row.next_tick is None or (now and row.next_tick <= now)]
        self.is_idle = not due
        if now is None:
            return longest
        if not due:
            return min(float((rows[0].next_tick - now).total_seconds()), longest)
        return 0.0 if self._fire([ticks.plan(row, now, self._known) for row in due]) else BUSY_PAUSE

    def _fire(self, firings: Sequence[Firing]) -> int:
        """Make the jobs all at once, or one schedule's after the other's if the database refuses one.

        How many of the schedules were still as they had been seen.
        """
        try:
            done = self._control.transaction(lambda session: ticks.fire(session, firings))
        except Exception as error:
            if is_lost(error) or self._control.dialect.is_conflict(error):
                raise
            if len(firings) > 1:
                return sum(self._fire([each]) for each in firings)
            broken = [ticks.broken(each, error) for each in firings]
            done = self._control.transaction(lambda session: ticks.fire(session, broken))
        for each in done:
            if each.pauses:
                log.error('schedule "%s" is paused: %s', each.row.name, each.error)
            elif each.error is not None:
                log.error('schedule "%s" has no job for a tick: %s', each.row.name, each.error)
        return len(done)

    def _sync(self, worker_id: uuid.UUID) -> None:
        if not self._control.statements(lambda session: ticks.is_synced(session, self._known)):
            starting = not self._has_started
            done = self._control.transaction(
                lambda session: ticks.sync(session, worker_id, self._known, starting=starting)
            )
            if done:
                log.info("schedules of the code: %s", ", ".join(done))
        again = LISTENING_LOOK if self._known.declared else math.inf
        self._next_sync = time.monotonic() + again
