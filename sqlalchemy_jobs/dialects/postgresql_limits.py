"""PostgreSQL: the statements for jobs that count against limits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from functools import cache

from sqlalchemy import (
    ARRAY,
    Integer,
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
from sqlalchemy_jobs.columns import utc_datetime
from sqlalchemy_jobs.dialects.claiming import CLAIMED, claim_of
from sqlalchemy_jobs.dialects.limits import LimitStatements
from sqlalchemy_jobs.dialects.postgresql_claims import (
    COLUMNS,
    ORDER,
    claiming,
    in_schema,
    schema_in,
)
from sqlalchemy_jobs.tables import TO_JOB, jobs

# A loose index scan, by key, queue and priority. LIMIT 1 keeps the planner from joining with all jobs, which it takes for
# none when it has last seen an empty table; of what is running it would then read all, but for a condition that it
# sees nothing in.
_LIMITED_LANES = """
WITH RECURSIVE lane (number, limit_key, queue, priority, run_at, kind, crashes) AS (
  (SELECT 1, limit_key, queue, priority, run_at, kind, crashes FROM {jobs}
   WHERE id = {first_of_key_behind_after} LIMIT 1)
  UNION ALL
  SELECT here.number + 1, next.limit_key, next.queue, next.priority, next.run_at, next.kind, next.crashes
  FROM lane here CROSS JOIN LATERAL (
    SELECT * FROM {jobs} WHERE id = coalesce(
      (SELECT id FROM {jobs} job
       WHERE state = 'ready' AND limit_key IS NOT NULL AND limit_key = here.limit_key
         AND queue = here.queue AND priority > here.priority ORDER BY priority, run_at, id LIMIT 1),
      (SELECT id FROM {jobs} job
       WHERE state = 'ready' AND limit_key IS NOT NULL AND limit_key = here.limit_key
         AND queue > here.queue ORDER BY queue, priority, run_at, id LIMIT 1),
      {first_of_key_behind_here}) LIMIT 1) next
  WHERE here.number < :most
)
SELECT lane.limit_key, queue, priority,
  CAST(extract(epoch FROM run_at - clock_timestamp()) AS float8) AS due, kind, crashes,
  (SELECT count(*) FROM {jobs} job WHERE job.limit_key = lane.limit_key AND {is_running}) AS running,
  CAST(coalesce(extract(epoch FROM known.next_at - clock_timestamp()), 0) AS float8) AS opens,
  known.limit_key IS NOT NULL AS is_known
FROM lane LEFT JOIN {limits} known ON known.limit_key = lane.limit_key
ORDER BY lane.number
"""
_FIRST_OF_KEY_BEHIND = """(SELECT id FROM {jobs} job
     WHERE state = 'ready' AND limit_key IS NOT NULL AND limit_key = (
       SELECT limit_key FROM {jobs} next
       WHERE state = 'ready' AND limit_key IS NOT NULL AND limit_key > {behind} ORDER BY limit_key LIMIT 1)
     ORDER BY queue, priority, run_at, id LIMIT 1)"""

# As the claim of lanes, for keys of limits whose rows are locked: what is running is counted by the snapshot of this
# statement, which is later than the locks. Each key is in one queue here, so none is counted for twice.
_CLAIM_LIMITED = """
WITH wanted (pool, room) AS MATERIALIZED (
  SELECT * FROM unnest(CAST(:pools AS varchar[]), CAST(:rooms AS int[]))
), limited (limit_key, pool, queue, most, allowed) AS MATERIALIZED (
  SELECT * FROM unnest(CAST(:keys AS varchar[]), CAST(:key_pools AS varchar[]), CAST(:key_queues AS varchar[]),
    CAST(:mosts AS int[]), CAST(:allowed AS int[]))
)
UPDATE {jobs}
SET state = 'running', attempt = attempt + 1, worker_id = :worker_id, started_at = :began_at,
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
    ) free
    CROSS JOIN LATERAL (
      SELECT job.id
      FROM unnest(CAST(:lane_keys AS varchar[]), CAST(:lane_priorities AS smallint[])) AS lane (limit_key, priority)
      CROSS JOIN LATERAL (
        SELECT job.id FROM {jobs} job
        WHERE job.state = 'ready' AND job.limit_key IS NOT NULL AND job.limit_key = lane.limit_key
          AND job.queue = limited.queue AND job.priority = lane.priority AND job.run_at <= now()
          AND job.kind = ANY (CAST(:kinds AS varchar[]))
          AND (job.crashes >= {alone_from} AND job.kind <> ALL (CAST(:never_alone AS varchar[]))) = :suspects
          {and_keys_are_free}
        ORDER BY job.run_at, job.id LIMIT free.room FOR NO KEY UPDATE SKIP LOCKED) job
      WHERE lane.limit_key = limited.limit_key LIMIT free.room) due
    WHERE limited.pool = wanted.pool LIMIT wanted.room) taken
  LIMIT :total))
RETURNING {claimed}, limit_key
"""


@cache
def _limited_lanes(schema: str | None) -> TextClause:
    lanes = _LIMITED_LANES
    for place, behind in (("after", "CAST(:after AS varchar)"), ("here", "here.limit_key")):
        first = _FIRST_OF_KEY_BEHIND.replace("{behind}", behind)
        lanes = lanes.replace(f"{{first_of_key_behind_{place}}}", first)
    return text(in_schema(lanes, schema))


@cache
def _claim_limited(schema: str | None, free_slots: bool) -> TextualSelect:
    return (
        claiming(_CLAIM_LIMITED, schema, free_slots)
        .bindparams(
            bindparam("keys", type_=ARRAY(String)),
            bindparam("key_pools", type_=ARRAY(String)),
            bindparam("key_queues", type_=ARRAY(String)),
            bindparam("mosts", type_=ARRAY(Integer)),
            bindparam("allowed", type_=ARRAY(Integer)),
            bindparam("lane_keys", type_=ARRAY(String)),
            bindparam("began_at", type_=utc_datetime()),
        )
        .columns(*COLUMNS, column("limit_key"))
    )


class PostgreSQLLimits(LimitStatements):
    claimed = (*CLAIMED[:4], cast(jobs.c.payload, String).label("payload"), *CLAIMED[5:])

    def lanes(self, session: Session, after: str, most: int) -> list[LimitedLane]:
        found = session.execute(
            _limited_lanes(schema_in(session)),
            {"after": after, "most": most},
            bind_arguments=TO_JOB,
        )
        return [LimitedLane(*row) for row in found]

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
        rows = session.execute(
            _claim_limited(schema_in(session), wanted.free_slots),
            {
                "pools": list(rooms),
                "rooms": list(rooms.values()),
                "keys": [each.key for each in others],
                "key_pools": [wanted.pool(each.queue) for each in others],
                "key_queues": [each.queue for each in others],
                "mosts": [each.most for each in others],
                "allowed": [each.numbers.concurrency for each in others],
                "lane_keys": [each.key for each in others for _ in each.priorities],
                "lane_priorities": [n for each in others for n in each.priorities],
                "kinds": list(wanted.kinds),
                "never_alone": list(wanted.never_alone),
                "worker_id": wanted.worker_id,
                "total": total,
                "suspects": wanted.suspects,
                "began_at": began_at,
            },
            bind_arguments=TO_JOB,
        ).all()
        for row in sorted(rows, key=ORDER):
            claims.setdefault(row.limit_key, []).append(claim_of(row, row[1], wanted.worker_id))
        return claims
