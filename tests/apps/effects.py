"""The application that worker processes of the tests run: handlers that leave traces to be counted.

`SAJOBS_TEST_URL` names the database, `SAJOBS_TEST_FOLDER` a folder for signs between test and handler.
"""

import os
import signal
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from sqlalchemy import create_engine, make_url
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from sqlalchemy_jobs import Fail, JobApp, Retry, Snooze, current_run, current_runs, job, sqlite
from tests.domain import Effect

_ASYNC = {"sqlite": "sqlite+aiosqlite", "mysql": "mysql+aiomysql"}

url = make_url(os.environ["SAJOBS_TEST_URL"])
# pool_pre_ping: a run does not fail for a connection that a server cut which is back already.
engine = create_engine(url, pool_pre_ping=True)
async_engine = create_async_engine(
    url.set(drivername=_ASYNC.get(engine.dialect.name, url.drivername)), pool_pre_ping=True
)
if engine.dialect.name == "sqlite":
    sqlite.configure(engine)
    sqlite.configure(async_engine)

jobs = JobApp(sessionmaker(engine), async_sessionmaker(async_engine))


@job("write", max_attempts=1000)
@dataclass(frozen=True)
class Write:
    """Insert one effect."""

    note: str = ""


@job("write_async", max_attempts=1000)
@dataclass(frozen=True)
class WriteAsync:
    """Insert one effect, from an async handler."""

    note: str = ""


@job("write_many", max_attempts=1000)
@dataclass(frozen=True)
class WriteMany:
    """Insert one effect each, for many at once; the note "kill" kills the process, in the job's first run."""

    note: str = ""


@job("write_and_hang")
@dataclass(frozen=True)
class WriteAndHang:
    """Insert one effect, flush, and in the first run wait to be killed."""


@job("wait")
@dataclass(frozen=True)
class Wait:
    """Say that it runs, then wait until the file ``go`` is there, or until it is asked to stop."""

    heed_stop: bool = False


@job("poison", max_attempts=2)
@dataclass(frozen=True)
class Poison:
    """Kill the process that runs it."""


@job("snooze_once")
@dataclass(frozen=True)
class SnoozeOnce:
    """Insert one effect and snooze, in the first run; insert another in the second."""


@job("wait_and_end", backoff=lambda failures: timedelta(0))
@dataclass(frozen=True)
class WaitAndEnd:
    """Wait for the file ``go-1`` and then end as it says; in the second run wait for ``go-2`` and complete."""

    how: str


def effect(note: str) -> Effect:
    return Effect(job_id=current_run().job_id.hex, note=note)


@jobs.handler(Write)
def write(session: Session, payload: Write) -> None:
    session.add(effect(payload.note))


@jobs.handler(WriteAsync)
async def write_async(session: AsyncSession, payload: WriteAsync) -> None:
    session.add(effect(payload.note))


@jobs.handler(WriteMany, batch=50)
def write_many(session: Session, payloads: list[WriteMany]) -> None:
    runs = current_runs()
    for payload, run in zip(payloads, runs, strict=True):
        session.add(Effect(job_id=run.job_id.hex, note=payload.note))
    session.flush()
    if any(each.note == "kill" for each in payloads) and runs[0].attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)


@jobs.handler(WriteAndHang)
def write_and_hang(session: Session, payload: WriteAndHang) -> None:
    session.add(effect("hung"))
    session.flush()
    if current_run().attempt == 1:
        sign("flushed")
        while True:
            time.sleep(60)


@jobs.handler(Wait)
def wait(session: Session, payload: Wait) -> None:
    sign("waiting")
    while not (folder() / "go").exists():
        if payload.heed_stop and current_run().should_stop:
            raise RuntimeError("asked to stop")
        time.sleep(0.01)
    session.add(effect("waited"))


@jobs.handler(Poison)
def poison(session: Session, payload: Poison) -> None:
    session.add(effect("poison"))
    session.flush()
    os.kill(os.getpid(), signal.SIGKILL)


@jobs.handler(SnoozeOnce)
def snooze_once(session: Session, payload: SnoozeOnce) -> Snooze | None:
    session.add(effect(f"run {current_run().attempt}"))
    return Snooze(timedelta(0)) if current_run().attempt == 1 else None


@jobs.handler(WaitAndEnd)
def wait_and_end(session: Session, payload: WaitAndEnd) -> Snooze | None:
    attempt = current_run().attempt
    sign("waiting")
    first = attempt == 1
    while not (folder() / f"go-{attempt}").exists() or (first and payload.how == "does not end"):
        time.sleep(0.01)
    session.add(effect(f"run {attempt}"))
    if payload.how == "completes" or not first:
        return None
    if payload.how == "snoozes":
        return Snooze(timedelta(hours=1))
    raise Retry(timedelta(hours=1)) if payload.how == "fails" else Fail("for good")


def folder() -> Path:
    return Path(os.environ["SAJOBS_TEST_FOLDER"])


def sign(name: str) -> None:
    """Tell the test by a line in the log, which it waits for."""
    sys.stderr.write(
        f"SIGN {name} {current_run().job_id}\n"
    )  # one write: print() makes two, and threads mix
    sys.stderr.flush()
