"""Does the drain rate hold with a million jobs in the table, or under a snapshot that stays open?

Two databases on one server: in one lies what may be in the way, the other is without. In turns 20k jobs that are due
before everything else are added and drained, and their rows deleted again. `--million 10` for ten million.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from functools import partial

from sqlalchemy import URL, delete, text

from benchmarks.app import Noop
from benchmarks.common import (
    Database,
    Options,
    Results,
    alternate,
    database,
    drain,
    machine,
    main,
    postgresql,
    worker,
)
from sqlalchemy_jobs import Job, JobState, enqueue
from sqlalchemy_jobs.models import utcnow

Burden = Callable[[Database, int], AbstractContextManager[None]]


def head(database: Database, count: int) -> float:
    """Drain so many jobs that are due before all others; return the rate."""
    with database.engine.begin() as connection:
        connection.execute(delete(Job).where(Job.state == JobState.SUCCEEDED))
    database.fill([Noop(n) for n in range(count)], run_at=utcnow() - timedelta(days=1))
    database.settle()
    # Not until the table is empty: until these were run. What the worker does beyond them is left out.
    return drain(worker(database, count=count), count, lambda: False).rate


def due(database: Database, count: int) -> AbstractContextManager[None]:
    database.multiply(enqueue(Noop(0), run_at=utcnow() - timedelta(hours=1)), count)
    return nullcontext()


def scheduled(database: Database, count: int) -> AbstractContextManager[None]:
    tomorrow = utcnow() + timedelta(days=1)
    database.multiply(enqueue(Noop(0), run_at=tomorrow, priority=-10), count)
    return nullcontext()


def churn(database: Database, count: int) -> None:
    """Have so many jobs done, as a worker does them."""
    database.multiply(enqueue(Noop(0)), count)
    drain(worker(database, "--drain", count=count), count, database.left)


@contextmanager
def pinned(database: Database, count: int) -> Iterator[None]:
    with database.engine.connect() as snapshot:
        snapshot.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
        snapshot.execute(text("SELECT 1"))
        churn(database, count)
        yield


@contextmanager
def unpinned(database: Database, count: int) -> Iterator[None]:
    churn(database, count)
    yield


def nothing(database: Database, count: int) -> AbstractContextManager[None]:
    return nullcontext()


def compare(
    options: Options,
    server: URL,
    what: str,
    burden: Burden,
    without: Burden,
    most: int,
    wanted: float,
) -> Results:
    count = options.size(20_000, 300)
    with ExitStack() as stack:
        sides = {}
        for name, put in (("with", burden), ("without", without)):
            side = stack.enter_context(database(server))
            stack.enter_context(put(side, most))
            side.settle()
            sides[name] = side
        variants = {name: partial(head, side, count) for name, side in sides.items()}
        measured = alternate(options.rounds, variants)
        table = Results(
            f"backlog: {what}",
            f"Drain rate of {count:,} no-op jobs by one worker, against the same without.",
            machine(options, sides["with"].engine, "psycopg"),
        )
    table.compare(what, measured["with"], measured["without"], "/s", wanted=wanted)
    return table


def answer(options: Options) -> Iterator[Results]:
    most = options.size(options.extra.million * 1_000_000, 2_000)
    churned = options.size(300_000, 2_000)
    cases: dict[str, tuple[str, Burden, Burden, int, float]] = {
        "due": (f"{most:,} due jobs behind", due, nothing, most, 0.95),
        "scheduled": (
            f"{most:,} scheduled for later at a better priority",
            scheduled,
            nothing,
            most,
            0.95,
        ),
        "pinned": (
            f"a pinned snapshot after {churned:,} churned jobs",
            pinned,
            unpinned,
            churned,
            0.85,
        ),
    }
    with postgresql(options) as server:
        for name, case in cases.items():
            if options.extra.only in (None, name):
                yield compare(options, server, *case)


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--million", type=int, default=1, metavar="N", help="how many millions behind"
    )
    parser.add_argument("--only", choices=("due", "scheduled", "pinned"))


if __name__ == "__main__":
    main(answer, __doc__, add)
