"""PostgreSQL: claim and batched completion in one statement each."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, cached_property, partial
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Connection,
    Integer,
    String,
    TableClause,
    TextClause,
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

from sqlalchemy_jobs.claims import Claim, Due, Lane, Wanted
from sqlalchemy_jobs.columns import utc_datetime
from sqlalchemy_jobs.dialects.base import (
    MIGRATION_WAIT,
    Dialect,
    Transaction,
    waited_in_vain,
)
from sqlalchemy_jobs.dialects.claiming import claim_of
from sqlalchemy_jobs.dialects.completing import LEASE_LOST, Completing
from sqlalchemy_jobs.dialects.listening import CHANNEL_OF_TABLE, Listening, table_of
from sqlalchemy_jobs.dialects.postgresql_claims import (
    ORDER,
    array_of,
    claim_of_lanes,
    in_schema,
    is_psycopg,
    schema_in,
)
from sqlalchemy_jobs.dialects.postgresql_limits import PostgreSQLLimits
from sqlalchemy_jobs.dialects.sessions import SessionLocks
from sqlalchemy_jobs.errors import EngineError, MigrationError
from sqlalchemy_jobs.inserts import HEARD
from sqlalchemy_jobs.states import JobState
from sqlalchemy_jobs.tables import (
    BEGUN,
    HAS_NO_SLOT,
    TO_JOB,
    final,
    jobs,
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

_RING = f"""
SELECT pg_notify({CHANNEL_OF_TABLE}, queue)
FROM unnest(CAST(:queues AS varchar[])) AS queue WHERE {HEARD}
"""
_IDS = cast(bindparam("ids", type_=String), ARRAY(Uuid()))
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
    return text(in_schema(_LANES, schema))


@cache
def _ring(schema: str | None) -> TextClause:
    return text(in_schema(_RING, schema)).bindparams(bindparam("queues", type_=ARRAY(String)))


class PostgreSQL(Dialect):
    label = "PostgreSQL"
    oldest = (13,)
    why_oldest = "this library is tested with"
    session_locks = AdvisoryLocks()
    level_of_a_statement = func.current_setting("default_transaction_isolation")
    limits = PostgreSQLLimits()
    ear = Listening

    def lanes(self, session: Session, queues: Sequence[str]) -> dict[Lane, Due]:
        found = session.execute(_lanes(schema_in(session)), bind_arguments=TO_JOB)
        return {
            (row.queue, row.priority): Due(row.first_in, row.next_in)
            for row in found
            if not queues or row.queue in queues
        }

    def ring(self, session: Session, queues: Collection[str]) -> None:
        session.execute(
            _ring(schema := schema_in(session)),
            {"queues": list(queues) or [""], "table": table_of(schema)},
            bind_arguments=TO_JOB,
        )

    def claim(self, session: Session, wanted: Wanted) -> list[Claim]:
        rooms, lanes = wanted.rooms(), wanted.in_turn()
        marks = [wanted.marks.get(lane, (None, None)) for lane in lanes]
        values = {
            "pools": array_of(rooms),
            "rooms": array_of(rooms.values()),
            "lane_pools": array_of([wanted.pool(queue) for queue, _ in lanes]),
            "lane_queues": array_of([queue for queue, _ in lanes]),
            "lane_priorities": array_of([priority for _, priority in lanes]),
            "lane_shares": array_of(
                [wanted.shares.get(lane, wanted.room[lane[0]]) for lane in lanes]
            ),
            "mark_run_ats": array_of([run_at for run_at, _ in marks]),
            "mark_ids": array_of([job_id for _, job_id in marks]),
            "kinds": array_of(wanted.kinds),
            "never_alone": array_of(wanted.never_alone),
            "worker_id": wanted.worker_id,
            "total": wanted.total,
            "suspects": wanted.suspects,
            "ahead": wanted.ahead,
            "durable": wanted.durable,
        }
        rows = claim_of_lanes(session, wanted.free_slots, values)
        # RETURNING has no order.
        return [claim_of(row, row[1], wanted.worker_id) for row in sorted(rows, key=ORDER)]

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
        if not is_psycopg(connection):
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

    def bounded_waits(self, session: Session, seconds: int) -> AbstractContextManager[object]:
        of_transaction = select(func.set_config("lock_timeout", f"{seconds}s", True))
        session.execute(of_transaction, bind_arguments=TO_JOB)
        return nullcontext()

    def cancel_statement(self, cancellable: Any, transaction: Transaction) -> None:
        if hasattr(cancellable, "cancel_safe"):  # psycopg
            cancellable.cancel_safe(timeout=CANCEL_TIMEOUT)
        else:  # psycopg2
            cancellable.cancel()

    def _is_conflict(self, error: BaseException | None) -> bool:
        state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
        return state in _CONFLICTS
