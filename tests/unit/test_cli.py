"""`sajobs`: where its options come from, and what its mistakes look like."""

import itertools
import logging
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from sqlalchemy import QueuePool, create_engine, event

from sqlalchemy_jobs import Worker
from sqlalchemy_jobs.cli import main
from sqlalchemy_jobs.cli.worker import one_line

_numbers = itertools.count()

APP = """
from dataclasses import dataclass
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker
from sqlalchemy_jobs import JobApp, job

sessions = sessionmaker(create_engine("sqlite:///jobs.sqlite"))
"""


@dataclass(frozen=True)
class Result:
    status: Any
    stdout: str
    stderr: str


@dataclass
class Command:
    """`sajobs` called in a folder of its own."""

    folder: Path
    capsys: pytest.CaptureFixture[str]
    started: list[Worker]
    log_levels: list[Any]

    def __call__(self, *arguments: str) -> Result:
        with pytest.raises(SystemExit) as exit_:
            main(list(arguments), prog_name="sajobs")
        return Result(exit_.value.code, *self.capsys.readouterr())

    def module(self, text: str, folder: Path | None = None) -> str:
        """Write a module; its name is new, for a module is imported once in a process."""
        name = f"app_of_test_cli_{next(_numbers)}"
        ((folder or self.folder) / f"{name}.py").write_text(dedent(text))
        return name

    def app(self) -> str:
        return self.module(APP + "jobs = JobApp(sessions)\n") + ":jobs"

    def pyproject(self, text: str, folder: Path | None = None) -> None:
        ((folder or self.folder) / "pyproject.toml").write_text(dedent(text))

    def start(self, *arguments: str) -> Worker:
        """Call `sajobs worker` and return the worker that it would have run."""
        result = self("worker", *arguments)
        assert result == Result(0, "", "")
        return self.started[-1]

    def refusal(self, *arguments: str) -> str:
        """The one line that `sajobs worker` answers with."""
        result = self("worker", *arguments)
        assert (result.status, result.stdout) == (2, ""), result
        (line,) = result.stderr.splitlines()
        assert line.startswith("Error: ")
        return line

    def misuse(self, *arguments: str) -> str:
        """What click says of a wrong option: a usage line, a hint, and the error last."""
        result = self("worker", *arguments)
        assert (result.status, result.stdout) == (2, ""), result
        return result.stderr.splitlines()[-1]


