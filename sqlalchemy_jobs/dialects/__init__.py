"""What differs between databases, and nothing else."""

from __future__ import annotations

from sqlalchemy import Connection
from sqlalchemy.orm import Session

from sqlalchemy_jobs.dialects.base import Dialect
from sqlalchemy_jobs.dialects.mysql import MySQL
from sqlalchemy_jobs.dialects.postgresql import PostgreSQL
from sqlalchemy_jobs.dialects.sqlite import SQLite
from sqlalchemy_jobs.errors import UnsupportedServer
from sqlalchemy_jobs.tables import TO_JOB

_BY_NAME: dict[str, Dialect] = {
    "postgresql": PostgreSQL(),
    "mysql": MySQL(),
    "mariadb": MySQL(),
    "sqlite": SQLite(),
}


def named(name: str) -> Dialect:
    """Return the dialect for SQLAlchemy's name of it.

    Raises: UnsupportedServer.
    """
    try:
        return _BY_NAME[name]
    except KeyError:
        raise UnsupportedServer(
            f"{name} is not supported: the jobs can live in PostgreSQL, MariaDB, MySQL or SQLite"
        ) from None


def of(where: Session | Connection) -> Dialect:
    """Return the dialect of the database that holds the jobs."""
    connection = where.connection(bind_arguments=TO_JOB) if isinstance(where, Session) else where
    return named(connection.dialect.name)
