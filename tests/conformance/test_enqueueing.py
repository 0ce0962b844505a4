"""A job is part of the caller's transaction, in whichever session, and is stored as it was given."""

import asyncio
import inspect
import sys
import uuid
from collections.abc import Awaitable, Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum
from typing import Any

import attrs
import flask
import flask_sqlalchemy
import msgspec
import pydantic
import pytest
import sqlmodel
from sqlalchemy import event, func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import Session, scoped_session, sessionmaker

import sqlalchemy_jobs
from sqlalchemy_jobs import Job, JobApp, JobState, Worker, enqueue, enqueue_many, job
from sqlalchemy_jobs.columns import server_now
from sqlalchemy_jobs.errors import EnqueueError, PayloadError
from tests.databases import NAMES, Database
from tests.domain import Order


@job("send_receipt", queue="mail", priority=-1, max_attempts=7)
@dataclass
class SendReceipt:
    order_id: int


@job("crawl")
@attrs.frozen
class Crawl:
    page: str


@job("export")
class Export(msgspec.Struct):
    columns: tuple[str, ...]


@job("invoice")
class Invoice(pydantic.BaseModel):
    number: int
    due: date


# --------------------------------------------------------------------------- sessions of every make

Script = Callable[[Any], Generator[Callable[[], Any], Any, None]]
"""What an application does with its session. It yields each call that an AsyncSession makes awaitable."""


def follow(script: Script, session: Any) -> None:
    steps = script(session)
    result = None
    with closing(steps):
        while True:
            try:
                step = steps.send(result)
            except StopIteration:
                return
            result = step()


async def follow_async(script: Script, session: Any) -> None:
    steps = script(session)
    result = None
    with closing(steps):
        while True:
            try:
                step = steps.send(result)
            except StopIteration:
                return
            result = step()
            if inspect.isawaitable(result):
                result = await result


def by_session(database: Database, script: Script) -> None:
    with Session(database.engine()) as session:
        follow(script, session)


def by_scoped_session(database: Database, script: Script) -> None:
    session = scoped_session(database.sessions())
    try:
        follow(script, session)
    finally:
        session.remove()


def by_sqlmodel(database: Database, script: Script) -> None:
    with sqlmodel.Session(database.engine()) as session:
        follow(script, session)


def by_flask_sqlalchemy(database: Database, script: Script) -> None:
    app, db = flask_application(database)
    with app.app_context():
        try:
            follow(script, db.session)
        finally:
            db.session.remove()
            db.engine.dispose()


def by_async_session(database: Database, script: Script) -> None:
    asyncio.run(in_async_session(database, script, database.async_url.drivername))


def by_asyncpg(database: Database, script: Script) -> None:
    asyncio.run(in_async_session(database, script, "postgresql+asyncpg"))


def by_async_scoped_session(database: Database, script: Script) -> None:
    async def main() -> None:
        engine = database.async_engine()
        session = async_scoped_session(async_sessionmaker(engine), asyncio.current_task)
        try:
            await follow_async(script, session)
        finally:
            await session.remove()
            await engine.dispose()

    asyncio.run(main())


async def in_async_session(database: Database, script: Script, driver: str) -> None:
    engine = database.async_engine(database.url.set(drivername=driver))
    try:
        async with AsyncSession(engine) as session:
            await follow_async(script, session)
    finally:
        await engine.dispose()


def flask_application(database: Database) -> tuple[flask.Flask, flask_sqlalchemy.SQLAlchemy]:
    app = flask.Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = database.url
    db = flask_sqlalchemy.SQLAlchemy(app)
    if database.name == "sqlite":
        with app.app_context():
            sqlalchemy_jobs.sqlite.configure(db.engine)
    return app, db


Way = Callable[[Database, Script], None]
SYNC = [by_session, by_scoped_session, by_sqlmodel, by_flask_sqlalchemy]
ASYNC = [by_async_session, by_async_scoped_session]


