"""What any worker does for all: rescue the jobs of the dead, tell of jobs that nobody serves, delete old ones."""

from __future__ import annotations

import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from functools import partial

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from sqlalchemy_jobs import dialects, patterns, retention, transitions
from sqlalchemy_jobs.app import Handler
from sqlalchemy_jobs.columns import server_now
from sqlalchemy_jobs.states import JobState, WorkerState
from sqlalchemy_jobs.tables import IS_READY, TO_JOB, jobs, workers
from sqlalchemy_jobs.unique import Unique
from sqlalchemy_jobs.worker.availability import brief, is_lost
from sqlalchemy_jobs.worker.control import Control
from sqlalchemy_jobs.worker.leases import Lease, Other, forget_dead, look
from sqlalchemy_jobs.worker.loops import LONGEST_PAUSE
from sqlalchemy_jobs.worker.settings import Settings

log = logging.getLogger("sqlalchemy_jobs")

LOOK = 2.0
"""Seconds between two looks at the other workers."""
SECOND_LOOK = 0.25
"""Seconds between two looks while the lock of another worker is free."""
FREE_FOR = 0.5
"""Seconds for which a lock must have been free: its holder may be about to take it again."""
NEW_VIEW = 2.0
"""Seconds for which a worker that has just started does not judge others by their locks."""
BROKEN_VIEW = 2 * LONGEST_PAUSE
"""The same after a renewal that failed: others may have lost their locks too, and take as long to come back."""
SWEEP = 10.0
"""Seconds between two sweeps for jobs whose worker is dead or gone."""
LONE_SWEEP = 60.0
"""The same while there is no other worker, and the last one has found nothing."""
FORGET = 3600.0
"""Seconds between two looks for the rows of workers that have been dead for long, and of keys that have no jobs."""
REPORT = 60.0
"""Seconds between two looks for jobs that nobody serves."""
PRUNE = 60.0
"""Seconds between two looks for jobs that have been kept for long enough."""
PRUNE_FOR = 1.0
"""Seconds after which deleting makes room for what else is to be done; it goes on at the next look."""
REFUSED_FOR = 86400.0
"""Seconds after which it tries again to delete what it could not delete."""
SHIELDED_LOOKS = 5
"""After how many looks an operator is told that a dead worker's row is locked."""
SAMPLED = 1000
"""How many due jobs of a lane are looked at for unknown kinds: the unclaimed gather at the head."""


