"""The lock beside the lease, by which the death of a worker is noticed at once."""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import TypeVar

from sqlalchemy import Connection, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from sqlalchemy_jobs.dialects.sessions import SessionLocks
from sqlalchemy_jobs.worker.availability import brief, is_lost
from sqlalchemy_jobs.worker.control import Control

log = logging.getLogger("sqlalchemy_jobs")

T = TypeVar("T")

LEAST_SILENCE = timedelta(seconds=10)
"""For how long, at least, the server waits for a sign of the worker before it frees the lock."""


class SessionLock:
    """A worker's lock, in a session that serves nothing else: a long statement would hide the client's death.

    Where it is not to be had, the worker is believed alive by its lease only. That is so behind a pooler: other
    clients would share the session, and the lock would outlive the worker.
    """

    def __init__(self, control: Control, locks: SessionLocks, lease: timedelta) -> None:
        self._control = control
        self._locks = locks
        self._silence = math.ceil(max(lease / 3, LEAST_SILENCE).total_seconds())
        self._held: tuple[uuid.UUID, datetime] | None = None
        self._to_be_had = True

    def hold(self, worker_id: uuid.UUID) -> datetime | None:
        """Make sure of the lock; return the start of the server that keeps it, None where there is no lock.

        When it turns out to be lost together with its connection, the driver's error is raised: the next call
        takes it anew.
        """
        if self._held is not None:
            held_by, since = self._held
            self._held = None
            if held_by == worker_id and self._control.on_kept_connection(self._is_own_session):
                self._held = held_by, since
                return since
            self._control.drop_kept_connection()
        if self._to_be_had and (server_start := self._take(worker_id)) is not None:
            self._held = worker_id, server_start
            return server_start
        return None

    def held_since(self, worker_id: uuid.UUID) -> datetime | None:
        """Return the start of the server that keeps the lock, as far as is known without asking."""
        held_by, since = self._held or (None, None)
        return since if held_by == worker_id else None

    def ask(self, work: Callable[[Session], T]) -> T | None:
        """Run one quick statement, in autocommit, in the session of the lock that is held.

        None when it must be run elsewhere. When the lock turns out to be lost together with its connection, the
        driver's error is raised, as by ``hold``.
        """
        held, self._held = self._held, None
        try:
            answer = self._control.on_kept_connection(
                lambda connection: _in_session(connection, work)
            )
        except Exception as error:
            if is_lost(error):
                raise
            self._consider(error)
            return None
        self._held = held
        return answer

    def leads_elsewhere(self) -> None:
        """Do without: what is asked in the session of the lock is not answered by the database of the jobs."""
        self._held = None
        self._control.drop_kept_connection()
        self._give_up("its connection leads to another database")

    def close(self) -> None:
        """End the session, and with it the lock."""
        self._control.close()

    def _take(self, worker_id: uuid.UUID) -> datetime | None:
        """Take it, or remember why not. An error here must not keep the lease from being renewed."""
        try:
            return self._control.on_kept_connection(
                lambda connection: self._take_in(connection, worker_id)
            )
        except Exception as error:
            self._consider(error)
            return None

    def _take_in(self, connection: Connection, worker_id: uuid.UUID) -> datetime | None:
        if not self._is_own_session(connection):
            self._give_up("a pooler is between, or the driver does not tell its session")
            return None
        connection.execute(self._locks.limits, {"seconds": self._silence})
        taken, server_start = connection.execute(
            select(self._locks.take(worker_id), self._locks.server_start)
        ).one()
        # Not taken: the server does not know yet that the session which has it is broken.
        return server_start if taken else None

    def _is_own_session(self, connection: Connection) -> bool:
        driver = connection.connection.driver_connection
        return connection.scalar(select(self._locks.session)) == self._locks.session_of(driver)

    def _consider(self, error: Exception) -> None:
        """Give up what is refused for good; what went wrong for once (a timeout, a deadlock) may go right next time."""
        if isinstance(error, OperationalError) or is_lost(error):
            log.debug("the lock beside the lease is not to be had now: %s", brief(error))
        else:
            self._give_up(brief(error))

    def _give_up(self, why: str) -> None:
        self._to_be_had = False
        log.info("no lock beside the lease, so a death is noticed when that has passed: %s", why)


def _in_session(connection: Connection, work: Callable[[Session], T]) -> T:
    with Session(connection) as session:
        return work(session)
