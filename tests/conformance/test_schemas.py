"""The tables in a schema of the application's choice, and once per tenant."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import NullPool, create_engine, select, text
from sqlalchemy.orm import Session, sessionmaker

from sqlalchemy_jobs import Job, JobApp, JobState, Worker, enqueue, job, migrations
from sqlalchemy_jobs.errors import EngineError
from tests import domain, migrating
from tests.apps import in_schema
from tests.databases import Database, Databases
from tests.environments import Environment
from tests.processes import WorkerProcess

AT_LATEST = f"at version {migrations.LATEST}"
WEIRD = 'Tenant :two "100%"'
"""A name that SQL, text() and the drivers' formats must each be told to leave alone."""


@dataclass(frozen=True)
class Schemas:
    database: Database
    one: str
    two: str


@pytest.fixture(params=["postgresql", "mysql"])
def schemas(
    request: pytest.FixtureRequest, databases: Databases, tmp_path: Path
) -> Iterator[Schemas]:
    """A database without tables, and two schemas in it; on MySQL these are databases beside it."""
    with ExitStack() as stack:
        database = stack.enter_context(databases.empty(request.param, tmp_path))
        if request.param == "mysql":
            beside = [stack.enter_context(databases.empty("mysql", tmp_path)) for _ in range(2)]
            one, two = (str(each.url.database) for each in beside)
        else:
            one, two = "one", WEIRD
            with create_engine(database.url, poolclass=NullPool).begin() as connection:
                connection.exec_driver_sql("CREATE SCHEMA one")
                quoted = connection.dialect.identifier_preparer.quote_identifier(two)
                connection.exec_driver_sql(f"CREATE SCHEMA {quoted}")
        yield Schemas(database, one, two)


@pytest.mark.parametrize("work", [in_schema.make_tables, in_schema.run_jobs])
def test_an_application_in_a_schema(schemas: Schemas, tmp_path: Path, work: Any) -> None:
    """`use_schema`: every way to make the tables, and workers of both colours."""
    database = schemas.database
    migrating.apart(work, database.name, database.url, schemas.one, tmp_path)


def test_each_tenant_has_its_jobs(
    schemas: Schemas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tenants in schemas of one database, by `schema_translate_map`; their workers at once, one sync, one async."""
    url = schemas.database.url
    tenants = {schemas.one: "sync", schemas.two: "async"}
    for tenant in tenants:
        engine = schemas.database.engine(execution_options={"schema_translate_map": {None: tenant}})
        with engine.begin() as connection:
            assert str(migrations.migrate(connection)) == "no tables for jobs"
            assert str(migrations.state(connection)) == AT_LATEST
            migrations.check(connection)
        domain.Base.metadata.create_all(engine)
        with Session(engine) as session, session.begin():
            session.add_all(enqueue(Note(f"{tenant} {number}")) for number in range(20))
    monkeypatch.setenv("SAJOBS_TEST_SCHEMA", "")
    with ExitStack() as stack:
        started = []
        for tenant, colour in tenants.items():
            monkeypatch.setenv("SAJOBS_TEST_TENANT", tenant)
            monkeypatch.setenv("SAJOBS_TEST_COLOUR", colour)
            worker = WorkerProcess(url, tmp_path, "--drain", app="tests.apps.schemas:jobs")
            stack.callback(worker.wait)
            stack.callback(worker.process.kill)
            started.append(worker)
        for worker in started:
            assert worker.wait() == 0, worker.log
    for tenant in tenants:
        engine = schemas.database.engine(execution_options={"schema_translate_map": {None: tenant}})
        with Session(engine) as session:
            assert sorted(session.scalars(select(domain.Effect.note))) == sorted(
                f"{tenant} {number}" for number in range(20)
            )
            assert set(session.scalars(select(Job.state))) == {JobState.SUCCEEDED}
    with create_engine(url, poolclass=NullPool).connect() as connection:
        assert str(migrations.state(connection)) == "no tables for jobs"


def test_a_revision_makes_the_tables_of_each_tenant(schemas: Schemas, tmp_path: Path) -> None:
    """With the loop over the tenants that Alembic's cookbook gives for `schema_translate_map`."""
    environment = Environment(tmp_path / "alembic").on(schemas.database)
    environment.write(f"upgrade(op, to={migrations.LATEST})", "downgrade(op, to=0)")
    environment.edit(
        """\
        context.configure(
            connection=connection, """,
        f"""\
      for tenant in {[schemas.one, schemas.two]!r}:
        connection = connection.execution_options(schema_translate_map={{None: tenant}})
        context.configure(
            version_table_schema=tenant,
            connection=connection, """,
    )
    environment.edit(
        """\
        with context.begin_transaction():
            context.run_migrations()


if""",
        """\
        with context.begin_transaction():
            context.run_migrations()
        connection.commit()


if""",
    )
    found = []
    for step in (environment.upgrade, environment.downgrade, environment.upgrade):
        step()
        with create_engine(schemas.database.url, poolclass=NullPool).connect() as connection:
            found.append(
                [
                    str(migrations.state(connection, schema=each))
                    for each in (schemas.one, schemas.two, None)
                ]
            )
    there = [AT_LATEST, AT_LATEST, "no tables for jobs"]
    assert found == [there, ["no tables for jobs"] * 3, there]


@pytest.mark.parametrize("schemas", ["mysql"], indirect=True)
def test_on_mysql_the_url_need_not_name_a_database(schemas: Schemas) -> None:
    """The lock is named by the schema: two who come by different URLs wait for each other."""
    url = schemas.database.url
    server = url.difference_update_query([])._replace(database=None)
    with (
        create_engine(server, poolclass=NullPool).connect() as connection,
        create_engine(url, poolclass=NullPool).connect() as other,
    ):
        assert connection.scalar(text("SELECT database()")) is None
        assert str(migrations.migrate(connection, schema=schemas.one)) == "no tables for jobs"
        assert str(migrations.migrate(other, schema=schemas.one)) == AT_LATEST


def test_a_schema_that_is_not_there_is_refused(schemas: Schemas) -> None:
    engine = schemas.database.engine(execution_options={"schema_translate_map": {None: "nowhere"}})
    for work in (migrations.migrate, migrations.state, migrations.check):
        with (
            pytest.raises(EngineError, match='has no schema "nowhere": create it'),
            engine.begin() as connection,
        ):
            work(connection)
    with pytest.raises(EngineError, match='has no schema "nowhere": create it'):
        worker_on(engine).run()


def test_on_sqlite_there_are_no_schemas(databases: Databases, tmp_path: Path) -> None:
    with databases.empty("sqlite", tmp_path) as database:
        engine = database.engine(execution_options={"schema_translate_map": {None: "one"}})
        for work in (migrations.migrate, migrations.state, migrations.check):
            with (
                pytest.raises(EngineError, match='in the schema "one", and SQLite has no schemas'),
                engine.begin() as connection,
            ):
                work(connection)
        with pytest.raises(EngineError, match="SQLite has no schemas"):
            worker_on(engine).run()


# Of the same kind as the one of `tests.apps.schemas`, which is imported by worker processes only.


@job("note")
@dataclass(frozen=True)
class Note:
    text: str


def worker_on(engine: Any) -> Worker:
    app: JobApp[Any, Any] = JobApp(sessionmaker(engine))

    @app.handler(Note)
    def handle(session: Session, payload: Note) -> None: ...

    return Worker(app, drain=True)
