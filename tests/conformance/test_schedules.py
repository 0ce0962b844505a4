"""Schedules: each tick has its job once, whoever makes it and whatever dies."""

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import event, insert, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session, sessionmaker

from sqlalchemy_jobs import (
    Handlers,
    Job,
    JobApp,
    Schedule,
    Unique,
    WorkerRow,
    current_run,
    enqueue,
    errors,
    job,
    pause_schedule,
    requeue,
    resume_schedule,
)
from sqlalchemy_jobs.cli import main
from sqlalchemy_jobs.columns import server_now
from sqlalchemy_jobs.payloads import declaration_of
from sqlalchemy_jobs.schedules import ticks
from sqlalchemy_jobs.schedules.cron import rule
from sqlalchemy_jobs.schedules.ticks import BATCH, Known, schedules
from sqlalchemy_jobs.worker import leases, scheduling
from sqlalchemy_jobs.worker.availability import Availability
from sqlalchemy_jobs.worker.control import Control
from sqlalchemy_jobs.worker.scheduling import Scheduler
from sqlalchemy_jobs.worker.wakeup import Wakeup
from tests.apps.ticking import KNOWN, Note, fire_due
from tests.apps.transition import engine_for
from tests.databases import Database
from tests.locks import without_old_rows
from tests.processes import ROOT
from tests.proxy import Proxy, When
from tests.waiting import until

HOUR, DAY = timedelta(hours=1), timedelta(days=1)


@job("only", unique=Unique(on_conflict="raise"))
@dataclass(frozen=True)
class Only:
    pass


