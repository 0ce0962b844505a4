"""Of jobs with one unique key, one is kept: whatever commits or rolls back beside it, and when."""

import asyncio
import random
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import event, func, inspect, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, scoped_session, sessionmaker

import sqlalchemy_jobs
from sqlalchemy_jobs import (
    Job,
    JobState,
    Unique,
    cancel,
    dialects,
    enqueue,
    enqueue_many,
    errors,
    job,
    requeue,
    transitions,
)
from sqlalchemy_jobs.claims import Claim, Wanted
from sqlalchemy_jobs.transitions import Failure
from sqlalchemy_jobs.worker import leases
from tests.databases import Database
from tests.domain import Effect, Order
from tests.locks import until_somebody_waits, without_old_rows

WAIT = 20


@job("ship", unique=Unique(fields=("order_id",)))
@dataclass(frozen=True)
class Ship:
    order_id: int
    note: str = ""


@job("index", unique=Unique(fields=("page",), on_conflict="replace"))
@dataclass(frozen=True)
class Index:
    page: str
    version: int = 0


@job("once", unique=Unique(on_conflict="raise"))
@dataclass(frozen=True)
class Once:
    n: int = 0


@job("report", unique=Unique(period=timedelta(hours=1)))
@dataclass(frozen=True)
class Report:
    n: int = 0


@job("until_started", unique=Unique(states=(JobState.READY,)))
@dataclass(frozen=True)
class UntilStarted:
    n: int = 0


@job("plain")
@dataclass(frozen=True)
class Plain:
    n: int = 0


KINDS = ["ship", "index", "once", "report", "until_started", "plain"]


class Bench:
    """A database with a few hands; every call is a transaction of its own."""

    def __init__(self, database: Database) -> None:
        self.sessions = database.sessions(expire_on_commit=False)

    def add(self, *payloads: Any, **options: Any) -> list[Job]:
        with self.sessions.begin() as session:
            made = [enqueue(each, **options) for each in payloads]
            session.add_all(made)
        return made

    def do(self, work: Callable[[Session], Any]) -> Any:
        with self.sessions.begin() as session:
            return work(session)

    def rows(self) -> list[Job]:
        with self.sessions() as session:
            return list(session.scalars(select(Job).order_by(Job.id)))

    def row(self, job_id: uuid.UUID) -> Job:
        with self.sessions() as session:
            return session.get_one(Job, job_id)

    def claim(self) -> Claim:
        def claim(session: Session) -> Claim:
            worker = leases.register(session, timedelta(seconds=30))
            lanes = dialects.of(session).lanes(session, ())
            wanted = Wanted(worker, KINDS, lanes, {"default": 1}, 1)
            (claimed,) = transitions.claim(session, wanted)
            return claimed

        claimed: Claim = self.do(claim)
        return claimed

    def finish(self) -> None:
        claim = self.claim()
        assert self.do(lambda session: transitions.complete(session, claim))


@pytest.fixture
def bench(database: Database) -> Bench:
    return Bench(database)


def is_left_out(made: Job, other: Job) -> bool:
    return made.duplicate_of == other.id and inspect(made).transient


# --- one transaction --------------------------------------------------------------------------------


def test_of_two_in_one_flush_the_first_is_inserted(bench: Bench) -> None:
    with bench.sessions.begin() as session:
        first, second, other, plain, plain_too = made = [
            enqueue(each) for each in (Ship(1), Ship(1, "again"), Ship(2), Plain(1), Plain(1))
        ]
        session.add_all([*made, Order()])
        session.flush()
        assert is_left_out(second, first)
        for each in (first, other, plain, plain_too):
            assert inspect(each).persistent and each.duplicate_of is None
    assert {each.id for each in bench.rows()} == {each.id for each in made if each is not second}
    assert bench.do(lambda session: session.scalar(select(func.count()).select_from(Order))) == 1


