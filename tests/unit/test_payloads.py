"""Payload classes: what may be declared, and that what is stored is what is read back, or refused."""

import enum
import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, make_dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from types import SimpleNamespace
from typing import Any, Generic, Literal, NewType, TypeVar
from zoneinfo import ZoneInfo

import attrs
import msgspec
import pydantic
import pydantic.dataclasses
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sqlalchemy_jobs import Limit, Unique, job
from sqlalchemy_jobs.backoff import quartic
from sqlalchemy_jobs.codec import decode, encode
from sqlalchemy_jobs.errors import (
    DeclarationError,
    EnqueueError,
    InvalidPayload,
    JobsError,
    PayloadError,
)
from sqlalchemy_jobs.payloads import Declaration, declaration_of

# --------------------------------------------------------------------------------- declaring classes


@dataclass
class Plain:
    n: int


@attrs.define
class Attrs:
    n: int


class Struct(msgspec.Struct):
    n: int


class Model(pydantic.BaseModel):
    n: int


@pydantic.dataclasses.dataclass
class PydanticDataclass:
    n: int


FAMILIES = [Plain, Attrs, Struct, Model, PydanticDataclass]


def a_dataclass() -> type:
    return make_dataclass("Fresh", [("n", int)])


@pytest.mark.parametrize("cls", FAMILIES)
def test_a_declared_class_is_returned_unchanged(cls: type) -> None:
    attributes = set(vars(cls))
    assert job("some.kind")(cls) is cls
    assert set(vars(cls)) - attributes <= {"__sajobs__"}
    assert declaration_of(cls).kind == "some.kind"


