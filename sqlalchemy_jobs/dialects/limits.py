"""The statements for jobs that count against limits."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from operator import attrgetter
from typing import Any, ClassVar

from sqlalchemy import (
    FromClause,
    Integer,
    Select,
    String,
    and_,
    bindparam,
    case,
    func,
    literal_column,
    select,
)
from sqlalchemy.orm import Session

from sqlalchemy_jobs.claims import ALONE_FROM, Claim, LimitedKey, LimitedLane, Swept, Wanted
from sqlalchemy_jobs.columns import server_now, utc_datetime
from sqlalchemy_jobs.dialects.claiming import (
    CLAIMED,
    NEVER_ALONE,
    TAKE,
    claim_of,
    lock_live_worker,
)
from sqlalchemy_jobs.inserts import insert_missing
from sqlalchemy_jobs.states import JobState
from sqlalchemy_jobs.tables import IS_RUNNING, TO_JOB, by_id, is_limited, jobs, limits

NEWEST = 100
"""Among how many jobs one looks for new ones that count against limits."""

MOST_CRASHES = 2**31 - 1
"""Any number of them."""

_LANE = jobs.c["id", "limit_key", "queue", "priority", "run_at", "kind", "crashes"]
_TAKE = TAKE.values(started_at=bindparam("began_at", type_=utc_datetime()))
_ADD_KEYS = insert_missing(limits).values(limit_key=bindparam("of_key"), used_at=server_now())


class LimitStatements:
    """As SQLAlchemy says them for every database; some override what they must."""

    claimed: ClassVar[Sequence[Any]] = CLAIMED
    """The columns of a claimed job; its payload as text."""

    def lanes(self, session: Session, after: str, most: int) -> list[LimitedLane]:
        """Return so many lanes of jobs that count against keys behind ``after``; locks nothing.

        By one descent of the index for each, as ``Dialect.lanes``.
        """
        rows: list[Any] = []
        step: dict[str, Any] = {"of_key": after}
        follow: Sequence[Any] = self._steps[-1:]
        while len(rows) < most and (first := self._first_rows(session, follow, step)):
            row = first[0]
            lanes = {(each.limit_key, each.queue, each.priority) for each in first}
            rows.append((row, len(lanes) < len(first)))
            step = {"of_key": row.limit_key, "of_queue": row.queue, "of_priority": row.priority}
            follow = self._steps
        keys = sorted({row.limit_key for row, _ in rows})
        known = {
            row.limit_key: row
            for row in session.execute(self._standing, {"keys": keys}, bind_arguments=TO_JOB)
        }
        return [_lane(row, known.get(row.limit_key), has_more=more) for row, more in rows]

    def _first_rows(
        self, session: Session, statements: Sequence[Any], parameters: dict[str, Any]
    ) -> Sequence[Any]:
        """Return the first two rows of the first of these statements that has any."""
        found = (session.execute(each, parameters, bind_arguments=TO_JOB) for each in statements)
        return next((rows for each in found if (rows := each.all())), ())

    @cached_property
    def _steps(self) -> tuple[Any, ...]:
        """The lane that follows a lane: in its queue, in its key, in the next key."""
        job = jobs.alias()
        key, priority = bindparam("of_key", type_=String), bindparam("of_priority", type_=Integer)
        behind = select(job.c.limit_key).where(
            is_limited(job, JobState.READY), job.c.limit_key > key
        )
        next_key = self._by_index(behind, job).order_by(job.c.limit_key).limit(1)
        lane = select(*_LANE, server_now().label("now")).where(is_limited(jobs, JobState.READY))
        lane = self._by_index(lane, jobs).limit(2)
        in_key = lane.where(jobs.c.limit_key == key)
        queue = bindparam("of_queue", type_=String)
        of_queue = jobs.c["priority", "run_at", "id"]
        return (
            # Not by the queue too: MariaDB would sort.
            in_key.where(jobs.c.queue == queue, jobs.c.priority > priority).order_by(*of_queue),
            in_key.where(jobs.c.queue > queue).order_by(jobs.c.queue, *of_queue),
            lane.where(jobs.c.limit_key == next_key.scalar_subquery()).order_by(
                jobs.c.queue, *of_queue
            ),
        )

    @cached_property
    def _standing(self) -> Any:
        running = self._running_of(limits.c.limit_key).label("running")
        found = select(limits.c.limit_key, limits.c.next_at, running)
        return found.where(limits.c.limit_key.in_(bindparam("keys", expanding=True)))

    def newest(self, session: Session, after: uuid.UUID) -> tuple[list[LimitedLane], uuid.UUID]:
        """Return lanes of which a job behind an id is among the newest ``NEWEST``, and the newest id; locks nothing.

        Ids grow with the time at which they were made. All the newest are read: by a condition on the id, of which it
        knows nothing yet, PostgreSQL would read and sort all jobs.
        """
        found = session.execute(self._newest, bind_arguments=TO_JOB).all()
        rows: dict[tuple[Any, ...], list[Any]] = {}
        for row in found:
            if row.id > after and row.limit_key is not None and row.state == JobState.READY:
                rows.setdefault((row.limit_key, row.queue, row.priority), []).append(row)
        keys = sorted({key for key, _, _ in rows})
        known = {
            row.limit_key: row
            for row in session.execute(self._standing, {"keys": keys}, bind_arguments=TO_JOB)
        }
        lanes = [
            _lane(min(of_lane, key=attrgetter("run_at")), known.get(key), has_more=len(of_lane) > 1)
            for (key, _, _), of_lane in rows.items()
        ]
        return lanes, found[0].id if found else after

    @cached_property
    def _newest(self) -> Any:
        found = select(*_LANE, jobs.c.state, server_now().label("now"))
        return by_id(found.order_by(jobs.c.id.desc()).limit(NEWEST))

    def ordered_heads(self, session: Session, keys: Sequence[str]) -> list[LimitedLane]:
        """Return the oldest ready job of each of these keys: no other of the key may begin."""
        found = session.execute(self._heads, {"keys": keys}, bind_arguments=TO_JOB)
        known = {row.head: row for row in found if row.head is not None}
        heads = session.execute(self._jobs, {"ids": sorted(known)}, bind_arguments=TO_JOB)
        return [_lane(row, known[row.id], has_more=False) for row in heads]

    def _running_of(self, key: Any) -> Any:
        """Count the running jobs of a key."""
        job = jobs.alias()
        running = select(func.count()).where(
            is_limited(job, JobState.RUNNING), job.c.limit_key == key
        )
        return self._by_index(running, job).scalar_subquery()

    @cached_property
    def _heads(self) -> Any:
        key, job = limits.c.limit_key, jobs.alias()
        # The last condition is that of the index of ordered keys.
        ready = and_(is_limited(job, JobState.READY), job.c.limit_key > literal_column("''"))
        head = select(job.c.id).where(ready, job.c.limit_key == key).order_by(job.c.id).limit(1)
        head = self._by_index(head, job, "sajobs_job_ordered")
        return self._standing.add_columns(head.scalar_subquery().label("head"))

    @cached_property
    def _jobs(self) -> Any:
        found = select(*_LANE, server_now().label("now"))
        return found.where(jobs.c.id.in_(bindparam("ids", expanding=True)))

    def add_keys(self, session: Session, keys: Sequence[str]) -> None:
        """Make the rows of keys that have none; another worker may do the same."""
        rows = [{"of_key": key} for key in keys]
        session.execute(_ADD_KEYS, rows, bind_arguments=TO_JOB)

    def claim(
        self,
        session: Session,
        wanted: Wanted,
        keys: Sequence[LimitedKey],
        began_at: datetime | None,
    ) -> dict[str, list[Claim]]:
        """Lock due jobs of keys whose rows are locked, as many as may run beside those that do; update them all.

        The running ones must be counted by a statement that begins after the rows were locked.
        """
        if not keys or not lock_live_worker(session, wanted.worker_id):
            return {}
        rows: list[Any] = []
        rooms = wanted.rooms()
        kinds = {
            "kinds": wanted.kinds,
            "never_alone": wanted.never_alone,
            "is_suspect": int(wanted.suspects),
            "most_crashes": 0 if wanted.ahead else MOST_CRASHES,
        }
        ordered = [each.key for each in keys if each.numbers.ordered]
        heads = self._free_heads(session, ordered) if ordered else {}
        for each in keys:
            pool = wanted.pool(each.queue)
            most = min(each.most, rooms[pool], wanted.total - len(rows))
            if each.numbers.ordered:
                of_key: list[dict[str, Any]] = (
                    [{"head": heads[each.key]}] if each.key in heads else []
                )
                due = self._due_head
            else:
                if (allowed := each.numbers.concurrency) is not None and most > 0:
                    running = session.scalar(
                        self._running_now, {"of_key": each.key}, bind_arguments=TO_JOB
                    )
                    most = min(most, allowed - (running or 0))
                of_key = [{"of_key": each.key, "of_priority": n} for n in each.priorities]
                due = self._due
            for which in of_key:
                if most > 0:
                    found = session.execute(
                        due,
                        {**which, **kinds, "of_queue": each.queue, "most": most},
                        bind_arguments=TO_JOB,
                    ).all()
                    rows += found
                    rooms[pool] -= len(found)
                    most -= len(found)
        claims: dict[str, list[Claim]] = {}
        if rows:
            values = {"by_worker": wanted.worker_id, "began_at": began_at}
            ids = sorted(row.id for row in rows)
            session.execute(_TAKE, {"ids": ids, **values}, bind_arguments=TO_JOB)
        for row in rows:
            claim = claim_of(row, row.attempt + 1, wanted.worker_id)
            claims.setdefault(row.limit_key, []).append(claim)
        return claims

    def claim_at_once(
        self, session: Session, wanted: Wanted, keys: Sequence[LimitedKey]
    ) -> dict[str, list[Claim]] | None:
        """Lock the rows of keys and claim as above, in one round trip; None: it takes several here."""
        return None

    def claim_next(
        self, session: Session, wanted: Wanted, after: str, allowed: Mapping[str, int], most: int
    ) -> Swept | None:
        """Go by the keys of so many ready jobs behind a key: lock or make their rows, and claim as above."""
        return None

    def running_in(self, session: Session, queue: str) -> int:
        """Count the running jobs of a queue."""
        running = session.scalar(self._running_in, {"of_queue": queue}, bind_arguments=TO_JOB)
        return running or 0

    @cached_property
    def _running_in(self) -> Any:
        running = select(func.count()).where(
            jobs.c.worker_id.is_not(None), IS_RUNNING, jobs.c.queue == bindparam("of_queue")
        )
        return self._by_index(running, jobs, "sajobs_job_running")

    def _free_heads(self, session: Session, keys: Sequence[str]) -> dict[str, uuid.UUID]:
        """Return the oldest ready job of each of these keys of which none is running."""
        found = session.execute(self._heads, {"keys": keys}, bind_arguments=TO_JOB)
        return {row.limit_key: row.head for row in found if row.head and not row.running}

    @cached_property
    def _running_now(self) -> Any:
        return select(self._running_of(bindparam("of_key", type_=String)))

    @cached_property
    def _due(self) -> Any:
        due: Any = select(*self.claimed, jobs.c.limit_key)
        due = due.where(
            is_limited(jobs, JobState.READY),
            jobs.c.limit_key == bindparam("of_key"),
            jobs.c.priority == bindparam("of_priority"),
        )
        in_order = self._by_index(due.order_by(jobs.c.run_at, jobs.c.id), jobs)
        return self._due_and_wanted(in_order)

    @cached_property
    def _due_head(self) -> Any:
        head = select(*self.claimed, jobs.c.limit_key).where(
            is_limited(jobs, JobState.READY), jobs.c.id == bindparam("head")
        )
        return self._due_and_wanted(head)

    def _due_and_wanted(self, statement: Any) -> Any:
        must_be_alone = and_(jobs.c.crashes >= ALONE_FROM, jobs.c.kind.not_in(NEVER_ALONE))
        return (
            statement.where(
                jobs.c.queue == bindparam("of_queue"),
                jobs.c.run_at <= server_now(),
                jobs.c.kind.in_(bindparam("kinds", expanding=True)),
                jobs.c.crashes <= bindparam("most_crashes", type_=Integer),
                case((must_be_alone, literal_column("1")), else_=literal_column("0"))
                == bindparam("is_suspect", type_=Integer),
            )
            .limit(bindparam("most", type_=Integer))
            .with_for_update(key_share=True, skip_locked=True)
        )

    def _by_index(
        self, statement: Select[Any], job: FromClause, index: str = "sajobs_job_limited"
    ) -> Select[Any]:
        """Have the server go by an index of jobs that count against limits, where it must be told."""
        return statement


def _lane(row: Any, known: Any, *, has_more: bool) -> LimitedLane:
    """Make a LimitedLane of its first job and of what is known of its key; None: nothing yet."""

    def until(when: datetime) -> float:
        return float((when - row.now).total_seconds())

    return LimitedLane(
        row.limit_key,
        row.queue,
        row.priority,
        until(row.run_at),
        row.kind,
        row.crashes,
        known.running if known else 0,
        until(known.next_at) if known and known.next_at else 0.0,
        known is not None,
        has_more,
    )
