"""The example of schedules does what its page says."""

from pathlib import Path

from tests.processes import ROOT, python


def test_a_customers_schedule_ticks_and_is_changed_beside_that_of_the_code(tmp_path: Path) -> None:
    printed = python(str(ROOT / "examples/schedules/tenants.py"), str(tmp_path), cwd=ROOT,
                     env={"PYTHONPATH": str(ROOT)})  # fmt: skip
    before, after = printed.split("changed\n")
    assert "cleanup: what is older than" in before and "tenant-17: the report of Ada's" in before
    assert "cleanup: what is older than" in after
    assert "the next report: 20" in after
