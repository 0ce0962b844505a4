"""Workers with the sessions of other libraries, on every driver, alone and inside an application."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import flask
import flask_sqlalchemy
import pytest
import sqlmodel
from sqlalchemy import NullPool, func, select, text, update
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, scoped_session, sessionmaker

import sqlalchemy_jobs
from sqlalchemy_jobs import (
    Fail,
    Job,
    JobApp,
    JobState,
    Run,
    Worker,
    current_run,
    enqueue,
    job,
    transitions,
)
from sqlalchemy_jobs.claims import Wanted
from sqlalchemy_jobs.errors import ConfigurationError
from sqlalchemy_jobs.worker.availability import Availability
from sqlalchemy_jobs.worker.control import Control
from sqlalchemy_jobs.worker.leases import register
from tests.databases import NAMES, Database
from tests.domain import Effect

WAIT = 20.0
"""Seconds until an event that does not come fails the test."""
QUICK = timedelta(seconds=0.05)
EMBEDDED: Any = {"poll_interval": QUICK, "shutdown_timeout": timedelta(seconds=WAIT)}
"""A worker that looks often, and at its end gives a slow machine the time to commit."""


@job("sync")
@dataclass
class Sync:
    note: str = ""


@job("async")
@dataclass
class Async:
    note: str = ""


def add(database: Database, *payloads: Any) -> list[uuid.UUID]:
    with database.session.begin() as session:
        jobs = [enqueue(payload) for payload in payloads]
        session.add_all(jobs)
        return [each.id for each in jobs]


def drain(app: JobApp[Any, Any]) -> None:
    assert Worker(app, drain=True, poll_interval=QUICK).run()


def states(database: Database) -> list[str]:
    """The states of all jobs, in the order in which they were enqueued."""
    with database.session.begin() as session:
        return list(session.scalars(select(Job.state).order_by(Job.id)))


def notes(database: Database) -> list[str]:
    with database.session.begin() as session:
        return sorted(session.scalars(select(Effect.note)))


def problems(database: Database) -> list[str | None]:
    with database.session.begin() as session:
        found = session.scalars(select(sqlalchemy_jobs.Attempt))
        return [f"{each.error_type}: {each.message}" for each in found]


def succeeded(database: Database, count: int) -> None:
    """Every one of `count` jobs succeeded, and if not the reason is shown."""
    assert (states(database), problems(database)) == ([JobState.SUCCEEDED] * count, [])


DRIVERS = {
    "sqlite": ["sqlite+aiosqlite"],
    "postgresql": ["postgresql+psycopg", "postgresql+asyncpg"],
    "mysql": ["mysql+aiomysql"],
}
PAIRS = [(name, driver) for name, drivers in DRIVERS.items() for driver in drivers]

on_every_async_driver = pytest.mark.parametrize(
    ("database", "driver"),
    PAIRS,
    indirect=["database"],
    ids=[driver for _, driver in PAIRS],
)


def async_engine(database: Database, driver: str, **options: Any) -> AsyncEngine:
    return database.async_engine(database.url.set(drivername=driver), **options)


# ------------------------------------------------------------------------------ sessions of other makes


def test_sqlmodels_session(database: Database) -> None:
    app = JobApp(sessionmaker(database.engine(), class_=sqlmodel.Session))

    @app.handler(Sync)
    def handle(session: sqlmodel.Session, payload: Sync) -> int:
        session.add(Effect(note=payload.note))
        # exec() is SQLModel's own, and sees what was added.
        return session.exec(sqlmodel.select(func.count()).select_from(Effect)).one()

    @app.handler(Async)  # whatever it is called: a plain def
    def fail(session: sqlmodel.Session, payload: Async) -> None:
        session.add(Effect(note="never"))
        session.flush()
        raise Fail("on purpose")

    add(database, Sync("done"), Async())
    drain(app)
    assert states(database) == [JobState.SUCCEEDED, JobState.FAILED]
    assert notes(database) == ["done"]


def test_a_helper_with_the_global_scoped_session_writes_into_the_runs_transaction(
    database: Database,
) -> None:
    registry = scoped_session(database.sessions())
    app = JobApp(registry)
    same: list[bool] = []

    def helper(note: str) -> None:
        registry.add(Effect(note=note, job_id=current_run().job_id.hex))

    @app.handler(Sync)
    def handle(session: Session, payload: Sync) -> None:
        helper(payload.note)
        same.append(registry() is session)
        session.flush()
        if payload.note == "fails":
            raise Fail("what the helper wrote goes too")

    add(database, Sync("first"), Sync("fails"), Sync("last"))
    drain(app)
    assert same == [True, True, True]
    assert notes(database) == ["first", "last"]
    assert states(database) == [JobState.SUCCEEDED, JobState.FAILED, JobState.SUCCEEDED]


def test_the_applications_own_scoped_session_is_left_alone(database: Database) -> None:
    """Also in the thread that starts the worker: what was added there is committed later."""
    registry = scoped_session(database.sessions())
    app = JobApp(registry)
    used: list[Session] = []
    done = threading.Event()

    @app.handler(Sync)
    def handle(session: Session, payload: Sync) -> None:
        used.append(session)
        if len(used) == 2:
            done.set()

    add(database, Sync(), Sync())
    mine = registry()
    registry.add(Effect(note="mine"))
    with app.worker(**EMBEDDED):
        assert done.wait(WAIT)
    succeeded(database, 2)
    after = registry()
    registry.commit()
    registry.remove()
    assert after is mine
    assert mine not in used
    assert used[0] is not used[1]
    assert notes(database) == ["mine"]


def flask_application(database: Database) -> tuple[flask.Flask, flask_sqlalchemy.SQLAlchemy]:
    app = flask.Flask("shop")
    app.config["SQLALCHEMY_DATABASE_URI"] = database.url
    db = flask_sqlalchemy.SQLAlchemy(app)
    if database.name == "sqlite":
        with app.app_context():
            sqlalchemy_jobs.sqlite.configure(db.engine)
    return app, db


@pytest.fixture
def shop(database: Database) -> Iterator[tuple[flask.Flask, flask_sqlalchemy.SQLAlchemy]]:
    app, db = flask_application(database)
    yield app, db
    with app.app_context():
        db.engine.dispose()


def test_flask_sqlalchemy(
    database: Database, shop: tuple[flask.Flask, flask_sqlalchemy.SQLAlchemy]
) -> None:
    app, db = shop
    jobs = JobApp(db.session, context=app.app_context)
    seen: list[Any] = []

    @jobs.handler(Sync)
    def handle(session: Session, payload: Sync) -> None:
        seen.append((flask.current_app.name, db.session() is session))
        db.session.add(Effect(note=payload.note))
        db.session.flush()
        assert session.scalar(select(func.count()).where(Effect.note == payload.note)) == 1
        if payload.note == "fails":
            raise Fail("on purpose")

    with app.app_context():
        db.session.add_all([enqueue(Sync("first")), enqueue(Sync("fails")), enqueue(Sync("last"))])
        db.session.commit()
    drain(jobs)
    assert seen == [("shop", True)] * 3
    assert notes(database) == ["first", "last"]
    assert states(database) == [JobState.SUCCEEDED, JobState.FAILED, JobState.SUCCEEDED]


def test_flask_sqlalchemy_in_the_application_itself(
    database: Database, shop: tuple[flask.Flask, flask_sqlalchemy.SQLAlchemy]
) -> None:
    app, db = shop
    jobs = JobApp(db.session, context=app.app_context)
    done = threading.Event()

    @jobs.handler(Sync)
    def handle(session: Session, payload: Sync) -> None:
        db.session.add(Effect(note=payload.note))
        done.set()

    with jobs.worker(**EMBEDDED):
        with app.test_request_context():
            db.session.add(enqueue(Sync("from a request")))
            db.session.commit()
        assert done.wait(WAIT)
    succeeded(database, 1)
    assert notes(database) == ["from a request"]


def test_the_context_is_around_each_run(sqlite: Database) -> None:
    where = threading.local()

    @contextmanager
    def context() -> Iterator[None]:
        where.inside = True
        try:
            yield
        finally:
            where.inside = False

    inside: list[bool] = []
    app = JobApp(sqlite.sessions(), context=context)
    app.handler(Sync)(lambda session, payload: inside.append(where.inside))
    add(sqlite, Sync(), Sync())
    drain(app)
    succeeded(sqlite, 2)
    assert inside == [True, True]


# ------------------------------------------------------------------------------------- async sessions


@on_every_async_driver
def test_async_sessions_alone(database: Database, driver: str) -> None:
    """The worker's own transactions go through the same driver, on a loop of their own."""
    app = JobApp(async_sessionmaker(async_engine(database, driver)))

    @app.handler(Async)
    async def handle(session: AsyncSession, payload: Async) -> dict[str, int]:
        session.add(Effect(note=payload.note, job_id=current_run().job_id.hex))
        await session.flush()
        await asyncio.to_thread(current_run)  # kept
        if payload.note == "fails":
            raise Fail("on purpose")
        if payload.note == "savepoint":
            savepoint = await session.begin_nested()
            session.add(Effect(note="never"))
            await session.flush()
            await savepoint.rollback()
        return {"effects": await session.scalar(select(func.count()).select_from(Effect)) or 0}

    add(database, Async("first"), Async("fails"), Async("savepoint"))
    drain(app)
    assert states(database) == [JobState.SUCCEEDED, JobState.FAILED, JobState.SUCCEEDED]
    assert notes(database) == ["first", "savepoint"]
    with database.session.begin() as session:
        results = list(session.scalars(select(Job.result).order_by(Job.id)))
    assert results[1] is None
    assert all(each["effects"] in (1, 2) for each in (results[0], results[2]))


