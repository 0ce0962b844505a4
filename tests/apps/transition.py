"""Makes one transition in a process of its own and dies at a chosen moment: see conformance/test_interruptions.py.

    python -m tests.apps.transition URL

reads lines "job_id attempt worker_id transition moment" and forks for each a child that dies by SIGKILL; answers with a
line when the child is gone. Forking spares the time in which Python starts.
"""

import os
import random
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

from sqlalchemy import Engine, create_engine, event, select, update
from sqlalchemy.orm import Session

from sqlalchemy_jobs import Job, WorkerRow, cancel, dialects, limited, requeue, sqlite, transitions
from sqlalchemy_jobs.claims import Claim, LimitedKey, Wanted
from sqlalchemy_jobs.limits import Numbers, Rate, key_of_queue
from sqlalchemy_jobs.transitions import Failure
from tests.domain import Effect

BOOM = Failure("boom", "ValueError")


def with_effect(transition: Callable[[Session, Claim], Any]) -> Callable[[Session, Claim], Any]:
    def both(session: Session, claim: Claim) -> Any:
        session.add(Effect(job_id=claim.job_id.hex))
        session.flush()
        return transition(session, claim)

    return both


def claim_due(session: Session, claim: Claim) -> Any:
    lanes = dialects.of(session).lanes(session, ())
    return transitions.claim(session, Wanted(claim.worker_id, ["note"], lanes, {"default": 1}, 1))


NUMBERS = Numbers(concurrency=1, rate=Rate(1000, timedelta(minutes=1)))


def claim_limited(session: Session, claim: Claim) -> Any:
    session.execute(update(Job).where(Job.id == claim.job_id).values(limit_key="note"))
    limited.add_keys(session, ["note"])
    wanted = Wanted(claim.worker_id, ["note"], (), {"default": 1}, 1)
    key = LimitedKey("note", "default", [0], NUMBERS, 1)
    return limited.claim(session, wanted, [key])


def claim_queue(session: Session, claim: Claim) -> Any:
    limited.add_keys(session, [key_of_queue("default")])
    wanted = Wanted(claim.worker_id, ["note"], [("default", 0)], {"default": 1}, 1)
    return limited.claim_queue(session, wanted, "default", NUMBERS, [])


def rescue(session: Session, claim: Claim) -> Any:
    seen = session.scalars(
        select(WorkerRow.heartbeat_at).where(WorkerRow.id == claim.worker_id)
    ).one()
    return transitions.rescue(session, claim.worker_id, seen)


TRANSITIONS: dict[str, Callable[[Session, Claim], Any]] = {
    "claim": claim_due,
    "claim_limited": claim_limited,
    "claim_queue": claim_queue,
    "complete": with_effect(transitions.complete),
    "complete_many": lambda session, claim: transitions.complete_many(session, [claim]),
    "snooze": with_effect(
        lambda session, claim: transitions.snooze(session, claim, delay=timedelta(0))
    ),
    "cancel_by_handler": with_effect(
        lambda session, claim: transitions.cancel(session, claim, reason="enough")
    ),
    "retry": lambda session, claim: transitions.retry(
        session, claim, failure=BOOM, delay=timedelta(0)
    ),
    "fail": lambda session, claim: transitions.fail(session, claim, failure=BOOM),
    "release": lambda session, claim: transitions.release(session, claim, reason="stopped"),
    "release_unowned": lambda session, claim: transitions.release_unowned(
        session, claim.worker_id, ()
    ),
    "rescue": rescue,
    "cancel": lambda session, claim: cancel(session, claim.job_id, "no more"),
    "requeue": lambda session, claim: requeue(session, claim.job_id),
}


def engine_for(url: str) -> Engine:
    engine = create_engine(url)
    if engine.dialect.name == "sqlite":
        sqlite.configure(engine)
    return engine


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def work_and_die(url: str, moment: str, work: Callable[[Session], object]) -> None:
    """Die before COMMIT is sent, at some moment while it is under way, or after it has returned."""
    engine = engine_for(url)

    @event.listens_for(engine, "commit")
    def commit(connection: Any) -> None:
        if moment == "before":
            die()
        if moment == "in":
            threading.Timer(random.uniform(0, 0.003), die).start()

    with Session(engine) as session, session.begin():
        work(session)
    if moment == "in":
        time.sleep(60)
    die()


def in_child(work: Callable[[], object]) -> None:
    """Do something in a forked process; when that is gone print a line with its exit status."""
    child = os.fork()
    if child == 0:
        work()
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)  # noqa: T201


def main() -> None:
    url = sys.argv[1]
    for line in sys.stdin:
        job_id, attempt, worker_id, name, moment = line.split()
        claim = Claim(uuid.UUID(job_id), int(attempt), uuid.UUID(worker_id))
        make = partial(TRANSITIONS[name], claim=claim)
        in_child(partial(work_and_die, url, moment, make))


if __name__ == "__main__":
    main()
