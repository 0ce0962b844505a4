"""Making jobs without a database: what is refused, what warns, and what a job looks like."""

import copy
import gc
import pickle
import subprocess
import sys
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import StaticPool, create_engine, insert, select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    make_transient,
    mapped_column,
    relationship,
    scoped_session,
    sessionmaker,
)

import sqlalchemy_jobs
from sqlalchemy_jobs import Job, JobNeverAdded, JobState, enqueue, enqueue_many, job
from sqlalchemy_jobs.errors import DeclarationError, EnqueueError, PayloadError
from sqlalchemy_jobs.ids import uuid7


@job("send_receipt", queue="mail", priority=-3, max_attempts=10, aliases=["receipt"])
@dataclass
class SendReceipt:
    order_id: int
    password: str = ""


@pytest.fixture
def engine() -> Iterator[Any]:
    engine = create_engine("sqlite://", poolclass=StaticPool)
    sqlalchemy_jobs.sqlite.configure(engine)
    sqlalchemy_jobs.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def session(engine: Any) -> Iterator[Session]:
    with Session(engine) as session:
        yield session


def made(*arguments: Any, **options: Any) -> Job:
    """A job that is looked at and never added, on purpose."""
    result = enqueue(*arguments, **options)
    make_quiet(result)
    return result


def make_quiet(unwanted: Job) -> None:
    session = Session()
    session.add(unwanted)
    session.expunge(unwanted)


# -------------------------------------------------------------------------------- what a job holds


def test_what_is_not_given_comes_from_the_class() -> None:
    before = datetime.now(UTC)
    found = made(SendReceipt(7))
    after = datetime.now(UTC)
    assert (found.kind, found.queue, found.priority, found.max_attempts) == (
        "send_receipt",
        "mail",
        -3,
        10,
    )
    assert found.payload == {"order_id": 7, "password": ""}
    assert (found.tags, found.headers) == (None, None)
    assert found.state == JobState.READY
    assert (found.attempt, found.failures, found.crashes) == (0, 0, 0)
    assert before <= found.run_at == found.created_at <= after


def test_what_is_given_goes_before_the_class() -> None:
    found = made(
        SendReceipt(7),
        queue="slow",
        priority=0,
        max_attempts=1,
        tags=["a", "b c"],
        headers={"traceparent": "00-1"},
    )
    assert (found.queue, found.priority, found.max_attempts) == ("slow", 0, 1)
    assert (found.tags, found.headers) == (["a", "b c"], {"traceparent": "00-1"})


def test_a_delay_is_counted_from_now() -> None:
    found = made(SendReceipt(7), delay=timedelta(hours=1))
    assert found.run_at - found.created_at == timedelta(hours=1)
    found = made(SendReceipt(7), delay=timedelta(0))
    assert found.run_at == found.created_at


def test_run_at_is_kept_as_the_same_instant_in_utc() -> None:
    at = datetime(2030, 7, 1, 12, 0, 0, 123456, tzinfo=timezone(timedelta(hours=5, minutes=45)))
    found = made(SendReceipt(7), run_at=at)
    assert found.run_at == at
    assert found.run_at.tzinfo is UTC


def test_the_past_is_a_possible_run_at() -> None:
    at = datetime(2001, 1, 1, tzinfo=UTC)
    assert made(SendReceipt(7), run_at=at).run_at == at


def test_a_change_of_the_payload_after_enqueue_is_not_stored() -> None:
    payload = SendReceipt(7)
    found = made(payload)
    payload.order_id = 8
    assert found.payload["order_id"] == 7


def test_a_change_of_the_options_after_enqueue_is_not_stored() -> None:
    tags, headers = ["a"], {"k": "v"}
    found = made(SendReceipt(7), tags=tags, headers=headers)
    tags.append("b")
    headers["k"] = "w"
    assert (found.tags, found.headers) == (["a"], {"k": "v"})


def test_the_repr_has_no_payload() -> None:
    found = made(SendReceipt(4711, password="hunter2"), headers={"h": "secret"}, tags=["t"])
    assert repr(found) == f"<Job {found.id} send_receipt ready>"


# ---------------------------------------------------------------------------------------- refusals


