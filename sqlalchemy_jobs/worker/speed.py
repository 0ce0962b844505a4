"""How quick the handlers are, and so how many jobs are worth claiming ahead of free slots."""

from __future__ import annotations

import time
from collections.abc import Mapping

from sqlalchemy_jobs.worker.pools import Pools
from sqlalchemy_jobs.worker.slots import Slots

AHEAD = 0.25
"""Seconds of work that may wait in the worker, at the speed that was observed."""
MOST_AHEAD = 1000
ROUNDS = 4
"""How often every slot has to be used, on the average, before the speed is believed."""
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
