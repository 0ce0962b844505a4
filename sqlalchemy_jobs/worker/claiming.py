"""Claims jobs for the free slots, and gives back what is not ours to run."""

from __future__ import annotations

import logging
import math
import random
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import TypeVar

from sqlalchemy.orm import Session

from sqlalchemy_jobs import dialects, transitions
from sqlalchemy_jobs.app import Handler
from sqlalchemy_jobs.claims import Claim, Lane, Mark, Wanted
from sqlalchemy_jobs.runs import Run
from sqlalchemy_jobs.states import JobState
from sqlalchemy_jobs.worker.clearing import Clearing
from sqlalchemy_jobs.worker.control import Control
from sqlalchemy_jobs.worker.controls import Controls
from sqlalchemy_jobs.worker.leases import Lease
from sqlalchemy_jobs.worker.limiting import Limiting
from sqlalchemy_jobs.worker.loops import SHORTEST_PAUSE
from sqlalchemy_jobs.worker.pools import Pools
from sqlalchemy_jobs.worker.settings import Settings
from sqlalchemy_jobs.worker.slots import Slots, may_share
from sqlalchemy_jobs.worker.wakeup import Wakeup

log = logging.getLogger("sqlalchemy_jobs")

T = TypeVar("T")

IDLE_WAITS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Seconds an idle worker waits before it looks again; then its poll interval, which also bounds these, or longer where
it is told of new jobs."""
MOST_GUESSED = 8
"""In how many lanes, those of its last claims, a worker that is rung for claims before it has looked."""
SHORTEST_WAIT = 0.001
"""Seconds to wait at least for a job that is about to fall due: SQLite's clock has no finer grain."""
SWEEP = 1.0
"""Seconds for which a worker under full load may miss a lane that is new, or a job that was committed late."""
SWEEPS_SHARE = 20
"""A claim from the beginning may have to read what others have left behind: so many times as long pass until the next."""
LONGEST_SWEEP = 5.0
"""But no more seconds: it may have been slow for once, and until then a better priority that is new is not seen."""
RECONCILE = 10.0
"""Seconds between two reconciliations of an undisturbed worker."""
IDLE_RECONCILE = 300.0
"""The same while it claims nothing."""
AHEAD = 0.25
"""Seconds of work that may wait in the worker, at the speed that was observed."""
MOST_AHEAD = 1000
ROUNDS = 4
"""How often every slot has to be used, on the average, before the speed is believed."""
FILL_WORTH = 0.01
"""Seconds that a job is worth which gets into a batch with others instead of a slot of its own."""
FILL_REST = 20
"""How many times as long as it took a claim to fill a batch it is not made again, if it was not worth it."""
LONGEST_AHEAD = 1.0
"""Seconds after which a job that waits in the worker is given back: others may be idle. And between two claims for
free slots, which alone take jobs that must not wait here: no handler is that slow in between."""


class Speed:
    """How many handlers end in a second, by pool, and so how many jobs may wait for a slot."""

    def __init__(self, slots: Slots, pools: Pools) -> None:
        self._slots = slots
        self._pools = pools
        self._measured_at = time.monotonic()
        self._ended: Mapping[str, int] = {}
        self._ahead: dict[str, int] = {}

    def ahead(self) -> dict[str, int]:
        """Return how many jobs of each pool are worth ``AHEAD`` seconds.

        None where a slot takes longer than that for one: another worker may be quicker.
        """
        now = time.monotonic()
        took = now - self._measured_at
        ended = self._slots.ended_counts()
        runs = sum(ended.values()) - sum(self._ended.values())
        if took > 0 and (runs >= ROUNDS * self._slots.total or took >= LONGEST_AHEAD):
            worth = {
                pool: int((count - self._ended.get(pool, 0)) / took * AHEAD)
                for pool, count in ended.items()
            }
            self._measured_at, self._ended = now, ended
            total = sum(worth.values())
            share = min(1.0, MOST_AHEAD / max(total, 1))
            self._ahead = {
                pool: int(count * share)
                for pool, count in worth.items()
                if total > self._slots.total and count > (self._pools.concurrency[pool] or 0)
            }
        return self._ahead


