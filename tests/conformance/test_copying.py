"""`enqueue_many` writes the same rows by whatever statement, in the caller's transaction: COPY where psycopg is there."""

import asyncio
import json
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, event, func, select, text
from sqlalchemy.exc import DBAPIError, ProgrammingError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sqlalchemy_jobs import Job, copying, enqueue, enqueue_many, job, metadata
from sqlalchemy_jobs.copying import FEWEST
from sqlalchemy_jobs.tables import jobs
from tests.databases import Database

ENQUEUE = sys.modules[
    "sqlalchemy_jobs.enqueue"
]  # the module: its name is also that of the function


@job("copied", queue="of:class", priority=-3, max_attempts=4)
@dataclass(frozen=True)
class Copied:
    n: int = 0
    text: str = ""
    anything: Any = None


TRICKY = [
    Copied(1, "tab\t newline\n return\r backslash\\ \\N \\. \\t \x01\x1f\x7f"),
    Copied(2, "ünïcode \U0001f600 \u2028 \ufeff '\" % :name $1 {} {0}"),
    Copied(3, "x" * 200_000),
    Copied(4, "\\.", {"\\N": "\\N", "a\tb\n": ["\\", None, True, 1e308, 5e-324, -(10**30)]}),
    Copied(5, "\\.\n", [[], {}, "", {"": ""}]),
]
PAYLOADS = [*TRICKY, *(Copied(n) for n in range(FEWEST))]


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of `enqueue_many` went by COPY."""
    done: list[bool] = []

    def copy(connection: Any, rows: Any) -> bool:
        done.append(copying.copy(connection, rows))
        return done[-1]

    monkeypatch.setattr(ENQUEUE, "copy", copy)
    return done


def rows(session: Session) -> list[dict[str, Any]]:
    """All columns of all rows, in the order of the ids."""
    return [dict(row._mapping) for row in session.execute(select(jobs).order_by(jobs.c.id))]


def count(database: Database) -> int:
    with database.session() as session:
        return session.scalar(select(func.count()).select_from(Job)) or 0


OPTIONS: list[dict[str, Any]] = [
    {},
    {"delay": timedelta(days=1)},
    {
        "queue": "q.1:a-b",
        "priority": 32767,
        "run_at": datetime(1, 1, 2, 3, 4, 5, 6, tzinfo=UTC),
        "max_attempts": 1,
        "tags": ["a b", "\\N", "ü\\", '{"}'],
        "headers": {"\\N": "tab\t\n\\", "ü": '"'},
    },
    {"run_at": datetime(9999, 12, 30, 23, 59, 59, 999999, tzinfo=UTC)},
]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "delay", "all options", "far away"])
def test_the_rows_are_those_that_adding_one_by_one_writes(
    database: Database, copies: list[bool], options: dict[str, Any], asynchronous: bool
) -> None:
    if asynchronous:

        async def main() -> list[uuid.UUID]:
            engine = database.async_engine()
            async with AsyncSession(engine) as session, session.begin():
                ids = await session.run_sync(enqueue_many, PAYLOADS, **options)
            await engine.dispose()
            return ids

        ids = asyncio.run(main())
    else:
        with database.session.begin() as session:
            ids = enqueue_many(session, PAYLOADS, **options)
    assert copies == [database.name == "postgresql"]
    with database.session.begin() as session:
        session.add_all([enqueue(each, **options) for each in PAYLOADS])
    with database.session() as session:
        found = rows(session)
    many, single = found[: len(PAYLOADS)], found[len(PAYLOADS) :]
    assert [each["id"] for each in many] == ids
    for one, other in zip(many, single, strict=True):
        assert set(one) == set(other) == set(jobs.c.keys())
        for name in one.keys() - {"id"}:
            if name == "created_at" or (name == "run_at" and "run_at" not in options):
                assert timedelta(0) <= other[name] - one[name] < timedelta(minutes=10)
            else:
                assert one[name] == other[name], name
    # What compares equal in Python may be written in two ways.
    if database.name == "postgresql":
        with database.session() as session:
            written = session.scalars(
                text("SELECT payload::text FROM sajobs_job ORDER BY id")
            ).all()
        assert written[: len(PAYLOADS)] == written[len(PAYLOADS) :]


def test_they_commit_and_roll_back_with_the_callers_transaction(
    row_locks: Database, copies: list[bool]
) -> None:
    sessions = row_locks.sessions()
    with sessions() as session:
        enqueue_many(session, PAYLOADS)
        assert count(row_locks) == 0
        session.rollback()
        enqueue_many(session, PAYLOADS)
        savepoint = session.begin_nested()
        enqueue_many(session, PAYLOADS)
        savepoint.rollback()
        with session.begin_nested():
            enqueue_many(session, PAYLOADS)
        session.add(enqueue(Copied()))
        session.commit()
    assert count(row_locks) == 2 * len(PAYLOADS) + 1
    assert copies == [row_locks.name == "postgresql"] * 4


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_the_isolation_is_that_of_the_session(
    postgresql: Database, copies: list[bool], level: Any
) -> None:
    with Session(postgresql.engine(isolation_level=level)) as session:
        assert session.scalar(select(func.count()).select_from(Job)) == 0
        with postgresql.session.begin() as other:
            enqueue_many(other, PAYLOADS)
        enqueue_many(session, PAYLOADS)
        assert session.scalar(text("SHOW transaction_isolation")) == level.lower()
        assert session.scalar(select(func.count()).select_from(Job)) == len(PAYLOADS)
        session.commit()
    assert copies == [True, True]
    assert count(postgresql) == 2 * len(PAYLOADS)


@pytest.mark.parametrize("by", ["schema_translate_map", "search_path"])
def test_they_go_where_the_session_looks(postgresql: Database, copies: list[bool], by: str) -> None:
    schema = 'Odd "schema'
    quoted = '"Odd ""schema"'
    plain = postgresql.engine()
    with plain.begin() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {quoted}")
        metadata.create_all(connection.execution_options(schema_translate_map={None: schema}))
    engine: Engine = plain.execution_options(schema_translate_map={None: schema})
    if by == "search_path":
        engine = postgresql.engine()

        @event.listens_for(engine, "begin")
        def look_there(connection: Any) -> None:
            connection.exec_driver_sql(f"SET LOCAL search_path = {quoted}")

    with Session(engine) as session, session.begin():
        enqueue_many(session, PAYLOADS)
        assert session.scalar(select(func.count()).select_from(Job)) == len(PAYLOADS)
    assert copies == [True]
    assert count(postgresql) == 0
    with plain.begin() as connection:
        found = connection.exec_driver_sql(f"SELECT count(*) FROM {quoted}.sajobs_job")
        assert found.scalar() == len(PAYLOADS)
        connection.exec_driver_sql(f"DROP SCHEMA {quoted} CASCADE")


def test_row_level_security_has_them_inserted(postgresql: Database, copies: list[bool]) -> None:
    """COPY would be refused, and that would end the caller's transaction."""
    role = f"sajobs_copy_{uuid.uuid4().hex}"
    engine = postgresql.engine()
    with engine.begin() as connection:
        for statement in (
            f"CREATE ROLE {role}",
            f"GRANT SELECT, INSERT ON sajobs_job TO {role}",
            f"GRANT SELECT ON sajobs_worker TO {role}",
            "ALTER TABLE sajobs_job ENABLE ROW LEVEL SECURITY",
            "CREATE POLICY own ON sajobs_job USING (queue = 'mine') WITH CHECK (queue = 'mine')",
        ):
            connection.exec_driver_sql(statement)
    try:
        with Session(engine) as session, session.begin():
            session.execute(text(f"SET LOCAL ROLE {role}"))
            enqueue_many(session, PAYLOADS, queue="mine")
            with pytest.raises(ProgrammingError, match="policy"), session.begin_nested():
                enqueue_many(session, PAYLOADS, queue="other")
        assert copies == [False, False]
        assert count(postgresql) == len(PAYLOADS)
        with Session(engine) as session, session.begin():
            enqueue_many(session, PAYLOADS)  # it does not hold for this user
        assert copies[2:] == [True]
    finally:
        with engine.begin() as connection:
            connection.exec_driver_sql(f"DROP OWNED BY {role}")
            connection.exec_driver_sql(f"DROP ROLE {role}")


