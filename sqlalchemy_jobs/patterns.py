"""Patterns that name queues: ``mail``, ``mail.*``, ``*``; with ``!`` before it one excludes what it fits.

The most specific pattern that fits a queue decides: its name, then the longest beginning. So the order in which
they are given does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import ColumnElement, case, func, literal_column, true

EVERY = "*"
NOT = "!"


def most_specific(patterns: Iterable[str], queue: str) -> str | None:
    """Return the pattern that decides about a queue; None: none fits it."""
    fitting = (each for each in patterns if _fits(each.removeprefix(NOT), queue))
    return max(fitting, key=_specificity, default=None)


def serves(patterns: Iterable[str] | None, queue: str) -> bool:
    """Tell whether a worker serves a queue, by what its row says; None: it serves all."""
    return patterns is None or is_served(most_specific(patterns, queue))


def is_served(pattern: str | None) -> bool:
    """Tell whether the queues about which a pattern decides are served."""
    return pattern is not None and not pattern.startswith(NOT)


def is_name(pattern: str) -> bool:
    """Tell whether it is the name of one queue that is served."""
    return is_served(pattern) and not pattern.endswith(EVERY)


def fitting(patterns: Iterable[str], column: ColumnElement[str]) -> ColumnElement[bool]:
    """Return the condition that the queue in a column is served."""
    served: ColumnElement[Any] = literal_column("1")
    excluded: ColumnElement[Any] = literal_column("0")
    decisions: list[tuple[Any, Any]] = [
        (_condition(each.removeprefix(NOT), column), served if is_served(each) else excluded)
        for each in sorted(patterns, key=_specificity, reverse=True)
    ]
    return case(*decisions, else_=excluded) == served


def _fits(pattern: str, queue: str) -> bool:
    if pattern.endswith(EVERY):
        return queue.startswith(pattern.removesuffix(EVERY))
    return queue == pattern


def _condition(pattern: str, column: ColumnElement[str]) -> ColumnElement[bool]:
    if pattern == EVERY:
        return true()
    if pattern.endswith(EVERY):  # not LIKE: SQLite's does not tell "a" from "A"
        beginning = pattern.removesuffix(EVERY)
        return func.substr(column, 1, len(beginning)) == beginning
    return column == pattern


def _specificity(pattern: str) -> tuple[bool, int]:
    return not pattern.endswith(EVERY), len(pattern.removeprefix(NOT))
