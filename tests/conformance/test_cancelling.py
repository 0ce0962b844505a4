"""Who cancels a job, or has it run again, wins or loses against its run; nothing is done by halves."""

import asyncio
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from sqlalchemy_jobs import (
    Job,
    JobApp,
    JobState,
    cancel,
    current_run,
    enqueue,
    errors,
    job,
    requeue,
    transitions,
)
from sqlalchemy_jobs.claims import Claim, Wanted
from sqlalchemy_jobs.transitions import Failure
from sqlalchemy_jobs.worker import leases, timeouts
from tests.databases import Database
from tests.domain import Effect
from tests.locks import until_somebody_waits

WAIT = 20
QUICK = timedelta(seconds=0.05)


@job("work")
@dataclass(frozen=True)
class Work:
    n: int = 0


class Bench:
    """A database with a few hands; every call is a transaction of its own."""

    def __init__(self, database: Database) -> None:
        self.sessions = database.sessions(expire_on_commit=False)

    def do(self, work: Callable[[Session], Any]) -> Any:
        with self.sessions.begin() as session:
            return work(session)

    def add(self, payload: Any = Work(), **options: Any) -> uuid.UUID:
        made = enqueue(payload, **options)
        job_id = made.id
        self.do(lambda session: session.add(made))
        return job_id

    def claim(self) -> Claim:
        def claim(session: Session) -> Claim:
            worker = leases.register(session, timedelta(seconds=30))
            wanted = Wanted(worker, ["work"], [("default", 0)], {"default": 1}, 1)
            (claimed,) = transitions.claim(session, wanted)
            return claimed

        claimed: Claim = self.do(claim)
        return claimed

    def row(self, job_id: uuid.UUID) -> Job:
        with self.sessions() as session:
            found = session.get_one(Job, job_id)
            _ = found.attempts
            return found

    def attempts(self, job_id: uuid.UUID) -> list[tuple[int, str, str | None]]:
        return [(each.attempt, each.outcome, each.message) for each in self.row(job_id).attempts]

    def effects(self) -> list[str]:
        with self.sessions() as session:
            return list(session.scalars(select(Effect.note)))

    def wait_for(self, job_id: uuid.UUID, state: JobState) -> None:
        end = time.monotonic() + WAIT
        while (found := self.row(job_id).state) != state:
            assert time.monotonic() < end, found
            time.sleep(0.02)


@pytest.fixture
def bench(database: Database) -> Bench:
    return Bench(database)


@pytest.fixture
def elsewhere() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


# --- cancel -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [JobState.READY, JobState.BLOCKED])
def test_a_job_that_waits_is_cancelled_without_an_attempt(bench: Bench, state: JobState) -> None:
    job_id = bench.add()
    bench.do(lambda session: session.execute(update(Job).values(state=state)))
    assert bench.do(lambda session: cancel(session, job_id, "why")) is True
    row = bench.row(job_id)
    assert (row.state, row.worker_id, row.attempts) == ("cancelled", None, [])
    assert row.finished_at is not None
    assert bench.do(lambda session: cancel(session, job_id)) is False


def test_a_running_job_is_cancelled_with_an_attempt_and_its_run_can_do_nothing(
    bench: Bench,
) -> None:
    job_id = bench.add()
    claim = bench.claim()
    assert bench.do(lambda session: cancel(session, job_id, "why\0")) is True
    row = bench.row(job_id)
    assert (row.state, row.worker_id, row.attempt, row.failures) == ("cancelled", None, 1, 0)
    assert bench.attempts(job_id) == [(1, "cancelled", "why\\0")]
    assert row.attempts[0].worker_id == claim.worker_id
    assert row.attempts[0].started_at is not None
    for move in (
        transitions.complete,
        lambda session, claim: transitions.fail(session, claim, failure=Failure("x")),
        lambda session, claim: transitions.release(session, claim, reason="x"),
    ):
        assert bench.do(lambda session, m=move: m(session, claim)) is False  # type: ignore[misc]
    assert bench.do(lambda session: transitions.complete_many(session, [claim, claim])) == set()
    assert len(bench.attempts(job_id)) == 1


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED])
def test_a_final_job_and_one_that_does_not_exist_are_not_cancelled(
    bench: Bench, state: JobState
) -> None:
    job_id = bench.add()
    bench.do(lambda session: session.execute(update(Job).values(state=state)))
    assert bench.do(lambda session: cancel(session, job_id)) is False
    assert bench.do(lambda session: cancel(session, uuid.uuid4())) is False
    assert bench.row(job_id).state == state


