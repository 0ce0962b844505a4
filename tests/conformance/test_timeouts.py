"""A run that takes longer than its timeout is interrupted, counts as a failure, and writes nothing."""

import asyncio
import gc
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
from sqlalchemy import Engine, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from sqlalchemy_jobs import (
    Attempt,
    Job,
    JobApp,
    Run,
    Worker,
    cancel,
    current_run,
    dialects,
    enqueue,
    errors,
    job,
)
from sqlalchemy_jobs.backoff import ByError
from sqlalchemy_jobs.claims import Claim
from sqlalchemy_jobs.worker import slots, timeouts
from sqlalchemy_jobs.worker.handling import ThreadHandling
from sqlalchemy_jobs.worker.pools import Pools
from tests.databases import Database
from tests.domain import Effect
from tests.waiting import until

NOW = timedelta(0)
SOON = timedelta(seconds=0.2)
FOR_EVER = 3600


@job("slow", timeout=SOON, max_attempts=2, backoff=lambda failures: NOW)
@dataclass(frozen=True)
class Slow:
    n: int = 0


@job("quick", timeout=timedelta(hours=1))
@dataclass(frozen=True)
class Quick:
    n: int = 0


class App:
    """An app on a database, and what becomes of its jobs."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.engine: Engine = database.engine()
        self.sessions = database.sessions()
        self.sessions.configure(bind=self.engine)
        self.jobs: JobApp[Any, Any] = JobApp(self.sessions)

    def add(self, *payloads: Any) -> None:
        with self.sessions.begin() as session:
            session.add_all(enqueue(payload) for payload in payloads)

    def drain(self, **options: Any) -> None:
        assert Worker(self.jobs, drain=True, **{"concurrency": 1} | options).run()

    def run(self, handler: Callable[[Session, Any], Any], **how: Any) -> Job:
        """Work on one slow job until it is final; return it."""
        self.jobs.handler(Slow, **how)(handler)
        self.add(Slow())
        self.drain()
        return self.one()

    def one(self) -> Job:
        with self.sessions() as session:
            found = session.scalars(select(Job)).one()
            _ = found.attempts
            return found

    def effects(self) -> list[str]:
        with self.sessions() as session:
            return list(session.scalars(select(Effect.note).order_by(Effect.id)))

    def timed_out_twice(self, found: Job) -> None:
        assert (found.state, found.failures, found.attempt) == ("failed", 2, 2)
        assert [each.outcome for each in found.attempts] == ["timed_out", "timed_out"]
        for each in found.attempts:
            assert each.message and "took longer than its timeout of 0:00:00.2" in each.message
        assert self.effects() == []


@pytest.fixture
def app(database: Database) -> App:
    return App(database)


def long_statement(database: str) -> str:
    """A statement that would run for minutes."""
    if database == "sqlite":
        return (
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000000000) "
            "SELECT max(i) FROM n"
        )
    return "SELECT pg_sleep(600)" if database == "postgresql" else "SELECT SLEEP(600)"


# --- how a handler is interrupted ---------------------------------------------------------------------


def test_a_statement_that_runs_too_long_is_cancelled_at_the_server(app: App) -> None:
    def handler(session: Session, payload: Slow) -> None:
        session.add(Effect(note="never"))
        session.flush()
        session.execute(text(long_statement(app.database.name)))

    found = app.run(handler)
    app.timed_out_twice(found)
    assert found.attempts[0].traceback and "in handler" in found.attempts[0].traceback


def test_a_loop_in_python_is_interrupted_by_an_exception_that_except_exception_lets_through(
    app: App,
) -> None:
    seen: list[bool] = []

    def handler(session: Session, payload: Slow) -> None:
        session.add(Effect(note="never"))
        session.flush()
        while True:
            try:
                time.sleep(0.001)
            except Exception:
                raise AssertionError("it is no Exception") from None
            except BaseException:
                seen.append(current_run().should_stop and current_run().timed_out)
                raise

    found = app.run(handler)
    app.timed_out_twice(found)
    assert seen == [True, True]
    assert found.attempts[0].error_type == "sqlalchemy_jobs.errors.RunInterrupted"


@pytest.mark.parametrize("use_session", [True, False])
def test_a_handler_that_swallows_everything_and_returns_has_timed_out_all_the_same(
    app: App, use_session: bool
) -> None:
    def handler(session: Session, payload: Slow) -> str:
        if use_session:
            session.add(Effect(note="never"))
        until(lambda: current_run().should_stop)
        try:
            while True:
                time.sleep(0.001)
        except BaseException:
            return "as if nothing had happened"

    app.timed_out_twice(app.run(handler))


def test_a_handler_that_heeds_should_stop_and_returns_has_timed_out(app: App) -> None:
    def handler(session: Session, payload: Slow) -> None:
        session.add(Effect(note="never"))
        try:
            until(lambda: current_run().should_stop)
        except errors.RunInterrupted:
            return

    app.timed_out_twice(app.run(handler))


def test_a_manual_handler_commits_nothing_once_it_has_timed_out(app: App) -> None:
    refused: list[type[BaseException]] = []

    def handler(session: Session, payload: Slow) -> None:
        session.execute(text("SELECT 1"))
        session.commit()
        try:
            until(lambda: current_run().should_stop)
            while True:
                time.sleep(0.001)
        except errors.RunInterrupted:
            session.add(Effect(note="never"))
            try:
                session.commit()
            except BaseException as error:
                refused.append(type(error))
                raise

    app.timed_out_twice(app.run(handler, transaction="manual"))
    assert refused == [errors.RunInterrupted] * 2


def test_the_flush_of_what_the_handler_left_pending_is_within_its_time(app: App) -> None:
    """Another transaction holds what it is about to insert."""
    if app.database.name == "sqlite":
        pytest.skip("one writer at a time: nothing is locked but everything")

    def handler(session: Session, payload: Slow) -> None:
        session.add(Effect(id=1, note="never"))

    with app.sessions() as other:
        other.add(Effect(id=1, note="held"))
        other.flush()
        app.timed_out_twice(app.run(handler))
        other.rollback()


def test_a_job_with_attempts_left_is_retried_after_its_backoff(app: App) -> None:
    given: list[tuple[int, type[BaseException]]] = []

    def backoff(failures: int, error: BaseException) -> timedelta:
        given.append((failures, type(error)))
        return timedelta(hours=1)

    @job("patient", timeout=SOON, backoff=ByError(backoff))
    @dataclass(frozen=True)
    class Patient:
        n: int = 0

    @app.jobs.handler(Patient)
    def handler(session: Session, payload: Patient) -> None:
        while True:
            time.sleep(0.001)

    app.add(Patient())
    app.drain()
    found = app.one()
    assert (found.state, found.failures, given) == ("ready", 1, [(1, errors.RunInterrupted)])
    assert found.run_at - found.attempts[0].finished_at > timedelta(minutes=59)


def test_a_run_in_time_knows_its_deadline_and_is_left_alone(app: App) -> None:
    seen: list[datetime | None] = []

    @app.jobs.handler(Quick)
    def handler(session: Session, payload: Quick) -> None:
        seen.append(current_run().deadline)

    before = datetime.now(UTC)
    app.add(Quick())
    app.drain()
    assert app.one().state == "succeeded"
    (deadline,) = seen
    assert deadline is not None
    assert before + timedelta(hours=1) <= deadline <= datetime.now(UTC) + timedelta(hours=1)


def test_no_thread_watches_where_no_kind_has_a_timeout(sqlite: Database) -> None:
    @job("unhurried")
    @dataclass(frozen=True)
    class Unhurried:
        n: int = 0

    def watchers() -> set[str]:
        return {each.name for each in threading.enumerate() if "timeouts" in each.name}

    for payload, expected in ((Unhurried, set()), (Quick, {"sajobs-timeouts"})):
        app = App(sqlite)
        app.jobs.handler(payload)(lambda session, payload: None)
        with app.jobs.worker():
            assert watchers() == expected


# --- what else is not hit -----------------------------------------------------------------------------


# The exception may come where Python cannot raise it: in a finaliser, or while a socket is being opened.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_runs_that_end_near_their_deadline_end_in_one_of_two_ways(app: App) -> None:
    """Nothing of the library is hit, no connection is left in pieces, and every effect is one success."""

    @job("close_call", timeout=timedelta(seconds=0.15), max_attempts=1)
    @dataclass(frozen=True)
    class CloseCall:
        n: int = 0

    @app.jobs.handler(CloseCall)
    def handler(session: Session, payload: CloseCall) -> None:
        session.add(Effect(note=str(payload.n)))
        session.flush()
        end = time.monotonic() + 0.1 + payload.n % 12 / 120
        while time.monotonic() < end:
            session.execute(text("SELECT 1"))

    app.add(*(CloseCall(n) for n in range(24)))
    app.drain(concurrency=8)
    with app.sessions() as session:
        ended = {each.payload["n"]: each.state for each in session.scalars(select(Job))}
        outcomes = list(session.scalars(select(Attempt.outcome)))
    assert len(ended) == 24 and set(ended.values()) <= {"succeeded", "failed"}
    assert outcomes == ["timed_out"] * list(ended.values()).count("failed")
    succeeded = sorted(str(n) for n, state in ended.items() if state == "succeeded")
    assert sorted(app.effects()) == succeeded
    gc.collect()


def test_only_a_connection_that_the_run_holds_has_its_statement_cancelled(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a manual handler has given back to the pool may be in use by another run."""
    held: list[bool] = []
    cancelled: list[bool] = []
    dialect = type(dialects.named(app.engine.dialect.name))
    monkeypatch.setattr(dialect, "cancel_statement", lambda *arguments: cancelled.append(held[-1]))

    def handler(session: Session, payload: Slow) -> None:
        session.execute(text("SELECT 1"))
        held.append(current_run().attempt == 1)
        if not held[-1]:
            session.commit()
        while True:
            time.sleep(0.001)

    app.timed_out_twice(app.run(handler, transaction="manual"))
    assert held == [True, False] and cancelled == [True]


