import contextlib
import random
import shutil
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import click
from sqlalchemy import Engine, create_engine, func, select, update
from sqlalchemy.exc import SQLAlchemyError

import sqlalchemy_jobs
from sqlalchemy_jobs import Job, sqlite
from tests.chaos import audit
from tests.chaos.app import Base
from tests.chaos.faults import Faults, Workers
from tests.chaos.load import Load
from tests.chaos.servers import SERVERS, Remote, Server
from tests.proxy import Proxy

UNFINISHED = ("ready", "running", "blocked")


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
@click.option("--lease", type=float, default=5, show_default=True, help="Seconds.")
@click.option(
    "--rate", type=float, default=None, help="Transactions per second. Default: 20, on SQLite 4."
)
def main(
    database: str, seconds: float, seed: int | None, count: int, lease: float, rate: float | None
) -> None:
    """Run workers under faults, and audit what became of every job."""
    seed = random.randrange(10_000) if seed is None else seed
    folder = Path(tempfile.mkdtemp(prefix="sajobs-chaos-"))
    print(f"{database}, seed {seed}, {seconds:g} s of faults; logs in {folder}", flush=True)
    with contextlib.closing(SERVERS[database]()) as server:
        engine = _tables(server)
        proxy = Proxy(server.url) if isinstance(server, Remote) else None
        options = ["--lease", f"{lease:g}", "--shutdown-timeout", "2", "--concurrency", "6"]
        workers = Workers(proxy.url if proxy else server.url, folder, options)
        for _ in range(count):
            workers.start()
        through = [server.url, proxy.url] if proxy else [server.url]
        load = Load(through, seed, rate or (20 if proxy else 4))
        faults = Faults(workers, server, proxy, seed, lease)
        time.sleep(seconds)
        faults.stop()
        load.stop()
        settled_in = _settle(engine, lease)
        for process in list(workers.alive):
            workers.stop(process)
        books = audit.Books(engine, folder)
        died = workers.died()
        found = audit.violations(books, load.transactions, died)
        _print(books, load, faults, workers, settled_in, found)
        engine.dispose()
    if found:
        raise SystemExit(1)
    shutil.rmtree(folder)


def _tables(server: Server) -> Engine:
    engine = create_engine(server.url, pool_pre_ping=True)
    if engine.dialect.name == "sqlite":
        sqlite.configure(engine)
    sqlalchemy_jobs.metadata.create_all(engine)
    Base.metadata.create_all(engine)
    return engine


def _settle(engine: Engine, lease: float) -> float | None:
    """Wait until every job is final; what waits for a retry is made due. None: it did not come to that."""
    began = time.monotonic()
    while time.monotonic() < began + 300 + 4 * lease:
        with contextlib.suppress(SQLAlchemyError), engine.begin() as connection:
            unfinished = select(func.count()).where(Job.state.in_(UNFINISHED))
            if connection.scalar(unfinished) == 0:
                return time.monotonic() - began
            # Nobody waits for the backoff of a job whose workers were killed again and again.
            now = datetime.now(UTC)
            connection.execute(
                update(Job).where(Job.state == "ready", Job.run_at > now).values(run_at=now)
            )
        time.sleep(0.5)
    return None


def _print(
    books: audit.Books,
    load: Load,
    faults: Faults,
    workers: Workers,
    settled_in: float | None,
    found: list[str],
) -> None:
    recovered = audit.recoveries(books, workers.ended)
    rows = [
        ("jobs", str(len(books.jobs))),
        *(
            (f"  {state}", str(n))
            for state, n in sorted(Counter(j.state for j in books.jobs.values()).items())
        ),
        ("transactions", str(len(load.transactions))),
        *(
            (f"  {fate}", str(n))
            for fate, n in sorted(Counter(t.fate for t in load.transactions).items())
        ),
        ("runs that began", str(len(books.starts))),
        ("runs that did not succeed", str(len(books.attempts))),
        *(
            (f"  {outcome}", str(n))
            for outcome, n in sorted(Counter(a.outcome for a in books.attempts).items())
        ),
        ("faults", str(faults.done.total())),
        *((f"  {kind}", str(n)) for kind, n in sorted(faults.done.items())),
        ("recoveries after a kill", str(len(recovered))),
        ("  p50 / p95 / max", _spread(recovered)),
        ("settled in", "not at all" if settled_in is None else f"{settled_in:.1f} s"),
        ("violations", str(len(found))),
    ]
    for name, value in rows:
        print(f"{name:<28} {value:>24}")
    for each in found[:50]:
        print("VIOLATION:", each)


def _spread(seconds: list[float]) -> str:
    if not seconds:
        return "-"
    at = [seconds[min(int(len(seconds) * part), len(seconds) - 1)] for part in (0.5, 0.95, 1)]
    return " / ".join(f"{each:.2f} s" for each in at)


main()