def refusal(**options: Any) -> str:
    """The error of `enqueue`, which is also that of `enqueue_many`."""
    texts = set()
    for call in (
        lambda: enqueue(SendReceipt(1), **options),
        lambda: enqueue_many(Session(), [SendReceipt(1)], **options),
    ):
        with pytest.raises(EnqueueError) as caught:
            call()
        texts.add(str(caught.value))
    assert len(texts) == 1
    return texts.pop()


def test_a_naive_run_at_is_refused_with_the_line_to_write() -> None:
    text = refusal(run_at=datetime(2030, 1, 1))  # noqa: DTZ001
    assert "has no time zone" in text
    assert "run_at.replace(tzinfo=timezone.utc)" in text


def test_run_at_with_a_delay_is_refused() -> None:
    text = refusal(run_at=datetime(2030, 1, 1, tzinfo=UTC), delay=timedelta(seconds=1))
    assert "both given" in text


def test_run_at_with_no_delay_at_all_is_refused_too() -> None:
    assert "both given" in refusal(run_at=datetime(2030, 1, 1, tzinfo=UTC), delay=timedelta(0))


@pytest.mark.parametrize("run_at", ["tomorrow", 1893456000, timedelta(1), 0, "", False])
def test_a_run_at_that_is_no_datetime_is_refused(run_at: Any) -> None:
    assert "not a datetime" in refusal(run_at=run_at)


def test_a_date_is_no_run_at() -> None:
    assert "is a date, not a datetime" in refusal(run_at=datetime(2030, 1, 1, tzinfo=UTC).date())


@pytest.mark.parametrize("delay", [60, 0, 1.5])
def test_seconds_as_a_delay_are_refused_with_what_to_say(delay: Any) -> None:
    text = refusal(delay=delay)
    assert f"delay={delay}" in text
    assert f"say timedelta(seconds={delay})" in text


@pytest.mark.parametrize("delay", ["60", "", [], datetime(2030, 1, 1, tzinfo=UTC)])
def test_a_delay_that_is_no_duration_is_refused(delay: Any) -> None:
    assert "not a timedelta" in refusal(delay=delay)


def test_a_negative_delay_is_refused() -> None:
    assert "is negative" in refusal(delay=timedelta(microseconds=-1))


def test_a_delay_beyond_the_calendar_is_refused() -> None:
    assert refusal(delay=timedelta.max)


def test_a_run_at_beyond_the_calendar_in_utc_is_refused() -> None:
    """Its instant has no name in UTC."""
    assert refusal(run_at=datetime.max.replace(tzinfo=timezone(timedelta(hours=-1))))


def test_a_string_for_tags_is_refused_with_the_line_to_write() -> None:
    assert "write tags=['mail']" in refusal(tags="mail")


def test_too_many_tags_are_refused() -> None:
    assert "at most 20" in refusal(tags=[f"t{number}" for number in range(21)])
    assert len(made(SendReceipt(1), tags=[f"t{number}" for number in range(20)]).tags or ()) == 20


@pytest.mark.parametrize(
    "tag", ["", "a\nb", "\0", "\x1b", "\ud800", "x" * 101, 7, None, b"a"], ids=ascii
)
def test_unprintable_and_oversized_tags_are_refused(tag: Any) -> None:
    assert "printable" in refusal(tags=["fine", tag])


def test_tags_at_the_edge_are_kept() -> None:
    tags = ["x" * 100, "two words", "ünïcode \U0001f600"]
    assert made(SendReceipt(1), tags=tags).tags == tags


def test_tags_may_be_any_collection() -> None:
    assert made(SendReceipt(1), tags=("a", "b")).tags == ["a", "b"]
    assert made(SendReceipt(1), tags={"a"}).tags == ["a"]


@pytest.mark.parametrize("headers", [{"tries": 3}, {3: "x"}, {"x": None}, {"x": b"y"}])
def test_headers_are_strings(headers: Any) -> None:
    assert "wanted a string for a string" in refusal(headers=headers)


@pytest.mark.parametrize("headers", [{"x": "\0"}, {"\0": "x"}, {"x": "\ud800"}, {"\udfff": "x"}])
def test_headers_that_no_database_stores_are_refused(headers: Any) -> None:
    assert "NUL or a lone surrogate" in refusal(headers=headers)


