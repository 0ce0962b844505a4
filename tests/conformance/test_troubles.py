"""What must hold when something goes wrong around a run: at its commit, at its start, at its settling, at the end."""

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, func, select, update
from sqlalchemy.exc import InternalError, OperationalError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

import sqlalchemy_jobs
from sqlalchemy_jobs import (
    Attempt,
    Cancel,
    Fail,
    Job,
    JobApp,
    Worker,
    WorkerRow,
    current_run,
    enqueue,
    enqueue_many,
    job,
    transitions,
)
from sqlalchemy_jobs.claims import Claim
from sqlalchemy_jobs.worker import (
    control,
    execution,
    leases,
    loops,
    maintenance,
    reconciling,
    settling,
)
from sqlalchemy_jobs.worker import worker as worker_module
from sqlalchemy_jobs.worker.event_loop import EventLoop
from sqlalchemy_jobs.worker.leases import register
from sqlalchemy_jobs.worker.maintenance import find_unserved
from tests import domain
from tests.databases import Database
from tests.domain import Effect
from tests.look import Look
from tests.waiting import until

AT_ONCE = timedelta(0)


@job("trouble", backoff=lambda failures: AT_ONCE)
@dataclass(frozen=True)
class Trouble:
    note: str = ""


@job("twice", max_attempts=2, backoff=lambda failures: AT_ONCE)
@dataclass(frozen=True)
class Twice:
    note: str = ""


class Failures(Look):
    def failures(self) -> int:
        with self.sessions() as session:
            return session.scalars(select(func.sum(Job.failures))).one()

    def errors(self) -> list[tuple[str, str | None]]:
        """Outcome and type of error of the runs that did not succeed."""
        with self.sessions() as session:
            query = select(Attempt.outcome, Attempt.error_type).order_by(Attempt.finished_at)
            return [tuple(each) for each in session.execute(query)]  # type: ignore[misc]


@pytest.fixture
def look(request: pytest.FixtureRequest) -> Failures:
    """At whichever database the test uses; through sessions of its own."""
    (name,) = (name for name in ("database", "sqlite") if name in request.fixturenames)
    database: Database = request.getfixturevalue(name)
    return Failures(database.session)


# --- an error at the commit ---------------------------------------------------------------------------


@pytest.mark.parametrize("transaction", ["wrapped", "manual"])
def test_an_error_of_a_commit_listener_is_a_failure_of_the_job(
    database: Database, look: Failures, transaction: Any
) -> None:
    """The user's own rule refused the work: it is not written, and not tried for ever."""
    sessions = database.sessions()
    app: JobApp[Any, Any] = JobApp(sessions)
    calls: list[None] = []

    @event.listens_for(sessions, "before_commit")
    def rule(session: Session) -> None:
        raise ValueError("a rule of the domain was broken")

    @app.handler(Twice, transaction=transaction)
    def handler(session: Session, payload: Twice) -> None:
        calls.append(None)
        session.add(Effect(note="never"))

    look.add(Twice())
    with app.worker(shutdown_timeout=AT_ONCE):
        until(lambda: look.states() == {"failed": 1})
    assert (len(calls), look.failures(), look.effects()) == (2, 2, [])
    assert look.errors() == [("failed", "ValueError")] * 2


def test_an_error_of_a_commit_listener_is_a_failure_of_an_async_job(
    sqlite: Database, look: Failures
) -> None:
    class Ruled(Session): ...

    @event.listens_for(Ruled, "before_commit")
    def rule(session: Session) -> None:
        raise ValueError("a rule of the domain was broken")

    app: JobApp[Any, Any] = JobApp(
        async_sessionmaker(sqlite.async_engine(), sync_session_class=Ruled)
    )

    @app.handler(Twice)
    async def handler(session: AsyncSession, payload: Twice) -> None:
        session.add(Effect(note="never"))

    look.add(Twice())
    with app.worker(shutdown_timeout=AT_ONCE):
        until(lambda: look.states() == {"failed": 1})
    assert (look.failures(), look.effects()) == (2, [])
    assert look.errors() == [("failed", "ValueError")] * 2


