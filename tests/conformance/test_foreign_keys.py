"""A table of the user's refers to jobs: what that refuses or locks holds up nothing else."""

import json
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
from sqlalchemy import (
    Column,
    ForeignKey,
    Integer,
    MetaData,
    Table,
    delete,
    event,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.orm import Session, sessionmaker

from sqlalchemy_jobs import (
    Job,
    JobApp,
    JobState,
    Unique,
    WorkerRow,
    cancel,
    job,
    retention,
    transitions,
)
from sqlalchemy_jobs.claims import Claim, Wanted
from sqlalchemy_jobs.runs import Run
from sqlalchemy_jobs.transitions import Failure
from sqlalchemy_jobs.worker import maintenance
from sqlalchemy_jobs.worker.leases import Lease
from sqlalchemy_jobs.worker.maintenance import Maintenance
from sqlalchemy_jobs.worker.settings import Settings
from sqlalchemy_jobs.worker.settling import Settler
from tests.conformance.test_transitions import LEASE, Bench, Note
from tests.databases import Database
from tests.locks import until_somebody_waits
from tests.waiting import until

RECEIPTS = Table(
    "receipt",
    MetaData(),
    Column("id", Integer, primary_key=True),
    Column("job_id", ForeignKey(Job.id)),  # no ON DELETE: the job's row cannot be deleted
)


class Referenced(Bench):
    """Jobs, and receipts that refer to them; SQLite enforces that here, as the others do."""

    def __init__(self, database: Database) -> None:
        self.engine = database.engine()
        if database.name == "sqlite":
            event.listen(self.engine, "connect", _enforce)
        super().__init__(database, self.engine)

    def refer(self, session: Session, ids: list[uuid.UUID]) -> None:
        session.execute(insert(RECEIPTS), [{"job_id": job_id} for job_id in ids])

    def states(self) -> dict[uuid.UUID, str]:
        found = self.do(lambda session: session.execute(select(Job.id, Job.state)).all())
        return {row.id: row.state for row in found}


@job("keyed", unique=Unique())
@dataclass(frozen=True)
class Keyed:
    n: int = 0


@job("ready_only", unique=Unique(states=[JobState.READY]))
@dataclass(frozen=True)
class ReadyOnly:
    n: int = 0


KEY_SHARE: dict[str, Any] = {"read": True, "key_share": True}


def _enforce(connection: Any, record: Any) -> None:
    connection.execute("PRAGMA foreign_keys = ON")


def referenced(database: Database) -> Iterator[Referenced]:
    bench = Referenced(database)
    RECEIPTS.create(bench.engine)
    yield bench
    bench.control.close()
    RECEIPTS.drop(bench.engine)


@pytest.fixture
def bench(database: Database) -> Iterator[Referenced]:
    yield from referenced(database)


def test_old_jobs_that_a_foreign_key_keeps_do_not_hold_up_the_others(
    bench: Referenced, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor whatever else is to be done: the step of the loop goes on, and says it once for the kind."""
    monkeypatch.setattr(maintenance, "PRUNE", 0.0)
    step = maintaining(bench).step
    kept = add_old(bench, "a_kept", 2)
    bench.do(lambda session: bench.refer(session, kept))
    for _ in range(3):
        add_old(bench, "b_free", 1)
        step()
        assert set(bench.states()) == set(kept)
    told = [each for each in caplog.messages if "cannot be deleted" in each]
    assert len(told) == 1 and '"a_kept"' in told[0]


def maintaining(bench: Referenced) -> Maintenance:
    lease = Lease(bench.control, LEASE, [], [], lambda: None, lambda reason, *, dead: None)
    return Maintenance(bench.control, lease, LEASE, {}, Settings(), lambda: None)


def add_old(bench: Referenced, kind: str, count: int, days: int = 99) -> list[uuid.UUID]:
    """Add jobs that ended at one instant."""
    one = {
        "kind": kind,
        "state": "succeeded",
        "finished_at": datetime.now(UTC) - timedelta(days=days),
        "payload": {},
    }
    rows = [one | {"id": uuid.uuid4()} for _ in range(count)]
    bench.do(lambda session: session.execute(insert(Job), rows))
    return [row["id"] for row in rows]


def test_old_jobs_that_a_foreign_key_keeps_do_not_hold_up_those_of_their_kind(
    bench: Referenced, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither one that is in the midst of others, nor more of them in a row than a batch holds."""
    monkeypatch.setattr(maintenance, "PRUNE", 0.0)
    monkeypatch.setattr(maintenance, "PRUNE_FOR", 120.0)
    monkeypatch.setattr(retention, "BATCH", 8)
    old, *_ = add_old(bench, "mixed", 20, days=99)
    kept = [old, *add_old(bench, "mixed", 20, days=98), *add_old(bench, "mixed", 1, days=97)]
    add_old(bench, "mixed", 20, days=96)
    bench.do(lambda session: bench.refer(session, kept))
    maintenance_of_a_day = maintaining(bench)
    maintenance_of_a_day.step()
    assert set(bench.states()) == set(kept)

    add_old(bench, "mixed", 1, days=95)
    bench.do(lambda session: session.execute(delete(RECEIPTS).where(RECEIPTS.c.job_id != old)))
    maintenance_of_a_day.step()
    assert set(bench.states()) == set(kept)  # not tried again so soon
    maintaining(bench).step()
    assert set(bench.states()) == {old}


@pytest.fixture
def locking(row_locks: Database) -> Iterator[Referenced]:
    yield from referenced(row_locks)


@contextmanager
def referring(bench: Referenced, ids: list[uuid.UUID]) -> Iterator[Callable[..., Any]]:
    """Yields `do` while an open transaction refers to the jobs; what waits for that one is an error."""
    name = bench.engine.dialect.name
    limit = "lock_timeout = '20s'" if name == "postgresql" else "innodb_lock_wait_timeout = 20"

    def do(work: Callable[[Session], Any]) -> Any:
        def limited(session: Session) -> Any:
            session.execute(text(f"SET SESSION {limit}"))
            return work(session)

        return bench.do(limited)

    with Session(bench.engine) as open_transaction:
        bench.refer(open_transaction, ids)
        yield do


def settle(transition: Any) -> Callable[[Session, list[Claim]], set[uuid.UUID]]:
    """One by one, with the interface of complete_many."""
    return lambda session, claims: {
        claim.job_id for claim in claims if transitions.settle(session, claim, transition)
    }


ENDS = {
    "complete_many": (transitions.complete_many, True),
    "complete": (settle(transitions.complete), True),
    "fail": (settle(partial(transitions.fail, failure=Failure("no"))), True),
    "discard_many": (transitions.discard_many, False),
    "discard": (settle(transitions.discard), False),
}


@pytest.mark.parametrize("name", ENDS)
def test_the_end_of_a_run_does_not_wait_for_who_refers_to_its_job(
    locking: Referenced, name: str
) -> None:
    """PostgreSQL lets a row change that is referred to, but not its keys: unique_slot is one."""
    end, keeps_the_row = ENDS[name]
    plain, keyed, plain_free, keyed_free = ids = locking.add(Note(), Keyed(1), Note(), Keyed(2))
    claims = locking.claim(locking.worker(), kinds=("note", "keyed"))
    with referring(locking, [plain, keyed]) as do:
        done = do(lambda session: end(session, claims))
    passes = keeps_the_row and locking.engine.dialect.name == "postgresql"
    assert done == {plain_free, keyed_free} | ({plain} if passes else set())
    assert done | locking.do(lambda session: end(session, claims)) == set(ids)


def test_a_worker_claims_past_a_job_that_gives_up_its_slot_and_is_referred_to(
    locking: Referenced,
) -> None:
    app: JobApp[Any, Any] = JobApp(sessionmaker(locking.engine))
    app.handler(ReadyOnly)(lambda session, payload: None)
    app.handler(Note)(lambda session, payload: None)
    held, free, note = ids = [*locking.add(ReadyOnly(1), ReadyOnly(2)), *locking.add(Note())]
    with Session(locking.engine) as other:
        locking.refer(other, [held])
        with app.worker():
            until(lambda: locking.states() == {held: "ready", free: "succeeded", note: "succeeded"})
            other.rollback()
            until(lambda: locking.states() == dict.fromkeys(ids, "succeeded"))


@pytest.mark.parametrize(
    "meanwhile", ["nothing", "changed", "later", "ended", "referred to", "changed and referred to"]
)
def test_what_happens_to_such_a_job_in_the_midst_of_a_claim(
    postgresql: Database, meanwhile: str
) -> None:
    """The claim waits for the worker's row, so it has its picture of the jobs and none of them locked yet."""
    bench = Bench(postgresql)
    first, job_id, last = bench.add(*(ReadyOnly(n) for n in range(3)))
    worker = bench.worker()
    wanted = Wanted(worker, ["ready_only"], [("default", 0)], {"default": 3}, 3, free_slots=True)
    with (
        Session(postgresql.engine()) as holder,
        Session(postgresql.engine()) as other,
        ThreadPoolExecutor() as pool,
    ):
        holder.execute(select(WorkerRow.id).where(WorkerRow.id == worker).with_for_update()).all()
        claim = pool.submit(bench.do, lambda session: transitions.claim(session, wanted))
        until_somebody_waits(postgresql)
        if "changed" in meanwhile:
            other.execute(update(Job).where(Job.id == job_id).values(payload={"n": 7}))
        if meanwhile == "later":
            in_an_hour = datetime.now(UTC) + timedelta(hours=1)
            other.execute(update(Job).where(Job.id == job_id).values(run_at=in_an_hour))
        if meanwhile == "ended":
            assert cancel(other, job_id)
        other.commit()
        if "referred to" in meanwhile:
            other.execute(select(Job.id).where(Job.id == job_id).with_for_update(**KEY_SHARE)).all()
        holder.rollback()
        got = {each.job_id: json.loads(each.payload)["n"] for each in claim.result(60)}
    expected = {first: 0, job_id: 7 if meanwhile == "changed" else 1, last: 2}
    if meanwhile not in ("nothing", "changed"):
        del expected[job_id]
    assert got == expected
    bench.control.close()


def test_a_rescue_does_not_wait_for_who_refers_to_a_job(locking: Referenced) -> None:
    plain, again, last, free = ids = [
        *locking.add(Note(), Keyed(1)),
        *locking.add(Keyed(2), Keyed(3), max_attempts=1),
    ]
    worker = locking.worker()
    assert len(locking.claim(worker, kinds=("note", "keyed"))) == 4
    seen = locking.heartbeat(worker)
    with referring(locking, [plain, again, last]) as do:
        rescued = do(lambda session: transitions.rescue(session, worker, seen))
    passing = {plain, again} if locking.engine.dialect.name == "postgresql" else set()
    assert rescued.keys() == {free} | passing
    rest = locking.do(lambda session: transitions.rescue_orphans(session, worker))
    assert rescued.keys() | rest.keys() == set(ids)


def test_jobs_that_cannot_be_rescued_yet_do_not_hold_up_the_others(
    locking: Referenced, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many they are: a rescue takes so many jobs, not so many of the first ones."""
    monkeypatch.setattr(transitions, "RESCUE_BATCH", 2)
    held = locking.add(*(Keyed(n) for n in range(3)), max_attempts=1)
    others = [*locking.add(Note()), *locking.add(Note(), Keyed(3), max_attempts=1)]
    worker = locking.worker()
    assert len(locking.claim(worker, kinds=("note", "keyed"))) == 6
    seen = locking.heartbeat(worker)
    rescued: set[uuid.UUID] = set()
    with referring(locking, held) as do:
        rescued |= do(lambda session: transitions.rescue(session, worker, seen)).keys()
        rescued |= do(lambda session: transitions.rescue_orphans(session, worker)).keys()
    assert rescued == set(others)
    for _ in range(2):
        rescued |= locking.do(lambda s: transitions.rescue_orphans(s, worker)).keys()
    assert rescued == {*others, *held}


def test_ends_that_a_foreign_key_refuses_do_not_hold_up_the_others(bench: Referenced) -> None:
    ids = bench.add(*[Note()] * 4)
    bench.do(lambda session: bench.refer(session, ids[:2]))
    runs = {claim.job_id: Run(claim) for claim in bench.claim(bench.worker())}
    settled: list[Run] = []
    settler = Settler(bench.control, settled.extend)
    for job_id in ids[:3]:
        settler.put(runs[job_id], transitions.discard)
    settler.put(runs[ids[3]], transitions.complete)
    settler.step()
    assert {run.job_id for run in settled} == set(ids)
    states = bench.states()
    assert ids[2] not in states and states[ids[3]] == JobState.SUCCEEDED
    assert {states[job_id] for job_id in ids[:2]} == {JobState.FAILED}
