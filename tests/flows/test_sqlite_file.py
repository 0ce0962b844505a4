"""SQLite as a real database for jobs: many processes on one file, and one write lock for all of them."""

import asyncio
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, func, select, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import NullPool

from sqlalchemy_jobs import Attempt, Job, JobApp, Worker, WorkerRow, enqueue, job
from sqlalchemy_jobs.sqlite import configure
from sqlalchemy_jobs.worker import execution, guard
from tests.databases import Database
from tests.domain import Effect, Order
from tests.processes import ROOT, workers
from tests.waiting import until

# --- many processes -------------------------------------------------------------------------------

ENQUEUE = """
import sys
from sqlalchemy.orm import Session
from sqlalchemy_jobs import enqueue
from tests.apps.effects import Write, WriteAsync, engine
from tests.domain import Order

for n in range(int(sys.argv[2])):
    with Session(engine) as session:
        session.add(Order(paid=True))
        session.flush()
        payload = Write if n % 2 else WriteAsync
        session.add(enqueue(payload(f"{sys.argv[1]} {n}")))
        session.flush()
        if n % 5 == 4:
            session.rollback()
        else:
            session.commit()
"""


def test_three_workers_and_two_enqueuing_processes_share_one_file(
    sqlite: Database, tmp_path: Path
) -> None:
    """Nothing is lost or doubled, and nobody is told "database is locked"."""
    each = 200
    committed = 2 * each * 4 // 5
    environment = {
        "SAJOBS_TEST_URL": str(sqlite.url),
        "SAJOBS_TEST_FOLDER": str(tmp_path),
        "PYTHONPATH": str(ROOT),
    }
    # A lease that does not pass while others have the write lock, however slow the machine is.
    options = ("--concurrency", "2", "--lease", "90")
    with workers(sqlite, tmp_path, *options, count=3) as three, ExitStack() as stack:
        for worker in three:
            worker.wait_for("serves all queues")
        enqueuing = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", ENQUEUE, name, str(each)],
                    cwd=ROOT,
                    env=environment,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for name in ("one", "two")
        ]
        for process in enqueuing:
            stack.callback(process.kill)
        for process in enqueuing:
            _, said = process.communicate(timeout=90)
            assert (process.returncode, said) == (0, "")
        until(lambda: states(sqlite) == {"succeeded": committed}, 60)
        for worker in three:
            worker.signal(signal.SIGTERM)
        assert [worker.wait() for worker in three] == [0, 0, 0]
        for worker in three:
            assert not [line for line in worker.lines if " INFO " not in line][:-1], worker.log
            assert "locked" not in worker.log
    with sqlite.session() as session:
        assert session.scalar(select(func.count()).select_from(Order)) == committed
        notes = session.scalars(select(Effect.note)).all()
        assert len(notes) == len(set(notes)) == committed
        assert session.scalar(select(func.count(Effect.job_id.distinct()))) == committed
        # What was claimed ahead and waited for long was given back.
        assert session.scalars(select(Job.failures).distinct()).all() == [0]
        assert session.scalars(select(Attempt)).all() == []
        assert session.scalars(select(WorkerRow)).all() == []


def states(database: Database) -> dict[str, int]:
    with database.session() as session:
        query = select(Job.state, func.count()).group_by(Job.state)
        return dict(session.execute(query).all())  # type: ignore[arg-type]


# --- the warning about long writes ------------------------------------------------------------------


@job("slow", max_attempts=1)
@dataclass(frozen=True)
class Slow:
    n: int = 0


