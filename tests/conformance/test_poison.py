"""Jobs that kill the process they run in: they end, they take no others along, and some are not run again."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.orm import Session

from sqlalchemy_jobs import Job, JobApp, Worker, enqueue, job, transitions
from sqlalchemy_jobs.claims import Wanted
from sqlalchemy_jobs.worker.leases import register
from tests.conformance.test_exactly_once import Outcome, effects_app
from tests.conformance.test_transitions import LEASE, Bench
from tests.databases import Database
from tests.processes import workers

__all__ = ["effects_app"]


@job("suspect")
@dataclass(frozen=True)
class Suspect:
    n: int = 0


@job("once_only", on_crash="fail")
@dataclass(frozen=True)
class OnceOnly:
    n: int = 0


def until(condition: Callable[[], bool], timeout: float = 60) -> None:
    """Wait for a condition that another process will make true."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.05)


def test_a_job_that_kills_every_worker_it_runs_in_ends_as_failed(
    database: Database, tmp_path: Path, effects_app: Any
) -> None:
    outcome = Outcome(database)
    with outcome.sessions.begin() as session:
        session.add(enqueue(effects_app.Poison()))
    with workers(database, tmp_path, "--lease", "1", count=3) as started:
        until(lambda: outcome.states() == {"failed": 1})
        until(lambda: sum(each.process.poll() is not None for each in started) == 2)
    with outcome.sessions() as session:
        found = session.scalars(select(Job)).one()
        assert (found.failures, found.crashes, found.attempt) == (2, 2, 2)
        assert [each.outcome for each in found.attempts] == ["crashed", "crashed"]
        assert all("died while running" in (each.message or "") for each in found.attempts)
    assert outcome.effects() == (0, 0)


def crash(app: JobApp[Any, Any], crashes: int, *payloads: Any) -> None:
    """Add jobs that have crashed their worker so often."""
    assert app.sessions is not None
    with app.sessions() as session, session.begin():
        made = [enqueue(payload) for payload in payloads]
        session.add_all(made)
        session.flush()
        ids = [each.id for each in made]
        changed = update(Job).where(Job.id.in_(ids)).values(crashes=crashes, failures=crashes)
        session.execute(changed)


def test_from_the_second_crash_on_a_job_runs_alone_in_its_worker(database: Database) -> None:
    sessions = database.sessions()
    app: JobApp[Any, Any] = JobApp(sessions)
    running: set[int] = set()
    beside: list[tuple[int, set[int]]] = []
    lock = threading.Lock()

    @app.handler(Suspect)
    def handler(session: Session, payload: Suspect) -> None:
        with lock:
            running.add(payload.n)
            beside.append((payload.n, set(running)))
        time.sleep(0.02)
        with lock:
            beside.append((payload.n, set(running)))
            running.remove(payload.n)

    crash(app, 2, *(Suspect(n) for n in range(4)))
    crash(app, 1, *(Suspect(n) for n in range(10, 20)))
    crash(app, 3, *(Suspect(n) for n in range(4, 6)))
    assert Worker(app, drain=True, concurrency=5).run()
    for n, others in beside:
        assert others == {n} if n < 6 else min(others) >= 10
    assert {n for n, _ in beside} == {*range(6), *range(10, 20)}
    with sessions() as session:
        assert set(session.scalars(select(Job.state))) == {"succeeded"}


def test_a_worker_that_has_anything_to_do_does_not_claim_what_must_run_alone(
    database: Database,
) -> None:
    bench = Bench(database)
    app: JobApp[Any, Any] = JobApp(database.sessions())
    crash(app, 2, Suspect(1), Suspect(2))
    worker = bench.do(lambda session: register(session, LEASE))

    def claim(suspects: bool, total: int) -> int:
        wanted = Wanted(worker, ["suspect"], [("default", 0)], {"default": 5}, total, suspects)
        return len(bench.do(lambda session: transitions.claim(session, wanted)))

    crash(app, 1, Suspect(3))
    assert (claim(False, 5), claim(False, 5), claim(True, 1), claim(True, 1)) == (1, 0, 1, 1)
    bench.control.close()


def test_a_job_that_must_not_be_repeated_fails_after_the_first_crash(database: Database) -> None:
    sessions = database.sessions()
    app: JobApp[Any, Any] = JobApp(sessions)
    ran: list[int] = []
    app.handler(OnceOnly)(lambda session, payload: ran.append(payload.n))
    crash(app, 1, OnceOnly(1))
    crash(app, 0, OnceOnly(2))
    assert Worker(app, drain=True).run()
    assert ran == [2]
    with sessions() as session:
        failed = session.scalars(select(Job).where(Job.state == "failed")).one()
        assert [each.outcome for each in failed.attempts] == ["failed"]
        assert 'on_crash is "fail"' in (failed.attempts[0].message or "")


def test_a_job_that_is_not_run_again_need_not_wait_until_its_worker_is_idle(
    database: Database,
) -> None:
    """It is only failed, so it keeps its unique key no longer than it must."""
    sessions = database.sessions()
    app: JobApp[Any, Any] = JobApp(sessions)
    began, go_on = threading.Event(), threading.Event()

    @app.handler(Suspect, transaction="manual")
    def handler(session: Session, payload: Suspect) -> None:
        began.set()
        assert go_on.wait(60)

    app.handler(OnceOnly)(lambda session, payload: None)
    crash(app, 0, Suspect())

    def states(kind: str) -> list[str]:
        with sessions() as session:
            return list(session.scalars(select(Job.state).where(Job.kind == kind)))

    with app.worker(concurrency=2):
        assert began.wait(20)
        crash(app, 2, OnceOnly())
        until(lambda: states("once_only") == ["failed"])
        assert states("suspect") == ["running"]
        go_on.set()


@pytest.mark.parametrize("durable", [True, False])
def test_a_claim_that_must_survive_the_server_is_flushed(
    postgresql: Database, durable: bool
) -> None:
    bench = Bench(postgresql)
    worker = bench.do(lambda session: register(session, LEASE))

    def setting(session: Session) -> str:
        wanted = Wanted(worker, ["note"], [("default", 0)], {"default": 1}, 1, durable=durable)
        assert transitions.claim(session, wanted)
        return str(session.scalar(text("SHOW synchronous_commit")))

    bench.add()
    assert bench.do(setting) == ("on" if durable else "off")
    bench.control.close()