class Scene:
    """A database, and what becomes of the schedules in it."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.sessions = sessionmaker(database.engine())

    def add(self, *added: Schedule) -> None:
        with self.sessions.begin() as session:
            session.add_all(added)

    def set(self, name: str, **values: Any) -> None:
        """Change a row as a person with a SQL prompt would."""
        with self.sessions.begin() as session:
            session.execute(update(schedules).where(schedules.c.name == name).values(**values))

    def row(self, name: str) -> Schedule:
        with self.sessions() as session:
            return session.get_one(Schedule, name)

    def jobs(self) -> list[Job]:
        with self.sessions() as session:
            return list(session.scalars(select(Job).order_by(Job.scheduled_at)))

    def ticks(self) -> list[datetime | None]:
        return [job.scheduled_at for job in self.jobs()]

    def now(self) -> datetime:
        with self.sessions() as session:
            now = session.scalar(select(server_now()))
            assert now is not None
            return now

    def fire(self, known: Known = KNOWN) -> int:
        """Do once what a worker does when it wakes up; how many schedules were seen to."""
        with self.sessions.begin() as session:
            return len(fire_due(session, known))

    def wait_for_others(self, name: str) -> None:
        """Wait until nobody holds a row: the server may still be at the COMMIT of one who has gone."""
        with self.sessions.begin() as session:
            session.get(Schedule, name, with_for_update=True)

    def make_due(self, name: str, ago: timedelta = timedelta(seconds=1)) -> datetime:
        """Have it that the next tick has come some time ago."""
        tick = self.now() - ago
        self.set(name, next_tick=tick)
        return tick


@pytest.fixture
def scene(database: Database) -> Scene:
    return Scene(database)


def app_of(scene: Scene) -> JobApp[Any, Any]:
    app: JobApp[Any, Any] = JobApp(scene.sessions)

    @app.handler(Note)
    def note(session: Session, payload: Note) -> None:
        pass

    return app


class Registered:
    """The lease of a worker that has only a row."""

    def __init__(self, scene: Scene, kinds: tuple[str, ...] = ("note",), **values: Any) -> None:
        with scene.sessions.begin() as session:
            self.worker_id = leases.register(session, timedelta(minutes=5), (), kinds)
            if values:
                session.execute(
                    update(WorkerRow).where(WorkerRow.id == self.worker_id).values(**values)
                )


@contextmanager
def scheduler(scene: Scene, app: JobApp[Any, Any], lease: Registered) -> Iterator[Scheduler]:
    control = Control(scene.database.engine(), Availability())
    wakeup = Wakeup(1.0, lambda: None)
    try:
        yield Scheduler(control, lease, app.known_schedules, wakeup)  # type: ignore[arg-type]
    finally:
        control.close()


def start(scene: Scene, app: JobApp[Any, Any], **values: Any) -> Registered:
    """Do what a worker does when it starts."""
    lease = Registered(scene, **values)
    with scheduler(scene, app, lease) as each:
        each.step()
    return lease


# --- one job for each tick ------------------------------------------------------------------------


def test_a_tick_makes_a_job_that_knows_it(scene: Scene) -> None:
    options: Any = {"queue": "mail", "priority": -3, "max_attempts": 2, "tags": ["a"]}
    scene.add(Schedule("report", "@hourly", Note("x"), headers={"h": "1"}, **options))
    assert scene.fire() == 1  # the next tick is worked out
    assert scene.row("report").next_tick == rule("@hourly").after(scene.now())
    assert scene.jobs() == []
    tick = scene.make_due("report")
    assert scene.fire() == 1
    (made,) = scene.jobs()
    assert (made.kind, made.payload, made.scheduled_at, made.run_at) == (
        "note",
        {"text": "x"},
        tick,
        tick,
    )
    assert {name: getattr(made, name) for name in options} == options
    assert made.headers == {"h": "1", "sajobs.schedule": "report"}
    row = scene.row("report")
    assert (row.last_tick, row.next_tick) == (tick, rule("@hourly").after(scene.now()))
    assert scene.fire() == 0


def test_of_many_workers_that_see_the_same_tick_one_makes_its_job(scene: Scene) -> None:
    names = [f"s{n}" for n in range(20)]
    scene.add(*(Schedule(name, "@hourly", Note(name)) for name in names))
    scene.fire()
    engines = [scene.database.engine() for _ in range(4)]
    for _ in range(3):
        for name in names:
            scene.make_due(name)
        barrier = threading.Barrier(len(engines))

        def wake(engine: Any, barrier: threading.Barrier = barrier) -> int:
            """All see the ticks before any makes a job."""
            with Session(engine) as session:
                rows, now = ticks.upcoming(session, KNOWN)
            assert now is not None
            firings = [ticks.plan(row, now, KNOWN) for row in rows if row.next_tick <= now]
            barrier.wait(30)
            with Session(engine) as session, session.begin():
                return len(ticks.fire(session, firings))

        with ThreadPoolExecutor(len(engines)) as pool:
            assert sum(pool.map(wake, engines)) == len(names)
    made = [(each.payload["text"], each.scheduled_at) for each in scene.jobs()]
    assert len(made) == len(set(made)) == 3 * len(names)


def test_a_process_that_dies_leaves_both_the_tick_and_its_job_or_neither(scene: Scene) -> None:
    """Not before COMMIT is sent; perhaps while it is under way; for certain after it has returned."""
    scene.add(Schedule("report", "@hourly", Note()))
    scene.fire()
    following = scene.row("report").next_tick
    url = scene.database.url.render_as_string(hide_password=False)
    command = [sys.executable, "-m", "tests.apps.ticking", url]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as dying:
        assert dying.stdin is not None and dying.stdout is not None
        for moment in ("before", "in", "in", "after"):
            made = len(scene.jobs())
            tick = scene.make_due("report")
            print(moment, file=dying.stdin, flush=True)
            assert dying.stdout.readline() == "-9\n"
            scene.wait_for_others("report")
            moved_on = scene.row("report").next_tick == following
            assert len(scene.jobs()) == made + moved_on
            assert moved_on in {"before": (False,), "in": (False, True), "after": (True,)}[moment]
            scene.fire()  # another worker
            assert len(scene.jobs()) == made + 1
            assert scene.ticks()[-1] == tick
        dying.stdin.close()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_commit_that_is_cut_leaves_both_or_neither_and_is_not_made_twice(
    row_locks: Database, when: When
) -> None:
    scene = Scene(row_locks)
    scene.add(Schedule("report", "@hourly", Note()))
    scene.fire()
    scene.make_due("report")
    proxy = Proxy(row_locks.url)
    engine = engine_for(proxy.url.render_as_string(hide_password=False))
    with Session(engine) as session:
        fire_due(session)
        proxy.cut_commit("", when)
        with pytest.raises(DBAPIError):
            session.commit()
    assert proxy.cuts.acquire(timeout=20)
    scene.wait_for_others("report")
    assert len(scene.jobs()) == (when == "after")
    scene.fire()
    assert len(scene.jobs()) == 1
    engine.dispose()
    proxy.stop()


def test_a_clock_that_is_put_back_repeats_no_tick(scene: Scene) -> None:
    """Nor when the rule is changed, or the schedule resumed, meanwhile: the clock is at 11:59:50 once more."""
    noon = scene.now().replace(hour=12, minute=0, second=0, microsecond=0)
    scene.add(Schedule("report", "0 * * * *", Note()))
    scene.set("report", next_tick=noon, last_tick=noon - HOUR)

    def fire_at(now: datetime) -> None:
        with scene.sessions.begin() as session:
            rows, _ = ticks.upcoming(session, KNOWN)
            due = [row for row in rows if row.next_tick is None or row.next_tick <= now]
            ticks.fire(session, [ticks.plan(row, now, KNOWN) for row in due])

    fire_at(noon)
    fire_at(noon - timedelta(seconds=10))
    scene.set("report", next_tick=None, updated_at=noon - timedelta(seconds=10))
    fire_at(noon - timedelta(seconds=9))
    fire_at(noon + timedelta(seconds=1))
    assert scene.ticks() == [noon]
    assert scene.row("report").next_tick == noon + HOUR


@given(
    st.sampled_from(["* * * * *", "*/20 * * * *", "@every 90s", "* * * * * */7"]),
    st.sampled_from(["skip", "once", "all"]),
    st.lists(st.floats(-300, 900), min_size=1, max_size=12),
)
@settings(deadline=None)
def test_whatever_the_clock_does_a_tick_has_one_job_and_under_all_none_is_missing(
    cron: str, catch_up: str, steps: list[float]
) -> None:
    begin = now = datetime(2026, 5, 1, 12, 0, 3, tzinfo=UTC)
    made, latest, following = [], now, rule(cron).after(now)
    for step in steps:
        now += timedelta(seconds=step)
        latest = max(latest, now)
        while following <= now:
            before = following
            found, following = ticks.owed(rule(cron), following, now, catch_up, DAY)
            assert following > before
            made += found
    assert made == sorted(set(made))
    if catch_up == "all":
        wanted = rule(cron).after(begin)
        while wanted <= latest:
            assert made.pop(0) == wanted
            wanted = rule(cron).after(wanted)
        assert made == []


# --- late, and paused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("catch_up", "window", "late", "expected"),
    [
        ("skip", None, timedelta(seconds=50), [0]),  # no missed tick yet
        ("skip", None, timedelta(minutes=5), []),
        ("once", None, timedelta(minutes=5), [0]),
        ("once", None, 2.5 * HOUR, [2]),
        ("once", timedelta(minutes=20), 2.5 * HOUR, []),
        ("once", timedelta(minutes=30), 2.5 * HOUR, [2]),
        ("all", None, 2.5 * HOUR, [0, 1, 2]),
        ("all", 2 * HOUR, 2.5 * HOUR, [1, 2]),
        ("all", 2 * HOUR, 3 * HOUR, [1, 2, 3]),
        ("all", timedelta(minutes=20), 2.5 * HOUR, []),
        ("all", None, 26.5 * HOUR, list(range(3, 27))),
    ],
)
def test_what_is_caught_up(
    catch_up: str, window: timedelta | None, late: timedelta, expected: list[int]
) -> None:
    first = datetime(2026, 5, 1, 12, tzinfo=UTC)
    now = first + late
    found, following = ticks.owed(rule("@hourly"), first, now, catch_up, window or DAY)
    assert found == [first + n * HOUR for n in expected]
    assert following == rule("@hourly").after(now)


def test_ticks_that_follow_closely_are_not_missed_when_a_worker_stumbles() -> None:
    first = datetime(2026, 5, 1, 12, tzinfo=UTC)
    for late, number in ((3.5, 4), (5.0, 6), (30.0, 6)):
        now = first + timedelta(seconds=late)
        found, _ = ticks.owed(rule("* * * * * *"), first, now, "skip", DAY)
        assert len(found) == number
    found, _ = ticks.owed(rule("* * * * *"), first, first + timedelta(minutes=3), "skip", DAY)
    assert found == [first + timedelta(minutes=2), first + timedelta(minutes=3)]


def test_a_long_row_of_missed_ticks_is_made_in_parts(scene: Scene) -> None:
    scene.add(Schedule("report", "* * * * *", Note(), catch_up="all"))
    scene.fire()
    first = rule("* * * * *").after(scene.now() - timedelta(minutes=BATCH + 20))
    scene.set("report", next_tick=first)
    scene.fire()
    assert len(scene.jobs()) == BATCH
    while scene.fire():
        pass
    made = scene.ticks()
    assert made[0] == first and len(made) in (BATCH + 20, BATCH + 21)
    assert made == sorted(set(made), key=str)
    assert scene.row("report").last_tick == made[-1]


def test_the_ticks_of_a_paused_schedule_pass_by_also_after_it_is_resumed(scene: Scene) -> None:
    scene.add(
        Schedule("report", "* * * * *", Note(), catch_up="all"), Schedule("b", "@daily", Note())
    )
    scene.fire()
    with scene.sessions.begin() as session:
        assert pause_schedule(session, "report")
        assert not pause_schedule(session, "report")
        with pytest.raises(errors.ControlError, match='there is no schedule "no such"'):
            resume_schedule(session, "no such")
    scene.set("report", last_tick=scene.now() - HOUR)
    assert scene.fire() == 0
    with scene.sessions.begin() as session:
        assert resume_schedule(session, "report")
    scene.fire()
    assert scene.jobs() == []
    following = scene.row("report").next_tick
    assert following is not None and following > scene.now() - timedelta(seconds=1)


def test_a_new_rule_ticks_from_its_commit_on(scene: Scene) -> None:
    scene.add(Schedule("report", "@yearly", Note()))
    scene.fire()
    with scene.sessions.begin() as session:
        schedule = session.get_one(Schedule, "report")
        schedule.cron, schedule.payload = "@monthly", Note("new")
        schedule.window = timedelta(hours=2)
        schedule.timezone = "Asia/Kathmandu"
        with pytest.raises(errors.ScheduleError, match="the hour"):
            schedule.cron = "0 25 * * *"
    row = scene.row("report")
    assert (row.next_tick, row.payload, row.window) == (None, {"text": "new"}, 2 * HOUR)
    scene.fire()
    assert scene.row("report").next_tick == rule("@monthly", "Asia/Kathmandu").after(scene.now())
    with scene.sessions.begin() as session:
        session.delete(session.get_one(Schedule, "report"))
    assert scene.fire() == 0


def test_a_tick_that_was_worked_out_while_a_new_rule_was_written_is_not_kept(scene: Scene) -> None:
    scene.add(Schedule("report", "@yearly", Note()))
    read_before = scene.row("report")
    assert read_before.next_tick is None
    scene.fire()
    assert scene.row("report").next_tick is not None
    with scene.sessions.begin() as session:
        session.add(read_before)
        read_before.cron = "@monthly"
    assert scene.row("report").next_tick is None


def test_a_schedule_that_is_merged_is_added_or_changed_and_stays_paused(scene: Scene) -> None:
    def merge(cron: str, payload: Note, **options: Any) -> Schedule:
        with scene.sessions.begin() as session:
            session.merge(Schedule("report", cron, payload, **options))
        return scene.row("report")

    assert merge("@hourly", Note("first"), tags=["a"]).next_tick is None
    scene.fire()
    row = merge("@hourly", Note("second"), tags=["a"])
    assert (row.kind, row.payload, row.options) == ("note", {"text": "second"}, {"tags": ["a"]})
    assert row.next_tick is not None
    with scene.sessions.begin() as session:
        pause_schedule(session, "report")
    row = merge("@daily", Note("second"))
    assert (row.paused, row.cron, row.options) == (True, "@daily", None)


def test_a_tick_between_the_commit_and_the_first_look_is_not_missed(scene: Scene) -> None:
    scene.add(Schedule("report", "@every 1s", Note()))
    added = scene.row("report").updated_at
    while scene.now() < added + timedelta(seconds=1):
        time.sleep(0.05)
    scene.fire()
    scene.fire()
    assert scene.ticks()[0] == rule("@every 1s").after(added)


def test_a_row_from_the_future_ticks_from_now_on(scene: Scene) -> None:
    """The clock was put back since it was added."""
    scene.add(Schedule("report", "@hourly", Note()))
    scene.set("report", updated_at=scene.now() + DAY)
    scene.fire()
    assert scene.row("report").next_tick == rule("@hourly").after(scene.now())


# --- what is wrong with a row ------------------------------------------------------------------------


MENDED: dict[str, Any] = {
    "cron": "@daily",
    "timezone": "UTC",
    "payload": Note("mended"),
    "options": {},
    "catch_up": "once",
    "catch_up_window": None,
}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"cron": "0 25 * * *"}, 'the hour "25"'),
        ({"timezone": "Mars/Base"}, "timezone='Mars/Base' is not known"),
        ({"payload": {"text": 5}}, "invalid payload"),
        ({"payload": None}, "invalid payload"),
        ({"options": {"queue": "a b"}}, "queue 'a b'"),
        ({"options": {"colour": "red"}}, "colour: no option"),
        ({"options": ["red"]}, "options=['red']: wanted an object with queue"),
        ({"catch_up": "maybe"}, "catch_up='maybe': wanted"),
        ({"catch_up_window": 1e15}, "catch_up_window=1e+15: wanted seconds"),
        ({"catch_up_window": -1.0}, "catch_up_window=-1: wanted seconds"),
    ],
)
def test_a_row_that_was_broken_by_hand_is_paused_and_does_not_stop_the_others(
    scene: Scene, values: dict[str, Any], said: str
) -> None:
    scene.add(*(Schedule(name, "@hourly", Note(name)) for name in ("bad", "good")))
    scene.fire()
    for name in ("bad", "good"):
        scene.make_due(name)
    scene.set("bad", **values)
    scene.fire()
    assert [each.payload for each in scene.jobs()] == [{"text": "good"}]
    bad = scene.row("bad")
    assert bad.paused and bad.error is not None and said in bad.error
    assert scene.fire() == 0
    with scene.sessions.begin() as session:
        row = session.get_one(Schedule, "bad")
        (broken,) = values
        setattr(row, {"catch_up_window": "window"}.get(broken, broken), MENDED[broken])
    bad = scene.row("bad")
    assert (bad.paused, bad.error) == (False, None)
    scene.fire()
    scene.make_due("bad")
    scene.fire()
    assert len(scene.jobs()) == 2


def test_a_job_that_the_database_refuses_pauses_its_schedule_only_and_is_told_once(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    scene.add(*(Schedule(name, "@hourly", Note(name)) for name in ("a", "bad", "c")))
    scene.fire()
    for name in ("a", "bad", "c"):
        scene.make_due(name)

    def refuse(mapper: Any, connection: Any, made: Job) -> None:
        if made.payload == {"text": "bad"}:
            raise IntegrityError("INSERT", {}, Exception("a trigger says no"))

    event.listen(Job, "before_insert", refuse)
    try:
        with caplog.at_level(logging.ERROR):
            start(scene, app_of(scene))
    finally:
        event.remove(Job, "before_insert", refuse)
    assert sorted(each.payload["text"] for each in scene.jobs()) == ["a", "c"]
    assert "a trigger says no" in (scene.row("bad").error or "")
    assert [each.message.partition(":")[0] for each in caplog.records] == [
        'schedule "bad" is paused'
    ]


def test_a_unique_job_that_is_still_there_stands_for_that_of_the_next_tick(scene: Scene) -> None:
    known = Known({"only": (Only, declaration_of(Only))}, {})
    scene.add(Schedule("only", "@hourly", Only()))
    scene.fire(known)
    for _ in range(2):
        scene.make_due("only")
        assert scene.fire(known) == 1
    assert len(scene.jobs()) == 1
    assert not scene.row("only").paused


def test_a_unique_key_that_an_open_transaction_holds_stops_no_other_schedule(
    row_locks: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does the waiting change the connection that other transactions of the worker are on."""
    monkeypatch.setattr(scheduling, "KEY_REST", 0.1)
    without_old_rows(row_locks)
    scene = Scene(row_locks)
    names = ("held 1", "other", "held 2")
    scene.add(*(Schedule(name, "@hourly", Note(name), unique_key=name) for name in names[::2]))
    scene.add(Schedule("other", "@hourly", Note("other")))
    app = app_of(scene)
    lease = start(scene, app)
    patience = {"postgresql": "SHOW lock_timeout", "mysql": "SELECT @@innodb_lock_wait_timeout"}

    def made() -> list[str]:
        return sorted(each.payload["text"] for each in scene.jobs())

    with scheduler(scene, app, lease) as each, scene.sessions() as theirs:
        theirs.add_all([enqueue(Note("theirs"), unique_key=name) for name in names[::2]])
        theirs.flush()
        before = theirs.scalar(text(patience[row_locks.name]))
        for name in names:
            scene.make_due(name)
        for _ in range(3):
            each.step()
        assert made() == ["other"]
        assert not each.is_idle
        scene.make_due("other")
        each.step()
        assert made() == ["other", "other"]
        assert each._control.transaction(
            lambda session: session.scalar(text(patience[row_locks.name])) == before
        )
        theirs.rollback()
        until(lambda: each.step() >= 0.0 and len(made()) == 4)
    assert made() == ["held 1", "held 2", "other", "other"]
    assert sum("waits for an open transaction" in line.message for line in caplog.records) == 2


