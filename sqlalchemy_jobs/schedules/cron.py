"""When a schedule ticks: a cron line and a time zone as a function from one instant to the next tick.

Which local times a line names is croniter's business; which instants these are is decided here. Where the clocks
change, the rule is that of Debian's cron, by the field of the hours: if that is a wildcard (``*``, ``*/2``), every
instant at which the local clock shows a time of the line is a tick; so a time that is skipped has none and one that
comes twice has two. Otherwise each such time is one tick: a skipped one when the clock has moved on, one that
comes twice at its first coming.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from functools import lru_cache
from itertools import takewhile
from typing import Any, NoReturn, Protocol
from zoneinfo import ZoneInfo

from sqlalchemy_jobs.errors import ScheduleError

CRON_LENGTH = 200
ZONE_LENGTH = 64

_SECOND = timedelta(seconds=1)
_DAY = timedelta(days=1)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LONGEST = timedelta(days=366)

_FIELDS = (
    ("minute", "0 to 59"),
    ("hour", "0 to 23"),
    ("day", "1 to 31, or L for the last"),
    ("month", "1 to 12, or jan to dec"),
    ("weekday", "0 to 7 from Sunday to Sunday, or sun to sat"),
    ("second", "0 to 59"),
)
_NAMES = ("@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly")
_UNITS = {"d": "days", "h": "hours", "m": "minutes", "s": "seconds"}
_EVERY = re.compile(
    "".join(f"(?:(?P<{name}>[0-9]{{1,8}}){unit})?" for unit, name in _UNITS.items())
)
# A hash of the schedule's name, or a random number: the workers would not agree on the ticks.
_HASHED = re.compile(r"[hr](\(|/|$)", re.IGNORECASE)


class Rule(Protocol):
    """Knows the ticks of a schedule: whole seconds, in UTC."""

    def after(self, instant: datetime, /) -> datetime:
        """Return the first tick after an instant."""
        ...


@lru_cache(maxsize=4096)
def rule(cron: str, timezone: str = "UTC") -> Rule:
    """Return the rule of a cron line for the local clock of a zone.

    Five fields: minute, hour, day of the month, month, day of the week. A sixth at the **end** is the second. Or
    ``@yearly``, ``@monthly``, ``@weekly``, ``@daily``, ``@hourly``. Or ``@every 90s``, ``@every 1h30m``: the
    multiples of that time since 1970 in UTC, whatever the zone.

    Raises: ScheduleError.
    """
    if not isinstance(cron, str) or not cron.strip():
        raise ScheduleError(f'cron={cron!r}: wanted a cron line, for example "0 4 * * *"')
    if len(cron) > CRON_LENGTH:
        raise ScheduleError(f"cron: {len(cron)} characters, and at most {CRON_LENGTH} are kept")
    clock = zone(timezone)
    word, _, rest = cron.strip().partition(" ")
    if word.lower() == "@every":
        return _Every(_interval(cron, rest))
    return _Cron(cron, clock)


def ticks(rule: Rule, first: datetime, until: datetime) -> Iterator[datetime]:
    """Yield the ticks from ``first``, which is one, to ``until``."""
    return takewhile(lambda tick: tick <= until, _from(rule, first))


def latest(rule: Rule, first: datetime, until: datetime) -> datetime:
    """Return the last of those ticks without walking through them; ``first`` is at or before ``until``."""
    low, high = first, until
    while (following := rule.after(low)) <= until:
        low = following
        middle = low + (high - low) / 2
        if (tick := rule.after(middle)) <= until:
            low = tick
        else:
            high = middle
    return low


def _from(rule: Rule, tick: datetime) -> Iterator[datetime]:
    while True:
        yield tick
        tick = rule.after(tick)


class _Every:
    def __init__(self, interval: timedelta) -> None:
        self._interval = interval

    def after(self, instant: datetime, /) -> datetime:
        return _EPOCH + ((instant - _EPOCH) // self._interval + 1) * self._interval


class _Cron:
    def __init__(self, line: str, zone: tzinfo) -> None:
        self._zone = zone
        self._times = _checked(line)
        self._lock = threading.Lock()
        hours = self._times.expressions[1]
        self._each = hours.startswith("*") or self._times.expanded[1] == ["*"]

    def after(self, instant: datetime, /) -> datetime:
        instant = instant.astimezone(UTC).replace(microsecond=0)
        return self._after_each(instant) if self._each else self._after_once(instant)

    def _after_once(self, instant: datetime) -> datetime:
        wall = _wall(instant, self._zone)
        while True:
            wall = self._next_time(wall)
            if (tick := self._first_at(wall)) > instant:  # else it has come a second time
                return tick

    def _first_at(self, wall: datetime) -> datetime:
        """Return when the local clock first shows a time, or when it has skipped it."""
        tick = wall.replace(tzinfo=self._zone).astimezone(UTC)
        if _wall(tick, self._zone) == wall:
            return tick
        before = wall.replace(tzinfo=self._zone, fold=1).astimezone(UTC)
        return _change(self._zone, before, tick)

    def _after_each(self, instant: datetime) -> datetime:
        wall = _wall(instant, self._zone)
        while True:
            offset = _offset(instant, self._zone)
            tick = self._next_time(wall).replace(tzinfo=UTC) - offset
            change = _next_change(self._zone, instant, tick)
            if change is None:
                return tick
            instant = change
            wall = _wall(change, self._zone) - _SECOND  # the change itself may be a tick

    def _next_time(self, wall: datetime) -> datetime:
        """Return the next time of the line, on a clock that is never changed."""
        with self._lock:
            found: datetime = self._times.get_next(datetime, start_time=wall)
        return found


# --- zones ----------------------------------------------------------------------------------------


def zone(name: str) -> tzinfo:
    """Return a time zone by its name.

    Raises: ScheduleError.
    """
    if name == "UTC":
        return UTC  # also where there is no database of zones
    try:
        if len(name) > ZONE_LENGTH:
            raise ValueError(f"more than {ZONE_LENGTH} characters")
        return ZoneInfo(name)
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise ScheduleError(
            f"timezone={name!r} is not known: wanted a name such as Europe/Berlin or UTC; if it is one, install the "
            "package tzdata"
        ) from error


def _offset(instant: datetime, zone: tzinfo) -> timedelta:
    offset = instant.astimezone(zone).utcoffset()
    assert offset is not None
    return offset


def _wall(instant: datetime, zone: tzinfo) -> datetime:
    return instant.astimezone(zone).replace(tzinfo=None, fold=0)


def _next_change(zone: tzinfo, low: datetime, high: datetime) -> datetime | None:
    """Return the first instant after ``low``, up to ``high``, at which the zone's offset changes."""
    offset = _offset(low, zone)
    while low < high:
        step = min(low + _DAY, high)
        if _offset(step, zone) != offset:
            return _change(zone, low, step)
        low = step
    return None


