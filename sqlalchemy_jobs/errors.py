"""Every error and warning that this library raises.

    JobsError
    ├── DeclarationError            a class, handler or app was declared wrongly (at import)
    │   ├── DuplicateKind           two classes claim one kind in one app
    │   ├── DuplicateHandler        two handlers for one kind
    │   ├── DuplicateSchedule       two schedules of one name
    │   └── ScheduleError           a cron line, a zone or an option of a schedule makes no sense
    ├── EnqueueError                a job could not be made (in the caller's stack)
    │   └── PayloadError            the payload cannot be stored, or not read back as it was
    ├── DuplicateJob                another job has the unique key (at the flush, and in requeue)
    ├── ControlError                a queue or a kind cannot be set like this
    ├── ConfigurationError          a worker, or a command, cannot start like this
    │   ├── AppError                ``--app`` does not lead to a JobApp
    │   ├── MissingSessions         a handler's colour has no session factory
    │   ├── EngineError             the engine cannot keep the promise (AUTOCOMMIT, two-phase, ...)
    │   ├── TablesMissing           the tables are not in the database
    │   ├── TablesOutdated          they are older than this release needs, or half migrated
    │   ├── TablesTooNew            a later release took away what this one needs
    │   ├── MigrationError          a migration cannot be done
    │   └── UnsupportedServer       the database server is too old
    └── RunError                    something about one run
        ├── InvalidPayload          the stored payload no longer decodes
        ├── ResultError             the handler returned something that cannot be stored, or not one entry each
        ├── HandlerEndedTransaction the handler ended the transaction that was to carry its work
        ├── HandlerChangedItsJob    the handler changed the row of the job it was running
        ├── LeaseLost               the job belongs to another run by now: this one wrote nothing
        └── NoCurrentRun            current_run() outside a run

    RunInterrupted (BaseException)  raised in a handler's thread: its time is over, or the worker stops

    JobNeverAdded (warning)         a job was made and dropped without being added to a session

Each message says what was found, what was wanted and what to do; the data is in attributes where
a program may want it.
"""

from __future__ import annotations

import uuid


class JobsError(Exception):
    """Base of every error of this library."""


class DeclarationError(JobsError, TypeError):
    """A payload class, a handler or an app is declared wrongly."""


class DuplicateKind(DeclarationError):
    """Two payload classes of one app have the same kind."""


class DuplicateHandler(DeclarationError):
    """A kind has two handlers in one app."""


class DuplicateSchedule(DeclarationError):
    """Two schedules of one app have the same name."""


class ScheduleError(DeclarationError, ValueError):
    """A schedule is declared wrongly: its cron line, its time zone or another option of it.

    ``position`` is the index in the cron line at which the fault begins; None where it is in no single place.
    """

    def __init__(self, message: str, *, position: int | None = None) -> None:
        super().__init__(message)
        self.position = position


class EnqueueError(JobsError, ValueError):
    """A job could not be made from what was given."""


class PayloadError(EnqueueError):
    """The payload cannot be stored, or would not be read back as it was.

    ``path`` names the field, for example ``SendReceipt.lines[2].price``.
    """

    def __init__(self, message: str, *, path: str) -> None:
        super().__init__(message)
        self.path = path


class DuplicateJob(JobsError):
    """Another job has the unique key, so this one cannot wait or run beside it.

    ``key`` is the key, ``other`` the id of the job that has it; None when that job was not to be seen.
    """

    def __init__(self, message: str, *, key: str, other: uuid.UUID | None) -> None:
        super().__init__(message)
        self.key = key
        self.other = other


class ControlError(JobsError, ValueError):
    """What was said about a queue, a kind or a schedule at run time makes no sense; nothing was changed."""


class ConfigurationError(JobsError):
    """A worker or a command cannot start like this; nothing was changed."""


class AppError(ConfigurationError):
    """The name given by ``--app`` does not lead to a JobApp."""


class MissingSessions(ConfigurationError):
    """A handler is sync or async, and the app has no session factory of that colour."""


class EngineError(ConfigurationError):
    """The engine behind the sessions cannot keep the promise of one transaction per run."""


class TablesMissing(ConfigurationError):
    """The library's tables are not in the database."""


class TablesOutdated(ConfigurationError):
    """The tables are older than this release needs, or a migration of them was interrupted."""


class TablesTooNew(ConfigurationError):
    """A later release of the library took away what this one needs."""


class MigrationError(ConfigurationError):
    """A migration cannot be done; nothing was changed."""


class UnsupportedServer(ConfigurationError):
    """The database server is older than the oldest that works."""


class RunError(JobsError):
    """Something went wrong with one run of a job."""


class InvalidPayload(RunError):
    """The stored payload no longer decodes into its class.

    Raised inside the run, before the handler is called; the job is retried, since the next deploy
    may mend it.
    """


class ResultError(RunError):
    """The handler returned something that cannot be stored as JSON, or a batch handler not one entry per payload."""


class HandlerEndedTransaction(RunError):
    """The handler committed, rolled back or closed the session that was to carry its work.

    The work and the mark "succeeded" commit together, so the worker ends the transaction. Use
    ``session.begin_nested()`` for partial rollbacks, or ``transaction="manual"`` for a handler
    that must commit on its own.
    """


class HandlerChangedItsJob(RunError):
    """The handler changed state, attempt or worker_id of the job that it was running; its work was rolled back."""


class LeaseLost(RunError):
    """The job belongs to another run by now; nothing of this run was written."""


class NoCurrentRun(RunError, LookupError):
    """There is no run here.

    ``current_run()`` works inside a handler and in what it calls or awaits, also through
    ``asyncio.to_thread``; a thread that the handler starts itself does not inherit it. In a batch handler it is
    ``current_runs()``.
    """


class RunInterrupted(BaseException):
    """The handler's time is over, or the worker stops; whatever it returns or raises now is rolled back.

    Raised in the thread of a ``def`` handler, wherever it is, once the call into C that it may be waiting in
    has returned. It is no Exception, so that ``except Exception`` does not swallow it; one that must
    clean up catches it and raises it again. An ``async def`` handler gets ``asyncio.CancelledError``.
    """


class JobNeverAdded(RuntimeWarning):
    """A job was made by ``enqueue`` and dropped without having been added to a session."""