@on_every_async_driver
def test_a_handler_that_does_not_use_its_async_session(database: Database, driver: str) -> None:
    app = JobApp(async_sessionmaker(async_engine(database, driver)))
    count = 0

    @app.handler(Async)
    async def handle(session: AsyncSession, payload: Async) -> None:
        nonlocal count
        count += 1

    add(database, *[Async()] * 20)
    drain(app)
    succeeded(database, 20)
    assert count == 20


@on_every_async_driver
def test_both_colours_in_one_worker(database: Database, driver: str) -> None:
    app = JobApp(database.sessions(), async_sessionmaker(async_engine(database, driver)))

    @app.handler(Sync)
    def handle(session: Session, payload: Sync) -> None:
        session.add(Effect(note=f"sync {payload.note}"))
        session.add(enqueue(Async(payload.note)))

    @app.handler(Async)
    async def handle_async(session: AsyncSession, payload: Async) -> None:
        session.add(Effect(note=f"async {payload.note}"))
        if payload.note == "1":
            session.add(enqueue(Sync("2")))

    add(database, Sync("1"))
    drain(app)
    succeeded(database, 4)
    assert notes(database) == ["async 1", "async 2", "sync 1", "sync 2"]


def test_async_handlers_run_side_by_side(database: Database) -> None:
    """As many as the concurrency, although on one loop: each waits for the other."""
    app = JobApp(async_sessionmaker(async_engine(database, DRIVERS[database.name][0])))
    arrived: list[str] = []
    both = asyncio.Event()

    @app.handler(Async)
    async def handle(session: AsyncSession, payload: Async) -> None:
        arrived.append(payload.note)
        if len(arrived) == 2:
            both.set()
        await asyncio.wait_for(both.wait(), WAIT)

    add(database, Async("a"), Async("b"))
    assert Worker(app, drain=True, concurrency=2, poll_interval=QUICK).run()
    succeeded(database, 2)


