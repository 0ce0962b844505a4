"""JobApp: which handler handles which kind, and where sessions come from."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from types import MappingProxyType
from typing import (
    TYPE_CHECKING,
    Any,
    Generic,
    Literal,
    Protocol,
    TypeAlias,
    TypeGuard,
    TypeVar,
    Unpack,
    overload,
)

from sqlalchemy.orm import Session, scoped_session, sessionmaker

from sqlalchemy_jobs.errors import (
    DeclarationError,
    DuplicateHandler,
    DuplicateKind,
    DuplicateSchedule,
)
from sqlalchemy_jobs.models import Job
from sqlalchemy_jobs.outcomes import Cancel, Snooze
from sqlalchemy_jobs.payloads import (
    Attrs,
    Dataclass,
    Declaration,
    Payload,
    PayloadT,
    Struct,
    declaration_of,
    is_whole,
)
from sqlalchemy_jobs.runs import Run
from sqlalchemy_jobs.schedules import ticks
from sqlalchemy_jobs.schedules.declared import Declared, declare
from sqlalchemy_jobs.schedules.rows import CatchUp, JobOptions, definition

if TYPE_CHECKING:
    # Needs greenlet, which an application without async code does not have.
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

    from sqlalchemy_jobs.worker import Options, Worker

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
Result: TypeAlias = "Json | Dataclass | Attrs | Struct | Snooze | Cancel"
"""What a handler may return. Bound, not open: else an async function would pass for a sync one."""

Entry: TypeAlias = "Result | Exception"
"""What a batch handler's list may hold: an exception says that this job failed."""

ResultT = TypeVar("ResultT", bound=Result)
EntriesT = TypeVar("EntriesT", bound="Sequence[Entry] | None")
SyncT = TypeVar("SyncT", bound=Session)
AsyncT = TypeVar("AsyncT", bound="AsyncSession")
_S = TypeVar("_S")
_A = TypeVar("_A")
_P = TypeVar("_P")

SyncSessions: TypeAlias = sessionmaker[Any] | scoped_session[Any]
AsyncSessions: TypeAlias = "async_sessionmaker[Any]"
Transaction: TypeAlias = Literal["wrapped", "manual"]
Middleware: TypeAlias = Callable[[Run], AbstractContextManager[object]]
LARGEST_BATCH = 1000

_NO_CONTEXT = nullcontext()  # it may be entered again and again; to make one takes longer than that


def _no_context() -> AbstractContextManager[object]:
    return _NO_CONTEXT


class NoSessions:
    """The colour that has no session factory; no handler takes it."""


class _Decorator(Protocol[_S, _A, _P]):
    # Sync first: mypy reports a mistake against the first.
    @overload
    def __call__(self, handler: Callable[[_S, _P], ResultT], /) -> Callable[[_S, _P], ResultT]: ...
    @overload
    def __call__(
        self, handler: Callable[[_A, _P], Coroutine[Any, Any, ResultT]], /
    ) -> Callable[[_A, _P], Coroutine[Any, Any, ResultT]]: ...


class _BatchDecorator(Protocol[_S, _A, _P]):
    @overload
    def __call__(
        self, handler: Callable[[_S, list[_P]], EntriesT], /
    ) -> Callable[[_S, list[_P]], EntriesT]: ...
    @overload
    def __call__(
        self, handler: Callable[[_A, list[_P]], Coroutine[Any, Any, EntriesT]], /
    ) -> Callable[[_A, list[_P]], Coroutine[Any, Any, EntriesT]]: ...


@dataclass(frozen=True)
class Handler:
    """A function and the payload class whose jobs it handles."""

    function: Callable[[Any, Any], Any]
    payload: type[Any]
    declaration: Declaration
    transaction: Transaction
    batch: int | None = None
    """How many payloads it takes at once, at most; None: it is called with one, and not with a list."""

    @cached_property
    def is_async(self) -> bool:
        return _is_async(self.function)

    @property
    def name(self) -> str:
        module = getattr(self.function, "__module__", "?")
        return f"{module}.{getattr(self.function, '__qualname__', self.function)}"


