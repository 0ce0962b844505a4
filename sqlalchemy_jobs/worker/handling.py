"""Where the handler's own part of a run begins and ends: that much may be interrupted, and nothing else.

What a handler's thread is told from outside (that its statement is cancelled, an exception) must never reach
our own code, which writes down how the run ended, nor another run that uses the connection next. So it is
told under a lock, only while the thread is inside, and once. To go out takes the lock, too. Whoever comes out
interrupted raises: what the handler returned does not count any more, whether it noticed or not.
"""

from __future__ import annotations

import ctypes
import logging
import math
import sys
import threading
import time
import traceback
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any

from sqlalchemy import Connection, event
from sqlalchemy.pool import ConnectionPoolEntry

from sqlalchemy_jobs.errors import RunInterrupted
from sqlalchemy_jobs.runs import Run
from sqlalchemy_jobs.worker.control import Control

log = logging.getLogger("sqlalchemy_jobs")

_KEY = "sqlalchemy_jobs.handling"
_listening = threading.Lock()
_NOBODY = ()
"""Uses a connection whose check-ins are listened to: to ask SQLAlchemy costs more than the rest."""


class Handling(ABC):
    """The handler's part of one run: ``with handling:`` is around it."""

    __slots__ = ("_inside", "_lock", "deadline", "interrupted", "run")

    def __init__(self, run: Run) -> None:
        self.run = run
        self.deadline = math.inf
        """Until when it may take (monotonic seconds)."""
        self.interrupted = False
        self._inside = False
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            if not self.interrupted and self.is_overdue:
                self._note(timed_out=True)
            inside = self._inside = not self.interrupted
        # Decided under the lock: who is told from here on is told inside, and is on the way in.
        if not inside:
            raise RunInterrupted("interrupted before the handler was called")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        # An exception that is on its way may come here as well: then it is not on its way any more.
        with self._lock:
            self._inside = False
            self._withdraw()
        if self.interrupted and not self._is_it(error):
            raise RunInterrupted("the handler went on after it had been interrupted")

    @property
    def is_overdue(self) -> bool:
        return time.monotonic() >= self.deadline

    def interrupt(self, *, timed_out: bool) -> bool:
        """Tell the handler, if it is at work and was not told before, that its work is in vain."""
        with self._lock:
            if not self._inside or self.interrupted:
                return False
            self._note(timed_out)
            self._reach()
        return True

    def _note(self, timed_out: bool) -> None:
        self.interrupted = True
        if timed_out:
            self.run.time_out()
        else:
            self.run.ask_to_stop()

    @abstractmethod
    def _reach(self) -> None:
        """Make the handler notice."""

    @abstractmethod
    def _withdraw(self) -> None:
        """Take back what has not reached the handler."""

    @abstractmethod
    def _is_it(self, error: BaseException | None) -> bool:
        """Tell whether this is what ``_reach`` made of the handler."""

    @abstractmethod
    def uses(self, connection: Connection) -> None:
        """Take note of a connection on which the handler's statements run."""

    def is_cancellation(self, error: BaseException, run: Run) -> bool:
        """Tell whether this came out of a run since it was cancelled from outside: by the worker, or with its loop."""
        return False

    def where(self) -> str | None:
        """Return the stack of a handler that hangs, if it can be seen."""
        return None


class ThreadHandling(Handling):
    """On a thread: its statement is cancelled at the server, and an exception raised in the thread."""

    __slots__ = ("_cancellable", "_control", "_thread")

    def __init__(self, run: Run, control: Control) -> None:
        super().__init__(run)
        self._control = control
        self._thread = threading.get_ident()
        self._cancellable: list[Any] = []

    def uses(self, connection: Connection) -> None:
        info = connection.info
        if user := info.get(_KEY):
            return
        # A handler may give its connection back while it is at work, for another run to take.
        if user is None:
            pool = connection.engine.pool
            with _listening:
                if not event.contains(pool, "checkin", _left):
                    event.listen(pool, "checkin", _left)
        cancellable = self._control.dialect.cancellable(connection)
        with self._lock:
            self._cancellable.append(cancellable)
        info[_KEY] = (self, cancellable)

    def leaves(self, cancellable: Any) -> None:
        with self._lock:
            self._cancellable.remove(cancellable)

    def _reach(self) -> None:
        for each in self._cancellable:
            try:
                self._control.dialect.cancel_statement(each, self._control.transaction)
            except Exception as error:
                log.debug("%r: its statement could not be cancelled: %s", self.run, error)
        _raise_in(self._thread, RunInterrupted)

    def _withdraw(self) -> None:
        if self.interrupted:
            _raise_in(self._thread, None)

    def _is_it(self, error: BaseException | None) -> bool:
        return isinstance(error, RunInterrupted)

    def where(self) -> str | None:
        frame = sys._current_frames().get(self._thread)
        return "".join(traceback.format_stack(frame)) if frame else None


def _left(connection: Any, entry: ConnectionPoolEntry) -> None:
    if user := entry.info.get(_KEY):
        entry.info[_KEY] = _NOBODY
        handling, cancellable = user
        handling.leaves(cancellable)


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Raise an exception in a thread at its next step in Python; None takes back what is not raised yet."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), None if error is None else ctypes.py_object(error)
    )