def test_middleware_is_around_sync_and_async_handlers(sqlite: Database) -> None:
    engine = async_engine(sqlite, DRIVERS[sqlite.name][0])
    app = JobApp(sqlite.sessions(), async_sessionmaker(engine))
    events: list[str] = []

    @app.middleware
    @contextmanager
    def outer(run: Run) -> Iterator[None]:
        events.append(f"before {run.kind}")
        yield
        events.append(f"after {run.kind}")

    @app.handler(Sync)
    def handle(session: Session, payload: Sync) -> None:
        events.append("sync")

    @app.handler(Async)
    async def handle_async(session: AsyncSession, payload: Async) -> None:
        await asyncio.sleep(0)
        events.append("async")

    add(sqlite, Sync())
    drain(app)
    add(sqlite, Async())
    drain(app)  # another worker, with another loop for the engine
    assert events == ["before sync", "sync", "after sync", "before async", "async", "after async"]


# --------------------------------------------------------------------------- inside an application, sync


def test_embedded_in_sync_code_works_in_the_background(database: Database) -> None:
    app = JobApp(database.sessions())
    threads: list[threading.Thread] = []
    done = threading.Event()

    @app.handler(Sync)
    def handle(session: Session, payload: Sync) -> None:
        session.add(Effect(note=payload.note))
        threads.append(threading.current_thread())
        done.set()

    worker = app.worker(**EMBEDDED)
    assert not worker.is_running
    with worker as entered:
        assert entered is worker
        assert worker.is_running
        add(database, Sync("in the background"))
        assert done.wait(WAIT)
    assert not worker.is_running
    succeeded(database, 1)
    assert notes(database) == ["in the background"]
    assert threads[0] is not threading.current_thread()


