"""Claims jobs for the free slots."""

from __future__ import annotations

import math
import random
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from sqlalchemy.orm import Session

from sqlalchemy_jobs import dialects, transitions
from sqlalchemy_jobs.app import Handler
from sqlalchemy_jobs.claims import Claim, Lane, Wanted
from sqlalchemy_jobs.runs import Run
from sqlalchemy_jobs.states import JobState
from sqlalchemy_jobs.worker.clearing import Clearing
from sqlalchemy_jobs.worker.control import Control
from sqlalchemy_jobs.worker.controls import IN_FORCE, Controls
from sqlalchemy_jobs.worker.filling import Filling
from sqlalchemy_jobs.worker.idling import Idling
from sqlalchemy_jobs.worker.lanes import Lanes
from sqlalchemy_jobs.worker.leases import Lease
from sqlalchemy_jobs.worker.limiting import Limiting
from sqlalchemy_jobs.worker.loops import SHORTEST_PAUSE
from sqlalchemy_jobs.worker.reconciling import Reconciling
from sqlalchemy_jobs.worker.settings import Settings
from sqlalchemy_jobs.worker.slots import NONE, Slots
from sqlalchemy_jobs.worker.speed import LONGEST_AHEAD, Speed
from sqlalchemy_jobs.worker.wakeup import Wakeup

LONGEST_REST = 0.1
"""Seconds between two claims for a few slots, at most: the first one may have waited itself, for a lock or the network."""


@dataclass(slots=True)
class Step:
    """What a step has room for, and what it has claimed."""

    worker_id: uuid.UUID
    ahead: Mapping[str, int]
    """How many jobs of each pool may wait for a slot; empty: it claims for free slots only."""
    free: int
    """How many jobs there is room for."""
    share: int
    """For how many of them those that count against limits are claimed first."""
    guesses: bool
    """Whether it claims where the last claims were, without looking."""
    had_marks: bool
    """Whether it does not begin where the lanes do."""
    began_at: float = field(default_factory=time.monotonic)
    claims: list[Claim] = field(default_factory=list)
    """Of jobs that count against no limit."""
    asked: int = 0
    """How many of these it asked for."""
    limited: list[Claim] = field(default_factory=list)
    """Of jobs that count against limits."""

    @property
    def is_full(self) -> bool:
        """Whether there may be more jobs like these."""
        return 0 < self.asked <= len(self.claims)


