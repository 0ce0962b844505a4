"""Whether the database can be reached, told once when it changes."""

from __future__ import annotations

import logging
import math
import sqlite3
import threading
import time

from sqlalchemy import exc as sa_exc

log = logging.getLogger("sqlalchemy_jobs")


TOLD_EVERY = 60.0
"""Seconds between two words about the same outage, with its latest error."""


class Availability:
    """Tells once that the database went away, and once that it is back.

    Several threads ask the database at the same time. What one asked before the last change says nothing of
    now, however late it hears the answer.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.away = False
        self.losses = 0
        """How many connections were lost so far: after each, the worker reconciles."""
        self._told_at = 0.0
        self._changed_at = -math.inf

    def broke(self, error: BaseException) -> None:
        """Take note of a connection that broke; whether the database is away will be seen at the next."""
        with self._lock:
            self.losses += 1
        log.debug("a connection was lost: %s", brief(error))

    def lost(self, error: BaseException, asked_at: float) -> None:
        """Take note of a connection that broke or could not be made; told once a minute."""
        if isinstance(error, sa_exc.DBAPIError) and error.connection_invalidated:
            self.broke(error)
            return
        now = time.monotonic()
        with self._lock:
            self.losses += 1
            if asked_at < self._changed_at:
                return
            tell = not self.away or now - self._told_at >= TOLD_EVERY
            if not self.away:
                self.away, self._changed_at = True, now
            self._told_at = now if tell else self._told_at
        if tell:
            log.warning("the database is away, trying again until it is back: %s", brief(error))

    def reached(self, asked_at: float) -> None:
        """Take note of an answer."""
        if self.away:
            with self._lock:
                back = self.away and asked_at >= self._changed_at
                if back:
                    self.away, self._changed_at = False, time.monotonic()
            if back:
                log.warning("the database is back")


# SQLSTATE classes: connection, insufficient resources, operator intervention, authorisation, no such database.
_SQLSTATES = ("08", "53", "57P", "28", "3D")
# MySQL's own codes beside the client's, 2000 to 2999: too many connections, access denied, no such database,
# shutdown, host blocked. PyMySQL says 0 for a connection that is closed.
_MYSQL = (0, 1040, 1044, 1045, 1049, 1053, 1129, 1130, 1203)
_SQLITE = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR)


def is_lost(error: BaseException) -> bool:
    """Tell whether an error says that the database cannot be reached, and not that it refused something."""
    if isinstance(error, sa_exc.DBAPIError):
        if error.connection_invalidated:
            return True
        if not isinstance(error, (sa_exc.OperationalError, sa_exc.InterfaceError)):
            return False
        return _cannot_be_reached(error.orig)
    # asyncpg's errors of connecting are not wrapped by SQLAlchemy.
    of_asyncpg = type(error).__module__.startswith("asyncpg.")
    return isinstance(error, (OSError, sa_exc.TimeoutError)) or (
        of_asyncpg and _cannot_be_reached(error)
    )


def _cannot_be_reached(error: BaseException | None) -> bool:
    if (code := getattr(error, "sqlite_errorcode", None)) is not None:
        return code & 0xFF in _SQLITE
    if sqlstate := getattr(error, "sqlstate", None):
        return str(sqlstate).startswith(_SQLSTATES)
    first = error.args[0] if error and error.args else None
    if isinstance(first, int):
        return first in _MYSQL or 2000 <= first < 3000
    return True  # psycopg: no server, no SQLSTATE


def brief(error: BaseException) -> str:
    """Return the first line of an error, without SQLAlchemy's background links."""
    original = getattr(error, "orig", None) or error
    lines = str(original).strip().splitlines() or [""]
    return f"{type(original).__name__}: {lines[0]}"
