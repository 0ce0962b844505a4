"""Queues: pools of them in one worker, and what holds for them at run time."""

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, event, func, select, update
from sqlalchemy.orm import Session, sessionmaker

from sqlalchemy_jobs import (
    Job,
    JobApp,
    Kind,
    Queue,
    Worker,
    current_run,
    dialects,
    enqueue,
    enqueue_many,
    job,
    pause_kind,
    pause_queue,
    resume_kind,
    resume_queue,
    set_queue,
    transitions,
)
from sqlalchemy_jobs.claims import Claim, Wanted
from sqlalchemy_jobs.errors import ControlError
from sqlalchemy_jobs.queues import QueueOptions
from sqlalchemy_jobs.worker import claiming, controls, speed
from sqlalchemy_jobs.worker.claiming import Claimer
from sqlalchemy_jobs.worker.controls import Controls
from sqlalchemy_jobs.worker.maintenance import find_unserved
from tests.conformance.test_transitions import Bench
from tests.databases import Database
from tests.waiting import until


@job("errand")
@dataclass(frozen=True)
class Errand:
    n: int = 0


@job("other")
@dataclass(frozen=True)
class Other:
    n: int = 0


@job("renamed", aliases=["once_so"])
@dataclass(frozen=True)
class Renamed:
    n: int = 0


class App(JobApp[Any, Any]):
    """Notes the queue of each job that runs."""

    def __init__(self, database: Database) -> None:
        super().__init__(database.sessions())
        self.ran: list[str] = []
        self.began_at: list[float] = []
        self.at_once: dict[str, int] = {}
        self._running: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.handler(Errand)(self._run)

    def _run(self, session: Session, payload: Errand) -> None:
        queue = current_run().queue
        with self._lock:
            self.ran.append(queue)
            self.began_at.append(time.monotonic())
            self._running[queue] += 1
            for each in (queue, "*"):
                running = self._running.total() if each == "*" else self._running[each]
                self.at_once[each] = max(self.at_once.get(each, 0), running)
        session.scalar(select(Job.id).limit(1))
        with self._lock:
            self._running[queue] -= 1


def add(database: Database, count: int, *queues: str, **options: Any) -> None:
    with database.sessions().begin() as session:
        for queue in queues:
            enqueue_many(session, [Errand(n) for n in range(count)], queue=queue, **options)


