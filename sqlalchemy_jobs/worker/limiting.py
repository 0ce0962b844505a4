"""Claims the jobs that count against limits: of which keys, and when to look again."""

from __future__ import annotations

import math
import time
import uuid
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial

from sqlalchemy.orm import Session

from sqlalchemy_jobs import dialects, limited
from sqlalchemy_jobs.app import Handler
from sqlalchemy_jobs.claims import ALONE_FROM, Claim, Lane, LimitedKey, LimitedLane, Wanted
from sqlalchemy_jobs.ids import earlier
from sqlalchemy_jobs.limits import UNLIMITED, Numbers, key_of_queue, name_of
from sqlalchemy_jobs.runs import Run
from sqlalchemy_jobs.worker.control import Control
from sqlalchemy_jobs.worker.controls import Controls
from sqlalchemy_jobs.worker.looking import Ahead, Found
from sqlalchemy_jobs.worker.loops import Loop
from sqlalchemy_jobs.worker.pools import Pools
from sqlalchemy_jobs.worker.slots import Slots

LANES = 200
"""How many lanes one look goes through."""
LOOKS = 5
"""How many times in a row it looks on when all keys were blocked; then the other jobs have their turn."""
KEYS = 10
"""By how many keys one claim goes at least, if there are so many; by more where they bring too few jobs."""
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


