"""Ticks, against a slow and obvious reference that looks at every minute of the local clock."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import islice, takewhile
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqlalchemy_jobs.errors import ScheduleError
from sqlalchemy_jobs.schedules import cron as crons
from sqlalchemy_jobs.schedules.cron import Rule, rule

MINUTE, DAY = timedelta(minutes=1), timedelta(days=1)
BACK = timedelta(hours=3)
"""More than any clock is put back."""
ZONES = (
    "UTC",
    "Africa/Cairo",  # midnight does not come in spring
    "Africa/Casablanca",
    "America/New_York",
    "America/Sao_Paulo",
    "America/St_Johns",  # until 2011 one minute past midnight
    "Antarctica/Troll",  # two hours
    "Asia/Kathmandu",
    "Australia/Lord_Howe",  # half an hour
    "Europe/Berlin",
    "Europe/Dublin",
    "Pacific/Apia",  # without December 30, 2011
)


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def ticks_of(rule: Rule, start: datetime) -> Iterator[datetime]:
    """The ticks after an instant."""
    tick = start
    while True:
        tick = rule.after(tick)
        yield tick


# --- the reference ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Field:
    text: str
    values: frozenset[int]


@dataclass(frozen=True)
class Line:
    minute: Field
    hour: Field
    day: Field
    month: Field
    weekday: Field
    second: Field | None

    @property
    def text(self) -> str:
        fields = [self.minute, self.hour, self.day, self.month, self.weekday]
        return " ".join(each.text for each in [*fields, *([self.second] if self.second else [])])

    def names(self, wall: datetime) -> bool:
        day, weekday = (
            wall.day in self.day.values,
            wall.isoweekday() % 7 in self.weekday.values,
        )
        both = self.day.text != "*" and self.weekday.text != "*"
        return (
            wall.second in (self.second.values if self.second else {0})
            and wall.minute in self.minute.values
            and wall.hour in self.hour.values
            and wall.month in self.month.values
            and (day or weekday if both else day and weekday)
        )


def reference(
    line: Line, zone: ZoneInfo, start: datetime, end: datetime, step: timedelta
) -> list[datetime]:
    """Look at every instant in (start, end], and at the local times that may have come before."""
    instants = [start + n * step for n in range(-(BACK // step), (end - start) // step + 1)]
    walls = [instant.astimezone(zone).replace(tzinfo=None, fold=0) for instant in instants]
    ticks: set[datetime] = set()
    if line.hour.text.startswith("*"):
        ticks.update(at for at, wall in zip(instants, walls, strict=True) if line.names(wall))
    else:
        first: dict[datetime, datetime] = {}
        before = walls[0]
        for instant, wall in zip(instants, walls, strict=True):
            while before < wall:  # this one, and those that the clock has skipped
                before += step
                first.setdefault(before, instant)
            before = wall
        ticks.update(at for wall, at in first.items() if line.names(wall))
    return sorted(tick for tick in ticks if start < tick <= end)


@cache
def changes(zone: ZoneInfo, year: int) -> list[datetime]:
    """The minutes of a year at which the clocks of a zone are changed."""
    days = [datetime(year, 1, 1, tzinfo=UTC) + n * DAY for n in range(366)]
    return [
        next(
            minute
            for minute in (day + n * MINUTE for n in range(1, 24 * 60 + 1))
            if minute.astimezone(zone).utcoffset() != day.astimezone(zone).utcoffset()
        )
        for day in days
        if day.astimezone(zone).utcoffset() != (day + DAY).astimezone(zone).utcoffset()
    ]


def fields(low: int, high: int, names: Sequence[str] = ()) -> st.SearchStrategy[Field]:
    every = range(low, high + 1)

    def listed(values: set[int]) -> Field:
        texts = [names[value - low] if names else str(value) for value in sorted(values)]
        return Field(",".join(texts), frozenset(values))

    def spanned(ends: tuple[int, int], step: int) -> Field:
        first, last = sorted(ends)
        return Field(f"{first}-{last}/{step}", frozenset(range(first, last + 1, step)))

    values = st.sampled_from(every)
    return st.one_of(
        st.just(Field("*", frozenset(every))),
        st.integers(2, 7).map(lambda step: Field(f"*/{step}", frozenset(every[::step]))),
        st.sets(values, min_size=1, max_size=4).map(listed),
        st.builds(
            spanned,
            st.lists(values, min_size=2, max_size=2, unique=True).map(
                lambda ends: (ends[0], ends[1])
            ),
            st.integers(2, 5),
        ),
    )


DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")


def lines(seconds: st.SearchStrategy[Field | None]) -> st.SearchStrategy[Line]:
    # Most clocks are changed by night, and a line that names few days would seldom be due at all.
    often = st.just(Field("*", frozenset(range(32))))
    return st.builds(
        Line,
        fields(0, 59),
        st.one_of(fields(0, 23), fields(0, 3), fields(0, 3))
        .filter(lambda field: field.text != "*" or len(field.values) == 24)
        .map(
            lambda field: (
                field
                if not field.text.startswith("*/")
                else Field(field.text, frozenset(range(0, 24, int(field.text[2:]))))
            )
        ),
        st.one_of(often, fields(1, 31)),
        st.one_of(often, fields(1, 12), fields(1, 12, MONTHS)),
        st.one_of(often, fields(0, 6), fields(0, 6, DAYS)),
        seconds,
    )


@st.composite
def moments(draw: Callable[[st.SearchStrategy[object]], object]) -> tuple[ZoneInfo, datetime]:
    """A zone and an instant in it, as a rule shortly before its clocks are changed, or after."""
    zone = ZoneInfo(draw(st.sampled_from(ZONES)))  # type: ignore[arg-type]
    year = draw(st.integers(1995, 2035))
    found = changes(zone, year) or [datetime(year, 6, 15, tzinfo=UTC)]  # type: ignore[arg-type]
    minutes = st.one_of(st.integers(-1440, 130), st.integers(-70, 130))
    return zone, draw(st.sampled_from(found)) + draw(minutes) * MINUTE  # type: ignore[operator, return-value]


@given(lines(st.none()), moments())
@settings(max_examples=100)
def test_the_ticks_are_those_of_a_reference_that_looks_at_every_minute(
    line: Line, moment: tuple[ZoneInfo, datetime]
) -> None:
    zone, start = moment
    end = start + DAY
    made = rule(line.text, zone.key)
    expected = reference(line, zone, start, end, MINUTE)
    assert list(takewhile(lambda tick: tick <= end, ticks_of(made, start))) == expected
    if expected:
        assert crons.latest(made, expected[0], end) == expected[-1]
        assert list(crons.ticks(made, expected[0], end)) == expected


@given(lines(fields(0, 59)), moments())
@settings(max_examples=15)
def test_so_are_those_of_a_line_with_seconds(line: Line, moment: tuple[ZoneInfo, datetime]) -> None:
    zone, start = moment
    end = start + timedelta(hours=1)
    made = rule(line.text, zone.key)
    found = list(takewhile(lambda tick: tick <= end, ticks_of(made, start)))
    assert found == reference(line, zone, start, end, timedelta(seconds=1))


@given(
    st.integers(0, 400), st.integers(0, 50), st.integers(0, 100), st.integers(0, 100),
    st.integers(0, 4 * 10**9).map(lambda second: datetime.fromtimestamp(second, UTC)),
)  # fmt: skip
def test_every_is_the_multiples_of_a_time(
    days: int, hours: int, minutes: int, seconds: int, start: datetime
) -> None:
    interval = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    text = f"@every {days}d{hours}h{minutes}m{seconds}s"
    if not timedelta(seconds=1) <= interval <= timedelta(days=366):
        with pytest.raises(ScheduleError, match="wanted 1s to 366d"):
            rule(text)
        return
    first, second = islice(ticks_of(rule(text, "Europe/Berlin"), start), 2)
    assert start < first <= start + interval == start + (second - first)
    assert (first - datetime(1970, 1, 1, tzinfo=UTC)) % interval == timedelta(0)


# --- the traps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "zone", "start", "expected"),
    [
        # Spring: 02:00 to 03:00 does not come on March 29, 2026.
        ("30 2 * * *", "Europe/Berlin", "2026-03-28T12:00", ["03-29 01:00", "03-30 00:30"]),
        ("0,30 2,3 * * *", "Europe/Berlin", "2026-03-28T12:00", ["03-29 01:00", "03-29 01:30"]),
        ("0 */2 * * *", "Europe/Berlin", "2026-03-28T22:30", ["03-28 23:00", "03-29 02:00"]),
        ("30 * * * *", "Europe/Berlin", "2026-03-29T00:00", ["03-29 00:30", "03-29 01:30"]),
        ("30 0-23 * * *", "Europe/Berlin", "2026-03-29T00:00", ["03-29 00:30", "03-29 01:30"]),
        # Autumn: 02:00 to 03:00 comes twice on October 25, 2026.
        ("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00", ["10-25 00:30", "10-26 01:30"]),
        ("30 2 * * *", "Europe/Berlin", "2026-10-25T00:31", ["10-26 01:30", "10-27 01:30"]),
        ("30 2 * * *", "Europe/Berlin", "2026-10-25T01:10", ["10-26 01:30", "10-27 01:30"]),
        ("0,40 2 * * *", "Europe/Berlin", "2026-10-25T00:50", ["10-26 01:00", "10-26 01:40"]),
        ("0 * 1 4 *", "Europe/Berlin", "2026-02-01T00:00", ["03-31 22:00", "03-31 23:00"]),
        ("30 * * * *", "Europe/Berlin", "2026-10-25T00:00", ["10-25 00:30", "10-25 01:30"]),
        ("0 */2 * * *", "Europe/Berlin", "2026-10-24T23:00", ["10-25 00:00", "10-25 01:00"]),
        # Midnight does not come.
        ("@daily", "Africa/Cairo", "2026-04-23T12:00", ["04-23 22:00", "04-24 21:00"]),
        # Nor does a whole day.
        ("0 9 30 12 *", "Pacific/Apia", "2011-12-01T00:00", ["12-30 10:00", "12-29 19:00"]),
        ("0 0 29 2 *", "UTC", "2026-01-01T00:00", ["02-29 00:00", "02-29 00:00"]),
        ("0 12 L * *", "UTC", "2026-02-01T00:00", ["02-28 12:00", "03-31 12:00"]),
        ("0 12 * * fri#2", "UTC", "2026-02-01T00:00", ["02-13 12:00", "03-13 12:00"]),
        ("@every 1h30m", "Asia/Kathmandu", "2026-01-01T00:00", ["01-01 01:30", "01-01 03:00"]),
        ("@Hourly", "UTC", "2026-01-01T00:00", ["01-01 01:00", "01-01 02:00"]),
    ],
)  # fmt: skip
def test_where_the_clocks_are_changed(
    line: str, zone: str, start: str, expected: list[str]
) -> None:
    found = islice(ticks_of(rule(line, zone), at(start)), 2)
    assert [tick.strftime("%m-%d %H:%M") for tick in found] == expected


def test_the_sixth_field_is_the_second() -> None:
    first, second = islice(ticks_of(rule("5 4 * * * 10,40"), at("2026-01-01T00:00")), 2)
    assert [first, second] == [at("2026-01-01T04:05:10"), at("2026-01-01T04:05:40")]


@pytest.mark.parametrize("part", [0, 1, 500_000, 999_999])
def test_a_tick_is_after_the_instant_however_little(part: int) -> None:
    instant = at("2026-01-01T00:00:59").replace(microsecond=part)
    assert rule("* * * * *").after(instant) == at("2026-01-01T00:01")
    assert rule("* * * * * *").after(instant) == at("2026-01-01T00:01")
    assert rule("@every 1s").after(instant) == at("2026-01-01T00:01")


@pytest.mark.parametrize(
    ("line", "position", "words"),
    [
        ("0 25 * * *", 2, 'character 3: the hour "25": wanted 0 to 23'),
        ("60 * * * *", 0, 'character 1: the minute "60": wanted 0 to 59'),
        ("0  0 1,2,32 * *", 9, 'character 10: the day "32"'),
        ("* * * foo *", 6, 'the month "foo": wanted 1 to 12, or jan to dec'),
        ("* * * * mon-fry", 8, 'the weekday "mon-fry"'),
        ("* * * * * 61", 10, 'the second "61"'),
        ("1,,2 * * * *", 2, 'the minute ""'),
        ("*/0 * * * *", 0, 'the minute "*/0"'),
        ("H * * * *", 0, 'the minute "H"'),
        ("* R(1-5) * * *", 2, 'the hour "R(1-5)"'),
        ("@reboot", 0, "wanted one of @yearly"),
        ("@daily 5", 0, "wanted one of @yearly"),
        ("@every", 6, "wanted 1s to 366d"),
        ("@every 5", 7, '"5": wanted 1s to 366d'),
        ("@every 30m1h", 7, "in this order"),
        ("@every 0s", 7, "wanted 1s"),
        ("@every 400d", 7, "wanted 1s to 366d"),
        ("* * * *", None, "has 4 fields: wanted five (minute, hour, day, month, weekday), or six"),
        ("0 0 * * * * 2027", None, "has 7 fields"),
        ("0 0 31 2 *", None, "a day that never comes"),
        ("0 0 31 4,6,9,11 *", None, "a day that never comes"),
        ("", None, "wanted a cron line"),
        ("0" * 201, None, "201 characters"),
    ],
)  # fmt: skip
def test_a_fault_is_named_with_its_position(line: str, position: int | None, words: str) -> None:
    with pytest.raises(ScheduleError) as raised:
        rule(line)
    assert words in str(raised.value)
    assert raised.value.position == position


@pytest.mark.parametrize(
    "zone", ["Mars/Base", "", "Europe", "../Berlin", "/etc/localtime", "x" * 99]
)
def test_an_unknown_zone_is_refused(zone: str) -> None:
    with pytest.raises(ScheduleError, match="wanted a name such as Europe/Berlin"):
        rule("* * * * *", zone)


@given(st.text(alphabet="0123456789*/,-#LWRH? @dhmseverymonfi", max_size=20))
@settings(max_examples=150)
def test_any_text_gives_ticks_or_a_schedule_error(line: str) -> None:
    try:
        made = rule(line)
    except ScheduleError:
        return
    first, second = islice(ticks_of(made, at("2026-01-01T00:00")), 2)
    assert at("2026-01-01T00:00") < first < second
