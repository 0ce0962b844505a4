"""Payloads to JSON and back: what a row holds, and what of it survives.

``encode`` decodes what it encoded and compares: what cannot be stored, or would be read back changed, fails in the
caller's stack and not at his flush, and not days later in a worker.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import Any, cast

import msgspec

from sqlalchemy_jobs.errors import EnqueueError, InvalidPayload, PayloadError
from sqlalchemy_jobs.payloads import (
    Payload,
    PayloadT,
    Pydantic,
    Stored,
    declaration_of,
    family_of,
    fields_of,
)


def encode(payload: Payload) -> Stored:
    """Return the JSON object that a row will hold; it is certain to decode to an equal payload.

    Raises: DeclarationError, PayloadError (with the path of the field).
    """
    cls = type(payload)
    if issubclass(cls, type):
        name = cast(type, payload).__name__
        raise EnqueueError(
            f"enqueue was given the class {name}, not an instance: write {name}(...)"
        )
    declaration_of(cls)
    try:
        stored = _to_stored(payload)
    except Exception as error:
        path = _bounded_path(payload, cls.__name__)
        raise PayloadError(f"{path} cannot be stored: {error}", path=path) from error
    text = _checked_json(stored, cls.__name__)
    try:
        restored = _from_json(cls, text)
    except Exception as error:
        path = _path_in(error, cls.__name__)
        raise PayloadError(f"{path} could not be read back: {error}", path=path) from error
    if cls.__eq__ is not object.__eq__ and restored != payload:
        path = _first_difference(payload, restored, cls.__name__)
        raise PayloadError(
            f"{path} does not survive being stored: it would be read back changed", path=path
        )
    return stored


def decode(cls: type[PayloadT], text: str, upgrade: Callable[[Stored], Stored] | None) -> PayloadT:
    """Return the payload whose JSON a row holds. Unknown fields are ignored, for rolling deploys.

    Raises: InvalidPayload.
    """
    try:
        if upgrade:
            return _from_stored(cls, upgrade(msgspec.json.decode(text)))
        return _from_json(cls, text)
    except Exception as error:
        raise InvalidPayload(
            f"invalid payload: {_path_in(error, cls.__name__)}: {error}. The stored object does not "
            f"fit {cls.__name__}: give new fields a default, or @job(..., upgrade=...) to convert it"
        ) from error


def to_json(value: object) -> Any:
    """Return a value as JSON builtins, refusing what no database stores (NaN, NUL, surrogates).

    Raises: PayloadError, TypeError, and what the value's own methods raise.
    """
    built = msgspec.to_builtins(value, str_keys=True, enc_hook=_encode_other)
    _checked_json(built, type(value).__name__)
    return built


def digest(cls: type[PayloadT], stored: Stored, fields: Sequence[str]) -> str:
    """Return the same 64 characters for payloads with the same values in these fields (none: in all).

    Of what would be read back, not of what was stored: there 1 and 1.0 may stand for the same number.
    """
    values = _values_of(cls, stored, fields)
    return hashlib.sha256(_dump_in_short(values).encode()).hexdigest()


def key_of(cls: type[PayloadT], stored: Stored, fields: Sequence[str]) -> str | None:
    """Return the same text for payloads with the same values in these fields, and None where all of them are None.

    A string stands for itself, everything else for its JSON; several make a list.
    """
    found = _values_of(cls, stored, fields)
    is_named = isinstance(found, dict) and found.keys() == set(fields)
    values = [found[name] for name in fields] if is_named else [found]
    if all(value is None for value in values):
        return None
    value = values[0] if len(values) == 1 else values
    return value if isinstance(value, str) else _dump_in_short(value)


def _values_of(cls: type[PayloadT], stored: Stored, fields: Sequence[str]) -> Any:
    """Return the values of these fields (none: of all) in JSON that is the same for equal ones."""
    payload: Any = _from_stored(cls, stored)
    if family_of(cls) == "msgspec":
        values = _in_order({name: getattr(payload, name) for name in fields or fields_of(cls)})
    else:
        values = _dump_in_order(payload)
        # What is dumped under other names (a RootModel) counts as a whole: rather too many jobs than too few.
        if fields and isinstance(values, dict) and values.keys() >= set(fields):
            values = {name: values[name] for name in fields}
    return values


def _in_order(value: object) -> Any:
    """Encode so that equal sets give equal lists, in every process."""
    return msgspec.to_builtins(value, str_keys=True, order="deterministic", enc_hook=_dump_in_order)


def _dump_in_order(value: Any) -> Any:
    """Do so with what pydantic made."""
    if family_of(type(value)) == "pydantic":
        dump = value.model_dump
    else:
        dump = partial(_adapter(type(value)).dump_python, value)
    return _sorted_sets(dump(by_alias=False), dump(mode="json", by_alias=False))


def _sorted_sets(value: object, stored: Any) -> Any:
    """Return what is stored for a value, with the sets in it sorted."""
    match value, stored:
        case ((set() | frozenset()), list()):
            return sorted(stored, key=_dumps)
        case Mapping(), dict():
            pairs = zip(stored.items(), value.values(), strict=False)
            return {name: _sorted_sets(part, item) for (name, item), part in pairs}
        case ((list() | tuple()), list()):
            return [_sorted_sets(*pair) for pair in zip(value, stored, strict=False)]
    return stored


def _to_stored(payload: Any) -> Stored:
    match family_of(type(payload)):
        case "pydantic":
            return cast(Stored, payload.model_dump(mode="json", by_alias=True))
        case "pydantic dataclass":
            return cast(
                Stored, _adapter(type(payload)).dump_python(payload, mode="json", by_alias=True)
            )
    return cast(Stored, msgspec.to_builtins(payload, str_keys=True, enc_hook=_encode_other))


def _from_stored(cls: type[PayloadT], stored: Any) -> PayloadT:
    match family_of(cls):
        case "pydantic":
            return cast(PayloadT, cast(type[Pydantic], cls).model_validate(stored))
        case "pydantic dataclass":
            return cast(PayloadT, _adapter(cls).validate_python(stored))
    return msgspec.convert(stored, cls, strict=True, str_keys=True, dec_hook=_decode_other)


def _from_json(cls: type[PayloadT], text: str | bytes) -> PayloadT:
    decoder = _decoder(cast(type, cls))
    if decoder is None:
        return _from_stored(cls, msgspec.json.decode(text))
    return cast(PayloadT, decoder.decode(text))


@cache
def _decoder(cls: type) -> msgspec.json.Decoder[Any] | None:
    """Return what reads a class from JSON in one step; None for those of pydantic. Making one takes longer than using it."""
    if family_of(cls) != "msgspec":
        return None
    return msgspec.json.Decoder(cls, strict=True, dec_hook=_decode_other)


def _adapter(cls: type) -> Any:
    import pydantic  # only for classes that pydantic itself made

    return pydantic.TypeAdapter(cls)


def _encode_other(value: Any) -> Any:
    """Encode a pydantic model that is a field of something else."""
    if family_of(type(value)) == "pydantic":
        return value.model_dump(mode="json", by_alias=True)
    raise NotImplementedError(f"objects of type {type(value).__name__} are not supported")


def _decode_other(cls: type, value: Any) -> Any:
    if family_of(cls) == "pydantic":
        return cast(type[Pydantic], cls).model_validate(value)
    raise NotImplementedError(f"fields of type {cls.__name__} are not supported")


# --- what no database stores, and where it stands ----------------------------------------------

_dumps = json.JSONEncoder(allow_nan=False, ensure_ascii=False).encode
_dump_in_short = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


def _checked_json(stored: object, root: str) -> str | bytes:
    """Return the JSON text. Raises: PayloadError, with the path of what no database stores."""
    with suppress(Exception):  # the slower way takes more, and tells what is wrong
        quick = msgspec.json.encode(stored)
        # What is not finite would be read back as None, and most of what is not JSON as a string.
        if b"\\u0000" not in quick and msgspec.json.decode(quick) == stored:
            return quick
    try:
        text = _dumps(stored)
        text.encode()
        if "\\u0000" not in text:
            return text
        reason = ""
    except (ValueError, TypeError, RecursionError) as error:
        text, reason = "", str(error) or type(error).__name__
    with suppress(RecursionError):
        for path, value in _leaves(stored, root):
            problem = _unstorable(value)
            if problem:
                raise PayloadError(f"{path} cannot be stored: {problem}", path=path)
    if not text:
        raise PayloadError(f"{root} cannot be stored: {reason}", path=root)
    return text


def _leaves(value: object, path: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield f"{path}, key {key!r}", key
            yield from _leaves(item, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")
    else:
        yield path, value


def _unstorable(value: object) -> str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is not a JSON number"
    if isinstance(value, str):
        if "\0" in value:
            return "it contains a NUL character, which PostgreSQL does not store"
        try:
            value.encode()
        except UnicodeEncodeError:
            return f"{value!r} contains a lone surrogate, which is not valid Unicode"
    elif value is not None and not isinstance(value, (bool, int, float)):
        return f"a {type(value).__name__} is not JSON"
    return None


def _cannot_encode(value: object) -> bool:
    try:
        _to_stored(value)
    except Exception:
        return True
    return False


def _bounded_path(payload: object, root: str) -> str:
    try:
        return _path(payload, root, _cannot_encode)
    except RecursionError:  # it contains itself
        return root


def _path(value: object, path: str, bad: Callable[[object], bool]) -> str:
    """Follow the first part that is bad on its own, down to the innermost one."""
    for name, part in _parts(value):
        if bad(part):
            return _path(part, path + name, bad)
    return path


def _parts(value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from ((f"[{index}]", item) for index, item in enumerate(value))
    else:
        yield from ((f".{name}", getattr(value, name, None)) for name in fields_of(type(value)))


def _first_difference(before: object, after: object, path: str) -> str:
    if type(before) is type(after) or not fields_of(type(before)):
        parts = dict(_parts(after))
        for name, part in _parts(before):
            if name in parts and part != parts[name]:
                return _first_difference(part, parts[name], path + name)
    return path


def _path_in(error: Exception, root: str) -> str:
    """Take the path out of a decoder's message: msgspec writes ``... - at `$.lines[0].n```."""
    if locations := getattr(error, "errors", None):  # pydantic
        try:
            return ".".join([root, *(str(part) for part in locations()[0]["loc"])])
        except (TypeError, LookupError):
            return root
    found = re.search(r"at `\$([^`]*)`", str(error))
    return root + (found.group(1) if found else "")
