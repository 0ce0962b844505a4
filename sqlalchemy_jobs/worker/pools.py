"""Which queues a worker serves: pools of queues that share a concurrency, and their order within a pool."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from sqlalchemy_jobs.errors import ConfigurationError
from sqlalchemy_jobs.patterns import EVERY, NOT, is_name, is_served, most_specific
from sqlalchemy_jobs.payloads import check_queue


class Place(NamedTuple):
    """Where a queue stands among those that are served."""

    pool: str
    level: int
    """Of its pool, the queues of a lower level come first."""
    weight: int
    """How often it comes first among those of its level, compared with them."""


class Pools:
    """The pools of a worker: what names the queues of each, and its concurrency or None.

    A pool names its queues by patterns: ``critical>default,bulk`` takes jobs of ``critical`` first, and of the others
    in turns; ``default@3,bulk@1`` three times as often of the one. Nothing given: one pool of all queues.

    Raises: ConfigurationError.
    """

    def __init__(self, given: Mapping[str, int | None]) -> None:
        self.concurrency = dict(given) or {EVERY: None}
        self._places: dict[str, Place | None] = {}
        for pool, most in self.concurrency.items():
            self._add(pool)
            if most is not None and not is_count(most):
                raise ConfigurationError(
                    f"queue {pool}={most!r}: wanted a concurrency of 1 or more"
                )
        self._known: dict[str, Place | None] = {}

    @property
    def patterns(self) -> list[str]:
        """Which queues are served, for whoever asks elsewhere; empty: all."""
        return [] if [*self._places] == [EVERY] else [*self._places]

    @property
    def names(self) -> list[str]:
        """The queues that are served, where all of them are known by name; else none."""
        served = [each for each in self._places if is_served(each)]
        return served if all(map(is_name, served)) else []

    @property
    def has_levels(self) -> bool:
        """Whether some queues come strictly before others."""
        return any(place and place.level for place in self._places.values())

    def place(self, queue: str) -> Place | None:
        """Return where a queue stands; None: it is not served."""
        if queue not in self._known:
            pattern = most_specific(self._places, queue)
            self._known[queue] = None if pattern is None else self._places[pattern]
        return self._known[queue]

    def serves(self, queue: str) -> bool:
        return self.place(queue) is not None

    def in_turn(self, queues: Iterable[str], room: Collection[str]) -> dict[str, str]:
        """Return those of the queues whose pools have room, each with its pool, in the order in which they are claimed.

        By chance, where nothing else is said: then none is always last when there is room for one only.
        """
        turns = {pool: random.random() for pool in room}
        served = [
            (turns[place.pool], place.level, -(random.random() ** (1 / place.weight)), queue, place)
            for queue in queues
            if (place := self.place(queue)) is not None and place.pool in turns
        ]
        return {queue: place.pool for *_, queue, place in sorted(served)}

    def __str__(self) -> str:
        if self.concurrency == {EVERY: None}:
            return "all queues"
        return "; ".join(
            pool if most is None else f"{pool}={most}" for pool, most in self.concurrency.items()
        )

    def _add(self, pool: str) -> None:
        if not isinstance(pool, str):
            raise ConfigurationError(
                f"queue {pool!r}: wanted a name, or several as in 'mail,bulk.*'"
            )
        for at, level, item in _items(pool):
            pattern, weighted, weight = item.partition("@")
            try:
                name = pattern.removeprefix(NOT)
                if name != EVERY:
                    check_queue(name.removesuffix(EVERY), ConfigurationError)
                if weighted and (not weight.isdecimal() or int(weight) < 1 or pattern != name):
                    raise ConfigurationError(f"{item!r}: wanted QUEUE@N with N 1 or more")
                if name in self._places or NOT + name in self._places:
                    raise ConfigurationError(f"queue {name!r} is named twice")
            except ConfigurationError as error:
                raise ConfigurationError(f"queues {pool!r}, character {at + 1}: {error}") from None
            place = Place(pool, level, int(weight or 1))
            self._places[pattern] = place if is_served(pattern) else None
        if not any(place and place.pool == pool for place in self._places.values()):
            raise ConfigurationError(
                f"queues {pool!r} names none to serve: write '{EVERY},{pool}' for all others"
            )


def _items(pool: str) -> Iterator[tuple[int, int, str]]:
    """Yield each item of a pool, with its position and its level."""
    at = 0
    for level, items in enumerate(pool.split(">")):
        for item in items.split(","):
            yield at, level, item
            at += len(item) + 1


def is_count(value: object) -> bool:
    """Tell whether it is a whole number from 1 (True is none)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
