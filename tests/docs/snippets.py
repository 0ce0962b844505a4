"""The code blocks of a Markdown page.

    ```python            is executed; the blocks of one page share a namespace, in order
    ```console           `$ sajobs ...` lines must name commands and options that exist

A Python block whose first line is a comment with a path (`# shop/jobs.py`) is written to that
file, under the page's temporary working directory, and imported as a module; its names are then
known to the blocks below it, as they are to a reader. Alembic's `env.py` and what lies in `versions` are only
written: Alembic imports them.

A block that cannot run has a reason above it, with nothing but empty lines between:

    <!-- not run: needs a mail server -->
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_BLOCK = re.compile(
    r"""
    (?:<!--\s*not\ run:\s*(?P<reason>[^\n]+?)\s*-->\s*\n)?  # why the block is not executed
    ^(?P<indent>[ ]*)```(?P<language>\w+)[^\n]*\n           # indented in a list item, say
    (?P<code>.*?)
    ^(?P=indent)```[ ]*$
    """,
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)
_PATH = re.compile(r"# ([\w/]+\.py)\b")


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    line: int  # of its first line of code, from 1
    reason: str | None  # why it is not run

    @property
    def path(self) -> str | None:
        """The file that its first line names."""
        match = _PATH.match(self.code)
        return match[1] if match else None


def blocks(page: str, language: str) -> list[Block]:
    """The blocks of one language in a page's text."""
    return [
        Block(
            language=match["language"],
            code=re.sub(rf"^{match['indent']}", "", match["code"], flags=re.MULTILINE),
            line=page.count("\n", 0, match.start("code")) + 1,
            reason=match["reason"],
        )
        for match in _BLOCK.finditer(page)
        if match["language"] == language
    ]


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
