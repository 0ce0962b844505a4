"""The commit of a run carries its completion: together, in one round trip where the driver can, and for itself only."""

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import URL, event, select, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from sqlalchemy_jobs import Job, JobApp, Worker, enqueue
from tests.conformance.test_runs import Act
from tests.databases import Database
from tests.domain import Effect


class Statements(list[str]):
    """What is sent to the server by an engine, transactions' ends included."""

    def __init__(self, engine: Any) -> None:
        super().__init__()
        event.listen(engine, "before_cursor_execute", self._executed)
        event.listen(engine, "rollback", lambda connection: self.append("ROLLBACK"))

    def _executed(
        self, connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any
    ) -> None:
        self.append(statement)


def run(database: Database, handler: Callable[[Session, Act], Any]) -> Statements:
    engine = database.engine(pool_size=1, max_overflow=0)
    sessions = sessionmaker(engine)
    app: JobApp[Any, Any] = JobApp(sessions)
    app.handler(Act)(handler)
    with sessions.begin() as session:
        session.add(enqueue(Act(), max_attempts=2))
    statements = Statements(engine)
    assert Worker(app, drain=True, concurrency=1).run()
    return statements


def write(session: Session, payload: Act) -> None:
    session.add(Effect(note="done"))


def found(database: Database) -> tuple[str, int, int]:
    with database.session() as session:
        job = session.scalars(select(Job)).one()
        return job.state, job.failures, len(session.scalars(select(Effect)).all())


def test_a_run_costs_one_statement_more_than_its_handler(database: Database) -> None:
    statements = run(database, write)
    sent = [each for each in statements if "sajobs_worker" not in each]
    inserts = [each for each in sent if each.startswith("INSERT INTO effect")]
    completions = [each for each in sent if "UPDATE" in each and "finished_at" in each]
    assert len(inserts) == 1
    # On PostgreSQL it goes with the COMMIT, which is no statement to SQLAlchemy.
    assert len(completions) == (0 if database.name == "postgresql" else 1)
    assert found(database) == ("succeeded", 0, 1)


def test_a_commit_that_fails_before_it_is_sent_leaves_nothing_to_the_next_transaction(
    database: Database,
) -> None:
    """The pool has one connection: what the failed run left on it would be sent by whoever commits next."""
    refused: list[bool] = []

    def handler(session: Session, payload: Act) -> None:
        session.add(Effect(note="done"))

        @event.listens_for(session, "before_commit")
        def refuse(session: Session) -> None:
            if not refused:
                refused.append(True)
                raise RuntimeError("not this time")

    run(database, handler)
    assert refused and found(database) == ("succeeded", 1, 1)
    with database.session() as session:
        assert [each.outcome for each in session.scalars(select(Job)).one().attempts] == ["failed"]


def test_what_a_listener_adds_at_the_commit_commits_with_the_run(database: Database) -> None:
    def handler(session: Session, payload: Act) -> None:
        session.add(Effect(note="handler"))
        event.listen(
            session,
            "before_commit",
            lambda session: session.add(Effect(note="listener")),
            once=True,
        )

    run(database, handler)
    assert found(database) == ("succeeded", 0, 2)


def test_a_listener_of_the_engine_that_came_later_is_called_before_the_completion(
    database: Database,
) -> None:
    engine = database.engine(pool_size=1, max_overflow=0)
    app: JobApp[Any, Any] = JobApp(sessionmaker(engine))
    had_events: list[bool] = []

    def refuse(connection: Any) -> None:
        raise RuntimeError("not this time")

    @app.handler(Act)
    def handler(session: Session, payload: Act) -> None:
        session.add(Effect(note="done"))
        had_events.append(engine._has_events)
        if len(had_events) == 2:
            event.listen(engine, "commit", refuse, once=True)

    with database.session.begin() as session:
        session.add_all([enqueue(Act(), max_attempts=2) for _ in range(2)])
    before = engine._has_events  # SQLite's are configured by one
    assert Worker(app, drain=True, concurrency=1).run()
    with database.session() as session:
        jobs = session.scalars(select(Job)).all()
        assert sorted((job.state, job.failures) for job in jobs) == [
            ("succeeded", 0),
            ("succeeded", 1),
        ]
        assert len(session.scalars(select(Effect)).all()) == 2
    assert had_events[:2] == [before] * 2, "SQLAlchemy prepares the events of every statement"


