"""A worker that could not keep its promise does not start, and says what to do."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, inspect
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import AssertionPool, NullPool, StaticPool

import sqlalchemy_jobs
from sqlalchemy_jobs import Job, JobApp, Worker, dialects, enqueue, errors, job
from sqlalchemy_jobs.dialects.base import Dialect
from sqlalchemy_jobs.dialects.mysql import MariaDB, MySQL
from sqlalchemy_jobs.dialects.postgresql import PostgreSQL
from sqlalchemy_jobs.dialects.sqlite import SQLite
from tests.databases import Database
from tests.processes import WorkerProcess


@job("start")
@dataclass(frozen=True)
class Start:
    n: int = 0


def handle(session: Session, payload: Start) -> None: ...


async def handle_async(session: AsyncSession, payload: Start) -> None: ...


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """A worker that was refused leaves nothing running."""
    before = set(threading.enumerate())
    yield
    left = [each for each in set(threading.enumerate()) - before if each.name.startswith("sajobs-")]
    for thread in left:
        thread.join(20)
    assert not [each.name for each in left if each.is_alive()]


def sync_app(sessions: Any) -> JobApp[Any, Any]:
    app: JobApp[Any, Any] = JobApp(sessions)
    app.handler(Start)(handle)
    return app


def async_app(sessions: Any) -> JobApp[Any, Any]:
    app: JobApp[Any, Any] = JobApp(sessions)
    app.handler(Start)(handle_async)
    return app


# Each way starts a worker, which is to be refused; one that is not ends by itself.


def run(app: JobApp[Any, Any]) -> None:
    Worker(app, drain=True).run()


def enter(app: JobApp[Any, Any]) -> None:
    with app.worker():
        pass


def enter_async(app: JobApp[Any, Any]) -> None:
    async def main() -> None:
        async with app.worker():
            pass

    asyncio.run(asyncio.wait_for(main(), 30))


Way = Callable[[JobApp[Any, Any]], None]
every_way = pytest.mark.parametrize("way", [run, enter, enter_async])


def in_loop(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 30))


# --- tables -------------------------------------------------------------------------------------


@every_way
def test_missing_tables_are_told_with_how_to_make_them(empty_database: Database, way: Way) -> None:
    app = sync_app(empty_database.sessions())
    with pytest.raises(errors.TablesMissing) as caught:
        way(app)
    said = str(caught.value)
    assert "no tables for jobs. Run `sajobs migrate`, or list sqlalchemy_jobs.metadata" in said
    assert inspect(empty_database.engine()).get_table_names() == []


@every_way
def test_missing_tables_are_seen_by_an_async_app(empty_database: Database, way: Way) -> None:
    engine = empty_database.async_engine(poolclass=NullPool)
    with pytest.raises(errors.TablesMissing):
        way(async_app(async_sessionmaker(engine)))


@pytest.mark.parametrize(
    ("missing", "error", "told"),
    [
        ("sajobs_kind", errors.TablesOutdated, "version 2 was made in part, and these are missing"),
        ("sajobs_attempt", errors.MigrationError, "what version 2 has and they lack"),
    ],
)
def test_one_missing_table_is_enough_and_only_that_is_named(
    empty_database: Database, missing: str, error: type[Exception], told: str
) -> None:
    engine = empty_database.engine()
    sqlalchemy_jobs.metadata.create_all(engine)
    sqlalchemy_jobs.metadata.tables[missing].drop(engine)
    with pytest.raises(error, match=f"{told}: {missing}[.,]") as refusal:
        run(sync_app(sessionmaker(engine)))
    assert "sajobs_job" not in str(refusal.value)
    sqlalchemy_jobs.metadata.create_all(engine)
    run(sync_app(sessionmaker(engine)))


def test_missing_tables_end_the_command_with_one_error_line_and_status_2(
    empty_database: Database, tmp_path: Path
) -> None:
    worker = WorkerProcess(empty_database.url, tmp_path, "--drain")
    try:
        assert worker.wait() == 2
    finally:
        worker.process.kill()
    (line,) = (each for each in worker.lines if each.startswith("Error: "))
    assert "Traceback" not in worker.log
    assert "no tables for jobs. Run `sajobs migrate`" in line


def test_the_password_is_not_told(postgresql: Database) -> None:
    url = postgresql.url.set(password="s3cret")
    engine = postgresql.engine(url, connect_args={"options": "-c search_path=nowhere"})
    with pytest.raises(errors.TablesMissing) as caught:
        run(sync_app(sessionmaker(engine)))
    assert "s3cret" not in str(caught.value)


# --- handlers and sessions ------------------------------------------------------------------------


@every_way
def test_an_app_without_handlers(database: Database, way: Way) -> None:
    with pytest.raises(errors.ConfigurationError, match=r"no handlers.*--import"):
        way(JobApp(database.sessions()))


def test_an_async_handler_without_async_sessions(database: Database) -> None:
    app: JobApp[Any, Any] = JobApp(database.sessions())
    app.handler(Start)(handle_async)
    for way in (run, enter_async):
        with pytest.raises(errors.MissingSessions, match=r"handle_async is async.*plain def"):
            way(app)


@every_way
def test_a_plain_handler_without_plain_sessions(database: Database, way: Way) -> None:
    engine = database.async_engine(poolclass=NullPool)
    app: JobApp[Any, Any] = JobApp(async_sessionmaker(engine))
    app.handler(Start)(handle)
    with pytest.raises(errors.MissingSessions, match=r"handle is a plain def.*async def"):
        way(app)


def test_an_async_handler_is_refused_by_a_plain_with_on_a_running_loop(sqlite: Database) -> None:
    app = async_app(async_sessionmaker(sqlite.async_engine(poolclass=NullPool)))

    async def main() -> None:
        with pytest.raises(errors.ConfigurationError, match="async with jobs"):
            app.worker().__enter__()

    in_loop(main)


# --- engines --------------------------------------------------------------------------------------


def autocommit_of_the_engine(make: Any, url: Any) -> Any:
    return make(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)


def autocommit_by_execution_options(make: Any, url: Any) -> Any:
    return make(url, poolclass=NullPool).execution_options(isolation_level="AUTOCOMMIT")


def autocommit_as_options_of_the_engine(make: Any, url: Any) -> Any:
    return make(url, execution_options={"isolation_level": "AUTOCOMMIT"}, poolclass=NullPool)


def autocommit_of_the_driver(make: Any, url: Any) -> Any:
    return make(url, connect_args={"autocommit": True}, poolclass=NullPool)


in_autocommit = pytest.mark.parametrize(
    "made",
    [
        autocommit_of_the_engine,
        autocommit_by_execution_options,
        autocommit_as_options_of_the_engine,
        autocommit_of_the_driver,
    ],
)


@in_autocommit
def test_an_engine_in_autocommit(row_locks: Database, made: Any) -> None:
    app = sync_app(sessionmaker(made(create_engine, row_locks.url)))
    for way in (run, enter, enter_async):
        with pytest.raises(errors.EngineError, match="AUTOCOMMIT"):
            way(app)


@in_autocommit
def test_an_async_engine_in_autocommit(row_locks: Database, made: Any) -> None:
    app = async_app(async_sessionmaker(made(create_async_engine, row_locks.async_url)))
    for way in (run, enter_async):
        with pytest.raises(errors.EngineError, match="AUTOCOMMIT"):
            way(app)


@pytest.mark.parametrize("made", [autocommit_of_the_engine, autocommit_by_execution_options])
def test_asyncpg_in_autocommit(postgresql: Database, made: Any) -> None:
    url = postgresql.url.set(drivername="postgresql+asyncpg")
    app = async_app(async_sessionmaker(made(create_async_engine, url)))
    for way in (run, enter_async):
        with pytest.raises(errors.EngineError, match="AUTOCOMMIT"):
            way(app)


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_other_isolation_levels_start(row_locks: Database, level: str) -> None:
    run(sync_app(sessionmaker(row_locks.engine(isolation_level=level))))
    engine = create_async_engine(row_locks.async_url, isolation_level=level, poolclass=NullPool)
    run(async_app(async_sessionmaker(engine)))


@every_way
def test_two_phase_sessions(database: Database, way: Way) -> None:
    app = sync_app(sessionmaker(database.engine(), twophase=True))
    with pytest.raises(errors.EngineError, match="twophase=True"):
        way(app)


@every_way
def test_two_phase_async_sessions(database: Database, way: Way) -> None:
    app = async_app(async_sessionmaker(database.async_engine(poolclass=NullPool), twophase=True))
    if way is not enter:
        with pytest.raises(errors.EngineError, match="twophase=True"):
            way(app)


def test_sessions_bound_to_a_connection(database: Database) -> None:
    with database.engine().connect() as connection:
        app = sync_app(sessionmaker(connection))
        for way in (run, enter):
            with pytest.raises(errors.EngineError, match="bound to a Connection, not to an Engine"):
                way(app)


def test_async_sessions_bound_to_a_connection(database: Database) -> None:
    async def main() -> None:
        engine = database.async_engine(poolclass=NullPool)
        async with engine.connect() as connection:
            with pytest.raises(errors.EngineError, match="not to an AsyncEngine"):
                async with async_app(async_sessionmaker(connection)).worker():
                    pass

    in_loop(main)


def test_sessions_without_a_bind(database: Database) -> None:
    class Unbound: ...

    for sessions in (sessionmaker(), sessionmaker(binds={Unbound: database.engine()})):
        with pytest.raises(errors.EngineError, match="bind"):
            run(sync_app(sessions))


def test_async_sessions_without_a_bind() -> None:
    with pytest.raises(errors.EngineError, match="bind"):
        run(async_app(async_sessionmaker()))


def test_the_async_sessions_are_checked_though_there_are_plain_ones_too(
    database: Database,
) -> None:
    """The plain ones give the worker its own connections; async handlers still use the others."""
    engine = database.async_engine(poolclass=NullPool)
    app: JobApp[Any, Any] = JobApp(database.sessions(), async_sessionmaker(engine, twophase=True))
    app.handler(Start)(handle_async)
    with pytest.raises(errors.EngineError, match="twophase=True"):
        run(app)


def test_a_connection_under_async_sessions_is_refused_though_there_are_plain_ones_too(
    database: Database,
) -> None:
    async def main() -> None:
        engine = database.async_engine(poolclass=NullPool)
        async with engine.connect() as connection:
            app: JobApp[Any, Any] = JobApp(database.sessions(), async_sessionmaker(connection))
            app.handler(Start)(handle_async)
            with pytest.raises(errors.EngineError, match="not to an AsyncEngine"):
                async with app.worker():
                    pass

    in_loop(main)


@every_way
@pytest.mark.parametrize("pool", [StaticPool, AssertionPool])
def test_a_pool_that_gives_one_connection_to_all(database: Database, way: Way, pool: Any) -> None:
    """Runs on several threads would commit one another's work."""
    app = sync_app(database.sessions())
    way(app)
    app = sync_app(sessionmaker(database.engine(poolclass=pool)))
    with pytest.raises(errors.EngineError, match=f"the engine has a {pool.__name__}"):
        way(app)