# --- the schedules of the code ------------------------------------------------------------------------


def test_a_deploy_adds_changes_and_retires_the_schedules_of_the_code(scene: Scene) -> None:
    old, new, other = app_of(scene), app_of(scene), JobApp(scene.sessions)

    @other.handler(Only)
    def only(session: Session, payload: Only) -> None:
        pass

    old.schedule("goes", "@daily", Note())
    old.schedule("stays", "@daily", Note("1"))
    old.schedule("changes", "@daily", Note("1"), priority=3)
    new.schedule("stays", "@daily", Note("1"))
    new.schedule("changes", "@weekly", Note("2"), catch_up="once", window=HOUR)
    new.schedule("comes", "@daily", Note())
    other.schedule("theirs", "@daily", Only())
    scene.add(Schedule("row", "@daily", Note()))
    start(scene, other, kinds=("only",))
    start(scene, old)
    with scene.sessions.begin() as session:
        pause_schedule(session, "changes")
        pause_schedule(session, "stays")
    start(scene, new)
    with scene.sessions() as session:
        rows = {row.name: row for row in session.scalars(select(Schedule))}
    assert rows.keys() == {"stays", "changes", "comes", "theirs", "row"}
    changed = rows["changes"]
    assert (changed.cron, changed.payload, changed.options, changed.catch_up, changed.window) == (
        "@weekly",
        {"text": "2"},
        None,
        "once",
        HOUR,
    )
    assert changed.paused and rows["stays"].paused and not rows["comes"].paused
    assert [name for name, row in rows.items() if not row.in_code] == ["row"]


