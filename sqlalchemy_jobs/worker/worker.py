"""The worker: claims jobs and has them run, until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Unpack

from sqlalchemy_jobs.app import JobApp
from sqlalchemy_jobs.errors import ConfigurationError
from sqlalchemy_jobs.worker import guard, preflight
from sqlalchemy_jobs.worker.availability import is_lost
from sqlalchemy_jobs.worker.loops import (
    LONGEST_PAUSE,
    SHORTEST_PAUSE,
)
from sqlalchemy_jobs.worker.parts import Parts
from sqlalchemy_jobs.worker.settings import Options, Settings

if TYPE_CHECKING:
    pass

log = logging.getLogger("sqlalchemy_jobs")

PROCESS_SHUTDOWN = timedelta(seconds=30)
LONGEST_WAIT = 30 * 86400.0
SIGNAL_SLICE = 0.5
"""Seconds for which a signal may wait for its handler."""
RELEASE_WAIT = 5.0
"""Seconds for which a worker waits until the runs that it gives up are released."""
EMBEDDED_SHUTDOWN = timedelta(seconds=5)
"""Short, so that an application that reloads does not hang."""


class Worker:
    """Runs the jobs of a JobApp in this process.

    Three ways: ``run()`` blocks until ``stop()``, and is what ``sajobs worker`` does; ``with worker:`` works in
    background threads; ``async with worker:`` does so too, and runs ``async def`` handlers on the running
    loop. None of them installs a signal handler. The keyword arguments are the fields of ``Settings``.

    It survives a database that is away, at start and later: it says so, and goes on when it is back.
    Raises, at start: ConfigurationError and its kin, when it could not keep its promise.
    """

    def __init__(self, app: JobApp[Any, Any], /, **options: Unpack[Options]) -> None:
        self.app = app
        self.settings = Settings(**options)
        self._inbox: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._ending = threading.Event()
        self._parts: Parts | None = None
        self._forked = False

    # --- as a process -------------------------------------------------------------------------------

    def run(self) -> bool:
        """Work until ``stop()`` is called or, with ``drain``, until nothing is due.

        True when every run came to its end; False when some were released at the shutdown timeout.
        """
        return self._run(lambda connections, **_: log.info(connections.told()))

    def _run(self, begun: Callable[..., None]) -> bool:
        parts = self._prepare(None)
        try:
            if self._check_when_reachable(parts, self._stop_requested):
                parts.begin()
                begun(parts.connections, one_writer=parts.one_writer)
                while self._receive(LONGEST_WAIT) not in ("stop", "drained"):
                    pass
        finally:
            ended = self._shut_down(self._shutdown_timeout(PROCESS_SHUTDOWN))
        return ended

    def stop(self) -> None:
        """Ask ``run()`` to end: claim nothing more, let the runs finish. A second call ends the waiting.

        Safe in a signal handler and from any thread.
        """
        self._inbox.put("stop")  # SimpleQueue.put may interrupt itself; a lock would deadlock

    # --- inside an application ----------------------------------------------------------------------

    def __enter__(self) -> Worker:
        if any(handler.is_async for handler in self.app.handlers.values()):
            with suppress(RuntimeError):
                asyncio.get_running_loop()
                raise ConfigurationError(
                    "the app has async handlers, and a loop is running here: write `async with jobs.worker():` "
                    "so that they run on it (their engine belongs to that loop)"
                )
        self._enter(None)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._leave()

    async def __aenter__(self) -> Worker:
        loop = asyncio.get_running_loop()
        entering = asyncio.ensure_future(asyncio.to_thread(self._enter, loop))
        try:
            await asyncio.shield(entering)
        except asyncio.CancelledError:
            entering.add_done_callback(self._leave_again)
            raise
        return self

    def _leave_again(self, entered: asyncio.Future[None]) -> None:
        """End a worker whose ``async with`` was cancelled while it was starting."""
        if not entered.cancelled() and entered.exception() is None:
            threading.Thread(target=self._shut_down, args=(timedelta(0),), daemon=True).start()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self._leave)

    @property
    def is_running(self) -> bool:
        """Whether it works in this very process (a forked child does not inherit it)."""
        return self._parts is not None and not self._forked and not self._ending.is_set()

    # --- how ----------------------------------------------------------------------------------------

    def _leave(self) -> None:
        while not self._inbox.empty():  # stop() is for run(): it must not cut the wait short here
            self._inbox.get()
        self._shut_down(self._shutdown_timeout(EMBEDDED_SHUTDOWN))

    def _shutdown_timeout(self, default: timedelta) -> timedelta:
        given = self.settings.shutdown_timeout
        return default if given is None else given

    def _enter(self, loop: asyncio.AbstractEventLoop | None) -> None:
        if self.settings.drain:
            raise ConfigurationError(
                "drain=True is for run(): nobody would learn here that it ended"
            )
        parts = self._prepare(loop)
        try:
            if self._check(parts):
                parts.begin()
            else:
                threading.Thread(target=self._begin_later, args=(parts,), daemon=True).start()
        except BaseException:
            self._shut_down(timedelta(0))
            raise

    def _begin_later(self, parts: Parts) -> None:
        try:
            if self._check_when_reachable(parts, self._ending.wait):
                parts.begin()
        except ConfigurationError as error:
            log.error("the worker does not start: %s", error)
            self._shut_down(timedelta(0))
        except Exception:
            log.exception("the worker does not start")
            self._shut_down(timedelta(0))

    def _prepare(self, loop: asyncio.AbstractEventLoop | None) -> Parts:
        if self._parts is not None:
            raise ConfigurationError("this Worker was started before: make a new one")
        preflight.check_app(self.app)
        guard.install()
        self._parts = Parts(self.app, self.settings, loop, self._inbox, self._ending)
        _started.add(self)
        return self._parts

    def _check_when_reachable(self, parts: Parts, stop_within: Any) -> bool:
        """Wait for the database and check it; False when told to stop meanwhile."""
        pause = SHORTEST_PAUSE
        while not self._check(parts):
            if stop_within(pause):
                return False
            pause = min(pause * 2, LONGEST_PAUSE)
        return True

    def _check(self, parts: Parts) -> bool:
        asked_at = time.monotonic()
        try:
            parts.check()
        except Exception as error:
            if isinstance(error, ConfigurationError) or not is_lost(error):
                raise
            parts.availability.lost(error, asked_at)
            return False
        return True

    def _stop_requested(self, within: float) -> bool:
        return self._receive(within) == "stop"

    def _receive(self, seconds: float) -> str | None:
        """Return the next message, or None after so many seconds; waits in short slices.

        A signal that arrives just before a thread begins to wait for a lock does not interrupt the wait: its
        handler would run only when the wait has ended.
        """
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            with suppress(queue.Empty):
                return self._inbox.get(timeout=min(left, SIGNAL_SLICE))
        return None

    def _shut_down(self, timeout: timedelta) -> bool:
        parts = self._parts
        if parts is None or self._forked or self._ending.is_set():
            return True
        try:
            parts.stop_claiming()
            ended = self._wait_until_idle(parts, timeout.total_seconds(), heed_stop=True)
            if not ended:
                parts.release_runs()
                self._wait_until_idle(parts, RELEASE_WAIT, heed_stop=False)
        finally:
            parts.close()
            _started.discard(self)
        return ended

    def _wait_until_idle(self, parts: Parts, seconds: float, *, heed_stop: bool) -> bool:
        until = time.monotonic() + min(seconds, LONGEST_WAIT)
        while not parts.slots.is_idle():
            message = self._receive(until - time.monotonic())
            if message is None or (heed_stop and message == "stop"):
                break
        return parts.slots.is_idle()


_started: weakref.WeakSet[Worker] = weakref.WeakSet()


def _after_fork() -> None:
    """Tell a forked child that the worker's threads stayed in its parent."""
    for worker in list(_started):
        worker._forked = True
        log.error(
            "this process was forked from one with a running worker, which does not run here: start the "
            "worker after the fork (gunicorn: post_fork, or without --preload)"
        )


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
