"""Writes down how runs ended that were not settled in their handler's own transaction."""

from __future__ import annotations

import logging
import queue
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from sqlalchemy import exc as sa_exc
from sqlalchemy.orm import Session

from sqlalchemy_jobs import transitions
from sqlalchemy_jobs.claims import Claim
from sqlalchemy_jobs.runs import Run
from sqlalchemy_jobs.transitions import Failure
from sqlalchemy_jobs.worker.availability import is_lost
from sqlalchemy_jobs.worker.control import Control
from sqlalchemy_jobs.worker.execution import Transition

log = logging.getLogger("sqlalchemy_jobs")

LARGEST_BATCH = 500
BESIDE_AWAITED = 100
"""How many others go along with those whose end is awaited: the batch is to be small, and the others are to go on too."""
GATHER = 0.02
"""Seconds for which ends are gathered at most while quick jobs wait for a slot: a batch costs as much as dozens of jobs."""
PATIENT_TRIES = 3
PATIENCE = 5.0
"""Seconds, and how many tries at least, after which a run whose end is not accepted is at fault itself."""
_OWN_FAULT = (
    sa_exc.DataError,
    sa_exc.IntegrityError,
    TypeError,
    ValueError,
    AttributeError,
    RecursionError,
)
LOCKED_PAUSE = 0.05
"""Seconds until a row that someone else holds locked is tried again."""


class _Rehearsed(Exception):
    """Rolls a transaction back whose statements were accepted."""


class Settler:
    """The step of a loop: takes what has come in, and makes the transitions.

    Runs without a result whose handler did not use its session are completed together. No row is waited
    for: what someone holds locked is tried again, so one open transaction does not stall the others.
    While the database is away everything is kept; every transition is fenced, so making it again after a
    lost reply changes nothing.
    """

    def __init__(
        self,
        control: Control,
        settled: Callable[[Sequence[Run]], None],
        expects_more: Callable[[], bool] = lambda: False,
        is_awaited: Callable[[Run], bool] = lambda run: False,
    ) -> None:
        self._control = control
        self._expects_more = expects_more
        self._settled = settled
        self._is_awaited = is_awaited
        self._awaited: queue.SimpleQueue[tuple[Run, Transition]] = queue.SimpleQueue()
        """Those for whose end other jobs wait: they do not wait for others."""
        self._incoming: queue.SimpleQueue[tuple[Run, Transition]] = queue.SimpleQueue()
        self._open: list[tuple[Run, Transition]] = []
        self._troubles: dict[Run, tuple[float, int]] = {}

    def put(self, run: Run, transition: Transition) -> None:
        (self._awaited if self._is_awaited(run) else self._incoming).put((run, transition))

    def step(self) -> float | None:
        most = LARGEST_BATCH
        if not self._awaited.empty():
            self._take_in(self._awaited, LARGEST_BATCH)
            most = len(self._open) + BESIDE_AWAITED
        else:
            self._gather()
        self._take_in(self._incoming, most)
        statements, transaction = self._control.statements, self._control.transaction
        self._make_together(transitions.complete, transitions.complete_many, statements)
        self._make_together(transitions.discard, transitions.discard_many, transaction)
        self._make_together(transitions.give_back, transitions.give_back_many, transaction)
        trouble = None
        for run, transition in list(self._open):
            try:
                self._settle(run, transition)
            except Exception as error:
                if self._control.availability.away:
                    raise
                trouble = error  # it may be this one's fault alone: the others go on
        if trouble is not None:
            raise trouble
        if self._open:
            return LOCKED_PAUSE
        return None if self._incoming.empty() and self._awaited.empty() else 0.0

    def _gather(self) -> None:
        """Wait for a full batch, while more will come of themselves and no other job waits for one of these."""
        until = time.monotonic() + GATHER
        while (
            self._expects_more()
            and self._incoming.qsize() < LARGEST_BATCH
            and self._awaited.empty()
            and time.monotonic() < until
        ):
            time.sleep(GATHER / 10)

    def _take_in(self, ended: queue.SimpleQueue[tuple[Run, Transition]], most: int) -> None:
        while len(self._open) < most and not ended.empty():
            self._open.append(ended.get())

    def _make_together(
        self,
        one: Transition,
        many: Callable[[Session, list[Claim]], set[uuid.UUID]],
        carry_out: Callable[[Callable[[Session], set[uuid.UUID]]], set[uuid.UUID]],
    ) -> None:
        runs = [run for run, made in self._open if made is one]
        if len(runs) > 1:
            claims = [run.claim for run in runs]
            try:
                done = carry_out(lambda session: many(session, claims))
            except Exception as error:
                if self._control.availability.away or is_lost(error):
                    raise
                return  # it may be the fault of one of them: each is settled by itself
            self._close([run for run in runs if run.job_id in done])

    def _settle(self, run: Run, transition: Transition) -> None:
        try:
            settled = self._make(run, transition)
        except Exception as error:
            if not self._blames(run, error):
                raise
            log.exception("%s %s: how it ended cannot be written down", run.kind, run.job_id)
            failure = Failure(f"how the run ended could not be written down: {error!r}")
            settled = self._fail(run, transition, partial(transitions.fail, failure=failure))
        if settled is not None:
            self._close([run])
            if not settled:
                log.warning(
                    "%s %s: its end is written down already, or it belongs to another run",
                    run.kind,
                    run.job_id,
                )

    def _fail(self, run: Run, transition: Transition, fail: Transition) -> bool | None:
        """Fail a job over its end, but only if the database takes that while it still refuses the end itself."""

        def rehearse(session: Session) -> None:
            transitions.settle(session, run.claim, fail)
            raise _Rehearsed

        with suppress(_Rehearsed):
            self._control.transaction(rehearse)
        try:
            return self._make(run, transition)
        except Exception:
            return self._make(run, fail)

    def _make(self, run: Run, transition: Transition) -> bool | None:
        return self._control.transaction(
            lambda session: transitions.settle(session, run.claim, transition)
        )

    def _blames(self, run: Run, error: Exception) -> bool:
        """Tell whether it is this run that the database refuses, and not for a while all of them.

        At once when its values are refused; else when it was tried again and again, for long enough.
        """
        if self._control.availability.away:
            return False
        orig = error.orig if isinstance(error, sa_exc.StatementError) else None
        if isinstance(error, _OWN_FAULT) or isinstance(orig, _OWN_FAULT):
            return True
        since, tries = self._troubles.get(run, (time.monotonic(), 0))
        self._troubles[run] = since, tries + 1
        return tries + 1 >= PATIENT_TRIES and time.monotonic() - since >= PATIENCE

    def _close(self, runs: list[Run]) -> None:
        closed = set(runs)
        self._open = [each for each in self._open if each[0] not in closed]
        for run in runs:
            self._troubles.pop(run, None)
        self._settled(runs)
