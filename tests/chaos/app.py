"""What the workers run. Every handler leaves an Effect for each run of it that committed."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

from sqlalchemy import func, make_url, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, aliased, sessionmaker

from sqlalchemy_jobs import Cancel, Fail, Job, JobApp, Retry, Run, Snooze, current_run, enqueue
from tests.chaos.diary import Diary
from tests.chaos.kinds import (
    EVERY,
    PARTS,
    SNOOZES,
    Blank,
    Both,
    Brief,
    Doomed,
    Flaky,
    Follow,
    Latest,
    Long,
    LongAsync,
    Meet,
    MeetAsync,
    MeetOnce,
    MeetParts,
    MeetWrite,
    Neighbour,
    Nothing,
    Once,
    Only,
    Ordered,
    Overdue,
    OverdueAsync,
    Paced,
    Pair,
    Parts,
    Patient,
    PatientAsync,
    Poison,
    Resigned,
    Short,
    Single,
    Sleepy,
    Sole,
    Tick,
    Vanishing,
    Windowed,
    Write,
    WriteAsync,
)
from tests.chaos.rows import Effect, Reference, effect, make_async_engine, make_engine
from tests.chaos.signs import CALM, called_off, is_open, presence

SOON = timedelta(milliseconds=100)
MOST_PATIENT = 60.0
"""Seconds after which a run that is cancelled, and does not learn of it, gives in."""

folder = Path(os.environ.get("SAJOBS_CHAOS_FOLDER", "."))
url = make_url(os.environ.get("SAJOBS_CHAOS_URL", "sqlite://"))
is_sqlite = url.get_backend_name() == "sqlite"
# As many connections as slots and handlers that may hang: one that is lost is missed.
pool = {} if is_sqlite else {"pool_size": 9, "max_overflow": 0}
jobs = JobApp(
    sessionmaker(make_engine(url, **pool)), async_sessionmaker(make_async_engine(url, **pool))
)

_diary: Diary | None = None
_begun: set[Run] = set()


def diary() -> Diary:
    global _diary
    _diary = _diary or Diary(folder)
    return _diary


@jobs.middleware
@contextmanager
def keep_diary(run: Run) -> Iterator[None]:
    if run not in _begun:  # a run whose transaction lost against another is called again
        _begun.add(run)
        diary().write("began", run)
    try:
        yield
    finally:
        diary().write("over", run, "told" if run.should_stop else "untold")


@jobs.handler(Write)
@jobs.handler(Vanishing)
@jobs.handler(Only)
@jobs.handler(Sole)
@jobs.handler(Windowed)
def write(session: Session, payload: object) -> None:
    session.add(effect())


@jobs.handler(WriteAsync)
async def write_async(session: AsyncSession, payload: WriteAsync) -> None:
    session.add(effect())
    await session.flush()


@jobs.handler(Latest)
def latest(session: Session, payload: Latest) -> None:
    session.add(effect(intent_id=payload.intent_id))


@jobs.handler(Follow)
def follow(session: Session, payload: Follow) -> None:
    session.add(effect())
    session.add(enqueue(Write(payload.n)))


@jobs.handler(Brief)
def brief(session: Session, payload: Brief) -> None:
    session.add_all([effect(), Reference(job_id=current_run().job_id)])


@jobs.handler(Sleepy)
def sleepy(session: Session, payload: Sleepy) -> Snooze | None:
    before = session.scalar(select(func.count()).where(Effect.job_id == current_run().job_id.hex))
    assert before is not None
    last = before >= SNOOZES
    session.add(effect(last))
    return None if last else Snooze(SOON)


@jobs.handler(Flaky)
def flaky(session: Session, payload: Flaky) -> None:
    session.add(effect())
    session.flush()
    if (payload.n + current_run().attempt) % 3:
        raise RuntimeError("flaky")


@jobs.handler(Doomed)
def doomed(session: Session, payload: Doomed) -> None:
    session.add(effect())
    session.flush()
    raise RuntimeError("doomed")


@jobs.handler(Resigned)
def resigned(session: Session, payload: Resigned) -> Cancel:
    session.add(effect())
    return Cancel("resigned")


@jobs.handler(Nothing)
@jobs.handler(Blank)
def nothing(session: Session, payload: object) -> None:
    pass


# --- long ones --------------------------------------------------------------------------------------


@jobs.handler(Long)
def long(session: Session, payload: Long) -> None:
    session.add(effect())
    _flush(session)
    until = time.monotonic() + payload.seconds
    while time.monotonic() < until:
        if current_run().should_stop:
            raise RuntimeError("told to stop")
        time.sleep(0.02)


@jobs.handler(LongAsync)
async def long_async(session: AsyncSession, payload: LongAsync) -> None:
    await asyncio.sleep(payload.seconds)
    session.add(effect())


@jobs.handler(Patient)
def patient(session: Session, payload: Patient) -> None:
    session.add(effect())
    _flush(session)
    try:
        for wait in _waits(payload.seconds):
            time.sleep(wait)
    except BaseException:  # it has been told, and wants to commit all the same
        session.add(effect())


@jobs.handler(PatientAsync)
async def patient_async(session: AsyncSession, payload: PatientAsync) -> None:
    try:
        for wait in _waits(payload.seconds):
            await asyncio.sleep(wait)
    except asyncio.CancelledError:
        pass
    session.add(effect())


def _waits(seconds: float) -> Iterator[float]:
    """Yield pauses for so long; longer while somebody is about to cancel the job: it is to be told."""
    run, began = current_run(), time.monotonic()
    while (passed := time.monotonic() - began) < MOST_PATIENT:
        if run.should_stop or (passed >= seconds and not called_off(folder, run.job_id).exists()):
            return
        yield 0.02


@jobs.handler(Parts, transaction="manual")
def parts(session: Session, payload: Parts) -> None:
    for _ in range(PARTS):
        session.add(effect(last=False))
        session.commit()
        time.sleep(0.3)
    session.add(effect())


@jobs.handler(Overdue)
def overdue(session: Session, payload: Overdue) -> None:
    session.add(effect())
    _flush(session)
    for _ in range(200):
        time.sleep(0.05)


@jobs.handler(OverdueAsync)
async def overdue_async(session: AsyncSession, payload: OverdueAsync) -> None:
    session.add(effect())
    await asyncio.sleep(10)


def _flush(session: Session) -> None:
    if not is_sqlite:  # it would keep the write lock
        session.flush()


# --- limits -----------------------------------------------------------------------------------------


@jobs.handler(Pair)
@jobs.handler(Single)
@jobs.handler(Paced)
@jobs.handler(Both)
def limited(session: Session, payload: Pair | Single | Paced | Both) -> None:
    time.sleep(payload.seconds)
    _count(session)
    session.add(effect())


@jobs.handler(Ordered)
def ordered(session: Session, payload: Ordered) -> Snooze | None:
    time.sleep(0.2)
    _count(session)
    match payload.n if current_run().attempt == 1 else 0:
        case 1:
            raise RuntimeError("the first time")
        case 2:
            return Snooze(SOON)
        case 3:
            raise Retry(SOON)
        case 4:
            raise Fail("in its turn")
    session.add(effect())
    return None


def _count(session: Session) -> None:
    """Write down how many jobs count against the own limit, this one among them, as one statement sees them."""
    run, other = current_run(), aliased(Job)
    key = select(Job.limit_key).where(Job.id == run.job_id).scalar_subquery()
    count = select(func.count()).where(other.state == "running", other.limit_key == key)
    diary().write("counted", run, str(session.scalar(count)))


# --- schedules --------------------------------------------------------------------------------------


def of_tick(tick: datetime) -> Tick:
    return Tick(tick.timestamp())


jobs.schedule("all", f"@every {EVERY['all']}s", of_tick, catch_up="all")
jobs.schedule("once", f"@every {EVERY['once']}s", of_tick, catch_up="once")
jobs.schedule("skip", f"@every {EVERY['skip']}s", Tick())


@jobs.handler(Tick)
def tick(session: Session, payload: Tick) -> None:
    at = current_run().scheduled_at
    if at is None or payload.at not in (None, at.timestamp()):
        raise Fail(f"of the tick {payload.at}, scheduled at {at}")
    session.add(effect())


# --- crashes ----------------------------------------------------------------------------------------


@jobs.handler(Once)
@jobs.handler(Neighbour)
@jobs.handler(Short)
def short(session: Session, payload: Once | Neighbour | Short) -> None:
    time.sleep(payload.seconds)
    session.add(effect())


@jobs.handler(Poison)
def poison(session: Session, payload: Poison) -> None:
    time.sleep(0.2)  # so that it has neighbours
    run = current_run()
    if run.claim.crashes < payload.kills and not (folder / CALM).exists():
        diary().write("poisoned", run)
        os.kill(os.getpid(), signal.SIGKILL)
    session.add(effect())


# --- when all is quiet ------------------------------------------------------------------------------


@jobs.handler(Meet)
@jobs.handler(MeetOnce)
def meet(session: Session, payload: Meet | MeetOnce) -> None:
    if not is_sqlite:
        session.execute(select(1))  # each has a connection of the pool
    with presence(folder, payload.round, current_run()):
        for wait in _until_open(payload.round):
            time.sleep(wait)


@jobs.handler(MeetAsync)
async def meet_async(session: AsyncSession, payload: MeetAsync) -> None:
    if not is_sqlite:
        await session.execute(select(1))
    with presence(folder, payload.round, current_run()):
        for wait in _until_open(payload.round):
            await asyncio.sleep(wait)


@jobs.handler(MeetParts, transaction="manual")
def meet_parts(session: Session, payload: MeetParts) -> None:
    with presence(folder, payload.round, current_run()):
        for wait in _until_open(payload.round):
            time.sleep(2 * wait)
            session.add(effect(last=False))
            session.commit()
    session.add(effect())


@jobs.handler(MeetWrite)
def meet_write(session: Session, payload: MeetWrite) -> None:
    with presence(folder, payload.round, current_run()):
        for wait in _until_open(payload.round):
            if current_run().should_stop:
                break
            time.sleep(wait)
    session.add(effect())


def _until_open(round_: str) -> Iterator[float]:
    while not is_open(folder, round_):
        yield 0.05
