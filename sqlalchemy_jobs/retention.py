"""Deletes jobs that have been final for long enough, without getting in the way of those that are not."""

from __future__ import annotations

import uuid
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Select, and_, delete, exists, literal_column, or_, select, union_all
from sqlalchemy.orm import Session

from sqlalchemy_jobs.columns import server_now
from sqlalchemy_jobs.limits import LONGEST_WINDOW, key_of_queue
from sqlalchemy_jobs.states import JobState
from sqlalchemy_jobs.tables import HAS_NO_SLOT, TO_JOB, is_limited, jobs, limits
from sqlalchemy_jobs.transitions import delete_locked

BATCH = 500
"""How many jobs are deleted in one transaction."""

KEPT_KEYS = LONGEST_WINDOW + timedelta(hours=1)
"""How long the row of a key is kept at least after its last start by a rate."""

FINAL = (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)
"""In the order in which the index names them."""


def kinds(session: Session) -> list[tuple[JobState, str, datetime]]:
    """Return the final states and kinds that there are, each with the present time.

    What ended before an instant is then asked for by its value: a volatile function of the server could not be
    a bound of the scan.
    """
    found = session.execute(_KINDS, bind_arguments=TO_JOB)
    return [(JobState(row.state), row.kind, row.now) for row in found]


def forget_keys(session: Session, after: str) -> str | None:
    """Delete the rows of keys of limits that have no job any more; return where to go on, None at the end.

    A row is kept for as long as a rate may look back, and while somebody claims by it: it is deleted only under its
    own lock. Its own short transaction.
    """
    key = limits.c.limit_key
    page = select(key).where(key > after, _IS_FORGOTTEN).order_by(key).limit(BATCH)
    found = session.scalars(page, bind_arguments=TO_JOB).all()
    locked = session.scalars(
        select(key).where(key.in_(found)).order_by(key).with_for_update(skip_locked=True),
        bind_arguments=TO_JOB,
    ).all()
    # By a second statement: what was enqueued and claimed before the lock is seen.
    session.execute(delete(limits).where(key.in_(locked), _IS_FORGOTTEN), bind_arguments=TO_JOB)
    return found[-1] if len(found) == BATCH else None


class Pruning:
    """Deletes the old jobs of a final state and a kind, the oldest first, and gets past those that it cannot delete.

    When a batch is refused, since a foreign key refers to one of them, it is halved, until that one is found;
    what comes after is deleted all the same. Those found stay passed over for the life of this object.
    """

    def __init__(self, state: JobState, kind: str) -> None:
        self._state = state
        self._kind = kind
        self._most = BATCH
        self._tried: list[Any] = []
        self._refused_at: datetime | None = None
        """When the last of the refused ones ended: those that ended before it are done with."""
        self._refused: set[uuid.UUID] = set()
        """Those that ended at that very instant."""

    def step(self, session: Session, until: datetime, *, slots: bool = False) -> bool:
        """Delete a batch of those that ended before an instant; return whether there may be more.

        Those that keep others out by their ``unique_slot`` stay, unless ``slots``. Its own short transaction.
        What someone has locked, for example another worker that prunes, is passed over: nobody waits.
        """
        found = oldest(self._state, self._kind, until, slots=slots).limit(self._most)
        if self._refused_at is not None:
            found = found.where(
                jobs.c.finished_at >= self._refused_at, jobs.c.id.not_in(self._refused)
            )
        self._tried = list(session.execute(found, bind_arguments=TO_JOB))
        if self._tried:
            delete_locked(session, sorted(row.id for row in self._tried))
        may_be_more = len(self._tried) == self._most
        self._most = min(2 * self._most, BATCH)
        return may_be_more

    def refused(self) -> None:
        """Take note that the latest step was refused."""
        self._most = max(len(self._tried) // 2, 1)
        if len(self._tried) == 1:
            (row,) = self._tried
            if row.finished_at != self._refused_at:
                self._refused_at, self._refused = row.finished_at, set()
            self._refused.add(row.id)
            if len(self._refused) > BATCH:  # so many ended at one instant: the rest of it is let be
                self._refused_at = row.finished_at + timedelta(microseconds=1)
                self._refused = set()


def oldest(state: JobState, kind: str, until: datetime, *, slots: bool = False) -> Select[Any, Any]:
    """Lock and return the jobs that have been final for the longest, by a range of their index."""
    found = (
        select(jobs.c.id, jobs.c.finished_at)
        .where(_is(state), jobs.c.kind == kind, jobs.c.finished_at < until)
        .order_by(jobs.c.finished_at)
        .limit(BATCH)
        .with_for_update(skip_locked=True)
    )
    return found if slots else found.where(HAS_NO_SLOT)


def _is(state: JobState) -> Any:
    # A literal: a partial index cannot be used for a bind under a generic plan. SQLite uses it only where its
    # own condition is repeated.
    return and_(
        jobs.c.state == literal_column(f"'{state.value}'"),
        jobs.c.state.in_(literal_column(f"'{each.value}'") for each in FINAL),
    )


def _kinds(state: JobState) -> Any:
    """Return the kinds of the jobs in a state by one descent of the index for each, however many jobs there are."""
    of_state = select(jobs.c.kind).where(_is(state)).order_by(jobs.c.kind).limit(1)
    found = select(of_state.scalar_subquery().label("kind")).cte(
        f"{state.value}_kinds", recursive=True
    )
    after = of_state.where(jobs.c.kind > found.c.kind).correlate(found).scalar_subquery()
    found = found.union_all(select(after).where(found.c.kind.is_not(None)))
    own: Any = literal_column(f"'{state.value}'").label("state")
    named = select(own, found.c.kind, server_now().label("now"))
    return named.where(found.c.kind.is_not(None))


_IS_FORGOTTEN = and_(
    ~limits.c.limit_key.startswith(key_of_queue("")),
    limits.c.used_at < server_now(-KEPT_KEYS),
    ~exists().where(
        jobs.c.limit_key == limits.c.limit_key,
        or_(is_limited(jobs, JobState.READY), is_limited(jobs, JobState.RUNNING)),
    ),
)

# Made once: making a statement costs more than executing it.
_KINDS = union_all(*map(_kinds, FINAL))
