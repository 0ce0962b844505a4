"""The rows, the diaries and the transactions as they are in the end, and put in order."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from sqlalchemy_jobs import Attempt, Job
from tests.chaos import diary
from tests.chaos.diary import Entry, RunKey
from tests.chaos.load import Transaction
from tests.chaos.rows import Effect, Intent, Reference

CLOCK = timedelta(seconds=0.1)
"""By so much the server's clock may be set back."""


@dataclass(frozen=True, eq=False)
class Held:
    """A run whose row is known to have been `running` all the while from ``began`` to ``ended``.

    Its handler was called when the claim had been committed; and its end was dated, by the clock of the server, in the
    transaction that was about to commit it. So a run that was lost with its worker lasts until the rescue.
    """

    job: Job
    claimed: float
    """By the clock of the server, before the claim was committed."""
    began: float
    ended: float


class Books:
    def __init__(
        self,
        rows: Iterable[Job | Attempt | Effect | Reference],
        intents: Iterable[str],
        entries: Iterable[Entry],
        transactions: Iterable[Transaction],
        calm_at: float = math.inf,
    ) -> None:
        self.calm_at = calm_at
        """From when on nobody did any harm."""
        rows = list(rows)
        self.jobs = {row.id.hex: row for row in rows if isinstance(row, Job)}
        self.attempts = [row for row in rows if isinstance(row, Attempt)]
        self.effects = [row for row in rows if isinstance(row, Effect)]
        self.references = {row.id: row for row in rows if isinstance(row, Reference)}
        self.intents = set(intents)
        self.transactions = list(transactions)
        committed = [each for each in self.transactions if each.id in self.intents]
        self.kinds = {job_id: job.kind for job_id, job in self.jobs.items()}
        """Of every committed job, also where its row is gone."""
        self.called_off: set[str] = set()
        """Jobs that a transaction has cancelled."""
        self.requeued: dict[str, int] = {}
        """Jobs that a transaction has put back, and how often that was after a success."""
        self.changes: defaultdict[str, list[Transaction]] = defaultdict(list)
        """The transactions that changed a queue, a kind or a schedule, in their order."""
        for each in sorted(committed, key=lambda each: each.began):
            for name in each.changes:
                self.changes[name].append(each)
        for each in committed:
            self.kinds |= each.jobs
            self.called_off.update(each.cancelled)
            for job_id, had_succeeded in each.requeued:
                self.requeued[job_id] = self.requeued.get(job_id, 0) + had_succeeded

        self.starts: list[Entry] = []
        self.counted: list[Entry] = []
        """How many jobs were running with a limit's key."""
        self.poisoned: list[Entry] = []
        """The last words of those that killed their process."""
        self.over: dict[RunKey, Entry] = {}
        """When the handler came to its end, and whether it had been told to stop."""
        for entry in sorted(entries, key=lambda entry: entry.at):
            match entry.event:
                case "began":
                    self.starts.append(entry)
                case "over":
                    self.over[entry.run] = entry
                case "counted":
                    self.counted.append(entry)
                case "poisoned":
                    self.poisoned.append(entry)
        self.starts_of: defaultdict[str, list[Entry]] = defaultdict(list)
        for entry in self.starts:
            self.starts_of[entry.run[0]].append(entry)
        self.start_of = {entry.run: entry for entry in self.starts}
        self.attempts_of: defaultdict[str, list[Attempt]] = defaultdict(list)
        for attempt in sorted(self.attempts, key=lambda attempt: attempt.attempt):
            self.attempts_of[attempt.job_id.hex].append(attempt)
        self.outcomes = {run_of(each): each.outcome for each in self.attempts}
        self.held = list(self._held())

    def _held(self) -> Iterator[Held]:
        """Yield the runs whose end is known; a job that was put back after its success has forgotten that run."""
        ends = {run_of(each): (each.started_at, each.finished_at) for each in self.attempts}
        for entry in self.starts:
            job = self.jobs.get(entry.run[0])
            if job is None:
                continue
            claimed, ended = ends.get(entry.run, (None, None))
            if entry.run not in ends and (job.state, job.attempt) == ("succeeded", entry.run[1]):
                claimed, ended = job.started_at, job.finished_at
            if claimed and ended:
                yield Held(job, claimed.timestamp(), entry.at, (ended - CLOCK).timestamp())

    def in_force(self, name: str, since: float, until: float, before: Any = None) -> set[Any]:
        """Return all that may have been in force in a time, by the transactions that changed it one after the other.

        Each may have committed as soon as it had begun, and has replaced what was there when it was known to have.
        """
        values = {before}
        for each in self.changes[name]:
            if each.began > until:
                break
            if each.ended is not None and each.ended <= since:
                values.clear()
            values.add(each.changes[name])
        return values

    @classmethod
    def read(
        cls, engine: Engine, folder: Path, transactions: Iterable[Transaction], calm_at: float
    ) -> "Books":
        with Session(engine) as session:
            tables = (Job, Attempt, Effect, Reference)
            rows = [row for table in tables for row in session.scalars(select(table))]
            intents = session.scalars(select(Intent.id)).all()
            session.expunge_all()
        return cls(rows, intents, diary.read(folder), transactions, calm_at)

    def of_kind(self, *kinds: str) -> Iterable[tuple[str, Job]]:
        return ((job_id, job) for job_id, job in self.jobs.items() if job.kind in kinds)


def run_of(row: Attempt | Effect) -> RunKey:
    job_id = row.job_id if isinstance(row, Effect) else row.job_id.hex
    worker_id = row.worker_id if isinstance(row, Effect) else row.worker_id.hex
    return job_id, row.attempt, worker_id


def at_once(runs: Iterable[Held]) -> Iterator[tuple[Held, int]]:
    """Yield each run, and how many were running when it began, itself among them."""
    ends: list[float] = []
    for run in sorted(runs, key=lambda run: run.began):
        while ends and ends[0] <= run.began:
            heappop(ends)
        if run.ended > run.began:
            heappush(ends, run.ended)
            yield run, len(ends)
