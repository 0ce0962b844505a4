"""Several worker processes: they are started, started again when they die, and ended together.

A worker process has a line to its supervisor, a pair of sockets. Over it the worker says that it has begun, and is told
to stop. When the line breaks, because the supervisor was killed, the worker stops in order, too. Signals
would not do for that: Ctrl-C and systemd send theirs to all processes, so a worker would take the
supervisor's for the second one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from sqlalchemy_jobs.worker.connections import Connections

log = logging.getLogger("sqlalchemy_jobs")

FIRST_PAUSE = 1.0
LONGEST_PAUSE = 30.0
LONG_LIFE = 60.0
"""Seconds after which a death is not taken for a consequence of the one before."""
CANNOT_START = 2
"""The exit status of a worker that cannot start like this."""

_VARIABLE = "SAJOBS_SUPERVISOR"


class Line:
    """The worker's end of the line to its supervisor."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    @staticmethod
    def of_this_process() -> Line | None:
        """Return it in a process that a supervisor has started; once, for what is started by handlers is not."""
        number = os.environ.pop(_VARIABLE, None)
        if number is None:
            return None
        end = socket.socket(fileno=int(number))
        end.set_inheritable(False)
        signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # Ctrl-C reaches the supervisor, which tells us
        return Line(end)

    def begun(self, connections: Connections, *, one_writer: bool) -> None:
        """Tell the supervisor that the worker has begun."""
        told = {**connections._asdict(), "one_writer": one_writer}
        with suppress(OSError):  # it is dead
            self._end.sendall(json.dumps(told).encode())

    def heed(self, stop: Callable[[], None]) -> None:
        """Have ``stop`` called, once on SIGTERM or when told so or when the line breaks, and when told so again."""
        once = [stop]

        def stop_once() -> None:
            with suppress(IndexError):  # atomic: a signal handler may interrupt the thread's call
                once.pop()()

        def listen() -> None:
            told = False
            with suppress(OSError):
                while self._end.recv(1):
                    (stop if told else stop_once)()
                    told = True
            stop_once()

        signal.signal(signal.SIGTERM, lambda number, frame: stop_once())
        threading.Thread(target=listen, name="sajobs-supervised", daemon=True).start()


def supervise(arguments: Sequence[str], count: int, *, drain: bool) -> int:
    """Keep ``count`` processes of ``sajobs worker`` with these arguments at work until told to stop by a signal.

    The second signal has them stop at once. With ``drain`` those that are done are not replaced. Return the exit
    status: 0 when the last process in each place ended so, 2 when they cannot start like this, else 1.
    """
    return asyncio.run(_Processes(arguments, count, drain).run())


class _Processes:
    def __init__(self, arguments: Sequence[str], count: int, drain: bool) -> None:
        self._command = [sys.executable, "-m", "sqlalchemy_jobs", "worker", *arguments]
        self._count = count
        self._drain = drain
        self._stopping = asyncio.Event()
        self._begun = asyncio.Event()
        """Set when a process has begun: then the others can, too."""
        self._running: dict[asyncio.subprocess.Process, socket.socket] = {}
        self._working: set[asyncio.subprocess.Process] = set()
        """Those that have begun."""

    async def run(self) -> int:
        for each in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(each, self._told_to_stop)
        # The first alone: what keeps it from starting would keep all, and is told once.
        places = [self._keep()]
        places += [self._keep(after=self._begun) for _ in range(self._count - 1)]
        statuses = await asyncio.gather(*places)
        if CANNOT_START in statuses:
            return CANNOT_START
        return 1 if any(statuses) else 0

    def _told_to_stop(self) -> None:
        log.info("stopping: %d processes", len(self._running))
        self._stop()

    def _stop(self) -> None:
        self._stopping.set()
        self._begun.set()  # nobody is to wait for it
        for process, line in self._running.items():
            self._tell_to_stop(process, line)

    def _tell_to_stop(self, process: asyncio.subprocess.Process, line: socket.socket) -> None:
        with suppress(OSError):
            line.send(b".")
        if process not in self._working:
            # It may be busy with imports and not listen yet; when it does, this is not the second time.
            with suppress(ProcessLookupError):
                process.terminate()

    async def _keep(self, after: asyncio.Event | None = None) -> int:
        """Keep one place filled; return the exit status of the last process in it."""
        if after is not None:
            await after.wait()
        pause, status, has_begun = FIRST_PAUSE, 0, False
        while not self._stopping.is_set():
            started = time.monotonic()
            pid, status, began = await self._process()
            has_begun = has_begun or began
            if self._stopping.is_set():
                return status if began else 0  # what had not begun had no runs
            if self._drain and status == 0:
                return status
            if status == CANNOT_START and not has_begun:
                self._stop()
                return status
            if time.monotonic() - started >= LONG_LIFE:
                pause = FIRST_PAUSE
            log.warning("process %d %s: a new one in %g s", pid, _told(status), pause)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)
            pause = min(pause * 2, LONGEST_PAUSE)
        return status

    async def _process(self) -> tuple[int, int, bool]:
        """Run a process to its end; return its id, its exit status, and whether it has begun."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *self._command,
                    env={**os.environ, _VARIABLE: str(theirs.fileno())},
                    pass_fds=[theirs.fileno()],
                )
            ours.setblocking(False)
            self._running[process] = ours
            if self._stopping.is_set():  # told while it was being started
                self._tell_to_stop(process, ours)
            listening = asyncio.create_task(self._listen(process, ours))
            status = await process.wait()
            del self._running[process]
            # What it has said is read before the end; a process that it has forked may still hold its end open.
            await asyncio.wait([listening], timeout=1)
            listening.cancel()
        began = process in self._working
        self._working.discard(process)
        return process.pid, status, began

    async def _listen(self, process: asyncio.subprocess.Process, line: socket.socket) -> None:
        with suppress(OSError):
            if told := await asyncio.get_running_loop().sock_recv(line, 4096):
                self._working.add(process)
                self._tell(**json.loads(told))

    def _tell(self, handlers: int, own: int, one_writer: bool) -> None:
        if not self._begun.is_set():
            log.info(Connections(handlers, own).told(self._count))
            if one_writer:
                log.warning(
                    "SQLite lets one process write at a time: %d are hardly quicker than one",
                    self._count,
                )
        self._begun.set()


def _told(status: int) -> str:
    if status < 0:
        with suppress(ValueError):
            return f"was killed by {signal.Signals(-status).name}"
    return f"ended with status {status}"
