"""The benchmarks run; what they measure is not looked at."""

import importlib
from pathlib import Path

import pytest

from benchmarks import common
from benchmarks.__main__ import PROGRAMS
from tests.databases import Database
from tests.processes import ROOT, python

QUICK = ("--quick", "--rounds", "1")


@pytest.mark.parametrize(
    "program",
    [("limit",), ("bulk",), ("backlog", "--only", "scheduled")],
    ids=lambda program: program[0],
)
def test_a_benchmark_on_postgresql(program: tuple[str, ...], postgresql: Database) -> None:
    name, *options = program
    url = postgresql.url.render_as_string(hide_password=False)
    printed = python("-m", f"benchmarks.{name}", *QUICK, "--url", url, *options, cwd=ROOT, env={})
    assert f"## {name}: " in printed and "| ratio |" in printed


def test_a_benchmark_on_sqlite() -> None:
    printed = python("-m", "benchmarks.servers", *QUICK, "--only", "sqlite", cwd=ROOT, env={})
    assert "## servers: drain 300 no-op jobs on sqlite" in printed


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_benchmark_can_be_imported(program: str) -> None:
    assert importlib.import_module(f"benchmarks.{program}").answer


def test_every_program_is_run_by_make_bench() -> None:
    programs = {each.stem for each in Path(common.__file__).parent.glob("*.py")}
    assert programs - {"__main__", "app", "common", "recovery"} == set(PROGRAMS)


def test_a_result_takes_the_place_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path / "RESULTS.md")
    for title, ours in (("a", 2.0), ("b", 3.0), ("a", 4.0)):
        table = common.Results(title, "About.", "A machine.")
        table.compare("what", [ours] * 2, [2.0, 1.0], "/s", wanted=1)
        common.write(table)
    written = common.RESULTS.read_text()
    assert written.count("\n## a\n") == written.count("\n## b\n") == 1
    assert written.index("## a") < written.index("## b")
    assert "| what | 4 /s | 1.5 /s | **3.00** | 2.00..4.00 | 1 |" in written
