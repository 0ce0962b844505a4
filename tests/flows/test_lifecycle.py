"""From start to end of a worker: draining, queues, leases that pass while it lives, and shutting down."""

import logging
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, func, select, text
from sqlalchemy.orm import Session, sessionmaker

from sqlalchemy_jobs import (
    Job,
    JobApp,
    Worker,
    WorkerRow,
    current_run,
    enqueue,
    job,
    transitions,
)
from sqlalchemy_jobs.worker import idling, settling
from sqlalchemy_jobs.worker import worker as worker_module
from sqlalchemy_jobs.worker.claiming import Claimer
from sqlalchemy_jobs.worker.leases import register
from tests.databases import Database
from tests.domain import Effect
from tests.look import Look
from tests.processes import workers
from tests.proxy import Proxy
from tests.waiting import until


@job("live", backoff=lambda failures: timedelta(0))
@dataclass(frozen=True)
class Live:
    note: str = ""


class Workers(Look):
    def workers(self) -> dict[Any, tuple[str, str]]:
        """Name and state by id, the oldest first."""
        with self.sessions() as session:
            rows = session.scalars(select(WorkerRow).order_by(WorkerRow.id))
            return {row.id: (row.name, row.state) for row in rows}

    def heartbeat(self) -> Any:
        with self.sessions() as session:
            return session.scalar(select(func.max(WorkerRow.heartbeat_at)))


@pytest.fixture
def look(request: pytest.FixtureRequest) -> Workers:
    """At whichever database the test uses."""
    names = ("database", "row_locks", "sqlite", "postgresql")
    (name,) = (name for name in names if name in request.fixturenames)
    database: Database = request.getfixturevalue(name)
    return Workers(database.session)


# --- draining -------------------------------------------------------------------------------------


def test_drain_waits_for_a_job_of_a_killed_worker_and_finishes_it(
    database: Database, look: Workers, tmp_path: Path, effects_app: Any
) -> None:
    look.add(effects_app.Wait())
    with workers(database, tmp_path, "--lease", "2") as (victim,):
        victim.wait_for("SIGN waiting")
        victim.signal(signal.SIGKILL)
        victim.wait()
    assert look.states() == {"running": 1}
    (tmp_path / "go").touch()
    with workers(database, tmp_path, "--lease", "2", "--drain") as (drainer,):
        assert drainer.wait() == 0
        assert "is dead, its lease has passed; jobs brought back: 1" in drainer.log
    assert (look.states(), look.effects(), look.attempts()) == (
        {"succeeded": 1},
        ["waited"],
        ["crashed"],
    )


def test_drain_waits_for_a_job_that_another_live_worker_runs(
    database: Database, look: Workers, tmp_path: Path, effects_app: Any
) -> None:
    """What it does may be more work for the one that drains."""
    look.add(effects_app.Wait())
    with workers(database, tmp_path) as (other,):
        other.wait_for("SIGN waiting")
        with workers(database, tmp_path, "--drain") as (drainer,):
            drainer.wait_for("serves all queues")
            look.add(effects_app.Write("for whoever is free"))
            until(lambda: look.states() == {"running": 1, "succeeded": 1})
            assert drainer.process.poll() is None
            (tmp_path / "go").touch()
            assert drainer.wait() == 0
    assert look.states() == {"succeeded": 2}