class Maintenance:
    """The step of a loop."""

    def __init__(
        self,
        control: Control,
        lease: Lease,
        length: timedelta,
        handlers: Mapping[str, Handler],
        settings: Settings,
        rescued: Callable[[], None],
    ) -> None:
        self._control = control
        self._lease = lease
        self._handlers = handlers
        self._settings = settings
        self._rescued = rescued
        self._grace = length.total_seconds() / 3
        self._look = min(LOOK, length.total_seconds() / 6)
        self._next_sweep = 0.0
        self._next_forget = 0.0
        self._next_report = 0.0
        self._next_prune = 0.0
        self._prunings: dict[tuple[JobState, str], retention.Pruning] = {}
        self._forget_prunings = 0.0
        self._refused: set[str] = set()
        self._reported: set[tuple[str, str | None]] = set()
        self._shielded: Counter[uuid.UUID] = Counter()
        self._free_since: dict[uuid.UUID, float] = {}

    def step(self) -> float:
        now = time.monotonic()
        wait = self._look
        if self._lease.has_company and (me := self._lease.worker_id) is not None:
            wait = self._judge(self._control.statements(lambda session: look(session, me)))
        if now >= self._next_sweep:
            found = self._sweep()
            self._next_sweep = now + (SWEEP if found or self._lease.has_company else LONE_SWEEP)
        if now >= self._next_forget:
            self._control.transaction(forget_dead)
            self._forget_keys()
            self._next_forget = now + FORGET
        if now >= self._next_report and self._lease.worker_id is not None:
            self._report()
            self._next_report = now + REPORT
        if now >= self._next_prune:
            self._next_prune = now + PRUNE  # also after an error
            if not self._prune(until=now + PRUNE_FOR):
                self._next_prune = now
        return wait

    def _judge(self, others: list[Other]) -> float:
        """Rescue the jobs of those who are dead; return how many seconds to wait before the next look.

        Neither sign counts while the own view is young: during an outage nobody renews, so when the server is
        back all leases lie in the past, and all locks are free until their holders are back as well.
        """
        now, age = time.monotonic(), self._lease.view_age
        self._free_since = {
            each.id: self._free_since.get(each.id, now) for each in others if each.is_unlocked
        }
        locks_tell = age > (BROKEN_VIEW if self._lease.was_broken else NEW_VIEW)
        wait, suspects = self._look, []
        for each in others:
            if age > self._grace and each.has_expired:
                suspects.append((each, "its lease has passed"))
            elif locks_tell and each.is_unlocked:
                if each.is_silent and now - self._free_since[each.id] >= FREE_FOR:
                    suspects.append((each, "the server has freed its lock"))
                else:
                    wait = SECOND_LOOK
        for each, why in suspects:
            self._rescue(each, why)
        self._shielded = Counter({each.id: self._shielded[each.id] for each, _ in suspects})
        return wait

    def _rescue(self, other: Other, why: str) -> None:
        rescued = self._control.transaction(
            lambda session: transitions.rescue(session, other.id, other.heartbeat_at)
        )
        if len(rescued or ()) == transitions.RESCUE_BATCH:
            self._next_sweep = 0.0  # there may be more than one transaction brings back
        self._next_sweep = min(self._next_sweep, time.monotonic() + SWEEP)  # for what it left
        if rescued is None:
            self._tell_of_shield(other)
        else:
            self._tell(f"worker {other.name} is dead, {why}", rescued)

    def _tell_of_shield(self, other: Other) -> None:
        self._shielded[other.id] += 1
        if self._shielded[other.id] == SHIELDED_LOOKS:
            log.warning(
                "worker %s is dead, but an open transaction holds its row: its jobs come back when the server "
                "ends that transaction (a half-open connection? see idle_in_transaction_session_timeout and the "
                "TCP keepalives of the server)",
                other.name,
            )

    def _sweep(self) -> bool:
        """Rescue what the dead have left behind; True when there was any: some may be locked."""
        orphaning = self._control.statements(transitions.orphaning_workers)
        for worker_id in orphaning:
            orphans: dict[uuid.UUID, JobState] = {}
            is_full = True
            while is_full:
                found = self._control.transaction(
                    lambda session, v=worker_id: transitions.rescue_orphans(session, v)  # type: ignore[misc]
                )
                orphans |= found
                is_full = len(found) == transitions.RESCUE_BATCH
            self._tell(f"worker {worker_id} is gone", orphans)
        return bool(orphaning)

    def _tell(self, what: str, rescued: Mapping[uuid.UUID, JobState]) -> None:
        self._rescued()
        failed = [job_id for job_id, state in rescued.items() if state == JobState.FAILED]
        log.warning("%s; jobs brought back: %d", what, len(rescued) - len(failed))
        for job_id in failed:
            log.warning("%s failed for good: its worker died, and no attempt is left", job_id)

    def _prune(self, until: float) -> bool:
        """Delete what has been kept for long enough; False when there is more than could be done now."""
        if (now := time.monotonic()) >= self._forget_prunings:
            self._prunings.clear()
            self._forget_prunings = now + REFUSED_FOR
        found = self._control.statements(retention.kinds)
        of_others: set[str] = set()
        if any(kind not in self._handlers for _, kind, _ in found):
            of_others = self._control.statements(find_kinds) - self._handlers.keys()
        for state, kind, present in found:
            kept = None if kind in of_others else self._kept(state, kind)  # they know for how long
            if kept is None:
                continue
            try:
                if not self._prune_kind(state, kind, present - kept, until):
                    return False
            except Exception as error:
                if is_lost(error):
                    raise
                self._tell_of_refusal(kind, error)
        return True

    def _kept(self, state: JobState, kind: str) -> timedelta | None:
        """Return for how long jobs are kept that have ended so; None: for ever."""
        name = "keep_failed" if state == JobState.FAILED else "keep"
        handler = self._handlers.get(kind)
        own = getattr(handler.declaration, name) if handler else None
        kept: timedelta | None = getattr(self._settings, name) if own is None else own
        unique = self._holding(state, kind)
        if kept is None or unique is None:
            return kept
        # Without a period it keeps others out for ever.
        return unique.period and max(kept, unique.period)

    def _prune_kind(self, state: JobState, kind: str, end: datetime, until: float) -> bool:
        """Delete those that ended before ``end``; False when there is more than could be done now."""
        slots = self._holding(state, kind) is not None  # their windows are over
        pruning = self._prunings.setdefault((state, kind), retention.Pruning(state, kind))
        may_be_more = True
        while may_be_more:
            if time.monotonic() >= until:
                return False
            try:
                may_be_more = self._control.transaction(
                    lambda session: pruning.step(session, end, slots=slots)
                )
            except IntegrityError as error:
                self._tell_of_refusal(kind, error)
                pruning.refused()
        return True

    def _forget_keys(self) -> None:
        after: str | None = ""
        while after is not None:
            after = self._control.transaction(partial(retention.forget_keys, after=after))

    def _tell_of_refusal(self, kind: str, error: Exception) -> None:
        if kind not in self._refused:
            self._refused.add(kind)
            log.warning(
                'some old jobs of kind "%s" cannot be deleted (has a foreign key to Job.id no ON DELETE?): %s',
                kind,
                brief(error),
            )

    def _holding(self, state: JobState, kind: str) -> Unique | None:
        """Return by what a job of a kind of ours still keeps others out in a final state; None: it does not."""
        handler = self._handlers.get(kind)
        unique = handler.declaration.unique if handler else None
        return unique if unique and unique.holds_in(state) else None

    def _report(self) -> None:
        unserved = self._control.statements(find_unserved)
        for queue, kind in sorted(unserved - self._reported, key=str):
            if kind is None:
                log.warning('queue "%s" has due jobs, and no worker serves it', queue)
            else:
                log.warning(
                    'queue "%s" has due jobs of kind "%s", for which no worker has a handler: they stay ready',
                    queue,
                    kind,
                )
        self._reported = unserved


