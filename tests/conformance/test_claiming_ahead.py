"""Quick jobs are claimed before a slot is free; what such a claim may and may not do to them."""

import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from sqlalchemy import func, select, text
from sqlalchemy.orm import Session, defer

from sqlalchemy_jobs import Attempt, Job, JobApp, JobState, Worker, enqueue_many, job, transitions
from sqlalchemy_jobs.claims import Claim, Wanted
from sqlalchemy_jobs.worker import claiming, lanes, reconciling, speed
from sqlalchemy_jobs.worker.controls import Controls
from sqlalchemy_jobs.worker.lanes import Lanes
from sqlalchemy_jobs.worker.maintenance import Maintenance
from sqlalchemy_jobs.worker.pools import Pools
from sqlalchemy_jobs.worker.settings import Settings
from tests.conformance.test_transitions import Bench
from tests.databases import Database
from tests.waiting import until


@job("quick", max_attempts=3)
@dataclass(frozen=True)
class Quick:
    n: int = 0


@job("once", on_crash="fail")
@dataclass(frozen=True)
class Once:
    n: int = 0


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Wanted, list[Claim]]]:
    """What workers asked for, and what they got."""
    made: list[tuple[Wanted, list[Claim]]] = []
    claim = transitions.claim

    def noted(session: Session, wanted: Wanted) -> list[Claim]:
        got = claim(session, wanted)
        made.append((wanted, got))
        return got

    monkeypatch.setattr(transitions, "claim", noted)
    return made


@pytest.fixture
def always_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have workers believe that every handler is quick."""
    monkeypatch.setattr(speed.Speed, "ahead", lambda self: {"*": 40})


def states(database: Database) -> Counter[str]:
    with database.session() as session:
        return Counter(session.scalars(select(Job.state)))


def add(database: Database, *payloads: Any, **options: Any) -> None:
    with database.session.begin() as session:
        enqueue_many(session, payloads, **options)


def test_quick_jobs_are_claimed_ahead_and_each_runs_once(
    database: Database, claims: list[tuple[Wanted, list[Claim]]]
) -> None:
    app: JobApp[Any, Any] = JobApp(database.sessions())
    ran: list[int] = []
    app.handler(Quick)(lambda session, payload: ran.append(payload.n))
    add(database, *(Quick(n) for n in range(3000)))
    assert Worker(app, drain=True, concurrency=2).run()
    assert sorted(ran) == list(range(3000))
    assert max(len(got) for wanted, got in claims if wanted.ahead) > 10
    with database.session() as session:
        rows = session.execute(select(Job.state, Job.attempt, Job.started_at <= Job.finished_at))
        assert set(rows.all()) == {("succeeded", 1, True)}


def test_a_slow_handler_claims_no_more_than_it_has_slots_for(
    database: Database, claims: list[tuple[Wanted, list[Claim]]]
) -> None:
    app: JobApp[Any, Any] = JobApp(database.sessions())
    pause = threading.Event()
    app.handler(Quick)(lambda session, payload: pause.wait(0.2) and None)
    add(database, *(Quick(n) for n in range(8)))
    assert Worker(app, drain=True, concurrency=2).run()
    assert max(len(got) for _, got in claims) == 2


class AheadBench(Bench):
    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self.database = database

    def claim_ahead(self, *, ahead: bool = True) -> list[Claim]:
        worker = self.worker()
        wanted = Wanted(worker, ["quick"], [("default", 0)], {"default": 9}, 9, ahead=ahead)
        return self.do(lambda session: transitions.claim(session, wanted))

    def die(self, claim: Claim) -> None:
        self.do(lambda session: transitions.rescue_orphans(session, claim.worker_id))

    def one(self) -> Job:
        with self.database.session() as session:
            return session.scalars(select(Job)).one()


def test_a_crash_counts_no_failure_of_a_job_that_may_not_have_begun(database: Database) -> None:
    """But it counts a crash: then the job is claimed for a free slot only, and its next crash does count."""
    bench = AheadBench(database)
    add(database, Quick())
    (claim,) = bench.claim_ahead()
    assert bench.one().started_at is None
    bench.die(claim)
    found = bench.one()
    assert (found.state, found.failures, found.crashes) == (JobState.READY, 0, 1)
    assert bench.claim_ahead() == []
    (claim,) = bench.claim_ahead(ahead=False)
    assert claim.attempt == 2 and bench.one().started_at is not None
    bench.die(claim)
    found = bench.one()
    assert (found.failures, found.crashes) == (1, 2)
    with database.session() as session:
        outcomes = session.scalars(select(Attempt.outcome).order_by(Attempt.attempt)).all()
    assert outcomes == ["crashed", "crashed"]
    bench.control.close()


def test_a_last_attempt_that_may_not_have_begun_is_made_again(database: Database) -> None:
    bench = AheadBench(database)
    add(database, Quick(), max_attempts=1)
    (claim,) = bench.claim_ahead()
    bench.die(claim)
    assert bench.one().state == JobState.READY
    (claim,) = bench.claim_ahead(ahead=False)
    bench.die(claim)
    assert bench.one().state == JobState.FAILED
    bench.control.close()


def test_all_that_a_dead_worker_had_claimed_ahead_comes_back_at_once(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be more than one transaction brings back."""
    monkeypatch.setattr(transitions, "RESCUE_BATCH", 2)
    bench = AheadBench(database)
    add(database, *(Quick(n) for n in range(7)))
    claims = bench.claim_ahead()
    seen = bench.heartbeat(claims[0].worker_id)
    bench.do(lambda session: transitions.rescue(session, claims[0].worker_id, seen))
    assert states(database) == {"running": 5, "ready": 2}
    lease: Any = SimpleNamespace(has_company=False, worker_id=None)
    Maintenance(bench.control, lease, timedelta(minutes=5), {}, Settings(), lambda: None).step()
    assert states(database) == {"ready": 7}
    bench.control.close()


