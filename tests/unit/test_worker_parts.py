"""The parts of a worker, one by one: slots, loops, the lease, maintenance, handler threads."""

import asyncio
import logging
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextvars import Context, ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
from greenlet import getcurrent
from sqlalchemy import Engine, event, func, select, text, update
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.util import await_only

from sqlalchemy_jobs import Job, JobApp, Run, WorkerRow, bell, enqueue, job, transitions
from sqlalchemy_jobs.claims import Claim
from sqlalchemy_jobs.models import Queue
from sqlalchemy_jobs.tables import queues
from sqlalchemy_jobs.worker import control as module_of_control
from sqlalchemy_jobs.worker import slots, threads
from sqlalchemy_jobs.worker.availability import Availability, is_lost
from sqlalchemy_jobs.worker.control import Control
from sqlalchemy_jobs.worker.event_loop import Greenlet
from sqlalchemy_jobs.worker.executors import Supervisor, Work
from sqlalchemy_jobs.worker.leases import Lease, register, unregister
from sqlalchemy_jobs.worker.loops import Loop
from sqlalchemy_jobs.worker.maintenance import Maintenance
from sqlalchemy_jobs.worker.opening import Opened
from sqlalchemy_jobs.worker.pools import Pools
from sqlalchemy_jobs.worker.settings import Settings
from sqlalchemy_jobs.worker.slots import Slots
from sqlalchemy_jobs.worker.threads import Threads
from sqlalchemy_jobs.worker.timeouts import Timeouts
from tests.databases import Database

WORKER = uuid.uuid4()


def a_run(queue: str = "default", *, worker_id: uuid.UUID = WORKER, **claim: Any) -> Run:
    claim = {"job_id": uuid.uuid4(), "attempt": 1} | claim
    return Run(Claim(**claim, worker_id=worker_id, kind="part", queue=queue, max_attempts=20))


def started(held: Slots, run: Run) -> bool:
    """Tell whether a claimed run gets a slot."""
    held.take([run])
    return held.next() is run


def never() -> None:
    raise AssertionError("not expected to be called")


# --- greenlets ------------------------------------------------------------------------------------


def test_a_greenlet_serves_one_task_after_another_in_the_context_of_each() -> None:
    note: ContextVar[str] = ContextVar("note")
    seen: list[tuple[str, str, int]] = []

    async def fail() -> None:
        raise ZeroDivisionError

    def work() -> None:
        first = note.get()
        assert await_only(asyncio.sleep(0, "slept")) == "slept"
        with pytest.raises(ZeroDivisionError):
            await_only(fail())
        with pytest.raises(TypeError, match="await"):
            await_only(None)  # type: ignore[arg-type]
        seen.append((first, note.get(), id(getcurrent())))

    async def task(name: str, in_greenlet: Greenlet) -> None:
        note.set(name)
        await in_greenlet.call(work)

    async def main() -> None:
        shared = Greenlet()
        for name in "ab":
            await asyncio.Task(task(name, shared), context=Context())
        assert seen == [(name, name, id(shared)) for name in "ab"]
        freed = weakref.ref(shared)
        del shared
        await asyncio.sleep(0)
        assert freed() is None

    asyncio.run(main())


def test_a_greenlet_whose_function_raised_serves_nobody_any_more() -> None:
    async def main() -> Greenlet:
        shared = Greenlet()
        await shared.call(list)
        assert shared
        with pytest.raises(AssertionError, match="not expected"):
            await shared.call(never)
        return shared

    assert not asyncio.run(main())


# --- slots ----------------------------------------------------------------------------------------


def test_room_is_what_is_left_of_the_total() -> None:
    held = Slots(3, Pools({}), lambda: None)
    assert held.room() == (3, {"*": 3})
    for queue in ("a", "a"):
        assert started(held, a_run(queue))
    assert held.room() == (1, {"*": 1})
    assert started(held, a_run("b"))
    assert held.room() == (0, {})


def test_room_of_a_queue_is_bounded_by_its_own_limit_and_by_the_total() -> None:
    held = Slots(4, Pools({"mail": 2, "default": None}), lambda: None)
    assert held.room() == (4, {"mail": 2, "default": 4})
    mail = [a_run("mail"), a_run("mail")]
    for each in mail:
        assert started(held, each)
    assert held.room() == (2, {"default": 2})
    assert started(held, a_run("default"))
    held.ended(mail[0])
    assert held.room() == (2, {"mail": 1, "default": 2})


def test_a_slot_is_free_when_the_handler_ends_and_the_run_owned_until_it_is_settled() -> None:
    changes: list[None] = []
    held = Slots(1, Pools({"default": 1}), lambda: changes.append(None))
    run = a_run()
    assert held.is_idle()
    assert started(held, run)
    assert (held.running(), held.owned(), held.is_idle()) == ([run], [run], False)
    held.ended(run)
    assert (held.running(), held.owned(), held.is_idle()) == ([], [run], False)
    assert held.room() == (1, {"default": 1})
    held.disown([run])
    assert held.is_idle()
    assert len(changes) == 2


