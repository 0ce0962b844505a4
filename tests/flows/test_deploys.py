"""Old code on newer tables, new code on older ones, and a migration under a worker that goes on.

The versions after the newest are made up here.
"""

import threading
from collections.abc import Iterator
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
from tests.waiting import until

LATEST = migrations.LATEST
AT_LATEST = f"at version {LATEST}"

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


def next_up(op: Steps) -> None:
    add_column(op, "sajobs_job", Column("later", sa.Integer()))
    make_later(op)


def next_down(op: Steps) -> None:
    op.drop_table("sajobs_later")
    drop_column(op, "sajobs_job", "later")


NEXT = SimpleNamespace(
    WHEN="before", ABOUT="the table sajobs_later", upgrade=next_up, downgrade=next_down
)
HALF_OF_NEXT = SimpleNamespace(
    upgrade=lambda op: add_column(op, "sajobs_job", Column("later", sa.Integer()))
)


def after_next_up(op: Steps) -> None:
    drop_column(op, "sajobs_job", "tags")
    op.drop_table("sajobs_later")


def after_next_down(op: Steps) -> None:
    make_later(op)
    add_column(op, "sajobs_job", Column("tags", sa.JSON()))


AFTER_NEXT = SimpleNamespace(
    WHEN="after", ABOUT="the tags", upgrade=after_next_up, downgrade=after_next_down
)


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
    """A database of its own, at the version of this release."""
    migrate(empty_database, to=LATEST)
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
    with release(NEXT):
        assert migrate(migrated, to=LATEST + 1) == AT_LATEST
        assert migrate(migrated, to=LATEST + 1) == f"at version {LATEST + 1}"
    names = names_in(migrated)
    assert {"sajobs_later", "sajobs_job.later"} <= names
    check(migrated)
    jobs_are_done(migrated)
    assert migrate(migrated, to=LATEST) == AT_LATEST
    with pytest.raises(
        MigrationError,
        match=r"a later release .* \(sajobs_job.later, sajobs_later.*\): take them back",
    ):
        migrate(migrated, to=0)
    assert names_in(migrated) == names
    with release(NEXT):
        migrate(migrated, to=LATEST)
    assert names_in(migrated) == set(versions.layout(LATEST))


def test_a_release_refuses_tables_that_are_older_than_it_needs(migrated: Database) -> None:
    """At its start, with the command; on the right tables it works."""
    with release(NEXT):
        told = f"{AT_LATEST}, and this release needs version {LATEST + 1}. Run your migrations, or `sajobs migrate`"
        with pytest.raises(TablesOutdated, match=told):
            check(migrated)
        with pytest.raises(TablesOutdated, match=told):
            worker(migrated).run()
        migrate(migrated, to=LATEST + 1)
        check(migrated)
        jobs_are_done(migrated)


def test_a_version_that_was_made_in_part_is_completed(migrated: Database) -> None:
    with release(HALF_OF_NEXT):
        migrate(migrated, to=LATEST + 1)
    check(migrated)  # the previous release does not mind
    with release(NEXT):
        told = f"version {LATEST + 1} was made in part, and these are missing: sajobs_later, and this release"
        with pytest.raises(TablesOutdated, match=told):
            worker(migrated).run()
        migrate(migrated, to=LATEST + 1)
        check(migrated)
        jobs_are_done(migrated)
    with create_engine(migrated.url, poolclass=NullPool).begin() as connection:
        connection.execute(sa.text("DROP TABLE sajobs_later"))
    with release(NEXT):
        migrate(migrated, to=LATEST)  # and half of it is taken back
    assert names_in(migrated) == set(versions.layout(LATEST))


def test_a_release_refuses_tables_from_which_a_later_one_took_what_it_needs(
    migrated: Database,
) -> None:
    with release(NEXT, AFTER_NEXT):
        assert migrate(migrated, to=LATEST + 2) == AT_LATEST
        check(migrated)
    names = names_in(migrated)
    assert "sajobs_later" not in names  # made and taken away by one run
    told = r"needs what is no longer there: sajobs_job\.tags\. Install the later release"
    with pytest.raises(TablesTooNew, match=told):
        check(migrated)
    with pytest.raises(TablesTooNew, match=told):
        worker(migrated).run()
    for to in (LATEST, 0):
        with pytest.raises(TablesTooNew, match=told):
            migrate(migrated, to=to)
    assert names_in(migrated) == names
    with release(NEXT, AFTER_NEXT):
        migrate(migrated, to=LATEST)
    check(migrated)
    assert names_in(migrated) == set(versions.layout(LATEST))


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
            until(lambda: done() >= 10, 60)
            for to in (LATEST + 1, LATEST, LATEST + 1, LATEST):
                with release(NEXT):
                    migrate(database, to=to)
                before = done()
                until(lambda before=before: done() >= before + 10, 60)
        finally:
            enqueueing.stop.set()
            enqueueing.join(60)
        assert enqueueing.failed == []
        until(lambda: done() == len(enqueueing.made), 60)
        effects = select(Effect.job_id, func.count()).group_by(Effect.job_id)
        assert {row[0]: row[1] for row in session.execute(effects)} == {
            each.hex: 1 for each in enqueueing.made
        }
        assert session.scalar(select(func.count()).select_from(Attempt)) == 0
    assert names_in(database) == set(versions.layout(LATEST))


# --- the versions that there are ------------------------------------------------------------------


@contextmanager
def earlier_release(version: int) -> Iterator[None]:
    """Be the release that came with a version, and knows of no later one."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (versions, migrations):
            patch.setattr(module, "VERSIONS", versions.VERSIONS[:version])
            patch.setattr(module, "LATEST", version)
        patch.setattr(migrations, "_needed", lambda: versions.layout(version))
        yield


@pytest.mark.parametrize("version", range(1, LATEST))
def test_an_earlier_release_takes_the_tables_for_its_own(migrated: Database, version: int) -> None:
    """It starts on them, leaves them alone, and says which release is to take them back."""
    names = names_in(migrated)
    with earlier_release(version):
        check(migrated)
        assert migrate(migrated, to=version) == f"at version {version}"
        with pytest.raises(MigrationError, match="a later release of sqlalchemy-jobs changed"):
            migrate(migrated, to=0)
    assert names_in(migrated) == names


def test_a_version_that_runs_before_the_deploy_adds_what_the_release_before_need_not_write() -> (
    None
):
    """No column to a table that is there; else an INSERT of that release would fail for one that is NOT NULL."""
    for number, version in enumerate(versions.VERSIONS, start=1):
        before, after = versions.layout(number - 1), versions.layout(number)
        if version.WHEN == "before":
            assert before <= after
            assert not any(
                name.partition(".")[0] in before for name in after - before if "." in name
            )