def test_few_and_unique_jobs_are_inserted(postgresql: Database, copies: list[bool]) -> None:
    with postgresql.session.begin() as session:
        enqueue_many(session, PAYLOADS[: FEWEST - 1])
        assert copies == [False]
        enqueue_many(session, PAYLOADS, unique_key="one of them")
        assert copies == [False]  # not even tried
    assert count(postgresql) == FEWEST


def test_an_engine_with_its_own_json_has_it_written(
    postgresql: Database, copies: list[bool]
) -> None:
    engine = postgresql.engine(json_serializer=lambda value: json.dumps([value]))
    with Session(engine) as session, session.begin():
        enqueue_many(session, PAYLOADS)
    assert copies == [False]
    with postgresql.session() as session:
        assert isinstance(rows(session)[0]["payload"], list)


def test_an_error_of_the_server_is_the_one_of_any_statement(
    postgresql: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = uuid.uuid4()
    monkeypatch.setattr(ENQUEUE, "uuid7", lambda: same)
    with postgresql.session() as session:
        with pytest.raises(DBAPIError, match="sajobs_job_pkey") as raised:
            enqueue_many(session, PAYLOADS)
        assert raised.value.statement is not None and raised.value.statement.startswith("COPY ")
        session.rollback()
        assert session.scalar(select(1)) == 1
    assert count(postgresql) == 0


def test_a_connection_that_breaks_meanwhile_is_taken_out_of_the_pool(
    postgresql: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks: Callable[..., Any] = copying._chunks

    def break_then_send(given: Any) -> Any:
        with postgresql.engine().connect() as other:
            other.execute(text("SELECT pg_terminate_backend(:pid, 20000)"), {"pid": pid})
        yield from chunks(given)

    monkeypatch.setattr(copying, "_chunks", break_then_send)
    with postgresql.session() as session:
        pid = session.scalar(text("SELECT pg_backend_pid()"))
        with pytest.raises(DBAPIError) as raised:
            enqueue_many(session, PAYLOADS)
        assert raised.value.connection_invalidated
        session.rollback()
        assert session.scalar(text("SELECT pg_backend_pid()")) != pid
    assert count(postgresql) == 0


def test_a_time_zone_and_a_date_style_of_the_session_change_nothing(
    postgresql: Database, copies: list[bool]
) -> None:
    at = datetime(2030, 3, 4, 5, 6, 7, 8, tzinfo=UTC)
    with postgresql.session.begin() as session:
        session.execute(text("SET LOCAL TimeZone = 'America/St_Johns'"))
        session.execute(text("SET LOCAL DateStyle = 'SQL, DMY'"))
        enqueue_many(session, PAYLOADS, run_at=at)
    with postgresql.session() as session:
        assert set(session.scalars(select(Job.run_at))) == {at}
    assert copies == [True]


def test_a_connection_that_was_detached_has_them_inserted(
    postgresql: Database, copies: list[bool]
) -> None:
    with Session(postgresql.engine()) as session, session.begin():
        session.connection().detach()
        enqueue_many(session, PAYLOADS)
    assert copies == [False]
    assert count(postgresql) == len(PAYLOADS)