@pytest.fixture
def sajobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in list(os.environ):
        if name.startswith("SAJOBS_") and not name.startswith("SAJOBS_TEST_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "100")
    command = Command(folder, capsys, [], [])

    class Started(Worker):
        def run(self) -> bool:
            command.started.append(self)
            return True

    monkeypatch.setattr("sqlalchemy_jobs.worker.Worker", Started)
    monkeypatch.setattr(
        logging, "basicConfig", lambda **options: command.log_levels.append(options["level"])
    )
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    yield command
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for name in [name for name in sys.modules if name.startswith("app_of_test_cli_")]:
        del sys.modules[name]


# --- help ---------------------------------------------------------------------------------------


def test_help_names_the_commands_and_where_options_come_from(sajobs: Command) -> None:
    result = sajobs("--help")
    assert result.status == 0
    assert result.stdout.startswith("Usage: sajobs [OPTIONS] COMMAND")
    assert "worker" in result.stdout
    assert "[tool.sajobs]" in result.stdout
    assert sajobs("-h").stdout == result.stdout


def test_help_of_the_worker_names_every_option_and_the_exit_statuses(sajobs: Command) -> None:
    result = sajobs("worker", "--help")
    assert result.status == 0
    assert result.stdout.startswith("Usage: sajobs worker [OPTIONS]")
    for option in (
        "--app MODULE:NAME",
        "--import MODULE",
        "--queue QUEUES[=N]",
        "--concurrency N",
        "--processes N",
        "--poll-interval S",
        "--listen / --no-listen",
        "--listen-url URL",
        "--lease S",
        "--shutdown-timeout S",
        "--keep DAYS",
        "--keep-failed DAYS",
        "--drain",
        "--log-level [debug|info|warning|error]",
        "Exit status: 0",
    ):
        assert option in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100


@pytest.mark.parametrize(
    "command",
    [(sys.executable, "-m", "sqlalchemy_jobs"), (str(Path(sys.executable).with_name("sajobs")),)],
    ids=["python -m", "script"],
)
def test_both_ways_to_call_it_are_the_same_command(
    sajobs: Command, command: tuple[str, ...]
) -> None:
    done = subprocess.run(
        [*command, "worker", "--help"], capture_output=True, text=True, timeout=90
    )
    assert Result(done.returncode, done.stdout, done.stderr) == sajobs("worker", "--help")


def test_an_error_of_the_real_command_is_one_line_without_traceback(sajobs: Command) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sqlalchemy_jobs", "worker", "--app", "nowhere_at_all:jobs"],
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("Error: there is no module nowhere_at_all")


# --- --app and --import -------------------------------------------------------------------------


def test_an_app_in_the_current_folder_is_found(sajobs: Command) -> None:
    worker = sajobs.start("--app", sajobs.app())
    assert worker.app.sessions is not None


@pytest.mark.parametrize(
    "name", ["nothing_like_it:jobs", "nothing.like.it:jobs", "email.nope:jobs"]
)
def test_a_module_that_is_missing(sajobs: Command, name: str) -> None:
    line = sajobs.refusal("--app", name)
    assert "there is no module" in line
    assert str(sajobs.folder) in line


@pytest.mark.parametrize("name", ["jobs", "jobs:", ":jobs", ":", ""])
def test_an_app_without_module_or_name_is_told_the_form(sajobs: Command, name: str) -> None:
    assert 'wanted "package.module:name"' in sajobs.refusal("--app", name)


def test_an_attribute_that_is_missing_names_the_apps_that_there_are(sajobs: Command) -> None:
    module = sajobs.module(APP + "jobs = JobApp(sessions)\nothers = JobApp(sessions)\n")
    line = sajobs.refusal("--app", f"{module}:jbos")
    assert f"{module} has no jbos; it has jobs, others" in line


def test_an_attribute_that_is_missing_where_there_is_no_app(sajobs: Command) -> None:
    module = sajobs.module("")
    line = sajobs.refusal("--app", f"{module}:jobs")
    assert line == f"Error: --app {module}:jobs: {module} has no jobs"


@pytest.mark.parametrize(
    "path", ["number.jobs", "settings.jobs", "text.a.b", "jobs..x", "slotted.x"]
)
def test_a_dotted_path_that_breaks_off(sajobs: Command, path: str) -> None:
    module = sajobs.module("""
        class settings: pass
        class Slotted: __slots__ = ()
        slotted = Slotted()
        jobs, number, text = None, 3, "jobs"
    """)
    assert " has no " in sajobs.refusal("--app", f"{module}:{path}")


def test_a_dotted_path_leads_into_objects(sajobs: Command) -> None:
    module = sajobs.module(APP + "class shop:\n    jobs = JobApp(sessions)\n")
    assert sajobs.start("--app", f"{module}:shop.jobs").app.sessions is not None


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("3", "a int"),
        ("None", "a NoneType"),
        ("JobApp", "the class JobApp"),
        ("sessions", "a sessionmaker"),
    ],
)
def test_what_is_not_a_job_app_is_named(sajobs: Command, value: str, found: str) -> None:
    module = sajobs.module(APP + f"jobs = {value}\n")
    line = sajobs.refusal("--app", f"{module}:jobs")
    assert line.endswith(f"it is {found}, not a JobApp")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nothing_like_it", "ModuleNotFoundError: No module named 'nothing_like_it'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("raise ValueError", "ValueError"),
        ("raise SystemExit('no DATABASE_URL')", "no DATABASE_URL"),
        (APP + "JobApp(3)", "DeclarationError: JobApp was given 3"),
    ],
)
def test_a_module_whose_own_import_fails_is_told_with_file_and_line(
    sajobs: Command, text: str, said: str
) -> None:
    module = sajobs.module(text)
    line = sajobs.refusal("--app", f"{module}:jobs")
    assert f"importing {module} raised" in line
    assert said in line
    assert f"{module}.py:" in line


