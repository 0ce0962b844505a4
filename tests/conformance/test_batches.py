"""Batch handlers: many jobs in one transaction, each with its own outcome and its own fence."""

import math
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from sqlalchemy_jobs import (
    Cancel,
    Fail,
    Handlers,
    Job,
    JobApp,
    Retry,
    Run,
    Snooze,
    Unique,
    Worker,
    cancel,
    current_run,
    current_runs,
    enqueue_many,
    errors,
    job,
    pause_kind,
    transitions,
)
from sqlalchemy_jobs.claims import Claim, Wanted
from sqlalchemy_jobs.worker import filling
from sqlalchemy_jobs.worker.availability import Availability
from sqlalchemy_jobs.worker.control import Control
from tests.conformance.test_exactly_once import declare_one_dead
from tests.databases import Database
from tests.domain import Effect
from tests.locks import until_somebody_waits
from tests.look import Look
from tests.processes import workers
from tests.waiting import until

NOW = timedelta(0)


@job("item", backoff=lambda failures: NOW, max_attempts=3, aliases=["old_item"])
@dataclass(frozen=True)
class Item:
    n: int


@job("plain")
@dataclass(frozen=True)
class Plain:
    n: int


@job("fleeting", keep=NOW, backoff=lambda failures: NOW)
@dataclass(frozen=True)
class Fleeting:
    n: int


@job("one_each", unique=Unique(fields=("n",)))
@dataclass(frozen=True)
class OneEach:
    n: int


@job("hasty", timeout=timedelta(seconds=0.2), max_attempts=2, backoff=lambda failures: NOW)
@dataclass(frozen=True)
class Hasty:
    n: int


class App:
    """An app with a batch handler, what it was called with, and what it left behind."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.sessions = database.sessions()
        self.jobs: JobApp[Any, Any] = JobApp(self.sessions)
        self.calls: list[list[int]] = []
        self.ids: list[uuid.UUID] = []

    def handle(
        self, function: Callable[[Session, list[Any]], Any], payload: type = Item, batch: int = 10
    ) -> None:
        def noted(session: Session, payloads: list[Any]) -> Any:
            self.calls.append([each.n for each in payloads])
            return function(session, payloads)

        self.jobs.handler(payload, batch=batch)(noted)

    def add(self, *payloads: Any, **options: Any) -> None:
        with self.sessions.begin() as session:
            self.ids += enqueue_many(session, payloads, **options)

    def drain(self, **options: Any) -> None:
        assert Worker(self.jobs, drain=True, **{"concurrency": 1} | options).run()

    def rows(self) -> list[Job]:
        """The jobs in the order in which they were added."""
        with self.sessions() as session:
            found = {each.id: each for each in session.scalars(select(Job))}
            for each in found.values():
                _ = each.attempts
            return [found[job_id] for job_id in self.ids if job_id in found]

    def states(self) -> list[str]:
        return [row.state for row in self.rows()]

    def effects(self) -> list[int]:
        with self.sessions() as session:
            return sorted(int(note) for note in session.scalars(select(Effect.note)))


@pytest.fixture(autouse=True)
def always_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have batches filled however slow the machine is."""
    monkeypatch.setattr(filling, "FILL_WORTH", math.inf)


@pytest.fixture
def app(database: Database) -> App:
    return App(database)


def write(session: Session, payloads: list[Any]) -> None:
    session.add_all(
        Effect(note=str(each.n), job_id=run.job_id.hex)
        for each, run in zip(payloads, current_runs(), strict=True)
    )


# --- how much, and in which order -------------------------------------------------------------------


def test_a_handler_gets_what_is_due_in_its_order_and_ends_it_together(app: App) -> None:
    app.handle(write)
    app.add(*(Item(n) for n in range(25)))
    app.drain()
    assert app.states() == ["succeeded"] * 25
    assert app.effects() == list(range(25))
    assert [len(call) for call in app.calls] == [10, 10, 5]
    assert [n for call in app.calls for n in call] == list(range(25))
    for row in app.rows():
        assert (row.attempt, row.failures, row.attempts, row.worker_id) == (1, 0, [], None)
        assert row.started_at and row.finished_at and row.started_at <= row.finished_at


