"""Makes the jobs of schedules when their ticks have come."""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Mapping, Sequence

from sqlalchemy.orm import Session

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
KEY_WAIT = 1
"""Seconds for which a unique key is waited for that an open transaction holds: the other schedules wait, too."""
KEY_REST = 5.0
"""Seconds until it is tried again."""


class _KeyIsHeld(Exception):
    """Somebody has added a job with the key, in a transaction that is still open."""


class Scheduler:
    """The step of a loop."""

    def __init__(self, control: Control, lease: Lease, known: Known, wakeup: Wakeup) -> None:
        self._control = control
        self._lease = lease
        self._known = known
        self._wakeup = wakeup
        self._next_sync = -math.inf
        self._has_started = False
        self._rest_until: dict[str, float] = {}
        """Of the schedules whose job has a key that was held when it was last tried."""
        self.is_idle = False
        """Whether no tick had come when it last looked."""

    def step(self) -> float:
        worker_id = self._lease.worker_id
        if worker_id is None:
            return SHORTEST_PAUSE
        if time.monotonic() >= self._next_sync:
            self._sync(worker_id)
        resting = self._resting()
        if not self._has_started:
            starts = self._control.transaction(
                lambda session: ticks.starts(session, worker_id, self._known)
            )
            fired = self._fire([each for each in starts if each.row.name not in resting])
            self._has_started = fired == len(starts)
        wait = self._see_to_next(resting)
        return wait if self._has_started else min(wait, SHORTEST_PAUSE)

    def _resting(self) -> dict[str, float]:
        """Return for how many seconds more schedules rest whose job has a key that is held."""
        now = time.monotonic()
        return {name: until - now for name, until in self._rest_until.items() if until > now}

    def _see_to_next(self, resting: Mapping[str, float]) -> float:
        """Make the jobs of the ticks that have come; return for how many seconds there is nothing to do."""
        longest = LISTENING_LOOK if self._wakeup.is_on else LOOK
        found, now = self._control.statements(lambda session: ticks.upcoming(session, self._known))
        rows = [row for row in found if row.name not in resting]
        due = [row for row in rows if row.next_tick is None or (now and row.next_tick <= now)]
        self.is_idle = not due and not resting
        if due and now is not None:
            fired = self._fire([ticks.plan(row, now, self._known) for row in due])
            return 0.0 if fired else BUSY_PAUSE
        waits = [longest, *resting.values()]
        if rows and now is not None:
            waits.append((rows[0].next_tick - now).total_seconds())
        return min(waits)

    def _fire(self, firings: Sequence[Firing]) -> int:
        """Make the jobs of the ticks; how many of the schedules were still as they had been seen, and had theirs made.

        Those with a unique key come last: an open transaction of others may hold it.
        """
        unique: list[Firing] = []
        plain: list[Firing] = []
        for each in firings:
            (unique if self._known.makes_unique(each.row) else plain).append(each)
        return self._fire_all(plain) + self._fire_all(unique)

    def _fire_all(self, firings: Sequence[Firing]) -> int:
        """Make the jobs all at once, or one schedule's after the other's if the database refuses one."""
        if not firings:
            return 0
        try:
            done = self._control.transaction(lambda session: self._made(session, firings))
        except _KeyIsHeld:
            return self._fire_until_held(firings)
        except Exception as error:
            if is_lost(error) or self._control.dialect.is_conflict(error):
                raise
            if len(firings) > 1:
                return sum(self._fire_all([each]) for each in firings)
            broken = [ticks.broken(each, error) for each in firings]
            done = self._control.transaction(lambda session: ticks.fire(session, broken))
        for each in done:
            self._rest_until.pop(each.row.name, None)
            if each.pauses:
                log.error('schedule "%s" is paused: %s', each.row.name, each.error)
            elif each.error is not None:
                log.error('schedule "%s" has no job for a tick: %s', each.row.name, each.error)
        return len(done)

    def _made(self, session: Session, firings: Sequence[Firing]) -> list[Firing]:
        dialect = self._control.dialect
        if not self._known.makes_unique(firings[0].row):
            return ticks.fire(session, firings)
        with dialect.bounded_waits(session, KEY_WAIT):
            try:
                return ticks.fire(session, firings)
            except Exception as error:
                if dialect.is_conflict(error):
                    raise _KeyIsHeld from error
                raise

    def _fire_until_held(self, firings: Sequence[Firing]) -> int:
        """Make the jobs of one schedule after the other's, up to one whose key is held: then others have their turn."""
        if len(firings) > 1:
            fired = 0
            for each in firings:
                fired += self._fire_all([each])
                if each.row.name in self._rest_until:
                    break
            return fired
        (held,) = firings
        if held.row.name not in self._rest_until:
            log.warning(
                'schedule "%s" waits for an open transaction, which holds the unique key of its job',
                held.row.name,
            )
        self._rest_until[held.row.name] = time.monotonic() + KEY_REST
        return 0

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
