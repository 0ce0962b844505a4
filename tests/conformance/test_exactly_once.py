"""However workers die and connections break, what a job does in the database is done exactly once."""

import gc
import random
import signal
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import NullPool

from sqlalchemy_jobs import Job, JobApp, WorkerRow, enqueue_many, transitions
from sqlalchemy_jobs.worker.availability import Availability
from sqlalchemy_jobs.worker.control import Control
from tests.databases import Database
from tests.look import Look
from tests.processes import workers
from tests.proxy import Proxy, When
from tests.waiting import until


def test_two_processes_do_three_thousand_jobs_once_each(
    database: Database, tmp_path: Path, effects_app: Any
) -> None:
    look = Look(database.session)
    with workers(database, tmp_path, "--concurrency", "3", count=2) as both:  # many small claims
        for each in both:
            each.wait_for("serves")
        with look.sessions.begin() as session:  # both begin to claim at once
            enqueue_many(session, [effects_app.Write(str(n)) for n in range(1500)])
            enqueue_many(session, [effects_app.WriteAsync(str(n)) for n in range(1500)])
        look.wait_for(succeeded=3000)
        for each in both:
            each.signal(signal.SIGTERM)
        assert [each.wait() for each in both] == [0, 0]
        assert all("WARNING" not in each.log and "ERROR" not in each.log for each in both), (
            both[0].log + both[1].log
        )
    assert look.count_effects() == (3000, 3000)
    assert look.attempts() == []


