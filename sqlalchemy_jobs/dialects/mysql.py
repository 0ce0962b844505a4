"""MariaDB and MySQL: no partial indexes, no key-share locks, and locks on whatever a scan walks past."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any, ClassVar

from sqlalchemy import (
    Boolean,
    ColumnElement,
    Connection,
    FromClause,
    Integer,
    Select,
    String,
    TableClause,
    bindparam,
    func,
    select,
    text,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from sqlalchemy_jobs.columns import utc_datetime
from sqlalchemy_jobs.dialects.base import (
    MIGRATION_WAIT,
    Dialect,
    Transaction,
    waited_in_vain,
)
from sqlalchemy_jobs.dialects.limits import LimitStatements
from sqlalchemy_jobs.dialects.sessions import SessionLocks
from sqlalchemy_jobs.errors import EngineError, MigrationError
from sqlalchemy_jobs.tables import IS_READY, TO_JOB, jobs, workers

_CONFLICTS = (
    1020,  # record has changed since last read (innodb_snapshot_isolation)
    1205,  # lock wait timeout exceeded
    1213,  # deadlock found
    1412,  # the table was migrated since the transaction began
)


# Both terms are counted from the start of the statement in whole seconds, so their difference is always the
# same. The microseconds tell the members of a cluster apart, which do not see each other's locks.
_SERVER_START = """(
  SELECT TIMESTAMPADD(MICROSECOND, CRC32(CONCAT(@@hostname, ':', @@port)) MOD 1000000,
                      TIMESTAMPADD(SECOND, -CAST(variable_value AS SIGNED), UTC_TIMESTAMP()))
  FROM {schema}.global_status WHERE variable_name = 'Uptime')"""


_SESSION = "sqlalchemy_jobs.session"
_WHICH_SESSION = "SELECT CONNECTION_ID() AS number, @@hostname AS host, @@port AS port"
NO_SESSION = 0
# Behind a balancer it may arrive at another server, where the number is somebody else's: there it must fail.
_KILL = text(f"KILL QUERY IF(@@hostname = :host AND @@port = :port, :number, {NO_SESSION})")


class _ServerStart(FunctionElement[datetime]):
    type = utc_datetime()
    inherit_cache = True


@compiles(_ServerStart, "mysql", "mariadb")
def _server_start(element: _ServerStart, compiler: SQLCompiler, **kw: Any) -> str:
    server: Any = compiler.dialect
    return _SERVER_START.format(
        schema="information_schema" if server.is_mariadb else "performance_schema"
    )


class NamedLocks(SessionLocks):
    """GET_LOCK. Its names are the server's, not the database's: the worker's id makes them unique."""

    limits = text("SET SESSION wait_timeout = :seconds").bindparams(
        bindparam("seconds", type_=Integer)
    )
    session = func.connection_id()
    server_start = _ServerStart()
    is_free = func.is_used_lock(func.concat("sajobs:", workers.c.id, type_=String)).is_(None)

    def session_of(self, driver: Any) -> int | None:
        if hasattr(driver, "thread_id"):
            return int(driver.thread_id())
        return getattr(driver, "connection_id", None)

    def take(self, worker_id: uuid.UUID) -> ColumnElement[bool]:
        return func.get_lock(f"sajobs:{worker_id.hex}", 0, type_=Boolean)


_LOCKS = NamedLocks()


def _by_index(
    statement: Select[Any], job: FromClause, index: str = "sajobs_job_limited"
) -> Select[Any]:
    for name in ("mysql", "mariadb"):
        statement = statement.with_hint(job, f"FORCE INDEX ({index})", name)
    return statement


class MySQLLimits(LimitStatements):
    def _by_index(
        self, statement: Select[Any], job: FromClause, index: str = "sajobs_job_limited"
    ) -> Select[Any]:
        return _by_index(statement, job, index)


class MySQL(Dialect):
    label = "MySQL"
    oldest: ClassVar[tuple[int, ...]] = (8, 0, 1)
    why_oldest = "claiming needs SKIP LOCKED, which came with"
    stale_reads = True
    session_locks = _LOCKS
    limits = MySQLLimits()

    def _by_ready_index(self, statement: Any) -> Any:
        # Only this index separates jobs without a limit from those that wait behind one.
        return _by_index(statement, jobs).where(IS_READY)

    @contextmanager
    def migrating_alone(self, connection: Connection, schema: str | None) -> Iterator[None]:
        if schema is None and connection.engine.url.database is None:
            raise EngineError("the URL names no database: add it, as in mysql+pymysql://host/shop")
        # Names are the whole server's.
        name = func.concat("sajobs migrate ", func.md5(schema or func.database()))
        if connection.scalar(select(func.get_lock(name, MIGRATION_WAIT))) != 1:
            raise MigrationError(waited_in_vain("SHOW PROCESSLIST"))
        try:
            yield
        finally:
            if not connection.invalidated:  # the lock goes with its connection
                connection.execute(select(func.release_lock(name)))

    @contextmanager
    def locked(self, connection: Connection, tables: Sequence[TableClause]) -> Iterator[None]:
        name = connection.dialect.identifier_preparer.format_table
        connection.exec_driver_sql(
            f"LOCK TABLES {', '.join(f'{name(each)} WRITE' for each in tables)}"
        )
        try:
            yield
        finally:
            if not connection.invalidated:
                connection.exec_driver_sql("UNLOCK TABLES")

    @contextmanager
    def bounded_waits(self, session: Session, seconds: int) -> Iterator[None]:
        # On the driver's connection: SQLAlchemy's takes no more statements after an error.
        cursor = session.connection(bind_arguments=TO_JOB).connection.cursor()
        cursor.execute(
            "SET @sajobs_wait = @@innodb_lock_wait_timeout, "
            f"SESSION innodb_lock_wait_timeout = {seconds:d}"
        )
        try:
            yield
        finally:
            with suppress(Exception):  # it is broken
                cursor.execute("SET SESSION innodb_lock_wait_timeout = @sajobs_wait")
                cursor.close()

    def cancellable(self, connection: Connection) -> dict[str, Any]:
        """Return the number of the session, and the server that counts it; asked once in a connection's life."""
        known: dict[str, Any] | None = connection.info.get(_SESSION)
        if known is None:
            known = dict(connection.exec_driver_sql(_WHICH_SESSION).mappings().one())
            # A proxy that shares out its connections has numbers of its own, and the server's change hands.
            if known["number"] != _LOCKS.session_of(connection.connection.driver_connection):
                known["number"] = NO_SESSION
            connection.info[_SESSION] = known
        return known

    def cancel_statement(self, cancellable: dict[str, Any], transaction: Transaction) -> None:
        transaction(lambda session: session.execute(_KILL, cancellable, bind_arguments=TO_JOB))

    def _is_conflict(self, error: BaseException | None) -> bool:
        return bool(error and error.args) and error is not None and error.args[0] in _CONFLICTS

    def check_server(self, connection: Connection) -> None:
        dialect: Any = connection.dialect
        (MariaDB() if dialect.is_mariadb else self).check_version(
            tuple(part for part in dialect.server_version_info if isinstance(part, int))
        )


class MariaDB(MySQL):
    label = "MariaDB"
    oldest = (10, 6)