def every_way(ways: Iterable[Way], names: Iterable[str] = NAMES) -> Any:
    pairs = [(name, way) for name in names for way in ways]
    if by_async_session in ways:
        pairs.append(("postgresql", by_asyncpg))
    return pytest.mark.parametrize(
        ("database", "way"),
        pairs,
        indirect=["database"],
        ids=[f"{name}-{way.__name__}" for name, way in pairs],
    )


in_every_session = every_way([*SYNC, *ASYNC])


def rows(database: Database) -> list[Job]:
    with database.sessions(expire_on_commit=False).begin() as session:
        found = list(session.scalars(select(Job).order_by(Job.id)))
        session.expunge_all()
        return found


def orders(database: Database) -> int:
    with database.session.begin() as session:
        return session.scalar(select(func.count()).select_from(Order)) or 0


# ----------------------------------------------------------------------- one transaction with the rest


@in_every_session
def test_commit_leaves_the_job_beside_the_domain_data(database: Database, way: Way) -> None:
    ids: list[uuid.UUID] = []

    def script(session: Any) -> Any:
        order = Order(paid=True)
        session.add(order)
        yield session.flush
        made = enqueue(
            SendReceipt(order.id), tags=["new", "ünïcode"], headers={"trace": "\U0001f600"}
        )
        ids.append(made.id)
        session.add(made)
        yield session.commit

    way(database, script)
    (found,) = rows(database)
    assert found.id == ids[0]
    assert (found.kind, found.queue, found.priority, found.max_attempts) == (
        "send_receipt",
        "mail",
        -1,
        7,
    )
    assert found.payload.keys() == {"order_id"}
    assert (found.state, found.attempt, found.failures) == (JobState.READY, 0, 0)
    assert found.worker_id is None
    assert (found.tags, found.headers) == (["new", "ünïcode"], {"trace": "\U0001f600"})
    assert orders(database) == 1


@in_every_session
def test_a_duplicate_is_left_out_and_the_rest_commits(database: Database, way: Way) -> None:
    ids: list[uuid.UUID] = []

    def script(session: Any) -> Any:
        first, second = (enqueue(SendReceipt(n), unique_key="k") for n in (1, 2))
        ids.append(first.id)
        session.add_all([first, second, Order()])
        yield session.flush
        assert (first.duplicate_of, second.duplicate_of) == (None, ids[0])
        assert second not in session
        yield session.commit

    way(database, script)
    assert [each.id for each in rows(database)] == ids
    assert orders(database) == 1


@in_every_session
def test_rollback_leaves_no_job(database: Database, way: Way) -> None:
    def script(session: Any) -> Any:
        session.add(Order())
        session.add(enqueue(SendReceipt(1)))
        yield session.flush
        session.add(enqueue(SendReceipt(2)))  # not even flushed
        yield session.rollback
        yield session.commit

    way(database, script)
    assert rows(database) == []
    assert orders(database) == 0


@in_every_session
def test_a_session_that_is_left_without_commit_leaves_no_job(database: Database, way: Way) -> None:
    def script(session: Any) -> Any:
        session.add_all([Order(), enqueue(SendReceipt(1))])
        yield session.flush

    way(database, script)
    assert rows(database) == []


@in_every_session
def test_the_rollback_of_a_savepoint_takes_its_jobs_along_and_no_others(
    database: Database, way: Way
) -> None:
    def script(session: Any) -> Any:
        session.add(enqueue(SendReceipt(1)))
        yield session.flush
        savepoint = yield session.begin_nested
        session.add_all([Order(), enqueue(SendReceipt(2))])
        yield session.flush
        yield savepoint.rollback
        savepoint = yield session.begin_nested
        session.add(enqueue(SendReceipt(3)))
        yield savepoint.commit
        yield session.commit

    way(database, script)
    assert [found.payload["order_id"] for found in rows(database)] == [1, 3]
    assert orders(database) == 0