def test_it_is_the_callers_transaction(bench: Bench) -> None:
    job_id = bench.add()
    bench.claim()
    with bench.sessions() as session:
        assert cancel(session, job_id)
        session.rollback()
    assert (bench.row(job_id).state, bench.attempts(job_id)) == ("running", [])


def test_a_job_that_was_added_in_the_same_session_is_found_and_its_object_is_fresh(
    bench: Bench,
) -> None:
    with bench.sessions.begin() as session:
        made = enqueue(Work())
        session.add(made)
        assert cancel(session, made.id)
        assert (made.state, made.worker_id) == ("cancelled", None)
        assert requeue(session, made.id)
        assert (made.state, made.finished_at) == ("ready", None)


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a_completion_waits_for_an_open_cancel(
    row_locks: Database, elsewhere: ThreadPoolExecutor, end: str
) -> None:
    bench = Bench(row_locks)
    job_id = bench.add()
    claim = bench.claim()

    def complete(session: Session) -> bool:
        session.add(Effect(note="done"))
        session.flush()
        done = transitions.complete(session, claim)
        if not done:
            session.rollback()  # as the worker does
        return done

    with bench.sessions() as session:
        assert cancel(session, job_id, "why")
        completing = elsewhere.submit(bench.do, complete)
        until_somebody_waits(row_locks)
        getattr(session, end)()
    assert completing.result(WAIT) is (end == "rollback")
    assert bench.row(job_id).state == ("cancelled" if end == "commit" else "succeeded")
    assert bench.attempts(job_id) == ([(1, "cancelled", "why")] if end == "commit" else [])
    assert bench.effects() == ([] if end == "commit" else ["done"])


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a_cancel_waits_for_an_open_completion(
    row_locks: Database, elsewhere: ThreadPoolExecutor, end: str
) -> None:
    bench = Bench(row_locks)
    job_id = bench.add()
    claim = bench.claim()
    with bench.sessions() as session:
        session.add(Effect(note="done"))
        session.flush()
        assert transitions.complete(session, claim)
        cancelling = elsewhere.submit(bench.do, lambda other: cancel(other, job_id, "why"))
        until_somebody_waits(row_locks)
        getattr(session, end)()
    assert cancelling.result(WAIT) is (end == "rollback")
    assert bench.row(job_id).state == ("succeeded" if end == "commit" else "cancelled")
    assert bench.attempts(job_id) == ([] if end == "commit" else [(1, "cancelled", "why")])
    assert bench.effects() == (["done"] if end == "commit" else [])


def test_a_cancel_waits_for_a_claim_in_flight_and_cancels_its_run(
    row_locks: Database, elsewhere: ThreadPoolExecutor
) -> None:
    bench = Bench(row_locks)
    job_id = bench.add()
    worker = bench.do(lambda session: leases.register(session, timedelta(seconds=30)))
    isolated = row_locks.engine(isolation_level="READ COMMITTED")
    with Session(isolated) as claiming:
        wanted = Wanted(worker, ["work"], [("default", 0)], {"default": 1}, 1)
        (claim,) = transitions.claim(claiming, wanted)
        cancelling = elsewhere.submit(bench.do, lambda other: cancel(other, job_id, "why"))
        until_somebody_waits(row_locks)
        claiming.commit()
    assert cancelling.result(WAIT) is True
    assert bench.attempts(job_id) == [(1, "cancelled", "why")]
    assert bench.do(lambda session: transitions.complete(session, claim)) is False


# --- the run learns of it ---------------------------------------------------------------------------


def ended_without_a_trace(bench: Bench, job_id: uuid.UUID) -> None:
    """Of a cancelled run nothing is left but the attempt that the cancel wrote."""
    row = bench.row(job_id)
    assert (row.state, row.attempt, row.failures) == ("cancelled", 1, 0)
    assert bench.attempts(job_id) == [(1, "cancelled", "enough")]
    assert bench.effects() == []


