"""The claim goes through its index on every database, whatever lies beside the due jobs."""

import uuid
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy import event, text, update
from sqlalchemy.orm import Session

from sqlalchemy_jobs import Job, Limit, dialects, enqueue_many, job, limited, transitions
from sqlalchemy_jobs.claims import LimitedKey, Wanted
from sqlalchemy_jobs.dialects import postgresql_limits
from sqlalchemy_jobs.dialects.postgresql_claims import plain_cursor
from sqlalchemy_jobs.limits import Numbers
from sqlalchemy_jobs.worker import leases
from tests.conformance.test_transitions import Note
from tests.databases import Database


@job("keyed", limit=Limit(concurrency=1, key="key"))
@dataclass(frozen=True)
class Keyed:
    key: str
    n: int


@job("other")
@dataclass(frozen=True)
class Other:
    n: int


INDEX = {
    "postgresql": "sajobs_job_ready",
    "mysql": "sajobs_job_limited",
    "sqlite": "USING INDEX sajobs_job_ready (state=? AND queue=? AND priority=? AND run_at<?)",
}


def _claim(session: Session, wanted: Wanted) -> None:
    assert len(transitions.claim(session, wanted)) == 10


def _claim_and_free_slots(session: Session, wanted: Wanted) -> None:
    _claim(session, replace(wanted, free_slots=True))


def _look_for_suspects(session: Session, wanted: Wanted) -> None:
    assert transitions.lanes_of_suspects(session, wanted) == []


def _look_where_to_start(session: Session, wanted: Wanted) -> None:
    starts = dialects.of(session).starts(session, wanted.lanes, wanted.kinds)
    assert starts.keys() == {("default", 0)}


def _count_shares(session: Session, wanted: Wanted) -> None:
    queue, priorities = "default", [priority for _, priority in wanted.lanes]
    shares = dialects.of(session).shares(session, queue, priorities, 60.0, wanted.kinds, 10, {})
    assert shares == {("default", -1): 0, ("default", 0): 10}


LOOKS = [
    _claim,
    _claim_and_free_slots,
    _look_for_suspects,
    _look_where_to_start,
    _count_shares,
]


@pytest.mark.parametrize("analysed", [True, False])
@pytest.mark.parametrize("look", LOOKS)
def test_a_claim_goes_through_its_index(
    database: Database, look: Any, analysed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[str, Any]] = []
    with Session(database.engine()) as session:
        _forget(session)
        _fill(session)
        if analysed:
            session.execute(text(f"ANALYZE {'TABLE' * (database.name == 'mysql')} sajobs_job"))
        worker = leases.register(session, timedelta(minutes=5))
        connection = session.connection()
        lanes = dialects.of(session).lanes(session, ())
        event.listen(
            connection,
            "before_cursor_execute",
            lambda _, cursor, sql, values, context, many: sent.append((sql, values)),
        )
        if database.name == "postgresql":  # a claim is executed by psycopg itself
            execute = psycopg.Cursor.execute

            def seen(cursor: Any, sql: Any, values: Any = None, **options: Any) -> Any:
                sent.append((sql, values))
                return execute(cursor, sql, values, **options)

            monkeypatch.setattr(psycopg.Cursor, "execute", seen)
        look(session, Wanted(worker, ["note"], lanes, {"default": 10}, 10))
        *_, last = (each for each in sent if "run_at" in each[0])  # of the last lane
        explain = "EXPLAIN QUERY PLAN" if database.name == "sqlite" else "EXPLAIN"
        plan = connection.exec_driver_sql(f"{explain} {last[0]}", last[1]).all()
    said = "\n".join(str(row) for row in plan).replace("run_at>? AND run_at<?", "run_at<?")
    assert INDEX[database.name] in said, said
    assert "Seq Scan on sajobs_job" not in said, said
    if look is _look_for_suspects:
        assert "Sort" not in said and "filesort" not in said and "TEMP B-TREE" not in said, said
    if look is _look_for_suspects and database.name == "postgresql":
        assert "run_at <=" in said.split("Index Cond:")[1].split("Filter:")[0], said


