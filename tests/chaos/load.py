"""The transactions that enqueue, requeue, cancel and refer to jobs: what each of them was to do, and what became of it."""

import random
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import URL, func, select
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from sqlalchemy_jobs import Job, JobState, Schedule, cancel, enqueue, enqueue_many, requeue
from sqlalchemy_jobs.errors import DuplicateJob, JobsError
from sqlalchemy_jobs.payloads import declaration_of
from tests.chaos.kinds import (
    ASIDE,
    NARROW,
    UNIQUE,
    Poison,
    Short,
    Sole,
    Tick,
    any_payload,
    limited_payload,
)
from tests.chaos.rows import Intent, Reference, make_engine
from tests.chaos.signs import called_off

Fate = Literal["committed", "rolled back", "unknown"]

QUEUES = {"default": 12, "other": 6, ASIDE: 1}
"""With their weights."""
SCHEDULES = 2
"""How many rows each thread has, at most."""
POISON_PAUSE = 10.0
"""Seconds between two jobs that kill their worker."""
CROWD = 200
"""Unfinished jobs beyond which no more are added: a machine that is slow must come to an end, too."""
REQUEUED = [
    ("doomed", "failed"),
    *((kind, "succeeded") for kind in ("only", "latest", "sole", "windowed")),
]
FINAL = (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


@dataclass
class Transaction:
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    jobs: dict[str, str] = field(default_factory=dict)
    """Those that it inserted, and their kinds."""
    others: list[uuid.UUID] = field(default_factory=list)
    """Those that stand in for what it wanted to insert."""
    cancelled: list[str] = field(default_factory=list)
    requeued: list[tuple[str, bool]] = field(default_factory=list)
    """With whether it had succeeded before."""
    references: list[str] = field(default_factory=list)
    refused: int = 0
    """How often it was told by an exception that a key is taken, and went on."""
    changes: dict[str, object] = field(default_factory=dict)
    """What it was to have in force from its commit on: of a queue, a kind or a schedule."""
    began: float = field(default_factory=time.time)
    ended: float | None = None
    """When its commit was known."""
    fate: Fate = "unknown"

    def committed(self) -> None:
        self.fate, self.ended = "committed", time.time()


class Load:
    """Threads that enqueue until told to stop; what they did is in ``transactions``."""

    def __init__(self, urls: list[URL], seed: int, per_second: float) -> None:
        self.transactions: list[Transaction] = []
        self.errors: list[Exception] = []
        """What spoilt a transaction although the server was there."""
        self.crowded = False
        """Whether so many jobs wait that no more are to be added."""
        self._next_poison = time.monotonic() + POISON_PAUSE / 2
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(
                target=self._run,
                args=(url, number, random.Random(f"load {seed} {number}"), len(urls) / per_second),
                daemon=True,
            )
            for number, url in enumerate(urls)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, url: URL, number: int, random: random.Random, pause: float) -> None:
        engine = make_engine(url)
        sessions = sessionmaker(engine)
        while not self._stop.wait(random.uniform(0, 2 * pause)):
            if self.crowded:
                continue
            transaction = Transaction()
            self.transactions.append(transaction)
            try:
                with sessions() as session:
                    self._fill(session, transaction, number, random)
                    if random.random() < 0.25:
                        session.rollback()
                        transaction.fate = "rolled back"
                    else:
                        session.commit()
                        transaction.committed()
            except Exception as error:
                if isinstance(error, (IntegrityError, JobsError)):
                    self.errors.append(error)
                time.sleep(0.05)  # the server is away, or the answer to the COMMIT did not come
        engine.dispose()

    def _fill(
        self, session: Session, transaction: Transaction, number: int, random: random.Random
    ) -> None:
        session.add(Intent(id=transaction.id))
        self._enqueue(session, transaction, number, random)
        match random.randrange(10):
            case 0:
                if (job_id := self._earlier(random)) and cancel(session, job_id, "by chaos"):
                    transaction.cancelled.append(job_id.hex)
            case 1:
                if job_id := self._earlier(random):
                    _refer(session, transaction, job_id)
                    time.sleep(random.uniform(0, 0.3))  # and hold whatever it locks
            case 2:
                _requeue(session, transaction, random)
            case 3:
                _schedule(session, transaction, number, random)

    def _earlier(self, random: random.Random) -> uuid.UUID | None:
        earlier = random.choice(self.transactions)
        there = earlier.fate == "committed" and earlier.jobs
        return uuid.UUID(random.choice(list(earlier.jobs))) if there else None

    def _enqueue(
        self, session: Session, transaction: Transaction, number: int, random: random.Random
    ) -> None:
        options: Any = {
            "priority": random.choice([0, 0, 0, -1, 5]),
            "queue": random.choices(list(QUEUES), list(QUEUES.values()))[0],
        }
        if random.random() < 0.1:
            many = [any_payload(random, transaction.id, quick=True) for _ in range(10)]
            ids = enqueue_many(session, many, **options)
            for payload, job_id in zip(many, ids, strict=True):
                if isinstance(payload, UNIQUE):
                    transaction.others.append(job_id)
                else:
                    transaction.jobs[job_id.hex] = declaration_of(type(payload)).kind
            return
        for _ in range(random.randint(1, 3)):
            if random.random() < 0.2:
                payload = limited_payload(random, number)
                of_limited = {**options, "queue": random.choice([*[options["queue"]] * 4, NARROW])}
                _add(session, transaction, payload, of_limited)
                continue
            payload = any_payload(random, transaction.id, quick=False)
            # So that a key is held for a while.
            delay = timedelta(seconds=random.uniform(0, 2)) if isinstance(payload, UNIQUE) else None
            _add(session, transaction, payload, {**options, "delay": delay})
        if random.random() < 0.05:
            short = Short(round(random.uniform(0.05, 0.5), 2))
            _add(session, transaction, short, {**options, "queue": NARROW})
        if time.monotonic() > self._next_poison:
            self._next_poison = time.monotonic() + random.uniform(0, 2 * POISON_PAUSE)
            _add(session, transaction, Poison(random.randint(1, 4)), {"priority": -5})


