"""What holds for queues and kinds at run time, as the worker has read it: their rows in ``Queue`` and ``Kind``."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import literal_column, null, select, union_all
from sqlalchemy.orm import Session

from sqlalchemy_jobs.app import Handler
from sqlalchemy_jobs.limits import UNLIMITED, Numbers, Rate
from sqlalchemy_jobs.queues import fault_of, fault_of_rate
from sqlalchemy_jobs.tables import TO_JOB, kinds, queues

log = logging.getLogger("sqlalchemy_jobs")

IN_FORCE = 2.0
"""Seconds after its commit at which a change holds in every worker: with what was read longer ago nothing begins."""
BELIEVED = 1.0
"""Seconds for which a worker that claims believes what it has read."""

_READ = union_all(
    select(
        literal_column("1").label("is_queue"),
        *queues.c["name", "paused", "concurrency", "rate", "strategy", "ageing"],
    ),
    select(literal_column("0"), *kinds.c["name", "paused"], null(), null(), null(), null()).where(
        kinds.c.paused
    ),
)


@dataclass(frozen=True, slots=True)
class QueueControl:
    """What holds for a queue."""

    paused: bool = False
    numbers: Numbers = UNLIMITED
    """How many of its jobs may run at once, and begin in a time, in all workers."""
    ageing: float | None = None
    """Seconds of waiting that make up for one step of priority, 0 by time alone; None: none do."""


DEFAULT = QueueControl()


class Controls:
    """The rows as they were read at most a second ago, for a worker that claims. For the claimer's thread."""

    def __init__(self, handlers: Mapping[str, Handler]) -> None:
        self._handlers = handlers
        self._read_at = -math.inf
        self.expired = True
        """Whether someone has said, from any thread, that they have changed."""
        self._queues: dict[str, QueueControl] = {}
        self.paused_kinds: list[str] = []
        """Of those that it has handlers for: with its kind a class's aliases are paused."""
        self.kinds = list(handlers)
        """The others, which it claims."""
        self._faults: dict[str, str] = {}

    @property
    def believed_for(self) -> float:
        """For how many seconds more they need not be read again."""
        return self._read_at + BELIEVED - time.monotonic()

    @property
    def in_force_until(self) -> float:
        """Until when, by the monotonic clock, what has been read lets jobs begin."""
        return self._read_at + IN_FORCE

    def read(self, session: Session) -> bool:
        """Read them again, if it is time to; True when something has changed."""
        if self.believed_for > 0 and not self.expired:
            return False
        began_at = time.monotonic()
        self.expired = False  # what changes from here on is said again
        rows = session.execute(_READ, bind_arguments=TO_JOB).all()
        before = self._queues, self.paused_kinds
        of_queues = [row for row in rows if row.is_queue]
        paused = {row.name for row in rows if not row.is_queue}
        self._queues = {row.name: control_of(row) for row in of_queues}
        self.paused_kinds, self.kinds = [], []
        for kind, handler in self._handlers.items():
            is_paused = kind in paused or handler.declaration.kind in paused
            (self.paused_kinds if is_paused else self.kinds).append(kind)
        self._read_at = began_at
        faults = {}
        for row in of_queues:
            if fault := fault_of(row.strategy, row.ageing):
                faults[row.name] = (
                    f"{fault}; until `sajobs queues set` mends it, the queue goes by priority"
                )
            if fault := fault_of_rate(row.rate):
                faults[row.name] = (
                    f"{fault}; until `sajobs queues set` mends it, none of its jobs begins"
                )
        self._tell(faults)
        return before != (self._queues, self.paused_kinds)

    def queue(self, name: str) -> QueueControl:
        """Return what holds for a queue."""
        return self._queues.get(name, DEFAULT)

    def is_plain(self, queue: str) -> bool:
        """Tell whether a queue is neither paused nor has limits itself."""
        control = self.queue(queue)
        return not control.paused and control.numbers == UNLIMITED

    @property
    def limited_queues(self) -> list[str]:
        """The queues that have limits themselves and are not paused."""
        return [
            name
            for name, control in self._queues.items()
            if not control.paused and control.numbers != UNLIMITED
        ]

    @property
    def paused_queues(self) -> list[str]:
        return [name for name, control in self._queues.items() if control.paused]

    def is_paused(self, queue: str, kind: str) -> bool:
        """Tell whether a job must not begin."""
        return self.queue(queue).paused or kind in self.paused_kinds

    def _tell(self, faults: dict[str, str]) -> None:
        for name, fault in faults.items():
            if self._faults.get(name) != fault:
                log.error('the row of queue "%s" has %s', name, fault)
        self._faults = faults


def control_of(row: Any) -> QueueControl:
    """Return what a row of ``Queue`` says; where its order makes no sense, the default.

    Where its rate makes none, the queue is paused: too few begin, rather than too many.
    """
    ageing = 0.0 if row.strategy == "fifo" else row.ageing
    if fault_of(row.strategy, row.ageing):
        ageing = None
    if fault_of_rate(row.rate):
        return QueueControl(paused=True, ageing=ageing)
    rate = None if row.rate is None else Rate.parse(row.rate)
    return QueueControl(bool(row.paused), Numbers(row.concurrency, rate), ageing)