def test_a_handler_that_commits_its_connection_fails_and_does_not_run_for_ever(
    database: Database, look: Failures
) -> None:
    """The guard does not see such a commit; the worker's own then finds its transaction gone."""
    app: JobApp[Any, Any] = JobApp(database.sessions())
    calls: list[None] = []

    @app.handler(Twice)
    def handler(session: Session, payload: Twice) -> None:
        calls.append(None)
        session.connection().commit()

    look.add(Twice())
    with app.worker(shutdown_timeout=AT_ONCE):
        until(lambda: look.states() == {"failed": 1})
    assert (len(calls), look.failures()) == (2, 2)
    assert [outcome for outcome, _ in look.errors()] == ["failed"] * 2


# --- results and outcomes that are refused ------------------------------------------------------------


@pytest.mark.parametrize("use_session", [True, False])
@pytest.mark.parametrize(
    "result",
    ["a\0b", {"k": ["\ud800"]}, {"\0": 1}, 10**5000],
    ids=["NUL", "surrogate", "NUL in a key", "int of 5000 digits"],
)
def test_a_result_that_no_database_stores_is_refused_before_it_gets_there(
    database: Database, look: Failures, result: Any, use_session: bool
) -> None:
    app: JobApp[Any, Any] = JobApp(database.sessions())

    @app.handler(Twice)
    def handler(session: Session, payload: Twice) -> Any:
        if use_session:
            session.add(Effect(note="never"))
        return result

    look.add(Twice())
    with app.worker(shutdown_timeout=AT_ONCE):
        until(lambda: look.states() == {"failed": 1})
    assert look.errors() == [("failed", "sqlalchemy_jobs.errors.ResultError")] * 2
    assert (look.failures(), look.effects()) == (2, [])


@pytest.mark.parametrize("outcome", [Cancel, Fail])
def test_a_reason_that_is_no_string_is_told_to_the_handler_that_gives_it(
    sqlite: Database, look: Failures, outcome: Any
) -> None:
    """Not to the worker, when it writes the reason down."""
    app: JobApp[Any, Any] = JobApp(sqlite.sessions())

    @app.handler(Twice)
    def handler(session: Session, payload: Twice) -> None:
        with pytest.raises(TypeError, match=r"\(5\): the reason is a string"):
            outcome(5)
        outcome(5)

    look.add(Twice())
    with app.worker(shutdown_timeout=AT_ONCE):
        until(lambda: look.states() == {"failed": 1})
    assert look.errors() == [("failed", "TypeError")] * 2


# --- a run that is given up before it has begun -------------------------------------------------------


@job("quick", backoff=lambda failures: AT_ONCE)
@dataclass(frozen=True)
class Quick:
    n: int = 0


@job("meet", backoff=lambda failures: AT_ONCE)
@dataclass(frozen=True)
class Meet:
    n: int = 0


LEASE = timedelta(seconds=1)


@dataclass
class Blocked:
    """A worker of concurrency 3 with one run that blocks the event loop, and two that wait for their first step.

    The loop goes on when all three were cancelled.
    """

    worker: Worker
    look: Failures
    began: threading.Event = field(default_factory=threading.Event)
    started: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    went_on: threading.Event = field(default_factory=threading.Event)

    def fill(self) -> None:
        self.look.add(Trouble())
        assert self.began.wait(20)
        for n in range(2):
            self.look.add(Quick(n))
        # Not only claimed by their rows: a run that the loop was not given yet is not cancelled there.
        for _ in range(3):
            assert self.started.acquire(timeout=20)

    def works_on(self) -> None:
        """Every job gets done, and three at once: no slot is lost."""
        until(lambda: self.look.states() == {"succeeded": 3})
        for n in range(3):
            self.look.add(Meet(n))
        until(lambda: self.look.states(kind="meet") == {"succeeded": 3})


