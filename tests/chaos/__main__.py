"""Chaos: workers and enqueuing transactions under random faults, and an audit of what became of every job.

    python -m tests.chaos --database postgresql --seconds 60 --seed 1

It starts a server of its own (PostgreSQL from the wheel, MariaDB if `mariadbd` is installed, an SQLite file), several
worker processes that reach it through a TCP proxy, and a stream of transactions that enqueue, of which some roll back. Meanwhile
it kills workers, stops and continues them, ends server connections, cuts and delays connections, and restarts the
server; and some jobs kill their own worker. Then it lets everything settle, plays a few rounds in which nothing is in
the way, audits, prints one table and exits non-zero on any violation.

    kinds.py     the payloads: what may be enqueued
    app.py       what the workers run: handlers that write what they did, in the database and in a diary beside it
    rows.py      the application's tables
    diary.py     what the workers write down beside the database
    signs.py     what the processes tell one another beside the database
    load.py      the transactions that enqueue, requeue, cancel and refer to jobs, and add and change schedules
    operator.py  who pauses and resumes queues and kinds, and sets how much of a queue may run
    servers.py   the servers, and how they are restarted
    faults.py    what is done to workers, connections and servers
    rounds.py    what is tried when all is quiet, with the bounds on its times
    books.py     rows, diaries and transactions, put in order
    audit.py     what must be true at the end
    flow.py      the same of limits, pauses and schedules
    figures.py   times, which are only printed
"""

import contextlib
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import click
from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session

import sqlalchemy_jobs
from sqlalchemy_jobs import Job
from tests.chaos import audit, figures, flow
from tests.chaos.books import Books
from tests.chaos.faults import Faults, Workers
from tests.chaos.load import Load, Onlooker
from tests.chaos.operator import Operator
from tests.chaos.rounds import Rounds
from tests.chaos.rows import Base, make_engine
from tests.chaos.servers import SERVERS, Remote, Server
from tests.chaos.signs import CALM
from tests.proxy import Proxy


@click.command()
@click.option(
    "--database", type=click.Choice(list(SERVERS)), default="postgresql", show_default=True
)
@click.option(
    "--seconds", type=float, default=60, show_default=True, help="How long faults are made."
)
@click.option(
    "--seed", type=int, default=None, help="Of what is done, and when. Default: a new one."
)
@click.option("--workers", "count", type=int, default=3, show_default=True)
@click.option("--slots", type=int, default=6, show_default=True, help="Of each worker.")
@click.option("--lease", type=float, default=5, show_default=True, help="Seconds.")
@click.option(
    "--rate", type=float, default=None, help="Transactions per second. Default: 20, on SQLite 4."
)
def main(
    database: str,
    seconds: float,
    seed: int | None,
    count: int,
    slots: int,
    lease: float,
    rate: float | None,
) -> None:
    """Run workers under faults, and audit what became of every job."""
    seed = random.randrange(10_000) if seed is None else seed
    random.seed(seed)  # the proxy's choices
    folder = Path(tempfile.mkdtemp(prefix="sajobs-chaos-"))
    print(f"{database}, seed {seed}, {seconds:g} s of faults; logs in {folder}", flush=True)
    with contextlib.closing(SERVERS[database]()) as server:
        engine = _tables(server)
        proxy = Proxy(server.url) if isinstance(server, Remote) else None
        options = ["--lease", f"{lease:g}", "--shutdown-timeout", "2"]
        operator = Operator(server.url, seed, 2.5)
        workers = Workers(proxy.url if proxy else server.url, folder, slots, options)
        for _ in range(count):
            workers.start()
        through = [server.url, proxy.url] if proxy else [server.url]
        load = Load(through, seed, rate or (20 if proxy else 4))
        onlooker = Onlooker(server.url, seed, folder, 0.5 if proxy else 1, load)
        faults = Faults(workers, server, proxy, seed, lease)
        time.sleep(seconds)
        faults.stop()
        load.stop()
        onlooker.stop()
        operator.stop()
        (folder / CALM).touch()
        calm_at = time.time()
        rounds = Rounds(engine, workers, operator, lease)
        settled_in = rounds.settle()
        with Session(engine) as session:
            unpruned = session.scalar(select(func.count()).where(Job.kind == "brief")) or 0
        if not rounds.violations:
            rounds.play()
        rounds.wait_for_pruning()
        workers.end()
        transactions = [*load.transactions, *onlooker.transactions, *operator.transactions]
        books = Books.read(engine, folder, transactions, calm_at)
        found = [
            *rounds.violations,
            *onlooker.seen,
            *(f"a transaction failed: {error!r}" for error in load.errors),
            *audit.violations(books, workers.died()),
            *flow.violations(books, faults.longest_stall),
        ]
        engine.dispose()
        operator.close()
    rows = [
        *_jobs(books),
        ("  pruned under faults", _count(books, "brief") - unpruned),
        *_counted("transactions", (each.fate for each in books.transactions)),
        ("keys found taken", sum(len(each.others) for each in books.transactions)),
        ("  with an exception", sum(each.refused for each in books.transactions)),
        ("jobs requeued", len(books.requeued)),
        ("runs that began", len(books.starts)),
        *_counted("runs that did not succeed", (each.outcome for each in books.attempts)),
        *_counted("ticks that have a job", flow.schedules(books)),
        *_counted("runs under limits", (run.job.kind for run in books.held if run.job.limit_key)),
        ("most at once of a key", figures.most_at_once(books)),
        *_counted(
            "changes at run time",
            (
                name.split()[0]
                for each in books.transactions
                for name in each.changes
                if each.id in books.intents
            ),
        ),
        *_counted("faults", [*faults.done.elements(), *["poison"] * len(books.poisoned)]),
        *_times("recoveries under faults", figures.recoveries(books, workers.ended)),
        *_times("recoveries in quiet", rounds.recovered),
        *_times("cancels heard under faults", figures.learned(books, onlooker.cancelled_at)),
        *_times("cancels heard in quiet", rounds.learned),
        *_times("waits after a second crash", figures.suspects_waited(books)),
        ("settled in", f"{settled_in:.1f} s"),
        ("violations", len(found)),
    ]
    for name, value in rows:
        print(f"{name:<28} {value:>24}")
    for each in found[:50]:
        print("VIOLATION:", each)
    if found:
        raise SystemExit(1)
    shutil.rmtree(folder)


def _tables(server: Server) -> Engine:
    engine = make_engine(server.url, pool_pre_ping=True)
    sqlalchemy_jobs.metadata.create_all(engine)
    Base.metadata.create_all(engine)
    return engine


Row = tuple[str, object]


def _jobs(books: Books) -> Iterator[Row]:
    states = [
        str(books.jobs[job_id].state) if job_id in books.jobs else "deleted"
        for job_id in books.kinds
    ]
    return _counted("jobs", states)


def _count(books: Books, kind: str) -> int:
    return list(books.kinds.values()).count(kind)


def _counted(name: str, found: Iterable[str]) -> Iterator[Row]:
    count = Counter(found)
    yield name, count.total()
    yield from ((f"  {each}", n) for each, n in sorted(count.items()))


def _times(name: str, seconds: list[float]) -> Iterator[Row]:
    yield name, len(seconds)
    yield "  p50 / p95 / max", figures.spread(seconds)


main()
