"""The statements as SQLAlchemy says them for every database; each dialect overrides what it must."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, ClassVar, TypeAlias

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Connection,
    Executable,
    FromClause,
    Integer,
    Select,
    String,
    TableClause,
    and_,
    bindparam,
    case,
    exists,
    func,
    literal_column,
    or_,
    select,
    type_coerce,
    union_all,
    update,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from sqlalchemy_jobs.claims import (
    ALONE_FROM,
    Claim,
    Due,
    Lane,
    LimitedKey,
    LimitedLane,
    Mark,
    Wanted,
)
from sqlalchemy_jobs.columns import server_now, utc_datetime
from sqlalchemy_jobs.errors import UnsupportedServer
from sqlalchemy_jobs.states import JobState, WorkerState
from sqlalchemy_jobs.tables import (
    BEGUN,
    IS_READY,
    IS_RUNNING,
    TO_JOB,
    final,
    is_limited,
    jobs,
    limits,
    slot_in,
    workers,
)

MIGRATION_WAIT = 60
"""Seconds for which a migration waits for another one."""

HEAD = 100
"""How many jobs of a lane are looked through for one that must run alone: the claim passes those by."""

Transaction: TypeAlias = Callable[[Callable[[Session], Any]], Any]

CLAIMED = (
    jobs.c.id,
    jobs.c.attempt,
    jobs.c.kind,
    jobs.c.queue,
    type_coerce(jobs.c.payload, String),
    jobs.c.failures,
    jobs.c.max_attempts,
    jobs.c.headers,
    jobs.c.crashes,
    jobs.c.scheduled_at,
    jobs.c.priority,
    jobs.c.run_at,
)

_LONG_AGO = datetime(1, 1, 1, tzinfo=UTC)
LIMITED = jobs.c["id", "limit_key", "queue", "priority", "run_at", "kind", "crashes"]

_NEVER_ALONE: BindParameter[Any] = bindparam("never_alone", expanding=True)
_ALIVE = (
    select(workers.c.id)
    .where(workers.c.id == bindparam("worker_id"), workers.c.state == WorkerState.ALIVE.value)
    .with_for_update(read=True, key_share=True)
)
_TAKE = (
    update(jobs)
    .where(jobs.c.id.in_(bindparam("ids", expanding=True)))
    .values(
        state=JobState.RUNNING.value,
        attempt=jobs.c.attempt + 1,
        worker_id=bindparam("by_worker"),
        unique_slot=slot_in(JobState.RUNNING),
        started_at=server_now(),
    )
)
_SUCCEED_LOCKED = (
    update(jobs)
    .where(jobs.c.id.in_(bindparam("ids", expanding=True)))
    .values(**final(JobState.SUCCEEDED), **BEGUN)
)
_TAKE_AHEAD = _TAKE.values(started_at=None)
_TAKE_LIMITED = _TAKE.values(started_at=bindparam("began_at", type_=utc_datetime()))


class SessionLocks(ABC):
    """Locks that belong to a session of the server, which frees them when the session's client is gone."""

    limits: ClassVar[Executable]
    """Ends the session after ``seconds`` without a statement, or when its client does not answer."""
    session: ClassVar[ColumnElement[int]]
    """The number of the session, as the server says it."""
    server_start: ClassVar[ColumnElement[datetime]]
    """When this server was started: its locks of before are gone."""
    is_free: ClassVar[ColumnElement[bool]]
    """Whether nobody holds the lock of a worker, by its row."""

    @abstractmethod
    def session_of(self, driver: Any) -> int | None:
        """Return the number of the session as the driver was told when it connected; None: it does not say."""

    @abstractmethod
    def take(self, worker_id: uuid.UUID) -> ColumnElement[bool]:
        """Take a worker's lock, without waiting for it."""


