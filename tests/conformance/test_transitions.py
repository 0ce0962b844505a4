"""Every transition is guarded: it moves a job only for the run, or the worker, that owns it."""

import json
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from msgspec.structs import replace
from sqlalchemy import Engine, delete, select, update
from sqlalchemy.orm import Session

from sqlalchemy_jobs import (
    Attempt,
    Job,
    JobState,
    WorkerRow,
    dialects,
    enqueue,
    enqueue_many,
    job,
    transitions,
)
from sqlalchemy_jobs.claims import Claim, Wanted
from sqlalchemy_jobs.transitions import Failure
from sqlalchemy_jobs.worker import leases
from sqlalchemy_jobs.worker.availability import Availability
from sqlalchemy_jobs.worker.control import Control
from tests.databases import Database

LEASE = timedelta(seconds=30)


@job("note")
@dataclass(frozen=True)
class Note:
    text: str = ""


class Bench:
    """A database with a few hands: every call is a transaction of its own."""

    def __init__(self, database: Database, engine: Engine | None = None) -> None:
        self.control = Control(engine or database.engine(), Availability())
        self.do = self.control.transaction

    def worker(self) -> uuid.UUID:
        return self.do(lambda session: leases.register(session, LEASE))

    def add(self, *payloads: Any, **options: Any) -> list[uuid.UUID]:
        return self.do(lambda session: enqueue_many(session, payloads or [Note()], **options))

    def claim(
        self, worker: uuid.UUID, total: int = 10, kinds: tuple[str, ...] = ("note",), **room: int
    ) -> list[Claim]:
        def claim(session: Session) -> list[Claim]:
            rooms = room or {"default": total}
            lanes = dialects.of(session).lanes(session, list(rooms))
            return transitions.claim(session, Wanted(worker, kinds, lanes, rooms, total))

        return self.do(claim)

    def job(self, job_id: uuid.UUID) -> Job:
        def read(session: Session) -> Job:
            found = session.get_one(Job, job_id)
            session.expunge(found)
            return found

        return self.do(read)

    def attempts(self, job_id: uuid.UUID) -> list[Attempt]:
        def read(session: Session) -> list[Attempt]:
            found = list(
                session.scalars(
                    select(Attempt).where(Attempt.job_id == job_id).order_by(Attempt.attempt)
                )
            )
            session.expunge_all()
            return found

        return self.do(read)

    def claimed(self, **options: Any) -> Claim:
        """One job, claimed by one worker."""
        self.add(**options)
        (claim,) = self.claim(self.worker())
        return claim

    def heartbeat(self, worker: uuid.UUID) -> datetime:
        return self.do(lambda session: session.get_one(WorkerRow, worker).heartbeat_at)

    def declare_dead(self, worker: uuid.UUID) -> dict[uuid.UUID, JobState] | None:
        seen = self.heartbeat(worker)
        return self.do(lambda session: transitions.rescue(session, worker, seen))


@pytest.fixture
def bench(database: Database) -> Iterator[Bench]:
    bench = Bench(database)
    yield bench
    bench.control.close()


BOOM = Failure("boom", "ValueError", "Traceback ...")

BY_A_RUN: dict[str, tuple[Callable[[Session, Claim], bool], JobState, int, str | None]] = {
    "complete": (transitions.complete, JobState.SUCCEEDED, 0, None),
    "complete with a result": (
        lambda session, claim: transitions.complete(session, claim, result={"n": [1, "ä"]}),
        JobState.SUCCEEDED,
        0,
        None,
    ),
    "snooze": (
        lambda session, claim: transitions.snooze(session, claim, delay=timedelta(hours=1)),
        JobState.READY,
        0,
        "snoozed",
    ),
    "cancel": (
        lambda session, claim: transitions.cancel(session, claim, reason="boom"),
        JobState.CANCELLED,
        0,
        "cancelled",
    ),
    "retry": (
        lambda session, claim: transitions.retry(
            session, claim, failure=BOOM, delay=timedelta(hours=1)
        ),
        JobState.READY,
        1,
        "failed",
    ),
    "fail": (
        lambda session, claim: transitions.fail(session, claim, failure=BOOM),
        JobState.FAILED,
        1,
        "failed",
    ),
    "release": (
        lambda session, claim: transitions.release(session, claim, reason="boom"),
        JobState.READY,
        0,
        "released",
    ),
}


