"""`examples/quickstart`: what `make demo` runs, and that its audit can fail."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import URL, create_engine, inspect

from tests.databases import Database
from tests.processes import ended

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
OK = (
    "OK: each of the 368 valid orders has exactly one receipt_sent_at, "
    "and none of the 32 rolled-back orders has a job"
)


def command(*options: str) -> list[str]:
    return [sys.executable, str(QUICKSTART / "demo.py"), *options]


def demo(folder: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    """Run the demo to its end, with its temporary folder in `folder`."""
    return subprocess.run(
        command(*options),
        env={**os.environ, "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=240,
    )


def in_full(url: URL) -> str:
    return url.render_as_string(hide_password=False)


def tables(url: URL) -> list[str]:
    engine = create_engine(url)
    try:
        return inspect(engine).get_table_names()
    finally:
        engine.dispose()


@pytest.mark.parametrize("empty_database", ["postgresql", "mysql"], indirect=True)
def test_on_a_server(empty_database: Database, tmp_path: Path) -> None:
    result = demo(tmp_path, "--database-url", in_full(empty_database.url))

    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == OK
    assert tables(empty_database.url) == []
    assert list(tmp_path.iterdir()) == []


# --- on SQLite; what it kept is then tampered with ------------------------------------------------


@dataclass(frozen=True)
class Kept:
    output: str
    folder: Path

    def execute(self, sql: str) -> None:
        with closing(sqlite3.connect(self.folder / "shop.sqlite")) as connection, connection:
            assert connection.execute(sql).rowcount == 1

    def audit(self) -> tuple[int, str]:
        """Its exit status, and what it printed."""
        url = f"sqlite:///{self.folder / 'shop.sqlite'}"
        return ended(
            *("-m", "shop.audit", "orders.csv", str(self.folder / "mails")),
            cwd=QUICKSTART,
            env={"SHOP_DATABASE_URL": url},
        )


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    folder = tmp_path_factory.mktemp("quickstart")
    result = demo(folder, "--keep")
    assert result.returncode == 0, result.stdout + result.stderr
    [kept] = folder.iterdir()
    return Kept(result.stdout, kept)


@pytest.fixture
def kept(original: Kept, tmp_path: Path) -> Kept:
    """A copy of what the demo left."""
    copy = tmp_path / "kept"
    shutil.copytree(original.folder, copy)
    return Kept(original.output, copy)


def test_on_sqlite(original: Kept) -> None:
    lines = original.output.splitlines()
    rows = [line.split() for line in lines]

    assert lines[-1] == OK
    for row in ("orders in the file 400", "taken 368", "jobs succeeded 368", "jobs failed 0"):
        assert row.split() in rows
    # It was killed between mail and commit, so one mail at least was sent again.
    assert any("sent again after the kill" in line for line in lines)
    assert any(line.startswith("$ kill -KILL ") for line in lines)


def test_the_audit_passes_what_nobody_tampered_with(kept: Kept) -> None:
    status, printed = kept.audit()
    assert (status, printed.splitlines()[-1]) == (0, OK)


SOME = "(SELECT min(number) FROM shop_order)"


@pytest.mark.parametrize(
    ("sql", "found"),
    [
        pytest.param(
            f"UPDATE shop_order SET receipt_sent_at = NULL WHERE number = {SOME}",
            "order 10001 of wim.weiss@example.org has no receipt_sent_at",
            id="not-marked",
        ),
        pytest.param(
            f"UPDATE shop_order SET receipts_marked = 2 WHERE number = {SOME}",
            "the receipt of order 10001 of wim.weiss@example.org was marked 2 times",
            id="marked-twice",
        ),
        pytest.param(
            f"DELETE FROM shop_order WHERE number = {SOME}",
            "order 10001 of wim.weiss@example.org is valid, and is not in the database",
            id="order-lost",
        ),
        pytest.param(
            "DELETE FROM sajobs_job WHERE json_extract(payload, '$.order') = 10001",
            "order 10001 of wim.weiss@example.org has 0 jobs",
            id="job-lost",
        ),
        pytest.param(
            "UPDATE sajobs_job SET state = 'failed' WHERE id = (SELECT min(id) FROM sajobs_job)",
            "is failed",
            id="job-failed",
        ),
    ],
)
def test_the_audit_fails_on_a_tampered_database(kept: Kept, sql: str, found: str) -> None:
    kept.execute(sql)

    status, printed = kept.audit()

    assert status == 1
    assert found in printed
    assert printed.splitlines()[-1].startswith("FAILED: ")


def test_the_audit_fails_on_a_job_of_a_rolled_back_order(kept: Kept) -> None:
    rolled_back = next(
        line.split(",")
        for line in (QUICKSTART / "orders.csv").read_text(encoding="utf-8").splitlines()
        if line.endswith("not in stock")
    )
    number, _, email, *_ = rolled_back
    kept.execute(
        f"UPDATE sajobs_job SET payload = json_set(payload, '$.order', {number}, '$.email', '{email}')"
        " WHERE json_extract(payload, '$.order') = 10001"
    )

    status, printed = kept.audit()

    assert status == 1
    assert (
        f"order {number} of {email} was to be rolled back (not in stock), and has a job" in printed
    )


def test_the_audit_fails_on_a_lost_mail(kept: Kept) -> None:
    mails = list((kept.folder / "mails" / "new").iterdir())
    # Two copies of one mail: removing both is what loses it.
    [id_] = [line for line in mails[0].read_text().splitlines() if line.startswith("Message-ID")]
    for mail in mails:
        if id_ in mail.read_text():
            mail.unlink()

    status, printed = kept.audit()

    assert status == 1
    assert "no mail was received for job" in printed


# --- what must not happen -------------------------------------------------------------------------


def test_tables_that_exist_are_left_alone(sqlite: Database, tmp_path: Path) -> None:
    before = tables(sqlite.url)

    result = demo(tmp_path, "--database-url", in_full(sqlite.url))

    assert result.returncode == 2
    assert "give the shop a new, empty database" in result.stderr
    assert tables(sqlite.url) == before


def test_interrupted_it_cleans_up(tmp_path: Path) -> None:
    database, folder = tmp_path / "shop.sqlite", tmp_path / "temporary"
    folder.mkdir()
    with subprocess.Popen(
        command("--database-url", f"sqlite:///{database}"),
        env={**os.environ, "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if line.startswith("$ kill -KILL "))
        process.send_signal(signal.SIGTERM)
        *_, last = process.stdout
        status = process.wait(90)

    assert (status, last) == (130, "interrupted\n")
    assert tables(URL.create("sqlite", database=str(database))) == []
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "'nonsense' is no URL of a database"),
        ("oracle://host/name", "oracle is not supported"),
        ("sqlite://", "it names no database that several processes can share"),
        ("sqlite+aiosqlite:///shop.sqlite", "aiosqlite is asynchronous"),
        ("postgresql+psycopg://127.0.0.1:1/name", "cannot be reached"),
    ],
)
def test_an_unusable_url_is_refused(url: str, message: str, tmp_path: Path) -> None:
    result = demo(tmp_path, "--database-url", url)

    assert result.returncode in (1, 2)
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []
