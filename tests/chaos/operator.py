"""What somebody at a console does meanwhile: pauses and resumes queues and kinds, and sets how much of a queue may run."""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sqlalchemy import URL, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from sqlalchemy_jobs import (
    Schedule,
    pause_kind,
    pause_queue,
    pause_schedule,
    resume_kind,
    resume_queue,
    set_queue,
)
from tests.chaos.kinds import ASIDE, NARROW, NARROW_AT_ONCE, NARROW_RATE
from tests.chaos.load import Transaction
from tests.chaos.rows import Intent, make_engine

PAUSED = [f"queue {ASIDE}", "kind nothing", "kind single"]
"""What is paused now and then."""
AT_ONCE = f"concurrency {NARROW}"


class Operator:
    """A thread that changes something now and then until told to stop; what it did is in ``transactions``."""

    def __init__(self, url: URL, seed: int, pause: float) -> None:
        self.transactions: list[Transaction] = []
        self._random = random.Random(f"operator {seed}")
        self._engine = make_engine(url, pool_pre_ping=True)
        with Session(self._engine) as session, session.begin():
            set_queue(session, NARROW, concurrency=NARROW_AT_ONCE, rate=NARROW_RATE)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(pause,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Do no more by chance; pause the schedules and nothing else, so that an end comes."""
        self._stop.set()
        self._thread.join()
        for name in PAUSED:
            self.change(name, False)
        with Session(self._engine) as session:
            schedules = session.scalars(select(Schedule.name)).all()
        for name in schedules:
            self.change(f"schedule {name}", 0)

    def close(self) -> None:
        self._engine.dispose()

    def change(self, name: str, value: bool | int) -> None:
        """Change one thing."""
        with self.transaction() as (session, transaction):
            _change(session, transaction, name, value)

    @contextmanager
    def transaction(self) -> Iterator[tuple[Session, Transaction]]:
        """Note what is done in a transaction, and what became of that."""
        transaction = Transaction()
        self.transactions.append(transaction)
        with Session(self._engine) as session:
            with session.begin():
                session.add(Intent(id=transaction.id))
                session.flush()
                yield session, transaction
            transaction.committed()

    def _run(self, pause: float) -> None:
        is_paused = dict.fromkeys(PAUSED, False)
        while not self._stop.wait(self._random.uniform(0, 2 * pause)):
            name = self._random.choice([*PAUSED, AT_ONCE])
            value = self._random.randint(1, 4) if name == AT_ONCE else not is_paused[name]
            with suppress(SQLAlchemyError, _Undone), self.transaction() as (session, transaction):
                _change(session, transaction, name, value)
                if self._random.random() < 0.2:
                    transaction.fate = "rolled back"
                    raise _Undone
            if name in is_paused and transaction.fate == "committed":
                is_paused[name] = value


class _Undone(Exception):
    """Rolls a transaction back."""


def _change(session: Session, transaction: Transaction, name: str, value: bool | int) -> None:
    match name.split():
        case "queue", queue:
            (pause_queue if value else resume_queue)(session, queue)
        case "kind", kind:
            (pause_kind if value else resume_kind)(session, kind)
        case "schedule", schedule:
            pause_schedule(session, schedule)
        case _:
            set_queue(session, NARROW, concurrency=value)
    transaction.changes[name] = value
