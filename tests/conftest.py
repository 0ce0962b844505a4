"""The databases as fixtures. A test that takes `database` runs on each of the three."""

import shutil
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from sqlalchemy import URL

from tests import pooling
from tests.databases import NAMES, Database, Databases, EmbeddedPostgres

# How long an example takes tells of the machine.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Let tests that log lone surrogates report through xdist, which sends UTF-8."""
    return _sendable((yield))


def _sendable(value: Any) -> Any:
    match value:
        case str():
            return value.encode("utf-8", "backslashreplace").decode("utf-8")
        case dict():
            return {_sendable(key): _sendable(each) for key, each in value.items()}
        case list() | tuple():
            return type(value)(_sendable(each) for each in value)
    return value


@pytest.fixture(scope="session")
def databases() -> Iterator[Databases]:
    databases = Databases()
    yield databases
    databases.close()


def _fresh(databases: Databases, name: str, folder: Path) -> Iterator[Database]:
    database = databases.with_tables(name, folder)
    yield database
    database.dispose()


@pytest.fixture(params=NAMES)
def database(
    request: pytest.FixtureRequest, databases: Databases, tmp_path: Path
) -> Iterator[Database]:
    """A database with all tables and no rows, on every server in turn."""
    yield from _fresh(databases, request.param, tmp_path)


@pytest.fixture(params=[name for name in NAMES if name != "sqlite"])
def row_locks(
    request: pytest.FixtureRequest, databases: Databases, tmp_path: Path
) -> Iterator[Database]:
    """For tests of transactions that overlap; SQLite lets one writer in at a time."""
    yield from _fresh(databases, request.param, tmp_path)


@pytest.fixture
def sqlite(databases: Databases, tmp_path: Path) -> Iterator[Database]:
    yield from _fresh(databases, "sqlite", tmp_path)


@pytest.fixture
def postgresql(databases: Databases, tmp_path: Path) -> Iterator[Database]:
    yield from _fresh(databases, "postgresql", tmp_path)


@pytest.fixture
def mysql(databases: Databases, tmp_path: Path) -> Iterator[Database]:
    yield from _fresh(databases, "mysql", tmp_path)


@pytest.fixture(params=NAMES)
def empty_database(
    request: pytest.FixtureRequest, databases: Databases, tmp_path: Path
) -> Iterator[Database]:
    """A database without tables, for tests of migrations."""
    with databases.empty(request.param, tmp_path) as database:
        yield database


@pytest.fixture
def embedded_postgresql(databases: Databases, postgresql: Database) -> EmbeddedPostgres:
    """The server of `postgresql`, for tests that stop and start it."""
    if databases.embedded_postgresql is None:
        pytest.skip("SAJOBS_TEST_POSTGRESQL_URL names a server that is not ours to restart")
    return databases.embedded_postgresql


@pytest.fixture
def pooled(postgresql: Database) -> Iterator[URL]:
    """PgBouncer in transaction mode in front of the server."""
    program = shutil.which("pgbouncer")
    if program is None:
        pytest.skip("pgbouncer is not installed")
    with pooling.pooled(program, postgresql.url) as url:
        yield url


@pytest.fixture
def effects_app(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The module that the worker processes run; here only for its payload classes."""
    monkeypatch.setenv("SAJOBS_TEST_URL", "sqlite://")
    monkeypatch.setenv("SAJOBS_TEST_FOLDER", str(tmp_path))
    from tests.apps import effects

    return effects