def test_a_module_whose_dependency_fails_names_the_deepest_line(sajobs: Command) -> None:
    inner = sajobs.module("\n\nint('x')")
    outer = sajobs.module(f"import {inner}")
    assert f"{inner}.py:3)" in sajobs.refusal("--app", f"{outer}:jobs")


def test_a_syntax_error_is_told_with_file_and_line(sajobs: Command) -> None:
    module = sajobs.module("x = 1\ndef jobs(:\n    pass\n")
    line = sajobs.refusal("--app", f"{module}:jobs")
    assert "SyntaxError" in line
    assert f"{module}.py, line 2" in line


HANDLERS = """
    from dataclasses import dataclass
    from sqlalchemy_jobs import job
    from {app} import jobs

    @job("{kind}")
    @dataclass
    class Payload:
        n: int = 0

    jobs.handler(Payload)(lambda session, payload: None)
"""


def test_import_registers_handlers(sajobs: Command) -> None:
    app = sajobs.app()
    one, two = (
        sajobs.module(HANDLERS.format(app=app.removesuffix(":jobs"), kind=kind))
        for kind in ("one", "two")
    )
    worker = sajobs.start("--app", app, "--import", one, "--import", two)
    assert set(worker.app.handlers) == {"one", "two"}


@pytest.mark.parametrize("text", [None, "1 / 0", "def ("])
def test_an_import_that_fails_is_one_line_too(sajobs: Command, text: str | None) -> None:
    module = "nothing_like_it" if text is None else sajobs.module(text)
    assert module in sajobs.refusal("--app", sajobs.app(), "--import", module)


def test_an_import_with_the_kind_of_another_handler_is_one_line(sajobs: Command) -> None:
    app = sajobs.app()
    one, two = (
        sajobs.module(HANDLERS.format(app=app.removesuffix(":jobs"), kind="same")) for _ in range(2)
    )
    line = sajobs.refusal("--app", app, "--import", one, "--import", two)
    assert 'DuplicateKind: kind "same"' in line


# --- --queue ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "pools", "total"),
    [
        ([], {"*": None}, 10),
        (["mail"], {"mail": None}, 10),
        (["mail=2"], {"mail": 2}, 2),
        (["mail=2", "slow=3"], {"mail": 2, "slow": 3}, 5),
        (["mail=2", "default"], {"mail": 2, "default": None}, 10),
        (["eu.mail:bulk-2=1"], {"eu.mail:bulk-2": 1}, 1),
        (["mail=2;default,bulk=8"], {"mail": 2, "default,bulk": 8}, 10),
        (["mail=2;slow", "a>b@2,c.*=1"], {"mail": 2, "slow": None, "a>b@2,c.*": 1}, 10),
    ],
)
def test_queues_and_their_own_concurrency(
    sajobs: Command, given: list[str], pools: dict[str, int | None], total: int
) -> None:
    options = itertools.chain.from_iterable(("--queue", each) for each in given)
    settings = sajobs.start("--app", sajobs.app(), *options).settings
    assert settings.pools.concurrency == pools
    assert settings.total(10) == total


@pytest.mark.parametrize(
    "given", ["mail=", "mail=0", "mail=-1", "mail=two", "mail=2=3", "mail=1.5", "a,b=1.5"]
)
def test_a_queue_with_a_number_that_is_none(sajobs: Command, given: str) -> None:
    line = sajobs.misuse("--app", sajobs.app(), "--queue", given)
    assert given in line
    assert "wanted NAME=N" in line


