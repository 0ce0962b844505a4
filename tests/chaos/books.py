"""The rows, the diaries and the transactions as they are in the end, and put in order."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from sqlalchemy_jobs import Attempt, Job
from tests.chaos import diary
from tests.chaos.diary import Entry, RunKey
from tests.chaos.load import Transaction
from tests.chaos.rows import Effect, Intent, Reference


class Books:
    def __init__(
        self,
        rows: Iterable[Job | Attempt | Effect | Reference],
        intents: Iterable[str],
        entries: Iterable[Entry],
        transactions: Iterable[Transaction],
    ) -> None:
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
        for each in committed:
            self.kinds |= each.jobs
            self.called_off.update(each.cancelled)
            for job_id, had_succeeded in each.requeued:
                self.requeued[job_id] = self.requeued.get(job_id, 0) + had_succeeded

        self.starts: list[Entry] = []
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

    @classmethod
    def read(cls, engine: Engine, folder: Path, transactions: Iterable[Transaction]) -> "Books":
        with Session(engine) as session:
            tables = (Job, Attempt, Effect, Reference)
            rows = [row for table in tables for row in session.scalars(select(table))]
            intents = session.scalars(select(Intent.id)).all()
            session.expunge_all()
        return cls(rows, intents, diary.read(folder), transactions)

    def of_kind(self, *kinds: str) -> Iterable[tuple[str, Job]]:
        return ((job_id, job) for job_id, job in self.jobs.items() if job.kind in kinds)


def run_of(row: Attempt | Effect) -> RunKey:
    job_id = row.job_id if isinstance(row, Effect) else row.job_id.hex
    worker_id = row.worker_id if isinstance(row, Effect) else row.worker_id.hex
    return job_id, row.attempt, worker_id
