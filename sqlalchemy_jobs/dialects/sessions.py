"""What belongs to a session of the server: locks that end with it, and an ear for the bell."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import datetime
from typing import Any, ClassVar

from sqlalchemy import ColumnElement, Connection, Executable


class SessionLocks(ABC):
    """Locks that belong to a session of the server, which frees them when the session's client is gone."""

    limits: ClassVar[Executable]
    """Ends the session after ``seconds`` without a statement, or when its client does not answer."""
    session: ClassVar[ColumnElement[int]]
    """The number of the session, as the server says it."""
    server_start: ClassVar[ColumnElement[datetime]]
    """When this server was started: its locks of before are gone."""
    is_free: ClassVar[ColumnElement[bool]]
    """Whether nobody holds the lock of a worker, by its row."""

    @abstractmethod
    def session_of(self, driver: Any) -> int | None:
        """Return the number of the session as the driver was told when it connected; None: it does not say."""

    @abstractmethod
    def take(self, worker_id: uuid.UUID) -> ColumnElement[bool]:
        """Take a worker's lock, without waiting for it."""


class Ear(ABC):
    """A session that the server tells of new jobs. Its connection must stay open, and is used for nothing else."""

    @abstractmethod
    def __init__(
        self, connection: Connection, rung: Callable[[str], None], ended: Callable[[], None]
    ) -> None:
        """Begin. ``rung`` will be called with a queue, or with "" for any; ``ended`` when the session has ended, where
        there is no socket that says so. Both perhaps in another thread.
        """

    @property
    @abstractmethod
    def socket(self) -> int | None:
        """What becomes readable when there is something to take in; None: that happens by itself."""

    @abstractmethod
    def take_in(self) -> None:
        """Call ``rung`` for what has come. Raises what the driver does when the session has ended."""

    @abstractmethod
    def check(self, connection: Connection) -> None:
        """Raise when the session has ended or does not hear of these tables any more."""
