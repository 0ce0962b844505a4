"""How an idle worker learns of new jobs: by the bell, by a commit in its process, by knowing when the next is due.

The poll interval is 60 s where not said otherwise, so that a job that starts within ``SOON`` was not found by a poll.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import event, select, text, update
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import NullPool

from sqlalchemy_jobs import (
    Job,
    JobApp,
    Retry,
    Snooze,
    WorkerRow,
    bell,
    enqueue,
    enqueue_many,
    job,
    pause_queue,
    requeue,
    resume_queue,
)
from sqlalchemy_jobs.columns import server_now
from sqlalchemy_jobs.dialects import postgresql as pg
from sqlalchemy_jobs.dialects.listening import CHANNEL_OF_TABLE, table_of
from sqlalchemy_jobs.tables import jobs as table
from sqlalchemy_jobs.worker import Worker, claiming, idling, leases, wakeup
from sqlalchemy_jobs.worker.lanes import Lanes
from sqlalchemy_jobs.worker.wakeup import Wakeup
from tests.databases import Database
from tests.waiting import until

POLL = timedelta(seconds=60)
SOON = 40.0
"""Seconds: less than the poll interval, and more than a busy machine takes."""


@job("woken")
@dataclass(frozen=True)
class Woken:
    n: int = 0


@dataclass
class Asleep:
    """A worker that has gone to sleep for longer than the quick polls, and what it ran."""

    worker: Worker
    ran: list[int] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    hold: threading.Event = field(default_factory=threading.Event)

    def sleep(self) -> None:
        """Wait until it sleeps; and for long, with no more of the growing pauses to come."""
        until(lambda: self.waits and self.waits[-1] > 30)

    def sleep_again(self) -> None:
        """The same after a run: until that is settled, which wakes it once more, and it sleeps since then."""
        parts, seen = self.worker._parts, 0
        assert parts is not None

        def sleeps() -> bool:
            nonlocal seen
            far = parts._claimer._idling._asleep_until - time.monotonic() > 30
            seen = (
                seen + 1
                if far and parts.slots.is_idle() and not parts._claiming._woken.is_set()
                else 0
            )
            return seen > 3

        until(sleeps)

    def runs(self, n: int) -> None:
        until(lambda: n in self.ran)


@pytest.fixture
def few_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idling, "IDLE_WAITS", (0.01, 0.02))


@contextmanager
def asleep(
    sessions: Any, monkeypatch: pytest.MonkeyPatch, *, in_process: bool = False, **options: Any
) -> Iterator[Asleep]:
    """Start a worker and wait until it sleeps; commits of this process do not wake it, unless ``in_process``."""
    app: JobApp[Any, Any] = JobApp(sessions)
    worker = app.worker(**{"poll_interval": POLL} | options)
    it = Asleep(worker)
    it.hold.set()
    if isinstance(sessions, async_sessionmaker):

        @app.handler(Woken)
        async def handler(session: Any, payload: Woken) -> None:
            it.ran.append(payload.n)
    else:

        @app.handler(Woken)
        def handler(session: Session, payload: Woken) -> None:
            assert it.hold.wait(SOON)
            it.ran.append(payload.n)

    original = claiming.Claimer.step

    def step(claimer: claiming.Claimer) -> float:
        wait = original(claimer)
        it.waits.append(wait)
        return wait

    monkeypatch.setattr(claiming.Claimer, "step", step)
    with worker:
        if not in_process:
            until(lambda: len(bell.sleepers) > 0)
            bell.sleepers.clear()
        it.sleep()
        yield it


def bells(database: Database) -> list[bool]:
    with Session(database.engine(poolclass=NullPool)) as session:
        return list(session.scalars(select(WorkerRow.bell).where(WorkerRow.state == "alive")))


def add(sessions: Any, n: int, **options: Any) -> None:
    with sessions.begin() as session:
        session.add(enqueue(Woken(n), **options))


# --- in one process, on every database ---------------------------------------------------------------


@pytest.mark.usefixtures("few_polls")
def test_a_commit_wakes_the_worker_of_the_same_process(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = database.sessions()
    with asleep(sessions, monkeypatch, in_process=True, listen=False) as it:
        add(sessions, 1)
        it.runs(1)
        it.sleep()
        with sessions() as session:  # what is added in a savepoint counts when all is committed
            with session.begin_nested():
                session.add(enqueue(Woken(2)))
            session.commit()
        it.runs(2)
        it.sleep()
        with sessions.begin() as session:
            enqueue_many(session, [Woken(3)])
        it.runs(3)
        it.sleep()
        with sessions() as session:
            job_id = session.scalars(select(Job.id).order_by(Job.id)).first()
            assert job_id is not None
            it.ran.clear()
            requeue(session, job_id)
            session.commit()
        it.runs(1)
    assert not bell.sleepers


@pytest.mark.usefixtures("few_polls")
def test_who_is_woken_claims_jobs_like_the_last_ones_before_looking_for_others(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = database.sessions()
    with asleep(sessions, monkeypatch, in_process=True, listen=False, concurrency=2) as it:
        original = Lanes.look

        def look(lanes: Lanes, session: Session) -> bool:
            it.ran.append(LOOKED)
            return original(lanes, session)

        monkeypatch.setattr(Lanes, "look", look)
        add(sessions, 1)
        it.runs(1)
        for n, options, first in ((2, {}, 2), (3, {"queue": "other", "priority": 5}, LOOKED)):
            it.sleep_again()
            it.ran.clear()
            add(sessions, n, **options)
            it.runs(n)
            assert it.ran[0] == first


LOOKED = 0
"""Between the numbers of the jobs that ran: the worker has looked where there are any."""


def test_only_a_commit_wakes(sqlite: Database) -> None:
    class Sleeper:
        woken = 0

        def wake(self) -> None:
            self.woken += 1

    sleeper = Sleeper()
    bell.sleepers.add(sleeper)
    try:
        with Session(sqlite.engine()) as session:
            with session.begin_nested():
                session.add(enqueue(Woken()))
            assert sleeper.woken == 0
            session.rollback()
            assert sleeper.woken == 0
            session.add(enqueue(Woken()))
            session.commit()
            assert sleeper.woken == 1
            session.commit()
            session.scalars(select(Job)).all()
            session.commit()
            assert sleeper.woken == 1
    finally:
        bell.sleepers.discard(sleeper)


@pytest.mark.usefixtures("few_polls")
def test_a_scheduled_job_starts_when_it_is_due(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker sleeps for so long and no longer; a job for later and one of another queue do not matter."""
    sessions = database.sessions()
    add(sessions, 1, delay=timedelta(hours=1), priority=-1)
    with sessions.begin() as session:
        session.execute(update(Job).values(kind="unknown", run_at=server_now()))
    add(sessions, 2, delay=timedelta(hours=1), priority=1)
    with asleep(sessions, monkeypatch, in_process=True, listen=False) as it:
        add(sessions, 3, delay=timedelta(seconds=3))
        it.runs(3)
        done = select(Job.run_at, Job.started_at).where(Job.state == "succeeded")

        def times() -> Any:
            with sessions() as session:
                return session.execute(done).first()

        until(times)
        assert times().run_at <= times().started_at
        assert any(0 < wait <= 3 for wait in it.waits)
        assert len(it.waits) < 100, "it does not look again and again meanwhile"


