"""Limits as they are declared, the keys that rows carry, and the arithmetic of rates."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import attrs
import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.orm import Session, sessionmaker

from sqlalchemy_jobs import JobApp, Limit, enqueue, job
from sqlalchemy_jobs.errors import DeclarationError
from sqlalchemy_jobs.limits import (
    BUCKETS,
    LIMIT_KEY_LENGTH,
    Numbers,
    Rate,
    Starts,
    limit_key,
    name_of,
)

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)

# ---------------------------------------------------------------------------------------- rates


@pytest.mark.parametrize(
    ("text", "count", "window"),
    [
        ("1/second", 1, timedelta(seconds=1)),
        ("100/minute", 100, timedelta(minutes=1)),
        ("7/hour", 7, timedelta(hours=1)),
        ("1000000/day", 1_000_000, timedelta(days=1)),
        ("5/15s", 5, timedelta(seconds=15)),
        ("2/90m", 2, timedelta(minutes=90)),
        ("2/24h", 2, timedelta(days=1)),
        ("2/1d", 2, timedelta(days=1)),
    ],
)
def test_rates(text: str, count: int, window: timedelta) -> None:
    assert Rate.parse(text) == Rate(count, window)


@pytest.mark.parametrize(
    ("text", "position", "wanted"),
    [
        ("", 1, "how many"),
        ("0/minute", 1, "how many"),
        ("-1/minute", 1, "how many"),
        ("ten/minute", 1, "how many"),
        ("100", 4, "a slash"),
        ("100 per minute", 4, "a slash"),
        ("100/", 5, "second, minute, hour or day"),
        ("100/minutes", 5, "second, minute, hour or day"),
        ("100/15", 7, "second, minute, hour or day"),
        ("100/15minute", 7, "second, minute, hour or day"),
        ("100/s", 5, "second, minute, hour or day"),
        ("100/minute ", 5, "second, minute, hour or day"),
        ("100/0s", 5, "up to a day"),
        ("100/25h", 5, "up to a day"),
        ("100/99999d", 5, "up to a day"),
        (f"{'9' * 5000}/second", 10, "a slash"),
    ],
)
def test_a_bad_rate_is_refused_with_the_position_of_the_fault(
    text: str, position: int, wanted: str
) -> None:
    with pytest.raises(DeclarationError, match=f"at character {position}: wanted .*{wanted}"):
        Limit(rate=text)


@given(st.text())
def test_any_text_is_a_rate_or_refused(text: str) -> None:
    try:
        rate = Rate.parse(text)
    except DeclarationError:
        return
    assert rate.count > 0 and timedelta(0) < rate.window <= timedelta(days=1)


# ------------------------------------------------------------------------- starts within a window

WINDOW = timedelta(seconds=60)
steps = st.lists(st.tuples(st.integers(0, 70_000_000), st.integers(0, 12)), min_size=1, max_size=60)


@given(st.integers(1, 30), steps)
def test_no_window_ever_has_more_starts_than_the_rate_says(most: int, steps: Any) -> None:
    """By any sequence of claims at any times; and little is remembered."""
    rate, used, now = Rate(most, WINDOW), None, NOW
    begun: list[datetime] = []
    for wait, wanted in steps:
        now += timedelta(microseconds=wait)
        starts = Starts(rate, used, now)
        if (taken := min(wanted, starts.free)) > 0:
            starts.add(taken)
            begun += [now] * taken
            used = starts.used
        assert len(starts.used) <= BUCKETS + 2
        assert len([at for at in begun if at > now - WINDOW]) <= most


@given(st.integers(1, 30), steps)
def test_all_that_began_a_window_and_a_part_ago_may_begin_again(most: int, steps: Any) -> None:
    rate, used, now = Rate(most, WINDOW), None, NOW
    begun: list[datetime] = []
    for wait, wanted in steps:
        now += timedelta(microseconds=wait)
        starts = Starts(rate, used, now)
        remembered = [at for at in begun if at > now - WINDOW - WINDOW / BUCKETS]
        assert starts.free >= most - len(remembered)
        if (taken := min(wanted, starts.free)) > 0:
            starts.add(taken)
            begun += [now] * taken
            used = starts.used


@given(st.integers(1, 30), steps)
def test_the_next_start_is_at_the_first_instant_at_which_one_is_free(most: int, steps: Any) -> None:
    rate, used, now = Rate(most, WINDOW), None, NOW
    for wait, wanted in steps:
        now += timedelta(microseconds=wait)
        starts = Starts(rate, used, now)
        if (taken := min(wanted, starts.free)) > 0:
            starts.add(taken)
            used = starts.used
        if (opens := starts.next_at) is None:
            assert starts.free > 0
        else:
            assert starts.free == 0 and now < opens <= now + WINDOW
            assert Starts(rate, starts.used, opens).free > 0
            assert Starts(rate, starts.used, opens - timedelta(microseconds=1)).free == 0


def test_a_clock_that_is_set_back_lets_nothing_begin_too_early_and_holds_up_for_a_window() -> None:
    rate = Rate(2, WINDOW)
    starts = Starts(rate, None, NOW)
    starts.add(2)
    earlier = NOW - timedelta(hours=5)
    back = Starts(rate, starts.used, earlier)
    assert back.free == 0 and back.next_at == earlier + WINDOW


def test_a_rate_that_was_lowered_waits_until_few_enough_are_left() -> None:
    starts = Starts(Rate(10, WINDOW), None, NOW)
    starts.add(6)
    later = NOW + timedelta(seconds=30)
    starts = Starts(Rate(10, WINDOW), starts.used, later)
    starts.add(4)
    lowered = Starts(Rate(3, WINDOW), starts.used, later)
    assert lowered.free == 0 and lowered.next_at == later + WINDOW


# -------------------------------------------------------------------------------------- declaring


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "a Limit without a limit"),
        ({"key": "account_id"}, "a Limit without a limit"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"concurrency": True}, "concurrency=True"),
        ({"concurrency": 1.5}, r"concurrency=1\.5"),
        ({"concurrency": 2**31}, "from 1 to 2147483647"),
        ({"ordered": True, "concurrency": 2}, "leave concurrency away"),
        ({"rate": 5}, "rate=5: wanted a string"),
        ({"concurrency": 1, "key": ""}, "wanted the name of a field"),
        ({"concurrency": 1, "key": ()}, "wanted the name of a field"),
        ({"concurrency": 1, "key": ["a", ""]}, "wanted the name of a field"),
    ],
    ids=str,
)
def test_limits_that_cannot_be_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(DeclarationError, match=said):
        Limit(**options)


def test_a_key_that_names_no_field_is_refused_with_the_fields_that_there_are() -> None:
    with pytest.raises(
        DeclarationError,
        match="limit: Charge has no field 'acount_id': it has account_id, amount",
    ):

        @job("charge", limit=Limit(concurrency=1, key="acount_id"))
        @dataclass
        class Charge:
            account_id: int
            amount: int


@pytest.mark.parametrize("limit", [3, "100/minute", {"concurrency": 1}], ids=str)
def test_what_is_no_limit_is_refused(limit: Any) -> None:
    with pytest.raises(DeclarationError, match=r"wanted a Limit, for example limit=Limit"):
        job("k", limit=limit)


@pytest.mark.parametrize("name", ["", "a/b", "a b", "x" * 101])
def test_a_name_that_no_kind_could_have_is_refused(name: str) -> None:
    with pytest.raises(DeclarationError, match=r"limit .*: wanted 1 to 100 letters"):
        job("k", limit=Limit(concurrency=1, name=name))


def declared(kind: str, limit: Limit | None, **options: Any) -> type[Any]:
    @job(kind, limit=limit, **options)
    @dataclass
    class Fresh:
        account: int = 0
        other: int = 0

    return Fresh


def app_of(*classes: type[Any]) -> JobApp[Any, Any]:
    app: JobApp[Any, Any] = JobApp(sessionmaker())
    for cls in classes:

        @app.handler(cls)
        def handle(session: Session, payload: Any) -> None: ...

    return app


def test_classes_that_share_a_limit_must_say_the_same_numbers() -> None:
    one = declared("one", Limit(concurrency=3, key="account", name="api"))
    app_of(one, declared("two", Limit(concurrency=3, key="other", name="api")))
    with pytest.raises(
        DeclarationError, match=r'the limit "api" of .*concurrency=4.*must say the same'
    ):
        app_of(one, declared("two", Limit(concurrency=4, name="api")))
    with pytest.raises(DeclarationError, match='the limit "api" of '):
        app_of(one, declared("api", Limit(rate="1/second")))


def test_what_a_limit_allows() -> None:
    assert Limit(ordered=True, key="a").numbers == Numbers(1, None, True)
    assert Limit(rate="1/second").numbers == Numbers(None, Rate(1, timedelta(seconds=1)))


# ------------------------------------------------------------------------------------------- keys


def key_of(payload: Any) -> str | None:
    made = enqueue(payload)
    Session().add(made)
    return made.limit_key


def test_the_key_is_the_name_and_the_value() -> None:
    assert key_of(declared("charge", Limit(concurrency=1))(7)) == "charge"
    assert key_of(declared("charge", Limit(concurrency=1, key="account"))(7)) == "charge/7"
    assert key_of(declared("charge", Limit(concurrency=1, key="account", name="api"))(7)) == "api/7"
    both = declared("charge", Limit(concurrency=1, key=["account", "other"]))
    assert key_of(both(7, 8)) == "charge/[7,8]"
    assert key_of(declared("charge", None)(7)) is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: dataclass(type("D", (), {"__annotations__": {"to": str | None}})),
        lambda: attrs.define(type("A", (), {"__annotations__": {"to": str | None}})),
        lambda: msgspec.defstruct("S", [("to", str | None)]),
        lambda: pydantic.create_model("P", to=(str | None, pydantic.Field(alias="TO"))),
    ],
    ids=["dataclass", "attrs", "Struct", "pydantic"],
)
def test_the_key_is_the_same_whatever_made_the_class(make: Callable[[], Any]) -> None:
    cls = job("mail", limit=Limit(concurrency=1, key="to"))(make())
    name = "TO" if hasattr(cls, "model_fields") else "to"
    assert key_of(cls(**{name: "ä@example.org"})) == "mail/ä@example.org"
    assert key_of(cls(**{name: None})) is None


@pytest.mark.parametrize(
    "value", ["a", "x" * 300, "line\nbreak", "end ", "\u200b", "#", "a/b", "ö" * 190]
)
def test_whatever_the_value_the_key_can_be_stored_and_told_apart(value: str) -> None:
    key = limit_key("k" * 100, value)
    assert len(key) <= LIMIT_KEY_LENGTH and key.isprintable() and key == key.strip()
    assert name_of(key) == "k" * 100
    assert key != limit_key("k" * 100, value + "y") and key == limit_key("k" * 100, value)
