"""Waits for the bell."""

from __future__ import annotations

import logging
import selectors
import socket
from collections.abc import Callable
from contextlib import suppress

from sqlalchemy import Connection, select

from sqlalchemy_jobs.dialects.sessions import Ear, SessionLocks
from sqlalchemy_jobs.inserts import SCHEDULES
from sqlalchemy_jobs.worker.availability import brief, is_lost
from sqlalchemy_jobs.worker.control import Control
from sqlalchemy_jobs.worker.loops import SHORTEST_PAUSE
from sqlalchemy_jobs.worker.wakeup import Wakeup

log = logging.getLogger("sqlalchemy_jobs")

CHECK = 30.0
"""Seconds after which a silent session is asked whether it is still there."""


class Listener:
    """The step of a loop: hears the bell in a session of its own, and calls ``rung`` with the queue.

    Where that cannot be, the worker polls: behind a pooler notifications would reach some other client.
    """

    def __init__(
        self,
        control: Control,
        ear: type[Ear],
        locks: SessionLocks,
        serves: Callable[[str], bool],
        wakeup: Wakeup,
        rung: Callable[[str], None],
        rescheduled: Callable[[], None],
    ) -> None:
        self._control = control
        self._make_ear = ear
        self._locks = locks
        self._serves = serves
        self._wakeup = wakeup
        self._rung = rung
        self._rescheduled = rescheduled
        self._ear: Ear | None = None
        self._stopped = False
        self._nudged, self._nudges = socket.socketpair()
        self._selector = selectors.DefaultSelector()

    def step(self) -> float | None:
        try:
            if self._ear is None:
                self._ear = self._control.on_kept_connection(self._begin)
                self._watch(self._ear)
                self._wakeup.hears(True)
            self._wait(self._ear)
        except Exception as error:
            had_begun, self._ear = self._ear is not None, None
            self._control.drop_kept_connection()
            if self._stopped:
                return None
            self._wakeup.hears(False)
            if had_begun:
                log.debug("the bell is not heard, listening anew: %s", brief(error))
                return SHORTEST_PAUSE
            if is_lost(error):
                raise
            log.info("no bell is heard, so the worker polls: %s", brief(error))
            return None
        return None if self._stopped else 0.0

    def stop(self) -> None:
        """End the present step."""
        self._stopped = True
        self._nudge()

    def close(self) -> None:
        """End the session."""
        self._control.close()
        self._selector.close()
        self._nudged.close()
        self._nudges.close()

    def _begin(self, connection: Connection) -> Ear:
        session = connection.scalar(select(self._locks.session))
        if session != self._locks.session_of(connection.connection.driver_connection):
            raise LookupError("a pooler is between, or the driver does not tell its session")
        return self._make_ear(connection, self._on_ring, self._nudge)

    def _watch(self, ear: Ear) -> None:
        """Wait for this one from now on. Not made anew for each wait: who is woken would have to wait for that."""
        self._selector.close()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._nudged, selectors.EVENT_READ)
        if (heard := ear.socket) is not None:
            self._selector.register(heard, selectors.EVENT_READ)

    def _wait(self, ear: Ear) -> None:
        has_come = [key.fileobj for key, _ in self._selector.select(CHECK)]
        if self._nudged in has_come:
            self._nudged.recv(1)
        if self._stopped:
            return
        if has_come:
            self._control.on_kept_connection(lambda connection: ear.take_in())
        else:
            self._control.on_kept_connection(ear.check)

    def _nudge(self) -> None:
        """Cut the wait short."""
        with suppress(OSError):  # it is closed
            self._nudges.send(b"x")

    def _on_ring(self, queue: str) -> None:
        if queue == SCHEDULES:
            self._rescheduled()
        elif not queue or self._serves(queue):
            self._rung(queue)