@pytest.mark.parametrize("name", BY_A_RUN)
def test_the_owner_moves_its_job_once(bench: Bench, name: str) -> None:
    move, state, failures, outcome = BY_A_RUN[name]
    claim = bench.claimed()

    assert bench.do(lambda session: move(session, claim)) is True
    assert bench.do(lambda session: move(session, claim)) is False

    job = bench.job(claim.job_id)
    assert (job.state, job.worker_id, job.attempt, job.failures) == (state, None, 1, failures)
    assert (job.finished_at is not None) == (state != JobState.READY)
    assert job.result == ({"n": [1, "ä"]} if "result" in name else None)
    attempts = bench.attempts(claim.job_id)
    assert [each.outcome for each in attempts] == ([outcome] if outcome else [])
    for each in attempts:
        assert (each.attempt, each.worker_id) == (1, claim.worker_id)
        assert each.started_at and each.started_at <= each.finished_at
        assert each.message == (None if outcome == "snoozed" else "boom")


@pytest.mark.parametrize("name", [*BY_A_RUN, "discard"])
def test_nobody_else_moves_it(bench: Bench, name: str) -> None:
    """A wrong attempt or worker, and a job that is ready or final, stay as they are."""
    move = transitions.discard if name == "discard" else BY_A_RUN[name][0]
    claim = bench.claimed()
    for stranger in (
        replace(claim, attempt=2),
        replace(claim, attempt=0),
        replace(claim, worker_id=uuid.uuid4()),
        replace(claim, job_id=uuid.uuid4()),
    ):
        assert bench.do(lambda session, c=stranger: move(session, c)) is False  # type: ignore[misc]
    assert bench.job(claim.job_id).state == JobState.RUNNING
    for state in (JobState.READY, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED):
        bench.do(lambda s, v=state: s.execute(update(Job).values(state=v, worker_id=None)))  # type: ignore[misc]
        assert bench.do(lambda session: move(session, claim)) is False
        assert bench.job(claim.job_id).state == state
    assert bench.attempts(claim.job_id) == []


def test_discarding_deletes_what_is_owned_with_its_attempts_and_nothing_else(bench: Bench) -> None:
    bench.add(*[Note()] * 5)
    for claim in bench.claim(bench.worker()):
        bench.do(lambda session, c=claim: transitions.snooze(session, c, delay=timedelta(0)))  # type: ignore[misc]
    one, other, *many = bench.claim(bench.worker())
    strange = replace(many[0], attempt=1)

    assert bench.do(lambda session: transitions.discard(session, one)) is True
    assert bench.do(lambda session: transitions.discard(session, one)) is False
    done = bench.do(lambda session: transitions.discard_many(session, [strange, *many[1:]]))
    assert done == {each.job_id for each in many[1:]}
    left = {other.job_id, many[0].job_id}
    assert bench.do(lambda session: set(session.scalars(select(Job.id)))) == left
    assert bench.do(lambda session: set(session.scalars(select(Attempt.job_id)))) == left


def test_waits_are_counted_by_the_servers_clock(bench: Bench) -> None:
    claim = bench.claimed()
    before = bench.heartbeat(claim.worker_id)
    bench.do(lambda session: transitions.snooze(session, claim, delay=timedelta(hours=1)))
    wait = bench.job(claim.job_id).run_at - before
    assert timedelta(hours=1) <= wait < timedelta(hours=1, minutes=5)


# --- claim ----------------------------------------------------------------------------------------


