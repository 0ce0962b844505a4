"""The lock beside the lease: who holds it, who may conclude from its absence, and where there is none."""

import logging
import signal
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, Connection, select, text, update
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool, QueuePool

from sqlalchemy_jobs import Job, JobApp, WorkerRow, enqueue, job
from sqlalchemy_jobs.columns import server_now
from sqlalchemy_jobs.worker import leases
from sqlalchemy_jobs.worker.availability import Availability, is_lost
from sqlalchemy_jobs.worker.control import Control
from sqlalchemy_jobs.worker.leases import Lease, Other, look, register, renew
from sqlalchemy_jobs.worker.locks import SessionLock
from sqlalchemy_jobs.worker.maintenance import Maintenance
from sqlalchemy_jobs.worker.settings import Settings
from tests.databases import Database
from tests.processes import workers
from tests.waiting import until

LEASE = timedelta(minutes=10)


@job("locked")
@dataclass(frozen=True)
class Locked:
    n: int = 0


def lock_on(engine: Any) -> SessionLock:
    control = Control(engine, Availability())
    assert control.dialect.session_locks
    return SessionLock(control, control.dialect.session_locks, LEASE)


@dataclass
class Two:
    """An observer, and another worker that has a lock and runs a job."""

    control: Control
    lock: SessionLock
    me: uuid.UUID
    other: uuid.UUID

    def see(self) -> Other:
        def see(session: Session) -> list[Other]:
            renew(session, self.me, LEASE)  # or it sees nothing
            return look(session, self.me)

        seen = self.control.transaction(see)
        return next(each for each in seen if each.id == self.other)

    def session(self) -> int:
        """The server's number of the session that has the lock."""
        number: int = self.lock._control.on_kept_connection(
            lambda connection: connection.scalar(select(self.lock._locks.session))
        )
        return number

    def change(self, **values: Any) -> None:
        """Change the row of the other one."""

        def change(session: Session) -> None:
            session.execute(update(WorkerRow).where(WorkerRow.id == self.other).values(values))

        self.control.transaction(change)

    def state(self) -> str:
        return self.control.transaction(
            lambda session: session.get_one(WorkerRow, self.other).state
        )


def two_on(control: Control, engine: Any) -> Iterator[Two]:
    lock = lock_on(engine)
    me, other = uuid.uuid4(), uuid.uuid4()
    since = lock.hold(other)
    assert since is not None

    def arrive(session: Session) -> None:
        register(session, LEASE, worker_id=me)
        register(session, LEASE, worker_id=other, locked_since=since)
        made = enqueue(Locked())
        made.state, made.attempt, made.worker_id = "running", 1, other
        session.add(made)

    control.transaction(arrive)
    yield Two(control, lock, me, other)
    lock.close()
    control.close()


@pytest.fixture
def two(row_locks: Database) -> Iterator[Two]:
    yield from two_on(Control(row_locks.engine(), Availability()), row_locks.engine())


# --- having it --------------------------------------------------------------------------------------


def kill(connection: Connection, number: int) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_terminate_backend(:number)"), {"number": number})
    else:
        connection.execute(text(f"KILL {number}"))


