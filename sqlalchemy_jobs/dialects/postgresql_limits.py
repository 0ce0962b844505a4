"""PostgreSQL: the statements for jobs that count against limits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import cache
from itertools import accumulate
from typing import Any

from sqlalchemy import (
    ARRAY,
    String,
    TextClause,
    TextualSelect,
    bindparam,
    cast,
    column,
    text,
)
from sqlalchemy.orm import Session

from sqlalchemy_jobs.claims import Claim, LimitedKey, LimitedLane, Wanted
from sqlalchemy_jobs.dialects.claiming import CLAIMED, claim_of
from sqlalchemy_jobs.dialects.limits import LimitStatements
from sqlalchemy_jobs.dialects.postgresql_claims import (
    COLUMNS,
    ORDER,
    array_of,
    as_psycopg_takes,
    claiming,
    in_schema,
    in_utc,
    is_psycopg,
    plain_cursor,
    schema_in,
)
from sqlalchemy_jobs.tables import TO_JOB, jobs, schema_of

# A loose index scan, by key, queue and priority. LIMIT 1 keeps the planner from joining with all jobs, which it takes for
# none when it has last seen an empty table; of what is running it would then read all, but for a condition that it
# sees nothing in.
_LIMITED_LANES = """
WITH RECURSIVE lane (number, limit_key, queue, priority, run_at, id, kind, crashes) AS (
  (SELECT 1, limit_key, queue, priority, run_at, id, kind, crashes FROM {jobs}
   WHERE id = {first_of_key_behind_after} LIMIT 1)
  UNION ALL
  SELECT here.number + 1, next.limit_key, next.queue, next.priority, next.run_at, next.id, next.kind, next.crashes
  FROM lane here CROSS JOIN LATERAL (
    SELECT * FROM {jobs} WHERE id = coalesce(
      (SELECT id FROM {jobs} job
       WHERE state = 'ready' AND limit_key IS NOT NULL AND limit_key = here.limit_key
         AND (queue, priority) > (here.queue, here.priority) ORDER BY queue, priority, run_at, id LIMIT 1),
      {first_of_key_behind_here}) LIMIT 1) next
  WHERE here.number < :most
)
SELECT lane.limit_key, queue, priority,
  CAST(extract(epoch FROM run_at - clock_timestamp()) AS float8) AS due, kind, crashes,
  (SELECT count(*) FROM {jobs} job WHERE job.limit_key = lane.limit_key AND {is_running}) AS running,
  CAST(coalesce(extract(epoch FROM known.next_at - clock_timestamp()), 0) AS float8) AS opens,
  coalesce(known.is_known, false) AS is_known,
  EXISTS (SELECT FROM {jobs} job
    WHERE state = 'ready' AND limit_key IS NOT NULL AND job.limit_key = lane.limit_key AND job.queue = lane.queue
      AND job.priority = lane.priority AND (job.run_at, job.id) > (lane.run_at, lane.id)) AS has_more
FROM lane LEFT JOIN LATERAL (
  SELECT next_at, true AS is_known FROM {limits} WHERE limit_key = lane.limit_key LIMIT 1) known ON true
ORDER BY lane.number
"""
_FIRST_OF_KEY_BEHIND = """(SELECT id FROM {jobs} job
     WHERE state = 'ready' AND limit_key IS NOT NULL AND limit_key = (
       SELECT limit_key FROM {jobs} next
       WHERE state = 'ready' AND limit_key IS NOT NULL AND limit_key > {behind} ORDER BY limit_key LIMIT 1)
     ORDER BY queue, priority, run_at, id LIMIT 1)"""
# Lost in a crash of the server they are made again.
_ADD_KEYS = """
INSERT INTO {limits} (limit_key, used_at)
SELECT limit_key, clock_timestamp()
FROM unnest(CAST(:keys AS varchar[])) AS key (limit_key)
CROSS JOIN (SELECT set_config('synchronous_commit', 'off', true)) unflushed
ON CONFLICT DO NOTHING
"""

# As the claim of lanes, for keys of limits whose rows are locked: what is running is counted by the snapshot of this
# statement, which is later than the locks. Each key is in one queue here, so none is counted for twice.
_CLAIM_LIMITED = """
WITH wanted (pool, room) AS MATERIALIZED (
  SELECT * FROM unnest(CAST(:pools AS varchar[]), CAST(:rooms AS int[]))
), limited (limit_key, pool, queue, most, allowed, first, last) AS MATERIALIZED (
  SELECT * FROM unnest(CAST(:keys AS varchar[]), CAST(:key_pools AS varchar[]), CAST(:key_queues AS varchar[]),
    CAST(:mosts AS int[]), CAST(:allowed AS int[]), CAST(:firsts AS int[]), CAST(:lasts AS int[]))
    AS key (limit_key, pool, queue, most, allowed, first, last) {that_is_locked}
)
UPDATE {jobs}
SET state = 'running', attempt = attempt + 1, worker_id = :worker_id, started_at = {began_at},
  unique_slot = CASE WHEN unique_states & {running} <> 0 THEN unique_slot END