def test_a_claim_takes_the_best_priority_then_the_longest_due(bench: Bench) -> None:
    now = datetime.now(UTC)
    late, early = (now - timedelta(minutes=each) for each in (1, 2))
    expected = [
        *bench.add(run_at=late, priority=-1),
        *bench.add(run_at=early),
        *bench.add(run_at=late),
        *bench.add(run_at=early, priority=7),
    ]
    worker = bench.worker()
    first = bench.claim(worker, 3)
    assert [each.job_id for each in first] == expected[:3]
    assert [each.job_id for each in bench.claim(worker)] == expected[3:]
    assert bench.claim(worker) == []


def test_a_claim_carries_what_a_run_needs(bench: Bench) -> None:
    (job_id,) = bench.add(Note("ä"), headers={"trace": "1"}, max_attempts=3)
    worker = bench.worker()
    (claim,) = bench.claim(worker)
    assert replace(claim, payload="", run_at=None) == Claim(
        job_id, 1, worker, "note", "default", "", 0, 3, {"trace": "1"}
    )
    assert json.loads(claim.payload) == {"text": "ä"}
    row = bench.job(job_id)
    assert (row.state, row.worker_id, row.attempt) == (JobState.RUNNING, worker, 1)
    assert row.started_at is not None


def test_jobs_that_are_not_due_not_ready_or_limited_are_not_claimed(bench: Bench) -> None:
    bench.add(delay=timedelta(hours=1))
    for values in (
        {"state": "succeeded"},
        {"state": "failed"},
        {"state": "cancelled"},
        {"state": "blocked"},
        {"limit_key": "account 7"},
    ):
        (job_id,) = bench.add()
        bench.do(lambda s, j=job_id, v=values: s.execute(update(Job).where(Job.id == j).values(v)))  # type: ignore[misc]
    assert bench.claim(bench.worker()) == []


def test_unknown_kinds_and_other_queues_are_left_alone(bench: Bench) -> None:
    bench.add(queue="other")
    bench.add()
    worker = bench.worker()
    assert bench.claim(worker, kinds=("something_else",)) == []
    assert bench.claim(worker, kinds=()) == []
    assert bench.claim(worker, total=5, NOTE=5) == []  # a queue's name is compared with its case
    assert len(bench.claim(worker)) == 1


def test_each_queue_has_room_of_its_own_and_the_total_bounds_them(bench: Bench) -> None:
    for queue in ("a", "b", "c"):
        for priority in (0, 5):
            bench.add(*[Note()] * 5, queue=queue, priority=priority)
    worker = bench.worker()
    taken = bench.claim(worker, total=9, a=2, b=7, c=7)
    counts = {queue: sum(each.queue == queue for each in taken) for queue in "abc"}
    assert sum(counts.values()) == 9
    assert counts["a"] <= 2 and counts["b"] <= 7 and counts["c"] <= 7


def test_a_worker_that_was_declared_dead_claims_nothing(bench: Bench) -> None:
    bench.add()
    worker = bench.worker()
    assert bench.declare_dead(worker) == {}
    assert bench.claim(worker) == []
    assert bench.do(lambda session: leases.renew(session, worker, LEASE)) is None
    assert len(bench.claim(bench.worker())) == 1