def test_a_connection_that_the_exception_may_have_hit_is_not_used_again(
    row_locks: Database,
) -> None:
    app, seen = App(row_locks), []
    number = "pg_backend_pid()" if row_locks.name == "postgresql" else "connection_id()"

    def handler(session: Session, payload: Slow) -> None:
        seen.append(session.scalar(text(f"SELECT {number}")))
        while True:
            time.sleep(0.001)

    app.timed_out_twice(app.run(handler))
    assert len(set(seen)) == 2


def test_an_exception_on_its_way_into_a_handler_does_not_come_out_behind_it() -> None:
    """The run is interrupted just when its thread has gone in, and the exception comes late."""
    run = Run(Claim(uuid.uuid4(), 1, uuid.uuid4()))
    noted, decided = threading.Event(), threading.Event()
    hit: list[BaseException] = []

    class Late(ThreadHandling):
        def _note(self, timed_out: bool) -> None:
            super()._note(timed_out)
            noted.set()

        def _reach(self) -> None:
            assert decided.wait(20)
            super()._reach()

    class Lock:
        """When the handler's thread has let go of it for the first time, the other one takes it."""

        def __init__(self) -> None:
            self._lock = threading.Lock()

        def __enter__(self) -> None:
            self._lock.acquire()

        def __exit__(self, *error: object) -> None:
            self._lock.release()
            if not noted.is_set():
                interrupting.start()
                assert noted.wait(20)

    def work() -> None:
        try:
            try:
                with handling:
                    decided.set()
            except errors.RunInterrupted:
                decided.set()
            end = time.monotonic() + 20
            while interrupting.is_alive() and time.monotonic() < end:  # here is the library's code
                time.sleep(0.001)
        except BaseException as error:
            hit.append(error)

    def make() -> None:
        nonlocal handling
        handling = Late(run, cast(Any, None))
        handling._lock = cast(Any, Lock())
        work()

    handling: Late = cast(Any, None)
    interrupting = threading.Thread(target=lambda: handling.interrupt(timed_out=True))
    thread = threading.Thread(target=make)
    thread.start()
    thread.join(20)
    interrupting.join(20)
    assert run.timed_out and hit == []


