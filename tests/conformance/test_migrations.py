"""Versioned operations in a revision, and `migrate` without one: the same tables, whatever happens on the way."""

import ast
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from sqlalchemy import (
    Column,
    Connection,
    ForeignKey,
    MetaData,
    NullPool,
    Table,
    create_engine,
    event,
    select,
    text,
)
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, sessionmaker

import sqlalchemy_jobs
from sqlalchemy_jobs import Job, JobApp, Worker, enqueue, migrations, pause_queue
from sqlalchemy_jobs import job as declare
from sqlalchemy_jobs.cli import main
from sqlalchemy_jobs.errors import EngineError, MigrationError, TablesMissing, TablesOutdated
from sqlalchemy_jobs.migrations.versions import VERSIONS, layout
from tests import migrating
from tests.databases import Database, Databases
from tests.environments import Environment, definition, execute, table_names
from tests.waiting import until


@declare("nothing")
@dataclass(frozen=True)
class Nothing:
    pass


LATEST = migrations.LATEST
AT_LATEST = f"at version {LATEST}"
UPGRADE = f"upgrade(op, to={LATEST}, start=0)"
DOWNGRADE = f"downgrade(op, to=0, start={LATEST})"
TABLES = set(sqlalchemy_jobs.metadata.tables)


def in_transaction(database: Database, work: Callable[[Connection], Any]) -> Any:
    with create_engine(database.url, poolclass=NullPool).begin() as connection:
        return work(connection)


def made(database: Database) -> str:
    """What `migrate` finds; then the tables are there."""
    return str(in_transaction(database, migrations.migrate))


@pytest.fixture(scope="module")
def whole(
    databases: Databases, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], list[str]]:
    """The tables as `create_all` makes them of the models, on a server."""
    known: dict[str, list[str]] = {}

    def definition_on(name: str) -> list[str]:
        if name not in known:
            with databases.empty(name, tmp_path_factory.mktemp("whole")) as database:
                sqlalchemy_jobs.metadata.create_all(database.engine(poolclass=NullPool))
                known[name] = definition(database)
        return known[name]

    return definition_on


Whole = Callable[[str], list[str]]


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """An environment with one revision, which calls our operations."""
    environment = Environment(tmp_path / "alembic")
    environment.write(UPGRADE, DOWNGRADE)
    return environment


# --- the frozen DDL and the models --------------------------------------------------------------


def test_the_versions_have_all_that_the_models_have() -> None:
    assert layout(migrations.LATEST) == migrations._needed()


