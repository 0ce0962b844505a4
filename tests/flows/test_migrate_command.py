"""`sajobs migrate`: what it says and does, and what bad input gets."""

import secrets
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import pytest
from click.testing import CliRunner
from sqlalchemy import URL, NullPool, create_engine, text
from sqlalchemy.orm import Session

import sqlalchemy_jobs
from sqlalchemy_jobs import enqueue, job, migrations
from sqlalchemy_jobs.cli import main
from sqlalchemy_jobs.migrations.versions import VERSIONS
from tests.databases import Database, Databases
from tests.environments import Environment, definition, execute, table_names

TABLES = set(sqlalchemy_jobs.metadata.tables)
LATEST = migrations.LATEST
MADE = [
    f"version {number}: made {version.ABOUT}" for number, version in enumerate(VERSIONS, start=1)
]


@job("kept")
@dataclass(frozen=True)
class Kept:
    pass


@dataclass(frozen=True)
class Said:
    status: int
    output: str

    @property
    def last(self) -> str:
        return self.output.splitlines()[-1]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own, without options from elsewhere, and with what it holds importable."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("SAJOBS_APP", "SAJOBS_DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
    return folder


def migrate(*options: str, url: URL | None = None) -> Said:
    """A clean end or a one-line refusal; never a traceback."""
    there = [] if url is None else ["--database-url", in_full(url)]
    result = CliRunner().invoke(main, ["migrate", *there, *options])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return Said(result.exit_code, result.output)


def refused(said: Said) -> str:
    """The message of a configuration that cannot work."""
    assert said.status == 2, said
    assert said.output.startswith("Error: ")
    return said.output


def in_full(url: URL) -> str:
    return url.render_as_string(hide_password=False)


def add_job(database: Database) -> None:
    with Session(database.engine()) as session, session.begin():
        session.add(enqueue(Kept()))


# --- what it does -------------------------------------------------------------------------------