def test_an_old_worker_leaves_alone_what_a_new_one_has_changed(scene: Scene) -> None:
    old, new = app_of(scene), app_of(scene)
    old.schedule("report", "@daily", Note("old"))
    new.schedule("report", "@daily", Note("new"))
    start(scene, old)
    start(scene, new)
    scene.make_due("report")
    scene.fire(old.known_schedules)
    assert scene.jobs() == []
    scene.fire(new.known_schedules)
    assert [each.payload for each in scene.jobs()] == [{"text": "new"}]
    scene.make_due("report")
    scene.fire(KNOWN)  # of a worker that knows the kind, and not the schedule
    assert len(scene.jobs()) == 1


def test_the_youngest_live_worker_decides_what_the_code_says(scene: Scene) -> None:
    """A worker of the old code that starts late undoes the deploy, until it has gone."""
    old, new = app_of(scene), app_of(scene)
    new.schedule("report", "@daily", Note("new"))
    lease_of_new = start(scene, new)
    with scheduler(scene, new, lease_of_new) as each:
        each.step()
        lease_of_old = start(scene, old)  # which retires it
        each._next_sync = 0.0  # a minute later
        each.step()
        with scene.sessions() as session:
            assert session.get(Schedule, "report") is None
        with scene.sessions.begin() as session:
            leases.unregister(session, lease_of_old.worker_id)
        each._next_sync = 0.0
        each.step()
    assert scene.row("report").payload == {"text": "new"}


