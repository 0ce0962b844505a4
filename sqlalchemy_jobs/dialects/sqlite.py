"""SQLite: one writer at a time; BEGIN IMMEDIATE makes every transaction of ours atomic."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from sqlalchemy import Connection, FromClause, Select, TableClause, literal_column

from sqlalchemy_jobs.dialects.base import Dialect, Transaction
from sqlalchemy_jobs.dialects.limits import LimitStatements
from sqlalchemy_jobs.tables import IS_READY, jobs


class SQLiteLimits(LimitStatements):
    def _by_index(
        self, statement: Select[Any], job: FromClause, index: str = "sajobs_job_limited"
    ) -> Select[Any]:
        # The last condition: as the first one it would be what the index is searched for, and the result sorted.
        of_index = job.c.state.in_([literal_column("'ready'"), literal_column("'running'")])
        return statement.where(of_index)


class SQLite(Dialect):
    label = "SQLite"
    oldest = (3, 35)
    why_oldest = "partial indexes and the clock functions in use need"
    one_writer = True
    concurrency = 1
    limits = SQLiteLimits()

    def _by_ready_index(self, statement: Any) -> Any:
        # The planner takes a partial index only where its own condition is among those of the query.
        of_index = jobs.c.state.in_([literal_column("'ready'"), literal_column("'blocked'")])
        return statement.where(IS_READY, of_index)

    def migrating_alone(
        self, connection: Connection, schema: str | None
    ) -> AbstractContextManager[object]:
        driver: Any = connection.connection.driver_connection
        if not driver.in_transaction:  # an engine that is not configured begins none for DDL
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        return nullcontext()

    def locked(
        self, connection: Connection, tables: Sequence[TableClause]
    ) -> AbstractContextManager[object]:
        return nullcontext()  # migrating_alone has taken the only write lock

    def cancel_statement(self, cancellable: Any, transaction: Transaction) -> None:
        cancellable.interrupt()

    def _is_conflict(self, error: BaseException | None) -> bool:
        code = getattr(error, "sqlite_errorcode", None)
        return code is not None and code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
