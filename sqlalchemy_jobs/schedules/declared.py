"""The schedules that code declares, by ``JobApp.schedule``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast, get_type_hints

from sqlalchemy_jobs.codec import encode
from sqlalchemy_jobs.errors import ScheduleError
from sqlalchemy_jobs.payloads import Payload, declaration_of, family_of


@dataclass(frozen=True)
class Declared:
    """A schedule as the code has it."""

    columns: dict[str, Any]
    """What its row says, by attribute; the payload is None where a function makes it."""
    source: Payload | Callable[[datetime], Payload]

    @property
    def name(self) -> str:
        return cast(str, self.columns["name"])

    @property
    def kind(self) -> str:
        return cast(str, self.columns["kind"])

    def payload(self, tick: datetime) -> Payload:
        """Return what the job of a tick carries; raises what the application's function does."""
        if not callable(self.source):
            return self.source
        made = self.source(tick)
        if (kind := declaration_of(type(made)).kind) != self.kind:
            raise ScheduleError(
                f'its function returned a payload of kind "{kind}", not "{self.kind}"'
            )
        encode(made)  # before any job of these ticks is made
        return made


def declare(
    definition: dict[str, Any], payload: Payload | Callable[[datetime], Payload]
) -> Declared:
    """Join a schedule's definition with its payload, or the function that makes one for each tick.

    Raises: ScheduleError, PayloadError, DeclarationError.
    """
    if family_of(type(payload)) is not None:
        cls, stored = type(payload), encode(cast(Payload, payload))
    elif callable(payload) and not isinstance(payload, type):
        cls, stored = _returned(definition["name"], payload), None
    else:
        given = f"the class {payload.__name__}" if isinstance(payload, type) else repr(payload)
        raise ScheduleError(
            f'schedule "{definition["name"]}" was given {given}: wanted a payload, or a function of the tick that '
            "returns one"
        )
    columns = {**definition, "kind": declaration_of(cls).kind, "payload": stored}
    return Declared(columns, payload)


def _returned(name: str, function: Callable[..., Any]) -> type[Any]:
    what = f'schedule "{name}": {getattr(function, "__qualname__", function)}'
    if inspect.iscoroutinefunction(function):
        raise ScheduleError(
            f"{what} is async: wanted a plain def, called by the worker at each tick"
        )
    try:
        inspect.signature(function).bind(object())
    except TypeError as error:
        raise ScheduleError(
            f"{what} cannot be called with a tick: {error}. Write def make(tick: datetime) -> YourPayload"
        ) from None
    try:
        returned = get_type_hints(function).get("return")
    except Exception as error:
        raise ScheduleError(f"{what}: its annotations cannot be read: {error}") from error
    if not isinstance(returned, type) or family_of(returned) is None:
        raise ScheduleError(
            f"{what} does not say what it returns: annotate it, def make(tick: datetime) -> YourPayload"
        )
    return returned
