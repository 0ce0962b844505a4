"""PostgreSQL: claim and batched completion in one statement each."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from functools import cache, cached_property, partial
from operator import itemgetter
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    ColumnElement,
    Connection,
    Integer,
    SmallInteger,
    String,
    TableClause,
    TextClause,
    TextualSelect,
    Uuid,
    bindparam,
    cast,
    column,
    func,
    literal,
    select,
    text,
    update,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from sqlalchemy_jobs.claims import ALONE_FROM, Claim, Due, Lane, LimitedKey, LimitedLane, Wanted
from sqlalchemy_jobs.columns import utc_datetime
from sqlalchemy_jobs.dialects.base import (
    CLAIMED,
    MIGRATION_WAIT,
    Dialect,
    SessionLocks,
    Transaction,
    claim_of,
    waited_in_vain,
)
from sqlalchemy_jobs.dialects.completing import LEASE_LOST, Completing
from sqlalchemy_jobs.dialects.listening import CHANNEL_OF_TABLE, Listening, table_of
from sqlalchemy_jobs.errors import EngineError, MigrationError
from sqlalchemy_jobs.inserts import HEARD
from sqlalchemy_jobs.states import JobState
from sqlalchemy_jobs.tables import (
    BEGUN,
    HAS_NO_SLOT,
    TO_JOB,
    final,
    jobs,
    limits,
    schema_of,
    workers,
)

_CONFLICTS = (
    "40001",  # serialization failure
    "40P01",  # deadlock detected
    "55P03",  # lock not available
    "26000",  # no such prepared statement: a pooler that was not noticed has gone to another session
)

CANCEL_TIMEOUT = 5.0
"""Seconds for which a server that does not answer a request to cancel holds up the next one."""
_MIGRATION_LOCK = int.from_bytes(b"sajobs")
_SHADOWED = """
SELECT nspname FROM pg_catalog.pg_class JOIN pg_catalog.pg_namespace ON pg_namespace.oid = relnamespace
WHERE pg_class.oid = to_regclass('sajobs_job') AND nspname <> current_schema()
"""

# A loose index scan: one descent for each lane, however many jobs lie in it.
_LANES = """
WITH RECURSIVE lane (queue, priority, run_at) AS (
  (SELECT queue, priority, run_at FROM {jobs}
   WHERE state = 'ready' AND limit_key IS NULL
   ORDER BY queue, priority, run_at LIMIT 1)
  UNION ALL
  SELECT next.queue, next.priority, next.run_at
  FROM lane CROSS JOIN LATERAL (
    SELECT queue, priority, run_at FROM {jobs}
    WHERE state = 'ready' AND limit_key IS NULL AND (queue, priority) > (lane.queue, lane.priority)
    ORDER BY queue, priority, run_at LIMIT 1) next
)
SELECT queue, priority, CAST(extract(epoch FROM run_at - clock_timestamp()) AS float8) AS first_in, (
  SELECT CAST(extract(epoch FROM job.run_at - clock_timestamp()) AS float8) FROM {jobs} job
  WHERE job.state = 'ready' AND job.limit_key IS NULL
    AND job.queue = lane.queue AND job.priority = lane.priority AND job.run_at > now()
  ORDER BY job.run_at LIMIT 1) AS next_in
FROM lane
"""

# The same, by key, queue and priority. LIMIT 1 keeps the planner from joining with all jobs, which it takes for none when
# it has last seen an empty table; of what is running it would then read all, but for a condition that it sees nothing in.
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

# The due jobs of each lane are locked in the innermost query: a sort or a UNION above it would lock more than
# is returned. The uncorrelated ARRAY is estimated at ten rows, so the plan is the same with absent,
# empty or wrong statistics. The worker's row is locked so that whoever declares it dead waits for this
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
        AND job.kind = ANY (CAST(:kinds AS varchar[]))
        AND (job.crashes = 0 OR NOT :ahead)
        AND (job.crashes >= {alone_from} AND job.kind <> ALL (CAST(:never_alone AS varchar[]))) = :suspects
        {and_keys_are_free}
      ORDER BY job.run_at, job.id LIMIT lane.share FOR NO KEY UPDATE SKIP LOCKED) due
    WHERE lane.pool = wanted.pool LIMIT wanted.room) taken
  LIMIT :total))
RETURNING {claimed}
"""
# The same for keys of limits whose rows are locked: what is running is counted by the snapshot of this statement, which
# is later than the locks. Each key is in one queue here, so none is counted for twice.
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
_CLAIMED = """id, attempt, kind, queue, CAST(payload AS text) AS payload, failures, max_attempts, headers, crashes, scheduled_at,
  priority, CAST(extract(epoch FROM run_at) * 1000000 AS bigint) AS run_at"""
