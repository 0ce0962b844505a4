"""The transactions that enqueue: what each of them was to do, and whether it is known to have committed."""

import random
import threading
import time
import uuid
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import URL, create_engine
from sqlalchemy.orm import Session, sessionmaker

from sqlalchemy_jobs import Job, cancel, enqueue, enqueue_many, requeue, sqlite
from tests.chaos.app import Intent, Only, any_payload

Fate = Literal["committed", "rolled back", "unknown"]


@dataclass
class Transaction:
    id: str
    jobs: list[uuid.UUID] = field(default_factory=list)
    """Those that it inserted."""
    others: list[uuid.UUID] = field(default_factory=list)
    """Those that stand in for what it wanted to insert."""
    cancelled: list[uuid.UUID] = field(default_factory=list)
    fate: Fate = "unknown"


class Load:
    """Threads that enqueue until told to stop; what they did is in ``transactions``."""

    def __init__(self, urls: list[URL], seed: int, per_second: float) -> None:
        self.transactions: list[Transaction] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(
                target=self._run,
                args=(url, random.Random(f"load {seed} {number}"), len(urls) / per_second),
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

    def _run(self, url: URL, random: random.Random, pause: float) -> None:
        engine = create_engine(url)
        if engine.dialect.name == "sqlite":
            sqlite.configure(engine)
        sessions = sessionmaker(engine)
        while not self._stop.wait(random.uniform(0, 2 * pause)):
            transaction = Transaction(uuid.uuid4().hex)
            self.transactions.append(transaction)
            try:
                with sessions() as session:
                    self._fill(session, transaction, random)
                    if random.random() < 0.25:
                        session.rollback()
                        transaction.fate = "rolled back"
                    else:
                        session.commit()
                        transaction.fate = "committed"
            except Exception:  # the server is away, or the answer to the COMMIT did not come
                time.sleep(0.05)
        engine.dispose()

    def _fill(self, session: Session, transaction: Transaction, random: random.Random) -> None:
        session.add(Intent(id=transaction.id))
        self._enqueue(session, transaction, random)
        earlier = random.choice(self.transactions)
        if earlier.fate == "committed" and earlier.jobs:
            job_id = random.choice(earlier.jobs)
            if random.random() < 0.1 and cancel(session, job_id, "by chaos"):
                transaction.cancelled.append(job_id)
            elif random.random() < 0.2 and session.get_one(Job, job_id).kind == "doomed":
                requeue(session, job_id)

    def _enqueue(self, session: Session, transaction: Transaction, random: random.Random) -> None:
        options: Any = {
            "priority": random.choice([0, 0, 0, -1, 5]),
            "queue": random.choice(["default", "default", "other"]),
        }
        if random.random() < 0.1:
            many = [any_payload(random, quick=True) for _ in range(10)]
            for payload, job_id in zip(many, enqueue_many(session, many, **options), strict=True):
                unique = isinstance(payload, Only)
                (transaction.others if unique else transaction.jobs).append(job_id)
            return
        made = [
            enqueue(any_payload(random, quick=False), **options)
            for _ in range(random.randint(1, 3))
        ]
        ids = {job: job.id for job in made}
        session.add_all(made)
        session.flush()
        for job, job_id in ids.items():
            if job.duplicate_of is None:
                transaction.jobs.append(job_id)
            else:
                transaction.others.append(job.duplicate_of)
