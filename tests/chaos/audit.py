"""What must be true when everything has settled."""

from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from sqlalchemy_jobs import Attempt, Job, JobState
from tests.chaos.app import SNOOZES, Effect, Intent
from tests.chaos.faults import Process
from tests.chaos.load import Transaction

FINAL = {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}
ENDS = {
    "doomed": ({JobState.FAILED, JobState.CANCELLED}, 0),
    "resigned": ({JobState.CANCELLED}, 1),
    "overdue": ({JobState.FAILED}, 0),
    "overdue_async": ({JobState.FAILED}, 0),
    "nothing": ({JobState.SUCCEEDED}, 0),
}
"""By kind: how a job ends, and how many last effects it leaves; else succeeded and one."""


@dataclass(frozen=True)
class Start:
    """A run that began, as the workers' logs have it."""

    pid: int
    at: float
    job_id: str
    attempt: int
    worker_id: str


class Books:
    """The rows and the logs as they are in the end."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        with Session(engine) as session:
            self.jobs = {each.id.hex: each for each in session.scalars(select(Job))}
            self.attempts = list(session.scalars(select(Attempt)))
            self.effects = list(session.scalars(select(Effect)))
            self.intents = set(session.scalars(select(Intent.id)))
            session.expunge_all()
        self.starts = sorted(_starts(folder), key=lambda start: start.at)


def _starts(folder: Path) -> Iterator[Start]:
    for path in folder.glob("runs-*"):
        for line in path.read_text().splitlines():
            words = line.split()
            if len(words) == 4:  # the last line of a killed process may be cut
                pid = int(path.name.removeprefix("runs-"))
                yield Start(pid, float(words[0]), words[1], int(words[2]), words[3])


def violations(books: Books, transactions: list[Transaction], died: Iterable[Process]) -> list[str]:
    called_off = {
        job_id.hex for each in transactions if each.id in books.intents for job_id in each.cancelled
    }
    return [
        *_transactions(books, transactions),
        *_ends(books, called_off),
        *_uniqueness(books),
        *_runs(books),
        *(f"a worker ended by itself, status {each.popen.returncode}: {each.log}" for each in died),
    ]


def _transactions(books: Books, transactions: Iterable[Transaction]) -> Iterator[str]:
    for each in transactions:
        there = [job_id.hex for job_id in each.jobs if job_id.hex in books.jobs]
        committed = each.id in books.intents
        if committed != (each.fate == "committed") and each.fate != "unknown":
            yield f"transaction {each.id} was {each.fate}, and its row is {'there' if committed else 'not there'}"
        if len(there) != (len(each.jobs) if committed else 0):
            yield (
                f"transaction {each.id} ({each.fate}, committed: {committed}) had {len(each.jobs)} jobs, {len(there)} are there"
            )

        for job_id in each.others if committed else ():
            if job_id.hex not in books.jobs:
                yield f"transaction {each.id} was told that {job_id} stands in, which is no job"


def _ends(books: Books, called_off: Container[str]) -> Iterator[str]:
    last = Counter(each.job_id for each in books.effects if each.last)
    earlier = Counter(each.job_id for each in books.effects if not each.last)
    for job_id, job in books.jobs.items():
        states, effects = ENDS.get(job.kind, ({JobState.SUCCEEDED}, 1))
        if job_id in called_off and job.kind != "doomed":  # that one may have been put back
            states, effects = {JobState.CANCELLED}, 0
        if job.state not in FINAL:
            yield f"{job.kind} {job_id} is {job.state}: stuck"
        elif job.state not in states:
            yield f"{job.kind} {job_id} ended as {job.state}"
        if last[job_id] != effects:
            yield f"{job.kind} {job_id} has {last[job_id]} effects, wanted {effects}"
        snoozes = SNOOZES if job.kind == "sleepy" else 0
        if not (earlier[job_id] == snoozes or (job_id in called_off and earlier[job_id] < snoozes)):
            yield f"{job.kind} {job_id} has {earlier[job_id]} effects of snoozed runs"
        if job.worker_id is not None:
            yield f"{job.kind} {job_id} is {job.state} and has a worker"
    for job_id in (last.keys() | earlier.keys()) - books.jobs.keys():
        yield f"an effect of {job_id}, which is no job"


def _uniqueness(books: Books) -> Iterator[str]:
    """Jobs with one key come one after the other: each is inserted when the one before has ended."""
    by_key: dict[str, list[Job]] = {}
    for job in books.jobs.values():
        if job.unique_key is not None and job.finished_at is not None:
            by_key.setdefault(job.unique_key, []).append(job)
    for key, same in by_key.items():
        same.sort(key=lambda job: job.finished_at or job.created_at)
        for one, following in pairwise(same):
            # One that was cancelled before it ran has no start.
            if following.started_at and one.finished_at and following.started_at < one.finished_at:
                yield f"{following.id} with key {key} ran before {one.id} had ended"


def _runs(books: Books) -> Iterator[str]:
    # An effect of a snoozed or cancelled run and its Attempt are two traces of one committed end.
    ends = {(each.job_id.hex, each.attempt, each.worker_id.hex) for each in books.attempts}
    ends |= {(each.job_id, each.attempt, each.worker_id) for each in books.effects}
    for (job_id, attempt), count in Counter(end[:2] for end in ends).items():
        if count > 1:
            yield f"attempt {attempt} of {job_id} ended {count} times"
    doubled = Counter((each.job_id, each.attempt) for each in books.effects)
    yield from (
        f"attempt {key[1]} of {key[0]} has {n} effects" for key, n in doubled.items() if n > 1
    )
    begun = Counter((each.job_id, each.attempt, each.worker_id) for each in books.starts)
    yield from (f"run {key} began {n} times" for key, n in begun.items() if n > 1)
    for job_id, attempt, _ in ends:
        if job_id in books.jobs and attempt > books.jobs[job_id].attempt:
            yield f"attempt {attempt} of {job_id} ended, and its row is at {books.jobs[job_id].attempt}"


def recoveries(books: Books, ended: Iterable[Process]) -> list[float]:
    """Seconds from the death of a worker to the next start of what it was running, at a job's first crash."""
    crashed: dict[str, list[int]] = {}
    for each in books.attempts:
        if each.outcome == "crashed":
            crashed.setdefault(each.job_id.hex, []).append(each.attempt)
    killed = {each.popen.pid: each.killed_at for each in ended}
    next_start: dict[str, float] = {}
    found = []
    for start in reversed(books.starts):
        died_at = killed.get(start.pid)
        is_first_crash = start.attempt == min(crashed.get(start.job_id, [0]))
        if died_at is not None and is_first_crash and start.job_id in next_start:
            found.append(next_start[start.job_id] - died_at)
        next_start[start.job_id] = start.at
    return sorted(found)