_RING = f"""
SELECT pg_notify({CHANNEL_OF_TABLE}, queue)
FROM unnest(CAST(:queues AS varchar[])) AS queue WHERE {HEARD}
"""
_IDS = cast(bindparam("ids", type_=String), ARRAY(Uuid()))
_ORDER = itemgetter(len(CLAIMED) - 2, len(CLAIMED) - 1, 0)
# A number is read ten times as fast as a time.
_COLUMNS: tuple[Any, ...] = (
    *CLAIMED[:4],
    column("payload", String),
    *CLAIMED[5:-1],
    column("run_at", BigInteger),
)

# A job that gives up its slot changes a key. Its keys are locked as well, or the UPDATE would wait for whoever
# refers to it (see lock_keys). Not in every claim: even where no row needs it, it costs 0.1 ms.
_KEYS_ARE_FREE = """AND CASE WHEN job.unique_slot IS NULL OR job.unique_states & {running} <> 0 THEN true
          ELSE EXISTS (SELECT FROM {jobs} same WHERE same.id = job.id FOR UPDATE SKIP LOCKED) END"""


def _schema(session: Session) -> str | None:
    return schema_of(session.connection(bind_arguments=TO_JOB))


# Joined with the settings that there are: the first two came with PostgreSQL 14.
_LIMITS = """
SELECT set_config(known.name, wanted.value, false)
FROM pg_catalog.pg_settings known
JOIN (VALUES ('idle_session_timeout', :seconds || 's'),
             ('client_connection_check_interval', '1s'),
             ('tcp_keepalives_idle', '5'),
             ('tcp_keepalives_interval', '2'),
             ('tcp_keepalives_count', '3')) wanted (name, value) ON wanted.name = known.name
"""
_HELD = """
SELECT (classid::bigint << 32) | objid::bigint AS key
FROM pg_catalog.pg_locks
WHERE locktype = 'advisory' AND objsubid = 1 AND granted
  AND database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
"""


def _lock_key(worker_id: ColumnElement[Any]) -> ColumnElement[int]:
    return func.hashtextextended(cast(worker_id, String), 0, type_=BigInteger)


class AdvisoryLocks(SessionLocks):
    limits = text(_LIMITS).bindparams(bindparam("seconds", type_=Integer))
    session = func.pg_backend_pid()
    server_start = func.pg_postmaster_start_time(type_=utc_datetime())
    is_free = _lock_key(workers.c.id).not_in(text(_HELD).columns(column("key", BigInteger)))

    def session_of(self, driver: Any) -> int | None:
        if hasattr(driver, "get_server_pid"):  # asyncpg
            return int(driver.get_server_pid())
        return getattr(getattr(driver, "info", None), "backend_pid", None)

    def take(self, worker_id: uuid.UUID) -> ColumnElement[bool]:
        return func.pg_try_advisory_lock(_lock_key(literal(worker_id, Uuid())))


@cache
def _lanes(schema: str | None) -> TextClause:
    return text(_in_schema(_LANES, schema))


@cache
def _limited_lanes(schema: str | None) -> TextClause:
    lanes = _LIMITED_LANES
    for place, behind in (("after", "CAST(:after AS varchar)"), ("here", "here.limit_key")):
        first = _FIRST_OF_KEY_BEHIND.replace("{behind}", behind)
        lanes = lanes.replace(f"{{first_of_key_behind_{place}}}", first)
    return text(_in_schema(lanes, schema))


@cache
def _ring(schema: str | None) -> TextClause:
    return text(_in_schema(_RING, schema)).bindparams(bindparam("queues", type_=ARRAY(String)))


@cache
def _claim(schema: str | None, free_slots: bool) -> TextualSelect:
    return (
        _claiming(_CLAIM, schema, free_slots)
        .bindparams(
            bindparam("lane_pools", type_=ARRAY(String)),
            bindparam("lane_queues", type_=ARRAY(String)),
            bindparam("lane_shares", type_=ARRAY(Integer)),
            bindparam("mark_run_ats", type_=ARRAY(utc_datetime())),
            bindparam("mark_ids", type_=ARRAY(Uuid())),
            bindparam("ahead", type_=Boolean),
            bindparam("durable", type_=Boolean),
        )
        .columns(*_COLUMNS)
    )


@cache
def _claim_limited(schema: str | None, free_slots: bool) -> TextualSelect:
    return (
        _claiming(_CLAIM_LIMITED, schema, free_slots)
        .bindparams(
            bindparam("keys", type_=ARRAY(String)),
            bindparam("key_pools", type_=ARRAY(String)),
            bindparam("key_queues", type_=ARRAY(String)),
            bindparam("mosts", type_=ARRAY(Integer)),
            bindparam("allowed", type_=ARRAY(Integer)),
            bindparam("lane_keys", type_=ARRAY(String)),
            bindparam("began_at", type_=utc_datetime()),
        )
        .columns(*_COLUMNS, column("limit_key"))
    )


