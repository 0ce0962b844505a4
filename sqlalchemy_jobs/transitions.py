"""The life of a job: one function for each transition.

Every function takes a session that it did not open, and neither commits nor rolls back. Each is a
guarded UPDATE. A run is named by (job, attempt, worker), and ``worker_id`` is NULL in every state but
running, so the fence ``id AND attempt AND worker_id`` holds only for the run that owns the row; a
function returns False when it does not, and then nothing was changed.

The guard stands on the updated row itself, or the rows were locked before in the same transaction:
an unlocked sub-select would be evaluated against an old snapshot (it turned a succeeded job back to
ready). Where several rows are concerned they are locked in the order of their ids.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, cast

from sqlalchemy import (
    CursorResult,
    and_,
    bindparam,
    delete,
    exists,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.orm import Session

from sqlalchemy_jobs import bell, dialects, patterns
from sqlalchemy_jobs.backoff import quartic
from sqlalchemy_jobs.claims import Claim, Lane, Wanted
from sqlalchemy_jobs.columns import microseconds, server_now
from sqlalchemy_jobs.inserts import RUNG_AHEAD
from sqlalchemy_jobs.states import JobState, Outcome, WorkerState
from sqlalchemy_jobs.tables import (
    BEGUN,
    HAS_NO_SLOT,
    IS_READY,
    IS_RUNNING,
    TO_JOB,
    attempts,
    by_id,
    final,
    is_limited,
    jobs,
    slot_in,
    workers,
)

NO_WAIT = timedelta(0)
RESCUE_BATCH = 500
MESSAGE_LENGTH = 2048
TRACEBACK_LENGTH = 8192


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong, as an ``Attempt`` row keeps it."""

    message: str
    error_type: str | None = None
    traceback: str | None = None
    outcome: Outcome = Outcome.FAILED


# --- by a worker, for many jobs at once -----------------------------------------------------------


def claim(session: Session, wanted: Wanted) -> list[Claim]:
    """ready -> running for due jobs; best priority first, then the longest due.

    Its own short transaction at READ COMMITTED, which also locks the worker's live row: a worker
    that was declared dead claims nothing.
    """
    return dialects.of(session).claim(session, wanted)


def lanes_of_suspects(session: Session, wanted: Wanted) -> list[Lane]:
    """Return the lanes at whose head there are jobs that must run alone; locks nothing."""
    return dialects.of(session).lanes_of_suspects(session, wanted)


def complete_many(session: Session, claims: Sequence[Claim]) -> set[uuid.UUID]:
    """running -> succeeded for runs without a result whose handler did not use its session.

    Never waits: a row that someone holds locked, and one that another run owns, is missing from the
    returned ids. One that this very run completed before may be among them. Its own short transaction.
    """
    dialect = dialects.of(session)
    done: set[uuid.UUID] = set()
    for (worker_id, attempt), ids in _by_run(claims).items():
        done.update(dialect.complete_many(session, worker_id, attempt, ids))
    return done


def discard_many(session: Session, claims: Sequence[Claim]) -> set[uuid.UUID]:
    """running -> deleted, as ``complete_many``."""
    done = _lock_many(session, claims, to_delete=True)
    delete_locked(session, sorted(done))
    return done


def _lock_many(
    session: Session, claims: Sequence[Claim], *, to_delete: bool = False
) -> set[uuid.UUID]:
    lock_owned = dialects.of(session).lock_owned
    locked: set[uuid.UUID] = set()
    for (worker_id, attempt), ids in _by_run(claims).items():
        locked.update(lock_owned(session, worker_id, attempt, ids, to_delete=to_delete))
    return locked


def delete_locked(session: Session, ids: Sequence[uuid.UUID]) -> None:
    """Delete jobs that this transaction has locked."""
    session.execute(delete(jobs).where(jobs.c.id.in_(ids)), bind_arguments=TO_JOB)
    _delete_attempts(session, ids)


