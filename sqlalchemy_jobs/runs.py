"""The run that is going on: ``current_run()``; in a batch handler those, ``current_runs()``."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from contextvars import ContextVar, Token
from datetime import UTC, datetime, timedelta
from types import MappingProxyType

from sqlalchemy_jobs.claims import Claim
from sqlalchemy_jobs.errors import NoCurrentRun

SCHEDULE_HEADER = "sajobs.schedule"
"""The header by which a job tells the name of the schedule that made it."""

_current: ContextVar[Run] = ContextVar("sqlalchemy_jobs.run")


class Run:
    """One call of a handler for one claim. Get it by ``current_run()``; middleware is given it."""

    __slots__ = ("_deadline", "_stop", "_timed_out", "claim")

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self._stop = False
        self._deadline: datetime | None = None
        self._timed_out = False

    @property
    def claims(self) -> Sequence[Claim]:
        """The jobs that its handler is called for. For the worker."""
        return (self.claim,)

    @property
    def job_id(self) -> uuid.UUID:
        """The job's id: the idempotency key for whatever lies outside the database."""
        return self.claim.job_id

    @property
    def kind(self) -> str:
        """The kind that the row carries (an alias, for an old row)."""
        return self.claim.kind

    @property
    def queue(self) -> str:
        """The queue that it was claimed from."""
        return self.claim.queue

    @property
    def attempt(self) -> int:
        """The ordinal of this run, from 1; snoozed and released runs count."""
        return self.claim.attempt

    @property
    def failures(self) -> int:
        """How many earlier runs failed."""
        return self.claim.failures

    @property
    def headers(self) -> Mapping[str, str]:
        """What ``enqueue(..., headers=...)`` sent along."""
        return MappingProxyType(dict(self.claim.headers or {}))

    @property
    def scheduled_at(self) -> datetime | None:
        """The tick of the schedule that made the job, in UTC; None for a job made by ``enqueue``."""
        return self.claim.scheduled_at

    @property
    def schedule(self) -> str | None:
        """The name of that schedule."""
        return self.headers.get(SCHEDULE_HEADER)

    @property
    def deadline(self) -> datetime | None:
        """When the handler will be interrupted, in UTC by this machine's clock; None without a ``timeout``."""
        return self._deadline

    @property
    def should_stop(self) -> bool:
        """Whether the handler had better return or raise soon.

        True when its deadline has passed, when the job was cancelled, when the worker gives the run up, or
        fears that the job is being taken from it. What the handler still does in the database is committed only
        if the job turns out to be its own, and never once its deadline has passed.
        """
        return self._stop

    @property
    def timed_out(self) -> bool:
        """Whether the deadline passed before the handler had come to its end."""
        return self._timed_out

    def ask_to_stop(self) -> None:
        """Make ``should_stop`` true. For the worker."""
        self._stop = True

    def begin(self, timeout: timedelta | None) -> None:
        """Let the time for the handler run from now on. For the worker."""
        self._deadline = None if timeout is None else datetime.now(UTC) + timeout

    def time_out(self) -> None:
        """Make ``timed_out`` and ``should_stop`` true. For the worker."""
        self._timed_out = self._stop = True

    def enter(self) -> Token[Run]:
        """Make this the current run until ``leave``. For the worker."""
        return _current.set(self)

    @staticmethod
    def leave(token: Token[Run]) -> None:
        """Make that the current run which was before ``enter``. For the worker."""
        _current.reset(token)

    def __repr__(self) -> str:
        return f"<Run {self.attempt} of {self.kind} {self.job_id}>"


class Batch(Run):
    """The runs that one call of a batch handler stands for. For the worker: no handler is given one.

    It has a slot, a thread and a deadline as a run has, under the name of its first run.
    """

    __slots__ = ("apart", "members")

    def __init__(self, members: Sequence[Run]) -> None:
        super().__init__(members[0].claim)
        self.members = tuple(members)
        self.apart: set[Run] = set()
        """Those that the handler is not called for (any more): each ends for itself."""

    @property
    def runs(self) -> list[Run]:
        """The runs that the handler is called for, in the order of its payloads."""
        return [run for run in self.members if run not in self.apart]

    @property
    def claims(self) -> Sequence[Claim]:
        return [run.claim for run in self.runs]

    def ask_to_stop(self) -> None:
        super().ask_to_stop()
        for run in self.members:
            run.ask_to_stop()

    def begin(self, timeout: timedelta | None) -> None:
        super().begin(timeout)
        for run in self.members:
            run._deadline = self._deadline

    def time_out(self) -> None:
        super().time_out()
        for run in self.members:
            run.time_out()

    def __repr__(self) -> str:
        return f"<Batch of {len(self.members)} of {self.kind}>"


def current_run() -> Run:
    """Return the run that called this, directly or through helpers and awaits.

    Raises: NoCurrentRun outside a run, in a thread that the handler started itself, and in a batch handler.
    """
    run = _the_current()
    if isinstance(run, Batch):
        raise NoCurrentRun(
            f'the handler of "{run.kind}" has a run for each payload of its batch: current_runs() returns them, '
            "in the order of the payloads"
        )
    return run


def current_runs() -> list[Run]:
    """Return the runs that called this: one for each payload of a batch handler, in their order; else one.

    Raises: NoCurrentRun outside a run, and in a thread that the handler started itself.
    """
    run = _the_current()
    return run.runs if isinstance(run, Batch) else [run]


def _the_current() -> Run:
    run = _current.get(None)
    if run is None:
        raise NoCurrentRun(
            "there is no current run: current_run() works inside a handler and in what it calls or "
            "awaits; a thread started by the handler must be given what it needs"
        )
    return run
