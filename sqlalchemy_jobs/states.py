"""The states of a job and of a worker, and the outcomes of a run that did not succeed."""

from __future__ import annotations

from enum import StrEnum


class JobState(StrEnum):
    """Where a job stands.

    A ready job with a later ``run_at`` is scheduled; one with ``failures > 0`` is being retried.
    Nothing but the transitions (``transitions.py``) moves a job from one state to another.
    """

    READY = "ready"
    """Waits to be claimed, from ``run_at`` on. Left by claim and cancel."""
    RUNNING = "running"
    """Claimed by the worker in ``worker_id``. Left by complete, retry, snooze, fail, cancel,
    release and rescue."""
    SUCCEEDED = "succeeded"
    """Final: the handler returned, and its work was committed with this state."""
    FAILED = "failed"
    """Final: the handler gave up, or ``failures`` reached ``max_attempts``."""
    CANCELLED = "cancelled"
    """Final: the handler, or a person, called it off."""
    BLOCKED = "blocked"
    """Will wait for other jobs. Reserved: no job is blocked yet."""

    @property
    def bit(self) -> int:
        """Its bit in ``Job.unique_states``. Rows carry it: it never changes."""
        return _BITS[self]


_BITS = {
    JobState.READY: 1,
    JobState.RUNNING: 2,
    JobState.SUCCEEDED: 4,
    JobState.FAILED: 8,
    JobState.CANCELLED: 16,
    JobState.BLOCKED: 32,
}

UNFINISHED = (JobState.READY, JobState.BLOCKED, JobState.RUNNING)
FINAL = (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


class WorkerState(StrEnum):
    """Whether a worker may claim."""

    ALIVE = "alive"
    """Renews its lease; may claim."""
    DEAD = "dead"
    """Declared dead by another worker; never alive again: it registers anew under a new id."""


class Outcome(StrEnum):
    """How a run that did not succeed ended: the ``outcome`` of its ``Attempt`` row."""

    FAILED = "failed"
    """It raised. Counts as a failure."""
    TIMED_OUT = "timed_out"
    """Its handler took longer than its kind's ``timeout``. Counts as a failure."""
    CRASHED = "crashed"
    """Its worker died. Counts as a failure."""
    SNOOZED = "snoozed"
    """The handler returned ``Snooze``."""
    CANCELLED = "cancelled"
    """The handler returned ``Cancel``, or somebody called ``cancel`` while it ran."""
    RELEASED = "released"
    """Its worker gave it back: shutdown, or a lost connection."""
