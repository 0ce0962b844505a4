"""Which runs this worker owns, and for how many more it has room."""

from __future__ import annotations

import threading
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from sqlalchemy_jobs.claims import ALONE_FROM
from sqlalchemy_jobs.runs import Run

RunKey = tuple[uuid.UUID, int, uuid.UUID]
MOST_UNSETTLED = 2000
"""No more is claimed while so many runs have ended and are not written down yet."""


def key_of(run: Run) -> RunKey:
    return run.claim.job_id, run.claim.attempt, run.claim.worker_id


class Slots:
    """A run takes a slot from its claim until its handler has ended, and is owned until it is settled.

    ``changed`` is called, without the lock, whenever a slot or an ownership was given up.
    """

    def __init__(
        self, total: int, limits: Mapping[str, int | None], changed: Callable[[], None]
    ) -> None:
        self._total = total
        self._most_hung = max(1, total // 2)
        """How many may hang for nothing; each has a connection of the application's pool."""
        self._limits = limits
        self._changed = changed
        self._lock = threading.Lock()
        self._owned: dict[RunKey, Run] = {}
        self._running: dict[RunKey, Run] = {}
        self._hung: set[RunKey] = set()
        self._by_queue: Counter[str] = Counter()

    def take(self, run: Run) -> bool:
        """Own a claimed run; False when it is owned already (its claim was lost in a crash of the
        server and made again: it must not start a second time)."""
        with self._lock:
            if key_of(run) in self._owned:
                return False
            self._owned[key_of(run)] = self._running[key_of(run)] = run
            self._by_queue[run.queue] += 1
            return True

    def ended(self, run: Run) -> bool:
        """Free the slot of a run whose handler has ended; False when it was given up before."""
        with self._lock:
            self._hung.discard(key_of(run))
            freed = self._free(run)
        self._changed()
        return freed

    def give_up(self, run: Run) -> bool:
        """Free the slot of a run whose handler does not come back; False when it has ended before."""
        with self._lock:
            freed = self._free(run)
            if freed:
                self._hung.add(key_of(run))
        self._changed()
        return freed

    def _free(self, run: Run) -> bool:
        freed = self._running.pop(key_of(run), None) is not None
        self._by_queue[run.queue] -= freed
        return freed

    @property
    def lost(self) -> int:
        """How many slots are not used, since as many handlers hang beyond what is allowed."""
        return max(0, len(self._hung) - self._most_hung)

    def disown(self, run: Run) -> None:
        """Forget a run that is settled, or whose job belongs to another one."""
        with self._lock:
            self._owned.pop(key_of(run), None)
        self._changed()

    def disown_all(self) -> list[Run]:
        """Forget every run, and return them: their worker was declared dead or is going away."""
        with self._lock:
            runs = list(self._owned.values())
            self._owned.clear()
        for run in runs:
            run.ask_to_stop()
        self._changed()
        return runs

    def owned(self) -> list[Run]:
        with self._lock:
            return list(self._owned.values())

    def running(self) -> list[Run]:
        with self._lock:
            return list(self._running.values())

    def is_idle(self) -> bool:
        """Tell whether no handler is running and nothing is left to write down."""
        with self._lock:
            return not self._owned and not self._running

    def room(self, queues: Sequence[str]) -> tuple[int, dict[str, int]]:
        """Return the free slots in all, and those of each queue that has any."""
        with self._lock:
            free = self._total - len(self._running) - self.lost
            if any(run.claim.crashes >= ALONE_FROM for run in self._running.values()):
                free = 0
            if len(self._owned) > MOST_UNSETTLED + self._total:
                free = 0
            rooms = {}
            for queue in queues:
                limit = self._limits.get(queue)
                room = free if limit is None else min(free, limit - self._by_queue[queue])
                if room > 0:
                    rooms[queue] = room
            return free, rooms