def test_runs_that_did_not_use_their_session_succeed(app: App) -> None:
    app.handle(lambda session, payloads: None, batch=100)
    app.add(*(Item(n) for n in range(2000)))
    app.drain(concurrency=4)
    assert app.states() == ["succeeded"] * 2000
    assert sorted(n for call in app.calls for n in call) == list(range(2000))
    assert max(map(len, app.calls)) == 100


def test_a_batch_is_not_waited_for(app: App) -> None:
    app.handle(write, batch=1000)
    app.add(Item(1))
    app.drain()
    assert app.calls == [[1]] and app.states() == ["succeeded"]


def test_each_queue_has_its_own_batches_and_an_alias_shares_them(app: App) -> None:
    app.handle(write)
    app.add(*(Item(n) for n in range(4)))
    app.add(*(Item(n) for n in range(4, 8)), queue="mail")
    with app.sessions.begin() as session:
        session.execute(update(Job).where(Job.id == app.ids[1]).values(kind="old_item"))
    app.drain(queues={"mail": 1, "default": 1}, concurrency=2)
    assert sorted(app.calls) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_batch_is_not_filled_with_jobs_of_an_alias_that_is_paused(app: App) -> None:
    app.handle(write)
    app.add(*(Item(n) for n in range(4)))
    with app.sessions.begin() as session:
        session.execute(update(Job).where(Job.id == app.ids[1]).values(kind="old_item"))
        pause_kind(session, "old_item")
    app.drain()
    assert sorted(app.calls) == [[0, 2, 3]]


def test_batches_and_ordinary_kinds_in_one_queue(app: App) -> None:
    app.handle(write)
    ran: list[int] = []
    app.jobs.handler(Plain)(lambda session, payload: ran.append(payload.n))
    app.add(*(payload for n in range(200) for payload in (Item(n), Plain(n))))
    app.drain(concurrency=4)
    assert app.states() == ["succeeded"] * 400
    assert sorted(ran) == app.effects() == list(range(200))
    assert max(map(len, app.calls)) == 10


