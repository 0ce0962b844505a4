"""Worker processes for the tests: real ones, with real signals."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import URL

from tests.databases import Database

ROOT = Path(__file__).parent.parent
APP = "tests.apps.effects:jobs"


class WorkerProcess:
    """`sajobs worker` in a process of its own; its log can be waited for."""

    def __init__(
        self, url: URL, folder: Path, *options: str, app: str = APP, path: Path = ROOT
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sqlalchemy_jobs", "worker", "--app", app, *options],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": f"{path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
                "SAJOBS_TEST_URL": url.render_as_string(hide_password=False),
                "SAJOBS_TEST_FOLDER": str(folder),
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr:
            for line in self.process.stderr:
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


def python(*arguments: str, cwd: Path, env: dict[str, str]) -> str:
    """Run Python in a folder to its end; return what it printed, to either stream."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout}"
    return done.stdout


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
