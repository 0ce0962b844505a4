"""The tables behind the rows, the schema that they are in, and the conditions that the statements share."""

from __future__ import annotations

from typing import Any, TypeVar

from sqlalchemy import (
    URL,
    ColumnElement,
    Connection,
    FromClause,
    Select,
    Table,
    Update,
    and_,
    case,
    func,
    literal_column,
)

from sqlalchemy_jobs.columns import server_now
from sqlalchemy_jobs.errors import ConfigurationError
from sqlalchemy_jobs.models import Attempt, Job, Kind, LimitRow, Queue, WorkerRow, metadata
from sqlalchemy_jobs.states import JobState

jobs: Table = Job.__table__  # type: ignore[assignment]
attempts: Table = Attempt.__table__  # type: ignore[assignment]
workers: Table = WorkerRow.__table__  # type: ignore[assignment]
queues: Table = Queue.__table__  # type: ignore[assignment]
kinds: Table = Kind.__table__  # type: ignore[assignment]
limits: Table = LimitRow.__table__  # type: ignore[assignment]

StatementT = TypeVar("StatementT", Update, Select[Any])

TO_JOB = {"mapper": Job}
"""Routes a statement on a table to the database of the jobs, in a session with several."""

# Literals, not binds: a partial index cannot be used for a bind under a generic plan.
IS_RUNNING = jobs.c.state == literal_column("'running'")
IS_READY = and_(jobs.c.state == literal_column("'ready'"), jobs.c.limit_key.is_(None))
"""Of the jobs that count against no limit."""


def is_limited(job: FromClause, state: JobState) -> ColumnElement[bool]:
    """Tell whether a job counts against a limit and is in a state."""
    return and_(job.c.limit_key.is_not(None), job.c.state == literal_column(f"'{state.value}'"))


# Not IS NULL: without statistics PostgreSQL would read all jobs without a slot by the index of that column.
HAS_NO_SLOT = func.coalesce(jobs.c.unique_slot, literal_column("''")) == literal_column("''")


def by_id(statement: StatementT) -> StatementT:
    """Have MySQL go by the primary key, and by nothing else that the condition names.

    By the index of worker_id it would lock the gap in which new jobs are inserted: then nobody could enqueue
    while this statement waits for its row, or until a handler at REPEATABLE READ commits.
    """
    for name in ("mysql", "mariadb"):
        statement = statement.with_hint(
            selectable=jobs, text="FORCE INDEX (PRIMARY)", dialect_name=name
        )
    return statement


def slot_in(state: JobState, slot: Any = jobs.c.unique_slot) -> Any:
    """Return what ``unique_slot`` becomes in a state: kept, or NULL where the job keeps nobody out.

    Kept, not taken anew: meanwhile another job may have it, and a transition must not fail for that.
    """
    holds = jobs.c.unique_states.bitwise_and(literal_column(str(state.bit)))
    return case((holds != literal_column("0"), slot))


BEGUN = {"started_at": func.coalesce(jobs.c.started_at, server_now())}
"""What the end of every run sets: a job that was claimed ahead was quick, or it would not have been."""


def final(state: JobState) -> dict[str, Any]:
    """Return what every transition to a final state sets."""
    return {
        "state": state.value,
        "worker_id": None,
        "unique_slot": slot_in(state),
        "finished_at": server_now(),
    }


def use_schema(name: str) -> None:
    """Put the library's tables into a schema: ``use_schema("jobs")`` makes them ``jobs.sajobs_job`` and so on.

    Call it once, where your own models are declared, before any statement with a job is built: by then every
    process of the application has it, the worker and Alembic too. On MySQL and MariaDB a schema is a
    database of the same server; SQLite has none. For the same tables once per tenant leave it and set
    ``schema_translate_map`` on each tenant's engine.

    Raises: ConfigurationError for a name that is none, or another one than before.
    """
    if not isinstance(name, str) or not name:
        raise ConfigurationError(f"use_schema({name!r}): wanted the name of a schema")
    if jobs.schema not in (None, name):
        raise ConfigurationError(
            f"use_schema({name!r}): the tables are in the schema {jobs.schema!r} already, and there is one for all of "
            "an application; for tenants set schema_translate_map on their engines"
        )
    for table in metadata.sorted_tables:
        metadata.remove(table)
        table.schema, table.fullname = name, f"{name}.{table.name}"
        # The way a Table enters its MetaData when it is made; there is no public one.
        metadata._add_table(table.name, name, table)


def shown(url: URL) -> str:
    """Return a database's URL for a message: without its passwords, those among the query's parameters too."""
    return repr(url.difference_update_query([name for name in url.query if "pass" in name]))


def schema_of(connection: Connection) -> str | None:
    """Return the schema of the tables on this connection; None: where the server looks by default."""
    translated = connection.get_execution_options().get("schema_translate_map") or {}
    schema: str | None = translated.get(jobs.schema, jobs.schema)
    return schema