@pytest.mark.parametrize("headers", ["a=b", ["a"], [("a", "b")], 7])
def test_headers_that_are_no_mapping_are_refused(headers: Any) -> None:
    assert "headers" in refusal(headers=headers)


@pytest.mark.parametrize("queue", ["", "a b", "-a", "x" * 61, 5])
def test_wrong_queues_are_refused(queue: Any) -> None:
    assert "queue" in refusal(queue=queue)


@pytest.mark.parametrize("priority", [-32769, 32768, 1.0, "1", True])
def test_wrong_priorities_are_refused(priority: Any) -> None:
    """Also True: PostgreSQL would refuse it at the flush."""
    assert "priority" in refusal(priority=priority)


@pytest.mark.parametrize("most", [0, -1, 32768, 1.0, "3", True])
def test_wrong_max_attempts_are_refused(most: Any) -> None:
    assert "max_attempts" in refusal(max_attempts=most)


@pytest.mark.parametrize("option", ["payload", "kind", "unique", "batch"])
def test_there_are_no_other_options(option: str) -> None:
    with pytest.raises(TypeError, match=option):
        enqueue(SendReceipt(1), **{option: None})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=option):
        enqueue_many(Session(), [SendReceipt(1)], **{option: None})  # type: ignore[arg-type]


def test_wrong_payloads_are_refused() -> None:
    with pytest.raises(PayloadError, match=r"SendReceipt\.order_id"):
        enqueue(SendReceipt("seven"))  # type: ignore[arg-type]
    with pytest.raises(DeclarationError, match="SimpleThing is not declared"):
        enqueue(dataclass(type("SimpleThing", (), {}))())
    with pytest.raises(EnqueueError, match="the class SendReceipt, not an instance"):
        enqueue(SendReceipt)  # type: ignore[arg-type]


def test_every_refusal_is_a_value_error() -> None:
    """So that a form handler that catches ValueError sees it."""
    with pytest.raises(ValueError):
        enqueue(SendReceipt("seven"))  # type: ignore[arg-type]


def test_a_session_that_is_asked_to_add_the_payload_itself_says_so() -> None:
    with pytest.raises(Exception, match="is not mapped"):
        Session().add(SendReceipt(1))


# --------------------------------------------------------------------------------------------- ids


def test_ids_are_uuids_of_version_7() -> None:
    before = datetime.now(UTC)
    found = made(SendReceipt(1)).id
    after = datetime.now(UTC)
    assert found.version == 7
    assert found.variant == uuid.RFC_4122
    milliseconds = found.int >> 80
    assert int(before.timestamp() * 1000) <= milliseconds <= int(after.timestamp() * 1000) + 1


def test_ids_are_known_at_once_and_grow() -> None:
    ids = [made(SendReceipt(1)).id for _ in range(50)]
    assert ids == sorted(set(ids))


def test_ids_grow_within_and_across_threads() -> None:
    """Within a thread each is greater than the last, and none is given twice."""
    count = 5_000
    per_thread: list[list[uuid.UUID]] = [[] for _ in range(8)]
    start = threading.Barrier(8)

    def make(into: list[uuid.UUID]) -> None:
        start.wait()
        into.extend(uuid7() for _ in range(count))

    threads = [threading.Thread(target=make, args=(each,)) for each in per_thread]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(each == sorted(each) for each in per_thread)
    assert len({one for each in per_thread for one in each}) == 8 * count
    assert uuid7() > max(each[-1] for each in per_thread)


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="the standard library's own")
def test_ids_grow_when_the_clock_steps_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    first = uuid7()
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now - 3_600 * 10**9)
    ids = [first, *(uuid7() for _ in range(100))]
    assert ids == sorted(set(ids))


# ----------------------------------------------------------------------------------- JobNeverAdded


@contextmanager
def watched() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as found:
        # Of ours only: what an earlier test left behind may be collected here.
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", JobNeverAdded)
        yield found
        gc.collect()


