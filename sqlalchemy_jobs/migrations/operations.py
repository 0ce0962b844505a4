"""What a version is made of: Alembic's operations, in one schema, without what is done already."""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING, Any, TextIO

from sqlalchemy import Column, Connection, Constraint
from sqlalchemy.sql.elements import conv

if TYPE_CHECKING:
    from alembic.operations import Operations


class Steps:
    """The operations of the versions.

    A server without transactional DDL leaves a migration that was interrupted half done. So a thing that is there
    is not made again, and one that is gone is not dropped again: running it once more completes it.
    """

    def __init__(self, op: Any, schema: str | None, there: Set[str] | None) -> None:
        """``op``: Alembic's. ``there``: the names of what there is; None: not known, offline."""
        self._op = op
        self._schema = schema
        self._there = there

    def create_table(self, name: str, *parts: Column[Any] | Constraint) -> None:
        for part in parts:
            if isinstance(part, Constraint):
                # Final: a naming convention of the user's is not for ours.
                part.name = conv(str(part.name))
        if self._there is None or name not in self._there:
            # Elsewhere there are no transactions, whatever the server's default is.
            self._op.create_table(
                name, *parts, schema=self._schema, mysql_engine="InnoDB", mariadb_engine="InnoDB"
            )

    def create_index(self, name: str, table: str, columns: list[str], **options: Any) -> None:
        if self._there is None or name not in self._there:
            self._op.create_index(conv(name), table, columns, schema=self._schema, **options)

    def drop_index(self, name: str, table: str) -> None:
        if self._there is None or name in self._there:
            self._op.drop_index(conv(name), table, schema=self._schema)

    def drop_table(self, name: str) -> None:
        if self._there is None or name in self._there:
            self._op.drop_table(name, schema=self._schema)

    def qualified(self, column: str) -> str:
        """Return ``table.column`` as a foreign key names it."""
        return column if self._schema is None else f"{self._schema}.{column}"


def operations(connection: Connection, sql: TextIO | None = None) -> Operations:
    """Return Alembic's operations on a connection; with ``sql`` the statements are written there instead."""
    from alembic.migration import (
        MigrationContext,  # a worker that finds the tables in order does without
    )
    from alembic.operations import Operations

    offline = {} if sql is None else {"as_sql": True, "output_buffer": sql}
    return Operations(MigrationContext.configure(connection, opts=offline))