def test_looking_for_lanes_and_for_what_falls_due_next_goes_through_the_index(
    database: Database,
) -> None:
    sent: list[tuple[str, Any]] = []
    with Session(database.engine()) as session:
        _fill(session)
        session.execute(text(f"ANALYZE {'TABLE' * (database.name == 'mysql')} sajobs_job"))
        connection = session.connection()
        event.listen(
            connection,
            "before_cursor_execute",
            lambda _, cursor, sql, values, context, many: sent.append((sql, values)),
        )
        lanes = dialects.of(session).lanes(session, ())
        assert list(lanes) == [("default", -1), ("default", 0)]
        assert lanes["default", 0].first <= 0
        assert lanes["default", 0].next is None
        assert 3000 < (lanes["default", -1].next or 0) <= 3600
        explain = "EXPLAIN QUERY PLAN" if database.name == "sqlite" else "EXPLAIN"
        for sql, values in list(sent):
            plan = connection.exec_driver_sql(f"{explain} {sql}", values).all()
            said = "\n".join(str(row) for row in plan)
            assert INDEX[database.name].partition(" (")[0].removeprefix("USING INDEX ") in said, (
                said
            )
            assert "Seq Scan on sajobs_job" not in said, said


@pytest.mark.parametrize("plans", ["force_custom_plan", "force_generic_plan"])
@pytest.mark.parametrize(
    "known",
    [
        "nothing",
        "an empty table",
        "a table in which all was done",
        "other kinds, which are done by now",
    ],
)
def test_a_burst_that_the_statistics_know_nothing_of_is_no_surprise(
    postgresql: Database, known: str, plans: str
) -> None:
    """Claims and completions read what they take and little more, however wrong the statistics are."""
    with Session(postgresql.engine()) as session:
        session.execute(text("ALTER TABLE sajobs_job SET (autovacuum_enabled = false)"))
        _forget(session)
        if known == "a table in which all was done":
            _fill(session)
            session.execute(update(Job).values(state="succeeded"))
        elif known.startswith("other"):
            enqueue_many(session, [Other(n) for n in range(20_000)])
        if known != "nothing":
            session.execute(text("ANALYZE sajobs_job"))
        if known.startswith("other"):
            session.execute(update(Job).values(state="succeeded"))
        enqueue_many(session, [Note(str(n)) for n in range(20_000)])
        session.execute(text(f"SET plan_cache_mode = {plans}"))
        worker = leases.register(session, timedelta(minutes=5))
        session.commit()
        lanes = dialects.of(session).lanes(session, ())
        wanted = Wanted(worker, ["note"], lanes, {"default": 100}, 100)
        for _ in range(12):  # so often that a plan that is made once would be kept
            before = session.execute(_READ).one()
            claims = transitions.claim(session, wanted)
            assert len(transitions.complete_many(session, claims)) == 100
            read = session.execute(_READ).one()
            wanted = replace(wanted, marks={("default", 0): claims[-1].mark})
            assert read.seq_scan == before.seq_scan
            assert read.idx_tup_fetch - before.idx_tup_fetch < 1000


_READ = text(
    "SELECT seq_scan, idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relid = to_regclass('sajobs_job')"
)


def _forget(session: Session) -> None:
    """Other tests leave pages and statistics behind."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("TRUNCATE sajobs_job CASCADE"))
        session.execute(text("DELETE FROM pg_statistic WHERE starelid = to_regclass('sajobs_job')"))
        session.commit()  # nothing is due that is added in a transaction that has begun before


def _fill(session: Session) -> None:
    """Due jobs, jobs for later at a better priority, and jobs that have ended.

    So many that PostgreSQL, which looks at the size of the table, does not rightly read all of it.
    """
    notes = [Note(str(n)) for n in range(2000)]
    for options in ({}, {"delay": timedelta(hours=1), "priority": -1}, {"queue": "other"}):
        enqueue_many(session, notes, **options)  # type: ignore[arg-type]
    session.execute(update(Job).where(Job.queue == "other").values(state="succeeded"))


@pytest.mark.parametrize("statistics", ["none", "of an empty table", "of this one"])
@pytest.mark.parametrize("keys", [5, 2000])
def test_a_claim_with_limits_in_one_round_trip_goes_through_indexes(
    postgresql: Database, statistics: str, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also to the rows of the keys, of which all are a few pages."""
    plans: list[str] = []
    at_once = postgresql_limits._at_once

    def explained(connection: Any, *statements: tuple[str, dict[str, Any]]) -> Any:
        cursor = plain_cursor(connection)
        cursor.execute(f"SAVEPOINT explained; {postgresql_limits._BY_INDEX}")
        for sql, values in statements:
            cursor.execute(f"EXPLAIN {sql}", values)
            plans.append("\n".join(row[0] for row in cursor.fetchall()))
            cursor.execute(sql, values)
        cursor.execute("ROLLBACK TO explained")
        return at_once(connection, *statements)

    monkeypatch.setattr(postgresql_limits, "_at_once", explained)
    analyse = text("ANALYZE sajobs_job, sajobs_limit")
    with Session(postgresql.engine()) as session:
        _forget(session)
        if statistics == "of an empty table":
            session.execute(analyse)
        enqueue_many(session, [Keyed(f"{n % keys:05}", n) for n in range(4000)])
        enqueue_many(session, [Keyed("00001", n) for n in range(4000)], delay=timedelta(hours=1))
        limited.add_keys(session, [f"keyed/{n:05}" for n in range(1000)])
        worker = leases.register(session, timedelta(minutes=5))
        session.commit()
        if statistics == "of this one":
            session.execute(analyse)
            session.commit()
        wanted = Wanted(worker, ["keyed"], (), {"default": 60}, 60, ahead=True)
        of_keys = [
            LimitedKey(f"keyed/{n:05}", "default", [0], Numbers(9), 1) for n in range(min(keys, 50))
        ]
        assert len(limited.claim_at_once(session, wanted, of_keys) or ()) == len(of_keys)
        session.rollback()
        swept = limited.claim_next(session, wanted, "", {"keyed": 9}, 60)
        assert swept is not None and swept.keys == len(swept.claims) == (1 if keys == 5 else 2)
    for plan in plans:
        for scan in ("Seq Scan on sajobs", "Bitmap Index Scan"):
            assert scan not in plan, plan
        # What it has found of keys it may sort.
        assert all("limit_key" in line for line in plan.splitlines() if "Sort Key" in line), plan


