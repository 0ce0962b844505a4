"""Which database a command works on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click
from sqlalchemy import Connection, Engine, create_engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.orm import Session

from sqlalchemy_jobs import migrations, sqlite
from sqlalchemy_jobs.cli.config import Refused
from sqlalchemy_jobs.cli.loading import load_app
from sqlalchemy_jobs.errors import ConfigurationError, JobsError
from sqlalchemy_jobs.tables import shown
from sqlalchemy_jobs.worker import preflight

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

T = TypeVar("T")
CommandT = TypeVar("CommandT", bound=Callable[..., Any])


def of_database(command: CommandT) -> CommandT:
    """Give a command the options ``url`` and ``app_name``, for ``engine_of``; they may stand before it, at its group."""
    for option in (
        click.option(
            "--app",
            "app_name",
            envvar="SAJOBS_APP",
            metavar="MODULE:NAME",
            callback=_or_of_group,
            help="Where the JobApp is, for example shop.jobs:jobs; its database and schema are taken.",
        ),
        click.option(
            "--database-url",
            "url",
            envvar="SAJOBS_DATABASE_URL",
            metavar="URL",
            callback=_or_of_group,
            help="The database, as SQLAlchemy names it. Default: the one of the app.",
        ),
    ):
        command = option(command)
    return command


def _or_of_group(context: click.Context, option: click.Parameter, value: Any) -> Any:
    if value is None and context.parent is not None:
        return context.parent.params.get(option.name or "")
    return value


def engine_of(url: str | None, app_name: str | None) -> Engine | AsyncEngine:
    """Return the engine of the URL, with the schema of the app if there is one; else that of the app's sessions.

    Raises: ConfigurationError.
    """
    options: dict[str, Any] = {}
    if app_name is not None:
        app = load_app(app_name)
        with app.context():
            own = preflight.engine_of(app)
        if url is None:
            return own
        schemas = own.get_execution_options().get("schema_translate_map")
        options["execution_options"] = {"schema_translate_map": schemas}
    elif url is None:
        raise ConfigurationError(
            "which database? Name it by --database-url, or the app that uses it by --app"
        )
    try:
        made = make_url(url)
        if made.get_backend_name() == "sqlite":
            options["connect_args"] = {"timeout": sqlite.BUSY_TIMEOUT}
        if made.get_dialect().is_async:
            from sqlalchemy.ext.asyncio import create_async_engine

            async_engine = create_async_engine(made, **options)
            preflight.checked(async_engine.sync_engine)
            return async_engine
        return preflight.checked(create_engine(made, **options))
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        raise ConfigurationError(f"--database-url: {error}") from error
    except (ArgumentError, ValueError) as error:
        # Not in SQLAlchemy's words: they quote the URL, with the password in it.
        raise ConfigurationError(
            "--database-url is no URL: wanted dialect+driver://user:password@host/database, with characters such as "
            "@ : / in the password written as %40 %3A %2F"
        ) from error


def run(engine: Engine | AsyncEngine, work: Callable[[Connection], T]) -> T:
    """Run ``work`` in a transaction of an engine of either colour, and leave no connection."""
    # Whoever waited for another migration has to see what that one did.
    options = {} if engine.dialect.name == "sqlite" else {"isolation_level": "READ COMMITTED"}
    if not isinstance(engine, Engine):
        return asyncio.run(_run_async(engine.execution_options(**options), work))
    try:
        with engine.execution_options(**options).begin() as connection:
            return work(connection)
    finally:
        engine.dispose()


async def _run_async(engine: AsyncEngine, work: Callable[[Connection], T]) -> T:
    try:
        async with engine.begin() as connection:
            return await connection.run_sync(work)
    finally:
        await engine.dispose()


def is_of_database(error: Exception, engine: Engine | AsyncEngine) -> bool:
    """Tell whether the database is what has failed. When asyncpg cannot connect, the error is its own or the socket's."""
    if isinstance(error, BrokenPipeError):  # whoever read what we print has gone
        return False
    of_driver = type(error).__module__.partition(".")[0] == engine.dialect.driver
    return of_driver or isinstance(error, DBAPIError | OSError)


def in_session(url: str | None, app_name: str | None, work: Callable[[Session], T]) -> T:
    """Run ``work`` in a session of the database that is meant, and commit; tell in one line what is wrong with it."""
    try:
        engine = engine_of(url, app_name)
    except ConfigurationError as error:
        raise Refused(error) from error
    try:
        return run(engine, lambda connection: _in_session(connection, work))
    except ConfigurationError as error:
        raise Refused(error) from error
    except JobsError as error:
        raise click.ClickException(str(error)) from error
    except Exception as error:
        if is_of_database(error, engine):
            refused = error.orig if isinstance(error, DBAPIError) else error
            raise click.ClickException(f"{shown(engine.url)}: {str(refused).strip()}") from error
        raise


def _in_session(connection: Connection, work: Callable[[Session], T]) -> T:
    migrations.check(connection)
    with Session(connection) as session:
        result = work(session)
        session.commit()
    return result
