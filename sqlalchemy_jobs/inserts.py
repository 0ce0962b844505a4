"""The INSERT of a job: it leaves out what another job's unique slot keeps out, and rings for idle workers.

An IntegrityError would end the caller's transaction, and a statement of its own for the bell would cost a
round trip. So both ride on every INSERT that comes from the table itself: the ORM's own, ``bulk_save_objects``
and ``jobs.insert()``, but not on ``insert(Job)``. Who was left out is found by ``duplicates.py``.
"""

from __future__ import annotations

from typing import Any, cast

from sqlalchemy import BindParameter, ClauseElement, Insert, Table, bindparam
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler


class JobTable(Table):
    """The table of jobs."""

    inherit_cache = True

    def insert(self) -> Insert:
        statement = _JobInsert(self)
        statement._post_values_clause = _KeepFirst()
        return statement


class _JobInsert(Insert):
    """What it makes."""

    inherit_cache = True


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


class _KeepFirst(ClauseElement):
    """What stands behind the VALUES."""

    __visit_name__ = "sajobs_keep_first"
    inherit_cache = True
    # Without it the INSERT would be compiled anew at each flush.
    _traverse_internals = []  # noqa: RUF012


@compiles(_KeepFirst)
def _keep_first(element: _KeepFirst, compiler: SQLCompiler, **kw: Any) -> str:
    return "ON CONFLICT (unique_slot) DO NOTHING"


@compiles(_KeepFirst, "mysql", "mariadb")
def _mysql_keep_first(element: _KeepFirst, compiler: SQLCompiler, **kw: Any) -> str:
    # The clause cannot name an index. A row without a slot is in conflict by its id: that stays an error.
    return "ON DUPLICATE KEY UPDATE id = IF(unique_slot IS NULL, NULL, id)"


# --- the bell -------------------------------------------------------------------------------------

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
# In dollars, since the name of a schema may have quotes in it.
_RING = f"""CASE WHEN {{run_at}} < clock_timestamp() + interval '{RUNG_AHEAD} seconds' AND {HEARD}
  THEN pg_notify('{CHANNEL}' || CAST(CAST($sajobs${{jobs}}$sajobs$ AS regclass) AS oid), {{queue}}) END"""


def _ring(compiler: SQLCompiler, jobs: Table, run_at: str, queue: str) -> str:
    table = compiler.preparer.format_table
    workers = next(each for each in jobs.metadata.tables.values() if each.name == "sajobs_worker")
    return _RING.format(run_at=run_at, workers=table(workers), jobs=table(jobs), queue=queue)


@compiles(_JobInsert, "postgresql")
def _insert_and_ring(insert: _JobInsert, compiler: Any, **kw: Any) -> str:
    """Ring while the values are evaluated, where all are given and no row can be left out; else by RETURNING.

    A result costs SQLAlchemy and the driver 20 us, though nobody reads it.
    """
    jobs = cast(Table, insert.table)
    given = set(compiler.column_keys or ())
    may_be_left_out = "unique_states" in given  # it comes with every slot
    is_plain = not insert._values and insert.select is None
    if is_plain and given >= {"queue", "run_at"} and not may_be_left_out:
        due = bindparam("run_at", type_=jobs.c.run_at.type)
        queue = _RingingQueue("queue", type_=jobs.c.queue.type)
        queue.jobs, queue.due = jobs, due
        insert = insert.values(queue=queue, run_at=due)
        return cast(str, compiler.visit_insert(insert, **kw))
    text: str = compiler.visit_insert(insert, **kw)
    if insert._returning or compiler.implicit_returning:  # there can be one RETURNING only
        return text
    name = compiler.preparer.quote(jobs.name)
    return f"{text} RETURNING {_ring(compiler, jobs, f'{name}.run_at', f'{name}.queue')}"


class _RingingQueue(BindParameter[str]):
    """The queue among the values. (No other expression: SQLAlchemy would read it back.)"""

    inherit_cache = True
    jobs: Table
    due: BindParameter[Any]


@compiles(_RingingQueue)
def _ringing(queue: _RingingQueue, compiler: Any, **kw: Any) -> str:
    value = compiler.visit_bindparam(queue, **kw)
    ring = _ring(compiler, queue.jobs, compiler.process(queue.due, **kw), value)
    return f"concat({value}, {ring})"