@pytest.fixture
def bench(database: Database) -> Iterator[Bench]:
    bench = Bench(database)
    yield bench
    bench.control.close()


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have workers claim nothing ahead."""
    monkeypatch.setattr(speed.Speed, "ahead", lambda self: {})


# --- pools ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [3, 5, 20])
def test_queues_that_share_a_room_get_no_more_than_it(
    database: Database, bench: Bench, total: int
) -> None:
    add(database, 4, "a", "b", "c")
    worker = bench.worker()

    def claim(session: Session) -> list[Claim]:
        lanes = [(queue, 0) for queue in "abc"]
        room = {"b": 3, "c": 9, "a": 3}
        pools = {"b": "a,b", "a": "a,b"}
        return transitions.claim(session, Wanted(worker, ["errand"], lanes, room, total, pools))

    assert (
        Counter(claimed.queue for claimed in bench.do(claim))
        == {
            3: {"b": 3},
            5: {"b": 3, "c": 2},
            20: {"b": 3, "c": 4},
        }[total]
    )


def test_a_worker_serves_what_its_pools_name_and_no_more_at_once(database: Database) -> None:
    add(database, 12, "mail.eu", "mail.us", "default", "bulk", "mail")
    app = App(database)
    assert Worker(app, queues={"mail.*": 2, "*,!bulk": 3, "slow": 1}, drain=True).run()
    assert Counter(app.ran) == {"mail.eu": 12, "mail.us": 12, "default": 12, "mail": 12}
    assert max(app.at_once["mail.eu"], app.at_once["mail.us"]) <= 2
    assert max(app.at_once["default"], app.at_once["mail"]) <= 3


def test_of_a_strict_pool_the_lower_queue_waits_until_the_better_one_is_empty(
    database: Database,
) -> None:
    add(database, 30, "default", "critical", "bulk")
    app = App(database)
    assert Worker(app, queues={"critical>default>bulk": 1}, drain=True).run()
    assert app.ran == ["critical"] * 30 + ["default"] * 30 + ["bulk"] * 30


def test_of_a_strict_pool_a_worker_that_was_idle_begins_with_the_better_queue(
    database: Database,
) -> None:
    """Although its last jobs were those of the other one."""
    app = App(database)
    with app.worker(queues={"critical>default": 1}) as worker:
        for round_ in (1, 2):
            add(database, 1, "default")
            until(lambda count=3 * round_ - 2: len(app.ran) == count)
            until(lambda: worker._parts is not None and _sleeps(worker._parts._claimer))
            with database.sessions().begin() as session:
                for queue in ("default", "critical"):
                    session.add(enqueue(Errand(), queue=queue))
            until(lambda count=3 * round_: len(app.ran) == count)
    assert app.ran == ["default", "critical", "default"] * 2


def _sleeps(claimer: Claimer) -> bool:
    """Whether it has found nothing for so long that it takes what wakes it for the same as the last time."""
    return claimer._idling._asleep_until > time.monotonic() + 0.2


@pytest.mark.usefixtures("one_by_one")
def test_with_a_backlog_in_both_the_share_of_the_runs_is_that_of_the_weights(
    database: Database,
) -> None:
    """By the claim: many that are claimed ahead at once count as one."""
    add(database, 70, "often", "seldom")
    app = App(database)
    assert Worker(app, queues={"often@4,seldom": 1}, drain=True).run()
    assert len(app.ran) == 140
    share = app.ran[:60].count("often") / 60
    assert 0.55 < share < 0.99


def test_a_queue_that_a_worker_serves_by_a_pattern_is_not_reported(
    database: Database, bench: Bench
) -> None:
    add(database, 1, "mail.eu", "bulk", "default")
    app = App(database)
    with app.worker(queues=["mail.*,!mail.us", "none"]) as worker:
        while worker._parts is None or worker._parts._lease.worker_id is None:
            threading.Event().wait(0.01)
        assert bench.do(find_unserved) == {("bulk", None), ("default", None)}


# --- pausing --------------------------------------------------------------------------------------

IN_FORCE = 2.0
"""Seconds within which every worker heeds a commit, by the promise."""


@dataclass(frozen=True)
class Pausing:
    """One way to hold up the errands of the queue "mail"."""

    pause: Callable[[Session], bool]
    resume: Callable[[Session], bool]


WAYS = {
    "queue": Pausing(lambda s: pause_queue(s, "mail"), lambda s: resume_queue(s, "mail")),
    "kind": Pausing(lambda s: pause_kind(s, "errand"), lambda s: resume_kind(s, "errand")),
}


@pytest.fixture(params=WAYS)
def pausing(request: pytest.FixtureRequest) -> Pausing:
    return WAYS[request.param]


def test_pausing_and_resuming_tell_whether_they_changed_anything(
    database: Database, pausing: Pausing
) -> None:
    sessions = database.sessions()
    with sessions.begin() as session:
        assert not pausing.resume(session)
        assert pausing.pause(session)
        assert not pausing.pause(session)
    with sessions() as session:
        assert not pausing.pause(session)
        assert pausing.resume(session)
        assert pausing.pause(session)
        assert pausing.resume(session)
        session.rollback()
        assert not pausing.pause(session)


def test_the_row_that_a_session_knows_shows_the_change(database: Database) -> None:
    with database.sessions().begin() as session:
        session.add_all([Queue(name="mail"), Kind(name="errand")])
        session.flush()
        queue, kind = session.get_one(Queue, "mail"), session.get_one(Kind, "errand")
        assert pause_queue(session, "mail") and pause_kind(session, "errand")
        assert queue.paused and kind.paused


def test_two_that_pause_at_once_both_succeed(row_locks: Database) -> None:
    sessions = row_locks.sessions()
    with sessions.begin() as first, ThreadPoolExecutor() as pool:
        assert pause_queue(first, "mail")

        def second() -> bool:
            with sessions.begin() as session:
                return pause_queue(session, "mail")

        changed = pool.submit(second)
        with pytest.raises(TimeoutError):
            changed.result(0.2)
        first.commit()
        assert not changed.result(20)


def test_of_what_is_paused_nothing_begins_and_the_rest_goes_on(
    database: Database, pausing: Pausing
) -> None:
    """A worker that drains does not wait for it; and aliases are paused with their kind."""
    add(database, 3, "mail")
    app = App(database)
    app.handler(Other)(lambda session, payload: app.ran.append("other"))
    with database.sessions().begin() as session:
        pausing.pause(session)
        session.add(enqueue(Other(), queue="default"))
    assert Worker(app, drain=True).run()
    assert app.ran == ["other"]
    with database.sessions().begin() as session:
        assert pausing.resume(session)
    assert Worker(app, drain=True).run()
    assert app.ran == ["other"] + ["mail"] * 3


def test_a_kind_is_paused_under_its_aliases_too(database: Database) -> None:
    with database.sessions().begin() as session:
        session.add(enqueue(Renamed()))
        session.flush()
        session.execute(update(Job).values(kind="once_so"))
        pause_kind(session, "renamed")
    app: JobApp[Any, Any] = JobApp(database.sessions())
    app.handler(Renamed)(lambda session, payload: None)
    assert Worker(app, drain=True).run()
    with database.sessions()() as session:
        assert session.scalars(select(Job.state)).all() == ["ready"]


def test_a_pause_is_in_force_in_every_worker_within_two_seconds_and_a_resume_wakes_them(
    database: Database, pausing: Pausing
) -> None:
    """What is running goes on; what waits in a worker goes back."""
    sessions = database.sessions()
    apps = [App(database), App(database)]
    add(database, 6000, "mail")
    with ExitStack() as stack:
        workers = [
            stack.enter_context(app.worker(concurrency=2, poll_interval=timedelta(seconds=0.5)))
            for app in apps
        ]
        until(lambda: all(len(app.ran) > 20 for app in apps) or _left(sessions) == 0)
        with sessions.begin() as session:
            pausing.pause(session)
        paused_at = time.monotonic()
        until(lambda: all(map(_holds_still, workers)))
        assert max(max(app.began_at) for app in apps) - paused_at < IN_FORCE
        ran = [len(app.ran) for app in apps]
        assert _left(sessions) > 0, "the workers were too quick for this test"
        with sessions() as session:
            assert set(session.scalars(select(Job.state))) <= {"ready", "succeeded"}
        threading.Event().wait(0.3)
        assert [len(app.ran) for app in apps] == ran
        with sessions.begin() as session:
            assert pausing.resume(session)
        until(lambda: sum(len(app.ran) for app in apps) > sum(ran))


def _holds_still(worker: Worker) -> bool:
    """Whether it knows of the pause, and runs nothing any more."""
    parts = worker._parts
    assert parts is not None
    return parts._claimer._controls.is_paused("mail", "errand") and parts.slots.is_idle()


def _left(sessions: sessionmaker[Session]) -> int:
    with sessions() as session:
        return session.scalar(select(func.count()).where(Job.state == "ready")) or 0


def test_what_waits_in_a_worker_that_cannot_read_what_holds_does_not_begin(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was claimed ahead, and then the database does not answer; when it does again, the jobs go on."""
    monkeypatch.setattr(speed.Speed, "ahead", lambda self: {"*": 40})
    monkeypatch.setattr(claiming, "LONGEST_AHEAD", 60.0)  # they are not given back
    monkeypatch.setattr(controls, "IN_FORCE", 0.5)
    monkeypatch.setattr(controls, "BELIEVED", 0.2)
    read, answers = Controls.read, threading.Event()
    answers.set()
    asked_at: list[float] = []
    began_at: list[float] = []

    def slow_read(self: Controls, session: Session) -> bool:
        if not answers.is_set():
            asked_at.append(time.monotonic())
            assert answers.wait(60)
        return read(self, session)

    monkeypatch.setattr(Controls, "read", slow_read)
    app: JobApp[Any, Any] = JobApp(database.sessions())

    @app.handler(Errand)
    def errand(session: Session, payload: Errand) -> None:
        began_at.append(time.monotonic())
        threading.Event().wait(0.05)

    add(database, 60, "mail")
    with app.worker(concurrency=1) as worker:
        assert worker._parts is not None
        slots = worker._parts.slots
        until(lambda: slots.waiting > 20)
        answers.clear()
        until(lambda: bool(asked_at and slots.waiting and not slots.running()))
        assert max(began_at) - asked_at[0] < controls.IN_FORCE
        answers.set()
        until(lambda: len(began_at) >= 60)


