"""The workers' rows: by its lease each is believed alive, and by a lock that the server frees when it dies."""

from __future__ import annotations

import logging
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, cast

from sqlalchemy import CursorResult, delete, exists, false, insert, select, update
from sqlalchemy.orm import Session

from sqlalchemy_jobs import dialects
from sqlalchemy_jobs.columns import server_now
from sqlalchemy_jobs.ids import uuid7
from sqlalchemy_jobs.states import WorkerState
from sqlalchemy_jobs.tables import IS_RUNNING, TO_JOB, jobs, workers
from sqlalchemy_jobs.transitions import release_unowned
from sqlalchemy_jobs.worker.control import Control
from sqlalchemy_jobs.worker.locks import SessionLock
from sqlalchemy_jobs.worker.wakeup import Wakeup

log = logging.getLogger("sqlalchemy_jobs")

RENEWAL = timedelta(seconds=2)
"""Between two renewals, when there are other workers, who will judge this one."""
LONE_RENEWAL = timedelta(seconds=5)
"""Between two renewals of a worker that knows of no other; at each it learns of newcomers."""
LATENESS = timedelta(seconds=0.5)
"""By how much a renewal may be late before the worker counts as silent."""
DEAD_KEPT = timedelta(days=1)


def own_name() -> str:
    """Return host:pid, by which people know this worker."""
    return f"{socket.gethostname()}:{os.getpid()}"[:200]


def register(
    session: Session,
    lease: timedelta,
    queues: Sequence[str] = (),
    kinds: Sequence[str] = (),
    *,
    worker_id: uuid.UUID | None = None,
    locked_since: datetime | None = None,
    bell: bool = False,
) -> uuid.UUID:
    """Insert the row of a new worker under an id that has never been used before. No queues: all.

    ``locked_since``: the start of the server on which it holds its lock already, if it does. ``bell``: whether
    it listens.
    """
    worker_id = worker_id or uuid7()
    session.execute(
        insert(workers).values(
            id=worker_id,
            name=own_name(),
            state=WorkerState.ALIVE.value,
            queues=list(queues) or None,
            kinds=list(kinds),
            started_at=server_now(),
            **_renewed(lease, locked_since, bell),
        ),
        bind_arguments=TO_JOB,
    )
    return worker_id


def renew(
    session: Session,
    worker_id: uuid.UUID,
    lease: timedelta,
    locked_since: datetime | None = None,
    bell: bool = False,
) -> bool | None:
    """Prolong the lease; return whether there are other workers.

    None when the worker was declared dead, which cannot be taken back.
    """
    renewal = (
        update(workers)
        .where(workers.c.id == worker_id, workers.c.state == WorkerState.ALIVE.value)
        .values(_renewed(lease, locked_since, bell))
    )
    other = workers.alias()
    others = exists().where(other.c.id != worker_id, other.c.state == WorkerState.ALIVE.value)
    if session.connection(bind_arguments=TO_JOB).dialect.update_returning:
        return session.scalar(renewal.returning(others), bind_arguments=TO_JOB)
    renewed = session.execute(renewal, bind_arguments=TO_JOB)
    if cast("CursorResult[object]", renewed).rowcount == 0:
        return None
    return session.scalar(select(others), bind_arguments=TO_JOB)


def _renewed(lease: timedelta, locked_since: datetime | None, bell: bool) -> dict[str, Any]:
    return {
        "heartbeat_at": server_now(),
        "lease_until": server_now(lease),
        "holds_lock": locked_since is not None,
        "server_start": locked_since,
        "bell": bell,
    }


def unregister(session: Session, worker_id: uuid.UUID) -> None:
    """Delete the row of a worker that has ended; jobs still running under it are given back."""
    release_unowned(session, worker_id, ())
    session.execute(delete(workers).where(workers.c.id == worker_id), bind_arguments=TO_JOB)


@dataclass(frozen=True, slots=True)
class Other:
    """What a worker sees of another one that is not declared dead, by the server's clock."""

    id: uuid.UUID
    name: str
    heartbeat_at: datetime
    has_expired: bool
    """Its lease has passed."""
    is_silent: bool
    """It missed its latest renewal."""
    is_unlocked: bool
    """Nobody holds the lock that it held on this server, which was not restarted since."""


def look(session: Session, me: uuid.UUID) -> list[Other]:
    """Return what the worker ``me`` sees of the others; nothing when it is silent itself.

    What held it up, for example a machine that slept, may have held up the others as well.
    """
    locks = dialects.of(session).session_locks
    found = session.execute(
        select(
            *workers.c["id", "name", "started_at", "heartbeat_at", "lease_until"],
            server_now().label("now"),
            (
                workers.c.holds_lock
                & (workers.c.server_start == locks.server_start)
                & locks.is_free
                if locks
                else false()
            ).label("is_unlocked"),
        ).where(workers.c.state == WorkerState.ALIVE.value),
        bind_arguments=TO_JOB,
    ).all()
    mine = next((row for row in found if row.id == me), None)
    if mine is None or mine.now - mine.heartbeat_at > LONE_RENEWAL + LATENESS:
        return []
    # One that has renewed since this one came knows that it is not alone, and renews more often. A second more:
    # this one's row was visible only when its insertion was committed.
    known = mine.started_at + timedelta(seconds=1)
    return [
        Other(
            row.id,
            row.name,
            row.heartbeat_at,
            row.lease_until < row.now,
            row.now - row.heartbeat_at
            > LATENESS + (RENEWAL if row.heartbeat_at > known else LONE_RENEWAL),
            bool(row.is_unlocked),
        )
        for row in found
        if row.id != me
    ]