def _claiming(statement: str, schema: str | None, free_slots: bool) -> TextClause:
    """Return a claim with the parameters that all claims have."""
    statement = statement.replace("{and_keys_are_free}", _KEYS_ARE_FREE if free_slots else "")
    return text(_in_schema(statement, schema)).bindparams(
        bindparam("pools", type_=ARRAY(String)),
        bindparam("rooms", type_=ARRAY(Integer)),
        bindparam("lane_priorities", type_=ARRAY(SmallInteger)),
        bindparam("kinds", type_=ARRAY(String)),
        bindparam("never_alone", type_=ARRAY(String)),
        bindparam("worker_id", type_=Uuid()),
        bindparam("total", type_=Integer),
        bindparam("suspects", type_=Boolean),
    )


def _in_schema(statement: str, schema: str | None) -> str:
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
    return '"' + _doubled(name).replace(":", r"\:") + '"'


def _doubled(name: str) -> str:
    return name.replace('"', '""')


class PostgreSQL(Dialect):
    label = "PostgreSQL"
    oldest = (13,)
    why_oldest = "this library is tested with"
    session_locks = AdvisoryLocks()
    single_statements = True
    claimed = (*CLAIMED[:4], cast(jobs.c.payload, String).label("payload"), *CLAIMED[5:])
    ear = Listening

    def level_of_a_statement(self, session: Session) -> str:
        level = func.current_setting("default_transaction_isolation")
        return str(session.scalar(select(level), bind_arguments=TO_JOB))

    def lanes(self, session: Session, queues: Sequence[str]) -> dict[Lane, Due]:
        found = session.execute(_lanes(_schema(session)), bind_arguments=TO_JOB)
        return {
            (row.queue, row.priority): Due(row.first_in, row.next_in)
            for row in found
            if not queues or row.queue in queues
        }

    def limited_lanes(self, session: Session, after: str, most: int) -> list[LimitedLane]:
        found = session.execute(
            _limited_lanes(_schema(session)), {"after": after, "most": most}, bind_arguments=TO_JOB
        )
        return [LimitedLane(*row) for row in found]

    def ring(self, session: Session, queues: Collection[str]) -> None:
        session.execute(
            _ring(schema := _schema(session)),
            {"queues": list(queues) or [""], "table": table_of(schema)},
            bind_arguments=TO_JOB,
        )

    def claim(self, session: Session, wanted: Wanted) -> list[Claim]:
        rooms, lanes = wanted.rooms(), wanted.in_turn()
        marks = [wanted.marks.get(lane, (None, None)) for lane in lanes]
        rows = session.execute(
            _claim(_schema(session), wanted.free_slots),
            {
                "pools": list(rooms),
                "rooms": list(rooms.values()),
                "lane_pools": [wanted.pool(queue) for queue, _ in lanes],
                "lane_queues": [queue for queue, _ in lanes],
                "lane_priorities": [priority for _, priority in lanes],
                "lane_shares": [wanted.shares.get(lane, wanted.room[lane[0]]) for lane in lanes],
                "mark_run_ats": [run_at for run_at, _ in marks],
                "mark_ids": [job_id for _, job_id in marks],
                "kinds": list(wanted.kinds),
                "never_alone": list(wanted.never_alone),
                "worker_id": wanted.worker_id,
                "total": wanted.total,
                "suspects": wanted.suspects,
                "ahead": wanted.ahead,
                "durable": wanted.durable,
            },
            bind_arguments=TO_JOB,
        ).all()
        # RETURNING has no order.
        return [claim_of(row, row[1], wanted.worker_id) for row in sorted(rows, key=_ORDER)]

    def claim_limited(
        self, session: Session, wanted: Wanted, keys: Sequence[LimitedKey], began_at: datetime
    ) -> dict[str, list[Claim]]:
        ordered = [each for each in keys if each.numbers.ordered]
        claims = super().claim_limited(session, wanted, ordered, began_at)
        rooms = Counter(wanted.rooms())
        rooms.subtract(wanted.pool(each.queue) for found in claims.values() for each in found)
        total = wanted.total - sum(map(len, claims.values()))
        others = [each for each in keys if not each.numbers.ordered]
        if not others or total <= 0:
            return claims
        rows = session.execute(
            _claim_limited(_schema(session), wanted.free_slots),
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
        for row in sorted(rows, key=_ORDER):
            claims.setdefault(row.limit_key, []).append(claim_of(row, row[1], wanted.worker_id))
        return claims

    def complete_many(
        self,
        session: Session,
        worker_id: uuid.UUID,
        attempt: int,
        ids: Sequence[uuid.UUID],
    ) -> Iterable[uuid.UUID]:
        # One text: a driver spends more on an array of UUIDs than on all the rest.
        run = {"ids": f"{{{','.join([each.hex for each in ids])}}}", "in_attempt": attempt}
        completed: Any = session.execute(
            self._complete_many, run | {"by_worker": worker_id}, bind_arguments=TO_JOB
        )
        if completed.rowcount == len(ids):
            return ids
        return session.scalars(self._completed, run, bind_arguments=TO_JOB).all()

    @cached_property
    def _completed(self) -> Any:
        """Which have succeeded: by this very run, or the attempt would be another one."""
        return select(jobs.c.id).where(
            jobs.c.id == func.any(_IDS),
            jobs.c.attempt == bindparam("in_attempt"),
            jobs.c.state == JobState.SUCCEEDED.value,
        )

    @cached_property
    def _complete_many(self) -> Any:
        ours = (
            jobs.c.attempt == bindparam("in_attempt"),
            jobs.c.worker_id == bindparam("by_worker"),
        )
        free = select(jobs.c.id).where(jobs.c.id == func.any(_IDS), *ours).order_by(jobs.c.id)
        # Giving up a slot changes a key of the row, so nobody may refer to it meanwhile: see lock_keys.
        without = free.where(HAS_NO_SLOT)
        with_slot = free.where(~HAS_NO_SLOT)
        locked = func.array_cat(
            func.array(without.with_for_update(key_share=True, skip_locked=True).scalar_subquery()),
            func.array(with_slot.with_for_update(skip_locked=True).scalar_subquery()),
        )
        return (
            update(jobs)
            .where(jobs.c.id == func.any(locked), *ours)
            .values(**final(JobState.SUCCEEDED), **BEGUN)
        )

    def completing_commit(self, connection: Connection, claim: Claim) -> Callable[[], None] | None:
        # psycopg 3 sees that the transaction has ended and sends no second COMMIT; other drivers would, or refuse
        # two statements.
        if connection.dialect.driver not in ("psycopg", "psycopg_async"):
            return None
        return partial(Completing.of(connection).commit, schema_of(connection), claim)

    def is_lease_lost(self, error: BaseException) -> bool:
        return LEASE_LOST in str(getattr(error, "orig", None))

    def migrating_alone(
        self, connection: Connection, schema: str | None
    ) -> AbstractContextManager[object]:
        began_at = connection.scalar(select(func.now()))
        level = connection.scalar(select(func.current_setting("transaction_isolation")))
        # now() stands still within a transaction.
        if level != "read committed" or began_at != connection.scalar(select(func.now())):
            raise EngineError(
                f"the connection is at {level!r}, or in AUTOCOMMIT: a migration could not see what another one has "
                'done; migrate at READ COMMITTED, with engine.execution_options(isolation_level="READ COMMITTED")'
            )
        if schema is None and (other := connection.scalar(text(_SHADOWED))) is not None:
            raise EngineError(
                f'the tables that the search_path leads to are in the schema "{other}", not in the one that new tables '
                f'are made in: say which is meant, schema="{other}" or another (--schema on the command line)'
            )
        self._wait_for_other_migrations(connection)
        return nullcontext()

    def _wait_for_other_migrations(self, connection: Connection) -> None:
        """Take the lock, which is held until the transaction ends: DDL is part of it."""
        before = connection.scalar(select(func.current_setting("lock_timeout")))
        connection.execute(select(func.set_config("lock_timeout", f"{MIGRATION_WAIT}s", True)))
        try:
            connection.execute(select(func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
        except DBAPIError as error:
            if self.is_conflict(error):
                raise MigrationError(waited_in_vain("pg_stat_activity")) from error
            raise
        connection.execute(select(func.set_config("lock_timeout", before, True)))

    def locked(
        self, connection: Connection, tables: Sequence[TableClause]
    ) -> AbstractContextManager[object]:
        name = connection.dialect.identifier_preparer.format_table
        connection.exec_driver_sql(
            f"LOCK TABLE {', '.join(name(each) for each in tables)} IN ACCESS EXCLUSIVE MODE"
        )
        return nullcontext()

    def cancel_statement(self, cancellable: Any, transaction: Transaction) -> None:
        if hasattr(cancellable, "cancel_safe"):  # psycopg
            cancellable.cancel_safe(timeout=CANCEL_TIMEOUT)
        else:  # psycopg2
            cancellable.cancel()

    def _is_conflict(self, error: BaseException | None) -> bool:
        state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
        return state in _CONFLICTS