def test_a_constraint_that_is_checked_at_the_commit_fails_the_run(database: Database) -> None:
    if database.name != "postgresql":
        pytest.skip("only PostgreSQL defers constraints that tests can make")
    unique = "ALTER TABLE effect ADD CONSTRAINT once UNIQUE (note) DEFERRABLE INITIALLY DEFERRED"
    with database.engine().begin() as connection:
        connection.execute(text(unique))
    try:
        with database.session.begin() as session:
            session.add(Effect(note="done"))
        run(database, write)
    finally:
        with database.engine().begin() as connection:
            connection.execute(text("ALTER TABLE effect DROP CONSTRAINT once"))
    assert found(database) == ("failed", 2, 1)
    with database.session() as session:
        attempts = session.scalars(select(Job)).one().attempts
        assert all("IntegrityError" in (each.error_type or "") for each in attempts)


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_a_run_whose_job_was_taken_commits_nothing(row_locks: Database, isolation: str) -> None:
    """The fence fails at the commit: with no row, or with a serialization failure."""
    engine = row_locks.engine(isolation_level=isolation)
    sessions = sessionmaker(engine)
    app: JobApp[Any, Any] = JobApp(sessions)
    taken: list[bool] = []

    @app.handler(Act)
    def handler(session: Session, payload: Act) -> None:
        session.add(Effect(note="done"))
        session.flush()
        if not taken:
            taken.append(True)
            with row_locks.session.begin() as other:
                other.execute(
                    text(
                        "UPDATE sajobs_job SET state = 'ready', worker_id = NULL, attempt = attempt + 1"
                    )
                )

    with sessions.begin() as session:
        session.add(enqueue(Act(), delay=timedelta(0)))
    assert Worker(app, drain=True, concurrency=1).run()
    with row_locks.session() as session:
        job = session.scalars(select(Job)).one()
        assert (job.state, job.attempt, job.failures) == ("succeeded", 3, 0)
        assert len(session.scalars(select(Effect)).all()) == 1


@pytest.mark.parametrize("is_async", [False, True])
def test_where_every_statement_is_prepared_this_one_is_not(
    postgresql: Database, is_async: bool
) -> None:
    """Two statements in one cannot be prepared."""
    options: dict[str, Any] = {"connect_args": {"prepare_threshold": 0}}
    app: JobApp[Any, Any]
    if is_async:
        async_sessions = async_sessionmaker(postgresql.async_engine(**options))
        app = JobApp(async_sessions)

        @app.handler(Act)
        async def handler(session: AsyncSession, payload: Act) -> None:
            session.add(Effect(note="done"))
    else:
        app = JobApp(sessionmaker(postgresql.engine(**options)))
        app.handler(Act)(write)
    with postgresql.session.begin() as session:
        session.add(enqueue(Act(), max_attempts=1))
    assert Worker(app, drain=True, concurrency=1).run()
    assert found(postgresql) == ("succeeded", 0, 1)


