"""Column types that mean the same on every database and leave no trace in Alembic's scripts.

Plain SQLAlchemy types fail in four places: ``DateTime(timezone=True)`` loses the offset on MariaDB
and SQLite; ``JSON().with_variant(JSONB())`` is rendered by Alembic with a name that the script
does not import; MariaDB's native UUID sorts version 7 wrongly before 10.11.5; and MySQL compares
names without regard to case. The types here mend that, and pose as the types they stand for so that a
generated migration holds nothing of this library.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Dialect,
    String,
    Text,
    TypeDecorator,
    Uuid,
    bindparam,
    literal,
)
from sqlalchemy import types as sqltypes
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeEngine

MYSQL = ("mysql", "mariadb")


class _Utc(TypeDecorator[datetime]):
    """Stores an aware datetime as UTC and returns it as UTC; refuses a naive one."""

    impl: type[TypeEngine[Any]] | TypeEngine[Any] = sqltypes.DateTime

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"naive datetime {value!r}: give it a time zone, for example UTC")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class _UtcDateTime(_Utc):
    cache_ok = True  # read from each class itself
    impl = sqltypes.DateTime(timezone=True)

    def __repr__(self) -> str:
        return "DateTime(timezone=True)"


class _UtcMysqlDatetime(_Utc):
    cache_ok = True
    impl = mysql.DATETIME(fsp=6)

    def __repr__(self) -> str:
        return "DATETIME(fsp=6)"


class _Jsonb(postgresql.JSONB):
    def __repr__(self) -> str:
        return "JSONB(none_as_null=True)"


# Alembic takes the import of a rendered type from the module of its class.
_UtcDateTime.__module__ = "sqlalchemy.sql.sqltypes"
_UtcMysqlDatetime.__module__ = "sqlalchemy.dialects.mysql.types"
_Jsonb.__module__ = "sqlalchemy.dialects.postgresql.json"


def utc_datetime() -> TypeEngine[datetime]:
    """An instant, to the microsecond; aware and in UTC in Python, whatever the database keeps."""
    return _UtcDateTime().with_variant(_UtcMysqlDatetime(), *MYSQL)


def uuid_key() -> TypeEngine[Any]:
    """A UUID: native on PostgreSQL, CHAR(32) elsewhere, ordered as its bytes are.

    Source: MDEV-29959 (MariaDB before 10.11.5 stores the groups of a version 7 swapped).
    """
    return Uuid().with_variant(Uuid(native_uuid=False), *MYSQL)


def name(length: int) -> TypeEngine[str]:
    """A name or key that is compared byte by byte (MySQL's default would ignore case)."""
    return String(length).with_variant(mysql.VARCHAR(length, collation="utf8mb4_bin"), *MYSQL)


def text() -> TypeEngine[str]:
    """Free text, also where MySQL's default character set could not hold it."""
    return Text().with_variant(mysql.TEXT(collation="utf8mb4_bin"), *MYSQL)


def json() -> TypeEngine[Any]:
    """A JSON value; None is stored as SQL NULL."""
    return JSON(none_as_null=True).with_variant(_Jsonb(none_as_null=True), "postgresql")


class server_now(FunctionElement[datetime]):  # noqa: N801 (reads as the SQL function it renders)
    """The server's clock in UTC, optionally ``after`` a delay; never local to the session.

    MySQL's CURRENT_TIMESTAMP is in the session's zone and SQLite's has whole seconds.
    """

    type = utc_datetime()
    inherit_cache = True

    def __init__(self, after: timedelta | str = timedelta(0)) -> None:
        """``after``: a delay, or the name of a parameter that will be given microseconds."""
        super().__init__(
            bindparam(after, type_=BigInteger)
            if isinstance(after, str)
            else literal(microseconds(after), BigInteger)
        )


def microseconds(delay: timedelta) -> int:
    """Return a delay as ``server_now`` takes it."""
    return delay // timedelta(microseconds=1)


@compiles(server_now, "postgresql")
def _postgresql_now(element: server_now, compiler: SQLCompiler, **kw: Any) -> str:
    micros = compiler.process(element.clauses, **kw)
    return f"(clock_timestamp() + {micros} * interval '1 microsecond')"


@compiles(server_now, "mysql", "mariadb")
def _mysql_now(element: server_now, compiler: SQLCompiler, **kw: Any) -> str:
    micros = compiler.process(element.clauses, **kw)
    return f"TIMESTAMPADD(MICROSECOND, {micros}, UTC_TIMESTAMP(6))"


@compiles(server_now, "sqlite")
def _sqlite_now(element: server_now, compiler: SQLCompiler, **kw: Any) -> str:
    # SQLAlchemy compares datetimes as text with six digits; strftime gives three.
    micros = compiler.process(element.clauses, **kw)
    return f"strftime('%Y-%m-%d %H:%M:%f000', 'now', ({micros} / 1e6) || ' seconds')"