def test_false_deaths_double_nothing_and_lose_nothing(
    database: Database, tmp_path: Path, effects_app: Any
) -> None:
    """Live workers are declared dead all the time: their jobs run elsewhere, their own runs write nothing."""
    count = 800
    look = Look(database.session)
    with look.sessions.begin() as session:
        enqueue_many(session, [effects_app.Write(str(n)) for n in range(count // 2)])
        enqueue_many(session, [effects_app.WriteAsync(str(n)) for n in range(count // 2)])
    control = Control(database.engine(), Availability())
    rescued = deaths = 0
    with workers(database, tmp_path, "--lease", "1", "--concurrency", "4", count=2) as both:
        for each in both:
            each.wait_for("serves")
        while deaths < 12 and look.states().keys() != {"succeeded"}:
            brought_back = declare_one_dead(control)
            deaths, rescued = deaths + (brought_back > 0), rescued + brought_back
        look.wait_for(succeeded=count)
        # At its next renewal, which the others need not wait for.
        until(lambda: any("declared this one dead" in each.log for each in both))
        for each in both:
            each.signal(signal.SIGTERM)
        assert [each.wait() for each in both] == [0, 0]
    control.close()
    assert rescued > 0
    assert look.count_effects() == (count, count)


def declare_one_dead(control: Control) -> int:
    """Declare some live worker with running jobs dead; return how many jobs that brought back."""

    def rescue(session: Session) -> int:
        alive = session.execute(
            select(WorkerRow.id, WorkerRow.heartbeat_at).where(
                WorkerRow.state == "alive", WorkerRow.id.in_(select(Job.worker_id))
            )
        ).all()
        if not alive:
            return 0
        worker_id, seen = random.choice(alive)
        return len(transitions.rescue(session, worker_id, seen) or ())

    return control.transaction(rescue)


def test_a_kill_between_flush_and_commit_leaves_nothing_and_the_job_runs_again(
    database: Database, tmp_path: Path, effects_app: Any
) -> None:
    look = Look(database.session)
    look.add(effects_app.WriteAndHang())
    with workers(database, tmp_path, "--lease", "2") as (victim,):
        victim.wait_for("SIGN flushed")
        victim.signal(signal.SIGKILL)
        assert victim.wait() == -signal.SIGKILL
    assert look.count_effects() == (0, 0)
    assert look.states() == {"running": 1}
    with workers(database, tmp_path, "--lease", "2") as (rescuer,):
        rescuer.wait_for("is dead, its lease has passed; jobs brought back: 1")
        look.wait_for(succeeded=1)
    assert look.count_effects() == (1, 1)
    assert look.attempts() == ["crashed"]


def test_sigterm_lets_runs_finish_and_claims_nothing_more(
    database: Database, tmp_path: Path, effects_app: Any
) -> None:
    look = Look(database.session)
    look.add(effects_app.Wait())
    with workers(database, tmp_path, "--concurrency", "2") as (worker,):
        worker.wait_for("SIGN waiting")
        worker.signal(signal.SIGTERM)
        worker.wait_for("stopping")
        look.add(effects_app.Write())
        (tmp_path / "go").touch()
        assert worker.wait() == 0
    assert look.states() == {"succeeded": 1, "ready": 1}
    assert look.count_effects() == (1, 1)
    with look.sessions() as session:
        assert session.scalars(select(WorkerRow)).all() == []


@pytest.mark.parametrize("how", ["a second signal", "the shutdown timeout"])
def test_runs_that_do_not_end_are_released_without_a_failure(
    database: Database, tmp_path: Path, effects_app: Any, how: str
) -> None:
    look = Look(database.session)
    look.add(effects_app.Wait())
    timeout = "60" if how == "a second signal" else "0.2"
    with workers(database, tmp_path, "--shutdown-timeout", timeout) as (worker,):
        worker.wait_for("SIGN waiting")
        worker.signal(signal.SIGINT)
        if how == "a second signal":
            worker.wait_for("stopping")
            worker.signal(signal.SIGINT)
        assert worker.wait() == 1
        worker.wait_for("did not end in time: released")
    with look.sessions() as session:
        job = session.scalars(select(Job)).one()
        assert (job.state, job.failures, job.attempt) == ("ready", 0, 1)
    assert look.attempts() == ["released"]
    assert look.count_effects() == (0, 0)


# --- broken connections -------------------------------------------------------------------------------


@pytest.fixture
def proxy(row_locks: Database) -> Iterator[Proxy]:
    proxy = Proxy(row_locks.url)
    yield proxy
    proxy.stop()


def sync_app(proxy: Proxy, effects_app: Any) -> tuple[JobApp[Any, Any], Callable[[], None]]:
    from sqlalchemy import create_engine

    engine = create_engine(proxy.url)
    app = JobApp(sessionmaker(engine))

    @app.handler(effects_app.Write)
    def write(session: Session, payload: Any) -> None:
        session.add(effects_app.effect(payload.note))

    return app, engine.dispose


def async_app(proxy: Proxy, effects_app: Any) -> tuple[JobApp[Any, Any], Callable[[], None]]:
    driver = {"mysql+pymysql": "mysql+aiomysql"}.get(proxy.url.drivername, proxy.url.drivername)
    app = JobApp(
        async_sessionmaker(
            create_async_engine(proxy.url.set(drivername=driver), poolclass=NullPool)
        )
    )

    @app.handler(effects_app.Write)
    async def write(session: AsyncSession, payload: Any) -> None:
        session.add(effects_app.effect(payload.note))

    return app, lambda: None


@pytest.mark.parametrize("make_app", [sync_app, async_app])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # aiomysql's sockets
def test_a_connection_cut_during_commit_leads_to_one_effect(
    row_locks: Database, proxy: Proxy, effects_app: Any, when: When, make_app: Any
) -> None:
    """Not two, when the commit had been carried out, and not none, when it had not."""
    look = Look(row_locks.session)
    app, dispose = make_app(proxy, effects_app)
    look.add(effects_app.Write())
    proxy.cut_commit("INSERT INTO effect", when)
    with app.worker():
        assert proxy.cuts.acquire(timeout=20)
        look.wait_for(succeeded=1)
    dispose()
    del app
    gc.collect()  # not in a later test, which would be blamed for those sockets
    assert look.count_effects() == (1, 1)
    assert look.attempts() == (["released"] if when == "before" else [])


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_claim_whose_reply_is_lost_is_given_back(
    row_locks: Database, proxy: Proxy, effects_app: Any, when: When
) -> None:
    """The job is running by its row, and nobody runs it: the worker itself finds and releases it."""
    look = Look(row_locks.session)
    app, dispose = sync_app(proxy, effects_app)
    look.add(effects_app.Write())
    if row_locks.name == "mysql":
        proxy.cut_commit("UPDATE sajobs_job SET state", when)
    else:  # it commits by itself
        proxy.cut_commit("WITH wanted", when, by="WITH wanted")
    with app.worker(lease=timedelta(minutes=5)):
        assert proxy.cuts.acquire(timeout=20)
        look.wait_for(succeeded=1)
    dispose()
    assert look.count_effects() == (1, 1)
    with look.sessions() as session:
        assert session.scalars(select(Job.attempt)).one() == (1 if when == "before" else 2)
        assert session.scalars(select(Job.failures)).one() == 0


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_failure_is_recorded_once_though_the_connection_breaks(
    row_locks: Database, proxy: Proxy, effects_app: Any, when: When
) -> None:
    look = Look(row_locks.session)
    from sqlalchemy import create_engine

    engine = create_engine(proxy.url)
    app = JobApp(sessionmaker(engine))

    @app.handler(effects_app.Write)
    def fails(session: Session, payload: Any) -> None:
        raise ValueError("boom")

    look.add(effects_app.Write(), max_attempts=1)
    proxy.cut_commit("INSERT INTO sajobs_attempt", when)
    with app.worker():
        assert proxy.cuts.acquire(timeout=20)
        look.wait_for(failed=1)
    engine.dispose()
    assert look.attempts() == ["failed"]


def test_a_database_that_is_away_is_waited_for_and_told_of_once(
    row_locks: Database, proxy: Proxy, effects_app: Any, tmp_path: Path
) -> None:
    """At the start, and later with runs in flight."""
    look = Look(row_locks.session)
    proxy.stop()
    with workers(row_locks, tmp_path, url=proxy.url) as (worker,):
        worker.wait_for("the database is away")
        proxy.start()
        worker.wait_for("serves all queues")
        look.add(effects_app.Write("before"))
        look.wait_for(succeeded=1)
        proxy.stop()
        worker.wait_for("the database is away", count=2)
        look.add(effects_app.Write("while away"))
        proxy.start()
        worker.wait_for("the database is back", count=2)
        look.wait_for(succeeded=2)
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
        assert worker.log.count("the database is away") == 2, worker.log
        assert "Traceback" not in worker.log
    assert look.count_effects() == (2, 2)
