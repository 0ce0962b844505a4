"""The peers: installed by name into a folder, driven by the small programs beside this module.

To repeat it without these benchmarks: `npm install` the packages of `NPM` beside the `.mjs` files, and
`pip install` those of `PIP` into a virtual environment; `node graphile.mjs URL install`, then `fill 20000`, then
`work 20000` says when its first and its last handler ran.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import URL, text

from benchmarks.common import Database, Drained, Options, Process, database, drain

NPM = {"graphile-worker": "0.18.0", "pg-boss": "12.35.0"}
PIP = {"pgqueuer": "1.6.0", "asyncpg": "0.32.0", "uvloop": "0.23.0"}
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Peer:
    """A peer that is installed, with a database of its own."""

    name: str
    command: tuple[str, ...]
    database: Database
    tables: str
    """Which of its tables are emptied before a round."""
    unfinished: str
    """Finds a job that is not done."""

    def start(self, *what: str) -> Process:
        return Process([*self.command, self.database.dsn, *what])

    def do(self, *what: str) -> None:
        process = self.start(*what)
        process.wait_for("done")
        process.wait()

    def left(self) -> bool:
        with self.database.engine.connect() as connection:
            return connection.scalar(text(self.unfinished)) is not None

    def drain(self, count: int) -> Drained:
        with self.database.engine.begin() as connection:
            connection.execute(text(f"TRUNCATE {self.tables}"))
        self.do("fill", str(count))
        self.database.settle()
        return drain(self.start("work", str(count)), count, self.left)


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--peers",
        type=Path,
        metavar="FOLDER",
        help="where they are installed, once; else a temporary one",
    )


@contextmanager
def installed(options: Options, server: URL) -> Iterator[Mapping[str, Peer | str]]:
    """Install each peer and make its database; in place of one that cannot be had: why."""
    with ExitStack() as stack:
        folder = options.extra.peers or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(exist_ok=True, parents=True)
        peers: dict[str, Peer | str] = {}
        for name, find in (
            ("graphile-worker", _graphile),
            ("pg-boss", _pgboss),
            ("pgqueuer", _pgqueuer),
        ):
            try:
                command = find(folder)
            except (OSError, subprocess.CalledProcessError) as error:
                peers[name] = f"not installed: {_reason(error)}"
                print(f"  {name}: {peers[name]}", file=sys.stderr)
                continue
            tables, unfinished = _TABLES[name]
            own = stack.enter_context(database(server))
            peer = Peer(name, command, own, tables, unfinished)
            peer.do("install")
            peers[name] = peer
        yield peers


_TABLES = {
    "graphile-worker": (
        "graphile_worker._private_jobs",
        "SELECT 1 FROM graphile_worker._private_jobs LIMIT 1",
    ),
    "pg-boss": ("pgboss.job", "SELECT 1 FROM pgboss.job WHERE state < 'completed' LIMIT 1"),
    "pgqueuer": ("pgqueuer, pgqueuer_log", "SELECT 1 FROM pgqueuer LIMIT 1"),
}


def _graphile(folder: Path) -> tuple[str, ...]:
    return _node(folder, "graphile-worker", "graphile.mjs")


def _pgboss(folder: Path) -> tuple[str, ...]:
    return _node(folder, "pg-boss", "pgboss.mjs")


def _node(folder: Path, package: str, program: str) -> tuple[str, ...]:
    own = folder / package
    if not (own / "node_modules" / package).exists():
        own.mkdir(exist_ok=True)
        wanted = f"{package}@{NPM[package]}"
        npm = ["npm", "install", "--no-audit", "--no-fund", "--loglevel=error", "--prefix", "."]
        _run([*npm, wanted], own)
    for name in ("harness.mjs", program):  # where the packages are found
        shutil.copy(HERE / name, own)
    return "node", str(own / program)


def _pgqueuer(folder: Path) -> tuple[str, ...]:
    own = folder / "pgqueuer"
    if not (own / "bin" / "pgq").exists():
        venv.create(own, with_pip=True)
        wanted = [f"{name}=={version}" for name, version in PIP.items()]
        _run([str(own / "bin" / "python"), "-m", "pip", "install", "--quiet", *wanted], own)
    return str(own / "bin" / "python"), str(HERE / "pgqueuer_.py")


def _run(command: list[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)


def _reason(error: OSError | subprocess.CalledProcessError) -> str:
    said = (
        error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
    ).strip()
    return said.splitlines()[-1] if said else type(error).__name__