def test_a_schedule_of_the_code_under_the_name_of_a_row_is_refused_at_the_start(
    scene: Scene,
) -> None:
    scene.add(Schedule("report", "@daily", Note("row")))
    app = app_of(scene)
    app.schedule("report", "@daily", Note("code"))
    with pytest.raises(
        errors.ConfigurationError, match="under names that the app declares: report"
    ):
        app.worker(drain=True).run()
    assert scene.row("report").payload == {"text": "row"}


@pytest.mark.parametrize("trouble", [ValueError("not today"), SystemExit("not today")])
def test_a_function_makes_the_payload_of_each_tick_and_its_error_costs_that_tick_alone(
    scene: Scene, caplog: pytest.LogCaptureFixture, trouble: BaseException
) -> None:
    app = app_of(scene)
    troubles = [trouble]

    def make(tick: datetime) -> Note:
        if troubles:
            raise troubles.pop()
        return Note(tick.isoformat())

    app.schedule("report", "@hourly", make)
    lease = start(scene, app)
    scene.make_due("report")
    with scheduler(scene, app, lease) as each, caplog.at_level(logging.ERROR):
        while each.step() == 0.0:
            pass
    assert scene.jobs() == []
    row = scene.row("report")
    said = f"{type(trouble).__name__}: not today"
    assert (row.paused, row.error, row.payload) == (False, said, None)
    assert len(caplog.records) == 1
    tick = scene.make_due("report")
    scene.fire(app.known_schedules)
    assert [each.payload for each in scene.jobs()] == [{"text": tick.isoformat()}]
    assert scene.row("report").error is None


def test_a_function_that_exits_at_the_start_costs_the_start_tick_alone(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    def make(tick: datetime) -> Note:
        sys.exit("not at the start")

    app = app_of(scene)
    app.schedule("report", "@yearly", make, run_on_start=True)
    start(scene, app)
    assert scene.jobs() == []
    assert [each.message for each in caplog.records if each.levelno == logging.ERROR] == [
        'schedule "report" has no job for a tick: SystemExit: not at the start'
    ]
    assert scene.row("report").next_tick is not None


def test_workers_that_start_together_add_a_schedule_once_and_make_one_start_tick(
    scene: Scene,
) -> None:
    app = app_of(scene)
    app.schedule("report", "@yearly", Note(), run_on_start=True)
    scene.add(Schedule("row", "@yearly", Note("row"), run_on_start=True))
    barrier = threading.Barrier(4)

    def begin(number: int) -> None:
        barrier.wait(30)
        with scheduler(scene, app, Registered(scene)) as each:
            while not each._has_started:
                each.step()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(begin, range(4)))
    assert sorted(each.payload["text"] for each in scene.jobs()) == ["", "row"]
    start(scene, app)  # one that comes later
    assert len(scene.jobs()) == 2


