"""Jobs that kill the process they run in: they end, they take no others along, and some are not run again."""

import collections
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.orm import Session

from sqlalchemy_jobs import Job, JobApp, Worker, cancel, enqueue, job, transitions
from sqlalchemy_jobs.claims import Wanted
from sqlalchemy_jobs.worker import clearing
from sqlalchemy_jobs.worker.leases import register
from tests.conformance.test_transitions import LEASE, Bench
from tests.databases import Database
from tests.look import Look
from tests.processes import workers
from tests.waiting import until


@job("suspect")
@dataclass(frozen=True)
class Suspect:
    n: int = 0


@job("step")
@dataclass(frozen=True)
class Step:
    n: int = 0


@job("once_only", on_crash="fail")
@dataclass(frozen=True)
class OnceOnly:
    n: int = 0


def test_a_job_that_kills_every_worker_it_runs_in_ends_as_failed(
    database: Database, tmp_path: Path, effects_app: Any
) -> None:
    look = Look(database.session)
    look.add(effects_app.Poison())
    with workers(database, tmp_path, "--lease", "1", count=3) as started:
        until(lambda: look.states() == {"failed": 1}, 60)
        until(lambda: sum(each.process.poll() is not None for each in started) == 2, 60)
    with look.sessions() as session:
        found = session.scalars(select(Job)).one()
        assert (found.failures, found.crashes, found.attempt) == (2, 2, 2)
        assert [each.outcome for each in found.attempts] == ["crashed", "crashed"]
        assert all("died while running" in (each.message or "") for each in found.attempts)
    assert look.count_effects() == (0, 0)


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


class Busy:
    """A worker that is never idle: a run ends only when the next one has begun, and there is always a next one."""

    def __init__(self, app: JobApp[Any, Any]) -> None:
        self.sessions = app.sessions
        self.began: dict[int, threading.Event] = collections.defaultdict(threading.Event)
        self.runs: list[int | str] = []
        self.running: set[int | str] = set()
        self.beside: list[set[int | str]] = []
        """What was running when a suspect began or ended."""
        self.enough = threading.Event()
        app.handler(Step, transaction="manual")(self.step)
        app.handler(Suspect, transaction="manual")(self.suspect)

    def step(self, session: Session, payload: Step) -> None:
        self.running.add(payload.n)
        self.runs.append(payload.n)
        if not self.enough.is_set():
            session.add(enqueue(Step(payload.n + 1)))
            session.commit()
        self.began[payload.n].set()
        # Not for ever: a worker that clears claims no next one.
        end = time.monotonic() + 2
        while not self.began[payload.n + 1].wait(0.05) and time.monotonic() < end:
            pass
        self.running.remove(payload.n)

    def suspect(self, session: Session, payload: Suspect) -> None:
        self.running.add(f"suspect {payload.n}")
        self.runs.append(f"suspect {payload.n}")
        self.beside.append(set(self.running))
        time.sleep(0.05)
        self.beside.append(set(self.running))
        self.running.remove(f"suspect {payload.n}")


def test_a_suspect_has_its_turn_in_a_worker_that_is_never_idle(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And between two of them the others have theirs."""
    monkeypatch.setattr(clearing, "LOOK", (0.0, 0.0))
    monkeypatch.setattr(clearing, "REST", 0)
    app: JobApp[Any, Any] = JobApp(database.sessions())
    busy = Busy(app)
    crash(app, 0, Step())
    with app.worker(concurrency=2):
        assert busy.began[3].wait(60)
        crash(app, 2, Suspect(1), Suspect(2))
        until(lambda: {"suspect 1", "suspect 2"} <= set(busy.runs))
        busy.enough.set()
    first, second = (n for n, each in enumerate(busy.runs) if isinstance(each, str))
    assert second > first + 1
    assert [len(each) for each in busy.beside] == [1] * 4


def test_a_suspect_does_not_keep_a_worker_waiting_for_a_long_run(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clearing, "LOOK", (0.0, 0.0))
    monkeypatch.setattr(clearing, "CLEAR_FOR", 0.1)
    app: JobApp[Any, Any] = JobApp(database.sessions())
    ended, began = threading.Event(), threading.Event()
    ran: list[int] = []

    @app.handler(Step, transaction="manual")
    def step(session: Session, payload: Step) -> None:
        ran.append(payload.n)
        if payload.n == 0:
            began.set()
            assert ended.wait(120)

    app.handler(Suspect)(lambda session, payload: ran.append(-1))
    crash(app, 0, Step())
    with app.worker(concurrency=2):
        assert began.wait(60)
        crash(app, 2, Suspect())
        for n in range(1, 4):  # the look follows a claim, so one of them is left behind it
            crash(app, 0, Step(n))
            until(lambda n=n: n in ran)  # type: ignore[misc]
        assert -1 not in ran
        ended.set()
        until(lambda: -1 in ran)


def test_a_worker_that_clears_goes_on_when_the_suspect_is_gone(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clearing, "LOOK", (0.0, 0.0))
    app: JobApp[Any, Any] = JobApp(sessions := database.sessions())
    ended, began = threading.Event(), threading.Event()
    ran: list[int] = []

    @app.handler(Step, transaction="manual")
    def step(session: Session, payload: Step) -> None:
        ran.append(payload.n)
        if payload.n == 0:
            began.set()
            assert ended.wait(120)

    app.handler(Suspect)(lambda session, payload: None)
    crash(app, 0, Step())
    worker = app.worker(concurrency=2, poll_interval=timedelta(seconds=0.05))
    with worker:
        assert began.wait(60)
        crash(app, 2, Suspect())
        until(lambda: clears(worker))
        crash(app, 0, Step(1))
        with sessions.begin() as session:
            assert cancel(session, session.scalars(select(Job.id).where(Job.crashes > 0)).one())
        until(lambda: 1 in ran)
        ended.set()


def clears(worker: Worker) -> bool:
    """Whether it claims nothing more for the sake of a suspect."""
    assert worker._parts is not None
    return worker._parts._claimer._clearing._since is not None


def test_a_worker_that_has_anything_to_do_does_not_claim_what_must_run_alone(
    database: Database,
) -> None:
    bench = Bench(database)
    app: JobApp[Any, Any] = JobApp(database.sessions())
    crash(app, 2, Suspect(1), Suspect(2))
    worker = bench.do(lambda session: register(session, LEASE))

    def claim(suspects: bool, total: int) -> int:
        wanted = Wanted(
            worker, ["suspect"], [("default", 0)], {"default": 5}, total, suspects=suspects
        )
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
