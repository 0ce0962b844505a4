"""The worker's own transactions, on connections that no handler shares."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

from sqlalchemy import URL, Connection, Engine, QueuePool, create_engine, event, make_url, select
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn

from sqlalchemy_jobs import dialects, sqlite
from sqlalchemy_jobs.tables import TO_JOB
from sqlalchemy_jobs.worker.availability import Availability, is_lost
from sqlalchemy_jobs.worker.connections import limit_of
from sqlalchemy_jobs.worker.loops import LoopThread

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

T = TypeVar("T")

_AUTOCOMMIT = {"isolation_level": "AUTOCOMMIT"}
KEPT = 30.0
"""Seconds of rest after which a session is not kept: whether its connection is too old, or to be asked first, its pool knows."""
TRIES = 5
"""How often a transaction that lost against another one is run in all."""


class Control:
    """Runs functions of a session, each in a transaction of its own at READ COMMITTED.

    It has a pool of its own, made like the application's: claims and renewals never wait for a
    connection that a handler holds, and never run on the handlers' event loop. With an async engine all this
    is done in greenlets, on a loop in a thread of this object.
    """

    def __init__(
        self, engine: Engine | AsyncEngine, availability: Availability, *, durable: bool = False
    ) -> None:
        self.availability = availability
        self.durable = durable
        """Whether claims must survive a loss of power."""
        self.dialect = dialects.named(engine.dialect.name)
        self._kept: Connection | None = None
        self._closed = False
        self._engine = _own(engine, durable)
        self._loop = None if isinstance(engine, Engine) else LoopThread("control")
        self._autocommitting = self._engine.execution_options(**_AUTOCOMMIT)
        self._sessions: deque[tuple[float, Session]] = deque()
        """For ``statements``, each with the time of its last use and a connection in autocommit: to make them costs as
        much as a statement."""
        self._level_of_a_statement: str | None = None

    def transaction(self, work: Callable[[Session], T]) -> T:
        """Run ``work`` in a transaction and commit; again, when it lost against another one."""
        return self._retried(work, self._engine)

    def statements(self, work: Callable[[Session], T]) -> T:
        """Run ``work``, in which each statement may be a transaction of its own: on PostgreSQL it is.

        That saves the round trips of BEGIN and COMMIT; and a process that is stopped between two statements
        leaves no transaction open, for which others would have to wait.
        """
        level = self.dialect.level_of_a_statement
        if level is not None and self._level_of_a_statement is None:
            self._level_of_a_statement = self.transaction(
                lambda session: session.scalar(select(level), bind_arguments=TO_JOB)
            )
        if self._level_of_a_statement != "read committed":
            return self.transaction(work)
        return self._retried(work, self._autocommitting)

    def _retried(self, work: Callable[[Session], T], engine: Engine) -> T:
        if self._closed:
            raise RuntimeError("the worker has ended")
        for last in (False,) * (TRIES - 1) + (True,):
            asked_at = time.monotonic()
            try:
                result = self._call(partial(self._once, work, engine))
            except Exception as error:
                conflict = self.dialect.is_conflict(error)
                if conflict and not last:
                    continue
                if not conflict and is_lost(error):
                    self.availability.lost(error, asked_at)
                raise
            self.availability.reached(asked_at)
            return result
        raise AssertionError("unreachable")

    def on_kept_connection(self, work: Callable[[Connection], T]) -> T:
        """Run ``work`` in autocommit on a connection that stays open, and no one else's, until it fails."""
        if self._closed:
            raise RuntimeError("the worker has ended")
        return self._call(partial(self._on_kept, work))

    def drop_kept_connection(self) -> None:
        """Close it for good, so that the server ends its session."""
        self._call(self._drop_kept)

    def close(self) -> None:
        """Close the connections; a run that ends later opens none."""
        self._closed = True
        if self._loop is None:
            self._close()
        else:
            self._loop.close(greenlet_spawn(self._close))

    def _call(self, function: Callable[[], T]) -> T:
        return function() if self._loop is None else self._loop.call(greenlet_spawn(function))

    def _on_kept(self, work: Callable[[Connection], T]) -> T:
        try:
            if self._kept is None:
                self._kept = self._autocommitting.connect()
            return work(self._kept)
        except BaseException:
            self._drop_kept()
            raise

    def _drop_kept(self) -> None:
        if (kept := self._kept) is not None:
            self._kept = None
            with suppress(Exception):  # broken
                kept.invalidate()
                kept.close()

    def _close(self) -> None:
        self._drop_kept()
        self._close_sessions()
        self._engine.dispose()

    def _once(self, work: Callable[[Session], T], engine: Engine) -> T:
        pool = self._engine.pool
        if isinstance(pool, QueuePool):
            if engine is self._autocommitting:
                return self._in_kept_session(work, pool)
            if self._sessions and pool.checkedin() == 0:
                self._close_sessions()  # rather than open one connection more, or wait for one
        with Session(engine) as session, session.begin():
            return work(session)

    def _in_kept_session(self, work: Callable[[Session], T], pool: QueuePool) -> T:
        """Run ``work`` where each statement commits. The session is told of a commit only if that means anything to it."""
        session = self._kept_session() or Session(self._autocommitting.connect())
        try:
            result = work(session)
            # The bell waits for it, or rows would not be read again.
            if session.info or session.identity_map:
                session.commit()
        except BaseException:
            _drop(session)
            raise
        if pool.checkedout() >= limit_of(pool):  # somebody may be waiting for it
            _close(session)
            return result
        self._sessions.append((time.monotonic(), session))
        if self._closed:
            self._close_sessions()
        return result

    def _kept_session(self) -> Session | None:
        with suppress(IndexError):  # there is none, or another thread was quicker
            used_at, session = self._sessions.pop()
            if time.monotonic() < used_at + KEPT:
                return session
            _close(session)
            self._close_sessions()  # they have rested for longer
        return None

    def _close_sessions(self) -> None:
        while self._sessions:
            with suppress(IndexError):  # another thread was quicker
                _close(self._sessions.pop()[1])


