"""Limits hold over all workers, whatever dies, and a key that is blocked does not hold up the others."""

import math
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from psycopg.pq import TransactionStatus
from sqlalchemy import create_engine, func, select, text, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, sessionmaker

from sqlalchemy_jobs import (
    Job,
    JobApp,
    JobState,
    Limit,
    Queue,
    Retry,
    Worker,
    cancel,
    current_run,
    dialects,
    enqueue_many,
    job,
    limited,
    pause_kind,
    pause_queue,
    resume_kind,
    resume_queue,
    retention,
    set_queue,
    transitions,
)
from sqlalchemy_jobs.claims import Claim, LimitedKey, Wanted
from sqlalchemy_jobs.columns import server_now
from sqlalchemy_jobs.dialects.limits import NEWEST
from sqlalchemy_jobs.errors import ControlError
from sqlalchemy_jobs.limits import Numbers, Rate
from sqlalchemy_jobs.models import LimitRow
from sqlalchemy_jobs.runs import Run
from sqlalchemy_jobs.tables import limits
from sqlalchemy_jobs.worker import limiting, reconciling, speed
from sqlalchemy_jobs.worker.controls import Controls
from sqlalchemy_jobs.worker.pools import Pools
from sqlalchemy_jobs.worker.slots import Slots
from tests.conformance.test_transitions import BOOM, Bench
from tests.databases import Database
from tests.proxy import Proxy, When
from tests.waiting import until


@job("three", limit=Limit(concurrency=3))
@dataclass(frozen=True)
class Three:
    n: int = 0


@job("charge", limit=Limit(concurrency=1, key="account"), max_attempts=3)
@dataclass(frozen=True)
class Charge:
    account: int | None = 1
    n: int = 0


@job("call", limit=Limit(rate="3/hour", name="api"))
@dataclass(frozen=True)
class Call:
    n: int = 0


@job("ask", limit=Limit(rate="3/hour", name="api"))
@dataclass(frozen=True)
class Ask:
    n: int = 0


@job("step", limit=Limit(key="order", ordered=True))
@dataclass(frozen=True)
class Step:
    order: str = "a"
    n: int = 0


@job("plain")
@dataclass(frozen=True)
class Plain:
    n: int = 0


SYNC = "S\0\0\0\4"
"""What ends a pipeline, and commits it."""
THREE = Numbers(concurrency=3)
ONE = Numbers(concurrency=1)
ORDERED = Numbers(concurrency=1, ordered=True)
RATE = Numbers(rate=Rate(3, timedelta(hours=1)))


class LimitBench(Bench):
    """Claims by hand: every call is a transaction of its own."""

    def claim_of(
        self, worker: uuid.UUID, *keys: str, numbers: Numbers = THREE, most: int = 10
    ) -> list[Claim]:
        """As a worker does: in one round trip, where there is a way."""
        claims = None
        if numbers.only_count:
            claims = self.control.statements(
                lambda session: self.claim_in(
                    session, worker, keys, numbers, most, limited.claim_at_once
                )
            )
        if claims is None:
            claims = self.do(lambda session: self.claim_in(session, worker, keys, numbers, most))
        assert claims is not None
        return claims

    @staticmethod
    def claim_in(
        session: Session,
        worker: uuid.UUID,
        keys: Sequence[str],
        numbers: Numbers,
        most: int = 10,
        claim: Callable[..., dict[str, list[Claim]] | None] = limited.claim,
    ) -> list[Claim] | None:
        kinds = ["three", "charge", "call", "step"]
        found = claim(
            session,
            Wanted(worker, kinds, (), {"default": most}, most),
            [LimitedKey(key, "default", [0], numbers, most) for key in keys],
        )
        if found is None:
            return None
        return [claim for of_key in found.values() for claim in of_key]

    def add_limited(self, *payloads: Any, **options: Any) -> list[uuid.UUID]:
        """Add jobs, and the rows of their keys."""
        ids = self.add(*payloads, **options)

        def add_keys(session: Session) -> None:
            keys = set(session.scalars(select(Job.limit_key))) - {None}
            limited.add_keys(session, [key for key in keys if key])

        self.do(add_keys)
        return ids

    def age(self, seconds: float) -> None:
        """Let so many seconds pass, as far as rates know."""

        def shift(session: Session) -> None:
            for row in session.scalars(select(LimitRow)):
                row.used = [[at - int(seconds * 1e6), count] for at, count in row.used or ()]
                if row.next_at is not None:
                    row.next_at -= timedelta(seconds=seconds)

        self.do(shift)


@pytest.fixture
def bench(database: Database) -> Iterator[LimitBench]:
    bench = LimitBench(database)
    yield bench
    bench.control.close()


def add(database: Database, *payloads: Any, **options: Any) -> None:
    with database.sessions().begin() as session:
        enqueue_many(session, payloads, **options)


class Counting:
    """A handler that knows how many of it ran at once, by key."""

    def __init__(
        self,
        app: JobApp[Any, Any],
        payload: type[Any],
        key: Callable[[Any], object] = lambda payload: None,
    ) -> None:
        self.most: Counter[Any] = Counter()
        self.ran: list[Any] = []
        self._at_once: Counter[Any] = Counter()
        self._lock = threading.Lock()
        self._key = key
        app.handler(payload)(self._handle)

    def _handle(self, session: Session, payload: Any) -> None:
        key = self._key(payload)
        with self._lock:
            self.ran.append(payload)
            self._at_once[key] += 1
            self.most[key] = max(self.most[key], self._at_once[key])
        time.sleep(0.002)
        with self._lock:
            self._at_once[key] -= 1


