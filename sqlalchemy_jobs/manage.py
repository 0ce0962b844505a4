"""What a person, or the application, does to a job: cancel it, requeue it.

Functions of a session, like the transitions: they neither commit nor roll back. They flush first, so that a
job that was just added is found, and lock the job's row until the transaction ends.
"""

from __future__ import annotations

import uuid
from contextlib import nullcontext
from datetime import datetime
from typing import Any, cast

from sqlalchemy import CursorResult, bindparam, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, scoped_session
from sqlalchemy.orm.util import identity_key

from sqlalchemy_jobs import bell, dialects
from sqlalchemy_jobs.claims import Claim
from sqlalchemy_jobs.columns import server_now
from sqlalchemy_jobs.enqueue import checked_run_at
from sqlalchemy_jobs.errors import DuplicateJob
from sqlalchemy_jobs.models import Job
from sqlalchemy_jobs.states import FINAL, UNFINISHED, JobState, Outcome
from sqlalchemy_jobs.tables import TO_JOB, by_id, final, jobs, slot_in
from sqlalchemy_jobs.transitions import Failure, record


def cancel(session: Session | scoped_session[Any], job_id: uuid.UUID, /, reason: str = "") -> bool:
    """ready | blocked | running -> cancelled, in the transaction of ``session``; True when it was so.

    Use it to call a job off. It waits for whoever is changing the row: a run that commits first has
    succeeded, and False is returned, as for every job that is final or does not exist. Once the cancel
    is committed, a run that is going on can write nothing more; its handler learns of it within a second
    (``current_run().should_stop``, or asyncio's CancelledError). That run leaves an ``Attempt`` with the
    reason. With an AsyncSession: ``await session.run_sync(cancel, job_id)``.
    """
    session = _flushed(session)
    # Again only where the SELECT locks nothing: an SQLite engine that is not configured.
    while row := _locked(session, job_id, UNFINISHED):
        of_this = {"job_id": job_id, "in_attempt": row.attempt, "by_worker": row.worker_id}
        if _changed(session, _CANCEL, of_this):
            if row.worker_id is not None:
                record(
                    session,
                    Claim(job_id, row.attempt, row.worker_id),
                    Outcome.CANCELLED,
                    Failure(reason),
                )
            if row.limit_key is not None:  # another one may begin
                bell.ring(session, [row.queue])
            _refresh(session, job_id)
            return True
    return False


def requeue(
    session: Session | scoped_session[Any],
    job_id: uuid.UUID,
    /,
    *,
    run_at: datetime | None = None,
) -> bool:
    """succeeded | failed | cancelled -> ready, in the transaction of ``session``; True when it was so.

    Use it to have a job run again: at ``run_at`` (an aware datetime), by default at once by the database
    server's clock. It begins afresh, with all its ``max_attempts``: ``failures`` and ``crashes`` become
    0; ``attempt`` goes on, and its attempts are kept. False when it is not final or does not exist.
    A unique job takes its key again. With an AsyncSession: ``await session.run_sync(requeue, job_id)``.

    Raises: DuplicateJob when another job has its unique key; nothing was changed, and the transaction is still
    usable. EnqueueError for a wrong ``run_at``.
    """
    due = server_now() if run_at is None else checked_run_at(run_at)
    session = _flushed(session)
    row = _locked(session, job_id, FINAL)
    if row is None:
        return False
    statement = _REQUEUE.values(run_at=due)
    if row.unique_key is None:
        changed = _changed(session, statement, {"job_id": job_id})
    else:
        changed = _with_slot(session, job_id, row.unique_key, statement)
    if changed:
        bell.ring(session)
        _refresh(session, job_id)
    return changed


# --- how it is done -------------------------------------------------------------------------------

_CANCEL = (
    by_id(update(jobs))
    .where(
        jobs.c.id == bindparam("job_id"),
        jobs.c.attempt == bindparam("in_attempt"),
        jobs.c.worker_id.is_not_distinct_from(bindparam("by_worker", type_=jobs.c.worker_id.type)),
        jobs.c.state.in_([state.value for state in UNFINISHED]),
    )
    .values(final(JobState.CANCELLED))
)
_REQUEUE = (
    update(jobs)
    .where(jobs.c.id == bindparam("job_id"), jobs.c.state.in_([state.value for state in FINAL]))
    .values(
        state=JobState.READY.value,
        failures=0,
        crashes=0,
        finished_at=None,
        result=None,
        unique_slot=slot_in(JobState.READY, jobs.c.unique_key),
    )
)


def _flushed(session: Session | scoped_session[Any]) -> Session:
    plain: Session = session() if isinstance(session, scoped_session) else session
    plain.flush()
    return plain


def _locked(session: Session, job_id: uuid.UUID, states: tuple[JobState, ...]) -> Any:
    """Lock the job's row, when it is in one of these states, and return what it is guarded by."""
    return session.execute(
        select(*jobs.c["attempt", "worker_id", "unique_key", "limit_key", "queue"])
        .where(jobs.c.id == job_id, jobs.c.state.in_([state.value for state in states]))
        .with_for_update(key_share=True),
        bind_arguments=TO_JOB,
    ).first()


def _changed(session: Session, statement: Any, parameters: dict[str, Any]) -> bool:
    changed = session.execute(statement, parameters, bind_arguments=TO_JOB)
    return cast("CursorResult[Any]", changed).rowcount == 1


def _refresh(session: Session, job_id: uuid.UUID) -> None:
    """Let the session's own object of the job, if there is one, show what the row says."""
    known = session.identity_map.get(identity_key(Job, job_id))
    if known is not None:
        session.refresh(known)


def _with_slot(session: Session, job_id: uuid.UUID, key: str, statement: Any) -> bool:
    """Requeue a job that takes its slot again.

    Raises: DuplicateJob.
    """
    if other := _other_with(session, job_id, key):
        raise _taken(job_id, key, other)
    # Another transaction may be taking it at this moment: the index has the last word.
    alone = dialects.of(session).one_writer
    try:
        with nullcontext() if alone else session.begin_nested():
            return _changed(session, statement, {"job_id": job_id})
    except IntegrityError as error:
        raise _taken(job_id, key, _other_with(session, job_id, key)) from error


def _other_with(session: Session, job_id: uuid.UUID, key: str) -> uuid.UUID | None:
    holder = select(jobs.c.id).where(jobs.c.unique_slot == key, jobs.c.id != job_id)
    if dialects.of(session).stale_reads:
        holder = holder.with_for_update(read=True)
    return session.scalar(holder, bind_arguments=TO_JOB)


def _taken(job_id: uuid.UUID, key: str, other: uuid.UUID | None) -> DuplicateJob:
    return DuplicateJob(
        f"job {job_id} cannot wait again: {f'job {other}' if other else 'another job'} has its unique key {key!r}; "
        "cancel that one first, or let it do the work",
        key=key,
        other=other,
    )
