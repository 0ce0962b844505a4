"""Where handlers run: ``def`` on threads; ``async def`` on an event loop, in ``event_loop.py``.

These two are the only places that know threads, loops and how sessions are opened. Runs of both colours
go through one supervisor.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, Protocol, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, scoped_session

from sqlalchemy_jobs import transitions
from sqlalchemy_jobs.app import Handler, JobApp, SyncSessions
from sqlalchemy_jobs.errors import LeaseLost
from sqlalchemy_jobs.runs import Batch, Run
from sqlalchemy_jobs.tables import TO_JOB
from sqlalchemy_jobs.transitions import Failure
from sqlalchemy_jobs.worker import batches, execution
from sqlalchemy_jobs.worker.availability import brief
from sqlalchemy_jobs.worker.control import Control
from sqlalchemy_jobs.worker.execution import CommitFailed, Transition
from sqlalchemy_jobs.worker.handling import Handling, ThreadHandling
from sqlalchemy_jobs.worker.loops import Loop
from sqlalchemy_jobs.worker.timeouts import Timeouts

log = logging.getLogger("sqlalchemy_jobs")

T = TypeVar("T")

Work = tuple[Run, Handler]
QUICK = 0.0001
"""Seconds within which a run is quick: one thread takes all of those, others would only take the interpreter from it."""
REST = 20
"""Of how many runs of a handler it is not asked whether they left their sessions as new, after one did not."""
LOOK = 0.001
"""Seconds between two looks whether that thread has gone on to another run."""
LOOKS = 3
"""After how many in vain it counts as blocked: it may have waited for the interpreter."""

Finish = Callable[[Run, Transition | None], None]
"""Takes a run whose handler has ended, and the transition that is still to be made."""


class Opened:
    """A session for a run, and what the handler gets for it: ``base`` is SQLAlchemy's class of that.

    ``base`` is None where it serves one run only.
    """

    def __init__(self, session: Session, argument: Any, base: type[Any] | None) -> None:
        self.session = session
        self.argument = argument
        # A session with listeners of its own has the attribute that tells of a transaction from the beginning.
        self._may_serve_again = (
            base is not None
            and "dispatch" not in vars(session)
            and all(
                type(each).__init__ is own.__init__ and type(each).close is own.close
                for each, own in ((session, Session), (argument, base))
            )
        )
        if not self._may_serve_again:
            return
        session.info  # noqa: B018 (it is made by the first look at it)
        self._attributes = [vars(each) for each in dict.fromkeys((session, argument))]
        self._were = [each.copy() for each in self._attributes]
        self._dicts = [
            value for each in self._were for value in each.values() if type(value) is dict
        ]
        self._held = [each.copy() for each in self._dicts]

    def is_as_new(self) -> bool:
        """Tell whether nobody can see that it served a run: so it may serve another one, without being closed.

        To make a session and to close it costs as much as all the rest of a run. Never told of a class that does more
        than SQLAlchemy's own. A transaction leaves an attribute behind, and without one there is nothing in the
        identity map.
        """
        return (
            self._may_serve_again and self._attributes == self._were and self._dicts == self._held
        )


class Reserve:
    """Sessions that served a run and are as new: the next one may have them."""

    def __init__(self, base: type[Any]) -> None:
        self._base = base
        self._as_new: deque[Opened] = deque()
        self._rests: dict[str, int] = {}
        """By kind: of how many runs more the sessions are not looked at."""

    def take(self, handler: Handler, make: Callable[[], tuple[Session, Any]]) -> Opened:
        try:
            return self._as_new.pop()
        except IndexError:
            session, argument = make()
        kind = handler.declaration.kind
        if rest := self._rests.get(kind, 0):
            self._rests[kind] = rest - 1
        return Opened(session, argument, None if rest else self._base)

    def takes(self, opened: Opened, handler: Handler) -> bool:
        """Keep a session if it is as new; else it is to be closed."""
        if opened.is_as_new():
            self._as_new.append(opened)
            return True
        kind = handler.declaration.kind
        if not self._rests.get(kind):
            self._rests[kind] = REST
        return False


class Colour(Protocol):
    """How sync or async code opens a session, calls a handler and waits for something that blocks."""

    def open(self, handler: Handler) -> Opened: ...
    def close(self, opened: Opened, handler: Handler) -> None: ...
    def caller(self, handler: Handler, argument: Any) -> Callable[[Any], Any]: ...
    def handling(self, run: Run, control: Control) -> Handling: ...
    def block(self, function: Callable[[], T]) -> T: ...


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


class Supervisor:
    """Takes a run through its handler, whatever happens, and hands it on to be settled."""

    def __init__(
        self,
        app: JobApp[Any, Any],
        control: Control,
        timeouts: Timeouts,
        finish: Finish,
        end_apart: Callable[[Batch, Run, Transition | None], None],
    ) -> None:
        self._app = app
        self._control = control
        self._timeouts = timeouts
        self._finish = finish
        self._end_apart = end_apart
        self._handlings: dict[Run, Handling] = {}
        self._asking = threading.Lock()

    def give_back(self, run: Run) -> None:
        """Give back a run whose handler was not even called."""
        self._finish(run, transitions.give_back)

    def interrupt(self, runs: Iterable[Run]) -> None:
        """Interrupt the handlers of runs that are given up, where they are at work."""
        for run in runs:
            if handling := self._handlings.get(run):
                handling.interrupt(timed_out=False)

    def call_off(self, run: Run) -> None:
        """Interrupt the handler of a run whose job was taken from it, and give it up if it does not come back."""
        if handling := self._handlings.get(run):
            self._timeouts.call_off(handling)

    def supervise(self, run: Run, handler: Handler, colour: Colour) -> bool:
        """Take a run to its end; False when its handler had to be interrupted."""
        handling = self._handlings[run] = colour.handling(run, self._control)
        if (timeout := handler.declaration.timeout) is not None:
            run.begin(timeout)
            handling.deadline = time.monotonic() + timeout.total_seconds()
            self._timeouts.watch(handling)
        try:
            token = run.enter()
            try:
                with self._app.context():
                    transition = self._outcome(handling, handler, colour)
            finally:
                run.leave(token)
        except BaseException as error:  # of the context itself
            transition = self._classified(error, handling, handler)
        del self._handlings[run]
        self._timeouts.forget(handling)
        self._finish(run, transition)
        return not handling.interrupted

    def _outcome(self, handling: Handling, handler: Handler, colour: Colour) -> Transition | None:
        try:
            return self._run(handling, handler, colour)
        except BaseException as error:
            return self._classified(error, handling, handler)

    def _classified(self, error: BaseException, handling: Handling, handler: Handler) -> Transition:
        if handling.interrupted:
            execution.forget(error)
        return batches.of_each(
            handling.run, lambda run: self._classified_run(error, run, handling, handler)
        )

    @staticmethod
    def _classified_run(
        error: BaseException, run: Run, handling: Handling, handler: Handler
    ) -> Transition:
        """Never raises: a run that is handed on by nobody would stay running for ever."""
        try:
            if handling.interrupted and not run.timed_out:
                return execution.released("the worker stopped")
            if not run.timed_out and execution.is_cancellation(error, run):
                return execution.released("its task was cancelled")
            return execution.classify_error(error, run, handler.declaration)
        except Exception:
            log.exception("%s %s raised something that cannot be classified", run.kind, run.job_id)
            return partial(transitions.fail, failure=Failure("its error could not be classified"))

    def _run(self, handling: Handling, handler: Handler, colour: Colour) -> Transition | None:
        run = handling.run
        rerun = 0
        while True:
            try:
                payloads = None
                if isinstance(run, Batch):
                    payloads = batches.payloads_of(run, handler, self._end_apart)
                    if not payloads:
                        return None
                opened = colour.open(handler)
                try:
                    call = colour.caller(handler, opened.argument)
                    call = execution.through(self._app.middlewares, run, call)
                    work: Callable[[], Transition] = partial(execution.work, run, handler, call)
                    if payloads is not None:
                        work = partial(batches.work, payloads, handler, call)
                    return execution.perform(opened.session, handling, handler, work)
                finally:
                    colour.close(opened, handler)
            except LeaseLost:
                had = len(run.claims)
                still_owned = self._still_owned(run, colour)
                if still_owned and len(run.claims) < had:
                    continue  # a batch, without those that it lost: no failure of the others
                changed = execution.lost_or_changed(run, still_owned=bool(still_owned))
                if changed is None:
                    log.warning(
                        "%s %s belongs to another run: nothing was written", run.kind, run.job_id
                    )
                    return None
                return self._classified(changed, handling, handler)
            except BaseException as error:
                cause = error.__cause__ if isinstance(error, CommitFailed) else error
                assert cause is not None
                if isinstance(error, CommitFailed) and execution.is_unknown(cause):
                    self._control.availability.broke(cause)
                    log.warning(
                        "%s %s: its commit may or may not have arrived; the row will tell: %s",
                        run.kind,
                        run.job_id,
                        brief(cause),
                    )
                    return execution.released("the connection was lost during COMMIT")
                if handler.transaction == "manual" or not self._may_rerun(cause, rerun):
                    raise cause  # noqa: B904 (the cause is the handler's own error)
                still_owned = self._still_owned(run, colour)
                if still_owned is None:
                    raise cause  # noqa: B904
                if not still_owned:
                    return None
                rerun += 1

    def _may_rerun(self, error: BaseException, rerun: int) -> bool:
        """Tell whether a wrapped handler may run again at once; all that it wrote is rolled back.

        When its transaction lost against another one; and the first time that its connection broke, which
        may have been a pooled one from before a restart of the server.
        """
        if isinstance(error, DBAPIError) and error.connection_invalidated:
            return rerun == 0
        return rerun < execution.RERUNS and self._control.dialect.is_conflict(error)

    def _still_owned(self, run: Run, colour: Colour) -> bool | None:
        """Ask the row; None when it cannot be asked now. A batch parts with those of its runs that lost theirs."""

        def ask() -> set[uuid.UUID]:
            with (
                self._asking
            ):  # after a restart of the server all may ask: one connection is enough
                return self._control.transaction(
                    lambda session: transitions.owned_of(session, run.claims)
                )

        try:
            owned = colour.block(ask)
        except Exception as error:
            log.debug("%s %s: who owns it could not be asked: %s", run.kind, run.job_id, error)
            return None
        if isinstance(run, Batch):
            for lost in [each for each in run.runs if each.job_id not in owned]:
                log.warning(
                    "%s %s was taken from its batch, which goes on without it",
                    lost.kind,
                    lost.job_id,
                )
                self._end_apart(run, lost, None)
        return bool(owned)


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
