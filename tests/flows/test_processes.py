"""`sajobs worker --processes N`: real processes, real signals; whatever dies, nothing is lost or left behind."""

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select, text

from sqlalchemy_jobs import Job, WorkerRow, enqueue
from tests.databases import Database
from tests.domain import Effect
from tests.processes import WorkerProcess, workers

END = "(end of its log)"  # of all: the supervisor and its processes write to the same pipe


def add(database: Database, *payloads: Any) -> None:
    with database.session.begin() as session:
        session.add_all([enqueue(each) for each in payloads])


def outcome(database: Database) -> dict[str, int]:
    """How many jobs are in which state; no worker may have left its row, unless it was declared dead."""
    with database.session() as session:
        assert session.scalars(select(WorkerRow.name).where(WorkerRow.state == "alive")).all() == []
        query = select(Job.state, func.count()).group_by(Job.state)
        return dict(session.execute(query).all())  # type: ignore[arg-type]


def pids(supervisor: WorkerProcess, count: int) -> list[int]:
    """The processes that have begun, once there were so many."""
    supervisor.wait_for(" serves ", count=count)
    found = (re.search(r"worker \S+:(\d+) on", line) for line in supervisor.lines)
    return [int(each[1]) for each in found if each]


def pid_of_run(line: str, database: Database) -> int:
    """Who runs the job that a sign names."""
    job_id = line.split()[-1].replace("-", "")
    with database.session() as session:
        names = select(WorkerRow.name, Job.id).join(Job, Job.worker_id == WorkerRow.id)
        (name,) = (name for name, id_ in session.execute(names) if id_.hex == job_id)
    return int(name.rsplit(":", 1)[1])


def test_a_process_that_is_killed_is_replaced_and_its_job_runs_again(
    row_locks: Database, tmp_path: Path, effects_app: Any
) -> None:
    add(row_locks, effects_app.Wait())
    with workers(row_locks, tmp_path, "--processes", "3") as (supervisor,):
        assert len(set(pids(supervisor, 3))) == 3
        own = 10 if row_locks.name == "postgresql" else 9  # one for the bell
        budget = supervisor.wait_for(f"connections: 3 x (30 + {own}) = {3 * (30 + own)} at most")
        assert f" {supervisor.process.pid} connections" in budget  # who said it
        victim = pid_of_run(supervisor.wait_for("SIGN waiting"), row_locks)
        os.kill(victim, signal.SIGKILL)
        supervisor.wait_for(f"process {victim} was killed by SIGKILL: a new one in 1 s")
        assert len(set(pids(supervisor, 4))) == 4
        supervisor.wait_for("SIGN waiting", count=2)
        (tmp_path / "go").touch()
        supervisor.signal(signal.SIGTERM)
        assert supervisor.wait() == 0
    assert outcome(row_locks) == {"succeeded": 1}
    with row_locks.session() as session:
        assert session.scalars(select(Effect.note)).all() == ["waited"]


@pytest.mark.parametrize("to_all", [False, True], ids=["to the supervisor", "to all, like Ctrl-C"])
def test_the_first_signal_lets_runs_finish_also_when_it_reaches_every_process(
    sqlite: Database, tmp_path: Path, effects_app: Any, to_all: bool
) -> None:
    """A worker that took the supervisor's word for a second signal would give its run back."""
    add(sqlite, effects_app.Wait(heed_stop=True))
    with workers(sqlite, tmp_path, "--processes", "2") as (supervisor,):
        running = pids(supervisor, 2)
        supervisor.wait_for("SIGN waiting")
        for each in running if to_all else ():
            os.kill(each, signal.SIGINT)
            os.kill(each, signal.SIGTERM)
        supervisor.signal(signal.SIGINT)
        supervisor.wait_for("stopping: 2 processes")
        supervisor.wait_for("stopping: 1 runs in flight")
        supervisor.wait_for("stopping: 0 runs in flight")
        (tmp_path / "go").touch()
        assert supervisor.wait() == 0
        assert "released" not in supervisor.log
    assert outcome(sqlite) == {"succeeded": 1}