WHERE id = ANY (ARRAY(
  SELECT taken.id
  FROM (SELECT 1 FROM {workers} WHERE id = :worker_id AND state = 'alive' FOR KEY SHARE) alive
  CROSS JOIN wanted
  CROSS JOIN LATERAL (
    SELECT due.id
    FROM limited
    CROSS JOIN LATERAL (
      SELECT least(limited.most, CASE WHEN limited.allowed IS NOT NULL THEN greatest(0, limited.allowed - (
        SELECT count(*) FROM {jobs} job WHERE job.limit_key = limited.limit_key AND {is_running})) END) AS room
      OFFSET 0  -- or it would count twice
    ) free
    CROSS JOIN LATERAL (
      SELECT job.id
      FROM unnest((CAST(:lane_priorities AS smallint[]))[limited.first : limited.last]) AS lane (priority)
      CROSS JOIN LATERAL (
        SELECT job.id FROM {jobs} job
        WHERE job.state = 'ready' AND job.limit_key IS NOT NULL AND job.limit_key = limited.limit_key
          AND job.queue = limited.queue AND job.priority = lane.priority AND job.run_at <= now()
          AND job.kind = ANY (ARRAY(SELECT unnest(CAST(:kinds AS varchar[]))))
          AND (job.crashes >= {alone_from} AND job.kind <> ALL (CAST(:never_alone AS varchar[]))) = :suspects
          {and_keys_are_free}
        ORDER BY job.run_at, job.id LIMIT free.room FOR NO KEY UPDATE SKIP LOCKED) job
      LIMIT free.room) due
    WHERE limited.pool = wanted.pool LIMIT wanted.room) taken
  LIMIT :total))
RETURNING {claimed}, limit_key
"""
# In one round trip the claim must know which rows were locked by the statement before it, and not by somebody else.
_LOCK = """
SELECT set_config('sajobs.locked', CAST(ARRAY(
  SELECT locked.limit_key FROM unnest(CAST(:keys AS varchar[])) AS key (limit_key) CROSS JOIN LATERAL (
    SELECT limit_key FROM {limits} WHERE limit_key = key.limit_key LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED) locked
  ) AS text), true)
