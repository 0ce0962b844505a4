"""Which keys of limits have jobs to claim, in whose turn, and which wait until a run has ended."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection
from typing import TypeAlias

from sqlalchemy_jobs.claims import LimitedKey
from sqlalchemy_jobs.worker.speed import MOST_AHEAD

KEYS = 10
"""By how many keys one claim goes at least, if there are so many; by more where they bring too few jobs."""
MOST_KEYS = 500
"""By how many at most."""
LEAST_OF_A_KEY = 0.1
"""A key that had its last job claimed is tried once more, and there may be many such keys."""

_Where: TypeAlias = tuple[str, str]
"""A key and a queue."""


class Turns:
    """The keys as they were when they were looked at, with what was claimed and has ended here since.

    For the claimer's thread, but ``is_awaited`` is for any.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[_Where, LimitedKey] = OrderedDict()
        """What has something to claim; the next one to have its turn first."""
        self._pressing: set[_Where] = set()
        """Of which of these nothing is to be claimed ahead of free slots."""
        self._resting: dict[str, list[LimitedKey]] = {}
        """Of which no more is to be claimed ahead until what was claimed last has run."""
        self._rest_until: dict[str, int] = {}
        """How many of this worker's own are running when it has."""
        self._blocked: dict[str, list[LimitedKey]] = {}
        """Of which as many are running as may."""
        self._running: dict[str, int] = {}
        """By key, in all workers."""
        self._own: dict[str, int] = {}
        """How many of these are this worker's own: one hears when they end."""
        self._of_a_key = 1.0
        """How many jobs of a key the next claim may expect."""

    def begin_round(self) -> None:
        """Forget what is looked at again."""
        for of_round in (self._resting, self._rest_until, self._blocked, self._running):
            of_round.clear()

    def forget(self) -> None:
        """Forget the turns."""
        for each in (self._open, self._pressing, self._resting, self._rest_until):
            each.clear()

    # --- what there is ------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._open)

    @property
    def is_pressing(self) -> bool:
        """Whether something is to begin as soon as there is a slot."""
        return bool(self._pressing)

    @property
    def is_resting(self) -> bool:
        """Whether more will be claimed ahead when some of what was has run."""
        return bool(self._resting)

    @property
    def queues(self) -> set[str]:
        """Where something is open."""
        return {queue for _, queue in self._open}

    def expected(self, queues: Collection[str]) -> float:
        """Return how many jobs of these queues a claim of all that is open is likely to bring."""
        return sum(self._expected(each) for each in self._open.values() if each.queue in queues)

    @property
    def pressing(self) -> int:
        """For how many jobs slots are to be free, at least."""
        expected = math.ceil(sum(self._expected(self._open[where]) for where in self._pressing))
        return max(expected, bool(self._pressing))

    def waits(self, key: str) -> bool:
        """Tell whether a key waits until some of its runs have ended."""
        return key in self._blocked or key in self._resting

    def is_awaited(self, key: str) -> bool:
        """Tell whether the end of each run of a key is waited for."""
        return key in self._blocked

    def of_queue(self, queue: str) -> list[LimitedKey]:
        """Return what is open in a queue."""
        return [each for each in self._open.values() if each.queue == queue]

    # --- what changes it ----------------------------------------------------------------------------

    def looked_at(self, key: LimitedKey, running: int) -> bool:
        """Take note of a key with ready jobs, of which so many are running; False: no more of it may."""
        self._running[key.key] = running
        allowed = key.numbers.concurrency
        if allowed is not None and running >= allowed:
            self._blocked.setdefault(key.key, []).append(key)
            return False
        if known := self._open.get((key.key, key.queue)):
            priorities = sorted({*known.priorities, *key.priorities})
            key = key._replace(
                priorities=priorities,
                has_more=key.has_more or known.has_more or len(priorities) > 1,
                may_wait=key.may_wait and known.may_wait,
            )
        self._add(key)
        return True

    def claimed(self, key: str, count: int) -> None:
        """Take note that so many jobs of a key are running here."""
        self._running[key] = self._running.get(key, 0) + count
        self._own[key] = self._own.get(key, 0) + count

    def freed(self, key: str) -> None:
        """Take note that a run of a key has ended here."""
        if (running := self._running.get(key, 0)) > 0:
            self._running[key] = running - 1
        if (own := self._own.pop(key, 1) - 1) > 0:  # there may be a great many keys
            self._own[key] = own
        for each in self._blocked.pop(key, ()):
            self._add(each)
        if resting := self._resting.get(key):
            has_run = own <= self._rest_until[key]
            if has_run or self._spare(resting[0]) >= self._share(resting[0]):
                self._wake(key)

    def wake(self) -> None:
        """Have those take turns that rest: not everything is claimed ahead now."""
        for key in [*self._resting]:
            self._wake(key)

    def pick(
        self, total: int, queues: Collection[str], *, pressing: bool | None = None
    ) -> list[LimitedKey]:
        """Take out whose turn it is to have so many jobs claimed, about as many of each.

        ``pressing``: only those of which nothing, or only those of which something is to be claimed ahead; and then of
        each no more than that.
        """
        picked: dict[str, LimitedKey] = {}
        expected = 0.0
        for where, each in [*self._open.items()]:
            if len(picked) >= KEYS and (expected >= total or len(picked) >= MOST_KEYS):
                break
            is_wanted = pressing is None or pressing == (where in self._pressing)
            if is_wanted and each.queue in queues and each.key not in picked:
                self.take_out(each)
                if pressing is False and self._spare(each) <= 0:
                    self._add(each)  # claimed of in another queue since
                    continue
                picked[each.key] = each
                expected += self._expected(each)
        share = -(-total // max(len(picked), 1))
        return [
            each._replace(
                most=share
                if pressing is not False
                else min(share, self._spare(each), self._share(each))
            )
            for each in picked.values()
        ]

    def take_out(self, key: LimitedKey) -> None:
        """Let a key have no turn any more."""
        where = key.key, key.queue
        self._open.pop(where, None)
        self._pressing.discard(where)

    def put_back(self, key: LimitedKey, count: int, *, had_room: bool, ahead: bool) -> None:
        """Keep a key of which so many jobs were claimed, if there may be more.

        To have its turn after the others, or when runs have ended. Without room it had no turn.
        """
        if count:
            self.claimed(key.key, count)
        allowed = key.numbers.concurrency
        if allowed is not None and self._running.get(key.key, 0) >= allowed:
            if key.has_more:
                self._blocked.setdefault(key.key, []).append(key)
        elif not had_room if count < key.most else key.most > 1 or key.has_more:
            if ahead and count and self._spare(key) < self._share(key):
                self._resting.setdefault(key.key, []).append(key)
                self._rest_until[key.key] = self._own[key.key] - count
                return
            self._add(key)
            if not count:
                self._open.move_to_end((key.key, key.queue), last=False)

    def brought(self, keys: Collection[LimitedKey], count: int, total: int) -> None:
        """Take note that a claim by these keys that was to bring so many jobs has brought so many."""
        if sum(map(self._expected, keys)) >= total:
            # By half as many keys the next time, if it was full.
            of_a_key = count / len(keys) * (1 + (count == total))
            self._of_a_key = max(of_a_key, LEAST_OF_A_KEY)

    def _add(self, key: LimitedKey) -> None:
        where = key.key, key.queue
        self._open[where] = key
        if self._spare(key) > 0:
            self._pressing.discard(where)
        else:
            self._pressing.add(where)

    def _wake(self, key: str) -> None:
        del self._rest_until[key]
        for each in self._resting.pop(key):
            self._add(each)

    def _expected(self, key: LimitedKey) -> float:
        """Return how many jobs of a key a claim is likely to bring."""
        if not key.has_more:
            return 1.0
        allowed = key.numbers.concurrency
        if allowed is None:
            return self._of_a_key
        return min(self._of_a_key, max(allowed - self._running.get(key.key, 0), 0))

    def _spare(self, key: LimitedKey) -> int:
        """Return how many more jobs of a key may be claimed ahead."""
        return self._most_ahead(key) - self._running.get(key.key, 0)

    def _share(self, key: LimitedKey) -> int:
        """Return how many of them one claim brings at most: while these run, others are claimed."""
        most = self._most_ahead(key)
        return -(-most // 2) if key.has_more else min(most, 1)

    def _most_ahead(self, key: LimitedKey) -> int:
        """Return how many jobs of a key may run for others to be claimed ahead: while these wait nobody else can begin them.

        Half of what the limit lets run; or all of it where nothing else of the key is there to begin.
        """
        allowed = key.numbers.concurrency
        if not key.may_wait:
            return 0
        if allowed is None:
            return MOST_AHEAD
        return allowed // 2 if key.has_more else allowed
