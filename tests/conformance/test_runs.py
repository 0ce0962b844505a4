"""What becomes of a job for each thing that a handler can do."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import func, select, text, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, sessionmaker

from sqlalchemy_jobs import (
    Attempt,
    Cancel,
    Fail,
    Handlers,
    Job,
    JobApp,
    Retry,
    Run,
    Snooze,
    Worker,
    current_run,
    enqueue,
    errors,
    job,
    transitions,
)
from tests.databases import Database
from tests.domain import Effect
from tests.waiting import until


@job("act", backoff=lambda failures: timedelta(0))
@dataclass(frozen=True)
class Act:
    n: int = 0


@job("fragile", max_attempts=3, give_up_on=(LookupError,), backoff=lambda failures: timedelta(0))
@dataclass(frozen=True)
class Fragile:
    n: int = 0


class App:
    """An app with one handler, and a look at what it left behind."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.sessions = database.sessions()
        self.jobs = JobApp(self.sessions)

    def handle(
        self, function: Callable[[Session, Any], Any], payload: Any = None, **how: Any
    ) -> Job:
        """Register a handler, enqueue one job for it and work until nothing is due; return the job."""
        payload = payload or Act()
        self.jobs.handler(type(payload), **how)(function)
        with self.sessions.begin() as session:
            made = enqueue(payload)
            session.add(made)
            job_id = made.id
        self.drain()
        with self.sessions() as session:
            found = session.get_one(Job, job_id)
            _ = found.attempts
            return found

    def drain(self) -> None:
        assert Worker(self.jobs, drain=True, concurrency=1).run()

    def effects(self) -> list[str]:
        with self.sessions() as session:
            return list(session.scalars(select(Effect.note).order_by(Effect.id)))


@pytest.fixture
def app(database: Database) -> App:
    return App(database)


# --- return commits ---------------------------------------------------------------------------------


def test_none_succeeds_and_commits_the_work(app: App) -> None:
    def handler(session: Session, payload: Act) -> None:
        session.add(Effect(note="done"))

    job = app.handle(handler)
    assert (job.state, job.attempt, job.attempts, app.effects()) == ("succeeded", 1, [], ["done"])


@pytest.mark.parametrize("use_session", [True, False])
@pytest.mark.parametrize("result", [7, "ä", {"n": [1, None]}, Act(3), [], 0, False])
def test_a_result_is_kept_in_the_row(app: App, use_session: bool, result: Any) -> None:
    def handler(session: Session, payload: Act) -> Any:
        if use_session:
            session.execute(text("SELECT 1"))
        return result

    job = app.handle(handler)
    assert job.state == "succeeded"
    assert job.result == ({"n": 3} if result == Act(3) else result)


def test_a_result_that_is_not_json_is_a_failure(app: App) -> None:
    def handler(session: Session, payload: Act) -> Any:
        session.add(Effect(note="never"))
        return object()

    job = app.handle(handler, Fragile())
    assert (job.state, app.effects()) == ("failed", [])
    assert "cannot be stored as JSON" in (job.attempts[0].message or "")


@pytest.mark.parametrize("use_session", [True, False])
def test_a_snooze_keeps_the_work_and_is_no_failure(app: App, use_session: bool) -> None:
    def handler(session: Session, payload: Act) -> Snooze | None:
        if use_session:
            session.add(Effect(note=f"run {current_run().attempt}"))
        return Snooze(timedelta(0)) if current_run().attempt < 3 else None

    job = app.handle(handler)
    assert (job.state, job.attempt, job.failures) == ("succeeded", 3, 0)
    assert [each.outcome for each in job.attempts] == ["snoozed", "snoozed"]
    assert app.effects() == (["run 1", "run 2", "run 3"] if use_session else [])


def test_a_snoozed_job_waits(app: App) -> None:
    job = app.handle(lambda session, payload: Snooze(timedelta(hours=1)))
    assert (job.state, job.attempt) == ("ready", 1)


@pytest.mark.parametrize("use_session", [True, False])
def test_a_cancel_keeps_the_work_and_the_reason(app: App, use_session: bool) -> None:
    def handler(session: Session, payload: Act) -> Cancel:
        if use_session:
            session.add(Effect(note="noted"))
        return Cancel("too late")

    job = app.handle(handler)
    assert (job.state, job.failures) == ("cancelled", 0)
    assert [(each.outcome, each.message) for each in job.attempts] == [("cancelled", "too late")]
    assert app.effects() == (["noted"] if use_session else [])