def find_kinds(session: Session) -> set[str]:
    """Return the kinds that live workers have handlers for."""
    alive = select(workers.c.kinds).where(workers.c.state == WorkerState.ALIVE.value)
    found = session.scalars(alive, bind_arguments=TO_JOB)
    return {kind for kinds in found for kind in kinds or ()}


def find_unserved(session: Session) -> set[tuple[str, str | None]]:
    """Return (queue, None) for due queues that no live worker serves, (queue, kind) for kinds unknown there."""
    alive = session.execute(
        select(workers.c.queues, workers.c.kinds).where(workers.c.state == WorkerState.ALIVE.value),
        bind_arguments=TO_JOB,
    ).all()
    found: set[tuple[str, str | None]] = set()
    for queue, priority in dialects.of(session).lanes(session, ()):
        serving = [row for row in alive if patterns.serves(row.queues, queue)]
        due = (
            select(jobs.c.kind)
            .where(
                IS_READY,
                jobs.c.queue == queue,
                jobs.c.priority == priority,
                jobs.c.run_at <= server_now(),
            )
            .order_by(jobs.c.run_at)
            .limit(SAMPLED)
        ).subquery()
        present = set(session.scalars(select(due.c.kind).distinct(), bind_arguments=TO_JOB))
        if present and not serving:
            found.add((queue, None))
        known = {kind for row in serving for kind in row.kinds or ()}
        found.update((queue, kind) for kind in present - known if serving)
    return found
