"""The INSERT of a job: it leaves out what another job's unique slot keeps out, and raises no error.

An IntegrityError would end the caller's transaction. So the clause rides on every INSERT that comes
from the table itself: the ORM's own, ``bulk_save_objects`` and ``jobs.insert()``, but not on ``insert(Job)``.
Who was left out is found by ``duplicates.py``.
"""

from __future__ import annotations

from typing import Any

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


class _AfterValues(ClauseElement):
    """What stands behind the VALUES."""

    __visit_name__ = "sajobs_after_values"
    inherit_cache = True
    # Without it the INSERT would be compiled anew at each flush.
    _traverse_internals = []  # noqa: RUF012


@compiles(_AfterValues)
def _keep_first(element: _AfterValues, compiler: SQLCompiler, **kw: Any) -> str:
    return "ON CONFLICT (unique_slot) DO NOTHING"


@compiles(_AfterValues, "mysql", "mariadb")
def _mysql_keep_first(element: _AfterValues, compiler: SQLCompiler, **kw: Any) -> str:
    # The clause cannot name an index. A row without a slot is in conflict by its id: that stays an error.
    return "ON DUPLICATE KEY UPDATE id = IF(unique_slot IS NULL, NULL, id)"