@pytest.fixture
def blocked(sqlite: Database, look: Failures, monkeypatch: pytest.MonkeyPatch) -> Blocked:
    monkeypatch.setattr(maintenance, "SWEEP", 0.1)
    cancelled = threading.Semaphore(0)
    original_cancel, original_start = EventLoop.cancel, EventLoop.start

    def cancel(loop: EventLoop, run: Any) -> None:
        original_cancel(loop, run)
        cancelled.release()

    def start(loop: EventLoop, run: Any, handler: Any) -> None:
        original_start(loop, run, handler)
        made.started.release()

    monkeypatch.setattr(EventLoop, "cancel", cancel)
    monkeypatch.setattr(EventLoop, "start", start)
    app: JobApp[Any, Any] = JobApp(async_sessionmaker(sqlite.async_engine()))
    meeting = asyncio.Barrier(3)

    @app.handler(Trouble)
    async def block(session: AsyncSession, payload: Trouble) -> None:
        if current_run().attempt == 1:
            made.began.set()
            for _ in range(3):
                assert cancelled.acquire(timeout=20)
            made.went_on.set()

    @app.handler(Quick)
    async def quick(session: AsyncSession, payload: Quick) -> None: ...

    @app.handler(Meet)
    async def meet(session: AsyncSession, payload: Meet) -> None:
        await asyncio.wait_for(meeting.wait(), 15)

    made = Blocked(app.worker(concurrency=3, lease=LEASE, shutdown_timeout=AT_ONCE), look)
    return made


def test_async_runs_that_had_not_begun_when_their_worker_was_declared_dead_lose_no_slot(
    blocked: Blocked,
) -> None:
    with blocked.worker:
        blocked.fill()
        with blocked.look.sessions.begin() as session:
            session.execute(update(WorkerRow).values(state="dead"))
        assert blocked.went_on.wait(20)
        blocked.works_on()


def test_async_runs_that_had_not_begun_when_the_lease_ended_are_handed_back(
    blocked: Blocked, monkeypatch: pytest.MonkeyPatch
) -> None:
    with blocked.worker:
        blocked.fill()
        with monkeypatch.context() as outage:

            def away(*args: Any) -> bool:
                raise ConnectionError("the network is down")

            outage.setattr(leases, "renew", away)
            assert blocked.went_on.wait(20)
        blocked.works_on()
    assert blocked.look.failures() == 0


def test_async_runs_that_had_not_begun_at_the_shutdown_are_given_back(blocked: Blocked) -> None:
    with blocked.worker:
        blocked.fill()
    assert blocked.went_on.wait(20)  # the loop may go on a moment after the worker gave it up
    assert blocked.look.states(kind="quick") == {"ready": 2}
    assert "running" not in blocked.look.states()
    assert blocked.look.errors() == []
    assert blocked.look.failures() == 0


