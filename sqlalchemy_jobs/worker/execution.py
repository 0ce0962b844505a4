"""One run: load the payload, call the handler, classify how it ended, settle it.

What a run comes to is a *transition*: a function of a session and the claim, which is True when the run
still owned its job. A handler that used its session has it made in that very transaction; otherwise it is
returned, to be made elsewhere together with others.
"""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from sqlalchemy_jobs import transitions
from sqlalchemy_jobs.app import Handler, Middleware
from sqlalchemy_jobs.backoff import quartic, wait
from sqlalchemy_jobs.claims import Claim
from sqlalchemy_jobs.codec import decode, to_json
from sqlalchemy_jobs.errors import (
    HandlerChangedItsJob,
    LeaseLost,
    ResultError,
    RunInterrupted,
)
from sqlalchemy_jobs.models import Job
from sqlalchemy_jobs.outcomes import Cancel, Fail, Retry, Snooze, checked_delay
from sqlalchemy_jobs.payloads import Declaration
from sqlalchemy_jobs.runs import Batch, Run
from sqlalchemy_jobs.states import Outcome
from sqlalchemy_jobs.transitions import Failure
from sqlalchemy_jobs.worker import guard
from sqlalchemy_jobs.worker.availability import is_lost
from sqlalchemy_jobs.worker.handling import Handling

log = logging.getLogger("sqlalchemy_jobs")

Transition = Callable[[Session, Claim], bool]

_NOT_OURS = "job {} belongs to another run by now: nothing was written"
NOT_KEPT = timedelta(0)

RERUNS = 5
"""How often a wrapped handler is run again at once when its transaction lost against another one."""

LONG_WRITE = 5.0
"""Seconds of holding SQLite's write lock that are worth a warning."""


class CommitFailed(Exception):
    """The commit of a run raised; the cause tells whether its outcome is known."""


def perform(
    session: Session, handling: Handling, handler: Handler, work: Callable[[], Transition]
) -> Transition | None:
    """Do a handler's work in its session; None when it is settled, else the transition to be made.

    Raises what the handler raises; RunInterrupted; LeaseLost when the job belongs to another run by now;
    CommitFailed.
    """
    run = handling.run
    with guard.Watch(session, handling, manual=handler.transaction == "manual") as watch:
        try:
            with handling:
                if not session.autobegin:
                    session.begin()
                transition = work()
                watch.check()
                if not session.in_transaction():
                    return transition
                session.flush()
        except RunInterrupted:
            # It may have come in the midst of what a driver says to its server: such a connection must not
            # go back to its pool, as a rollback would have it. SQLite has no server to talk to, and does not
            # roll back a connection that is closed while a cursor is left over.
            if session.get_bind(Job).dialect.name == "sqlite":
                session.rollback()
            else:
                session.invalidate()
            raise
        held_since = watch.began_at
        goes_along = watch.completes_by_its_commit(transition)
        if not goes_along:
            if not transition(session, run.claim):
                raise LeaseLost(_NOT_OURS.format(run.job_id))
            watch.undo_a_refused_commit()
        watch.settling = True
        try:
            session.commit()
        except BaseException as error:
            if watch.is_lease_lost(error):
                raise LeaseLost(_NOT_OURS.format(run.job_id)) from error
            raise CommitFailed from error
        if goes_along and not watch.has_completed:
            log.error(
                "%s %s: its completion did not go along with its commit", run.kind, run.job_id
            )
            return transition
        _warn_of_long_write(session, handler, held_since)
        _warn_of_two_databases(watch, handler)
    return None


def work(run: Run, handler: Handler, call: Callable[[Any], Any]) -> Transition:
    """Decode the payload, call the handler and return the transition that it asks for.

    Raises: what the handler raises, InvalidPayload, ResultError.
    """
    payload = decode(handler.payload, run.claim.payload, handler.declaration.upgrade)
    return classify(call(payload), handler.declaration)


def through(
    middlewares: list[Middleware], run: Run, call: Callable[[Any], Any]
) -> Callable[[Any], Any]:
    """Return the same call with every middleware around it, the first outermost."""

    def inside(payload: Any) -> Any:
        with ExitStack() as stack:
            for middleware in middlewares:
                stack.enter_context(middleware(run.runs[0] if isinstance(run, Batch) else run))
            return call(payload)
        raise LookupError(f"a middleware swallowed what the handler of {run.kind} raised")

    return inside if middlewares else call


def classify(value: object, declaration: Declaration) -> Transition:
    """Return the transition that a handler's return value asks for.

    Raises: ResultError.
    """
    kept = declaration.keep != NOT_KEPT
    match value:
        case None:
            return transitions.complete if kept else transitions.discard
        case Snooze(delay):
            return partial(transitions.snooze, delay=delay)
        case Cancel(reason):
            return partial(transitions.cancel, reason=reason)
    try:
        result = to_json(value)
    except Exception as error:
        raise ResultError(
            f"the handler returned a {type(value).__name__} that cannot be stored as JSON ({error}): "
            "return None, JSON-able data, Snooze or Cancel"
        ) from error
    return partial(transitions.complete, result=result) if kept else transitions.discard


