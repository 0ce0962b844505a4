"""`sajobs queues` and `sajobs kinds`, as a person calls them."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import select

from sqlalchemy_jobs import JobApp, Queue, enqueue, job
from sqlalchemy_jobs.cli import main
from sqlalchemy_jobs.cli.listing import laid_out
from tests.databases import Database
from tests.waiting import until

Sajobs = Callable[..., Result]


@job("letter")
@dataclass(frozen=True)
class Letter:
    n: int = 0


@pytest.fixture
def sajobs(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sajobs:
    """Call `sajobs` with the database of the test, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAJOBS_DATABASE_URL", database.url.render_as_string(hide_password=False))
    return lambda *arguments: CliRunner().invoke(main, arguments)


def rows(result: Result) -> dict[str, dict[str, str]]:
    """What a table says: by the first word of each row, the others by their heading."""
    assert result.exit_code == 0, result.output
    heading, *lines = result.stdout.splitlines()
    names = [each.strip() for each in heading.split("  ") if each.strip()]
    starts = [heading.index(name) for name in names] + [None]
    cells = [[line[a:b].strip() for a, b in pairwise(starts)] for line in lines]
    return {row[0]: dict(zip(names[1:], row[1:], strict=True)) for row in cells}


def test_the_queues_are_listed_with_what_waits_and_who_serves_them(
    database: Database, sajobs: Sajobs
) -> None:
    app: JobApp[Any, Any] = JobApp(database.sessions())
    app.handler(Letter)(lambda session, payload: None)
    with database.session.begin() as session:
        session.add(enqueue(Letter(), queue="bulk"))
        session.add(Queue(name="odd", strategy="foo", concurrency=3, rate="5/minute"))
        session.add(Queue(name="old", ageing=90.0, paused=True))
    with app.worker(queues=["mail.eu", "mail.*", "old"]):
        until(lambda: "mail.eu" in sajobs("queues").stdout, 60)
        found = rows(listed := sajobs("queues"))
        kinds = rows(sajobs("kinds"))
    (worker,) = {found["mail.eu"]["WORKERS"], found["old"]["WORKERS"], kinds["letter"]["WORKERS"]}
    assert ":" in worker
    assert list(found) == ["bulk", "mail.eu", "odd", "old"]
    assert found["bulk"] == {
        "READY": "1", "RUNNING": "0", "LATER": "0", "PAUSED": "-", "AT ONCE": "-", "RATE": "-",
        "ORDER": "priority", "WORKERS": "-",
    }  # fmt: skip
    assert found["old"] | {"PAUSED": "yes", "ORDER": "priority, ageing 90 s"} == found["old"]
    assert found["odd"] | {"AT ONCE": "3", "RATE": "5/minute", "ORDER": "foo"} == found["odd"]
    assert "queue odd has strategy='foo': wanted priority or fifo; it goes by priority" in (
        listed.stderr
    )
    assert kinds == {
        "letter": {"READY": "1", "RUNNING": "0", "LATER": "0", "PAUSED": "-", "WORKERS": worker}
    }


def test_pausing_a_name_that_nobody_knows_is_done_and_told(
    database: Database, sajobs: Sajobs
) -> None:
    """It may be a slip of the pen, and else it looks as if something was paused."""
    with database.sessions().begin() as session:
        session.add(enqueue(Letter(), queue="mail"))
    app: JobApp[Any, Any] = JobApp(database.sessions())
    app.handler(Letter)(lambda session, payload: None)
    with app.worker(queues=["bulk"]):
        until(lambda: "bulk" in sajobs("queues").stdout)
        of_queues = sajobs("queues", "pause", "mail", "mial", "bulk")
        of_kinds = sajobs("kinds", "pause", "letter", "lettre")
    assert of_queues.stdout == "mail: paused\nmial: paused\nbulk: paused\n"
    assert of_queues.stderr == "mial: no job waits in this queue now, and no worker names it\n"
    assert of_kinds.stdout == "letter: paused\nlettre: paused\n"
    assert of_kinds.stderr == "lettre: no job of this kind waits now, and no worker handles it\n"