def _by_run(claims: Sequence[Claim]) -> dict[tuple[uuid.UUID, int], list[uuid.UUID]]:
    groups: dict[tuple[uuid.UUID, int], list[uuid.UUID]] = {}
    for each in claims:
        groups.setdefault((each.worker_id, each.attempt), []).append(each.job_id)
    return groups


# --- by the run that owns the job ---------------------------------------------------------------


def complete(session: Session, claim: Claim, *, result: Any = None) -> bool:
    """running -> succeeded. Called in the transaction that carries the handler's work."""
    return _move(session, claim, _SUCCEED, returned=result)


def discard(session: Session, claim: Claim) -> bool:
    """running -> deleted: succeeded, for a kind whose rows are not kept. Called in the handler's transaction."""
    if not _move(session, claim, _DELETE):
        return False
    if claim.attempt > 1:
        _delete_attempts(session, [claim.job_id])
    return True


def complete_all(session: Session, claims: Sequence[Claim]) -> bool:
    """running -> succeeded for the runs of a batch, without results. Called in the handler's transaction.

    False when one of them does not own its job: then the transaction must not commit.
    """
    for which in _fences_of(claims):
        moved = session.execute(_SUCCEED_ALL, which, bind_arguments=TO_JOB)
        if cast("CursorResult[Any]", moved).rowcount != len(which["ids"]):
            return False
    return True


def discard_all(session: Session, claims: Sequence[Claim]) -> bool:
    """running -> deleted, as ``complete_all``."""
    for which in _fences_of(claims):
        locked = session.scalars(_LOCK_ALL, which, bind_arguments=TO_JOB).all()
        if len(locked) != len(which["ids"]):
            return False
        delete_locked(session, locked)
    return True


def snooze(session: Session, claim: Claim, *, delay: timedelta) -> bool:
    """running -> ready after ``delay``; no failure. Called in the handler's transaction."""
    moved = _to_ready(session, claim, delay)
    _ring_ahead(session, claim, delay)
    return moved and record(session, claim, Outcome.SNOOZED)


def cancel(session: Session, claim: Claim, *, reason: str) -> bool:
    """running -> cancelled, by the handler's own word. Called in the handler's transaction."""
    moved = _move(session, claim, _CANCEL)
    return moved and record(session, claim, Outcome.CANCELLED, Failure(reason))


def retry(session: Session, claim: Claim, *, failure: Failure, delay: timedelta) -> bool:
    """running -> ready after ``delay``, one failure more. Called in a fresh transaction, or in that of a batch."""
    moved = _to_ready(session, claim, delay, failed=1)
    _ring_ahead(session, claim, delay)
    return moved and record(session, claim, failure.outcome, failure)


def fail(session: Session, claim: Claim, *, failure: Failure) -> bool:
    """running -> failed, one failure more. Called in a fresh transaction, or in that of a batch."""
    moved = _move(session, claim, _FAIL, failed=1, crashed=0)
    return moved and record(session, claim, failure.outcome, failure)


def release(session: Session, claim: Claim, *, reason: str) -> bool:
    """running -> ready at once, no failure: the run was given up, or its commit never arrived."""
    moved = _to_ready(session, claim)
    if moved:
        bell.ring(session)
    return moved and record(session, claim, Outcome.RELEASED, Failure(reason))


def owned_of(session: Session, claims: Sequence[Claim]) -> set[uuid.UUID]:
    """Return the jobs that are their runs' own, as far as is committed; whoever is changing a row is not waited for."""
    owned: set[uuid.UUID] = set()
    for which in _fences_of(claims):
        owned.update(session.scalars(_OWNED_OF, which, bind_arguments=TO_JOB))
    return owned