def test_a_duplicate_of_a_committed_job_does_not_disturb_the_transaction(bench: Bench) -> None:
    (first,) = bench.add(Ship(1))
    with bench.sessions.begin() as session:
        session.add(Effect(note="before"))
        second = enqueue(Ship(1))
        session.add(second)
        session.flush()
        session.add(Effect(note="after"))
    assert is_left_out(second, first)
    assert [each.id for each in bench.rows()] == [first.id]
    assert bench.do(lambda s: list(s.scalars(select(Effect.note)))) == ["before", "after"]


def test_other_values_other_kinds_and_fields_that_do_not_count_are_told_apart(bench: Bench) -> None:
    bench.add(Ship(1), Ship(2), Ship(1, "another note"), Index("1"), Plain(1), Plain(1))
    kinds = sorted((each.kind, each.payload.get("order_id")) for each in bench.rows())
    assert kinds == [("index", None), ("plain", None), ("plain", None), ("ship", 1), ("ship", 2)]


def test_a_running_job_keeps_others_out_and_a_final_one_does_not(bench: Bench) -> None:
    (first,) = bench.add(Ship(1))
    claim = bench.claim()
    (second,) = bench.add(Ship(1))
    assert is_left_out(second, first)
    bench.do(lambda session: transitions.complete(session, claim))
    bench.do(lambda session: session.add(second))  # the very same object, once more
    assert second.duplicate_of is None
    assert [each.state for each in bench.rows()] == ["succeeded", "ready"]
    assert {each.unique_key for each in bench.rows()} == {first.unique_key}


def test_a_rollback_frees_the_key(bench: Bench) -> None:
    with bench.sessions() as session:
        first, second = enqueue(Ship(1)), enqueue(Ship(1))
        session.add_all([first, second])
        session.flush()
        session.rollback()
        assert inspect(first).transient and inspect(second).transient
        session.add(second)
        session.flush()
        assert second.duplicate_of is None
        session.add(first)
        session.commit()
    assert is_left_out(first, second)
    assert [each.id for each in bench.rows()] == [second.id]


def test_a_savepoint_that_is_rolled_back_frees_the_key(bench: Bench) -> None:
    with bench.sessions.begin() as session:
        with session.begin_nested() as savepoint:
            first = enqueue(Ship(1))
            session.add(first)
            session.flush()
            savepoint.rollback()
        second = enqueue(Ship(1))
        session.add(second)
    assert inspect(first).transient
    assert [each.id for each in bench.rows()] == [second.id]


def test_a_flush_that_failed_leaves_nothing_behind(bench: Bench) -> None:
    made = enqueue(Ship(1))
    with bench.sessions() as session:
        session.add(made)
        session.add(Job(kind=None, payload={}))
        with pytest.raises(DBAPIError):
            session.flush()
        session.rollback()
        session.add(enqueue(Plain()))
        session.commit()
        session.add(made)
        session.commit()
    assert made.duplicate_of is None
    assert sorted(each.kind for each in bench.rows()) == ["plain", "ship"]


def test_an_id_that_is_there_already_is_an_error_as_ever(bench: Bench) -> None:
    """The clause that leaves out duplicates forgives nothing else."""
    (first,) = bench.add(Plain())
    with bench.sessions() as session:
        session.add(Job(id=first.id, kind="plain", payload={}))
        with pytest.raises(IntegrityError):
            session.flush()


def test_bulk_save_objects_leaves_duplicates_out(bench: Bench) -> None:
    with bench.sessions.begin() as session:
        made = [enqueue(Ship(1)), enqueue(Ship(1)), enqueue(Ship(2))]
        session.bulk_save_objects(made)
        for each in made:  # copies were added: these are not watched any more
            session.add(each)
            session.expunge(each)
    assert [each.id for each in bench.rows()] == [made[0].id, made[2].id]


# --- enqueue_many -----------------------------------------------------------------------------------


def test_enqueue_many_returns_the_job_that_stands_for_each_payload(bench: Bench) -> None:
    (there,) = bench.add(Ship(1))
    payloads = [Ship(2), Plain(), Ship(1), Ship(2, "again"), Plain()]
    ids = bench.do(lambda session: enqueue_many(session, payloads))
    assert ids[2] == there.id and ids[3] == ids[0] and len(set(ids)) == 4
    assert {each.id for each in bench.rows()} == set(ids)