@pytest.mark.parametrize("given", ["", "=2", "two words", "-mail", "x" * 61])
def test_a_queue_whose_name_cannot_be(sajobs: Command, given: str) -> None:
    line = sajobs.refusal("--app", sajobs.app(), f"--queue={given}")
    name = given.partition("=")[0]
    assert f"queues {name!r}, character 1: queue {name!r}: wanted" in line


@pytest.mark.parametrize("given", [("mail", "mail=2"), ("mail;mail",), ("mail=2;bulk,mail",)])
def test_a_queue_that_is_named_twice_is_refused(sajobs: Command, given: tuple[str, ...]) -> None:
    options = itertools.chain.from_iterable(("--queue", each) for each in given)
    assert "'mail' is named twice" in sajobs.refusal("--app", sajobs.app(), *options)


@pytest.mark.parametrize(
    "options",
    [
        ("--concurrency", "0"),
        ("--concurrency", "many"),
        ("--poll-interval", "0"),
        ("--lease", "0.9"),
        ("--shutdown-timeout", "-1"),
        ("--keep", "for ever"),
        ("--keep-failed", "1e99"),
        ("--log-level", "loud"),
    ],
)
def test_numbers_out_of_range_are_refused(sajobs: Command, options: tuple[str, str]) -> None:
    line = sajobs.misuse("--app", sajobs.app(), *options)
    assert f"'{options[0]}'" in line
    assert options[1] in line


def test_a_missing_app_is_asked_for(sajobs: Command) -> None:
    assert "Missing option '--app'" in sajobs.misuse()


# --- flag over environment over file --------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """One option, said in three places; and what it comes to in each."""

    key: str
    toml: str
    environment: str
    flags: tuple[str, ...]
    read: Callable[[Worker], Any]
    expected: tuple[Any, Any, Any]


def _seconds(name: str) -> Callable[[Worker], Any]:
    return lambda worker: getattr(worker.settings, name) / timedelta(seconds=1)


def _days(name: str) -> Callable[[Worker], Any]:
    def read(worker: Worker) -> Any:
        kept = getattr(worker.settings, name)
        return None if kept is None else kept / timedelta(days=1)

    return read


OPTIONS = [
    Option(
        "queue",
        '["mail=2", "default"]',
        "slow=3 other",
        ("--queue", "fast"),
        lambda worker: worker.settings.pools.concurrency,
        ({"mail": 2, "default": None}, {"slow": 3, "other": None}, {"fast": None}),
    ),
    Option(
        "concurrency",
        "3",
        "4",
        ("--concurrency", "5"),
        lambda worker: worker.settings.concurrency,
        (3, 4, 5),
    ),
    Option(
        "poll-interval",
        "0.25",
        "0.5",
        ("--poll-interval", "2"),
        _seconds("poll_interval"),
        (0.25, 0.5, 2),
    ),
    Option(
        "listen", "false", "1", ("--no-listen",), lambda w: w.settings.listen, (False, True, False)
    ),
    Option(
        "listen-url",
        '"postgresql://one/shop"',
        "postgresql://two/shop",
        ("--listen-url", "postgresql://three/shop"),
        lambda worker: worker.settings.listen_url,
        ("postgresql://one/shop", "postgresql://two/shop", "postgresql://three/shop"),
    ),
    Option("lease", "20", "21", ("--lease", "22"), _seconds("lease"), (20, 21, 22)),
    Option(
        "shutdown-timeout",
        "0",
        "7.5",
        ("--shutdown-timeout", "8"),
        _seconds("shutdown_timeout"),
        (0, 7.5, 8),
    ),
    Option("keep", "2", "off", ("--keep", "0.5"), _days("keep"), (2, None, 0.5)),
    Option("keep-failed", '"off"', "3", ("--keep-failed", "0"), _days("keep_failed"), (None, 3, 0)),
    Option("drain", "true", "0", ("--drain",), lambda w: w.settings.drain, (True, False, True)),
]


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.key)
def test_a_flag_is_stronger_than_the_environment_and_that_than_the_file(
    sajobs: Command, monkeypatch: pytest.MonkeyPatch, option: Option
) -> None:
    app = sajobs.app()
    in_file, in_environment, in_flags = option.expected
    sajobs.pyproject(f"[tool.sajobs]\n{option.key} = {option.toml}\n")
    assert option.read(sajobs.start("--app", app)) == in_file
    variable = "SAJOBS_" + option.key.upper().replace("-", "_")
    monkeypatch.setenv(variable, option.environment)
    assert option.read(sajobs.start("--app", app)) == in_environment
    assert option.read(sajobs.start("--app", app, *option.flags)) == in_flags


