"""Looks whether the jobs that are being run are still ours: somebody may have cancelled one."""

from __future__ import annotations

import logging
from collections.abc import Callable

from sqlalchemy_jobs import transitions
from sqlalchemy_jobs.runs import Run
from sqlalchemy_jobs.worker.control import Control
from sqlalchemy_jobs.worker.slots import Slots

log = logging.getLogger("sqlalchemy_jobs")

LOOK = 0.4
"""Seconds between two looks; a run that is younger costs nothing."""
SECOND_LOOK = 0.3
"""Seconds until a run that seems to have lost its job is looked at again."""


class Lookout:
    """The step of a loop. ``stop`` is called, once, with a run whose job has been taken from it.

    A run that has just committed its own end, a snooze for example, looks the same until its thread gets to say
    so: it is believed lost only when it still runs at the second look.
    """

    def __init__(self, control: Control, slots: Slots, stop: Callable[[Run], None]) -> None:
        self._control = control
        self._slots = slots
        self._stop = stop
        self._seen: set[Run] = set()
        self._suspects: set[Run] = set()

    def step(self) -> float:
        running = {run for run in self._slots.running() if not run.should_stop}
        old = list(running & self._seen)
        self._seen = running
        if not old:
            return LOOK
        lost = self._control.statements(
            lambda session: transitions.lost_of(
                session, [each for run in old for each in run.claims]
            )
        )
        # A batch goes on while it has any job left; it runs again without those that it lost.
        suspects = {run for run in old if all(claim in lost for claim in run.claims)}
        for run in suspects & self._suspects:
            log.info(
                "%s %s was cancelled, or taken away: its run is interrupted", run.kind, run.job_id
            )
            self._stop(run)
        self._suspects = suspects
        return SECOND_LOOK if suspects else LOOK
