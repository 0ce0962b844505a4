"""Applications with an Alembic environment of their own, as `alembic init` or `flask db init` writes it."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, inspect, text
from sqlalchemy.pool import NullPool

import sqlalchemy_jobs
from tests.databases import Database, Databases
from tests.processes import python

# One test is some ten commands.
pytestmark = pytest.mark.timeout(400)

APPS = Path(__file__).parents[1] / "apps"

OURS = [table.name for table in sqlalchemy_jobs.metadata.sorted_tables]

COMMANDS = """
import sys

def alembic(*arguments):
    from alembic.config import main
    main(arguments, prog="alembic")

def flask(*arguments):
    from flask.cli import cli
    cli.main(arguments, prog_name="flask", standalone_mode=False)

def sajobs(*arguments):
    from sqlalchemy_jobs.cli import main
    main(arguments, prog_name="sajobs", standalone_mode=False)

for line in sys.argv[1:]:
    print("$", line, flush=True)
    command, *arguments = line.split()
    globals()[command](*arguments)
"""
"""Runs command lines in one process: to start one takes longer than what most commands do."""


class Application:
    """A copy of a folder in `tests/apps`, with an Alembic environment, on an empty database."""

    def __init__(self, name: str, environment: Path, folder: Path, database: Database, driver: str):
        self._folder = folder
        self._database = database
        url = database.url.set(drivername=driver).render_as_string(hide_password=False)
        self._environment = {"SHOP_DATABASE_URL": url}
        shutil.copytree(environment, folder)
        shutil.copytree(APPS / name, folder, dirs_exist_ok=True)

    def edit(self, name: str, *changes: tuple[str, str]) -> None:
        path = self._folder / name
        lines = path.read_text()
        for old, new in changes:
            assert lines.count(old) == 1, f"{name} has not one {old!r}, but {lines.count(old)}"
            lines = lines.replace(old, new)
        path.write_text(lines)

    def append(self, name: str, lines: str) -> None:
        with (self._folder / name).open("a") as file:
            file.write(lines)

    def fill_in(self, base: str, target_metadata: str) -> None:
        """Fill in what `alembic init` leaves to do: url, imports and target_metadata."""
        url = self._environment["SHOP_DATABASE_URL"].replace("%", "%%")
        self.edit("alembic.ini", ("driver://user:pass@localhost/dbname", url))
        imports = (
            f"import sqlalchemy_jobs\nfrom alembic import context\nfrom shop.models import {base}\n"
        )
        self.edit(
            "migrations/env.py",
            ("from alembic import context\n", imports),
            ("target_metadata = None", f"target_metadata = {target_metadata}"),
        )

    def python(self, *arguments: str) -> str:
        return python(*arguments, cwd=self._folder, env=self._environment)

    def run(self, *commands: str) -> str:
        return self.python("-c", COMMANDS, *commands)

    def made_in(self, message: str) -> list[str]:
        """Which tables a revision makes, in order."""
        (script,) = (self._folder / "migrations/versions").glob(f"*_{message}.py")
        assert "sqlalchemy_jobs" not in script.read_text()
        return re.findall(r"op\.create_table\('(\w+)'", script.read_text())

    def tables(self) -> set[str]:
        return set(inspect(create_engine(self._database.url, poolclass=NullPool)).get_table_names())

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        with create_engine(self._database.url, poolclass=NullPool).connect() as connection:
            return [tuple(row) for row in connection.execute(text(query))]


def initialised(folder: Path, template: str) -> Path:
    """The folder, with what `alembic init` makes."""
    python("-m", "alembic", "init", "-t", template, "migrations", cwd=folder, env={})
    return folder


# --- `alembic init -t async` ----------------------------------------------------------------------

DRIVERS = {
    "postgresql+psycopg": "postgresql",
    "postgresql+asyncpg": "postgresql",
    "mysql+aiomysql": "mysql",
    "sqlite+aiosqlite": "sqlite",
}

one_driver_for_each_database = pytest.mark.parametrize("shop", list(DRIVERS)[1:], indirect=True)

TO_AND_FRO = (
    "alembic upgrade head",
    "alembic check",
    "alembic downgrade base",
    "alembic upgrade head",
    "alembic check",
)


@pytest.fixture(scope="session")
def async_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return initialised(tmp_path_factory.mktemp("async"), "async")


@pytest.fixture(params=DRIVERS)
def shop(
    request: pytest.FixtureRequest, databases: Databases, async_environment: Path, tmp_path: Path
) -> Iterator[Application]:
    with databases.empty(DRIVERS[request.param], tmp_path) as database:
        shop = Application("shop", async_environment, tmp_path / "shop", database, request.param)
        # Alembic makes the tables in this order, and the shop's refer to ours.
        shop.fill_in("Base", "[sqlalchemy_jobs.metadata, Base.metadata]")
        yield shop


INVOICE = """

class Invoice(Base):
    __tablename__ = "shop_invoice"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(ForeignKey(Order.id))
