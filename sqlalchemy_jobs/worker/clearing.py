"""Lets a job that must run alone have its turn in a worker that is never idle by itself."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable

from sqlalchemy.orm import Session

from sqlalchemy_jobs.claims import Lane, Wanted

log = logging.getLogger("sqlalchemy_jobs")

LOOK = (5.0, 30.0)
"""Seconds from one look for a suspect to the next, at random: workers do not all clear for the same one."""
CLEAR_FOR = 30.0
"""Seconds after which a worker that is still not idle claims again: a handler may run for hours."""
REST = 10
"""A worker rests from clearing ten times as long as it took, so it costs a tenth of its time at most."""


class Clearing:
    """A worker that clears claims nothing more until it is idle; then it may claim a suspect, which runs alone.

    The claim passes suspects by, so each comes to the head of its lane as the others are run, and there it
    is seen. A look follows a claim, so between two clearings there is one.
    """

    def __init__(self, find: Callable[[Session, Wanted], list[Lane]]) -> None:
        self._find = find
        self._look_at = time.monotonic() + random.uniform(*LOOK)
        self._since: float | None = None

    @property
    def is_on(self) -> bool:
        return self._since is not None

    def begin_if_needed(self, session: Session, wanted: Wanted) -> None:
        """Begin when a suspect waits; looked up now and then only."""
        now = time.monotonic()
        if self._since is None and now >= self._look_at:
            self._look_at = now + random.uniform(*LOOK)
            if self._find(session, wanted):
                self._since = now

    def lanes(self, session: Session, wanted: Wanted) -> list[Lane]:
        """Return the lanes of the suspects for which the worker claims nothing else yet.

        None any more when it has taken too long, or when other workers took them.
        """
        if self._since is None:
            return []
        found = self._find(session, wanted)
        if found and time.monotonic() - self._since < CLEAR_FOR:
            return found
        if found:
            log.info("a job that must run alone goes on waiting: the runs here take too long")
        self.end()
        return []

    def end(self) -> None:
        """Go back to claiming, if it has not ended before."""
        if self._since is not None:
            now = time.monotonic()
            took = min(now - self._since, CLEAR_FOR)
            self._since, self._look_at = None, now + max(random.uniform(*LOOK), REST * took)
