"""The tables by versions, for Alembic and without it.

Inside a revision of your own::

    from sqlalchemy_jobs import migrations

    def upgrade() -> None:
        migrations.upgrade(op, to=2)

    def downgrade() -> None:
        migrations.downgrade(op, to=1)

Without an Alembic environment: ``sajobs migrate``, or ``migrations.migrate(connection)``. The result is the
same as what ``alembic revision --autogenerate`` makes of ``sqlalchemy_jobs.metadata``.

The version of a database is read off its tables. Nothing is written down beside them that could be
wrong, so it does not matter who made them: ``create_all``, your revisions or ``sajobs migrate``.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TextIO

from sqlalchemy import Connection, func, inspect, select, table

from sqlalchemy_jobs import dialects
from sqlalchemy_jobs.errors import (
    EngineError,
    MigrationError,
    TablesMissing,
    TablesOutdated,
)
from sqlalchemy_jobs.migrations.operations import Steps, operations
from sqlalchemy_jobs.migrations.versions import (
    LATEST,
    VERSIONS,
    State,
    layout,
    names_in,
    state_of,
    tables_in,
)
from sqlalchemy_jobs.models import metadata
from sqlalchemy_jobs.tables import jobs, schema_of, shown

__all__ = ["LATEST", "State", "check", "downgrade", "migrate", "state", "upgrade"]


def upgrade(op: Any, /, *, to: int, start: int | None = None, schema: str | None = None) -> None:
    """Bring the tables up to a version, in a revision of your own; ``op`` is Alembic's.

    It belongs to the transaction of the revision, and waits for other migrations of these tables. What is
    there already is left alone: tables that ``create_all`` made, or the first half of a migration that was
    interrupted on MySQL. With ``--sql`` nothing can be looked at: then it begins at ``start``, by default ``to - 1``.
    ``schema``: where the tables are, unless ``use_schema`` or the connection's ``schema_translate_map`` says so.

    Raises: MigrationError for a version that there is not, or tables that fit none; EngineError.
    """
    with _inside(op, schema) as migration:
        migration.up(to, to - 1 if start is None else start)


def downgrade(
    op: Any,
    /,
    *,
    to: int,
    start: int | None = None,
    schema: str | None = None,
    drop_rows: bool = False,
) -> None:
    """Take the tables back to a version, in a revision of your own; 0 drops them.

    It belongs to the transaction of the revision. With ``--sql`` it begins at ``start``, by default ``to + 1``, and
    rows are not counted. The rest is as for ``upgrade``.

    Raises: MigrationError, also when rows would be lost and ``drop_rows`` is false; EngineError.
    """
    with _inside(op, schema) as migration:
        migration.down(to, to + 1 if start is None else start, drop_rows)


def migrate(
    connection: Connection,
    /,
    *,
    to: int = LATEST,
    schema: str | None = None,
    drop_rows: bool = False,
    sql: TextIO | None = None,
) -> State:
    """Bring the tables to a version without an Alembic environment; return the state that they were in.

    For tests, scripts and deployments; ``sajobs migrate`` calls it. Several hosts may do so at once: one
    works, the others wait and find it done. It runs in the transaction of ``connection``, at READ
    COMMITTED, which you commit (MySQL commits each step by itself). With an AsyncConnection:
    ``await connection.run_sync(migrate)``. With ``sql`` the statements are written there instead, and rows are
    not counted.

    Raises: MigrationError, also when rows would be lost and ``drop_rows`` is false; EngineError.
    """
    _check_known(to)
    op = operations(connection, sql)
    with _on(connection, schema, op) as migration:
        before = migration.state()
        if not before.lowest == before.highest == to:
            with op.get_context().begin_transaction():  # a script says where it begins and ends
                if to < before.highest:
                    migration.down(to, to, drop_rows)
                else:
                    migration.up(to, to)
    return before


def state(connection: Connection, /, *, schema: str | None = None) -> State:
    """Tell at which version the tables are, or between which two.

    Raises: TablesTooNew, MigrationError when they fit none; EngineError.
    """
    return state_of(names_in(connection, _schema(connection, schema)))


def check(connection: Connection, /, *, schema: str | None = None) -> None:
    """Refuse tables with which this release cannot work, and say what mends it.

    A worker does so when it starts; an application that only enqueues may do so when it starts:
    ``with engine.connect() as connection: migrations.check(connection)``. What a later release has added is
    no fault: it is added such that this one works on.

    Raises: TablesMissing, TablesOutdated, TablesTooNew; MigrationError, EngineError.
    """
    schema = _schema(connection, schema)
    there = names_in(connection, schema)
    if _needed() <= there:
        return
    found = state_of(there)
    where = shown(connection.engine.url) + ("" if schema is None else f", schema {schema}")
    command = "`sajobs migrate" + ("`" if schema is None else f" --schema {schema}`")
    if found.highest == 0:
        raise TablesMissing(
            f"{where}: {found}. Run {command}, or list sqlalchemy_jobs.metadata in the target_metadata of your "
            "Alembic environment and generate a revision"
        )
    raise TablesOutdated(
        f"{where}: {found}, and this release needs version {LATEST}. Run your migrations, or {command}"
    )


@contextmanager
def _inside(op: Any, schema: str | None) -> Iterator[_Migration]:
    if op.get_context().as_sql:
        yield _Migration(op, jobs.schema if schema is None else schema, None, None)
    else:
        with _on(op.get_bind(), schema, op) as migration:
            yield migration


@contextmanager
def _on(connection: Connection, schema: str | None, op: Any) -> Iterator[_Migration]:
    schema = _schema(connection, schema)
    alone = dialects.of(connection).migrating_alone(connection, schema)
    with nullcontext() if op.get_context().as_sql else alone:
        yield _Migration(op, schema, connection, names_in(connection, schema))


@dataclass(frozen=True)
class _Migration:
    """The tables in one schema of one database, and the operations that change them."""

    op: Any
    schema: str | None
    connection: Connection | None
    """None in a revision with ``--sql``: nothing can be looked at."""
    there: Set[str] | None

    def state(self) -> State:
        assert self.there is not None
        return state_of(self.there)

    def up(self, to: int, start: int) -> None:
        """Go up to a version; ``start`` is where from, if nothing can be looked at."""
        _check_known(to)
        start = max(start, 0) if self.there is None else self.state().lowest
        there = self.there
        for number in range(start + 1, to + 1):
            VERSIONS[number - 1].upgrade(Steps(self.op, self.schema, there))
            there = None if there is None else there | layout(number)

    def down(self, to: int, start: int, drop_rows: bool) -> None:
        """Go down to a version; ``start`` is where from, if nothing can be looked at."""
        _check_known(to)
        start, doomed = min(start, LATEST), set[str]()
        if self.there is not None:
            start = self.state().highest
            if self.state().unknown:
                raise MigrationError(
                    f"a later release of sqlalchemy-jobs changed the tables ({_listed(self.state().unknown)}): "
                    "take them back with that one; or drop these first, if they are your own"
                )
            doomed = tables_in(self.there) - tables_in(layout(to))
            self._check_nothing_refers_to(doomed)
        kept = doomed and not drop_rows and not self.op.get_context().as_sql
        with self._without_rows(doomed) if kept else nullcontext():
            there = self.there
            for number in range(start, to, -1):
                VERSIONS[number - 1].downgrade(Steps(self.op, self.schema, there))
                there = None if there is None else layout(number - 1)

    def _check_nothing_refers_to(self, doomed: Set[str]) -> None:
        """Refuse what MySQL would break off in the middle, and SQLite would not mind."""
        assert self.connection is not None
        keys_of = inspect(self.connection).get_multi_foreign_keys(self.schema)
        for (_, name), keys in keys_of.items():
            for key in keys:
                if name not in doomed and key["referred_table"] in doomed:
                    raise MigrationError(
                        f"{name} has a foreign key to {key['referred_table']} ({', '.join(key['constrained_columns'])}): "
                        "drop it first. Nothing was changed"
                    )

    @contextmanager
    def _without_rows(self, doomed: Set[str]) -> Iterator[None]:
        """Refuse to drop tables with rows, and let nobody write one between the count and the drop."""
        assert self.connection is not None
        assert self.there is not None
        tables = {name: table(name, schema=self.schema) for name in tables_in(self.there)}
        # All of them: MySQL lets us use no other. That of the jobs first, as nearly every transaction has it.
        every = [
            tables[name] for name in sorted(tables, key=lambda name: (name != jobs.name, name))
        ]
        with dialects.of(self.connection).locked(self.connection, every):
            counts = {
                name: self.connection.scalar(select(func.count()).select_from(tables[name]))
                for name in sorted(doomed)
            }
            if any(counts.values()):
                raise MigrationError(
                    "rows would be lost with their tables: "
                    + ", ".join(f"{name} has {count}" for name, count in counts.items() if count)
                    + ". Nothing was changed. To drop them all the same: `sajobs migrate --yes`, or in a revision "
                    "migrations.downgrade(op, ..., drop_rows=True)"
                )
            yield


def _check_known(version: int) -> None:
    if version not in range(LATEST + 1):
        raise MigrationError(
            f"there is no version {version!r}: the newest that this release of sqlalchemy-jobs has is {LATEST}, and 0 is none"
        )


def _schema(connection: Connection, schema: str | None) -> str | None:
    """Return the schema that is meant.

    Raises: EngineError when there is none of that name.
    """
    schema = schema_of(connection) if schema is None else schema
    if schema is None:
        return None
    if connection.dialect.name == "sqlite":
        raise EngineError(
            f'the tables are to be in the schema "{schema}", and SQLite has no schemas'
        )
    if not inspect(connection).has_schema(schema):
        raise EngineError(
            f'{shown(connection.engine.url)} has no schema "{schema}": create it (CREATE SCHEMA {schema}), or correct the name'
        )
    return schema


def _listed(names: Set[str]) -> str:
    return ", ".join(sorted(names))


def _needed() -> Set[str]:
    """Return the names that the models use: what version LATEST has, without the trouble of making it."""
    return {
        name
        for each in metadata.tables.values()
        for name in (
            each.name,
            *(f"{each.name}.{column.name}" for column in each.columns),
            *(str(index.name) for index in each.indexes),
        )
    }
