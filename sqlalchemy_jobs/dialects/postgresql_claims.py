"""PostgreSQL: the claim in one statement, and what those of other jobs have of it."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from datetime import UTC
from functools import cache
from operator import itemgetter
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Connection,
    Integer,
    String,
    TextClause,
    TextualSelect,
    Uuid,
    bindparam,
    column,
    text,
)
from sqlalchemy.dialects.postgresql import psycopg
from sqlalchemy.orm import Session

from sqlalchemy_jobs.claims import ALONE_FROM
from sqlalchemy_jobs.columns import utc_datetime
from sqlalchemy_jobs.dialects.claiming import CLAIMED
from sqlalchemy_jobs.states import JobState
from sqlalchemy_jobs.tables import TO_JOB, jobs, limits, schema_of, workers

# The due jobs of each lane are locked in the innermost query: a sort or a UNION above it would lock more than
# is returned. The uncorrelated ARRAY is estimated at ten rows, so the plan is the same with absent,
# empty or wrong statistics. Nor does the planner see the kinds: by statistics that know none of them it would read the whole
# lane and sort it. The worker's row is locked so that whoever declares it dead waits for this
# claim, or is seen by it. A claim lost in a crash of the server is harmless, so it need not be flushed;
# set_config(..., true) ends with the transaction and does not leak through a pooler. now(), not
# clock_timestamp(): only a stable function can be a bound of the scan.
_CLAIM = """
WITH wanted (pool, room) AS MATERIALIZED (
  SELECT * FROM unnest(CAST(:pools AS varchar[]), CAST(:rooms AS int[]))
)
UPDATE {jobs}
SET state = 'running', attempt = attempt + 1, worker_id = :worker_id,
  started_at = CASE WHEN NOT :ahead THEN clock_timestamp() END,
  unique_slot = CASE WHEN unique_states & {running} <> 0 THEN unique_slot END
WHERE id = ANY (ARRAY(
  SELECT taken.id
  FROM (SELECT 1 FROM {workers} WHERE id = :worker_id AND state = 'alive' FOR KEY SHARE) alive
  CROSS JOIN (SELECT set_config('synchronous_commit', CASE WHEN :durable
    THEN current_setting('synchronous_commit') ELSE 'off' END, true)) unflushed
  CROSS JOIN wanted
  CROSS JOIN LATERAL (
    SELECT due.id
    FROM unnest(CAST(:lane_pools AS varchar[]), CAST(:lane_queues AS varchar[]),
        CAST(:lane_priorities AS smallint[]), CAST(:lane_shares AS int[]),
        CAST(:mark_run_ats AS timestamptz[]), CAST(:mark_ids AS uuid[]))
      AS lane (pool, queue, priority, share, run_at, id)
    CROSS JOIN LATERAL (
      SELECT job.id FROM {jobs} job
      WHERE job.state = 'ready' AND job.limit_key IS NULL
        AND job.queue = lane.queue AND job.priority = lane.priority AND job.run_at <= now()
        AND (job.run_at, job.id) >= (coalesce(lane.run_at, '-infinity'), coalesce(lane.id, '{first_id}'))
        AND job.kind = ANY (ARRAY(SELECT unnest(CAST(:kinds AS varchar[]))))
        AND (job.crashes = 0 OR NOT :ahead)
        AND (job.crashes >= {alone_from} AND job.kind <> ALL (CAST(:never_alone AS varchar[]))) = :suspects
        {and_keys_are_free}
      ORDER BY job.run_at, job.id LIMIT lane.share FOR NO KEY UPDATE SKIP LOCKED) due
    WHERE lane.pool = wanted.pool LIMIT wanted.room) taken
  LIMIT :total))