@pytest.mark.parametrize("ending", ["returns", "raises"])
def test_a_sync_handler_is_interrupted(database: Database, ending: str) -> None:
    bench = Bench(database)
    jobs = JobApp(bench.sessions)
    started, ended = threading.Event(), threading.Event()

    @jobs.handler(Work)
    def handle(session: Session, payload: Work) -> None:
        if payload.n == 0:
            started.set()
            end = time.monotonic() + WAIT
            try:
                while time.monotonic() < end:
                    time.sleep(0.01)
            except errors.RunInterrupted:
                if current_run().should_stop:
                    ended.set()
            session.add(Effect(note="never"))
            session.flush()
            if ending == "raises":
                raise RuntimeError("stopped")

    job_id = bench.add()
    with jobs.worker(concurrency=1, poll_interval=QUICK):
        assert started.wait(WAIT)
        assert bench.do(lambda session: cancel(session, job_id, "enough"))
        assert ended.wait(WAIT)
        bench.wait_for(bench.add(Work(1)), JobState.SUCCEEDED)  # its slot is free again
    ended_without_a_trace(bench, job_id)


def test_the_statement_of_a_cancelled_suspect_is_cancelled_and_its_worker_free(
    row_locks: Database,
) -> None:
    """A suspect runs alone: nothing else is claimed before it has ended."""
    bench = Bench(row_locks)
    jobs = JobApp(bench.sessions)
    started = threading.Event()
    minutes = "SELECT pg_sleep(600)" if row_locks.name == "postgresql" else "SELECT SLEEP(600)"

    @jobs.handler(Work)
    def handle(session: Session, payload: Work) -> None:
        if payload.n == 0:
            started.set()
            session.execute(text(minutes))

    job_id = bench.add()
    bench.do(lambda session: session.execute(update(Job).values(crashes=2)))
    with jobs.worker(concurrency=2, poll_interval=QUICK):
        assert started.wait(WAIT)
        assert bench.do(lambda session: cancel(session, job_id, "enough"))
        bench.wait_for(bench.add(Work(1)), JobState.SUCCEEDED)
    ended_without_a_trace(bench, job_id)


def test_a_cancelled_handler_that_hangs_gives_its_slot_up(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeouts, "GRACE", 0.1)
    bench = Bench(database)
    jobs = JobApp(bench.sessions)
    started, hang = threading.Event(), threading.Lock()
    hanging: list[threading.Thread] = []

    @jobs.handler(Work)
    def handle(session: Session, payload: Work) -> None:
        if payload.n == 0:
            hanging.append(threading.current_thread())
            started.set()
            with hang:
                session.add(Effect(note="never"))

    job_id = bench.add()
    with hang, jobs.worker(concurrency=1, poll_interval=QUICK):
        assert started.wait(WAIT)
        assert bench.do(lambda session: cancel(session, job_id, "enough"))
        bench.wait_for(bench.add(Work(1)), JobState.SUCCEEDED)
    hanging[0].join(WAIT)
    ended_without_a_trace(bench, job_id)


def test_an_async_handler_is_cancelled_once(database: Database) -> None:
    bench = Bench(database)
    started, ended = threading.Event(), threading.Event()
    cleaned_up: list[bool] = []

    async def main() -> None:
        engine = database.async_engine(poolclass=NullPool)
        jobs = JobApp(async_sessionmaker(engine))

        @jobs.handler(Work)
        async def handle(session: AsyncSession, payload: Work) -> None:
            if payload.n == 1:
                return
            started.set()
            try:
                await asyncio.sleep(WAIT)
            except asyncio.CancelledError:
                await asyncio.sleep(0.6)  # a second cancellation would cut this short
                cleaned_up.append(current_run().should_stop)
                raise
            finally:
                ended.set()

        async with jobs.worker(concurrency=1, poll_interval=QUICK):
            assert await asyncio.to_thread(started.wait, WAIT)
            await asyncio.to_thread(bench.do, lambda session: cancel(session, job_id, "enough"))
            assert await asyncio.to_thread(ended.wait, WAIT)
            other = await asyncio.to_thread(bench.add, Work(1))
            await asyncio.to_thread(bench.wait_for, other, JobState.SUCCEEDED)
        await engine.dispose()

    job_id = bench.add()
    asyncio.run(main())
    assert cleaned_up == [True]
    ended_without_a_trace(bench, job_id)