def test_jobs_enqueued_by_a_handler_commit_with_it(app: App) -> None:
    def handler(session: Session, payload: Act) -> None:
        if payload.n < 2:
            session.add(enqueue(Act(payload.n + 1)))
        if current_run().failures == 0 and payload.n == 1:
            raise ValueError("its follow-up must go with it")

    app.handle(handler)
    with app.sessions() as session:
        notes = sorted(each["n"] for each in session.scalars(select(Job.payload)))
        assert notes == [0, 1, 2]


def test_the_work_of_a_session_without_autoflush_is_not_forgotten(database: Database) -> None:
    app = App(database)
    app.jobs = JobApp(sessionmaker(database.engine(), autoflush=False))

    def handler(session: Session, payload: Act) -> None:
        session.add(Effect(note="pending only"))

    assert (app.handle(handler).state, app.effects()) == ("succeeded", ["pending only"])


# --- raise rolls back -------------------------------------------------------------------------------


def test_an_exception_rolls_back_and_is_retried_until_the_job_fails(app: App) -> None:
    def handler(session: Session, payload: Fragile) -> None:
        session.add(Effect(note="never"))
        session.flush()
        raise ValueError(f"boom {current_run().attempt} \0 \ud800 ä")

    job = app.handle(handler, Fragile())
    assert (job.state, job.failures, job.attempt, app.effects()) == ("failed", 3, 3, [])
    assert job.finished_at is not None
    assert [each.attempt for each in job.attempts] == [1, 2, 3]
    for each in job.attempts:
        assert each.outcome == "failed" and each.error_type == "ValueError"
        assert each.message == f"boom {each.attempt} \\0 \\ud800 ä"
        assert each.traceback and "test_runs.py" in each.traceback
        assert "in handler" in each.traceback and "sqlalchemy_jobs/worker" not in each.traceback


def test_backoff_decides_when_a_failed_job_runs_again(app: App) -> None:
    @job("patient", backoff=lambda failures: timedelta(hours=failures))
    @dataclass(frozen=True)
    class Patient:
        n: int = 0

    def handler(session: Session, payload: Patient) -> None:
        raise ValueError

    found = app.handle(handler, Patient())
    with app.sessions() as session:
        (attempt,) = session.scalars(select(Attempt))
        wait = found.run_at - attempt.finished_at
    assert (found.state, found.failures) == ("ready", 1)
    assert timedelta(minutes=59) < wait < timedelta(minutes=61)


@pytest.mark.parametrize("wait", [timedelta.max, timedelta(-1), 60, None])
def test_a_backoff_that_makes_no_sense_is_replaced_by_the_default(app: App, wait: Any) -> None:
    @job("nonsense", backoff=lambda failures: wait)
    @dataclass(frozen=True)
    class Nonsense:
        n: int = 0

    def handler(session: Session, payload: Nonsense) -> None:
        raise ValueError

    job_ = app.handle(handler, Nonsense())
    assert (job_.state, job_.failures) == ("ready", 1)


