"""What the type checkers of users find in their code: every mistake of `wrong.py`, nothing in `ok.py`."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ROOT / "tests" / "typing"

pytestmark = pytest.mark.skipif(
    not (importlib.util.find_spec("mypy") and importlib.util.find_spec("pyright")),
    reason="the checkers are not installed here (dependency group lint)",
)

Errors = dict[str, dict[int, str]]
"""By the file's name and the line, the first message."""


def run(*command: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode in (0, 1), f"{done.stdout}\n{done.stderr}"
    return done.stdout


def by_mypy() -> Errors:
    # A file named on the command line is checked although pyproject.toml excludes it.
    found: Errors = {}
    for line in run("mypy", "--no-pretty", FILES / "ok.py", FILES / "wrong.py").splitlines():
        if match := re.match(r"(?:.*/)?(\w+\.py):(\d+): error: (.*)", line):
            found.setdefault(match[1], {}).setdefault(int(match[2]), match[3])
    return found


def by_pyright(folder: Path) -> Errors:
    # pyproject.toml excludes wrong.py from the command line too: check copies, with its settings.
    for name in ("ok.py", "wrong.py"):
        shutil.copy(FILES / name, folder)
    settings = {"extends": str(ROOT / "pyproject.toml"), "include": ["."], "exclude": []}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    report = json.loads(
        run("pyright", "--project", folder, "--pythonpath", sys.executable, "--outputjson")
    )
    assert report["summary"]["filesAnalyzed"] == 2
    found: Errors = {}
    for each in report["generalDiagnostics"]:
        if each["severity"] == "error":
            line = each["range"]["start"]["line"] + 1
            found.setdefault(Path(each["file"]).name, {}).setdefault(line, each["message"])
    return found


@pytest.fixture(scope="module", params=["mypy", "pyright"])
def errors(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Errors:
    if request.param == "mypy":
        return by_mypy()
    return by_pyright(tmp_path_factory.mktemp("pyright"))


def marked() -> set[int]:
    lines = (FILES / "wrong.py").read_text().splitlines()
    return {number for number, line in enumerate(lines, 1) if "# error: " in line}


def test_correct_use_has_no_errors(errors: Errors) -> None:
    assert errors.get("ok.py", {}) == {}


def test_each_marked_mistake_is_an_error_and_no_other_line(errors: Errors) -> None:
    found = errors["wrong.py"]
    missed = sorted(marked() - set(found))
    unmarked = {line: found[line] for line in sorted(set(found) - marked())}
    assert (missed, unmarked) == ([], {})


def test_only_the_files_with_mistakes_have_errors(errors: Errors) -> None:
    """An error inside the library would hide behind those of its users."""
    assert set(errors) == {"wrong.py"}
