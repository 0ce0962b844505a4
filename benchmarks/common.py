"""What the benchmarks share: servers, worker processes, alternating rounds, and the tables that they print.

Each program answers one question: `python -m benchmarks.limit`, and `python -m benchmarks` runs all. What is
compared is run in turns, in a database of its own on one server, so that both sides see the same
machine; only the ratios of one run mean something.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import queue
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Engine, NullPool, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import Session

import sqlalchemy_jobs
from benchmarks.app import COLOUR, COUNT_OF, TRACE, URL_OF, Base, Noop
from sqlalchemy_jobs import Job, WorkerRow, enqueue_many

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "RESULTS.md"
PATIENCE = 1800.0
"""Seconds after which what does not come is taken for broken."""
LOAD = os.getloadavg()[0]
"""How many others wanted a core before we began."""


# ------------------------------------------------------------------------------------ the command


@dataclass
class Options:
    """What every program is told."""

    url: str | None
    rounds: int
    quick: bool
    extra: argparse.Namespace

    def size(self, full: int, quick: int) -> int:
        return quick if self.quick else full


Question = Callable[[Options], Iterable["Results"]]


def main(
    answer: Question,
    about: str | None,
    add: Callable[[argparse.ArgumentParser], None] | None = None,
) -> None:
    """Run a program: print its tables, and with --write put them into RESULTS.md."""
    parser = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    parser.add_argument("--url", help="of a PostgreSQL where databases can be created")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it work at all?")
    parser.add_argument("--write", action="store_true", help=f"write into {RESULTS.name}")
    if add is not None:
        add(parser)
    given = parser.parse_args()
    if given.write and given.quick:
        parser.error("what --quick measures is not a result")
    for table in answer(Options(given.url, given.rounds, given.quick, given)):
        print(table.text, flush=True)
        if given.write:
            write(table)


# ------------------------------------------------------------------------------------ the servers


@contextmanager
def postgresql(options: Options) -> Iterator[URL]:
    """The server of --url or SAJOBS_BENCH_POSTGRESQL_URL, else one at 127.0.0.1, else one from a wheel."""
    local = "postgresql+psycopg://postgres@127.0.0.1:5432/postgres"
    given = options.url or os.environ.get("SAJOBS_BENCH_POSTGRESQL_URL")
    url = make_url(given or local).set(drivername="postgresql+psycopg")
    if given or answers(url):
        yield url
        return
    from tests.databases import EmbeddedPostgres

    class Durable(EmbeddedPostgres):
        SETTINGS = "max_connections = 200"

    server = Durable()
    try:
        yield server.url
    finally:
        server.close()


def answers(url: URL) -> bool:
    try:
        create_engine(url, poolclass=NullPool).connect().close()
    except OperationalError:
        return False
    return True


@contextmanager
def created(server: URL) -> Iterator[URL]:
    """CREATE DATABASE under a random name, DROP DATABASE at the end."""
    name = f"sajobs_bench_{secrets.token_hex(6)}"
    force = " WITH (FORCE)" if server.get_backend_name() == "postgresql" else ""
    admin = create_engine(server, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    try:
        yield server.set(database=name)
    finally:
        with admin.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name}{force}"))


@dataclass(frozen=True)
class Database:
    """A new database with our tables, and what the benchmarks do to it."""

    url: URL
    engine: Engine

    @property
    def dsn(self) -> str:
        """The address in libpq's form, as psycopg and the peers take it."""
        plain = self.url.set(drivername="postgresql")
        return plain.render_as_string(hide_password=False)

    def fill(self, payloads: Iterable[Any], **options: Any) -> None:
        with Session(self.engine) as session, session.begin():
            enqueue_many(session, payloads, **options)

    def multiply(self, job: Job, count: int) -> None:
        """Add copies of a job, each due a microsecond after the other; for millions of them."""
        with Session(self.engine) as session, session.begin():
            session.add(job)
            session.flush()
            copied = [c.name for c in Job.__table__.columns if c.name not in ("id", "run_at")]
            session.execute(
                text(f"""
                    INSERT INTO sajobs_job (id, run_at, {", ".join(copied)})
                    SELECT CAST(lpad(to_hex(n), 12, '0') || '7' || substr(md5(CAST(n AS text)), 1, 3)
                        || '8' || substr(md5(CAST(n AS text)), 4, 15) AS uuid),
                      run_at + n * interval '1 microsecond', {", ".join(copied)}
                    FROM sajobs_job, generate_series(CAST(1 AS bigint), {count - 1}) n
                    WHERE id = :id
                """),
                {"id": job.id},
            )

    def settle(self) -> None:
        """Do now what the server would do in the background, to both sides alike."""
        autocommit = self.engine.execution_options(isolation_level="AUTOCOMMIT")
        if self.engine.dialect.name != "postgresql":
            return
        with autocommit.connect() as connection:
            connection.execute(text("VACUUM (ANALYZE)"))
            with suppress(DBAPIError):  # it may not be ours to ask for
                connection.execute(text("CHECKPOINT"))

    def empty(self) -> None:
        """Delete every row; no worker runs."""
        fast = self.engine.dialect.name == "postgresql"
        tables = [*reversed(sqlalchemy_jobs.metadata.sorted_tables), *Base.metadata.sorted_tables]
        with self.engine.begin() as connection:
            if fast:
                names = ", ".join(table.name for table in tables)
                connection.execute(text(f"TRUNCATE {names}"))
            for table in tables if not fast else ():
                connection.execute(table.delete())

    def left(self) -> bool:
        """Tell whether a job is ready or running."""
        query = "SELECT 1 FROM sajobs_job WHERE state IN ('ready', 'running') LIMIT 1"
        with self.engine.connect() as connection:
            return connection.scalar(text(query)) is not None

    def wait_for_workers(self, count: int) -> None:
        def alive() -> bool:
            with Session(self.engine) as session:
                return session.query(WorkerRow).filter_by(state="alive").count() >= count

        wait_until(alive, 0.05)


