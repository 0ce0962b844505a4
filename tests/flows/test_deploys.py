"""Old code on newer tables, new code on older ones, and a migration under a worker that goes on.

The versions after the newest are made up here.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Column, NullPool, create_engine, func, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, sessionmaker

from sqlalchemy_jobs import (
    Attempt,
    Job,
    JobApp,
    JobState,
    Worker,
    dialects,
    enqueue,
    enqueue_many,
    job,
    migrations,
)
from sqlalchemy_jobs.errors import MigrationError, TablesOutdated, TablesTooNew
from sqlalchemy_jobs.migrations import versions
from sqlalchemy_jobs.migrations.operations import Steps
from tests.databases import Database
from tests.domain import Effect
from tests.processes import workers

# --- the versions to come -------------------------------------------------------------------------


def add_column(op: Steps, table: str, column: Column[Any]) -> None:
    if op._there is None or f"{table}.{column.name}" not in op._there:
        op._op.add_column(table, column, schema=op._schema)


def drop_column(op: Steps, table: str, name: str) -> None:
    if op._there is None or f"{table}.{name}" in op._there:
        op._op.drop_column(table, name, schema=op._schema)


def make_later(op: Steps) -> None:
    op.create_table(
        "sajobs_later",
        Column("id", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="sajobs_later_pkey"),
    )


def second_up(op: Steps) -> None:
    add_column(op, "sajobs_job", Column("later", sa.Integer()))
    make_later(op)


def second_down(op: Steps) -> None:
    op.drop_table("sajobs_later")
    drop_column(op, "sajobs_job", "later")


SECOND = SimpleNamespace(
    WHEN="before", ABOUT="the table sajobs_later", upgrade=second_up, downgrade=second_down
)
HALF_OF_SECOND = SimpleNamespace(
    upgrade=lambda op: add_column(op, "sajobs_job", Column("later", sa.Integer()))
)


def third_up(op: Steps) -> None:
    drop_column(op, "sajobs_job", "tags")
    op.drop_table("sajobs_later")


def third_down(op: Steps) -> None:
    make_later(op)
    add_column(op, "sajobs_job", Column("tags", sa.JSON()))


THIRD = SimpleNamespace(WHEN="after", ABOUT="the tags", upgrade=third_up, downgrade=third_down)


@contextmanager
def release(*later: Any) -> Iterator[None]:
    """Be a later release, with further versions, all of which it needs."""
    every = (*versions.VERSIONS, *later)
    with pytest.MonkeyPatch.context() as patch:
        for module in (versions, migrations):
            patch.setattr(module, "VERSIONS", every)
            patch.setattr(module, "LATEST", len(every))
        patch.setattr(migrations, "_needed", lambda: versions.layout(len(every)))
        versions.layout.cache_clear()
        yield
    versions.layout.cache_clear()


def migrate(database: Database, to: int) -> str:
    with create_engine(database.url, poolclass=NullPool).begin() as connection:
        return str(migrations.migrate(connection, to=to))


def check(database: Database) -> None:
    with create_engine(database.url, poolclass=NullPool).connect() as connection:
        migrations.check(connection)


def names_in(database: Database) -> set[str]:
    with create_engine(database.url, poolclass=NullPool).connect() as connection:
        return set(versions.names_in(connection, None))


@pytest.fixture
def migrated(empty_database: Database) -> Database:
    """A database of its own, at version 1."""
    migrate(empty_database, to=1)
    return empty_database


# --- a job ----------------------------------------------------------------------------------------


@job("step")
@dataclass(frozen=True)
class Step:
    pass


def worker(database: Database) -> Worker:
    app: JobApp[Any, Any] = JobApp(sessionmaker(database.engine()))

    @app.handler(Step)
    def handle(session: Session, payload: Step) -> None: ...

    return Worker(app, drain=True)


def jobs_are_done(database: Database) -> None:
    with Session(database.engine()) as session:
        with session.begin():
            session.add(enqueue(Step()))
            enqueue_many(session, [Step()])
        assert worker(database).run()
        states = set(session.scalars(select(Job.state)))
    assert states == {JobState.SUCCEEDED}


# --- tests ----------------------------------------------------------------------------------------


def test_the_previous_release_works_on_what_a_later_one_added(migrated: Database) -> None:
    """And leaves it alone: it neither completes nor takes back what it does not know."""
    with release(SECOND):
        assert migrate(migrated, to=2) == "at version 1"
        assert migrate(migrated, to=2) == "at version 2"
    names = names_in(migrated)
    assert {"sajobs_later", "sajobs_job.later"} <= names
    check(migrated)
    jobs_are_done(migrated)
    assert migrate(migrated, to=1) == "at version 1"
    with pytest.raises(
        MigrationError,
        match=r"a later release .* \(sajobs_job.later, sajobs_later.*\): take them back",
    ):
        migrate(migrated, to=0)
    assert names_in(migrated) == names
    with release(SECOND):
        migrate(migrated, to=1)
    assert names_in(migrated) == set(versions.layout(1))


def test_a_release_refuses_tables_that_are_older_than_it_needs(migrated: Database) -> None:
    """At its start, with the command; on the right tables it works."""
    with release(SECOND):
        told = "at version 1, and this release needs version 2. Run your migrations, or `sajobs migrate`"
        with pytest.raises(TablesOutdated, match=told):
            check(migrated)
        with pytest.raises(TablesOutdated, match=told):
            worker(migrated).run()
        migrate(migrated, to=2)
        check(migrated)
        jobs_are_done(migrated)


def test_a_version_that_was_made_in_part_is_completed(migrated: Database) -> None:
    with release(HALF_OF_SECOND):
        migrate(migrated, to=2)
    check(migrated)  # the previous release does not mind
    with release(SECOND):
        told = "version 2 was made in part, and these are missing: sajobs_later, and this release"
        with pytest.raises(TablesOutdated, match=told):
            worker(migrated).run()
        migrate(migrated, to=2)
        check(migrated)
        jobs_are_done(migrated)
    with create_engine(migrated.url, poolclass=NullPool).begin() as connection:
        connection.execute(sa.text("DROP TABLE sajobs_later"))
    with release(SECOND):
        migrate(migrated, to=1)  # and half of it is taken back
    assert names_in(migrated) == set(versions.layout(1))


def test_a_release_refuses_tables_from_which_a_later_one_took_what_it_needs(
    migrated: Database,
) -> None:
    with release(SECOND, THIRD):
        assert migrate(migrated, to=3) == "at version 1"
        check(migrated)
    names = names_in(migrated)
    assert "sajobs_later" not in names  # made and taken away by one run
    told = r"needs what is no longer there: sajobs_job\.tags\. Install the later release"
    with pytest.raises(TablesTooNew, match=told):
        check(migrated)
    with pytest.raises(TablesTooNew, match=told):
        worker(migrated).run()
    for to in (1, 0):
        with pytest.raises(TablesTooNew, match=told):
            migrate(migrated, to=to)
    assert names_in(migrated) == names
    with release(SECOND, THIRD):
        migrate(migrated, to=1)
    check(migrated)
    assert names_in(migrated) == set(versions.layout(1))


def test_a_transaction_from_before_a_migration_is_run_again(mysql: Database) -> None:
    """It is no failure of its job that MariaDB refuses its old snapshot of a table with a new index."""
    with (
        create_engine(
            mysql.url, poolclass=NullPool, isolation_level="REPEATABLE READ"
        ).connect() as old,
        create_engine(mysql.url, poolclass=NullPool).connect() as migration,
    ):
        old.execute(select(Effect.id)).all()
        migration.execute(sa.text("CREATE INDEX sajobs_later ON sajobs_job (created_at)"))
        try:
            with pytest.raises(DBAPIError) as refused:
                old.execute(sa.text("SELECT id FROM sajobs_job FORCE INDEX (sajobs_later)"))
        finally:
            old.rollback()
            migration.execute(sa.text("DROP INDEX sajobs_later ON sajobs_job"))
    assert dialects.named("mysql").is_conflict(refused.value)


class Enqueueing(threading.Thread):
    """An application that enqueues until told to stop."""

    def __init__(self, database: Database) -> None:
        super().__init__()
        self.sessions = database.sessions()
        self.stop = threading.Event()
        self.made: list[Any] = []
        self.failed: list[Exception] = []

    def run(self) -> None:
        from tests.apps.effects import Write, WriteAsync

        while not self.stop.wait(0.02):
            try:
                with self.sessions() as session, session.begin():
                    session.add(one := enqueue(Write()))
                    session.add(other := enqueue(WriteAsync()))
                    ids = [one.id, other.id, *enqueue_many(session, [Write()])]
                self.made += ids
            except Exception as error:  # told by the test
                self.failed.append(error)


def test_a_migration_under_a_running_worker_loses_no_job(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There and back, while the previous release enqueues and works: each job is done exactly once, none fails."""
    monkeypatch.setenv("SAJOBS_TEST_URL", database.url.render_as_string(hide_password=False))
    enqueueing = Enqueueing(database)
    with workers(database, tmp_path), Session(database.engine(poolclass=NullPool)) as session:

        def done() -> int:
            with session.begin():
                succeeded = Job.state == JobState.SUCCEEDED
                return session.scalar(select(func.count()).where(succeeded)) or 0

        enqueueing.start()
        try:
            wait_until(lambda: done() >= 10)
            for to in (2, 1, 2, 1):
                with release(SECOND):
                    migrate(database, to=to)
                before = done()
                wait_until(lambda before=before: done() >= before + 10)
        finally:
            enqueueing.stop.set()
            enqueueing.join(60)
        assert enqueueing.failed == []
        wait_until(lambda: done() == len(enqueueing.made))
        effects = select(Effect.job_id, func.count()).group_by(Effect.job_id)
        assert {row[0]: row[1] for row in session.execute(effects)} == {
            each.hex: 1 for each in enqueueing.made
        }
        assert session.scalar(select(func.count()).select_from(Attempt)) == 0
    assert names_in(database) == set(versions.layout(1))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