def classify_error(error: BaseException, run: Run, declaration: Declaration) -> Transition:
    """Return the transition that an exception asks for: retry with backoff, or fail."""
    failure = describe(error)
    if run.timed_out:
        failure = replace(failure, message=_timed_out(declaration), outcome=Outcome.TIMED_OUT)
    return failed(error, failure, run, declaration)


def hung(run: Run, declaration: Declaration, where: str | None) -> Transition:
    """Return the transition for a run that did not come back after it had been interrupted."""
    message = f"{_timed_out(declaration)}; it did not come back when it was interrupted"
    return failed(
        RunInterrupted(message),
        Failure(message, _name_of(RunInterrupted), where, Outcome.TIMED_OUT),
        run,
        declaration,
    )


def not_repeated(run: Run) -> Transition:
    """Return the transition for a job whose worker died in it, and that must not run again."""
    log.warning("%s %s failed for good: its worker died in it, on_crash=fail", run.kind, run.job_id)
    failure = Failure('not run again: its worker had died while running it, and on_crash is "fail"')
    return partial(transitions.fail, failure=failure)


def _timed_out(declaration: Declaration) -> str:
    return f"the run took longer than its timeout of {declaration.timeout}"


def failed(
    error: BaseException, failure: Failure, run: Run, declaration: Declaration
) -> Transition:
    """Return the transition for a run that failed: retry with backoff, or fail."""
    failures = run.failures + 1
    if isinstance(error, (Fail, *declaration.give_up_on)) or failures >= run.claim.max_attempts:
        log.warning("%s %s failed for good: %s", run.kind, run.job_id, _short(failure))
        return partial(transitions.fail, failure=failure)
    delay = error.delay if isinstance(error, Retry) else None
    if delay is None:
        delay = _backoff(declaration, failures, error)
    log.warning(
        "%s %s failed (%d of %d), again in %s: %s",
        run.kind,
        run.job_id,
        failures,
        run.claim.max_attempts,
        timedelta(seconds=round(delay.total_seconds())),
        _short(failure),
    )
    return partial(transitions.retry, failure=failure, delay=delay)


def released(reason: str) -> Transition:
    """Return the transition for a run that was given up without being at fault."""
    return partial(transitions.release, reason=reason)


def is_unknown(error: BaseException) -> bool:
    """Tell whether a commit that raised this may have been carried out all the same.

    Whatever else a commit raises (a listener's error, a deferred constraint) has rolled it back.
    """
    if isinstance(error, DBAPIError):
        return error.connection_invalidated
    return isinstance(error, (asyncio.CancelledError, OSError)) or is_lost(error)


def describe(error: BaseException) -> Failure:
    """Put an exception into the words of an attempt: its type, text and the handler's traceback."""
    cls = type(error)
    frames = error.__traceback__
    while frames and frames.tb_next and _is_ours(frames.tb_frame.f_globals.get("__name__", "")):
        frames = frames.tb_next
    lines = traceback.format_exception(cls, error, frames)
    try:
        message = str(error)
    except Exception as broken:
        message = f"(its text cannot be had: {broken!r})"
    return Failure(message, _name_of(cls), "".join(lines))


def forget(error: BaseException | None) -> None:
    """Drop what the frames of an error refer to, its causes included: cursors and connections among it.

    SQLAlchemy closes a connection that was interrupted in the midst of a statement; on SQLite its write lock
    lasts for as long as a cursor is referred to.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def lost_or_changed(run: Run, *, still_owned: bool) -> HandlerChangedItsJob | None:
    """Tell a lost lease (None) from a handler that changed the row of its own job."""
    if not still_owned:
        return None
    return HandlerChangedItsJob(
        f"the handler changed the row of its own job {run.job_id}: return Snooze, Cancel or a result, "
        "and leave state, attempt and worker_id alone"
    )


def _name_of(cls: type[BaseException]) -> str:
    module = "" if cls.__module__ == "builtins" else f"{cls.__module__}."
    return f"{module}{cls.__qualname__}"[:200]


def _is_ours(module: str) -> bool:
    return module.startswith(("sqlalchemy_jobs.worker", "sqlalchemy.util", "contextlib"))


def _backoff(declaration: Declaration, failures: int, error: BaseException) -> timedelta:
    try:
        return checked_delay(wait(declaration.backoff, failures, error), "backoff()")
    except Exception:
        log.exception('the backoff of "%s" raised: the default one is used', declaration.kind)
        return quartic(failures)


def _short(failure: Failure) -> str:
    first = failure.message.strip().splitlines() or [""]
    return f"{failure.error_type}: {first[0]}" if failure.error_type else first[0]


_warned_of: set[str] = set()


def _warn_of_two_databases(watch: guard.Watch, handler: Handler) -> None:
    if len(watch.databases) > 1 and handler.name not in _warned_of:
        _warned_of.add(handler.name)
        log.warning(
            "%s used %d databases in its session: what it writes to the other one does not commit together "
            "with the job",
            handler.name,
            len(watch.databases),
        )


def _warn_of_long_write(session: Session, handler: Handler, held_since: float | None) -> None:
    held = 0.0 if held_since is None else time.monotonic() - held_since
    if held > LONG_WRITE and session.get_bind(Job).dialect.name == "sqlite":
        log.warning(
            "%s held SQLite's only write lock for %.0f s, and everybody else waited: use the session "
            'last, or register the handler with transaction="manual"',
            handler.name,
            held,
        )