class Claimer:
    """The step of a loop.

    ``start`` is given each new run, and owns it from then on. ``drained`` is called when nothing is due and
    nothing of this app is running anywhere.
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
        self._idle_polls = 0
        self._looked_at = -math.inf
        self._asleep_until = 0.0
        self._last_lanes: dict[Lane, None] = {}
        self._lanes: Collection[Lane] = ()
        self._limited_lanes: list[Lane] = []
        """The lanes with due jobs of queues that have limits themselves."""
        self._marks: dict[Lane, Mark] = {}
        self._starts: dict[Lane, Mark] = {}
        """Where each lane begins behind jobs of paused kinds."""
        self._starts_until = 0.0
        self._sweep_at = 0.0
        self._next_due = math.inf
        self._pools = settings.pools
        self._controls = controls
        self._speed = Speed(slots, self._pools)
        self._ahead_until = 0.0
        self._was_ahead = False
        self._reconciled_at = -math.inf
        self._has_claimed = False
        self._losses_seen = 0
        self._limiting = limiting
        self._limited_first = False
        self._was_full = False
        self._clearing = Clearing(self._lanes_of_suspects)
        self._batched = {kind: each for kind, each in handlers.items() if each.batch}
        self._fill_from: dict[str, float] = {}

    def step(self) -> float:
        worker_id = self._lease.worker_id
        if worker_id is None:
            return SHORTEST_PAUSE
        if self._wakeup.was_turned_on():
            self._idle_polls = 0
            self._controls.expired = True
        elif (early := self._too_early()) > 0:
            return early
        self._reconcile(worker_id)
        self._give_back(self._slots.withdraw(LONGEST_AHEAD))
        if self._slots.waiting and self._controls.believed_for <= 0:
            self._control.statements(self._heed)
        self._slots.wake_at = math.inf  # before looking: what is given up meanwhile wakes this loop
        may_wait = time.monotonic() < self._ahead_until and not self._limited_wait
        ahead = self._speed.ahead() if may_wait else {}
        free, _ = self._slots.room(ahead)
        enough = sum(ahead.values()) // 2
        if free <= enough:
            if ahead:
                self._slots.wake_at = self._slots.total + enough
            self._wakeup.claimed(full=True)
            self._tell_if_drained()
            return (
                min(self._poll, self._controls.believed_for) if self._slots.waiting else self._poll
            )
        if self._was_ahead and not ahead:
            self._marks = dict(self._starts)  # what a claim ahead passes by lies before the marks
        self._was_ahead = bool(ahead)
        began_at, marked = time.monotonic(), self._marks != self._starts
        # Woken from its sleep: most likely there is another job like the last ones.
        may_guess = bool(self._last_lanes) and not self._pools.has_levels
        guesses = may_guess and began_at < self._asleep_until
        self._asleep_until = 0.0
        self._limited_first = not self._limited_first
        half = (free + self._limited_first) // 2 if self._lanes else free
        sees_due = guesses or self._clearing.is_on or self._sees_due()
        limited = [] if ahead or guesses else self._claim_limited(worker_id, half)
        if sees_due:
            claims, asked = self._carry_out(
                lambda session: self._claim(session, worker_id, ahead, guesses)
            )
        else:
            claims, asked = [], 0
            self._slots.wake_at = -1  # no slot that is given up would let it claim more
        if guesses and not claims:
            return 0.0  # and then it looks
        is_full = 0 < asked <= len(claims)
        self._looked_at = time.monotonic()
        self._was_full = is_full
        self._wakeup.claimed(full=is_full)
        self._has_claimed |= bool(claims or limited)
        taken = list(claims)
        try:
            if self._batched:
                for found in self._fill(worker_id, claims):
                    taken += found
        finally:
            self._slots.take([Run(claim) for claim in taken])
            self._start()
        self._mark(claims if is_full else [], began_at)
        if not ahead:
            last = {(each.queue, each.priority): None for each in claims}
            self._last_lanes = dict([*(last | self._last_lanes).items()][:MOST_GUESSED])
        if not is_full:
            self._ahead_until = 0.0
        elif not ahead and not self._limited_wait and all(map(self._might_wait, claims)):
            self._ahead_until = time.monotonic() + LONGEST_AHEAD
        if not is_full and not ahead and half < free:  # what the others leave
            limited += self._claim_limited(worker_id, free)
        if not claims and not limited and self._slots.is_idle():
            limited = self._claim_suspect(worker_id)
        if self._limited_wait:
            self._slots.wake_at = math.inf
        if claims or marked or limited:
            self._idle_polls = 0
            at_once = is_full or marked or self._limiting.wants_slots or 0 < half <= len(limited)
            return 0.0 if at_once else min(IDLE_WAITS[0], self._poll, self._limiting.wait)
        self._tell_if_drained()
        self._idle_polls += 1
        wait = self._idle_wait()
        self._asleep_until = time.monotonic() + wait
        return wait

    def rung(self, queue: str) -> None:
        """Take note of the bell; from another thread. Rung for no queue, it may be that what holds for them has changed."""
        if not queue:
            self._controls.expired = True

    def _heed(self, session: Session) -> None:
        """Read what holds for queues and kinds, if it is time to, and go by it."""
        if self._controls.read(session):
            self._starts, self._starts_until = {}, 0.0
            self._marks = {}  # what was paused lies before them
            self._limiting.forget()
            self._give_back(self._slots.withdraw_if(self._must_not_wait))

    def _pass_paused_kinds(self, session: Session, lanes: Collection[Lane]) -> None:
        """Look now and then where the lanes begin for this worker: a claim is not to read what it must not take."""
        kinds, began_at = self._controls.kinds, time.monotonic()
        if self._controls.paused_kinds and kinds and began_at >= self._starts_until:
            self._starts = dialects.of(session).starts(session, lanes, kinds)
            self._starts_until = max(began_at + SWEEP, _rested(began_at))

    def _must_not_wait(self, run: Run) -> bool:
        controls = self._controls
        return controls.is_paused(run.queue, run.kind) or not controls.is_plain(run.queue)

    def _plain(self, lanes: Iterable[Lane]) -> list[Lane]:
        return [lane for lane in lanes if self._controls.is_plain(lane[0])]

    def _claim_limited(self, worker_id: uuid.UUID, most: int) -> list[Claim]:
        """Claim and start jobs that count against limits: for free slots only, and none while a suspect is waited for."""
        if most == 0 or self._clearing.is_on:
            return []
        self._limiting.look(is_busy=self._was_full)
        if not self._limiting.wants_slots and not self._limited_lanes:
            return []
        if self._controls.expired or self._controls.believed_for <= 0:
            self._control.statements(self._heed)
        claims = self._begin(self._limiting.claim(self._wanted(worker_id, most)))
        queues = self._controls.limited_queues
        for queue in random.sample(queues, len(queues)):
            if (left := most - len(claims)) > 0:
                lanes = [lane for lane in self._limited_lanes if lane[0] == queue]
                wanted = replace(self._wanted(worker_id, left), lanes=lanes, room={queue: left})
                if self._controls.queue(queue).ageing is not None:
                    shares = self._control.statements(partial(self._shares, wanted=wanted))
                    wanted = replace(wanted, shares=shares)
                claims += self._begin(self._limiting.claim_queue(wanted, queue))
        return claims

    @property
    def _limited_wait(self) -> bool:
        """Whether jobs that count against limits may wait for a slot."""
        of_queues = (self._limiting.may_begin(queue) for queue, _ in self._limited_lanes)
        return self._limiting.wants_slots or any(of_queues)

    def _claim_suspect(self, worker_id: uuid.UUID) -> list[Claim]:
        """Claim a job that counts against limits and must run alone."""
        wanted = replace(self._wanted(worker_id, 1), suspects=True)
        claims = self._limiting.claim_suspect(wanted)
        for queue in self._controls.limited_queues:
            lanes = [lane for lane in self._limited_lanes if lane[0] == queue]
            if not claims and lanes:
                claims = self._limiting.claim_queue(replace(wanted, lanes=lanes), queue)
        return self._begin(claims)

    def _wanted(self, worker_id: uuid.UUID, total: int) -> Wanted:
        return Wanted(
            worker_id,
            self._controls.kinds,
            (),
            {},
            total,
            never_alone=self._not_repeated,
            free_slots=self._free_slots,
        )

    def _begin(self, claims: list[Claim]) -> list[Claim]:
        if claims:
            self._slots.take([Run(claim) for claim in claims])
            self._start()
        return claims

    def _lanes_of_suspects(self, session: Session, wanted: Wanted) -> list[Lane]:
        everywhere = replace(wanted, lanes=[*wanted.lanes, *self._limited_lanes])
        return self._limiting.suspects or transitions.lanes_of_suspects(session, everywhere)

    def _might_wait(self, claim: Claim) -> bool:
        """Tell whether a claim ahead would have brought this job: where others come, there may be more of them."""
        return not claim.crashes and claim.kind not in self._not_repeated

    def _carry_out(self, work: Callable[[Session], T]) -> T:
        """Claim; what raises may have claimed all the same, where each statement is a transaction of its own."""
        try:
            return self._control.statements(work)
        except BaseException:
            self._reconciled_at = -math.inf
            raise

    def _idle_wait(self) -> float:
        """Return how long to sleep: until the next job that is known falls due, at most."""
        if self._idle_polls < len(IDLE_WAITS):
            wait = min(IDLE_WAITS[self._idle_polls], self._poll)
        elif self._slots.is_idle():
            wait = self._wakeup.longest_sleep(self._idle_polls - len(IDLE_WAITS))
        else:  # what it runs may become due again, and nobody rings for that
            wait = self._poll
        due_in = min(self._next_due - time.monotonic(), self._limiting.wait)
        return min(wait, max(due_in, SHORTEST_WAIT))

    def _too_early(self) -> float:
        """Return for how long not to look: others were quicker than this one each time that it was woken."""
        if self._idle_polls <= len(IDLE_WAITS):
            return 0.0
        return min(IDLE_WAITS[0], self._poll) + self._looked_at - time.monotonic()

    def _tell_if_drained(self) -> None:
        if self._settings.drain and self._slots.is_idle() and self._is_drained():
            self._drained()

    def _claim(
        self, session: Session, worker_id: uuid.UUID, ahead: Mapping[str, int], guesses: bool
    ) -> tuple[list[Claim], int]:
        # Who changes what holds for a queue rings the bell: while it is heard, it need not be read at the first ring.
        if self._controls.expired or not (guesses and self._wakeup.is_on):
            self._heed(session)
        found = self._guess_lanes() if guesses else self._find_lanes(session)
        lanes, kinds = self._plain(found), self._controls.kinds
        if not kinds:
            return [], 0
        queues = {queue for queue, _ in lanes}
        free, rooms = self._slots.room(ahead)
        pools = self._pools.in_turn(queues, rooms)
        if guesses:
            free = self._slots.total // 2  # a better priority may have come as well
        asked = min(free, sum(rooms[pool] for pool in set(pools.values())))
        if len(pools) == len(queues):  # no slot that is given up would let it claim more
            self._slots.wake_at = -1
        if asked <= 0 and not self._limiting.suspects:
            return [], 0
        wanted = Wanted(
            worker_id,
            [kind for kind in kinds if not ahead or kind not in self._not_repeated],
            lanes,
            {queue: rooms[pool] for queue, pool in pools.items()},
            asked,
            pools,
            never_alone=self._not_repeated,
            free_slots=self._free_slots,
            marks=self._marks,
            durable=self._control.durable,
            ahead=bool(ahead),
        )
        if shares := self._shares(session, wanted):
            wanted = replace(wanted, shares=shares)
        suspects = self._clearing.lanes(session, wanted)
        if suspects:
            self._slots.wake_at = math.inf
        claims = [] if suspects else transitions.claim(session, wanted)
        if claims or guesses or not self._slots.is_idle():
            self._clearing.begin_if_needed(session, wanted)
        else:
            self._clearing.end()
            alone = replace(
                wanted, lanes=suspects or lanes, total=1, suspects=True, ahead=False, shares={}
            )
            claims = transitions.claim(session, replace(alone, marks=self._starts))
        return claims, asked

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

    def _fill(self, worker_id: uuid.UUID, claims: list[Claim]) -> Iterator[list[Claim]]:
        """Claim and yield what makes a full batch of each of these jobs; take what is there, and wait for no more.

        Ahead: who can get into no batch waits for a slot. Where there are few, the claim may have looked through
        a long backlog of other kinds.
        """
        room: dict[str, Counter[str]] = {}
        for claim in claims:
            handler = self._batched.get(claim.kind)
            if handler and may_share(claim):
                by_queue = room.setdefault(handler.declaration.kind, Counter())
                by_queue[claim.queue] += (handler.batch or 1) - 1
        for kind, by_queue in room.items():
            began = time.monotonic()
            asked = min(sum(by_queue.values()), MOST_AHEAD)
            if asked and began >= self._fill_from.get(kind, 0.0):
                wanted = Wanted(
                    worker_id,
                    [kind, *self._batched[kind].declaration.aliases],
                    self._lanes,
                    by_queue,
                    asked,
                    free_slots=self._free_slots,
                    marks=self._marks,
                    durable=self._control.durable,
                    ahead=True,
                )
                found = self._carry_out(partial(transitions.claim, wanted=wanted))
                now = time.monotonic()
                if now - began > FILL_WORTH * (1 + len(found)):
                    self._fill_from[kind] = now + FILL_REST * (now - began)
                yield found

    def _find_lanes(self, session: Session) -> Collection[Lane]:
        """Return where ready jobs are; looked up again now and then, and after a claim that came empty."""
        if time.monotonic() >= self._sweep_at:
            self._look(session)
        return self._lanes

    def _guess_lanes(self) -> Collection[Lane]:
        """Return the lanes of the last claims, the better priority first."""
        return sorted(self._last_lanes, key=itemgetter(1))

    def _sees_due(self) -> bool:
        """Look whether anything is due, after a claim that came empty; else take it that there is."""
        return self._idle_polls == 0 or self._control.statements(self._look)

    def _look(self, session: Session) -> bool:
        found = dialects.of(session).lanes(session, self._pools.names)
        found = {lane: due for lane, due in found.items() if self._pools.serves(lane[0])}
        now = time.monotonic()
        self._lanes, self._sweep_at = found.keys(), now + SWEEP
        if any(
            due.first <= 0 or self._controls.queue(lane[0]).paused for lane, due in found.items()
        ):
            self._heed(session)
        self._pass_paused_kinds(session, plain := self._plain(found))
        self._marks = dict(self._starts)
        limited = self._controls.limited_queues
        self._limited_lanes = [
            lane for lane, due in found.items() if lane[0] in limited and due.first <= 0
        ]
        later = [found[lane].next for lane in (*plain, *self._limited_lanes)]
        self._next_due = now + min((due for due in later if due is not None), default=math.inf)
        return any(found[lane].first <= 0 for lane in plain)

    def _mark(self, claims: list[Claim], began_at: float) -> None:
        """Remember how far each lane was claimed, while claims come full.

        What is committed late, with an earlier ``run_at``, is found by the next claim from the beginning.
        """
        if not claims:
            self._marks = dict(self._starts)
        elif self._marks == self._starts:
            self._sweep_at = max(self._sweep_at, _rested(began_at))
        last = {
            (each.queue, each.priority): each for each in claims
        }  # they are in the order of each lane
        self._marks |= {lane: claim.mark for lane, claim in last.items()}

    def _is_drained(self) -> bool:
        """Tell whether nothing of ours is due, or running anywhere: what a dead worker ran comes back."""

        def is_drained(session: Session) -> bool:
            self._heed(session)
            kinds, patterns, controls = list(self._handlers), self._pools.patterns, self._controls
            return not transitions.any_unfinished(
                session, kinds, patterns, controls.paused_kinds, controls.paused_queues
            )

        return self._control.transaction(is_drained)

    def _reconcile(self, worker_id: uuid.UUID) -> None:
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


def _rested(began_at: float) -> float:
    """Return when to read from the beginning again, where it may take long to pass what others have left behind."""
    now = time.monotonic()
    return now + min(SWEEPS_SHARE * (now - began_at), LONGEST_SWEEP)