def _close(session: Session) -> None:
    connection = cast(Connection, session.get_bind())
    session.close()
    connection.close()


def _drop(session: Session) -> None:
    """Close a session of which it is not known how far its connection got; that does not go back to the pool."""
    with suppress(Exception):  # what matters is what was raised before
        cast(Connection, session.get_bind()).invalidate()
        _close(session)


def direct(engine: Engine | AsyncEngine, url: str | URL | None) -> Engine | AsyncEngine:
    """Make an engine for another way to the same database; None: return the engine itself."""
    if url is None:
        return engine
    url = make_url(url)
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    if url.get_dialect().is_async:
        from sqlalchemy.ext.asyncio import create_async_engine

        return create_async_engine(url, **_options(engine))
    return create_engine(url, **_options(engine))


def _own(engine: Engine | AsyncEngine, durable: bool) -> Engine:
    """Make an engine with the creator and the pool events of another, and connections of its own."""
    pool, options = engine.pool.recreate(), _options(engine)
    if isinstance(engine, Engine):
        own = create_engine(engine.url, pool=pool, **options)
    else:
        from sqlalchemy.ext.asyncio import create_async_engine

        own = create_async_engine(engine.url, pool=pool, **options).sync_engine
    _set_up(own)
    if own.dialect.name == "sqlite" and not durable:
        event.listen(own, "connect", _commit_without_flush)
    return own


def _set_up(engine: Engine) -> None:
    if engine.dialect.name == "sqlite":
        sqlite.configure(engine)


def _commit_without_flush(connection: Any, record: Any) -> None:
    """Let our own transactions not wait for the disk, as claims do not on PostgreSQL.

    In WAL mode a loss of power loses the latest commits only, in order: a handler's commit, which is
    flushed, flushes what was before it. What is lost of ours is a claim, or a job that runs again.
    """
    cursor = connection.cursor()
    cursor.execute("PRAGMA synchronous = NORMAL")
    cursor.close()


def _options(engine: Engine | AsyncEngine) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if engine.dialect.name != "sqlite":
        # At REPEATABLE READ a claim would raise 40001 on PostgreSQL and lock gaps on MariaDB.
        options["isolation_level"] = "READ COMMITTED"
    if schemas := engine.get_execution_options().get("schema_translate_map"):
        options["execution_options"] = {"schema_translate_map": schemas}
    return options
