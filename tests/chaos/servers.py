"""Servers of our own, that may be restarted, and the connections to them that may be ended."""

import getpass
import shutil
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from pathlib import Path

from sqlalchemy import URL, create_engine, make_url, text
from sqlalchemy.pool import NullPool

from tests.databases import EmbeddedPostgres


class Server(ABC):
    """What keeps a database."""

    url: URL

    @abstractmethod
    def close(self) -> None: ...


class Remote(Server):
    """A server, and a database in it."""

    @abstractmethod
    def restart(self) -> None:
        """Stop it as a restart in production does, and start it again."""

    @abstractmethod
    def end_connection(self) -> None:
        """End one connection of a client, at random."""

    def execute(self, *statements: str) -> None:
        engine = create_engine(self.url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
        with engine.connect() as connection:
            for statement in statements:
                connection.execute(text(statement))


class PostgreSQL(Remote):
    def __init__(self) -> None:
        self._server = EmbeddedPostgres()
        self.url = self._server.url
        self.execute("CREATE DATABASE chaos")
        self.url = self.url.set(database="chaos")

    def restart(self) -> None:
        self._server.restart()

    def end_connection(self) -> None:
        self.execute(
            "SELECT pg_terminate_backend(pid) FROM (SELECT pid FROM pg_stat_activity WHERE datname = 'chaos' "
            "AND pid <> pg_backend_pid() ORDER BY random() LIMIT 1) victim"
        )

    def close(self) -> None:
        self._server.close()


class MariaDB(Remote):
    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="sajobs-"))
        self._port = _free_port()
        subprocess.run(
            [
                "mariadb-install-db",
                "--no-defaults",
                f"--datadir={self._folder}/db",
                f"--user={getpass.getuser()}",
                "--auth-root-authentication-method=normal",
                "--skip-test-db",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.url = make_url(f"mysql+pymysql://root@127.0.0.1:{self._port}/")
        self._start()
        self.execute("CREATE DATABASE chaos CHARACTER SET utf8mb4")
        self.url = self.url.set(database="chaos")

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [
                "mariadbd",
                "--no-defaults",
                f"--user={getpass.getuser()}",
                f"--datadir={self._folder}/db",
                f"--socket={self._folder}/socket",
                "--bind-address=127.0.0.1",
                f"--port={self._port}",
                "--default-time-zone=+05:45",
                "--max-connections=300",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _wait_for_port(self._port)

    def restart(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._start()

    def end_connection(self) -> None:
        engine = create_engine(self.url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
        with engine.connect() as connection:
            victim = connection.scalar(
                text(
                    "SELECT id FROM information_schema.processlist WHERE db = 'chaos' AND id <> connection_id() "
                    "ORDER BY rand() LIMIT 1"
                )
            )
            if victim is not None:
                connection.exec_driver_sql(f"KILL {int(victim)}")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        shutil.rmtree(self._folder)


class SQLite(Server):
    """A file: nothing to restart, no connections to end."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="sajobs-"))
        self.url = URL.create("sqlite+pysqlite", database=str(self._folder / "chaos.sqlite"))

    def close(self) -> None:
        shutil.rmtree(self._folder)


SERVERS: dict[str, type[Server]] = {"postgresql": PostgreSQL, "mysql": MariaDB, "sqlite": SQLite}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _wait_for_port(port: int) -> None:
    until = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
        else:
            return
