"""Who was left out by an INSERT of jobs, and which job stands in for each.

The unique index decides, so there is no gap between looking and inserting: the INSERT leaves a
duplicate out (``inserts.py``), and after it a SELECT tells whose row has the slot.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias, cast

from sqlalchemy import CursorResult, bindparam, event, select, update
from sqlalchemy.orm import InstanceState, Session, UOWTransaction, make_transient
from sqlalchemy.orm.util import identity_key

from sqlalchemy_jobs import dialects
from sqlalchemy_jobs.errors import DuplicateJob, EnqueueError
from sqlalchemy_jobs.models import DUPLICATE_OF, Job
from sqlalchemy_jobs.states import JobState
from sqlalchemy_jobs.tables import TO_JOB, jobs
from sqlalchemy_jobs.unique import OnConflict

Sent: TypeAlias = tuple[Mapping[str, Any], OnConflict]
"""The values of a row that was sent to the table with a unique slot, and what was asked for."""

ON_CONFLICT = "_on_conflict"
"""Where a job that is not added yet has what was asked for: in its ``__dict__``. Absent: "keep"."""
TRIES = 10
"""How often the slot may be given up between the INSERT and the SELECT after it."""
_MOST = 500
"""How many keys go into one statement."""

_HOLDERS = select(jobs.c.unique_slot, jobs.c.id, jobs.c.state).where(
    jobs.c.unique_slot.in_(bindparam("slots", expanding=True))
)
_HOLDERS_NOW = _HOLDERS.with_for_update(read=True)
_REPLACE = (
    update(jobs)
    .where(
        jobs.c.id == bindparam("holder"),
        jobs.c.unique_slot == bindparam("slot"),
        jobs.c.state == JobState.READY.value,
    )
    .values(payload=bindparam("new_payload"), run_at=bindparam("new_run_at"))
)


def stand_ins(session: Session, sent: Sequence[Sent]) -> dict[uuid.UUID, uuid.UUID]:
    """Return, for each row that was left out, the id of the job that stands in for it.

    Called in the transaction of the INSERT, right after it. What "replace" asks for is done; a row whose slot
    has become free meanwhile is inserted after all.

    Raises: DuplicateJob, for a row with "raise" that was left out.
    """
    found: dict[uuid.UUID, uuid.UUID] = {}
    sent = sorted(sent, key=lambda each: each[1] != "raise")  # before anything is replaced
    for _ in range(TRIES):
        holders = list(_holders(session, [row for row, _ in sent]))
        ours = {row["id"] for row, _ in sent} & {holder.id for holder in holders}
        # An old snapshot may show a former holder beside a row of ours: then ours counts.
        by_slot = {
            each.unique_slot: each for each in sorted(holders, key=lambda each: each.id in ours)
        }
        open_ = []
        for row, on_conflict in sent:
            holder = by_slot.get(row["unique_slot"])
            if row["id"] in ours:
                continue
            if holder is None:
                _insert(session, row)
                open_.append((row, on_conflict))
            elif on_conflict == "raise":
                raise _duplicate(row, holder.id)
            elif (
                on_conflict == "replace"
                and holder.state == JobState.READY
                and not _replace(session, holder.id, row)
            ):
                open_.append((row, on_conflict))  # it has just been claimed, or has ended
            else:
                found[row["id"]] = holder.id
        if not open_:
            return found
        sent = open_
    raise EnqueueError(
        f"a job with the unique key {sent[0][0]['unique_slot']!r} was kept out {TRIES} times by another one "
        "that was then not to be seen: is the table under row-level security?"
    )


def expire_replaced(session: Session, job_id: uuid.UUID) -> None:
    """Let the session's own object of a job that was replaced, if there is one, be read anew."""
    known = session.identity_map.get(identity_key(Job, job_id))
    if known is not None:
        session.expire(known, ["payload", "run_at"])


def _duplicate(row: Mapping[str, Any], other: uuid.UUID) -> DuplicateJob:
    key = row["unique_slot"]
    return DuplicateJob(
        f'job {other} has the unique key {key!r} already, and on_conflict is "raise": roll back, or put '
        "session.begin_nested() around the adding",
        key=key,
        other=other,
    )


def _holders(session: Session, rows: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
    ids = {row["id"] for row in rows}
    every = list({row["unique_slot"] for row in rows})
    for start in range(0, len(every), _MOST):
        some = every[start : start + _MOST]
        found = session.execute(_HOLDERS, {"slots": some}, bind_arguments=TO_JOB).all()
        if dialects.of(session).stale_reads:
            # Ours are seen by any read. One that locks them locks the gap before them too, and there jobs without
            # a slot are inserted: all of them would wait for this transaction.
            found = [each for each in found if each.id in ids]
            if others := {*some} - {each.unique_slot for each in found}:
                slots = {"slots": list(others)}
                yield from session.execute(_HOLDERS_NOW, slots, bind_arguments=TO_JOB)
        yield from found


def _insert(session: Session, row: Mapping[str, Any]) -> None:
    values = {name: row[name] for name in jobs.c.keys() if name in row}  # noqa: SIM118
    session.execute(jobs.insert(), values, bind_arguments=TO_JOB)


def _replace(session: Session, holder: uuid.UUID, row: Mapping[str, Any]) -> bool:
    replaced = session.execute(
        _REPLACE,
        {
            "holder": holder,
            "slot": row["unique_slot"],
            "new_payload": row["payload"],
            "new_run_at": row["run_at"],
        },
        bind_arguments=TO_JOB,
    )
    return cast("CursorResult[Any]", replaced).rowcount == 1


# --- the ORM's own INSERT -------------------------------------------------------------------------

# The listeners stand on the Session class, so as to work in whatever session a job is added to. A flush
# without keyed jobs pays for two looks into a dictionary.

_FLUSHED = "sqlalchemy_jobs.flushed"


def note(session: Session, state: InstanceState[Job]) -> None:
    """Have the flush that inserts this job, which has a unique slot, look whether it was left out."""
    session.info.setdefault(_FLUSHED, []).append(state.obj())


@event.listens_for(Session, "after_flush")
def _look(session: Session, flush: UOWTransaction) -> None:
    noted = session.info.pop(_FLUSHED, None)
    if noted is None:
        return
    pending = session.new  # an earlier flush that failed may have left its own behind
    flushed: dict[uuid.UUID, Job] = {job.id: job for job in noted if job in pending}
    for job in flushed.values():
        vars(job).pop(DUPLICATE_OF, None)
    sent: list[Sent] = [(vars(job), vars(job).get(ON_CONFLICT, "keep")) for job in flushed.values()]
    session.info[flush] = [
        (flushed[job_id], other) for job_id, other in stand_ins(session, sent).items()
    ]


@event.listens_for(Session, "after_flush_postexec")
def _take_out(session: Session, flush: UOWTransaction) -> None:
    """Not before: the end of the flush takes every job in it for one that has a row."""
    for job, other in session.info.pop(flush, ()):
        make_transient(job)
        vars(job)[DUPLICATE_OF] = other
        if vars(job).get(ON_CONFLICT) == "replace":
            expire_replaced(session, other)
