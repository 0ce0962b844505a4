"""The fixtures themselves: every test starts with empty tables, and every driver connects."""

import asyncio

import pytest
from sqlalchemy import AsyncAdaptedQueuePool, func, inspect, select, text

from tests.databases import Database, EmbeddedPostgres
from tests.domain import Effect


@pytest.mark.parametrize("time", ["first", "second"])
def test_every_test_starts_with_empty_tables(database: Database, time: str) -> None:
    with database.session.begin() as session:
        assert session.scalar(select(func.count()).select_from(Effect)) == 0
        session.add(Effect(note=time))


def test_an_empty_database_has_no_tables(empty_database: Database) -> None:
    assert inspect(empty_database.engine()).get_table_names() == []


def test_the_asynchronous_driver_connects(database: Database) -> None:
    async def main() -> int | None:
        engine = database.async_engine()
        async with engine.connect() as connection:
            found = await connection.scalar(select(func.count()).select_from(Effect))
        await engine.dispose()
        return found

    assert asyncio.run(main()) == 0


def test_asyncpg_connects(postgresql: Database) -> None:
    async def main() -> int | None:
        engine = postgresql.async_engine(postgresql.url.set(drivername="postgresql+asyncpg"))
        async with engine.connect() as connection:
            found = await connection.scalar(select(func.count()).select_from(Effect))
        await engine.dispose()
        return found

    assert asyncio.run(main()) == 0


def test_a_forgotten_asynchronous_engine_is_an_error(sqlite: Database) -> None:
    engine = sqlite.async_engine(poolclass=AsyncAdaptedQueuePool)  # not yet SQLite's in 2.0.31

    async def use() -> None:
        async with engine.connect():
            pass
        with pytest.raises(AssertionError, match="dispose"):
            sqlite.dispose()
        await engine.dispose()

    asyncio.run(use())


def test_the_embedded_server_restarts(
    postgresql: Database, embedded_postgresql: EmbeddedPostgres
) -> None:
    engine = postgresql.engine(pool_pre_ping=True)
    with engine.connect() as connection:
        before = connection.scalar(text("SELECT pg_postmaster_start_time()"))
    embedded_postgresql.restart()
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT pg_postmaster_start_time()")) > before
