"""The rows: jobs, the runs that did not succeed, workers, and what holds at run time.

They are plain mapped classes on a ``DeclarativeBase`` of their own: ``select(Job).where(...)`` is the
query API. List ``sqlalchemy_jobs.metadata`` before your own in Alembic's ``target_metadata``, and
write foreign keys with the column object, ``ForeignKey(Job.id)``.

Columns are written by the transitions only. Change ``payload``, ``queue``, ``priority`` or ``run_at``
of a ready job if you like; leave ``state``, ``attempt`` and ``worker_id`` alone: they are the fence that
keeps a job from running twice.
"""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Double, ForeignKey, Index, MetaData, SmallInteger, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from sqlalchemy_jobs import columns
from sqlalchemy_jobs.ids import uuid7
from sqlalchemy_jobs.inserts import JobTable
from sqlalchemy_jobs.limits import LIMIT_KEY_LENGTH
from sqlalchemy_jobs.payloads import KIND_LENGTH, QUEUE_LENGTH
from sqlalchemy_jobs.states import JobState, WorkerState


def utcnow() -> datetime:
    """Return the client's clock in UTC."""
    return datetime.now(UTC)


metadata = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "fk": "%(table_name)s_%(column_0_name)s_fkey",
    }
)


class Base(DeclarativeBase):
    """The registry of this library's own tables."""

    metadata = metadata
    # Every column has a Python-side default: an INSERT needs no RETURNING.
    __mapper_args__ = {"eager_defaults": False}  # noqa: RUF012 (SQLAlchemy's interface)


def _where(condition: str) -> dict[str, Any]:
    """Make an index partial where the server can; MySQL ignores it."""
    return {"postgresql_where": text(condition), "sqlite_where": text(condition)}


INNODB = {"mysql_engine": "InnoDB", "mariadb_engine": "InnoDB"}
"""Other engines have no transactions, and the server's default may be one of them."""

UNIQUE_KEY_LENGTH = 200

DUPLICATE_OF = "_duplicate_of"
"""Where a job that was kept out has the other's id: in its ``__dict__``, for it is no column."""


