"""What the workers run. Every handler leaves an Effect for each run of it that committed, and a line for each that began."""

import asyncio
import os
import random
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from sqlalchemy import String, create_engine, func, make_url, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from sqlalchemy_jobs import (
    Cancel,
    JobApp,
    Run,
    Snooze,
    Unique,
    current_run,
    enqueue,
    job,
    sqlite,
)

ASYNC_DRIVERS = {"sqlite": "sqlite+aiosqlite", "mysql": "mysql+aiomysql"}
SOON = timedelta(milliseconds=100)
SNOOZES = 2
"""How often a Sleepy job is put off."""
ENDLESS = 30_000
"""max_attempts of what shall succeed in the end, however often its worker is killed."""


class Base(DeclarativeBase):
    pass


class Effect(Base):
    """What a run did, committed with its end."""

    __tablename__ = "effect"

    id: Mapped[uuid.UUID] = mapped_column(
        String(32), primary_key=True, default=lambda: uuid.uuid4().hex
    )
    job_id: Mapped[str] = mapped_column(String(32), index=True)
    attempt: Mapped[int]
    worker_id: Mapped[str] = mapped_column(String(32))
    last: Mapped[bool]
    """Whether the run was to end the job; a snoozed one is not."""


class Intent(Base):
    """A transaction that enqueued, committed with its jobs."""

    __tablename__ = "intent"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)


def effect(last: bool = True) -> Effect:
    claim = current_run().claim
    return Effect(
        job_id=claim.job_id.hex, attempt=claim.attempt, worker_id=claim.worker_id.hex, last=last
    )


def soon(failures: int) -> timedelta:
    return SOON


@job("write", max_attempts=ENDLESS, backoff=soon)
@dataclass(frozen=True)
class Write:
    n: int


@job("write_async", max_attempts=ENDLESS, backoff=soon)
@dataclass(frozen=True)
class WriteAsync:
    n: int


@job("follow", max_attempts=ENDLESS, backoff=soon)
@dataclass(frozen=True)
class Follow:
    """Enqueues a Write, in its own transaction."""

    n: int


@job("sleepy", max_attempts=ENDLESS, backoff=soon)
@dataclass(frozen=True)
class Sleepy:
    n: int


@job("flaky", max_attempts=ENDLESS, backoff=soon)
@dataclass(frozen=True)
class Flaky:
    """Writes, and raises in most of its runs."""

    n: int


@job("doomed", max_attempts=3, backoff=soon)
@dataclass(frozen=True)
class Doomed:
    """Writes, and always raises."""

    n: int


@job("resigned", max_attempts=ENDLESS, backoff=soon)
@dataclass(frozen=True)
class Resigned:
    """Writes, and cancels itself."""

    n: int


@job("long", max_attempts=ENDLESS, backoff=soon)
@dataclass(frozen=True)
class Long:
    seconds: float


@job("long_async", max_attempts=ENDLESS, backoff=soon)
@dataclass(frozen=True)
class LongAsync:
    seconds: float


@job("nothing", max_attempts=ENDLESS, backoff=soon)
@dataclass(frozen=True)
class Nothing:
    """Does not touch its session: it is completed together with others."""

    n: int


@job("only", max_attempts=ENDLESS, backoff=soon, unique=Unique())
@dataclass(frozen=True)
class Only:
    """Writes; there is at most one unfinished job for each n."""

    n: int


@job("overdue", max_attempts=2, backoff=soon, timeout=timedelta(seconds=0.3))
@dataclass(frozen=True)
class Overdue:
    """Writes, and takes longer than it may; it does not look whether it should stop."""

    n: int


@job("overdue_async", max_attempts=2, backoff=soon, timeout=timedelta(seconds=0.3))
@dataclass(frozen=True)
class OverdueAsync:
    n: int