def test_embedded_in_a_thread(database: Database) -> None:
    """Where signal handlers cannot be installed, and the application's loop is elsewhere."""
    engine = async_engine(database, DRIVERS[database.name][0])
    app = JobApp(database.sessions(), async_sessionmaker(engine))
    done = [threading.Event(), threading.Event()]
    started, stop = threading.Event(), threading.Event()
    problems: list[BaseException] = []

    @app.handler(Sync)
    def handle(session: Session, payload: Sync) -> None:
        session.add(Effect(note="sync"))
        done[0].set()

    @app.handler(Async)
    async def handle_async(session: AsyncSession, payload: Async) -> None:
        session.add(Effect(note="async"))
        done[1].set()

    def serve() -> None:
        try:
            with app.worker(**EMBEDDED):
                started.set()
                stop.wait()
        except BaseException as problem:
            problems.append(problem)
            started.set()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        assert started.wait(WAIT)
        add(database, Sync(), Async())
        assert all(each.wait(WAIT) for each in done)
    finally:
        stop.set()
        thread.join()
    assert problems == []
    succeeded(database, 2)
    assert notes(database) == ["async", "sync"]


def test_nothing_that_a_run_leaves_behind_is_seen_by_the_next_one(sqlite: Database) -> None:
    """Neither in its session, which may serve several runs, nor, on a loop, in its context."""
    engine = async_engine(sqlite, DRIVERS["sqlite"][0])
    app = JobApp(sqlite.sessions(), async_sessionmaker(engine))
    left: ContextVar[str] = ContextVar("left", default="")
    seen: list[tuple[object, ...]] = []

    def traces(session: Session) -> tuple[object, ...]:
        return (
            session.autoflush,
            dict(session.info).get("mine"),
            session.new,
            hasattr(session, "mine"),
        )

    def leave(session: Session, how: str) -> None:
        seen.append(traces(session))
        if how == "attribute":
            session.autoflush = False
        elif how == "another":
            session.mine = True  # type: ignore[attr-defined]
        elif how == "info":
            session.info["mine"] = how
        elif how == "object":
            session.add(Effect(note=how))

    @app.handler(Sync)
    def handle(session: Session, payload: Sync) -> None:
        leave(session, payload.note)

    @app.handler(Async)
    async def handle_async(session: AsyncSession, payload: Async) -> None:
        assert left.get() == ""
        left.set(payload.note)
        leave(session.sync_session, payload.note)

    hows = ["", "attribute", "", "another", "info", "", "object", "", ""]
    add(sqlite, *map(Sync, hows), *map(Async, hows))
    drain(app)
    succeeded(sqlite, 18)
    assert [(flush, info, list(new), mine) for flush, info, new, mine in seen] == [
        (True, None, [], False)
    ] * 18