def test_a_manual_handler_cannot_commit_any_more(database: Database) -> None:
    bench = Bench(database)
    jobs = JobApp(bench.sessions)
    started, go = threading.Event(), threading.Event()
    refused: list[Exception] = []

    @jobs.handler(Work, transaction="manual")
    def handle(session: Session, payload: Work) -> None:
        started.set()
        assert go.wait(WAIT)
        session.add(Effect(note="never"))
        try:
            session.commit()
        except errors.LeaseLost as error:
            refused.append(error)
            raise

    job_id = bench.add()
    with jobs.worker(concurrency=1, poll_interval=QUICK):
        assert started.wait(WAIT)
        assert bench.do(lambda session: cancel(session, job_id, "enough"))
        go.set()
    assert len(refused) == 1
    ended_without_a_trace(bench, job_id)


# --- requeue ----------------------------------------------------------------------------------------


def test_a_failed_job_begins_afresh(bench: Bench) -> None:
    job_id = bench.add(max_attempts=1)
    claim = bench.claim()
    bench.do(lambda session: transitions.fail(session, claim, failure=Failure("boom")))
    assert bench.do(lambda session: requeue(session, job_id)) is True
    row = bench.row(job_id)
    assert (row.state, row.attempt, row.failures, row.crashes) == ("ready", 1, 0, 0)
    assert (row.finished_at, row.worker_id) == (None, None)
    again = bench.claim()  # due at once, by the server's clock
    assert again.attempt == 2
    assert bench.do(lambda session: transitions.complete(session, claim)) is False
    assert bench.do(lambda session: transitions.complete(session, again)) is True
    assert [each[:2] for each in bench.attempts(job_id)] == [(1, "failed")]


def test_a_result_of_an_earlier_life_is_forgotten(bench: Bench) -> None:
    job_id = bench.add()
    claim = bench.claim()
    bench.do(lambda session: transitions.complete(session, claim, result=7))
    assert bench.do(lambda session: requeue(session, job_id)) is True
    assert bench.row(job_id).result is None


def test_it_may_be_for_later(bench: Bench) -> None:
    job_id = bench.add()
    bench.do(lambda session: cancel(session, job_id))
    later = datetime(2100, 1, 1, tzinfo=UTC)
    assert bench.do(lambda session: requeue(session, job_id, run_at=later)) is True
    assert bench.row(job_id).run_at == later
    with pytest.raises(errors.EnqueueError, match="no time zone"):
        bench.do(lambda session: requeue(session, job_id, run_at=datetime(2100, 1, 1)))  # noqa: DTZ001


@pytest.mark.parametrize("state", [JobState.READY, JobState.RUNNING, JobState.BLOCKED])
def test_only_a_final_job_is_requeued(bench: Bench, state: JobState) -> None:
    job_id = bench.add()
    bench.do(lambda session: session.execute(update(Job).values(state=state)))
    assert bench.do(lambda session: requeue(session, job_id)) is False
    assert bench.do(lambda session: requeue(session, uuid.uuid4())) is False
    assert bench.row(job_id).state == state


def test_a_cancelled_run_that_is_requeued_at_once_does_not_come_back(bench: Bench) -> None:
    """The old run finds its job ready, then running under another attempt: neither is its own."""
    job_id = bench.add()
    old = bench.claim()
    bench.do(lambda s: (cancel(s, job_id), requeue(s, job_id)))
    assert bench.do(lambda session: transitions.complete(session, old)) is False
    new = bench.claim()
    assert bench.do(lambda session: transitions.complete(session, old)) is False
    assert bench.do(lambda session: transitions.complete(session, new)) is True
    assert bench.attempts(job_id) == [(1, "cancelled", "")]


def test_of_many_runs_those_whose_jobs_were_taken_from_them_are_told(bench: Bench) -> None:
    for _ in range(5):
        bench.add()
    running, done, cancelled, requeued, rescued = (bench.claim() for _ in range(5))
    bench.do(lambda session: transitions.complete(session, done))
    bench.do(lambda session: cancel(session, cancelled.job_id))
    bench.do(lambda s: (cancel(s, requeued.job_id), requeue(s, requeued.job_id)))
    bench.do(lambda session: transitions.rescue_orphans(session, rescued.worker_id))
    gone = Claim(uuid.uuid4(), 1, running.worker_id)
    runs = [running, done, cancelled, requeued, rescued, gone]
    lost = bench.do(lambda session: transitions.lost_of(session, runs))
    assert lost == [cancelled, requeued, rescued, gone]
