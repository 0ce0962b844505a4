"""How a list is printed."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

Row = Sequence[object]


def laid_out(rows: Sequence[Row]) -> str:
    """Return rows as ``in_columns``; on a terminal that is too narrow for these, each as a paragraph of its own."""
    table = in_columns(rows)
    width = max(map(len, table.splitlines()))
    if not sys.stdout.isatty() or width <= shutil.get_terminal_size().columns:
        return table
    heading, *others = rows
    return "\n\n".join(in_columns([*zip(heading, row, strict=True)]) for row in others)


def in_columns(rows: Sequence[Row]) -> str:
    """Return rows of words, the first the heading, one below the other; None is a dash."""
    words = [["-" if each is None else str(each) for each in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*words, strict=True)]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()
        for row in words
    )
