"""A user's own Alembic environment that lists our metadata: the generated script is good everywhere."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from sqlalchemy.pool import NullPool

import sqlalchemy_jobs
from sqlalchemy_jobs import migrations
from tests.databases import NAMES, Database, Databases
from tests.environments import Environment, definition, table_names


@pytest.fixture
def three(databases: Databases, tmp_path: Path) -> Iterator[dict[str, Database]]:
    """Three databases without tables, one on each server."""
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(databases.empty(name, _folder(tmp_path / name)))
            for name in NAMES
        }


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize("generated_on", NAMES)
def test_a_script_generated_on_one_database_is_true_on_all(
    three: dict[str, Database], generated_on: str, tmp_path: Path
) -> None:
    """Upgrade, check ("no new upgrade operations"), downgrade, upgrade, check: on each of the three.

    To the library they are the tables of its newest version.
    """
    environment = Environment(tmp_path / "alembic")
    script = environment.on(three[generated_on]).generate()
    assert (
        "sqlalchemy_jobs" not in script
    )  # readable, and no import of ours that a later version could break
    for database in three.values():
        here = environment.on(database)
        here.upgrade()
        here.check()
        here.downgrade()
        assert table_names(database) == set()
        here.upgrade()
        here.check()
        before = definition(database)
        with database.engine(poolclass=NullPool).begin() as connection:
            found = migrations.migrate(connection)
        assert (found.lowest, found.highest) == (migrations.LATEST, migrations.LATEST)
        assert definition(database) == before


def test_tables_made_by_create_all_need_no_migration(
    three: dict[str, Database], tmp_path: Path
) -> None:
    environment = Environment(tmp_path / "alembic")
    for database in three.values():
        sqlalchemy_jobs.metadata.create_all(database.engine(poolclass=NullPool))
        environment.on(database).check()