class Claimer:
    """The step of a loop.

    ``start`` starts what waits for a slot and gets one. ``drained`` is called when nothing is due and nothing of
    this app is running anywhere.
    """

    def __init__(
        self,
        control: Control,
        lease: Lease,
        slots: Slots,
        handlers: Mapping[str, Handler],
        settings: Settings,
        wakeup: Wakeup,
        start: Callable[[], None],
        give_back: Callable[[list[Run]], None],
        drained: Callable[[], None],
        controls: Controls,
        limiting: Limiting,
    ) -> None:
        self._control = control
        self._lease = lease
        self._slots = slots
        self._handlers = handlers
        self._not_repeated = [
            kind for kind, each in handlers.items() if each.declaration.on_crash == "fail"
        ]
        uniques = [each.declaration.unique for each in handlers.values()]
        self._free_slots = any(each and not each.holds_in(JobState.RUNNING) for each in uniques)
        self._settings = settings
        self._wakeup = wakeup
        self._start = start
        self._give_back = give_back
        self._drained = drained
        self._poll = settings.poll_interval.total_seconds()
        self._pools = settings.pools
        self._controls = controls
        self._limiting = limiting
        self._idling = Idling(self._poll, slots, wakeup)
        self._reconciling = Reconciling(control, slots)
        self._lanes = Lanes(self._pools, controls, self._heed)
        self._filling = Filling(handlers, self._lanes, self._claim_more)
        self._clearing = Clearing(self._lanes_of_suspects)
        self._speed = Speed(slots, self._pools)
        self._ahead_until = 0.0
        self._was_ahead = False
        self._was_full = False
        self._limited_first = False
        self._rests_until = 0.0
        """Until when it does not claim for a few slots."""

    def step(self) -> float:
        worker_id = self._lease.worker_id
        if worker_id is None:
            return SHORTEST_PAUSE
        if self._wakeup.was_turned_on():
            self._idling.end()
            self._controls.expired = True
        elif (early := self._idling.too_early()) > 0:
            return early
        self._reconciling.reconcile(worker_id)
        self._give_back_what_waits()
        self._claim_beside_waiting(worker_id)
        step = self._begin(worker_id)
        if step is None:
            wait, rest = self._wait_for_slots(), self._rests_until - time.monotonic()
            return min(wait, rest) if rest > 0 else wait
        self._claim(step)
        if step.guesses and not step.claims:
            return 0.0  # and then it looks
        self._tell(step)
        self._start_claimed(step)
        self._remember(step)
        self._claim_what_is_left(step)
        self._rest(step)
        return self._wait(step)

    def rung(self, queue: str) -> None:
        """Take note of the bell; from another thread. Rung for no queue, it may be that what holds for them has changed."""
        if not queue:
            self._controls.expired = True

    # --- the parts of a step, in turn ---------------------------------------------------------------

    def _give_back_what_waits(self) -> None:
        """Give back what has waited for too long, or must not begin any more."""
        self._give_back(self._slots.withdraw(LONGEST_AHEAD))
        if self._slots.waiting and self._controls.believed_for <= 0:
            self._control.statements(self._heed)
            self._start()  # what has waited for this

    def _claim_beside_waiting(self, worker_id: uuid.UUID) -> None:
        """Claim what counts against limits for slots that those would get who were claimed ahead.

        A key that becomes free is not to wait until these have begun: they get half of the slots meanwhile. But not where a
        queue is strictly better than another: what waits may be better.
        """
        half = (self._slots.total + 1) // 2
        wanted = min(self._limiting.wanted_slots, half)
        if not (self._was_ahead and self._slots.waiting) or self._pools.has_levels:
            wanted = 0
        if wanted:
            self._slots.wake_at = math.inf
            self._slots.kept = wanted
            if self._slots.room(beside_waiting=True)[0] <= 0:
                return  # until a run has ended
        if self._slots.kept:
            try:
                if wanted:
                    self._claim_limited(worker_id, half, beside_waiting=True)
            finally:
                self._slots.kept = 0
                self._start()

    def _begin(self, worker_id: uuid.UUID) -> Step | None:
        """Return what there is room for; None: not enough for a claim."""
        self._slots.wake_at = math.inf  # before looking: what is given up meanwhile wakes this loop
        may_wait = time.monotonic() < self._ahead_until and not self._is_pressing
        ahead = self._speed.ahead() if may_wait else {}
        free, _ = self._slots.room(ahead)
        enough = sum(ahead.values()) // 2
        half = self._slots.total // 2
        if not ahead and 0 < free < half and time.monotonic() < self._rests_until:
            self._slots.wake_at = self._slots.total - half
            return None
        if free <= enough:
            if ahead:
                self._slots.wake_at = self._slots.total + enough
            return None
        if self._was_ahead and not ahead:
            self._lanes.forget_marks()  # what a claim ahead passes by lies before the marks
        self._was_ahead = bool(ahead)
        self._limited_first = not self._limited_first
        return Step(
            worker_id,
            ahead,
            free,
            share=(free + self._limited_first) // 2 if self._lanes.found else free,
            # Woken from its sleep: most likely there is another job like the last ones.
            guesses=self._idling.was_woken() and self._lanes.may_guess,
            had_marks=self._lanes.has_marks,
        )

    def _wait_for_slots(self) -> float:
        self._wakeup.claimed(full=True)
        self._tell_if_drained()
        return min(self._poll, self._controls.believed_for) if self._slots.waiting else self._poll

    def _claim(self, step: Step) -> None:
        """Claim for a share of the slots what counts against limits, and then the others."""
        sees_due = step.guesses or self._clearing.is_on or self._sees_due()
        if not step.guesses:
            step.limited = self._claim_limited(step.worker_id, step.share, step.ahead)
        if sees_due:
            work = partial(self._claim_unlimited, step=step)
            step.claims, step.asked = self._reconciling.claim(
                partial(self._control.statements, work)
            )
        else:
            self._slots.wake_at = -1  # no slot that is given up would let it claim more

    def _tell(self, step: Step) -> None:
        """Tell what came of the claim to those who go by it."""
        self._idling.looked()
        self._was_full = step.is_full
        self._wakeup.claimed(full=step.is_full)
        if step.claims or step.limited:
            self._reconciling.claimed()

    def _start_claimed(self, step: Step) -> None:
        """Start what was claimed, with what makes full batches of it."""
        claims = list(step.claims)
        try:
            for found in self._filling.fill(self._wanted(step.worker_id, 0), step.claims):
                claims += found
        finally:
            self._slots.take([Run(claim) for claim in claims])
            self._start()

    def _remember(self, step: Step) -> None:
        """Remember what matters to the next claims."""
        self._lanes.mark(step.claims if step.is_full else [], step.began_at)
        if not step.ahead:
            self._lanes.remember(step.claims)
        claims = step.claims + step.limited
        if not (step.is_full or ((step.limited or step.ahead) and self._limiting.goes_on)):
            self._ahead_until = 0.0
        elif not step.ahead and not self._is_pressing and all(map(self._might_wait, claims)):
            self._ahead_until = time.monotonic() + LONGEST_AHEAD

    def _claim_what_is_left(self, step: Step) -> None:
        """Claim what counts against limits for the slots that the others leave; and what must run alone."""
        if not step.is_full and step.share < step.free:
            step.limited += self._claim_limited(step.worker_id, step.free, step.ahead)
        if not step.claims and not step.limited and self._slots.is_idle():
            step.limited = self._claim_suspect(step.worker_id)
        if self._limited_wait:
            self._slots.wake_at = math.inf

    def _rest(self, step: Step) -> None:
        """Have the next claim wait for half of the slots, for as long as this one took.

        For one job a claim with limits costs as much as the work of a handler. Else it would be made for each slot that is free.
        """
        now = time.monotonic()
        took = now - step.began_at if step.limited and not step.ahead else 0.0
        self._rests_until = now + min(took, LONGEST_REST)

    def _wait(self, step: Step) -> float:
        """Return how long to wait until the next step."""
        if step.claims or step.had_marks or step.limited:
            self._idling.end()
            took_share = 0 < step.share <= len(step.limited)
            goes_on = self._limiting.may_claim(ahead=bool(step.ahead))
            if step.is_full or step.had_marks or took_share or goes_on:
                return 0.0
            return min(self._idling.shortest, self._limiting.wait)
        if step.ahead and self._limiting.is_resting:
            due_in = min(self._poll, self._lanes.due_in, self._limiting.wait)
            return max(due_in, self._idling.shortest)
        self._tell_if_drained()
        return self._idling.wait(min(self._lanes.due_in, self._limiting.wait))

    # --- what holds for queues and kinds ------------------------------------------------------------

    def _heed(self, session: Session) -> None:
        """Read what holds for queues and kinds, if it is time to, and go by it."""
        if self._controls.read(session):
            self._lanes.forget()
            self._limiting.forget()
            self._give_back(self._slots.withdraw_if(self._must_not_wait))
        self._slots.begin_until = self._controls.in_force_until

    @property
    def _must_heed(self) -> bool:
        return self._controls.expired or self._controls.believed_for <= 0

    def _must_not_wait(self, run: Run) -> bool:
        controls = self._controls
        return controls.is_paused(run.queue, run.kind) or not controls.is_plain(run.queue)

    # --- claims -------------------------------------------------------------------------------------

    def _sees_due(self) -> bool:
        """Look whether anything is due, after a claim that came empty; else take it that there is."""
        return not self._idling.is_idle or self._control.statements(self._lanes.look)

    def _claim_unlimited(self, session: Session, step: Step) -> tuple[list[Claim], int]:
        """Claim jobs that count against no limit; return with them how many were asked for."""
        # Who changes what holds for a queue rings the bell: while it is heard, it need not be read at the first ring.
        if self._controls.expired or not (step.guesses and self._wakeup.is_on):
            self._heed(session)
        else:
            self._slots.begin_until = step.began_at + IN_FORCE
        wanted = self._unlimited(session, step)
        if wanted is None:
            return [], 0
        suspects = self._clearing.lanes(session, wanted)
        if suspects:
            self._slots.wake_at = math.inf
        claims = [] if suspects else transitions.claim(session, wanted)
        if claims or step.guesses or not self._slots.is_idle():
            self._clearing.begin_if_needed(session, wanted)
        else:
            self._clearing.end()
            alone = replace(
                wanted,
                lanes=suspects or wanted.lanes,
                total=1,
                shares={},
                marks=self._lanes.starts,
                suspects=True,
                ahead=False,
            )
            claims = transitions.claim(session, alone)
        return claims, wanted.total

    def _unlimited(self, session: Session, step: Step) -> Wanted | None:
        """Return which jobs are wanted that count against no limit; None: none can begin, or wait here."""
        lanes = self._lanes.guess() if step.guesses else self._lanes.known(session)
        if not self._controls.kinds:
            return None
        queues = {queue for queue, _ in lanes}
        free, rooms = self._slots.room(step.ahead)
        pools = self._pools.in_turn(queues, rooms)
        if step.guesses:
            free = min(free, self._slots.total // 2)  # a better priority may have come as well
        asked = min(free, sum(rooms[pool] for pool in set(pools.values())))
        if len(pools) == len(queues):  # no slot that is given up would let it claim more
            self._slots.wake_at = -1
        if asked <= 0 and not self._limiting.suspects:
            return None
        wanted = replace(
            self._wanted(step.worker_id, asked, ahead=bool(step.ahead)),
            lanes=lanes,
            room={queue: rooms[pool] for queue, pool in pools.items()},
            pools=pools,
            marks=self._lanes.marks,
        )
        shares = self._shares(session, wanted)
        return replace(wanted, shares=shares) if shares else wanted

    def _claim_more(self, wanted: Wanted) -> list[Claim]:
        work = partial(transitions.claim, wanted=wanted)
        return self._reconciling.claim(partial(self._control.statements, work))

    def _claim_limited(
        self,
        worker_id: uuid.UUID,
        most: int,
        ahead: Mapping[str, int] = NONE,
        *,
        beside_waiting: bool = False,
    ) -> list[Claim]:
        """Claim and start jobs that count against limits; none while a suspect is waited for."""
        if most == 0 or self._clearing.is_on:
            return []
        if self._limiting.has_passed_paused and self._must_heed:
            self._control.statements(self._heed)  # it may have been resumed
        self._limiting.look(is_busy=self._was_full, wanted=most, ahead=ahead)
        if not (self._limiting.may_claim(ahead=bool(ahead)) or self._lanes.limited):
            return []
        if self._must_heed:
            self._control.statements(self._heed)
        wanted = self._wanted(worker_id, most, ahead=bool(ahead))
        claim = partial(self._limiting.claim, wanted, ahead)
        if beside_waiting:
            claim = partial(self._limiting.claim_beside_waiting, wanted)
        claims = self._reconciling.claim(claim)
        self._started(claims, first=beside_waiting)
        queues = () if ahead else self._controls.limited_queues
        for queue in random.sample(queues, len(queues)):
            if (left := most - len(claims)) > 0:
                lanes = self._lanes.limited_of(queue)
                wanted = replace(self._wanted(worker_id, left), lanes=lanes, room={queue: left})
                if self._controls.queue(queue).ageing is not None:
                    shares = self._control.statements(partial(self._shares, wanted=wanted))
                    wanted = replace(wanted, shares=shares)
                claims += self._started(self._limiting.claim_queue(wanted, queue))
        return claims

    def _claim_suspect(self, worker_id: uuid.UUID) -> list[Claim]:
        """Claim and start a job that counts against limits and must run alone."""
        wanted = replace(self._wanted(worker_id, 1), suspects=True)
        claims = self._reconciling.claim(partial(self._limiting.claim_suspect, wanted))
        for queue in self._controls.limited_queues:
            lanes = self._lanes.limited_of(queue)
            if not claims:
                claims = self._limiting.claim_queue(replace(wanted, lanes=lanes), queue)
        return self._started(claims)

    def _started(self, claims: list[Claim], *, first: bool = False) -> list[Claim]:
        if claims:
            self._slots.take([Run(claim) for claim in claims], first=first)
            self._slots.kept = 0
            self._start()
        return claims

    def _wanted(self, worker_id: uuid.UUID, total: int, *, ahead: bool = False) -> Wanted:
        """Return what is the same for every claim."""
        kinds = self._controls.kinds
        return Wanted(
            worker_id,
            [kind for kind in kinds if kind not in self._not_repeated] if ahead else kinds,
            (),
            {},
            total,
            never_alone=self._not_repeated,
            free_slots=self._free_slots,
            durable=self._control.durable,
            ahead=ahead,
        )

    def _shares(self, session: Session, wanted: Wanted) -> dict[Lane, int]:
        """Return how many jobs of each lane come next, in queues that do not go by priority alone."""
        shares: dict[Lane, int] = {}
        for queue, room in wanted.room.items():
            ageing = self._controls.queue(queue).ageing
            priorities = [priority for name, priority in wanted.lanes if name == queue]
            if ageing is not None and len(priorities) > 1:
                shares |= dialects.of(session).shares(
                    session,
                    queue,
                    priorities,
                    ageing,
                    wanted.kinds,
                    min(room, wanted.total),
                    wanted.marks,
                )
        return shares

    def _lanes_of_suspects(self, session: Session, wanted: Wanted) -> list[Lane]:
        everywhere = replace(wanted, lanes=[*wanted.lanes, *self._lanes.limited])
        return self._limiting.suspects or transitions.lanes_of_suspects(session, everywhere)

    @property
    def _limited_wait(self) -> bool:
        """Whether jobs that count against limits may wait for a slot."""
        return self._limiting.wants_slots or self._limited_queues_wait

    @property
    def _is_pressing(self) -> bool:
        """Whether some of them must not wait here."""
        return self._limiting.is_pressing or self._limited_queues_wait

    @property
    def _limited_queues_wait(self) -> bool:
        return any(self._limiting.may_begin(queue) for queue, _ in self._lanes.limited)

    def _might_wait(self, claim: Claim) -> bool:
        """Tell whether a claim ahead would have brought this job: where others come, there may be more of them."""
        return not claim.crashes and claim.kind not in self._not_repeated

    # --- the end ------------------------------------------------------------------------------------

    def _tell_if_drained(self) -> None:
        if self._settings.drain and self._slots.is_idle() and self._is_drained():
            self._drained()

    def _is_drained(self) -> bool:
        """Tell whether nothing of ours is due, or running anywhere: what a dead worker ran comes back."""

        def is_drained(session: Session) -> bool:
            self._heed(session)
            kinds, patterns, controls = list(self._handlers), self._pools.patterns, self._controls
            return not transitions.any_unfinished(
                session, kinds, patterns, controls.paused_kinds, controls.paused_queues
            )

        return self._control.transaction(is_drained)
