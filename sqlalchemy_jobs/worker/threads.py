"""Where sync handlers run: on threads. The counterpart of ``event_loop.py``."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from sqlalchemy import Connection
from sqlalchemy.orm import Session, scoped_session

from sqlalchemy_jobs.app import Handler, SyncSessions
from sqlalchemy_jobs.runs import Run
from sqlalchemy_jobs.tables import TO_JOB
from sqlalchemy_jobs.worker.control import Control
from sqlalchemy_jobs.worker.executors import Supervisor, Work
from sqlalchemy_jobs.worker.handling import Handling, ThreadHandling
from sqlalchemy_jobs.worker.loops import Loop
from sqlalchemy_jobs.worker.opening import Opened, Reserve

T = TypeVar("T")

QUICK = 0.0001
"""Seconds within which a run is quick: one thread takes all of those, others would only take the interpreter from it."""
LOOK = 0.001
"""Seconds between two looks whether that thread has gone on to another run."""
LOOKS = 3
"""After how many in vain it counts as blocked: it may have waited for the interpreter."""


class Sync:
    """On a thread."""

    def __init__(self, sessions: SyncSessions) -> None:
        self._sessions = sessions
        self._scoped = sessions if isinstance(sessions, scoped_session) else None
        self._reserve = Reserve(Session)

    def open(self, handler: Handler) -> Opened:
        if self._scoped is None:
            return self._reserve.take(handler, self._made)
        session = self.make()
        # Helpers that use the global session must write into this transaction.
        self._scoped.registry.set(session)
        return Opened(session, session, None)

    def _made(self) -> tuple[Session, Session]:
        session = self.make()
        return session, session

    def close(self, opened: Opened, handler: Handler) -> None:
        if self._scoped is not None:
            self._scoped.remove()  # closes it, too
        elif not self._reserve.takes(opened, handler):
            opened.session.close()

    def make(self) -> Session:
        """Return a new session, also where the factory would return the thread's own."""
        factory = self._sessions if self._scoped is None else self._scoped.session_factory
        session: Session = factory()
        return session

    def caller(self, handler: Handler, argument: Any) -> Callable[[Any], Any]:
        return partial(handler.function, argument)

    def handling(self, run: Run, control: Control) -> Handling:
        return ThreadHandling(run, control)

    def block(self, function: Callable[[], T]) -> T:
        return function()


class Threads:
    """Runs sync handlers on daemon threads, made as they are needed.

    As many at once as there are runs; but while runs are quick one thread takes them all, as long as it goes on. Who
    leaves runs to it wakes the watch, which has ``start_waiting`` called once that thread has no more or is blocked.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        sessions: SyncSessions,
        most: int,
        next_work: Callable[[], Work | None],
        start_waiting: Callable[[], None],
    ) -> None:
        self._supervisor = supervisor
        self._colour = Sync(sessions)
        self._most = most
        self._next_work = next_work
        self._start_waiting = start_waiting
        self._was_quick = False
        self._alone: Run | None = None
        """What the one thread is at that takes all the runs."""
        self._watch = Loop("handlers", self._look)
        self._seen: Run | None = None
        self._looks = 0
        self._look_at = 0.0
        self._work: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._serving: set[Run] = set()
        self._idle = 0
        self._count = 0
        self._lock = threading.Lock()

    def take_what_waits(self) -> bool:
        """Tell whether runs may be left to a thread that is at work: nobody else need start them."""
        if self._alone is None:
            return False
        self._watch.wake()
        return True

    def start(self, run: Run, handler: Handler) -> None:
        with self._lock:
            if self._was_quick:
                self._alone = run
            if self._idle <= 0:
                self._add_thread()
            self._idle -= 1
        self._work.put((run, handler))

    def replace(self, run: Run) -> None:
        """Count no more on the thread of a run that does not come back."""
        if self._give_up(run):
            self._lose()

    def _give_up(self, run: Run) -> bool:
        """Decide, in one step, whether a thread goes on after its run or is replaced."""
        try:
            self._serving.remove(run)
        except KeyError:
            return False
        return True

    def _lose(self) -> None:
        with self._lock:
            self._count -= 1
            if self._idle < 0:
                with suppress(
                    RuntimeError
                ):  # no thread can be started now: the next run tries again
                    self._add_thread()

    def _add_thread(self) -> None:
        if self._count >= self._most:
            return
        if self._most > 1:
            self._watch.start()
        name = f"sajobs-handler-{self._count + 1}"
        threading.Thread(target=self._serve, name=name, daemon=True).start()
        # Not counted when it could not be started.
        self._count += 1
        self._idle += 1

    def check(self, check: Callable[[Connection], None]) -> None:
        """Apply a check to a connection such as handlers get."""
        # Not through open(): that would replace the caller's own session in a scoped registry.
        session = self._colour.make()
        try:
            check(session.connection(bind_arguments=TO_JOB))
        finally:
            session.close()

    def stop(self) -> None:
        self._watch.stop()
        for _ in range(self._count):
            self._work.put(None)

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            now = time.monotonic()
            while work is not None:
                run, handler = work
                began = now
                self._serving.add(run)
                sound = self._serve_run(run, handler)
                if not self._give_up(run):
                    return  # it was replaced
                if not sound:  # who knows what the exception has left behind in its thread
                    self._lose()
                    return
                now = time.monotonic()
                # Of several only: the watch is for the others.
                work = self._next(run, quick=self._most > 1 and now - began < QUICK)
            with self._lock:
                self._idle += 1

    def _next(self, run: Run, *, quick: bool) -> Work | None:
        self._was_quick = quick
        if quick and self._alone is not run and self.take_what_waits():
            return None
        work = self._next_work()
        if quick:
            self._alone = work and work[0]
        elif self._alone is run:
            self._alone = None
        return work

    def _look(self) -> float | None:
        """The step of the watch."""
        now = time.monotonic()
        if now < self._look_at:
            return self._look_at - now
        alone, self._looks = self._alone, self._looks + 1
        if alone is not self._seen:
            self._seen, self._looks = alone, 0
        if alone is not None and self._looks < LOOKS:
            self._look_at = now + LOOK
            return LOOK
        if alone is not None:
            self._alone, self._was_quick = None, False
        self._start_waiting()
        return None

    def _serve_run(self, run: Run, handler: Handler) -> bool:
        if run.should_stop:
            self._supervisor.give_back(run)
            return True
        return self._supervisor.supervise(run, handler, self._colour)