def test_a_claim_that_was_not_worth_it_is_not_made_again_at_once(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To fill a batch it may have walked past a long backlog of other kinds."""
    monkeypatch.setattr(filling, "FILL_WORTH", -1)
    monkeypatch.setattr(filling, "FILL_REST", 1e9)
    app.handle(write)
    with app.jobs.worker(concurrency=1):
        app.add(*(Item(n) for n in range(3)))
        until(lambda: app.states() == ["succeeded"] * 3)
        app.add(*(Item(n) for n in range(3, 6)))
        until(lambda: app.states() == ["succeeded"] * 6)
    assert app.calls == [[0, 1, 2], [3], [4], [5]]


def test_when_the_claim_that_fills_a_batch_fails_it_is_smaller(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was claimed before is ours by then: it must start."""
    claim = transitions.claim

    def failing(session: Session, wanted: Wanted) -> list[Claim]:
        if wanted.ahead:
            raise RuntimeError("as tested")
        return claim(session, wanted)

    monkeypatch.setattr(transitions, "claim", failing)
    app.handle(write)
    app.add(*(Item(n) for n in range(3)))
    app.drain()
    assert app.calls == [[0], [1], [2]]
    assert [(row.state, row.attempt) for row in app.rows()] == [("succeeded", 1)] * 3


# --- what it returns --------------------------------------------------------------------------------


@pytest.mark.parametrize("used", [True, False])
def test_each_entry_ends_its_own_job_and_the_work_is_kept(app: App, used: bool) -> None:
    @dataclass(frozen=True)
    class Answer:
        text: str

    entries: list[Any] = [
        None,
        {"a": [1]},
        Snooze(timedelta(hours=1)),
        Cancel("pointless"),
        Fail("for good"),
        Retry(timedelta(hours=1)),
        ValueError("odd"),
        Answer("yes"),
        False,
    ]

    def handler(session: Session, payloads: list[Item]) -> list[Any]:
        if used:
            write(session, payloads)
        return [entries[each.n] if run.attempt == 1 else None for each, run in pairs(payloads)]

    app.handle(handler)
    app.add(*(Item(n) for n in range(9)))
    app.drain()
    rows = app.rows()
    assert [row.state for row in rows] == [
        *("succeeded", "succeeded", "ready", "cancelled", "failed"),
        *("ready", "succeeded", "succeeded", "succeeded"),
    ]
    assert [row.result for row in rows if row.state == "succeeded"] == [
        None,
        {"a": [1]},
        None,
        {"text": "yes"},
        False,
    ]
    assert [row.failures for row in rows] == [0, 0, 0, 0, 1, 1, 1, 0, 0]
    assert {
        row.payload["n"]: [(each.outcome, each.error_type, each.message) for each in row.attempts]
        for row in rows
        if row.attempts
    } == {
        2: [("snoozed", None, None)],
        3: [("cancelled", None, "pointless")],
        4: [("failed", "sqlalchemy_jobs.outcomes.Fail", "for good")],
        5: [("failed", "sqlalchemy_jobs.outcomes.Retry", "retry in 1:00:00")],
        6: [("failed", "ValueError", "odd")],
    }
    assert app.calls == [list(range(9)), [6]]
    assert app.effects() == (sorted([*range(9), 6]) if used else [])


def pairs(payloads: list[Any]) -> list[tuple[Any, Run]]:
    return list(zip(payloads, current_runs(), strict=True))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([None] * 3, "3 entries for 4 payloads"),
        ([None] * 5, "5 entries for 4 payloads"),
        ([], "0 entries for 4 payloads"),
        ({"sent": 4}, "returned a dict"),
        (Snooze(timedelta(hours=1)), "returned a Snooze"),
        ([None, object(), None, None], "cannot be stored as JSON"),
    ],
    ids=["too few", "too many", "none", "a dict", "a Snooze", "not JSON"],
)
def test_what_is_no_entry_for_each_fails_them_all_and_nothing_is_written(
    app: App, returned: Any, message: str
) -> None:
    def handler(session: Session, payloads: list[Item]) -> Any:
        write(session, payloads)
        return returned if len(payloads) == 4 else None

    app.handle(handler)
    app.add(*(Item(n) for n in range(4)))
    app.drain()
    for row in app.rows():
        assert (row.state, row.failures, row.attempt) == ("succeeded", 1, 2)
        assert [each.error_type for each in row.attempts] == ["sqlalchemy_jobs.errors.ResultError"]
        assert message in (row.attempts[0].message or "")
    assert app.effects() == [0, 1, 2, 3]


# --- what it raises ---------------------------------------------------------------------------------


def test_one_bad_payload_fails_its_batch_once_and_then_only_itself(app: App) -> None:
    def handler(session: Session, payloads: list[Item]) -> None:
        write(session, payloads)
        session.flush()
        if any(each.n == 3 for each in payloads):
            raise ValueError("three")

    app.handle(handler)
    app.add(*(Item(n) for n in range(6)))
    app.drain()
    rows = app.rows()
    assert [row.state for row in rows] == [
        "failed" if row.payload["n"] == 3 else "succeeded" for row in rows
    ]
    assert [row.failures for row in rows] == [1, 1, 1, 3, 1, 1]
    assert app.effects() == [0, 1, 2, 4, 5]
    assert app.calls[0] == list(range(6))
    assert sorted(app.calls[1:]) == [[0], [1], [2], [3], [3], [4], [5]]
    traceback = rows[0].attempts[0].traceback
    assert traceback and "in handler" in traceback and "sqlalchemy_jobs/worker" not in traceback