def _change(zone: tzinfo, low: datetime, high: datetime) -> datetime:
    """Return it where there is one, by bisection to the second."""
    offset = _offset(low, zone)
    while high - low > _SECOND:
        middle = low + (high - low) // _SECOND // 2 * _SECOND
        if _offset(middle, zone) == offset:
            low = middle
        else:
            high = middle
    return high


# --- reading, and saying where it is wrong ----------------------------------------------------------


def _interval(cron: str, text: str) -> timedelta:
    start = cron.index(text) if text else len(cron)
    text = text.strip()
    found = _EVERY.fullmatch(text)
    given = {unit: int(count) for unit, count in found.groupdict("0").items()} if found else {}
    interval = timedelta(**given)
    if not _SECOND <= interval <= _LONGEST:
        _refuse(
            cron,
            start,
            f'"{text}": wanted 1s to 366d, such as 90s, 1h30m or 1d (d, h, m, s in this order)',
        )
    return interval


def _checked(line: str) -> Any:
    from croniter import CroniterBadDateError, croniter  # not in a process that only enqueues

    fields = list(re.finditer(r"\S+", line))
    first = fields[0]
    if first[0].startswith("@"):
        if len(fields) > 1 or first[0].lower() not in _NAMES:
            known = ", ".join(_NAMES)
            _refuse(line, first.start(), f'"{line.strip()}": wanted one of {known}, or @every 90s')
    elif len(fields) not in (5, 6):
        names = ", ".join(name for name, _ in _FIELDS[:5])
        raise ScheduleError(
            f'cron "{line}" has {len(fields)} fields: wanted five ({names}), or six with the second at the end'
        )
    else:
        for number, field in enumerate(fields):
            _check_field(line, number, field.start(), field[0])
    try:
        times = croniter(line.strip(), datetime(2000, 1, 1))  # noqa: DTZ001 (a local time)
        times.get_next(datetime)
    except CroniterBadDateError:
        raise ScheduleError(
            f'cron "{line}" names a day that never comes, such as February 30', position=None
        ) from None
    except Exception as error:
        raise ScheduleError(f'cron "{line}": {error}') from error
    return times


def _check_field(line: str, number: int, start: int, field: str) -> None:
    """Refuse a field that would not be understood alone, and name the part of it that is wrong."""
    from croniter import croniter

    name, wanted = _FIELDS[number]
    position = start
    for part in field.split(","):
        alone = ["*"] * 5 + ["0"] * (number == 5)
        alone[number] = part
        try:
            if not part or _HASHED.match(part):
                raise ValueError
            croniter.expand(" ".join(alone))
        except Exception:
            _refuse(line, position, f'the {name} "{part}": wanted {wanted}')
        position += len(part) + 1


def _refuse(line: str, position: int, what: str) -> NoReturn:
    raise ScheduleError(f'cron "{line}", character {position + 1}: {what}', position=position)
