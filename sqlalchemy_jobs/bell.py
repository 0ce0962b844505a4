"""The bell: tells workers that sleep of jobs that were added, so that they need not look so often.

On PostgreSQL the INSERT itself rings, for workers everywhere (``inserts.py``). A worker in the process of the one
who adds is woken on every database, by the commit. Nothing depends on it: who is not told looks by himself.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol
from weakref import WeakSet

from sqlalchemy import Connection, event, func, select
from sqlalchemy.orm import Session, SessionTransaction

from sqlalchemy_jobs import dialects
from sqlalchemy_jobs.inserts import SCHEDULES, SILENT


class Sleeper(Protocol):
    def wake(self) -> None: ...


sleepers: WeakSet[Sleeper] = WeakSet()
"""What a commit in this process wakes: the claims of the workers that it runs."""
schedulers: WeakSet[Sleeper] = WeakSet()
"""What a commit wakes that has changed a schedule."""

_ADDED = "sqlalchemy_jobs.added"
_RESCHEDULED = "sqlalchemy_jobs.rescheduled"


def ring(session: Session, queues: Collection[str] = ()) -> None:
    """Have idle workers look at these queues (none given: at all) when the transaction is committed.

    For jobs that become due by other means than the table's own INSERT; one statement, on PostgreSQL only.
    """
    tell_own(session)
    dialects.of(session).ring(session, queues)


def ring_schedules(session: Session) -> None:
    """Have workers look at the schedules when the transaction is committed; one statement, on PostgreSQL only."""
    if schedulers:
        session.info[_RESCHEDULED] = True
    dialects.of(session).ring(session, [SCHEDULES])


def tell_own(session: Session) -> None:
    """Have the workers of this process look when the transaction is committed. No statement."""
    if sleepers:
        session.info[_ADDED] = True


# --- the listeners, on the Session class: jobs are added in whatever session there is ----------------


@event.listens_for(Session, "after_commit")
def _wake(session: Session) -> None:
    if not (sleepers or schedulers) or session.in_nested_transaction():
        return
    for change, woken in ((_ADDED, sleepers), (_RESCHEDULED, schedulers)):
        if session.info.pop(change, False):
            for sleeper in list(woken):
                sleeper.wake()


@event.listens_for(Session, "after_begin")
def _silence(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    """A transaction that has executed NOTIFY cannot be prepared."""
    if session.twophase and connection.dialect.name == "postgresql":
        connection.execute(select(func.set_config(SILENT, "on", True)))