@pytest.mark.parametrize("way", [run, enter_async])
def test_an_async_pool_that_gives_one_connection_to_all(database: Database, way: Way) -> None:
    app = async_app(async_sessionmaker(database.async_engine(poolclass=StaticPool)))
    with pytest.raises(errors.EngineError, match="the engine has a StaticPool"):
        way(app)


@every_way
def test_sync_and_async_sessions_on_different_databases(database: Database, way: Way) -> None:
    """The jobs of the one would be claimed there and settled in the other."""
    other = database.async_url.set(database="another_one")
    engine = database.async_engine(other, poolclass=NullPool)
    app: JobApp[Any, Any] = JobApp(database.sessions(), async_sessionmaker(engine))
    app.handler(Start)(handle)
    with pytest.raises(errors.EngineError, match=r"another_one.*the jobs are in one database"):
        way(app)


def test_sync_and_async_sessions_on_the_same_database_start(database: Database) -> None:
    engine = database.async_engine(poolclass=NullPool)
    app: JobApp[Any, Any] = JobApp(database.sessions(), async_sessionmaker(engine))
    app.handler(Start)(handle_async)
    run(app)


def test_sessions_whose_job_engine_is_one_of_several_start(database: Database) -> None:
    """`binds=`: what counts is the engine that the jobs are routed to."""
    other = create_engine("sqlite://")
    binds = {sqlalchemy_jobs.models.Base: database.engine()}
    run(sync_app(sessionmaker(bind=other, binds=binds)))
    other.dispose()