def test_enqueue_many_with_hundreds_of_duplicates(bench: Bench) -> None:
    first = bench.do(lambda session: enqueue_many(session, [Ship(n) for n in range(600)]))
    again = bench.do(lambda session: enqueue_many(session, [Ship(n) for n in range(600)]))
    assert again == first and len(set(first)) == 600


def test_enqueue_many_with_a_key_inserts_one(bench: Bench) -> None:
    ids = bench.do(lambda s: enqueue_many(s, [Plain(1), Plain(2)], unique_key="nightly"))
    assert ids[0] == ids[1]
    assert [each.payload for each in bench.rows()] == [{"n": 1}]


def test_enqueue_many_that_raises_inserts_nothing(bench: Bench) -> None:
    there, page = bench.add(Once(3), Index("/", 1))
    with bench.sessions.begin() as session:
        with pytest.raises(errors.DuplicateJob) as caught:
            enqueue_many(session, [Index("/", 2), Plain(), Once(1), Once(2), Once(3)])
        session.add(Order())  # the transaction is as good as before
    assert caught.value.other == there.id
    assert [each.id for each in bench.rows()] == [there.id, page.id]
    assert bench.row(page.id).payload["version"] == 1


# --- raise ------------------------------------------------------------------------------------------


def test_raise_names_the_other_job_at_the_flush(bench: Bench) -> None:
    (first,) = bench.add(Once())
    with bench.sessions.begin() as session:
        session.add(Effect(note="kept"))
        second = enqueue(Once())
        with (
            pytest.raises(errors.DuplicateJob, match=str(first.id)) as caught,
            session.begin_nested(),
        ):
            session.add(second)
        assert (caught.value.other, caught.value.key) == (first.id, first.unique_key)
        assert inspect(second).transient and second.duplicate_of is None
    assert bench.do(lambda session: session.scalar(select(Effect.note))) == "kept"
    assert [each.id for each in bench.rows()] == [first.id]


def test_raise_without_a_savepoint_takes_the_transaction_with_it(bench: Bench) -> None:
    bench.add(Once())
    with pytest.raises(errors.DuplicateJob):
        bench.do(lambda session: session.add_all([Order(), enqueue(Once())]))
    assert bench.do(lambda session: session.scalar(select(func.count()).select_from(Order))) == 0


# --- replace ----------------------------------------------------------------------------------------


def test_replace_gives_payload_and_time_to_the_one_that_is_ready(bench: Bench) -> None:
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    (first,) = bench.add(Index("/", 1), priority=-5)
    (second,) = bench.add(Index("/", 2), run_at=tomorrow)
    assert is_left_out(second, first)
    (row,) = bench.rows()
    assert (row.id, row.payload, row.priority) == (first.id, {"page": "/", "version": 2}, -5)
    assert row.run_at == tomorrow


def test_the_last_of_several_replaces(bench: Bench) -> None:
    payloads = [Index("/", n) for n in range(4)]
    with bench.sessions.begin() as session:
        first = enqueue(payloads[0])
        session.add_all([first, enqueue(payloads[1])])
        session.flush()
        assert first.payload["version"] == 1  # what the session has loaded is what the row says
        assert enqueue_many(session, payloads[2:]) == [first.id, first.id]
        assert first.payload["version"] == 3
    assert [each.payload["version"] for each in bench.rows()] == [3]


def test_replace_keeps_one_that_is_running(bench: Bench) -> None:
    (first,) = bench.add(Index("/", 1))
    bench.claim()
    (second,) = bench.add(Index("/", 2))
    assert is_left_out(second, first)
    assert [each.payload["version"] for each in bench.rows()] == [1]


def test_one_that_is_being_replaced_is_not_claimed_before_the_commit(row_locks: Database) -> None:
    """So the run sees what the transaction that replaced the payload wrote beside it."""
    bench = Bench(row_locks)
    (first,) = bench.add(Index("/", 1))
    with bench.sessions() as session:
        session.add(enqueue(Index("/", 2)))
        session.flush()
        with pytest.raises(ValueError, match="not enough values"):  # nothing to claim
            bench.claim()
        session.commit()
    assert (bench.claim().job_id, bench.row(first.id).payload["version"]) == (first.id, 2)