def test_ending_twice_frees_one_slot() -> None:
    """A run released at shutdown ends once more when its thread comes back."""
    held = Slots(2, Pools({"default": 2}), lambda: None)
    run = a_run()
    assert started(held, run)
    assert started(held, a_run())
    held.ended(run)
    held.ended(run)
    assert held.room() == (1, {"default": 1})


def test_a_run_that_is_owned_already_is_adopted_not_started_again() -> None:
    held = Slots(5, Pools({"default": 5}), lambda: None)
    run = a_run()
    again = Run(run.claim)
    assert started(held, run)
    assert not started(held, again)
    assert held.room() == (4, {"default": 4})
    held.ended(run)
    assert not started(held, again), "its end is not written down yet"
    held.disown([run])
    assert started(held, again)


@pytest.mark.parametrize("differs", ["job_id", "attempt", "worker_id"])
def test_another_job_attempt_or_worker_is_another_run(differs: str) -> None:
    held = Slots(5, Pools({}), lambda: None)
    same = {"job_id": uuid.uuid4(), "attempt": 1, "worker_id": WORKER}
    other: dict[str, Any] = {"job_id": uuid.uuid4(), "attempt": 2, "worker_id": uuid.uuid4()}
    assert started(held, a_run(**same))
    assert started(held, a_run(**same | {differs: other[differs]}))


def test_what_waits_does_not_begin_when_what_holds_for_its_queue_was_read_too_long_ago() -> None:
    held = Slots(2, Pools({}), lambda: None)
    run = a_run()
    held.begin_until = time.monotonic() - 0.001
    assert not started(held, run)
    held.begin_until = time.monotonic() + 60
    assert held.next() is run


def test_disown_all_forgets_every_run_and_asks_each_to_stop() -> None:
    changes: list[None] = []
    held = Slots(3, Pools({"default": 3}), lambda: changes.append(None))
    running, ended = a_run(), a_run()
    assert started(held, running)
    assert started(held, ended)
    held.ended(ended)
    changes.clear()
    assert set(held.disown_all()) == {running, ended}
    assert running.should_stop
    assert held.owned() == []
    assert len(changes) == 1
    # Its handler still has the thread.
    assert held.running() == [running]
    assert held.room() == (2, {"default": 2})
    assert not held.is_idle()
    held.ended(running)
    assert held.is_idle()
    assert held.room() == (3, {"default": 3})


def test_no_room_while_too_many_ends_are_not_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "MOST_UNSETTLED", 2)
    held = Slots(1, Pools({}), lambda: None)
    ended = [a_run() for _ in range(4)]
    for each in ended:
        assert started(held, each)
        held.ended(each)
    assert held.room() == (0, {})
    held.disown([ended[0]])
    assert held.room() == (1, {"*": 1})


def test_slots_are_kept_for_what_goes_before_those_that_wait() -> None:
    held = Slots(2, Pools({"a": 1, "b": None}), lambda: None)
    waiting = [a_run("b") for _ in range(4)]
    held.take(waiting)
    held.kept = 1
    assert held.next() is waiting[0]
    assert held.next() is None
    assert held.room() == (-2, {})
    assert held.room(beside_waiting=True) == (1, {"a": 1, "b": 1})
    for queue in ("a", "b"):
        run = a_run(queue)
        held.take([run], first=True)
        assert held.room(beside_waiting=True) == (0, {})
        held.kept = 0
        assert held.next() is run
        held.ended(run)
    assert [held.next(), held.next()] == [waiting[1], None]


def test_slots_are_counted_right_by_many_threads() -> None:
    held = Slots(100, Pools({"a": 50, "b": 50}), lambda: None)

    def work(queue: str) -> None:
        for _ in range(300):
            run = a_run(queue)
            assert started(held, run)
            held.ended(run)
            held.disown([run])

    threads = [threading.Thread(target=work, args=(queue,)) for queue in "abab"]
    for each in threads:
        each.start()
    for each in threads:
        each.join(120)
    assert held.is_idle()
    assert held.room() == (100, {"a": 50, "b": 50})


# --- loops ----------------------------------------------------------------------------------------


@dataclass
class Step:
    """The step of a loop, that a test can wait for; it takes what to do from a list."""

    todo: list[Any] = field(default_factory=list)
    calls: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    count: int = 0

    def __call__(self) -> float | None:
        self.count += 1
        done = self.todo.pop(0) if self.todo else None
        self.calls.release()
        if isinstance(done, Exception):
            raise done
        return done  # type: ignore[no-any-return]

    def wait_for(self, calls: int) -> None:
        for _ in range(calls):
            assert self.calls.acquire(timeout=20)


@pytest.fixture
def start() -> Iterator[Callable[..., Loop]]:
    """Start loops, and stop them in the end; then no thread is left."""
    started: list[Loop] = []

    def start_(step: Any) -> Loop:
        loop = Loop("of-a-test", step)
        started.append(loop)
        loop.start()
        return loop

    yield start_
    for each in started:
        each.stop()
    assert "sajobs-of-a-test" not in {each.name for each in threading.enumerate()}


