"""What a started worker consists of, and how a run passes through it."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from sqlalchemy_jobs import bell, transitions
from sqlalchemy_jobs.app import JobApp
from sqlalchemy_jobs.runs import Batch, Run
from sqlalchemy_jobs.worker import batches, connections, execution, preflight
from sqlalchemy_jobs.worker.availability import Availability
from sqlalchemy_jobs.worker.claiming import Claimer
from sqlalchemy_jobs.worker.control import Control, direct
from sqlalchemy_jobs.worker.controls import Controls
from sqlalchemy_jobs.worker.execution import Transition
from sqlalchemy_jobs.worker.executors import Supervisor, Work
from sqlalchemy_jobs.worker.handling import Handling
from sqlalchemy_jobs.worker.leases import Lease, own_name
from sqlalchemy_jobs.worker.limiting import Limiting
from sqlalchemy_jobs.worker.listening import Listener
from sqlalchemy_jobs.worker.locks import SessionLock
from sqlalchemy_jobs.worker.lookout import Lookout
from sqlalchemy_jobs.worker.loops import (
    LAST_STEP,
    Loop,
    stop_together,
)
from sqlalchemy_jobs.worker.maintenance import Maintenance
from sqlalchemy_jobs.worker.scheduling import Scheduler
from sqlalchemy_jobs.worker.settings import Settings
from sqlalchemy_jobs.worker.settling import Settler
from sqlalchemy_jobs.worker.slots import Slots
from sqlalchemy_jobs.worker.threads import Threads
from sqlalchemy_jobs.worker.timeouts import GRACE, Timeouts
from sqlalchemy_jobs.worker.wakeup import Wakeup

if TYPE_CHECKING:
    from sqlalchemy_jobs.worker.event_loop import EventLoop

log = logging.getLogger("sqlalchemy_jobs")


class Parts:
    """Made at each start: the checks hold for the handlers that the app has then.

    ``inbox`` is told when the worker may look again whether it is idle, and when it is drained. ``ending`` is set from
    the first moment of the end on.
    """

    def __init__(
        self,
        app: JobApp[Any, Any],
        settings: Settings,
        loop: asyncio.AbstractEventLoop | None,
        inbox: queue.SimpleQueue[str],
        ending: threading.Event,
    ) -> None:
        self._app = app
        self._handlers = dict(app.handlers)
        self._settings = settings
        self._inbox = inbox
        self._ending = ending
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
        self.slots = Slots(self._total, settings.pools, self._on_change, batched)
        controls = Controls(self._handlers)
        self._limiting = Limiting(
            self._control,
            self.slots,
            self._handlers,
            settings.pools,
            controls,
            settings.poll_interval.total_seconds(),
            lambda: self._claiming.wake(),
        )
        self._settler = Settler(
            self._control,
            self._disown,
            lambda: self.slots.waiting > self._total,
            self._limiting.is_awaited,
        )
        self._timeouts = Timeouts(lambda: self._timing.wake(), self._on_hung)
        supervisor = Supervisor(app, self._control, self._timeouts, self._on_end, self._end_apart)
        self._supervisor = supervisor
        self._threads: Threads | None = None
        if app.sessions is not None:
            self._threads = Threads(
                supervisor,
                app.sessions,
                self._total,
                self._next_for_thread,
                self._start_waiting,
            )
        self._loop: EventLoop | None = None
        if any(handler.is_async for handler in self._handlers.values()):
            from sqlalchemy_jobs.worker.event_loop import EventLoop

            assert app.async_sessions is not None
            self._loop = EventLoop(supervisor, app.async_sessions, loop, self._next_for_task)
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
                    settings.pools.serves,
                    self._wakeup,
                    self._on_rung,
                    lambda: self._scheduling.wake(),
                )
        self._lease = Lease(
            self._lease_control,
            settings.lease,
            settings.pools.patterns,
            self._handlers,
            self._on_ready,
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
            self._on_drained,
            controls,
            self._limiting,
        )
        self._scheduler = Scheduler(self._control, self._lease, app.known_schedules, self._wakeup)
        self._lookout = Lookout(self._control, self.slots, self._call_off)
        self._claiming = Loop("claim", self._claimer.step)
        self._settling = Loop("settle", self._settler.step)
        self._leasing = Loop("lease", self._lease.step)
        self._watching = Loop("lease-watch", self._lease.watch)
        self._maintaining = Loop("maintenance", self._maintenance.step)
        self._scheduling = Loop("schedules", self._scheduler.step)
        self._looking_out = Loop("lookout", self._lookout.step)
        self._timing = Loop("timeouts", self._timeouts.step)
        self.one_writer = self._control.dialect.one_writer
        self._listening = Loop("listen", self._listener.step) if self._listener else None
        self._beginning = threading.Lock()
        self._begun = False

    # --- start and end ------------------------------------------------------------------------------

    def check(self) -> None:
        self._control.transaction(preflight.check_database)
        self._control.transaction(lambda session: preflight.check_schedules(session, self._app))
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
                self._scheduling,
                self._looking_out,
            ):
                loop.start()
            bell.sleepers.add(self._claiming)
            bell.schedulers.add(self._scheduling)
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
            self._settings.pools,
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
        bell.schedulers.discard(self._scheduling)
        stop_together(self._claiming, self._maintaining, self._scheduling)

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
        while not self._is_left_to_a_thread() and (run := self.slots.next()) is not None:
            try:
                self._start(run)
            except Exception as error:  # the others are ours to start as well
                trouble = error
        if trouble is not None:
            raise trouble

    def _is_left_to_a_thread(self) -> bool:
        return self._threads is not None and self._threads.take_what_waits()

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
        return self._next_work(is_async=False)

    def _next_for_task(self) -> Work | None:
        return self._next_work(is_async=True)

    def _next_work(self, *, is_async: bool) -> Work | None:
        """Return a waiting run for who has just ended one: so nobody need be woken for it."""
        while (run := self.slots.next()) is not None:
            handler = self._handlers[run.kind]
            if handler.is_async == is_async and not run.claim.crashes:
                return run, handler
            self._start(run)
        return None

    def _give_back(self, runs: list[Run]) -> None:
        for run in runs:
            self._settle(run, transitions.give_back)

    def _disown(self, runs: Sequence[Run]) -> None:
        self.slots.disown(runs)
        self._limiting.disowned(runs)

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
            self._disown([run])
        else:
            self._settle(run, transition)

    def _on_end(self, run: Run, transition: Transition | None) -> None:
        if not self.slots.ended(run):
            return  # it was given up, and its end is written down
        if transition is None:
            self._disown(run.runs if isinstance(run, Batch) else [run])
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

    def _on_rung(self, queue: str) -> None:
        self._claimer.rung(queue)
        self._claiming.wake()

    def _on_ready(self) -> None:
        self._claiming.wake()
        self._scheduling.wake()

    def _on_drained(self) -> None:
        if self._scheduler.is_idle:
            self._inbox.put("drained")

    def _on_change(self) -> None:
        self._claiming.wake()
        if self._ending.is_set():
            self._inbox.put("changed")

    def _on_lost(self, reason: str, *, dead: bool) -> None:
        log.error("%s: the runs in flight are %s", reason, "given up" if dead else "asked to stop")
        if not dead:  # what waits is not to begin
            self._give_back(self.slots.withdraw())
        runs = self.slots.disown_all() if dead else self.slots.running()
        if dead:
            self._limiting.disowned(runs)
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
