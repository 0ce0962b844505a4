"""Payload classes: how they are declared.

A payload class is the user's own: a dataclass, an attrs class, a msgspec Struct or a pydantic
model. ``@job`` attaches a declaration to it and returns it unchanged, so type checkers see what was
written. There is no registry here: kinds are checked for uniqueness by each JobApp.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, TypeVar, cast

from sqlalchemy_jobs import backoff as backoffs
from sqlalchemy_jobs.errors import DeclarationError, EnqueueError
from sqlalchemy_jobs.limits import Limit
from sqlalchemy_jobs.outcomes import checked_delay
from sqlalchemy_jobs.states import FINAL
from sqlalchemy_jobs.unique import Unique


class Dataclass(Protocol):
    """Any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


class Attrs(Protocol):
    """Any attrs class."""

    __attrs_attrs__: ClassVar[Any]


class Struct(Protocol):
    """Any msgspec Struct."""

    __struct_fields__: ClassVar[tuple[str, ...]]


class Pydantic(Protocol):
    """Any pydantic model."""

    @classmethod
    def model_validate(cls, obj: Any) -> Any: ...
    def model_dump(self, *, mode: Any = ..., by_alias: bool | None = ...) -> dict[str, Any]: ...


Payload: TypeAlias = Dataclass | Attrs | Struct | Pydantic
PayloadT = TypeVar("PayloadT", bound=Payload)
C = TypeVar("C", bound=type)

OnCrash: TypeAlias = Literal["retry", "fail"]
Stored: TypeAlias = dict[str, Any]
"""A payload as the row holds it: a JSON object."""

KIND_LENGTH = 100
QUEUE_LENGTH = 60
PRIORITIES = range(-32768, 32768)

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]*")
_ATTRIBUTE = "__sajobs__"
_HOW_TO_DECLARE = "put @dataclass between @job(...) and the class, or use attrs, a msgspec Struct or a pydantic model"


@dataclass(frozen=True)
class Declaration:
    """What ``@job`` says about a payload class.

    Frozen into the row by ``enqueue``: kind, queue, priority, max_attempts, unique, and the key of the limit. Read
    from the class when a job is claimed, runs or has ended: all others.
    """

    kind: str
    queue: str
    priority: int
    max_attempts: int
    backoff: backoffs.Backoff
    give_up_on: tuple[type[Exception], ...]
    aliases: tuple[str, ...]
    upgrade: Callable[[Stored], Stored] | None
    unique: Unique | None
    limit: Limit | None
    timeout: timedelta | None
    on_crash: OnCrash
    keep: timedelta | None
    keep_failed: timedelta | None

    @property
    def limit_names(self) -> tuple[str, ...]:
        """The names that its limit has in rows, those of earlier kinds too; the first is that of new ones."""
        if self.limit is None:
            return ()
        return (self.kind, *self.aliases) if self.limit.name is None else (self.limit.name,)


def job(
    kind: str,
    /,
    *,
    queue: str = "default",
    priority: int = 0,
    max_attempts: int = 20,
    unique: Unique | None = None,
    limit: Limit | None = None,
    timeout: timedelta | None = None,
    on_crash: OnCrash = "retry",
    keep: timedelta | None = None,
    keep_failed: timedelta | None = None,
    backoff: backoffs.Backoff = backoffs.quartic,
    give_up_on: Sequence[type[Exception]] = (),
    aliases: Sequence[str] = (),
    upgrade: Callable[[Stored], Stored] | None = None,
) -> Callable[[C], C]:
    """Declare a payload class: what may be enqueued, and how it is treated by default.

    ``kind`` is the stable name that the rows carry for ever; it is no import path, so classes
    may move and be renamed. The class is returned unchanged; a subclass is not declared by it.

    Frozen into each row when it is enqueued: ``queue``; ``priority`` (-32768 to 32767, lower runs
    first); ``max_attempts`` (runs that raise or die before the job fails; 1 is "no retry");
    ``unique`` (which jobs of the class stand for one another: see ``Unique``); the name and the key of
    ``limit`` (how many may run at once or begin in a time: see ``Limit``), whose numbers hold from the next claim on.
    Read from the class when a job runs: ``timeout`` (how long a run may take: then it is interrupted,
    which counts as a failure), ``on_crash`` (``"fail"``: a job whose worker died in it is failed and not
    run again), ``backoff`` (a policy of the module ``backoff``), ``give_up_on`` (exceptions that
    fail the job at once), ``aliases`` (earlier kinds of this class, still in rows), ``upgrade``
    (stored object of any age -> one that the class decodes).
    Read from the class when a job has ended: ``keep`` and ``keep_failed`` (for how long the row of a job
    that succeeded or was cancelled, or that failed, is kept at least; None: what the worker's settings
    say; ``keep=timedelta(0)``: deleted in the transaction that completes it).

    Raises: DeclarationError.
    """
    if not isinstance(kind, str):
        raise DeclarationError(
            f'@job was given {kind!r}, not a kind: write @job("a_stable_name") above the class'
        )
    if isinstance(aliases, str):
        raise DeclarationError(f"aliases={aliases!r} is one string: write aliases=[{aliases!r}]")
    for each in (kind, *aliases):
        check_kind(each, DeclarationError)
    check_options(queue=queue, priority=priority, max_attempts=max_attempts, error=DeclarationError)
    for given_up in give_up_on:
        if not (isinstance(given_up, type) and issubclass(given_up, BaseException)):
            raise DeclarationError(f"give_up_on has {given_up!r} in it: wanted exception classes")
    if unique is not None and not isinstance(unique, Unique):
        raise DeclarationError(f"unique={unique!r}: wanted a Unique, for example unique=Unique()")
    if limit is not None and not isinstance(limit, Limit):
        raise DeclarationError(
            f"limit={limit!r}: wanted a Limit, for example limit=Limit(concurrency=3)"
        )
    if limit is not None and limit.name is not None:
        _check_name(limit.name, "limit", KIND_LENGTH, DeclarationError)
    if on_crash not in ("retry", "fail"):
        raise DeclarationError(f'on_crash={on_crash!r}: wanted "retry" or "fail"')
    _check_durations(timeout=timeout, keep=keep, keep_failed=keep_failed)
    if timeout == timedelta(0):
        raise DeclarationError("timeout=timedelta(0): no handler could run; None is no timeout")
    if keep == timedelta(0) and unique and any(map(unique.holds_in, FINAL)):
        raise DeclarationError(
            "keep=timedelta(0) and a Unique with a period or a final state: the deleted row would no longer "
            "keep others out; leave keep away"
        )
    if not callable(getattr(backoff, "policy", backoff)):
        raise DeclarationError(
            f"backoff={backoff!r}: wanted a function of the number of failures, or backoff.ByError(function)"
        )
    declaration = Declaration(
        kind, queue, priority, max_attempts, backoff, tuple(give_up_on), tuple(aliases), upgrade,
        unique, limit, timeout, on_crash, keep, keep_failed,
    )  # fmt: skip

    def declare(cls: C) -> C:
        if not isinstance(cls, type):
            raise DeclarationError(f'@job("{kind}") declares a class, not {cls!r}')
        if family_of(cls) is None:
            raise DeclarationError(
                f'@job("{kind}") class {cls.__name__} has no fields: {_HOW_TO_DECLARE}'
            )
        if getattr(getattr(cls, "__struct_config__", None), "array_like", False):
            raise DeclarationError(
                f"{cls.__name__} is array_like: its fields would be stored without their names and could "
                "never change; remove array_like=True"
            )
        known = fields_of(cls)
        for option, named in (("unique", unique), ("limit", limit)):
            for field in named.fields if named else ():
                if field not in known:
                    raise DeclarationError(
                        f"{option}: {cls.__name__} has no field {field!r}: it has {', '.join(known)}"
                    )
        setattr(cls, _ATTRIBUTE, declaration)
        return cls

    return declare


