"""Every transition is made or not made: whenever its process dies, and whenever its connection breaks.

And whatever became of it, the job is done once in the end.
"""

import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import delete, func, select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, sessionmaker

from sqlalchemy_jobs import Attempt, Job, JobApp, WorkerRow, enqueue, job, transitions
from sqlalchemy_jobs.claims import Claim, Wanted
from sqlalchemy_jobs.worker import leases
from tests.apps.transition import TRANSITIONS, engine_for
from tests.databases import Database
from tests.domain import Effect
from tests.processes import ROOT
from tests.proxy import Proxy, When

FROM_READY = {"claim", "claim_limited", "claim_queue"}
FROM_FINAL = {"requeue"}


@job("note", max_attempts=50, backoff=lambda failures: timedelta(0))
@dataclass(frozen=True)
class Note:
    pass


@dataclass(frozen=True)
class Shown:
    """What a transition changes."""

    state: str
    attempt: int
    failures: int
    crashes: int
    has_worker: bool
    is_finished: bool
    outcomes: tuple[str, ...]
    effects: int


class Scene:
    """A database with one job in the state that a transition starts from."""

    def __init__(self, database: Database) -> None:
        self.sessions = sessionmaker(database.engine())

    def prepare(self, transition: str) -> Claim:
        with self.sessions.begin() as session:
            worker = leases.register(session, timedelta(minutes=5), (), ["note"])
            made = enqueue(Note())
            job_id = made.id
            session.add(made)
        if transition in FROM_READY:
            return Claim(job_id, 0, worker)
        with self.sessions.begin() as session:
            (claim,) = transitions.claim(
                session, Wanted(worker, ["note"], [("default", 0)], {"default": 1}, 1)
            )
        if transition in FROM_FINAL:
            with self.sessions.begin() as session:
                assert transitions.cancel(session, claim, reason="to be put back")
        return claim

    def shown(self, job_id: uuid.UUID) -> Shown:
        with self.sessions() as session:
            if session.get_bind().dialect.name != "sqlite":  # there any transaction sees one state
                # The server may still be at the commit of a process that is dead.
                session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
            row = session.get_one(Job, job_id)
            outcomes = session.scalars(
                select(Attempt.outcome).where(Attempt.job_id == job_id).order_by(Attempt.attempt)
            )
            effects = session.scalar(select(func.count()).where(Effect.job_id == job_id.hex))
            return Shown(
                row.state,
                row.attempt,
                row.failures,
                row.crashes,
                row.worker_id is not None,
                row.finished_at is not None,
                tuple(outcomes),
                effects or 0,
            )

    def made(self, transition: str) -> Shown:
        """What the transition makes of such a job when nothing is in its way."""
        claim = self.prepare(transition)
        with self.sessions.begin() as session:
            TRANSITIONS[transition](session, claim)
        shown = self.shown(claim.job_id)
        self.clear()
        return shown

    def clear(self) -> None:
        with self.sessions.begin() as session:
            for table in (Attempt, Effect, Job, WorkerRow):
                session.execute(delete(table))

    def settle(self, claim: Claim) -> None:
        """Let the worker be dead, and others do what is left; the job is done once, or was called off."""
        before = self.shown(claim.job_id)
        with self.sessions.begin() as session:
            session.execute(
                update(WorkerRow).where(WorkerRow.id == claim.worker_id).values(state="dead")
            )
            transitions.rescue_orphans(session, claim.worker_id)
        app: JobApp[Any, Any] = JobApp(self.sessions)

        @app.handler(Note)
        def note(session: Session, payload: Note) -> None:
            session.add(Effect(job_id=claim.job_id.hex))

        app.worker(drain=True, concurrency=1).run()
        after = self.shown(claim.job_id)
        if before.is_finished:
            assert after == before
        else:
            assert (after.state, after.effects) == ("succeeded", before.effects + 1)
        assert not after.has_worker


@pytest.fixture
def scene(database: Database) -> Scene:
    return Scene(database)


@pytest.fixture
def dying(database: Database) -> Iterator["subprocess.Popen[str]"]:
    """Makes transitions in children that die."""
    url = database.url.render_as_string(hide_password=False)
    with subprocess.Popen(
        [sys.executable, "-m", "tests.apps.transition", url],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def die(dying: "subprocess.Popen[str]", transition: str, claim: Claim, moment: str) -> None:
    assert dying.stdin is not None
    assert dying.stdout is not None
    print(
        claim.job_id.hex,
        claim.attempt,
        claim.worker_id.hex,
        transition,
        moment,
        file=dying.stdin,
        flush=True,
    )
    assert dying.stdout.readline() == "-9\n"


def test_a_process_that_dies_has_made_its_transition_or_not(
    scene: Scene, dying: "subprocess.Popen[str]"
) -> None:
    """Not before COMMIT is sent; perhaps while it is under way; for certain after it has returned."""
    for transition in TRANSITIONS:
        made = scene.made(transition)
        for moment in ("before", "in", "after"):
            claim = scene.prepare(transition)
            before = scene.shown(claim.job_id)
            die(dying, transition, claim, moment)
            shown = scene.shown(claim.job_id)
            allowed = {"before": (before,), "in": (before, made), "after": (made,)}[moment]
            assert shown in allowed, (transition, moment)
            if moment == "in":
                scene.clear()  # it is as before or as after, and what becomes of those is shown
            else:
                scene.settle(claim)


@pytest.fixture
def proxy(row_locks: Database) -> Iterator[Proxy]:
    proxy = Proxy(row_locks.url)
    yield proxy
    proxy.stop()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_transition_whose_commit_is_cut_is_made_or_not_and_making_it_again_changes_nothing_more(
    row_locks: Database, proxy: Proxy, when: When
) -> None:
    """Before the server sees the COMMIT, or after it has answered and before the answer arrives."""
    scene = Scene(row_locks)
    engine = engine_for(proxy.url.render_as_string(hide_password=False))
    for transition, make in TRANSITIONS.items():
        made = scene.made(transition)
        claim = scene.prepare(transition)
        before = scene.shown(claim.job_id)
        with Session(engine) as session:
            session.begin()
            make(session, claim)
            proxy.cut_commit("", when)
            with pytest.raises(DBAPIError):
                session.commit()
        assert proxy.cuts.acquire(timeout=20)
        assert scene.shown(claim.job_id) == (before if when == "before" else made), transition
        if when == "after":
            with scene.sessions() as session:
                if make(session, claim):
                    session.commit()
            assert scene.shown(claim.job_id) == made, transition
        scene.settle(claim)
    engine.dispose()