RETURNING {claimed}
"""
_CLAIMED = """id, attempt, kind, queue, CAST(payload AS text) AS payload, failures, max_attempts, headers, crashes, scheduled_at,
  priority, CAST(extract(epoch FROM run_at) * 1000000 AS bigint) AS run_at"""
_SCHEDULED_AT = next(n for n, each in enumerate(CLAIMED) if each is jobs.c.scheduled_at)
ORDER = itemgetter(len(CLAIMED) - 2, len(CLAIMED) - 1, 0)
# A number is read ten times as fast as a time.
COLUMNS: tuple[Any, ...] = (
    *CLAIMED[:4],
    column("payload", String),
    *CLAIMED[5:-1],
    column("run_at", BigInteger),
)

# A job that gives up its slot changes a key. Its keys are locked as well, or the UPDATE would wait for whoever
# refers to it (see lock_keys). Not in every claim: even where no row needs it, it costs 0.1 ms.
_KEYS_ARE_FREE = """AND CASE WHEN job.unique_slot IS NULL OR job.unique_states & {running} <> 0 THEN true
          ELSE EXISTS (SELECT FROM {jobs} same WHERE same.id = job.id FOR UPDATE SKIP LOCKED) END"""


def schema_in(session: Session) -> str | None:
    """Return the schema of the tables; None: where the server looks by default."""
    return schema_of(session.connection(bind_arguments=TO_JOB))


def claim_of_lanes(session: Session, free_slots: bool, values: dict[str, Any]) -> Sequence[Any]:
    """Claim, and return the rows of what was claimed, in no order."""
    connection = session.connection(bind_arguments=TO_JOB)
    statement, plain = _of_lanes(schema_of(connection), free_slots)
    if not is_psycopg(connection):
        return session.execute(statement, values, bind_arguments=TO_JOB).all()
    try:
        return in_utc(_rows(connection, plain, values))
    except BaseException as error:
        # As for any statement: wrapped, and a connection that broke leaves the pool.
        connection._handle_dbapi_exception(error, plain, values, None, None)


def is_psycopg(connection: Connection) -> bool:
    """Tell whether the driver is psycopg 3: four fifths of what a claim costs the client are SQLAlchemy's."""
    return connection.dialect.driver in ("psycopg", "psycopg_async")


def _rows(connection: Connection, statement: str, values: dict[str, Any]) -> Any:
    """Execute a statement by psycopg and return its rows."""
    if not connection.dialect.is_async:
        return plain_cursor(connection).execute(statement, values).fetchall()
    adapted: Any = connection.connection.dbapi_connection
    return adapted.run_async(lambda driver: _awaited_rows(driver, statement, values))


async def _awaited_rows(driver: Any, statement: str, values: dict[str, Any]) -> Any:
    from psycopg import AsyncCursor
    from psycopg.rows import tuple_row

    cursor: Any = AsyncCursor(driver, row_factory=tuple_row)
    await cursor.execute(statement, values)
    return await cursor.fetchall()


def plain_cursor(connection: Connection) -> Any:
    """Return a cursor of psycopg's, on a thread, whose rows are tuples."""
    from psycopg import Cursor
    from psycopg.rows import tuple_row

    driver: Any = connection.connection.dbapi_connection
    return Cursor(driver, row_factory=tuple_row)


def in_utc(rows: Sequence[tuple[Any, ...]]) -> Sequence[tuple[Any, ...]]:
    """Return rows of psycopg's, which reads times in the session's zone."""
    at = _SCHEDULED_AT
    return [
        row if row[at] is None else (*row[:at], row[at].astimezone(UTC), *row[at + 1 :])
        for row in rows
    ]


@cache
def _of_lanes(schema: str | None, free_slots: bool) -> tuple[TextualSelect, str]:
    return claiming(_CLAIM, schema, free_slots, *COLUMNS)


_TYPES: dict[str, Any] = {
    **dict.fromkeys(("suspects", "ahead", "durable"), Boolean),
    "worker_id": Uuid,
    "total": Integer,
    "began_at": utc_datetime(),
}


def claiming(
    statement: str, schema: str | None, free_slots: bool, *columns: Any
) -> tuple[TextualSelect, str]:
    """Return a claim, and as psycopg takes it. Its arrays are texts: a driver spends more on them than on all the rest."""
    keys_are_free = _KEYS_ARE_FREE if free_slots else ""
    plain = text(in_schema(statement.replace("{and_keys_are_free}", keys_are_free), schema))
    names = plain.compile().params
    typed = plain.bindparams(*(bindparam(name, type_=_TYPES.get(name, String)) for name in names))
    return typed.columns(*columns), as_psycopg_takes(plain)


def as_psycopg_takes(statement: TextClause) -> str:
    return str(statement.compile(dialect=psycopg.dialect()))  # type: ignore[no-untyped-call]


def array_of(values: Iterable[Any]) -> str:
    """Return an array as PostgreSQL writes it."""
    texts = [
        "NULL" if each is None else '"' + str(each).replace("\\", r"\\").replace('"', r"\"") + '"'
        for each in values
    ]
    return "{" + ",".join(texts) + "}"


def in_schema(statement: str, schema: str | None) -> str:
    prefix = "" if schema is None else f"{_quoted(schema)}."
    return statement.format(
        jobs=prefix + jobs.name,
        workers=prefix + workers.name,
        limits=prefix + limits.name,
        claimed=_CLAIMED,
        is_running="job.limit_key IS NOT NULL AND job.state IN ('ready', 'running') AND job.state > 'ready'",
        running=JobState.RUNNING.bit,
        alone_from=ALONE_FROM,
        first_id=uuid.UUID(int=0),
    )


def _quoted(name: str) -> str:
    """Quote a name for ``text()``, to which a colon begins a parameter and a percent sign is one."""
    return '"' + doubled(name).replace(":", r"\:") + '"'


def doubled(name: str) -> str:
    return name.replace('"', '""')
