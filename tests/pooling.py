"""PgBouncer in front of a server."""

import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import URL

from tests.proxy import Proxy
from tests.waiting import until


@contextmanager
def pooled(program: str, url: URL) -> Iterator[URL]:
    """Start one in transaction mode; return the address of what is behind it."""
    server = Proxy(url)  # it listens on TCP
    login = f"user={server.url.username or 'postgres'}"
    if server.url.password:
        login += f" password={server.url.password}"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "ini").write_text(
            f"[databases]\n* = host=127.0.0.1 port={server.url.port} {login}\n[pgbouncer]\n"
            f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
            "auth_type = any\npool_mode = transaction\nserver_tls_sslmode = disable\n"
        )
        user = {"user": "nobody"} if os.geteuid() == 0 else {}  # it refuses to run as root
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen([program, folder / "ini"], stderr=log, **user)  # type: ignore[call-overload]
        try:
            until(lambda: "process up" in (folder / "log").read_text())
            yield server.url.set(port=port)
        finally:
            process.terminate()
            process.wait(20)
            server.stop()