def test_a_version_imports_no_model() -> None:
    """Nor anything else that changes: with the packages' own imports left out, it comes with its operations only."""
    package = Path(sqlalchemy_jobs.__file__).parent
    code = f"""
import sys, types
for name, path in (("sqlalchemy_jobs", {str(package)!r}), ("sqlalchemy_jobs.migrations", {str(package / "migrations")!r})):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [path]
for number in range(1, {migrations.LATEST} + 1):
    __import__(f"sqlalchemy_jobs.migrations.v{{number:03}}")
print(sorted(name for name in sys.modules if name.startswith("sqlalchemy_jobs.migrations.")))
print(sorted(name for name in sys.modules if name.startswith("sqlalchemy_jobs") and ".migrations" not in name))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    own, others = (ast.literal_eval(line) for line in result.stdout.splitlines())
    numbered = [f"sqlalchemy_jobs.migrations.v{n:03}" for n in range(1, migrations.LATEST + 1)]
    assert own == ["sqlalchemy_jobs.migrations.operations", *numbered]
    assert others == ["sqlalchemy_jobs"]


def test_every_version_says_when_it_is_run_and_what_it_is_about() -> None:
    for version in VERSIONS:
        assert version.WHEN in ("before", "after")
        assert version.ABOUT


# --- in a revision ------------------------------------------------------------------------------


def test_a_revision_makes_what_the_models_say(
    empty_database: Database, environment: Environment, whole: Whole
) -> None:
    """Upgrade, check, downgrade, upgrade, check."""
    here = environment.on(empty_database)
    here.upgrade()
    here.check()
    assert definition(empty_database) == whole(empty_database.name)
    here.downgrade()
    assert table_names(empty_database) == set()
    here.upgrade()
    here.check()
    assert made(empty_database) == AT_LATEST  # `sajobs migrate` then has nothing to do
    assert definition(empty_database) == whole(empty_database.name)


@pytest.mark.parametrize("template", ["generic", "async"])
def test_the_revision_that_sajobs_writes_works_unedited(
    empty_database: Database,
    template: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: Whole,
) -> None:
    environment = Environment(tmp_path / "alembic", template).on(empty_database)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["migration", "--config", environment.ini.name])
    assert result.exit_code == 0, result.output
    environment.upgrade()
    environment.check()
    assert definition(empty_database) == whole(empty_database.name)
    environment.downgrade()
    assert table_names(empty_database) == set()


def test_an_offline_upgrade_makes_the_same(
    empty_database: Database, environment: Environment, whole: Whole
) -> None:
    """What `alembic upgrade head --sql` prints, run by hand."""
    here = environment.on(empty_database)
    script = here.upgrade_offline()
    assert table_names(empty_database) == set()
    execute(empty_database, script)
    here.check()
    assert definition(empty_database) == whole(empty_database.name)


def test_a_naming_convention_of_the_users_renames_nothing(
    empty_database: Database, environment: Environment, whole: Whole
) -> None:
    environment.edit(
        "target_metadata = [sqlalchemy_jobs.metadata]",
        """
