"""Everything that README.md and docs/ show is executed, or says why it is not: see snippets.py."""

import importlib
import linecache
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import click
import pytest

from tests.docs.snippets import ROOT, Block, blocks, pages

PAGES = [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages()]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory; the modules imported from it are forgotten at the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        # Packages without __init__.py have a __path__ but no __file__.
        module = sys.modules[name]
        places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
        if any(place and Path(place).is_relative_to(tmp_path) for place in places):
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES)
def test_python(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A module in sys.modules: dataclasses and SQLAlchemy look up annotations there.
    module = ModuleType("docs_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in blocks(page.read_text(), "python"):
        if block.reason is None:
            _run(block, page, folder, module)


def _run(block: Block, page: Path, folder: Path, module: ModuleType) -> None:
    if block.path is not None:
        file = folder / block.path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(block.code)
        if file.name == "env.py" or file.parent.name == "versions":
            return
        importlib.invalidate_caches()
        name = block.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        vars(module).update(_names(importlib.import_module(name)))
        return
    # Empty lines before it, so that a traceback names the page's own line and shows it.
    source = "\n" * (block.line - 1) + block.code
    linecache.cache[str(page)] = (len(source), None, source.splitlines(keepends=True), str(page))
    exec(compile(source, str(page), "exec"), vars(module))


def _names(module: ModuleType) -> dict[str, object]:
    return {name: value for name, value in vars(module).items() if not name.startswith("__")}


@pytest.mark.parametrize("page", PAGES)
def test_console(page: Path) -> None:
    for block in blocks(page.read_text(), "console"):
        if block.reason is None:
            for words in _commands(block.code):
                _check(words)


def _commands(code: str) -> Iterator[list[str]]:
    """The arguments of each `$ sajobs ...` in a console block."""
    for line in code.replace("\\\n", " ").splitlines():
        if not line.startswith("$ "):
            continue
        words = shlex.split(line[2:], comments=True)
        while words and "=" in words[0]:  # NAME=value before the command
            del words[0]
        if words[:3] == ["python", "-m", "sqlalchemy_jobs"]:
            words[:3] = ["sajobs"]
        if words[:1] == ["sajobs"]:
            ends = [i for i, word in enumerate(words) if word in {"|", ">", ">>", "&", "&&", ";"}]
            yield words[1 : ends[0] if ends else None]


def _check(words: list[str]) -> None:
    """Fail where `sajobs` has no such command or option; values are not looked at."""
    from sqlalchemy_jobs.cli import main

    command: click.Command = main
    for word in words:
        context = click.Context(command, **command.context_settings)
        if word.startswith("-"):
            options = [name for p in command.get_params(context) for name in _spellings(p)]
            option = word.split("=")[0]
            assert option in options, f"`{command.name}` has no {option}: sajobs {' '.join(words)}"
        elif isinstance(command, click.Group):
            command = command.get_command(context, word) or command
    needs_command = isinstance(command, click.Group) and not command.invoke_without_command
    assert not needs_command or {"--help", "--version"} & set(words), (
        f"no such command: sajobs {' '.join(words)}"
    )


def _spellings(parameter: click.Parameter) -> list[str]:
    return [*parameter.opts, *parameter.secondary_opts]