# --- periods and states -----------------------------------------------------------------------------


def test_in_a_period_there_is_one_job_even_when_it_has_ended(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = datetime(2030, 1, 1, 12, 59, 59, tzinfo=UTC)
    module = sys.modules["sqlalchemy_jobs.enqueue"]  # the name itself is the function's
    monkeypatch.setattr(module, "utcnow", lambda: clock)
    past = datetime(2020, 1, 1, tzinfo=UTC)
    (first,) = bench.add(Report(), run_at=past)
    bench.finish()
    (second,) = bench.add(Report())
    assert is_left_out(second, first)
    clock += timedelta(seconds=1)
    (third,) = bench.add(Report(), run_at=past)
    assert third.duplicate_of is None
    for end in (transitions.fail, transitions.retry):
        options: dict[str, Any] = {"failure": Failure("boom")}
        if end is transitions.retry:
            options["delay"] = timedelta(0)
            bench.do(lambda session: requeue(session, third.id))
        claim = bench.claim()
        bench.do(lambda session, c=claim, e=end, o=options: e(session, c, **o))  # type: ignore[misc]
        assert bench.add(Report())[0].duplicate_of == third.id
    bench.do(lambda session: cancel(session, third.id))
    assert bench.add(Report())[0].duplicate_of == third.id


def test_a_job_that_gave_up_its_key_by_its_state_does_not_take_it_again(bench: Bench) -> None:
    (first,) = bench.add(UntilStarted())
    assert bench.add(UntilStarted())[0].duplicate_of == first.id
    claim = bench.claim()
    (second,) = bench.add(UntilStarted())
    assert second.duplicate_of is None
    bench.do(lambda s: transitions.retry(s, claim, failure=Failure("x"), delay=timedelta(0)))
    assert bench.row(first.id).unique_slot is None
    assert bench.row(second.id).unique_slot == first.unique_key
    assert bench.add(UntilStarted())[0].duplicate_of == second.id


def test_a_batch_that_is_completed_gives_up_its_keys(bench: Bench) -> None:
    bench.add(Ship(1), Report(1), Plain(1))
    claims = [bench.claim() for _ in range(3)]
    bench.do(lambda session: transitions.complete_many(session, claims))
    slots = {each.kind: each.unique_slot for each in bench.rows()}
    assert slots["ship"] is None and slots["plain"] is None
    assert slots["report"] is not None


def test_a_key_of_ones_own_holds_within_its_kind_until_the_job_is_final(bench: Bench) -> None:
    (first,) = bench.add(Plain(1), unique_key="k")
    assert first.unique_key == "plain/k"
    assert bench.add(Plain(2), unique_key="k")[0].duplicate_of == first.id
    assert bench.add(Ship(1), unique_key="k")[0].duplicate_of is None
    bench.do(lambda session: cancel(session, first.id))
    assert bench.add(Plain(2), unique_key="k")[0].duplicate_of is None


# --- two transactions -------------------------------------------------------------------------------


@pytest.fixture
def elsewhere() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def by_add(session: Session, payload: Any) -> uuid.UUID:
    made = enqueue(payload)
    session.add(made)
    session.flush()
    return made.duplicate_of or made.id


def by_enqueue_many(session: Session, payload: Any) -> uuid.UUID:
    (job_id,) = enqueue_many(session, [payload])
    return job_id


@pytest.mark.parametrize("way", [by_add, by_enqueue_many])
@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a_second_transaction_waits_for_the_first_to_end(
    row_locks: Database, elsewhere: ThreadPoolExecutor, way: Any, end: str
) -> None:
    bench = Bench(row_locks)
    with bench.sessions() as session:
        first = enqueue(Ship(1))
        session.add(first)
        session.flush()

        def second(session: Session) -> uuid.UUID:
            session.scalar(select(func.count()).select_from(Order))  # its snapshot is old
            session.add(Order())
            found: uuid.UUID = way(session, Ship(1, "second"))
            return found

        waiting: Future[uuid.UUID] = elsewhere.submit(bench.do, second)
        until_somebody_waits(row_locks)
        getattr(session, end)()
    stands = waiting.result(WAIT)
    (row,) = bench.rows()
    assert stands == row.id
    assert (row.id == first.id) == (end == "commit")
    assert bench.do(lambda session: session.scalar(select(func.count()).select_from(Order))) == 1


@pytest.mark.parametrize("way", [by_add, by_enqueue_many])
def test_a_job_without_a_key_waits_for_nobody_who_has_added_one_with(
    row_locks: Database, way: Any
) -> None:
    """Whose key is the smallest: at REPEATABLE READ its gap is where jobs without a key are inserted."""
    without_old_rows(row_locks)
    bench = Bench(row_locks)
    with bench.sessions() as session:
        way(session, Ship(1))

        def other(session: Session) -> uuid.UUID:
            with dialects.of(session).bounded_waits(session, 1):
                found: uuid.UUID = way(session, Plain())
                return found

        assert bench.do(other)


@pytest.mark.parametrize("payload", [Ship(1), Index("/")])
def test_many_transactions_at_once_leave_one_job(database: Database, payload: Any) -> None:
    """Some roll back. Who is in the way of another one for a moment tries again, as an application does."""
    bench = Bench(database)
    conflicts = dialects.named(database.name).is_conflict
    start = threading.Barrier(4)
    claimed_to_be_inserted: list[uuid.UUID] = []

    def enqueue_some(number: int) -> None:
        chance = random.Random(number)
        start.wait(WAIT)
        for _ in range(8):
            while True:
                try:
                    with bench.sessions() as session:
                        made = enqueue(payload)
                        session.add_all([made, Order()])
                        session.flush()
                        if chance.random() < 0.4:
                            session.rollback()
                        else:
                            session.commit()
                            if made.duplicate_of is None:
                                claimed_to_be_inserted.append(made.id)
                    break
                except DBAPIError as error:
                    if not conflicts(error):
                        raise

    with ThreadPoolExecutor(4) as pool:
        for each in [pool.submit(enqueue_some, number) for number in range(4)]:
            each.result(60)
    assert [each.id for each in bench.rows()] == claimed_to_be_inserted
    assert len(claimed_to_be_inserted) == 1


def test_a_key_that_is_given_up_just_after_the_insert_is_taken(postgresql: Database) -> None:
    """The INSERT was left out, and then nobody has the key any more: the job must not be lost."""
    bench = Bench(postgresql)
    bench.add(Ship(1))
    claim = bench.claim()
    engine = postgresql.engine(isolation_level="READ COMMITTED")
    given_up: list[bool] = []

    @event.listens_for(engine, "after_cursor_execute")
    def give_up(conn: Any, cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("INSERT INTO sajobs_job") and not given_up:
            given_up.append(bench.do(lambda session: transitions.complete(session, claim)))

    with sessionmaker(engine).begin() as session:
        made = enqueue(Ship(1, "second"))
        session.add(made)
        session.flush()
        assert given_up == [True] and made.duplicate_of is None and inspect(made).persistent
    assert [each.state for each in bench.rows()] == ["succeeded", "ready"]


# --- requeue ----------------------------------------------------------------------------------------


def test_requeue_takes_the_key_again(bench: Bench) -> None:
    (first,) = bench.add(Ship(1))
    bench.finish()
    assert bench.do(lambda session: requeue(session, first.id))
    assert bench.row(first.id).unique_slot == first.unique_key
    assert bench.add(Ship(1))[0].duplicate_of == first.id


def test_requeue_with_its_key_taken_raises_and_changes_nothing(bench: Bench) -> None:
    (first,) = bench.add(Ship(1))
    bench.finish()
    (second,) = bench.add(Ship(1))
    with bench.sessions.begin() as session:
        with pytest.raises(errors.DuplicateJob, match=str(second.id)) as caught:
            requeue(session, first.id)
        assert (caught.value.other, caught.value.key) == (second.id, first.unique_key)
        session.add(Order())  # the transaction is as good as before
    assert bench.row(first.id).state == "succeeded"
    assert bench.do(lambda session: session.scalar(select(func.count()).select_from(Order))) == 1


def test_a_job_of_a_period_that_has_kept_its_key_can_be_requeued(bench: Bench) -> None:
    (first,) = bench.add(Report())
    bench.finish()
    assert bench.do(lambda session: requeue(session, first.id))
    assert bench.row(first.id).unique_slot == first.unique_key


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_requeue_while_another_transaction_takes_the_key(
    row_locks: Database, elsewhere: ThreadPoolExecutor, end: str
) -> None:
    bench = Bench(row_locks)
    (first,) = bench.add(Ship(1))
    bench.finish()

    def again(session: Session) -> object:
        session.add(Order())
        try:
            return requeue(session, first.id)
        except errors.DuplicateJob as error:
            return error.other

    with bench.sessions() as session:
        second = enqueue(Ship(1))
        session.add(second)
        session.flush()
        waiting = elsewhere.submit(bench.do, again)
        until_somebody_waits(row_locks)
        getattr(session, end)()
    assert waiting.result(WAIT) == (second.id if end == "commit" else True)
    assert bench.row(first.id).state == ("succeeded" if end == "commit" else "ready")
    assert bench.do(lambda session: session.scalar(select(func.count()).select_from(Order))) == 1


# --- sessions of other makes ------------------------------------------------------------------------


def test_a_scoped_session(bench: Bench) -> None:
    session = scoped_session(bench.sessions)
    first, second = enqueue(Ship(1)), enqueue(Ship(1))
    session.add_all([first, second])
    session.flush()
    assert enqueue_many(session, [Ship(1)]) == [first.id]
    assert cancel(session, first.id) and requeue(session, first.id)
    session.commit()
    assert is_left_out(second, first)
    session.remove()


def test_an_async_session(database: Database) -> None:
    async def main() -> None:
        engine = database.async_engine()
        async with AsyncSession(engine, expire_on_commit=False) as session:
            first, second = enqueue(Index("/", 1)), enqueue(Index("/", 2))
            session.add_all([first, second])
            await session.commit()
            assert is_left_out(second, first)
            assert await session.run_sync(enqueue_many, [Index("/", 3)]) == [first.id]
            assert await session.run_sync(cancel, first.id, "why")
            assert (first.state, first.payload["version"]) == ("cancelled", 3)
            assert await session.run_sync(requeue, first.id)
            await session.commit()
        await engine.dispose()

    asyncio.run(main())


def test_a_schema_translate_map(postgresql: Database) -> None:
    engine = postgresql.engine().execution_options(schema_translate_map={None: "tenant"})
    with postgresql.engine().begin() as connection:
        connection.execute(text("DROP SCHEMA IF EXISTS tenant CASCADE"))
        connection.execute(text("CREATE SCHEMA tenant"))
    try:
        sqlalchemy_jobs.metadata.create_all(engine)
        with Session(engine) as session:
            first, second = enqueue(Index("/", 1)), enqueue(Index("/", 2))
            session.add_all([first, second])
            session.commit()
            assert is_left_out(second, first)
            assert enqueue_many(session, [Index("/", 3)]) == [first.id]
            assert cancel(session, first.id) and requeue(session, first.id)
            session.commit()
            assert first.payload["version"] == 3
    finally:
        with postgresql.engine().begin() as connection:
            connection.execute(text("DROP SCHEMA tenant CASCADE"))
    assert Bench(postgresql).rows() == []


def test_a_two_phase_session(mysql: Database) -> None:
    with Session(mysql.engine(), twophase=True) as session:
        first, second = enqueue(Ship(1)), enqueue(Ship(1))
        session.add_all([first, second])
        session.commit()
        assert is_left_out(second, first)


def test_rows_made_by_hand_cannot_be_doubled_either(bench: Bench) -> None:
    """The index itself keeps them out: INSERTs that do not come through the table are refused."""
    (first,) = bench.add(Ship(1))
    bench.add(Ship(2))
    with pytest.raises(IntegrityError):
        bench.do(
            lambda s: s.execute(
                update(Job).where(Job.id != first.id).values(unique_slot=first.unique_slot)
            )
        )
