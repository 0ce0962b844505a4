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
    Connection,
    String,
    TextClause,
    TextualSelect,
    bindparam,
    cast,
    column,
    text,
)
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from sqlalchemy_jobs.claims import Claim, LimitedKey, LimitedLane, Swept, Wanted
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
  known.limit_key IS NOT NULL AS is_known,
  EXISTS (SELECT FROM {jobs} job
    WHERE state = 'ready' AND limit_key IS NOT NULL AND job.limit_key = lane.limit_key AND job.queue = lane.queue
      AND job.priority = lane.priority AND (job.run_at, job.id) > (lane.run_at, lane.id)) AS has_more
FROM lane LEFT JOIN LATERAL (
  SELECT limit_key, next_at FROM {limits}
  WHERE limit_key >= lane.limit_key ORDER BY limit_key LIMIT 1) known ON known.limit_key = lane.limit_key
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
), limited AS MATERIALIZED ({limited})
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
    CROSS JOIN LATERAL ({due_of_key} LIMIT free.room) due
    WHERE limited.pool = wanted.pool LIMIT wanted.room) taken
  LIMIT :total))
RETURNING {claimed}, limit_key
"""
_OF_THESE_KEYS = """
  SELECT * FROM unnest(CAST(:keys AS varchar[]), CAST(:key_pools AS varchar[]), CAST(:key_queues AS varchar[]),
    CAST(:mosts AS int[]), CAST(:allowed AS int[]), CAST(:firsts AS int[]), CAST(:lasts AS int[]))
    AS key (limit_key, pool, queue, most, allowed, first, last)"""
_DUE_IN_LANES = """
      SELECT job.id
      FROM unnest((CAST(:lane_priorities AS smallint[]))[limited.first : limited.last]) AS lane (priority)
      CROSS JOIN LATERAL (
        SELECT job.id FROM {jobs} job
        WHERE job.state = 'ready' AND job.limit_key IS NOT NULL AND job.limit_key = limited.limit_key
          AND job.queue = limited.queue AND job.priority = lane.priority AND job.run_at <= now()
          AND job.kind = ANY (ARRAY(SELECT unnest(CAST(:kinds AS varchar[]))))
          AND (job.crashes = 0 OR NOT :ahead)
          AND (job.crashes >= {alone_from} AND job.kind <> ALL (CAST(:never_alone AS varchar[]))) = :suspects
          {and_keys_are_free}
        ORDER BY job.run_at, job.id LIMIT free.room FOR NO KEY UPDATE SKIP LOCKED) job"""
# In one round trip the claim must know which rows were locked by the statement before it, and not by somebody else.
_LOCK = """
SELECT set_config('sajobs.locked', CAST(ARRAY(
  SELECT locked.limit_key FROM unnest(CAST(:keys AS varchar[])) AS key (limit_key) CROSS JOIN LATERAL (
    SELECT limit_key FROM {limits} WHERE limit_key = key.limit_key LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED) locked
  ) AS text), true)
"""
# To read all of a small table for each of two hundred keys is not cheaper; nor is it to read and sort all jobs for the first
# five hundred, where nothing is known of how many there are.
_BY_INDEX = (
    "SELECT set_config('enable_seqscan', 'off', true), set_config('enable_bitmapscan', 'off', true)"
)
_THAT_ARE_LOCKED = f"""{_OF_THESE_KEYS}
    JOIN unnest(CAST(current_setting('sajobs.locked') AS varchar[])) AS locked (limit_key) USING (limit_key)"""

# The keys of the next ready jobs: their rows are locked, or made where there are none. They are made in the order of the
# keys, or those who make the same ones would wait for one another. Each of them in one queue here, too: the one whose turn
# it is, or the next by name.
_LOCK_NEXT = """
WITH page AS MATERIALIZED (
  SELECT limit_key, queue FROM {jobs}
  WHERE state = 'ready' AND limit_key IS NOT NULL AND limit_key > CAST(:after AS varchar)
  ORDER BY limit_key LIMIT :most
), key AS MATERIALIZED (
  SELECT limit_key, coalesce(min(queue) FILTER (WHERE queue >= CAST(:turn AS varchar)), min(queue)) AS queue
  FROM page GROUP BY limit_key
), locked AS MATERIALIZED (
  SELECT locked.limit_key
  FROM key CROSS JOIN LATERAL (
    SELECT limit_key FROM {limits} WHERE limit_key = key.limit_key LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED) locked
  WHERE split_part(key.limit_key, '/', 1) = ANY (CAST(:names AS varchar[]))
), made AS (
  INSERT INTO {limits} (limit_key, used_at)
  SELECT limit_key, clock_timestamp() FROM key
  WHERE split_part(limit_key, '/', 1) = ANY (CAST(:names AS varchar[]))
    AND limit_key NOT IN (SELECT limit_key FROM locked)
  ORDER BY limit_key
  ON CONFLICT DO NOTHING RETURNING limit_key
), ours AS (
  SELECT limit_key FROM locked UNION ALL SELECT limit_key FROM made
)
SELECT (SELECT count(*) FROM key),
  CASE WHEN (SELECT count(*) FROM page) = :most THEN (SELECT max(limit_key) FROM key) END,
  set_config('sajobs.locked', CAST(coalesce(array_agg(limit_key), '{{}}') AS text), true),
  set_config('sajobs.queues', CAST(coalesce(array_agg(queue), '{{}}') AS text), true)