class Job(Base):
    """One payload to be handled once. Made by ``enqueue``, committed by your own transaction."""

    __tablename__ = "sajobs_job"
    __table_args__ = (
        # The claim. `state` is a column of the index for MySQL, which has no partial indexes; the predicate is
        # wider than "ready" so that PostgreSQL keeps it as a bound of the scan (docs/decisions/0001).
        Index(
            "sajobs_job_ready",
            "state",
            "queue",
            "priority",
            "run_at",
            "id",
            **_where("limit_key IS NULL AND state IN ('ready', 'blocked')"),
        ),
        # Jobs with a limit, apart: blocked ones must not lie in the way of the others. On MySQL this one
        # serves the claim of both (`limit_key IS NULL` is its first column).
        Index(
            "sajobs_job_limited",
            "limit_key",
            "state",
            "queue",
            "priority",
            "run_at",
            "id",
            **_where("limit_key IS NOT NULL AND state IN ('ready', 'running')"),
        ),
        Index("sajobs_job_running", "worker_id", **_where("state = 'running'")),
        # The oldest job of an ordered key that is not final. Its predicate is another one, or PostgreSQL would take it for
        # the one above when its statistics say that both are empty, and sort.
        Index(
            "sajobs_job_ordered",
            "limit_key",
            "state",
            "id",
            **_where("limit_key > '' AND state IN ('ready', 'running')"),
        ),
        # Pruning, by the age that each kind is kept for.
        Index(
            "sajobs_job_final",
            "state",
            "kind",
            "finished_at",
            **_where("state IN ('succeeded', 'failed', 'cancelled')"),
        ),
        Index("sajobs_job_unique_slot", "unique_slot", unique=True),
        INNODB,
    )

    id: Mapped[uuid.UUID] = mapped_column(columns.uuid_key(), primary_key=True, default=uuid7)
    """UUIDv7, known as soon as ``enqueue`` returns. The idempotency key for the outside world."""
    kind: Mapped[str] = mapped_column(columns.name(KIND_LENGTH))
    """The stable name of the payload's class. Never changes."""
    queue: Mapped[str] = mapped_column(columns.name(QUEUE_LENGTH), default="default")
    """The line that the job waits in."""
    priority: Mapped[int] = mapped_column(SmallInteger, default=0)
    """Lower runs first, within its queue."""
    state: Mapped[str] = mapped_column(columns.name(12), default=JobState.READY)
    """One of ``JobState``."""
    run_at: Mapped[datetime] = mapped_column(columns.utc_datetime(), default=utcnow)
    """When it may be claimed. Moved forward by retry and snooze."""
    payload: Mapped[Any] = mapped_column(columns.json())
    """What the handler gets, as a JSON object."""
    attempt: Mapped[int] = mapped_column(default=0)
    """The ordinal of the latest run: raised by each claim, never lowered. Part of the fence."""
    failures: Mapped[int] = mapped_column(default=0)
    """Runs that raised or whose worker died. The job fails when it reaches ``max_attempts``."""
    crashes: Mapped[int] = mapped_column(default=0)
    """How often its worker died; the first time may count no failure, where the job may not have begun."""
    max_attempts: Mapped[int] = mapped_column(SmallInteger, default=20)
    """How many failures are too many."""
    worker_id: Mapped[uuid.UUID | None] = mapped_column(columns.uuid_key(), default=None)
    """Who runs it; NULL in every state but running. Part of the fence."""
    unique_key: Mapped[str | None] = mapped_column(columns.name(UNIQUE_KEY_LENGTH), default=None)
    """What makes it unique: its kind and what was asked for; kept for ever. NULL: nothing does."""
    unique_slot: Mapped[str | None] = mapped_column(columns.name(UNIQUE_KEY_LENGTH), default=None)
    """Its ``unique_key`` for as long as that keeps other jobs out, else NULL: at most one row has it."""
    unique_states: Mapped[int] = mapped_column(SmallInteger, default=0)
    """In which states it holds its slot: the sum of their ``JobState.bit``."""
    limit_key: Mapped[str | None] = mapped_column(columns.name(LIMIT_KEY_LENGTH), default=None)
    """The limit that the job counts against: its name and key; NULL: none."""
    waits_for: Mapped[int] = mapped_column(SmallInteger, default=0)
    """How many unfinished jobs it waits for, while blocked. Reserved: not read yet."""
    tags: Mapped[list[str] | None] = mapped_column(columns.json(), default=None)
    """Words to find it by."""
    headers: Mapped[dict[str, str] | None] = mapped_column(columns.json(), default=None)
    """What travels with the job beside the payload, for example trace context."""
    created_at: Mapped[datetime] = mapped_column(columns.utc_datetime(), default=utcnow)
    """When ``enqueue`` made it (the client's clock)."""
    scheduled_at: Mapped[datetime | None] = mapped_column(columns.utc_datetime(), default=None)
    """The tick of the schedule that made it; NULL for a job made by ``enqueue``."""
    started_at: Mapped[datetime | None] = mapped_column(columns.utc_datetime(), default=None)
    """When the latest run began (the server's clock). NULL while it is not known: a quick job may be claimed some
    tenths of a second ahead; then it is when the run ended."""
    finished_at: Mapped[datetime | None] = mapped_column(columns.utc_datetime(), default=None)
    """When it became succeeded, failed or cancelled (the server's clock)."""
    result: Mapped[Any | None] = mapped_column(columns.json(), default=None)
    """What the handler returned."""

    attempts: Mapped[list[Attempt]] = relationship(viewonly=True, order_by="Attempt.attempt")
    """The runs that did not succeed, oldest first."""

    @classmethod
    def __table_cls__(cls, *args: Any, **options: Any) -> JobTable:
        return JobTable(*args, **options)

    @property
    def duplicate_of(self) -> uuid.UUID | None:
        """After a flush: the id of the job that kept this one out. None: this one has been inserted.

        A job that was kept out is transient, as if it had never been added, and has no row: a foreign key to it
        would fail, ``job.duplicate_of or job.id`` is the job that is there.
        """
        return self.__dict__.get(DUPLICATE_OF)

    def __repr__(self) -> str:
        # No payload: it may hold secrets, and reprs end up in logs.
        return f"<Job {self.id} {self.kind} {self.state}>"


class Attempt(Base):
    """A run that did not succeed. Committed with the transition that ended the run."""

    __tablename__ = "sajobs_attempt"
    __table_args__ = INNODB

    # The three name one run for ever. No further index: MySQL would need it for the foreign key, and then
    # refuse to drop it where Alembic's downgrade drops indexes before tables.
    job_id: Mapped[uuid.UUID] = mapped_column(
        columns.uuid_key(), ForeignKey(Job.id, ondelete="CASCADE"), primary_key=True
    )
    """The job; its attempts are deleted with it (on SQLite only with ``PRAGMA foreign_keys = ON``)."""
    attempt: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    """The ordinal of the run: ``Job.attempt`` as the claim set it."""
    worker_id: Mapped[uuid.UUID] = mapped_column(columns.uuid_key(), primary_key=True)
    """Who ran it; the worker's row may be gone."""
    outcome: Mapped[str] = mapped_column(columns.name(12))
    """One of ``Outcome``."""
    error_type: Mapped[str | None] = mapped_column(columns.name(200), default=None)
    """The exception's class, with its module."""
    message: Mapped[str | None] = mapped_column(columns.text(), default=None)
    """The exception's text or the reason given, cut at 2 KiB."""
    traceback: Mapped[str | None] = mapped_column(columns.text(), default=None)
    """The end of the traceback, at most 8 KiB."""
    started_at: Mapped[datetime | None] = mapped_column(columns.utc_datetime(), default=None)
    """When the run was claimed (the server's clock)."""
    finished_at: Mapped[datetime] = mapped_column(columns.utc_datetime(), default=utcnow)
    """When its end was written down (the server's clock)."""

    def __repr__(self) -> str:
        return f"<Attempt {self.attempt} of {self.job_id} {self.outcome}>"


