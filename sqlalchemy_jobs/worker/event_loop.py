"""Async handlers as tasks of an event loop. Imported only for an app that has some: it needs greenlet.

A run is supervised by the same plain function as on a thread. It runs in a greenlet, as SQLAlchemy's own
asyncio extension does it, so that the session's calls and the handler's coroutine can be awaited from it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context
from typing import Any, TypeVar, cast

from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only, greenlet_spawn

from sqlalchemy_jobs.app import AsyncSessions, Handler
from sqlalchemy_jobs.errors import RunInterrupted
from sqlalchemy_jobs.runs import Run
from sqlalchemy_jobs.tables import TO_JOB
from sqlalchemy_jobs.worker.control import Control
from sqlalchemy_jobs.worker.executors import Opened, Reserve, Supervisor, Work
from sqlalchemy_jobs.worker.handling import Handling
from sqlalchemy_jobs.worker.loops import LoopThread

T = TypeVar("T")


class Async:
    """In a greenlet on the event loop."""

    def __init__(self, sessions: AsyncSessions) -> None:
        self._sessions = sessions
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
        # A task that was cancelled may be cancelled again: the connection must go back all the same.
        closing = asyncio.ensure_future(opened.argument.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        await_only(asyncio.shield(closing))

    def caller(self, handler: Handler, argument: Any) -> Callable[[Any], Any]:
        return lambda payload: await_only(handler.function(argument, payload))

    def handling(self, run: Run, control: Control) -> Handling:
        return TaskHandling(run)

    def block(self, function: Callable[[], T]) -> T:
        return await_only(asyncio.to_thread(function))


class TaskHandling(Handling):
    """As a task: it is cancelled, at what it awaits."""

    __slots__ = ("_loop", "_task")

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()

    def _reach(self) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self._inside and self._task is not None:
            self._task.cancel()

    def _withdraw(self) -> None:
        """Nothing is on its way: it was told inside, or is not told."""

    def uses(self, connection: Connection) -> None:
        """The driver itself cancels the statement of a task that is cancelled."""

    def _is_it(self, error: BaseException | None) -> bool:
        return isinstance(error, (asyncio.CancelledError, RunInterrupted))


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
        self._colour = Async(sessions)
        self._cancellable: dict[Run, asyncio.Task[None]] = {}
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

    def _begin(self, run: Run, handler: Handler) -> None:
        # A task for each run: it sees nothing that another one has left in its context. Not one of the loop's
        # task factory: an eager one would begin each run within the one before.
        asyncio.Task(self._work(run, handler), loop=self._loop, context=Context())

    async def _work(self, run: Run, handler: Handler) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._cancellable[run] = task  # the loop itself refers to it weakly
        try:
            if run.should_stop:
                self._supervisor.give_back(run)
            else:
                await greenlet_spawn(self._supervisor.supervise, run, handler, self._colour)
        finally:
            del self._cancellable[run]
            if (work := self._next_work()) is not None:
                self._begin(*work)

    def _cancel(self, run: Run) -> None:
        # A task that is cancelled before its first step would never hand its run on: such a run was asked to
        # stop, and sees it when it begins.
        if task := self._cancellable.get(run):
            task.cancel()