@contextmanager
def database(server: URL) -> Iterator[Database]:
    """A Database on PostgreSQL or MariaDB, or with a URL of SQLite in a file of its own."""
    with ExitStack() as stack:
        if server.get_backend_name() == "sqlite":
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            url = server.set(database=str(Path(folder) / "jobs.sqlite"))
        else:
            url = stack.enter_context(created(server))
        engine = create_engine(url, pool_size=20)
        stack.callback(engine.dispose)
        if engine.dialect.name == "sqlite":
            sqlalchemy_jobs.sqlite.configure(engine)
        sqlalchemy_jobs.metadata.create_all(engine)
        Base.metadata.create_all(engine)
        yield Database(url, engine)


# ------------------------------------------------------------------------------- the processes


class Process:
    """A process that says what happens, one JSON object a line; what it writes to stderr is ours too."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout:
            for line in self._process.stdout:
                if line.startswith("{"):
                    self._events.put(json.loads(line))
        self._events.put(None)

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_for(self, event: str) -> dict[str, Any]:
        """Wait for what it says; skips everything else."""
        while (said := self._events.get(timeout=PATIENCE)) is not None:
            if said["event"] == event:
                return said
        raise RuntimeError(f"{self._process.args!r} ended before it said {event!r}")

    def send(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def wait(self) -> None:
        if status := self._process.wait(PATIENCE):
            raise RuntimeError(f"{self._process.args!r} ended with status {status}")

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        """Ask it to end, as a deployment does, and insist after a while."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def worker(database: Database, *options: str, count: int = TRACE, colour: str = "sync") -> Process:
    """Start `sajobs worker`; after so many runs it says "last"."""
    command = [sys.executable, "-m", "sqlalchemy_jobs", "worker", "--app", "benchmarks.app:jobs"]
    url = database.url.render_as_string(hide_password=False)
    return Process(
        [*command, "--log-level", "error", *options],
        {URL_OF: url, COUNT_OF: str(count), COLOUR: colour},
    )


@dataclass
class Drained:
    """How a worker did its jobs: from the first call of a handler until the last job is written down."""

    rate: float
    """Jobs a second."""
    cpu: float
    """Microseconds of its process for each job, user and system."""


def drain(process: Process, count: int, left: Callable[[], bool]) -> Drained:
    """Watch a worker process do so many jobs."""
    with process:
        first = process.wait_for("first")
        last = process.wait_for("last")
        wait_until(lambda: not left(), 0.002)
        seconds = time.time() - first["at"]
    return Drained(count / seconds, (last["cpu"] - first["cpu"]) / count * 1e6)


def drain_ours(
    database: Database, count: int, payload: type[Any] = Noop, colour: str = "sync", *options: str
) -> Drained:
    """Fill our table with so many jobs and drain them by one worker process with default settings."""
    database.empty()
    database.fill([payload(n) for n in range(count)])
    database.settle()
    process = worker(database, "--drain", *options, count=count, colour=colour)
    return drain(process, count, database.left)


def wait_until(condition: Callable[[], bool], pause: float) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("it did not come to its end")
        time.sleep(pause)


