"""Gives back what is running under the worker's id, but not in it."""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy_jobs import transitions
from sqlalchemy_jobs.worker.control import Control
from sqlalchemy_jobs.worker.slots import Slots

log = logging.getLogger("sqlalchemy_jobs")

T = TypeVar("T")

RECONCILE = 10.0
"""Seconds between two reconciliations of an undisturbed worker."""
IDLE_RECONCILE = 300.0
"""The same while it claims nothing."""


class Reconciling:
    """A claim whose answer was lost has claimed all the same; nobody here runs its jobs."""

    def __init__(self, control: Control, slots: Slots) -> None:
        self._control = control
        self._slots = slots
        self._reconciled_at = -math.inf
        self._losses_seen = 0
        self._has_claimed = False

    def claim(self, work: Callable[[], T]) -> T:
        """Claim; what raises may have claimed all the same, where each statement is a transaction of its own."""
        try:
            return work()
        except BaseException:
            self._reconciled_at = -math.inf
            raise

    def claimed(self) -> None:
        """Take note that jobs were claimed."""
        self._has_claimed = True

    def reconcile(self, worker_id: uuid.UUID) -> None:
        """Give back what is running under our id but not here, after a lost connection and now and then."""
        losses, now = self._control.availability.losses, time.monotonic()
        interval = RECONCILE if self._has_claimed else IDLE_RECONCILE
        if losses == self._losses_seen and now < self._reconciled_at + interval:
            return
        owned = {(run.job_id, run.attempt) for run in self._slots.owned()}
        released = self._control.transaction(
            lambda session: transitions.release_unowned(session, worker_id, owned)
        )
        if released:
            log.warning("jobs that a lost connection had left behind, released: %d", len(released))
        self._losses_seen, self._reconciled_at = losses, now
        self._has_claimed = bool(owned)
