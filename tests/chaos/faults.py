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

from tests.chaos import diary
from tests.chaos.servers import Remote, Server
from tests.proxy import Proxy

ENDS = (0, 1, -signal.SIGTERM)
"""How a worker ends that is told to: by the signal itself while it was only starting."""
LEASES = 2.0
"""For how many leases a worker is stopped at most."""
HOLD = 3.0
"""For how many seconds its connections are held, and for how many there is none."""
ROOT = Path(__file__).parents[2]


@dataclass
class Process:
    """A worker process, and what was done to it."""

    popen: subprocess.Popen[bytes]
    log: Path
    killed_at: float | None = None
    """By a fault, or by a job of its own that is made to do that."""


@dataclass
class Workers:
    url: URL
    folder: Path
    slots: int
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
                    "--concurrency",
                    str(self.slots),
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
        process.popen.wait()

    def tell_to_end(self, process: Process) -> None:
        process.popen.terminate()
        self._take_out(process)

    def has_run_jobs(self, process: Process) -> bool:
        return any(diary.read(self.folder, process.popen.pid))

    def replace_poisoned(self) -> None:
        """Start another one for each that was killed by a job of its own."""
        for process in list(self.alive):
            if process.popen.poll() is not None and self._is_poisoned(process):
                self._take_out(process)
                self.start()

    def _take_out(self, process: Process) -> None:
        self.alive.remove(process)
        self.ended.append(process)

    def _is_poisoned(self, process: Process) -> bool:
        entries = diary.read(self.folder, process.popen.pid)
        at = next((each.at for each in entries if each.event == "poisoned"), None)
        process.killed_at = process.killed_at or at
        return at is not None

    def end(self) -> None:
        """Tell all to end, and wait for that."""
        for process in list(self.alive):
            self.tell_to_end(process)
        for process in self.ended:
            with suppress(subprocess.TimeoutExpired):
                process.popen.wait(120)

    def died(self) -> list[Process]:
        """Those that ended although nobody killed them or told them to, or did not end when told to."""
        dead = [each for each in self.alive if each.popen.poll() is not None]
        dead += [each for each in self.ended if each.popen.poll() not in ENDS]
        return [each for each in dead if each.killed_at is None and not self._is_poisoned(each)]


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
        self._stop = threading.Event()
        self._timers: list[threading.Timer] = []
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Make no more, and wait until every process that was stopped runs again."""
        self._stop.set()
        self._thread.join()
        for timer in self._timers:
            timer.join()
        if self._error is not None:  # there were less faults than it seems
            raise self._error

    @property
    def longest_stall(self) -> float:
        """For how many seconds a worker is kept from going on, when one fault follows another."""
        return LEASES * self._lease + 3 * HOLD

    def _run(self) -> None:
        try:
            self._make_faults()
        except Exception as error:
            self._error = error

    def _make_faults(self) -> None:
        possible: dict[Callable[[], None], int] = {self.kill: 5, self.suspend: 3, self.replace: 2}
        if isinstance(self._server, Remote):
            possible |= {self.end_connection: 6, self.restart_server: 1}
        if self._proxy is not None:
            possible |= {self.cut: 6, self.cut_in_commit: 6, self.delay: 2, self.part: 1}
        of_workers = list(possible)[:3]
        while not self._stop.wait(self._random.uniform(0.2, 2)):
            self._workers.replace_poisoned()
            (fault,) = self._random.choices(list(possible), list(possible.values()))
            if fault in of_workers and self._is_hard_pressed():
                continue
            fault()
            self.done[fault.__name__.replace("_", " ")] += 1

    def _is_hard_pressed(self) -> bool:
        """Tell, most of the time, whether less than two workers have come so far as to run jobs.

        On a slow machine they would otherwise be killed before they begin, and there would be nothing to audit.
        """
        serving = [each for each in self._workers.alive if self._workers.has_run_jobs(each)]
        return len(serving) < min(2, len(self._workers.alive)) and self._random.random() < 0.8

    # --- workers ----------------------------------------------------------------------------------

    def kill(self) -> None:
        self._workers.kill(self._random.choice(self._workers.alive))
        self._workers.start()

    def suspend(self) -> None:
        """SIGSTOP, for less than the lease or long enough to be declared dead, and SIGCONT; the faults go on."""
        process = self._random.choice(self._workers.alive)
        process.popen.send_signal(signal.SIGSTOP)
        leases = self._random.choice(
            [self._random.uniform(0, 1), self._random.uniform(1.5, LEASES)]
        )
        seconds = leases * self._lease
        self._timers.append(threading.Timer(seconds, process.popen.send_signal, [signal.SIGCONT]))
        self._timers[-1].start()

    def replace(self) -> None:
        """SIGTERM, as a deploy does."""
        process = self._random.choice(self._workers.alive)
        process.popen.send_signal(signal.SIGCONT)
        self._workers.tell_to_end(process)
        self._workers.start()

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
        self._proxy.hold(self._random.uniform(0.05, HOLD))

    def part(self) -> None:
        """The network between workers and server is gone for a moment."""
        assert self._proxy is not None
        self._proxy.stop()
        time.sleep(self._random.uniform(0.1, HOLD))
        self._proxy.start()

    # --- the server -------------------------------------------------------------------------------

    def restart_server(self) -> None:
        assert isinstance(self._server, Remote)
        self._server.restart()