def lost_of(session: Session, claims: Sequence[Claim]) -> list[Claim]:
    """Return the runs whose jobs were taken from them, as far as is committed.

    One that has succeeded was not: only its own run can have made it so.
    """
    found = session.execute(
        select(jobs.c.id, jobs.c.attempt, jobs.c.worker_id, jobs.c.state).where(
            jobs.c.id.in_([each.job_id for each in claims])
        ),
        bind_arguments=TO_JOB,
    )
    rows = {row.id: row for row in found}

    def is_lost(claim: Claim) -> bool:
        row = rows.get(claim.job_id)
        return (
            row is None
            or row.attempt != claim.attempt
            or (row.worker_id != claim.worker_id and row.state != JobState.SUCCEEDED)
        )

    return [claim for claim in claims if is_lost(claim)]


def give_back(session: Session, claim: Claim) -> bool:
    """running -> ready, as if it had not been claimed: its handler was not called. In a fresh transaction."""
    return bool(give_back_many(session, [claim]))


def give_back_many(session: Session, claims: Sequence[Claim]) -> set[uuid.UUID]:
    """The same for many, never waiting: as ``complete_many``."""
    locked = _lock_many(session, claims)
    session.execute(_GIVE_BACK, {"ids": sorted(locked)}, bind_arguments=TO_JOB)
    if locked:
        bell.ring(session)
    return locked


def settle(
    session: Session, claim: Claim, transition: Callable[[Session, Claim], bool]
) -> bool | None:
    """Make one of the transitions above without waiting: None when someone holds the row locked.

    Its own short transaction. False: another run owns the job, nothing was changed.
    """
    if dialects.of(session).lock_owned(
        session, claim.worker_id, claim.attempt, [claim.job_id], to_delete=transition is discard
    ):
        return transition(session, claim)
    visible = session.execute(_OWNED, _identity(claim), bind_arguments=TO_JOB)
    return None if visible.first() else False


# --- by a worker, for runs that are not running --------------------------------------------------


def release_unowned(
    session: Session, worker_id: uuid.UUID, owned: Collection[tuple[uuid.UUID, int]]
) -> list[uuid.UUID]:
    """running -> ready for the jobs that are this worker's by their rows but that it does not run.

    The reply to a claim can be lost with the connection; without this such a job would be running
    for ever under a live worker. ``owned`` holds (job, attempt) of the runs that do exist.
    """
    found = session.execute(
        select(jobs.c.id, jobs.c.attempt).where(IS_RUNNING, jobs.c.worker_id == worker_id),
        bind_arguments=TO_JOB,
    ).all()
    released = []
    for job_id, attempt in sorted((row.id, row.attempt) for row in found):
        if (job_id, attempt) not in owned:
            lost = Claim(job_id, attempt, worker_id)
            if _to_ready(session, lost):
                released.append(job_id)
    if released:
        bell.ring(session)
    return released


def rescue(
    session: Session, worker_id: uuid.UUID, heartbeat_at: datetime
) -> dict[uuid.UUID, JobState] | None:
    """Declare a worker dead and bring back its jobs; None when it turns out to be alive or busy.

    ``heartbeat_at`` is the heartbeat that led to the suspicion: a renewal since then saves it. The
    worker's row is locked first, which waits out (here: skips) a claim in flight, and its jobs are
    read by a *second* statement, at READ COMMITTED: one statement would read them by a snapshot from
    before the lock, and leave behind what the claim had just taken.
    """
    suspect = session.execute(
        select(workers.c.id)
        .where(
            workers.c.id == worker_id,
            workers.c.state == WorkerState.ALIVE.value,
            workers.c.heartbeat_at == heartbeat_at,
        )
        .with_for_update(skip_locked=True),
        bind_arguments=TO_JOB,
    )
    if suspect.first() is None:
        return None
    session.execute(
        update(workers).where(workers.c.id == worker_id).values(state=WorkerState.DEAD.value),
        bind_arguments=TO_JOB,
    )
    return rescue_orphans(session, worker_id)


def orphaning_workers(session: Session) -> Sequence[uuid.UUID]:
    """Return the ids under which jobs are running although no live worker has them."""
    return (
        session.execute(
            select(jobs.c.worker_id)
            .distinct()
            .select_from(jobs.outerjoin(workers, workers.c.id == jobs.c.worker_id))
            .where(
                IS_RUNNING,
                or_(workers.c.id.is_(None), workers.c.state == WorkerState.DEAD.value),
            ),
            bind_arguments=TO_JOB,
        )
        .scalars()
        .all()
    )