from sqlalchemy import MetaData
target_metadata = MetaData(naming_convention={
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(constraint_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(constraint_name)s",
    "pk": "pk_%(table_name)s",
})
""",
    )
    environment.on(empty_database).upgrade()
    assert definition(empty_database) == whole(empty_database.name)


def test_tables_that_are_there_are_left_alone(
    empty_database: Database, environment: Environment
) -> None:
    """Made by `create_all`, then by the user's own revision: nothing to do, and jobs are kept."""
    sqlalchemy_jobs.metadata.create_all(empty_database.engine(poolclass=NullPool))
    job = add_job(empty_database)
    before = definition(empty_database)
    assert made(empty_database) == AT_LATEST
    environment.on(empty_database).upgrade()
    environment.check()
    assert made(empty_database) == AT_LATEST
    assert definition(empty_database) == before
    assert jobs_in(empty_database) == [job]


@pytest.mark.parametrize(
    ("upgrade", "downgrade", "wrong"),
    [
        (f"upgrade(op, to={LATEST + 1})", DOWNGRADE, LATEST + 1),
        ("upgrade(op, to=-1)", DOWNGRADE, -1),
        (UPGRADE, "downgrade(op, to=7)", 7),
        (UPGRADE, "downgrade(op, to=-1)", -1),
    ],
)
def test_a_version_that_there_is_not_is_refused(
    upgrade: str, downgrade: str, wrong: int, databases: Databases, tmp_path: Path
) -> None:
    environment = Environment(tmp_path / "alembic")
    environment.write(upgrade, downgrade)
    with databases.empty("sqlite", tmp_path) as database:
        environment.on(database)
        step = environment.upgrade
        if upgrade == UPGRADE:
            environment.upgrade()
            step = environment.downgrade
        with pytest.raises(MigrationError, match=f"no version {wrong}: the newest .* is {LATEST}"):
            step()
        assert table_names(database) == (TABLES if upgrade == UPGRADE else set())


@pytest.mark.parametrize(
    ("upgrade", "downgrade"),
    [("upgrade(op, to=0)", DOWNGRADE), (UPGRADE, f"downgrade(op, to={LATEST})")],
)
def test_a_step_to_where_it_begins_is_none(
    upgrade: str, downgrade: str, databases: Databases, tmp_path: Path
) -> None:
    """Online and offline."""
    environment = Environment(tmp_path / "alembic")
    environment.write(upgrade, downgrade)
    with databases.empty("sqlite", tmp_path) as database:
        script = environment.on(database).upgrade_offline() + environment.downgrade_offline()
        assert ("CREATE TABLE sajobs_job" in script) == (upgrade == UPGRADE)
        assert ("DROP TABLE sajobs_job" in script) == (downgrade == DOWNGRADE)
        environment.upgrade()
        environment.downgrade()
        assert table_names(database) == (TABLES if upgrade == UPGRADE else set())


# --- `migrate` ----------------------------------------------------------------------------------


def test_migrate_makes_what_the_models_say(empty_database: Database, whole: Whole) -> None:
    assert made(empty_database) == "no tables for jobs"
    assert definition(empty_database) == whole(empty_database.name)
    assert made(empty_database) == AT_LATEST
    assert definition(empty_database) == whole(empty_database.name)


def test_its_statements_can_be_executed_elsewhere(empty_database: Database, whole: Whole) -> None:
    script = StringIO()
    in_transaction(empty_database, lambda each: migrations.migrate(each, sql=script))
    assert table_names(empty_database) == set()
    execute(empty_database, script.getvalue())
    assert definition(empty_database) == whole(empty_database.name)
    back = StringIO()
    in_transaction(empty_database, lambda each: migrations.migrate(each, to=0, sql=back))
    assert table_names(empty_database) == TABLES
    execute(empty_database, back.getvalue())
    assert table_names(empty_database) == set()


def test_several_at_once_make_the_tables_once(
    empty_database: Database, tmp_path: Path, whole: Whole
) -> None:
    """Two processes, then five, then `alembic upgrade` among them; all succeed, and one of them did it."""
    environment = Environment(tmp_path / "alembic")
    environment.write(UPGRADE, DOWNGRADE)
    for count in (2, 5):
        said = migrating.at_once(empty_database.url, tmp_path, *[migrating.migrate] * count)
        assert sum("made the tables" in each for each in said) == 1, said
        assert sum("nothing to do" in each for each in said) == count - 1, said
        assert definition(empty_database) == whole(empty_database.name)
        in_transaction(empty_database, lambda each: migrations.migrate(each, to=0))
    migrating.at_once(
        empty_database.url,
        environment.folder,
        migrating.migrate,
        migrating.upgrade,
        migrating.migrate,
    )
    environment.on(empty_database).check()  # at its head, as `alembic upgrade` left it
    assert definition(empty_database) == whole(empty_database.name)


def test_from_version_to_version_with_rows(empty_database: Database, whole: Whole) -> None:
    """Jobs are kept, on the way there and back; what only the later version holds is not dropped unasked."""
    one_made = in_transaction(empty_database, lambda each: migrations.migrate(each, to=1))
    assert str(one_made) == "no tables for jobs"
    first = definition(empty_database)
    job = add_job(empty_database)
    assert made(empty_database) == "at version 1"
    assert definition(empty_database) == whole(empty_database.name)
    with Session(empty_database.engine()) as session, session.begin():
        pause_queue(session, "mail")
    with pytest.raises(MigrationError, match=r"sajobs_queue has 1\. Nothing was changed"):
        in_transaction(empty_database, lambda each: migrations.migrate(each, to=1))
    assert definition(empty_database) == whole(empty_database.name)
    in_transaction(empty_database, lambda each: migrations.migrate(each, to=1, drop_rows=True))
    assert definition(empty_database) == first
    assert jobs_in(empty_database) == [job]


def test_a_later_revision_makes_the_later_version(
    empty_database: Database, environment: Environment, whole: Whole
) -> None:
    """By hand and by autogenerate, where the first one made version 1; online and with `--sql`."""
    environment.write("upgrade(op, to=1)", "downgrade(op, to=0)")
    here = environment.on(empty_database)
    here.upgrade()
    script = here.generate()
    assert script.count("create_table") == 4 and "op.drop" not in script.partition("def down")[0]
    here.upgrade()
    here.check()
    assert definition(empty_database) == whole(empty_database.name)
    here.downgrade()
    assert table_names(empty_database) == set()


# --- killed in the middle -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "back"),
    [
        pytest.param(migrating.migrate, migrating.migrate_to_none, id="migrate"),
        pytest.param(migrating.upgrade, migrating.downgrade, id="revision"),
    ],
)
@pytest.mark.parametrize("empty_database", ["mysql"], indirect=True)
def test_where_ddl_is_not_transactional_it_goes_on_from_where_it_was_killed(
    empty_database: Database,
    environment: Environment,
    there: migrating.Work,
    back: migrating.Work,
    whole: Whole,
) -> None:
    """Each run is killed after one statement, on the way there and on the way back: all states in between."""
    url, folder = empty_database.url, environment.folder
    environment.on(empty_database)
    states = []
    while migrating.killed_after_one_step(there, url, folder):
        refuses = migrations.check if states else start_worker
        with pytest.raises(TablesOutdated, match="or `sajobs migrate`") as refused:
            in_transaction(empty_database, refuses)
        states.append(in_transaction(empty_database, lambda each: str(migrations.state(each))))
        assert states[-1] in str(refused.value)
    environment.upgrade()  # where it was `migrate`, there is nothing to do
    environment.check()
    assert definition(empty_database) == whole("mysql")
    assert len(states) == 13
    assert states[7] == "at version 1"
    assert states[2] == (
        "version 1 was made in part, and these are missing: "
        "sajobs_attempt, sajobs_job_final, sajobs_job_running, sajobs_job_unique_slot, sajobs_worker"
    )

    while migrating.killed_after_one_step(back, url, folder):
        states.append(in_transaction(empty_database, lambda each: str(migrations.state(each))))
    assert len(states) == 20
    assert states[-1].endswith("these are missing: sajobs_attempt, sajobs_worker")
    assert table_names(empty_database) == set()


