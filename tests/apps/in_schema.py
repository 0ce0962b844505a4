"""The life of an application that calls `use_schema`: to be run in a process of its own, for it is for ever."""

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from click.testing import CliRunner
from sqlalchemy import URL, Connection, NullPool, create_engine, inspect, select, update
from sqlalchemy.orm import Session

import sqlalchemy_jobs
from sqlalchemy_jobs import (
    Attempt,
    Job,
    JobState,
    WorkerRow,
    enqueue,
    enqueue_many,
    migrations,
    transitions,
)
from sqlalchemy_jobs.cli import main
from tests import domain
from tests.databases import Database
from tests.environments import OPTIONS, Environment

NAMES = {table.name for table in sqlalchemy_jobs.metadata.tables.values()}
AT_LATEST = f"at version {migrations.LATEST}"


def make_tables(name: str, url: URL, schema: str, folder: Path) -> None:
    """In all ways but by `sajobs migrate`."""
    database = begin(name, url, schema)
    assert {table.fullname for table in sqlalchemy_jobs.metadata.sorted_tables} == {
        f"{schema}.{each}" for each in NAMES
    }
    for work in (by_create_all, by_autogenerate, by_revision, by_offline_revision):
        assert tables_of(database) == {"the schema": set(), "elsewhere": set()}, work
        work(database, schema, folder / work.__name__)


def run_jobs(name: str, url: URL, schema: str, folder: Path) -> None:
    """In tables by `sajobs migrate`."""
    database = begin(name, url, schema)
    by_command(database, schema, folder)
    environment(folder / "alembic", schema).on(database).check()
    domain.Base.metadata.create_all(create_engine(database.url, poolclass=NullPool))
    jobs_are_done(database)


def begin(name: str, url: URL, schema: str) -> Database:
    os.environ.update(
        SAJOBS_TEST_URL=url.render_as_string(hide_password=False), SAJOBS_TEST_SCHEMA=schema
    )
    import tests.apps.schemas  # noqa: F401 (calls use_schema)

    return Database(name, url)


def tables_of(database: Database) -> dict[str, set[str]]:
    schema = os.environ["SAJOBS_TEST_SCHEMA"]
    inspector = inspect(create_engine(database.url, poolclass=NullPool))
    found = {
        "the schema": set(inspector.get_table_names(schema)),
        "elsewhere": set(inspector.get_table_names()) & NAMES,
    }
    found["the schema"] -= {"alembic_version"}
    return found


HERE: dict[str, set[str]] = {"the schema": NAMES, "elsewhere": set()}


def environment(folder: Path, schema: str) -> Environment:
    """As autogenerate needs it to see the schema, and no other."""
    folder.parent.mkdir(exist_ok=True)
    made = Environment(folder)
    made.edit(
        OPTIONS,
        f"{OPTIONS}, include_schemas=True, "
        f"include_name=lambda name, type_, parents: type_ != 'schema' or name in (None, {schema!r})",
    )
    return made


def in_transaction(database: Database, work: Callable[[Connection], object]) -> object:
    with create_engine(database.url, poolclass=NullPool).begin() as connection:
        return work(connection)


def by_create_all(database: Database, schema: str, folder: Path) -> None:
    engine = create_engine(database.url, poolclass=NullPool)
    sqlalchemy_jobs.metadata.create_all(engine)
    assert tables_of(database) == HERE
    assert str(in_transaction(database, migrations.migrate)) == AT_LATEST
    environment(folder, schema).on(database).check()
    sqlalchemy_jobs.metadata.drop_all(engine)


def by_autogenerate(database: Database, schema: str, folder: Path) -> None:
    here = environment(folder, schema).on(database)
    here.generate()
    there_and_back(here, database)


def by_revision(database: Database, schema: str, folder: Path) -> None:
    here = environment(folder, schema).on(database)
    here.write(f"upgrade(op, to={migrations.LATEST}, start=0)", "downgrade(op, to=0)")
    there_and_back(here, database)


def there_and_back(here: Environment, database: Database) -> None:
    here.upgrade()
    assert tables_of(database) == HERE
    here.check()
    assert str(in_transaction(database, migrations.migrate)) == AT_LATEST
    here.downgrade()


def by_offline_revision(database: Database, schema: str, folder: Path) -> None:
    """`use_schema` is all that it knows, and enough."""
    here = environment(folder, schema).on(database)
    here.write(f"upgrade(op, to={migrations.LATEST}, start=0)", "downgrade(op, to=0)")
    script = here.upgrade_offline()
    for each in NAMES:
        assert f"CREATE TABLE {schema}.{each} (" in script


def by_command(database: Database, schema: str, folder: Path) -> None:
    """`sajobs migrate`: the schema is the app's, also on a database that is named beside it."""
    app = ["migrate", "--app", "tests.apps.schemas:jobs"]
    url = ["--database-url", database.url.render_as_string(hide_password=False)]
    for options, said in (
        (["--check"], "no tables for jobs"),
        ([], "made the tables"),
        (url, "nothing to do"),
        (["--check"], AT_LATEST),
        (["--to", "0"], "took back the tables"),
        (url, "made the tables"),
    ):
        result = CliRunner().invoke(main, app + options)
        assert said in result.output, result
    assert tables_of(database) == HERE


def jobs_are_done(database: Database) -> None:
    """By real workers of both colours, also those that were brought back from a dead one."""
    from tests.apps.schemas import Note

    engine = create_engine(database.url, poolclass=NullPool)
    for colour in ("sync", "async"):
        with Session(engine) as session, session.begin():
            session.add(enqueue(Note(f"{colour} one")))
            enqueue_many(session, [Note(f"{colour} {each}") for each in ("two", "three")])
            session.add(left := enqueue(Note(f"{colour} left")))
            session.flush()
            leave(session, left)
        done = subprocess.run(
            [
                *(sys.executable, "-m", "sqlalchemy_jobs", "worker"),
                *("--app", "tests.apps.schemas:jobs", "--drain"),
            ],
            env=os.environ | {"SAJOBS_TEST_COLOUR": colour},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        with Session(engine) as session:
            notes = session.scalars(
                select(domain.Effect.note).where(domain.Effect.note.startswith(f"{colour} "))
            )
            assert sorted(notes) == [f"{colour} {each}" for each in ("left", "one", "three", "two")]
            assert set(session.scalars(select(Job.state))) == {JobState.SUCCEEDED}
            assert session.scalars(select(Attempt.outcome)).all()[-1] == "crashed"


def leave(session: Session, job: Job) -> None:
    """Make it a job that was run by a worker whose lease has ended, and declare that one dead."""
    long_ago = datetime.now(UTC) - timedelta(hours=1)
    worker = WorkerRow(
        name="gone", started_at=long_ago, heartbeat_at=long_ago, lease_until=long_ago
    )
    session.add(worker)
    session.flush()
    session.execute(
        update(Job)
        .where(Job.id == job.id)
        .values(state=JobState.RUNNING, worker_id=worker.id, attempt=1, started_at=long_ago)
    )
    assert transitions.rescue(session, worker.id, long_ago) == {job.id: JobState.READY}