@pytest.mark.parametrize("stored", [{"n": "no number"}, {}])
def test_a_payload_that_does_not_decode_fails_by_itself(app: App, stored: Any) -> None:
    app.handle(write)
    app.add(*(Item(n) for n in range(5)))
    with app.sessions.begin() as session:
        session.execute(update(Job).where(Job.id == app.ids[2]).values(payload=stored))
    app.drain()
    assert app.states() == ["succeeded", "succeeded", "failed", "succeeded", "succeeded"]
    bad = app.rows()[2]
    assert (bad.failures, bad.attempt) == (3, 3)
    assert {each.error_type for each in bad.attempts} == {"sqlalchemy_jobs.errors.InvalidPayload"}
    assert app.calls == [[0, 1, 3, 4]]
    assert app.effects() == [0, 1, 3, 4]


def test_a_handler_that_ends_its_transaction_is_refused(app: App) -> None:
    def handler(session: Session, payloads: list[Item]) -> None:
        write(session, payloads)
        session.commit()

    app.handle(handler)
    app.add(Item(0), Item(1))
    app.drain()
    assert app.states() == ["failed", "failed"] and app.effects() == []


def test_a_batch_takes_no_longer_than_its_timeout(app: App) -> None:
    deadlines: set[Any] = set()

    def handler(session: Session, payloads: list[Hasty]) -> None:
        write(session, payloads)
        runs = current_runs()
        deadlines.add(len({run.deadline for run in runs}))
        while not all(run.should_stop for run in runs):
            time.sleep(0.01)

    app.handle(handler, Hasty)
    app.add(*(Hasty(n) for n in range(3)))
    app.drain()
    assert app.states() == ["failed"] * 3 and app.effects() == []
    assert {each.outcome for row in app.rows() for each in row.attempts} == {"timed_out"}
    assert deadlines <= {1}


# --- fences -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("used", [True, False])
def test_a_job_that_was_cancelled_meanwhile_is_left_out(app: App, used: bool) -> None:
    """What was done for it cannot be told apart: so the others are done again, without a failure."""

    def handler(session: Session, payloads: list[Item]) -> None:
        if len(app.calls) == 1:
            with app.sessions.begin() as other:
                assert cancel(other, app.ids[0]) and cancel(other, app.ids[3])
        if used:
            write(session, payloads)

    app.handle(handler)
    app.add(*(Item(n) for n in range(5)))
    app.drain()
    assert app.states() == ["cancelled", "succeeded", "succeeded", "cancelled", "succeeded"]
    assert [(row.attempt, row.failures) for row in app.rows()] == [(1, 0)] * 5
    assert app.calls == ([[0, 1, 2, 3, 4], [1, 2, 4]] if used else [[0, 1, 2, 3, 4]])
    assert app.effects() == ([1, 2, 4] if used else [])


def test_a_batch_of_which_nothing_is_left_writes_nothing(app: App) -> None:
    def handler(session: Session, payloads: list[Item]) -> None:
        with app.sessions.begin() as other:
            for job_id in app.ids:
                assert cancel(other, job_id)
        write(session, payloads)

    app.handle(handler)
    app.add(Item(0), Item(1))
    app.drain()
    assert app.states() == ["cancelled"] * 2 and app.effects() == [] and app.calls == [[0, 1]]


def test_a_batch_of_which_every_job_was_cancelled_is_interrupted(app: App) -> None:
    began = threading.Event()

    def handler(session: Session, payloads: list[Item]) -> None:
        began.set()
        while not current_runs()[0].should_stop:
            time.sleep(0.01)
        write(session, payloads)

    app.handle(handler)
    app.add(Item(0), Item(1))
    with app.jobs.worker(concurrency=1):
        assert began.wait(60)
        with app.sessions.begin() as session:
            assert [cancel(session, job_id) for job_id in app.ids] == [True, True]
        until(lambda: "running" not in app.states())
    assert app.states() == ["cancelled"] * 2 and app.effects() == []


