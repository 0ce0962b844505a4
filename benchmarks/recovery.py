"""How soon do the jobs of a killed worker run again?

    python benchmarks/recovery.py postgresql+psycopg://postgres@127.0.0.1/empty [--kills 20] [--lease 5]

Two workers, as `sajobs worker` starts them, with default settings unless --lease is given. Each round one of them
has a running job and is killed by SIGKILL. What counts is the time until the handler is called again, in the other
one; then a new worker takes the place of the dead one. The database must be empty; the tables are dropped at the end.
On two cores of your own, the figures are those of the rule in docs/worker.md; on a busy machine they are larger.
"""

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, inspect, select
from sqlalchemy.orm import Session, sessionmaker

import sqlalchemy_jobs
from sqlalchemy_jobs import Job, JobApp, WorkerRow, current_run, enqueue, job

URL = "SAJOBS_BENCHMARK_URL"
QUIET = (3.0, 6.0)
"""Between how many seconds there are from the start of the new worker to the next kill."""


@job("hang_once")
@dataclass(frozen=True)
class HangOnce:
    """Wait to be killed in the first run; say in the second when it began."""

    n: int


def hang_once(session: Session, payload: HangOnce) -> float:
    began_at = time.time()
    while current_run().attempt == 1:
        time.sleep(60)
    return began_at


def engine_for(url: str) -> Engine:
    engine = create_engine(url)
    if engine.dialect.name == "sqlite":
        sqlalchemy_jobs.sqlite.configure(engine)
    return engine


if URL in os.environ:  # in a worker
    jobs = JobApp(sessionmaker(engine_for(os.environ[URL])))
    jobs.handler(HangOnce)(hang_once)


class Benchmark:
    def __init__(self, engine: Engine, lease: float | None) -> None:
        self.sessions = sessionmaker(engine)
        self.lease = lease
        self.url = engine.url.render_as_string(hide_password=False)
        self.workers: dict[int, subprocess.Popen[bytes]] = {}

    def start_worker(self) -> None:
        command = [sys.executable, "-m", "sqlalchemy_jobs", "worker", "--app", "recovery:jobs"]
        if self.lease is not None:
            command += ["--lease", str(self.lease)]
        command += ["--log-level", "error"]
        folder = Path(__file__).parent
        started = subprocess.Popen(command, cwd=folder, env={**os.environ, URL: self.url})
        self.workers[started.pid] = started
        self.wait_for(lambda session: started.pid in self.alive(session))

    def alive(self, session: Session) -> set[int]:
        names = session.scalars(select(WorkerRow.name).where(WorkerRow.state == "alive"))
        return {int(name.rpartition(":")[2]) for name in names}

    def kill_one(self, n: int) -> float:
        """Kill the worker that runs a job; return the seconds until the job runs again."""
        with self.sessions.begin() as session:
            session.add(made := enqueue(HangOnce(n)))
            job_id = made.id
        query = select(WorkerRow.name).join(Job, Job.worker_id == WorkerRow.id)
        name = self.wait_for(lambda session: session.scalar(query.where(Job.id == job_id)))
        victim = self.workers.pop(int(name.rpartition(":")[2]))
        time.sleep(random.uniform(*QUIET))
        killed_at = time.time()
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        result = select(Job.result).where(Job.id == job_id, Job.state == "succeeded")
        began_at: float = self.wait_for(lambda session: session.scalar(result))
        return began_at - killed_at

    def wait_for(self, look: Callable[[Session], Any], timeout: float = 120) -> Any:
        end = time.monotonic() + timeout
        while True:
            with self.sessions() as session:
                if found := look(session):
                    return found
            if time.monotonic() > end:
                raise TimeoutError("no answer: do the workers run?")
            time.sleep(0.1)

    def run(self, kills: int) -> list[float]:
        try:
            self.start_worker()
            taken = []
            for n in range(kills):
                self.start_worker()
                taken.append(self.kill_one(n))
                print(f"{n + 1:4} {taken[-1]:6.2f} s", flush=True)
            return taken
        finally:
            for worker in self.workers.values():
                worker.kill()
                worker.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url", help="of an empty database")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--lease", type=float, help="seconds; default: the worker's own")
    options = parser.parse_args()
    engine = engine_for(options.url)
    if present := inspect(engine).get_table_names():
        sys.exit(f"the database has tables ({present[0]}, ...): wanted an empty one, to drop it")
    sqlalchemy_jobs.metadata.create_all(engine)
    try:
        taken = sorted(Benchmark(engine, options.lease).run(options.kills))
    finally:
        sqlalchemy_jobs.metadata.drop_all(engine)
        engine.dispose()
    p95 = statistics.quantiles(taken, n=20, method="inclusive")[18] if len(taken) > 1 else taken[0]
    print("| kills | p50 | p95 | max |\n|---|---|---|---|")
    print(f"| {len(taken)} | {statistics.median(taken):.2f} s | {p95:.2f} s | {taken[-1]:.2f} s |")


if __name__ == "__main__":
    main()
