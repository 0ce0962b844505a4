"""Keeps a handler from ending the transaction that is to carry its work.

Two facts decide: ``commit()`` must be refused *before* anything is committed, and a ``rollback()`` or
``close()`` that is followed by a return would lose the work of a job that succeeds. The listeners
stand on the Session class, since per-instance listeners cost as much as the rest of the run and
``async_sessionmaker`` takes none; they do nothing for a session that no run is watching.

``text("COMMIT")``, the driver's own ``commit()`` and ``session.connection().commit()`` are not seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from sqlalchemy import Connection, Engine, event, select
from sqlalchemy.orm import Session, SessionTransaction

from sqlalchemy_jobs import dialects, transitions
from sqlalchemy_jobs.dialects.base import Dialect
from sqlalchemy_jobs.errors import HandlerEndedTransaction, LeaseLost, RunInterrupted
from sqlalchemy_jobs.models import Job
from sqlalchemy_jobs.tables import TO_JOB, jobs
from sqlalchemy_jobs.worker.handling import Handling

_KEY = "sqlalchemy_jobs.watch"


class Watch:
    """What is known of one run's session, which it watches for the length of the run."""

    __slots__ = (
        "_bind",
        "_connection",
        "_dialect",
        "_ended",
        "_session",
        "began_at",
        "databases",
        "handling",
        "has_completed",
        "manual",
        "settling",
    )

    def __init__(self, session: Session, handling: Handling, *, manual: bool) -> None:
        self._session = session
        self.handling = handling
        self.manual = manual
        self.settling = False
        self.began_at: float | None = None
        """When its transaction first touched the database (monotonic seconds)."""
        self.databases: set[Engine] = set()
        """The engines that its transactions have used."""
        self._ended: str | None = None
        self._bind: Any = None
        self._connection: Connection | None = None
        """On which its transaction uses the database with the jobs, by an engine that is the session's."""
        self._dialect: Dialect | None = None
        self.has_completed = False
        """Whether the completion was sent with the commit."""

    def __enter__(self) -> Watch:
        self._session.info[_KEY] = self
        return self

    def __exit__(self, *_: object) -> None:
        self._session.info.pop(_KEY, None)

    def check(self) -> None:
        """Refuse the return of a handler that ended its transaction.

        Raises: HandlerEndedTransaction.
        """
        if self._ended and not self.manual:
            raise HandlerEndedTransaction(
                f"the handler {self._ended}, so its work could not commit together with the job: leave "
                "the transaction to the worker, use session.begin_nested() for partial rollbacks, or "
                'register the handler with transaction="manual"'
            )

    def completes_by_its_commit(self, transition: object) -> bool:
        """Have the commit carry the completion, where that saves a round trip, and tell whether it does."""
        connection = self._connection
        if (
            transition is not transitions.complete
            or connection is None
            or self._session.twophase
            or len(self.databases) > 1
        ):
            return False
        dialect = dialects.named(connection.dialect.name)
        complete = dialect.completing_commit(connection, self.handling.run.claim)
        if complete is None:
            return False
        _Events(connection, partial(self._complete, complete))
        self._dialect = dialect
        return True

    def _complete(self, complete: Callable[[], None], connection: Connection) -> None:
        """Commit by a statement of ours: what the driver sends next finds no transaction."""
        self.has_completed = True
        try:
            complete()
        except BaseException as error:
            # As for any statement: wrapped, and a connection that broke, or was cancelled at it, leaves the pool.
            connection._handle_dbapi_exception(error, "COMMIT", None, None, None)

    def undo_a_refused_commit(self) -> None:
        """Have a commit roll back when a listener of the engine raises."""
        if self._connection is not None and self._connection.engine._has_events:
            _Events(self._connection, lambda connection: None)

    def is_lease_lost(self, error: BaseException) -> bool:
        return self._dialect is not None and self._dialect.is_lease_lost(error)

    def before_commit(self, session: Session) -> None:
        if self.settling or session.in_nested_transaction():
            return
        if self.manual:
            self._refuse_a_commit_of_the_dead(session)
        else:
            self._ended = "called session.commit()"
            self.check()

    def after_begin(self, connection: Connection) -> None:
        if self._bind is None:
            self._bind = self._session.get_bind(Job)
        self.began_at = self.began_at or time.monotonic()
        self.databases.add(connection.engine)
        # Where the session is bound to a connection that was begun outside, the commit is not the session's.
        if connection.engine is self._bind:
            self._connection = connection
            self.handling.uses(connection)

    def after_end(self) -> None:
        if not self.settling:
            self._ended = self._ended or "called session.rollback() or session.close() and returned"
        self.began_at = self._connection = None

    def _refuse_a_commit_of_the_dead(self, session: Session) -> None:
        if self.handling.interrupted:
            raise RunInterrupted("the run was interrupted: nothing was committed")
        run = self.handling.run
        claim = run.claim
        ours = session.execute(
            select(jobs.c.id)
            .where(
                jobs.c.id == claim.job_id,
                jobs.c.attempt == claim.attempt,
                jobs.c.worker_id == claim.worker_id,
            )
            # A share lock conflicts with the rescue's UPDATE; a key-share lock would not.
            .with_for_update(read=True),
            bind_arguments=TO_JOB,
        )
        if ours.first() is None:
            run.ask_to_stop()
            raise LeaseLost(
                f"job {claim.job_id} belongs to another run by now: nothing was committed"
            )


class _Events:
    """Takes the place of a connection's events until its session returns it: those who listen, and then we.

    A listener at the engine would have SQLAlchemy prepare the events of every statement, for a tenth of what it costs.
    """

    def __init__(self, connection: Any, on_commit: Callable[[Connection], None]) -> None:
        self._others = connection.dispatch
        self._had_events = connection._has_events
        self._on_commit = on_commit
        connection.dispatch = self
        connection._has_events = True

    def commit(self, connection: Connection) -> None:
        try:
            if self._had_events or connection.engine._has_events:
                self._others.commit(connection)
            self._on_commit(connection)
        except BaseException:
            # SQLAlchemy takes a commit that raises for the end of the transaction, and others get the connection.
            if not connection.invalidated:
                with suppress(Exception):
                    connection.connection.rollback()
            raise

    def __getattr__(self, event: str) -> Any:
        return getattr(self._others, event)


def install() -> None:
    """Put the listeners in place, once in a process."""
    if not event.contains(Session, "before_commit", _before_commit):
        event.listen(Session, "before_commit", _before_commit)
        event.listen(Session, "after_begin", _after_begin)
        event.listen(Session, "after_transaction_end", _after_transaction_end)


def _before_commit(session: Session) -> None:
    watch: Watch | None = session.info.get(_KEY)
    if watch is not None:
        watch.before_commit(session)


def _after_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    watch: Watch | None = session.info.get(_KEY)
    if watch is not None:
        watch.after_begin(connection)


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    watch: Watch | None = session.info.get(_KEY)
    if watch is not None and transaction.parent is None:
        watch.after_end()
