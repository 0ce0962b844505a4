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

from sqlalchemy_jobs import bell, transitions
from sqlalchemy_jobs.app import JobApp
from sqlalchemy_jobs.errors import ConfigurationError
from sqlalchemy_jobs.runs import Batch, Run
from sqlalchemy_jobs.worker import batches, connections, execution, guard, preflight
from sqlalchemy_jobs.worker.availability import Availability, is_lost
from sqlalchemy_jobs.worker.claiming import Claimer
from sqlalchemy_jobs.worker.control import Control, direct
from sqlalchemy_jobs.worker.execution import Transition
from sqlalchemy_jobs.worker.executors import Supervisor, Threads, Work
from sqlalchemy_jobs.worker.handling import Handling
from sqlalchemy_jobs.worker.leases import Lease, own_name
from sqlalchemy_jobs.worker.listening import Listener
from sqlalchemy_jobs.worker.locks import SessionLock
from sqlalchemy_jobs.worker.lookout import Lookout
from sqlalchemy_jobs.worker.loops import (
    LAST_STEP,
    LONGEST_PAUSE,
    SHORTEST_PAUSE,
    Loop,
    stop_together,
)
from sqlalchemy_jobs.worker.maintenance import Maintenance
from sqlalchemy_jobs.worker.settings import Options, Settings
from sqlalchemy_jobs.worker.settling import Settler
from sqlalchemy_jobs.worker.slots import Slots
from sqlalchemy_jobs.worker.timeouts import GRACE, Timeouts
from sqlalchemy_jobs.worker.wakeup import Wakeup

if TYPE_CHECKING:
    from sqlalchemy_jobs.worker.event_loop import EventLoop

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
        self._parts: _Parts | None = None
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

    def _begin_later(self, parts: _Parts) -> None:
        try:
            if self._check_when_reachable(parts, self._ending.wait):
                parts.begin()
        except ConfigurationError as error:
            log.error("the worker does not start: %s", error)
            self._shut_down(timedelta(0))
        except Exception:
            log.exception("the worker does not start")
            self._shut_down(timedelta(0))

    def _prepare(self, loop: asyncio.AbstractEventLoop | None) -> _Parts:
        if self._parts is not None:
            raise ConfigurationError("this Worker was started before: make a new one")
        preflight.check_app(self.app)
        guard.install()
        self._parts = _Parts(self, loop)
        _started.add(self)
        return self._parts

    def _check_when_reachable(self, parts: _Parts, stop_within: Any) -> bool:
        """Wait for the database and check it; False when told to stop meanwhile."""
        pause = SHORTEST_PAUSE
        while not self._check(parts):
            if stop_within(pause):
                return False
            pause = min(pause * 2, LONGEST_PAUSE)
        return True

    def _check(self, parts: _Parts) -> bool:
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

    def _wait_until_idle(self, parts: _Parts, seconds: float, *, heed_stop: bool) -> bool:
        until = time.monotonic() + min(seconds, LONGEST_WAIT)
        while not parts.slots.is_idle():
            message = self._receive(until - time.monotonic())
            if message is None or (heed_stop and message == "stop"):
                break
        return parts.slots.is_idle()


