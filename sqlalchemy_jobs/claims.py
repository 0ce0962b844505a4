"""What a claim asks for, and what comes out of it."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, TypeAlias

from msgspec import Struct

from sqlalchemy_jobs.limits import Numbers

Lane: TypeAlias = tuple[str, int]
"""A queue and a priority: jobs of one lane are claimed by time."""
Mark: TypeAlias = tuple[datetime, uuid.UUID]
"""``run_at`` and id of a job."""
_EPOCH = datetime.fromtimestamp(0, UTC)


class Due(NamedTuple):
    """When the jobs of a lane fall due, in seconds from now."""

    first: float
    """The first of its ready jobs; 0 or less: it is due, or that is not known."""
    next: float | None
    """The first of those that are not due yet; None: there is none."""


class LimitedLane(NamedTuple):
    """Ready jobs of one lane that count against a key, and how the key stands; times in seconds from now."""

    key: str
    queue: str
    priority: int
    due: float
    """When the first of them falls due; 0 or less: it is."""
    kind: str
    """The kind of that one."""
    crashes: int
    """Its crashes."""
    running: int
    """How many jobs of the key are running."""
    opens: float
    """When its rate lets the next one begin; 0 or less: it does."""
    is_known: bool
    """Whether there is a row to lock for the key."""
    has_more: bool
    """Whether the lane has more than one of them."""


class LimitedKey(NamedTuple):
    """A key of which jobs are wanted, from one queue."""

    key: str
    queue: str
    priorities: Sequence[int]
    """Where ready jobs were seen; the better one first."""
    numbers: Numbers
    most: int
    """How many jobs, whatever its limit allows."""
    has_more: bool = True
    """Whether more than one was seen."""
    may_wait: bool = False
    """Whether its jobs may be claimed ahead of free slots, as far as the limit has room to spare."""


ALONE_FROM = 2
"""From so many crashes on a job runs alone in its worker: it takes no neighbours along any more."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which jobs a worker would take now."""

    worker_id: uuid.UUID
    kinds: Sequence[str]
    """The kinds that it has handlers for; no other job is ever claimed."""
    lanes: Collection[Lane]
    """Where ready jobs were seen; within a queue the better priority first."""
    room: Mapping[str, int]
    """How many jobs of each queue; the order of the queues decides when ``total`` is less."""
    total: int
    """How many jobs in all."""
    pools: Mapping[str, str] = field(default_factory=dict)
    """Which queues share their room, by the name of their pool; a queue that has none here has room of its own."""
    shares: Mapping[Lane, int] = field(default_factory=dict)
    """How many jobs of a lane at most, where the queue does not go by priority."""
    marks: Mapping[Lane, Mark] = field(default_factory=dict)
    """Where to begin to look in a lane: what is due before was claimed, and its remains need not be read again."""
    suspects: bool = False
    """Whether to take jobs that must run alone (``ALONE_FROM``), and only those."""
    never_alone: Sequence[str] = ()
    """Kinds whose jobs need not run alone: after a crash they are failed, and not run."""
    ahead: bool = False
    """Whether they may wait in the worker: then ``started_at`` stays NULL until the run's end, and what a crash
    has met before is left to a claim whose jobs start at once."""
    free_slots: bool = False
    """Whether there are kinds whose jobs give up their unique slot when they are claimed: only then are those
    passed over to which an open transaction refers, and otherwise waited for."""
    durable: bool = False
    """Whether the claim must survive a crash of the server: it is what a later run is warned by."""

    def pool(self, queue: str) -> str:
        """Return whose room a queue has."""
        return self.pools.get(queue, queue)

    def rooms(self) -> dict[str, int]:
        """Return how many jobs of each pool."""
        return {self.pool(queue): room for queue, room in self.room.items()}

    def in_turn(self) -> list[Lane]:
        """Return the lanes with room, in the order of the queues in ``room``."""
        turns = {queue: turn for turn, queue in enumerate(self.room)}
        with_room = [lane for lane in self.lanes if lane[0] in turns]
        return sorted(with_room, key=lambda lane: (turns[lane[0]], lane[1]))


class Claim(Struct, frozen=True, gc=False):
    """A job as it was claimed for one run, and the proof of owning it. Crosses threads freely.

    (job_id, attempt, worker_id) names one run for ever. Thousands may wait in a worker: they are made by one step
    in C, and the garbage collector passes them by.
    """

    job_id: uuid.UUID
    attempt: int
    worker_id: uuid.UUID
    kind: str = ""
    queue: str = ""
    payload: str = ""
    """Its JSON."""
    failures: int = 0
    max_attempts: int = 0
    headers: Mapping[str, str] | None = None
    crashes: int = 0
    scheduled_at: datetime | None = None
    priority: int = 0
    run_at: datetime | int | None = None
    """As the dialect reads it; a number is of microseconds."""

    @property
    def mark(self) -> Mark:
        """Where the next claim of its lane may begin to look."""
        if isinstance(self.run_at, int):
            return _EPOCH + timedelta(microseconds=self.run_at), self.job_id
        assert self.run_at is not None
        return self.run_at, self.job_id


class Swept(NamedTuple):
    """What a claim of keys has brought that nobody had looked at."""

    claims: Mapping[str, list[Claim]]
    """By key."""
    keys: int
    """Of how many keys it has seen jobs."""
    last: str
    """The last of them; "": there is none behind."""
