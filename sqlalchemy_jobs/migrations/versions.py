"""The versions, and which of them a database has.

It is read off the names of tables, columns and indexes, so a version has to change one of them. It says
WHEN it is run: "before" the deploy of the code that needs it, and then it only adds what the code of
the version before does not notice; or "after", and then it takes away what that code needs.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from functools import cache

from sqlalchemy import Connection, StaticPool, create_engine, inspect

from sqlalchemy_jobs.errors import MigrationError, TablesTooNew
from sqlalchemy_jobs.migrations import v001, v002
from sqlalchemy_jobs.migrations.operations import Steps, operations

VERSIONS = (v001, v002)
LATEST = len(VERSIONS)

PREFIX = "sajobs_"


@dataclass(frozen=True)
class State:
    """Between which versions a database is; the two are equal unless a migration was interrupted."""

    lowest: int
    highest: int
    missing: Set[str]
    """What there is not of the highest, when the two differ."""
    unknown: Set[str]
    """What no version of this release has."""

    def __str__(self) -> str:
        if self.missing:
            return f"version {self.highest} was made in part, and these are missing: {_listed(self.missing)}"
        return f"at version {self.lowest}" if self.lowest else "no tables for jobs"


def names_in(connection: Connection, schema: str | None) -> frozenset[str]:
    """Return the names of the library's tables, of their indexes, and of their columns as ``table.column``."""
    inspector = inspect(connection)
    tables = [each for each in inspector.get_table_names(schema) if each.startswith(PREFIX)]
    if not tables:
        return frozenset()
    names = set(tables)
    # Of all tables at once, which on PostgreSQL is one statement: every worker asks at its start.
    columns = inspector.get_multi_columns(schema, filter_names=tables)
    for (_, table), found in columns.items():
        names |= {f"{table}.{column['name']}" for column in found}
    for indexes in inspector.get_multi_indexes(schema, filter_names=tables).values():
        names |= {index["name"] or "" for index in indexes}
    return frozenset(name for name in names if name.startswith(PREFIX))


def tables_in(names: Set[str]) -> set[str]:
    """Return which of the names are tables: those that have columns."""
    return {name.partition(".")[0] for name in names if "." in name}


@cache
def layout(version: int) -> frozenset[str]:
    """Return the names that a version consists of; found by making it."""
    engine = create_engine("sqlite://", poolclass=StaticPool)
    with engine.connect() as connection:
        for each in VERSIONS[:version]:
            each.upgrade(Steps(operations(connection), None, None))
        names = names_in(connection, None)
    engine.dispose()
    return names


def state_of(there: Set[str]) -> State:
    """Tell by the names that are there which version they are.

    Raises: TablesTooNew, MigrationError when they are none, nor something between two neighbours.
    """
    layouts = [layout(version) for version in range(LATEST + 1)]
    known = there & frozenset().union(*layouts)
    unknown = there - known
    for version in range(LATEST, -1, -1):
        if known == layouts[version]:
            return State(version, version, frozenset(), unknown)
    for version in range(LATEST):
        low, high = layouts[version : version + 2]
        # A table is made whole: one that lacks columns is no step of ours.
        cut = {name for name in high - known if name.partition(".")[0] in known - low}
        if low & high <= known <= low | high and not cut:
            return State(version, version + 1, high - known, unknown)
    for version in range(LATEST, 0, -1):
        lacking = layouts[version] - known
        tables = tables_in(layouts[version])
        if known <= layouts[version] and not any(
            name.partition(".")[0] in tables for name in lacking
        ):
            # Indexes that somebody has dropped: the versions that made them make them again.
            whole = (each for each in range(version) if layouts[each] & layouts[version] <= known)
            return State(max(whole), version, lacking, unknown)
    missing = _listed(layouts[LATEST] - known)
    if unknown:
        raise TablesTooNew(
            f"the tables were changed by a later release of sqlalchemy-jobs ({_listed(unknown)}), and this "
            f"one needs what is no longer there: {missing}. Install the later release"
        )
    raise MigrationError(
        f"the tables are at no version that this release knows; what version {LATEST} has and they lack: {missing}. "
        "Add it by hand, as `sajobs migrate --sql` prints it for an empty database"
    )


def _listed(names: Set[str]) -> str:
    """List them without the columns of a table that is among them."""
    return ", ".join(sorted(name for name in names if name.partition(".")[0] not in names - {name}))