def test_on_a_terminal_that_is_too_narrow_each_row_is_a_paragraph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [["NAME", "CRON", "ZONE"], ["nightly", "0 4 * * *", None], ["b", "@daily", "UTC"]]
    table = "NAME     CRON       ZONE\nnightly  0 4 * * *  -\nb        @daily     UTC"
    paragraphs = "NAME  nightly\nCRON  0 4 * * *\nZONE  -\n\nNAME  b\nCRON  @daily\nZONE  UTC"
    for is_terminal, columns, expected in (
        (True, 24, table),
        (True, 23, paragraphs),
        (False, 23, table),
    ):
        monkeypatch.setattr(sys.stdout, "isatty", lambda is_terminal=is_terminal: is_terminal)
        monkeypatch.setenv("COLUMNS", str(columns))
        assert laid_out(rows) == expected


def test_a_queue_is_paused_resumed_and_set(database: Database, sajobs: Sajobs) -> None:
    assert sajobs("queues", "pause", "mail", "bulk").stdout == "mail: paused\nbulk: paused\n"
    assert sajobs("queues", "pause", "mail").stdout == "mail: was paused before\n"
    assert sajobs("queues", "resume", "mail").stdout == "mail: resumed\n"
    assert sajobs("queues", "resume", "mail").stdout == "mail: was not paused\n"
    said = sajobs("queues", "set", "mail", "--concurrency", "5", "--strategy", "fifo")
    assert rows(said)["mail"] | {"AT ONCE": "5", "ORDER": "fifo"} == rows(said)["mail"]
    sajobs("queues", "set", "mail", "--ageing", "1.5", "--strategy", "priority")
    sajobs("queues", "set", "mail", "--concurrency", "none")
    with database.session() as session:
        found = session.scalars(select(Queue).order_by(Queue.name)).all()
        assert [(each.name, each.paused, each.concurrency, each.strategy, each.ageing) for each in found] == [
            ("bulk", True, None, "priority", None),
            ("mail", False, None, "priority", 1.5),
        ]  # fmt: skip


def test_a_kind_is_paused_and_resumed(sajobs: Sajobs) -> None:
    assert sajobs("kinds", "pause", "letter").stdout == "letter: paused\n"
    assert rows(sajobs("kinds"))["letter"]["PAUSED"] == "yes"
    assert sajobs("kinds", "resume", "letter").stdout == "letter: resumed\n"
    assert rows(sajobs("kinds")) == {}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["set", "mail"], "nothing to set: give --concurrency, --rate, --strategy, --ageing"),
        (["set", "mail", "--concurrency", "0"], "concurrency=0: wanted a whole number from 1"),
        (["set", "mail", "--concurrency", "x"], "x: wanted a whole number from 1, or none"),
        (["set", "mail", "--ageing", "-1"], "is negative"),
        (["set", "mail", "--ageing", "nan"], "nan: wanted a number of seconds, or none"),
        (["set", "mail", "--strategy", "lifo"], "'lifo' is not one of 'priority', 'fifo'"),
        (["pause", "mail.*"], "queue 'mail.*': wanted"),
        (["pause"], "Missing argument 'NAME...'"),
    ],
)
def test_what_cannot_be_set_is_told_and_nothing_is_changed(
    sqlite: Database, given: list[str], told: str
) -> None:
    said = CliRunner().invoke(main, ["queues", *given, "--database-url", str(sqlite.url)])
    assert said.exit_code in (1, 2)
    assert told in said.stderr
    with sqlite.session() as session:
        assert session.scalars(select(Queue)).all() == []


def test_the_options_may_stand_before_the_command_and_in_the_file(
    sqlite: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of what is the worker's there, nothing is set."""
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(main, ["queues", "--database-url", str(sqlite.url), "pause", "a"])
    assert said.stdout == "a: paused\n"
    (tmp_path / "pyproject.toml").write_text(
        f'[tool.sajobs]\nqueue = ["mail=2"]\nconcurrency = 7\ndatabase-url = "{sqlite.url}"\n'
    )
    said = CliRunner().invoke(main, ["queues", "set", "a", "--strategy", "fifo"])
    assert rows(said)["a"]["AT ONCE"] == "-"


def test_a_database_that_does_not_answer_and_one_without_tables(tmp_path: Path) -> None:
    away = CliRunner().invoke(
        main, ["queues", "--database-url", "postgresql+psycopg://nobody@127.0.0.1:1/none"]
    )
    assert away.exit_code == 1
    assert "Connection refused" in away.stderr or "refused" in away.stderr
    empty = CliRunner().invoke(main, ["queues", "--database-url", f"sqlite:///{tmp_path}/new"])
    assert empty.exit_code == 2
    assert "no tables for jobs. Run `sajobs migrate`" in empty.stderr