def test_a_million_ways_to_claim_at_once_give_each_job_to_one(bench: Bench) -> None:
    """Several workers claim at the same time: every job is claimed once, and none is left."""
    ids = bench.add(*[Note()] * 300)
    taken: list[Claim] = []
    start = threading.Barrier(4)

    def claim_all() -> None:
        worker = bench.worker()
        start.wait()
        empty = 0
        while empty < 3:  # what another one holds locked is skipped, so one empty claim says little
            got = bench.claim(worker, 7)
            taken.extend(got)
            empty = 0 if got else empty + 1

    threads = [threading.Thread(target=claim_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(each.job_id for each in taken) == sorted(ids)


# --- completing together ----------------------------------------------------------------------------


def test_runs_are_completed_together_and_only_those_that_are_owned(bench: Bench) -> None:
    bench.add(*[Note()] * 5)
    claims = bench.claim(bench.worker())
    retried, stolen, *rest = claims
    bench.do(lambda session: transitions.retry(session, retried, failure=BOOM, delay=timedelta(0)))
    bench.do(
        lambda s: s.execute(
            update(Job).where(Job.id == stolen.job_id).values(worker_id=uuid.uuid4())
        )
    )
    (again,) = bench.claim(rest[0].worker_id)
    assert again.attempt == 2
    done = bench.do(lambda session: transitions.complete_many(session, [*claims, again]))
    assert done == {each.job_id for each in (*rest, again)}
    assert {bench.job(each).state for each in done} == {JobState.SUCCEEDED}
    assert bench.job(stolen.job_id).state == JobState.RUNNING


def test_settling_never_waits_for_a_row_that_someone_holds(row_locks: Database) -> None:
    """A person's open transaction on one job delays neither the others nor the caller."""
    bench = Bench(row_locks)
    bench.add(Note(), Note(), Note())
    claims = bench.claim(bench.worker())
    held = claims[1]
    with Session(row_locks.engine()) as person:
        person.execute(update(Job).where(Job.id == held.job_id).values(state="cancelled"))
        done = bench.do(lambda session: transitions.complete_many(session, claims))
        assert done == {claims[0].job_id, claims[2].job_id}
        settled = bench.do(lambda s: transitions.settle(s, held, transitions.complete))
        assert settled is None
        person.rollback()
    assert bench.do(lambda s: transitions.settle(s, held, transitions.complete)) is True
    assert bench.do(lambda s: transitions.settle(s, held, transitions.complete)) is False
    bench.control.close()


# --- rescue -----------------------------------------------------------------------------------------


def test_a_rescue_brings_back_the_jobs_of_the_dead_and_no_others(bench: Bench) -> None:
    bench.add(*[Note()] * 3)
    dead, alive = bench.worker(), bench.worker()
    lost = bench.claim(dead, 2)
    kept = bench.claim(alive)
    assert bench.declare_dead(dead) == {each.job_id: JobState.READY for each in lost}
    for claim in lost:
        row = bench.job(claim.job_id)
        assert (row.state, row.worker_id, row.failures, row.crashes) == ("ready", None, 1, 1)
        assert [each.outcome for each in bench.attempts(claim.job_id)] == ["crashed"]
    assert bench.job(kept[0].job_id).state == JobState.RUNNING
    assert [each.attempt for each in bench.claim(alive)] == [2, 2]  # at once, without backoff
    assert bench.do(lambda session: transitions.complete(session, lost[0])) is False


def test_a_renewal_meanwhile_saves_the_suspect(bench: Bench) -> None:
    claim = bench.claimed()
    seen = bench.heartbeat(claim.worker_id)
    while bench.heartbeat(claim.worker_id) == seen:  # SQLite's clock has milliseconds
        assert bench.do(lambda session: leases.renew(session, claim.worker_id, LEASE)) is not None
    rescued = bench.do(lambda session: transitions.rescue(session, claim.worker_id, seen))
    assert rescued is None
    assert bench.job(claim.job_id).state == JobState.RUNNING


def test_a_job_that_kills_its_workers_fails_at_max_attempts(bench: Bench) -> None:
    bench.add(max_attempts=2)
    states = []
    for _ in range(2):
        worker = bench.worker()
        bench.do(lambda s: s.execute(update(Job).values(run_at=datetime(2020, 1, 1, tzinfo=UTC))))
        (claim,) = bench.claim(worker)
        bench.declare_dead(worker)
        states.append(bench.job(claim.job_id).state)
    assert states == [JobState.READY, JobState.FAILED]
    row = bench.job(claim.job_id)
    assert (row.failures, row.crashes) == (2, 2) and row.finished_at is not None


def test_a_rescue_waits_out_a_claim_in_flight(row_locks: Database) -> None:
    """A worker whose claim is not committed yet cannot be declared dead: no orphan is left behind."""
    bench = Bench(row_locks)
    bench.add()
    worker = bench.worker()
    seen = bench.heartbeat(worker)
    isolated = row_locks.engine(isolation_level="READ COMMITTED")
    with Session(isolated) as claiming:
        (claim,) = transitions.claim(
            claiming, Wanted(worker, ["note"], [("default", 0)], {"default": 1}, 1)
        )
        assert bench.do(lambda session: transitions.rescue(session, worker, seen)) is None
        claiming.commit()
    assert bench.do(lambda session: transitions.rescue(session, worker, seen)) == {
        claim.job_id: JobState.READY
    }
    bench.control.close()


def test_orphans_of_workers_that_are_dead_or_gone_are_found(bench: Bench) -> None:
    bench.add(*[Note()] * 3)
    dead, gone, alive = (bench.worker() for _ in range(3))
    for worker in (dead, gone, alive):
        assert len(bench.claim(worker, 1)) == 1
    bench.do(
        lambda s: s.execute(update(WorkerRow).where(WorkerRow.id == dead).values(state="dead"))
    )
    bench.do(lambda s: s.execute(delete(WorkerRow).where(WorkerRow.id == gone)))
    assert set(bench.do(transitions.orphaning_workers)) == {dead, gone}
    for worker in (dead, gone):
        assert len(bench.do(lambda s, w=worker: transitions.rescue_orphans(s, w))) == 1  # type: ignore[misc]
    assert bench.do(transitions.orphaning_workers) == []


def test_reconciliation_releases_what_the_worker_does_not_run(bench: Bench) -> None:
    """The reply to a claim was lost: the job is running under a worker that does not know of it."""
    bench.add(*[Note()] * 3)
    worker, other = bench.worker(), bench.worker()
    known, unknown = bench.claim(worker, 2)
    (foreign,) = bench.claim(other)
    released = bench.do(
        lambda s: transitions.release_unowned(s, worker, {(known.job_id, known.attempt)})
    )
    assert released == [unknown.job_id]
    row = bench.job(unknown.job_id)
    assert (row.state, row.worker_id, row.failures, row.attempt) == ("ready", None, 0, 1)
    for claim in (known, foreign):
        assert bench.job(claim.job_id).state == JobState.RUNNING


# --- leases -----------------------------------------------------------------------------------------


def test_a_lease_that_has_passed_is_found_by_the_servers_clock(bench: Bench) -> None:
    passed = bench.do(lambda session: leases.register(session, timedelta(microseconds=1)))
    me, other = bench.worker(), bench.worker()

    def expired() -> dict[uuid.UUID, bool]:
        assert bench.do(lambda session: leases.renew(session, me, LEASE))
        return {each.id: each.has_expired for each in bench.do(lambda s: leases.look(s, me))}

    while (found := expired()) == {passed: False, other: False}:
        pass  # the server's clock goes on by itself
    assert found == {passed: True, other: False}


def test_rows_of_the_long_dead_go_when_no_job_is_left(bench: Bench) -> None:
    long_ago = datetime.now(UTC) - timedelta(days=2)
    bench.add()
    busy, done, lately, alive = (bench.worker() for _ in range(4))
    bench.claim(busy)

    def bury(session: Session) -> None:
        for worker, state, seen in (
            (busy, "dead", long_ago),
            (done, "dead", long_ago),
            (lately, "dead", datetime.now(UTC)),
            (alive, "alive", long_ago),
        ):
            row = session.get_one(WorkerRow, worker)
            row.state, row.heartbeat_at = state, seen

    bench.do(bury)
    bench.do(leases.forget_dead)
    left = bench.do(lambda session: set(session.scalars(select(WorkerRow.id))))
    assert left == {busy, lately, alive}


def test_a_job_made_and_added_by_hand_is_what_enqueue_many_makes(bench: Bench) -> None:
    bench.do(lambda session: session.add(enqueue(Note("x"), queue="a", tags=["t"])))
    bench.add(Note("x"), queue="a", tags=["t"])
    one, two = bench.do(
        lambda s: [
            {c.name: getattr(row, c.name) for c in Job.__table__.columns}
            for row in s.scalars(select(Job))
        ]
    )
    for own in ("id", "run_at", "created_at"):
        one.pop(own), two.pop(own)
    assert one == two