# --- the bell -------------------------------------------------------------------------------------------


def engines(database: Database, driver: str) -> Any:
    name = driver.removeprefix("async ")
    url = database.url.set(drivername=name)
    if driver.startswith("async ") or name.endswith("asyncpg"):
        return async_sessionmaker(database.async_engine(url, poolclass=NullPool))
    return sessionmaker(database.engine(url))


@pytest.mark.usefixtures("few_polls")
@pytest.mark.parametrize(
    "driver", ["postgresql+psycopg", "async postgresql+psycopg", "postgresql+asyncpg"]
)
def test_the_bell_wakes_a_worker_and_is_heard_again_after_its_session_was_ended(
    postgresql: Database, monkeypatch: pytest.MonkeyPatch, driver: str
) -> None:
    sessions = postgresql.sessions()
    with asleep(engines(postgresql, driver), monkeypatch) as it:
        assert bells(postgresql) == [True]
        add(sessions, 1)
        it.runs(1)
        it.sleep()
        with sessions.begin() as session:
            enqueue_many(session, [Woken(2), Woken(3)])
        it.runs(3)
        with postgresql.engine(isolation_level="AUTOCOMMIT").connect() as connection:
            listening = text(
                "SELECT pid FROM pg_stat_activity WHERE query LIKE 'LISTEN%' AND datname = current_database()"
            )
            (pid,) = connection.scalars(listening).all()
            connection.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
            until(lambda: connection.scalars(listening).all() not in ([], [pid]))
        until(lambda: bells(postgresql) == [True])
        it.sleep()
        add(sessions, 4)
        it.runs(4)
    assert bells(postgresql) == []


