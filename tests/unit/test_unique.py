"""What makes two jobs stand for one another: the declaration and the key."""

import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import attrs
import msgspec
import pydantic
import pydantic.dataclasses
import pytest

from sqlalchemy_jobs import Job, JobState, Unique, enqueue, errors, job

pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy_jobs.JobNeverAdded")


@job("line", unique=Unique())
@dataclass(frozen=True)
class Line:
    price: float
    tags: frozenset[str] = frozenset()
    names: dict[str, int] = field(default_factory=dict)


@job("some", unique=Unique(fields=["b", "a"]))
@attrs.frozen
class Some:
    a: int
    b: Decimal
    c: int = 0


@job("other_order", unique=Unique(fields=["a", "b"]))
@attrs.frozen
class OtherOrder:
    a: int
    b: Decimal


@job("renamed", unique=Unique(fields=["n"]))
class Renamed(msgspec.Struct, rename="camel"):
    n: int
    other: int = 0


@job("model", unique=Unique(fields=["number", "tags"]))
class Model(pydantic.BaseModel):
    number: int = pydantic.Field(alias="no")
    tags: set[str] = set()
    nested: dict[str, set[int]] = {}


@job("pydantic_dataclass", unique=Unique(fields=["tags"]))
@pydantic.dataclasses.dataclass
class PydanticDataclass:
    tags: tuple[set[str], ...]
    n: int = 0


@job("root", unique=Unique())
class Root(pydantic.RootModel[dict[str, int]]):
    pass


@job("plain")
@dataclass
class Plain:
    n: int = 0


def key(payload: Any, **options: Any) -> str:
    made: Job = enqueue(payload, **options)
    assert made.unique_key is not None and made.unique_key == made.unique_slot
    return made.unique_key


def rest(payload: Any) -> str:
    return key(payload).partition("/")[2]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Line(1), Line(1.0)),
        (Line(1, names={"a": 1, "b": 2}), Line(1, names={"b": 2, "a": 1})),
        (Line(1, frozenset("abcdefg")), Line(1, frozenset("gfedcba"))),
        (Some(1, Decimal("1.5"), 2), Some(1, Decimal("1.5"), 3)),
        (Renamed(1, 2), Renamed(1, 3)),
        (Model(no=1, tags={"a", "b"}), Model(no=1, tags={"b", "a"}, nested={"x": {1}})),
        (PydanticDataclass(({"a", "b"},), 1), PydanticDataclass(({"b", "a"},), 2)),
    ],
)
def test_equal_values_have_one_key(one: Any, other: Any) -> None:
    assert key(one) == key(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Line(1), Line(1.5)),
        (Line(1), Line(1, frozenset("a"))),
        (Some(1, Decimal("1.5")), Some(1, Decimal("1.6"))),
        (Renamed(1), Renamed(2)),
        (Model(no=1, tags={"a"}), Model(no=1, tags={"a", "b"})),
        (PydanticDataclass(({"a"}, {"b"})), PydanticDataclass(({"a", "b"},))),
        (Root({"a": 1}), Root({"a": 2})),
    ],
)
def test_other_values_have_other_keys(one: Any, other: Any) -> None:
    assert key(one) != key(other)


def test_the_order_in_which_fields_are_named_does_not_matter_and_the_kind_does() -> None:
    one, other = Some(1, Decimal(2)), OtherOrder(1, Decimal(2))
    assert key(one) != key(other)
    assert rest(one) == rest(other)


def test_the_key_is_the_same_in_every_process() -> None:
    """Sets of strings come in another order in each."""
    program = (
        "import tests.unit.test_unique as t; letters = 'abcdefghijk';"
        "print(t.key(t.Line(1, frozenset(letters))), t.key(t.Model(no=1, tags=set(letters))),"
        " t.key(t.PydanticDataclass((set(letters),))))"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1 and printed != {""}


def test_a_key_of_ones_own_stands_for_the_fields() -> None:
    assert key(Plain(1), unique_key="k") == key(Plain(2), unique_key="k") == "plain/k"
    assert key(Some(1, Decimal(1)), unique_key="k") == key(Some(2, Decimal(2)), unique_key="k")


def test_a_job_without_a_key_has_none() -> None:
    made = enqueue(Plain())
    assert (made.unique_key, made.unique_slot, made.duplicate_of) == (None, None, None)


def test_the_longest_kind_with_a_digest_and_a_window_fits() -> None:
    @job("k" * 100, unique=Unique(period=timedelta(seconds=1)))
    @dataclass
    class Long:
        n: int = 0

    assert len(key(Long())) <= 200


@pytest.mark.parametrize("wrong", ["", " k", "k ", "k\n", "a\0b", "\ud800", 7, "k" * 195])
def test_wrong_keys_are_refused(wrong: Any) -> None:
    with pytest.raises(errors.EnqueueError, match="unique_key="):
        enqueue(Plain(), unique_key=wrong)


def test_windows_are_counted_in_utc_from_1970() -> None:
    daily = Unique(period=timedelta(days=1))
    midnight = datetime(1970, 1, 3, tzinfo=UTC)
    assert daily.key("k", "s", midnight) == "k/s/2"
    assert daily.key("k", "s", midnight - timedelta(microseconds=1)) == "k/s/1"


READY, RUNNING, SUCCEEDED = JobState.READY, JobState.RUNNING, JobState.SUCCEEDED


@pytest.mark.parametrize(
    ("unique", "mask"),
    [
        (Unique(), 1 + 2 + 32),
        (Unique(period=timedelta(days=1)), 63),
        (Unique(states=[READY]), 1 + 32),
        (Unique(states={READY, RUNNING, SUCCEEDED}), 1 + 2 + 4 + 32),
        (Unique(states=[READY], period=timedelta(days=1)), 1 + 32),
    ],
)
def test_states_are_a_bit_mask_that_never_changes(unique: Unique, mask: int) -> None:
    assert unique.mask == mask


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fields": "order_id"}, "one string"),
        ({"period": 60}, "timedelta"),
        ({"period": timedelta(0)}, "one second or more"),
        ({"on_conflict": "ignore"}, "keep, replace, raise"),
        ({"states": "ready"}, "JobState"),
        ({"states": ["no such"]}, "JobState"),
        ({"states": []}, "without ready"),
        ({"states": [RUNNING]}, "without ready"),
        ({"states": [READY, SUCCEEDED]}, "without running"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.DeclarationError, match=message):
        Unique(**options)


@pytest.mark.parametrize("cls", [Line, Some, Renamed, Model, PydanticDataclass])
def test_fields_that_the_class_does_not_have_are_refused(cls: type) -> None:
    with pytest.raises(errors.DeclarationError, match="has no field 'missing'"):
        job("x", unique=Unique(fields=["missing"]))(cls)


@pytest.mark.parametrize(
    "unique",
    [
        Unique(period=timedelta(days=1)),
        Unique(states=[READY, RUNNING, SUCCEEDED]),
        Unique(states=[READY, RUNNING, JobState.CANCELLED]),
    ],
)
def test_what_keeps_others_out_when_it_is_final_is_not_deleted_at_once(unique: Unique) -> None:
    with pytest.raises(errors.DeclarationError, match="would no longer keep others out"):
        job("x", unique=unique, keep=timedelta(0))
    job("x", unique=Unique(), keep=timedelta(0))


def test_anything_but_a_unique_is_refused() -> None:
    with pytest.raises(errors.DeclarationError, match="wanted a Unique"):
        job("x", unique=True)  # type: ignore[arg-type]