class _Parts:
    """What a started worker consists of."""

    def __init__(self, worker: Worker, loop: asyncio.AbstractEventLoop | None) -> None:
        self._app = app = worker.app
        self._handlers = dict(app.handlers)  # as they are now: the checks hold for these
        self._settings = settings = worker.settings
        self._inbox = worker._inbox
        self._ending = worker._ending
        self.availability = Availability()
        with app.context():
            engines = preflight.engines_of(app)
        engine = engines[0] or engines[1]
        assert engine is not None
        # A job that fails because its worker died in it must be found claimed, after a loss of power too.
        durable = any(each.declaration.on_crash == "fail" for each in self._handlers.values())
        self._control = Control(engine, self.availability, durable=durable)
        self._lease_control = Control(engine, self.availability)
        self._total = settings.total(self._control.dialect.concurrency)
        self.connections = connections.most(
            self._handlers.values(), *engines, self._total, self._control.dialect
        )
        batched = {kind: each for kind, each in self._handlers.items() if each.batch}
        self.slots = Slots(self._total, settings.limits, self._on_change, batched)
        self._settler = Settler(
            self._control, self.slots.disown, lambda: self.slots.waiting > self._total
        )
        self._timeouts = Timeouts(lambda: self._timing.wake(), self._on_hung)
        supervisor = Supervisor(app, self._control, self._timeouts, self._on_end, self._end_apart)
        self._supervisor = supervisor
        self._threads: Threads | None = None
        if app.sessions is not None:
            self._threads = Threads(supervisor, app.sessions, self._total, self._next_for_thread)
        self._loop: EventLoop | None = None
        if any(handler.is_async for handler in self._handlers.values()):
            from sqlalchemy_jobs.worker.event_loop import EventLoop

            assert app.async_sessions is not None
            self._loop = EventLoop(supervisor, app.async_sessions, loop, self._start_waiting)
        self._wakeup = Wakeup(settings.poll_interval.total_seconds(), lambda: self._leasing.wake())
        self._lock: SessionLock | None = None
        self._listener: Listener | None = None
        if (locks := self._control.dialect.session_locks) is not None:
            to_server = direct(engine, settings.listen_url)
            self._lock = SessionLock(Control(to_server, self.availability), locks, settings.lease)
            if (ear := self._control.dialect.ear) is not None and settings.listen:
                self._listener = Listener(
                    Control(to_server, self.availability),
                    ear,
                    locks,
                    settings.limits,
                    self._wakeup,
                    lambda: self._claiming.wake(),
                )
        self._lease = Lease(
            self._lease_control,
            settings.lease,
            list(settings.limits),
            self._handlers,
            lambda: self._claiming.wake(),
            self._on_lost,
            self._lock,
            self._wakeup,
        )
        self._maintenance = Maintenance(
            self._control,
            self._lease,
            settings.lease,
            self._handlers,
            settings,
            lambda: self._claiming.wake(),
        )
        self._claimer = Claimer(
            self._control,
            self._lease,
            self.slots,
            self._handlers,
            settings,
            self._wakeup,
            self._start_waiting,
            self._give_back,
            lambda: self._inbox.put("drained"),
        )
        self._lookout = Lookout(self._control, self.slots, self._call_off)
        self._claiming = Loop("claim", self._claimer.step)
        self._settling = Loop("settle", self._settler.step)
        self._leasing = Loop("lease", self._lease.step)
        self._watching = Loop("lease-watch", self._lease.watch)
        self._maintaining = Loop("maintenance", self._maintenance.step)
        self._looking_out = Loop("lookout", self._lookout.step)
        self._timing = Loop("timeouts", self._timeouts.step)
        self.one_writer = self._control.dialect.one_writer
        self._listening = Loop("listen", self._listener.step) if self._listener else None
        self._beginning = threading.Lock()
        self._begun = False

    # --- start and end ------------------------------------------------------------------------------

    def check(self) -> None:
        self._control.transaction(preflight.check_database)
        with self._app.context():
            if self._threads is not None:
                self._threads.check(preflight.check_handlers_connection)
        if self._loop is not None:
            self._loop.check(preflight.check_handlers_connection)

    def begin(self) -> None:
        with self._beginning:
            if self._ending.is_set():
                return
            self._begun = True
            for loop in (
                self._leasing,
                self._settling,
                self._maintaining,
                self._claiming,
                self._looking_out,
            ):
                loop.start()
            bell.sleepers.add(self._claiming)
            if self._listening is not None:
                self._listening.start()
            if not self._control.dialect.one_writer:
                self._watching.start()
            if any(handler.declaration.timeout for handler in self._handlers.values()):
                self._timing.start()
        log.info(
            "worker %s on %s serves %s, %d at once, with a lease of %g s",
            own_name(),
            self._control.dialect.label,
            ", ".join(self._settings.limits) or "all queues",
            self._total,
            self._settings.lease.total_seconds(),
        )

    def stop_claiming(self) -> None:
        with self._beginning:
            self._ending.set()
        if self._begun:
            log.info("stopping: %d runs in flight", len(self.slots.running()))
        self._give_back(self.slots.withdraw())
        bell.sleepers.discard(self._claiming)
        stop_together(self._claiming, self._maintaining)

    def release_runs(self) -> None:
        """Give back what is still running, without counting a failure."""
        on_threads = []
        for run in self.slots.running():
            log.warning("%s %s did not end in time: released", run.kind, run.job_id)
            run.ask_to_stop()
            if self._is_async(run):
                assert self._loop is not None
                self._loop.cancel(run)  # once: it may be cleaning up. It hands over its own release
                continue
            on_threads.append(run)
            if self.slots.give_up(run):
                self._settle(run, execution.released("the worker stopped"))
        # A server that does not answer must not hold up the end. On SQLite the release waits for this.
        threading.Thread(target=self._supervisor.interrupt, args=(on_threads,), daemon=True).start()

    def close(self) -> None:
        loops = [self._settling, self._looking_out, self._watching, self._leasing, self._timing]
        if self._listener is not None and self._listening is not None:
            self._listener.stop()
            loops.append(self._listening)
        stop_together(*loops)
        if self._begun:
            ending = threading.Thread(target=self._end_lease, daemon=True)
            ending.start()
            ending.join(LAST_STEP)
        for executor in (self._threads, self._loop):
            if executor is not None:
                executor.stop()
        self._control.close()
        self._lease_control.close()
        if self._lock is not None:
            self._lock.close()
        if self._listener is not None:
            self._listener.close()

    def _end_lease(self) -> None:
        with suppress(Exception):  # away: the lease will pass
            self._lease.end()

    # --- runs ---------------------------------------------------------------------------------------

    def _is_async(self, run: Run) -> bool:
        return self._handlers[run.kind].is_async

    def _start_waiting(self) -> None:
        """Start what waits for a slot and gets one."""
        if self._ending.is_set():  # a claim that was on its way
            self._give_back(self.slots.withdraw())
        trouble = None
        while (run := self.slots.next()) is not None:
            try:
                self._start(run)
            except Exception as error:  # the others are ours to start as well
                trouble = error
        if trouble is not None:
            raise trouble

    def _start(self, run: Run) -> None:
        handler = self._handlers[run.kind]
        if run.claim.crashes and handler.declaration.on_crash == "fail":
            self._on_end(run, execution.not_repeated(run))
            return
        executor = self._loop if handler.is_async else self._threads
        try:
            assert executor is not None
            executor.start(run, handler)
        except BaseException:
            self._on_end(run, execution.released("the worker could not start it"))
            raise

    def _next_for_thread(self) -> Work | None:
        """Return a waiting run for the thread that has just ended one: so it need not be woken."""
        while (run := self.slots.next()) is not None:
            handler = self._handlers[run.kind]
            if not handler.is_async and not run.claim.crashes:
                return run, handler
            self._start(run)
        return None

    def _give_back(self, runs: list[Run]) -> None:
        for run in runs:
            self._settle(run, transitions.give_back)

    def _settle(self, run: Run, transition: Transition) -> None:
        if isinstance(run, Batch):
            for each, its_own in batches.each_of(run, transition):
                self._settler.put(each, its_own)
        else:
            self._settler.put(run, transition)
        self._settling.wake()

    def _end_apart(self, batch: Batch, run: Run, transition: Transition | None) -> None:
        """End a run of a batch for itself; the batch goes on without it."""
        batch.apart.add(run)
        if transition is None:
            self.slots.disown([run])
        else:
            self._settle(run, transition)

    def _on_end(self, run: Run, transition: Transition | None) -> None:
        if not self.slots.ended(run):
            return  # it was given up, and its end is written down
        if transition is None:
            self.slots.disown(run.runs if isinstance(run, Batch) else [run])
        else:
            self._settle(run, transition)

    def _on_hung(self, handling: Handling) -> None:
        run, overdue = handling.run, handling.is_overdue
        if not self.slots.give_up(run):
            return
        log.error(
            "%s %s did not come back %g s after %s: its thread is left alone%s",
            run.kind,
            run.job_id,
            GRACE,
            "its deadline" if overdue else "it was called off",
            "; too many hang: less is claimed until they come back" if self.slots.lost else "",
        )
        if overdue:
            declaration = self._handlers[run.kind].declaration
            where = handling.where()
            self._settle(
                run, batches.of_each(run, lambda each: execution.hung(each, declaration, where))
            )
        else:
            self._settle(run, execution.released("its handler did not come back"))
        if not self._is_async(run):
            assert self._threads is not None
            self._threads.replace(run)
        self._start_waiting()

    def _on_change(self) -> None:
        self._claiming.wake()
        if self._ending.is_set():
            self._inbox.put("changed")

    def _on_lost(self, reason: str, *, dead: bool) -> None:
        log.error("%s: the runs in flight are %s", reason, "given up" if dead else "asked to stop")
        runs = self.slots.disown_all() if dead else self.slots.running()
        for run in runs:
            self._stop(run)

    def _call_off(self, run: Run) -> None:
        """Have a run end whose job was taken from it."""
        run.ask_to_stop()
        with self._beginning:
            self._timing.start()
        self._supervisor.call_off(run)

    def _stop(self, run: Run) -> None:
        run.ask_to_stop()
        if self._loop is not None and self._is_async(run):
            self._loop.cancel(run)


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
