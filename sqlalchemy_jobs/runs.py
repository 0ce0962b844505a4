"""The run that is going on: ``current_run()``."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from contextvars import ContextVar, Token
from datetime import UTC, datetime, timedelta
from types import MappingProxyType

from sqlalchemy_jobs.claims import Claim
from sqlalchemy_jobs.errors import NoCurrentRun

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


def current_run() -> Run:
    """Return the run that called this, directly or through helpers and awaits.

    Raises: NoCurrentRun outside a run, and in a thread that the handler started itself.
    """
    run = _current.get(None)
    if run is None:
        raise NoCurrentRun(
            "there is no current run: current_run() works inside a handler and in what it calls or "
            "awaits; a thread started by the handler must be given what it needs"
        )
    return run
