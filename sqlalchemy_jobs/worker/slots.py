"""Which runs this worker owns, which of them wait for a slot, and for how many more it has room."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from operator import itemgetter
from types import MappingProxyType
from typing import Any

from sqlalchemy_jobs.app import Handler
from sqlalchemy_jobs.claims import ALONE_FROM, Claim
from sqlalchemy_jobs.runs import Batch, Run
from sqlalchemy_jobs.worker.pools import Place, Pools

NONE: Mapping[str, Any] = MappingProxyType({})
RunKey = tuple[int, int, int]
MOST_UNSETTLED = 2000
"""No more is claimed while so many runs have ended and are not written down yet."""


def may_share(claim: Claim) -> bool:
    """Tell whether a job may be in a batch with others: one that failed before would fail them again."""
    return not claim.failures and not claim.crashes


def key_of(run: Run) -> RunKey:
    claim = run.claim
    return claim.job_id.int, claim.attempt, claim.worker_id.int  # a UUID hashes in Python


def most_hung(total: int) -> int:
    """Return how many runs may hang for nothing; each has a connection of the application's pool."""
    return max(1, total // 2)


class Slots:
    """A run is owned from its claim until it is settled; it waits for a slot, and keeps it until its handler ends.

    ``changed`` is called, without the lock, when a slot or an ownership was given up and no more than ``wake_at``
    runs are left that wait or have a slot, or none is left to be settled.
    """

    def __init__(
        self,
        total: int,
        pools: Pools,
        changed: Callable[[], None],
        batched: Mapping[str, Handler] = NONE,
    ) -> None:
        self.total = total
        self._most_hung = most_hung(total)
        self._pools = pools
        self._changed = changed
        self._batched = batched
        """The batch handlers by kind: their runs get a slot together."""
        self._most_owned = MOST_UNSETTLED + total * max(
            (handler.batch or 1 for handler in batched.values()), default=1
        )
        self.wake_at: float = math.inf
        self.begin_until: float = math.inf
        """Until when, by the monotonic clock, what waits may begin: then what holds for its queue must be read again."""
        self.kept = 0
        """How many slots are kept for what does not wait."""
        self._lock = threading.Lock()
        self._owned: dict[RunKey, Run] = {}
        self._running: dict[Run, str] = {}
        """Each with the pool that it counts in."""
        self._waiting: dict[str, deque[tuple[float, Run]]] = {}
        """By queue, with the time of the claim: the longest waiting first. No queue in which none waits."""
        self._waiting_count = 0
        self._first: set[Run] = set()
        """Those among them that go before all others: they have their slots already."""
        self._hung: set[Run] = set()
        self._by_pool: Counter[str] = Counter()
        """How many are running."""
        self._ended: Counter[str] = Counter()

    # --- the life of a run --------------------------------------------------------------------------

    def take(self, runs: Iterable[Run], *, first: bool = False) -> None:
        """Own claimed runs, and have them wait, perhaps before all others; but not one that is owned already.

        Its claim was lost in a crash of the server and made again: it must not start a second time.
        """
        now = time.monotonic()
        with self._lock:
            if first:
                oldest = min((each[0][0] for each in self._waiting.values()), default=now)
                now = math.nextafter(oldest, 0)
            for run in runs:
                key = key_of(run)
                if key not in self._owned:
                    self._owned[key] = run
                    waiting = self._waiting.setdefault(run.queue, deque())
                    (waiting.appendleft if first else waiting.append)((now, run))
                    if first:
                        self._first.add(run)
                    self._waiting_count += 1

    def next(self) -> Run | None:
        """Give a slot to the run whose turn it is; to a batch if its kind has them."""
        if not self._waiting_count:
            return None
        with self._lock:
            if len(self._running) + self.lost + self.kept >= self.total:
                return None
            if time.monotonic() > self.begin_until:
                return None
            if (queue := self._first_in_turn()) is None:
                return None
            waiting, pool = self._waiting[queue], self._place(queue).pool
            _, run = waiting.popleft()
            self._waiting_count -= 1
            if handler := self._batched.get(run.claim.kind):
                run = self._batch(run, handler, waiting)
            if not waiting:
                del self._waiting[queue]
            if self._first:
                self._first.difference_update(run.runs if isinstance(run, Batch) else [run])
            self._running[run] = pool
            self._by_pool[pool] += 1
            return run

    def _place(self, queue: str) -> Place:
        place = self._pools.place(queue)
        assert place is not None  # nothing else is claimed
        return place

    def _first_in_turn(self) -> str | None:
        """Return the queue whose first run has waited longest, of the best level of each pool with room."""
        if len(self._waiting) == 1:  # nearly always
            [queue] = self._waiting
            return queue if self._has_room(self._place(queue).pool) else None
        firsts: dict[str, tuple[int, float, str]] = {}
        for queue, waiting in self._waiting.items():
            pool, level, _ = self._place(queue)
            if self._has_room(pool):
                turn = (level, waiting[0][0], queue)
                firsts[pool] = min(firsts.get(pool, turn), turn)
        return min(firsts.values(), key=itemgetter(1))[2] if firsts else None

    def _has_room(self, pool: str) -> bool:
        most = self._pools.concurrency[pool]
        return most is None or self._by_pool[pool] < most

    def _batch(self, first: Run, handler: Handler, waiting: deque[tuple[float, Run]]) -> Batch:
        """Return it with those of its kind that wait in the same queue: what is there, as long as there is room."""
        members, others = [first], []
        if may_share(first.claim):
            while waiting and len(members) < (handler.batch or 1):
                at, run = waiting.popleft()
                if self._batched.get(run.kind) is handler and may_share(run.claim):
                    members.append(run)
                else:
                    others.append((at, run))
            waiting.extendleft(reversed(others))
            self._waiting_count -= len(members) - 1
        return Batch(members)

    def withdraw(self, waited: float = 0.0) -> list[Run]:
        """Take those back that have waited for so many seconds; they stay owned until they are settled."""
        until = time.monotonic() - waited
        withdrawn = []
        with self._lock:
            for queue, waiting in [*self._waiting.items()]:
                while waiting and waiting[0][0] <= until:
                    withdrawn.append(waiting.popleft()[1])
                if not waiting:
                    del self._waiting[queue]
            self._waiting_count -= len(withdrawn)
            self._first.difference_update(withdrawn)
        return withdrawn

    def withdraw_if(self, condition: Callable[[Run], bool]) -> list[Run]:
        """Take those back that wait and of which it is true; they stay owned until they are settled."""
        withdrawn = []
        with self._lock:
            for queue, waiting in self._waiting.items():
                withdrawn += [run for _, run in waiting if condition(run)]
                self._waiting[queue] = deque(each for each in waiting if not condition(each[1]))
            self._waiting_count -= len(withdrawn)
            self._first.difference_update(withdrawn)
        return withdrawn

    def ended(self, run: Run) -> bool:
        """Free the slot of a run whose handler has ended; False when it was given up before."""
        with self._lock:
            self._hung.discard(run)
            freed = self._free(run)
        self._tell()
        return freed

    def give_up(self, run: Run) -> bool:
        """Free the slot of a run whose handler does not come back; False when it has ended before."""
        with self._lock:
            freed = self._free(run)
            if freed:
                self._hung.add(run)
        self._tell()
        return freed

    def _free(self, run: Run) -> bool:
        pool = self._running.pop(run, None)
        if pool is None:
            return False
        self._by_pool[pool] -= 1
        self._ended[pool] += 1
        return True

    def disown(self, runs: Iterable[Run]) -> None:
        """Forget runs that are settled, or whose jobs belong to others."""
        with self._lock:
            for run in runs:
                self._owned.pop(key_of(run), None)
        self._tell()

    def disown_all(self) -> list[Run]:
        """Forget every run, and return them: their worker was declared dead or is going away."""
        with self._lock:
            runs = list(self._owned.values())
            # Of a batch the runs are owned, but it is what runs.
            runs += [run for run in self._running if isinstance(run, Batch)]
            self._owned.clear()
            self._waiting.clear()
            self._waiting_count = 0
            self._first.clear()
        for run in runs:
            run.ask_to_stop()
        self._tell()
        return runs

    def _tell(self) -> None:
        if len(self._running) + self._waiting_count <= self.wake_at or not self._owned:
            self._changed()

    # --- what there is ------------------------------------------------------------------------------

    @property
    def lost(self) -> int:
        """How many slots are not used, since as many handlers hang beyond what is allowed."""
        return max(0, len(self._hung) - self._most_hung) if self._hung else 0

    @property
    def waiting(self) -> int:
        """How many runs wait for a slot."""
        return self._waiting_count

    def owned(self) -> list[Run]:
        with self._lock:
            return list(self._owned.values())

    def running(self) -> list[Run]:
        with self._lock:
            return list(self._running)

    def is_idle(self) -> bool:
        """Tell whether no handler is running and nothing is left to write down."""
        with self._lock:
            return not self._owned and not self._running

    def ended_counts(self) -> dict[str, int]:
        """Return how many handlers have ended or were given up so far, by pool."""
        with self._lock:
            return dict(self._ended)

    def room(
        self, ahead: Mapping[str, int] = NONE, *, beside_waiting: bool = False
    ) -> tuple[int, dict[str, int]]:
        """Return the room in all, and that of each pool that has any: ``ahead`` says how many may wait.

        ``beside_waiting``: the slots that are free now, though others wait for them.
        """
        with self._lock:
            if any(run.claim.crashes >= ALONE_FROM for run in self._running):
                return 0, {}
            if len(self._owned) > self._most_owned:
                return 0, {}
            free = self.total - self.lost - len(self._running)
            rooms = {}
            taken = dict.fromkeys(self._pools.concurrency, 0) | self._by_pool
            if beside_waiting:
                free -= len(self._first)
                for run in self._first:
                    taken[self._place(run.queue).pool] += 1
            else:
                free += sum(ahead.values()) - self._waiting_count
                for queue, waiting in self._waiting.items():
                    taken[self._place(queue).pool] += len(waiting)
            for pool, most in self._pools.concurrency.items():
                room = free
                if most is not None:
                    room = min(free, most + ahead.get(pool, 0) - taken[pool])
                if room > 0:
                    rooms[pool] = room
            return free, rooms
