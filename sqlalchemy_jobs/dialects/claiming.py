"""What all claims share."""

from __future__ import annotations

import uuid
from typing import Any

from sqlalchemy import BindParameter, String, bindparam, select, type_coerce, update
from sqlalchemy.orm import Session

from sqlalchemy_jobs.claims import Claim
from sqlalchemy_jobs.columns import server_now
from sqlalchemy_jobs.states import JobState, WorkerState
from sqlalchemy_jobs.tables import TO_JOB, jobs, slot_in, workers

CLAIMED = (
    jobs.c.id,
    jobs.c.attempt,
    jobs.c.kind,
    jobs.c.queue,
    type_coerce(jobs.c.payload, String),
    jobs.c.failures,
    jobs.c.max_attempts,
    jobs.c.headers,
    jobs.c.crashes,
    jobs.c.scheduled_at,
    jobs.c.priority,
    jobs.c.run_at,
)

NEVER_ALONE: BindParameter[Any] = bindparam("never_alone", expanding=True)
_ALIVE = (
    select(workers.c.id)
    .where(workers.c.id == bindparam("worker_id"), workers.c.state == WorkerState.ALIVE.value)
    .with_for_update(read=True, key_share=True)
)
TAKE = (
    update(jobs)
    .where(jobs.c.id.in_(bindparam("ids", expanding=True)))
    .values(
        state=JobState.RUNNING.value,
        attempt=jobs.c.attempt + 1,
        worker_id=bindparam("by_worker"),
        unique_slot=slot_in(JobState.RUNNING),
        started_at=server_now(),
    )
)


def lock_live_worker(session: Session, worker_id: uuid.UUID) -> bool:
    """Share-lock the worker's row until the transaction ends; False when it is declared dead."""
    alive = session.execute(_ALIVE, {"worker_id": worker_id}, bind_arguments=TO_JOB)
    return alive.first() is not None


def claim_of(row: Any, attempt: int, worker_id: uuid.UUID) -> Claim:
    """Make a Claim of a row that begins with the ``CLAIMED`` columns."""
    return Claim(row[0], attempt, worker_id, *row[2 : len(CLAIMED)])