@pytest.mark.usefixtures("few_polls")
def test_the_bell_of_a_session_that_is_lost_is_off_until_it_is_heard_again(
    postgresql: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = postgresql.sessions()
    with asleep(sessions, monkeypatch) as it:
        listener: Any = it.worker._parts._listener  # type: ignore[union-attr]
        refuse = threading.Event()
        original = listener._control.on_kept_connection

        def on_kept_connection(work: Any) -> Any:
            if refuse.is_set():
                raise ConnectionError("no more connections")
            return original(work)

        monkeypatch.setattr(listener._control, "on_kept_connection", on_kept_connection)
        refuse.set()
        add(sessions, 1)  # it tries to hear it
        until(lambda: bells(postgresql) == [False])
        assert it.worker._parts._wakeup.longest_sleep(9) == 60  # type: ignore[union-attr]
        refuse.clear()
        until(lambda: bells(postgresql) == [True])
        it.sleep()
        add(sessions, 2)
        it.runs(2)


@pytest.mark.usefixtures("few_polls")
def test_a_scheduled_job_of_another_process_starts_when_it_is_due(
    postgresql: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = postgresql.sessions()
    with asleep(sessions, monkeypatch) as it:
        add(sessions, 1, delay=timedelta(seconds=2))
        it.runs(1)


@pytest.mark.usefixtures("few_polls")
def test_no_bell_is_rung_when_it_is_switched_off(
    postgresql: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = postgresql.sessions()
    with asleep(sessions, monkeypatch, listen=False, poll_interval=timedelta(seconds=31)) as it:
        assert bells(postgresql) == [False]
        assert "sajobs-listen" not in {thread.name for thread in threading.enumerate()}
        with heard(postgresql) as what:
            add(sessions, 1)
        assert what == []
        assert it.ran == []


@contextmanager
def heard(database: Database, schema: str | None = None) -> Iterator[list[str]]:
    """What arrives on the channel of the tables until the end of the block."""
    engine = database.engine(poolclass=NullPool, isolation_level="AUTOCOMMIT")
    got: list[str] = []
    with engine.connect() as connection:
        channel = connection.scalar(text(f"SELECT {CHANNEL_OF_TABLE}"), {"table": table_of(schema)})
        connection.exec_driver_sql(f"LISTEN {channel}")
        yield got
        driver: Any = connection.connection.driver_connection
        connection.execute(text("SELECT pg_notify(:channel, 'end')"), {"channel": channel})
        for notify in driver.notifies(timeout=SOON):
            if notify.payload == "end":
                break
            got.append(notify.payload)


def listen(session: Session, *, lease: timedelta = timedelta(minutes=5), on: bool = True) -> None:
    leases.register(session, lease, bell=on)


def test_a_retry_and_a_snooze_ring_for_other_workers(postgresql: Database) -> None:
    """The one that ran the job may be busy when it is due, and the others sleep past that."""
    sessions = postgresql.sessions()

    app: JobApp[Any, Any] = JobApp(sessions)
    ends: dict[int, Any] = {1: Retry(timedelta(seconds=70)), 2: Snooze(timedelta(seconds=70))}
    ends |= {3: Retry(timedelta(hours=1)), 4: Snooze(timedelta(hours=1))}

    @app.handler(Woken)
    def handler(session: Session, payload: Woken) -> Any:
        session.execute(select(1))
        if isinstance(ends[payload.n], Retry):
            raise ends[payload.n]
        return ends[payload.n]

    for n in ends:
        add(sessions, n, queue=f"q{n}")
    with sessions.begin() as session:
        listen(session)
    with heard(postgresql) as what:
        assert Worker(app, drain=True, listen=False).run()
    assert sorted(what) == ["q1", "q2"]


@pytest.mark.filterwarnings("ignore::sqlalchemy_jobs.errors.JobNeverAdded")  # in bulk
def test_each_way_to_add_rings_once_for_each_queue(postgresql: Database) -> None:
    sessions = postgresql.sessions()
    with sessions.begin() as session:
        listen(session)
    with heard(postgresql) as what, sessions.begin() as session:
        session.add_all([enqueue(Woken(n)) for n in range(300)])
        session.flush()
        session.add(enqueue(Woken(), queue="b"))
    assert sorted(what) == ["b", "default"]
    with heard(postgresql) as what, sessions.begin() as session:
        session.bulk_save_objects([enqueue(Woken(n)) for n in range(3)])
    assert what == ["default"]
    with heard(postgresql) as what, sessions.begin() as session:
        enqueue_many(session, [Woken(), Woken()], queue="c")
    assert what == ["c"]
    with heard(postgresql) as what, sessions.begin() as session:
        bell.ring(session, ["d", "e"])
        bell.ring(session)
    assert sorted(what) == ["", "d", "e"]
    with heard(postgresql) as what, sessions.begin() as session:
        made = enqueue(Woken())
        session.add(made)
        row = {c.name: getattr(made, c.key) for c in table.c}
        row |= {"unique_states": 0, "waits_for": 0}
        session.expunge(made)
        found = session.execute(table.insert().returning(table.c.id), row).scalars().all()
        assert found == [made.id]
    assert what == [], "an INSERT has one RETURNING only"


def test_who_may_be_left_out_rings_by_what_was_inserted(postgresql: Database) -> None:
    """And others without a RETURNING, whose result would cost more than the bell."""
    sessions = postgresql.sessions()
    inserts: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *others: Any) -> None:
        if statement.startswith("INSERT INTO sajobs_job"):
            inserts.append("by result" if "RETURNING" in statement else "by value")

    event.listen(sessions.kw["bind"], "before_cursor_execute", note)
    with sessions.begin() as session:
        listen(session)

    def rung(*jobs: Job) -> list[str]:
        inserts.clear()
        with heard(postgresql) as what, sessions.begin() as session:
            session.add_all(jobs)
        return sorted(what)

    assert rung(enqueue(Woken(), queue="a"), enqueue(Woken(), queue="b")) == ["a", "b"]
    assert inserts == ["by value"]
    assert rung(enqueue(Woken(), delay=timedelta(hours=1))) == []
    assert rung(enqueue(Woken(), unique_key="one"), enqueue(Woken(), queue="a")) == ["a", "default"]
    assert inserts == ["by result", "by value"]
    assert rung(enqueue(Woken(), unique_key="one")) == [], "it was left out"
    assert rung(Job(kind="woken", payload={})) == ["default"]
    assert inserts == ["by result"], "its queue and time are those of the columns"
    with heard(postgresql) as what, sessions.begin() as session:
        values = {"kind": "woken", "payload": {}, "queue": "c", "run_at": datetime.now(UTC)}
        assert session.scalar(table.insert().returning(table.c.queue), values) == "c"
    assert what == ["c"]


@pytest.mark.parametrize("driver", ["postgresql+psycopg", "postgresql+asyncpg"])
def test_async_sessions_ring(postgresql: Database, driver: str) -> None:
    with postgresql.session.begin() as session:
        listen(session)

    async def enqueue_some() -> None:
        engine = postgresql.async_engine(postgresql.url.set(drivername=driver))
        async with AsyncSession(engine) as session, session.begin():
            session.add(enqueue(Woken(), queue="a"))
            session.add_all([enqueue(Woken(), queue="b") for _ in range(20)])
            await session.run_sync(enqueue_many, [Woken(), Woken()])
        await engine.dispose()

    with heard(postgresql) as what:
        asyncio.run(enqueue_some())
    assert sorted(what) == ["a", "b", "default"]


def test_nothing_is_rung_for_nobody(postgresql: Database) -> None:
    """After a rollback, for a job of later, for workers that are busy, dead or have lost their lease."""
    sessions = postgresql.sessions()
    with sessions.begin() as session:
        listen(session, on=False)
        listen(session, lease=timedelta(seconds=-1))
        listen(session)
        session.execute(
            update(WorkerRow)
            .where(WorkerRow.bell, WorkerRow.lease_until > server_now())
            .values(state="dead")
        )
    with heard(postgresql) as what:
        add(sessions, 1)
    assert what == []
    with sessions.begin() as session:
        listen(session)
    with heard(postgresql) as what:
        with sessions() as session:
            session.add(enqueue(Woken()))
            session.flush()
            session.rollback()
        add(sessions, 2, delay=timedelta(hours=1))
    assert what == []


def test_a_prepared_transaction_does_not_ring(postgresql: Database) -> None:
    with postgresql.session.begin() as session:
        listen(session)
        if session.scalar(text("SELECT current_setting('max_prepared_transactions')::int")) == 0:
            pytest.skip("max_prepared_transactions is 0")
    engine = postgresql.engine()
    with heard(postgresql) as what, Session(engine, twophase=True) as session:
        session.add(enqueue(Woken()))
        session.flush()
        enqueue_many(session, [Woken()])
        bell.ring(session)
        session.commit()
    assert what == []
    with heard(postgresql) as what, Session(engine) as session:  # perhaps the same connection
        session.add(enqueue(Woken()))
        session.commit()
    assert what == ["default"]


def test_a_session_that_commits_in_two_phases_silences_the_bell(postgresql: Database) -> None:
    """Also where the server has no room for prepared transactions: up to the PREPARE."""
    with postgresql.session.begin() as session:
        listen(session)
    with heard(postgresql) as what, Session(postgresql.engine(), twophase=True) as session:
        session.add(enqueue(Woken()))
        session.flush()
        connection = session.connection()
        assert connection.scalar(text("SELECT current_setting('sajobs.silent')")) == "on"
        connection.exec_driver_sql("COMMIT")  # not what the session would do
        session.invalidate()
    assert what == []


def test_tenants_do_not_hear_each_other(postgresql: Database) -> None:
    """The channel is that of the table, however its name is arrived at."""
    from sqlalchemy_jobs import metadata

    other = "o'\"th:er"
    with postgresql.engine().begin() as connection:
        for schema in ("one", other):
            quoted = connection.dialect.identifier_preparer.quote_schema(schema)
            connection.exec_driver_sql(f"DROP SCHEMA IF EXISTS {quoted} CASCADE")
            connection.exec_driver_sql(f"CREATE SCHEMA {quoted}")
            metadata.create_all(connection.execution_options(schema_translate_map={None: schema}))
            connection.execution_options(schema_translate_map={})

    def tenant(schema: str | None) -> Any:
        return sessionmaker(
            postgresql.engine(execution_options={"schema_translate_map": {None: schema}})
        )

    for schema in (None, "one", other):
        with tenant(schema).begin() as session:
            listen(session)
    for own in ("one", other):
        with heard(postgresql, None) as by_plain, heard(postgresql, own) as by_own:
            add(tenant(own), 1, queue="mine")
            with tenant(own).begin() as session:
                bell.ring(session, ["yours"])
        assert (by_plain, sorted(by_own)) == ([], ["mine", "yours"])


@pytest.mark.usefixtures("few_polls")
def test_a_worker_of_a_tenant_hears_its_bell(
    postgresql: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sqlalchemy_jobs import metadata

    engine = postgresql.engine(execution_options={"schema_translate_map": {None: "tenant"}})
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP SCHEMA IF EXISTS tenant CASCADE")
        connection.exec_driver_sql("CREATE SCHEMA tenant")
        metadata.create_all(connection)
    sessions = sessionmaker(engine)
    with asleep(sessions, monkeypatch) as it:
        add(sessions, 1)
        it.runs(1)


@pytest.mark.usefixtures("few_polls")
def test_a_worker_does_not_heed_the_bell_of_a_queue_that_it_does_not_serve(
    postgresql: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = postgresql.sessions()
    with asleep(sessions, monkeypatch, queues=["mine"]) as it:
        it.waits.clear()
        add(sessions, 1, queue="yours")
        add(sessions, 2, queue="mine")
        it.runs(2)
        assert it.ran == [2]


# --- where there is no bell --------------------------------------------------------------------------


@pytest.mark.usefixtures("few_polls")
def test_behind_a_pooler_the_worker_polls(
    postgresql: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(pg.AdvisoryLocks, "session_of", lambda locks, driver: 1)
    with asleep(postgresql.sessions(), monkeypatch):
        assert bells(postgresql) == [False]
    assert [each for each in caplog.messages if "no bell is heard, so the worker polls" in each]


@pytest.mark.usefixtures("few_polls")
def test_a_listen_url_leads_past_a_pooler(
    postgresql: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pooler is played by the sessions of the app's own engine."""
    engine = postgresql.engine(connect_args={"application_name": "pooled"})
    original = pg.AdvisoryLocks.session_of

    def session_of(locks: pg.AdvisoryLocks, driver: Any) -> int | None:
        pooled = driver.info.get_parameters().get("application_name") == "pooled"
        return 1 if pooled else original(locks, driver)

    monkeypatch.setattr(pg.AdvisoryLocks, "session_of", session_of)
    sessions = sessionmaker(engine)
    url = postgresql.url.render_as_string(hide_password=False)
    with asleep(sessions, monkeypatch, listen_url=url) as it:
        assert bells(postgresql) == [True]
        with sessions() as session:
            assert session.scalars(select(WorkerRow.holds_lock)).all() == [True]
        add(sessions, 1)
        it.runs(1)


def test_a_listen_url_to_another_database_does_no_harm(
    postgresql: Database, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker's row is not there: it must not take itself for dead."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(leases, "LONE_RENEWAL", timedelta(seconds=0.2))
    monkeypatch.setattr(leases, "RENEWAL", timedelta(seconds=0.2))
    ran = threading.Event()
    sessions = postgresql.sessions()
    app: JobApp[Any, Any] = JobApp(sessions)

    @app.handler(Woken)
    def handler(session: Session, payload: Woken) -> None:
        ran.set()

    with app.worker(listen_url=postgresql.url.set(database="postgres")):
        until(lambda: "no lock beside the lease" in caplog.text)
        until(lambda: "no bell is heard" in caplog.text)
        with sessions() as session:
            until(
                lambda: (
                    session.scalars(select(WorkerRow.holds_lock)).all() == [False]
                    or session.rollback()
                )
            )
        add(sessions, 1)
        assert ran.wait(SOON)
    assert "declared this one dead" not in caplog.text


def test_tables_that_were_made_anew_are_listened_to_anew(postgresql: Database) -> None:
    engine = postgresql.engine(poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        ear = pg.Listening(connection, lambda queue: None, lambda: None)
        ear.check(connection)
        connection.exec_driver_sql("ALTER TABLE sajobs_job RENAME TO gone")
        try:
            with pytest.raises(LookupError):
                ear.check(connection)
        finally:
            connection.exec_driver_sql("ALTER TABLE gone RENAME TO sajobs_job")


# --- under load ------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_bell_is_off_while_claims_come_back_full(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, changes = Clock(), []
    monkeypatch.setattr(wakeup.time, "monotonic", clock)
    it = Wakeup(1.0, lambda: changes.append(it.wanted))
    it.hears(True)
    assert not it.was_turned_on(), "not before it is committed"
    assert it.announced(True)
    assert it.was_turned_on()
    assert not it.was_turned_on()
    it.claimed(full=True)
    clock.now += 0.9
    it.claimed(full=True)
    it.claimed(full=False)
    clock.now += 0.9
    it.claimed(full=True)
    assert changes == [True]
    clock.now += 1.0
    it.claimed(full=True)
    assert changes == [True, False]
    assert not it.announced(False)
    assert it.longest_sleep(9) == 1.0
    it.claimed(full=False)
    assert changes == [True, False, True]
    assert it.longest_sleep(9) == 1.0, "not before it is committed"
    assert it.announced(True)
    assert [it.longest_sleep(n) for n in range(6)] == [1, 2, 4, 8, 15, 15]
    it.hears(False)
    assert it.longest_sleep(9) == 1.0


@pytest.mark.parametrize(("poll", "longest"), [(0.1, 15), (30, 30), (3600, 60)])
def test_who_hears_the_bell_polls_at_least_each_minute(poll: float, longest: float) -> None:
    it = Wakeup(poll, lambda: None)
    it.hears(True)
    it.announced(True)
    assert it.longest_sleep(1000) == longest


@pytest.mark.usefixtures("few_polls")
def test_a_worker_that_has_no_room_turns_its_bell_off_and_on_again(
    postgresql: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wakeup, "BUSY", 0.05)
    sessions = postgresql.sessions()
    with asleep(sessions, monkeypatch, concurrency=1) as it:
        it.hold.clear()
        add(sessions, 1)
        add(sessions, 2)

        def is_off() -> bool:
            it.worker._parts._claiming.wake()  # type: ignore[union-attr]
            return bells(postgresql) == [False]

        until(is_off)
        it.hold.set()
        it.runs(2)
        until(lambda: bells(postgresql) == [True])
        it.sleep()
        add(sessions, 3)
        it.runs(3)


@pytest.mark.usefixtures("few_polls")
def test_a_pause_is_heard_by_a_worker_that_would_claim_before_it_reads(
    postgresql: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = postgresql.sessions()
    with asleep(sessions, monkeypatch) as it:
        add(sessions, 1)
        it.runs(1)
        it.sleep_again()
        with sessions.begin() as session:
            pause_queue(session, "default")
        add(sessions, 2)
        add(sessions, 3, queue="other")
        it.runs(3)
        assert 2 not in it.ran
        with sessions.begin() as session:
            resume_queue(session, "default")
        it.runs(2)


@pytest.mark.usefixtures("few_polls")
def test_a_worker_that_is_woken_in_vain_looks_no_more_than_every_10_ms(
    postgresql: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = postgresql.sessions()
    with asleep(sessions, monkeypatch) as it:
        looks: list[str] = []
        engine = it.worker._parts._control._engine  # type: ignore[union-attr]
        event.listen(engine, "before_cursor_execute", lambda *args: looks.append(args[2]))
        before = time.monotonic()
        for _ in range(200):
            it.worker._parts._claiming.wake()  # type: ignore[union-attr]
            time.sleep(0.0005)
        took = time.monotonic() - before
        assert len([each for each in looks if "lane" in each]) <= took / 0.01 + 2
