"""Jobs that are final for long enough are deleted, and nothing else is."""

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import event, func, insert, select, text
from sqlalchemy.orm import Session

from sqlalchemy_jobs import (
    Attempt,
    Fail,
    Job,
    JobApp,
    JobState,
    Retry,
    Unique,
    Worker,
    current_run,
    enqueue,
    job,
    retention,
)
from sqlalchemy_jobs.worker import maintenance
from sqlalchemy_jobs.worker.leases import register
from tests.databases import Database
from tests.domain import Effect
from tests.waiting import until

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
NOW = timedelta(0)


@job("plain")
@dataclass(frozen=True)
class Plain:
    n: int = 0


@job("brief", keep=HOUR, keep_failed=2 * HOUR, aliases=["once_brief"])
@dataclass(frozen=True)
class Brief:
    n: int = 0


@job("fleeting", keep=NOW, backoff=lambda failures: NOW)
@dataclass(frozen=True)
class Fleeting:
    n: int = 0


@job("weekly", unique=Unique(period=7 * DAY))
@dataclass(frozen=True)
class Weekly:
    n: int = 0


@job("until_failed", unique=Unique(states=[JobState.READY, JobState.RUNNING, JobState.FAILED]))
@dataclass(frozen=True)
class UntilFailed:
    n: int = 0


def final(kind: str, state: str, age: timedelta, count: int = 1) -> list[dict[str, Any]]:
    """Rows of jobs that ended so long ago."""
    at = datetime.now(UTC) - age
    one = {"kind": kind, "state": state, "finished_at": at, "payload": {}, "attempt": 1}
    return [one | {"id": uuid.uuid4()} for _ in range(count)]


class Store:
    def __init__(self, database: Database) -> None:
        self.sessions = database.sessions()
        self.jobs: JobApp[Any, Any] = JobApp(self.sessions)

    def put(self, *rows: dict[str, Any]) -> None:
        with self.sessions.begin() as session:
            session.execute(insert(Job), list(rows))

    def left(self) -> list[tuple[str, str]]:
        with self.sessions() as session:
            found = session.execute(select(Job.kind, Job.state).order_by(Job.kind, Job.state))
            return [(kind, state) for kind, state in found]

    def attempts(self) -> int:
        with self.sessions() as session:
            return session.scalar(select(func.count()).select_from(Attempt)) or 0

    def handle(self, payload: Any, handler: Callable[[Session, Any], Any], count: int = 1) -> None:
        self.jobs.handler(type(payload))(handler)
        with self.sessions.begin() as session:
            session.add_all(enqueue(payload) for _ in range(count))
        assert Worker(self.jobs, drain=True, keep=None, keep_failed=None).run()


@pytest.fixture
def store(database: Database) -> Store:
    return Store(database)