def test_the_second_signal_gives_runs_back_at_once(
    sqlite: Database, tmp_path: Path, effects_app: Any
) -> None:
    add(sqlite, effects_app.Wait())
    options = ("--processes", "2", "--shutdown-timeout", "10000")
    with workers(sqlite, tmp_path, *options) as (supervisor,):
        pids(supervisor, 2)
        supervisor.wait_for("SIGN waiting")
        supervisor.signal(signal.SIGTERM)
        supervisor.wait_for("stopping: 1 runs in flight")
        supervisor.signal(signal.SIGTERM)
        assert supervisor.wait() == 1
        supervisor.wait_for("did not end in time: released")
    assert outcome(sqlite) == {"ready": 1}


def test_when_the_supervisor_is_killed_its_processes_end_in_order(
    sqlite: Database, tmp_path: Path, effects_app: Any
) -> None:
    add(sqlite, effects_app.Wait())
    with workers(sqlite, tmp_path, "--processes", "2") as (supervisor,):
        pids(supervisor, 2)
        supervisor.wait_for("SIGN waiting")
        supervisor.signal(signal.SIGKILL)
        supervisor.process.wait()
        supervisor.wait_for("stopping: 1 runs in flight")
        supervisor.wait_for("stopping: 0 runs in flight")
        (tmp_path / "go").touch()
        supervisor.wait_for(END)
    assert outcome(sqlite) == {"succeeded": 1}


def test_a_process_that_is_told_to_end_by_itself_ends_in_order_and_is_replaced(
    sqlite: Database, tmp_path: Path, effects_app: Any
) -> None:
    with workers(sqlite, tmp_path, "--processes", "2") as (supervisor,):
        one, other = pids(supervisor, 2)
        os.kill(one, signal.SIGTERM)
        supervisor.wait_for(f"process {one} ended with status 0: a new one in 1 s")
        assert {one, other} < set(pids(supervisor, 3))
        supervisor.signal(signal.SIGTERM)
        assert supervisor.wait() == 0
        supervisor.wait_for("SQLite lets one process write at a time")
    assert outcome(sqlite) == {}


def test_what_keeps_every_process_from_starting_is_told_once(
    sqlite: Database, tmp_path: Path
) -> None:
    with sqlite.engine().begin() as connection:
        connection.execute(text("DROP TABLE sajobs_attempt"))
    with workers(sqlite, tmp_path, "--processes", "3") as (supervisor,):
        assert supervisor.wait() == 2
    (error,) = (line for line in supervisor.lines if "sajobs_attempt" in line)
    assert error.startswith("Error: ")
    assert "a new one" not in supervisor.log and " serves " not in supervisor.log


def test_draining_ends_when_every_process_is_done(
    database: Database, tmp_path: Path, effects_app: Any
) -> None:
    add(database, *(effects_app.Write(str(n)) for n in range(200)))
    with workers(database, tmp_path, "--processes", "2", "--drain") as (supervisor,):
        assert supervisor.wait() == 0
        assert "a new one" not in supervisor.log
    assert outcome(database) == {"succeeded": 200}


def test_a_signal_before_any_process_has_begun_ends_all(tmp_path: Path, sqlite: Database) -> None:
    """Its imports do not come to an end, so it does not listen."""
    (tmp_path / "slow_app.py").write_text(
        "import sys, time\nsys.stderr.write('importing\\n')\ntime.sleep(1e6)\n"
    )
    supervisor = WorkerProcess(
        sqlite.url, tmp_path, "--processes", "2", app="slow_app:jobs", path=tmp_path
    )
    try:
        supervisor.wait_for("importing")
        supervisor.signal(signal.SIGTERM)
        assert supervisor.wait() == 0
    finally:
        supervisor.process.kill()
    assert supervisor.lines[1:] == [supervisor.wait_for("stopping: 1 processes"), END]
