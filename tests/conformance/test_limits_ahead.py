"""Jobs with a limit are claimed ahead of free slots only where the limit has room to spare."""

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import func, select, text, update
from sqlalchemy.orm import Session

from sqlalchemy_jobs import Job, JobApp, JobState, Limit, Worker, job, limited, transitions
from sqlalchemy_jobs.claims import Claim, LimitedKey, Swept, Wanted
from sqlalchemy_jobs.dialects import postgresql_limits
from sqlalchemy_jobs.limits import Numbers
from sqlalchemy_jobs.models import LimitRow
from sqlalchemy_jobs.runs import Run
from sqlalchemy_jobs.worker import limiting, speed
from sqlalchemy_jobs.worker.turns import Turns
from tests.conformance.test_limits import (
    Call,
    Charge,
    LimitBench,
    Step,
    add,
    count,
    hammered,
    limiting_of,
)
from tests.databases import Database
from tests.waiting import until

AHEAD = {"*": 40}
ROW = "INSERT INTO sajobs_limit (limit_key, used_at) VALUES ('mail/1', now())"


@job("mail", limit=Limit(concurrency=20, key="to"), max_attempts=3)
@dataclass(frozen=True)
class Mail:
    to: int = 1
    n: int = 0


@job("news", limit=Limit(concurrency=200, key="to"))
@dataclass(frozen=True)
class News:
    to: int = 1
    n: int = 0


@job("wire", limit=Limit(concurrency=20), on_crash="fail")
@dataclass(frozen=True)
class Wire:
    n: int = 0


@pytest.fixture
def bench(database: Database) -> Iterator[LimitBench]:
    bench = LimitBench(database)
    yield bench
    bench.control.close()