def test_a_job_that_is_dropped_warns_with_the_place_of_its_enqueue() -> None:
    with watched() as found:
        enqueue(SendReceipt(1))
        line = sys._getframe().f_lineno - 1
    (warning,) = found
    assert warning.category is JobNeverAdded
    assert warning.filename == __file__
    assert warning.lineno == line
    assert "session.add(enqueue(...))" in str(warning.message)


def test_it_warns_at_once_without_the_garbage_collector() -> None:
    gc.disable()
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            enqueue(SendReceipt(1))
            assert len(found) == 1
    finally:
        gc.enable()


def test_each_dropped_job_warns() -> None:
    with watched() as found:
        for _ in range(3):
            enqueue(SendReceipt(1))
    assert len(found) == 3


def test_a_job_in_a_cycle_warns_when_it_is_collected() -> None:
    with watched() as found:
        cycle: list[Any] = [enqueue(SendReceipt(1))]
        cycle.append(cycle)
        del cycle
        gc.collect()
        assert [each.category for each in found] == [JobNeverAdded]


def test_a_dropped_job_with_warnings_as_errors_does_not_raise(tmp_path: Path) -> None:
    """It cannot: a finaliser's errors are only shown, with the place."""
    program = tmp_path / "program.py"
    program.write_text(
        "from dataclasses import dataclass\n"
        "from sqlalchemy_jobs import enqueue, job\n"
        "@job('k')\n"
        "@dataclass\n"
        "class P:\n"
        "    n: int\n"
        "enqueue(P(1))\n"
        "print('went on')\n"
        "kept = enqueue(P(2))\n"  # alive at the end of the interpreter: silent
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", program],
        cwd=Path(__file__).parents[2],
        text=True,
        capture_output=True,
    )
    assert (done.returncode, done.stdout) == (0, "went on\n")
    assert done.stderr.count("JobNeverAdded") == 1


def add_and_commit(session: Session) -> None:
    session.add(enqueue(SendReceipt(1)))
    session.commit()


def add_and_rollback(session: Session) -> None:
    session.add(enqueue(SendReceipt(1)))
    session.rollback()


def add_flush_and_rollback(session: Session) -> None:
    session.add(enqueue(SendReceipt(1)))
    session.flush()
    session.rollback()


def add_and_close(session: Session) -> None:
    session.add(enqueue(SendReceipt(1)))
    session.close()


def add_and_expunge(session: Session) -> None:
    found = enqueue(SendReceipt(1))
    session.add(found)
    session.expunge(found)


def add_and_expunge_all(session: Session) -> None:
    session.add(enqueue(SendReceipt(1)))
    session.expunge_all()


def add_all(session: Session) -> None:
    session.add_all([enqueue(SendReceipt(1)), enqueue(SendReceipt(2))])
    session.commit()


def add_in_a_savepoint(session: Session) -> None:
    session.begin()
    with session.begin_nested():
        session.add(enqueue(SendReceipt(1)))
    session.commit()


def rollback_of_a_savepoint(session: Session) -> None:
    session.begin()
    savepoint = session.begin_nested()
    session.add(enqueue(SendReceipt(1)))
    session.flush()
    savepoint.rollback()
    session.commit()


def error_in_the_block(session: Session) -> None:
    try:
        with session.begin():
            session.add(enqueue(SendReceipt(1)))
            raise LookupError
    except LookupError:
        pass


def add_and_delete(session: Session) -> None:
    found = enqueue(SendReceipt(1))
    session.add(found)
    session.flush()
    session.delete(found)
    session.commit()


def add_to_a_scoped_session(session: Session) -> None:
    registry = scoped_session(sessionmaker(session.bind))
    registry.add(enqueue(SendReceipt(1)))
    registry.commit()
    registry.remove()


def many(session: Session) -> None:
    enqueue_many(session, [SendReceipt(1), SendReceipt(2)])
    session.commit()


def core_insert(session: Session) -> None:
    session.execute(insert(Job).values(kind="k", payload={}))
    session.commit()


def loaded(session: Session) -> None:
    add_and_commit(session)
    session.expunge_all()
    assert session.scalars(select(Job)).one().kind == "send_receipt"


def loaded_and_made_transient(session: Session) -> None:
    add_and_commit(session)
    session.expunge_all()
    found = session.scalars(select(Job)).one()
    make_transient(found)


