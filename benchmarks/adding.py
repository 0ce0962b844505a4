"""What does `session.add(enqueue(...))` and commit cost, against a plain ORM row with the same columns?

Each client is a process; it does the one or the other in a random order, so that both see the same moments. An
idle worker does each job at once; a busy one has its hands full, and a queue of others before them.
"""

import itertools
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from sqlalchemy import Index, MetaData, PrimaryKeyConstraint, Table, create_engine, delete, inspect
from sqlalchemy.orm import DeclarativeBase, Session
from sqlalchemy.sql.elements import quoted_name

from benchmarks.app import NEVER, Nap, Noop
from benchmarks.common import (
    Database,
    Options,
    Results,
    database,
    machine,
    main,
    postgresql,
    worker,
)
from sqlalchemy_jobs import Job, enqueue

WARM_UP = 20
BACKLOG = 20_000


class PlainBase(DeclarativeBase):
    metadata = MetaData()
    # Like ours: every column has a default, so nothing has to be read back.
    __mapper_args__ = {"eager_defaults": False}  # noqa: RUF012 (SQLAlchemy's interface)


def _like_ours() -> Table:
    """Return a table with the columns and the indexes of ours, and without its way to insert."""
    name = "bench_plain"
    table = inspect(Job).local_table
    assert isinstance(table, Table)
    copied = table.to_metadata(PlainBase.metadata, name=name)
    named: tuple[PrimaryKeyConstraint | Index, ...] = (copied.primary_key, *copied.indexes)
    for each in named:
        each.name = quoted_name(str(each.name).replace(table.name, name), None)
    return copied


TABLE = _like_ours()


class Plain(PlainBase):
    """A row with the columns and the indexes of a job."""

    __table__ = TABLE


def plain(n: int) -> Plain:
    return Plain(kind="noop", payload={"n": n})


def job(n: int) -> Job:
    return enqueue(Noop(n))


def client(url: str, count: int) -> tuple[float, float]:
    """Add so many of each; return the seconds that one took on the average, jobs and plain rows."""
    random.seed(os.getpid())
    engine = create_engine(url)
    both: tuple[Callable[[int], Any], ...] = (job, plain)
    turns = [*itertools.chain.from_iterable([each] * count for each in both)]
    random.shuffle(turns)
    spent = dict.fromkeys(both, 0.0)
    for number, make in enumerate([*both * WARM_UP, *turns], -WARM_UP * 2):
        began = time.perf_counter()
        with Session(engine) as session:
            session.add(make(number))
            session.commit()
        if number >= 0:
            spent[make] += time.perf_counter() - began
    engine.dispose()
    return spent[job] / count, spent[plain] / count


def measure(database: Database, clients: int, count: int, busy: bool) -> tuple[float, float]:
    """Return how many a second one client adds, jobs and plain rows."""
    database.empty()
    with database.engine.begin() as connection:
        connection.execute(delete(Plain))
    if busy:
        database.multiply(enqueue(Nap(0)), BACKLOG)
    database.settle()
    url = database.url.render_as_string(hide_password=False)
    with worker(database, count=NEVER) as process:
        database.wait_for_workers(1)
        if busy:
            process.wait_for("first")
        with multiprocessing.get_context("spawn").Pool(clients) as pool:
            seconds = pool.starmap(client, [(url, count // clients)] * clients, chunksize=1)
    ours, theirs = (statistics.mean(each) for each in zip(*seconds, strict=True))
    return 1 / ours, 1 / theirs


def answer(options: Options) -> Iterator[Results]:
    count = options.size(2_000, 40)
    with postgresql(options) as server, database(server) as ours:
        PlainBase.metadata.create_all(ours.engine)
        table = Results(
            "adding: one job and commit, against one plain ORM row of the same columns",
            "How many a second each client adds.",
            machine(options, ours.engine, "psycopg"),
        )
        for state, clients in itertools.product(("busy", "idle"), (1, 8)):
            rounds = [measure(ours, clients, count, state == "busy") for _ in range(options.rounds)]
            table.compare(
                f"{clients} client{'s' if clients > 1 else ''}, worker {state}",
                [each for each, _ in rounds],
                [each for _, each in rounds],
                "/s",
                wanted=0.92 if state == "busy" else 0.85,
            )
    yield table


if __name__ == "__main__":
    main(answer, __doc__)