@pytest.fixture
def always_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have workers believe that every handler is quick."""
    monkeypatch.setattr(speed.Speed, "ahead", lambda self: AHEAD)


@dataclass
class Made:
    ahead: bool
    claims: list[Claim]
    running: dict[str, int]
    """How many jobs of each key were running behind it."""


@pytest.fixture
def made(database: Database, monkeypatch: pytest.MonkeyPatch) -> list[Made]:
    """The claims of workers."""
    found: list[Made] = []
    for name in ("_claim", "_sweep"):
        original = getattr(limiting.Limiting, name)

        def noted(
            it: Any, wanted: Wanted, *args: Any, _original: Any = original, **more: Any
        ) -> Any:
            claims = _original(it, wanted, *args, **more)
            with database.session() as session:
                running = session.execute(
                    select(Job.limit_key, func.count())
                    .where(Job.state == "running", Job.limit_key.is_not(None))
                    .group_by(Job.limit_key)
                )
                found.append(Made(wanted.ahead, claims, {str(key): n for key, n in running}))
            return claims

        monkeypatch.setattr(limiting.Limiting, name, noted)
    return found


def kinds(made: list[Made], *, ahead: bool) -> set[str]:
    return {claim.kind for each in made if each.ahead == ahead for claim in each.claims}


# --------------------------------------------------------------------------------- by a worker


def test_half_of_what_a_limit_lets_run_is_claimed_ahead_and_each_job_runs_once(
    database: Database, made: list[Made], always_ahead: None
) -> None:
    app: JobApp[Any, Any] = JobApp(database.sessions())
    ran: list[int] = []
    app.handler(Mail)(lambda session, payload: ran.append(payload.n))
    add(database, *(Mail(n % 3, n) for n in range(600)))
    assert Worker(app, drain=True, concurrency=2).run()
    assert sorted(ran) == list(range(600))
    assert max(len(each.claims) for each in made if each.ahead) > 10
    assert max(n for each in made for n in each.running.values()) <= 10
    assert count(database, Job.attempt == 1, Job.started_at <= Job.finished_at) == 600


@pytest.mark.parametrize("each", [1, 2])
def test_a_key_that_lets_one_run_is_claimed_ahead_where_it_has_a_single_job(
    database: Database, made: list[Made], always_ahead: None, each: int
) -> None:
    """Nobody else can miss its place."""
    app: JobApp[Any, Any] = JobApp(database.sessions())
    app.handler(Charge)(lambda session, payload: None)
    add(database, *(Charge(n, m) for n in range(80) for m in range(each)))
    assert Worker(app, drain=True, concurrency=2).run()
    assert count(database, Job.state == "succeeded") == 80 * each
    most = max((len(one.claims) for one in made if one.ahead), default=0)
    assert most > 10 if each == 1 else kinds(made, ahead=False)
    if each == 2:  # its last job is a single one
        first = next(claim for one in made for claim in one.claims)
        assert '"n":0' in first.payload.replace(" ", "")


def test_rates_order_and_what_must_not_be_repeated_are_never_claimed_ahead(
    database: Database, made: list[Made], always_ahead: None
) -> None:
    app: JobApp[Any, Any] = JobApp(database.sessions())
    for payload in (News, Wire, Call, Step):
        app.handler(payload)(lambda session, payload: None)
    add(database, *(News(n % 3, n) for n in range(600)), *(Wire(n) for n in range(5)))
    add(database, *(Call(n) for n in range(3)), *(Step("a", n) for n in range(10)))
    assert Worker(app, drain=True, concurrency=2).run()
    assert count(database, Job.state == "succeeded") == 618
    assert kinds(made, ahead=True) == {"news"}
    assert kinds(made, ahead=False) >= {"wire", "call", "step"}


def test_of_what_was_claimed_ahead_nothing_failed_when_its_worker_died(
    bench: LimitBench, database: Database
) -> None:
    """It may not have begun. It counts a crash, and is claimed for a free slot then."""
    bench.add_limited(Mail())
    worker = bench.worker()
    wanted = Wanted(worker, ["mail"], (), {"default": 9}, 9, ahead=True)
    key = LimitedKey("mail/1", "default", [0], Numbers(20), 9)

    def claim(wanted: Wanted) -> list[Claim]:
        found: Any = bench.control.statements(lambda s: limited.claim_at_once(s, wanted, [key]))
        if found is None:
            found = bench.do(lambda session: limited.claim(session, wanted, [key]))
        return [claim for of_key in found.values() for claim in of_key]

    assert len(claim(wanted)) == 1
    bench.do(lambda session: transitions.rescue_orphans(session, worker))
    with database.session() as session:
        assert session.execute(select(Job.state, Job.failures, Job.crashes)).one() == (
            "ready",
            0,
            1,
        )
    again = bench.worker()
    assert claim(Wanted(again, ["mail"], (), {"default": 9}, 9, ahead=True)) == []
    assert len(claim(Wanted(again, ["mail"], (), {"default": 9}, 9))) == 1
    bench.do(lambda session: transitions.rescue_orphans(session, again))
    with database.session() as session:
        assert session.execute(select(Job.failures, Job.crashes)).one() == (1, 2)


def test_through_many_keys_a_worker_goes_without_looking(
    database: Database, made: list[Made], always_ahead: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On PostgreSQL; and whatever lies between them is seen all the same."""
    monkeypatch.setattr(limiting, "LANES", 5)
    swept: list[int] = []
    sweep = limiting.Limiting._sweep

    def noted(*args: Any) -> list[Claim]:
        claims = sweep(*args)
        swept.append(len(claims))
        return claims

    monkeypatch.setattr(limiting.Limiting, "_sweep", noted)
    app: JobApp[Any, Any] = JobApp(database.sessions())
    ran: list[int] = []

    def handle(session: Session, payload: Any) -> None:
        ran.append(payload.n)

    for payload in (Mail, Wire, Call, Step):
        app.handler(payload)(handle)
    add(database, *(Mail(n % 300, n) for n in range(900)))
    add(database, *(Mail(n, 900 + n) for n in range(50)), queue="other")
    add(database, Mail(150, 950), Mail(200, 951), priority=-1, delay=timedelta(hours=1))
    add(database, Wire(952), Call(953), Step("a", 954), Mail(299, 955))
    assert Worker(app, drain=True, concurrency=2).run()
    assert sorted(ran) == [n for n in range(956) if n not in (950, 951)]
    at_once = database.name == "postgresql" and "asyncpg" not in str(database.url)
    assert (sum(swept) > 300) == at_once