def any_unfinished(
    session: Session,
    kinds: Sequence[str],
    queues: Collection[str],
    paused_kinds: Collection[str] = (),
    paused_queues: Collection[str] = (),
) -> bool:
    """Tell whether a job of these kinds and queues (patterns; none given: any) is due, or running anywhere.

    One statement: between two looks a job could pass from the one state to the other.
    """
    due = and_(
        or_(IS_READY, is_limited(jobs, JobState.READY)),
        jobs.c.run_at <= server_now(),
        jobs.c.kind.not_in(paused_kinds),
        jobs.c.queue.not_in(paused_queues),
    )
    unfinished = exists().where(or_(IS_RUNNING, due), jobs.c.kind.in_(kinds))
    if queues:
        unfinished = unfinished.where(patterns.fitting(queues, jobs.c.queue))
    return bool(session.scalar(select(unfinished), bind_arguments=TO_JOB))


def rescue_orphans(session: Session, worker_id: uuid.UUID) -> dict[uuid.UUID, JobState]:
    """running -> ready | failed for the jobs of a worker that is dead or gone; at most 500.

    Each counts a crash, and a failure if it is known to have begun: what was claimed ahead may have been waiting
    (the next time it starts at once). The first crash of a job is retried at once, later ones with backoff, and
    from ``ALONE_FROM`` on the job runs alone. Rows that someone holds locked are left for the next sweep.
    """
    # Giving up a slot needs the lock on the keys too (see lock_keys): those that cannot be had must not fill
    # the batch of the others.
    is_last = and_(jobs.c.started_at.is_not(None), jobs.c.failures + 1 >= jobs.c.max_attempts)
    gives_up_slot = and_(is_last, ~HAS_NO_SLOT)
    found: list[Any] = []
    for condition, keeps_keys in ((~gives_up_slot, True), (gives_up_slot, False)):
        found += session.execute(
            select(
                *jobs.c["id", "attempt", "failures", "crashes", "started_at"],
                is_last.label("is_last"),
            )
            .where(IS_RUNNING, jobs.c.worker_id == worker_id, condition)
            .order_by(jobs.c.id)
            .limit(RESCUE_BATCH - len(found))
            .with_for_update(key_share=keeps_keys, skip_locked=True),
            bind_arguments=TO_JOB,
        )
    failure = Failure(f"worker {worker_id} died while running the job")
    rescued = {}
    for row in sorted(found, key=lambda row: row.id):
        lost = Claim(row.id, row.attempt, worker_id)
        if row.is_last:
            _move(session, lost, _FAIL, failed=1, crashed=1)
            rescued[row.id] = JobState.FAILED
        else:
            wait = quartic(row.crashes) if row.crashes else NO_WAIT
            _to_ready(session, lost, wait, failed=int(row.started_at is not None), crashed=1)
            rescued[row.id] = JobState.READY
        record(session, lost, Outcome.CRASHED, failure)
    if rescued:
        bell.ring(session)
    return rescued


# --- how it is done -------------------------------------------------------------------------------


# The statements are made once: making one costs more than executing it.


def _fenced(**values: Any) -> Any:
    return by_id(update(jobs)).where(_FENCE).values(**values)


