"""``make demo``: a shop takes 400 orders and mails the receipts, and a worker is killed on the way.

Every line that it prints with a $ is a command that you could type, and a process of its own. This file only
starts and kills them, plays the mail server, and looks on. The shop is in ``shop/``.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
from asyncio.subprocess import Process
from collections.abc import Callable
from contextlib import suppress
from mailbox import Maildir
from pathlib import Path
from typing import Any, NamedTuple

from aiosmtpd.smtp import SMTP
from sqlalchemy import URL, Engine, NullPool, create_engine, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

# The jobs of a killed worker come back when its lease has passed. Two seconds, so that nobody has to wait;
# in production keep the default of 30: a worker that is only slow shall not be taken for dead.
WORKER = "sajobs worker --app shop.jobs:jobs --lease 2"

KILL_AT = 100
"""The first worker dies while it delivers this mail."""

TIMEOUT = 200
"""Seconds after which something must be wrong: all takes about ten."""


async def demo(url: URL, folder: Path, *, keep: bool) -> int:
    """Tell the story; return the status of the audit."""
    cancel_on(signal.SIGINT, signal.SIGTERM)
    screen, inbox = Screen(), Inbox(folder / "mails")
    look = Onlooker(url, inbox, screen)
    smtp = await inbox.serve()
    shell = Shell(screen, folder, SHOP_DATABASE_URL=in_full(url), SHOP_SMTP=smtp)
    if status := await shell.run("python -m shop.database create"):
        return status
    try:
        async with asyncio.timeout(TIMEOUT):
            first = await shell.start("worker 1", WORKER, ends_with=-signal.SIGKILL)
            inbox.victim = first
            app = await shell.start("application", "python -m shop.app orders.csv")
            await look.until(lambda now: shell.has_ended(first))
            screen.say(
                f"$ kill -KILL {first.pid}   # mail {KILL_AT} was out, and not yet committed"
            )

            second = await shell.start("worker 2", WORKER)
            await look.until(lambda now: shell.has_ended(app) and now.open_jobs == 0)
            screen.say(f"$ kill -TERM {second.pid}")
            second.terminate()
            await look.until(lambda now: shell.has_ended(second))
        return await shell.run(f"python -m shop.audit orders.csv {shlex.quote(str(inbox.folder))}")
    except TimeoutError:
        raise Failed(f"not done after {TIMEOUT} s: try --keep, and look at the logs") from None
    finally:
        await shell.kill_all()
        inbox.close()
        if not keep:
            await shell.run("python -m shop.database drop", quiet=True)


class Failed(Exception):
    """The demo cannot come to its end."""


def cancel_on(*signals: signal.Signals) -> None:
    """Have what goes on cancelled, so that it cleans up, instead of this process ended."""
    task = asyncio.current_task()
    assert task is not None
    for each in signals:
        asyncio.get_running_loop().add_signal_handler(each, task.cancel)


# --- the mail server ------------------------------------------------------------------------------


class Inbox:
    """Keeps every mail that comes in, and kills a worker at the worst moment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0
        self.victim: Process | None = None
        self._maildir = Maildir(folder)

    async def serve(self) -> str:
        """Listen on a free port of the loopback interface; return HOST:PORT."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: SMTP(self, hostname="localhost", loop=loop), "127.0.0.1", 0
        )
        self._server = server
        return "{}:{}".format(*server.sockets[0].getsockname())

    def close(self) -> None:
        self._server.close()

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802
        self._maildir.add(envelope.content)
        self.count += 1
        if self.count == KILL_AT and self.victim:
            # The worker has sent the mail and waits for our answer; nothing is committed yet.
            self.victim.kill()
            await self.victim.wait()
        return "250 OK"


# --- the processes --------------------------------------------------------------------------------


class Started(NamedTuple):
    process: Process
    name: str
    log: Path
    ends_with: int


class Shell:
    """Runs commands in the folder of the shop."""

    def __init__(self, screen: Screen, folder: Path, **environment: str) -> None:
        self._screen = screen
        self._folder = folder
        inherited = {key: v for key, v in os.environ.items() if not key.startswith("SAJOBS_")}
        self._environment = inherited | environment
        self._started: list[Started] = []

    async def run(self, command: str, *, quiet: bool = False) -> int:
        """Run a command to its end; return its status."""
        if not quiet:
            self._screen.say(f"$ {command}")
        return await (await self._spawn(command)).wait()

    async def start(self, name: str, command: str, *, ends_with: int = 0) -> Process:
        """Start a command in the background, with a log of its own."""
        path = self._folder / f"{name.replace(' ', '-')}.log"
        with path.open("wb") as log:
            process = await self._spawn(command, stdout=log, stderr=log)
        self._started.append(Started(process, name, path, ends_with))
        self._screen.say(f"$ {command} &   # {name}: process {process.pid}")
        return process

    def has_ended(self, process: Process) -> bool:
        """Tell whether it has ended. Raises: Failed, when this or another ended in an unwanted way."""
        for each in self._started:
            if each.process.returncode not in (None, each.ends_with):
                log = each.log.read_text(errors="replace").splitlines()[-20:]
                status = each.process.returncode
                raise Failed("\n  ".join([f"{each.name} ended with status {status}:", *log]))
        return process.returncode is not None

    async def kill_all(self) -> None:
        for each in self._started:
            with suppress(ProcessLookupError):
                each.process.kill()
            await each.process.wait()

    async def _spawn(self, command: str, **streams: Any) -> Process:
        program, *arguments = shlex.split(command)
        scripts = sysconfig.get_path("scripts")
        path = sys.executable if program == "python" else f"{scripts}/{program}"
        return await asyncio.create_subprocess_exec(
            path, *arguments, cwd=Path(__file__).parent, env=self._environment, **streams
        )


# --- what can be seen from outside ----------------------------------------------------------------


class Counts(NamedTuple):
    orders: int
    receipts: int
    open_jobs: int


class Onlooker:
    """Counts what is in the database and shows it."""

    SQL = text("""
        SELECT (SELECT count(*) FROM shop_order),
               (SELECT count(*) FROM shop_order WHERE receipt_sent_at IS NOT NULL),
               (SELECT count(*) FROM sajobs_job WHERE state IN ('ready', 'running'))
    """)

    def __init__(self, url: URL, inbox: Inbox, screen: Screen) -> None:
        self._engine = connectable(url)
        self._inbox = inbox
        self._screen = screen

    async def until(self, condition: Callable[[Counts], bool]) -> None:
        while True:
            now = await asyncio.to_thread(self._count)
            self._screen.progress(
                f"  {now.orders} orders, {now.receipts} receipts marked, {self._inbox.count} mails"
            )
            if condition(now):
                return
            await asyncio.sleep(0.1)

    def _count(self) -> Counts:
        with self._engine.connect() as connection:
            return Counts(*connection.execute(self.SQL).one())


class Screen:
    """Prints lines. The progress is written over on a terminal, and printed each second elsewhere."""

    def __init__(self) -> None:
        self._back = "\r\033[K" if sys.stdout.isatty() else ""
        self._shown = ""
        self._next = 0.0

    def say(self, line: str) -> None:
        print(f"{self._back}{line}", flush=True)

    def progress(self, line: str) -> None:
        if self._back:
            print(f"{self._back}{line}", end="", flush=True)
        elif line != self._shown and time.monotonic() >= self._next:
            print(line, flush=True)
            self._shown, self._next = line, time.monotonic() + 1


# --- the command line -----------------------------------------------------------------------------


def database_url(given: str) -> URL:
    """Return the URL of a database that will do. Raises: argparse.ArgumentTypeError."""
    wanted = "wanted postgresql+psycopg://user@host/name or mysql+pymysql://user@host/name"
    try:
        url = make_url(given)
        dialect = url.get_dialect()
        if dialect.name not in ("sqlite", "postgresql", "mysql", "mariadb"):
            raise argparse.ArgumentTypeError(f"{dialect.name} is not supported, {wanted}")
        dialect.import_dbapi()
    except (ArgumentError, NoSuchModuleError, ValueError):
        raise argparse.ArgumentTypeError(f"{given!r} is no URL of a database, {wanted}") from None
    except ImportError as error:
        raise argparse.ArgumentTypeError(
            f"the driver {error.name} is not installed: do so with pip in .venv, or choose another, {wanted}"
        ) from None
    if dialect.is_async:
        raise argparse.ArgumentTypeError(f"{dialect.driver} is asynchronous, {wanted}")
    if url.database in (None, "", ":memory:"):
        raise argparse.ArgumentTypeError("it names no database that several processes can share")
    if dialect.name == "sqlite":
        url = url.set(database=str(Path(url.database or "").resolve()))
    return url


def connectable(url: URL) -> Engine:
    """Return an engine that has connected once. Raises: Failed."""
    engine = create_engine(url, poolclass=NullPool)
    try:
        engine.connect().close()
    except DBAPIError as error:
        raise Failed(f"{url!r} cannot be reached: {error.orig}") from None
    return engine


def in_full(url: URL) -> str:
    return url.render_as_string(hide_password=False)


def main() -> int:
    parser = argparse.ArgumentParser(prog="demo.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--database-url",
        type=database_url,
        metavar="URL",
        help="an empty database on PostgreSQL, MariaDB or MySQL; default: a new SQLite file. "
        "The demo makes its tables there, and drops them at the end.",
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep the tables, the mails and the logs to look at"
    )
    arguments = parser.parse_args()

    folder = Path(tempfile.mkdtemp(prefix="sajobs-demo-"))
    url = arguments.database_url or make_url(f"sqlite:///{folder / 'shop.sqlite'}")
    try:
        return asyncio.run(demo(url, folder, keep=arguments.keep))
    except Failed as error:
        print(f"\nFAILED: {error}", file=sys.stderr)
        return 1
    except asyncio.CancelledError:
        print("\ninterrupted", file=sys.stderr)
        return 130
    finally:
        if arguments.keep:
            print(f"kept: {folder} and {url!r}", file=sys.stderr)
        else:
            shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