def test_it_tells_what_it_did(empty_database: Database) -> None:
    """As a user calls it, in a process."""
    url = in_full(empty_database.url)
    shown = f"{empty_database.url!r}: "
    first = [shown + "no tables for jobs", *MADE]
    for expected in (first, [f"{shown}at version {LATEST}", "nothing to do"]):
        done = subprocess.run(
            [sys.executable, "-m", "sqlalchemy_jobs", "migrate", "--database-url", url],
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines() == expected
    assert table_names(empty_database) == TABLES

    taken_back = [each.replace("made", "took back") for each in reversed(MADE)]
    back = migrate("--to", "0", url=empty_database.url)
    assert back.status == 0
    assert back.output.splitlines() == [f"{shown}at version {LATEST}", *taken_back]
    assert table_names(empty_database) == set()


def test_check_only_tells(empty_database: Database) -> None:
    url = empty_database.url
    before = _bytes(empty_database)
    assert migrate("--check", url=url) == Said(
        1, f"{url!r}: no tables for jobs\nwanted: version {LATEST}\n"
    )
    assert migrate("--check", "--to", "0", url=url).status == 0
    assert table_names(empty_database) == set()
    assert _bytes(empty_database) == before
    migrate(url=url)
    before = _bytes(empty_database)
    assert migrate("--check", url=url) == Said(0, f"{url!r}: at version {LATEST}\n")
    assert migrate("--check", "--to", "0", url=url).status == 1
    assert table_names(empty_database) == TABLES
    assert _bytes(empty_database) == before


def test_sql_only_prints(empty_database: Database, databases: Databases, tmp_path: Path) -> None:
    """What it prints makes the tables that it would have made."""
    url = empty_database.url
    before = _bytes(empty_database)
    script = migrate("--sql", url=url)
    assert script.status == 0
    assert table_names(empty_database) == set()
    assert _bytes(empty_database) == before
    (tmp_path / "other").mkdir()
    with databases.empty(empty_database.name, tmp_path / "other") as other:
        execute(other, script.output)
        migrate(url=url)
        assert definition(other) == definition(empty_database)
    assert migrate("--sql", url=url) == Said(0, "")
    add_job(empty_database)
    back = migrate("--sql", "--to", "0", url=url)
    assert (back.status, back.output.count("DROP TABLE")) == (0, len(TABLES))
    assert table_names(empty_database) == TABLES


def _bytes(database: Database) -> bytes:
    """The file of an SQLite database."""
    if database.name != "sqlite":
        return b""
    assert database.url.database
    path = Path(database.url.database)
    if not path.exists():
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("CREATE TABLE theirs (id)")
    return path.read_bytes()


def test_tables_that_others_made_are_recognised(empty_database: Database, tmp_path: Path) -> None:
    """`create_all` and the user's own Alembic; of the latter it tells what to mind."""
    url = empty_database.url
    sqlalchemy_jobs.metadata.create_all(empty_database.engine(poolclass=NullPool))
    assert migrate(url=url).last == "nothing to do"
    migrate("--to", "0", url=url)
    environment = Environment(tmp_path / "alembic").on(empty_database)
    environment.generate()
    environment.upgrade()
    assert migrate(url=url).last == "nothing to do"
    environment.downgrade()
    said = migrate(url=url)
    assert MADE[-1] in said.output
    assert said.last.startswith("This database is migrated by Alembic too. List sqlalchemy_jobs.")


def test_rows_are_dropped_only_when_told_so(empty_database: Database) -> None:
    url = empty_database.url
    migrate(url=url)
    add_job(empty_database)
    assert (
        "rows would be lost with their tables: sajobs_job has 1. Nothing was changed."
        in refused(migrate("--to", "0", url=url))
    )
    assert table_names(empty_database) == TABLES
    assert migrate("--to", "0", "--yes", url=url).status == 0
    assert table_names(empty_database) == set()


def test_the_driver_may_be_async(empty_database: Database) -> None:
    assert MADE[-1] in migrate(url=empty_database.async_url).output
    assert migrate(url=empty_database.async_url).last == "nothing to do"
    assert migrate("--check", url=empty_database.async_url).status == 0
    assert "CREATE" not in migrate("--sql", url=empty_database.async_url).output
    assert table_names(empty_database) == TABLES


# --- whose database -----------------------------------------------------------------------------

APPS = {
    "sync": """
        jobs = JobApp(sessionmaker(create_engine(url, poolclass=NullPool)))
        """,
    "async": """
        jobs = JobApp(async_sessionmaker(create_async_engine(async_url, poolclass=NullPool)))
        """,
    # As Flask-SQLAlchemy: outside the context there are no sessions.
    "in a context": """
        inside = []

        @contextmanager
        def context():
            inside.append(1)
            yield
            inside.pop()

        class ByContext(Session):
            def get_bind(self, *arguments, **options):
                assert inside, "working outside of application context"
                return engine

        engine = create_engine(url, poolclass=NullPool)
        jobs = JobApp(scoped_session(sessionmaker(class_=ByContext)), context=context)
        """,
}


def app(folder: Path, body: str, database: Database) -> str:
    name = f"app_{secrets.token_hex(6)}"
    (folder / f"{name}.py").write_text(
        dedent("""
        from contextlib import contextmanager
        from sqlalchemy import NullPool, create_engine
        from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
        from sqlalchemy.orm import Session, scoped_session, sessionmaker
        from sqlalchemy_jobs import JobApp
        """)
        + f"url, async_url = {in_full(database.url)!r}, {in_full(database.async_url)!r}\n"
        + dedent(body)
    )
    return f"{name}:jobs"


@pytest.mark.parametrize("kind", APPS)
def test_the_apps_database_is_taken(empty_database: Database, folder: Path, kind: str) -> None:
    """It needs no handlers for that."""
    name = app(folder, APPS[kind], empty_database)
    assert migrate("--check", "--app", name).status == 1
    assert MADE[-1] in migrate("--app", name).output
    assert migrate("--check", "--app", name).status == 0
    assert table_names(empty_database) == TABLES


def test_beside_a_url_the_app_says_the_schema(databases: Databases, folder: Path) -> None:
    """As when the tables are made by a role with more rights than the application's."""
    with databases.empty("postgresql", folder) as database:
        with create_engine(database.url, poolclass=NullPool).begin() as connection:
            connection.execute(text("CREATE SCHEMA jobs"))
        tenant = """
            engine = create_engine("postgresql+psycopg://nobody@127.0.0.1:1/nothing")
            jobs = JobApp(sessionmaker(engine.execution_options(schema_translate_map={None: "jobs"})))
            """
        name = app(folder, tenant, database)
        assert MADE[-1] in migrate("--app", name, url=database.url).output
        assert migrate("--check", "--schema", "jobs", url=database.url).status == 0
        assert migrate("--check", url=database.url).status == 1


# --- what is refused ----------------------------------------------------------------------------


def test_there_has_to_be_a_database() -> None:
    assert "Name it by --database-url, or the app that uses it by --app" in refused(migrate())


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nonsense", "--database-url is no URL"),
        ("postgresql:/app:s3cret@localhost/shop", "--database-url is no URL"),
        ("postgresql://app:p@ss:s3cret@localhost/shop", "--database-url is no URL"),
        ("postgresql+nosuch://localhost/x", "--database-url: Can't load plugin"),
        ("sqlite://", "the database is in memory"),
        ("sqlite+aiosqlite:///:memory:", "the database is in memory"),
    ],
)
def test_a_url_that_leads_nowhere_is_refused(url: str, said: str) -> None:
    output = refused(migrate("--database-url", url))
    assert said in output
    assert "s3cret" not in output