class Limiting:
    """Each key has its turn, one after the other, and one that is blocked does not hold up the others.

    For the claimer's thread; but ``disowned`` is for any. While a round goes on the next lanes are looked for in another one.
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
        self._is_disturbed = False
        """Whether it was called in the middle of a round: where the round had been something may have come up."""
        self._found_in_round = self._is_held_in_round = False
        """Whether a round has found anything, and whether something that ends elsewhere untold holds up a key."""
        self._due_in_round = math.inf
        self._open: OrderedDict[tuple[str, str], LimitedKey] = OrderedDict()
        """By key and queue; the next one to have its turn first."""
        self._blocked: dict[str, list[LimitedKey]] = {}
        self._at_once = True
        """Whether there is a way to claim in one round trip, as far as is known."""
        self._of_a_key = 1.0
        """How many jobs of a key the next claim may expect."""
        self._suspects: dict[str, LimitedKey] = {}
        self._running: Counter[str] = Counter()
        """How many jobs of a key were running when it was looked at, with what was claimed since."""
        self._queues: set[str] = set()
        """The keys of queues whose rows have been made."""
        self._ours: dict[uuid.UUID, str] = {}
        self._freed: deque[str] = deque()
        self._freed_since: Counter[str] = Counter()
        """How many runs of a key have ended since the last look, and so since one ahead was asked for."""
        self._ahead = Ahead(self._find)
        self._rest_until: dict[str, float] = {}
        """Until when queues that have limits themselves let nothing begin, as far as is known."""

    # --- for the claimer ----------------------------------------------------------------------------

    def claim(self, wanted: Wanted, *, beside_waiting: bool = False) -> list[Claim]:
        """Claim jobs for slots that are free now, perhaps though others wait for them."""
        if not self._open:
            return []
        return self._claim(wanted, self._open, *self._slots.room(beside_waiting=beside_waiting))

    def look(self, *, is_busy: bool, wanted: int = 1) -> None:
        """Look which keys may have jobs to claim, if it is time to: a busy worker does so now and then only.

        In the middle of a round also if those that are known have fewer than are wanted: a claim is to be full.
        """
        while self._freed:
            key = self._freed.popleft()
            self._rest_until.pop(key, None)
            self._running[key] -= 1
            self._freed_since[key] += 1
            for each in self._blocked.pop(key, ()):
                self._open[each.key, each.queue] = each
        now = time.monotonic()
        self._is_disturbed |= bool(self._cursor) and now < self._next_due
        self._rest_until = {key: until for key, until in self._rest_until.items() if until > now}
        has_enough = self._open and not (self._cursor and self._has_fewer_than(wanted))
        if now >= self._look_at or not (is_busy or has_enough or self._is_dormant):
            self._look(now)

    def claim_queue(self, wanted: Wanted, queue: str) -> list[Claim]:
        """Claim jobs of a queue that has limits itself: of its lanes, and of keys in it."""
        key, now = key_of_queue(queue), time.monotonic()
        free, rooms = self._slots.room()
        pool = self._pools.in_turn([queue], rooms).get(queue)
        known = self._suspects if wanted.suspects else self._open
        keys = [each for each in known.values() if each.queue == queue][:KEYS]
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
                del self._open[each.key, queue]
        self._ours.update((claim.job_id, key) for claim in found.claims)
        return found.claims

    def claim_suspect(self, wanted: Wanted) -> list[Claim]:
        """Claim a job that must run alone."""
        plain = [each for each in self._suspects.values() if self._controls.is_plain(each.queue)]
        for each in plain:
            del self._suspects[each.key]
        keys = {(each.key, each.queue): each for each in plain}
        return self._claim(wanted, keys, *self._slots.room())

    @property
    def suspects(self) -> list[Lane]:
        """The lanes of jobs that must run alone."""
        return [(each.queue, each.priorities[0]) for each in self._suspects.values()]

    @property
    def wanted_slots(self) -> int:
        """For how many jobs there is something to claim, at least."""
        return math.ceil(sum(map(self._expected, self._open.values()))) + len(self._freed)

    @property
    def wants_slots(self) -> bool:
        """Whether there may be jobs to claim as soon as there is a slot."""
        return bool(self._open or self._freed)

    def may_begin(self, queue: str) -> bool:
        """Tell whether the limits of a queue may let a job begin."""
        return self._rest_until.get(key_of_queue(queue), 0.0) <= time.monotonic()

    @property
    def wait(self) -> float:
        """Seconds until there may be something to claim that nobody tells of."""
        if self._freed:
            return 0.0
        next_due = self._look_at if self._open else self._next_due
        return max(min(next_due, *self._rest_until.values(), math.inf) - time.monotonic(), 0.0)

    def disowned(self, runs: Iterable[Run]) -> None:
        """Take note of runs whose jobs are not running here any more: others of their keys may begin."""
        keys = [key for run in runs if (key := self._ours.pop(run.job_id, None)) is not None]
        self._freed.extend(keys)
        if any(key in self._blocked or key.startswith(key_of_queue("")) for key in keys):
            self._wake()

    def is_awaited(self, run: Run) -> bool:
        """Tell whether others wait for the end of a run, since no more may run at once."""
        key = self._ours.get(run.job_id)
        return key is not None and (key in self._blocked or key in self._rest_until)

    @property
    def looking(self) -> Loop:
        """The thread that looks ahead: to be stopped after the claimer's."""
        return self._ahead.loop

    def forget(self) -> None:
        """Look again: what holds for queues and kinds has changed."""
        self._open.clear()
        self._cursor, self._look_at = "", -math.inf

    # --- looking ------------------------------------------------------------------------------------

    @property
    def _is_dormant(self) -> bool:
        """Whether nothing is expected: the code has no limits, and no job is left from when it had."""
        return not self._numbers and not self._has_found

    def _look(self, began_at: float) -> None:
        goes_on = bool(self._cursor)
        for _ in range(LOOKS):
            if not self._cursor:
                self._found_in_round = self._is_held_in_round = self.has_passed_paused = False
                self._is_disturbed = False
                self._due_in_round = math.inf
                for of_round in (self._blocked, self._suspects, self._running):
                    of_round.clear()
            ahead = self._ahead.take(self._cursor)
            found = self._find(self._cursor) if ahead is None else self._of_now(ahead)
            self._cursor = found.last
            self._take_in(found)
            self._has_found = self._found_in_round or (self._has_found and bool(self._cursor))
            if self._open or not self._cursor:
                break
        if (goes_on and not self._cursor) or (self._cursor and began_at >= self._newest_at):
            # A key that is new would wait until the round comes to it.
            newest = self._control.statements(self._find_newest)
            lanes = [each for each in newest.lanes if each.key not in self._blocked]
            self._take_in(newest._replace(lanes=lanes))
            self._newest_at = time.monotonic() + SWEEP / 5
        self._freed_since.clear()
        if self._cursor and self._open and not self._control.dialect.one_writer:
            self._ahead.ask(self._cursor)
        now = time.monotonic()
        took = now - began_at
        self._look_at = now + (PROBE if self._is_dormant else max(SWEEP, LOOKS_SHARE * took))
        again = math.inf
        if self._cursor or self._is_disturbed:
            again = min(ROUND_SHARE * took, self._poll)
        elif self._is_held_in_round:
            again = self._poll
        self._next_due = min(self._due_in_round, now + again)

    def _find(self, after: str) -> Found:
        """Look behind a key; also from the thread that looks ahead."""
        began_at, most = time.monotonic(), max(LANES, self._slots.total)

        def lanes(session: Session) -> Found:
            found = dialects.of(session).limits.lanes(session, after, most)
            last = found[-1].key if len(found) == most else ""
            return Found(after, last, *self._ours_of(session, found), began_at)

        return self._control.statements(lanes)

    def _find_newest(self, session: Session) -> Found:
        """Look at the jobs that are new."""
        began_at = time.monotonic()
        after = earlier(self._newest, LATE)
        found, self._newest = dialects.of(session).limits.newest(session, after)
        return Found("", "", *self._ours_of(session, found), began_at)

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

    def _of_now(self, ahead: Found) -> Found:
        """Return what was found ahead, less what has ended since. What has come up since is left to another round."""
        self._is_disturbed = True
        freed = self._freed_since
        lanes = [
            each._replace(running=max(each.running - freed[each.key], 0))
            if each.key in freed
            else each
            for each in ahead.lanes
        ]
        return ahead._replace(lanes=lanes)

    def _take_in(self, found: Found) -> None:
        self._is_held_in_round |= found.is_held
        for each in found.lanes:
            self._sort_in(each, found.began_at)

    def _sort_in(self, lane: LimitedLane, now: float) -> None:
        """Note whether there is something to claim in a lane, and else until when there is not."""
        self._found_in_round = True
        if self._is_paused(lane):
            self.has_passed_paused = True
            return
        self._running[lane.key] = lane.running
        numbers = self._numbers_of(lane.key)
        due = lane.due
        if numbers.rate is not None:
            # Later than that it cannot be: then the server's clock was set back.
            due = max(due, min(lane.opens, numbers.rate.window.total_seconds()))
        if due > 0:
            self._due_in_round = min(self._due_in_round, now + due)
            return
        key = LimitedKey(lane.key, lane.queue, [lane.priority], numbers, 0, lane.has_more)
        if lane.crashes >= ALONE_FROM and not self._is_never_alone(lane.kind):
            self._suspects[lane.key] = key
        if numbers.concurrency is not None and lane.running >= numbers.concurrency:
            self._is_held_in_round = True
            self._blocked.setdefault(lane.key, []).append(key)
        else:
            if known := self._open.get((lane.key, lane.queue)):
                priorities = sorted({*known.priorities, lane.priority})
                has_more = lane.has_more or known.has_more or len(priorities) > 1
                key = key._replace(priorities=priorities, has_more=has_more)
            self._open[lane.key, lane.queue] = key

    def _is_paused(self, lane: LimitedLane) -> bool:
        """Tell whether nothing of a lane is to begin; behind a job of a paused kind there may be others of its limit."""
        if self._controls.queue(lane.queue).paused or not self._controls.paused_kinds:
            return self._controls.queue(lane.queue).paused
        kinds = {lane.kind}
        if not self._numbers_of(lane.key).ordered:
            kinds |= self._kinds.get(name_of(lane.key), set())
        return kinds.issubset(self._controls.paused_kinds)

    def _is_never_alone(self, kind: str) -> bool:
        handler = self._handlers.get(kind)
        return handler is not None and handler.declaration.on_crash == "fail"

    # --- claiming -----------------------------------------------------------------------------------

    def _claim(
        self,
        wanted: Wanted,
        keys: dict[tuple[str, str], LimitedKey],
        free: int,
        rooms: Mapping[str, int],
    ) -> list[Claim]:
        """Claim jobs of the first of these keys, about as many of each; take the keys out, and keep what may have more."""
        queues = filter(self._controls.is_plain, {queue for _, queue in keys})
        pools = self._pools.in_turn(queues, rooms)
        total = min(wanted.total, free)
        if total <= 0:
            return []
        picked: dict[str, LimitedKey] = {}
        expected = 0.0
        for where, each in list(keys.items()):
            if len(picked) >= KEYS and expected >= total:
                break
            if each.queue in pools and each.key not in picked:
                picked[each.key] = keys.pop(where)
                expected += self._expected(each)
        if not picked:
            return []
        most = -(-total // len(picked))
        found = self._claim_of(
            replace(
                wanted,
                room={queue: rooms[pool] for queue, pool in pools.items()},
                pools=pools,
                total=total,
            ),
            [each._replace(most=most) for each in picked.values()],
        )
        claims = [claim for of_key in found.values() for claim in of_key]
        if expected >= total:  # a claim that was full may go by half as many keys the next time
            self._of_a_key = max(len(claims) / len(picked) * (1 + (len(claims) == total)), 1.0)
        left = Counter(rooms)
        left.subtract(pools[claim.queue] for claim in claims)
        for each in reversed(picked.values()):
            had_room = len(claims) < total and left[pools[each.queue]] > 0
            self._put_back(each, found.get(each.key, []), most, had_room)
        if claims and not self._open and self._cursor:
            self._look_at = self._next_due = -math.inf  # the round goes on
        return claims

    def _claim_of(self, wanted: Wanted, keys: list[LimitedKey]) -> dict[str, list[Claim]]:
        """Claim jobs of these keys, in one round trip where that can be."""
        if self._at_once and all(each.numbers.only_count for each in keys):
            at_once = partial(limited.claim_at_once, wanted=wanted, keys=keys)
            if (found := self._control.statements(at_once)) is not None:
                return found
            self._at_once = False
        return self._control.transaction(partial(limited.claim, wanted=wanted, keys=keys))

    def _has_fewer_than(self, wanted: int) -> bool:
        return len(self._open) < wanted and sum(map(self._expected, self._open.values())) < wanted

    def _expected(self, key: LimitedKey) -> float:
        """Return how many jobs of a key a claim is likely to bring."""
        if not key.has_more:
            return 1.0
        allowed = key.numbers.concurrency
        return min(
            self._of_a_key, math.inf if allowed is None else allowed - self._running[key.key]
        )

    def _put_back(self, key: LimitedKey, claims: list[Claim], most: int, had_room: bool) -> None:
        """Keep a key of which there may be more to claim: to have its turn after the others, or when a run has ended."""
        self._running[key.key] += len(claims)
        if not claims:  # who knows what holds it up
            self._next_due = min(self._next_due, time.monotonic() + self._poll)
        allowed = key.numbers.concurrency
        if allowed is not None:
            self._ours.update((claim.job_id, key.key) for claim in claims)
        if allowed is not None and self._running[key.key] >= allowed:
            self._blocked.setdefault(key.key, []).append(key)
        elif not had_room if len(claims) < most else most > 1 or key.has_more:
            self._open[key.key, key.queue] = key
            if not claims:  # it had no turn
                self._open.move_to_end((key.key, key.queue), last=False)