class Ear(ABC):
    """A session that the server tells of new jobs. Its connection must stay open, and is used for nothing else."""

    @abstractmethod
    def __init__(
        self, connection: Connection, rung: Callable[[str], None], ended: Callable[[], None]
    ) -> None:
        """Begin. ``rung`` will be called with a queue, or with "" for any; ``ended`` when the session has ended, where
        there is no socket that says so. Both perhaps in another thread.
        """

    @property
    @abstractmethod
    def socket(self) -> int | None:
        """What becomes readable when there is something to take in; None: that happens by itself."""

    @abstractmethod
    def take_in(self) -> None:
        """Call ``rung`` for what has come. Raises what the driver does when the session has ended."""

    @abstractmethod
    def check(self, connection: Connection) -> None:
        """Raise when the session has ended or does not hear of these tables any more."""


class Dialect(ABC):
    """One database: the transitions that are written differently, and how its errors read."""

    label: ClassVar[str]
    oldest: ClassVar[tuple[int, ...]]
    why_oldest: ClassVar[str]
    one_writer: ClassVar[bool] = False
    """Whether a transaction keeps all others from writing: then nobody can take what its worker runs."""
    stale_reads: ClassVar[bool] = False
    """Whether a plain SELECT may see less than an INSERT or UPDATE of the same transaction did."""
    single_statements: ClassVar[bool] = False
    """Whether a claim, a renewal and a completion of many are one statement each."""
    concurrency: ClassVar[int] = 10
    """How many runs at once, unless the user says otherwise."""
    session_locks: ClassVar[SessionLocks | None] = None
    """None: whether a worker lives is known by its lease only."""
    claimed: ClassVar[Sequence[Any]] = CLAIMED
    """The columns of a claimed job; its payload as text."""
    ear: ClassVar[type[Ear] | None] = None
    """None: the server tells nobody of new jobs."""

    def level_of_a_statement(self, session: Session) -> str:
        """Return the isolation level of a statement outside a transaction."""
        raise NotImplementedError

    # --- claiming ---------------------------------------------------------------------------------

    def lanes(self, session: Session, queues: Sequence[str]) -> dict[Lane, Due]:
        """Return the lanes of these queues (none given: of all) that have ready jobs, and when these fall due.

        By one descent of the index for each. Scanning all priorities in one go would walk past, and on
        InnoDB lock, every job that is scheduled for later at a better priority.
        """
        return {
            (queue, priority): Due(0.0, self._due_in(session, queue, priority))
            for queue in queues or self._climb(session, jobs.c.queue)
            for priority in self._climb(session, jobs.c.priority, jobs.c.queue == queue)
        }

    def _climb(self, session: Session, column: Any, *where: Any) -> Iterator[Any]:
        """Yield the distinct values of the next column of the index, in order."""
        first = self._by_ready_index(select(column)).where(*where).order_by(column).limit(1)
        value = session.scalar(first, bind_arguments=TO_JOB)
        while value is not None:
            yield value
            value = session.scalar(first.where(column > value), bind_arguments=TO_JOB)

    def _due_in(self, session: Session, queue: str, priority: int) -> float | None:
        lane = {"of_queue": queue, "of_priority": priority}
        row = session.execute(self._next_due, lane, bind_arguments=TO_JOB).first()
        return None if row is None else float((row.run_at - row.now).total_seconds())

    @cached_property
    def _next_due(self) -> Any:
        return (
            self._by_ready_index(select(jobs.c.run_at, server_now().label("now")))
            .where(
                jobs.c.queue == bindparam("of_queue"),
                jobs.c.priority == bindparam("of_priority"),
                jobs.c.run_at > server_now(),
            )
            .order_by(jobs.c.run_at)
            .limit(1)
        )

    def ring(self, session: Session, queues: Collection[str]) -> None:  # noqa: B027 (nothing is a way)
        """Have idle workers look at these queues (none given: at all) when the transaction is committed.

        Where the server has no way to tell them, they look by themselves.
        """

    def claim(self, session: Session, wanted: Wanted) -> list[Claim]:
        """Lock the due jobs lane by lane, then update them all."""
        if not self.lock_live_worker(session, wanted.worker_id):
            return []
        rows: list[Any] = []
        rooms = wanted.rooms()
        for queue, priority in wanted.in_turn():
            pool = wanted.pool(queue)
            share = wanted.shares.get((queue, priority), wanted.total)
            limit = min(rooms[pool], wanted.total - len(rows), share)
            if limit > 0:
                lane = {"of_queue": queue, "of_priority": priority, "most": limit}
                due = self._due_suspect if wanted.suspects else self._due
                if (mark := wanted.marks.get((queue, priority))) is not None:
                    due, lane["since"] = self._due_since, mark[0]
                kinds = {"kinds": wanted.kinds, "never_alone": wanted.never_alone}
                lane["crashed"] = 1 if wanted.ahead else ALONE_FROM
                found = session.execute(due, lane | kinds, bind_arguments=TO_JOB).all()
                rows += found
                rooms[pool] -= len(found)
        if not rows:
            return []
        ids = sorted(row.id for row in rows)
        take = _TAKE_AHEAD if wanted.ahead else _TAKE
        session.execute(take, {"ids": ids, "by_worker": wanted.worker_id}, bind_arguments=TO_JOB)
        return [claim_of(row, row.attempt + 1, wanted.worker_id) for row in rows]

    def lanes_of_suspects(self, session: Session, wanted: Wanted) -> list[Lane]:
        """Return the lanes with a suspect among their first due jobs."""
        kinds = {"kinds": wanted.kinds, "never_alone": wanted.never_alone}
        return [
            (queue, priority)
            for queue, priority in wanted.lanes
            if session.scalar(
                self._suspect_at_head,
                {"of_queue": queue, "of_priority": priority, **kinds},
                bind_arguments=TO_JOB,
            )
        ]

    def starts(
        self, session: Session, lanes: Iterable[Lane], kinds: Sequence[str]
    ) -> dict[Lane, Mark]:
        """Return where the due jobs of these kinds begin in each lane, or if there is none, where the others end."""
        found = {}
        for queue, priority in lanes:
            lane = {"of_queue": queue, "of_priority": priority}
            for statement in (self._first_due, self._last_due):
                row = session.execute(
                    statement, lane | {"kinds": kinds}, bind_arguments=TO_JOB
                ).first()
                if row is not None:
                    found[queue, priority] = row.run_at, row.id
                    break
        return found

    def shares(
        self,
        session: Session,
        queue: str,
        priorities: Sequence[int],
        ageing: float,
        kinds: Sequence[str],
        room: int,
        marks: Mapping[Lane, Mark],
    ) -> dict[Lane, int]:
        """Return how many of a queue's next jobs are of each of its lanes, where age makes up for priority.

        That is, by ``run_at`` and so many seconds for each step of priority. It locks nothing: what others take
        meanwhile is made up for by the next jobs of the lane.
        """
        wanted: dict[str, Any] = {"of_queue": queue, "kinds": kinds, "most": room}
        for number, priority in enumerate(priorities):
            mark = marks.get((queue, priority), (_LONG_AGO, None))
            wanted |= {f"priority_{number}": priority, f"since_{number}": mark[0]}
        due = session.execute(
            self._due_in_lanes(len(priorities)), wanted, bind_arguments=TO_JOB
        ).all()
        ages = sorted((row.run_at.timestamp() + ageing * row.priority, row.priority) for row in due)
        counts = Counter(priority for _, priority in ages[:room])
        return {(queue, priority): counts[priority] for priority in priorities}

    # Statements are made once: making one costs more than executing it.

    @cached_property
    def _suspect_at_head(self) -> Any:
        # The clock in a sub-select is read once, and so bounds the scan on PostgreSQL too.
        now = select(server_now()).scalar_subquery()
        head = self._due_in_lane(select(jobs.c.kind, jobs.c.crashes), now).limit(HEAD).subquery()
        return select(
            exists().where(head.c.crashes >= ALONE_FROM, head.c.kind.not_in(_NEVER_ALONE))
        )

    def _due_in_lanes(self, count: int) -> Any:
        """Select the first due jobs of each of so many lanes of a queue."""
        if count not in self._of_lanes:
            self._of_lanes[count] = union_all(*map(self._due_in_one_of, range(count)))
        return self._of_lanes[count]

    @cached_property
    def _of_lanes(self) -> dict[int, Any]:
        return {}

    def _due_in_one_of(self, number: int) -> Any:
        first = self._by_ready_index(select(jobs.c.priority, jobs.c.run_at)).where(
            jobs.c.queue == bindparam("of_queue"),
            jobs.c.priority == bindparam(f"priority_{number}"),
            jobs.c.run_at <= select(server_now()).scalar_subquery(),
            jobs.c.run_at >= bindparam(f"since_{number}"),
            jobs.c.kind.in_(bindparam("kinds", expanding=True)),
        )
        return select(first.order_by(jobs.c.run_at).limit(bindparam("most")).subquery())

    @cached_property
    def _first_due(self) -> Any:
        now = select(server_now()).scalar_subquery()
        return self._due_in_lane(select(jobs.c.run_at, jobs.c.id), now).limit(1)

    @cached_property
    def _last_due(self) -> Any:
        return (
            self._by_ready_index(select(jobs.c.run_at, jobs.c.id))
            .where(
                jobs.c.queue == bindparam("of_queue"),
                jobs.c.priority == bindparam("of_priority"),
                jobs.c.run_at <= select(server_now()).scalar_subquery(),
            )
            .order_by(jobs.c.run_at.desc(), jobs.c.id.desc())
            .limit(1)
        )

    @cached_property
    def _due(self) -> Any:
        return self._due_where(
            or_(jobs.c.crashes < bindparam("crashed"), jobs.c.kind.in_(_NEVER_ALONE))
        )

    @cached_property
    def _due_since(self) -> Any:
        return self._due.where(jobs.c.run_at >= bindparam("since", type_=jobs.c.run_at.type))

    @cached_property
    def _due_suspect(self) -> Any:
        return self._due_where(and_(jobs.c.crashes >= ALONE_FROM, jobs.c.kind.not_in(_NEVER_ALONE)))

    def _due_where(self, condition: Any) -> Any:
        """Lock and return the due jobs of one lane, the longest due first."""
        return (
            self._due_in_lane(select(*CLAIMED).where(condition), server_now())
            .limit(bindparam("most", type_=Integer))
            .with_for_update(key_share=True, skip_locked=True)
        )

    def _due_in_lane(self, statement: Any, now: Any) -> Any:
        return (
            self._by_ready_index(statement)
            .where(
                jobs.c.queue == bindparam("of_queue"),
                jobs.c.priority == bindparam("of_priority"),
                jobs.c.run_at <= now,
                jobs.c.kind.in_(bindparam("kinds", expanding=True)),
            )
            .order_by(jobs.c.run_at, jobs.c.id)
        )

    def _by_ready_index(self, statement: Any) -> Any:
        return statement.where(IS_READY)

    def lock_live_worker(self, session: Session, worker_id: uuid.UUID) -> bool:
        """Share-lock the worker's row until the transaction ends; False when it is declared dead."""
        alive = session.execute(_ALIVE, {"worker_id": worker_id}, bind_arguments=TO_JOB)
        return alive.first() is not None

    # --- claiming what counts against limits --------------------------------------------------------

    def limited_lanes(self, session: Session, after: str, most: int) -> list[LimitedLane]:
        """Return so many lanes of jobs that count against keys behind ``after``; locks nothing.

        By one descent of the index for each, as ``lanes``.
        """
        rows: list[Any] = []
        step: dict[str, Any] = {"of_key": after}
        follow: Sequence[Any] = self._limited_steps[-1:]
        while len(rows) < most and (row := self._first_row(session, follow, step)) is not None:
            rows.append(row)
            step = {"of_key": row.limit_key, "of_queue": row.queue, "of_priority": row.priority}
            follow = self._limited_steps
        keys = sorted({row.limit_key for row in rows})
        known = {
            row.limit_key: row
            for row in session.execute(self._standing, {"keys": keys}, bind_arguments=TO_JOB)
        }
        return [limited_lane(row, known.get(row.limit_key)) for row in rows]

    def _first_row(
        self, session: Session, statements: Sequence[Any], parameters: dict[str, Any]
    ) -> Any:
        found = (session.execute(each, parameters, bind_arguments=TO_JOB) for each in statements)
        return next((row for rows in found if (row := rows.first()) is not None), None)

    @cached_property
    def _limited_steps(self) -> tuple[Any, ...]:
        """The lane that follows a lane: in its queue, in its key, in the next key."""
        job = jobs.alias()
        key, priority = bindparam("of_key", type_=String), bindparam("of_priority", type_=Integer)
        behind = select(job.c.limit_key).where(
            is_limited(job, JobState.READY), job.c.limit_key > key
        )
        next_key = self._by_limited_index(behind, job).order_by(job.c.limit_key).limit(1)
        lane = select(*LIMITED, server_now().label("now")).where(is_limited(jobs, JobState.READY))
        lane = self._by_limited_index(lane, jobs).limit(1)
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

    def ordered_heads(self, session: Session, keys: Sequence[str]) -> list[LimitedLane]:
        """Return the oldest ready job of each of these keys: no other of the key may begin."""
        found = session.execute(self._heads, {"keys": keys}, bind_arguments=TO_JOB)
        known = {row.head: row for row in found if row.head is not None}
        heads = session.execute(self._jobs, {"ids": sorted(known)}, bind_arguments=TO_JOB)
        return [limited_lane(row, known[row.id]) for row in heads]

    def _running_of(self, key: Any) -> Any:
        """Count the running jobs of a key."""
        job = jobs.alias()
        running = select(func.count()).where(
            is_limited(job, JobState.RUNNING), job.c.limit_key == key
        )
        return self._by_limited_index(running, job).scalar_subquery()

    @cached_property
    def _heads(self) -> Any:
        key, job = limits.c.limit_key, jobs.alias()
        # The last condition is that of the index of ordered keys.
        ready = and_(is_limited(job, JobState.READY), job.c.limit_key > literal_column("''"))
        head = select(job.c.id).where(ready, job.c.limit_key == key).order_by(job.c.id).limit(1)
        head = self._by_limited_index(head, job, "sajobs_job_ordered")
        return self._standing.add_columns(head.scalar_subquery().label("head"))

    @cached_property
    def _jobs(self) -> Any:
        found = select(*LIMITED, server_now().label("now"))
        return found.where(jobs.c.id.in_(bindparam("ids", expanding=True)))

    def claim_limited(
        self, session: Session, wanted: Wanted, keys: Sequence[LimitedKey], began_at: datetime
    ) -> dict[str, list[Claim]]:
        """Lock due jobs of keys whose rows are locked, as many as may run beside those that do; update them all.

        The running ones must be counted by a statement that begins after the rows were locked.
        """
        if not keys or not self.lock_live_worker(session, wanted.worker_id):
            return {}
        rows: list[Any] = []
        rooms = wanted.rooms()
        kinds = {
            "kinds": wanted.kinds,
            "never_alone": wanted.never_alone,
            "is_suspect": int(wanted.suspects),
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
                due = self._due_limited
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
            session.execute(_TAKE_LIMITED, {"ids": ids, **values}, bind_arguments=TO_JOB)
        for row in rows:
            claim = claim_of(row, row.attempt + 1, wanted.worker_id)
            claims.setdefault(row.limit_key, []).append(claim)
        return claims

    def running_in(self, session: Session, queue: str) -> int:
        """Count the running jobs of a queue."""
        running = session.scalar(self._running_in, {"of_queue": queue}, bind_arguments=TO_JOB)
        return running or 0

    @cached_property
    def _running_in(self) -> Any:
        running = select(func.count()).where(
            jobs.c.worker_id.is_not(None), IS_RUNNING, jobs.c.queue == bindparam("of_queue")
        )
        return self._by_limited_index(running, jobs, "sajobs_job_running")

    def _free_heads(self, session: Session, keys: Sequence[str]) -> dict[str, uuid.UUID]:
        """Return the oldest ready job of each of these keys of which none is running."""
        found = session.execute(self._heads, {"keys": keys}, bind_arguments=TO_JOB)
        return {row.limit_key: row.head for row in found if row.head and not row.running}

    @cached_property
    def _running_now(self) -> Any:
        return select(self._running_of(bindparam("of_key", type_=String)))

    @cached_property
    def _due_limited(self) -> Any:
        due: Any = select(*self.claimed, jobs.c.limit_key)
        due = due.where(
            is_limited(jobs, JobState.READY),
            jobs.c.limit_key == bindparam("of_key"),
            jobs.c.priority == bindparam("of_priority"),
        )
        by_index = self._by_limited_index(due.order_by(jobs.c.run_at, jobs.c.id), jobs)
        return self._due_and_wanted(by_index)

    @cached_property
    def _due_head(self) -> Any:
        head = select(*self.claimed, jobs.c.limit_key).where(
            is_limited(jobs, JobState.READY), jobs.c.id == bindparam("head")
        )
        return self._due_and_wanted(head)

    def _due_and_wanted(self, statement: Any) -> Any:
        must_be_alone = and_(jobs.c.crashes >= ALONE_FROM, jobs.c.kind.not_in(_NEVER_ALONE))
        return (
            statement.where(
                jobs.c.queue == bindparam("of_queue"),
                jobs.c.run_at <= server_now(),
                jobs.c.kind.in_(bindparam("kinds", expanding=True)),
                case((must_be_alone, literal_column("1")), else_=literal_column("0"))
                == bindparam("is_suspect", type_=Integer),
            )
            .limit(bindparam("most", type_=Integer))
            .with_for_update(key_share=True, skip_locked=True)
        )

    def _by_limited_index(
        self, statement: Select[Any], job: FromClause, index: str = "sajobs_job_limited"
    ) -> Select[Any]:
        """Have the server go by an index of jobs that count against limits, where it must be told."""
        return statement

    # --- completing -------------------------------------------------------------------------------

    def complete_many(
        self,
        session: Session,
        worker_id: uuid.UUID,
        attempt: int,
        ids: Sequence[uuid.UUID],
    ) -> Iterable[uuid.UUID]:
        """Lock what is free and ours, then update just that; returns those ids."""
        locked = self.lock_owned(session, worker_id, attempt, ids)
        session.execute(_SUCCEED_LOCKED, {"ids": locked}, bind_arguments=TO_JOB)
        return locked

    def lock_owned(
        self,
        session: Session,
        worker_id: uuid.UUID,
        attempt: int,
        ids: Sequence[uuid.UUID],
        *,
        to_delete: bool = False,
    ) -> list[uuid.UUID]:
        """Lock those of the jobs that this worker runs, skipping what someone else holds.

        Ended or deleted, they wait for nobody then. See ``lock_keys``.
        """
        locked = session.execute(
            select(jobs.c.id, jobs.c.unique_slot)
            .where(jobs.c.id.in_(ids), jobs.c.attempt == attempt, jobs.c.worker_id == worker_id)
            .order_by(jobs.c.id)
            .with_for_update(key_share=True, skip_locked=True),
            bind_arguments=TO_JOB,
        ).all()
        keys = [row.id for row in locked if to_delete or row.unique_slot is not None]
        held = set(keys) - self.lock_keys(session, keys)
        return [row.id for row in locked if row.id not in held]

    def lock_keys(self, session: Session, ids: Sequence[uuid.UUID]) -> set[uuid.UUID]:
        """Lock jobs that are deleted or give up their slot, skipping those that an open transaction refers to.

        Only a foreign key that was checked in that transaction holds such a lock, and only on PostgreSQL one
        that lets other changes of the row pass: most jobs can be ended while they are referred to.
        """
        if not ids:
            return set()
        free = select(jobs.c.id).where(jobs.c.id.in_(ids)).order_by(jobs.c.id)
        locked = session.scalars(free.with_for_update(skip_locked=True), bind_arguments=TO_JOB)
        return set(locked)

    def completing_commit(self, connection: Connection, claim: Claim) -> Callable[[], None] | None:
        """Return what completes a run and commits, in one round trip; None: it takes two here.

        It raises, by the driver, and commits nothing, when the run does not own its job.
        """
        return None

    def is_lease_lost(self, error: BaseException) -> bool:
        """Tell whether that statement raised since the run does not own its job."""
        return False

    # --- interrupting -----------------------------------------------------------------------------

    def cancellable(self, connection: Connection) -> Any:
        """Return what ``cancel_statement`` is to know of a connection: here the driver's own."""
        return connection.connection.driver_connection

    @abstractmethod
    def cancel_statement(self, cancellable: Any, transaction: Transaction) -> None:
        """Cancel what a connection is executing in another thread; may raise, and then it goes on.

        ``transaction`` runs a function of a session on another connection with the same login.
        """

    # --- migrating --------------------------------------------------------------------------------

    @abstractmethod
    def migrating_alone(
        self, connection: Connection, schema: str | None
    ) -> AbstractContextManager[object]:
        """Keep every other migration of the tables waiting, at least until the context ends."""

    @abstractmethod
    def locked(
        self, connection: Connection, tables: Sequence[TableClause]
    ) -> AbstractContextManager[object]:
        """Keep everyone else out of the tables, at least until the context ends."""

    # --- errors and versions ----------------------------------------------------------------------

    def is_conflict(self, error: BaseException) -> bool:
        """Tell whether the transaction lost against another one and may simply be run again."""
        return isinstance(error, DBAPIError) and self._is_conflict(error.orig)

    @abstractmethod
    def _is_conflict(self, error: BaseException | None) -> bool:
        """Tell it by the driver's own error."""

    def check_server(self, connection: Connection) -> None:
        """Refuse a server that is too old.

        Raises: UnsupportedServer.
        """
        found = connection.dialect.server_version_info or ()
        self.check_version(tuple(part for part in found if isinstance(part, int)))

    def check_version(self, found: tuple[int, ...]) -> None:
        """Raises: UnsupportedServer."""
        if found < self.oldest:
            raise UnsupportedServer(
                f"the server is {self.label} {_dotted(found)}: {self.why_oldest} "
                f"{self.label} {_dotted(self.oldest)} or newer"
            )


def limited_lane(row: Any, known: Any) -> LimitedLane:
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
    )


def claim_of(row: Any, attempt: int, worker_id: uuid.UUID) -> Claim:
    """Make a Claim of a row that begins with the ``CLAIMED`` columns."""
    return Claim(row[0], attempt, worker_id, *row[2 : len(CLAIMED)])


def waited_in_vain(where: str) -> str:
    """Say that another migration has not ended, and where to look for it."""
    return (
        f"another migration of these tables has been at work for {MIGRATION_WAIT} s: see what it waits for ({where}), "
        "then try again"
    )


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version)
