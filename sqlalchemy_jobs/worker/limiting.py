"""Claims the jobs that count against limits: of which keys, and when to look again."""

from __future__ import annotations

import math
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from sqlalchemy.orm import Session

from sqlalchemy_jobs import dialects, limited
from sqlalchemy_jobs.app import Handler
from sqlalchemy_jobs.claims import ALONE_FROM, Claim, Lane, LimitedKey, LimitedLane, Wanted
from sqlalchemy_jobs.ids import earlier
from sqlalchemy_jobs.limits import UNLIMITED, Numbers, key_of_queue, name_of
from sqlalchemy_jobs.runs import Run
from sqlalchemy_jobs.worker.control import Control
from sqlalchemy_jobs.worker.controls import Controls
from sqlalchemy_jobs.worker.pools import Pools
from sqlalchemy_jobs.worker.slots import NONE, Slots
from sqlalchemy_jobs.worker.turns import KEYS, Turns

LANES = 200
"""How many lanes one look goes through."""
LOOKS = 5
"""How many times in a row it looks on when no key can have a job claimed; then the other jobs have their turn."""
MOST_SWEPT = 500
"""By how many jobs one claim goes, at most, that has not looked."""
MOST_IN_STEPS = 100
"""How many jobs one claim brings that takes several round trips: it keeps rows locked meanwhile."""
SWEEP = 1.0
"""Seconds for which a busy worker may miss a key that is new, or that another worker has made free."""
LOOKS_SHARE = 20
"""A busy worker looks again after so many times as long as it took: there may be many keys."""
LATE = 5000
"""Milliseconds by which the transaction of a job may commit after those of newer ones, and it counts as new all the same."""
ROUND_SHARE = 5
"""The same for an idle worker that has not been through all keys yet."""
PROBE = 60.0
"""Seconds between two looks of a worker whose code has no limits, for jobs that were enqueued when it had."""


class _Found(NamedTuple):
    """What a look has found."""

    lanes: Sequence[LimitedLane]
    is_held: bool
    """Whether something that ends elsewhere untold holds up a key."""
    began_at: float


