"""What the workers write down beside the database, so that it stays whatever becomes of a run.

A file for each process, and in it a line for each event: its time, its name, the run, and a word more.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy_jobs import Run

RunKey = tuple[str, int, str]
"""(job, attempt, worker): what names one run."""


@dataclass(frozen=True)
class Entry:
    pid: int
    at: float
    event: str
    run: RunKey
    word: str


class Diary:
    def __init__(self, folder: Path) -> None:
        path = folder / f"diary-{os.getpid()}"
        self._file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def write(self, event: str, run: Run, word: str = "-") -> None:
        claim = run.claim
        line = f"{time.time()} {event} {claim.job_id.hex} {claim.attempt} {claim.worker_id.hex} {word}\n"
        os.write(self._file, line.encode())


def read(folder: Path, pid: int | str = "*") -> Iterator[Entry]:
    for path in folder.glob(f"diary-{pid}"):
        writer = int(path.name.removeprefix("diary-"))
        for line in path.read_text().splitlines():
            words = line.split()
            if len(words) == 6:  # the last line of a killed process may be cut
                run = (words[2], int(words[3]), words[4])
                yield Entry(writer, float(words[0]), words[1], run, words[5])