def test_leaving_the_block_lets_a_run_finish(database: Database) -> None:
    app = JobApp(database.sessions())
    started = threading.Event()

    @app.handler(Sync)
    def handle(session: Session, payload: Sync) -> None:
        started.set()
        while worker.is_running:  # until the block is being left
            time.sleep(0.01)
        session.add(Effect(note="finished"))

    add(database, Sync())
    worker = app.worker(**EMBEDDED)
    with worker:
        assert started.wait(WAIT)
    succeeded(database, 1)
    assert notes(database) == ["finished"]


def test_an_error_in_the_block_is_not_swallowed_and_ends_the_worker(sqlite: Database) -> None:
    app = JobApp(sqlite.sessions())
    app.handler(Sync)(lambda session, payload: None)
    worker = app.worker()
    with pytest.raises(ZeroDivisionError), worker:
        raise ZeroDivisionError
    assert not worker.is_running


def test_a_worker_starts_once(sqlite: Database) -> None:
    app = JobApp(sqlite.sessions())
    app.handler(Sync)(lambda session, payload: None)
    worker = app.worker()
    with worker:
        pass
    with pytest.raises(ConfigurationError, match="make a new one"), worker:
        pass
    with app.worker() as another:
        assert another.is_running


def test_leaving_the_block_leaves_no_thread_and_no_row(database: Database) -> None:
    before = set(threading.enumerate())
    engine = async_engine(database, DRIVERS[database.name][0])
    app = JobApp(database.sessions(), async_sessionmaker(engine))
    done = threading.Barrier(3)

    @app.handler(Sync)
    def handle(session: Session, payload: Sync) -> None:
        done.wait(WAIT)

    @app.handler(Async)
    async def handle_async(session: AsyncSession, payload: Async) -> None:
        await asyncio.to_thread(done.wait, WAIT)

    add(database, Sync(), Async())
    with app.worker(concurrency=2, **EMBEDDED):
        done.wait(WAIT)
    left = [each for each in set(threading.enumerate()) - before if each.name.startswith("sajobs")]
    for thread in left:
        thread.join(WAIT)
    assert [each for each in left if each.is_alive()] == []
    with database.session.begin() as session:
        assert session.scalar(select(func.count()).select_from(sqlalchemy_jobs.WorkerRow)) == 0


# -------------------------------------------------------------------------- inside an application, async


@on_every_async_driver
def test_async_handlers_run_on_the_running_loop_and_share_its_engine(
    database: Database, driver: str
) -> None:
    """An AsyncEngine belongs to one loop: used on a second one, it fails on both."""
    count = 12

    async def main() -> tuple[set[asyncio.AbstractEventLoop], asyncio.AbstractEventLoop, int]:
        # SQLAlchemy 2.0.31 has no pool to size for aiosqlite.
        small = {} if driver.endswith("aiosqlite") else {"pool_size": 2, "max_overflow": 0}
        engine = async_engine(database, driver, **small)
        sessions = async_sessionmaker(engine)
        app = JobApp(sessions)
        loops: set[asyncio.AbstractEventLoop] = set()
        first, finished = asyncio.Event(), asyncio.Event()
        handled, queries = 0, 0

        @app.handler(Async)
        async def handle(session: AsyncSession, payload: Async) -> None:
            nonlocal handled
            loops.add(asyncio.get_running_loop())
            first.set()
            session.add(Effect(note=payload.note))
            await session.flush()
            handled += 1
            if handled == count:
                finished.set()

        async def own_queries() -> None:
            nonlocal queries
            while not (finished.is_set() and queries >= count):
                async with sessions() as session:
                    assert await session.scalar(text("SELECT 1")) == 1
                    queries += 1
                # SQLite's lock is not fair: leave the handlers a gap.
                await asyncio.sleep(0.001)

        async with sessions() as session, session.begin():
            session.add_all([enqueue(Async(str(number))) for number in range(count)])
        async with app.worker(**EMBEDDED) as worker:
            assert worker.is_running
            await asyncio.wait_for(first.wait(), WAIT)
            mine = [asyncio.create_task(own_queries()) for _ in range(2)]
            await asyncio.wait_for(asyncio.gather(*mine), WAIT)
        assert not worker.is_running
        # The application's engine goes on.
        async with sessions() as session:
            assert await session.scalar(select(func.count()).select_from(Effect)) == count
        await engine.dispose()
        return loops, asyncio.get_running_loop(), queries

    loops, own, queries = asyncio.run(main())
    assert loops == {own}
    assert queries >= count
    succeeded(database, count)


