"""What the benchmarked workers run. The first call of a handler and the last one are said on stdout."""

import asyncio
import itertools
import json
import os
import time
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import String, create_engine, func
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from sqlalchemy_jobs import JobApp, Limit, current_run, job, sqlite

URL_OF, COUNT_OF, COLOUR = "SAJOBS_BENCH_URL", "SAJOBS_BENCH_COUNT", "SAJOBS_BENCH_COLOUR"
TRACE = 0
"""In place of a count: say every call."""
NEVER = -1
"""In place of a count: say the first call only."""


MOST_LIMITED = 1000
"""More than a worker has slots."""


class Base(DeclarativeBase):
    pass


class Entry(Base):
    """What a handler with work in the database inserts."""

    __tablename__ = "bench_entry"

    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int]
    note: Mapped[str] = mapped_column(String(100), default="something of an ordinary length")
    created_at: Mapped[datetime] = mapped_column(default=func.now())


@job("noop")
@dataclass(frozen=True)
class Noop:
    """Nothing is done."""

    n: int


@job("limited", limit=Limit(concurrency=MOST_LIMITED, key="key"))
@dataclass(frozen=True)
class Limited:
    """Nothing is done, beside others of its key up to a limit."""

    key: str
    n: int


@job("insert")
@dataclass(frozen=True)
class Insert:
    """One ORM row is inserted in the handler's transaction."""

    n: int


@job("limited_insert", limit=Limit(concurrency=MOST_LIMITED, key="key"))
@dataclass(frozen=True)
class LimitedInsert:
    """The same, beside others of its key up to a limit."""

    key: str
    n: int


@job("rated_insert", limit=Limit(rate="1000000/minute", key="key"))
@dataclass(frozen=True)
class RatedInsert:
    """The same, counted by a rate that lets it begin."""

    key: str
    n: int


@job("burn")
@dataclass(frozen=True)
class Burn:
    """Some milliseconds of CPU in Python."""

    n: int


@job("nap")
@dataclass(frozen=True)
class Nap:
    """Keeps a slot and no CPU."""

    n: int


@job("tick")
@dataclass(frozen=True)
class Tick:
    """Says which tick of its schedule it is for."""


def noop(session: Session, payload: Noop) -> None:
    called()


def limited(session: Session, payload: Limited) -> None:
    called()


def insert(session: Session, payload: Insert | LimitedInsert | RatedInsert) -> None:
    called()
    session.add(Entry(number=payload.n))


def burn(session: Session, payload: Burn) -> None:
    called()
    sum(range(300_000))


def nap(session: Session, payload: Nap) -> None:
    called()
    time.sleep(0.05)


def tick(session: Session, payload: Tick) -> None:
    scheduled_at = current_run().scheduled_at
    assert scheduled_at is not None
    say("tick", tick=scheduled_at.timestamp())


_calls = itertools.count(1)
_count = int(os.environ.get(COUNT_OF, TRACE))


def called() -> None:
    number = next(_calls)
    if _count == TRACE:
        say("start")
    elif number == 1:
        say("first")
    if number == _count:
        say("last")


def say(event: str, **more: float) -> None:
    said = {"event": event, "at": time.time(), "cpu": time.process_time()} | more
    # One write: print() makes two, and threads mix.
    print(f"{json.dumps(said)}\n", end="", flush=True)


def engine_of(url: str) -> Any:
    engine = create_engine(url, pool_size=20)
    if engine.dialect.name == "sqlite":
        sqlite.configure(engine)
    return engine


if os.environ.get(COLOUR) == "async":
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

    jobs: JobApp[Any, Any] = JobApp(
        async_sessionmaker(create_async_engine(os.environ[URL_OF], pool_size=20))
    )

    @jobs.handler(Noop)
    async def async_noop(session: AsyncSession, payload: Noop) -> None:
        noop(session.sync_session, payload)

    @jobs.handler(Insert)
    async def async_insert(session: AsyncSession, payload: Insert) -> None:
        insert(session.sync_session, payload)

    @jobs.handler(Tick)
    async def async_tick(session: AsyncSession, payload: Tick) -> None:
        tick(session.sync_session, payload)

    @jobs.handler(Nap)
    async def async_nap(session: AsyncSession, payload: Nap) -> None:
        called()
        await asyncio.sleep(0.05)

elif URL_OF in os.environ:
    jobs = JobApp(sessionmaker(engine_of(os.environ[URL_OF])))
    jobs.handler(Noop)(noop)
    jobs.handler(Limited)(limited)
    jobs.handler(Insert)(insert)
    jobs.handler(LimitedInsert)(insert)
    jobs.handler(RatedInsert)(insert)
    jobs.handler(Burn)(burn)
    jobs.handler(Nap)(nap)
    jobs.handler(Tick)(tick)
