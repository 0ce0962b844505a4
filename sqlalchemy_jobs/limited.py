"""ready -> running for jobs that count against limits: as ``transitions.claim``, but by what is running already.

Every function takes a session that it did not open, and neither commits nor rolls back.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlalchemy import bindparam, select, update
from sqlalchemy.orm import Session

from sqlalchemy_jobs import dialects, transitions
from sqlalchemy_jobs.claims import Claim, LimitedKey, Swept, Wanted
from sqlalchemy_jobs.columns import server_now
from sqlalchemy_jobs.limits import Numbers, Starts, key_of_queue
from sqlalchemy_jobs.tables import TO_JOB, limits

_LOCK_KEYS = (
    select(limits.c.limit_key, limits.c.used, server_now().label("now"))
    .where(limits.c.limit_key.in_(bindparam("keys", expanding=True)))
    .order_by(limits.c.limit_key)
    .with_for_update(key_share=True, skip_locked=True)
)
_USE_KEY = (
    update(limits)
    .where(limits.c.limit_key == bindparam("of_key"))
    .values(
        used=bindparam("starts", type_=limits.c.used.type),
        next_at=bindparam("next", type_=limits.c.next_at.type),
        used_at=bindparam("at", type_=limits.c.used_at.type),
    )
)


@dataclass(frozen=True, slots=True)
class QueueClaim:
    """What came of a claim of a queue that has limits itself."""

    claims: list[Claim]
    opens: float = 0.0
    """Seconds until its limits let a job begin, as far as that is known; 0: they do."""


def claim(session: Session, wanted: Wanted, keys: Sequence[LimitedKey]) -> dict[str, list[Claim]]:
    """ready -> running for due jobs that count against these keys, as many as their limits let run; by key.

    Its own short transaction at READ COMMITTED, which must be durable: a claim that was lost would let others begin.
    The rows of the keys are locked first, by a statement of their own, and those are passed over that another worker
    has locked: what runs is counted by a later statement, which sees all that was claimed under the lock before.
    """
    locked = {
        row.limit_key: row
        for row in session.execute(
            _LOCK_KEYS, {"keys": sorted(each.key for each in keys)}, bind_arguments=TO_JOB
        )
    }
    if not locked:
        return {}
    now: datetime = max(row.now for row in locked.values())
    open_keys: list[LimitedKey] = []
    starts: dict[str, Starts] = {}
    for each in keys:
        if each.key in locked and each.numbers.rate is not None:
            began = Starts(each.numbers.rate, locked[each.key].used, now)
            each = each._replace(most=min(each.most, began.free))
            starts[each.key] = began
        if each.key in locked and each.most > 0:
            open_keys.append(each)
    claims = dialects.of(session).limits.claim(
        session, wanted, open_keys, None if wanted.ahead else now
    )
    used = []
    for key in claims.keys() & starts.keys():
        starts[key].add(len(claims[key]))
        used.append(_used(key, starts[key], now))
    if used:
        session.execute(_USE_KEY, used, bind_arguments=TO_JOB)
    return claims


def claim_at_once(
    session: Session, wanted: Wanted, keys: Sequence[LimitedKey]
) -> dict[str, list[Claim]] | None:
    """As ``claim``, in one round trip that commits where each statement does; None: not with this database or driver.

    For keys of which only the running jobs count: nothing is reckoned in between.
    """
    return dialects.of(session).limits.claim_at_once(session, wanted, keys)


def claim_next(
    session: Session, wanted: Wanted, after: str, allowed: Mapping[str, int], most: int
) -> Swept | None:
    """As ``claim_at_once``, ahead of free slots, for the keys of so many ready jobs behind a key, which nobody has looked at.

    Only of limits with one of these names; each with how many it lets run.
    """
    return dialects.of(session).limits.claim_next(session, wanted, after, allowed, most)


def claim_queue(
    session: Session, wanted: Wanted, queue: str, numbers: Numbers, keys: Sequence[LimitedKey]
) -> QueueClaim:
    """ready -> running for due jobs of a queue that has limits itself: of its lanes, and of keys in it.

    As ``claim``, with a row for the queue, that is locked first.
    """
    key = key_of_queue(queue)
    locked = session.execute(_LOCK_KEYS, {"keys": [key]}, bind_arguments=TO_JOB).first()
    if locked is None:
        return QueueClaim([])
    room = min(wanted.room[queue], wanted.total)
    if numbers.concurrency is not None:
        free = numbers.concurrency - dialects.of(session).limits.running_in(session, queue)
        if free <= 0:
            return QueueClaim([], opens=math.inf)
        room = min(room, free)
    if numbers.rate is not None:
        starts = Starts(numbers.rate, locked.used, locked.now)
        if starts.next_at is not None:
            return QueueClaim([], opens=(starts.next_at - locked.now).total_seconds())
        room = min(room, starts.free)
    claims: list[Claim] = []
    # By chance, for in the long run neither must take all.
    for limited in random.sample((True, False), 2):
        left = room - len(claims)
        rest = replace(wanted, room={queue: left}, total=left, pools={}, durable=True)
        if left > 0 and limited and keys:
            claims += [each for of_key in claim(session, rest, keys).values() for each in of_key]
        elif left > 0 and not limited and wanted.lanes:
            claims += transitions.claim(session, rest)
    if numbers.rate is not None and claims:
        now = session.scalar(select(server_now()), bind_arguments=TO_JOB)  # none began later
        assert now is not None
        starts = Starts(numbers.rate, locked.used, now)
        starts.add(len(claims))
        session.execute(_USE_KEY, [_used(key, starts, now)], bind_arguments=TO_JOB)
    return QueueClaim(claims)


def _used(key: str, starts: Starts, now: datetime) -> dict[str, Any]:
    return {"of_key": key, "starts": starts.used, "next": starts.next_at, "at": now}


def add_keys(session: Session, keys: Collection[str]) -> None:
    """Make the rows of keys that have none; another worker may do the same. Its own short transaction."""
    dialects.of(session).limits.add_keys(session, sorted(keys))