def test_the_first_commits_of_many_threads_complete_their_runs(
    postgresql: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """Each round has an engine to which nobody listens yet, and as many first commits as threads."""
    for _ in range(5):
        app: JobApp[Any, Any] = JobApp(sessionmaker(postgresql.engine(pool_size=10)))
        meeting = threading.Barrier(10)

        @app.handler(Act)
        def handler(session: Session, payload: Act, meeting: threading.Barrier = meeting) -> None:
            session.add(Effect(note="done"))
            session.flush()
            meeting.wait(20)

        with postgresql.session.begin() as session:
            session.add_all(enqueue(Act(n)) for n in range(10))
        assert Worker(app, drain=True, concurrency=10).run()
    with postgresql.session() as session:
        ended = session.execute(select(Job.state, Job.attempt)).all()
        assert ended == [("succeeded", 1)] * 50
        assert len(session.scalars(select(Effect)).all()) == 50
    assert "did not go along" not in caplog.text


# --- it is prepared, where that is safe ----------------------------------------------------------------

PREPARED = text(
    "SELECT sum(generic_plans + custom_plans) FROM pg_prepared_statements WHERE name ~ 'sajobs_complete'"
)


class Ended:
    """Jobs that were run one after the other on the one connection of a pool, and what became of them."""

    def __init__(
        self,
        database: Database,
        is_async: bool,
        use: Callable[[Session, int], None] = lambda session, number: None,
        *,
        url: URL | None = None,
    ) -> None:
        options: dict[str, Any] = {"pool_size": 1, "max_overflow": 0}
        calls: list[int] = []
        app: JobApp[Any, Any]

        def work(session: Session, number: int) -> None:
            calls.append(number)
            session.add(Effect(note=str(number)))
            session.flush()
            use(session, len(calls))
            plans.append(session.scalar(PREPARED) or 0)

        plans: list[int] = []
        engine: Any
        if is_async:
            engine = database.async_engine(url, **options)
            app = JobApp(async_sessionmaker(engine))

            @app.handler(Act)
            async def handler(session: AsyncSession, payload: Act) -> None:
                await session.run_sync(work, payload.n)
        else:
            engine = database.engine(url, **options)
            app = JobApp(sessionmaker(engine))

            @app.handler(Act)
            def handler(session: Session, payload: Act) -> None:
                work(session, payload.n)

        with database.sessions().begin() as session:
            session.add_all(enqueue(Act(n), max_attempts=2) for n in range(6))
        assert Worker(app, drain=True, concurrency=1).run()
        self.plans = plans
        """How often the prepared statement had been executed before each call."""
        with database.sessions()() as session:
            states = session.scalars(select(Job.state)).all()
            effects = sorted(session.scalars(select(Effect.note)))
        assert (states, effects) == (["succeeded"] * 6, [str(n) for n in range(6)])


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def is_async(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_the_second_and_all_further_completions_of_a_connection_are_prepared(
    postgresql: Database, is_async: bool
) -> None:
    assert Ended(postgresql, is_async).plans == [0, 0, 1, 2, 3, 4]


def test_a_handler_that_fails_costs_the_prepared_statement_and_no_run(
    postgresql: Database, is_async: bool
) -> None:
    """psycopg has the server forget all statements after a rollback."""

    def fail(session: Session, call: int) -> None:
        session.scalar(text("SELECT 1"))
        if call == 4:
            raise RuntimeError

    assert len(Ended(postgresql, is_async, fail).plans) == 6


def test_no_run_fails_for_a_statement_that_its_session_has_forgotten(
    postgresql: Database, is_async: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Where psycopg does not notice, one handler is called again at once, and then nothing is prepared any more."""

    def forget(session: Session, call: int) -> None:
        if call == 4:
            driver: Any = session.connection().connection.driver_connection
            driver.pgconn.exec_(b"DEALLOCATE ALL")

    ended = Ended(postgresql, is_async, forget)
    assert len(ended.plans) == 7 and ended.plans[-3:] == [0, 0, 0]
    assert not [each for each in caplog.records if each.levelname in ("WARNING", "ERROR")]


def test_behind_a_pooler_nothing_is_prepared(
    postgresql: Database, pooled: URL, is_async: bool
) -> None:
    def use(session: Session, call: int) -> None:
        assert session.scalar(PREPARED) is None

    Ended(postgresql, is_async, use, url=pooled)


def test_where_psycopg_is_to_prepare_nothing_nothing_is_prepared(postgresql: Database) -> None:
    engine = postgresql.engine(connect_args={"prepare_threshold": None}, pool_size=1)
    app: JobApp[Any, Any] = JobApp(sessionmaker(engine))
    app.handler(Act)(write)
    with postgresql.sessions().begin() as session:
        session.add_all(enqueue(Act(n)) for n in range(3))
    assert Worker(app, drain=True, concurrency=1).run()
    with engine.connect() as connection:
        assert connection.scalar(PREPARED) is None