@on_every_async_driver
def test_what_the_workers_own_connections_claim_is_the_same_by_every_driver(
    database: Database, driver: str
) -> None:
    tick = datetime(2026, 3, 29, 1, 30, tzinfo=UTC)
    with database.session.begin() as session:
        worker = register(session, timedelta(minutes=5))
        made = enqueue(Async("\u20ac %s"), headers={"a": "\xe4"}, max_attempts=7)
        made.scheduled_at = tick
        session.add(made)
    wanted = Wanted(worker, ["async"], [("default", 0)], {"default": 1}, 1)
    unclaimed = update(Job).values(state=JobState.READY, attempt=0, worker_id=None)
    claims = []
    for engine in (database.engine(), async_engine(database, driver)):
        control = Control(engine, Availability())
        claims += control.statements(lambda session: transitions.claim(session, wanted))
        control.close()
        with database.session.begin() as session:
            session.execute(unclaimed)
    assert len(claims) == 2
    assert claims[0] == claims[1]
    assert claims[1].scheduled_at == tick
    assert claims[1].headers == {"a": "\xe4"}


@on_every_async_driver
def test_both_colours_embedded_in_async_code(database: Database, driver: str) -> None:
    async def main() -> dict[str, Any]:
        engine = async_engine(database, driver)
        app = JobApp(database.sessions(), async_sessionmaker(engine))
        seen: dict[str, Any] = {}
        done = {"sync": asyncio.Event(), "async": asyncio.Event()}
        loop = asyncio.get_running_loop()

        @app.handler(Sync)
        def handle(session: Session, payload: Sync) -> None:
            seen["sync"] = threading.current_thread()
            session.add(Effect(note="sync"))
            loop.call_soon_threadsafe(done["sync"].set)

        @app.handler(Async)
        async def handle_async(session: AsyncSession, payload: Async) -> None:
            seen["async"] = threading.current_thread()
            session.add(Effect(note="async"))
            done["async"].set()

        async with app.worker(**EMBEDDED):
            await asyncio.to_thread(add, database, Sync(), Async())
            for each in done.values():
                await asyncio.wait_for(each.wait(), WAIT)
        await engine.dispose()
        return seen

    seen = asyncio.run(main())
    assert seen["async"] is threading.main_thread()
    assert seen["sync"] is not threading.main_thread()
    succeeded(database, 2)
    assert notes(database) == ["async", "sync"]


def test_a_failing_async_handler_embedded(database: Database) -> None:
    async def main() -> None:
        engine = async_engine(database, DRIVERS[database.name][0])
        app = JobApp(async_sessionmaker(engine))
        ended = asyncio.Event()

        @app.handler(Async)
        async def handle(session: AsyncSession, payload: Async) -> None:
            session.add(Effect(note="never"))
            await session.flush()
            ended.set()
            raise Fail("on purpose")

        await asyncio.to_thread(add, database, Async())
        async with app.worker(**EMBEDDED):
            await asyncio.wait_for(ended.wait(), WAIT)
        await engine.dispose()

    asyncio.run(main())
    assert states(database) == [JobState.FAILED]
    assert notes(database) == []


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")
def test_an_eager_task_factory_does_not_begin_each_run_within_the_one_before(
    sqlite: Database,
) -> None:
    count = 300  # more than there is room for on the stack
    depths: list[int] = []

    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
        engine = async_engine(sqlite, DRIVERS[sqlite.name][0])
        app = JobApp(async_sessionmaker(engine))
        ended = asyncio.Event()

        @app.handler(Async)
        async def handle(session: AsyncSession, payload: Async) -> None:
            depths.append(len(traceback.extract_stack()))
            if len(depths) == count:
                ended.set()

        await asyncio.to_thread(add, sqlite, *[Async()] * count)
        async with app.worker(**EMBEDDED):
            await asyncio.wait_for(ended.wait(), WAIT)
        await engine.dispose()

    asyncio.run(main())
    succeeded(sqlite, count)
    assert max(depths) < 2 * min(depths)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")