# ------------------------------------------------------- claims of keys that nobody has looked at


def swept(bench: LimitBench, worker: uuid.UUID, after: str = "", **more: Any) -> Swept:
    wanted = Wanted(worker, ["mail", "charge"], (), {"default": 40}, 40, ahead=True)
    allowed = {"mail": 20, "charge": 1}
    found = bench.control.statements(
        lambda session: limited.claim_next(session, wanted, after, allowed, more.get("most", 40))
    )
    assert found is not None
    return found


def of_keys(found: Swept) -> dict[str, int]:
    return {key: len(claims) for key, claims in found.claims.items()}


@pytest.fixture
def pg(postgresql: Database) -> Iterator[LimitBench]:
    bench = LimitBench(postgresql)
    yield bench
    bench.control.close()


def test_it_goes_by_the_jobs_behind_a_key_and_makes_the_rows_of_keys(
    pg: LimitBench, postgresql: Database
) -> None:
    pg.add(*(Mail(n) for n in (1, 2, 3)), *(Mail(2) for _ in range(2)), Charge(7))
    found = swept(pg, pg.worker(), most=3)
    assert (of_keys(found), found.keys, found.last) == (
        {"charge/7": 1, "mail/1": 1, "mail/2": 3},
        3,
        "mail/2",
    )
    found = swept(pg, pg.worker(), found.last)
    assert (of_keys(found), found.keys, found.last) == ({"mail/3": 1}, 1, "")
    assert swept(pg, pg.worker()) == Swept({}, 0, "")
    with postgresql.session() as session:
        assert {*session.scalars(select(LimitRow.limit_key))} == {
            "charge/7",
            "mail/1",
            "mail/2",
            "mail/3",
        }
        assert set(session.scalars(select(Job.started_at))) == {None}


def test_it_leaves_half_of_a_limit_to_jobs_that_begin_at_once(
    pg: LimitBench, postgresql: Database
) -> None:
    pg.add_limited(*(Mail(1, n) for n in range(30)), Charge(1), Charge(1), Charge(2))
    assert of_keys(swept(pg, pg.worker())) == {"charge/2": 1, "mail/1": 10}
    in_two_workers = count(postgresql, Job.state == "running")
    assert (of_keys(swept(pg, pg.worker())), in_two_workers) == ({}, 11)


def test_a_key_is_claimed_of_in_one_queue_or_its_limit_would_hold_for_each(
    pg: LimitBench,
) -> None:
    """The one whose turn it is, or the next by name that has jobs of it."""
    for queue in ("a", "b", "c"):
        pg.add(*(Mail(1, n) for n in range(30)), queue=queue)
    pg.add(Mail(2), queue="b")
    worker = pg.worker()
    for turns, found in (("c", "b", "a"), {"mail/1": 10, "mail/2": 1}), (("b", "a", "c"), {}):
        wanted = Wanted(worker, ["mail"], (), dict.fromkeys(turns, 40), 40, ahead=True)
        got = pg.control.statements(
            lambda s, w=wanted: limited.claim_next(s, w, "", {"mail": 20}, 200)  # type: ignore[misc]
        )
        assert got is not None and of_keys(got) == found
        queues = {claim.queue for claims in got.claims.values() for claim in claims}
        assert queues == ({"c", "b"} if found else set())


def test_it_leaves_what_a_claim_ahead_must_not_take(pg: LimitBench) -> None:
    """Of what lies before it within a key, too."""
    pg.add(Mail(1), delay=timedelta(hours=1), priority=-1)
    pg.add(Mail(2), Mail(3), Mail(4), Mail(5))
    pg.do(lambda s: s.execute(update(Job).where(Job.limit_key == "mail/2").values(crashes=1)))
    pg.do(lambda s: s.execute(update(Job).where(Job.limit_key == "mail/3").values(queue="other")))
    pg.do(lambda s: s.execute(update(Job).where(Job.limit_key == "mail/4").values(kind="later")))
    pg.add(Call(1))
    found = swept(pg, pg.worker())
    assert (of_keys(found), found.keys) == ({"mail/5": 1}, 6)