def test_a_declaration_keeps_every_option() -> None:
    def wait(failures: int) -> timedelta:
        return timedelta(seconds=failures)

    def upgrade(stored: dict[str, Any]) -> dict[str, Any]:
        return stored

    cls = job(
        "new",
        queue="mail",
        priority=-5,
        max_attempts=3,
        backoff=wait,
        give_up_on=[ValueError],
        aliases=["old", "older"],
        upgrade=upgrade,
        unique=Unique(),
        limit=Limit(concurrency=3),
        timeout=timedelta(seconds=7),
        on_crash="fail",
        keep=timedelta(0),
        keep_failed=timedelta(days=3),
    )(a_dataclass())
    assert declaration_of(cls) == Declaration(
        "new",
        "mail",
        -5,
        3,
        wait,
        (ValueError,),
        ("old", "older"),
        upgrade,
        Unique(),
        Limit(concurrency=3),
        timedelta(seconds=7),
        "fail",
        timedelta(0),
        timedelta(days=3),
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"timeout": 5}, r"timeout=5 \(int\) is not a timedelta: say timedelta\(seconds=5\)"),
        ({"timeout": timedelta(0)}, "no handler could run"),
        ({"timeout": timedelta(-1)}, "negative"),
        ({"keep": 1}, "keep=1"),
        ({"keep_failed": timedelta(-1)}, "keep_failed=.* is negative"),
        ({"on_crash": "ignore"}, 'wanted "retry" or "fail"'),
        ({"backoff": timedelta(1)}, "wanted a function of the number of failures"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused_at_the_declaration(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(DeclarationError, match=said):
        job("k", **options)


def test_the_defaults_of_a_declaration() -> None:
    cls = job("k")(a_dataclass())
    assert declaration_of(cls) == Declaration(
        "k", "default", 0, 20, quartic, (), (), None, None, None, None, "retry", None, None
    )


def test_one_class_may_have_its_kind_declared_anew_in_another_place() -> None:
    """There is no process-wide registry: a reloaded module declares its kinds again."""
    first, second = job("same")(a_dataclass()), job("same")(a_dataclass())
    assert declaration_of(first) == declaration_of(second)


def test_the_kind_is_required() -> None:
    with pytest.raises(DeclarationError, match=r'write @job\("a_stable_name"\) above the class'):
        job(a_dataclass())  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        job()  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        job(kind="by_name")  # type: ignore[call-arg]


def test_a_class_without_fields_is_refused_with_the_line_to_add() -> None:
    with pytest.raises(
        DeclarationError, match=r'@job\("k"\) class NoFields has no fields.*put @dataclass between'
    ):

        @job("k")
        class NoFields:
            n: int


def test_job_below_dataclass_is_refused() -> None:
    """The wrong order is an error at import, not a class without declaration (slots make a second)."""
    with pytest.raises(DeclarationError, match="put @dataclass between"):

        @dataclass(slots=True)
        @job("k")
        class WrongOrder:
            n: int


@pytest.mark.parametrize("thing", [Plain(1), print, SimpleNamespace(), "Plain"])
def test_only_classes_are_declared(thing: Any) -> None:
    with pytest.raises(DeclarationError, match="declares a class"):
        job("k")(thing)


@pytest.mark.parametrize("family", [dataclass, attrs.define, pydantic.dataclasses.dataclass])
def test_a_subclass_is_not_declared_by_its_parent(family: Callable[[type], type]) -> None:
    class Parent:
        n: int

    parent = job("parent")(family(Parent))

    class Child(parent):  # type: ignore[misc, valid-type]
        m: int = 0

    child = family(Child)
    with pytest.raises(DeclarationError, match=r"Child is not declared \(it only inherits from"):
        declaration_of(child)
    with pytest.raises(DeclarationError, match="Child is not declared"):
        encode(child(n=1))
    assert declaration_of(job("child")(child)).kind == "child"
    assert declaration_of(parent).kind == "parent"


def test_a_subclass_of_a_struct_or_model_is_not_declared_by_its_parent() -> None:
    @job("struct")
    class ParentStruct(msgspec.Struct):
        n: int

    class ChildStruct(ParentStruct):
        pass

    @job("model")
    class ParentModel(pydantic.BaseModel):
        n: int

    class ChildModel(ParentModel):
        pass

    for child in (ChildStruct(n=1), ChildModel(n=1)):
        with pytest.raises(DeclarationError, match="it only inherits from Parent"):
            encode(child)


def test_an_undeclared_class_is_refused_with_the_line_to_add() -> None:
    with pytest.raises(
        DeclarationError, match=r'no @job is above it\): put @job\("a_stable_kind"\)'
    ):
        encode(a_dataclass()(1))


def test_array_like_structs_are_refused() -> None:
    with pytest.raises(DeclarationError, match="remove array_like=True"):

        @job("k")
        class Listed(msgspec.Struct, array_like=True):
            n: int


@pytest.mark.parametrize(
    "name",
    ["", " ", "a b", ".a", ":a", "-a", "a\n", "a\0", "é", "a/b", "a;b", "x" * 101, None, 7, b"a"],
)
def test_wrong_kinds_are_refused(name: Any) -> None:
    with pytest.raises(DeclarationError):
        job(name)
    with pytest.raises(DeclarationError):
        job("fine", aliases=[name])


@pytest.mark.parametrize("name", ["a", "A1", "_", "9", "shop.mail:send-receipt_2", "x" * 100])
def test_usual_kinds_are_allowed(name: str) -> None:
    declared = declaration_of(job(name, aliases=[name[::-1]])(a_dataclass()))
    assert (declared.kind, declared.aliases) == (name, (name[::-1],))


@pytest.mark.parametrize("queue", ["", "a b", "-a", "x" * 61, 5, True])
def test_wrong_queues_are_refused(queue: Any) -> None:
    with pytest.raises(DeclarationError, match="queue"):
        job("k", queue=queue)
    job("k", queue="x" * 60)


@pytest.mark.parametrize("priority", [-32769, 32768, 1.0, "1", True])
def test_wrong_priorities_are_refused(priority: Any) -> None:
    with pytest.raises(DeclarationError, match="priority"):
        job("k", priority=priority)
    for limit in (-32768, 32767):
        job("k", priority=limit)


@pytest.mark.parametrize("most", [0, -1, 32768, 1.0, "3", True])
def test_wrong_max_attempts_are_refused(most: Any) -> None:
    with pytest.raises(DeclarationError, match="max_attempts"):
        job("k", max_attempts=most)
    for limit in (1, 32767):
        job("k", max_attempts=limit)


def test_a_string_is_not_taken_for_a_list_of_aliases() -> None:
    with pytest.raises(DeclarationError, match="alias"):
        job("k", aliases="old")


@pytest.mark.parametrize("exceptions", [["ValueError"], [ValueError("an instance")], [int], "x"])
def test_give_up_on_takes_exception_classes_only(exceptions: Any) -> None:
    """Found out later, it would break the run that has just failed."""
    with pytest.raises(DeclarationError, match="give_up_on"):
        job("k", give_up_on=exceptions)


# ------------------------------------------------------------------------- each family, and each in each


def read_back(payload: Any) -> Any:
    """What a handler is given: stored as JSON text, read by whichever database."""
    return decode(type(payload), json.dumps(encode(payload)), None)


@job("frozen")
@dataclass(frozen=True)
class Frozen:
    n: int
    text: str = "x"


@job("slots")
@dataclass(slots=True, kw_only=True)
class Slots:
    text: str = "x"
    n: int


@job("frozen_slots")
@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class FrozenSlots:
    text: str = "x"
    n: int


@job("own_init")
@dataclass(init=False)
class OwnInit:
    n: int

    def __init__(self, half: int) -> None:
        self.n = half * 2


@job("attrs_frozen")
@attrs.frozen(kw_only=True)
class AttrsFrozen:
    text: str = "x"
    n: int = attrs.field(validator=attrs.validators.ge(0))


@job("attrs_dict")
@attrs.define(slots=False)
class AttrsDict:
    n: int
    ns: list[int] = attrs.Factory(list)


@job("struct_frozen")
class StructFrozen(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    long_name: str = "x"
    n: int


@job("struct_omitting")
class StructOmitting(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    n: int
    text: str = "x"


@job("struct_tagged")
class StructTagged(msgspec.Struct, tag=True):
    n: int


@job("model_frozen")
class ModelFrozen(pydantic.BaseModel, frozen=True):
    n: pydantic.PositiveInt
    at: datetime


@job("model_alias")
class ModelAlias(pydantic.BaseModel, populate_by_name=True):
    n: int = pydantic.Field(alias="theNumber")


@job("pydantic_dataclass")
@pydantic.dataclasses.dataclass(frozen=True)
class PydanticFrozen:
    n: int
    at: datetime
    url: pydantic.HttpUrl


T = TypeVar("T")


@job("model_generic")
class ModelGeneric(pydantic.BaseModel, Generic[T]):
    content: T


@pytest.mark.parametrize(
    "payload",
    [
        Frozen(1),
        Slots(n=2),
        FrozenSlots(n=3, text="ü\U0001f600"),
        OwnInit(4),
        AttrsFrozen(n=5),
        AttrsDict(6, [7, 8]),
        StructFrozen(n=9, long_name="y"),
        StructOmitting(10),
        StructTagged(11),
        ModelFrozen(n=12, at=datetime(2030, 1, 1, tzinfo=UTC)),
        ModelAlias(theNumber=13),
        PydanticFrozen(14, datetime(2030, 1, 1, tzinfo=UTC), "https://example.com/"),  # type: ignore[arg-type]
        ModelGeneric(content={"a": [1, None]}),
    ],
    ids=lambda payload: type(payload).__name__,
)
def test_every_family_is_read_back_equal(payload: Any) -> None:
    restored = read_back(payload)
    assert type(restored) is type(payload)
    assert restored == payload


@pytest.mark.parametrize(
    ("payload", "stored"),
    [
        (Frozen(1), {"n": 1, "text": "x"}),
        (AttrsDict(1), {"n": 1, "ns": []}),
        (StructFrozen(n=1), {"longName": "x", "n": 1}),
        (StructOmitting(1), {"n": 1}),
        (ModelAlias(theNumber=1), {"theNumber": 1}),
    ],
    ids=lambda each: type(each).__name__,
)
def test_a_row_holds_a_json_object_by_the_names_that_are_read(
    payload: Any, stored: dict[str, Any]
) -> None:
    assert encode(payload) == stored


def test_defaults_are_stored_so_that_changing_them_does_not_change_waiting_jobs() -> None:
    assert encode(Slots(n=1)) == {"n": 1, "text": "x"}


def nested_in(outer: str, inner: type) -> type:
    """A declared class of one family with fields that hold another one, alone and in containers."""
    fields = {"one": inner, "many": list[inner], "named": dict[str, inner], "maybe": inner | None}  # type: ignore[valid-type]
    if outer == "dataclass":
        made = make_dataclass("Outer", list(fields.items()))
    elif outer == "attrs":
        made = attrs.make_class("Outer", {k: attrs.field(type=v) for k, v in fields.items()})
    elif outer == "struct":
        made = msgspec.defstruct("Outer", list(fields.items()))
    elif outer == "model":
        made = pydantic.create_model("Outer", **{k: (v, ...) for k, v in fields.items()})  # type: ignore[call-overload]
    else:
        plain = type("Outer", (), {"__annotations__": fields, "__module__": __name__})
        made = pydantic.dataclasses.dataclass(plain)
    return job("outer")(made)


OUTER = ["dataclass", "attrs", "struct", "model", "pydantic_dataclass"]
NOT_IN_PYDANTIC = {Attrs, Struct}


@pytest.mark.parametrize("inner", FAMILIES)
@pytest.mark.parametrize("outer", OUTER)
def test_every_family_can_be_a_field_of_every_other(outer: str, inner: type) -> None:
    if inner in NOT_IN_PYDANTIC and outer in ("model", "pydantic_dataclass"):
        # Pydantic's own limit, met before @job.
        with pytest.raises(pydantic.errors.PydanticSchemaGenerationError):
            nested_in(outer, inner)
        return
    cls = nested_in(outer, inner)
    for maybe in (None, inner(n=4)):
        payload = cls(one=inner(n=1), many=[inner(n=2)], named={"three": inner(n=3)}, maybe=maybe)
        restored = read_back(payload)
        assert restored == payload
        assert [type(restored.one), type(restored.many[0])] == [inner, inner]
        assert type(restored.named["three"]) is inner
        assert type(restored.maybe) is type(maybe)


@job("all_in_one")
@dataclass
class AllInOne:
    plain: Plain
    attrs_: Attrs
    struct: Struct
    model: Model
    models: list[Model]
    pydantic_dataclass: PydanticDataclass


def test_all_families_in_one_payload() -> None:
    payload = AllInOne(
        Plain(1), Attrs(2), Struct(3), Model(n=4), [Model(n=5)], PydanticDataclass(6)
    )
    assert read_back(payload) == payload


# ------------------------------------------------------------------------------------- values, at random


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Flags(enum.Flag):
    A = 1
    B = 2


UserId = NewType("UserId", int)

# What a database stores of a text; everything else is refused, see below.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
ZONES = st.integers(-23 * 60, 23 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
INTS = st.integers(-(10**30), 10**30)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
UUIDS = st.uuids()
DECIMALS = st.decimals(allow_nan=False, allow_infinity=False)
AWARE = st.datetimes(timezones=ZONES)
TIMEDELTAS = st.timedeltas(timedelta(days=-100_000), timedelta(days=100_000))


@dataclass(frozen=True)
class Line:
    sku: str
    price: Decimal
    shipped: date | None = None


LINES = st.builds(Line, TEXT, DECIMALS, st.none() | st.dates())


@job("values")
@dataclass
class Values:
    integer: int
    number: float
    text: str
    truth: bool
    aware: datetime
    naive: datetime
    day: date
    clock: time
    duration: timedelta
    key: uuid.UUID
    amount: Decimal
    colour: Colour
    level: Level
    flags: Flags
    user: UserId
    literal: Literal["a", "b", 3]
    raw: bytes
    maybe: int | None
    line: Line
    lines: list[Line]
    pairs: dict[str, Line]
    by_key: dict[uuid.UUID, int]
    by_number: dict[int, str]
    by_day: dict[date, str]
    words: set[str]
    numbers: frozenset[int]
    pair: tuple[int, str]
    many: tuple[Decimal, ...]
    deep: dict[str, list[dict[str, list[int]]]]
    anything: Any


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOATS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)

VALUES = st.builds(
    Values,
    integer=INTS,
    number=FLOATS,
    text=TEXT,
    truth=st.booleans(),
    aware=AWARE,
    naive=st.datetimes(),
    day=st.dates(),
    clock=st.times(),
    duration=TIMEDELTAS,
    key=UUIDS,
    amount=DECIMALS,
    colour=st.sampled_from(Colour),
    level=st.sampled_from(Level),
    flags=st.sampled_from([Flags.A, Flags.B]),
    user=INTS.map(UserId),
    literal=st.sampled_from(["a", "b", 3]),
    raw=st.binary(max_size=8),
    maybe=st.none() | INTS,
    line=LINES,
    lines=st.lists(LINES, max_size=2),
    pairs=st.dictionaries(TEXT, LINES, max_size=2),
    by_key=st.dictionaries(UUIDS, INTS, max_size=2),
    by_number=st.dictionaries(st.integers(-(2**63), 2**63 - 1), TEXT, max_size=2),
    by_day=st.dictionaries(st.dates(), TEXT, max_size=2),
    words=st.sets(TEXT, max_size=3),
    numbers=st.frozensets(st.integers(), max_size=3),
    pair=st.tuples(st.integers(), TEXT),
    many=st.lists(DECIMALS, max_size=3).map(tuple),
    deep=st.just({"a": [{"b": [1]}]}),
    anything=JSON_VALUES,
)


# Whatever is slow here is the machine.
PATIENT = settings(suppress_health_check=[HealthCheck.too_slow])


@settings(PATIENT, max_examples=60)
@given(VALUES)
def test_values_are_read_back_equal(payload: Values) -> None:
    restored = read_back(payload)
    assert restored == payload
    for name in Values.__dataclass_fields__:
        assert type(getattr(restored, name)) is type(getattr(payload, name)), name
    assert restored.aware.utcoffset() is not None


class ModelLine(pydantic.BaseModel):
    sku: str
    price: Decimal


@job("model_values")
class ModelValues(pydantic.BaseModel):
    aware: pydantic.AwareDatetime
    day: date
    clock: time
    duration: timedelta
    key: uuid.UUID
    amount: Decimal
    colour: Colour
    level: Level
    lines: list[ModelLine]
    by_key: dict[uuid.UUID, int]
    maybe: int | None
    words: set[str]
    pair: tuple[int, str]


@settings(PATIENT, max_examples=60)
@given(
    st.builds(
        ModelValues,
        aware=AWARE,
        day=st.dates(),
        clock=st.times(),
        duration=TIMEDELTAS,
        key=UUIDS,
        amount=DECIMALS,
        colour=st.sampled_from(Colour),
        level=st.sampled_from(Level),
        lines=st.lists(st.builds(ModelLine, sku=TEXT, price=DECIMALS), max_size=2),
        by_key=st.dictionaries(UUIDS, st.integers(), max_size=2),
        maybe=st.none() | st.integers(),
        words=st.sets(TEXT, max_size=3),
        pair=st.tuples(st.integers(), TEXT),
    )
)
def test_values_of_a_pydantic_model_are_read_back_equal(payload: ModelValues) -> None:
    assert read_back(payload) == payload


# -------------------------------------------------------------------- refused in the caller's stack


@job("item")
@dataclass
class Item:
    n: int = 0
    text: str = ""
    number: float = 0.0
    anything: Any = None
    colour: Colour = Colour.RED
    when: datetime | None = None
    plain: Plain | None = None


@job("cart")
@dataclass
class Cart:
    items: list[Item] = field(default_factory=list)
    named: dict[str, Item] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


@job("attrs_cart")
@attrs.define
class AttrsCart:
    items: list[Item] = attrs.Factory(list)


@job("struct_cart")
class StructCart(msgspec.Struct):
    items: list[Item] = []


def path_of_refusal(payload: Any) -> str:
    with pytest.raises(PayloadError) as caught:
        encode(payload)
    assert str(caught.value).startswith(caught.value.path)
    return caught.value.path


@pytest.mark.parametrize(
    ("item", "below"),
    [
        (Item(n="seven"), ".n"),  # type: ignore[arg-type]
        (Item(n=1.5), ".n"),  # type: ignore[arg-type]
        (Item(n=None), ".n"),  # type: ignore[arg-type]
        (Item(text=7), ".text"),  # type: ignore[arg-type]
        (Item(colour="green"), ".colour"),  # type: ignore[arg-type]
        (Item(when="tomorrow"), ".when"),  # type: ignore[arg-type]
        (Item(plain=Plain("x")), ".plain.n"),  # type: ignore[arg-type]
        (Item(number=float("nan")), ".number"),
        (Item(number=float("inf")), ".number"),
        (Item(number=float("-inf")), ".number"),
        (Item(anything={"a": [1.0, float("nan")]}), ".anything.a[1]"),
        (Item(text="a\0b"), ".text"),
        (Item(anything=["\0"]), ".anything[0]"),
        (Item(text="\ud800"), ".text"),
        (Item(anything={"k": "\udfff"}), ".anything.k"),
        (Item(anything=object()), ".anything"),
        (Item(n=object()), ".n"),  # type: ignore[arg-type]
    ],
    # The same in every process: no address.
    ids=lambda each: (
        repr(each).split(" object at ")[0][:40].encode("ascii", "backslashreplace").decode()
    ),
)
@pytest.mark.parametrize(
    ("wrap", "above"),
    [
        (lambda item: item, "Item"),
        (lambda item: Cart(items=[Item(), item]), "Cart.items[1]"),
        (lambda item: AttrsCart(items=[item]), "AttrsCart.items[0]"),
        (lambda item: StructCart(items=[item]), "StructCart.items[0]"),
    ],
    ids=["alone", "in a dataclass", "in an attrs class", "in a Struct"],
)
def test_what_would_not_be_read_back_is_refused_with_the_path_of_the_field(
    wrap: Callable[[Item], Any], above: str, item: Item, below: str
) -> None:
    assert path_of_refusal(wrap(item)) == above + below


@pytest.mark.parametrize("key", ["\0", "\ud800"])
def test_keys_that_cannot_be_stored_are_refused_with_their_path(key: str) -> None:
    assert path_of_refusal(Cart(extra={"fine": 1, key: 2})) == f"Cart.extra, key {key!r}"


def test_a_wrong_value_under_a_key_is_refused_with_a_path() -> None:
    path = path_of_refusal(Cart(named={"first": Item(n="seven")}))  # type: ignore[arg-type]
    assert path.startswith("Cart.named") and path.endswith(".n")


def test_the_letters_backslash_u0000_are_no_nul() -> None:
    assert read_back(Item(text="\\u0000")) == Item(text="\\u0000")


def test_the_message_says_what_is_wrong() -> None:
    for payload, words in [
        (Item(n="seven"), "Item.n could not be read back: Expected `int`, got `str`"),  # type: ignore[arg-type]
        (Item(number=float("nan")), "Item.number cannot be stored: nan is not a JSON number"),
        (Item(text="\0"), "Item.text cannot be stored: it contains a NUL character"),
        (Item(text="\ud800"), "Item.text cannot be stored: .* lone surrogate"),
        (Item(anything=object()), "Item.anything cannot be stored: .*object"),
    ]:
        with pytest.raises(PayloadError, match=words):
            encode(payload)


@job("secretive_model")
class SecretiveModel(pydantic.BaseModel):
    user: str = "me"
    password: pydantic.SecretStr


@job("secretive_dataclass")
@pydantic.dataclasses.dataclass
class SecretiveDataclass:
    password: pydantic.SecretStr


class Login(pydantic.BaseModel):
    password: pydantic.SecretStr


@job("nesting_secret_model")
class NestingSecretModel(pydantic.BaseModel):
    logins: list[Login]


@job("nesting_secret_dataclass")
@dataclass
class NestingSecretDataclass:
    logins: list[Login]


@job("attrs_private_default")
@attrs.define
class AttrsPrivateDefault:
    n: int
    _secret: str = "none"


@job("attrs_private")
@attrs.define
class AttrsPrivate:
    _secret: str


@job("attrs_inner_private")
@dataclass
class AttrsInnerPrivate:
    inner: AttrsPrivateDefault


@job("by_name_and_alias")
class SerializedOtherwise(pydantic.BaseModel):
    n: int = pydantic.Field(default=0, validation_alias="read", serialization_alias="written")


@job("excluded")
class Excluded(pydantic.BaseModel):
    n: int = pydantic.Field(default=0, exclude=True)


@job("not_initialised")
@dataclass
class NotInitialised:
    n: int = 0
    computed: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.computed = self.n * 2


@job("lossy_model")
class LossyBytes(pydantic.BaseModel):
    raw: bytes


SECRET = pydantic.SecretStr("hunter2")


@pytest.mark.parametrize(
    ("payload", "path"),
    [
        (SecretiveModel(password=SECRET), "SecretiveModel.password"),
        (SecretiveDataclass(SECRET), "SecretiveDataclass.password"),
        (
            NestingSecretModel(logins=[Login(password=SECRET)]),
            "NestingSecretModel.logins[0].password",
        ),
        (
            NestingSecretDataclass([Login(password=SECRET)]),
            "NestingSecretDataclass.logins[0].password",
        ),
        (AttrsPrivateDefault(1, "s"), "AttrsPrivateDefault._secret"),
        (AttrsInnerPrivate(AttrsPrivateDefault(1, "s")), "AttrsInnerPrivate.inner._secret"),
        (SerializedOtherwise(read=5), "SerializedOtherwise.n"),
        (Excluded(n=5), "Excluded.n"),
    ],
    ids=lambda each: each if isinstance(each, str) else type(each).__name__,
)
def test_what_the_class_loses_in_silence_is_refused_with_the_path(payload: Any, path: str) -> None:
    assert path_of_refusal(payload) == path


def test_a_required_private_attribute_is_refused() -> None:
    assert path_of_refusal(AttrsPrivate("s")).startswith("AttrsPrivate")


def test_bytes_that_pydantic_cannot_write_as_json_are_refused() -> None:
    assert path_of_refusal(LossyBytes(raw=b"\xff")).startswith("LossyBytes")
    assert read_back(LossyBytes(raw=b"text")) == LossyBytes(raw=b"text")


def test_a_refusal_holds_no_secret() -> None:
    """Errors end up in logs."""
    for payload in (SecretiveModel(password=SECRET), AttrsPrivateDefault(1, "hunter2")):
        with pytest.raises(PayloadError) as caught:
            encode(payload)
        assert "hunter2" not in str(caught.value)


def test_a_tuple_for_a_list_is_refused() -> None:
    """It would come back as a list, which is not equal to it."""
    assert path_of_refusal(Cart(items=(Item(),))) == "Cart.items"  # type: ignore[arg-type]


def test_a_tuple_where_anything_goes_is_refused() -> None:
    """It would come back as a list, and the class cannot tell."""
    assert path_of_refusal(Item(anything=(1, 2))) == "Item.anything"
    path = path_of_refusal(Cart(extra={"k": [{"pair": (1, 2)}]}))
    assert path.startswith("Cart.extra") and path.endswith("['pair']")
    assert read_back(Item(anything=[1, 2])) == Item(anything=[1, 2])


@pytest.mark.parametrize("wrap", [lambda n: Item(anything=n), lambda n: Item(n=n)])
def test_an_int_too_large_to_be_written_is_refused(wrap: Callable[[int], Any]) -> None:
    with pytest.raises(PayloadError, match=r"cannot be stored: .*4300"):
        encode(wrap(10**5000))
    assert read_back(Item(anything=10**400)) == Item(anything=10**400)


def circular_list() -> Any:
    circle: list[Any] = []
    circle.append(circle)
    return circle


def circular_dict() -> Any:
    circle: dict[str, Any] = {}
    circle["again"] = circle
    return circle


def circular_object() -> Any:
    circle = Item()
    circle.anything = circle
    return circle


def very_deep() -> Any:
    deep: list[Any] = []
    for _ in range(20_000):
        deep = [deep]
    return deep


@pytest.mark.parametrize("made", [circular_list, circular_dict, circular_object, very_deep])
def test_what_has_no_end_is_refused_like_anything_else(made: Callable[[], Any]) -> None:
    """And not with a RecursionError, which nobody expects of enqueue()."""
    assert path_of_refusal(Item(anything=made())).startswith("Item")


def test_fields_computed_by_the_class_are_computed_again() -> None:
    assert read_back(NotInitialised(3)) == NotInitialised(3)


def test_a_class_with_unresolvable_annotations_is_refused() -> None:
    cls = job("k")(make_dataclass("Unresolvable", [("n", "NoSuchName")]))
    with pytest.raises(PayloadError, match="NoSuchName"):
        encode(cls(1))


def test_a_class_without_eq_is_not_compared() -> None:
    @job("k")
    @dataclass(eq=False)
    class ByIdentity:
        n: int

    assert encode(ByIdentity(1)) == {"n": 1}


def test_the_class_instead_of_an_instance_is_refused() -> None:
    with pytest.raises(EnqueueError, match=r"the class Frozen, not an instance: write Frozen\("):
        encode(Frozen)  # type: ignore[arg-type]


@pytest.mark.parametrize("thing", [None, 7, "text", {"n": 1}, [1], object()])
def test_what_is_no_payload_is_refused(thing: Any) -> None:
    with pytest.raises(JobsError, match="is not declared"):
        encode(thing)


def test_values_that_are_not_json_leaves_are_not_let_through() -> None:
    """A model may dump anything it likes; it is refused here and not at the user's flush."""

    @job("k")
    class Custom(pydantic.BaseModel):
        n: int

        def model_dump(self, **options: Any) -> dict[str, Any]:
            return {"n": Decimal(1)}

    assert path_of_refusal(Custom(n=1)) == "Custom.n"


def test_a_string_of_a_class_of_its_own_is_a_string() -> None:
    class Html(str):
        pass

    @job("k")
    class Page(pydantic.BaseModel):
        html: str

        def model_dump(self, **options: Any) -> dict[str, Any]:
            return {"html": Html(self.html)}

    assert encode(Page(html="<p>")) == {"html": "<p>"}


# ------------------------------------------------------------------------------ reading rows of any age


@job("current", aliases=["earlier"])
@dataclass
class Current:
    n: int
    added: str = "default"


CURRENT = [
    Current,
    job("c")(attrs.make_class("AttrsCurrent", {"n": attrs.field(type=int), "added": attrs.field(type=str, default="default")})),
    job("c")(msgspec.defstruct("StructCurrent", [("n", int), ("added", str, "default")])),
    job("c")(pydantic.create_model("ModelCurrent", n=(int, ...), added=(str, "default"))),
    job("c")(pydantic.dataclasses.dataclass(make_dataclass("PydanticCurrent", [("n", int), ("added", str, field(default="default"))]))),
]  # fmt: skip


@pytest.fixture(params=CURRENT, ids=lambda cls: cls.__name__)
def current(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_unknown_fields_are_ignored(current: Any) -> None:
    """In a rolling deploy an old worker is given what a new process enqueued."""
    assert decode(current, '{"n": 1, "from_the_future": [1, {}]}', None) == current(n=1)


def test_a_new_field_takes_its_default_in_old_rows(current: Any) -> None:
    assert decode(current, '{"n": 1}', None).added == "default"


@pytest.mark.parametrize(
    ("stored", "path"),
    [
        ({}, ""),
        ({"n": "seven"}, ".n"),
        ({"n": None}, ".n"),
        ([1], ""),
        ("text", ""),
        (None, ""),
    ],
    ids=repr,
)
def test_what_does_not_decode_is_an_invalid_payload(current: Any, stored: Any, path: str) -> None:
    with pytest.raises(InvalidPayload, match=f"^invalid payload: {current.__name__}{path}"):
        decode(current, json.dumps(stored), None)


def test_an_invalid_payload_keeps_its_cause_and_says_what_helps() -> None:
    with pytest.raises(InvalidPayload, match="give new fields a default") as caught:
        decode(Current, "{}", None)
    assert isinstance(caught.value.__cause__, msgspec.ValidationError)


def test_upgrade_converts_what_is_stored_before_it_is_decoded(current: Any) -> None:
    def upgrade(stored: dict[str, Any]) -> dict[str, Any]:
        return {"n": int(stored.pop("number")), **stored}

    assert decode(current, '{"number": "7", "added": "x"}', upgrade) == current(n=7, added="x")


def test_an_upgrade_that_raises_is_an_invalid_payload() -> None:
    def upgrade(stored: dict[str, Any]) -> dict[str, Any]:
        return {"n": stored["number"]}

    with pytest.raises(InvalidPayload, match="number") as caught:
        decode(Current, '{"n": 1}', upgrade)
    assert isinstance(caught.value.__cause__, KeyError)


def test_upgrade_does_not_touch_what_is_enqueued_now() -> None:
    def upgrade(stored: dict[str, Any]) -> dict[str, Any]:
        raise AssertionError("what is enqueued now is of the present form")

    cls = job("k", upgrade=upgrade)(a_dataclass())
    assert encode(cls(1)) == {"n": 1}


def test_aliases_are_earlier_kinds_and_never_written() -> None:
    declared = declaration_of(Current)
    assert (declared.kind, declared.aliases) == ("current", ("earlier",))


def test_the_constructor_of_the_class_has_its_say_when_a_row_is_read() -> None:
    @job("k")
    @dataclass
    class Positive:
        n: int

        def __post_init__(self) -> None:
            if self.n < 0:
                raise ValueError("n must not be negative")

    with pytest.raises(InvalidPayload, match="n must not be negative"):
        decode(Positive, '{"n": -1}', None)


def test_a_named_zone_comes_back_as_the_same_instant() -> None:
    payload = Item(when=datetime(2030, 7, 1, 12, tzinfo=ZoneInfo("Europe/Vienna")))
    restored = read_back(payload)
    assert restored == payload
    assert restored.when.utcoffset() == timedelta(hours=2)


def test_the_same_object_is_not_shared_with_the_row() -> None:
    """Changing the payload after enqueue must not change what is stored."""
    payload = Cart(extra={"list": [1]})
    stored: Mapping[str, Any] = encode(payload)
    payload.extra["list"].append(2)
    assert stored["extra"] == {"list": [1]}