def any_payload(random: random.Random, quick: bool) -> object:
    """A payload of a random kind; ``quick``: none that runs for seconds."""
    if random.random() < 0.1:
        return Only(random.randrange(20))
    n = random.randrange(1_000_000)
    kinds = [Write, WriteAsync, Follow, Sleepy, Flaky, Doomed, Resigned, Nothing]
    if not quick and random.random() < 0.1:
        if random.random() < 0.3:
            return random.choice([Overdue, OverdueAsync])(n)
        return random.choice([Long, LongAsync])(round(random.uniform(0.2, 4), 1))
    return random.choice(kinds)(n)


# --- the handlers -------------------------------------------------------------------------------------

url = make_url(os.environ.get("SAJOBS_CHAOS_URL", "sqlite://"))
engine = create_engine(url, pool_size=15)
async_engine = create_async_engine(
    url.set(drivername=ASYNC_DRIVERS.get(engine.dialect.name, url.drivername))
)
if engine.dialect.name == "sqlite":
    sqlite.configure(engine)
    sqlite.configure(async_engine)
jobs = JobApp(sessionmaker(engine), async_sessionmaker(async_engine))

_begun: set[Run] = set()


@jobs.middleware
@contextmanager
def log_runs(run: Run) -> Iterator[None]:
    """Write a line when a run begins; beside the database, so that it stays whatever becomes of the run."""
    if run not in _begun:  # a run whose transaction lost against another is called again
        _begun.add(run)
        line = f"{time.time()} {run.job_id.hex} {run.attempt} {run.claim.worker_id.hex}\n"
        os.write(_log(), line.encode())
    yield


def _log() -> int:
    global _file
    if _file is None:
        path = Path(os.environ["SAJOBS_CHAOS_FOLDER"]) / f"runs-{os.getpid()}"
        _file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    return _file


_file: int | None = None


@jobs.handler(Write)
def write(session: Session, payload: Write) -> None:
    session.add(effect())


@jobs.handler(WriteAsync)
async def write_async(session: AsyncSession, payload: WriteAsync) -> None:
    session.add(effect())
    await session.flush()


@jobs.handler(Follow)
def follow(session: Session, payload: Follow) -> None:
    session.add(effect())
    session.add(enqueue(Write(payload.n)))


@jobs.handler(Sleepy)
def sleepy(session: Session, payload: Sleepy) -> Snooze | None:
    before = session.scalar(select(func.count()).where(Effect.job_id == current_run().job_id.hex))
    assert before is not None
    last = before >= SNOOZES
    session.add(effect(last))
    return None if last else Snooze(SOON)


@jobs.handler(Flaky)
def flaky(session: Session, payload: Flaky) -> None:
    session.add(effect())
    session.flush()
    if (payload.n + current_run().attempt) % 3:
        raise RuntimeError("flaky")


@jobs.handler(Doomed)
def doomed(session: Session, payload: Doomed) -> None:
    session.add(effect())
    session.flush()
    raise RuntimeError("doomed")


@jobs.handler(Resigned)
def resigned(session: Session, payload: Resigned) -> Cancel:
    session.add(effect())
    return Cancel("resigned")


@jobs.handler(Long)
def long(session: Session, payload: Long) -> None:
    session.add(effect())
    if not _is_sqlite():
        session.flush()  # on SQLite it would keep the write lock
    until = time.monotonic() + payload.seconds
    while time.monotonic() < until:
        if current_run().should_stop:
            raise RuntimeError("told to stop")
        time.sleep(0.02)


@jobs.handler(LongAsync)
async def long_async(session: AsyncSession, payload: LongAsync) -> None:
    await asyncio.sleep(payload.seconds)
    session.add(effect())


@jobs.handler(Only)
def only(session: Session, payload: Only) -> None:
    session.add(effect())


@jobs.handler(Overdue)
def overdue(session: Session, payload: Overdue) -> None:
    session.add(effect())
    if not _is_sqlite():
        session.flush()
    for _ in range(200):
        time.sleep(0.05)


@jobs.handler(OverdueAsync)
async def overdue_async(session: AsyncSession, payload: OverdueAsync) -> None:
    session.add(effect())
    await asyncio.sleep(10)


@jobs.handler(Nothing)
def nothing(session: Session, payload: Nothing) -> None:
    pass


def _is_sqlite() -> bool:
    return engine.dialect.name == "sqlite"