def test_an_async_handler_that_is_released_at_the_end_may_clean_up(row_locks: Database) -> None:
    app, engine = App(row_locks), row_locks.async_engine(poolclass=NullPool)
    app.jobs = JobApp(async_sessionmaker(engine))
    started = threading.Event()
    cleaned_up: list[bool] = []

    @app.jobs.handler(Quick)
    async def handler(session: AsyncSession, payload: Quick) -> None:
        try:
            started.set()
            await asyncio.sleep(FOR_EVER)
        finally:
            await asyncio.sleep(0.5)  # a second cancellation would cut this short
            cleaned_up.append(True)

    app.add(Quick())
    with app.jobs.worker(concurrency=1, shutdown_timeout=NOW):
        assert started.wait(20)
    assert cleaned_up == [True]
    assert [each.outcome for each in app.one().attempts] == ["released"]


def test_a_session_of_the_same_number_on_another_server_is_left_alone(mysql: Database) -> None:
    """As behind a balancer: the connection that is to kill has reached another member than the handler's."""
    dialect, sessions = dialects.named("mysql"), mysql.sessions()

    def transaction(work: Callable[[Session], Any]) -> Any:
        with sessions.begin() as session:
            return work(session)

    with mysql.engine().connect() as connection:
        here = dialect.cancellable(connection)
        number = connection.scalar(text("SELECT CONNECTION_ID()"))
        assert here["number"] == number and dialect.cancellable(connection) is here

        def sleeps() -> bool:
            running = "SELECT info FROM information_schema.processlist WHERE id = :id"
            info = transaction(lambda session: session.scalar(text(running), {"id": number}))
            return "SLEEP" in (info or "")

        def sleep() -> None:
            with suppress(DBAPIError):  # some servers say so, some return 1
                connection.execute(text("SELECT SLEEP(60)"))

        sleeping = threading.Thread(target=sleep)
        sleeping.start()
        until(sleeps)
        for elsewhere in ({"host": "elsewhere"}, {"port": 1}, {"number": 0}):
            with pytest.raises(DBAPIError, match="Unknown thread id"):
                dialect.cancel_statement(here | elsewhere, transaction)
            assert sleeps()
        dialect.cancel_statement(here, transaction)
        sleeping.join(20)
        assert not sleeping.is_alive()


