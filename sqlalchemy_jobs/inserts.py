"""The INSERT of a job: it leaves out what another job's unique slot keeps out, and rings for idle workers.

An IntegrityError would end the caller's transaction, and a statement of its own for the bell would cost a
round trip. So both ride on every INSERT that comes from the table itself: the ORM's own, ``bulk_save_objects``
and ``jobs.insert()``, but not on ``insert(Job)``. Who was left out is found by ``duplicates.py``.
"""

from __future__ import annotations

from typing import Any, cast

from sqlalchemy import ClauseElement, Insert, Table
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler


class JobTable(Table):
    """The table of jobs."""

    inherit_cache = True

    def insert(self) -> Insert:
        statement = Insert(self)
        statement._post_values_clause = _AfterValues()
        return statement


def insert_missing(table: Table) -> Insert:
    """Return an INSERT that leaves out the rows whose key is there: somebody else was quicker."""
    statement = Insert(table)
    statement._post_values_clause = _UnlessThere()
    return statement


class _UnlessThere(ClauseElement):
    """What stands behind the VALUES of such an INSERT."""

    __visit_name__ = "sajobs_unless_there"
    inherit_cache = True
    _traverse_internals = []  # noqa: RUF012


@compiles(_UnlessThere)
def _do_nothing(element: _UnlessThere, compiler: SQLCompiler, **kw: Any) -> str:
    return "ON CONFLICT DO NOTHING"


@compiles(_UnlessThere, "mysql", "mariadb")
def _mysql_do_nothing(element: _UnlessThere, compiler: SQLCompiler, **kw: Any) -> str:
    (key,) = cast(Table, cast(Insert, compiler.stack[-1]["selectable"]).table).primary_key
    return f"ON DUPLICATE KEY UPDATE {key.name} = {key.name}"


class _AfterValues(ClauseElement):
    """What stands behind the VALUES."""

    __visit_name__ = "sajobs_after_values"
    inherit_cache = True
    # Without it the INSERT would be compiled anew at each flush.
    _traverse_internals = []  # noqa: RUF012


@compiles(_AfterValues)
def _keep_first(element: _AfterValues, compiler: SQLCompiler, **kw: Any) -> str:
    return "ON CONFLICT (unique_slot) DO NOTHING"


CHANNEL = "sajobs_"
"""A channel of PostgreSQL's NOTIFY is this and the oid of the table of jobs: there is one for each schema."""
SCHEDULES = "@schedules"
"""What is notified when a schedule has changed, in the place of a queue: no queue is named like this."""
RUNG_AHEAD = 75
"""How many seconds before a job is due the bell is rung for it. Every worker looks once a minute at least, and
then sleeps until the next job that it sees."""

# SILENT is set where a notification would make the transaction fail: a prepared one (``bell.py``).
SILENT = "sajobs.silent"
HEARD = f"""EXISTS (SELECT FROM {{workers}}
  WHERE bell AND state = 'alive' AND lease_until > clock_timestamp())
  AND current_setting('{SILENT}', true) IS DISTINCT FROM 'on'"""
_RING = f"""RETURNING (SELECT pg_notify('{CHANNEL}' || CAST({{job}}.tableoid AS text), {{job}}.queue)
  WHERE {{job}}.run_at < clock_timestamp() + interval '{RUNG_AHEAD} seconds' AND {HEARD})"""


@compiles(_AfterValues, "postgresql")
def _keep_first_and_ring(element: _AfterValues, compiler: SQLCompiler, **kw: Any) -> str:
    clause = _keep_first(element, compiler)
    statement = cast(Insert, compiler.stack[-1]["selectable"])
    if statement._returning or compiler.implicit_returning:  # there can be one RETURNING only
        return clause
    names = compiler.preparer
    table = cast(Table, statement.table)
    workers = next(each for each in table.metadata.tables.values() if each.name == "sajobs_worker")
    ring = _RING.format(job=names.quote(table.name), workers=names.format_table(workers))
    return f"{clause} {ring}"


@compiles(_AfterValues, "mysql", "mariadb")
def _mysql_keep_first(element: _AfterValues, compiler: SQLCompiler, **kw: Any) -> str:
    # The clause cannot name an index. A row without a slot is in conflict by its id: that stays an error.
    return "ON DUPLICATE KEY UPDATE id = IF(unique_slot IS NULL, NULL, id)"
