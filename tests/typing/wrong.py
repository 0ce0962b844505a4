"""Mistakes that the type checkers catch: each line marked so, and no other line, is an error in both."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker
from sqlmodel import Session as SQLModelSession

from sqlalchemy_jobs import (
    Handlers,
    Job,
    JobApp,
    Limit,
    Retry,
    Run,
    Schedule,
    Snooze,
    Unique,
    cancel,
    enqueue,
    enqueue_many,
    job,
    pause_queue,
    pause_schedule,
    requeue,
    set_queue,
)


@job("crawl")
@dataclass(frozen=True, kw_only=True)
class Crawl:
    page: str


@job("thumbnail")
@dataclass(frozen=True)
class Thumbnail:
    path: str


@job("no_fields")
class NoFields:
    path: str = ""


Limit(3)  # error: by name only
Limit(concurrency="3")  # error: a number
Limit(rate=100)  # error: a string
Limit(concurrency=1, key=["page", 7])  # error: names of fields
job("k", limit=3)  # error: a Limit

both = JobApp(sessionmaker(), async_sessionmaker())
sync_only = JobApp(sessionmaker())
async_only = JobApp(async_sessionmaker())
sqlmodel = JobApp(sessionmaker(class_=SQLModelSession))
elsewhere = Handlers[Session, AsyncSession]()

# --- declaring -------------------------------------------------------------------------------------


@job  # error: the kind is missing
@dataclass
class WithoutKind:
    path: str


@job()  # error: the kind is missing
@dataclass
class WithEmptyParentheses:
    path: str


@job(kind="by_name")  # error: the kind is positional
@dataclass
class KindByName:
    path: str


@job("misspelt", max_attempt=3)  # error: no such option
@dataclass
class Misspelt:
    path: str


@job("seconds", backoff=lambda failures: failures * 60)  # error: wanted a timedelta
@dataclass
class BackoffInSeconds:
    path: str


job("classes", give_up_on=[ValueError("bad")])  # error: an instance, not a class
job("one_word", upgrade=lambda stored: None)  # error: upgrade gives nothing back
Crawl("/")  # error: its own constructor takes no positional arguments
Thumbnail("a.png").path = "b.png"  # error: frozen by its author
job("not_a_class")(Thumbnail("a.png"))  # error: an instance, not a class

# --- enqueueing ------------------------------------------------------------------------------------

enqueue(NoFields())  # error: not a dataclass, attrs class, Struct or pydantic model
enqueue(object())  # error: not a payload
enqueue({"page": "/"})  # error: not a payload
enqueue(Crawl)  # error: the class, not an instance
enqueue(payload=Thumbnail("a.png"))  # error: positional only
enqueue(Thumbnail("a.png"), "mail")  # error: options are keyword only
enqueue(Thumbnail("a.png"), delay=60)  # error: seconds
enqueue(Thumbnail("a.png"), run_at=timedelta(hours=1))  # error: that is a delay
enqueue(Thumbnail("a.png"), run_at="tomorrow")  # error: a datetime is wanted
enqueue(Thumbnail("a.png"), delay=datetime.now())  # error: that is a run_at  # noqa: DTZ005
enqueue(Thumbnail("a.png"), priority="high")  # error: a number is wanted
enqueue(Thumbnail("a.png"), headers={"tries": 3})  # error: strings only
enqueue(Thumbnail("a.png"), max_attempts=None, attempts=3)  # error: no such option
Job(Thumbnail("a.png"))  # error: rows are made by enqueue
Snooze(300)  # error: seconds
Snooze()  # error: for how long?
Retry(60)  # error: seconds


def enqueue_wrongly(session: Session, factory: sessionmaker[Session]) -> None:
    enqueue_many([Thumbnail("a.png")])  # error: the session comes first
    enqueue_many(session, Thumbnail("a.png"))  # error: not a collection
    enqueue_many(session, [NoFields()])  # error: not a payload
    enqueue_many(session, [Crawl])  # error: the class, not an instance
    enqueue_many(factory, [Thumbnail("a.png")])  # error: a factory, not a session


async def enqueue_wrongly_in_async_code(session: AsyncSession) -> None:
    enqueue_many(session, [Thumbnail("a.png")])  # error: run_sync is missing
    await session.run_sync(enqueue_many, Thumbnail("a.png"))  # error: not a collection


# --- handlers --------------------------------------------------------------------------------------


@both.handler(Crawl)  # error: the payload of another handler
def other_payload(session: Session, payload: Thumbnail) -> None: ...


@both.handler(Crawl)  # error: sync with an async session
def sync_with_async_session(session: AsyncSession, payload: Crawl) -> None: ...


@both.handler(Crawl)  # error: async with a sync session
async def async_with_sync_session(session: Session, payload: Crawl) -> None: ...


@both.handler(Crawl)  # error: async, the payload of another handler
async def async_other_payload(session: AsyncSession, payload: Thumbnail) -> None: ...


@async_only.handler(Crawl)  # error: there are no sync sessions
def without_sessions(session: Session, payload: Crawl) -> None: ...


@sync_only.handler(Crawl)  # error: there are no async sessions
async def without_async_sessions(session: AsyncSession, payload: Crawl) -> None: ...


@sync_only.handler(Crawl)  # error: async with a sync session
async def async_in_a_sync_app(session: Session, payload: Crawl) -> None: ...


@sync_only.handler(Crawl)  # error: the app's sessions are plain
def special_session(session: SQLModelSession, payload: Crawl) -> None: ...


@both.handler(Crawl)  # error: swapped
def swapped(payload: Crawl, session: Session) -> None: ...


@both.handler(Crawl)  # error: the session is missing
def without_session(payload: Crawl) -> None: ...


@both.handler(Crawl)  # error: who would give the third?
def three_parameters(session: Session, payload: Crawl, mailer: object) -> None: ...


@both.handler(Crawl)  # error: cannot be stored as a result
def result_is_an_object(session: Session, payload: Crawl) -> object: ...


@both.handler(Crawl)  # error: cannot be stored as a result
def result_is_a_set(session: Session, payload: Crawl) -> set[int]:
    return {1}


@both.handler(Crawl)  # error: cannot be stored as a result
async def async_result_is_complex(session: AsyncSession, payload: Crawl) -> list[complex]:
    return [1j]


@both.handler(Crawl)  # error: Retry is raised, not returned
def retry_returned(session: Session, payload: Crawl) -> Retry | None: ...


@both.handler(Crawl)  # error: a generator
def generator(session: Session, payload: Crawl) -> Iterator[int]:
    yield 1


@both.handler(Crawl)  # error: an asynchronous generator
async def async_generator(session: AsyncSession, payload: Crawl) -> AsyncIterator[int]:
    yield 1


@both.handler  # error: which payload?
def bare_decorator(session: Session, payload: Crawl) -> None: ...


@elsewhere.handler(Crawl)  # error: the payload of another handler
def elsewhere_other_payload(session: Session, payload: Thumbnail) -> None: ...


both.handler(NoFields)  # error: no payload class
both.handler(Thumbnail("a.png"))  # error: an instance, not the class
both.handler("crawl")  # error: the kind, not the class
both.handler(Crawl, transaction="none")  # error: wrapped or manual
both.handler(Crawl, batch="10")  # error: a number is wanted
both.handler(Crawl, batch=10, transaction="manual")  # error: a batch has one transaction


@both.handler(Crawl, batch=10)  # error: a list of payloads is wanted
def batch_of_one(session: Session, payload: Crawl) -> None: ...


@both.handler(Crawl, batch=10)  # error: the payloads of another handler
async def batch_of_others(session: AsyncSession, payloads: list[Thumbnail]) -> None: ...


@both.handler(Crawl)  # error: without batch it is one payload
def list_without_batch(session: Session, payloads: list[Crawl]) -> None: ...


@both.handler(Crawl, batch=10)  # error: a list is wanted
def one_for_all(session: Session, payloads: list[Crawl]) -> Snooze:
    return Snooze(timedelta(hours=1))


@both.handler(Crawl, batch=10)  # error: cannot be stored as a result
def entries_are_objects(session: Session, payloads: list[Crawl]) -> list[object]:
    return [object()]


@both.handler(Crawl, batch=10)  # error: the class, not an instance
async def entries_are_classes(session: AsyncSession, payloads: list[Crawl]) -> list[type[Retry]]:
    return [Retry]


# --- apps and workers ------------------------------------------------------------------------------

JobApp()  # error: no sessions
JobApp(create_async_engine("sqlite+aiosqlite://"))  # error: an engine, not a factory
JobApp(Session())  # error: a session, not a factory
JobApp(async_sessionmaker(), sessionmaker())  # error: the wrong way round
JobApp(sessionmaker(), context="app")  # error: not callable


@both.middleware  # error: not a context manager
def no_context_manager(run: Run) -> None: ...


@both.middleware  # error: called with the run alone
def two_arguments(run: Run, payload: Any) -> Any: ...


both.include(Crawl)  # error: not Handlers
both.worker(lease=30)  # error: seconds
both.worker(queue="mail")  # error: no such option
both.worker(queues={"mail": "2"})  # error: a number is wanted


def enter_in_sync_code() -> None:
    both.worker(drain="yes").run()  # error: a bool is wanted


# --- unique jobs, cancelling ------------------------------------------------------------------------

Unique(("page",))  # error: keywords only
Unique(period=3600)  # error: seconds
Unique(on_conflict="ignore")  # error: keep, replace or raise
Unique(states=["ready"])  # error: of JobState
job("unique", unique=True)  # error: a Unique is wanted
enqueue(Thumbnail("a.png"), unique_key=7)  # error: a string is wanted
enqueue(Thumbnail("a.png")).duplicate_of = None  # error: read only


def cancel_wrongly(session: Session, made: Job) -> None:
    cancel(session, made)  # error: its id is wanted
    cancel(made.id)  # error: the session comes first
    requeue(session, made.id, timedelta(hours=1))  # error: by keyword, and a datetime
    requeue(session, made.id, delay=timedelta(hours=1))  # error: no such option


async def cancel_wrongly_in_async_code(session: AsyncSession, made: Job) -> None:
    cancel(session, made.id)  # error: run_sync is missing


# --- queues and kinds -----------------------------------------------------------------------------


def hold_up(session: Session, asynchronous: AsyncSession) -> None:
    pause_queue(asynchronous, "mail")  # error: an AsyncSession
    pause_queue(session, Crawl)  # error: a class, not a name
    set_queue(session, "mail", strategy="lifo")  # error: no such strategy
    set_queue(session, "mail", ageing=60)  # error: a number, not a timedelta
    set_queue(session, "mail", paused=True)  # error: that is pause_queue


# --- schedules --------------------------------------------------------------------------------------


def not_a_payload(tick: datetime) -> str:
    return ""


def not_of_a_tick(tick: str) -> Thumbnail:
    return Thumbnail(tick)


both.schedule("name", "@daily", NoFields())  # error: no payload
both.schedule("name", "@daily", Thumbnail)  # error: the class, not an instance
both.schedule("name", "@daily", not_a_payload)  # error: returns no payload
both.schedule("name", "@daily", not_of_a_tick)  # error: takes no datetime
both.schedule("name", "@daily")  # error: no payload
both.schedule("name", 5, Thumbnail("a.png"))  # error: a line is wanted
both.schedule("name", "@daily", Thumbnail("a.png"), catch_up="never")  # error: skip, once or all
both.schedule("name", "@daily", Thumbnail("a.png"), window=60)  # error: seconds
both.schedule("name", "@daily", Thumbnail("a.png"), delay=60)  # error: no such option
Schedule("name", "@daily", Thumbnail("a.png"), priority="high")  # error: a number is wanted
Schedule("name", "@daily", lambda tick: Thumbnail("a.png"))  # error: a row holds no function
Schedule(name="name", cron="@daily", payload=Thumbnail("a.png"))  # error: by position


def pause_wrongly(session: Session, schedule: Schedule) -> None:
    pause_schedule(session, schedule)  # error: its name is wanted
    schedule.window = 60  # error: seconds