@pytest.mark.parametrize("empty_database", ["mysql"], indirect=True)
def test_a_downgrade_that_was_killed_can_be_taken_back(
    empty_database: Database, tmp_path: Path, whole: Whole
) -> None:
    made(empty_database)
    assert migrating.killed_after_one_step(migrating.migrate_to_none, empty_database.url, tmp_path)
    assert table_names(empty_database) == TABLES - {"sajobs_schedule"}
    made(empty_database)
    assert definition(empty_database) == whole("mysql")


@pytest.mark.parametrize("work", [migrating.migrate, migrating.upgrade])
@pytest.mark.parametrize("empty_database", ["sqlite", "postgresql"], indirect=True)
def test_elsewhere_nothing_is_left_of_it(
    empty_database: Database, environment: Environment, work: migrating.Work, whole: Whole
) -> None:
    assert migrating.killed_after_one_step(work, empty_database.url, environment.folder)
    assert table_names(empty_database) == set()
    with pytest.raises(TablesMissing, match="sajobs migrate"):
        in_transaction(empty_database, start_worker)
    work(empty_database.url, environment.folder)
    environment.on(empty_database).upgrade()
    environment.check()
    assert definition(empty_database) == whole(empty_database.name)


@pytest.mark.parametrize("empty_database", ["mysql"], indirect=True)
def test_a_lost_connection_is_told_as_such(empty_database: Database) -> None:
    """Not as the failure to free a lock that went with it."""
    engine, other = empty_database.engine(), empty_database.engine()

    def kill(connection: Connection, cursor: Any, statement: str, *rest: Any) -> None:
        if "CREATE TABLE sajobs_attempt" in statement:
            number = connection.connection.driver_connection.thread_id()  # type: ignore[union-attr]
            with other.connect() as killer:
                killer.execute(text(f"KILL {number}"))

    event.listen(engine, "before_cursor_execute", kill)
    with pytest.raises(OperationalError, match="sajobs_attempt"), engine.begin() as connection:
        migrations.migrate(connection)
    event.remove(engine, "before_cursor_execute", kill)
    assert made(empty_database).startswith("version 1 was made in part")
    assert made(empty_database) == AT_LATEST