_FENCE = and_(
    jobs.c.id == bindparam("job_id"),
    jobs.c.attempt == bindparam("in_attempt"),
    jobs.c.worker_id == bindparam("by_worker"),
)
_COUNTED = {
    "failures": jobs.c.failures + bindparam("failed"),
    "crashes": jobs.c.crashes + bindparam("crashed"),
}
_SUCCEED = _fenced(
    result=bindparam("returned", type_=jobs.c.result.type), **final(JobState.SUCCEEDED), **BEGUN
)
_CANCEL = _fenced(**final(JobState.CANCELLED), **BEGUN)
_FAIL = _fenced(**final(JobState.FAILED), **BEGUN, **_COUNTED)
_READY = _fenced(
    state="ready",
    worker_id=None,
    unique_slot=slot_in(JobState.READY),
    run_at=server_now("wait"),
    **BEGUN,
    **_COUNTED,
)
_GIVE_BACK = (
    by_id(update(jobs))
    .where(jobs.c.id.in_(bindparam("ids", expanding=True)))
    .values(state="ready", worker_id=None, unique_slot=slot_in(JobState.READY))
)
_DELETE = delete(jobs).where(_FENCE)
_OWNED = select(jobs.c.id).where(_FENCE)
_FENCE_OF_ALL = and_(
    jobs.c.id.in_(bindparam("ids", expanding=True)),
    jobs.c.attempt == bindparam("in_attempt"),
    jobs.c.worker_id == bindparam("by_worker"),
)
_SUCCEED_ALL = by_id(update(jobs)).where(_FENCE_OF_ALL).values(**final(JobState.SUCCEEDED), **BEGUN)
_OWNED_OF = by_id(select(jobs.c.id).where(_FENCE_OF_ALL).order_by(jobs.c.id))
_LOCK_ALL = _OWNED_OF.with_for_update()
_RECORD = insert(attempts).values(
    started_at=select(jobs.c.started_at).where(jobs.c.id == bindparam("of_job")).scalar_subquery(),
    finished_at=server_now(),
)


def _identity(claim: Claim) -> dict[str, Any]:
    return {"job_id": claim.job_id, "in_attempt": claim.attempt, "by_worker": claim.worker_id}


def _fences_of(claims: Sequence[Claim]) -> list[dict[str, Any]]:
    """Return the parameters that name these runs, for one statement for each attempt: nearly always one."""
    return [
        {"ids": sorted(ids), "in_attempt": attempt, "by_worker": worker_id}
        for (worker_id, attempt), ids in _by_run(claims).items()
    ]


def _move(session: Session, claim: Claim, statement: Any, **values: Any) -> bool:
    moved = session.execute(statement, _identity(claim) | values, bind_arguments=TO_JOB)
    return cast("CursorResult[Any]", moved).rowcount == 1


def _to_ready(
    session: Session, claim: Claim, wait: timedelta = NO_WAIT, failed: int = 0, crashed: int = 0
) -> bool:
    micros = microseconds(wait)
    return _move(session, claim, _READY, wait=micros, failed=failed, crashed=crashed)


def _ring_ahead(session: Session, claim: Claim, wait: timedelta) -> None:
    """Tell the other workers too: when the job is due, the one that ran it may be busy."""
    if wait < timedelta(seconds=RUNG_AHEAD):
        bell.ring(session, [claim.queue])


def record(
    session: Session, claim: Claim, outcome: Outcome, failure: Failure | None = None
) -> bool:
    """Insert the ``Attempt`` of a run that did not succeed, in the transaction that ended it; True."""
    session.execute(
        _RECORD,
        {
            "of_job": claim.job_id,
            "job_id": claim.job_id,
            "attempt": claim.attempt,
            "worker_id": claim.worker_id,
            "outcome": outcome.value,
            "error_type": failure and failure.error_type,
            "message": failure and _storable(failure.message)[:MESSAGE_LENGTH],
            "traceback": failure
            and failure.traceback
            and _storable(failure.traceback)[-TRACEBACK_LENGTH:],
        },
        bind_arguments=TO_JOB,
    )
    return True


def _delete_attempts(session: Session, ids: Sequence[uuid.UUID]) -> None:
    """Delete what the foreign key would, also where it is not enforced (SQLite)."""
    session.execute(delete(attempts).where(attempts.c.job_id.in_(ids)), bind_arguments=TO_JOB)


def _storable(text: str) -> str:
    """Escape what no database stores: recording a failure must not fail."""
    return text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode("utf-8")