@pytest.mark.parametrize("statistics", ["none", "of an empty table", "of this one"])
def test_what_counts_against_limits_is_looked_for_and_claimed_through_its_indexes(
    database: Database, statistics: str
) -> None:
    """Whatever lies beside it: blocked keys, jobs for later, jobs that have ended."""
    sent: dict[str, Any] = {}
    analyse = text(f"ANALYZE {'TABLE' * (database.name == 'mysql')} sajobs_job")
    with Session(database.engine()) as session:
        _forget(session)
        if statistics == "of an empty table":
            session.execute(analyse)
        hot = [Keyed("hot", n) for n in range(2000)]
        due = [*hot, *(Keyed(f"k{n % 40}", n) for n in range(2000))]
        enqueue_many(session, due, run_at=datetime.now(UTC) - timedelta(minutes=1))
        enqueue_many(session, hot, delay=timedelta(hours=1), priority=-1)
        enqueue_many(session, [Keyed("old", n) for n in range(2000)])
        session.execute(update(Job).where(Job.limit_key == "keyed/old").values(state="succeeded"))
        if statistics == "of this one":
            session.execute(analyse)
        worker = leases.register(session, timedelta(minutes=5))
        connection = session.connection()
        event.listen(
            connection,
            "before_cursor_execute",
            lambda _, cursor, sql, values, context, many: sent.setdefault(sql, values),
        )
        dialect = dialects.of(session)
        lanes = dialect.limits.lanes(session, "", 200)
        assert len(lanes) == 42 and lanes[0].due > 0 and lanes[1].due <= 0
        keys = [each.key for each in lanes]
        limited.add_keys(session, keys)
        wanted = Wanted(worker, ["keyed"], (), {"default": 60}, 60)
        for numbers in (Numbers(concurrency=1), Numbers(concurrency=1, ordered=True)):
            of_keys = [LimitedKey(key, "default", [-1, 0], numbers, 2) for key in sorted({*keys})]
            claimed = limited.claim(session, wanted, of_keys)
            assert len(claimed) == (0 if numbers.ordered else 41)
        found, newest = dialect.limits.newest(session, uuid.UUID(int=0))
        assert not found and dialect.limits.newest(session, newest) == ([], newest)
        assert len(dialect.limits.ordered_heads(session, ["keyed/hot", "keyed/k1"])) == 2
        assert dialect.limits.running_in(session, "default") == 41
        explain = "EXPLAIN QUERY PLAN" if database.name == "sqlite" else "EXPLAIN"
        for sql, values in list(sent.items()):
            if "sajobs_job" in sql and not sql.startswith("INSERT"):
                plan = connection.exec_driver_sql(f"{explain} {sql}", values).all()
                said = "\n".join(str(row) for row in plan)
                if (
                    "ORDER BY sajobs_job.id DESC" in sql
                ):  # and a LIMIT: a scan, but along the primary key
                    said = said.replace("SCAN sajobs_job USING INDEX", "")
                for scan in (
                    "Seq Scan on sajobs_job",
                    "SCAN sajobs_job",
                    "filesort",
                    "TEMP B-TREE",
                ):
                    assert scan not in said, f"{sql}\n{said}"
                few = "Sort Key: lane.number", "Sort Key: job.number", "Sort Key: sajobs_limit"
                for each in few:
                    said = said.replace(each, "")
                assert "Sort Key" not in said, said