# --- SQLite ---------------------------------------------------------------------------------------


@every_way
def test_a_sqlite_engine_that_is_not_configured(sqlite: Database, way: Way) -> None:
    app = sync_app(sessionmaker(create_engine(sqlite.url, poolclass=NullPool)))
    with pytest.raises(errors.EngineError, match=r"sqlalchemy_jobs\.sqlite\.configure\(engine\)"):
        way(app)


@pytest.mark.parametrize("way", [run, enter_async])
def test_an_async_sqlite_engine_that_is_not_configured(sqlite: Database, way: Way) -> None:
    app = async_app(async_sessionmaker(create_async_engine(sqlite.async_url, poolclass=NullPool)))
    with pytest.raises(errors.EngineError, match=r"sqlalchemy_jobs\.sqlite\.configure\(engine\)"):
        way(app)


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///file::memory:?uri=true",
        "sqlite:///file:name?mode=memory&cache=shared&uri=true",
    ],
)
def test_a_sqlite_database_in_memory(url: str) -> None:
    engine = create_engine(url, poolclass=StaticPool)
    sqlalchemy_jobs.sqlite.configure(engine)
    with pytest.raises(errors.EngineError, match=r"in memory.*use a file"):
        run(sync_app(sessionmaker(engine)))
    engine.dispose()