@on_every_async_driver
def test_an_eager_task_factory_does_not_close_sessions_within_the_run(
    database: Database, driver: str
) -> None:
    count = 20

    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
        engine = async_engine(database, driver, poolclass=NullPool)
        app = JobApp(async_sessionmaker(engine))
        called: list[str] = []
        ended = asyncio.Event()

        @app.handler(Async)
        async def handle(session: AsyncSession, payload: Async) -> None:
            session.add(Effect(note="never"))
            await session.flush()
            called.append(payload.note)
            if len(called) == count:
                ended.set()
            raise Fail(
                "on purpose"
            )  # the session has a transaction to roll back, and a connection to close

        await asyncio.to_thread(add, database, *[Async()] * count)
        async with app.worker(**EMBEDDED):
            await asyncio.wait_for(ended.wait(), WAIT)
        await engine.dispose()

    asyncio.run(main())
    assert states(database) == [JobState.FAILED] * count
    assert notes(database) == []


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_a_task_of_a_handler_does_not_end_the_workers_own_loop(
    sqlite: Database, error: type[BaseException]
) -> None:
    """asyncio lets these two out of the loop, whichever task raises them."""
    app = JobApp(async_sessionmaker(async_engine(sqlite, DRIVERS[sqlite.name][0])))

    async def end() -> None:
        raise error

    @app.handler(Async)
    async def handle(session: AsyncSession, payload: Async) -> None:
        if payload.note == "ends":
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(end())

    with sqlite.session.begin() as session:
        session.add_all([enqueue(Async("ends"), max_attempts=1), enqueue(Async())])
    drain(app)
    assert states(sqlite) == [JobState.FAILED, JobState.SUCCEEDED]
    assert problems(sqlite) == [f"{error.__name__}: "]


def test_a_handler_that_cancels_its_own_task_fails(database: Database) -> None:
    """On a loop of the worker's own nobody else does; given back it would run again at once, for ever."""
    app = JobApp(async_sessionmaker(async_engine(database, DRIVERS[database.name][0])))

    @app.handler(Async)
    async def handle(session: AsyncSession, payload: Async) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await session.execute(select(1))

    with database.session.begin() as session:
        session.add(enqueue(Async(), max_attempts=1))
    drain(app)
    assert states(database) == [JobState.FAILED]
    assert problems(database) == ["asyncio.exceptions.CancelledError: "]


def test_sync_with_is_refused_with_async_handlers_under_a_running_loop(sqlite: Database) -> None:
    async def main() -> None:
        engine = async_engine(sqlite, DRIVERS[sqlite.name][0])
        app = JobApp(sqlite.sessions(), async_sessionmaker(engine))

        @app.handler(Async)
        async def handle(session: AsyncSession, payload: Async) -> None: ...

        worker = app.worker()
        with pytest.raises(ConfigurationError, match=r"write `async with jobs\.worker\(\):`"):
            worker.__enter__()
        assert not worker.is_running
        async with worker:  # the same one, as it says
            assert worker.is_running
        await engine.dispose()

    asyncio.run(main())


def test_sync_with_is_fine_with_sync_handlers_under_a_running_loop(sqlite: Database) -> None:
    async def main() -> None:
        app = JobApp(sqlite.sessions())
        done = threading.Event()
        app.handler(Sync)(lambda session, payload: done.set())
        with app.worker(**EMBEDDED):
            add(sqlite, Sync())
            assert done.wait(WAIT)

    asyncio.run(main())
    succeeded(sqlite, 1)