# ------------------------------------------------------------------------------ never more at once


def test_no_more_jobs_run_at_once_than_their_limits_say(database: Database) -> None:
    app: JobApp[Any, Any] = JobApp(database.sessions())
    three = Counting(app, Three)
    charge = Counting(app, Charge, lambda payload: payload.account)
    plain = Counting(app, Plain)
    add(database, *(Three(n) for n in range(30)), *(Plain(n) for n in range(30)))
    add(database, *(Charge(n % 7 or None, n) for n in range(35)))
    assert Worker(app, drain=True, concurrency=8).run()
    assert 1 < three.most[None] <= 3
    del charge.most[None]  # without a key there is no limit
    assert charge.most == dict.fromkeys(range(1, 7), 1)
    assert [len(each.ran) for each in (three, charge, plain)] == [30, 35, 30]


def hammered(
    database: Database, claim: Callable[[LimitBench, uuid.UUID], list[Claim]]
) -> list[uuid.UUID]:
    """Have four workers claim and complete until there is nothing for long; return what was completed."""
    done: list[uuid.UUID] = []
    errors: list[BaseException] = []

    def hammer() -> None:
        own = LimitBench(database)
        try:
            worker = own.worker()
            nothing = 0
            while nothing < 20:
                claims = claim(own, worker)
                done.extend(own.do(lambda s, c=claims: transitions.complete_many(s, c)))  # type: ignore[misc]
                nothing = 0 if claims else nothing + 1
        except BaseException as error:
            errors.append(error)
        finally:
            own.control.close()

    threads = [threading.Thread(target=hammer) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    return done


@pytest.mark.parametrize("at_once", [True, False])
def test_claimers_that_hammer_two_keys_never_exceed_the_limit(
    database: Database, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one round trip, where there is a way, and in several."""
    if not at_once:
        monkeypatch.setattr(limited, "claim_at_once", lambda *_: None)
    bench = LimitBench(database)
    bench.add_limited(*(Three(n) for n in range(120)), *(Charge(1, n) for n in range(60)))
    running = (
        select(func.count())
        .where(Job.state == JobState.RUNNING, Job.limit_key.is_not(None))
        .group_by(Job.kind)
    )
    seen: list[int] = []

    def claim(own: LimitBench, worker: uuid.UUID) -> list[Claim]:
        claims = own.claim_of(worker, "three", "charge/1", most=4)
        seen.extend(own.do(lambda session: session.scalars(running).all()))
        return claims

    done = hammered(database, claim)
    assert max(seen) == 3
    assert len(done) == len(set(done)) == 180
    bench.control.close()


@pytest.mark.parametrize("numbers", [THREE, ORDERED, RATE], ids=["three", "ordered", "rate"])
def test_a_key_that_another_worker_claims_is_passed_over(
    row_locks: Database, numbers: Numbers
) -> None:
    bench = LimitBench(row_locks)
    bench.add_limited(*(Three(n) for n in range(8)))
    with _open_claim(bench, row_locks, numbers):
        assert bench.claim_of(bench.worker(), "three", numbers=numbers) == []
    bench.control.close()


def test_without_the_lock_of_its_row_a_key_would_be_exceeded(
    row_locks: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the tests above would see it."""
    unlocked = select(limits.c.limit_key, limits.c.used, server_now().label("now"))
    monkeypatch.setattr(limited, "_LOCK_KEYS", unlocked)
    bench = LimitBench(row_locks)
    bench.add_limited(*(Three(n) for n in range(8)))
    with _open_claim(bench, row_locks, THREE):
        assert len(bench.claim_of(bench.worker(), "three")) == 3
    assert count(row_locks, Job.state == "running") == 6
    bench.control.close()


@contextmanager
def _open_claim(bench: LimitBench, database: Database, numbers: Numbers) -> Iterator[Session]:
    """A claim whose transaction has not ended."""
    worker = bench.worker()
    with database.sessions()() as session:
        session.connection(execution_options={"isolation_level": "READ COMMITTED"})
        assert bench.claim_in(session, worker, ["three"], numbers)
        yield session
        session.commit()


@pytest.mark.parametrize("level", ["AUTOCOMMIT", "READ COMMITTED"])
def test_a_claim_in_one_round_trip_is_one_transaction_or_part_of_one(
    postgresql: Database, level: Any
) -> None:
    bench = LimitBench(postgresql)
    bench.add_limited(*(Three(n) for n in range(8)))
    worker = bench.worker()
    engine = postgresql.engine(isolation_level=level)
    with Session(engine) as session:
        claims = bench.claim_in(session, worker, ["three"], THREE, 10, limited.claim_at_once)
        assert claims is not None and len(claims) == 3
        driver: Any = session.connection().connection.driver_connection
        if level == "AUTOCOMMIT":
            assert driver.info.transaction_status == TransactionStatus.IDLE
        else:
            assert driver.info.transaction_status == TransactionStatus.INTRANS
            assert count(postgresql, Job.state == "running") == 0
            assert bench.claim_of(worker, "three") == []
            session.commit()
    assert count(postgresql, Job.state == "running") == 3
    bench.control.close()


@pytest.mark.parametrize("level", ["AUTOCOMMIT", "READ COMMITTED"])
def test_a_claim_that_fails_in_its_one_round_trip_commits_nothing(
    postgresql: Database, level: Any
) -> None:
    """What it has locked is free again."""
    bench = LimitBench(postgresql)
    bench.add_limited(*(Three(n) for n in range(8)))
    worker = bench.worker()
    engine = postgresql.engine(isolation_level=level)
    with Session(postgresql.engine()) as other, Session(engine) as session:
        other.execute(text("LOCK TABLE sajobs_job IN EXCLUSIVE MODE"))
        session.execute(text("SET lock_timeout = '10ms'"))
        with pytest.raises(OperationalError, match="lock timeout"):
            bench.claim_in(session, worker, ["three"], THREE, 10, limited.claim_at_once)
        session.rollback()
        assert count(postgresql, Job.state == "running") == 0
        other.rollback()
        assert len(bench.claim_of(worker, "three")) == 3
    engine.dispose()
    bench.control.close()


def test_a_connection_that_cannot_leave_the_round_trip_counts_as_broken(
    postgresql: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server has said that it ends the session, and the connection is not closed yet."""

    def cannot(pipeline: Any, error: BaseException | None) -> None:
        raise psycopg.OperationalError("cannot exit pipeline mode while busy")

    bench = LimitBench(postgresql)
    bench.add_limited(Three())
    worker = bench.worker()
    with monkeypatch.context() as patch:
        patch.setattr(psycopg.Pipeline, "_exit", cannot)
        with pytest.raises(OperationalError, match="while busy") as caught:
            bench.claim_of(worker, "three")
    assert caught.value.connection_invalidated
    assert bench.control.availability.losses == 1 and not bench.control.availability.away
    bench.control.close()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_claim_whose_connection_is_cut_is_made_or_not_and_given_back(
    postgresql: Database, when: When
) -> None:
    """In its one round trip: whatever became of it, each job runs once, and no more at once than the limit says."""
    add(postgresql, *(Three(n) for n in range(6)))
    proxy = Proxy(postgresql.url)
    engine = create_engine(proxy.url)
    app: JobApp[Any, Any] = JobApp(sessionmaker(engine))
    three = Counting(app, Three)
    proxy.cut_commit("sajobs.locked", when, by=SYNC)
    assert Worker(app, drain=True, concurrency=4, poll_interval=timedelta(seconds=0.1)).run()
    assert proxy.cuts.acquire(timeout=20)
    assert three.most[None] <= 3 and sorted(each.n for each in three.ran) == [*range(6)]
    engine.dispose()
    proxy.stop()


def test_the_slots_of_a_dead_worker_come_back_with_its_jobs(bench: LimitBench) -> None:
    bench.add_limited(*(Three(n) for n in range(5)))
    dead, alive = bench.worker(), bench.worker()
    taken = bench.claim_of(dead, "three")
    assert len(taken) == 3
    assert bench.claim_of(alive, "three") == []
    assert set(bench.declare_dead(dead) or ()) == {each.job_id for each in taken}
    assert len(bench.claim_of(alive, "three")) == 3
    assert bench.claim_of(dead, "three") == []


def test_a_worker_that_was_declared_dead_claims_nothing(bench: LimitBench) -> None:
    bench.add_limited(Three(), Step())
    worker = bench.worker()
    bench.declare_dead(worker)
    assert bench.claim_of(worker, "three") == []
    assert bench.claim_of(worker, "step/a", numbers=ORDERED) == []


ENDINGS: dict[str, Callable[[Session, Claim], object]] = {
    "complete": transitions.complete,
    "discard": transitions.discard,
    "fail": lambda session, claim: transitions.fail(session, claim, failure=BOOM),
    "cancel": lambda session, claim: transitions.cancel(session, claim, reason=""),
    "retry": lambda session, claim: transitions.retry(
        session, claim, failure=BOOM, delay=timedelta(hours=1)
    ),
    "snooze": lambda session, claim: transitions.snooze(session, claim, delay=timedelta(hours=1)),
    "release": lambda session, claim: transitions.release(session, claim, reason=""),
    "give back": transitions.give_back,
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_however_a_run_ends_its_place_is_free_again(bench: LimitBench, ending: str) -> None:
    bench.add_limited(Charge(1, 0), Charge(1, 1))
    worker = bench.worker()
    (first,) = bench.claim_of(worker, "charge/1", numbers=ONE)
    assert bench.claim_of(worker, "charge/1", numbers=ONE) == []
    bench.do(lambda session: ENDINGS[ending](session, first))
    assert len(bench.claim_of(worker, "charge/1", numbers=ONE)) == 1
    assert bench.claim_of(worker, "charge/1", numbers=ONE) == []


# ------------------------------------------------------------------------------------------- rates


def test_no_more_jobs_begin_within_the_window_than_the_rate_says(bench: LimitBench) -> None:
    bench.add_limited(*(Call(n) for n in range(9)))
    worker = bench.worker()
    first = bench.claim_of(worker, "api", numbers=RATE, most=2)
    bench.age(1800)
    assert len(first) == 2
    assert len(bench.claim_of(worker, "api", numbers=RATE)) == 1
    bench.age(1790)
    assert bench.claim_of(worker, "api", numbers=RATE) == []
    bench.age(11)
    assert len(bench.claim_of(worker, "api", numbers=RATE)) == 2
    assert bench.claim_of(worker, "api", numbers=RATE) == []


def test_a_retry_and_a_run_whose_worker_died_count_as_starts(bench: LimitBench) -> None:
    bench.add_limited(Call(0), Call(1))
    dead, worker = bench.worker(), bench.worker()
    one, _ = bench.claim_of(dead, "api", numbers=RATE)
    bench.do(lambda s: transitions.retry(s, one, failure=BOOM, delay=timedelta(0)))
    bench.declare_dead(dead)
    assert len(bench.claim_of(worker, "api", numbers=RATE)) == 1
    assert bench.claim_of(worker, "api", numbers=RATE) == []


def test_a_claim_that_was_rolled_back_has_used_nothing_of_the_rate(bench: LimitBench) -> None:
    bench.add_limited(*(Call(n) for n in range(5)))
    worker = bench.worker()

    def claim_and_break(session: Session) -> None:
        assert len(bench.claim_in(session, worker, ["api"], RATE)) == 3
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        bench.do(claim_and_break)
    assert len(bench.claim_of(worker, "api", numbers=RATE)) == 3


def test_a_rate_and_a_concurrency_hold_together(bench: LimitBench) -> None:
    both = Numbers(concurrency=2, rate=RATE.rate)
    bench.add_limited(*(Call(n) for n in range(5)))
    worker = bench.worker()
    claims = bench.claim_of(worker, "api", numbers=both)
    assert len(claims) == 2
    bench.do(lambda s: transitions.complete_many(s, claims))
    assert len(bench.claim_of(worker, "api", numbers=both)) == 1
    assert bench.claim_of(worker, "api", numbers=both) == []


def test_a_worker_starts_jobs_again_as_soon_as_the_rate_lets_it(database: Database) -> None:
    @job("tick", limit=Limit(rate="2/1s"))
    @dataclass(frozen=True)
    class Tick:
        n: int

    app: JobApp[Any, Any] = JobApp(database.sessions())
    Counting(app, Tick)
    add(database, *(Tick(n) for n in range(6)))
    with app.worker(concurrency=4, poll_interval=timedelta(seconds=30)):
        until(lambda: count(database, Job.state == "succeeded") == 6)
    with database.sessions()() as session:
        began = list(session.scalars(select(Job.started_at).order_by(Job.started_at)))
    for first, third in zip(began, began[2:], strict=False):
        assert first and third and third - first >= timedelta(seconds=1)


# ----------------------------------------------------------------------------------------- ordered


@pytest.mark.parametrize("ending", ["retry", "snooze", "release", "rescue", "complete", "fail"])
def test_nothing_of_an_ordered_key_overtakes_its_oldest_job(bench: LimitBench, ending: str) -> None:
    ids = bench.add_limited(*(Step(n=n) for n in range(3)), priority=0)
    worker, other = bench.worker(), bench.worker()
    (claim,) = bench.claim_of(worker, "step/a", numbers=ORDERED)
    assert claim.job_id == ids[0]
    assert bench.claim_of(other, "step/a", numbers=ORDERED) == []
    if ending == "rescue":
        bench.declare_dead(worker)
    else:
        bench.do(lambda session: ENDINGS[ending](session, claim))
    got = bench.claim_of(other, "step/a", numbers=ORDERED)
    expected = {
        "retry": [],
        "snooze": [],
        "release": ids[:1],
        "rescue": ids[:1],
        "complete": ids[1:2],
        "fail": ids[1:2],
    }
    assert [each.job_id for each in got] == expected[ending]


def test_an_ordered_key_keeps_to_the_order_of_enqueueing_whatever_the_priority(
    database: Database,
) -> None:
    """A failing head is tried again before the next one begins."""
    app: JobApp[Any, Any] = JobApp(database.sessions())
    ran: list[Step] = []

    @app.handler(Step)
    def step(session: Session, payload: Step) -> None:
        ran.append(payload)
        if ran.count(payload) < 2 and payload.n % 5 == 0:
            raise Retry(timedelta(milliseconds=20))

    add(database, *(Step("ab"[n % 2], n) for n in range(20)), priority=1)
    add(database, *(Step("ab"[n % 2], n) for n in range(20, 30)), priority=-1)
    assert Worker(app, drain=True, concurrency=8).run() is not None
    until(lambda: Worker(app, drain=True).run() and count(database, Job.state == "ready") == 0)
    for order in "ab":
        numbers = [each.n for each in ran if each.order == order]
        assert numbers == sorted(numbers) and len(set(numbers)) == 15


# ------------------------------------------------------------------------- waking up, and fairness


def count(database: Database, *where: Any) -> int:
    with database.sessions()() as session:
        return session.scalar(select(func.count()).select_from(Job).where(*where)) or 0


def test_a_key_that_its_own_worker_frees_goes_on_at_once(database: Database) -> None:
    app: JobApp[Any, Any] = JobApp(database.sessions())
    Counting(app, Charge)
    add(database, *(Charge(1, n) for n in range(10)))
    with app.worker(concurrency=2, poll_interval=timedelta(seconds=60)):
        until(lambda: count(database, Job.state == "succeeded") == 10, 20)


def test_a_key_that_another_worker_frees_is_found_by_polling(
    bench: LimitBench, database: Database
) -> None:
    bench.add_limited(Charge(1, 0), Charge(1, 1))
    (held,) = bench.claim_of(bench.worker(), "charge/1", numbers=ONE)
    app: JobApp[Any, Any] = JobApp(database.sessions())
    charge = Counting(app, Charge)
    with app.worker(concurrency=2, poll_interval=timedelta(seconds=0.2)):
        time.sleep(0.1)
        assert charge.ran == []
        bench.do(lambda session: transitions.complete(session, held))
        until(lambda: charge.ran == [Charge(1, 1)])


@dataclass(frozen=True)
class Held:
    """Why nothing of a key may begin, and within how many seconds somebody is to look again."""

    payload: Any
    key: str
    numbers: Numbers
    waits: float
    delay: timedelta = timedelta(0)


HELD = {
    "used up": Held(Call(), "api", RATE, 3600),
    "running": Held(Charge(), "charge/1", ONE, 1),
    "paused": Held(Three(), "three", THREE, math.inf),
    "delayed head": Held(Step(), "step/a", ORDERED, 600, timedelta(minutes=10)),
    "head of others": Held(Step(), "step/a", ORDERED, 1),
}


def limiting_of(
    bench: LimitBench, *payloads: type[Any], pools: Pools | None = None, running: Sequence[Run] = ()
) -> limiting.Limiting:
    """Return that of a worker with four slots and a poll interval of a second."""
    app: JobApp[Any, Any] = JobApp(sessionmaker())
    for payload in payloads:
        Counting(app, payload)
    controls, pools = Controls(app.handlers), pools or Pools({"default": None})
    bench.do(controls.read)
    slots = Slots(4, pools, lambda: None)
    slots.take(running)
    for _ in running:
        assert slots.next()
    return limiting.Limiting(bench.control, slots, app.handlers, pools, controls, 1.0, lambda: None)


@pytest.mark.parametrize("why", HELD)
def test_only_what_ends_untold_is_polled_for(bench: LimitBench, why: str) -> None:
    held = HELD[why]
    bench.add_limited(held.payload, delay=held.delay)
    bench.add_limited(*[held.payload] * 5)
    if why == "head of others":
        bench.do(lambda s: s.execute(update(Job).values(queue="others")))
        bench.add_limited(held.payload)
    if why in ("used up", "running"):
        assert bench.claim_of(bench.worker(), held.key, numbers=held.numbers)
    if why == "paused":
        bench.do(lambda session: pause_kind(session, "three"))
    it = limiting_of(bench, type(held.payload))
    it.look(is_busy=False)
    assert not it.wants_slots
    assert it.wait == pytest.approx(held.waits, rel=0.01)


def test_a_new_key_does_not_wait_for_a_round_through_all_those_that_are_blocked(
    bench: LimitBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limiting, "LANES", 5)
    monkeypatch.setattr(limiting, "LOOKS", 1)
    monkeypatch.setattr(limiting, "SWEEP", 0.0)
    for _ in range(2):
        bench.add_limited(*(Charge(n) for n in range(100, 140)))
    for n in range(4):
        keys = [f"charge/{100 + 10 * n + m}" for m in range(10)]
        assert len(bench.claim_of(bench.worker(), *keys, numbers=ONE)) == 10
    it = limiting_of(bench, Charge)
    it.look(is_busy=False)
    assert not it.wants_slots
    bench.add(Charge(999), Charge(998), delay=timedelta(hours=1))
    it.look(is_busy=False)
    assert not it.wants_slots
    bench.add(Plain(), Charge(999))
    it.look(is_busy=False)
    assert it.wants_slots
    wanted = Wanted(bench.worker(), ["charge"], (), {}, 4)
    assert len(it.claim(wanted)) == 1


def test_keys_of_a_queue_without_room_do_not_hold_up_the_round(
    bench: LimitBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limiting, "LANES", 5)
    bench.add_limited(*(Charge(n) for n in range(100, 112)), queue="full")
    bench.add_limited(Charge(999))
    worker = bench.worker()
    run = Run(Claim(uuid.uuid4(), 1, worker, queue="full"))
    it = limiting_of(bench, Charge, pools=Pools({"full": 1, "default": None}), running=[run])
    monkeypatch.setattr(it, "_newest_at", math.inf)
    it.look(is_busy=False, wanted=3)
    assert len(it.claim(Wanted(worker, ["charge"], (), {}, 3))) == 1


def test_keys_that_others_held_are_looked_at_again_after_the_poll_interval(
    row_locks: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the round ends behind them, with nothing."""
    monkeypatch.setattr(limiting, "LANES", 5)
    monkeypatch.setattr(limiting, "ROUND_SHARE", 0)
    bench = LimitBench(row_locks)
    bench.add_limited(*(Charge(n) for n in range(5)), *(Plain() for _ in range(NEWEST)))
    it, worker = limiting_of(bench, Charge), bench.worker()
    it.look(is_busy=False)
    with row_locks.sessions()() as session:
        session.execute(select(limits.c.limit_key).with_for_update()).all()
        assert it.claim(Wanted(worker, ["charge"], (), {}, 4)) == []
    it.look(is_busy=False)
    assert not it.wants_slots and it.wait <= 1
    bench.control.close()


@pytest.mark.parametrize("disturbed", [True, False])
def test_what_comes_up_behind_a_long_round_is_seen_by_the_next_one(
    bench: LimitBench, monkeypatch: pytest.MonkeyPatch, disturbed: bool
) -> None:
    """Who is woken in the middle of a round goes round again; else it would sleep until the rate lets one begin."""

    @job("visit", limit=Limit(rate="1/hour", key="site"))
    @dataclass(frozen=True)
    class Visit:
        site: int

    monkeypatch.setattr(limiting, "LANES", 5)
    monkeypatch.setattr(limiting, "LOOKS", 1)
    monkeypatch.setattr(limiting, "ROUND_SHARE", 1e6 if disturbed else 0)
    bench.add_limited(*(Visit(n) for n in range(12)))
    in_an_hour = server_now(timedelta(hours=1))
    bench.do(lambda session: session.execute(update(limits).values(next_at=in_an_hour)))
    it = limiting_of(bench, Visit)
    for _ in range(3):
        it.look(is_busy=False)
    assert it.wait == pytest.approx(1 if disturbed else 3600, rel=0.01)


def test_a_round_goes_on_at_once_when_its_keys_are_claimed(
    bench: LimitBench, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limiting, "LANES", 4)
    bench.add_limited(*(Charge(n) for n in range(12)))
    it = limiting_of(bench, Charge)
    monkeypatch.setattr(it, "_newest_at", math.inf)
    wanted = Wanted(bench.worker(), ["charge"], (), {}, 4)
    for left in (8, 4, 0):
        it.look(is_busy=True)
        assert len(it.claim(wanted)) == 4
        assert count(database, Job.state == "ready") == left
        if left:
            assert it.wait == 0


def test_a_claim_in_the_middle_of_a_round_is_full(
    bench: LimitBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not take the keys that the last look has left over, but what the next one finds as well."""
    monkeypatch.setattr(limiting, "LANES", 4)
    bench.add_limited(*(Charge(n) for n in range(12)))
    it = limiting_of(bench, Charge)
    monkeypatch.setattr(it, "_newest_at", math.inf)
    wanted = Wanted(bench.worker(), ["charge"], (), {}, 3)
    for _ in range(4):
        it.look(is_busy=False, wanted=3)
        assert len(it.claim(wanted)) == 3


def test_what_a_claim_with_limits_has_claimed_is_given_back_when_it_raises(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one round trip it is committed by then."""
    claim_of, raised = limiting.Limiting._claim_of, threading.Event()

    def once(*args: Any) -> dict[str, list[Claim]]:
        found = claim_of(*args)
        if found and not raised.is_set():
            raised.set()
            raise RuntimeError("after the claim")
        return found

    monkeypatch.setattr(limiting.Limiting, "_claim_of", once)
    monkeypatch.setattr(reconciling, "RECONCILE", 3600.0)
    monkeypatch.setattr(reconciling, "IDLE_RECONCILE", 3600.0)
    app: JobApp[Any, Any] = JobApp(database.sessions())
    done = threading.Event()
    app.handler(Charge)(lambda session, payload: done.set())
    with app.worker(concurrency=1):
        add(database, Charge(1))
        assert done.wait(20)
    assert raised.is_set()


def test_a_cancelled_head_does_not_hold_up_its_key(database: Database) -> None:
    """The bell is rung for it: the worker sleeps."""
    app: JobApp[Any, Any] = JobApp(database.sessions())
    step = Counting(app, Step)
    with database.sessions().begin() as session:
        (head,) = enqueue_many(session, [Step(n=1)], delay=timedelta(hours=1))
        enqueue_many(session, [Step(n=2)])
    with app.worker(poll_interval=timedelta(seconds=60)):
        with database.sessions().begin() as session:
            assert cancel(session, head)
        until(lambda: step.ran == [Step(n=2)])


def test_a_delayed_job_with_a_limit_starts_on_time(database: Database) -> None:
    app: JobApp[Any, Any] = JobApp(database.sessions())
    Counting(app, Charge)
    Counting(app, Step)
    add(database, Charge(1), Step(), delay=timedelta(seconds=1.5))
    with app.worker(concurrency=2, poll_interval=timedelta(seconds=60)):
        until(lambda: count(database, Job.state == "succeeded") == 2, 20)
    with database.sessions()() as session:
        for row in session.scalars(select(Job)):
            assert row.started_at and timedelta(0) <= row.started_at - row.run_at < timedelta(
                seconds=1
            )


def test_blocked_keys_hold_up_neither_other_keys_nor_other_jobs(
    bench: LimitBench, database: Database
) -> None:
    bench.add_limited(*(Charge(1, n) for n in range(500)))
    bench.claim_of(bench.worker(), "charge/1", numbers=ONE)
    app: JobApp[Any, Any] = JobApp(database.sessions())
    charge, plain = Counting(app, Charge), Counting(app, Plain)
    add(database, *(Charge(n, 0) for n in range(2, 12)), *(Plain(n) for n in range(50)))
    with app.worker(concurrency=2):
        until(lambda: len(charge.ran) == 10 and len(plain.ran) == 50)
    assert all(each.account != 1 for each in charge.ran)


def test_neither_jobs_with_a_limit_nor_those_without_starve_in_a_single_slot(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is claimed ahead while a key is blocked, a quarter of a second of work, is left out here."""
    monkeypatch.setattr(speed, "AHEAD", 0.0)
    app: JobApp[Any, Any] = JobApp(database.sessions())
    ran: list[type[Any]] = []
    for cls in (Three, Plain):
        app.handler(cls)(lambda session, payload: ran.append(type(payload)))
    add(database, *(Three(n) for n in range(40)), *(Plain(n) for n in range(40)))
    assert Worker(app, drain=True, concurrency=1).run()
    for cls in (Three, Plain):
        assert cls in ran[:40]


def test_a_key_that_becomes_free_does_not_wait_behind_what_was_claimed_ahead(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time it would wait for as long as a job may wait in a worker, a second, and so for longer than all the others."""
    monkeypatch.setattr(speed, "AHEAD", 5.0)
    app: JobApp[Any, Any] = JobApp(database.sessions())
    plain, charge = Counting(app, Plain), Counting(app, Charge)
    add(database, *(Charge(1, n) for n in range(12)), *(Plain(n) for n in range(3000)))
    with app.worker(concurrency=2):
        until(lambda: len(charge.ran) == 12, 40)
        assert len(plain.ran) < 3000


def test_each_of_many_keys_has_its_turn(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More keys than looks and claims go through at once, and one of them with a backlog."""
    monkeypatch.setattr(limiting, "LANES", 10)
    monkeypatch.setattr(limiting, "KEYS", 3)
    app: JobApp[Any, Any] = JobApp(database.sessions())
    charge = Counting(app, Charge, lambda payload: payload.account)
    add(database, *(Charge(1, n) for n in range(30)), *(Charge(n) for n in range(2, 40)))
    assert Worker(app, drain=True, concurrency=4).run()
    assert len(charge.ran) == 68 and charge.most == dict.fromkeys(range(1, 40), 1)
    others = [number for number, each in enumerate(charge.ran) if each.account != 1]
    assert max(others) < 60  # key 1 did not go first


# ----------------------------------------------------------------------------------------- deploys


def test_jobs_from_when_there_was_a_limit_are_not_left_behind(database: Database) -> None:
    add(database, *(Charge(1, n) for n in range(5)), Step())
    app: JobApp[Any, Any] = JobApp(database.sessions())

    @job("charge")
    @dataclass(frozen=True)
    class Unlimited:
        n: int = 0

    charge = Counting(app, Unlimited)
    with app.worker(concurrency=5):
        until(lambda: len(charge.ran) == 5)
    assert count(database, Job.kind == "step", Job.state == "ready") == 1


def test_a_number_that_was_changed_holds_for_the_jobs_that_are_there(database: Database) -> None:
    add(database, *(Charge(1, n) for n in range(20)))
    app: JobApp[Any, Any] = JobApp(database.sessions())

    @job("charge", limit=Limit(concurrency=2))
    @dataclass(frozen=True)
    class Two:
        n: int = 0

    charge = Counting(app, Two)
    assert Worker(app, drain=True, concurrency=5).run()
    assert charge.most[None] == 2


def test_an_app_without_limits_pays_nothing(database: Database) -> None:
    """Not a statement names the table of the keys; the one look at the start finds nothing."""
    app: JobApp[Any, Any] = JobApp(database.sessions())
    plain = Counting(app, Plain)
    add(database, *(Plain(n) for n in range(50)))
    looks: list[str] = []
    statements = type(dialects.named(database.name).limits)
    find = statements.lanes

    def noted(*args: Any) -> Any:
        looks.append("look")
        return find(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statements, "lanes", noted)
        assert Worker(app, drain=True).run()
    assert len(plain.ran) == 50 and looks == ["look"]


# ------------------------------------------------------------------------------------------ pausing


@pytest.mark.parametrize(
    ("pause", "resume", "name"),
    [(pause_queue, resume_queue, "mail"), (pause_kind, resume_kind, "three")],
)
def test_what_is_resumed_begins_though_nothing_waits_but_jobs_with_a_limit(
    database: Database,
    pause: Callable[[Session, str], bool],
    resume: Callable[[Session, str], bool],
    name: str,
) -> None:
    app: JobApp[Any, Any] = JobApp(database.sessions())
    three, plain = Counting(app, Three), Counting(app, Plain)
    with database.sessions().begin() as session:
        pause(session, name)
    with app.worker(poll_interval=timedelta(seconds=0.1)):
        add(database, Three(1), queue="mail")
        add(database, Plain(1))
        until(lambda: plain.ran)
        with database.sessions().begin() as session:
            resume(session, name)
        until(lambda: three.ran)


def test_a_paused_kind_does_not_hold_up_another_one_that_shares_its_limit(
    database: Database,
) -> None:
    app: JobApp[Any, Any] = JobApp(database.sessions())
    call, ask = Counting(app, Call), Counting(app, Ask)
    with database.sessions().begin() as session:
        pause_kind(session, "call")
    add(database, Call(1))
    add(database, Ask(2))
    assert Worker(app, drain=True).run()
    assert (call.ran, ask.ran) == ([], [Ask(2)])


# ------------------------------------------------------------------------------------------- poison


def test_a_job_that_must_run_alone_has_its_turn_in_a_queue_with_limits_too(
    database: Database,
) -> None:
    app: JobApp[Any, Any] = JobApp(database.sessions())
    three = Counting(app, Three)
    with database.sessions().begin() as session:
        set_queue(session, "mail", concurrency=2)
    add(database, Three(1), queue="mail")
    with database.sessions().begin() as session:
        session.execute(update(Job).values(crashes=2))
    with app.worker(poll_interval=timedelta(seconds=0.1)):
        until(lambda: three.ran)


def test_a_job_with_a_limit_that_killed_its_workers_runs_alone(database: Database) -> None:
    add(database, *(Three(n) for n in range(6)), *(Plain(n) for n in range(6)))
    with database.sessions().begin() as session:
        first = session.scalars(select(Job.id).where(Job.kind == "three").limit(1)).one()
        session.execute(update(Job).where(Job.id == first).values(crashes=2))
    app: JobApp[Any, Any] = JobApp(database.sessions())
    running = 0
    beside: dict[int, int] = {}
    lock = threading.Lock()

    def handle(session: Session, payload: Any) -> None:
        nonlocal running
        with lock:
            running += 1
        time.sleep(0.01)
        if isinstance(payload, Three):
            beside[payload.n] = running
        time.sleep(0.01)
        with lock:
            running -= 1

    app.handler(Three)(handle)
    app.handler(Plain)(handle)
    assert Worker(app, drain=True, concurrency=4).run()
    with database.sessions()() as session:
        suspect = session.scalars(select(Job).where(Job.crashes == 2)).one()
    assert suspect.state == "succeeded" and beside[suspect.payload["n"]] == 1


# --------------------------------------------------------------------------------- rows of the keys


def test_the_rows_of_keys_without_jobs_are_forgotten_after_a_day(bench: LimitBench) -> None:
    """But not while a worker claims by one, or a job waits or runs."""
    bench.add_limited(*(Charge(account) for account in range(1, 5)))
    worker = bench.worker()
    for account in (1, 2, 3):
        (claim,) = bench.claim_of(worker, f"charge/{account}", numbers=ONE)
        if account < 3:
            bench.do(lambda s, c=claim: transitions.complete(s, c))  # type: ignore[misc]
    long_ago = datetime.now(UTC) - retention.KEPT_KEYS - timedelta(seconds=1)
    keys = select(LimitRow.limit_key).order_by(LimitRow.limit_key)
    bench.do(lambda s: retention.forget_keys(s, ""))
    assert len(bench.do(lambda s: s.scalars(keys).all())) == 4
    bench.do(
        lambda s: s.execute(
            update(LimitRow).where(LimitRow.limit_key != "charge/2").values(used_at=long_ago)
        )
    )
    assert bench.do(lambda s: retention.forget_keys(s, "")) is None
    assert bench.do(lambda s: s.scalars(keys).all()) == ["charge/2", "charge/3", "charge/4"]


def test_a_key_that_is_being_claimed_is_not_forgotten(row_locks: Database) -> None:
    bench = LimitBench(row_locks)
    bench.add_limited(Three())
    long_ago = datetime.now(UTC) - timedelta(days=2)
    bench.do(lambda s: s.execute(update(LimitRow).values(used_at=long_ago)))
    with _open_claim(bench, row_locks, THREE) as session:
        session.execute(update(Job).values(state="succeeded"))
        bench.do(lambda s: retention.forget_keys(s, ""))
    assert len(bench.do(lambda s: s.scalars(select(LimitRow)).all())) == 1
    bench.control.close()


# ------------------------------------------------------------------------ queues with limits themselves


def test_a_queue_runs_no_more_jobs_at_once_than_it_is_set_to(database: Database) -> None:
    """With or without limits of their own, in two workers."""
    with database.sessions().begin() as session:
        set_queue(session, "mail", concurrency=2)
    add(database, *(Plain(n) for n in range(20)), *(Three(n) for n in range(20)), queue="mail")
    add(database, *(Charge(n) for n in range(10)), queue="mail")
    add(database, *(Plain(n) for n in range(100, 120)))
    at_once: Counter[str] = Counter()
    most: Counter[str] = Counter()
    lock = threading.Lock()

    def handle(session: Session, payload: Any) -> None:
        queue = current_run().queue
        with lock:
            at_once[queue] += 1
            most[queue] = max(most[queue], at_once[queue])
        time.sleep(0.005)
        with lock:
            at_once[queue] -= 1

    apps: list[JobApp[Any, Any]] = [JobApp(database.sessions()) for _ in range(2)]
    for app in apps:
        for cls in (Plain, Three, Charge):
            app.handler(cls)(handle)
    with apps[0].worker(concurrency=4), apps[1].worker(concurrency=4):
        until(lambda: count(database, Job.state == "succeeded") == 70, 40)
    assert most["mail"] == 2


def test_a_queue_begins_no_more_jobs_in_a_time_than_it_is_set_to(database: Database) -> None:
    with database.sessions().begin() as session:
        set_queue(session, "mail", rate="4/1s")
    add(database, *(Plain(n) for n in range(6)), *(Charge(n) for n in range(4)), queue="mail")
    app: JobApp[Any, Any] = JobApp(database.sessions())
    Counting(app, Plain)
    Counting(app, Charge)
    with app.worker(concurrency=8, poll_interval=timedelta(seconds=30)):
        until(lambda: count(database, Job.state == "succeeded") == 10, 30)
    with database.sessions()() as session:
        began = list(session.scalars(select(Job.started_at).order_by(Job.started_at)))
    for first, fifth in zip(began, began[4:], strict=False):
        assert first and fifth and fifth - first >= timedelta(seconds=1)


def test_the_limits_of_a_queue_are_in_force_within_two_seconds(database: Database) -> None:
    app: JobApp[Any, Any] = JobApp(database.sessions())
    ran: list[int] = []
    go_on = threading.Event()

    @app.handler(Plain)
    def plain(session: Session, payload: Plain) -> None:
        ran.append(payload.n)
        go_on.wait(30)

    with app.worker(concurrency=3, poll_interval=timedelta(seconds=0.2)):
        with database.sessions().begin() as session:
            set_queue(session, "mail", concurrency=1)
        time.sleep(2)
        add(database, *(Plain(n) for n in range(3)), queue="mail")
        until(lambda: len(ran) == 1)
        time.sleep(0.3)
        assert len(ran) == 1
        with database.sessions().begin() as session:
            set_queue(session, "mail", concurrency=None)
        until(lambda: len(ran) == 3)
        go_on.set()


def test_a_queue_whose_rate_makes_no_sense_waits_until_it_is_mended(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    with database.sessions().begin() as session:
        session.add(Queue(name="mail", rate="many"))
    add(database, Plain(1), queue="mail")
    add(database, Plain(2))
    app: JobApp[Any, Any] = JobApp(database.sessions())
    plain = Counting(app, Plain)
    with app.worker(poll_interval=timedelta(seconds=0.1)):
        until(lambda: plain.ran == [Plain(2)] and "none of its jobs begins" in caplog.text)
        with database.sessions().begin() as session:
            set_queue(session, "mail", rate="100/second")
        until(lambda: len(plain.ran) == 2)


def test_a_rate_that_makes_no_sense_is_refused(database: Database) -> None:
    refused = pytest.raises(ControlError, match="at character 5: wanted second, minute")
    with database.sessions()() as session, refused:
        set_queue(session, "mail", rate="100/fortnight")