def test_a_loop_waits_as_long_as_its_step_says(start: Callable[..., Loop]) -> None:
    step = Step([0.0, 0.05, None])
    began = time.monotonic()
    loop = start(step)
    step.wait_for(3)
    assert time.monotonic() - began >= 0.05
    assert not step.calls.acquire(timeout=0.05), "None: until it is woken"
    loop.wake()
    step.wait_for(1)


def test_waking_cuts_a_long_wait_short(start: Callable[..., Loop]) -> None:
    step = Step([60.0, 60.0, 60.0])
    loop = start(step)
    for _ in range(3):
        step.wait_for(1)
        loop.wake()


def test_a_wake_during_a_step_is_not_lost(start: Callable[..., Loop]) -> None:
    woken = threading.Semaphore(0)
    loop: Loop

    def step() -> float | None:
        woken.release()
        if len(calls) < 3:
            calls.append(None)
            loop.wake()
        return None

    calls: list[None] = []
    loop = Loop("of-a-test", step)
    loop.start()
    try:
        for _ in range(4):
            assert woken.acquire(timeout=20)
    finally:
        loop.stop()


def test_a_loop_survives_errors_with_growing_pauses(caplog: pytest.LogCaptureFixture) -> None:
    waits: list[float] = []

    class Waits(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            waits.append(timeout)
            loop._stopped = len(waits) == 10
            return True

    errors: list[Any] = [ValueError(str(n)) for n in range(8)]
    step = Step([*errors, 0.3, ValueError("later")])
    loop = Loop("of-a-test", step)
    loop._woken = Waits()
    with caplog.at_level(logging.ERROR):
        loop.start()
        loop._thread.join(20)
    assert [round(each, 3) for each in waits] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 0.3, 0.1]
    said = [record.getMessage() for record in caplog.records]
    assert said == ["sajobs-of-a-test: trying again"] * 9
    assert all(record.exc_info for record in caplog.records)


def test_that_the_database_is_away_is_not_told_at_each_try(
    start: Callable[..., Loop], caplog: pytest.LogCaptureFixture
) -> None:
    away = OperationalError("SELECT 1", {}, Exception("refused"))
    step = Step([away, away])
    with caplog.at_level(logging.DEBUG):
        start(step)
        step.wait_for(3)
    assert caplog.records == []


@pytest.mark.parametrize("wait", [None, 60.0, ValueError("boom")])
def test_a_waiting_loop_stops_at_once(start: Callable[..., Loop], wait: Any) -> None:
    step = Step([wait, wait, wait])
    loop = start(step)
    step.wait_for(1)
    loop.stop(within=20)
    assert not loop._thread.is_alive(), "it waits to its end"
    assert step.count == 1


def test_stopping_waits_for_the_present_step(start: Callable[..., Loop]) -> None:
    in_step, go_on = threading.Event(), threading.Event()
    ended: list[None] = []

    def step() -> None:
        in_step.set()
        assert go_on.wait(20)
        ended.append(None)

    loop = start(step)
    assert in_step.wait(20)
    threading.Timer(0.05, go_on.set).start()
    loop.stop()
    assert ended == [None]


def test_stopping_does_not_wait_for_ever_for_a_step_that_hangs(
    start: Callable[..., Loop],
) -> None:
    in_step, go_on = threading.Event(), threading.Event()

    def step() -> None:
        in_step.set()
        go_on.wait(60)

    loop = start(step)
    assert in_step.wait(20)
    loop.stop(within=0.05)
    assert loop._thread.is_alive()
    go_on.set()
    loop._thread.join(20)


def test_a_loop_that_was_not_started_can_be_stopped() -> None:
    Loop("of-a-test", never).stop()  # type: ignore[arg-type]


# --- what counts as a database that is away -------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "statement"),
    [
        ("sqlite", "SELECT * FROM no_such_table"),
        ("mysql", "SELECT * FROM no_such_table"),
        ("mysql", "INSERT INTO sajobs_worker (name) VALUES ('x')"),  # no default: OperationalError
        ("postgresql", "SELECT * FROM no_such_table"),
    ],
)
def test_a_database_that_answers_with_an_error_is_not_away(
    request: pytest.FixtureRequest, name: str, statement: str
) -> None:
    """Else a missing table is told as an outage, for ever, and its text at debug level only."""
    database: Database = request.getfixturevalue(name)
    with database.engine().connect() as connection, pytest.raises(DBAPIError) as caught:
        connection.execute(text(statement))
    assert not is_lost(caught.value)


def test_a_database_that_does_not_answer_is_away(mysql: Database, postgresql: Database) -> None:
    for database in (mysql, postgresql):
        with socket.create_server(("127.0.0.1", 0)) as closed:
            url = database.url.set(host="127.0.0.1", port=closed.getsockname()[1], query={})
        with pytest.raises(DBAPIError) as caught:
            database.engine(url).connect()
        assert is_lost(caught.value)


