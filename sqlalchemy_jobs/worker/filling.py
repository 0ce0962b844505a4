"""Claims more jobs for the batches that claimed jobs begin."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from sqlalchemy_jobs.app import Handler
from sqlalchemy_jobs.claims import Claim, Wanted
from sqlalchemy_jobs.worker.lanes import Lanes
from sqlalchemy_jobs.worker.slots import may_share
from sqlalchemy_jobs.worker.speed import MOST_AHEAD

FILL_WORTH = 0.01
"""Seconds that a job is worth which gets into a batch with others instead of a slot of its own."""
FILL_REST = 20
"""How many times as long as it took a claim to fill a batch it is not made again, if it was not worth it."""


class Filling:
    """Takes what is there, and waits for no more."""

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        lanes: Lanes,
        claim: Callable[[Wanted], list[Claim]],
    ) -> None:
        self._batched = {kind: each for kind, each in handlers.items() if each.batch}
        self._lanes = lanes
        self._claim = claim
        self._rest_until: dict[str, float] = {}

    def fill(self, wanted: Wanted, claims: list[Claim]) -> Iterator[list[Claim]]:
        """Claim and yield what makes a full batch of each of these jobs.

        Ahead: who can get into no batch waits for a slot. Where there are few, the claim may have looked through
        a long backlog of other kinds.
        """
        for kind, room in self._room(claims).items():
            began = time.monotonic()
            asked = min(sum(room.values()), MOST_AHEAD)
            if asked and began >= self._rest_until.get(kind, 0.0):
                kinds = (kind, *self._batched[kind].declaration.aliases)
                found = self._claim(
                    replace(
                        wanted,
                        kinds=[each for each in kinds if each in wanted.kinds],
                        lanes=self._lanes.found,
                        room=room,
                        total=asked,
                        marks=self._lanes.marks,
                        ahead=True,
                    )
                )
                now = time.monotonic()
                if now - began > FILL_WORTH * (1 + len(found)):
                    self._rest_until[kind] = now + FILL_REST * (now - began)
                yield found

    def _room(self, claims: list[Claim]) -> dict[str, Counter[str]]:
        """Return how many more jobs of each kind and queue the batches of these jobs have room for."""
        room: dict[str, Counter[str]] = {}
        for claim in claims:
            handler = self._batched.get(claim.kind)
            if handler and may_share(claim):
                by_queue = room.setdefault(handler.declaration.kind, Counter())
                by_queue[claim.queue] += (handler.batch or 1) - 1
        return room
