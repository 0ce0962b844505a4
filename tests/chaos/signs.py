"""Signs that processes give one another beside the database: files in one folder."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy_jobs import Run

CALM = "calm"
"""Is there once nobody is to do harm any more."""


def called_off(folder: Path, job_id: uuid.UUID) -> Path:
    """Return what is there while a running job is about to be cancelled, and from then on."""
    return folder / f"called-off-{job_id.hex}"


@contextmanager
def presence(folder: Path, name: str, run: Run) -> Iterator[None]:
    """Be seen by ``present`` meanwhile."""
    sign = folder / f"present-{name}-{os.getpid()}-{run.job_id.hex}-{run.attempt}"
    sign.touch()
    try:
        yield
    finally:
        sign.unlink()


def present(folder: Path, name: str) -> list[tuple[int, str]]:
    """Return the processes and jobs that are in a round; also those of processes that were killed."""
    signs = [each.name.split("-") for each in folder.glob(f"present-{name}-*")]
    return [(int(pid), job_id) for _, _, pid, job_id, _ in signs]


def open_(folder: Path, name: str) -> None:
    (folder / f"open-{name}").touch()


def is_open(folder: Path, name: str) -> bool:
    return (folder / f"open-{name}").exists()