@pytest.mark.parametrize("driver", ["postgresql+psycopg", "async psycopg", "postgresql+asyncpg"])
@pytest.mark.parametrize("size", [1, 2])
def test_a_session_that_is_kept_takes_no_connection_from_a_transaction(
    postgresql: Database, size: int, driver: str
) -> None:
    options: Any = {"pool_size": size, "max_overflow": 0, "pool_timeout": 1}
    engine: Engine | AsyncEngine
    if driver == "postgresql+psycopg":
        engine = postgresql.engine(**options)
    elif driver == "async psycopg":
        engine = postgresql.async_engine(**options)
    else:
        engine = postgresql.async_engine(postgresql.url.set(drivername=driver), **options)
    connected: list[Any] = []
    event.listen(engine.pool, "connect", lambda connection, record: connected.append(connection))
    control = Control(engine, Availability())
    used: set[Session] = set()

    def one(session: Session) -> int | None:
        used.add(session)
        return session.scalar(select(1))

    for carry_out in (control.statements, control.transaction) * 2:
        assert carry_out(one) == 1
    assert len(connected) == 1
    used.clear()
    for _ in range(3):
        assert control.statements(one) == 1
    assert len(used) == (3 if size == 1 else 1), (
        "it keeps a session, unless others want its connection"
    )
    control.close()


@pytest.mark.parametrize("is_async", [False, True])
def test_a_session_that_has_rested_goes_by_the_rules_of_its_pool(
    postgresql: Database, monkeypatch: pytest.MonkeyPatch, is_async: bool
) -> None:
    """Such as ``pool_pre_ping`` and ``pool_recycle``: what lies between may have dropped a connection that was silent."""
    make = postgresql.async_engine if is_async else postgresql.engine
    control = Control(make(pool_pre_ping=True), Availability())
    monkeypatch.setattr(module_of_control, "KEPT", 0.0)

    backend = control.statements(lambda session: session.scalar(select(func.pg_backend_pid())))
    with postgresql.session.begin() as session:
        session.execute(select(func.pg_terminate_backend(backend)))
    assert control.statements(lambda session: session.scalar(select(1))) == 1
    control.close()


def test_a_session_whose_connection_is_in_the_midst_of_something_is_not_kept(
    postgresql: Database,
) -> None:
    control = Control(postgresql.engine(pool_size=1, max_overflow=0), Availability())

    def break_off(session: Session) -> None:
        driver: Any = session.connection().connection.driver_connection
        driver.pgconn.enter_pipeline_mode()
        driver.pgconn.send_query_params(b"SELECT 1", None)
        raise LookupError("this is what matters")

    for _ in range(2):
        with pytest.raises(LookupError):
            control.statements(break_off)
        assert control.statements(lambda session: session.scalar(select(1))) == 1
    control.close()


class Sleeper:
    woken = 0

    def wake(self) -> None:
        self.woken += 1


def test_statements_in_a_kept_session_commit_wake_sleepers_and_read_rows_again(
    postgresql: Database,
) -> None:
    control = Control(postgresql.engine(pool_size=2), Availability())
    read: list[Queue] = []  # keeps the rows alive, and so in the session

    def concurrency(session: Session) -> int | None:
        read.append(session.get_one(Queue, "mail"))
        return read[-1].concurrency

    def change(session: Session) -> None:
        session.execute(update(queues).values(concurrency=3))
        bell.tell_own(session)

    with Session(postgresql.engine()) as session, session.begin():
        session.add(Queue(name="mail"))
    sleeper = Sleeper()
    bell.sleepers.add(sleeper)
    try:
        control.statements(change)
        assert sleeper.woken == 1
        assert control.statements(concurrency) == 3
        with Session(postgresql.engine()) as session, session.begin():
            session.execute(update(queues).values(concurrency=4))
        assert control.statements(concurrency) == 4
        assert sleeper.woken == 1
    finally:
        bell.sleepers.discard(sleeper)
        control.close()