@in_every_session
def test_a_job_of_a_kept_savepoint_goes_with_the_outer_rollback(
    database: Database, way: Way
) -> None:
    """On SQLite the driver's default would let it survive; sqlite.configure mends that."""

    def script(session: Any) -> Any:
        savepoint = yield session.begin_nested
        session.add_all([Order(), enqueue(SendReceipt(1))])
        yield savepoint.commit
        yield session.rollback

    way(database, script)
    assert rows(database) == []
    assert orders(database) == 0


@in_every_session
def test_a_refused_payload_leaves_the_transaction_usable(database: Database, way: Way) -> None:
    """It is refused before anything is sent."""

    def script(session: Any) -> Any:
        session.add(Order())
        yield session.flush
        for wrong in ("seven", float("nan"), "\0"):
            with pytest.raises(PayloadError, match=r"SendReceipt\.order_id"):
                enqueue(SendReceipt(wrong))  # type: ignore[arg-type]
        yield session.commit

    way(database, script)
    assert orders(database) == 1


# ----------------------------------------------------------------------------------- enqueue_many


def mixed(count: int) -> list[Any]:
    makers: list[Callable[[int], Any]] = [
        SendReceipt,
        lambda n: Crawl(f"/{n}"),
        lambda n: Export(("id", str(n))),
        lambda n: Invoice(number=n, due=date(2030, 1, 1)),
    ]
    return [makers[n % 4](n) for n in range(count)]


def many(
    session: Any, payloads: Iterable[Any], **options: Any
) -> Callable[[], list[uuid.UUID] | Awaitable[list[uuid.UUID]]]:
    if isinstance(session, AsyncSession | async_scoped_session):
        return lambda: session.run_sync(enqueue_many, payloads, **options)
    return lambda: enqueue_many(session, payloads, **options)


in_some_sessions = every_way([by_session, by_scoped_session, by_async_session])


@every_way([by_session, by_async_session])
def test_five_thousand_mixed_payloads_commit_with_the_callers_transaction(
    database: Database, way: Way
) -> None:
    ids: list[uuid.UUID] = []

    def script(session: Any) -> Any:
        session.add(Order())
        yield session.flush
        ids.extend((yield many(session, mixed(5_000))))
        yield session.commit

    way(database, script)
    assert len(set(ids)) == 5_000
    found = rows(database)
    assert [each.id for each in found] == sorted(ids) == ids
    assert [each.payload for each in found[:4]] == [
        {"order_id": 0},
        {"page": "/1"},
        {"columns": ["id", "2"]},
        {"number": 3, "due": "2030-01-01"},
    ]
    assert {(each.kind, each.queue, each.priority, each.max_attempts) for each in found} == {
        ("send_receipt", "mail", -1, 7),
        ("crawl", "default", 0, 20),
        ("export", "default", 0, 20),
        ("invoice", "default", 0, 20),
    }
    assert {(each.state, each.attempt, each.worker_id) for each in found} == {("ready", 0, None)}
    assert orders(database) == 1


@in_some_sessions
def test_the_rollback_takes_all_of_many_along(database: Database, way: Way) -> None:
    def script(session: Any) -> Any:
        session.add(Order())
        yield many(session, mixed(100))
        yield session.rollback
        savepoint = yield session.begin_nested
        yield many(session, mixed(50))
        yield savepoint.rollback
        yield many(session, [SendReceipt(1)])
        yield session.commit

    way(database, script)
    assert len(rows(database)) == 1
    assert orders(database) == 0


