"""A TCP proxy between an application and its database server, that cuts connections at chosen moments."""

import random
import select
import socket
import threading
from contextlib import suppress
from typing import Literal

from sqlalchemy import URL

When = Literal["before", "after"]


class Proxy:
    """Forwards to a server; `url` is how to connect through it.

    `cut_commit` makes it drop the next connection that commits after having sent a certain text: before
    the server sees the COMMIT, or after it has answered and before the application hears of it.
    """

    def __init__(self, server: URL) -> None:
        self._server = server
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._armed: tuple[bytes, When, bytes] | None = None
        self.cuts = threading.Semaphore(0)
        self._flowing = threading.Event()
        self._flowing.set()
        self._port = 0
        self.start()

    @property
    def url(self) -> URL:
        # In clear text, so that statements can be recognised; libpq's other side is a Unix socket.
        plain = {"sslmode": "disable", "gssencmode": "disable"} if self._is_postgresql else {}
        url = self._server.set(host="127.0.0.1", port=self._port)
        return url.set(query=plain)

    @property
    def _is_postgresql(self) -> bool:
        return self._server.get_backend_name() == "postgresql"

    def cut_commit(self, of: str, when: When, by: str = "COMMIT") -> None:
        with self._lock:
            self._armed = (of.encode(), when, by.encode())

    def start(self) -> None:
        """Listen; on the same port as before when it was stopped."""
        self._stopped = False
        self._listener = socket.create_server(("127.0.0.1", self._port))
        self._port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def stop(self) -> None:
        """Refuse new connections and drop the present ones, as a server that goes away does."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            self._stopped = True
            connections = list(self._connections)
        for each in connections:
            _drop(each)

    def cut(self) -> None:
        """Drop one connection, at random."""
        with self._lock:
            connections = list(self._connections)
        if connections:
            _drop(random.choice(connections))

    def hold(self, seconds: float) -> None:
        """Let nothing through for a while."""
        self._flowing.clear()
        threading.Timer(seconds, self._flowing.set).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _connect(self) -> socket.socket:
        folder = self._server.query.get("host")
        if isinstance(folder, str) and folder.startswith("/"):
            server = socket.socket(socket.AF_UNIX)
            server.connect(f"{folder}/.s.PGSQL.{self._server.port or 5432}")
            return server
        default = 5432 if self._is_postgresql else 3306
        return socket.create_connection(
            (self._server.host or "127.0.0.1", self._server.port or default)
        )

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError), self._connect() as server:
            with self._lock:
                late = self._stopped  # it was accepted a moment before
                self._connections |= {client, server}
            try:
                if not late:
                    self._forward(client, server)
            finally:
                for each in (client, server):
                    _drop(each)
                with self._lock:
                    self._connections -= {client, server}

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        marked = False
        while True:
            readable, _, _ = select.select([client, server], [], [])
            self._flowing.wait()
            if server in readable:
                client.sendall(_received(server))
            if client in readable:
                data = _received(client)
                with self._lock:
                    armed = self._armed
                    marked = marked or (armed is not None and armed[0] in data)
                    cut = armed if armed and marked and armed[2] in data else None
                    if cut:
                        self._armed = None
                if cut and cut[1] == "before":
                    self.cuts.release()
                    return
                server.sendall(data)
                if cut:
                    _received(server)  # it has committed
                    self.cuts.release()
                    return


def _received(from_: socket.socket) -> bytes:
    data = from_.recv(65536)
    if not data:
        raise ConnectionError
    return data


def _drop(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