def test_an_async_sqlite_database_in_memory() -> None:
    engine = create_async_engine("sqlite+aiosqlite://")
    sqlalchemy_jobs.sqlite.configure(engine)
    with pytest.raises(errors.EngineError, match=r"in memory.*use a file"):
        run(async_app(async_sessionmaker(engine)))


def test_configuring_another_engine_is_refused(row_locks: Database) -> None:
    with pytest.raises(ValueError, match="for SQLite engines"):
        sqlalchemy_jobs.sqlite.configure(row_locks.engine())


# --- servers --------------------------------------------------------------------------------------


class OtherDialect(SQLiteDialect_pysqlite):
    """A database that SQLAlchemy knows and this library does not."""

    name = "otherdb"
    supports_statement_cache = True


registry.register("otherdb", __name__, "OtherDialect")


def test_a_database_that_is_not_supported(tmp_path: Path) -> None:
    engine = create_engine(f"otherdb:///{tmp_path}/other")
    with pytest.raises(
        errors.UnsupportedServer,
        match="otherdb is not supported: the jobs can live in PostgreSQL, MariaDB, MySQL or SQLite",
    ):
        run(sync_app(sessionmaker(engine)))


@pytest.mark.parametrize(
    ("dialect", "oldest", "too_old"),
    [
        (PostgreSQL(), [(13,), (13, 0), (18, 1)], [(12,), (12, 99), (9, 6, 24)]),
        (MySQL(), [(8, 0, 1), (8, 4, 0), (9, 0)], [(8, 0, 0), (5, 7, 44)]),
        (MariaDB(), [(10, 6), (10, 6, 0), (10, 11, 6), (11, 4)], [(10, 5, 99), (5, 5, 68)]),
        (SQLite(), [(3, 35), (3, 35, 0), (3, 46, 1)], [(3, 34, 1), (3, 8)]),
    ],
    ids=lambda value: value.label if isinstance(value, Dialect) else "",
)
def test_a_server_that_is_too_old_is_told_which_would_do(
    dialect: Dialect, oldest: list[tuple[int, ...]], too_old: list[tuple[int, ...]]
) -> None:
    for version in oldest:
        dialect.check_version(version)
    for version in too_old:
        with pytest.raises(errors.UnsupportedServer) as caught:
            dialect.check_version(version)
        found, wanted = (".".join(map(str, each)) for each in (version, oldest[0]))
        assert str(caught.value).startswith(f"the server is {dialect.label} {found}: ")
        assert str(caught.value).endswith(f"{dialect.label} {wanted} or newer")


