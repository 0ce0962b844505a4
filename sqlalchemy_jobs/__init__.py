"""A transactional outbox for SQLAlchemy: jobs are rows in your own Session, run once by a worker.

    session.add(order)
    session.add(enqueue(SendReceipt(order_id=order.id)))
    session.commit()  # or rollback(): then there never was a job

A job commits or rolls back with the domain data. A worker (``sajobs worker``) claims it and runs its
handler in a session of its own; what the handler writes and the mark "succeeded" commit in one
transaction, and only for the run that still owns the row. So whatever lies inside the database happens
exactly once, whatever dies; what lies outside happens at least once, with the job's id to recognise it.
"""

from sqlalchemy_jobs import backoff, errors, migrations, sqlite
from sqlalchemy_jobs.app import Handlers, JobApp
from sqlalchemy_jobs.enqueue import enqueue, enqueue_many
from sqlalchemy_jobs.errors import JobNeverAdded
from sqlalchemy_jobs.limits import Limit
from sqlalchemy_jobs.manage import cancel, requeue
from sqlalchemy_jobs.models import Attempt, Job, Kind, Queue, WorkerRow, metadata
from sqlalchemy_jobs.outcomes import Cancel, Fail, Retry, Snooze
from sqlalchemy_jobs.payloads import job
from sqlalchemy_jobs.queues import pause_kind, pause_queue, resume_kind, resume_queue, set_queue
from sqlalchemy_jobs.runs import Run, current_run, current_runs
from sqlalchemy_jobs.schedules.manage import pause_schedule, resume_schedule
from sqlalchemy_jobs.schedules.rows import Schedule
from sqlalchemy_jobs.states import JobState, Outcome, WorkerState
from sqlalchemy_jobs.tables import use_schema
from sqlalchemy_jobs.unique import Unique
from sqlalchemy_jobs.worker import Worker

__version__ = "0.1.0"

__all__ = [
    "Attempt",
    "Cancel",
    "Fail",
    "Handlers",
    "Job",
    "JobApp",
    "JobNeverAdded",
    "JobState",
    "Kind",
    "Limit",
    "Outcome",
    "Queue",
    "Retry",
    "Run",
    "Schedule",
    "Snooze",
    "Unique",
    "Worker",
    "WorkerRow",
    "WorkerState",
    "backoff",
    "cancel",
    "current_run",
    "current_runs",
    "enqueue",
    "enqueue_many",
    "errors",
    "job",
    "metadata",
    "migrations",
    "pause_kind",
    "pause_queue",
    "pause_schedule",
    "requeue",
    "resume_kind",
    "resume_queue",
    "resume_schedule",
    "set_queue",
    "sqlite",
    "use_schema",
]