def forget_dead(session: Session) -> None:
    """Delete the rows of workers that have been dead for a day and have no job left."""
    has_job = exists().where(IS_RUNNING, jobs.c.worker_id == workers.c.id)
    session.execute(
        delete(workers).where(
            workers.c.state == WorkerState.DEAD.value,
            workers.c.heartbeat_at < server_now(-DEAD_KEPT),
            ~has_job,
        ),
        bind_arguments=TO_JOB,
    )


class Lease:
    """The step of a loop: registers, then renews. The loop and its connection serve nothing else.

    ``ready`` is called when there may be jobs that nobody has told of: after it has registered, and when its row
    says for the first time that the bell is on. ``lost`` is called when another worker has declared this one dead (the runs in flight are then no longer
    ours, and a new id is taken), and when the lease is about to end unrenewed (they may soon be).
    """

    def __init__(
        self,
        control: Control,
        lease: timedelta,
        queues: Sequence[str],
        kinds: Collection[str],
        ready: Callable[[], None],
        lost: Callable[..., None],
        lock: SessionLock | None = None,
        wakeup: Wakeup | None = None,
    ) -> None:
        self._control = control
        self._lease = lease
        self._queues = queues
        self._kinds = kinds
        self._ready = ready
        self._lost = lost
        self._session_lock = lock
        self._wakeup = wakeup
        self._id: uuid.UUID | None = None
        self._valid_until = 0.0
        self._suspended = False
        self._lock = threading.Lock()
        self._interval = 0.0
        self._renewed_at = -math.inf
        self._unbroken_since = math.inf
        self.was_broken = False
        """Whether a renewal has failed or was late before the present view began."""
        self.has_company = True
        """Whether there are other workers, as of the latest renewal."""

    @property
    def margin(self) -> float:
        """Seconds before its end at which a lease that could not be renewed is given up."""
        return self._lease.total_seconds() / 6

    @property
    def worker_id(self) -> uuid.UUID | None:
        """The id to claim under; None while there is none that is certain to be believed alive."""
        return self._id if time.monotonic() < self._valid_until - self.margin else None

    @property
    def view_age(self) -> float:
        """For how many seconds every renewal has come in time.

        During an outage nobody renews: judging others takes a view that is not too young.
        """
        return time.monotonic() - self._unbroken_since

    def step(self) -> float:
        asked_at = time.monotonic()
        bell = self._wakeup is not None and self._wakeup.wanted
        try:
            self._renew_or_register(bell)
        except Exception as error:
            self._renewed_at = -math.inf
            # A locked database (SQLite) has answered: nobody else can take the jobs either.
            if not self._control.dialect.is_conflict(error):
                self.watch()
            raise
        now = time.monotonic()
        if now - self._renewed_at > 2 * self._interval:
            # The first one, or one has failed, or the database or this process stood still.
            self.was_broken = (
                self._unbroken_since < math.inf or self._control.availability.losses > 0
            )
            self._unbroken_since = now
        self._renewed_at = now
        longest = RENEWAL if self.has_company else LONE_RENEWAL
        self._interval = min(self._lease / 6, longest).total_seconds()
        with self._lock:
            self._valid_until = asked_at + self._lease.total_seconds()
            resumed, self._suspended = self._suspended, False
        turned_on = self._wakeup is not None and self._wakeup.announced(bell)
        if resumed or turned_on:
            self._ready()
        return self._interval

    def watch(self) -> float:
        """The step of a second loop: stop the runs of a lease that ends before it can be renewed.

        It bounds for how long a side effect may overlap with that of the job's next run. It looks at the clock
        only, for a renewal may hang in a connection that is dead without an error.
        """
        with self._lock:
            late = self._is_late() and not self._suspended
            self._suspended = self._suspended or late
        if late:
            self._lost("the lease could not be renewed in time", dead=False)
        left = self._valid_until - self.margin - time.monotonic()
        return left if left > 0 else self.margin

    def end(self) -> None:
        """Give up the row, when the worker ends, and give back what is still running under it."""
        if (worker_id := self._id) is not None:
            self._id = None
            self._control.transaction(lambda session: unregister(session, worker_id))

    def _renew_or_register(self, bell: bool) -> None:
        # The lock first: a row says only what is true already.
        if (old_id := self._id) is not None:
            company = self._renew(old_id, bell)
            if company is not None:
                self.has_company = company
                return
            self._id = None
            self._lost("another worker declared this one dead", dead=True)
        new_id = uuid7()
        since = self._hold_lock(new_id)
        self._id = self._control.transaction(
            lambda session: register(
                session,
                self._lease,
                self._queues,
                list(self._kinds),
                worker_id=new_id,
                locked_since=since,
                bell=bell,
            )
        )
        self.has_company = True  # to be seen at the first renewal
        self._suspended = True

    def _renew(self, worker_id: uuid.UUID, bell: bool) -> bool | None:
        """Renew in the session of the lock if it is held: its answer proves that it is held still."""
        lock, unknown_there = self._session_lock, False
        if lock is not None and (since := lock.held_since(worker_id)) is not None:
            company = lock.ask(lambda session: renew(session, worker_id, self._lease, since, bell))
            if company is not None:
                return company
            unknown_there = lock.held_since(worker_id) is not None
        since = self._hold_lock(worker_id)
        company = self._control.statements(
            lambda session: renew(session, worker_id, self._lease, since, bell)
        )
        if lock is not None and unknown_there and company is not None:
            lock.leads_elsewhere()
        return company

    def _hold_lock(self, worker_id: uuid.UUID) -> datetime | None:
        return self._session_lock.hold(worker_id) if self._session_lock else None

    def _is_late(self) -> bool:
        return self._id is not None and time.monotonic() >= self._valid_until - self.margin
