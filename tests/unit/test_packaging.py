"""What users install: the wheel, in an environment that has nothing else."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.docs.snippets import ROOT, blocks

# Building and installing take longer than a test may, and share a fixture.
pytestmark = pytest.mark.timeout(400)

in_ci = pytest.mark.skipif(
    not os.environ.get("CI"), reason="takes half a minute and a package index; set CI=true"
)


def run(*command: str | Path, cwd: Path) -> str:
    # The caller's PYTHONPATH would make the source importable where only the wheel should be.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    # Without --wheel, so that the wheel is built from the sdist: both are checked.
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment with the wheel and its required dependencies."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", folder, cwd=folder)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", wheel, cwd=folder)
    return python


@in_ci
@pytest.mark.packaging
def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"sqlalchemy_jobs"}
    assert "sqlalchemy_jobs/py.typed" in names
    assert "sqlalchemy_jobs/migrations/v001.py" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


@in_ci
@pytest.mark.packaging
def test_the_command_starts(python: Path, tmp_path: Path) -> None:
    by_module = run(python, "-m", "sqlalchemy_jobs", "--help", cwd=tmp_path)
    by_script = run(python.with_name("sajobs"), "--help", cwd=tmp_path)
    assert "worker" in by_module
    assert "worker" in by_script


@in_ci
@pytest.mark.packaging
def test_it_migrates_far_from_the_repository(python: Path, tmp_path: Path) -> None:
    sajobs = python.with_name("sajobs")
    migrate = (sajobs, "migrate", "--database-url", "sqlite:///jobs.sqlite")
    assert "version 1: made the tables" in run(*migrate, cwd=tmp_path)
    assert "nothing to do" in run(*migrate, cwd=tmp_path)
    assert "migrations.upgrade(op, to=2, start=0)" in run(sajobs, "migration", cwd=tmp_path)


@in_ci
@pytest.mark.packaging
def test_the_first_example_of_the_readme_runs(python: Path, tmp_path: Path) -> None:
    example = blocks((ROOT / "README.md").read_text(), "python")[0]
    (tmp_path / "example.py").write_text(example.code)
    run(python, "example.py", cwd=tmp_path)


def test_importing_the_package_imports_neither_croniter_nor_click(tmp_path: Path) -> None:
    program = "import sys, sqlalchemy_jobs; print({'click', 'croniter'} & set(sys.modules))"
    assert run(sys.executable, "-c", program, cwd=tmp_path) == "set()\n"


@pytest.mark.parametrize("first", ["''", "os.getcwd()"])
def test_in_a_checkout_alembic_is_the_library_and_not_the_folder(first: str) -> None:
    program = f"import os, sys; sys.path.insert(0, {first}); import alembic.command; print(alembic.__file__)"
    imported = Path(run(sys.executable, "-c", program, cwd=ROOT).strip())
    assert not imported.is_relative_to(ROOT / "alembic")