def _add(session: Session, transaction: Transaction, payload: Any, options: Any) -> None:
    job = enqueue(payload, **options)
    job_id, kind = job.id, job.kind
    if isinstance(payload, Sole):
        try:
            with session.begin_nested():
                session.add(job)
        except DuplicateJob:  # and what else is in the transaction commits
            transaction.refused += 1
            return
    session.add(job)
    session.flush()
    if job.duplicate_of is None:
        transaction.jobs[job_id.hex] = kind
    else:
        transaction.others.append(job.duplicate_of)


def _refer(session: Session, transaction: Transaction, job_id: uuid.UUID) -> None:
    reference = Reference(id=uuid.uuid4().hex, job_id=job_id)
    with suppress(IntegrityError), session.begin_nested():  # the job may be gone
        session.add(reference)
        session.flush()
        transaction.references.append(reference.id)


def _requeue(session: Session, transaction: Transaction, random: random.Random) -> None:
    kind, state = random.choice(REQUEUED)
    ended = select(Job.id).where(Job.kind == kind, Job.state == state)
    found = session.scalars(ended.order_by(Job.finished_at.desc()).limit(20)).all()
    if not found:
        return
    job_id = random.choice(found)
    locked = select(Job.state).where(Job.id == job_id).with_for_update(key_share=True)
    state = session.scalar(locked)
    try:
        if requeue(session, job_id):
            transaction.requeued.append((job_id.hex, state == JobState.SUCCEEDED))
    except DuplicateJob:  # and what else is in the transaction commits
        transaction.refused += 1


def _schedule(
    session: Session, transaction: Transaction, number: int, random: random.Random
) -> None:
    """Add a row, or change, pause, resume or delete one; each thread has rows of its own."""
    prefix = f"load-{number}-"
    there = session.scalars(select(Schedule).where(Schedule.name.startswith(prefix))).all()
    every = random.randint(1, 4)
    if len(there) < SCHEDULES:
        name = prefix + transaction.id
        catch_up = random.choice(["skip", "once", "all"])
        session.add(Schedule(name, f"@every {every}s", Tick(), catch_up=catch_up))
    else:
        schedule = random.choice(there)
        name = schedule.name
        match random.randrange(4):
            case 0:
                session.delete(schedule)
            case 1 if not schedule.paused:
                schedule.paused = True
            case _:
                schedule.cron, schedule.paused = f"@every {every}s", False
        if schedule.paused or schedule in session.deleted:
            every = 0
    session.flush()
    transaction.changes[f"schedule {name}"] = every


class Onlooker:
    """Beside the load: cancels jobs while they run, and looks for rows that must not be there at any time."""

    def __init__(self, url: URL, seed: int, folder: Path, pause: float, load: Load) -> None:
        self._load = load
        self.transactions: list[Transaction] = []
        self.cancelled_at: dict[str, float] = {}
        """When the cancel of a running job was known to be committed."""
        self.seen: set[str] = set()
        """What must not be there, and was."""
        self._random = random.Random(f"onlooker {seed}")
        self._folder = folder
        self._engine = make_engine(url)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(pause,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        self._engine.dispose()

    def _run(self, pause: float) -> None:
        while not self._stop.wait(self._random.uniform(0, 2 * pause)):
            with suppress(SQLAlchemyError):
                self._look()
                self._cancel()

    def _look(self) -> None:
        with Session(self._engine) as session:
            twice = (
                select(Job.unique_key)
                .where(Job.state.in_(("ready", "running")), Job.unique_key.is_not(None))
                .group_by(Job.unique_key)
                .having(func.count() > 1)
            )
            self.seen |= {f"two unfinished jobs with key {key}" for key in session.scalars(twice)}
            unfinished = select(func.count()).where(Job.state.in_(("ready", "running")))
            self._load.crowded = (session.scalar(unfinished) or 0) > CROWD
            kept = select(Job.id).where(
                Job.kind.in_(("vanishing", "blank")), Job.state == JobState.SUCCEEDED
            )
            self.seen |= {f"{each} has succeeded, with keep=0" for each in session.scalars(kept)}

    def _cancel(self) -> None:
        with Session(self._engine) as session:
            running = select(Job.id).where(
                Job.state == "running", Job.kind.in_(("patient", "patient_async"))
            )
            found = [
                each
                for each in session.scalars(running.order_by(Job.id))
                if not called_off(self._folder, each).exists()
            ]
        if not found:
            return
        job_id = self._random.choice(found)
        sign = called_off(self._folder, job_id)
        sign.touch()  # from here on the handler waits to be told
        transaction = Transaction()
        self.transactions.append(transaction)
        try:
            with Session(self._engine) as session, session.begin():
                session.add(Intent(id=transaction.id))
                if cancel(session, job_id, "by chaos"):
                    transaction.cancelled.append(job_id.hex)
            transaction.committed()
        finally:
            if transaction.fate == "committed" and transaction.cancelled:
                self.cancelled_at[job_id.hex] = time.time()
            else:
                sign.unlink()
