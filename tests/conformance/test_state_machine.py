"""Any interleaving of transitions, by several workers and people, does to the rows what it does to a small model."""

import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import delete, func, select
from sqlalchemy.orm import sessionmaker

from sqlalchemy_jobs import (
    Attempt,
    Job,
    WorkerRow,
    cancel,
    dialects,
    enqueue,
    job,
    requeue,
    transitions,
)
from sqlalchemy_jobs.claims import ALONE_FROM, Claim, Wanted
from sqlalchemy_jobs.transitions import Failure
from sqlalchemy_jobs.worker import leases
from tests.databases import Database
from tests.domain import Effect

FINAL = ("succeeded", "failed", "cancelled")
NOW = timedelta(0)
BOOM = Failure("boom", "ValueError")


@job("note")
@dataclass(frozen=True)
class Note:
    pass


@dataclass
class Model:
    """A job as it should be."""

    max_attempts: int
    state: str = "ready"
    attempt: int = 0
    failures: int = 0
    crashes: int = 0
    worker: uuid.UUID | None = None
    effects: int = 0
    waits: bool = False
    """Whether it is put off for longer than the test takes."""

    def owned_by(self, claim: Claim) -> bool:
        return (self.attempt, self.worker) == (claim.attempt, claim.worker_id)

    def succeeded_by(self, claim: Claim) -> bool:
        return (self.state, self.attempt) == ("succeeded", claim.attempt)

    def leave(self, state: str, *, effect: bool = False, failed: bool = False) -> None:
        self.failures += failed
        self.state = state
        self.worker = None
        self.effects += effect

    def crash(self) -> None:
        self.leave("failed" if self.failures + 1 >= self.max_attempts else "ready", failed=True)
        self.waits = self.state == "ready" and self.crashes > 0
        self.crashes += 1