def pss(pid: int) -> float:
    """Return the memory of a process in MiB, its share of what it shares included; on Linux."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no Pss")


# ---------------------------------------------------------------------------------- the rounds

Measured = dict[str, list[Any]]


def alternate(
    rounds: int, variants: Mapping[str, Callable[[], Any]], *, quiet: bool = False
) -> Measured:
    """Measure each variant once a round, there and back again."""
    measured: Measured = {name: [] for name in variants}
    for number in range(rounds):
        for name in list(variants) if number % 2 == 0 else reversed(list(variants)):
            measured[name].append(variants[name]())
            if not quiet:
                said = f"  {number + 1}/{rounds} {name}: {measured[name][-1]}"
                print(said, file=sys.stderr, flush=True)
    return measured


def in_threads(count: int, work: Callable[[int], object]) -> float:
    """Call ``work`` in so many threads; return the seconds until all are done."""
    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(n,)) for n in range(count)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return time.perf_counter() - started


# ---------------------------------------------------------------------------------- the tables


@dataclass
class Results:
    """The answer to one question."""

    title: str
    about: str
    machine: str
    lines: list[str] = field(default_factory=list)

    def compare(
        self,
        what: str,
        ours: Sequence[float],
        theirs: Sequence[float],
        unit: str,
        *,
        wanted: float | None = None,
        lower: bool = False,
    ) -> None:
        """Add a line with the ratio of each round: more than 1 is better than what it is compared with."""
        pairs = zip(ours, theirs, strict=True)
        ratios = [b / a if lower else a / b for a, b in pairs]
        self._line(
            what,
            f"{number(ours)} {unit}",
            f"{number(theirs)} {unit}",
            f"**{statistics.median(ratios):.2f}**",
            f"{min(ratios):.2f}..{max(ratios):.2f}",
            "" if wanted is None else f"{wanted:g}",
        )

    def value(self, what: str, values: Sequence[float], unit: str, *, most: str = "") -> None:
        """Add a line that is compared with nothing."""
        self._line(what, f"{number(values)} {unit}", "", "", f"{spread(values)}", most)

    def note(self, what: str, words: str) -> None:
        self._line(what, words, "", "", "", "")

    def _line(self, *cells: str) -> None:
        self.lines.append(f"| {' | '.join(cells)} |")

    @property
    def text(self) -> str:
        head = "| what | measured | against | ratio | spread | wanted |\n|---|---|---|---|---|---|"
        return "\n".join(
            (f"## {self.title}\n", f"{self.about}\n", f"{self.machine}\n", head, *self.lines, "")
        )


def number(values: Sequence[float]) -> str:
    return _short(statistics.median(values))


def spread(values: Sequence[float]) -> str:
    return f"{_short(min(values))}..{_short(max(values))}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def machine(options: Options, engine: Engine, *packages: str) -> str:
    """Describe where it was measured, without names."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("sqlalchemy", *packages)]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return ", ".join(
        (
            f"{date.today()}",  # noqa: DTZ011 (the reader's calendar)
            f"{options.rounds} rounds{', small sizes' if options.quick else ''}",
            f"{os.cpu_count()} cores (load before it {LOAD:.1f})",
            f"{memory:.0f} GiB",
            f"{platform.system()} {platform.machine()}",
            f"Python {platform.python_version()}",
            *versions,
            _server(engine),
        )
    )


def _server(engine: Engine) -> str:
    with engine.connect() as connection:
        name, version = engine.dialect.name, engine.dialect.server_version_info or ()
        if name == "sqlite":
            return f"SQLite {connection.scalar(text('SELECT sqlite_version()'))}"
        label = "PostgreSQL" if name == "postgresql" else "MariaDB or MySQL"
        described = f"{label} {'.'.join(map(str, version))}"
        if name == "postgresql":
            settings = ("fsync", "synchronous_commit", "autovacuum", "shared_buffers")
            shown = [f"{each} {connection.scalar(text(f'SHOW {each}'))}" for each in settings]
            described += f" ({', '.join(shown)})"
    return described


def write(table: Results) -> None:
    """Put a table into RESULTS.md, in place of the one with its title."""
    before = RESULTS.read_text() if RESULTS.exists() else "# Results\n"
    head, *sections = before.split("\n## ")
    kept = {section.partition("\n")[0]: f"## {section.strip()}\n" for section in sections}
    kept[table.title] = table.text
    RESULTS.write_text("\n".join((f"{head.strip()}\n", *kept.values())))