def test_the_app_too_is_taken_from_flag_environment_or_file(
    sajobs: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_file, in_environment, in_flag = (sajobs.app() for _ in range(3))

    def name_of(worker: Worker) -> str:
        (name,) = (
            name
            for name, module in sys.modules.items()
            if name.startswith("app_of_test_cli_") and vars(module).get("jobs") is worker.app
        )
        return f"{name}:jobs"

    sajobs.pyproject(f'[tool.sajobs]\napp = "{in_file}"\n')
    assert name_of(sajobs.start()) == in_file
    monkeypatch.setenv("SAJOBS_APP", in_environment)
    assert name_of(sajobs.start()) == in_environment
    assert name_of(sajobs.start("--app", in_flag)) == in_flag


def test_modules_to_import_too_are_taken_from_flag_environment_or_file(
    sajobs: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = sajobs.app()
    in_file, in_environment, also, in_flag = (
        sajobs.module(HANDLERS.format(app=app.removesuffix(":jobs"), kind=kind))
        for kind in ("file", "environment", "also", "flag")
    )
    sajobs.pyproject(f'[tool.sajobs]\nimport = ["{in_file}"]\n')
    # Handlers stay registered on the app: each call adds those of its own source only.
    assert set(sajobs.start("--app", app).app.handlers) == {"file"}
    monkeypatch.setenv("SAJOBS_IMPORT", f"{in_environment} {also}")
    assert set(sajobs.start("--app", app).app.handlers) == {"file", "environment", "also"}
    monkeypatch.delenv("SAJOBS_IMPORT")
    sajobs.pyproject('[tool.sajobs]\nimport = ["nothing_like_it"]\n')
    assert "flag" in sajobs.start("--app", app, "--import", in_flag).app.handlers


def test_the_log_level_too_is_taken_from_flag_environment_or_file(
    sajobs: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = sajobs.app()
    sajobs.start("--app", app)
    sajobs.pyproject('[tool.sajobs]\nlog-level = "debug"\n')
    sajobs.start("--app", app)
    monkeypatch.setenv("SAJOBS_LOG_LEVEL", "warning")
    sajobs.start("--app", app)
    sajobs.start("--app", app, "--log-level", "error")
    assert sajobs.log_levels == ["INFO", "DEBUG", "WARNING", "ERROR"]


# --- pyproject.toml -----------------------------------------------------------------------------


def test_the_nearest_pyproject_upwards_is_read_and_no_other(
    sajobs: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = sajobs.app()
    below = sajobs.folder / "a" / "b"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    monkeypatch.syspath_prepend(sajobs.folder)
    sajobs.pyproject("[tool.sajobs]\nconcurrency = 3\nlease = 40\n", sajobs.folder)
    assert sajobs.start("--app", app).settings.concurrency == 3
    sajobs.pyproject("[tool.sajobs]\nconcurrency = 4\n", below)
    settings = sajobs.start("--app", app).settings
    assert (settings.concurrency, settings.lease) == (4, timedelta(seconds=30))


@pytest.mark.parametrize("text", ["", "[project]\nname = 'x'\n", "[tool.ruff]\nline-length = 80\n"])
def test_a_pyproject_without_a_table_of_ours_changes_nothing(sajobs: Command, text: str) -> None:
    sajobs.pyproject(text)
    assert sajobs.start("--app", sajobs.app()).settings.concurrency is None


@pytest.mark.parametrize("key", ["concurency", "poll_interval", "help"])
def test_an_unknown_key_is_refused_and_the_known_ones_are_named(sajobs: Command, key: str) -> None:
    sajobs.pyproject(f"[tool.sajobs]\nlease = 20\n{key} = 3\n")
    line = sajobs.refusal("--app", sajobs.app())
    assert f"unknown key {key}: known are app, concurrency, drain, import, keep" in line


@pytest.mark.parametrize(
    "text",
    [
        "[tool.sajobs\nlease = 3\n",
        "[tool.sajobs]\nlease =\n",
        "[tool.sajobs]\nlease = 3\nlease = 4\n",
        "tool = 3\n",
        "tool.sajobs = 3\n",
        "[[tool.sajobs]]\nlease = 3\n",
        "[[tool]]\nsajobs = 3\n",
    ],
)
def test_a_broken_pyproject_is_one_line_that_names_the_file(sajobs: Command, text: str) -> None:
    sajobs.pyproject(text)
    assert str(sajobs.folder / "pyproject.toml") in sajobs.refusal("--app", sajobs.app())


def test_a_pyproject_that_is_not_utf8_is_one_line_that_names_the_file(sajobs: Command) -> None:
    (sajobs.folder / "pyproject.toml").write_bytes(b'[tool.sajobs]\napp = "\xff"\n')
    assert str(sajobs.folder / "pyproject.toml") in sajobs.refusal("--app", sajobs.app())


@pytest.mark.parametrize(
    "line",
    [
        "concurrency = 0",
        'concurrency = "many"',
        "lease = 0.5",
        "poll-interval = 0",
        'queue = ["mail=0"]',
        "queue = [3]",
        "queue = [[]]",
        "log-level = 3",
    ],
)
def test_a_wrong_value_in_the_file_is_an_error_of_its_option(sajobs: Command, line: str) -> None:
    sajobs.pyproject(f"[tool.sajobs]\n{line}\n")
    said = sajobs.misuse("--app", sajobs.app())
    assert f"'--{line.partition(' ')[0]}'" in said


@pytest.mark.parametrize(
    ("value", "wanted"),
    [('"mail"', {"mail": None}), ('"mail=2"', {"mail": 2}), ("{ mail = 2 }", {"mail": 2})],
)
def test_a_queue_in_the_file_that_is_not_a_list_means_what_it_says_or_is_refused(
    sajobs: Command, value: str, wanted: dict[str, int | None]
) -> None:
    sajobs.pyproject(f"[tool.sajobs]\nqueue = {value}\n")
    result = sajobs("worker", "--app", sajobs.app())
    if result.status == 0:
        assert sajobs.started[-1].settings.pools.concurrency == wanted
    else:
        assert result.status == 2
        assert "queue" in result.stderr


def test_a_connection_that_breaks_on_its_way_back_to_the_pool_is_told_of_in_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The rollback may be the first to notice; SQLAlchemy's pool logs that with a traceback."""
    engine = create_engine("sqlite://", poolclass=QueuePool)

    @event.listens_for(engine, "reset")
    def broken(*_: object) -> None:
        raise sqlite3.OperationalError("server closed the connection\nand more")

    caplog.handler.addFilter(one_line)
    try:
        with engine.connect():
            pass
    finally:
        caplog.handler.removeFilter(one_line)
    assert "Traceback" not in caplog.text
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert (
        record.getMessage()
        == "a connection was lost: OperationalError: server closed the connection"
    )