def test_a_cancel_that_is_not_committed_yet_is_waited_for(row_locks: Database) -> None:
    app = App(row_locks)
    wrote, cancelled = threading.Event(), threading.Event()

    def handler(session: Session, payloads: list[Item]) -> None:
        write(session, payloads)
        session.flush()
        wrote.set()
        assert cancelled.wait(60)

    app.handle(handler)
    app.add(*(Item(n) for n in range(3)))
    with app.jobs.worker(concurrency=1):
        assert wrote.wait(60)
        with app.sessions() as session:
            assert cancel(session, app.ids[1])
            cancelled.set()
            until_somebody_waits(row_locks)
            session.commit()
        until(lambda: app.states() == ["succeeded", "cancelled", "succeeded"])
    assert app.effects() == [0, 2]


def test_a_handler_that_changes_the_row_of_its_job_fails(app: App) -> None:
    def handler(session: Session, payloads: list[Item]) -> None:
        write(session, payloads)
        run = current_runs()[0]
        session.execute(update(Job).where(Job.id == run.job_id).values(attempt=7))

    app.handle(handler)
    app.add(Item(0), Item(1))
    app.drain()
    assert app.states() == ["failed"] * 2 and app.effects() == []
    for row in app.rows():
        assert row.attempts[0].error_type == "sqlalchemy_jobs.errors.HandlerChangedItsJob"


def test_a_worker_that_dies_in_a_batch_leaves_nothing_and_each_job_runs_once(
    database: Database, tmp_path: Path, effects_app: Any
) -> None:
    look = Look(database.session)
    with look.sessions.begin() as session:
        notes = ["kill" if n == 70 else str(n) for n in range(200)]
        enqueue_many(session, [effects_app.WriteMany(note) for note in notes])
    with workers(database, tmp_path, "--lease", "1", count=2) as started:
        look.wait_for(succeeded=200)
        assert sum(each.process.poll() is not None for each in started) == 1
    assert look.count_effects() == (200, 200)
    assert "crashed" in look.attempts()


def test_false_deaths_double_nothing(database: Database, tmp_path: Path, effects_app: Any) -> None:
    look = Look(database.session)
    control = Control(database.engine(), Availability())
    with look.sessions.begin() as session:
        enqueue_many(session, [effects_app.WriteMany(str(n)) for n in range(2400)])
    rescued = 0
    with workers(database, tmp_path, "--lease", "1", "--concurrency", "2", count=2) as both:
        while look.states().keys() != {"succeeded"}:
            rescued += declare_one_dead(control) if rescued < 150 else 0
        for each in both:
            each.wait_for("serves")
    control.close()
    assert look.count_effects() == (2400, 2400)
    if database.name != "sqlite":  # where the one writer may well be done before anybody can say so
        assert rescued > 0


# --- other options of the class ---------------------------------------------------------------------


def test_rows_that_are_not_kept_are_deleted_with_their_attempts(app: App) -> None:
    def handler(session: Session, payloads: list[Fleeting]) -> list[Any]:
        write(session, payloads)
        return [
            Retry(NOW) if each.n == 1 and run.attempt == 1 else None
            for each, run in pairs(payloads)
        ]

    app.handle(handler, Fleeting)
    app.add(*(Fleeting(n) for n in range(4)))
    app.drain()
    assert app.rows() == [] and app.effects() == [0, 1, 1, 2, 3]


def test_unique_jobs_give_up_their_keys(app: App) -> None:
    app.handle(write, OneEach)
    app.add(*(OneEach(n) for n in range(3)))
    app.drain()
    assert [(row.state, row.unique_slot) for row in app.rows()] == [("succeeded", None)] * 3
    app.add(OneEach(1))
    app.drain()
    assert app.states() == ["succeeded"] * 4 and app.effects() == [0, 1, 1, 2]