class WorkerRow(Base):
    """A worker process, for as long as it lives; its id is new at each start."""

    __tablename__ = "sajobs_worker"
    __table_args__ = INNODB

    id: Mapped[uuid.UUID] = mapped_column(columns.uuid_key(), primary_key=True, default=uuid7)
    name: Mapped[str] = mapped_column(columns.name(200))
    """host:pid, for people."""
    state: Mapped[str] = mapped_column(columns.name(12), default=WorkerState.ALIVE)
    """One of ``WorkerState``. Set to dead by whoever rescues its jobs; never alive again."""
    queues: Mapped[list[str] | None] = mapped_column(columns.json(), default=None)
    """The queues that it serves: names, beginnings such as ``mail.*``, and with ``!`` what it does not; NULL: all."""
    kinds: Mapped[list[str] | None] = mapped_column(columns.json(), default=None)
    """The kinds that it has handlers for."""
    started_at: Mapped[datetime] = mapped_column(columns.utc_datetime(), default=utcnow)
    """When it registered (the server's clock)."""
    heartbeat_at: Mapped[datetime] = mapped_column(columns.utc_datetime())
    """The last renewal (the server's clock)."""
    lease_until: Mapped[datetime] = mapped_column(columns.utc_datetime())
    """Until when it is believed alive without renewing (the server's clock)."""
    holds_lock: Mapped[bool] = mapped_column(default=False)
    """Whether it holds a session-level lock, which the server frees when it dies."""
    server_start: Mapped[datetime | None] = mapped_column(columns.utc_datetime(), default=None)
    """The start of the server on which it took that lock; NULL: it holds none."""
    bell: Mapped[bool] = mapped_column(default=False)
    """Whether an enqueuing transaction is to notify it: PostgreSQL only, and not while it is busy."""

    def __repr__(self) -> str:
        return f"<WorkerRow {self.name} {self.state}>"


class Queue(Base):
    """What holds for a queue at run time, in every worker. A queue without a row has the defaults."""

    __tablename__ = "sajobs_queue"
    __table_args__ = INNODB

    name: Mapped[str] = mapped_column(columns.name(QUEUE_LENGTH), primary_key=True)
    paused: Mapped[bool] = mapped_column(default=False)
    """Whether none of its jobs is claimed."""
    concurrency: Mapped[int | None] = mapped_column(default=None)
    """How many of its jobs may run at once, in all workers together; NULL: as many as they have room for."""
    rate: Mapped[str | None] = mapped_column(columns.name(40), default=None)
    """How many of its jobs may begin in a time, such as ``100/minute``; NULL: as many as there are."""
    strategy: Mapped[str] = mapped_column(columns.name(12), default="priority")
    """``priority``: the better one first, and among equals by time. ``fifo``: by time alone."""
    ageing: Mapped[float | None] = mapped_column(Double, default=None)
    """The seconds of waiting that make up for one step of priority; NULL: none do."""
    updated_at: Mapped[datetime] = mapped_column(
        columns.utc_datetime(), default=utcnow, onupdate=utcnow
    )
    """The last change (the client's clock)."""

    def __repr__(self) -> str:
        return f"<Queue {self.name}{' paused' if self.paused else ''}>"


class Kind(Base):
    """What holds for a kind of jobs at run time, in every worker. A kind without a row has the defaults."""

    __tablename__ = "sajobs_kind"
    __table_args__ = INNODB

    name: Mapped[str] = mapped_column(columns.name(KIND_LENGTH), primary_key=True)
    paused: Mapped[bool] = mapped_column(default=False)
    """Whether none of its jobs is claimed."""
    updated_at: Mapped[datetime] = mapped_column(
        columns.utc_datetime(), default=utcnow, onupdate=utcnow
    )
    """The last change (the client's clock)."""

    def __repr__(self) -> str:
        return f"<Kind {self.name}{' paused' if self.paused else ''}>"


class LimitRow(Base):
    """A key that jobs are limited by: locked by who claims them, and the memory of its rate."""

    __tablename__ = "sajobs_limit"
    __table_args__ = INNODB

    limit_key: Mapped[str] = mapped_column(columns.name(LIMIT_KEY_LENGTH), primary_key=True)
    """``Job.limit_key`` of the jobs that share it."""
    used: Mapped[Any | None] = mapped_column(columns.json(), default=None)
    """What has begun within the window of its rate; see ``limits.Starts``."""
    next_at: Mapped[datetime | None] = mapped_column(columns.utc_datetime(), default=None)
    """Until when the rate lets nothing begin (the server's clock)."""
    used_at: Mapped[datetime] = mapped_column(columns.utc_datetime(), default=utcnow)
    """When it was made, or the last start by its rate (the server's clock): what is not used any more is pruned."""

    def __repr__(self) -> str:
        return f"<LimitRow {self.limit_key}>"