@pytest.mark.parametrize(
    "driver",
    [
        "postgresql+psycopg",
        "async postgresql+psycopg",
        "postgresql+asyncpg",
        "mysql+pymysql",
        "mysql+aiomysql",
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # aiomysql's sockets
def test_a_lock_is_held_until_its_session_ends_and_is_then_taken_anew(
    request: pytest.FixtureRequest, driver: str
) -> None:
    """With every driver, also when the app has async sessions only."""
    name = driver.removeprefix("async ")
    database: Database = request.getfixturevalue(name.partition("+")[0])
    is_async = driver.startswith("async ") or name.endswith(("asyncpg", "aiomysql"))
    url = database.url.set(drivername=name)
    # A pool of one connection is enough: no other work is done in the pool of the lock.
    engine: Any = (
        database.async_engine(url, poolclass=NullPool)
        if is_async
        else database.engine(url, poolclass=QueuePool, pool_size=1, max_overflow=0)
    )
    for this in two_on(Control(database.engine(), Availability()), engine):
        assert not this.see().is_unlocked
        assert this.lock.hold(this.other) is not None
        number = this.session()
        with database.engine(isolation_level="AUTOCOMMIT").connect() as connection:
            kill(connection, number)
        until(lambda this=this: this.see().is_unlocked)
        with pytest.raises(Exception) as caught:
            this.lock.hold(this.other)
        assert is_lost(caught.value), "no traceback in the log"
        assert this.lock.hold(this.other) is not None
        assert this.session() != number
        assert not this.see().is_unlocked


def test_a_new_id_takes_a_lock_of_its_own_and_frees_the_old_one(two: Two) -> None:
    two.lock.hold(uuid.uuid4())
    until(lambda: two.see().is_unlocked)


def test_a_statement_that_takes_too_long_costs_the_lock_for_once_only(two: Two) -> None:
    """A server's or a role's statement_timeout, while someone holds the worker's row."""
    limit, slow = (
        ("SET statement_timeout = 10", "SELECT pg_sleep(60)")
        if two.control.dialect.label == "PostgreSQL"
        else ("SET max_statement_time = 0.01", "SELECT SLEEP(60)")
    )
    two.lock._control.on_kept_connection(lambda connection: connection.execute(text(limit)))
    assert two.lock.ask(lambda session: session.scalar(text(slow))) is None
    assert two.lock.held_since(two.other) is None
    assert two.lock.hold(two.other) is not None


def test_a_lock_that_a_session_of_before_still_has_is_not_claimed_to_be_held(
    two: Two, row_locks: Database
) -> None:
    """The server may learn late that a connection is broken. The worker lives by its lease until then."""
    again = lock_on(row_locks.engine())
    assert again.hold(two.other) is None
    two.lock.close()
    until(lambda: again.hold(two.other) is not None)
    again.close()


def version(two: Two) -> tuple[int, ...]:
    return two.lock._control.on_kept_connection(
        lambda connection: connection.dialect.server_version_info or ()
    )


def test_the_server_ends_a_session_whose_client_is_silent(two: Two) -> None:
    """A client that a network has swallowed; PostgreSQL 13 knows the TCP keepalives only."""
    if two.control.dialect.label == "PostgreSQL":
        query = "SELECT setting FROM pg_settings WHERE name = 'idle_session_timeout'"
        wanted = "200000" if version(two) >= (14,) else None
    else:
        query, wanted = "SELECT CAST(@@wait_timeout AS CHAR)", "200"
    found = two.lock._control.on_kept_connection(lambda connection: connection.scalar(text(query)))
    assert found == wanted, "a third of the lease"


def test_the_start_of_the_server_is_the_same_at_each_look(two: Two) -> None:
    locks = two.lock._locks

    def read(session: Session) -> Any:
        time.sleep(0.02)  # more than a second in all
        return session.scalar(select(locks.server_start))

    assert len({two.control.transaction(read) for _ in range(60)}) == 1


def test_a_worker_of_an_async_only_app_has_a_lock(row_locks: Database) -> None:
    app: JobApp[Any, Any] = JobApp(async_sessionmaker(row_locks.async_engine(poolclass=NullPool)))

    @app.handler(Locked)
    async def handler(session: Any, payload: Locked) -> None: ...

    control = Control(row_locks.engine(), Availability())

    def locked() -> list[bool]:
        return control.transaction(
            lambda session: list(session.scalars(select(WorkerRow.holds_lock)))
        )

    with app.worker():
        until(lambda: locked() == [True])
    assert locked() == []
    control.close()


# --- judging by it ------------------------------------------------------------------------------------


class Clock:
    """Replaces time.monotonic(), and is moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Judge:
    """An observer that has just become able to judge another worker, whose lock is free and who is silent."""

    two: Two
    clock: Clock
    lease: Lease
    maintenance: Maintenance
    rescued: list[None]

    def is_declared_dead(self) -> bool:
        """Look twice, with as much time between as there has to be."""
        self.lease.step()
        self.maintenance.step()
        self.clock.now += 0.5
        self.maintenance.step()
        return self.two.state() == "dead"


@pytest.fixture
def judge(two: Two, monkeypatch: pytest.MonkeyPatch) -> Judge:
    clock = Clock()
    for module in ("leases", "maintenance"):
        monkeypatch.setattr(f"sqlalchemy_jobs.worker.{module}.time.monotonic", clock)
    lease = Lease(two.control, LEASE, [], [], lambda: None, lambda reason, *, dead: None)
    lease.step()
    clock.now += 2.1
    two.lock.close()
    until(lambda: two.see().is_unlocked)
    two.change(heartbeat_at=server_now(timedelta(seconds=-6)))
    rescued: list[None] = []
    maintenance = Maintenance(
        two.control, lease, LEASE, {}, Settings(), lambda: rescued.append(None)
    )
    return Judge(two, clock, lease, maintenance, rescued)


def test_a_worker_whose_lock_is_free_and_that_is_silent_is_dead(
    judge: Judge, caplog: pytest.LogCaptureFixture
) -> None:
    assert judge.is_declared_dead()
    assert "is dead, the server has freed its lock; jobs brought back: 1" in caplog.text
    states = judge.two.control.transaction(lambda session: list(session.scalars(select(Job.state))))
    assert states == ["ready"]
    assert judge.rescued == [None], "the claims are told at once"


def test_a_worker_that_holds_its_lock_is_not_dead(judge: Judge, row_locks: Database) -> None:
    """However silent it is, until its lease has passed."""
    again = lock_on(row_locks.engine())
    assert again.hold(judge.two.other) is not None
    assert not judge.is_declared_dead()
    again.close()
    until(lambda: judge.two.see().is_unlocked)
    assert judge.is_declared_dead()


def test_a_lock_that_is_taken_again_between_two_looks_counts_as_held(
    judge: Judge, row_locks: Database
) -> None:
    judge.maintenance.step()
    again = lock_on(row_locks.engine())
    assert again.hold(judge.two.other) is not None
    judge.clock.now += 0.5
    judge.maintenance.step()
    again.close()
    until(lambda: judge.two.see().is_unlocked)
    judge.maintenance.step()
    assert judge.two.state() == "alive", "the first look at a free lock begins anew"
    assert judge.is_declared_dead()


def test_one_look_is_not_enough_and_the_next_ones_come_sooner(judge: Judge) -> None:
    assert judge.maintenance.step() == 0.25
    judge.clock.now += 0.25
    assert judge.maintenance.step() == 0.25
    assert judge.two.state() == "alive"
    judge.clock.now += 0.25
    judge.maintenance.step()
    assert judge.two.state() == "dead"


def test_a_lock_of_before_a_restart_of_the_server_tells_nothing(judge: Judge) -> None:
    """The restart freed the locks of all, and this one has not come back to say so."""
    judge.two.change(server_start=server_now(timedelta(days=-1000)))
    assert not judge.is_declared_dead()


def test_a_worker_without_a_lock_is_judged_by_its_lease_only(judge: Judge) -> None:
    judge.two.change(holds_lock=False, server_start=None)
    assert not judge.is_declared_dead()


def test_a_worker_that_renews_is_not_dead_though_its_lock_is_free(judge: Judge) -> None:
    judge.two.change(heartbeat_at=server_now())
    assert not judge.is_declared_dead()


def test_a_worker_that_may_think_itself_alone_is_given_the_time_of_its_longer_interval(
    judge: Judge,
) -> None:
    judge.two.change(heartbeat_at=server_now(timedelta(seconds=-3)))
    assert not judge.is_declared_dead()


def test_a_worker_that_renewed_after_the_observer_came_has_to_renew_more_often(
    judge: Judge,
) -> None:
    judge.two.change(heartbeat_at=server_now(timedelta(seconds=-3)))
    judge.two.control.transaction(
        lambda session: session.execute(
            update(WorkerRow)
            .where(WorkerRow.id == judge.lease.worker_id)
            .values(started_at=server_now(timedelta(minutes=-1)))
        )
    )
    assert judge.is_declared_dead()


def test_an_observer_that_is_silent_itself_judges_nobody(judge: Judge) -> None:
    """Its machine slept, and theirs may have slept too; it looks before it has renewed."""
    judge.two.control.transaction(
        lambda session: session.execute(
            update(WorkerRow)
            .where(WorkerRow.id == judge.lease.worker_id)
            .values(heartbeat_at=server_now(timedelta(seconds=-6)))
        )
    )
    for _ in range(3):
        assert judge.maintenance.step() == 2
        judge.clock.now += 0.5
    assert judge.two.state() == "alive"
    assert judge.is_declared_dead()


def test_an_observer_that_has_just_come_does_not_judge_by_locks(judge: Judge) -> None:
    judge.clock.now -= 1
    assert not judge.is_declared_dead()


def test_an_observer_whose_renewal_failed_waits_until_the_others_are_back(
    judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cut its connection may have cut theirs, and freed their locks."""
    with monkeypatch.context() as outage:

        def away(*args: Any) -> bool:
            raise ConnectionError("the network is down")

        outage.setattr(leases, "renew", away)
        with pytest.raises(ConnectionError):
            judge.lease.step()
    judge.lease.step()
    for _ in range(4):
        judge.clock.now += 2
        assert not judge.is_declared_dead()  # which takes half a second
    judge.clock.now += 1
    assert judge.is_declared_dead()


# --- where there is none ------------------------------------------------------------------------------


def test_a_worker_behind_a_pooler_lives_by_its_lease(
    postgresql: Database, pooled: URL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock would be in a session that others use too, and would outlive it there."""
    monkeypatch.setenv("SAJOBS_TEST_URL", "sqlite://")
    from tests.apps.effects import Wait

    sessions = postgresql.sessions()
    with sessions.begin() as session:
        session.add(enqueue(Wait()))
    with workers(postgresql, tmp_path, "--lease", "2", url=pooled) as (victim,):
        victim.wait_for("no lock beside the lease")
        victim.wait_for("SIGN waiting")
        with sessions() as session:
            row = session.scalars(select(WorkerRow)).one()
            assert (row.holds_lock, row.server_start) == (False, None)
        with sessions() as session:
            held = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")
            assert session.scalar(held) == 0
        victim.signal(signal.SIGKILL)
        victim.wait()
    with workers(postgresql, tmp_path, "--lease", "2", url=pooled) as (rescuer,):
        rescuer.wait_for("is dead, its lease has passed; jobs brought back: 1")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_pooler_is_noticed_by_every_driver(
    postgresql: Database, pooled: URL, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    over_asyncpg = pooled.set(drivername="postgresql+asyncpg", query={"ssl": "disable"})
    engines: list[Any] = [
        postgresql.engine(pooled),
        postgresql.async_engine(pooled, poolclass=NullPool),
        postgresql.async_engine(over_asyncpg, poolclass=NullPool),
    ]
    for engine in engines:
        caplog.clear()
        lock = lock_on(engine)
        assert lock.hold(uuid.uuid4()) is None
        assert lock.hold(uuid.uuid4()) is None
        lock.close()
        assert len([each for each in caplog.messages if "a pooler is between" in each]) == 1


def test_a_lock_whose_connection_is_refused_leaves_the_lease_to_be_renewed(
    row_locks: Database,
) -> None:
    """The server may have no connection left."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = row_locks.url.set(host="127.0.0.1", port=closed.getsockname()[1], query={})
    lock = lock_on(row_locks.engine(url))
    control = Control(row_locks.engine(), Availability())
    lease = Lease(control, LEASE, [], [], lambda: None, lambda reason, *, dead: None, lock)
    lease.step()
    lease.step()
    assert lease.worker_id is not None
    lease.end()
    lock.close()
    control.close()