def test_an_outage_is_told_once_whatever_late_answers_come_in(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A thread that asked before the change, and was held up, hears of what was and not of what is."""
    availability = Availability()
    refused = OperationalError("SELECT 1", {}, Exception("refused"))
    before = time.monotonic()
    availability.lost(refused, time.monotonic())
    availability.reached(before)
    assert availability.away
    availability.lost(refused, before)
    during = time.monotonic()
    availability.reached(time.monotonic())
    availability.lost(refused, during)
    assert not availability.away
    assert availability.losses == 3, "after each the worker reconciles"
    assert [each.partition(",")[0] for each in caplog.messages] == [
        "the database is away",
        "the database is back",
    ]


# --- the lease ------------------------------------------------------------------------------------


class Clock:
    """Replaces time.monotonic(), and is moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Leased:
    """A lease of 12 s on a real SQLite file, whose database can be taken away."""

    control: Control
    lease: Lease
    clock: Clock
    registered: list[None]
    lost: list[bool]
    """For each call of `lost`: whether it was declared dead."""
    away: threading.Event

    def step(self) -> float:
        return self.lease.step()

    def fail(self) -> None:
        self.away.set()
        with pytest.raises(OperationalError):
            self.lease.step()
        self.away.clear()

    def rows(self) -> dict[uuid.UUID, str]:
        def read(session: Session) -> dict[uuid.UUID, str]:
            return dict(session.execute(select(WorkerRow.id, WorkerRow.state)).all())  # type: ignore[arg-type]

        return self.control.transaction(read)

    def declare_dead(self) -> None:
        def rescue(session: Session) -> bool:
            worker_id, seen = session.execute(
                select(WorkerRow.id, WorkerRow.heartbeat_at).where(WorkerRow.state == "alive")
            ).one()
            return transitions.rescue(session, worker_id, seen) is not None

        assert self.control.transaction(rescue)


@pytest.fixture
def leased(sqlite: Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[Leased]:
    clock = Clock()
    monkeypatch.setattr("sqlalchemy_jobs.worker.leases.time.monotonic", clock)
    control = Control(sqlite.engine(), Availability())
    away = threading.Event()

    @event.listens_for(control._engine, "begin")
    def refuse(connection: Any) -> None:
        if away.is_set():
            raise OperationalError("BEGIN", {}, Exception("the database is away"))

    registered: list[None] = []
    lost: list[bool] = []
    lease = Lease(
        control,
        timedelta(seconds=12),
        [],
        ["part"],
        lambda: registered.append(None),
        lambda reason, *, dead: lost.append(dead),
    )
    yield Leased(control, lease, clock, registered, lost, away)
    control.close()


def test_a_lease_registers_then_renews_the_same_row(leased: Leased) -> None:
    assert leased.lease.worker_id is None
    assert leased.step() == 2.0
    first = leased.lease.worker_id
    assert first is not None
    assert leased.rows() == {first: "alive"}
    for _ in range(5):
        leased.clock.now += 2
        leased.step()
        assert leased.lease.worker_id == first
    assert leased.rows() == {first: "alive"}
    assert (len(leased.registered), leased.lost) == (1, [])


def test_a_long_lease_is_renewed_every_two_seconds_and_every_five_by_a_worker_that_is_alone(
    leased: Leased,
) -> None:
    leased.lease._lease = timedelta(minutes=10)
    assert leased.step() == 2.0, "it does not know yet"
    assert leased.step() == 5.0
    other = leased.control.transaction(lambda session: register(session, timedelta(minutes=1)))
    assert leased.step() == 2.0
    leased.control.transaction(lambda session: unregister(session, other))
    assert leased.step() == 5.0


def test_there_is_no_id_before_the_database_was_reached(leased: Leased) -> None:
    leased.fail()
    assert (leased.lease.worker_id, leased.registered, leased.lost) == (None, [], [])
    leased.step()
    assert leased.lease.worker_id is not None
    assert len(leased.registered) == 1


def test_the_id_is_gone_before_a_lease_that_is_not_renewed_ends(leased: Leased) -> None:
    leased.step()
    worker_id = leased.lease.worker_id
    leased.clock.now += 12 - 2.01
    assert leased.lease.worker_id == worker_id
    leased.clock.now += 0.02
    assert leased.lease.worker_id is None, "two seconds before the end of the lease"


def test_a_lease_is_counted_from_before_its_renewal_was_sent(leased: Leased) -> None:
    """The server's clock starts it no earlier, however long the reply took."""
    leased.step()

    @event.listens_for(leased.control._engine, "commit")
    def slow(connection: Any) -> None:
        leased.clock.now += 9

    leased.clock.now += 1
    leased.step()
    leased.clock.now += 1.01  # 10.01 s after it was sent
    assert leased.lease.worker_id is None


def test_lost_is_called_once_when_renewals_fail_and_not_too_early(leased: Leased) -> None:
    leased.step()
    leased.clock.now += 9
    leased.fail()
    assert leased.lost == []
    assert leased.lease.worker_id is not None
    leased.clock.now += 1.5
    leased.fail()
    assert leased.lost == [False]
    for _ in range(3):
        leased.clock.now += 5
        leased.fail()
    assert leased.lost == [False]
    assert leased.lease.worker_id is None


def test_a_lease_renewed_in_the_end_goes_on_under_its_id(leased: Leased) -> None:
    """Nobody had declared it dead meanwhile."""
    leased.step()
    worker_id = leased.lease.worker_id
    leased.clock.now += 60
    leased.fail()
    assert leased.lease.worker_id is None
    leased.step()
    assert leased.lease.worker_id == worker_id
    assert (len(leased.registered), leased.lost) == (2, [False])
    leased.clock.now += 60
    leased.fail()
    assert leased.lost == [False, False], "a second outage is told again"


def test_a_lock_that_was_waited_for_in_vain_loses_nothing(leased: Leased) -> None:
    """SQLITE_BUSY: the database answered, and nobody else can take the jobs either."""
    import sqlite3

    leased.step()
    busy = sqlite3.OperationalError("database is locked")
    busy.sqlite_errorcode = sqlite3.SQLITE_BUSY

    def locked(connection: Any) -> None:
        raise OperationalError("BEGIN IMMEDIATE", {}, busy)

    event.listen(leased.control._engine, "begin", locked)
    leased.clock.now += 11
    with pytest.raises(OperationalError):
        leased.step()
    assert leased.lost == []
    assert leased.lease.worker_id is None, "nothing new is claimed all the same"
    event.remove(leased.control._engine, "begin", locked)


def test_a_worker_declared_dead_gets_a_new_id(leased: Leased) -> None:
    leased.step()
    first = leased.lease.worker_id
    leased.declare_dead()
    leased.step()
    second = leased.lease.worker_id
    assert second not in (None, first)
    assert leased.rows() == {first: "dead", second: "alive"}
    assert (len(leased.registered), leased.lost) == (2, [True])


def test_a_worker_whose_row_was_deleted_gets_a_new_id(leased: Leased) -> None:
    leased.step()
    first = leased.lease.worker_id
    leased.control.transaction(lambda session: session.query(WorkerRow).delete())
    leased.step()
    assert leased.lease.worker_id not in (None, first)
    assert leased.lost == [True]


def test_lost_is_called_once_though_registering_anew_fails(leased: Leased) -> None:
    leased.step()
    leased.declare_dead()
    engine = leased.control._engine

    @event.listens_for(engine, "commit", once=True)
    def go_away(connection: Any) -> None:
        leased.away.set()  # after the renewal that found it dead

    with pytest.raises(OperationalError):
        leased.step()
    assert (leased.lost, leased.lease.worker_id) == ([True], None)
    leased.fail()
    assert leased.lost == [True]
    leased.step()
    assert leased.lost == [True]
    assert sorted(leased.rows().values()) == ["alive", "dead"]


def test_the_end_of_a_lease_deletes_its_row(leased: Leased) -> None:
    leased.lease.end()
    leased.step()
    leased.lease.end()
    assert leased.lease.worker_id is None
    assert leased.rows() == {}


@pytest.mark.parametrize("seconds", [1, 2, 3, 6, 10, 12, 30, 45])
def test_the_runs_are_told_before_the_lease_ends_whatever_the_pauses_are(
    leased: Leased, seconds: int
) -> None:
    """A second loop looks at the clock: a renewal may hang, and the pauses after a failure grow."""
    leased.lease._lease = timedelta(seconds=seconds)
    leased.step()
    renewed_at = leased.clock.now
    while (wait := leased.lease.watch()) and not leased.lost:
        leased.clock.now += wait
    assert leased.clock.now - renewed_at < seconds
    assert leased.lease.worker_id is None


def test_the_view_of_a_worker_is_as_old_as_its_first_renewal(leased: Leased) -> None:
    """Started during an outage, it has seen nobody renew since it was made."""
    leased.clock.now += 600
    assert leased.lease.view_age < 0
    leased.fail()
    leased.clock.now += 600
    assert leased.lease.view_age < 0
    leased.step()
    assert leased.lease.view_age == 0
    leased.clock.now += 3
    assert leased.lease.view_age == 3


def test_the_view_stays_old_while_renewals_come_within_two_intervals(leased: Leased) -> None:
    leased.step()
    for pause in (2, 2, 4, 3.9, 0.1, 4):
        leased.clock.now += pause
        leased.step()
    assert leased.lease.view_age == pytest.approx(16)


@pytest.mark.parametrize("pause", [4.1, 9, 100])
def test_the_view_is_young_after_renewals_stood_still_without_an_error(
    leased: Leased, pause: float
) -> None:
    """The server hung, or this process was suspended: others could not renew either."""
    leased.step()
    for _ in range(10):
        leased.clock.now += 2
        leased.step()
    leased.clock.now += pause
    leased.step()
    assert leased.lease.view_age == 0


# --- maintenance ----------------------------------------------------------------------------------


@job("part")
@dataclass(frozen=True)
class Part:
    n: int = 0


@pytest.fixture
def other(leased: Leased) -> uuid.UUID:
    """Another worker, whose lease has passed while it ran a job."""

    def register_and_claim(session: Session) -> uuid.UUID:
        worker_id = register(session, timedelta(seconds=-60))
        made = enqueue(Part())
        session.add(made)
        session.flush()
        session.execute(
            update(Job)
            .where(Job.id == made.id)
            .values(state="running", attempt=1, worker_id=worker_id)
        )
        return worker_id

    return leased.control.transaction(register_and_claim)


def maintain(leased: Leased) -> Maintenance:
    return Maintenance(
        leased.control, leased.lease, timedelta(seconds=12), {}, Settings(), lambda: None
    )


def job_state(leased: Leased) -> str:
    return leased.control.transaction(lambda session: session.scalars(select(Job.state)).one())


def test_others_are_judged_only_by_a_view_older_than_a_third_of_the_lease(
    leased: Leased, other: uuid.UUID, caplog: pytest.LogCaptureFixture
) -> None:
    maintenance = maintain(leased)
    leased.step()
    for age in (0, 2, 3.9):
        leased.clock.now = leased.lease._unbroken_since + age
        maintenance.step()
        assert leased.rows()[other] == "alive"
    leased.clock.now = leased.lease._unbroken_since + 4.1
    maintenance.step()
    assert leased.rows()[other] == "dead"
    assert job_state(leased) == "ready"
    assert "is dead, its lease has passed; jobs brought back: 1" in caplog.text


def test_a_renewal_that_fails_makes_the_view_young_again(leased: Leased, other: uuid.UUID) -> None:
    """During an outage nobody renews: right after it, all leases lie in the past."""
    maintenance = maintain(leased)
    leased.step()
    leased.clock.now += 60
    leased.fail()
    leased.clock.now += 1
    leased.step()
    for _ in range(2):
        leased.clock.now += 1.4
        leased.step()
        maintenance.step()
        assert leased.rows()[other] == "alive"
    leased.clock.now += 1.4
    leased.step()
    maintenance.step()
    assert leased.rows()[other] == "dead"


def test_a_worker_that_overslept_its_own_lease_does_not_judge_others_at_once(
    leased: Leased, other: uuid.UUID
) -> None:
    """A machine that was suspended: no renewal failed, yet nobody on it had renewed."""
    maintenance = maintain(leased)
    leased.step()
    leased.clock.now += 6
    leased.step()
    leased.clock.now += 600
    leased.step()
    maintenance.step()
    assert leased.rows()[other] == "alive"


def test_a_worker_that_started_during_an_outage_does_not_judge_others_at_once(
    leased: Leased, other: uuid.UUID
) -> None:
    """It was made long ago; when it first reaches the database, all leases lie in the past."""
    maintenance = maintain(leased)
    leased.clock.now += 600
    leased.step()
    for age in (0, 2, 3.9):
        leased.clock.now = leased.lease._renewed_at + age
        maintenance.step()
        assert leased.rows()[other] == "alive"
    leased.clock.now += 0.2
    maintenance.step()
    assert leased.rows()[other] == "dead"


def test_a_worker_without_a_certain_lease_judges_nobody(leased: Leased, other: uuid.UUID) -> None:
    maintenance = maintain(leased)
    leased.clock.now += 60
    maintenance.step()
    leased.step()
    leased.clock.now += 60
    maintenance.step()
    assert leased.rows()[other] == "alive"


def test_a_worker_does_not_judge_itself(leased: Leased) -> None:
    maintenance = maintain(leased)
    leased.step()
    leased.clock.now += 5
    leased.control.transaction(
        lambda session: (
            session.execute(update(WorkerRow).values(lease_until=WorkerRow.started_at)).rowcount
        )  # type: ignore[attr-defined]
    )
    maintenance.step()
    assert set(leased.rows().values()) == {"alive"}


def test_orphans_are_brought_back_whatever_the_age_of_the_view(
    leased: Leased, other: uuid.UUID
) -> None:
    """Their worker is not judged: it is gone already."""
    leased.control.transaction(lambda session: session.query(WorkerRow).delete())
    maintain(leased).step()
    assert job_state(leased) == "ready"


@pytest.mark.parametrize("how", ["dead", "gone"])
def test_a_job_that_fails_for_good_with_its_worker_is_named_and_not_called_brought_back(
    leased: Leased, other: uuid.UUID, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    def add_a_last_run(session: Session) -> uuid.UUID:
        made = enqueue(Part(), max_attempts=1)
        made.state, made.attempt, made.worker_id = "running", 1, other
        made.started_at = made.created_at
        session.add(made)
        if how == "gone":
            session.query(WorkerRow).filter_by(id=other).delete()
        return made.id

    doomed = leased.control.transaction(add_a_last_run)
    leased.step()
    leased.clock.now += 4.1
    maintain(leased).step()
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert sum("jobs brought back: 1" in each for each in said) == 1
    assert [each for each in said if "failed for good" in each] == [
        f"{doomed} failed for good: its worker died, and no attempt is left"
    ]
    states = leased.control.transaction(
        lambda session: sorted(session.scalars(select(Job.state)).all())
    )
    assert states == ["failed", "ready"]


# --- handler threads --------------------------------------------------------------------------------


@dataclass
class Pool:
    """Handler threads with a real supervisor; `ended` counts the runs that were handed on."""

    threads: Threads
    app: JobApp[Any, Any]
    ended: threading.Semaphore
    seen: set[str]

    def start(self) -> None:
        self.threads.start(a_run(), self.app.handlers["part"])

    def wait_for(self, runs: int) -> None:
        for _ in range(runs):
            assert self.ended.acquire(timeout=20)


@pytest.fixture
def pool_of(sqlite: Database) -> Iterator[Callable[..., Pool]]:
    made: list[Pool] = []
    control = Control(sqlite.engine(), Availability())
    before = set(threading.enumerate())

    def make(
        most: int,
        handler: Callable[[], None] = lambda: None,
        next_work: Callable[[], Work | None] = lambda: None,
        start_waiting: Callable[[], None] = never,
    ) -> Pool:
        seen: set[str] = set()
        app: JobApp[Any, Any] = JobApp(sqlite.sessions())

        @app.handler(Part)
        def part(session: Session, payload: Part) -> None:
            seen.add(threading.current_thread().name)
            handler()

        ended = threading.Semaphore(0)
        supervisor = Supervisor(
            app,
            control,
            Timeouts(never, lambda handling: None),
            lambda run, transition: ended.release(),
            lambda batch, run, transition: never(),
        )
        assert app.sessions is not None
        threads = Threads(supervisor, app.sessions, most, next_work, start_waiting)
        pool = Pool(threads, app, ended, seen)
        # What a run carries is what the row holds.
        pool.start = lambda: pool.threads.start(  # type: ignore[method-assign]
            Run(Claim(uuid.uuid4(), 1, WORKER, "part", "default", '{"n": 0}', 0, 20)),
            app.handlers["part"],
        )
        made.append(pool)
        return pool

    yield make
    for pool in made:
        pool.threads.stop()
    for thread in set(threading.enumerate()) - before:
        thread.join(20)
        assert not thread.is_alive(), thread.name
    control.close()


def test_no_more_threads_than_the_concurrency_over_thousands_of_runs(
    pool_of: Callable[..., Pool],
) -> None:
    pool = pool_of(4)
    in_flight = threading.Semaphore(8)  # more than there are threads, as after a release
    runs = 4000

    def feed() -> None:
        for _ in range(runs):
            assert in_flight.acquire(timeout=20)
            pool.start()

    feeder = threading.Thread(target=feed)
    feeder.start()
    for _ in range(runs):
        pool.wait_for(1)
        in_flight.release()
    feeder.join(20)
    assert 1 <= len(pool.seen) <= 4
    assert pool.threads._count <= 4


def test_as_many_runs_as_the_concurrency_are_at_work_together(
    pool_of: Callable[..., Pool],
) -> None:
    """After thousands of runs too: no thread was forgotten in the count."""
    meeting = threading.Barrier(3)
    together: list[int] = []

    def handler() -> None:
        if meet:
            together.append(meeting.wait(20))

    meet: list[None] = []
    pool = pool_of(3, handler)
    for _ in range(1000):
        pool.start()
    pool.wait_for(1000)
    meet.append(None)
    for _ in range(6):
        pool.start()
    pool.wait_for(6)
    assert sorted(together) == [0, 0, 1, 1, 2, 2]


def test_one_run_at_a_time_needs_few_threads(pool_of: Callable[..., Pool]) -> None:
    """A thread that has just handed on its run may not be counted as idle yet."""
    pool = pool_of(50)
    for _ in range(300):
        pool.start()
        pool.wait_for(1)
    assert len(pool.seen) < 10


@pytest.mark.parametrize("most", [1, 2])
def test_a_run_is_started_that_comes_when_a_thread_has_just_looked_for_it_in_vain(
    pool_of: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(threads, "QUICK", 10.0)  # the thread takes all there is
    comes: list[None] = []
    waits: list[None] = []

    def next_work() -> None:
        if comes:
            waits.append(comes.pop())
            start_waiting()

    def start_waiting() -> None:
        while not pool.threads.take_what_waits() and waits:
            waits.pop()
            pool.start()

    pool = pool_of(most, lambda: None, next_work, start_waiting)
    for _ in range(20):
        pool.start()
        pool.wait_for(1)
        comes.append(None)
        pool.start()
        pool.wait_for(2)


def test_a_session_is_as_new_only_while_nothing_was_done_with_it(sqlite: Database) -> None:
    class Counting(Session):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.uses = 0

    def opened(cls: type[Session] = Session) -> Opened:
        session = sessionmaker(sqlite.engine(), class_=cls)()
        return Opened(session, session, Session)

    def is_as_new_after(use: Callable[[Session], object]) -> bool:
        one = opened()
        use(one.session)
        as_new = one.is_as_new()
        one.session.close()
        return as_new

    assert is_as_new_after(lambda session: session.in_transaction())
    assert not opened(Counting).is_as_new()
    listened = sessionmaker(sqlite.engine())()
    event.listen(listened, "after_commit", never)
    assert not Opened(listened, listened, Session).is_as_new()
    uses: list[Callable[[Session], object]] = [
        lambda session: session.begin(),
        lambda session: session.execute(select(1)),
        lambda session: session.add(enqueue(Part())),
        lambda session: session.info.update(mine=1),
        lambda session: setattr(session, "expire_on_commit", False),
        lambda session: setattr(session, "mine", 1),
        lambda session: session.bind_mapper(Job, sqlite.engine()),
        lambda session: event.listen(session, "after_commit", never),
        lambda session: session.close(),
    ]
    assert [use for use in uses if is_as_new_after(use)] == []


def test_a_handler_that_raises_anything_keeps_its_thread(pool_of: Callable[..., Pool]) -> None:
    def handler() -> None:
        raise SystemExit

    pool = pool_of(1, handler)
    for _ in range(50):
        pool.start()
    pool.wait_for(50)
    assert len(pool.seen) == 1