class Handlers(Generic[_S, _A]):
    """Handlers without sessions, for modules that cannot import the app: ``JobApp.include`` takes them.

    ``Handlers[Session, AsyncSession]()`` accepts sync and async handlers.
    """

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}
        self._schedules: dict[str, Declared] = {}

    @property
    def handlers(self) -> Mapping[str, Handler]:
        """The handlers by kind, aliases included."""
        return MappingProxyType(self._handlers)

    @overload
    def handler(
        self, payload: type[PayloadT], /, *, transaction: Transaction = "wrapped"
    ) -> _Decorator[_S, _A, PayloadT]: ...
    @overload
    def handler(
        self, payload: type[PayloadT], /, *, batch: int
    ) -> _BatchDecorator[_S, _A, PayloadT]: ...
    def handler(
        self,
        payload: type[PayloadT],
        /,
        *,
        transaction: Transaction = "wrapped",
        batch: int | None = None,
    ) -> Any:
        """Register the function below as the handler of a payload class; return it unchanged.

        The handler is called as ``handler(session, payload)``, with a session of its own. Return
        commits what it wrote together with the job's new state, raise rolls it back. Returned: None or a
        JSON-able result (kept in ``Job.result``), ``Snooze``, ``Cancel``. Raised: ``Retry``,
        ``Fail``, or any exception, which is retried with backoff.

        ``transaction="wrapped"``: the handler must not end its transaction; savepoints are free. It
        may be run again when its transaction lost against another one.
        ``transaction="manual"``: for handlers that work for long outside the database. It may commit as
        often as it likes; each commit is refused once the job belongs to another run. What it
        committed before a crash stays, and the job runs again: at least once.

        ``batch=100``: called as ``handler(session, payloads)`` with a list of 1 to 100 payloads, whatever is due, and
        ends their jobs in its one transaction. Returned: None, or a list with an entry for each payload, in their
        order: what a handler returns for one, or an exception, by which that job fails and what was written stays.
        Raised: everything is rolled back, and each job counts a failure. A job that failed before is alone in
        its list.

        Raises: DeclarationError, DuplicateHandler, DuplicateKind.
        """
        declaration = declaration_of(payload)
        if transaction not in ("wrapped", "manual"):
            raise DeclarationError(f'transaction={transaction!r}: wanted "wrapped" or "manual"')
        if batch is not None:
            _check_batch(batch, transaction, declaration)

        def register(function: Any) -> Any:
            _check_signature(function, payload, batch)
            handler = Handler(function, payload, declaration, transaction, batch)
            for kind in (declaration.kind, *declaration.aliases):
                self._add(kind, handler)
            return function

        return register

    @property
    def schedules(self) -> Mapping[str, Declared]:
        """The schedules that were declared, by name."""
        return MappingProxyType(self._schedules)

    def schedule(
        self,
        name: str,
        cron: str,
        payload: Payload | Callable[[datetime], Payload],
        /,
        *,
        timezone: str = "UTC",
        catch_up: CatchUp = "skip",
        window: timedelta | None = None,
        run_on_start: bool = False,
        **options: Unpack[JobOptions],
    ) -> None:
        """Declare a schedule: at each tick of ``cron`` one worker enqueues a job.

        ``cron`` has five fields (minute, hour, day, month, weekday) or a sixth, the second, at the end; or it is
        ``@hourly`` and the like, or ``@every 1h30m``. It is about the clock of ``timezone``. ``payload`` is what each
        job carries, or a function of the tick (an aware datetime in UTC) that returns it and says so by its
        annotation; it is called by the worker. The options are those of ``enqueue``. The handler finds the tick in
        ``current_run().scheduled_at``.

        ``catch_up`` says what becomes of ticks that no worker was there for: "skip" lets them pass by, "once"
        makes a job for the latest of them, "all" one for each, where they are no older than ``window`` (by default a
        day). A tick that is late by no more than the time to the next one, 5 s at least and 60 s at most, is
        none of them. ``run_on_start``: there is a tick, too, when the first worker starts.

        A starting worker writes the schedules of its app into the database and deletes those that its app declares no
        more. For schedules that come and go at run time add ``Schedule`` rows.

        Raises: ScheduleError, DuplicateSchedule, PayloadError, DeclarationError.
        """
        rule = definition(name, cron, timezone, catch_up, window, run_on_start, options)
        self._add_schedule(declare(rule, payload))

    def _add_schedule(self, declared: Declared) -> None:
        if self._schedules.setdefault(declared.name, declared) is not declared:
            raise DuplicateSchedule(
                f'there are two schedules "{declared.name}": choose another name for one of them'
            )

    def _add(self, kind: str, handler: Handler) -> None:
        other = self._handlers.setdefault(kind, handler)
        if other.payload is not handler.payload:
            raise DuplicateKind(
                f'kind "{kind}" belongs to {_name(other.payload)} and to {_name(handler.payload)}: '
                "a kind names one payload class; choose another for one of them"
            )
        if other.function is not handler.function:
            raise DuplicateHandler(
                f'kind "{kind}" has the handler {other.name} already: {handler.name} cannot handle it too'
            )
        for name in handler.declaration.limit_names:
            self._check_limit(name, handler)

    def _check_limit(self, name: str, handler: Handler) -> None:
        """Refuse a handler whose limit has a name that stands for other numbers."""
        mine = handler.declaration.limit
        for other in self._handlers.values():
            limit = other.declaration.limit
            if (
                mine
                and limit
                and name in other.declaration.limit_names
                and limit.numbers != mine.numbers
            ):
                raise DeclarationError(
                    f'the limit "{name}" of {_name(handler.payload)} is {mine}, and of {_name(other.payload)} {limit}: '
                    "classes that share a limit must say the same; else choose another name"
                )