def test_many_are_one_statement(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["sqlalchemy_jobs.enqueue"]  # its name is also that of the function
    monkeypatch.setattr(module, "copy", lambda *_: False)  # which is no statement of a cursor's
    inserts: list[str] = []
    engine = database.engine()

    @event.listens_for(engine, "before_cursor_execute")
    def count(conn: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if statement.startswith("INSERT"):
            inserts.append(statement)

    with Session(engine) as session, session.begin():
        enqueue_many(session, mixed(5_000))
    assert len(inserts) == 1


def test_the_options_apply_to_all_of_many(database: Database) -> None:
    at = datetime(2030, 1, 1, tzinfo=UTC)
    with database.session.begin() as session:
        ids = enqueue_many(
            session,
            (payload for payload in mixed(4)),  # any iterable
            queue="night",
            priority=9,
            run_at=at,
            max_attempts=1,
            tags=["t"],
            headers={"h": "v"},
        )
    found = rows(database)
    assert [each.id for each in found] == ids
    for each in found:
        assert (each.queue, each.priority, each.run_at, each.max_attempts) == ("night", 9, at, 1)
        assert (each.tags, each.headers) == (["t"], {"h": "v"})


def test_nothing_of_many_is_inserted_when_one_is_refused(database: Database) -> None:
    with database.session.begin() as session:
        session.add(Order())
        with pytest.raises(PayloadError, match=r"SendReceipt\.order_id"):
            enqueue_many(session, [*mixed(10), SendReceipt("seven"), SendReceipt(1)])  # type: ignore[arg-type]
        with pytest.raises(EnqueueError, match="delay=60"):
            enqueue_many(session, mixed(3), delay=60)  # type: ignore[arg-type]
    assert rows(database) == []
    assert orders(database) == 1


def test_none_of_many_is_nothing(database: Database) -> None:
    with database.session.begin() as session:
        assert enqueue_many(session, []) == []
    assert rows(database) == []


# ------------------------------------------------------------------------------ what a handler is given


class Colour(Enum):
    RED = "red"


class Level(IntEnum):
    HIGH = 2


LAST_KEY = uuid.UUID(int=2**128 - 1)


@dataclass(frozen=True)
class Line:
    sku: str
    price: Decimal


@job("values")
@dataclass(frozen=True)
class Values:
    integer: int = 0
    number: float = 0.0
    text: str = ""
    at: datetime | None = None
    day: date = date(2000, 2, 29)
    clock: time = time(23, 59, 59, 999999)
    duration: timedelta = timedelta(days=-1, microseconds=1)
    key: uuid.UUID = LAST_KEY
    amount: Decimal = Decimal("0.10")
    colour: Colour = Colour.RED
    level: Level = Level.HIGH
    raw: bytes = bytes(range(256))
    lines: tuple[Line, ...] = (Line("a", Decimal("1E+3")), Line("b", Decimal("-0.0")))
    words: frozenset[str] = frozenset({"a", "b"})
    by_key: Any = None
    named: tuple[tuple[str, int], ...] = ()
    anything: Any = None


@job("model_values")
class ModelValues(pydantic.BaseModel, frozen=True):
    at: datetime
    lines: list[dict[str, Decimal]]
    key: uuid.UUID
    colour: Colour


VALUES: list[Any] = [
    Values(),
    Values(number=-0.0, text="minus zero"),
    Values(integer=2**63),
    Values(integer=-(10**30)),
    *(Values(number=number) for number in (0.1, 1e22, 1e308, 5e-324, 2**53 + 0.0)),
    *(
        Values(text=text)
        for text in (
            "ünïcode \U0001f600 \u2028 \ufeff",
            "\\u0000 \\ ' \" % :name %(name)s ? $1",
            "\x01\x1f\x7f\r\n\t",
            " \u00a0 ",
            "x" * 100_000,
        )
    ),
    Values(at=datetime(2030, 7, 1, 12, 0, 0, 1, tzinfo=timezone(timedelta(hours=-9, minutes=-30)))),
    Values(at=datetime(1, 1, 1, tzinfo=UTC)),
    Values(at=datetime(9999, 12, 31, 23, 59, 59, 999999)),  # noqa: DTZ001 (naive stays naive)
    Values(anything={"": None, "a b": [1, 2.5, "x", True, None, {}], "$.x": [], "ß": {"": ""}}),
    Values(anything=[[], [[]], {"b": 1, "a": 2}]),
    ModelValues(
        at=datetime(2030, 7, 1, tzinfo=UTC),
        lines=[{"a": Decimal("0.30")}],
        key=uuid.UUID(int=1),
        colour=Colour.RED,
    ),
    Crawl("/"),
    Export(("a", "b")),
    Invoice(number=1, due=date(2030, 1, 1)),
]


def drain(app: JobApp[Any, Any]) -> None:
    assert Worker(app, drain=True, poll_interval=timedelta(seconds=0.05)).run()


def test_a_handler_is_given_what_was_enqueued(database: Database) -> None:
    sessions = database.sessions()
    app = JobApp(sessions)
    given: list[Any] = []
    for cls in (Values, ModelValues, Crawl, Export, Invoice):

        @app.handler(cls)
        def keep(session: Session, payload: Any) -> None:
            given.append(payload)

    with sessions.begin() as session:
        # By both ways, since they are stored by different statements.
        session.add_all([enqueue(payload) for payload in VALUES])
        enqueue_many(session, VALUES)
    drain(app)
    for payload in VALUES:
        assert given.count(payload) == 2, payload
    assert {each.state for each in rows(database)} == {JobState.SUCCEEDED}


def test_the_row_of_an_alias_is_given_to_the_same_handler(database: Database) -> None:
    def upgrade(stored: dict[str, Any]) -> dict[str, Any]:
        return {"page": stored["site"]} if "site" in stored else stored

    @job("crawl_page", aliases=["crawl_site"], upgrade=upgrade)
    @dataclass
    class CrawlPage:
        page: str

    sessions = database.sessions()
    app = JobApp(sessions)
    given: list[tuple[str, CrawlPage]] = []

    @app.handler(CrawlPage)
    def keep(session: Session, payload: CrawlPage) -> None:
        given.append((sqlalchemy_jobs.current_run().kind, payload))

    with sessions.begin() as session:
        session.add(enqueue(CrawlPage("/new")))
        old = enqueue(CrawlPage("/"))
        old.kind, old.payload = "crawl_site", {"site": "/old", "gone": 1}
        session.add(old)
    assert [each.kind for each in rows(database)] == ["crawl_page", "crawl_site"]
    drain(app)
    assert sorted(given, key=lambda each: each[0]) == [
        ("crawl_page", CrawlPage("/new")),
        ("crawl_site", CrawlPage("/old")),
    ]


# -------------------------------------------------------------------------------------------- clocks

TOLERANCE = timedelta(minutes=5)


@pytest.fixture(params=[timedelta(hours=1), timedelta(hours=-1)], ids=["fast", "slow"])
def wrong_clock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> timedelta:
    """The client's clock is an hour fast, or slow; the server's is right."""

    def utcnow() -> datetime:
        return datetime.now(UTC) + request.param

    for module in ("models", "enqueue"):  # by module: the package's `enqueue` is the function
        monkeypatch.setattr(sys.modules[f"sqlalchemy_jobs.{module}"], "utcnow", utcnow)
    return request.param


# SQLite has no server: its clock is the client's.
with_a_server = every_way([by_session, by_async_session], ["postgresql", "mysql"])


def until_due(database: Database) -> list[timedelta]:
    """How long each job has still to wait, by the server's clock."""
    with database.session.begin() as session:
        now = session.scalar(select(server_now()))
        assert now is not None
        return [found.run_at - now for found in session.scalars(select(Job).order_by(Job.id))]


@with_a_server
def test_a_client_whose_clock_is_wrong_enqueues_jobs_that_are_due_now(
    database: Database, way: Way, wrong_clock: timedelta
) -> None:
    def script(session: Any) -> Any:
        session.add_all([enqueue(SendReceipt(1)), enqueue(SendReceipt(2))])
        yield session.flush
        session.add(enqueue(SendReceipt(3)))
        yield many(session, [SendReceipt(4)])
        yield session.commit
        session.add(enqueue(SendReceipt(5)))
        yield session.commit

    way(database, script)
    left = until_due(database)
    assert len(left) == 5
    assert all(-TOLERANCE < each <= timedelta(0) for each in left), left


@pytest.mark.parametrize("seconds", [0.4, 5])
def test_a_job_is_due_now_however_long_the_server_takes_to_tell_the_time(
    row_locks: Database, monkeypatch: pytest.MonkeyPatch, wrong_clock: timedelta, seconds: float
) -> None:
    """Between its answer and ours there is no telling when it was: the job must not wait for that."""
    on_the_way = timedelta(0)

    def utcnow() -> datetime:
        return datetime.now(UTC) + wrong_clock + on_the_way

    for module in ("models", "enqueue"):
        monkeypatch.setattr(sys.modules[f"sqlalchemy_jobs.{module}"], "utcnow", utcnow)
    engine = row_locks.engine()

    @event.listens_for(engine, "before_cursor_execute")
    def slow(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        nonlocal on_the_way
        if statement.startswith("SELECT") and "TIMESTAMP" in statement.upper():
            on_the_way += timedelta(seconds=seconds)

    with Session(engine) as session:
        session.add(enqueue(SendReceipt(1)))
        session.commit()
        enqueue_many(session, [SendReceipt(2)])
        session.commit()
    assert on_the_way
    left = until_due(row_locks)
    assert len(left) == 2
    assert all(-TOLERANCE < each <= timedelta(0) for each in left), left


def test_a_job_is_due_as_soon_as_it_is_inserted(database: Database) -> None:
    """Also by SQLite's clock, which has milliseconds where ours has microseconds."""
    waiting = select(func.count()).select_from(Job).where(Job.run_at > server_now())
    with database.session.begin() as session:
        for number in range(100):
            enqueue_many(session, [SendReceipt(number)])
            assert session.scalar(waiting) == 0
            session.add(enqueue(SendReceipt(number)))
            assert session.scalar(waiting) == 0


@with_a_server
def test_a_delay_is_counted_by_the_servers_clock(
    database: Database, way: Way, wrong_clock: timedelta
) -> None:
    def script(session: Any) -> Any:
        session.add(enqueue(SendReceipt(1), delay=timedelta(minutes=10)))
        yield many(session, [SendReceipt(2)], delay=timedelta(minutes=10))
        yield session.commit

    way(database, script)
    left = until_due(database)
    assert len(left) == 2
    assert all(timedelta(0) <= timedelta(minutes=10) - each < TOLERANCE for each in left), left


@with_a_server
def test_an_explicit_run_at_is_kept_whatever_the_clock_says(
    database: Database, way: Way, wrong_clock: timedelta
) -> None:
    at = datetime(2030, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)

    def script(session: Any) -> Any:
        session.add(enqueue(SendReceipt(1), run_at=at))
        yield many(session, [SendReceipt(2)], run_at=at)
        yield session.commit

    way(database, script)
    assert [each.run_at for each in rows(database)] == [at, at]


@with_a_server
def test_a_run_at_that_is_set_by_hand_is_kept(
    database: Database, way: Way, wrong_clock: timedelta
) -> None:
    at = datetime(2030, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)

    def script(session: Any) -> Any:
        made = enqueue(SendReceipt(1))
        made.run_at = at
        session.add(made)
        yield session.commit

    way(database, script)
    assert [each.run_at for each in rows(database)] == [at]


@with_a_server
def test_a_job_that_is_added_again_after_a_rollback_is_not_moved_twice(
    database: Database, way: Way, wrong_clock: timedelta
) -> None:
    def script(session: Any) -> Any:
        made = enqueue(SendReceipt(1))
        session.add(made)
        yield session.flush
        yield session.rollback
        session.add(made)
        yield session.commit

    way(database, script)
    (left,) = until_due(database)
    assert -TOLERANCE < left <= timedelta(0)


def test_a_due_job_of_a_wrong_clock_is_run_at_once(
    mysql: Database, postgresql: Database, wrong_clock: timedelta
) -> None:
    for database in (mysql, postgresql):
        sessions = database.sessions()
        app = JobApp(sessions)
        app.handler(SendReceipt)(lambda session, payload: payload.order_id)
        with sessions.begin() as session:
            session.add(enqueue(SendReceipt(7)))
            session.add(enqueue(SendReceipt(8), delay=timedelta(minutes=10)))
        drain(app)
        assert {each.payload["order_id"]: each.state for each in rows(database)} == {
            7: JobState.SUCCEEDED,
            8: JobState.READY,
        }


def test_a_job_is_due_at_once_and_a_delayed_one_is_not(database: Database) -> None:
    sessions = database.sessions()
    app = JobApp(sessions)
    app.handler(SendReceipt)(lambda session, payload: None)
    with sessions.begin() as session:
        session.add(enqueue(SendReceipt(1)))
        session.add(enqueue(SendReceipt(2), delay=timedelta(hours=1)))
        session.add(enqueue(SendReceipt(3), run_at=datetime.now(UTC) + timedelta(hours=1)))
        session.add(enqueue(SendReceipt(4), run_at=datetime(2001, 1, 1, tzinfo=UTC)))
    drain(app)
    assert {each.payload["order_id"]: each.state for each in rows(database)} == {
        1: JobState.SUCCEEDED,
        2: JobState.READY,
        3: JobState.READY,
        4: JobState.SUCCEEDED,
    }


# ----------------------------------------------------------------------------------------- datetimes

OFFSETS = [timedelta(0), timedelta(hours=2), timedelta(hours=-9, minutes=-30), timedelta(hours=14)]
INSTANT = datetime(2030, 6, 30, 22, 30, 0, 123456, tzinfo=UTC)


@every_way([by_session, by_async_session])
def test_a_run_at_with_an_offset_is_stored_as_the_same_instant(
    database: Database, way: Way
) -> None:
    def script(session: Any) -> Any:
        for offset in OFFSETS:
            session.add(enqueue(SendReceipt(1), run_at=INSTANT.astimezone(timezone(offset))))
        yield session.commit
        found = yield lambda: session.scalars(select(Job.run_at))
        assert [(each, each.utcoffset()) for each in found] == [(INSTANT, timedelta(0))] * 4

    way(database, script)
    assert [each.run_at for each in rows(database)] == [INSTANT] * 4


def test_instants_are_comparable_in_queries_whatever_their_offset(database: Database) -> None:
    tick = timedelta(microseconds=1)
    with database.session.begin() as session:
        session.add(enqueue(SendReceipt(1), run_at=INSTANT))
        session.flush()
        for offset in OFFSETS:
            same = INSTANT.astimezone(timezone(offset))
            for condition, holds in [
                (Job.run_at == same, True),
                (Job.run_at < same, False),
                (Job.run_at <= same, True),
                (Job.run_at < same + tick, True),
                (Job.run_at > same - tick, True),
                (Job.run_at.between(same, same), True),
                (Job.run_at.in_([same]), True),
            ]:
                found = session.scalar(select(func.count()).select_from(Job).where(condition))
                assert found == int(holds), (str(condition), offset)


def test_a_datetime_that_is_assigned_later_is_stored_as_the_same_instant(
    database: Database,
) -> None:
    there = INSTANT.astimezone(timezone(timedelta(hours=-9, minutes=-30)))
    with database.session.begin() as session:
        session.add(enqueue(SendReceipt(1)))
    with database.session.begin() as session:
        session.scalars(select(Job)).one().run_at = there
    assert [each.run_at for each in rows(database)] == [INSTANT]


def test_a_naive_datetime_is_refused_in_assignments_and_queries(database: Database) -> None:
    naive = datetime(2030, 1, 1)  # noqa: DTZ001
    with database.session() as session:
        made = enqueue(SendReceipt(1))
        made.run_at = naive
        session.add(made)
        with pytest.raises(Exception, match="naive datetime"):
            session.flush()
        session.rollback()
        with pytest.raises(Exception, match="naive datetime"):
            session.execute(select(Job).where(Job.run_at < naive))
    assert rows(database) == []


def test_a_session_factory_is_all_that_enqueueing_needs(database: Database) -> None:
    """No JobApp, no handler, no worker."""
    with sessionmaker(database.engine()).begin() as session:
        session.add(enqueue(SendReceipt(1)))
    assert len(rows(database)) == 1
