"""What has become of jobs, as the database says it."""

import time
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session, sessionmaker

from sqlalchemy_jobs import Attempt, Job, enqueue
from tests.domain import Effect


@dataclass
class Look:
    sessions: sessionmaker[Session]

    def add(self, payload: Any, **options: Any) -> Any:
        """Commit a job; return its id."""
        with self.sessions.begin() as session:
            made = enqueue(payload, **options)
            session.add(made)
            return made.id

    def states(self, **where: Any) -> dict[str, int]:
        """How many jobs are in which state."""
        with self.sessions() as session:
            query = select(Job.state, func.count()).filter_by(**where).group_by(Job.state)
            return dict(session.execute(query).all())  # type: ignore[arg-type]

    def wait_for(self, timeout: float = 90, **states: int) -> None:
        """Wait until the jobs are in these states."""
        end = time.monotonic() + timeout
        while (found := self.states()) != states:
            assert time.monotonic() < end, found
            time.sleep(0.05)

    def attempts(self) -> list[str]:
        """How the runs ended that did not succeed."""
        with self.sessions() as session:
            return list(session.scalars(select(Attempt.outcome).order_by(Attempt.finished_at)))

    def effects(self) -> list[str]:
        """The notes of all effects."""
        with self.sessions() as session:
            return list(session.scalars(select(Effect.note).order_by(Effect.id)))

    def count_effects(self) -> tuple[int, int]:
        """How many effects there are, and of how many different jobs."""
        with self.sessions() as session:
            query = select(func.count(), func.count(Effect.job_id.distinct())).select_from(Effect)
            count, different = session.execute(query).one()
            return count, different