@pytest.mark.parametrize(
    ("is_mariadb", "version", "refused"),
    [
        (True, (10, 5, 9), "MariaDB 10.5.9: .* MariaDB 10.6 or newer"),
        (True, (10, 6, 12), None),
        (False, (8, 0, 0), r"MySQL 8.0.0: .* MySQL 8.0.1 or newer"),
        (False, (8, 0, 35), None),
        (True, (8, 0, 35), "MariaDB 8.0.35"),
    ],
)
def test_mariadb_and_mysql_are_told_apart(
    mysql: Database,
    monkeypatch: pytest.MonkeyPatch,
    is_mariadb: bool,
    version: tuple[int, ...],
    refused: str | None,
) -> None:
    with mysql.engine().connect() as connection:
        monkeypatch.setattr(connection.dialect, "is_mariadb", is_mariadb)
        monkeypatch.setattr(connection.dialect, "server_version_info", version)
        dialect = dialects.of(connection)
        if refused is None:
            dialect.check_server(connection)
        else:
            with pytest.raises(errors.UnsupportedServer, match=refused):
                dialect.check_server(connection)


def test_a_worker_refuses_a_server_that_is_too_old(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    for dialect in (PostgreSQL, MySQL, MariaDB, SQLite):
        monkeypatch.setattr(dialect, "oldest", (99,))
    with pytest.raises(errors.UnsupportedServer, match="99 or newer"):
        run(sync_app(database.sessions()))


# --- settings -------------------------------------------------------------------------------------

SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"queues": "mail"}, r"queues='mail' is one string: write \['mail'\]"),
    ({"queues": [""]}, "queue ''"),
    ({"queues": ["two words"]}, "queue 'two words'"),
    ({"queues": ["x" * 61]}, "wanted 1 to 60"),
    ({"queues": [3]}, "queue 3"),
    ({"queues": {"mail": 0}}, "queue mail=0: wanted a concurrency of 1 or more"),
    ({"queues": {"mail": -1, "default": None}}, "queue mail=-1"),
    ({"concurrency": 0}, "concurrency=0: wanted 1 or more"),
    ({"concurrency": -3}, "concurrency=-3"),
    ({"listen_url": "no url"}, "listen_url: ArgumentError: wanted an SQLAlchemy URL"),
    ({"listen_url": "oracles://h/shop"}, "listen_url: NoSuchModuleError: wanted an SQLAlchemy URL"),
    ({"poll_interval": timedelta(0)}, "poll_interval=0:00:00: wanted more than zero"),
    ({"poll_interval": timedelta(seconds=-1)}, "poll_interval"),
    ({"lease": timedelta(milliseconds=999)}, "lease=0:00:00.999000: wanted one second or more"),
    ({"shutdown_timeout": timedelta(seconds=-1)}, "shutdown_timeout"),
    ({"keep": timedelta(seconds=-1)}, "keep=-1 day"),
    ({"keep_failed": timedelta(seconds=-1)}, "keep_failed=-1 day"),
]

