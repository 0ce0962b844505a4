"""How a list is printed."""

from __future__ import annotations

from collections.abc import Sequence


def in_columns(rows: Sequence[Sequence[object]]) -> str:
    """Return rows of words, the first the heading, one below the other; None is a dash."""
    words = [["-" if each is None else str(each) for each in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*words, strict=True)]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()
        for row in words
    )