class JobApp(Handlers[_S, _A]):
    """The handlers of an application and its session factories; what ``sajobs worker --app`` names.

    ``JobApp(sessions)``, ``JobApp(async_sessions)`` or ``JobApp(sessions, async_sessions)``: a
    ``sessionmaker`` or ``scoped_session`` for ``def`` handlers, an ``async_sessionmaker`` for ``async def``
    ones. ``context`` is called for each run and returns a context manager to work in, for example
    Flask's ``app.app_context``; it is left normally whatever the handler raised. Apps share nothing: several may live in one process.
    """

    @overload
    def __init__(
        self: JobApp[SyncT, NoSessions],
        sessions: sessionmaker[SyncT] | scoped_session[SyncT],
        /,
        *,
        context: Callable[[], AbstractContextManager[object]] = ...,
    ) -> None: ...
    @overload
    def __init__(
        self: JobApp[NoSessions, AsyncT],
        sessions: async_sessionmaker[AsyncT],
        /,
        *,
        context: Callable[[], AbstractContextManager[object]] = ...,
    ) -> None: ...
    @overload
    def __init__(
        self: JobApp[SyncT, AsyncT],
        sessions: sessionmaker[SyncT] | scoped_session[SyncT],
        async_sessions: async_sessionmaker[AsyncT],
        /,
        *,
        context: Callable[[], AbstractContextManager[object]] = ...,
    ) -> None: ...
    def __init__(
        self, *sessions: Any, context: Callable[[], AbstractContextManager[object]] = _no_context
    ) -> None:
        super().__init__()
        self.sessions: SyncSessions | None = None
        self.async_sessions: AsyncSessions | None = None
        self.context = context
        self.middlewares: list[Middleware] = []
        for factory in sessions:
            if isinstance(factory, (sessionmaker, scoped_session)) and self.sessions is None:
                self.sessions = factory
            elif _is_async_sessionmaker(factory) and self.async_sessions is None:
                self.async_sessions = factory
            else:
                raise DeclarationError(
                    f"JobApp was given {factory!r}: it takes a sessionmaker (or scoped_session), an "
                    "async_sessionmaker, or one of each; for an engine write JobApp(sessionmaker(engine))"
                )
        if not sessions:
            raise DeclarationError("JobApp needs a sessionmaker, an async_sessionmaker, or both")

    def include(self, other: Handlers[Any, Any], /) -> None:
        """Take over the handlers and the schedules that ``other`` has now.

        Raises: DuplicateHandler, DuplicateKind, DuplicateSchedule.
        """
        for kind, handler in other.handlers.items():
            self._add(kind, handler)
        for declared in other.schedules.values():
            self._add_schedule(declared)

    @property
    def known_schedules(self) -> ticks.Known:
        """What this app can make the jobs of. For the worker."""
        kinds = {kind: (each.payload, each.declaration) for kind, each in self._handlers.items()}
        return ticks.Known(kinds, dict(self._schedules), self.context)

    def run_schedule(self, session: Session | scoped_session[Any], name: str, /) -> Job:
        """Add a job of a schedule to ``session``, due at once, and return it.

        Use it to try a schedule out, or for a tick that had no job. The schedule's ticks are left as they are, and
        it may be paused; ``scheduled_at`` is the server's time. With an AsyncSession: ``await
        session.run_sync(jobs.run_schedule, name)``.

        Raises: ControlError when there is no such schedule, or its kind has no handler here.
        """
        plain: Session = session() if isinstance(session, scoped_session) else session
        plain.flush()
        return ticks.run(plain, name, self.known_schedules)

    def middleware(self, function: Middleware, /) -> Middleware:
        """Register a context manager to be entered around each handler's call, sync or async.

        It is called with the Run (of a batch: with its first one), and sees what the handler raises. The transaction
        is open around it: it ends after the last middleware. The first registered is the outermost.
        """
        self.middlewares.append(function)
        return function

    def worker(self, **options: Unpack[Options]) -> Worker:
        """Return a worker to run inside this process: ``with`` in sync code, ``async with`` on a loop.

        ``with jobs.worker():`` works in background threads until the block ends; ``async with`` runs
        ``async def`` handlers on the running loop. No signal handler is installed. Start it in the process
        that is to do the work (after a fork, in a lifespan), never at import.

        The options are the fields of ``sqlalchemy_jobs.worker.Settings``. Raises: ConfigurationError.
        """
        from sqlalchemy_jobs.worker import Worker  # the worker imports this module

        return Worker(self, **options)