class Life(RuleBasedStateMachine):
    """Claims are never forgotten: each is tried again and again, long after another run owns the job."""

    jobs = Bundle("jobs")
    workers = Bundle("workers")
    claims = Bundle("claims")

    def __init__(self, database: Database, sessions: "sessionmaker[Any]") -> None:
        super().__init__()
        self.sessions = sessions
        self.models: dict[uuid.UUID, Model] = {}
        self.dead: set[uuid.UUID] = set()
        self.started = 0
        with sessions.begin() as session:
            for table in (Attempt, Effect, Job, WorkerRow):
                session.execute(delete(table))

    @initialize(target=workers)
    def first_worker(self) -> uuid.UUID:
        return self.start()

    @initialize(target=jobs)
    def first_job(self) -> uuid.UUID:
        return self.enqueue(max_attempts=4, rolled_back=False)

    @precondition(lambda self: self.started < 3)
    @rule(target=workers)
    def start(self) -> uuid.UUID:
        self.started += 1
        with self.sessions.begin() as session:
            return leases.register(session, timedelta(minutes=5), (), ["note"])

    @precondition(lambda self: len(self.models) < 4)
    @rule(target=jobs, max_attempts=st.integers(1, 4), rolled_back=st.booleans())
    def enqueue(self, max_attempts: int, rolled_back: bool) -> uuid.UUID:
        with self.sessions() as session:
            session.add(made := enqueue(Note(), max_attempts=max_attempts))
            job_id = made.id
            session.flush()
            if not rolled_back:
                self.models[job_id] = Model(max_attempts)
                session.commit()
        return job_id

    @rule(target=claims, worker=workers, most=st.integers(1, 3))
    def claim(self, worker: uuid.UUID, most: int) -> Any:
        with self.sessions.begin() as session:
            lanes = dialects.of(session).lanes(session, ())
            taken = transitions.claim(
                session, Wanted(worker, ["note"], lanes, {"default": most}, most)
            )
        due = [
            each
            for each in self.models.values()
            if each.state == "ready" and not each.waits and each.crashes < ALONE_FROM
        ]
        assert len(taken) == (0 if worker in self.dead else min(most, len(due)))
        for claim in taken:
            model = self.models[claim.job_id]
            assert model in due
            model.state, model.worker = "running", worker
            model.attempt += 1
            assert (claim.attempt, claim.failures) == (model.attempt, model.failures)
        return multiple(*taken)

    @rule(claim=claims, how=st.sampled_from(["complete", "cancel", "fail"]))
    def finish(self, claim: Claim, how: str) -> None:
        self.end(claim, how)

    @rule(claim=claims, how=st.sampled_from(["snooze", "retry", "release"]))
    def give_back(self, claim: Claim, how: str) -> None:
        self.end(claim, how)

    def end(self, claim: Claim, how: str) -> None:
        model = self.models[claim.job_id]
        effect = how in ("complete", "snooze", "cancel")
        make: dict[str, Any] = {
            "complete": (transitions.complete, {}, "succeeded"),
            "snooze": (transitions.snooze, {"delay": NOW}, "ready"),
            "cancel": (transitions.cancel, {"reason": "enough"}, "cancelled"),
            "retry": (transitions.retry, {"failure": BOOM, "delay": NOW}, "ready"),
            "fail": (transitions.fail, {"failure": BOOM}, "failed"),
            "release": (transitions.release, {"reason": "stopped"}, "ready"),
        }
        transition, arguments, state = make[how]
        with self.sessions() as session:
            if effect:
                session.add(Effect(job_id=claim.job_id.hex))
                session.flush()
            moved = transition(session, claim, **arguments)
            if moved:
                session.commit()
        assert moved == model.owned_by(claim)
        if moved:
            model.leave(state, effect=effect, failed=how in ("retry", "fail"))

    @rule(claims=st.lists(claims, max_size=4))
    def complete_many(self, claims: list[Claim]) -> None:
        with self.sessions.begin() as session:
            done = transitions.complete_many(session, claims)
        expected = {each.job_id for each in claims if self.models[each.job_id].owned_by(each)}
        # Completed before by the same run: on PostgreSQL that is told once more, and changes nothing.
        again = {each.job_id for each in claims if self.models[each.job_id].succeeded_by(each)}
        assert expected <= done <= expected | again
        for job_id in expected:
            self.models[job_id].leave("succeeded")

    @rule(worker=workers)
    def release_unowned(self, worker: uuid.UUID) -> None:
        with self.sessions.begin() as session:
            released = transitions.release_unowned(session, worker, ())
        assert set(released) == {k for k, m in self.models.items() if m.worker == worker}
        for job_id in released:
            self.models[job_id].leave("ready")

    @rule(worker=workers)
    def declare_dead(self, worker: uuid.UUID) -> None:
        with self.sessions.begin() as session:
            seen = session.get_one(WorkerRow, worker).heartbeat_at
            rescued = transitions.rescue(session, worker, seen)
        if worker in self.dead:
            assert rescued is None
            return
        self.dead.add(worker)
        theirs = {job_id: m for job_id, m in self.models.items() if m.worker == worker}
        for model in theirs.values():
            model.crash()
        assert rescued == {job_id: model.state for job_id, model in theirs.items()}

    @rule(job_id=jobs)
    def call_off(self, job_id: uuid.UUID) -> None:
        with self.sessions.begin() as session:
            moved = cancel(session, job_id, "no more")
        model = self.models.get(job_id)
        assert moved == (model is not None and model.state not in FINAL)
        if moved and model is not None:
            model.leave("cancelled")

    @rule(job_id=jobs)
    def put_back(self, job_id: uuid.UUID) -> None:
        with self.sessions.begin() as session:
            moved = requeue(session, job_id)
        model = self.models.get(job_id)
        assert moved == (model is not None and model.state in FINAL)
        if moved and model is not None:
            model.leave("ready")
            model.failures = model.crashes = 0
            model.waits = False

    @invariant()
    def rows_are_as_in_the_model(self) -> None:
        with self.sessions() as session:
            rows = {row.id: row for row in session.scalars(select(Job))}
            counted = session.execute(select(Effect.job_id, func.count()).group_by(Effect.job_id))
            effects = {uuid.UUID(hex=job_id): count for job_id, count in counted if job_id}
            attempts = session.execute(select(Attempt.job_id, Attempt.attempt)).all()
            assert rows.keys() == self.models.keys()
            for job_id, model in self.models.items():
                row = rows[job_id]
                assert (row.state, row.attempt, row.failures, row.crashes, row.worker_id) == (
                    model.state,
                    model.attempt,
                    model.failures,
                    model.crashes,
                    model.worker,
                )
                assert (row.finished_at is not None) == (model.state in FINAL)
                assert effects.get(job_id, 0) == model.effects
            assert len(set(attempts)) == len(attempts), "two ends of one attempt"


@pytest.mark.filterwarnings("ignore::sqlalchemy_jobs.JobNeverAdded")
def test_every_interleaving_does_what_the_model_does(database: Database) -> None:
    sessions = sessionmaker(database.engine())
    run_state_machine_as_test(
        lambda: Life(database, sessions),
        settings=settings(
            max_examples=40,
            stateful_step_count=50,
            suppress_health_check=list(HealthCheck),
        ),
    )