# --- handlers that do not come back -------------------------------------------------------------------


@pytest.fixture
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeouts, "GRACE", 0.1)


class Stuck:
    """Hangs in C, where no exception can reach it, until it is let go."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self._threads: list[threading.Thread] = []

    def __call__(self) -> None:
        self._threads.append(threading.current_thread())
        with self._lock:
            pass

    def let_go(self) -> None:
        if self._lock.locked():
            self._lock.release()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(20)


@contextmanager
def stuck() -> Iterator[Stuck]:
    hang = Stuck()
    try:
        yield hang
    finally:
        hang.let_go()
        hang.join()


def test_a_thread_that_does_not_come_back_is_replaced_and_its_late_work_refused(
    app: App, no_grace: None
) -> None:
    @app.jobs.handler(Quick)
    def quick(session: Session, payload: Quick) -> None:
        session.add(Effect(note="quick"))

    with stuck() as hang:

        @app.jobs.handler(Slow)
        def slow(session: Session, payload: Slow) -> None:
            hang()
            session.add(Effect(note="never"))

        app.add(Slow())
        app.drain(concurrency=4)  # so that two may hang
        found = app.one()
        assert (found.state, found.failures) == ("failed", 2)
        assert [each.outcome for each in found.attempts] == ["timed_out", "timed_out"]
        for each in found.attempts:
            assert each.message and "did not come back" in each.message
            assert each.traceback and "in __call__" in each.traceback
        app.add(Quick())
        app.drain()
    assert app.effects() == ["quick"]


def test_a_run_that_waits_behind_its_handler_when_its_time_is_over_gives_its_slot_up(
    row_locks: Database, no_grace: None
) -> None:
    """Somebody holds the job's row, so the handler's transaction cannot be ended."""

    @job("held", timeout=timedelta(seconds=1), backoff=lambda failures: NOW)
    @dataclass(frozen=True)
    class Held:
        n: int = 0

    app = App(row_locks)
    started, go, done = threading.Event(), threading.Event(), threading.Event()
    app.jobs.handler(Quick)(lambda session, payload: done.set())

    @app.jobs.handler(Held)
    def held(session: Session, payload: Held) -> None:
        session.add(Effect(note="once"))
        session.flush()
        started.set()
        assert go.wait(20)

    made = enqueue(Held())
    job_id = made.id
    with app.sessions.begin() as session:
        session.add(made)
    with app.jobs.worker(concurrency=1):
        assert started.wait(20)
        app.add(Quick())
        with app.sessions() as other:
            assert cancel(other, job_id)
            go.set()
            assert done.wait(20)
            other.rollback()

        def state() -> str:
            with app.sessions() as session:
                return session.get_one(Job, job_id).state

        until(lambda: state() == "succeeded")
    assert app.effects() == ["once"]


def test_too_many_hanging_threads_take_slots_away_until_they_come_back(
    sqlite: Database,
    no_grace: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = App(sqlite)
    done = threading.Event()
    app.jobs.handler(Quick)(lambda session, payload: done.set())
    running: list[int] = []
    with stuck() as hang:

        @app.jobs.handler(Slow)
        def slow(session: Session, payload: Slow) -> None:
            running.append(payload.n)
            hang()

        with app.jobs.worker(concurrency=1) as worker:
            app.add(Slow(1), Slow(2))
            until(lambda: "less is claimed until they come back" in caplog.text)
            parts = worker._parts
            assert parts is not None
            until(lambda: parts.slots.is_idle())
            app.add(Quick())
            assert parts.slots.room() == (0, {})
            assert len(running) == 2 and not done.is_set()
            hang.let_go()
            assert done.wait(20)


@pytest.mark.parametrize(("total", "allowed"), [(1, 1), (3, 1), (8, 4)])
def test_half_as_many_runs_as_there_are_slots_may_hang_for_nothing(
    total: int, allowed: int
) -> None:
    held = slots.Slots(total, Pools({}), lambda: None)
    for hung in range(1, allowed + total + 1):
        run = Run(Claim(uuid.uuid4(), 1, uuid.uuid4()))
        held.take([run])
        assert held.next() is run and held.give_up(run)
        held.disown([run])
        assert held.room()[0] == total - max(0, hung - allowed)


def test_a_run_that_ends_while_it_is_given_up_is_ended_once() -> None:
    """Whoever is first hands it on, and the slot is freed once."""
    held = slots.Slots(1, Pools({}), lambda: None)
    run = Run(Claim(uuid.uuid4(), 1, uuid.uuid4()))
    held.take([run])
    assert held.next() and held.give_up(run) and not held.ended(run)
    run = Run(Claim(uuid.uuid4(), 1, uuid.uuid4()))
    held.take([run])
    assert held.next() and held.ended(run) and not held.give_up(run)
    assert held.room()[0] == 1


def test_async_handlers_are_cancelled(database: Database) -> None:
    cleaned_up: list[bool] = []
    app, engine = App(database), database.async_engine(poolclass=NullPool)
    app.jobs = JobApp(async_sessionmaker(engine))

    @app.jobs.handler(Slow)
    async def handler(session: AsyncSession, payload: Slow) -> None:
        session.add(Effect(note="never"))
        await session.flush()
        try:
            await asyncio.sleep(FOR_EVER)
        except asyncio.CancelledError:
            cleaned_up.append(current_run().timed_out)
            raise

    app.add(Slow())
    app.drain()
    app.timed_out_twice(app.one())
    assert cleaned_up == [True, True]
