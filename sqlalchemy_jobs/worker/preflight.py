"""What must be true before a worker starts. Every refusal says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL, AssertionPool, Connection, Engine, StaticPool
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.orm import Session, scoped_session

from sqlalchemy_jobs import dialects, migrations
from sqlalchemy_jobs.app import AsyncSessions, JobApp, SyncSessions
from sqlalchemy_jobs.errors import (
    ConfigurationError,
    EngineError,
    MissingSessions,
)
from sqlalchemy_jobs.models import Job
from sqlalchemy_jobs.schedules import ticks

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine


def check_app(app: JobApp[Any, Any]) -> None:
    """Refuse an app without handlers, or with a handler whose colour has no sessions.

    Raises: ConfigurationError, MissingSessions.
    """
    if not app.handlers:
        raise ConfigurationError(
            "the app has no handlers: the module that registers them was not imported; import it where the "
            "app is made, or name it by --import"
        )
    for handler in app.handlers.values():
        if handler.is_async and app.async_sessions is None:
            raise MissingSessions(
                f"{handler.name} is async, and the app has no async sessions: JobApp(sessions, "
                "async_sessionmaker(async_engine)), or make it a plain def"
            )
        if not handler.is_async and app.sessions is None:
            raise MissingSessions(
                f"{handler.name} is a plain def, and the app has only async sessions: "
                "JobApp(sessionmaker(engine), async_sessions), or make it an async def"
            )
    for schedule in app.schedules.values():
        if schedule.kind not in app.handlers:
            raise ConfigurationError(
                f'schedule "{schedule.name}" makes jobs of kind "{schedule.kind}", and the app has no handler for them'
            )


def engine_of(app: JobApp[Any, Any]) -> Engine | AsyncEngine:
    """Check the engines that the app's sessions use for jobs; return the sync one when there are both.

    Call it within the app's context. Raises: EngineError.
    """
    own, own_async = engines_of(app)
    engine = own_async if own is None else own
    assert engine is not None
    return engine


def engines_of(app: JobApp[Any, Any]) -> tuple[Engine | None, AsyncEngine | None]:
    """Do so, and return both."""
    own_async = None if app.async_sessions is None else _async_engine(app.async_sessions)
    own = None if app.sessions is None else _sync_engine(app.sessions)
    if own is not None and own_async is not None and not _may_be_one(own.url, own_async.url):
        raise EngineError(
            f"the sessions use the database {own.url.database}, the async sessions {own_async.url.database}: "
            "the jobs are in one database"
        )
    return own, own_async


def _sync_engine(sessions: SyncSessions) -> Engine:
    session: Session = (
        sessions.session_factory() if isinstance(sessions, scoped_session) else sessions()
    )
    try:
        if session.twophase:
            raise EngineError(
                "the sessions are two-phase (twophase=True): the job's state and the handler's work could not "
                "commit together; give JobApp a sessionmaker without it"
            )
        bind = session.get_bind(Job)
    except UnboundExecutionError as error:
        raise _unbound() from error
    finally:
        session.close()
    if not isinstance(bind, Engine):
        raise EngineError(
            f"the sessions are bound to a {type(bind).__name__}, not to an Engine: every run needs a connection "
            "of its own; bind the sessionmaker to the engine"
        )
    return checked(bind)


def _async_engine(sessions: AsyncSessions) -> AsyncEngine:
    from sqlalchemy.ext.asyncio import AsyncEngine

    session = sessions()
    if session.sync_session.twophase:
        raise EngineError(
            "the async sessions are two-phase (twophase=True): give JobApp an async_sessionmaker without it"
        )
    try:
        bind = session.get_bind(Job)
    except UnboundExecutionError as error:
        raise _unbound() from error
    if not isinstance(bind, Engine):
        raise EngineError(
            f"the async sessions are bound to a {type(bind).__name__}, not to an AsyncEngine: write "
            "async_sessionmaker(create_async_engine(url))"
        )
    return AsyncEngine(checked(bind))


def _unbound() -> EngineError:
    return EngineError(
        "the sessions have no bind for the jobs: give the sessionmaker an engine, or with binds={...} one for "
        "sqlalchemy_jobs.Job, the same as for what the handlers write"
    )


def _may_be_one(one: URL, other: URL) -> bool:
    """Tell whether two URLs may name the same database; a host has too many names to be compared."""
    if one.database is None or other.database is None:  # made by a creator
        return True
    if one.get_backend_name() == "sqlite":
        return Path(one.database).resolve() == Path(other.database).resolve()
    return one.database == other.database


def checked(engine: Engine) -> Engine:
    """Refuse an engine of an unsupported database, or one without a connection for everyone.

    Raises: UnsupportedServer, EngineError.
    """
    dialects.named(engine.dialect.name)
    if engine.dialect.name == "sqlite" and _is_in_memory(engine):
        raise EngineError(
            "the database is in memory: the worker's connections could not see it; use a file"
        )
    if isinstance(engine.pool, (StaticPool, AssertionPool)):
        raise EngineError(
            f"the engine has a {type(engine.pool).__name__}, which gives the same connection to several threads: "
            "runs would commit one another's work; use another pool"
        )
    return engine


def _is_in_memory(engine: Engine) -> bool:
    name = engine.url.database or ":memory:"
    return ":memory:" in name or "mode=memory" in name or engine.url.query.get("mode") == "memory"


def check_database(session: Session) -> None:
    """Refuse a database in which the promise could not be kept. Runs on the worker's own engine.

    Raises: UnsupportedServer, TablesMissing, TablesOutdated, TablesTooNew.
    """
    connection = session.connection()
    dialects.of(connection).check_server(connection)
    migrations.check(connection)


def check_schedules(session: Session, app: JobApp[Any, Any]) -> None:
    """Refuse an app with a schedule of a name that a row of the application has.

    Raises: ConfigurationError.
    """
    if app.schedules and (names := ticks.taken(session, app.schedules)):
        raise ConfigurationError(
            f"schedules of the application are in the database under names that the app declares: {', '.join(names)}; "
            "delete those rows, or declare the schedules under other names"
        )


def check_handlers_connection(connection: Connection) -> None:
    """Refuse an engine whose transactions do not hold together. Runs on the handlers' engine.

    Raises: EngineError.
    """
    adapter, driver = (
        connection.connection.dbapi_connection,
        connection.connection.driver_connection,
    )
    if connection.dialect.name == "sqlite":
        if not getattr(driver, "in_transaction", False):
            raise EngineError(
                "the SQLite engine is not set up: rows written inside a SAVEPOINT would survive the rollback of "
                "their run; call sqlalchemy_jobs.sqlite.configure(engine) where the engine is made"
            )
        return
    by_option = connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT"
    if by_option or _is_in_autocommit(adapter) or _is_in_autocommit(driver):
        raise EngineError(
            "the engine is in AUTOCOMMIT: a handler's work could not be rolled back; give JobApp sessions on an "
            "engine without that isolation level"
        )


def _is_in_autocommit(connection: Any) -> bool:
    """Ask a driver's connection, or SQLAlchemy's adapter of it; each driver says it in its own way."""
    if hasattr(connection, "get_autocommit"):
        return bool(connection.get_autocommit())
    return getattr(connection, "autocommit", None) is True