# ------------------------------------------------------------------------------ the process around it


def installed_signal_handlers() -> dict[int, Any]:
    return {each: signal.getsignal(each) for each in signal.valid_signals()}


def by_run(app: JobApp[Any, Any], during: Callable[[], None]) -> None:
    drain(app)


def by_with(app: JobApp[Any, Any], during: Callable[[], None]) -> None:
    with app.worker(**EMBEDDED):
        during()


def by_async_with(app: JobApp[Any, Any], during: Callable[[], None]) -> None:
    async def main() -> None:
        before = installed_signal_handlers()
        async with app.worker(**EMBEDDED):
            await asyncio.to_thread(during)
            assert installed_signal_handlers() == before  # asyncio.run has its own for SIGINT
        assert installed_signal_handlers() == before

    asyncio.run(main())


@pytest.mark.parametrize("way", [by_run, by_with, by_async_with])
def test_no_signal_handler_is_installed(
    sqlite: Database, way: Callable[[JobApp[Any, Any], Callable[[], None]], None]
) -> None:
    app = JobApp(sqlite.sessions())
    done = threading.Event()
    while_running: list[dict[int, Any]] = []

    @app.handler(Sync)
    def handle(session: Session, payload: Sync) -> None:
        while_running.append(installed_signal_handlers())
        done.set()

    before = installed_signal_handlers()
    add(sqlite, Sync())
    way(app, lambda: assert_true(done.wait(WAIT)))
    assert installed_signal_handlers() == before
    if way is not by_async_with:
        assert while_running == [before]


def assert_true(value: bool) -> None:
    assert value


FORKING = """
    import logging, os, sys, threading
    from dataclasses import dataclass
    from sqlalchemy import create_engine, select
    from sqlalchemy.orm import sessionmaker
    import sqlalchemy_jobs
    from sqlalchemy_jobs import Job, JobApp, enqueue, job

    logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout, level="WARNING")

    @job("k")
    @dataclass
    class P:
        n: int

    engine = create_engine(sys.argv[1])
    if engine.dialect.name == "sqlite":
        sqlalchemy_jobs.sqlite.configure(engine)
    sessions = sessionmaker(engine)
    jobs = JobApp(sessions)
    done = threading.Event()

    @jobs.handler(P)
    def handle(session, payload):
        if payload.n == 2:
            done.set()

    def say(*words):
        print(*words, flush=True)

    with jobs.worker() as worker:
        child = os.fork()
        if child == 0:
            say("child", worker.is_running)
            worker.__exit__(None, None, None)  # as the child's own shutdown would
            if engine.dialect.name != "sqlite":  # whose locks do not survive a fork
                engine.dispose(close=False)
                with jobs.worker() as own:  # after the fork: its own worker
                    say("own", own.is_running)
                say("ended", own.is_running, worker.is_running)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        say("parent", worker.is_running, status)
        with sessions.begin() as session:
            session.add_all([enqueue(P(1)), enqueue(P(2))])
        say("handled", done.wait(20))
    if os.fork() == 0:  # after the worker's end: nothing to tell
        os._exit(0)
    os.wait()
    engine.dispose()
"""


def test_a_forked_child_has_no_running_worker_and_says_so_once(
    database: Database, tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(FORKING))
    done = subprocess.run(
        # Python warns of any fork beside threads: that is what is tested.
        [sys.executable, "-W", "ignore::DeprecationWarning", program,
         database.url.render_as_string(hide_password=False)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": "."},
        text=True,
        capture_output=True,
        timeout=90,
    )  # fmt: skip
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].startswith("ERROR this process was forked from one with a running worker")
    assert lines[1:] == [
        "child False",
        *(["own True", "ended False False"] if database.name != "sqlite" else []),
        "parent True 0",
        "handled True",
    ]


def test_every_database_has_its_async_drivers() -> None:
    assert set(DRIVERS) == set(NAMES)