def test_an_app_that_is_not_there_is_refused() -> None:
    assert "there is no module nowhere" in refused(migrate("--app", "nowhere:jobs"))


@pytest.mark.parametrize("version", [str(LATEST + 1), "-1"])
def test_a_version_that_there_is_not_is_refused(sqlite: Database, version: str) -> None:
    said = refused(migrate("--to", version, url=sqlite.url))
    assert f"there is no version {version}: the newest that this release" in said
    assert f"has is {LATEST}, and 0 is none" in said
    assert table_names(sqlite) == TABLES


def test_on_sqlite_there_is_no_schema(sqlite: Database) -> None:
    assert "SQLite has no schemas" in refused(migrate("--schema", "jobs", url=sqlite.url))


def test_a_schema_has_to_be_there(row_locks: Database) -> None:
    said = refused(migrate("--schema", "nowhere", url=row_locks.url))
    assert 'has no schema "nowhere": create it (CREATE SCHEMA nowhere), or correct the name' in said


def test_what_the_server_refuses_is_told_in_one_line(
    databases: Databases, row_locks: Database, tmp_path: Path
) -> None:
    """A database that does not exist, and a server that does not answer; by either kind of driver."""
    urls = [row_locks.url, row_locks.async_url]
    if row_locks.name == "postgresql":
        urls.append(row_locks.url.set(drivername="postgresql+asyncpg"))
    for url in urls:
        nowhere = migrate(url=url.set(database="nowhere_at_all"))
        assert nowhere.status == 1
        assert "nowhere_at_all" in nowhere.output
        assert nowhere.output.endswith("(nothing was changed)\n")
        silent = migrate(url=url.set(host="127.0.0.1", port=1).difference_update_query(["host"]))
        assert silent.status == 1
        assert silent.output.endswith("(nothing was changed)\n")


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE theirs (id)")
    before = path.read_bytes()
    url = URL.create("sqlite", database=f"file:{path}", query={"mode": "ro", "uri": "true"})
    said = migrate(url=url)
    assert said.status == 1
    assert said.output.endswith("attempt to write a readonly database (nothing was changed)\n")
    assert migrate("--check", url=url).status == 1
    assert migrate("--sql", url=url).output.count("CREATE TABLE") == len(TABLES)
    assert path.read_bytes() == before