class Limiting:
    """Each key has its turn, one after the other, and one that is blocked does not hold up the others.

    For the claimer's thread; but ``disowned`` and ``is_awaited`` are for any.
    """

    def __init__(
        self,
        control: Control,
        slots: Slots,
        handlers: Mapping[str, Handler],
        pools: Pools,
        controls: Controls,
        poll: float,
        wake: Callable[[], None],
    ) -> None:
        self._control = control
        self._slots = slots
        self._handlers = handlers
        self._not_repeated = {
            kind for kind, each in handlers.items() if each.declaration.on_crash == "fail"
        }
        self._pools = pools
        self._controls = controls
        self._poll = poll
        self._wake = wake
        self._numbers = {
            name: each.declaration.limit.numbers
            for each in handlers.values()
            if each.declaration.limit is not None
            for name in each.declaration.limit_names
        }
        self._counted = {
            name: numbers.concurrency
            for name, numbers in self._numbers.items()
            if numbers.only_count and numbers.concurrency is not None
        }
        """What the limits let run of which nothing else matters, by name."""
        self._kinds: dict[str, set[str]] = {}
        """By the name of a limit: whose jobs count against it."""
        for kind, each in handlers.items():
            for name in each.declaration.limit_names:
                self._kinds.setdefault(name, set()).add(kind)
        self.has_passed_paused = False
        """Whether the present round came by jobs whose queue or kind is paused, as far as is known."""
        self._has_found = False
        self._look_at = self._next_due = -math.inf
        self._newest = uuid.UUID(int=0)
        """The id of the newest job that was seen."""
        self._newest_at = -math.inf
        self._cursor = ""
        """Behind which key the next look begins; "" for a new round."""
        self._goes_on = False
        """Whether the round is to go on at once."""
        self._is_disturbed = False
        """Whether it was called in the middle of a round: where the round had been something may have come up."""
        self._found_in_round = self._is_held_in_round = False
        """Whether a round has found anything, and whether something that ends elsewhere untold holds up a key."""
        self._due_in_round = math.inf
        self._turns = Turns()
        self._at_once = True
        """Whether there is a way to claim in one round trip, as far as is known."""
        self._suspects: dict[str, LimitedKey] = {}
        self._sweeps = False
        """Whether the last look found nothing that could not be claimed ahead: most likely there is more of that behind."""
        self._seen: set[str] = set()
        """The queues in which the last look has found something."""
        self._queues: set[str] = set()
        """The keys of queues whose rows have been made."""
        self._ours: dict[uuid.UUID, str] = {}
        self._freed: deque[str] = deque()
        self._rest_until: dict[str, float] = {}
        """Until when queues that have limits themselves let nothing begin, as far as is known."""

    # --- for the claimer ----------------------------------------------------------------------------

    def claim(self, wanted: Wanted, ahead: Mapping[str, int] = NONE) -> list[Claim]:
        """Claim jobs for free slots, or so many of each pool ahead of them."""
        free, rooms = self._slots.room(ahead)
        wanted = replace(wanted, total=min(wanted.total, free), ahead=bool(ahead))
        if ahead and self._sweeps and not self._turns:
            return self._sweep(wanted, rooms)
        return self._claim(wanted, rooms, pressing=False if ahead else None)

    def claim_beside_waiting(self, wanted: Wanted) -> list[Claim]:
        """Claim jobs that are not to wait, for slots that are free now though others wait for them."""
        free, rooms = self._slots.room(beside_waiting=True)
        return self._claim(replace(wanted, total=min(wanted.total, free)), rooms, pressing=True)

    def look(self, *, is_busy: bool, wanted: int = 1, ahead: Mapping[str, int] = NONE) -> None:
        """Look which keys may have jobs to claim, if it is time to: a busy worker does so now and then only.

        In the middle of a round also if those that may be claimed now have fewer than are wanted: a claim is to be full.
        """
        self._note_freed()
        now = time.monotonic()
        self._is_disturbed |= bool(self._cursor) and now < self._next_due
        self._rest_until = {key: until for key, until in self._rest_until.items() if until > now}
        if now < self._look_at:
            if ahead and self._sweeps and not self._turns:
                return
            has_fewer = self._cursor and self._turns.expected(self._with_room(ahead)) < wanted
            has_enough = (self._turns and not has_fewer) or (ahead and self._turns.is_resting)
            if not self._goes_on and (is_busy or has_enough or self._is_dormant):
                return
        self._look(now, ahead)

    def claim_queue(self, wanted: Wanted, queue: str) -> list[Claim]:
        """Claim jobs of a queue that has limits itself: of its lanes, and of keys in it."""
        key, now = key_of_queue(queue), time.monotonic()
        free, rooms = self._slots.room()
        pool = self._pools.in_turn([queue], rooms).get(queue)
        keys = self._turns.of_queue(queue)
        if wanted.suspects:
            keys = [each for each in self._suspects.values() if each.queue == queue]
        keys = keys[:KEYS]
        if pool is None or not self.may_begin(queue) or not (wanted.lanes or keys):
            return []
        if key not in self._queues:
            self._control.transaction(partial(limited.add_keys, keys=[key]))
            self._queues.add(key)
        total = min(wanted.total, free)
        most = -(-total // max(len(keys), 1))
        found = self._control.transaction(
            partial(
                limited.claim_queue,
                wanted=replace(wanted, room={queue: rooms[pool]}, total=total),
                queue=queue,
                numbers=self._controls.queue(queue).numbers,
                keys=[each._replace(most=most) for each in keys],
            )
        )
        if found.opens:
            self._rest_until[key] = now + min(found.opens, self._poll)
        for each in keys:  # what there is more of them the next look sees
            if wanted.suspects:
                del self._suspects[each.key]
            else:
                self._turns.take_out(each)
        self._ours.update((claim.job_id, key) for claim in found.claims)
        return found.claims

    def claim_suspect(self, wanted: Wanted) -> list[Claim]:
        """Claim a job that must run alone."""
        free, rooms = self._slots.room()
        wanted = replace(wanted, total=min(wanted.total, free))
        wanted = self._of_queues(wanted, rooms, {each.queue for each in self._suspects.values()})
        keys = [each for each in self._suspects.values() if each.queue in wanted.room][:KEYS]
        if wanted.total <= 0 or not keys:
            return []
        for each in keys:
            del self._suspects[each.key]
        found = self._claim_of(wanted, [each._replace(most=wanted.total) for each in keys])
        for key, claims in found.items():
            self._turns.claimed(key, len(claims))
        return [claim for of_key in found.values() for claim in of_key]

    @property
    def suspects(self) -> list[Lane]:
        """The lanes of jobs that must run alone."""
        return [(each.queue, each.priorities[0]) for each in self._suspects.values()]

    @property
    def wanted_slots(self) -> int:
        """How many jobs are to have slots at once, at least."""
        self._note_freed()
        return self._turns.pressing

    @property
    def wants_slots(self) -> bool:
        """Whether there may be jobs to claim as soon as there is a slot."""
        self._note_freed()
        return bool(self._turns)

    @property
    def is_pressing(self) -> bool:
        """Whether some of them are not to be claimed ahead of it."""
        self._note_freed()
        return self._turns.is_pressing

    def may_claim(self, *, ahead: bool) -> bool:
        """Tell whether a claim may bring something, for free slots or ahead of them."""
        self._note_freed()
        return bool(self._turns) or (self._sweeps if ahead else self._turns.is_resting)

    @property
    def is_resting(self) -> bool:
        """Whether more is to be claimed ahead as soon as some of what was has run; then ``wake`` is called."""
        return self._turns.is_resting

    @property
    def goes_on(self) -> bool:
        """Whether there may be more to claim."""
        return bool(self._turns or self._cursor or self._turns.is_resting)

    def may_begin(self, queue: str) -> bool:
        """Tell whether the limits of a queue may let a job begin."""
        return self._rest_until.get(key_of_queue(queue), 0.0) <= time.monotonic()

    @property
    def wait(self) -> float:
        """Seconds until there may be something to claim that nobody tells of."""
        if self._freed:
            return 0.0
        has_turns = self._turns or self._turns.is_resting
        next_due = self._look_at if has_turns else self._next_due
        return max(min(next_due, *self._rest_until.values(), math.inf) - time.monotonic(), 0.0)

    def disowned(self, runs: Iterable[Run]) -> None:
        """Take note of runs whose jobs are not running here any more: others of their keys may begin."""
        keys = [key for run in runs if (key := self._ours.pop(run.job_id, None)) is not None]
        self._freed.extend(keys)
        if any(self._turns.waits(key) or key.startswith(key_of_queue("")) for key in keys):
            self._wake()

    def is_awaited(self, run: Run) -> bool:
        """Tell whether others wait for the end of a run, since no more may run at once."""
        key = self._ours.get(run.job_id)
        return key is not None and (self._turns.is_awaited(key) or key in self._rest_until)

    def forget(self) -> None:
        """Look again: what holds for queues and kinds has changed."""
        self._turns.forget()
        self._sweeps = False
        self._cursor, self._look_at = "", -math.inf

    def _with_room(self, ahead: Mapping[str, int]) -> list[str]:
        """Return the queues of keys that may have jobs claimed now."""
        queues = self._turns.queues
        with_room = self._pools.in_turn(queues, self._slots.room(ahead)[1])
        return [queue for queue in with_room if self.may_begin(queue)]

    def _note_freed(self) -> None:
        while self._freed:
            key = self._freed.popleft()
            self._rest_until.pop(key, None)
            self._turns.freed(key)

    # --- looking ------------------------------------------------------------------------------------

    @property
    def _is_dormant(self) -> bool:
        """Whether nothing is expected: the code has no limits, and no job is left from when it had."""
        return not self._numbers and not self._has_found

    def _look(self, began_at: float, ahead: Mapping[str, int]) -> None:
        self._goes_on = False
        was_in_round = bool(self._cursor)
        for _ in range(LOOKS):
            if not self._cursor:
                self._found_in_round = self._is_held_in_round = self.has_passed_paused = False
                self._is_disturbed = False
                self._due_in_round = math.inf
                self._suspects.clear()
                self._turns.begin_round()
            self._seen.clear()
            found = self._control.statements(self._find)
            all_may_wait = self._take_in(found)
            self._sweeps = all_may_wait and bool(self._cursor) and self._at_once
            self._has_found = self._found_in_round or (self._has_found and bool(self._cursor))
            if not self._cursor or self._turns.expected(self._with_room(ahead)):
                break
        if (was_in_round and not self._cursor) or (self._cursor and began_at >= self._newest_at):
            # A key that is new would wait until the round comes to it.
            newest = self._control.statements(self._find_newest)
            lanes = [each for each in newest.lanes if not self._turns.waits(each.key)]
            self._take_in(newest._replace(lanes=lanes))
            self._newest_at = time.monotonic() + SWEEP / 5
        now = time.monotonic()
        took = now - began_at
        self._look_at = now + (PROBE if self._is_dormant else max(SWEEP, LOOKS_SHARE * took))
        again = math.inf
        if self._cursor or self._is_disturbed:
            again = min(ROUND_SHARE * took, self._poll)
        elif self._is_held_in_round:
            again = self._poll
        self._next_due = min(self._due_in_round, now + again)

    def _find(self, session: Session) -> _Found:
        """Look behind the cursor, and move it."""
        began_at, most = time.monotonic(), max(LANES, self._slots.total)
        lanes = dialects.of(session).limits.lanes(session, self._cursor, most)
        found = _Found(*self._ours_of(session, lanes), began_at)
        self._cursor = lanes[-1].key if len(lanes) == most else ""
        return found

    def _find_newest(self, session: Session) -> _Found:
        """Look at the jobs that are new."""
        began_at = time.monotonic()
        after = earlier(self._newest, LATE)
        found, self._newest = dialects.of(session).limits.newest(session, after)
        return _Found(*self._ours_of(session, found), began_at)

    def _ours_of(
        self, session: Session, found: list[LimitedLane]
    ) -> tuple[list[LimitedLane], bool]:
        """Return those that are ours, of an ordered key the lane of its oldest job; and whether one is left to others."""
        ours = [each for each in found if self._is_ours(each)]
        if new := {each.key for each in ours if not each.is_known}:
            limited.add_keys(session, new)
        ordered = {each.key for each in ours if self._numbers_of(each.key).ordered}
        if not ordered:
            return ours, False
        opens = {each.key: each.opens for each in ours}
        heads = dialects.of(session).limits.ordered_heads(session, sorted(ordered))
        heads = [each._replace(opens=opens[each.key]) for each in heads if self._is_ours(each)]
        others = [each for each in ours if each.key not in ordered]
        return others + heads, len(heads) < len(ordered)

    def _is_ours(self, lane: LimitedLane) -> bool:
        """Tell whether the lane may have jobs for this worker; keys that only others know are left to them."""
        is_served = self._pools.serves(lane.queue)
        return is_served and (lane.kind in self._handlers or name_of(lane.key) in self._numbers)

    def _numbers_of(self, key: str) -> Numbers:
        return self._numbers.get(name_of(key), UNLIMITED)

    def _take_in(self, found: _Found) -> bool:
        """Note what there is; True: all of it may be claimed ahead."""
        self._is_held_in_round |= found.is_held
        sorted_in = [self._sort_in(each, found.began_at) for each in found.lanes]
        return all(sorted_in)

    def _sort_in(self, lane: LimitedLane, now: float) -> bool:
        """Note whether there is something to claim in a lane, and else until when there is not; True: claimed ahead, perhaps."""
        self._found_in_round = True
        if self._is_paused(lane):
            self.has_passed_paused = True
            return False
        self._seen.add(lane.queue)
        numbers = self._numbers_of(lane.key)
        due = lane.due
        if numbers.rate is not None:
            # Later than that it cannot be: then the server's clock was set back.
            due = max(due, min(lane.opens, numbers.rate.window.total_seconds()))
        if due > 0:
            self._due_in_round = min(self._due_in_round, now + due)
            return False
        may_wait = (
            numbers.only_count
            and not lane.crashes
            and lane.kind not in self._not_repeated
            and self._controls.is_plain(lane.queue)
        )
        key = LimitedKey(lane.key, lane.queue, [lane.priority], numbers, 0, lane.has_more, may_wait)
        if lane.crashes >= ALONE_FROM and lane.kind not in self._not_repeated:
            self._suspects[lane.key] = key
        if not self._turns.looked_at(key, lane.running):
            self._is_held_in_round = True
            return False
        return may_wait

    def _is_paused(self, lane: LimitedLane) -> bool:
        """Tell whether nothing of a lane is to begin; behind a job of a paused kind there may be others of its limit."""
        if self._controls.queue(lane.queue).paused or not self._controls.paused_kinds:
            return self._controls.queue(lane.queue).paused
        kinds = {lane.kind}
        if not self._numbers_of(lane.key).ordered:
            kinds |= self._kinds.get(name_of(lane.key), set())
        return kinds.issubset(self._controls.paused_kinds)

    # --- claiming -----------------------------------------------------------------------------------

    def _claim(
        self, wanted: Wanted, rooms: Mapping[str, int], *, pressing: bool | None
    ) -> list[Claim]:
        """Claim jobs of the keys whose turn it is, as ``Turns.pick`` finds them.

        Those that bring nothing have lost their turn: then it is that of the next ones.
        """
        if pressing is None:
            self._turns.wake()
        wanted = self._of_queues(wanted, rooms, self._turns.queues)
        if not self._at_once:
            wanted = replace(wanted, total=min(wanted.total, MOST_IN_STEPS))
        claims: list[Claim] = []
        while wanted.total > 0 and not claims:
            keys = self._turns.pick(wanted.total, wanted.room, pressing=pressing)
            if not keys:
                return []
            found = self._claim_of(wanted, keys)
            claims = [claim for of_key in found.values() for claim in of_key]
            self._turns.brought(keys, len(claims), wanted.total)
            left = Counter(rooms)
            left.subtract(wanted.pools[claim.queue] for claim in claims)
            reached = (
                set() if len(claims) == wanted.total else {pool for pool in left if left[pool] > 0}
            )
            for each in reversed(keys):
                count, pool = len(found.get(each.key, ())), wanted.pools[each.queue]
                had_room = pool in reached
                if count:  # who comes before it had its turn
                    reached.add(pool)
                self._turns.put_back(each, count, had_room=had_room, ahead=wanted.ahead)
                if not count:  # who knows what holds it up
                    self._is_held_in_round = True
                    self._next_due = min(self._next_due, time.monotonic() + self._poll)
        if claims and not self._turns and self._cursor:
            self._go_on()
        return claims

    def _go_on(self) -> None:
        """Have the round go on at once, also where a busy worker would not look."""
        self._goes_on, self._next_due = True, -math.inf

    def _claim_of(self, wanted: Wanted, keys: Sequence[LimitedKey]) -> dict[str, list[Claim]]:
        """Claim jobs of these keys, in one round trip where that can be; by key."""
        found = None
        if self._at_once and all(each.numbers.only_count for each in keys):
            at_once = partial(limited.claim_at_once, wanted=wanted, keys=keys)
            found = self._control.statements(at_once)
            self._at_once = found is not None
        if found is None:
            found = self._control.transaction(partial(limited.claim, wanted=wanted, keys=keys))
        self._own(found)
        return found

    def _sweep(self, wanted: Wanted, rooms: Mapping[str, int]) -> list[Claim]:
        """Claim of the next keys of the round, without a look at them first.

        As long as that brings something of each: else one looks what is left of them, and why.
        """
        wanted = self._of_queues(wanted, rooms, self._seen)
        most = min(wanted.total, MOST_SWEPT)
        if most <= 0 or not wanted.room:
            return []
        swept = self._control.statements(
            lambda session: limited.claim_next(session, wanted, self._cursor, self._counted, most)
        )
        if swept is None:
            self._at_once = self._sweeps = False
            return []
        self._own(swept.claims)
        for key, claims in swept.claims.items():
            self._turns.claimed(key, len(claims))
        self._sweeps = bool(swept.last) and len(swept.claims) == swept.keys
        if self._sweeps:
            self._cursor = swept.last
            self._is_disturbed = True  # of what it has passed there may be more
        else:
            self._go_on()
        return [claim for of_key in swept.claims.values() for claim in of_key]

    def _of_queues(
        self, wanted: Wanted, rooms: Mapping[str, int], queues: Collection[str]
    ) -> Wanted:
        """Return what is wanted of those of the queues that have room, and no limits themselves."""
        pools = self._pools.in_turn(filter(self._controls.is_plain, queues), rooms)
        room = {queue: rooms[pool] for queue, pool in pools.items()}
        return replace(wanted, room=room, pools=pools)

    def _own(self, found: Mapping[str, Iterable[Claim]]) -> None:
        for key, claims in found.items():
            self._ours.update((claim.job_id, key) for claim in claims)