"""


def test_autogenerated(shop: Application) -> None:
    """Its revisions before, one with our tables and its own that refers to them, and one after."""
    shop.run(
        "alembic upgrade head",
        "alembic revision --autogenerate -m jobs",
        "alembic upgrade head",
        "alembic check",
    )
    assert shop.made_in("jobs") == [*OURS, "shop_delivery"]
    shop.append("shop/models.py", INVOICE)
    shop.run("alembic revision --autogenerate -m invoices", *TO_AND_FRO)
    assert shop.made_in("invoices") == ["shop_invoice"]

    delivery = (
        "SELECT sent, state FROM shop_delivery LEFT JOIN sajobs_job ON sajobs_job.id = job_id"
    )
    shop.python("-m", "shop", "order", "10001")
    assert shop.rows(delivery) == [(False, "ready")]
    shop.python("-m", "sqlalchemy_jobs", "worker", "--app", "shop.jobs:jobs", "--drain")
    assert shop.rows(delivery) == [(True, "succeeded")]
    shop.python("-m", "shop", "tidy")
    assert shop.rows("SELECT sent, job_id FROM shop_delivery") == [(True, None)]
    assert shop.rows("SELECT id FROM sajobs_job") == []


@one_driver_for_each_database
def test_versioned(shop: Application) -> None:
    """The revision of `sajobs migration` is like one of its own; autogenerate finds the rest."""
    shop.run(
        "sajobs migration",
        "alembic upgrade head",
        "alembic revision --autogenerate -m deliveries",
        *TO_AND_FRO,
    )
    assert shop.made_in("deliveries") == ["shop_delivery"]


@one_driver_for_each_database
def test_migrated_beside_its_own_environment(shop: Application) -> None:
    """Its revisions leave the tables of `sajobs migrate` alone, in both directions."""
    shop.run(
        "sajobs migrate --app shop.jobs:jobs",
        "alembic upgrade head",
        "alembic revision --autogenerate -m deliveries",
        *TO_AND_FRO,
        "alembic downgrade base",
        "sajobs migrate --app shop.jobs:jobs --check",
    )
    assert shop.made_in("deliveries") == ["shop_delivery"]
    assert shop.tables() == {*OURS, "alembic_version"}


# --- `flask db init` ------------------------------------------------------------------------------

FLASK_TO_AND_FRO = tuple(command.replace("alembic", "flask db") for command in TO_AND_FRO)


@pytest.fixture(scope="session")
def flask_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flask")
    shutil.copy(APPS / "flask_shop/app.py", folder)
    python("-m", "flask", "db", "init", cwd=folder, env={"SHOP_DATABASE_URL": "sqlite://"})
    return folder


@pytest.fixture
def flask_shop(empty_database: Database, flask_environment: Path, tmp_path: Path) -> Application:
    driver = empty_database.url.drivername
    shop = Application("flask_shop", flask_environment, tmp_path / "shop", empty_database, driver)
    ours = "[sqlalchemy_jobs.metadata, target_db.metadatas[None]]"
    shop.edit(
        "migrations/env.py",
        (
            "from flask import current_app\n",
            "import sqlalchemy_jobs\nfrom flask import current_app\n",
        ),
        ("return target_db.metadatas[None]", f"return {ours}"),
    )
    return shop


def test_flask_migrate(flask_shop: Application) -> None:
    """Also a column that refers to jobs, in a table that was there before."""
    flask_shop.run("flask db upgrade", "flask db migrate -m jobs", *FLASK_TO_AND_FRO, "flask order")
    assert flask_shop.made_in("jobs") == OURS
    flask_shop.python("-m", "sqlalchemy_jobs", "worker", "--app", "app:jobs", "--drain")
    order = "SELECT delivered, state FROM shop_order JOIN sajobs_job ON sajobs_job.id = job_id"
    assert flask_shop.rows(order) == [(True, "succeeded")]


@pytest.mark.parametrize("empty_database", ["mysql"], indirect=True)
def test_flask_migrate_versioned(flask_shop: Application) -> None:
    flask_shop.run(
        "sajobs migration -d migrations",
        "flask db upgrade",
        "flask db migrate -m column",
        *FLASK_TO_AND_FRO,
    )
    assert flask_shop.made_in("column") == []
    assert flask_shop.tables() == {*OURS, "shop_order", "alembic_version"}


# --- SQLModel -------------------------------------------------------------------------------------


@pytest.mark.parametrize("empty_database", ["postgresql"], indirect=True)
def test_sqlmodel(empty_database: Database, tmp_path: Path) -> None:
    (tmp_path / "generic").mkdir()
    environment = initialised(tmp_path / "generic", "generic")
    driver = empty_database.url.drivername
    shop = Application("sqlmodel_shop", environment, tmp_path / "shop", empty_database, driver)
    shop.fill_in("SQLModel", "[sqlalchemy_jobs.metadata, SQLModel.metadata]")
    shop.edit(
        "migrations/script.py.mako",
        ("import sqlalchemy as sa\n", "import sqlalchemy as sa\nimport sqlmodel\n"),
    )
    shop.run("alembic revision --autogenerate -m jobs", *TO_AND_FRO)
    assert shop.made_in("jobs") == [*OURS, "delivery"]
