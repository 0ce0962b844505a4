"""Takes runs through their handlers, ``def`` and ``async def``.

``def`` handlers run on threads, in ``threads.py``, and ``async def`` on an event loop, in ``event_loop.py``. These two are
the only places that know threads, loops and how sessions are opened. Runs of both colours go through one supervisor.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol, TypeVar

from sqlalchemy.exc import DBAPIError

from sqlalchemy_jobs import transitions
from sqlalchemy_jobs.app import Handler, JobApp
from sqlalchemy_jobs.errors import LeaseLost
from sqlalchemy_jobs.runs import Batch, Run
from sqlalchemy_jobs.transitions import Failure
from sqlalchemy_jobs.worker import batches, execution
from sqlalchemy_jobs.worker.availability import brief
from sqlalchemy_jobs.worker.control import Control
from sqlalchemy_jobs.worker.execution import CommitFailed, Transition
from sqlalchemy_jobs.worker.handling import Handling
from sqlalchemy_jobs.worker.opening import Opened
from sqlalchemy_jobs.worker.timeouts import Timeouts

log = logging.getLogger("sqlalchemy_jobs")

T = TypeVar("T")

Work = tuple[Run, Handler]
Finish = Callable[[Run, Transition | None], None]
"""Takes a run whose handler has ended, and the transition that is still to be made."""


class Colour(Protocol):
    """How sync or async code opens a session, calls a handler and waits for something that blocks."""

    def open(self, handler: Handler) -> Opened: ...
    def close(self, opened: Opened, handler: Handler) -> None: ...
    def caller(self, handler: Handler, argument: Any) -> Callable[[Any], Any]: ...
    def handling(self, run: Run, control: Control) -> Handling: ...
    def block(self, function: Callable[[], T]) -> T: ...


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
            if not run.timed_out and handling.is_cancellation(error, run):
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