# --- rows ---------------------------------------------------------------------------------------


def test_a_downgrade_refuses_to_drop_rows(
    empty_database: Database, environment: Environment, tmp_path: Path
) -> None:
    """In a revision and without; told so, it does."""
    here = environment.on(empty_database)
    here.upgrade()
    job = add_job(empty_database)
    before = definition(empty_database)
    lost = r"rows would be lost with their tables: sajobs_job has 1\. Nothing was changed"
    with pytest.raises(MigrationError, match=lost):
        here.downgrade()
    with pytest.raises(MigrationError, match=lost):
        in_transaction(empty_database, lambda each: migrations.migrate(each, to=0))
    assert definition(empty_database) == before
    assert jobs_in(empty_database) == [job]

    here.write(UPGRADE, "downgrade(op, to=0, drop_rows=True)")
    here.downgrade()
    assert table_names(empty_database) == set()
    made(empty_database)
    add_job(empty_database)
    in_transaction(empty_database, lambda each: migrations.migrate(each, to=0, drop_rows=True))
    assert table_names(empty_database) == set()


_WAITING = {
    "postgresql": "SELECT count(*) FROM pg_locks WHERE NOT granted",
    "mysql": "SELECT count(*) FROM information_schema.processlist WHERE state LIKE 'Waiting for table%lock'",
}


@pytest.mark.parametrize("empty_database", ["postgresql", "mysql"], indirect=True)
def test_a_job_that_is_committed_while_the_tables_are_dropped_is_not_lost(
    empty_database: Database,
) -> None:
    """It is counted: the downgrade waits for the open transaction."""
    made(empty_database)
    refused: list[BaseException] = []

    def drop() -> None:
        try:
            in_transaction(empty_database, lambda each: migrations.migrate(each, to=0))
        except MigrationError as error:
            refused.append(error)

    dropping = threading.Thread(target=drop)
    with Session(empty_database.engine(), expire_on_commit=False) as session:
        session.add(job := enqueue(Nothing()))
        session.flush()
        dropping.start()
        try:
            until(
                lambda: in_transaction(
                    empty_database, lambda each: each.scalar(text(_WAITING[empty_database.name]))
                )
            )
        finally:
            session.commit()
            dropping.join(60)
        assert not dropping.is_alive()
        assert "sajobs_job has 1" in str(*refused)
        assert jobs_in(empty_database) == [job.id]


# --- tables that are none of ours ---------------------------------------------------------------


def test_tables_that_fit_no_version_are_refused(empty_database: Database) -> None:
    """A table is made whole: one without a column was not made by a migration, and none mends it."""
    made(empty_database)
    in_transaction(
        empty_database, lambda each: each.execute(text("ALTER TABLE sajobs_job DROP tags"))
    )
    before = definition(empty_database)
    for work in (migrations.migrate, migrations.state, migrations.check):
        with pytest.raises(MigrationError, match=r"at no version .*they lack: sajobs_job\.tags\."):
            in_transaction(empty_database, work)
    assert definition(empty_database) == before


def test_an_index_that_was_dropped_is_made_again(empty_database: Database, whole: Whole) -> None:
    made(empty_database)
    on = " ON sajobs_job" if empty_database.name == "mysql" else ""
    in_transaction(
        empty_database, lambda each: each.execute(text(f"DROP INDEX sajobs_job_final{on}"))
    )
    with pytest.raises(TablesOutdated, match="missing: sajobs_job_final, and this release needs"):
        in_transaction(empty_database, migrations.check)
    made(empty_database)
    in_transaction(empty_database, migrations.check)
    assert definition(empty_database) == whole(empty_database.name)


# --- an application that only enqueues ----------------------------------------------------------