def test_drain_does_not_leave_a_job_that_comes_back_between_its_two_looks(
    database: Database, look: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was running when the worker looked for due jobs, and is ready when it looks for running ones."""
    app: JobApp[Any, Any] = JobApp(database.sessions())
    app.handler(Live)(lambda session, payload: session.add(Effect(note="done")))
    job_id = look.add(Live())
    with look.sessions.begin() as session:
        other = register(session, timedelta(minutes=5))
        row = session.get_one(Job, job_id)
        row.state, row.attempt, row.worker_id = "running", 1, other
    brought_back: list[None] = []
    original = transitions.any_unfinished

    def any_unfinished(session: Session, *args: Any) -> bool:
        if not brought_back:
            # As maintenance, or the other worker's own retry, does it.
            brought_back.append(None)
            row = session.get_one(Job, job_id)
            row.state, row.worker_id, row.failures = "ready", None, 1
            session.flush()
        return original(session, *args)

    monkeypatch.setattr(transitions, "any_unfinished", any_unfinished)
    assert Worker(app, drain=True).run()
    assert brought_back
    assert (look.states(), look.effects()) == ({"succeeded": 1}, ["done"])


@pytest.mark.parametrize("differs", ["queue", "priority"])
def test_drain_does_not_leave_jobs_that_handlers_enqueued_elsewhere(
    database: Database, look: Workers, differs: str
) -> None:
    """Each run enqueues the next job, with a queue or priority that the worker has not seen yet."""
    app: JobApp[Any, Any] = JobApp(database.sessions())

    @app.handler(Live)
    def handler(session: Session, payload: Live) -> None:
        n = int(payload.note)
        session.add(Effect(note=payload.note))
        if n < 9:
            there: Any = {"queue": f"q{n}"} if differs == "queue" else {"priority": n + 1}
            session.add(enqueue(Live(str(n + 1)), **there))

    look.add(Live("0"))
    assert Worker(app, drain=True).run()
    assert (look.states(), look.effects()) == ({"succeeded": 10}, [str(n) for n in range(10)])


def test_drain_does_not_wait_for_what_is_not_its_own(database: Database, look: Workers) -> None:
    """Jobs of other queues and kinds, scheduled ones, and those that other queues run."""

    @job("of_others")
    @dataclass(frozen=True)
    class OfOthers:
        n: int = 0

    app: JobApp[Any, Any] = JobApp(database.sessions())
    app.handler(Live)(lambda session, payload: None)
    look.add(Live(), queue="served")
    look.add(Live(), queue="served", delay=timedelta(hours=1))
    look.add(Live(), queue="elsewhere")
    look.add(OfOthers(), queue="served")
    running = [look.add(OfOthers(), queue="served"), look.add(Live(), queue="elsewhere")]
    with look.sessions.begin() as session:
        other = register(session, timedelta(minutes=5))
        for job_id in running:
            row = session.get_one(Job, job_id)
            row.state, row.attempt, row.worker_id = "running", 1, other
    assert Worker(app, drain=True, queues=["served"]).run()  # or it waits for ever
    assert look.states() == {"succeeded": 1, "ready": 3, "running": 2}


# --- queues ---------------------------------------------------------------------------------------


def test_only_the_named_queues_are_served_each_with_its_own_limit(
    database: Database, look: Workers
) -> None:
    app: JobApp[Any, Any] = JobApp(database.sessions())
    lock, active, most = threading.Lock(), Counter[str](), Counter[str]()
    meeting = threading.Barrier(4)  # two of each queue, or it breaks

    @app.handler(Live)
    def handler(session: Session, payload: Live) -> None:
        queue = current_run().queue
        with lock:
            active[queue] += 1
            most[queue] = max(most[queue], active[queue])
        try:
            meeting.wait(20)
        finally:
            with lock:
                active[queue] -= 1

    for _ in range(6):
        for queue in ("mail", "default", "other"):
            look.add(Live(), queue=queue)
    assert Worker(app, drain=True, queues={"mail": 2, "default": 2}).run()
    assert most == {"mail": 2, "default": 2}
    assert not meeting.broken
    assert look.states(queue="other") == {"ready": 6}
    assert look.states(queue="mail") == look.states(queue="default") == {"succeeded": 6}
    assert look.attempts() == []


def test_a_limited_queue_does_not_keep_an_unlimited_one_from_its_slots(
    database: Database, look: Workers
) -> None:
    """`--queue mail=2 --queue default`: mail waits in a long line, the rest is for the others."""
    app: JobApp[Any, Any] = JobApp(database.sessions())
    lock, active, most = threading.Lock(), Counter[str](), Counter[str]()
    mail_may_end = threading.Event()

    @app.handler(Live)
    def handler(session: Session, payload: Live) -> None:
        queue = current_run().queue
        with lock:
            active[queue] += 1
            most[queue] = max(most[queue], active[queue])
        if queue == "mail":
            assert mail_may_end.wait(20)
        with lock:
            active[queue] -= 1

    for _ in range(20):
        look.add(Live(), queue="mail", priority=-5)
    for _ in range(20):
        look.add(Live(), queue="default")
    options: Any = {"queues": {"mail": 2, "default": None}, "concurrency": 5}
    with app.worker(**options):
        until(lambda: look.states(queue="default") == {"succeeded": 20})
        assert look.states(queue="mail") == {"running": 2, "ready": 18}
        mail_may_end.set()
        until(lambda: look.states(queue="mail") == {"succeeded": 20})
    assert most["mail"] == 2
    assert most["default"] <= 5


def test_a_slot_of_a_full_queue_is_used_as_soon_as_it_is_free(
    sqlite: Database, look: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while another queue has room and nothing due, so that the worker has gone to sleep."""
    poll = timedelta(seconds=60)
    asleep = threading.Event()
    original = Claimer.step

    def step(claimer: Claimer) -> float | None:
        wait = original(claimer)
        if wait == poll.total_seconds():
            asleep.set()
        return wait

    monkeypatch.setattr(Claimer, "step", step)
    monkeypatch.setattr(idling, "IDLE_WAITS", (0.01,))
    app: JobApp[Any, Any] = JobApp(sqlite.sessions())
    second = threading.Event()

    @app.handler(Live)
    def handler(session: Session, payload: Live) -> None:
        if payload.note == "first":
            assert asleep.wait(20)
        else:
            second.set()

    look.add(Live("first"), queue="mail")
    look.add(Live("second"), queue="mail")
    look.add(Live("later"), queue="default", delay=timedelta(hours=1))
    with app.worker(queues={"mail": 1, "default": 1}, poll_interval=poll):
        assert asleep.wait(20)
        assert second.wait(30), "the slot was free, and the next job waited for the poll interval"
        until(lambda: look.states(queue="mail") == {"succeeded": 2})


# --- a lease that passes while the worker lives -------------------------------------------------------


@pytest.fixture
def proxy(postgresql: Database) -> Iterator[Proxy]:
    proxy = Proxy(postgresql.url)
    yield proxy
    proxy.stop()


@dataclass
class Heeding:
    """An app whose first handler goes on until it is asked to stop."""

    app: JobApp[Any, Any]
    began: threading.Event
    asked: threading.Event
    give_up: threading.Event
    done: list[str]


@contextmanager
def heeding(url: Any) -> Iterator[Heeding]:
    engine = create_engine(url, pool_pre_ping=True)
    made = Heeding(
        JobApp(sessionmaker(engine)),
        threading.Event(),
        threading.Event(),
        threading.Event(),
        [],
    )

    @made.app.handler(Live)
    def handler(session: Session, payload: Live) -> None:
        if payload.note == "long" and current_run().attempt == 1:
            made.began.set()
            while not made.give_up.wait(0.01):
                if current_run().should_stop:
                    made.asked.set()
                    raise RuntimeError("asked to stop")
        made.done.append(payload.note)
        session.add(Effect(note=payload.note))

    try:
        yield made
    finally:
        made.give_up.set()
        engine.dispose()


def test_a_worker_that_cannot_renew_stops_its_runs_and_works_again_when_it_can(
    postgresql: Database, look: Workers, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with heeding(proxy.url) as this:
        worker = this.app.worker(lease=timedelta(seconds=3))
        with worker:
            look.add(Live("long"))
            assert this.began.wait(20)
            (worker_id,) = look.workers()
            proxy.stop()
            look.add(Live("while away"))
            assert this.asked.wait(20)
            assert "the lease could not be renewed in time" in caplog.text
            until_passed(look)
            assert look.states() == {"running": 1, "ready": 1}
            proxy.start()
            until(lambda: look.states() == {"succeeded": 2})
            assert list(look.workers()) == [worker_id], "nobody had declared it dead"
    assert sorted(look.effects()) == ["long", "while away"]
    assert look.attempts() == ["failed"]
    assert look.workers() == {}


@contextmanager
def renewals_hang(look: Workers) -> Iterator[None]:
    """Hold the worker's row so that its renewal waits, while claims do not (they take a key-share lock)."""
    with look.sessions.begin() as session:
        session.execute(select(WorkerRow.id).with_for_update(key_share=True)).one()
        yield


def test_a_worker_whose_renewal_hangs_claims_nothing_once_its_lease_is_uncertain(
    postgresql: Database, look: Workers
) -> None:
    """As in a network that swallows packets: no error tells of it."""
    with heeding(postgresql.url) as this, this.app.worker(lease=timedelta(seconds=1)):
        look.add(Live("before"))
        until(lambda: look.states() == {"succeeded": 1})
        with renewals_hang(look):
            until_passed(look)
            look.add(Live("while it hangs"))
            assert not _comes_true(lambda: look.states() == {"succeeded": 2}, 0.5)
            assert look.states() == {"succeeded": 1, "ready": 1}
        until(lambda: look.states() == {"succeeded": 2})


def test_a_worker_whose_renewal_hangs_stops_its_runs_meanwhile(
    postgresql: Database, look: Workers
) -> None:
    """By a second loop; that it does so before the lease ends is shown with a clock in test_worker_parts."""
    with heeding(postgresql.url) as this, this.app.worker(lease=timedelta(seconds=1)):
        look.add(Live("long"))
        assert this.began.wait(20)
        with renewals_hang(look):
            asked = this.asked.wait(20)  # and not only when the renewal comes back
            this.give_up.set()
        assert asked, "the run was not told to stop"


def until_passed(look: Workers) -> None:
    """Wait until the lease of the only worker has passed."""
    from sqlalchemy_jobs.columns import server_now

    def passed() -> bool:
        with look.sessions() as session:
            query = select(func.count()).where(WorkerRow.lease_until < server_now())
            return session.scalar(query) == 1

    until(passed)


def _comes_true(condition: Callable[[], bool], within: float) -> bool:
    end = time.monotonic() + within
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_a_worker_that_was_frozen_writes_nothing_afterwards_and_goes_on_under_a_new_id(
    row_locks: Database, look: Workers, tmp_path: Path, effects_app: Any
) -> None:
    """SIGSTOP for longer than its lease; another worker did its job meanwhile."""
    look.add(effects_app.Wait())
    lease = ("--lease", "3")  # long enough that no worker is late by itself on a busy machine
    with workers(row_locks, tmp_path, *lease) as (frozen,):
        frozen.wait_for("SIGN waiting")
        (old_id,) = look.workers()
        with workers(row_locks, tmp_path, *lease) as (rescuer,):
            rescuer.wait_for("serves all queues")
            freeze_between_renewals(frozen, look, old_id)
            rescuer.wait_for("is dead, its lease has passed; jobs brought back: 1")
            rescuer.wait_for("SIGN waiting")
            (tmp_path / "go").touch()
            until(lambda: look.states() == {"succeeded": 1})
            assert look.effects() == ["waited"]
            rescuer.signal(signal.SIGTERM)
            assert rescuer.wait() == 0
        frozen.signal(signal.SIGCONT)
        frozen.wait_for("another worker declared this one dead: the runs in flight are given up")
        frozen.wait_for("belongs to another run")
        look.add(effects_app.Write("afterwards"))
        until(lambda: look.states() == {"succeeded": 2})
        (name, state), (new_name, new_state) = look.workers().values()
        assert (name, state, new_state) == (new_name, "dead", "alive")
        frozen.signal(signal.SIGTERM)
        assert frozen.wait() == 0
        assert "Traceback" not in frozen.log
    assert look.effects() == ["waited", "afterwards"]
    assert look.attempts() == ["crashed"]


def freeze_between_renewals(worker: Any, look: Workers, worker_id: Any) -> None:
    """Right after a renewal, so that it holds no lock while it is frozen."""

    def heartbeat() -> Any:
        with look.sessions() as session:
            return session.get_one(WorkerRow, worker_id).heartbeat_at

    def is_locked() -> bool:
        with look.sessions.begin() as session:
            row = select(WorkerRow.id).where(WorkerRow.id == worker_id)
            return session.scalar(row.with_for_update(skip_locked=True)) is None

    def freeze() -> None:
        seen = heartbeat()
        until(lambda: heartbeat() != seen)
        worker.signal(signal.SIGSTOP)

    freeze()
    while is_locked():  # this test was so slow that the next renewal had begun
        worker.signal(signal.SIGCONT)
        freeze()


# --- an end that the database does not take ---------------------------------------------------------


def test_a_run_whose_end_cannot_be_written_down_does_not_hold_up_the_others(
    mysql: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MySQL cuts the connection at a statement beyond max_allowed_packet, each time that it is tried."""
    monkeypatch.setattr(settling, "PATIENCE", 3600.0)
    look = Workers(mysql.session)
    with look.sessions() as session:
        most = session.scalar(text("SELECT @@max_allowed_packet"))
    app: JobApp[Any, Any] = JobApp(mysql.sessions())

    @app.handler(Live)
    def handler(session: Session, payload: Live) -> str:
        return "x" * most if payload.note == "large" else payload.note

    look.add(Live("large"), queue="large")
    for n in range(8):
        look.add(Live(str(n)))
    with app.worker(shutdown_timeout=timedelta(0)):
        until(lambda: look.states(queue="default") == {"succeeded": 8})
        assert look.states(queue="large") == {"running": 1}
        monkeypatch.setattr(settling, "PATIENCE", 0.0)
        until(lambda: look.states(queue="large") == {"failed": 1})


# --- shutting down ----------------------------------------------------------------------------------


@dataclass
class Late:
    """A worker whose handler ended only after the worker was closed."""

    look: Workers
    worker: Worker
    before: tuple[Any, ...]
    """What the database said when the worker was closed."""

    def now(self) -> tuple[Any, ...]:
        return self.look.states(), self.look.attempts(), self.look.effects()


@pytest.fixture
def late(database: Database, look: Workers, monkeypatch: pytest.MonkeyPatch) -> Iterator[Late]:
    # Whoever waited for one of these would find that the handler has given up by then.
    monkeypatch.setattr(worker_module, "EMBEDDED_SHUTDOWN", timedelta(hours=1))
    monkeypatch.setattr(worker_module, "RELEASE_WAIT", 3600.0)
    app: JobApp[Any, Any] = JobApp(database.sessions())
    began, go_on = threading.Event(), threading.Event()
    threads: list[threading.Thread] = []

    @app.handler(Live)
    def handler(session: Session, payload: Live) -> None:
        threads.append(threading.current_thread())
        began.set()
        assert go_on.wait(60)
        session.add(Effect(note="too late"))

    look.add(Live())
    worker = app.worker(shutdown_timeout=timedelta(0))
    with worker:
        assert began.wait(20)
    made = Late(look, worker, ())
    made.before = made.now()
    go_on.set()
    threads[0].join(20)
    assert not threads[0].is_alive()
    yield made
    worker._parts._control.close()  # type: ignore[union-attr]


def test_a_shutdown_timeout_of_zero_releases_at_once(late: Late) -> None:
    assert late.before == ({"ready": 1}, ["released"], [])


def test_a_run_that_ends_after_its_worker_writes_nothing(late: Late) -> None:
    assert late.now() == late.before


def test_a_run_that_ends_after_its_worker_leaves_no_connection_open(late: Late) -> None:
    """Nobody would close it."""
    engine: Any = late.worker._parts._control._engine  # type: ignore[union-attr]
    assert engine.pool.checkedin() == 0