def test_the_first_worker_of_a_fleet_makes_the_start_tick_again(scene: Scene) -> None:
    app = app_of(scene)
    app.schedule("report", "@yearly", Note(), run_on_start=True)
    app.schedule("paused", "@yearly", Note(), run_on_start=True)
    first = start(scene, app)
    with scene.sessions.begin() as session:
        pause_schedule(session, "paused")
        leases.unregister(session, first.worker_id)
    start(scene, app)
    assert len(scene.jobs()) == 3


def test_of_two_that_start_together_the_second_sees_the_tick_of_the_first(scene: Scene) -> None:
    """Although it is the older one, and was not to be seen yet when the other one looked."""
    app = app_of(scene)
    app.schedule("report", "@yearly", Note(), run_on_start=True)
    start(scene, app)
    assert len(scene.jobs()) == 1
    older = Registered(scene, started_at=scene.now() - timedelta(minutes=1))
    with scheduler(scene, app, older) as each:
        each.step()
    assert len(scene.jobs()) == 1


def test_a_start_tick_takes_nothing_from_those_that_were_missed(scene: Scene) -> None:
    app = app_of(scene)
    scene.add(Schedule("report", "@hourly", Note(), run_on_start=True, catch_up="once"))
    scene.fire()
    tick = scene.make_due("report", ago=DAY / 2)
    lease = Registered(scene)
    with scheduler(scene, app, lease) as each:
        while each.step() == 0.0:
            pass
    missed, at_start = scene.ticks()
    assert missed is not None and at_start is not None
    assert tick <= missed < at_start


def test_a_row_that_is_locked_holds_up_no_other_and_has_its_start_tick_later(
    row_locks: Database,
) -> None:
    scene = Scene(row_locks)
    app = app_of(scene)
    for name in ("locked", "free"):
        scene.add(Schedule(name, "@yearly", Note(name), run_on_start=True))
    with (
        scheduler(scene, app, Registered(scene)) as each,
        scene.sessions.begin() as session,
        ThreadPoolExecutor() as pool,
    ):
        session.get(Schedule, "locked", with_for_update=True)
        pool.submit(each.step).result(20)
        assert [job.payload["text"] for job in scene.jobs()] == ["free"]
        session.rollback()
        until(lambda: each.step() > 0.0 and len(scene.jobs()) == 2)


# --- run now --------------------------------------------------------------------------------------


def test_a_schedule_can_be_run_by_hand(scene: Scene) -> None:
    app = app_of(scene)
    app.schedule("code", "@yearly", lambda_of_tick)
    scene.add(Schedule("row", "@yearly", Note("row"), queue="mail", paused=True))
    start(scene, app)
    before = scene.row("row").next_tick
    with scene.sessions.begin() as session:
        made = app.run_schedule(session, "row")
        assert (made.queue, made.payload) == ("mail", {"text": "row"})
        assert app.run_schedule(session, "code").scheduled_at is not None
        with pytest.raises(errors.ControlError, match='there is no schedule "nothing"'):
            app.run_schedule(session, "nothing")
        with pytest.raises(errors.ControlError, match="not by this app"):
            app_of(scene).run_schedule(session, "code")
        with pytest.raises(errors.ControlError, match="no handler"):
            JobApp(scene.sessions).run_schedule(session, "row")
    assert len(scene.jobs()) == 2
    assert scene.row("row").next_tick == before


def lambda_of_tick(tick: datetime) -> Note:
    return Note(str(tick.year))


# --- a whole worker -------------------------------------------------------------------------------


class Seen:
    """What handlers saw, to be waited for."""

    def __init__(self) -> None:
        self.runs: list[Any] = []
        self._changed = threading.Condition()

    def note(self, run: Any) -> None:
        with self._changed:
            self.runs.append(run)
            self._changed.notify_all()

    def wait(self, condition: Callable[[list[Any]], bool]) -> list[Any]:
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self.runs), 60), self.runs
            return list(self.runs)


