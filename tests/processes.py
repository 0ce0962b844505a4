"""Processes for the tests: real ones, with real signals.

Most are forked from one that has the libraries imported, and neither threads nor connections. A new interpreter takes
the better part of a second to come that far, and the tests start hundreds.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

from sqlalchemy import URL

from tests.databases import Database

ROOT = Path(__file__).parent.parent
APP = "tests.apps.effects:jobs"

forking = multiprocessing.get_context("forkserver")
forking.set_forkserver_preload(
    [
        "tests.migrating",
        "sqlalchemy_jobs.worker.supervisor",
        "sqlalchemy_jobs.worker.worker",
        "psycopg",
        "asyncpg",
        "pymysql",
        "aiomysql",
        "aiosqlite",
        "sqlalchemy.ext.asyncio",
        "flask_migrate",
        "flask_sqlalchemy",
        "sqlmodel",
    ]
)


class Python:
    """``python ARGUMENTS`` in a folder, forked; used like a `subprocess.Popen`."""

    def __init__(
        self,
        *arguments: str,
        cwd: Path,
        env: Mapping[str, str],
        streams: tuple[int, ...] = (1, 2),
    ) -> None:
        output, theirs = forking.Pipe(duplex=False)
        self.output = os.fdopen(os.dup(output.fileno()))
        """What it writes to these streams."""
        self._process = forking.Process(
            target=_run, args=(arguments, cwd, {**os.environ, **env}, theirs, streams), daemon=True
        )
        with output, theirs, contextlib.chdir(ROOT):  # where the first one finds what to preload
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        status = self._process.exitcode
        if status is None:
            raise subprocess.TimeoutExpired("python", timeout or 0)
        return status

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(
    arguments: tuple[str, ...],
    cwd: Path,
    env: dict[str, str],
    output: Connection,
    streams: tuple[int, ...],
) -> None:
    """Do as the interpreter does with these arguments."""
    with output:
        for each in streams:
            os.dup2(output.fileno(), each)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    first, *rest = arguments
    sys.path[:0] = [str(cwd), *env.get("PYTHONPATH", "").split(os.pathsep)]
    if first == "-m":
        module, *sys.argv[1:] = rest
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif first == "-c":
        code, *sys.argv[1:] = rest
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path.insert(0, str(Path(first).parent))
        sys.argv[1:] = rest
        runpy.run_path(first, run_name="__main__")


def python(*arguments: str, cwd: Path, env: Mapping[str, str]) -> str:
    """Run Python in a folder to its end; return what it printed, to either stream."""
    status, printed = ended(*arguments, cwd=cwd, env=env)
    assert status == 0, f"{arguments}\n{printed}"
    return printed


def ended(*arguments: str, cwd: Path, env: Mapping[str, str]) -> tuple[int, str]:
    """Run Python in a folder to its end; return its exit status and what it printed, to either stream."""
    process = Python(*arguments, cwd=cwd, env=env)
    with process.output:
        printed = process.output.read()
    return process.wait(300), printed


class WorkerProcess:
    """`sajobs worker` in a process of its own; its log can be waited for."""

    def __init__(
        self, url: URL, folder: Path, *options: str, app: str = APP, path: Path = ROOT
    ) -> None:
        self.process = Python(
            *("-m", "sqlalchemy_jobs", "worker", "--app", app, *options),
            cwd=ROOT,
            env={
                "PYTHONPATH": f"{path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
                "SAJOBS_TEST_URL": url.render_as_string(hide_password=False),
                "SAJOBS_TEST_FOLDER": str(folder),
            },
            streams=(2,),
        )
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with self.process.output as output:
            for line in output:
                with self._changed:
                    self.lines.append(line.rstrip("\n"))
                    self._changed.notify_all()
        with self._changed:
            self.lines.append("(end of its log)")
            self._changed.notify_all()

    def wait_for(self, text: str, timeout: float = 60, count: int = 1) -> str:
        """Wait until its log has lines with a text; return the last of them."""

        def found() -> list[str]:
            return [line for line in self.lines if text in line]

        with self._changed:
            came = self._changed.wait_for(
                lambda: len(found()) >= count or self.lines[-1:] == ["(end of its log)"], timeout
            )
            assert came and len(found()) >= count, f"{text!r} did not come:\n" + "\n".join(
                self.lines
            )
            return found()[-1]

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = 90) -> int:
        """Wait for its end; return its exit status."""
        status = self.process.wait(timeout)
        self._reader.join(20)
        return status

    @property
    def log(self) -> str:
        return "\n".join(self.lines)


@contextmanager
def workers(
    database: Database, folder: Path, *options: str, count: int = 1, url: URL | None = None
) -> Iterator[list[WorkerProcess]]:
    """Start worker processes; whatever happens, none outlives the block."""
    started = [WorkerProcess(url or database.url, folder, *options) for _ in range(count)]
    try:
        yield started
    finally:
        for worker in started:
            worker.process.kill()
            worker.wait()