def test_an_application_that_only_enqueues_can_check_the_tables(empty_database: Database) -> None:
    engine = empty_database.engine()
    with (
        engine.connect() as connection,
        pytest.raises(TablesMissing, match=r"no tables for jobs\. Run `sajobs migrate`"),
    ):
        migrations.check(connection)
    made(empty_database)
    with engine.connect() as connection:
        migrations.check(connection)


# --- helpers ------------------------------------------------------------------------------------


def add_job(database: Database) -> Any:
    with Session(database.engine(), expire_on_commit=False) as session, session.begin():
        session.add(job := enqueue(Nothing()))
    return job.id


def jobs_in(database: Database) -> list[Any]:
    with Session(database.engine(poolclass=NullPool)) as session:
        return list(session.scalars(select(Job.id)))


def start_worker(connection: Connection) -> None:
    """On the same database; raises what keeps it from starting."""
    app: JobApp[Any, Any] = JobApp(sessionmaker(connection.engine))

    @app.handler(Nothing)
    def handle(session: Session, payload: Nothing) -> None: ...

    Worker(app, drain=True).run()


# --- what a migration is refused for ------------------------------------------------------------------


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE", "AUTOCOMMIT"])
def test_postgresql_migrates_only_where_it_sees_what_others_have_committed(
    databases: Databases, tmp_path: Path, level: str
) -> None:
    """With an older snapshot a downgrade would not count a job that was just committed."""
    with databases.empty("postgresql", tmp_path) as database:
        engine = database.engine(isolation_level=level, poolclass=NullPool)
        with engine.begin() as connection, pytest.raises(EngineError, match="READ COMMITTED"):
            migrations.migrate(connection)


def test_tables_in_another_schema_of_the_search_path_are_not_taken_for_these(
    databases: Databases, tmp_path: Path
) -> None:
    with databases.empty("postgresql", tmp_path) as database:
        public = database.engine(poolclass=NullPool)
        with public.begin() as connection:
            migrations.migrate(connection)
            connection.exec_driver_sql("CREATE SCHEMA acme")
        tenant = database.engine(
            poolclass=NullPool, connect_args={"options": "-c search_path=acme,public"}
        )
        for to in (1, 0):
            with tenant.begin() as connection, pytest.raises(EngineError, match='schema "public"'):
                migrations.migrate(connection, to=to)
        with tenant.begin() as connection:
            migrations.migrate(connection, schema="acme")
            assert migrations.state(connection, schema="acme").lowest == migrations.LATEST


def test_tables_that_others_refer_to_are_not_dropped(empty_database: Database) -> None:
    engine = empty_database.engine(poolclass=NullPool)
    with engine.begin() as connection:
        migrations.migrate(connection)
    mine = MetaData()
    Table("mine", mine, Column("job_id", ForeignKey(Job.id, name="mine_fkey")))
    mine.create_all(engine)
    with (
        engine.begin() as connection,
        pytest.raises(MigrationError, match="mine has a foreign key"),
    ):
        migrations.migrate(connection, to=0, drop_rows=True)
    with engine.begin() as connection:
        assert migrations.state(connection).lowest == migrations.LATEST


@pytest.mark.parametrize("way", ["create_all", "migrate"])
def test_on_mysql_the_tables_have_transactions_whatever_the_default_is(
    databases: Databases, tmp_path: Path, way: str
) -> None:
    with databases.empty("mysql", tmp_path) as database:
        engine = database.engine(
            poolclass=NullPool,
            connect_args={"init_command": "SET default_storage_engine = MyISAM"},
        )
        with engine.begin() as connection:
            if way == "migrate":
                migrations.migrate(connection)
            else:
                sqlalchemy_jobs.metadata.create_all(connection)
            engines = connection.exec_driver_sql(
                "SELECT DISTINCT engine FROM information_schema.tables WHERE table_schema = DATABASE()"
            )
            assert engines.scalars().all() == ["InnoDB"]
