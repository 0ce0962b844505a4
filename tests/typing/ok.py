"""A tour of correct use: not a line of this file may be an error, in mypy --strict or in pyright."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Generic, TypeVar, assert_type
from uuid import UUID

import attrs
import msgspec
import pydantic
import pydantic.dataclasses
from sqlalchemy import ForeignKey, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session
from sqlalchemy.orm import sessionmaker as make
from sqlmodel import Session as SQLModelSession

from sqlalchemy_jobs import (
    Attempt,
    Cancel,
    Fail,
    Handlers,
    Job,
    JobApp,
    JobState,
    Limit,
    Retry,
    Run,
    Schedule,
    Snooze,
    Unique,
    backoff,
    cancel,
    current_run,
    current_runs,
    enqueue,
    enqueue_many,
    errors,
    job,
    pause_kind,
    pause_queue,
    pause_schedule,
    requeue,
    resume_kind,
    resume_queue,
    resume_schedule,
    set_queue,
)

# --- payload classes stay what their authors wrote -------------------------------------------------


class Size(StrEnum):
    SMALL = "small"
    LARGE = "large"


def renamed(stored: dict[str, object]) -> dict[str, object]:
    return {"page": stored.get("site")} | stored


@job("thumbnail")
@dataclass
class Thumbnail:
    path: str
    size: Size = Size.SMALL


@job("crawl", queue="web", priority=-3, max_attempts=5, aliases=["fetch"], upgrade=renamed)
@dataclass(frozen=True, slots=True, kw_only=True)
class Crawl:
    depth: int = 1
    page: str  # after a default: allowed by kw_only


@job("invite", give_up_on=(LookupError, PermissionError))
@attrs.frozen
class Invite:
    address: str
    sent_at: datetime | None = None


def by_error(failures: int, error: BaseException) -> timedelta:
    return timedelta(hours=failures) if isinstance(error, OSError) else timedelta(0)


@job(
    "by_error",
    backoff=backoff.ByError(by_error),
    timeout=timedelta(minutes=1),
    on_crash="fail",
    keep=timedelta(0),
)
@dataclass
class ByError:
    n: int


@job("doubling", backoff=backoff.exponential(timedelta(seconds=3), cap=timedelta(hours=1)))
@dataclass
class Doubling:
    n: int


@job("export", backoff=lambda failures: timedelta(minutes=failures))
class Export(msgspec.Struct, frozen=True, kw_only=True):
    limit: int | None = None
    columns: tuple[str, ...]


@job("invoice")
class Invoice(pydantic.BaseModel):
    number: int


@job("reminder")
@pydantic.dataclasses.dataclass
class Reminder:
    text: str


T = TypeVar("T")


@job("envelope")
@dataclass
class Envelope(Generic[T]):
    content: T


@job("own_init")
@dataclass(init=False)
class Period:
    days: int

    def __init__(self, weeks: int) -> None:
        self.days = weeks * 7


thumbnail = Thumbnail("a.png")
thumbnail.path = "b.png"  # not made read-only
assert_type(Crawl(page="/").depth, int)
assert_type(Envelope(3).content, int)
assert_type(Period(weeks=2).days, int)

# --- enqueue ---------------------------------------------------------------------------------------


def in_a_request(session: Session, now: datetime) -> list[UUID]:
    made = enqueue(thumbnail)
    assert_type(made, Job)
    assert_type(made.id, UUID)
    session.add(made)
    session.add(enqueue(Crawl(page="/"), queue="slow", priority=2, max_attempts=1))
    session.add(enqueue(Invite("a@example.com"), delay=timedelta(hours=1), tags=["mail", "new"]))
    session.add(enqueue(Export(columns=("id",)), run_at=now, headers={"trace": "1"}))
    session.add_all([enqueue(Invoice(number=1)), enqueue(Reminder("milk")), enqueue(Envelope("x"))])
    enqueue_many(session, (Crawl(page=str(page)) for page in range(9)), delay=timedelta(days=1))
    return enqueue_many(session, [thumbnail, Invoice(number=2)])


async def in_an_async_request(session: AsyncSession, invoices: Sequence[Invoice]) -> None:
    session.add(enqueue(invoices[0]))
    assert_type(await session.run_sync(enqueue_many, invoices), list[UUID])


def from_a_scoped_session(session: scoped_session[Session]) -> None:
    session.add(enqueue(Reminder("milk")))
    enqueue_many(session, [Reminder("bread")])


# --- handlers --------------------------------------------------------------------------------------

both = JobApp(make(), async_sessionmaker())
sync_only = JobApp(make())
async_only = JobApp(async_sessionmaker())
scoped = JobApp(scoped_session(make()))
sqlmodel = JobApp(make(class_=SQLModelSession))
batched = JobApp(make(), async_sessionmaker())


class OwnSession(AsyncSession):
    tenant: str


own = JobApp(async_sessionmaker(class_=OwnSession))


@both.handler(Thumbnail)
def shrink(session: Session, payload: Thumbnail) -> None:
    assert_type(current_run(), Run)
    session.add(enqueue(Reminder(payload.path)))


@both.handler(Crawl)
async def crawl(session: AsyncSession, payload: Crawl) -> dict[str, list[int]]:
    session.add(enqueue(Crawl(page=payload.page, depth=payload.depth - 1)))
    return {"statuses": [200, 404]}


@both.handler(Invite)
def invite(session: Session, payload: Invite) -> Snooze | Cancel | None:
    if payload.sent_at:
        return Cancel("sent already")
    if payload.address.endswith("@example.com"):
        raise Fail("a placeholder")
    return Snooze(timedelta(minutes=5)) if current_run().attempt == 1 else None


@both.handler(Export, transaction="manual")
async def export(session: AsyncSession, payload: Export) -> str:
    await session.commit()
    raise Retry(timedelta(minutes=1))


@sqlmodel.handler(Invoice, transaction="wrapped")
def invoice(session: SQLModelSession, payload: Invoice) -> Thumbnail:
    return Thumbnail(str(payload.number))


@scoped.handler(Reminder)
def remind(session: Session, payload: Reminder) -> bool:
    return True


@own.handler(Reminder)
async def remind_tenant(session: OwnSession, payload: Reminder) -> Snooze | str:
    return session.tenant


@async_only.handler(Invite)
async def invite_later(session: AsyncSession, payload: Invite) -> Mapping[str, int | None]:
    return {"sent": None}


@sync_only.handler(Invoice)
def wider_than_needed(session: object, payload: pydantic.BaseModel) -> None: ...


@sync_only.handler(Thumbnail)
def by_other_names(db: Session, what: Thumbnail, /, *, quality: int = 80) -> float:
    return quality / 100


@batched.handler(Thumbnail, batch=100)
def shrink_many(session: Session, payloads: list[Thumbnail]) -> None:
    assert_type(current_runs(), list[Run])


@batched.handler(Crawl, batch=20)
async def crawl_many(
    session: AsyncSession, payloads: list[Crawl]
) -> list[Snooze | dict[str, int] | OSError | None]:
    return [{"page": len(each.page)} for each in payloads]


@batched.handler(Invite, batch=7)
def invite_many(session: Session, payloads: Sequence[Invite]) -> list[Exception | None] | None:
    assert_type(payloads[0], Invite)
    return [Fail("a placeholder"), Retry(timedelta(minutes=1)), ValueError("no"), None]


@batched.handler(Reminder, batch=1)
async def remind_many(session: AsyncSession, payloads: list[Reminder]) -> None: ...


# A handler stays callable, as its own tests will call it.
assert_type(invite_many(Session(), [Invite("b@example.com")]), list[Exception | None] | None)
assert_type(invite(Session(), Invite("b@example.com")), Snooze | Cancel | None)

elsewhere = Handlers[Session, AsyncSession]()


@elsewhere.handler(Export)
def export_here(session: Session, payload: Export) -> None: ...


@elsewhere.handler(Invoice)
async def invoice_here(session: AsyncSession, payload: Invoice) -> None: ...


both.include(elsewhere)


# --- around them -----------------------------------------------------------------------------------


@both.middleware
@contextmanager
def timing(run: Run) -> Iterator[None]:
    yield


def embedded() -> None:
    with both.worker(queues={"mail": 2, "default": None}, lease=timedelta(seconds=30)) as worker:
        assert_type(worker.is_running, bool)
    with sync_only.worker(queues=["mail"], concurrency=3, poll_interval=timedelta(seconds=0.5)):
        pass


async def embedded_in_async_code() -> None:
    async with both.worker(shutdown_timeout=timedelta(seconds=1)):
        pass


# --- rows ------------------------------------------------------------------------------------------


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "order_"

    id: Mapped[int] = mapped_column(primary_key=True)
    receipt_id: Mapped[UUID | None] = mapped_column(ForeignKey(Job.id))


def look(session: Session) -> list[str | None]:
    waiting = select(Job).where(
        Job.state == JobState.READY, Job.kind == "crawl", Job.run_at < datetime.now(UTC)
    )
    for each in session.scalars(waiting):
        assert_type(each.run_at, datetime)
        assert_type(each.attempts, list[Attempt])
    return list(session.scalars(select(Attempt.message)))


# --- limits -----------------------------------------------------------------------------------------


@job("limited", limit=Limit(concurrency=3, rate="100/minute", key="page", name="pages"))
@dataclass
class Limited:
    page: str


@job("in_order", limit=Limit(key=("page", "part"), ordered=True))
@dataclass
class InOrder:
    page: str
    part: int


# --- unique jobs, cancelling ------------------------------------------------------------------------


@job(
    "sync_page",
    unique=Unique(
        fields=("page",),
        period=timedelta(hours=1),
        states=(JobState.READY, JobState.RUNNING),
        on_conflict="replace",
    ),
)
@dataclass
class SyncPage:
    page: str


def cancel_and_requeue(session: Session, scoped: scoped_session[Session], now: datetime) -> None:
    made = enqueue(SyncPage("/"), unique_key="front page")
    session.add(made)
    assert_type(made.duplicate_of, UUID | None)
    enqueue_many(session, [SyncPage("/")], unique_key="front page")
    assert_type(cancel(session, made.id, "not needed"), bool)
    assert_type(cancel(scoped, made.id), bool)
    try:
        assert_type(requeue(session, made.id, run_at=now), bool)
    except errors.DuplicateJob as error:
        assert_type(error.other, UUID | None)
        assert_type(error.key, str)


async def cancel_in_async_code(session: AsyncSession, job_id: UUID) -> None:
    assert_type(await session.run_sync(cancel, job_id, "not needed"), bool)
    assert_type(await session.run_sync(requeue, job_id), bool)


# --- queues and kinds -----------------------------------------------------------------------------


def hold_up(session: Session, scoped: scoped_session[Session]) -> None:
    for change in (pause_queue, resume_queue, pause_kind, resume_kind):
        assert_type(change(session, "mail"), bool)
        assert_type(change(scoped, "mail"), bool)
    set_queue(session, "mail", strategy="fifo", concurrency=3, rate="100/minute")
    set_queue(scoped, "mail", ageing=timedelta(seconds=60), concurrency=None, rate=None)


async def hold_up_async(session: AsyncSession) -> None:
    assert_type(await session.run_sync(pause_queue, "mail"), bool)
    await session.run_sync(set_queue, "mail", strategy="priority")


# --- schedules --------------------------------------------------------------------------------------


def crawl_at(tick: datetime) -> Crawl:
    return Crawl(page=f"/{tick:%Y}")


def reminders() -> Handlers[Session, AsyncSession]:
    several = Handlers[Session, AsyncSession]()
    several.schedule("daily", "@daily", Thumbnail("a.png"), queue="images", tags=["daily"])
    several.schedule("hourly", "0 * * * *", crawl_at, timezone="Europe/Berlin", catch_up="once")
    several.schedule(
        "all", "@every 90s", Invoice(number=1), catch_up="all", window=timedelta(hours=1)
    )
    return several


def change_schedules(
    session: Session, scoped: scoped_session[Session], app: JobApp[Session, AsyncSession]
) -> None:
    made = Schedule("one", "@hourly", Reminder("now"), priority=3, headers={"a": "b"}, paused=True)
    session.add(made)
    made.cron, made.paused, made.window = "@daily", False, timedelta(days=2)
    assert_type(made.next_tick, datetime | None)
    assert_type(pause_schedule(session, "one"), bool)
    assert_type(resume_schedule(scoped, "one"), bool)
    assert_type(app.run_schedule(session, "one"), Job)
    assert_type(current_run().scheduled_at, datetime | None)
    assert_type(current_run().schedule, str | None)
    try:
        Schedule("one", "* * *", Reminder("now"))
    except errors.ScheduleError as error:
        assert_type(error.position, int | None)