@contextmanager
def open_transaction(database: Database, statement: str) -> Iterator[Session]:
    with Session(database.engine()) as session:
        session.execute(text(statement))
        yield session
        session.rollback()


def test_it_passes_by_a_key_that_another_worker_claims(
    pg: LimitBench, postgresql: Database
) -> None:
    pg.add_limited(Mail(1), Mail(2))
    lock = "SELECT FROM sajobs_limit WHERE limit_key = 'mail/1' FOR NO KEY UPDATE"
    with open_transaction(postgresql, lock):
        found = swept(pg, pg.worker())
    assert (of_keys(found), found.keys) == ({"mail/2": 1}, 2)


@pytest.mark.parametrize("ending", ["commit", "rollback"])
def test_a_key_whose_row_another_worker_makes_is_claimed_by_one_of_them(
    pg: LimitBench, postgresql: Database, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for the end of the other's claim: who has made the row has it."""
    briefly = "SELECT set_config('lock_timeout', '60s', true)"
    monkeypatch.setattr(postgresql_limits, "_BRIEFLY", briefly)
    pg.add(Mail(1), Mail(2))
    found: list[Swept] = []
    with open_transaction(postgresql, ROW) as other:
        worker = pg.worker()
        thread = threading.Thread(target=lambda: found.append(swept(pg, worker)))
        thread.start()
        waits = text(
            "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'transactionid'"
        )
        until(lambda: bool(other.scalar(waits)))
        getattr(other, ending)()
        thread.join()
    assert of_keys(found[0]) == (
        {"mail/2": 1} if ending == "commit" else {"mail/1": 1, "mail/2": 1}
    )


def test_it_does_not_wait_for_long_for_a_row_that_is_made_elsewhere(
    pg: LimitBench, postgresql: Database
) -> None:
    """Then it claims nothing, and one looks first."""
    pg.add(Mail(1), Mail(2))
    worker = pg.worker()
    with open_transaction(postgresql, ROW):
        assert swept(pg, worker) == Swept({}, 40, "")
    assert of_keys(swept(pg, worker)) == {"mail/1": 1, "mail/2": 1}


def test_workers_that_go_through_the_same_keys_never_exceed_a_limit(postgresql: Database) -> None:
    bench = LimitBench(postgresql)
    bench.add(*(Mail(n % 5, n) for n in range(400)), *(Charge(n % 30, n) for n in range(90)))
    running = (
        select(Job.kind, func.count())
        .where(Job.state == JobState.RUNNING)
        .group_by(Job.kind, Job.limit_key)
    )
    seen: list[tuple[str, int]] = []

    def claim(own: LimitBench, worker: uuid.UUID) -> list[Claim]:
        found = swept(own, worker)
        claims = [claim for of_key in found.claims.values() for claim in of_key]
        claims += own.claim_of(worker, *(f"charge/{n}" for n in range(30)), numbers=Numbers(1))
        seen.extend((kind, n) for kind, n in own.do(lambda s: s.execute(running).all()))
        return claims

    done = hammered(postgresql, claim)
    most: dict[str, int] = {}
    for kind, n in seen:
        most[kind] = max(most.get(kind, 0), n)
    assert most["charge"] == 1 and 1 < most["mail"] <= 10
    assert len(done) == len(set(done)) == 490
    bench.control.close()


# --------------------------------------------------------------------------------- whose turn it is


def key(name: str, allowed: int = 20, **more: Any) -> LimitedKey:
    return LimitedKey(name, "default", [0], Numbers(allowed), 0, **({"may_wait": True} | more))


def pick(turns: Turns, total: int, pressing: bool | None = False) -> dict[str, int]:
    return {each.key: each.most for each in turns.pick(total, {"default"}, pressing=pressing)}


def test_a_key_rests_when_its_half_is_claimed_ahead_until_enough_of_it_has_run() -> None:
    turns, mail = Turns(), key("mail")
    assert turns.looked_at(mail, 0)
    for _ in range(2):
        assert pick(turns, 40) == {
            "mail": 5
        }  # the half of the half: while it runs the other one is claimed
        turns.put_back(mail._replace(most=5), 5, had_room=True, ahead=True)
    assert turns.is_resting and not turns and pick(turns, 40) == {}
    for _ in range(4):
        turns.freed("mail")
    assert turns.is_resting
    turns.freed("mail")
    assert pick(turns, 40) == {"mail": 5}


@pytest.mark.parametrize(
    ("others", "ahead", "ended"), [(3, 5, 3), (5, 5, 5), (6, 4, 4), (10, None, 0), (12, None, 0)]
)
def test_a_key_does_not_rest_for_what_runs_elsewhere(
    others: int, ahead: int | None, ended: int
) -> None:
    """Nobody tells of its end. What has nothing to spare has its turn for slots that are free."""
    turns, mail = Turns(), key("mail")
    assert turns.looked_at(mail, others)
    assert turns.is_pressing == (ahead is None)
    if ahead is None:
        assert pick(turns, 40) == {} and pick(turns, 40, None) == {"mail": 40}
        return
    assert pick(turns, 40) == {"mail": ahead}
    turns.put_back(mail._replace(most=ahead), ahead, had_room=True, ahead=True)
    assert turns.is_resting and not turns
    for _ in range(ended):
        assert turns.is_resting
        turns.freed("mail")
    assert not turns.is_resting and pick(turns, 40) == {"mail": ahead}


@pytest.mark.parametrize("pressing", [None, True])
def test_what_is_never_claimed_ahead_has_its_turn_for_free_slots(pressing: bool | None) -> None:
    turns, call = Turns(), LimitedKey("call", "default", [0], Numbers(), 0)
    for _ in range(3):  # runs that ended after the look had not counted them
        turns.freed("call")
    assert turns.looked_at(call, 0)
    assert turns.is_pressing and pick(turns, 40) == {}
    assert pick(turns, 4, pressing) == {"call": 4}
    turns.put_back(call._replace(most=4), 0, had_room=True, ahead=False)
    assert not turns and not turns.is_resting


def test_keys_that_bring_nothing_lose_their_turn_to_the_next_ones_at_once(
    bench: LimitBench, database: Database
) -> None:
    """Of a key that had its last job claimed nobody knows that it was the last one."""
    bench.add_limited(*(Charge(n, m) for n in range(100, 160) for m in range(2)))
    it, worker = limiting_of(bench, Charge), bench.worker()
    claims = [Claim(uuid.uuid4(), 1, worker)]
    while claims:
        it.look(is_busy=False, wanted=4)
        claims = it.claim(Wanted(worker, ["charge"], (), {}, 4))
        bench.do(lambda session, claims=claims: transitions.complete_many(session, claims))  # type: ignore[misc]
        it.disowned([Run(claim) for claim in claims])
    assert count(database, Job.state == "succeeded") == 120


def test_a_key_that_has_nothing_left_loses_its_turn_also_where_claims_are_full(
    bench: LimitBench,
) -> None:
    """Else what is never claimed ahead would keep all others from it, long after it has gone."""
    bench.add_limited(Call(1), Call(2), *(Mail(n % 3, n) for n in range(60)))
    it, worker = limiting_of(bench, Mail, Call), bench.worker()
    it.look(is_busy=False)
    assert it.is_pressing
    for _ in range(6):
        assert len(it.claim(Wanted(worker, ["mail", "call"], (), {}, 2))) == 2
    assert not it.is_pressing and it.wants_slots


def test_what_rests_is_claimed_for_free_slots_all_the_same(bench: LimitBench) -> None:
    bench.add_limited(*(Mail(1, n) for n in range(30)))
    it, worker = limiting_of(bench, Mail), bench.worker()
    wanted = Wanted(worker, ["mail"], (), {}, 40)
    it.look(is_busy=False)
    assert [len(it.claim(wanted, {"default": 40})) for _ in range(3)] == [5, 5, 0]
    assert it.is_resting and not it.may_claim(ahead=True)
    assert it.may_claim(ahead=False) and len(it.claim(wanted)) == 4