# --- a thread that cannot be started ------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("concurrency", [1, 2])
def test_a_handler_thread_that_cannot_be_started_releases_its_run_and_the_worker_works_on(
    sqlite: Database,
    look: Failures,
    monkeypatch: pytest.MonkeyPatch,
    times: int,
    concurrency: int,
) -> None:
    monkeypatch.setattr(reconciling, "RECONCILE", 0.1)  # gives back the rest of the same claim
    refusals = ["can't start new thread"] * times
    original = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name.startswith("sajobs-handler") and refusals:
            raise RuntimeError(refusals.pop())
        original(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    app: JobApp[Any, Any] = JobApp(sqlite.sessions())
    meeting = threading.Barrier(concurrency)

    @app.handler(Trouble)
    def handler(session: Session, payload: Trouble) -> None:
        meeting.wait(15)  # as many at once as before
        session.add(Effect(note=payload.note))

    notes = [str(n) for n in range(6)]
    for note in notes:
        look.add(Trouble(note))
    with app.worker(concurrency=concurrency, shutdown_timeout=AT_ONCE):
        until(lambda: look.states() == {"succeeded": 6})
    assert refusals == []
    assert (sorted(look.effects()), look.failures()) == (notes, 0)
    assert set(look.errors()) == {("released", None)}


# --- an end that cannot be written down for a while ---------------------------------------------------


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """While it is set, the server refuses all that the worker itself writes, as a standby does."""
    refusing = threading.Event()
    original = control._set_up

    def set_up(engine: Engine) -> None:
        @event.listens_for(engine, "begin")
        def begin(connection: Any) -> None:
            if engine.dialect.name == "sqlite":
                connection.exec_driver_sql(f"PRAGMA query_only = {int(refusing.is_set())}")
                return
            # For statements that are transactions of their own, and for this transaction.
            refuses = "on" if refusing.is_set() else "off"
            if engine.dialect.name == "postgresql":
                connection.exec_driver_sql(f"SET default_transaction_read_only = {refuses}")
            if refusing.is_set():
                connection.exec_driver_sql("SET TRANSACTION READ ONLY")

        original(engine)  # it begins SQLite's transactions, which a read-only one cannot

    monkeypatch.setattr(control, "_set_up", set_up)
    monkeypatch.setattr(control, "KEPT", 0.0)  # a session that is kept has begun before
    yield refusing
    refusing.clear()


@pytest.mark.parametrize("how", ["None", "result", "raises"])
def test_a_server_that_is_read_only_for_a_while_costs_no_job_and_no_second_run(
    database: Database,
    look: Failures,
    read_only: threading.Event,
    caplog: pytest.LogCaptureFixture,
    how: str,
) -> None:
    app: JobApp[Any, Any] = JobApp(database.sessions())
    calls: Counter[str] = Counter()
    began, go_on = threading.Semaphore(0), threading.Event()

    @app.handler(Trouble)
    def handler(session: Session, payload: Trouble) -> str | None:
        calls[payload.note] += 1
        if current_run().attempt == 1:
            began.release()
            assert go_on.wait(20)
        if how == "raises" and current_run().failures == 0:
            raise ValueError("once")
        return "a result" if how == "result" else None

    notes = ["a", "b", "c"]
    for note in notes:
        look.add(Trouble(note))

    def refused() -> int:
        return caplog.messages.count("sajobs-settle: trying again")

    with app.worker(concurrency=3, shutdown_timeout=AT_ONCE):
        for _ in notes:
            assert began.acquire(timeout=20)
        read_only.set()
        go_on.set()
        until(lambda: refused() >= 3)
        assert look.states() == {"running": 3}
        read_only.clear()
        until(lambda: look.states() == {"succeeded": 3})
    failed = 3 if how == "raises" else 0
    assert calls == dict.fromkeys(notes, 2 if failed else 1)
    assert look.failures() == failed
    assert look.errors() == [("failed", "ValueError")] * failed


@pytest.mark.parametrize("error", [OperationalError, InternalError])
@pytest.mark.parametrize("times", [1, 2, 3, 4, 5])
def test_an_end_that_is_refused_is_written_down_at_a_later_try(
    sqlite: Database, look: Failures, monkeypatch: pytest.MonkeyPatch, error: Any, times: int
) -> None:
    """At whichever try the refusal is over: a job does not fail for it, and is not given up."""
    monkeypatch.setattr(settling, "PATIENCE", 0.0, raising=False)
    monkeypatch.setattr(reconciling, "RECONCILE", 0.1)  # gives back what nobody owns
    refusals = [error("BEGIN", {}, Exception(3100, "refused for a while"))] * times
    original = control._set_up

    def set_up(engine: Engine) -> None:
        original(engine)

        @event.listens_for(engine, "begin")
        def begin(connection: Any) -> None:
            if threading.current_thread().name == "sajobs-settle" and refusals:
                raise refusals.pop()

    monkeypatch.setattr(control, "_set_up", set_up)
    app: JobApp[Any, Any] = JobApp(sqlite.sessions())
    calls: list[None] = []
    app.handler(Trouble)(lambda session, payload: calls.append(None))
    look.add(Trouble())
    with app.worker(shutdown_timeout=AT_ONCE):
        until(lambda: not look.states().keys() & {"ready", "running"})
    assert refusals == []
    assert (look.states(), look.errors(), len(calls)) == ({"succeeded": 1}, [], 1)


def test_a_run_whose_end_is_refused_for_a_while_does_not_hold_up_the_others(
    sqlite: Database, look: Failures, monkeypatch: pytest.MonkeyPatch
) -> None:
    app: JobApp[Any, Any] = JobApp(sqlite.sessions())
    calls: Counter[str] = Counter()
    original = transitions.settle
    refusals: list[None] = []
    over = threading.Event()

    def settle(session: Session, claim: Claim, transition: Any) -> bool | None:
        if claim.job_id == first and not over.is_set():
            refusals.append(None)
            raise OperationalError("UPDATE", {}, Exception(3100, "refused for a while"))
        return original(session, claim, transition)

    monkeypatch.setattr(transitions, "settle", settle)

    @app.handler(Trouble)
    def handler(session: Session, payload: Trouble) -> str:
        calls[payload.note] += 1
        return payload.note

    first = look.add(Trouble("first"), queue="first")
    with app.worker(shutdown_timeout=AT_ONCE):
        until(lambda: bool(refusals))
        for n in range(5):
            look.add(Trouble(str(n)))
        until(lambda: look.states(queue="default") == {"succeeded": 5})
        assert look.states(queue="first") == {"running": 1}
        over.set()
        until(lambda: look.states() == {"succeeded": 6})
    assert set(calls.values()) == {1}
    assert look.errors() == []


# --- an end in bounded time ---------------------------------------------------------------------------


@dataclass
class InThread:
    """A worker whose run() was called in a thread."""

    worker: Worker
    returned: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.returned.append(self.worker.run())

    def returns_within(self, seconds: float) -> bool:
        self._thread.join(seconds)
        return not self._thread.is_alive()


def test_a_handler_that_blocks_its_own_loop_does_not_keep_the_worker_from_ending(
    sqlite: Database, look: Failures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "RELEASE_WAIT", 0.1)
    monkeypatch.setattr(loops, "LAST_STEP", 0.2)
    app: JobApp[Any, Any] = JobApp(async_sessionmaker(sqlite.async_engine()))
    began, go_on = threading.Event(), threading.Event()
    loops_: list[threading.Thread] = []

    @app.handler(Trouble)
    async def handler(session: AsyncSession, payload: Trouble) -> None:
        loops_.append(threading.current_thread())
        began.set()
        assert go_on.wait(60)

    look.add(Trouble())
    running = InThread(app.worker(shutdown_timeout=timedelta(seconds=0.1)))
    try:
        assert began.wait(20)
        running.worker.stop()
        assert running.returns_within(30), "run() waits for the loop"
        assert running.returned == [False]
    finally:
        go_on.set()
    assert running.returns_within(20)
    loops_[0].join(20)
    assert not loops_[0].is_alive(), "the loop ends when it can"


def test_however_often_a_worker_is_told_to_stop_it_releases_what_hangs(
    database: Database, look: Failures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second stop() ends the waiting for the run, a third must not end the waiting for its release."""
    app: JobApp[Any, Any] = JobApp(database.sessions())
    began, go_on = threading.Event(), threading.Event()
    original = transitions.settle
    refusals = [OperationalError("UPDATE", {}, Exception(3100, "refused for a while"))]

    def settle(*args: Any) -> bool | None:
        if refusals:
            raise refusals.pop()  # so that the release takes longer than a moment
        return original(*args)

    monkeypatch.setattr(transitions, "settle", settle)

    @app.handler(Trouble)
    def handler(session: Session, payload: Trouble) -> None:
        began.set()
        assert go_on.wait(60)

    look.add(Trouble())
    running = InThread(app.worker(shutdown_timeout=timedelta(minutes=5)))
    try:
        assert began.wait(20)
        for _ in range(3):
            running.worker.stop()
        assert running.returns_within(30)
        assert running.returned == [False]
        assert look.states() == {"ready": 1}
        assert look.errors() == [("released", None)]
    finally:
        go_on.set()


# --- queues and workers beside one another ------------------------------------------------------------


def test_a_queue_with_one_job_is_served_soon_beside_a_queue_with_many(
    database: Database, look: Failures
) -> None:
    app: JobApp[Any, Any] = JobApp(database.sessions())
    order: list[str] = []
    app.handler(Trouble)(lambda session, payload: order.append(current_run().queue))
    with look.sessions.begin() as session:
        enqueue_many(session, [Trouble(str(n)) for n in range(300)], queue="many")
        session.add(enqueue(Trouble(), queue="one"))
    with app.worker(concurrency=1, shutdown_timeout=AT_ONCE):
        until(lambda: look.states() == {"succeeded": 301}, 60)
    assert order.index("one") < 100


def test_what_any_live_worker_serves_is_not_called_unserved(
    database: Database, look: Failures
) -> None:
    with look.sessions.begin() as session:
        five = timedelta(minutes=5)
        register(session, five, ["mail", "default"], ["trouble"])
        register(session, five, ["mail"], ["quick"])
        dead = register(session, five, (), ["trouble", "quick", "meet"])
        session.get_one(WorkerRow, dead).state = "dead"
        for queue in ("mail", "default", "elsewhere"):
            session.add(enqueue(Trouble(), queue=queue))
            session.add(enqueue(Quick(), queue=queue, priority=7))
        session.add(enqueue(Meet(), queue="later", delay=timedelta(hours=1)))
        session.add(enqueue(Meet(), queue="mail"))
    with look.sessions() as session:
        assert find_unserved(session) == {
            ("default", "quick"),
            ("elsewhere", None),
            ("mail", "meet"),
        }
    with look.sessions.begin() as session:
        register(session, five, (), ["quick"])  # of all queues
    with look.sessions() as session:
        assert find_unserved(session) == {("elsewhere", "trouble"), ("mail", "meet")}


def test_a_worker_does_not_complain_of_a_queue_that_another_one_serves(
    sqlite: Database, look: Failures, caplog: pytest.LogCaptureFixture
) -> None:
    app: JobApp[Any, Any] = JobApp(sqlite.sessions())
    app.handler(Trouble)(lambda session, payload: None)
    with look.sessions.begin() as session:
        register(session, timedelta(minutes=5), ["b_of_the_other"], ["trouble"])
    for queue in ("b_of_the_other", "c_of_nobody"):
        look.add(Trouble(), queue=queue)
    with app.worker(queues=["a_mine"]):  # queues are told of in order
        until(lambda: '"c_of_nobody" has due jobs, and no worker serves it' in caplog.text)
    assert "b_of_the_other" not in caplog.text


# --- two databases in one session ---------------------------------------------------------------------


def test_a_handler_that_uses_two_databases_is_warned_about_once(
    sqlite: Database,
    look: Failures,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(execution, "_warned_of", set())
    other = create_engine(f"sqlite:///{tmp_path}/other.sqlite")
    sqlalchemy_jobs.sqlite.configure(other)
    domain.Base.metadata.create_all(other)
    binds: Any = {sqlalchemy_jobs.models.Base: sqlite.engine(), domain.Base: other}
    app: JobApp[Any, Any] = JobApp(sessionmaker(binds=binds))

    @app.handler(Trouble)
    def of_two(session: Session, payload: Trouble) -> None:
        session.add(Effect(note=payload.note))

    @app.handler(Quick)
    def of_one(session: Session, payload: Quick) -> None:
        session.add(enqueue(Meet()))

    for n in range(3):
        look.add(Trouble(str(n)))
        look.add(Quick(n))
    with caplog.at_level(logging.WARNING), app.worker(shutdown_timeout=AT_ONCE):
        until(lambda: look.states(kind="trouble") == look.states(kind="quick") == {"succeeded": 3})
    (said,) = (each for each in caplog.messages if "databases" in each)
    assert "of_two used 2 databases in its session" in said
    with Session(other) as session:
        assert sorted(session.scalars(select(Effect.note))) == ["0", "1", "2"]
    other.dispose()
