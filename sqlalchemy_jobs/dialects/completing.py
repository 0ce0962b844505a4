"""psycopg 3: a run is completed and its transaction committed in one round trip.

As one simple query, behind whose first error a server does not go on: so the fence has to raise, for no rows would be no
error, and no COMMIT is carried out for it. Planning the UPDATE costs twice as much as executing it. So it is prepared
where that is safe: not behind a pooler, for which the next transaction may be in another session.
"""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any

from sqlalchemy import Connection

from sqlalchemy_jobs.claims import Claim
from sqlalchemy_jobs.dialects.listening import table_of
from sqlalchemy_jobs.states import JobState

_KEY = "sqlalchemy_jobs.completing"
LEASE_LOST = "sajobs: another run owns the job"
_NOT_ITS_OWN = (
    "26000",  # no such prepared statement
    "42P05",  # there is one of that name
)
_COMPLETE = f"""
WITH completed AS (
  UPDATE {{jobs}} SET state = 'succeeded', worker_id = NULL, result = NULL,
    unique_slot = CASE WHEN unique_states & {JobState.SUCCEEDED.bit} <> 0 THEN unique_slot END,
    started_at = coalesce(started_at, clock_timestamp()), finished_at = clock_timestamp()
  WHERE id = {{job_id}} AND attempt = {{attempt}} AND worker_id = {{worker_id}} RETURNING 1)
SELECT CAST(CASE count(*) WHEN 1 THEN '1' ELSE '{LEASE_LOST}' END AS int) FROM completed
"""


@cache
def _of_schema(schema: str | None) -> tuple[str, str, str]:
    """Return the name of the prepared statement, what prepares it, and the same with places for the values."""
    name = "sajobs_complete"
    if schema is not None:
        name += "_" + hashlib.sha256(schema.encode()).hexdigest()[:32]
    table = table_of(schema)
    prepared = _COMPLETE.format(jobs=table, job_id="$1", attempt="$2", worker_id="$3")
    # A percent sign in the name of a schema is none of ours.
    plain = _COMPLETE.format(
        jobs=table.replace("%", "%%"), job_id="'%s'", attempt="%s", worker_id="'%s'"
    )
    return name, f"PREPARE {name} (uuid, int, uuid) AS {prepared}", plain


class Completing:
    """What is known of one connection to the server; it is kept in its ``info``."""

    def __init__(self, connection: Connection) -> None:
        from psycopg import pq

        driver: Any = connection.connection.driver_connection
        self._driver = driver
        self._good = (pq.ExecStatus.COMMAND_OK, pq.ExecStatus.TUPLES_OK)
        self._encoding: str = driver.info.encoding
        self._run_async: Any = None
        if connection.dialect.is_async:
            self._run_async = connection.connection.dbapi_connection.run_async  # type: ignore[union-attr]
        self._is_direct: bool | None = None
        """Whether its session is its own; None: nobody has asked."""

    @classmethod
    def of(cls, connection: Connection) -> Completing:
        found: Completing | None = connection.info.get(_KEY)
        if found is None:
            found = connection.info[_KEY] = cls(connection)
        return found

    def commit(self, schema: str | None, claim: Claim) -> None:
        """Complete the run and commit; raises what the driver does, and nothing is committed then."""
        name, prepare, plain = _of_schema(schema)
        # UUIDs and a number: nothing is to be escaped.
        values = claim.job_id.hex, claim.attempt, claim.worker_id.hex
        if self._is_direct is None:
            session = self._first_value(f"SELECT pg_backend_pid(); {plain % values}; COMMIT")
            self._is_direct = session == str(self._driver.info.backend_pid)
        elif (prepared := self._prepared()) is None:
            self._execute(f"{plain % values}; COMMIT")
        else:
            run = "EXECUTE {} ('{}', {}, '{}'); COMMIT".format(name, *values)
            key = name.encode(), ()
            if key not in prepared:
                run = f"{prepare}; {run}"
                prepared[key] = name.encode()
            try:
                self._execute(run)
            except Exception as error:
                if getattr(error, "sqlstate", None) in _NOT_ITS_OWN:
                    self._is_direct = False
                raise

    def _prepared(self) -> Any:
        """Return which statements are prepared, by psycopg's own account; None: none may be.

        To it ours is one of its own. It has the server forget all of them after a rollback, or the oldest of too many.
        """
        if not (self._is_direct and self._driver.prepared_max):
            return None
        if (
            self._driver.prepare_threshold is None
        ):  # as the documentation of psycopg advises for poolers
            return None
        return getattr(getattr(self._driver, "_prepared", None), "_names", None)

    def _execute(self, statements: str) -> None:
        """By libpq: a cursor of psycopg costs as much as the completion.

        On a thread in one call. It would take turns with other threads for each part of the answer.
        """
        encoded = statements.encode(self._encoding)
        if self._run_async is not None:
            result = self._run_async(lambda driver: _last_result(driver, encoded))
        else:
            with self._driver.lock:
                result = self._driver.pgconn.exec_(encoded)
        if result.status not in self._good:
            from psycopg.errors import error_from_result

            raise error_from_result(result)

    def _first_value(self, statements: str) -> str:
        """Execute them as psycopg does it, and return what the first one has selected."""
        encoded = statements.encode(self._encoding)
        if self._run_async is not None:
            cursor = self._run_async(lambda driver: driver.execute(encoded, prepare=False))
        else:
            cursor = self._driver.execute(encoded, prepare=False)
        return str(cursor.pgresult.get_value(0, 0).decode())


async def _last_result(driver: Any, statements: bytes) -> Any:
    from psycopg.generators import execute

    async with driver.lock:
        driver.pgconn.send_query(statements)
        return (await driver.wait(execute(driver.pgconn)))[-1]