def test_what_must_not_be_repeated_is_never_claimed_ahead(
    database: Database, claims: list[tuple[Wanted, list[Claim]]], always_ahead: None
) -> None:
    app: JobApp[Any, Any] = JobApp(database.sessions())
    for payload in (Quick, Once):
        app.handler(payload)(lambda session, payload: None)
    add(database, *(Quick(n) for n in range(100)), *(Once(n) for n in range(20)))
    assert Worker(app, drain=True, concurrency=2).run()
    assert states(database) == {"succeeded": 120}
    kinds = {wanted.ahead: {each.kind for each in got} for wanted, got in claims if got}
    assert kinds[True] == {"quick"} and "once" in kinds[False]


def test_jobs_that_are_never_claimed_ahead_are_not_left_behind_by_those_that_are(
    database: Database, always_ahead: None
) -> None:
    """Once one is seen they go on until there is none: by their turn, and not a few in a second."""
    app: JobApp[Any, Any] = JobApp(database.sessions())
    ran: list[str] = []
    began, pause = threading.Event(), threading.Event()

    @app.handler(Quick)
    def quick(session: Session, payload: Quick) -> None:
        ran.append("quick")
        pause.wait(0.001)
        if len(ran) > 50:
            began.set()

    app.handler(Once)(lambda session, payload: ran.append("once"))
    add(database, *(Quick(n) for n in range(4000)))
    with app.worker(concurrency=1):
        assert began.wait(60)
        add(database, *(Once(n) for n in range(60)), run_at=datetime(2025, 1, 1, tzinfo=UTC))
        until(lambda: ran.count("once") == 60)
    first, last = ran.index("once"), len(ran) - ran[::-1].index("once")
    assert last - first < 60 + 100


@dataclass
class Held:
    """A worker whose first run does not end before it is told to."""

    database: Database
    began: threading.Event
    go_on: threading.Event
    app: JobApp[Any, Any]


@pytest.fixture
def held(database: Database) -> Held:
    app: JobApp[Any, Any] = JobApp(database.sessions())
    found = Held(database, threading.Event(), threading.Event(), app)

    @app.handler(Quick)
    def handler(session: Session, payload: Quick) -> None:
        found.began.set()
        found.go_on.wait(60)

    return found


def test_what_waits_for_long_is_given_back_as_it_was(
    held: Held, always_ahead: None, claims: list[tuple[Wanted, list[Claim]]]
) -> None:
    """Another worker may be idle."""
    add(held.database, *(Quick(n) for n in range(20)), run_at=datetime(2025, 1, 1, tzinfo=UTC))

    def due() -> dict[Any, datetime]:
        with held.database.session() as session:
            return {row.id: row.run_at for row in session.execute(select(Job.id, Job.run_at))}

    before = due()
    with held.app.worker(concurrency=1):
        assert held.began.wait(60)
        until(lambda: any(wanted.ahead and len(got) == 19 for wanted, got in claims))
        until(lambda: states(held.database) == {"running": 1, "ready": 19})
        assert due() == before
        with held.database.session() as session:
            assert session.scalar(select(func.max(Job.failures))) == 0
            assert session.scalar(select(func.count()).select_from(Attempt)) == 0
        held.go_on.set()
        until(lambda: states(held.database) == {"succeeded": 20})


def test_what_waits_is_given_back_at_once_when_the_worker_is_told_to_stop(
    held: Held, always_ahead: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claiming, "LONGEST_AHEAD", 600.0)
    add(held.database, *(Quick(n) for n in range(20)))
    worker = Worker(held.app, concurrency=1)
    ended: list[bool] = []
    running = threading.Thread(target=lambda: ended.append(worker.run()))
    running.start()
    until(lambda: states(held.database) == {"running": 20})
    worker.stop()
    until(lambda: states(held.database) == {"running": 1, "ready": 19})
    held.go_on.set()
    running.join(60)
    assert ended == [True]
    assert states(held.database) == {"succeeded": 1, "ready": 19}