"""
_THAT_IS_LOCKED = """
    JOIN unnest(CAST(current_setting('sajobs.locked') AS varchar[])) AS locked (limit_key) USING (limit_key)"""


@cache
def _limited_lanes(schema: str | None) -> TextClause:
    lanes = _LIMITED_LANES
    for place, behind in (("after", "CAST(:after AS varchar)"), ("here", "here.limit_key")):
        first = _FIRST_OF_KEY_BEHIND.replace("{behind}", behind)
        lanes = lanes.replace(f"{{first_of_key_behind_{place}}}", first)
    return text(in_schema(lanes, schema))


@cache
def _add_keys(schema: str | None) -> TextClause:
    return text(in_schema(_ADD_KEYS, schema)).bindparams(bindparam("keys", type_=ARRAY(String)))


@cache
def _lock(schema: str | None) -> str:
    return as_psycopg_takes(text(in_schema(_LOCK, schema)))


@cache
def _claim_limited(
    schema: str | None, free_slots: bool, at_once: bool
) -> tuple[TextualSelect, str]:
    statement = _CLAIM_LIMITED.replace("{that_is_locked}", _THAT_IS_LOCKED if at_once else "")
    statement = statement.replace("{began_at}", "clock_timestamp()" if at_once else ":began_at")
    return claiming(statement, schema, free_slots, *COLUMNS, column("limit_key"))


class PostgreSQLLimits(LimitStatements):
    claimed = (*CLAIMED[:4], cast(jobs.c.payload, String).label("payload"), *CLAIMED[5:])

    def lanes(self, session: Session, after: str, most: int) -> list[LimitedLane]:
        found = session.execute(
            _limited_lanes(schema_in(session)),
            {"after": after, "most": most},
            bind_arguments=TO_JOB,
        )
        return [LimitedLane(*row) for row in found.all()]

    def add_keys(self, session: Session, keys: Sequence[str]) -> None:
        session.execute(_add_keys(schema_in(session)), {"keys": list(keys)}, bind_arguments=TO_JOB)

    def claim(
        self, session: Session, wanted: Wanted, keys: Sequence[LimitedKey], began_at: datetime
    ) -> dict[str, list[Claim]]:
        ordered = [each for each in keys if each.numbers.ordered]
        claims = super().claim(session, wanted, ordered, began_at)
        rooms = Counter(wanted.rooms())
        rooms.subtract(wanted.pool(each.queue) for found in claims.values() for each in found)
        total = wanted.total - sum(map(len, claims.values()))
        others = [each for each in keys if not each.numbers.ordered]
        if not others or total <= 0:
            return claims
        statement, _ = _claim_limited(schema_in(session), wanted.free_slots, False)
        values = _values(replace(wanted, total=total), rooms, others) | {"began_at": began_at}
        rows = session.execute(statement, values, bind_arguments=TO_JOB).all()
        return claims | _by_key(wanted, rows)

    def claim_at_once(
        self, session: Session, wanted: Wanted, keys: Sequence[LimitedKey]
    ) -> dict[str, list[Claim]] | None:
        connection = session.connection(bind_arguments=TO_JOB)
        if connection.dialect.is_async or not (is_psycopg(connection) and _has_pipeline()):
            return None
        schema = schema_of(connection)
        _, plain = _claim_limited(schema, wanted.free_slots, True)
        values = _values(wanted, wanted.rooms(), keys)
        cursor = plain_cursor(connection)
        try:
            # One transaction, also in autocommit; of what fails in a pipeline, nothing behind it is done.
            with cursor.connection.pipeline():
                # Not prepared: a plan that was made for few keys would be kept when there are many.
                cursor.connection.execute(_lock(schema), {"keys": values["keys"]}, prepare=False)
                cursor.execute(plain, values)
            rows = in_utc(cursor.fetchall())
        except BaseException as error:
            if (
                cursor.connection.pgconn.pipeline_status
            ):  # it broke in the midst: nothing else can be sent
                cursor.connection.close()
            connection._handle_dbapi_exception(error, plain, values, None, None)
        return _by_key(wanted, rows)


def _has_pipeline() -> bool:
    """Tell whether several statements can be sent at once, by a libpq that is not too old."""
    from psycopg import capabilities

    return capabilities.has_pipeline()


def _values(wanted: Wanted, rooms: Mapping[str, int], keys: Sequence[LimitedKey]) -> dict[str, Any]:
    lasts = list(accumulate(len(each.priorities) for each in keys))
    firsts = (last + 1 - len(each.priorities) for each, last in zip(keys, lasts, strict=True))
    return {
        "pools": array_of(rooms),
        "rooms": array_of(rooms.values()),
        "keys": array_of(each.key for each in keys),
        "key_pools": array_of(wanted.pool(each.queue) for each in keys),
        "key_queues": array_of(each.queue for each in keys),
        "mosts": array_of(each.most for each in keys),
        "allowed": array_of(each.numbers.concurrency for each in keys),
        "firsts": array_of(firsts),
        "lasts": array_of(lasts),
        "lane_priorities": array_of(n for each in keys for n in each.priorities),
        "kinds": array_of(wanted.kinds),
        "never_alone": array_of(wanted.never_alone),
        "worker_id": wanted.worker_id,
        "total": wanted.total,
        "suspects": wanted.suspects,
    }


def _by_key(wanted: Wanted, rows: Sequence[Any]) -> dict[str, list[Claim]]:
    claims: dict[str, list[Claim]] = {}
    for row in sorted(rows, key=ORDER):
        claims.setdefault(row[-1], []).append(claim_of(row, row[1], wanted.worker_id))
    return claims