def test_a_run_whose_end_the_database_refuses_fails_for_good(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must not run again and again."""

    def refused(*args: object, **options: object) -> bool:
        raise ValueError("cannot be written")

    monkeypatch.setattr(transitions, "retry", refused)

    def handler(session: Session, payload: Act) -> None:
        raise ValueError

    job_ = app.handle(handler)
    assert (job_.state, job_.failures) == ("failed", 1)
    assert "cannot be written" in (job_.attempts[0].message or "")


def test_retry_names_its_own_delay_and_keeps_the_cause(app: App) -> None:
    def handler(session: Session, payload: Act) -> None:
        if current_run().failures == 0:
            try:
                raise KeyError("the cause")
            except KeyError as error:
                raise Retry(timedelta(0)) from error
        raise Retry(timedelta(hours=1))

    job = app.handle(handler)
    assert (job.state, job.failures) == ("ready", 2)
    assert "KeyError: 'the cause'" in (job.attempts[0].traceback or "")


def test_fail_and_give_up_on_end_the_job_at_once(app: App) -> None:
    def handler(session: Session, payload: Fragile) -> None:
        session.add(Effect(note="never"))
        if payload.n == 1:
            raise Fail("bad address")
        raise KeyError("of a family that is given up on")

    for n in (1, 2):
        job = App(app.database).handle(handler, Fragile(n))
        assert (job.state, job.failures, len(job.attempts)) == ("failed", 1, 1)
    assert app.effects() == []


def test_sys_exit_in_a_handler_is_a_failure_and_not_the_end_of_the_worker(app: App) -> None:
    def handler(session: Session, payload: Fragile) -> None:
        raise SystemExit("bye")

    assert app.handle(handler, Fragile()).state == "failed"


def test_a_failed_statement_is_a_failure_however_it_is_swallowed(app: App) -> None:
    """A handler that swallows an error of its own transaction cannot commit half of its work."""

    def handler(session: Session, payload: Fragile) -> None:
        session.add(Effect(id=1, note="one"))
        session.flush()
        session.expunge_all()
        session.add(Effect(id=1, note="two"))
        try:
            session.flush()
        except Exception:
            session.add(Effect(note="three"))

    job = app.handle(handler, Fragile())
    assert (job.state, app.effects()) == ("failed", [])


# --- the guard ----------------------------------------------------------------------------------------


def commits(session: Session) -> None:
    session.add(Effect(note="never"))
    session.commit()


def commits_and_swallows(session: Session) -> None:
    session.add(Effect(note="never"))
    with pytest.raises(errors.HandlerEndedTransaction):
        session.commit()


def begins(session: Session) -> None:
    with session.begin():
        session.add(Effect(note="never"))


def rolls_back(session: Session) -> None:
    session.add(Effect(note="never"))
    session.flush()
    session.rollback()


def rolls_back_and_goes_on(session: Session) -> None:
    rolls_back(session)
    session.add(Effect(note="never"))


def closes(session: Session) -> None:
    session.add(Effect(note="never"))
    session.close()


@pytest.mark.parametrize(
    "act", [commits, commits_and_swallows, begins, rolls_back, rolls_back_and_goes_on, closes]
)
def test_a_handler_that_ends_its_transaction_is_refused(
    app: App, act: Callable[[Session], None]
) -> None:
    def handler(session: Session, payload: Fragile) -> None:
        act(session)

    job = app.handle(handler, Fragile())
    assert (job.state, app.effects()) == ("failed", [])
    for each in job.attempts:
        assert each.error_type == "sqlalchemy_jobs.errors.HandlerEndedTransaction"
        assert 'transaction="manual"' in (each.message or "")


def test_savepoints_are_free(app: App) -> None:
    def handler(session: Session, payload: Act) -> None:
        with session.begin_nested():
            session.add(Effect(note="kept"))
        with session.begin_nested() as savepoint:
            session.add(Effect(note="undone"))
            session.flush()
            savepoint.rollback()
        session.begin_nested()
        session.add(Effect(note="left open"))

    assert app.handle(handler).state == "succeeded"
    assert app.effects() == ["kept", "left open"]


def test_the_guard_minds_only_the_session_of_the_run(app: App) -> None:
    def handler(session: Session, payload: Act) -> None:
        with app.sessions.begin() as other:
            other.add(Effect(note="elsewhere"))

    assert app.handle(handler).state == "succeeded"
    assert app.effects() == ["elsewhere"]


def test_a_handler_may_read_its_own_job_but_not_change_it(app: App) -> None:
    def reads(session: Session, payload: Act) -> str:
        return session.get_one(Job, current_run().job_id).state

    def changes(session: Session, payload: Fragile) -> None:
        session.add(Effect(note="never"))
        own = session.get_one(Job, current_run().job_id)
        own.state, own.worker_id = "cancelled", None

    assert app.handle(reads).result == "running"
    job = app.handle(changes, Fragile())
    assert (job.state, job.failures, app.effects()) == ("failed", 3, [])
    assert job.attempts[0].error_type == "sqlalchemy_jobs.errors.HandlerChangedItsJob"


# --- transaction="manual" -----------------------------------------------------------------------------


def test_a_manual_handler_commits_as_often_as_it_likes(app: App) -> None:
    def handler(session: Session, payload: Act) -> None:
        for n in range(3):
            session.add(Effect(note=f"step {n}"))
            session.commit()
        session.add(Effect(note="undone"))
        session.rollback()
        session.add(Effect(note="with its completion"))

    assert app.handle(handler, transaction="manual").state == "succeeded"
    assert app.effects() == ["step 0", "step 1", "step 2", "with its completion"]


def test_what_a_manual_handler_committed_stays_when_it_raises(app: App) -> None:
    def handler(session: Session, payload: Fragile) -> None:
        session.add(Effect(note="committed"))
        session.commit()
        session.add(Effect(note="never"))
        session.flush()
        raise ValueError

    job = app.handle(handler, Fragile(), transaction="manual")
    assert (job.state, job.failures, app.effects()) == ("failed", 3, ["committed"] * 3)


def test_a_manual_handler_whose_job_was_taken_cannot_commit(app: App) -> None:
    def handler(session: Session, payload: Act) -> None:
        with app.sessions.begin() as other:
            taken = update(Job).values(state="ready", worker_id=None, attempt=5)
            if current_run().attempt == 1:
                other.execute(taken)
        session.add(Effect(note=f"run {current_run().attempt}"))
        session.commit()

    job = app.handle(handler, transaction="manual")
    assert (job.state, job.attempt, app.effects()) == ("succeeded", 6, ["run 6"])


# --- ownership ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_session", [True, False])
def test_a_run_whose_job_was_taken_writes_nothing(app: App, use_session: bool) -> None:
    """A stale run: its job was rescued and is another's by now."""
    lost: list[int] = []

    def handler(session: Session, payload: Act) -> None:
        if current_run().attempt == 1:
            with app.sessions.begin() as other:
                other.execute(update(Job).values(state="ready", worker_id=None))
            lost.append(1)
        if use_session:
            session.add(Effect(note=f"run {current_run().attempt}"))

    job = app.handle(handler)
    assert lost == [1]
    assert (job.state, job.attempt, job.failures) == ("succeeded", 2, 0)
    assert app.effects() == (["run 2"] if use_session else [])


def test_a_run_that_lost_against_another_transaction_runs_again_at_once(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serialization failures and deadlocks are no failures of the job, five times in a row."""
    conflicts = {"n": 5}
    is_conflict = type(_dialect(app)).is_conflict
    monkeypatch.setattr(
        type(_dialect(app)),
        "is_conflict",
        lambda self, error: "sham conflict" in str(error) or is_conflict(self, error),
    )

    def handler(session: Session, payload: Fragile) -> None:
        session.add(Effect(note="once"))
        session.flush()
        if conflicts["n"]:
            conflicts["n"] -= 1
            raise OperationalError("sham conflict", {}, Exception())

    job = app.handle(handler, Fragile())
    assert (job.state, job.attempt, job.failures, app.effects()) == ("succeeded", 1, 0, ["once"])
    conflicts["n"] = 1000
    job = App(app.database).handle(handler, Fragile())
    assert (job.state, job.failures, 1000 - conflicts["n"]) == ("failed", 3, 18)


def _dialect(app: App) -> Any:
    from sqlalchemy_jobs import dialects

    return dialects.named(app.database.engine().dialect.name)


# --- what is not run ----------------------------------------------------------------------------------


def test_a_payload_that_no_longer_decodes_goes_through_retry_to_failed(app: App) -> None:
    called: list[object] = []
    app.jobs.handler(Fragile)(lambda session, payload: called.append(payload))
    with app.sessions.begin() as session:
        made = enqueue(Fragile())
        made.payload = {"n": "seven"}
        session.add(made)
    app.drain()
    with app.sessions() as session:
        job = session.scalars(select(Job)).one()
        assert (job.state, job.failures, called) == ("failed", 3, [])
        assert {each.error_type for each in job.attempts} == {
            "sqlalchemy_jobs.errors.InvalidPayload"
        }
        assert "Fragile.n" in (job.attempts[0].message or "")


def test_a_job_that_nobody_serves_stays_ready_and_is_reported(
    app: App, caplog: pytest.LogCaptureFixture
) -> None:
    @job("unheard_of", queue="quiet")
    @dataclass(frozen=True)
    class Unheard:
        n: int = 0

    app.jobs.handler(Act)(lambda session, payload: None)
    with app.sessions.begin() as session:
        session.add(enqueue(Unheard()))
        session.add(enqueue(Act(), queue="unserved"))
    with caplog.at_level(logging.WARNING), app.jobs.worker(queues=["quiet", "default"]):
        until(lambda: '"unserved" has due jobs' in caplog.text and '"unheard_of"' in caplog.text)
    with app.sessions() as session:
        assert set(session.execute(select(Job.state, Job.attempt)).all()) == {("ready", 0)}


# --- around runs ----------------------------------------------------------------------------------------


def test_middleware_and_context_are_around_each_run(app: App) -> None:
    seen: list[str] = []

    @contextmanager
    def context() -> Iterator[None]:
        seen.append("context in")
        yield
        seen.append("context out")

    app.jobs = JobApp(app.sessions, context=context)

    def named(name: str) -> Callable[[Run], Any]:
        @contextmanager
        def middleware(run: Run) -> Iterator[None]:
            seen.append(f"{name} in {run.attempt}")
            try:
                yield
            except ValueError as error:
                seen.append(f"{name} saw {error}")
                raise
            seen.append(f"{name} out")

        return middleware

    app.jobs.middleware(named("outer"))
    app.jobs.middleware(named("inner"))

    def handler(session: Session, payload: Act) -> None:
        seen.append("handler")
        if current_run().attempt == 1:
            raise ValueError("boom")

    assert app.handle(handler).state == "succeeded"
    runs = [each for each in seen if "context" not in each]
    assert runs == [
        *("outer in 1", "inner in 1", "handler", "inner saw boom", "outer saw boom"),
        *("outer in 2", "inner in 2", "handler", "inner out", "outer out"),
    ]
    first = seen.index("outer in 1")
    assert seen[first - 1] == "context in"
    assert seen.count("context in") == seen.count("context out")


def test_a_middleware_that_swallows_an_error_does_not_make_it_a_success(app: App) -> None:
    from contextlib import suppress

    app.jobs.middleware(lambda run: suppress(ValueError))

    def handler(session: Session, payload: Fragile) -> None:
        session.add(Effect(note="never"))
        raise ValueError

    assert (app.handle(handler, Fragile()).state, app.effects()) == ("failed", [])


def test_included_handlers_and_aliases_are_served(app: App) -> None:
    @job("new_name", aliases=["old_name"], upgrade=lambda old: {"n": old.get("n", old.get("m"))})
    @dataclass(frozen=True)
    class Renamed:
        n: int

    group: Handlers[Session, Any] = Handlers()

    @group.handler(Renamed)
    def handler(session: Session, payload: Renamed) -> dict[str, Any]:
        return {"n": payload.n, "kind": current_run().kind}

    app.jobs.include(group)
    app.jobs.include(group)  # twice is once
    with app.sessions.begin() as session:
        session.add(enqueue(Renamed(1)))
        old = enqueue(Renamed(2))
        old.kind, old.payload = "old_name", {"m": 2}
        session.add(old)
    app.drain()
    with app.sessions() as session:
        results = session.scalars(select(Job.result)).all()
        assert sorted(map(json.dumps, results)) == [
            '{"n": 1, "kind": "new_name"}',
            '{"n": 2, "kind": "old_name"}',
        ]


def test_current_run_tells_about_the_run(app: App) -> None:
    def handler(session: Session, payload: Act) -> dict[str, Any]:
        run = current_run()
        return {
            "id": str(run.job_id),
            "kind": run.kind,
            "queue": run.queue,
            "attempt": run.attempt,
            "failures": run.failures,
            "headers": dict(run.headers),
            "should_stop": run.should_stop,
        }

    app.jobs.handler(Act)(handler)
    with app.sessions.begin() as session:
        made = enqueue(Act(), queue="mail", headers={"a": "b"})
        session.add(made)
        job_id = made.id
    app.drain()
    with app.sessions() as session:
        assert session.get_one(Job, job_id).result == {
            "id": str(job_id),
            "kind": "act",
            "queue": "mail",
            "attempt": 1,
            "failures": 0,
            "headers": {"a": "b"},
            "should_stop": False,
        }
    with pytest.raises(errors.NoCurrentRun):
        current_run()


def test_a_thousand_runs_that_did_not_use_their_session_succeed(app: App) -> None:
    app.jobs.handler(Act)(lambda session, payload: None)
    with app.sessions.begin() as session:
        session.add_all(enqueue(Act(n)) for n in range(1000))
    assert Worker(app.jobs, drain=True, concurrency=10).run()
    with app.sessions() as session:
        states = session.execute(select(Job.state, func.count()).group_by(Job.state)).all()
        assert [tuple(each) for each in states] == [("succeeded", 1000)]
