"""Setting up an engine for jobs on SQLite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine, event

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine  # needs greenlet, which a sync application lacks

BUSY_TIMEOUT = 30.0
"""Seconds for which a transaction waits for the write lock before "database is locked"."""


def configure(engine: Engine | AsyncEngine) -> None:
    """Make an SQLite engine transactional, patient and concurrent; call it once, before first use.

    Python's driver by default begins no transaction before a SAVEPOINT, so that a row written inside
    ``begin_nested()`` survives the outer rollback: the promise of one transaction could not hold, and a
    worker refuses such an engine. From here on

    * every transaction begins with BEGIN IMMEDIATE, which waits up to 30 s for the write lock
      instead of failing in the middle;
    * the file is in WAL mode: engines that are not configured, for example a report's, read without waiting.

    There is one write lock, and every transaction takes it, even for a SELECT: one that does slow work after its
    first statement keeps all others waiting. Handlers that do so should use ``transaction="manual"``. Foreign
    keys are left as they are: SQLite enforces them only after ``PRAGMA foreign_keys = ON``.

    Source: SQLAlchemy's documentation of the pysqlite dialect, "Serializable isolation / Savepoints /
    Transactional DDL".
    """
    sync = engine if isinstance(engine, Engine) else engine.sync_engine
    if sync.dialect.name != "sqlite":
        raise ValueError(f"configure() is for SQLite engines, this one is {sync.dialect.name}")
    if not event.contains(sync, "begin", _begin):
        event.listen(sync, "connect", _connect)
        event.listen(sync, "begin", _begin)


def _connect(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # the driver itself begins nothing
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT * 1000)}")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.close()


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