class Clock:
    """Measures how long a lock is held, and is moved by hand: a slow machine holds it for no longer."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


clock = Clock()


def slow_part() -> None:
    """Stands for a request to somewhere."""
    clock.now += 2 * execution.LONG_WRITE


def warnings_of(
    app: JobApp[Any, Any],
    sessions: sessionmaker[Session],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> list[str]:
    for module in (execution, guard):
        monkeypatch.setattr(module, "time", clock)
    with sessions.begin() as session:
        session.add(enqueue(Slow()))
    with caplog.at_level(logging.WARNING):
        Worker(app, drain=True).run()
    with sessions() as session:
        assert session.scalars(select(Job.state)).all() == ["succeeded"]
    return [record.getMessage() for record in caplog.records]


def write_then_work(session: Session, payload: Slow) -> None:
    session.add(Effect(note="early"))
    session.flush()
    slow_part()


def read_then_work(session: Session, payload: Slow) -> None:
    session.execute(text("SELECT 1"))  # BEGIN IMMEDIATE: takes the lock as a write does
    slow_part()


def savepoint_then_work(session: Session, payload: Slow) -> None:
    with session.begin_nested():
        session.add(Effect(note="early"))
    slow_part()


def work_then_write(session: Session, payload: Slow) -> None:
    slow_part()
    session.add(Effect(note="late"))


def only_work(session: Session, payload: Slow) -> None:
    slow_part()


def commit_then_work(session: Session, payload: Slow) -> None:
    session.add(Effect(note="early"))
    session.commit()
    slow_part()
    session.add(Effect(note="late"))


def rollback_then_work(session: Session, payload: Slow) -> None:
    session.execute(text("SELECT 1"))
    session.rollback()
    slow_part()
    session.add(Effect(note="late"))


def write_then_work_manually(session: Session, payload: Slow) -> None:
    session.commit()
    write_then_work(session, payload)


Handler = Callable[[Session, Slow], None]


@pytest.mark.parametrize("handler", [write_then_work, read_then_work, savepoint_then_work])
def test_a_handler_that_holds_the_write_lock_for_long_is_warned_about_with_the_way_out(
    sqlite: Database,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    handler: Handler,
) -> None:
    sessions = sqlite.sessions()
    app: JobApp[Any, Any] = JobApp(sessions)
    app.handler(Slow)(handler)
    (said,) = warnings_of(app, sessions, monkeypatch, caplog)
    assert f"test_sqlite_file.{handler.__name__} held SQLite's only write lock" in said
    assert 'transaction="manual"' in said
    assert "use the session last" in said


@pytest.mark.parametrize("handler", [work_then_write, only_work])
def test_a_handler_that_writes_last_is_not_warned_about(
    sqlite: Database,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    handler: Handler,
) -> None:
    sessions = sqlite.sessions()
    app: JobApp[Any, Any] = JobApp(sessions)
    app.handler(Slow)(handler)
    assert warnings_of(app, sessions, monkeypatch, caplog) == []


@pytest.mark.parametrize("handler", [commit_then_work, rollback_then_work])
def test_a_manual_handler_that_ends_its_transaction_before_its_slow_part_is_not_warned_about(
    sqlite: Database,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    handler: Handler,
) -> None:
    sessions = sqlite.sessions()
    app: JobApp[Any, Any] = JobApp(sessions)
    app.handler(Slow, transaction="manual")(handler)
    assert warnings_of(app, sessions, monkeypatch, caplog) == []


def test_a_manual_handler_that_writes_before_its_slow_part_is_warned_about(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sessions = sqlite.sessions()
    app: JobApp[Any, Any] = JobApp(sessions)
    app.handler(Slow, transaction="manual")(write_then_work_manually)
    (said,) = warnings_of(app, sessions, monkeypatch, caplog)
    assert "held SQLite's only write lock" in said


def test_an_async_handler_is_warned_about_too(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    app: JobApp[Any, Any] = JobApp(async_sessionmaker(sqlite.async_engine(poolclass=NullPool)))

    @app.handler(Slow)
    async def handler(session: AsyncSession, payload: Slow) -> None:
        session.add(Effect(note="early"))
        await session.flush()
        slow_part()

    (said,) = warnings_of(app, sqlite.sessions(), monkeypatch, caplog)
    assert "held SQLite's only write lock" in said


def test_other_databases_have_no_such_warning(
    row_locks: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sessions = row_locks.sessions()
    app: JobApp[Any, Any] = JobApp(sessions)
    app.handler(Slow)(write_then_work)
    assert warnings_of(app, sessions, monkeypatch, caplog) == []


def test_a_manual_handler_lets_others_write_during_its_slow_part(sqlite: Database) -> None:
    sessions = sqlite.sessions()
    app: JobApp[Any, Any] = JobApp(sessions)
    committed, written = threading.Event(), threading.Event()

    @app.handler(Slow, transaction="manual")
    def handler(session: Session, payload: Slow) -> None:
        session.add(Effect(note="early"))
        session.commit()
        committed.set()
        assert written.wait(20)
        session.add(Effect(note="late"))

    with sessions.begin() as session:
        session.add(enqueue(Slow()))
    with app.worker():
        assert committed.wait(20)
        with sessions.begin() as session:
            session.add(Effect(note="meanwhile"))
        written.set()
        until(lambda: states(sqlite) == {"succeeded": 1})
    with sessions() as session:
        notes = session.scalars(select(Effect.note).order_by(Effect.id)).all()
    assert notes == ["early", "meanwhile", "late"]


# --- configure() ----------------------------------------------------------------------------------


@pytest.fixture
def engine(sqlite: Database) -> Engine:
    """An engine that nobody has configured."""
    return create_engine(sqlite.url, poolclass=NullPool)


def effects_after_rollback(engine: Engine) -> int:
    """Write a row in a SAVEPOINT, roll the outer transaction back, and count what is left."""
    with Session(engine) as session:
        with session.begin_nested():
            session.add(Effect(note="in a savepoint"))
        session.rollback()
        return session.scalar(select(func.count()).select_from(Effect)) or 0


def test_a_row_written_in_a_savepoint_is_gone_after_the_outer_rollback(engine: Engine) -> None:
    configure(engine)
    assert effects_after_rollback(engine) == 0


def test_a_savepoint_keeps_its_own_promise_too(engine: Engine) -> None:
    configure(engine)
    with Session(engine) as session:
        session.add(Effect(note="outer"))
        savepoint = session.begin_nested()
        session.add(Effect(note="inner"))
        session.flush()
        savepoint.rollback()
        session.commit()
        assert session.scalars(select(Effect.note)).all() == ["outer"]


def test_a_row_written_in_an_async_savepoint_is_gone_after_the_outer_rollback(
    sqlite: Database,
) -> None:
    async def main() -> int:
        engine = sqlite.async_engine(poolclass=NullPool)
        async with AsyncSession(engine) as session:
            async with session.begin_nested():
                session.add(Effect(note="in a savepoint"))
            await session.rollback()
            return await session.scalar(select(func.count()).select_from(Effect)) or 0

    assert asyncio.run(main()) == 0


def test_configuring_twice_is_harmless(engine: Engine, sqlite: Database) -> None:
    statements: list[str] = []
    configure_twice(engine)
    with engine.connect() as connection:
        raw: Any = connection.connection.dbapi_connection
        raw.set_trace_callback(statements.append)
        connection.execute(text("SELECT 1"))
        connection.commit()
        raw.set_trace_callback(None)
    assert statements == ["BEGIN IMMEDIATE", "SELECT 1", "COMMIT"]
    assert effects_after_rollback(engine) == 0
    app: JobApp[Any, Any] = JobApp(sessionmaker(engine))
    app.handler(Slow)(lambda session, payload: session.add(Effect(note="done")))
    with Session(engine) as session:
        session.add(enqueue(Slow()))
        session.commit()
    Worker(app, drain=True).run()
    assert states(sqlite) == {"succeeded": 1}


def configure_twice(engine: Engine) -> None:
    configure(engine)
    configure(engine)


def test_configuring_an_async_engine_and_its_sync_side_is_harmless(sqlite: Database) -> None:
    async def main() -> None:
        engine = sqlite.async_engine(poolclass=NullPool)  # configured
        configure_twice(engine.sync_engine)
        async with engine.connect() as connection:
            assert await connection.scalar(text("PRAGMA journal_mode")) == "wal"
            assert await connection.scalar(text("PRAGMA busy_timeout")) == 30_000

    asyncio.run(main())


def test_a_configured_engine_waits_for_the_write_lock_from_the_start(engine: Engine) -> None:
    """A transaction that has begun to read never fails in the middle because another one wrote."""
    configure(engine)
    order: list[str] = []
    has_lock = threading.Event()

    def second() -> None:
        assert has_lock.wait(20)
        with Session(engine) as session:
            session.scalar(select(func.count()).select_from(Effect))
            order.append("second reads")
            session.add(Effect(note="second"))
            session.commit()

    thread = threading.Thread(target=second)
    thread.start()
    with Session(engine) as session:
        session.scalar(select(func.count()).select_from(Effect))
        has_lock.set()
        thread.join(0.2)  # it would be done by now if it did not wait
        session.add(Effect(note="first"))
        session.flush()
        order.append("first wrote")
        session.commit()
    thread.join(20)
    assert order == ["first wrote", "second reads"]
