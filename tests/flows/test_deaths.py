"""Workers that die, that only seem to, and servers that go away under them: real processes, real signals."""

import signal
import sqlite3
from pathlib import Path
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import sessionmaker

from sqlalchemy_jobs import Job, WorkerRow
from sqlalchemy_jobs.columns import server_now
from sqlalchemy_jobs.worker.leases import LATENESS, LONE_RENEWAL
from tests.databases import Database, EmbeddedPostgres
from tests.look import Look
from tests.processes import WorkerProcess, workers
from tests.proxy import Proxy
from tests.waiting import until

LONGEST = LONE_RENEWAL + LATENESS


class Workers(Look):
    def jobs(self) -> list[tuple[str, int]]:
        """State and attempt of each job."""
        with self.sessions() as session:
            found = session.execute(select(Job.state, Job.attempt).order_by(Job.id))
            return [tuple(each) for each in found]  # type: ignore[misc]

    def workers(self) -> list[WorkerRow]:
        """The workers that are not declared dead."""
        with self.sessions() as session:
            query = select(WorkerRow).where(WorkerRow.state == "alive").order_by(WorkerRow.id)
            return list(session.scalars(query))

    def silent(self) -> int:
        """How many workers have not renewed for so long that a free lock would tell against them."""
        with self.sessions() as session:
            query = select(func.count()).where(WorkerRow.heartbeat_at < server_now(-LONGEST))
            return session.scalars(query).one()

    def locked_since(self) -> set[Any]:
        """When the server was started on which each worker holds a lock; None: it holds none."""
        return {each.server_start for each in self.workers()}


# --- killed -----------------------------------------------------------------------------------------


def test_the_jobs_of_a_killed_worker_run_again_long_before_its_lease_passes(
    row_locks: Database, tmp_path: Path, effects_app: Any
) -> None:
    look = Workers(row_locks.session)
    look.add(effects_app.WriteAndHang())
    with workers(row_locks, tmp_path, "--lease", "600") as (victim,):
        victim.wait_for("SIGN flushed")
        with workers(row_locks, tmp_path, "--lease", "600") as (rescuer,):
            rescuer.wait_for("serves all queues")
            victim.signal(signal.SIGKILL)
            rescuer.wait_for("is dead, the server has freed its lock; jobs brought back: 1")
            until(lambda: look.jobs() == [("succeeded", 2)])
    assert (look.effects(), look.attempts()) == (["hung"], ["crashed"])


# --- alive, though the server or the network went away ------------------------------------------------


def test_live_workers_go_through_a_restart_of_the_server_without_a_rescue(
    embedded_postgresql: EmbeddedPostgres, postgresql: Database, tmp_path: Path, effects_app: Any
) -> None:
    """All locks are free then, and nobody has renewed for a while."""
    look = Workers(sessionmaker(postgresql.engine(pool_pre_ping=True)))
    for _ in range(2):
        look.add(effects_app.Wait())
    with workers(postgresql, tmp_path, "--concurrency", "1", count=2) as both:
        for each in both:
            each.wait_for("SIGN waiting")
        until(lambda: None not in look.locked_since())
        (before,) = look.locked_since()
        embedded_postgresql.restart()
        until(lambda: not look.locked_since() & {before, None})
        finish(look, both, tmp_path)


def test_live_workers_go_through_an_outage_of_the_network_without_a_rescue(
    row_locks: Database, tmp_path: Path, effects_app: Any
) -> None:
    """The server still knows when it was started, and has freed the locks of all."""
    look = Workers(row_locks.session)
    for _ in range(2):
        look.add(effects_app.Wait())
    proxy = Proxy(row_locks.url)
    with workers(row_locks, tmp_path, "--concurrency", "1", count=2, url=proxy.url) as both:
        for each in both:
            each.wait_for("SIGN waiting")
        until(lambda: None not in look.locked_since())
        proxy.stop()
        for each in both:
            each.wait_for("the database is away")
        until(lambda: look.silent() == 2)
        proxy.start()
        until(lambda: look.silent() == 0 and None not in look.locked_since())
        finish(look, both, tmp_path)
    proxy.stop()


def finish(look: Workers, both: list[WorkerProcess], folder: Path) -> None:
    """Let the jobs end, each in its first run and in the worker that it began in."""
    assert len(look.workers()) == 2
    (folder / "go").touch()
    until(lambda: look.jobs() == [("succeeded", 1)] * 2)
    assert (look.effects(), look.attempts()) == (["waited"] * 2, [])
    for each in both:
        each.signal(signal.SIGTERM)
        assert each.wait() == 0
        assert "dead" not in each.log, each.log


# --- frozen, declared dead, and awake again -----------------------------------------------------------


def test_a_worker_that_slept_beyond_its_lease_changes_nothing_that_others_now_own(
    database: Database, tmp_path: Path, effects_app: Any
) -> None:
    """SIGSTOP, and SIGCONT while its jobs run elsewhere. It learns of its death and works on.

    Its runs complete, snooze, fail, and are released at its shutdown: none of that is written.
    """
    look = Workers(database.session)
    endings = ["completes", "snoozes", "fails", "fails for good", "does not end"]
    count = len(endings)
    for how in endings:
        look.add(effects_app.WaitAndEnd(how))
    slow, quick = ("--concurrency", "5", "--lease", "20"), ("--concurrency", "6", "--lease", "2")
    with workers(database, tmp_path, *quick, "--shutdown-timeout", "0") as (zombie,):
        zombie.wait_for("SIGN waiting", count=count)
        freeze(zombie, database)
        with workers(database, tmp_path, *slow) as (rescuer,):
            rescuer.wait_for("SIGN waiting", 60, count)
            zombie.signal(signal.SIGCONT)
            zombie.wait_for(
                "another worker declared this one dead: the runs in flight are given up"
            )
            (tmp_path / "go-1").touch()
            zombie.wait_for("belongs to another run", count=count - 1)
            look.add(effects_app.Write("afterwards"))  # the other one has no slot
            until(lambda: look.effects() == ["afterwards"])
            zombie.signal(signal.SIGTERM)
            zombie.wait()
            assert look.jobs() == [("running", 2)] * count + [("succeeded", 1)]
            (tmp_path / "go-2").touch()
            until(lambda: look.jobs() == [("succeeded", 2)] * count + [("succeeded", 1)])
            rescuer.signal(signal.SIGTERM)
            assert rescuer.wait() == 0
    assert look.effects() == ["afterwards"] + ["run 2"] * count
    assert look.attempts() == ["crashed"] * count


def freeze(worker: WorkerProcess, database: Database) -> None:
    """Stop it in a moment in which it holds no lock that a rescuer needs."""
    while True:
        worker.signal(signal.SIGSTOP)
        if is_free(database):
            return
        worker.signal(signal.SIGCONT)


def is_free(database: Database) -> bool:
    if database.name == "sqlite":
        connection = sqlite3.connect(database.url.database or "", timeout=0.2, isolation_level=None)
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return False
        finally:
            connection.close()
        return True
    with database.session() as session:
        query = select(WorkerRow.id).with_for_update(skip_locked=True)
        return session.execute(query).one_or_none() is not None
