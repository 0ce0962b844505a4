"""What does a job cost beside the work that its handler does in the database?

The handler inserts one ORM row. The bare loops insert the same row and commit, in as many threads or tasks as the
worker has slots.
"""

import asyncio
import time
from collections.abc import Iterator
from functools import partial

from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from benchmarks.app import Entry, Insert
from benchmarks.common import (
    Database,
    Options,
    Results,
    alternate,
    database,
    drain_ours,
    in_threads,
    machine,
    main,
    postgresql,
)

SLOTS = 10


def work(database: Database, count: int, colour: str) -> float:
    slots = ("--concurrency", str(SLOTS))
    return drain_ours(database, count, Insert, colour, *slots).rate


def threads(database: Database, count: int) -> float:
    database.empty()
    database.settle()

    def insert(number: int) -> None:
        for n in range(number, count, SLOTS):
            with Session(database.engine) as session:
                session.add(Entry(number=n))
                session.commit()

    return count / in_threads(SLOTS, insert)


def tasks(database: Database, count: int) -> float:
    database.empty()
    database.settle()
    return asyncio.run(_tasks(database, count))


async def _tasks(database: Database, count: int) -> float:
    engine = create_async_engine(database.url, pool_size=SLOTS)

    async def insert(number: int) -> None:
        for n in range(number, count, SLOTS):
            async with AsyncSession(engine) as session:
                session.add(Entry(number=n))
                await session.commit()

    began = time.perf_counter()
    await asyncio.gather(*(insert(number) for number in range(SLOTS)))
    seconds = time.perf_counter() - began
    await engine.dispose()
    return count / seconds


def answer(options: Options) -> Iterator[Results]:
    count = options.size(5_000, 200)
    with postgresql(options) as server, database(server) as ours:
        for warm_up in (threads, tasks):
            warm_up(ours, SLOTS)
        measured = alternate(
            options.rounds,
            {
                "def": partial(work, ours, count, "sync"),
                "threads": partial(threads, ours, count),
                "tasks": partial(tasks, ours, count),
                "async def": partial(work, ours, count, "async"),
            },
        )
        table = Results(
            f"handlers: drain {count:,} jobs that insert an ORM row, {SLOTS} at once",
            "Against the same insert and commit without jobs, by as many threads or tasks.",
            machine(options, ours.engine, "psycopg"),
        )
    table.compare("`def`, threads", measured["def"], measured["threads"], "/s", wanted=0.8)
    table.compare("`async def`, tasks", measured["async def"], measured["tasks"], "/s", wanted=0.8)
    yield table


if __name__ == "__main__":
    main(answer, __doc__)