def test_async_handlers_take_batches(database: Database) -> None:
    app = App(database)
    app.jobs = JobApp(async_sessionmaker(database.async_engine(poolclass=NullPool)))

    @app.jobs.handler(Item, batch=10)
    async def handler(session: AsyncSession, payloads: list[Item]) -> list[str | Exception]:
        app.calls.append([each.n for each in payloads])
        if len(app.calls) == 1:
            with app.sessions.begin() as other:
                assert cancel(other, app.ids[4])
        await session.run_sync(write, payloads)
        return [Fail("two") if each.n == 2 else f"done {each.n}" for each in payloads]

    app.add(*(Item(n) for n in range(6)))
    app.drain()
    rows = app.rows()
    assert [row.state for row in rows] == [
        *("succeeded", "succeeded", "failed", "succeeded", "cancelled", "succeeded")
    ]
    assert [row.result for row in rows] == ["done 0", "done 1", None, "done 3", None, "done 5"]
    assert app.calls == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 5]]
    assert app.effects() == [0, 1, 2, 3, 5]


# --- the runs, and what is around them --------------------------------------------------------------


def test_current_runs_are_those_of_the_payloads(app: App) -> None:
    entered: list[int] = []

    @app.jobs.middleware
    def once(run: Run) -> AbstractContextManager[None]:
        assert run in current_runs()
        entered.append(len(current_runs()))
        return nullcontext()

    def handler(session: Session, payloads: list[Item]) -> list[Any]:
        with pytest.raises(errors.NoCurrentRun, match="current_runs"):
            current_run()
        assert [type(run) for run in current_runs()] == [Run] * len(payloads)
        return [
            {"id": str(run.job_id), "n": run.headers["n"], "attempt": run.attempt}
            for run in current_runs()
        ]

    app.handle(handler)
    for n in range(3):
        app.add(Item(n), headers={"n": str(n)})
    app.drain()
    assert [row.result for row in app.rows()] == [
        {"id": str(job_id), "n": str(n), "attempt": 1} for n, job_id in enumerate(app.ids)
    ]
    assert entered == [3]
    with pytest.raises(errors.NoCurrentRun):
        current_runs()


def test_an_ordinary_handler_has_one_of_the_current_runs(app: App) -> None:
    def handler(session: Session, payload: Plain) -> bool:
        return current_runs() == [current_run()]

    app.jobs.handler(Plain)(handler)
    app.add(Plain(1))
    app.drain()
    assert app.rows()[0].result is True


def test_runs_that_do_not_end_are_released_together(app: App) -> None:
    began, go_on = threading.Event(), threading.Event()

    def handler(session: Session, payloads: list[Item]) -> None:
        write(session, payloads)
        began.set()
        while not go_on.wait(0.01):
            pass

    app.handle(handler)
    app.add(*(Item(n) for n in range(3)))
    worker = Worker(app.jobs, concurrency=1, shutdown_timeout=NOW)
    ended: list[bool] = []
    running = threading.Thread(target=lambda: ended.append(worker.run()))
    running.start()
    assert began.wait(60)
    worker.stop()
    running.join(60)
    go_on.set()
    assert ended == [False]
    assert app.states() == ["ready"] * 3 and app.effects() == []
    assert [row.failures for row in app.rows()] == [0] * 3
    assert {each.outcome for row in app.rows() for each in row.attempts} == {"released"}


# --- how it is declared -----------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [0, -1, 1001, True, 2.0, "10"])
def test_a_size_that_is_none_is_refused(batch: Any) -> None:
    with pytest.raises(errors.DeclarationError, match="whole number from 1 to 1000"):
        Handlers[Session, AsyncSession]().handler(Item, batch=batch)


def test_what_does_not_go_with_batches_is_refused() -> None:
    @job("once", on_crash="fail")
    @dataclass
    class Once:
        n: int

    handlers: Any = Handlers[Session, AsyncSession]()
    with pytest.raises(errors.DeclarationError, match="manual"):
        handlers.handler(Item, batch=10, transaction="manual")
    with pytest.raises(errors.DeclarationError, match="on_crash"):
        handlers.handler(Once, batch=10)
    with pytest.raises(errors.DeclarationError, match=r"payloads: list\[Item\]"):
        handlers.handler(Item, batch=10)(lambda session: None)
