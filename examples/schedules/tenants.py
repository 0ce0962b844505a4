"""A schedule of the code and one for each customer, who may change it while the worker runs."""

import sys
import tempfile
import threading
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sqlalchemy import create_engine
from sqlalchemy.orm import Session, sessionmaker

import sqlalchemy_jobs
from sqlalchemy_jobs import JobApp, Schedule, current_run, job

SessionLocal = sessionmaker()
jobs = JobApp(SessionLocal)
done = threading.Semaphore(0)


@job("cleanup")
@dataclass(frozen=True)
class CleanUp:
    before: str


@job("report")
@dataclass(frozen=True)
class Report:
    tenant: str


def up_to(tick: datetime) -> CleanUp:
    return CleanUp(before=f"{tick:%H:%M:%S}")


# Every second, so that there is something to see. In life: "0 3 * * *", timezone="Europe/Berlin".
jobs.schedule("cleanup", "* * * * * *", up_to)


@jobs.handler(CleanUp)
def clean_up(session: Session, work: CleanUp) -> None:
    print(f"{current_run().schedule}: what is older than {work.before}", flush=True)
    done.release()


@jobs.handler(Report)
def report(session: Session, work: Report) -> None:
    run = current_run()
    print(f"{run.schedule}: the report of {work.tenant}, due {run.scheduled_at:%H:%M:%S}")
    done.release()


def main(folder: Path) -> None:
    engine = create_engine(f"sqlite:///{folder / 'tenants.sqlite'}")
    sqlalchemy_jobs.sqlite.configure(engine)
    sqlalchemy_jobs.metadata.create_all(engine)
    SessionLocal.configure(bind=engine)
    with jobs.worker():
        with SessionLocal.begin() as session:  # a customer signs up
            session.add(Schedule("tenant-17", "@every 1s", Report("Ada's Bikes")))
        for _ in range(6):
            done.acquire()
        with SessionLocal.begin() as session:  # and wants it less often
            session.get_one(Schedule, "tenant-17").cron = "0 7 * * mon"
        print("changed", flush=True)
        for _ in range(2):
            done.acquire()
    with SessionLocal() as session:
        print("the next report:", session.get_one(Schedule, "tenant-17").next_tick)
    engine.dispose()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