def _is_async_sessionmaker(factory: object) -> TypeGuard[AsyncSessions]:
    asyncio = sys.modules.get("sqlalchemy.ext.asyncio")
    return asyncio is not None and isinstance(factory, asyncio.async_sessionmaker)


def _check_batch(batch: object, transaction: Transaction, declaration: Declaration) -> None:
    if not is_whole(batch, range(1, LARGEST_BATCH + 1)):
        raise DeclarationError(f"batch={batch!r}: wanted a whole number from 1 to {LARGEST_BATCH}")
    if transaction == "manual":
        raise DeclarationError(
            'batch and transaction="manual": a batch is ended in one transaction, and what one commit of the handler '
            "had written could not be told apart by job; leave one of them away"
        )
    if declaration.on_crash == "fail":
        raise DeclarationError(
            f'batch and "{declaration.kind}" with on_crash="fail": one crash would fail every job of the batch for '
            "good; leave one of them away"
        )


def _check_signature(function: Any, payload: type, batch: int | None) -> None:
    if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
        raise DeclarationError(
            f"{_name(function)} is a generator: a handler returns, it does not yield"
        )
    second = (
        f"payload: {payload.__name__}" if batch is None else f"payloads: list[{payload.__name__}]"
    )
    try:
        inspect.signature(function).bind(object(), object())
    except TypeError as error:
        raise DeclarationError(
            f"{_name(function)} cannot be called as handler(session, {second.partition(':')[0]}): {error}. Write "
            f"def {getattr(function, '__name__', 'handler')}(session: Session, {second})"
        ) from None


def _is_async(function: Any) -> bool:
    # An object with an async __call__ counts too.
    call = getattr(type(function), "__call__", None)  # noqa: B004 (not asking whether it is callable)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def _name(thing: Any) -> str:
    return (
        f"{thing.__module__}.{thing.__qualname__}"
        if hasattr(thing, "__qualname__")
        else repr(thing)
    )