MISTAKES_OF_TYPE: list[tuple[dict[str, Any], str]] = [
    ({"poll_interval": 1}, "poll_interval=1"),
    ({"lease": 30}, "lease=30"),
    ({"shutdown_timeout": 5}, "shutdown_timeout=5"),
    ({"keep": 1}, "keep=1: wanted a timedelta"),
    ({"concurrency": "4"}, "concurrency='4'"),
    ({"queues": {"mail": "2"}}, "queue mail='?2"),
]


@pytest.mark.parametrize(("options", "said"), SETTINGS, ids=lambda each: str(each)[:40])
def test_settings_that_cannot_be_are_refused_when_the_worker_is_made(
    options: dict[str, Any], said: str
) -> None:
    refused_when_made(options, said)


@pytest.mark.parametrize(("options", "said"), MISTAKES_OF_TYPE, ids=lambda each: str(each)[:40])
def test_settings_of_a_wrong_type_get_an_answer_as_good(options: dict[str, Any], said: str) -> None:
    """As `delay=60` does, which is a natural mistake too."""
    refused_when_made(options, said)


def refused_when_made(options: dict[str, Any], said: str) -> None:
    app = sync_app(sessionmaker())
    for make in (lambda: Worker(app, **options), lambda: app.worker(**options)):
        with pytest.raises(errors.ConfigurationError, match=said):
            make()


def test_the_smallest_settings_are_accepted() -> None:
    Worker(
        sync_app(sessionmaker()),
        queues={"mail": 1},
        concurrency=1,
        poll_interval=timedelta(microseconds=1),
        lease=timedelta(seconds=1),
        shutdown_timeout=timedelta(0),
    )


@pytest.mark.parametrize("way", [enter, enter_async])
def test_drain_is_refused_inside_an_application(sqlite: Database, way: Way) -> None:
    """Nobody would learn that it ended."""
    app = sync_app(sqlite.sessions())
    worker = app.worker(drain=True)
    app.worker = lambda: worker  # type: ignore[method-assign,assignment,misc]
    with pytest.raises(errors.ConfigurationError, match=r"drain=True is for run\(\)"):
        way(app)
    assert not worker.is_running


# --- refused late ---------------------------------------------------------------------------------


def test_a_worker_that_is_refused_when_the_database_comes_back_is_not_running(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "not mounted yet"
    engine = create_engine(f"sqlite:///{folder}/jobs.sqlite", poolclass=NullPool)
    sqlalchemy_jobs.sqlite.configure(engine)
    with caplog.at_level(logging.WARNING), sync_app(sessionmaker(engine)).worker() as worker:
        assert worker.is_running
        assert "the database is away" in caplog.text
        folder.mkdir()
        end = time.monotonic() + 20
        while worker.is_running:
            assert time.monotonic() < end, "it says that it is running"
            time.sleep(0.01)
        assert "the worker does not start" in caplog.text
        assert "no tables for jobs" in caplog.text


# --- starting twice -------------------------------------------------------------------------------


def test_a_worker_is_started_once(database: Database) -> None:
    worker = Worker(sync_app(database.sessions()))
    with worker:
        assert worker.is_running
        with pytest.raises(errors.ConfigurationError, match="started before: make a new one"):
            worker.run()
        with pytest.raises(errors.ConfigurationError, match="started before"), worker:
            pass
        assert worker.is_running
    assert not worker.is_running
    with pytest.raises(errors.ConfigurationError, match="started before"):
        worker.run()


def test_an_app_that_was_refused_can_be_mended_and_started(empty_database: Database) -> None:
    """A refusal changed nothing: not the app, not the database, not the engine."""
    engine = empty_database.engine()
    app: JobApp[Any, Any] = JobApp(sessionmaker(engine))
    with pytest.raises(errors.ConfigurationError, match="no handlers"):
        run(app)
    app.handler(Start)(handle)
    with pytest.raises(errors.TablesMissing):
        run(app)
    sqlalchemy_jobs.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(enqueue(Start()))
        session.commit()
        run(app)
        assert session.query(Job.state).all() == [("succeeded",)]