FROM ours JOIN key USING (limit_key)
"""
# Whoever makes the row of the same key has it; but one does not wait for somebody who does not come to an end.
_LOCK_NOT_AVAILABLE = "55P03"
_BRIEFLY = "SELECT set_config('lock_timeout', '100ms', true)"
# Half of what a limit lets run is for jobs that begin at once; but where a key has no other job nobody misses it.
_NEXT_KEYS = """
  SELECT key.limit_key, queue.pool, queue, key.most, CASE
    WHEN name.allowed > 1 OR EXISTS (
      SELECT FROM {jobs} job
      WHERE state = 'ready' AND limit_key IS NOT NULL AND job.limit_key = key.limit_key OFFSET 1)
    THEN name.allowed / 2 ELSE name.allowed END AS allowed
  FROM (
    SELECT limit_key, queue, CAST(ceil(CAST(:total AS float8) / count(*) OVER ()) AS int) AS most
    FROM unnest(
      CAST(current_setting('sajobs.locked') AS varchar[]), CAST(current_setting('sajobs.queues') AS varchar[])
    ) AS locked (limit_key, queue)) key
  JOIN unnest(CAST(:names AS varchar[]), CAST(:allowed AS int[])) AS name (name, allowed)
    ON name.name = split_part(key.limit_key, '/', 1)
  JOIN unnest(CAST(:queues AS varchar[]), CAST(:queue_pools AS varchar[])) AS queue (queue, pool) USING (queue)"""
# Limited before it is filtered, or it might read a thousand jobs that are not due.
_FIRST_OF_KEY = """
      SELECT job.id
      FROM (
        SELECT job.* FROM {jobs} job
        WHERE job.state = 'ready' AND job.limit_key IS NOT NULL AND job.limit_key = limited.limit_key
          AND job.queue = limited.queue
        ORDER BY job.priority, job.run_at, job.id LIMIT free.room FOR NO KEY UPDATE SKIP LOCKED) job
      WHERE job.run_at <= now() AND job.crashes = 0
        AND job.kind = ANY (ARRAY(SELECT unnest(CAST(:kinds AS varchar[])))) {and_keys_are_free}"""

_BEGAN_AT = "CASE WHEN NOT :ahead THEN clock_timestamp() END"


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
def _lock_next(schema: str | None) -> str:
    return as_psycopg_takes(text(in_schema(_LOCK_NEXT, schema)))


@cache
def _claim_limited(
    schema: str | None, free_slots: bool, limited: str, due_of_key: str, began_at: str
) -> tuple[TextualSelect, str]:
    statement = _CLAIM_LIMITED.replace("{limited}", limited).replace("{due_of_key}", due_of_key)
    statement = statement.replace("{began_at}", began_at)
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
        self,
        session: Session,
        wanted: Wanted,
        keys: Sequence[LimitedKey],
        began_at: datetime | None,
    ) -> dict[str, list[Claim]]:
        ordered = [each for each in keys if each.numbers.ordered]
        claims = super().claim(session, wanted, ordered, began_at)
        rooms = Counter(wanted.rooms())
        rooms.subtract(wanted.pool(each.queue) for found in claims.values() for each in found)
        total = wanted.total - sum(map(len, claims.values()))
        others = [each for each in keys if not each.numbers.ordered]
        if not others or total <= 0:
            return claims
        statement, _ = _claim_limited(
            schema_in(session), wanted.free_slots, _OF_THESE_KEYS, _DUE_IN_LANES, ":began_at"
        )
        values = _values(replace(wanted, total=total), rooms, others) | {"began_at": began_at}
        rows = session.execute(statement, values, bind_arguments=TO_JOB).all()
        return claims | _by_key(wanted, rows)

    def claim_at_once(
        self, session: Session, wanted: Wanted, keys: Sequence[LimitedKey]
    ) -> dict[str, list[Claim]] | None:
        connection = session.connection(bind_arguments=TO_JOB)
        if not _is_at_once(connection):
            return None
        schema = schema_of(connection)
        _, plain = _claim_limited(
            schema, wanted.free_slots, _THAT_ARE_LOCKED, _DUE_IN_LANES, _BEGAN_AT
        )
        values = _values(wanted, wanted.rooms(), keys)
        lock = _lock(schema), {"keys": values["keys"]}
        rows = _at_once(connection, lock, (plain, values))[-1]
        return _by_key(wanted, in_utc(rows))

    def claim_next(
        self, session: Session, wanted: Wanted, after: str, allowed: Mapping[str, int], most: int
    ) -> Swept | None:
        connection = session.connection(bind_arguments=TO_JOB)
        if not _is_at_once(connection):
            return None
        schema = schema_of(connection)
        _, plain = _claim_limited(schema, wanted.free_slots, _NEXT_KEYS, _FIRST_OF_KEY, "NULL")
        rooms = wanted.rooms()
        of_names = {"names": array_of(allowed)}
        values = of_names | {
            "allowed": array_of(allowed.values()),
            "pools": array_of(rooms),
            "rooms": array_of(rooms.values()),
            "queues": array_of(wanted.room),
            "queue_pools": array_of(map(wanted.pool, wanted.room)),
            "kinds": array_of(wanted.kinds),
            "worker_id": wanted.worker_id,
            "total": wanted.total,
        }
        page = of_names | {"after": after, "most": most, "turn": next(iter(wanted.room))}
        lock = _lock_next(schema), page
        try:
            _, [(count, last, *_)], rows = _at_once(
                connection, (_BRIEFLY, {}), lock, (plain, values)
            )
        except OperationalError as error:
            if getattr(error.orig, "sqlstate", None) != _LOCK_NOT_AVAILABLE:
                raise
            return Swept({}, most, "")
        return Swept(_by_key(wanted, in_utc(rows)), count, last or "")


def _at_once(
    connection: Connection, *statements: tuple[str, dict[str, Any]]
) -> list[Sequence[Any]]:
    """Execute them in one round trip and one transaction, also in autocommit; return the rows of each."""
    cursors = [plain_cursor(connection) for _ in statements]
    driver = cursors[0].connection
    try:
        # Of what fails in a pipeline, nothing behind it is done.
        with driver.pipeline():
            driver.execute(_BY_INDEX)
            for cursor, (statement, values) in zip(cursors, statements, strict=True):
                cursor.execute(statement, values)
        return [cursor.fetchall() for cursor in cursors]
    except BaseException as error:
        if driver.pgconn.pipeline_status:  # it broke in the midst: nothing else can be sent
            driver.close()
        connection._handle_dbapi_exception(error, *statements[-1], None, None)


def _is_at_once(connection: Connection) -> bool:
    """Tell whether several statements can be sent at once: not by a libpq that is too old."""
    if connection.dialect.is_async or not is_psycopg(connection):
        return False
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
        "ahead": wanted.ahead,
        "suspects": wanted.suspects,
    }


def _by_key(wanted: Wanted, rows: Sequence[Any]) -> dict[str, list[Claim]]:
    claims: dict[str, list[Claim]] = {}
    for row in sorted(rows, key=ORDER):
        claims.setdefault(row[-1], []).append(claim_of(row, row[1], wanted.worker_id))
    return claims