@pytest.fixture
def without_rights(row_locks_empty: Database) -> Iterator[URL]:
    """The URL of a role that may read and no more."""
    database = row_locks_empty
    role, password = f"sajobs_test_{secrets.token_hex(4)}", secrets.token_hex(8)
    if database.name == "postgresql":
        there = [
            f"CREATE ROLE {role} LOGIN PASSWORD '{password}'",
            "REVOKE CREATE ON SCHEMA public FROM PUBLIC",
        ]
        gone = [f"DROP ROLE {role}"]
    else:
        there = [
            f"CREATE USER {role}@'%' IDENTIFIED BY '{password}'",
            f"GRANT SELECT ON {database.url.database}.* TO {role}@'%'",
        ]
        gone = [f"DROP USER {role}@'%'"]
    admin = create_engine(database.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        for statement in there:
            connection.execute(text(statement))
    yield database.url.set(username=role, password=password)
    with admin.connect() as connection:
        for statement in gone:
            connection.execute(text(statement))


@pytest.fixture(params=["postgresql", "mysql"])
def row_locks_empty(
    request: pytest.FixtureRequest, databases: Databases, tmp_path: Path
) -> Iterator[Database]:
    with databases.empty(request.param, tmp_path) as database:
        yield database


def test_a_role_without_the_right_to_create_tables(
    without_rights: URL, row_locks_empty: Database
) -> None:
    """Nothing is changed; with the rights it goes on."""
    said = migrate(url=without_rights)
    assert said.status == 1
    assert "denied" in said.output
    assert "sajobs_job" in said.output
    assert table_names(row_locks_empty) == set()
    assert migrate("--check", url=without_rights).status == 1
    assert MADE[-1] in migrate(url=row_locks_empty.url).output


def test_no_password_is_printed_wherever_the_url_has_it(without_rights: URL) -> None:
    password = str(without_rights.password)
    as_parameter = without_rights.set(password=None).update_query_dict({"password": password})
    for url in (without_rights, as_parameter):
        for options in (["--check"], []):
            said = migrate(*options, url=url)
            assert str(url.database) in said.output
            assert password not in said.output


# --- `sajobs migration` ---------------------------------------------------------------------------

BY_HAND = """
import sqlalchemy as sa
from alembic import op
revision, down_revision = "1", None
def upgrade():
    for table in ("theirs",):
        op.create_table(table, sa.Column("id", sa.Integer))
    op.create_table('sajobs_job', sa.Column("id", sa.Integer))
def downgrade(): pass
"""


def migration(environment: Environment, *options: str) -> Said:
    """Have a revision written; its text is what was said."""
    before = set(environment.scripts())
    result = CliRunner().invoke(main, ["migration", "-c", str(environment.ini), *options])
    new = set(environment.scripts()) - before
    return Said(result.exit_code, *[each.read_text() for each in new] or [result.output])


@pytest.mark.parametrize("schema", [None, "jobs"])
def test_a_revision_goes_on_from_what_the_environment_has(
    tmp_path: Path, schema: str | None
) -> None:
    environment = Environment(tmp_path / "alembic")
    options = [] if schema is None else ["--schema", schema]
    also = "" if schema is None else f", schema={schema!r}"
    new = migration(environment, *options).output
    assert f"    migrations.upgrade(op, to={LATEST}, start=0{also})\n" in new
    assert f"    migrations.downgrade(op, to=0, start={LATEST}{also})\n" in new
    assert all(version.ABOUT in new for version in VERSIONS)
    assert migration(environment) == Said(
        0, f"the environment makes version {LATEST}, which is the newest: nothing to do\n"
    )


@pytest.mark.parametrize("first", ["a call", "operations"])
def test_a_revision_for_an_environment_that_has_version_1(tmp_path: Path, first: str) -> None:
    environment = Environment(tmp_path / "alembic")
    if first == "a call":
        environment.write("upgrade(op, to=1, schema='x')", "downgrade(op, to=0)")
    else:
        (environment.folder / "versions" / "jobs.py").write_text(BY_HAND)
    second = migration(environment).output
    assert "    migrations.upgrade(op, to=2)\n" in second
    assert "    migrations.downgrade(op, to=1)\n" in second
    assert VERSIONS[0].ABOUT not in second
    assert "down_revision: Union[str, Sequence[str], None] = '1'" in second


def test_what_the_environment_has_can_be_said(tmp_path: Path) -> None:
    environment = Environment(tmp_path / "alembic")
    assert "to=2)" in migration(environment, "--from", "1").output
    assert "start=0)" in migration(environment, "--from", "0").output
    refused = CliRunner().invoke(main, ["migration", "--from", str(LATEST + 1)])
    assert refused.exit_code == 2
    printed = CliRunner().invoke(main, ["migration", "--from", "1"])
    assert "migrations.upgrade(op, to=2)" in printed.output
