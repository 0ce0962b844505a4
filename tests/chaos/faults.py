"""What is done to workers, connections and the server while the jobs run."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import URL
from sqlalchemy.exc import SQLAlchemyError

from tests.chaos.servers import Remote, Server
from tests.proxy import Proxy

ENDS = (0, 1, -signal.SIGTERM)
"""How a worker ends that is told to: by the signal itself while it was only starting."""
ROOT = Path(__file__).parents[2]


@dataclass
class Process:
    """A worker process, and what was done to it."""

    popen: subprocess.Popen[bytes]
    log: Path
    killed_at: float | None = None


@dataclass
class Workers:
    url: URL
    folder: Path
    options: list[str]
    alive: list[Process] = field(default_factory=list)
    ended: list[Process] = field(default_factory=list)

    def start(self) -> None:
        log = self.folder / f"worker-{len(self.alive) + len(self.ended)}.log"
        with log.open("wb") as file:
            popen = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "sqlalchemy_jobs",
                    "worker",
                    "--app",
                    "tests.chaos.app:jobs",
                    *self.options,
                ],
                cwd=ROOT,
                env={
                    **os.environ,
                    "SAJOBS_CHAOS_URL": self.url.render_as_string(hide_password=False),
                    "SAJOBS_CHAOS_FOLDER": str(self.folder),
                },
                stdout=file,
                stderr=file,
            )
        self.alive.append(Process(popen, log))

    def kill(self, process: Process) -> None:
        process.killed_at = time.time()
        process.popen.kill()
        self._take_out(process)

    def stop(self, process: Process, timeout: float = 120) -> None:
        process.popen.terminate()
        self._take_out(process, timeout)

    def _take_out(self, process: Process, timeout: float = 120) -> None:
        self.alive.remove(process)
        self.ended.append(process)
        with suppress(subprocess.TimeoutExpired):
            process.popen.wait(timeout)

    def died(self) -> list[Process]:
        """Those that ended although nobody killed them or told them to, or did not end when told to."""
        return [each for each in self.alive if each.popen.poll() is not None] + [
            each for each in self.ended if each.killed_at is None and each.popen.poll() not in ENDS
        ]


class Faults:
    """Does one thing after another until told to stop; ``done`` counts them by kind."""

    def __init__(
        self, workers: Workers, server: Server, proxy: Proxy | None, seed: int, lease: float
    ) -> None:
        self.done: Counter[str] = Counter()
        self._workers = workers
        self._server = server
        self._proxy = proxy
        self._random = random.Random(f"faults {seed}")
        self._lease = lease
        self._count = len(workers.alive)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        possible: dict[Callable[[], None], int] = {self.kill: 5, self.suspend: 3, self.replace: 2}
        if isinstance(self._server, Remote):
            possible |= {self.end_connection: 6, self.restart_server: 1}
        if self._proxy is not None:
            possible |= {self.cut: 6, self.cut_in_commit: 6, self.delay: 2, self.part: 1}
        while not self._stop.wait(self._random.uniform(0.2, 2)):
            (fault,) = self._random.choices(list(possible), list(possible.values()))
            fault()
            self.done[fault.__name__.replace("_", " ")] += 1

    # --- workers ----------------------------------------------------------------------------------

    def kill(self) -> None:
        self._workers.kill(self._random.choice(self._workers.alive))
        self._workers.start()

    def suspend(self) -> None:
        """SIGSTOP, for less or more than the lease, and SIGCONT; the faults go on meanwhile."""
        process = self._random.choice(self._workers.alive)
        process.popen.send_signal(signal.SIGSTOP)
        threading.Timer(
            self._random.uniform(0.1, 2 * self._lease), process.popen.send_signal, [signal.SIGCONT]
        ).start()

    def replace(self) -> None:
        """SIGTERM, as a deploy does."""
        process = self._random.choice(self._workers.alive)
        process.popen.send_signal(signal.SIGCONT)
        self._workers.start()
        threading.Thread(target=self._workers.stop, args=(process,), daemon=True).start()

    # --- connections ------------------------------------------------------------------------------

    def end_connection(self) -> None:
        assert isinstance(self._server, Remote)
        with suppress(SQLAlchemyError):  # the server may be just restarting
            self._server.end_connection()

    def cut(self) -> None:
        assert self._proxy is not None
        self._proxy.cut()

    def cut_in_commit(self) -> None:
        assert self._proxy is not None
        self._proxy.cut_commit("effect", self._random.choice(["before", "after"]))

    def delay(self) -> None:
        assert self._proxy is not None
        self._proxy.hold(self._random.uniform(0.05, 3))

    def part(self) -> None:
        """The network between workers and server is gone for a moment."""
        assert self._proxy is not None
        self._proxy.stop()
        time.sleep(self._random.uniform(0.1, 3))
        self._proxy.start()

    # --- the server -------------------------------------------------------------------------------

    def restart_server(self) -> None:
        assert isinstance(self._server, Remote)
        self._server.restart()