def declaration_of(cls: type) -> Declaration:
    """Return what ``@job`` said about this very class (not about a parent).

    Raises: DeclarationError.
    """
    found = cls.__dict__.get(_ATTRIBUTE)
    if found is None:
        parent = next((base for base in cls.__mro__[1:] if _ATTRIBUTE in base.__dict__), None)
        found_instead = (
            f"it only inherits from {parent.__name__}, which is"
            if parent
            else "no @job is above it"
        )
        raise DeclarationError(
            f'{cls.__name__} is not declared ({found_instead}): put @job("a_stable_kind") above the class'
        )
    return cast(Declaration, found)


def check_options(
    *,
    queue: str | None = None,
    priority: int | None = None,
    max_attempts: int | None = None,
    error: type[Exception] = EnqueueError,
) -> None:
    """Refuse a queue, priority or max_attempts that the columns could not hold."""
    if queue is not None:
        check_queue(queue, error)
    if priority is not None and not is_whole(priority, PRIORITIES):
        raise error(
            f"priority={priority!r}: wanted a whole number from {PRIORITIES.start} to "
            f"{PRIORITIES.stop - 1} (lower runs first)"
        )
    if max_attempts is not None and not is_whole(max_attempts, range(1, 32768)):
        raise error(
            f"max_attempts={max_attempts!r}: wanted a whole number from 1 (no retry) to 32767"
        )


def check_queue(queue: object, error: type[Exception]) -> None:
    """Refuse what is no name of a queue."""
    _check_name(queue, "queue", QUEUE_LENGTH, error)


def check_kind(kind: object, error: type[Exception]) -> None:
    """Refuse what is no name of a kind."""
    _check_name(kind, "kind", KIND_LENGTH, error)


def _check_durations(**options: timedelta | None) -> None:
    for name, value in options.items():
        try:
            if value is not None:
                checked_delay(value, name)
        except (TypeError, ValueError) as error:
            raise DeclarationError(str(error)) from None


def is_whole(value: object, within: range) -> bool:
    """Tell whether it is a number (True is none) of a range."""
    return isinstance(value, int) and not isinstance(value, bool) and value in within


def _check_name(value: object, what: str, longest: int, error: type[Exception]) -> None:
    if not isinstance(value, str) or not _NAME.fullmatch(value) or len(value) > longest:
        raise error(
            f"{what} {value!r}: wanted 1 to {longest} letters, digits or one of _ . : - (not first: . : -)"
        )


def family_of(cls: type) -> str | None:
    """Tell which library made a payload class; None: it has no fields."""
    if hasattr(cls, "__pydantic_validator__"):
        return "pydantic" if hasattr(cls, "model_validate") else "pydantic dataclass"
    if (
        hasattr(cls, "__dataclass_fields__")
        or hasattr(cls, "__struct_fields__")
        or hasattr(cls, "__attrs_attrs__")
    ):
        return "msgspec"
    return None


def fields_of(cls: type) -> Sequence[str]:
    """Return the names of a payload class's fields, as Python code has them; of another class: none."""
    if hasattr(cls, "__struct_fields__"):
        return cast(Sequence[str], cls.__struct_fields__)
    if hasattr(cls, "__attrs_attrs__"):
        return [field.name for field in cls.__attrs_attrs__]
    if dataclasses.is_dataclass(cls):
        return [field.name for field in dataclasses.fields(cls)]
    return list(getattr(cls, "model_fields", ()))