def test_who_handles_a_kind_is_asked_for_those_of_others_only(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An idle worker has to send as little as can be."""
    asked: list[None] = []
    find_kinds = maintenance.find_kinds
    monkeypatch.setattr(
        maintenance, "find_kinds", lambda session: asked.append(None) or find_kinds(session)
    )
    store.jobs.handler(Brief)(lambda session, payload: None)
    for kind, times in (("brief", 0), ("unknown", 1)):
        store.put(*final(kind, "succeeded", 2 * DAY))
        with store.jobs.worker():
            until(lambda: store.left() == [])
        assert len(asked) == times


def test_each_state_and_kind_is_kept_for_its_own_time(store: Store) -> None:
    store.jobs.handler(Plain)(lambda session, payload: None)
    store.jobs.handler(Brief)(lambda session, payload: None)
    with store.sessions.begin() as session:  # another live worker, which knows for how long
        register(session, DAY, kinds=["of_another", "plain"])
    gone = [
        *final("plain", "succeeded", 2 * DAY),
        *final("plain", "cancelled", 2 * DAY),
        *final("plain", "failed", 15 * DAY),
        *final("brief", "succeeded", 2 * HOUR),
        *final("once_brief", "succeeded", 2 * HOUR),
        *final("brief", "failed", 3 * HOUR),
        *final("of_nobody", "succeeded", 2 * DAY),
    ]
    kept = [
        *final("plain", "succeeded", DAY / 2),
        *final("plain", "failed", 13 * DAY),
        *final("brief", "succeeded", HOUR / 2),
        *final("brief", "failed", HOUR),
        *final("of_another", "succeeded", 100 * DAY),
        *final("of_nobody", "failed", 13 * DAY),
    ]
    waiting = {"id": uuid.uuid4(), "kind": "of_nobody", "state": "ready", "payload": {}}
    store.put(*gone, *kept)
    store.put(waiting)
    with store.sessions.begin() as session:
        for row in (gone[0], kept[0]):
            session.add(
                Attempt(job_id=row["id"], attempt=1, worker_id=uuid.uuid4(), outcome="snoozed")
            )
    left = sorted((row["kind"], row["state"]) for row in [*kept, waiting])
    with store.jobs.worker():
        until(lambda: store.left() == left)
    assert store.attempts() == 1


def holding(kind: str, state: str, age: timedelta) -> dict[str, Any]:
    """A row of a job that ended so long ago and still keeps others out."""
    (row,) = final(kind, state, age)
    key = f"{kind}/{row['id']}"
    return row | {"unique_key": key, "unique_slot": key, "unique_states": 63}


def test_a_row_that_keeps_others_out_stays_as_long_as_it_is_meant_to(store: Store) -> None:
    """To the end of its window at least; without a window, or where nobody knows of one, for ever."""
    store.jobs.handler(Weekly)(lambda session, payload: None)
    store.jobs.handler(UntilFailed)(lambda session, payload: None)
    gone = [
        holding("weekly", "succeeded", 8 * DAY),
        holding("weekly", "failed", 15 * DAY),
        *final("until_failed", "succeeded", 2 * DAY),
        *final("of_nobody", "succeeded", 2 * DAY),
    ]
    kept = [
        holding("weekly", "succeeded", 6 * DAY),
        holding("weekly", "failed", 8 * DAY),
        holding("until_failed", "failed", 999 * DAY),
        holding("of_nobody", "succeeded", 999 * DAY),
    ]
    for row in [*gone, *kept]:
        store.put(row)
    left = sorted((row["kind"], row["state"]) for row in kept)
    with store.jobs.worker():
        until(lambda: store.left() == left)


def test_off_is_off(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.jobs.handler(Brief)(lambda session, payload: None)
    store.put(*final("of_nobody", "succeeded", 999 * DAY), *final("of_nobody", "failed", 999 * DAY))
    store.put(*final("brief", "succeeded", 2 * HOUR))
    with store.jobs.worker(keep=None, keep_failed=None):
        until(lambda: ("brief", "succeeded") not in store.left())
    assert store.left() == [("of_nobody", "failed"), ("of_nobody", "succeeded")]


def test_more_than_a_batch_goes_batch_by_batch_over_several_looks(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "BATCH", 10)
    monkeypatch.setattr(maintenance, "PRUNE_FOR", 0.05)
    monkeypatch.setattr(maintenance, "LOOK", 0.01)
    store.jobs.handler(Plain)(lambda session, payload: None)
    store.put(*final("plain", "succeeded", 2 * DAY, count=95), *final("plain", "failed", 2 * DAY))
    with store.jobs.worker():
        until(lambda: store.left() == [("plain", "failed")])


def test_pruning_waits_for_nobody(row_locks: Database) -> None:
    store = Store(row_locks)
    rows = final("plain", "succeeded", 2 * DAY, count=3)
    store.put(*rows)
    with store.sessions() as holder, store.sessions.begin() as session:
        holder.execute(select(Job.id).where(Job.id == rows[1]["id"]).with_for_update()).all()
        pruning = retention.Pruning(JobState.SUCCEEDED, "plain")
        assert not pruning.step(session, datetime.now(UTC) - DAY)
    assert store.left() == [("plain", "succeeded")]


def test_old_jobs_are_found_by_a_range_of_their_index_however_many_there_are(store: Store) -> None:
    rows = final("plain", "succeeded", HOUR, count=4000)
    store.put(*rows)
    statement = retention.oldest(JobState.SUCCEEDED, "plain", datetime.now(UTC) - DAY)
    with store.sessions() as session:
        connection = session.connection()
        name = connection.dialect.name
        session.execute(text(f"ANALYZE {'TABLE ' if name == 'mysql' else ''}sajobs_job"))
        sent: list[Any] = []
        event.listen(
            connection,
            "before_cursor_execute",
            lambda _, cursor, sql, values, context, many: sent.append((sql, values)),
        )
        assert session.scalars(statement).all() == []
        ((sql, values),) = sent
        explain = "EXPLAIN QUERY PLAN" if name == "sqlite" else "EXPLAIN"
        plan = connection.exec_driver_sql(f"{explain} {sql}", values).all()
    said = "\n".join(str(row) for row in plan)
    assert "sajobs_job_final" in said, said
    assert name != "mysql" or "range" in said, said
    assert "filesort" not in said and "Sort" not in said and "TEMP B-TREE" not in said, said


# --- not kept at all ----------------------------------------------------------------------------------


@pytest.mark.parametrize("use_session", [True, False])
@pytest.mark.parametrize("result", [None, {"n": 1}])
def test_a_job_that_is_not_kept_is_gone_with_its_attempts_when_it_has_succeeded(
    store: Store, use_session: bool, result: Any
) -> None:
    def handler(session: Session, payload: Fleeting) -> Any:
        if use_session:
            session.add(Effect(note="done"))
        if current_run().attempt == 1:
            raise Retry
        return result

    store.handle(Fleeting(), handler, count=3)
    assert store.left() == [] and store.attempts() == 0
    with store.sessions() as session:
        assert len(session.scalars(select(Effect.note)).all()) == 3 * use_session


def test_a_job_that_is_not_kept_stays_for_its_own_time_when_it_has_failed(store: Store) -> None:
    def handler(session: Session, payload: Fleeting) -> None:
        raise Fail("no")

    store.jobs.handler(Fleeting)(handler)
    with store.sessions.begin() as session:
        session.add(enqueue(Fleeting()))
    assert Worker(store.jobs, drain=True, keep_failed=DAY).run()
    assert store.left() == [("fleeting", "failed")] and store.attempts() == 1