def test_a_worker_runs_each_tick_on_time_and_tells_the_handler(scene: Scene) -> None:
    """A schedule that is added while it works too; requeued, the job keeps its tick."""
    seen = Seen()
    app: JobApp[Any, Any] = JobApp(scene.sessions)

    @app.handler(Note)
    def note(session: Session, payload: Note) -> None:
        run = current_run()
        seen.note((run.schedule, run.scheduled_at, run.job_id, run.attempt))

    app.schedule("code", "* * * * * *", Note())
    with app.worker(poll_interval=timedelta(milliseconds=200)):
        seen.wait(lambda runs: len(runs) >= 2)
        scene.add(Schedule("row", "@every 1s", Note()))
        runs = seen.wait(lambda runs: sum(each[0] == "row" for each in runs) >= 2)
        with scene.sessions.begin() as session:
            session.add(enqueue(Note()))
            assert requeue(session, runs[0][2])
        runs = seen.wait(
            lambda runs: {(*runs[0][:3], 2), (None, None)} <= {*runs, *(r[:2] for r in runs)}
        )
    for name in ("code", "row"):
        of_it = [each[1] for each in runs if each[0] == name and each[3] == 1]
        assert of_it == [of_it[0] + timedelta(seconds=n) for n in range(len(of_it))]
    late = [made.started_at - made.scheduled_at for made in scene.jobs()
            if made.scheduled_at and made.started_at and made.attempt == 1]  # fmt: skip
    assert sorted(late)[len(late) // 2] < timedelta(seconds=2)


def test_a_worker_that_drains_ends_when_no_tick_is_due(scene: Scene) -> None:
    app = app_of(scene)
    scene.add(Schedule("report", "@hourly", Note(), catch_up="once"))
    scene.fire()
    tick = scene.make_due("report", ago=DAY / 2)
    app.worker(drain=True).run()
    (made,) = scene.jobs()
    assert made.state == "succeeded" and made.scheduled_at is not None and made.scheduled_at >= tick


def test_a_worker_is_told_of_a_new_schedule_by_the_server(postgresql: Database) -> None:
    """Added by another process, whose commit wakes nobody here: without the bell it would take a minute."""
    scene = Scene(postgresql)
    seen = Seen()
    app = JobApp(scene.sessions)

    @app.handler(Note)
    def note(session: Session, payload: Note) -> None:
        seen.note(payload)

    url = postgresql.url.render_as_string(hide_password=False)
    program = (
        "import sys; from sqlalchemy import create_engine; from sqlalchemy.orm import Session\n"
        "from sqlalchemy_jobs import Schedule; from tests.apps.ticking import Note\n"
        "with Session(create_engine(sys.argv[1])) as session:\n"
        "    session.add(Schedule('row', '@every 1s', Note('told'))); session.commit()\n"
    )
    with app.worker():
        until(lambda: bell_is_on(scene))
        time.sleep(0.2)  # the look that follows it
        before = time.monotonic()
        subprocess.run([sys.executable, "-c", program, url], cwd=ROOT, check=True)
        seen.wait(lambda payloads: Note("told") in payloads)
        assert time.monotonic() - before < 30


def bell_is_on(scene: Scene) -> bool:
    with scene.sessions() as session:
        return session.scalar(select(WorkerRow.bell)) is True


# --- thousands of rows ------------------------------------------------------------------------------


def test_the_due_ones_of_thousands_are_found_by_the_index(database: Database) -> None:
    scene = Scene(database)
    names = {"postgresql": "sajobs_schedule_next", "mysql": "sajobs_schedule_next"}
    now = scene.now()
    made = Schedule("x", "@daily", Note())
    values = {"cron": "@daily", "kind": "note", "payload": made.payload, "created_at": now}
    with scene.sessions.begin() as session:
        session.execute(
            insert(schedules),
            [
                {
                    **values,
                    "name": f"tenant {n}",
                    "paused": n % 2 == 0,
                    "next_tick": now + timedelta(seconds=n + 60),
                }
                for n in range(4000)
            ],
        )
    scene.make_due("tenant 3001")
    scene.set("tenant 3003", next_tick=None)
    sent: list[Any] = []
    with scene.sessions() as session:
        session.execute(text(f"ANALYZE {'TABLE' * (database.name == 'mysql')} sajobs_schedule"))
        connection = session.connection()
        event.listen(
            connection,
            "before_cursor_execute",
            lambda _, cursor, sql, values, context, many: sent.append((sql, values)),
        )
        rows, _ = ticks.upcoming(session, KNOWN)
        assert [row.name for row in rows[:2]] == ["tenant 3003", "tenant 3001"]
        assert len(rows) == BATCH + 1
        explain = "EXPLAIN QUERY PLAN" if database.name == "sqlite" else "EXPLAIN"
        plan = connection.exec_driver_sql(f"{explain} {sent[-1][0]}", sent[-1][1]).all()
    said = "\n".join(str(row) for row in plan)
    assert (
        said.count(names.get(database.name, "USING INDEX sajobs_schedule_next (paused=?")) >= 2
    ), said
    assert "Seq Scan on sajobs_schedule" not in said and "filesort" not in said, said


# --- declared wrongly, and the command -----------------------------------------------------------------


async def in_vain(tick: datetime) -> Note:
    return Note()


def untold(tick):  # type: ignore[no-untyped-def]
    return Note()


def of_nothing() -> Note:
    return Note()


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        (("n", "0 25 * * *", Note()), {}, 'schedule "n": cron "0 25 * * *", character 3: the hour'),
        (("n", "@daily", Note()), {"timezone": "Mars"}, "timezone='Mars' is not known"),
        (("", "@daily", Note()), {}, "wanted a name of 1 to 200"),
        (("n\n", "@daily", Note()), {}, "wanted a name of 1 to 200"),
        (("n", "@daily", Note()), {"catch_up": "never"}, 'wanted "skip", "once" or "all"'),
        (("n", "@daily", Note()), {"window": HOUR}, 'window is for catch_up="once" and "all"'),
        (("n", "@daily", Note()), {"catch_up": "all", "window": 60}, "window=60 (int) is not a timedelta"),
        (("n", "@daily", Note()), {"delay": HOUR}, "delay: no option of a schedule's jobs"),
        (("n", "@daily", Note()), {"queue": "a b"}, "queue 'a b'"),
        (("n", "@daily", Note()), {"tags": "a"}, "tags='a' is one string"),
        (("n", "@daily", Note()), {"unique_key": " a"}, "unique_key=' a'"),
        (("n", "@daily", Note(5)), {}, "Note.text"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_where_it_is_declared(
    arguments: tuple[Any, ...], options: dict[str, Any], said: str
) -> None:
    app: JobApp[Any, Any] = JobApp(sessionmaker())
    for declare in (app.schedule, Schedule):
        with pytest.raises((errors.ScheduleError, errors.PayloadError)) as raised:
            declare(*arguments, **options)
        assert said in str(raised.value)


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (Note, "was given the class Note: wanted a payload, or a function of the tick"),
        ("note", "was given 'note'"),
        (in_vain, "in_vain is async"),
        (untold, "untold does not say what it returns"),
        (lambda tick: Note(), "does not say what it returns"),
        (of_nothing, "of_nothing cannot be called with a tick"),
    ],
)
def test_a_function_that_is_none_of_the_tick_is_refused(payload: Any, said: str) -> None:
    app: JobApp[Any, Any] = JobApp(sessionmaker())
    with pytest.raises(errors.ScheduleError) as raised:
        app.schedule("n", "@daily", payload)
    assert said in str(raised.value)