def test_a_backlog_of_a_paused_kind_is_not_read_by_each_claim(
    database: Database, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim begins behind it, also where there is nothing else, and finds what comes later."""
    last = bench.job(bench.add(*map(Errand, range(300)))[-1])
    app = App(database)
    ran = threading.Semaphore(0)
    app.handler(Other)(lambda session, payload: ran.release())
    with database.sessions().begin() as session:
        pause_kind(session, "errand")
        session.add(enqueue(Other()))
    wanted: list[Wanted] = []
    claim = transitions.claim
    monkeypatch.setattr(transitions, "claim", lambda s, w: wanted.append(w) or claim(s, w))
    with app.worker(poll_interval=timedelta(seconds=0.05)):
        for _ in range(3):
            assert ran.acquire(timeout=20)
            with database.sessions().begin() as session:
                session.add(enqueue(Other()))
        assert ran.acquire(timeout=20)
    assert not app.ran
    assert all(each.marks["default", 0] >= (last.run_at, last.id) for each in wanted)


def test_an_idle_worker_does_not_read_what_holds_for_queues(database: Database) -> None:
    """But for its first claim: nothing could begin anyway."""
    sent: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if connection.engine.url.database == database.url.database:
            sent.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        with App(database).worker(poll_interval=timedelta(seconds=0.02), listen=False) as worker:
            until(lambda: worker._parts is not None and worker._parts._claimer._idling._polls > 60)
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    assert sum("FROM sajobs_job" in each for each in sent) > 60
    assert sum("FROM sajobs_queue" in each for each in sent) == 1


@pytest.mark.parametrize("name", ["", "mail.*", "!mail", "x" * 101, None])
def test_only_what_can_be_a_name_is_paused(database: Database, name: Any) -> None:
    with database.sessions().begin() as session:
        for refuse in (pause_queue, pause_kind, set_queue):
            with pytest.raises(ControlError, match="wanted 1 to"):
                refuse(session, name)
        assert session.scalar(select(func.count()).select_from(Queue)) == 0


# --- the order within a queue ---------------------------------------------------------------------


def add_aged(database: Database, queue: str, *jobs: tuple[int, float]) -> None:
    """Add a job for each priority and number of seconds for which it has waited; ``n`` is its place."""
    now = datetime.now(UTC)
    with database.sessions().begin() as session:
        for n, (priority, waited) in enumerate(jobs):
            run_at = now - timedelta(seconds=waited)
            session.add(enqueue(Errand(n), queue=queue, priority=priority, run_at=run_at))


JOBS = [(5, 100.0), (0, 10.0), (5, 40.0), (-3, 1.0), (0, 70.0)]
ORDERS: list[tuple[QueueOptions, list[int]]] = [
    ({}, [3, 4, 1, 0, 2]),
    ({"strategy": "priority"}, [3, 4, 1, 0, 2]),
    ({"strategy": "fifo"}, [0, 4, 2, 1, 3]),
    ({"ageing": timedelta(0)}, [0, 4, 2, 1, 3]),
    ({"ageing": timedelta(seconds=10)}, [4, 0, 3, 1, 2]),
    ({"ageing": timedelta(days=1)}, [3, 4, 1, 0, 2]),
]


@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize(("options", "order"), ORDERS)
def test_a_queue_is_claimed_in_the_order_that_was_set(
    database: Database, options: QueueOptions, order: list[int]
) -> None:
    """That of another queue stays by priority."""
    add_aged(database, "mail", *JOBS)
    add_aged(database, "default", *JOBS)
    ran: dict[str, list[int]] = {"mail": [], "default": []}
    app: JobApp[Any, Any] = JobApp(database.sessions())
    app.handler(Errand)(lambda session, payload: ran[current_run().queue].append(payload.n))
    with database.sessions().begin() as session:
        set_queue(session, "mail", **options)
    assert Worker(app, queues={"mail,default": 1}, drain=True).run()
    assert ran == {"mail": order, "default": [3, 4, 1, 0, 2]}


@pytest.mark.parametrize("seed", range(5))
def test_as_many_come_from_each_priority_as_belong_to_the_next(
    database: Database, bench: Bench, seed: int
) -> None:
    """Whatever the room; and claimed are just those."""
    chance = random.Random(seed)
    aged = [(chance.choice([-2, 0, 7]), chance.uniform(1, 100)) for _ in range(40)]
    add_aged(database, "mail", *aged)
    ageing, room = chance.choice([0.0, 1.5, 8.0]), chance.randint(1, 45)
    worker = bench.worker()

    def claim(session: Session) -> list[Claim]:
        dialect, kinds = dialects.of(session), ["errand"]
        lanes = dialect.lanes(session, ["mail"])
        shares = dialect.shares(
            session, "mail", [priority for _, priority in lanes], ageing, kinds, room, {}
        )
        wanted = Wanted(worker, kinds, lanes, {"mail": room}, room, shares=shares)
        return transitions.claim(session, wanted)

    first = sorted(range(40), key=lambda n: ageing * aged[n][0] - aged[n][1])[:room]
    assert {json.loads(claimed.payload)["n"] for claimed in bench.do(claim)} == set(first)


@pytest.mark.usefixtures("one_by_one")
def test_a_row_that_was_broken_by_hand_is_told_of_once_and_goes_by_priority(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    add_aged(database, "mail", *JOBS)
    with database.sessions().begin() as session:
        session.add(Queue(name="mail", strategy="lifo"))
        session.add(Queue(name="other", ageing=-1.0))
    app: JobApp[Any, Any] = JobApp(database.sessions())
    ran: list[int] = []
    app.handler(Errand)(lambda session, payload: ran.append(payload.n))
    assert Worker(app, concurrency=1, drain=True).run()
    assert ran == [3, 4, 1, 0, 2]
    told = [each.getMessage() for each in caplog.records if "the row of queue" in each.message]
    assert [each.partition(";")[0] for each in sorted(told)] == [
        "the row of queue \"mail\" has strategy='lifo': wanted priority or fifo",
        'the row of queue "other" has ageing=-1.0: wanted seconds, zero or more',
    ]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"concurrency": 0}, "concurrency=0: wanted a whole number from 1"),
        ({"concurrency": True}, "concurrency=True: wanted a whole number from 1"),
        ({"strategy": "lifo"}, "strategy='lifo': wanted priority or fifo"),
        ({"ageing": 60}, r"ageing=60 \(int\) is not a timedelta: say timedelta\(seconds=60\)"),
        ({"ageing": timedelta(seconds=-1)}, "is negative"),
        ({"strategy": "fifo", "ageing": timedelta(seconds=1)}, 'ageing is for strategy="priority"'),
        (
            {"paused": True, "speed": 3},
            "paused, speed: not among concurrency, rate, strategy, ageing",
        ),
    ],
)
def test_what_makes_no_sense_for_a_queue_is_refused(
    sqlite: Database, options: Any, told: str
) -> None:
    with sqlite.sessions().begin() as session:
        with pytest.raises(ControlError, match=told):
            set_queue(session, "mail", **options)
        assert session.scalar(select(func.count()).select_from(Queue)) == 0
