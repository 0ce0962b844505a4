"""PostgreSQL's LISTEN, by each of the drivers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, text
from sqlalchemy.util import await_only

from sqlalchemy_jobs.dialects.sessions import Ear
from sqlalchemy_jobs.inserts import CHANNEL
from sqlalchemy_jobs.tables import jobs, schema_of

CHANNEL_OF_TABLE = f"'{CHANNEL}' || CAST(CAST(to_regclass(CAST(:table AS text)) AS oid) AS text)"
_CHANNEL = text(f"SELECT {CHANNEL_OF_TABLE}")


def table_of(schema: str | None) -> str:
    """Return the name of the table of jobs as ``to_regclass`` reads it."""
    quoted = [name.replace('"', '""') for name in (schema, jobs.name) if name is not None]
    return ".".join(f'"{name}"' for name in quoted)


class Listening(Ear):
    """LISTEN, in a session in autocommit: in a transaction nothing would arrive."""

    def __init__(
        self, connection: Connection, rung: Callable[[str], None], ended: Callable[[], None]
    ) -> None:
        self._channel = _channel(connection)
        self._driver: Any = connection.connection.driver_connection
        self._rung = rung
        if self._driver is None or self._channel is None:
            raise LookupError("the tables are not there")
        if hasattr(self._driver, "add_listener"):  # asyncpg
            await_only(self._driver.add_listener(self._channel, self._on_asyncpg))
            self._driver.add_termination_listener(lambda driver: ended())
            return
        if hasattr(self._driver, "add_notify_handler"):  # psycopg: what comes with other answers
            self._driver.add_notify_handler(lambda notify: rung(notify.payload))
        elif not hasattr(self._driver, "notifies"):  # psycopg2 has a list of that name
            raise LookupError(f"{type(self._driver).__module__} cannot wait for notifications")
        connection.exec_driver_sql(f"LISTEN {self._channel}")

    @property
    def socket(self) -> int | None:
        return None if hasattr(self._driver, "add_listener") else self._driver.fileno()

    def take_in(self) -> None:
        if hasattr(self._driver, "pgconn"):
            # Not by notifies(), which the async psycopg has in a form of its own.
            self._driver.pgconn.consume_input()
            while (notify := self._driver.pgconn.notifies()) is not None:
                self._rung(notify.extra.decode())
        elif hasattr(self._driver, "poll"):
            self._driver.poll()
            while self._driver.notifies:
                self._rung(self._driver.notifies.pop().payload)
        elif self._driver.is_closed():
            raise ConnectionError("the session has ended")

    def check(self, connection: Connection) -> None:
        if _channel(connection) != self._channel:
            raise LookupError("the tables were made anew")
        self.take_in()

    def _on_asyncpg(self, connection: Any, pid: int, channel: str, queue: str) -> None:
        self._rung(queue)


def _channel(connection: Connection) -> str | None:
    channel: str | None = connection.scalar(_CHANNEL, {"table": table_of(schema_of(connection))})
    return channel
