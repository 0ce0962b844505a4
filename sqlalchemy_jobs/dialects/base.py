"""The statements as SQLAlchemy says them for every database; each dialect overrides what it must."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, ClassVar, TypeAlias

from sqlalchemy import (
    ColumnElement,
    Connection,
    Integer,
    TableClause,
    and_,
    bindparam,
    exists,
    or_,
    select,
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
    Mark,
    Wanted,
)
from sqlalchemy_jobs.columns import server_now
from sqlalchemy_jobs.dialects.claiming import CLAIMED, NEVER_ALONE, TAKE, claim_of, lock_live_worker
from sqlalchemy_jobs.dialects.limits import LimitStatements
from sqlalchemy_jobs.dialects.sessions import Ear, SessionLocks
from sqlalchemy_jobs.errors import UnsupportedServer
from sqlalchemy_jobs.states import JobState
from sqlalchemy_jobs.tables import (
    BEGUN,
    IS_READY,
    TO_JOB,
    final,
    jobs,
)

MIGRATION_WAIT = 60
"""Seconds for which a migration waits for another one."""

HEAD = 100
"""How many jobs of a lane are looked through for one that must run alone: the claim passes those by."""

Transaction: TypeAlias = Callable[[Callable[[Session], Any]], Any]

_LONG_AGO = datetime(1, 1, 1, tzinfo=UTC)

_SUCCEED_LOCKED = (
    update(jobs)
    .where(jobs.c.id.in_(bindparam("ids", expanding=True)))
    .values(**final(JobState.SUCCEEDED), **BEGUN)
)
_TAKE_AHEAD = TAKE.values(started_at=None)


class Dialect(ABC):
    """One database: the transitions that are written differently, and how its errors read."""

    label: ClassVar[str]
    oldest: ClassVar[tuple[int, ...]]
    why_oldest: ClassVar[str]
    one_writer: ClassVar[bool] = False
    """Whether a transaction keeps all others from writing: then nobody can take what its worker runs."""
    stale_reads: ClassVar[bool] = False
    """Whether a plain SELECT may see less than an INSERT or UPDATE of the same transaction did."""
    level_of_a_statement: ClassVar[ColumnElement[str] | None] = None
    """The isolation level of a statement outside a transaction, where a claim, a renewal and a completion of many are
    one statement each; None: they are several."""
    concurrency: ClassVar[int] = 10
    """How many runs at once, unless the user says otherwise."""
    session_locks: ClassVar[SessionLocks | None] = None
    """None: whether a worker lives is known by its lease only."""
    limits: ClassVar[LimitStatements] = LimitStatements()
    """For jobs that count against limits."""
    ear: ClassVar[type[Ear] | None] = None
    """None: the server tells nobody of new jobs."""

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
        if not lock_live_worker(session, wanted.worker_id):
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
        take = _TAKE_AHEAD if wanted.ahead else TAKE
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
        return select(exists().where(head.c.crashes >= ALONE_FROM, head.c.kind.not_in(NEVER_ALONE)))

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
            or_(jobs.c.crashes < bindparam("crashed"), jobs.c.kind.in_(NEVER_ALONE))
        )

    @cached_property
    def _due_since(self) -> Any:
        return self._due.where(jobs.c.run_at >= bindparam("since", type_=jobs.c.run_at.type))

    @cached_property
    def _due_suspect(self) -> Any:
        return self._due_where(and_(jobs.c.crashes >= ALONE_FROM, jobs.c.kind.not_in(NEVER_ALONE)))

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

    def bounded_waits(self, session: Session, seconds: int) -> AbstractContextManager[object]:
        """Have what waits for a row of others for so long fail as a conflict, at least until the context ends."""
        return nullcontext()

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


def waited_in_vain(where: str) -> str:
    """Say that another migration has not ended, and where to look for it."""
    return (
        f"another migration of these tables has been at work for {MIGRATION_WAIT} s: see what it waits for ({where}), "
        "then try again"
    )


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version)
