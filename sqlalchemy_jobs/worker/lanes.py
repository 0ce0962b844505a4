"""Where ready jobs are, as far as the worker knows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from operator import itemgetter

from sqlalchemy.orm import Session

from sqlalchemy_jobs import dialects
from sqlalchemy_jobs.claims import Claim, Lane, Mark
from sqlalchemy_jobs.worker.controls import Controls
from sqlalchemy_jobs.worker.pools import Pools

MOST_GUESSED = 8
"""In how many lanes, those of its last claims, a worker that is rung for claims before it has looked."""
SWEEP = 1.0
"""Seconds for which a worker under full load may miss a lane that is new, or a job that was committed late."""
SWEEPS_SHARE = 20
"""A claim from the beginning may have to read what others have left behind: so many times as long pass until the next."""
LONGEST_SWEEP = 5.0
"""But no more seconds: it may have been slow for once, and until then a better priority that is new is not seen."""


class Lanes:
    """A look finds the lanes; while claims come full, marks remember how far each of them was claimed.

    ``heed`` reads what holds for queues and kinds, if it is time to; when that has changed it calls ``forget``.
    """

    def __init__(self, pools: Pools, controls: Controls, heed: Callable[[Session], None]) -> None:
        self._pools = pools
        self._controls = controls
        self._heed = heed
        self.found: Collection[Lane] = ()
        """All with ready jobs, due or not, of queues that are served; some may be paused."""
        self.marks: dict[Lane, Mark] = {}
        """Where the next claim begins in a lane."""
        self.starts: dict[Lane, Mark] = {}
        """Where each lane begins behind jobs of paused kinds."""
        self._starts_until = 0.0
        self.limited: list[Lane] = []
        """Those with due jobs of queues that have limits themselves."""
        self._last: dict[Lane, None] = {}
        """Those of the last claims, the latest first."""
        self._sweep_at = 0.0
        self._next_due = math.inf

    # --- where to claim -----------------------------------------------------------------------------

    def look(self, session: Session) -> bool:
        """Look where ready jobs are; True when there are any for a claim that goes by no limits."""
        found = dialects.of(session).lanes(session, self._pools.names)
        found = {lane: due for lane, due in found.items() if self._pools.serves(lane[0])}
        now = time.monotonic()
        self.found, self._sweep_at = found.keys(), now + SWEEP
        if any(
            due.first <= 0 or self._controls.queue(lane[0]).paused for lane, due in found.items()
        ):
            self._heed(session)
        self._pass_paused_kinds(session, plain := self._plain(found))
        self.forget_marks()
        limited = self._controls.limited_queues
        self.limited = [
            lane for lane, due in found.items() if lane[0] in limited and due.first <= 0
        ]
        later = [found[lane].next for lane in (*plain, *self.limited)]
        self._next_due = now + min((due for due in later if due is not None), default=math.inf)
        return any(found[lane].first <= 0 for lane in plain)

    def known(self, session: Session) -> list[Lane]:
        """Return where to claim; looked up again now and then."""
        if time.monotonic() >= self._sweep_at:
            self.look(session)
        return self._plain(self.found)

    @property
    def may_guess(self) -> bool:
        """Whether ``guess`` makes sense: not where a queue that is strictly better may have jobs as well."""
        return bool(self._last) and not self._pools.has_levels

    def guess(self) -> list[Lane]:
        """Return where the last claims were, the better priority first."""
        return self._plain(sorted(self._last, key=itemgetter(1)))

    def limited_of(self, queue: str) -> list[Lane]:
        """Return the lanes with due jobs of a queue that has limits itself."""
        return [lane for lane in self.limited if lane[0] == queue]

    @property
    def due_in(self) -> float:
        """Seconds until the next job that is known falls due."""
        return self._next_due - time.monotonic()

    # --- what was claimed ---------------------------------------------------------------------------

    @property
    def has_marks(self) -> bool:
        """Whether a claim does not begin where the lanes do."""
        return self.marks != self.starts

    def forget_marks(self) -> None:
        """Have the next claim begin where the lanes do."""
        self.marks = dict(self.starts)

    def forget(self) -> None:
        """Forget the starts too: what was paused lies before them."""
        self.starts, self._starts_until = {}, 0.0
        self.forget_marks()

    def mark(self, claims: Sequence[Claim], began_at: float) -> None:
        """Remember how far each lane was claimed, while claims come full.

        What is committed late, with an earlier ``run_at``, is found by the next claim from the beginning.
        """
        if not claims:
            self.forget_marks()
        elif not self.has_marks:
            self._sweep_at = max(self._sweep_at, _rested(began_at))
        last = {
            (each.queue, each.priority): each for each in claims
        }  # they are in the order of each lane
        self.marks |= {lane: claim.mark for lane, claim in last.items()}

    def remember(self, claims: Sequence[Claim]) -> None:
        """Remember where these were, for ``guess``."""
        last = {(each.queue, each.priority): None for each in claims}
        self._last = dict([*(last | self._last).items()][:MOST_GUESSED])

    def _plain(self, lanes: Iterable[Lane]) -> list[Lane]:
        return [lane for lane in lanes if self._controls.is_plain(lane[0])]

    def _pass_paused_kinds(self, session: Session, lanes: Collection[Lane]) -> None:
        """Look now and then where the lanes begin for this worker: a claim is not to read what it must not take."""
        kinds, began_at = self._controls.kinds, time.monotonic()
        if self._controls.paused_kinds and kinds and began_at >= self._starts_until:
            self.starts = dialects.of(session).starts(session, lanes, kinds)
            self._starts_until = max(began_at + SWEEP, _rested(began_at))


def _rested(began_at: float) -> float:
    """Return when to read from the beginning again, where it may take long to pass what others have left behind."""
    now = time.monotonic()
    return now + min(SWEEPS_SHARE * (now - began_at), LONGEST_SWEEP)