def test_runs_that_block_after_many_quick_ones_have_a_thread_each(row_locks: Database) -> None:
    """While they are quick one thread takes all; then ten wait for each other, and all the rest for them."""
    app: JobApp[Any, Any] = JobApp(row_locks.sessions())
    meeting = threading.Barrier(10)
    threads: Counter[int] = Counter()

    @app.handler(Quick)
    def handler(session: Session, payload: Quick) -> None:
        if payload.n:
            meeting.wait(20)
        else:
            threads[threading.get_ident()] += 1

    for _ in range(3):
        add(row_locks, *[Quick(0)] * 300, *[Quick(1)] * 10)
    assert Worker(app, drain=True, concurrency=10).run()
    assert states(row_locks) == {"succeeded": 930}
    assert max(threads.values()) > 180, "twice its share"


def test_a_queue_runs_no_more_at_once_than_it_may(
    row_locks: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed.Speed, "ahead", lambda self: {"mail": 30, "default": 30})
    app: JobApp[Any, Any] = JobApp(row_locks.sessions())
    running: Counter[str] = Counter()
    most: Counter[str] = Counter()
    lock = threading.Lock()
    pause: Callable[[float], bool] = threading.Event().wait

    @app.handler(Quick)
    def handler(session: Session, payload: Quick) -> None:
        queue = "mail" if payload.n else "default"
        with lock:
            running[queue] += 1
            most[queue] = max(most[queue], running[queue])
        pause(0.002)
        with lock:
            running[queue] -= 1

    add(row_locks, *[Quick(1)] * 150, queue="mail")
    add(row_locks, *[Quick(0)] * 150)
    assert Worker(app, drain=True, queues={"mail": 2, "default": 4}).run()
    assert states(row_locks) == {"succeeded": 300}
    assert most["mail"] <= 2 and most["default"] <= 4


def test_a_payload_that_cannot_be_read_fails_its_own_job_only(postgresql: Database) -> None:
    app: JobApp[Any, Any] = JobApp(postgresql.sessions())
    ran: list[int] = []
    app.handler(Quick)(lambda session, payload: ran.append(payload.n))
    add(postgresql, *(Quick(n) for n in range(3)), max_attempts=1)
    nested = '{"n": 1, "deep": ' + "[" * 2000 + "]" * 2000 + "}"
    try:
        msgspec.json.decode(nested)
        pytest.skip("this Python reads JSON that is nested as deep")
    except RecursionError:
        pass
    with postgresql.session.begin() as session:
        of_1 = select(Job.id).where(Job.payload["n"].as_integer() == 1)
        job_id = session.scalars(of_1).one()
        session.execute(
            text("UPDATE sajobs_job SET payload = CAST(:nested AS jsonb) WHERE id = :id"),
            {"nested": nested, "id": job_id},
        )
    assert Worker(app, drain=True, concurrency=3).run()
    assert sorted(ran) == [0, 2]
    with postgresql.session() as session:
        assert session.get_one(Job, job_id, options=[defer(Job.payload)]).state == JobState.FAILED
        assert "InvalidPayload" in str(session.scalars(select(Attempt.error_type)).one())


def test_what_was_claimed_by_a_claim_that_raised_is_given_back_at_once(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where each statement is a transaction of its own, what comes after the claim does not undo it."""
    claim, raised = transitions.claim, threading.Event()

    def once(session: Session, wanted: Wanted) -> list[Claim]:
        claims = claim(session, wanted)
        if claims and not raised.is_set():
            raised.set()
            raise RuntimeError("after the claim")
        return claims

    monkeypatch.setattr(transitions, "claim", once)
    monkeypatch.setattr(reconciling, "RECONCILE", 3600.0)
    monkeypatch.setattr(reconciling, "IDLE_RECONCILE", 3600.0)
    app: JobApp[Any, Any] = JobApp(database.sessions())
    app.handler(Quick)(lambda session, payload: None)
    with app.worker(concurrency=1):
        add(database, Quick())
        until(raised.is_set)
        until(lambda: states(database) == {"succeeded": 1})


def test_what_waits_does_not_begin_on_a_lease_that_cannot_be_renewed(
    row_locks: Database, always_ahead: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claiming, "LONGEST_AHEAD", 3600.0)
    app: JobApp[Any, Any] = JobApp(row_locks.sessions())
    began, go_on = threading.Event(), threading.Event()

    @app.handler(Quick)
    def handler(session: Session, payload: Quick) -> None:
        began.set()
        go_on.wait(60)

    add(row_locks, *(Quick(n) for n in range(20)))
    with app.worker(concurrency=1, lease=timedelta(seconds=10)):
        assert began.wait(60)
        until(lambda: states(row_locks) == {"running": 20})
        with row_locks.engine().begin() as connection:
            connection.execute(text("SELECT id FROM sajobs_worker FOR UPDATE"))
            until(lambda: states(row_locks) == {"running": 1, "ready": 19})
        go_on.set()
        until(lambda: states(row_locks) == {"succeeded": 20})


def test_a_slow_look_does_not_hide_a_new_lane_for_long() -> None:
    """Under full load; what came of one slow look was twenty times as long."""
    known = Lanes(Pools({}), Controls({}), lambda session: None)
    now = time.monotonic()
    first = Claim(uuid.uuid4(), 1, uuid.uuid4(), queue="default", run_at=datetime.now(UTC))
    known.mark([first], now - 3600)
    assert known._sweep_at <= time.monotonic() + lanes.LONGEST_SWEEP
