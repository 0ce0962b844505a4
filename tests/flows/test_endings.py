"""However a worker ends, nothing is left running under it, and nothing of it is left behind."""

import asyncio
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from sqlalchemy_jobs import Job, JobApp, Worker, WorkerRow, enqueue, errors, job
from sqlalchemy_jobs.worker import parts as parts_module
from sqlalchemy_jobs.worker import worker as worker_module
from sqlalchemy_jobs.worker.leases import Lease
from sqlalchemy_jobs.worker.loops import LoopThread
from tests.databases import Database
from tests.domain import Effect
from tests.waiting import until


@job("ending", max_attempts=1)
@dataclass(frozen=True)
class Ending:
    n: int = 0


def own_threads() -> set[str]:
    return {each.name for each in threading.enumerate() if each.name.startswith("sajobs-")}


def test_an_async_run_that_outlives_its_cancellation_is_given_back_without_a_failure(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cleans up for longer than the worker waits; with max_attempts=1 a crash would fail it for good."""
    monkeypatch.setattr(worker_module, "RELEASE_WAIT", 0.2)
    engine = database.async_engine(poolclass=NullPool)
    app: JobApp[Any, Any] = JobApp(async_sessionmaker(engine))
    began, go_on = threading.Event(), threading.Event()
    original = Lease.end

    def end(lease: Lease) -> None:
        original(lease)
        go_on.set()  # now the worker has given up all that it had, and waits for its loop

    monkeypatch.setattr(Lease, "end", end)

    @app.handler(Ending)
    async def handler(session: AsyncSession, payload: Ending) -> None:
        began.set()
        while not go_on.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue

    sessions = database.sessions()
    with sessions.begin() as session:
        session.add(enqueue(Ending()))
    worker = Worker(app, shutdown_timeout=timedelta(0))
    with worker:
        assert began.wait(20)
    assert go_on.is_set()
    with sessions() as session:
        found = session.scalars(select(Job)).one()
        assert (found.state, found.worker_id, found.failures, found.crashes) == (
            "ready",
            None,
            0,
            0,
        )
        assert session.scalar(select(func.count()).select_from(WorkerRow)) == 0


def test_a_run_that_is_given_back_at_the_end_is_rolled_back_first(database: Database) -> None:
    """On SQLite it holds the only write lock: its release could not be written down."""
    app: JobApp[Any, Any] = JobApp(database.sessions())
    began, over = threading.Event(), threading.Event()
    ended: list[type[BaseException]] = []

    @app.handler(Ending)
    def handler(session: Session, payload: Ending) -> None:
        session.add(Effect(note="never"))
        session.flush()
        began.set()
        try:
            while True:
                time.sleep(0.001)
        except BaseException as error:
            ended.append(type(error))
            over.set()
            raise

    sessions = database.sessions()
    with sessions.begin() as session:
        session.add(enqueue(Ending()))
    with app.worker(shutdown_timeout=timedelta(0)):
        assert began.wait(20)
    with sessions() as session:
        found = session.scalars(select(Job)).one()
        assert (found.state, found.failures, found.crashes) == ("ready", 0, 0)
        assert session.scalars(select(Effect)).all() == []
    assert over.wait(20)  # the worker does not wait for the thread to hear of it
    assert ended == [errors.RunInterrupted]


def test_waiting_for_ever_is_a_shutdown_timeout_like_any_other(sqlite: Database) -> None:
    app: JobApp[Any, Any] = JobApp(sqlite.sessions())
    began, go_on = threading.Event(), threading.Event()

    @app.handler(Ending)
    def handler(session: Session, payload: Ending) -> None:
        began.set()
        assert go_on.wait(20)

    with sqlite.session.begin() as session:
        session.add(enqueue(Ending()))
    with app.worker(shutdown_timeout=timedelta.max, poll_interval=timedelta(days=200_000)):
        assert began.wait(20)
        threading.Timer(0.2, go_on.set).start()
    with sqlite.session() as session:
        assert session.scalars(select(Job.state)).one() == "succeeded"


def test_an_error_in_the_shutdown_leaves_no_worker_behind(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    app: JobApp[Any, Any] = JobApp(sqlite.sessions())
    app.handler(Ending)(lambda session, payload: None)

    def interrupted(*args: object, **options: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(Worker, "_wait_until_idle", interrupted)
    worker = Worker(app)
    with pytest.raises(KeyboardInterrupt), worker:
        until(lambda: bool(own_threads()))
    until(lambda: not {each for each in own_threads() if "handler" not in each})
    with sqlite.session() as session:
        assert session.scalars(select(WorkerRow)).all() == []
    assert not worker.is_running


def test_a_cancelled_async_with_leaves_no_worker_behind(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    app: JobApp[Any, Any] = JobApp(sqlite.sessions())
    app.handler(Ending)(lambda session, payload: None)
    worker = Worker(app)
    in_check, go_on = threading.Event(), threading.Event()
    check = parts_module.Parts.check

    def slow_check(parts: Any) -> None:
        in_check.set()
        assert go_on.wait(20)
        check(parts)

    monkeypatch.setattr(parts_module.Parts, "check", slow_check)

    async def main() -> None:
        async def enter() -> None:
            async with worker:
                raise AssertionError("it was cancelled before")

        task = asyncio.create_task(enter())
        await asyncio.to_thread(in_check.wait, 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()
        await asyncio.to_thread(until, lambda: not worker.is_running)

    asyncio.run(main())
    until(lambda: not {each for each in own_threads() if "handler" not in each})


def test_stop_does_not_shorten_the_end_of_an_embedded_worker(sqlite: Database) -> None:
    app: JobApp[Any, Any] = JobApp(sqlite.sessions())
    began, go_on = threading.Event(), threading.Event()

    @app.handler(Ending)
    def handler(session: Session, payload: Ending) -> None:
        began.set()
        assert go_on.wait(20)

    with sqlite.session.begin() as session:
        session.add(enqueue(Ending()))
    worker = app.worker(shutdown_timeout=timedelta(seconds=20))
    with worker:
        assert began.wait(20)
        worker.stop()
        threading.Timer(0.2, go_on.set).start()
    with sqlite.session() as session:
        assert session.scalars(select(Job.state)).one() == "succeeded"


def test_a_call_in_flight_on_a_loop_that_is_closed_comes_to_an_end() -> None:
    loop = LoopThread("of-a-test")
    waiting, ended = threading.Event(), threading.Event()

    async def for_ever() -> None:
        waiting.set()
        await asyncio.Event().wait()

    def call() -> None:
        try:
            loop.call(for_ever())
        except BaseException:
            ended.set()

    threading.Thread(target=call, daemon=True).start()
    assert waiting.wait(20)
    loop.close(asyncio.sleep(0))
    assert ended.wait(20)


def test_a_handler_that_is_registered_later_waits_for_the_next_worker(sqlite: Database) -> None:
    """The checks at the start held for the handlers that there were."""
    app: JobApp[Any, Any] = JobApp(sqlite.sessions())

    @job("first")
    @dataclass(frozen=True)
    class First:
        n: int = 0

    app.handler(First)(lambda session, payload: None)
    sessions = sqlite.sessions()
    with app.worker():

        @app.handler(Ending)
        async def late(session: AsyncSession, payload: Ending) -> None: ...

        with sessions.begin() as session:
            session.add(enqueue(Ending()))
            session.add(enqueue(First()))

        def first_is_done() -> bool:
            with sessions() as session:
                return "succeeded" in session.scalars(select(Job.state).where(Job.kind == "first"))

        until(first_is_done)
    with sessions() as session:
        found = session.scalars(select(Job).where(Job.kind == "ending")).one()
        assert (found.state, found.attempt) == ("ready", 0)
