"""How many connections to the database a worker holds at most."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import Engine, Pool, QueuePool

from sqlalchemy_jobs.app import Handler
from sqlalchemy_jobs.dialects.base import Dialect
from sqlalchemy_jobs.worker import slots

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

CONTROL = 7
"""Claiming, scheduling, settling, looking out for cancelled jobs, maintenance, a run that asks for its job, a KILL (MySQL)."""
LEASE = 1


class Connections(NamedTuple):
    """The most that one worker holds at a time."""

    handlers: int
    """Of the application's engines."""
    own: int
    """Of the worker's own pools."""

    def told(self, processes: int = 1) -> str:
        """Say what so many workers hold."""
        each = f"{self.handlers} + {self.own}"
        if processes > 1:
            each = f"{processes} x ({each})"
        return f"connections: {each} = {processes * sum(self)} at most (of the handlers + the worker's own)"


def most(
    handlers: Iterable[Handler],
    engine: Engine | None,
    async_engine: AsyncEngine | None,
    total: int,
    dialect: Dialect,
) -> Connections:
    """Count them for a worker with ``total`` runs at once on the application's engines."""
    runs = total + slots.most_hung(total)  # what hangs keeps its connection
    colours = {each.is_async for each in handlers}
    used = 0.0
    for each, is_async in ((engine, False), (async_engine, True)):
        if each is not None:  # without handlers it has the connection of the check at the start
            used += min(runs if is_async in colours else 1, limit_of(each.pool))
    of_control = engine or async_engine
    assert of_control is not None
    kept_open = (dialect.session_locks is not None) + (dialect.ear is not None)
    return Connections(int(used), int(min(CONTROL, limit_of(of_control.pool))) + LEASE + kept_open)


def limit_of(pool: Pool) -> float:
    """Return how many connections it gives out at a time."""
    if isinstance(pool, QueuePool) and pool.size() > 0 and pool._max_overflow >= 0:
        return pool.size() + pool._max_overflow
    return math.inf