def committed_and_made_transient(session: Session) -> None:
    found = enqueue(SendReceipt(1))
    session.add(found)
    session.commit()
    make_transient(found)


def detached(session: Session) -> None:
    found = enqueue(SendReceipt(1))
    session.add(found)
    session.commit()
    session.close()
    gc.collect()
    assert found not in session


def made_by_hand(session: Session) -> None:
    Job(kind="k", payload={})


class Base(DeclarativeBase):
    metadata = sqlalchemy_jobs.metadata.__class__()


class Parcel(Base):
    __tablename__ = "parcel"

    id: Mapped[int] = mapped_column(primary_key=True)
    job_id: Mapped[uuid.UUID] = mapped_column()
    job: Mapped[Job] = relationship(
        Job, primaryjoin=lambda: Parcel.job_id == Job.id, foreign_keys=lambda: Parcel.job_id
    )


def cascade(session: Session) -> None:
    assert session.bind is not None
    with session.begin():
        Base.metadata.create_all(session.connection())
    session.add(Parcel(job=enqueue(SendReceipt(1))))
    session.commit()
    assert len(session.scalars(select(Job)).all()) == 1


QUIET: list[Callable[[Session], None]] = [
    add_and_commit,
    add_and_rollback,
    add_flush_and_rollback,
    add_and_close,
    add_and_expunge,
    add_and_expunge_all,
    add_all,
    add_in_a_savepoint,
    rollback_of_a_savepoint,
    error_in_the_block,
    add_and_delete,
    add_to_a_scoped_session,
    many,
    core_insert,
    loaded,
    loaded_and_made_transient,
    committed_and_made_transient,
    detached,
    made_by_hand,
    cascade,
]


@pytest.mark.parametrize("use", QUIET, ids=lambda use: use.__name__)
def test_a_job_that_was_added_does_not_warn(
    session: Session, use: Callable[[Session], None]
) -> None:
    with watched() as found:
        use(session)
        session.close()
    assert [str(each.message) for each in found] == []


async def use_async_session() -> None:
    engine = create_async_engine("sqlite+aiosqlite://", poolclass=StaticPool)
    async with engine.begin() as connection:
        await connection.run_sync(sqlalchemy_jobs.metadata.create_all)
    async with AsyncSession(engine) as session:
        session.add(enqueue(SendReceipt(1)))
        await session.commit()
        session.add(enqueue(SendReceipt(1)))
        await session.rollback()
        session.add(enqueue(SendReceipt(1)))
    async with AsyncSession(engine) as session, session.begin():
        await session.run_sync(lambda sync: sync.add(enqueue(SendReceipt(1))))
    await engine.dispose()


def test_a_job_that_was_added_to_an_async_session_does_not_warn() -> None:
    import asyncio

    with watched() as found:
        asyncio.run(use_async_session())
    assert [str(each.message) for each in found] == []


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda job: pickle.loads(pickle.dumps(job))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_copies_do_not_warn_and_the_original_does(duplicate: Callable[[Job], Job]) -> None:
    with watched() as found:
        original = enqueue(SendReceipt(1))
        twin = duplicate(original)
        assert (twin.id, twin.payload) == (original.id, original.payload)
        del twin
        gc.collect()
        assert found == []
        del original
    assert [each.category for each in found] == [JobNeverAdded]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_an_added_job_can_be_pickled(session: Session, protocol: int) -> None:
    found = enqueue(SendReceipt(1))
    session.add(found)
    session.flush()
    assert pickle.loads(pickle.dumps(found, protocol)).id == found.id


def test_a_pickled_job_can_be_added(session: Session) -> None:
    with watched() as found:
        original = made(SendReceipt(1))
        session.add(pickle.loads(pickle.dumps(original)))
        session.commit()
        assert session.get_one(Job, original.id).payload["order_id"] == 1
    assert found == []


def test_nothing_of_the_watch_is_seen_on_the_job() -> None:
    """It is neither a column nor a changed attribute."""
    found = made(SendReceipt(1))
    assert {each.key for each in Job.__mapper__.column_attrs} >= set(found.__dict__) - {
        "_sa_instance_state",
        "_fresh",
    }
