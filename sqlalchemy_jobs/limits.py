"""How many jobs may run at once, and how many may begin in a time: over all workers, for all or for each key."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy_jobs.errors import DeclarationError

LIMIT_KEY_LENGTH = 200
MOST_AT_ONCE = 2**31 - 1
LONGEST_WINDOW = timedelta(days=1)
BUCKETS = 20
"""A rate remembers its starts in so many parts of its window: those in one part return together, with the last."""

_UNITS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}
_LETTERS = {name[0]: seconds for name, seconds in _UNITS.items()}
_RATE = re.compile(
    r"(?P<count>[0-9]{0,9})(?P<slash>/?)(?P<number>[0-9]{0,5})(?P<unit>.*)", re.DOTALL
)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True, kw_only=True)
class Limit:
    """Say in ``@job(limit=...)`` how many jobs of the class may run at once, or begin in a time, in all workers.

    ``concurrency`` is how many may be running; ``rate`` how many may begin, retries too, in any window of a length:
    ``"100/minute"``, also second, hour and day, or ``"5/15s"`` with s, m, h or d, up to a day. At least one of them.
    ``key`` names a field of the payload, or several: then the limit holds for each value by itself, and a job in
    which they are all None is not limited. ``ordered=True``: the jobs of a key run one after the other in the order
    in which they were enqueued; one that is delayed or waits for its retry holds up those behind it until it is
    final. ``name`` has several classes share a limit; by default it is the kind.

    ``enqueue`` writes the name and the key into the row; the numbers are read from the class when a worker claims.

    Raises: DeclarationError.
    """

    concurrency: int | None = None
    rate: str | None = None
    key: str | Sequence[str] | None = None
    ordered: bool = False
    name: str | None = None

    def __post_init__(self) -> None:
        most = self.concurrency
        if most is not None and not (type(most) is int and 1 <= most <= MOST_AT_ONCE):
            raise DeclarationError(
                f"concurrency={most!r}: wanted a whole number from 1 to {MOST_AT_ONCE}"
            )
        if self.ordered and most not in (None, 1):
            raise DeclarationError(
                f"ordered=True and concurrency={most}: jobs in order run one after the other; leave concurrency away"
            )
        if most is None and self.rate is None and not self.ordered:
            raise DeclarationError(
                'a Limit without a limit: give it concurrency=3, rate="100/minute" or ordered=True'
            )
        if self.rate is not None:
            Rate.parse(self.rate)
        if self.key is not None and not (self.fields and all(self.fields)):
            raise DeclarationError(f"key={self.key!r}: wanted the name of a field, or several")

    @property
    def fields(self) -> Sequence[str]:
        """The fields that the key is made of; none: there is no key."""
        return (self.key,) if isinstance(self.key, str) else tuple(self.key or ())

    @property
    def numbers(self) -> Numbers:
        """What it allows."""
        rate = None if self.rate is None else Rate.parse(self.rate)
        return Numbers(1 if self.ordered else self.concurrency, rate, self.ordered)


@dataclass(frozen=True)
class Rate:
    """How many jobs may begin in any window of a length."""

    count: int
    window: timedelta

    @classmethod
    def parse(cls, text: str) -> Rate:
        """Read ``"100/minute"`` or ``"5/15s"``. Raises: DeclarationError, with the position of the fault."""
        found = _RATE.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise DeclarationError(f'rate={text!r}: wanted a string such as "100/minute"')
        number, unit = found["number"], found["unit"]
        seconds = (_LETTERS if number else _UNITS).get(unit, 0)
        window = timedelta(seconds=min(int(number or 1) * seconds, 10**9))
        for part, is_right, wanted in (
            ("count", int(found["count"] or 0) > 0, "how many, from 1"),
            ("slash", found["slash"], "a slash after how many"),
            ("unit", seconds, "second, minute, hour or day, or a number of s, m, h or d"),
            ("number", timedelta(0) < window <= LONGEST_WINDOW, "a time of up to a day"),
        ):
            if not is_right:
                raise DeclarationError(
                    f'rate={text!r}, at character {found.start(part) + 1}: wanted {wanted}, as in "100/minute" or "5/15s"'
                )
        return cls(int(found["count"]), window)


@dataclass(frozen=True)
class Numbers:
    """What holds for a key: None is no bound."""

    concurrency: int | None = None
    rate: Rate | None = None
    ordered: bool = False

    @property
    def only_count(self) -> bool:
        """Whether nothing matters but how many jobs are running."""
        return self.rate is None and not self.ordered


UNLIMITED = Numbers()


class Starts:
    """What has begun within a rate's window, as ``LimitRow.used`` keeps it: when, in microseconds, and how many.

    Never too few are remembered. By a clock that was set back, starts lie in the future: they count as of now.
    """

    def __init__(self, rate: Rate, used: Iterable[Sequence[int]] | None, now: datetime) -> None:
        self._most = rate.count
        self._window = rate.window // _MICROSECOND
        self._now = (now - _EPOCH) // _MICROSECOND
        known = ((min(at, self._now), count) for at, count in used or ())
        self.used = [[at, count] for at, count in known if at + self._window > self._now]

    @property
    def free(self) -> int:
        """How many may begin now."""
        return max(self._most - sum(count for _, count in self.used), 0)

    def add(self, count: int) -> None:
        """Take note that so many begin now."""
        part = max(self._window // BUCKETS, 1)
        if self.used and self.used[-1][0] // part == self._now // part:
            count += self.used.pop()[1]
        self.used.append([self._now, count])

    @property
    def next_at(self) -> datetime | None:
        """When the next one may begin; None: now."""
        left = sum(count for _, count in self.used)
        opens = None
        for at, count in self.used:
            if left < self._most:
                break
            left -= count
            opens = _EPOCH + (at + self._window) * _MICROSECOND
        return opens


def limit_key(name: str, value: str | None) -> str:
    """Return what ``Job.limit_key`` holds: the name, and behind a slash, which no name has, the value of the key."""
    if value is None:
        return name
    key = f"{name}/{value}"
    # MySQL takes what ends in a space for the same without it.
    if len(key) > LIMIT_KEY_LENGTH or not key.isprintable() or key.endswith(" "):
        key = f"{name}/#{hashlib.sha256(value.encode()).hexdigest()}"
    return key


def key_of_queue(queue: str) -> str:
    """Return the key of a queue that has limits itself; no limit has an empty name."""
    return f"/{queue}"


def name_of(key: str) -> str:
    """Return the name of the limit that a key belongs to."""
    return key.partition("/")[0]