def test_names_are_unique_also_through_include_and_a_schedule_needs_a_handler() -> None:
    group, app = Handlers[Any, Any](), JobApp(sessionmaker())
    group.schedule("n", "@daily", Note())
    app.include(group)
    app.include(group)
    with pytest.raises(errors.DuplicateSchedule, match='there are two schedules "n"'):
        app.schedule("n", "@daily", Note())
    app.handler(Only)(lambda session, payload: None)
    with pytest.raises(errors.ConfigurationError, match='kind "note", and the app has no handler'):
        app.worker(drain=True).run()


def test_who_only_enqueues_does_not_import_croniter() -> None:
    program = "import sys, sqlalchemy_jobs; sys.exit('croniter' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


Command = Callable[..., tuple[Any, str, str]]


@pytest.fixture
def command(
    scene: Scene, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Command:
    """`sajobs schedules`: its exit status, and what it wrote to stdout and stderr."""
    module = ModuleType("app_of_test_schedules")
    vars(module)["jobs"] = app = app_of(scene)
    app.schedule("code", "0 4 * * *", lambda_of_tick, timezone="Asia/Kathmandu")
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def command(
        *arguments: str, of: str = "--app=app_of_test_schedules:jobs"
    ) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["schedules", of, *arguments])
        return (ended.value.code, *capsys.readouterr())

    return command


def test_the_command_lists_what_was_broken_by_hand_and_says_why_it_cannot_be_run(
    scene: Scene, command: Command
) -> None:
    names = ("late", "odd", "taken", "zone")
    scene.add(*(Schedule(name, "@hourly", Note(name), unique_key=name) for name in names))
    scene.set("late", next_tick=datetime(9999, 12, 31, 17, tzinfo=UTC), timezone="Asia/Tokyo")
    scene.set("odd", payload={"text": 5})
    scene.set("zone", timezone="Mars")
    status, listed, said = command("--next", "2")
    assert status == 0, said
    assert [line.split()[0] for line in listed.splitlines()[1:] if line[0] != " "] == [*names]
    status, _, said = command("run", "odd")
    assert status == 1
    assert said.startswith("Error: invalid payload: Note.text")
    first = command("run", "taken")[1].split()[-1]
    _, second, _ = command("run", "taken")
    assert second == f"taken: job {first} has its unique key, so none was added\n"


def test_the_command_lists_pauses_resumes_and_runs(scene: Scene, command: Command) -> None:
    from app_of_test_schedules import jobs as app  # type: ignore[import-not-found]

    scene.add(Schedule("row", "@every 30d", Note()), Schedule("wrong", "@daily", Note()))
    lease = start(scene, app)
    scene.set("wrong", cron="nonsense", next_tick=None)
    scene.fire()
    url = scene.database.url.render_as_string(hide_password=False)
    for of in ("--app=app_of_test_schedules:jobs", f"--database-url={url}"):
        status, listed, faults = command(of=of)
        assert (status, faults) == (0, f"wrong: {scene.row('wrong').error}\n")
        code, row, wrong = (line.split() for line in listed.splitlines()[1:])
        assert code[:10] == [
            "code",
            "0",
            "4",
            "*",
            "*",
            "*",
            "Asia/Kathmandu",
            "note",
            "code",
            "on",
        ]
        assert code[-1] == "04:00:00+05:45"
        assert row[-6:-2] == ["note", "row", "on", "-"]
        assert wrong[-3:] == ["wrong", "-", "-"]
    _, listed, _ = command("--next", "5")
    shown = [line.split()[-2:] for line in listed.splitlines()[1:6]]
    assert len({day for day, _ in shown}) == 5 and {time for _, time in shown} == {"04:00:00+05:45"}
    assert command("pause", "row")[:2] == (0, "row: paused\n")
    assert command("pause", "row")[:2] == (0, "row: was paused before\n")
    assert command("resume", "row")[:2] == (0, "row: resumed\n")
    assert command("run", "row")[1].startswith("row: added job ")
    assert len(scene.jobs()) == 1
    with scene.sessions.begin() as session:
        leases.unregister(session, lease.worker_id)
    assert " unserved " in command()[1].splitlines()[2]
    assert command("pause", "no")[::2] == (1, 'Error: there is no schedule "no"\n')
    status, _, said = command("run", "row", of=f"--database-url={url}")
    assert status == 2 and "name it by --app" in said
