"""Async handlers as tasks of an event loop. Imported only for an app that has some: it needs greenlet.

A run is supervised by the same plain function as on a thread. It runs in a greenlet, as SQLAlchemy's own
asyncio extension does it, so that the session's calls and the handler's coroutine can be awaited from it. The
next run may have the same greenlet; its task and the context of that are its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import Context
from functools import partial
from typing import Any, TypeVar, cast

from greenlet import getcurrent, greenlet
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from sqlalchemy_jobs.app import AsyncSessions, Handler
from sqlalchemy_jobs.errors import RunInterrupted
from sqlalchemy_jobs.runs import Run
from sqlalchemy_jobs.tables import TO_JOB
from sqlalchemy_jobs.worker.control import Control
from sqlalchemy_jobs.worker.executors import Supervisor, Work
from sqlalchemy_jobs.worker.handling import Handling
from sqlalchemy_jobs.worker.loops import LoopThread
from sqlalchemy_jobs.worker.opening import Opened, Reserve

T = TypeVar("T")

_RETURNED = object()


class Greenlet(greenlet):  # type: ignore[misc]  # it comes without types
    """Calls one function after another, as ``greenlet_spawn`` calls one.

    For each a new one Python would map memory, for its stack, and unmap it again: half of what a run costs.
    """

    __sqlalchemy_greenlet_provider__ = True  # await_only asks for it

    def __init__(self) -> None:
        super().__init__(_call_what_comes)

    async def call(self, function: Callable[[], object]) -> None:
        """Call a function and await what it gives to ``await_only``."""
        self.parent = driver = getcurrent()
        self.gr_context = driver.gr_context
        awaitable = self.switch(function)
        while awaitable is not _RETURNED:
            try:
                value = await awaitable
            except BaseException as error:
                awaitable = self.throw(error)
            else:
                awaitable = self.switch(value)


def _call_what_comes(function: Callable[[], object]) -> None:
    # The greenlet itself is not named here: by its own stack it would be referred to for ever.
    while True:
        function()
        function = cast(greenlet, getcurrent().parent).switch(_RETURNED)


class Async:
    """In a greenlet on the event loop."""

    def __init__(
        self, sessions: AsyncSessions, tasks: Mapping[Run, asyncio.Task[None]], *, is_guest: bool
    ) -> None:
        self._sessions = sessions
        self._tasks = tasks
        self._is_guest = is_guest
        self._reserve = Reserve(AsyncSession)
        self._closing: set[asyncio.Future[None]] = set()  # the loop itself refers to them weakly

    def open(self, handler: Handler) -> Opened:
        return self._reserve.take(handler, self._made)

    def _made(self) -> tuple[Session, AsyncSession]:
        session = self._sessions()
        return session.sync_session, session

    def close(self, opened: Opened, handler: Handler) -> None:
        if self._reserve.takes(opened, handler):
            return
        # A task that was cancelled may be cancelled again: the connection must go back all the same. Not one of the
        # loop's task factory here either: an eager one would begin it in our greenlet, and then come back there.
        closing = asyncio.Task(opened.argument.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        await_only(asyncio.shield(closing))

    def caller(self, handler: Handler, argument: Any) -> Callable[[Any], Any]:
        return lambda payload: await_only(handler.function(argument, payload))

    def handling(self, run: Run, control: Control) -> Handling:
        return TaskHandling(run, self._tasks[run], is_guest=self._is_guest)

    def block(self, function: Callable[[], T]) -> T:
        return await_only(asyncio.to_thread(function))


class TaskHandling(Handling):
    """As a task: it is cancelled, at what it awaits. ``is_guest``: on a loop of the application, which may end, too."""

    __slots__ = ("_is_guest", "_task")

    def __init__(self, run: Run, task: asyncio.Task[None], *, is_guest: bool) -> None:
        super().__init__(run)
        self._task = task
        self._is_guest = is_guest

    def _reach(self) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._task.get_loop().call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self._inside:
            self._task.cancel()

    def _withdraw(self) -> None:
        """Nothing is on its way: it was told inside, or is not told."""

    def uses(self, connection: Connection) -> None:
        """The driver itself cancels the statement of a task that is cancelled."""

    def _is_it(self, error: BaseException | None) -> bool:
        return isinstance(error, (asyncio.CancelledError, RunInterrupted))

    def is_cancellation(self, error: BaseException, run: Run) -> bool:
        # Else the handler itself has cancelled its task, or something that it awaits: that fails, as often as it is tried.
        is_from_outside = run.should_stop or (self._is_guest and self._task.cancelling() > 0)
        return isinstance(error, asyncio.CancelledError) and is_from_outside


class EventLoop:
    """Runs async handlers as tasks: on the application's running loop, or on one of its own."""

    def __init__(
        self,
        supervisor: Supervisor,
        sessions: AsyncSessions,
        loop: asyncio.AbstractEventLoop | None,
        next_work: Callable[[], Work | None],
    ) -> None:
        self._supervisor = supervisor
        self._cancellable: dict[Run, asyncio.Task[None]] = {}
        self._colour = Async(sessions, self._cancellable, is_guest=loop is not None)
        self._sessions = sessions
        self._next_work = next_work
        self._own = LoopThread("loop") if loop is None else None
        self._loop = self._own.loop if self._own else cast(asyncio.AbstractEventLoop, loop)

    def start(self, run: Run, handler: Handler) -> None:
        self._loop.call_soon_threadsafe(self._begin, run, handler)

    def cancel(self, run: Run) -> None:
        self._loop.call_soon_threadsafe(self._cancel, run)

    def check(self, check: Callable[[Connection], None]) -> None:
        """Apply a check to a connection such as handlers get; called from another thread."""

        async def on_loop() -> None:
            async with self._sessions() as session:
                await session.run_sync(lambda sync: check(sync.connection(bind_arguments=TO_JOB)))

        asyncio.run_coroutine_threadsafe(on_loop(), self._loop).result()

    def stop(self) -> None:
        if self._own:
            self._own.close(self._dispose())

    async def _dispose(self) -> None:
        """Close the connections of the engines that were used here: they belong to this loop."""
        session = self._sessions()
        # Both attributes came after SQLAlchemy 2.0.31.
        binds = getattr(session, "binds", None) or {}
        for bind in {getattr(session, "bind", None), *binds.values()}:
            if isinstance(bind, AsyncEngine):
                await bind.dispose()
        await session.close()

    def _begin(self, run: Run, handler: Handler, last: Greenlet | None = None) -> None:
        # A task for each run: it sees nothing that another one has left in its context. Not one of the loop's
        # task factory: an eager one would begin each run within the one before.
        work = self._work(run, handler, last or Greenlet())  # one that has died is false
        asyncio.Task(work, loop=self._loop, context=Context())

    async def _work(self, run: Run, handler: Handler, in_greenlet: Greenlet) -> None:
        task = asyncio.current_task(self._loop)
        assert task is not None
        self._cancellable[run] = task  # the loop itself refers to it weakly
        try:
            if run.should_stop:
                self._supervisor.give_back(run)
            else:
                await in_greenlet.call(
                    partial(self._supervisor.supervise, run, handler, self._colour)
                )
        finally:
            del self._cancellable[run]
            if (work := self._next_work()) is not None:
                self._begin(*work, in_greenlet)

    def _cancel(self, run: Run) -> None:
        # A task that is cancelled before its first step would never hand its run on: such a run was asked to
        # stop, and sees it when it begins.
        if task := self._cancellable.get(run):
            task.cancel()
