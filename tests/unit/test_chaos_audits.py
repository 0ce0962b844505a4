"""Each audit of `tests.chaos` finds what it is there to find, and nothing where all is well."""

import re
import subprocess
import sys
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from sqlalchemy_jobs import Attempt, Job, Unique
from sqlalchemy_jobs.runs import SCHEDULE_HEADER
from tests.chaos import audit, flow
from tests.chaos.books import Books
from tests.chaos.diary import Entry
from tests.chaos.faults import Process
from tests.chaos.kinds import ASIDE, NARROW, PARTS
from tests.chaos.load import Fate, Transaction
from tests.chaos.operator import AT_ONCE
from tests.chaos.rows import Effect, Reference

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
CALM_AT = BEGAN + timedelta(seconds=1000)
STALLED = 15.0
WORKER, OTHER = uuid.uuid4(), uuid.uuid4()


class World:
    """A transaction that enqueued what is made here, and what became of that."""

    def __init__(self) -> None:
        self.transaction = Transaction(fate="committed")
        self.changes: list[Transaction] = []
        self.intents = {self.transaction.id}
        self.rows: list[Job | Attempt | Effect | Reference] = []
        self.entries: list[Entry] = []

    def job(
        self, kind: str, state: str = "succeeded", *, row: bool = True, **values: object
    ) -> Job:
        values = {"attempt": 1, "unique_states": 0, "failures": 0} | values
        job = Job(**{"id": uuid.uuid4(), "kind": kind, "state": state, **values})
        self.transaction.jobs[job.id.hex] = kind
        if row:
            self.rows.append(job)
        return job

    def done(self, kind: str, **values: object) -> Job:
        job = self.job(kind, **values)  # type: ignore[arg-type]
        self.effect(job)
        return job

    def effect(self, job: Job, attempt: int = 1, at: float = 1, last: bool = True) -> Effect:
        effect = Effect(
            id=uuid.uuid4().hex,
            job_id=job.id.hex,
            attempt=attempt,
            worker_id=WORKER.hex,
            at=BEGAN + timedelta(seconds=at),
            last=last,
        )
        self.rows.append(effect)
        return effect

    def ended(self, job: Job, attempt: int, outcome: str, at: float = 1) -> Attempt:
        ended = Attempt(
            job_id=job.id,
            attempt=attempt,
            worker_id=WORKER,
            outcome=outcome,
            finished_at=BEGAN + timedelta(seconds=at),
        )
        self.rows.append(ended)
        return ended

    def event(
        self,
        job: Job,
        event: str,
        attempt: int = 1,
        pid: int = 1,
        at: float | None = None,
        word: str = "-",
    ) -> None:
        run = (job.id.hex, attempt, WORKER.hex)
        when = float(len(self.entries)) if at is None else BEGAN.timestamp() + at
        self.entries.append(Entry(pid, when, event, run, word))

    def ran(self, kind: str, began: float, ended: float, **values: object) -> Job:
        """A job that ran once, and was claimed at once before it began."""
        started, finished = (BEGAN + timedelta(seconds=at) for at in (began, ended))
        job = self.done(kind, **{"started_at": started, "finished_at": finished, **values})
        self.event(job, "began", at=began)
        return job

    def changed(self, name: str, value: object, at: float, fate: Fate = "committed") -> None:
        """A transaction that changed something, in a tenth of a second."""
        change = Transaction(began=BEGAN.timestamp() + at, changes={name: value}, fate=fate)
        if fate == "committed":
            change.ended = change.began + 0.1
            self.intents.add(change.id)
        self.changes.append(change)

    def tick(
        self, name: str, at: float, made_at: float | None = None, carries: float | None = None
    ) -> Job:
        return self.done(
            "tick",
            headers={SCHEDULE_HEADER: name},
            payload={"at": None if carries is None else BEGAN.timestamp() + carries},
            scheduled_at=BEGAN + timedelta(seconds=at),
            created_at=BEGAN + timedelta(seconds=at if made_at is None else made_at),
        )

    def violations(self) -> list[str]:
        transactions = [self.transaction, *self.changes]
        books = Books(self.rows, self.intents, self.entries, transactions, CALM_AT.timestamp())
        return [*audit.violations(books, []), *flow.violations(books, STALLED)]


@pytest.fixture
def world() -> World:
    """Where all is well."""
    world = World()
    world.event(world.done("write"), "began")
    world.done("vanishing", row=False)
    sleepy = world.job("sleepy", attempt=3)
    for attempt in (1, 2):
        world.effect(sleepy, attempt, at=attempt, last=False)
        world.ended(sleepy, attempt, "snoozed", at=attempt)
    world.effect(sleepy, 3, at=3)
    parts = world.job("parts", attempt=2)
    world.effect(parts, 1, at=1, last=False)
    world.ended(parts, 1, "crashed", at=2)
    for at in range(PARTS):
        world.effect(parts, 2, at=3 + at, last=False)
    world.effect(parts, 2, at=9)
    poison = world.job("poison", "failed", attempt=3, failures=3)
    for attempt in (1, 2, 3):
        world.ended(poison, attempt, "crashed", at=attempt)
        world.event(poison, "began", attempt, pid=attempt)
        world.event(poison, "poisoned", attempt, pid=attempt)
    once = world.job("once", "failed", attempt=2)
    world.event(once, "began")
    world.ended(once, 1, "crashed", at=1)
    world.ended(once, 2, "failed", at=2)
    states = Unique().mask
    for at in (0, 2):
        started, finished = (BEGAN + timedelta(seconds=at + more) for more in (0, 1))
        times = {"started_at": started, "finished_at": finished}
        world.done("only", unique_key="only/1", unique_states=states, **times)
    patient = world.job("patient", "cancelled")
    world.transaction.cancelled.append(patient.id.hex)
    world.event(patient, "began")
    world.ended(patient, 1, "cancelled")
    requeued = world.done("latest", attempt=2)
    world.effect(requeued, 2, at=2)
    world.transaction.requeued.append((requeued.id.hex, True))
    gone, there = Reference(id="gone"), Reference(id="there", job_id=parts.id)
    world.rows += [gone, there]
    world.transaction.references += ["gone", "there"]
    _fill_with_limits(world)
    _fill_with_schedules(world)
    return world


def _fill_with_limits(world: World) -> None:
    for began in (0, 1, 2):
        world.event(_pair(world, began), "counted", word="2")
    lost = world.job("single", "cancelled", limit_key="single/1")
    world.transaction.cancelled.append(lost.id.hex)
    world.event(lost, "began", at=0)
    world.ended(lost, 1, "cancelled", at=1).started_at = BEGAN
    world.ran("single", 1, 2, limit_key="single/1")
    for at in (0, 0, 0, 0, 0, 0, 2):
        world.ran("paced", at, at + 1, limit_key="paced")
    for number in range(3):
        _ordered(world, number, 2 * number, 2 * number + 1)
    world.changed(AT_ONCE, 3, at=100)
    world.changed(AT_ONCE, 9, at=100, fate="rolled back")
    for began in (101, 101, 101, 103):
        world.ran("short", began, began + 2, queue=NARROW)
    world.changed("kind nothing", True, at=100)
    world.changed("kind nothing", False, at=200)
    for began in (99, 105, 201):
        world.event(world.job("nothing"), "began", at=began)


def _fill_with_schedules(world: World) -> None:
    for at in range(3):
        world.tick("all", at, made_at=9, carries=at)
    for at in (0, 4):
        world.tick("once", at)
    world.changed("schedule load", 2, at=0)
    world.changed("schedule load", 3, at=10)
    world.changed("schedule load", 5, at=11, fate="rolled back")
    world.changed("schedule load", 0, at=20)
    for at in (2, 4, 12, 18):
        world.tick("load", at)
    world.tick("load", 18 + 3, made_at=20.05)


def _pair(world: World, began: float) -> Job:
    return world.ran("pair", began, began + 2, limit_key="pair")


def _ordered(world: World, number: int, began: float, ended: float) -> Job:
    return world.ran("ordered", began, ended, limit_key="ordered/1", id=uuid.UUID(int=number))


def _lost_run_lasts(world: World) -> None:
    job = world.job("single", "cancelled", limit_key="single/1")
    world.transaction.cancelled.append(job.id.hex)
    world.event(job, "began", at=0.5)
    world.ended(job, 1, "crashed", at=7).started_at = BEGAN


def _too_fast(world: World) -> None:
    world.ran("paced", 1.5, 2, limit_key="paced")


def _queue_too_fast(world: World) -> None:
    for _ in range(31):
        world.ran("short", 300, 300, queue=NARROW)


def _one_more_in_the_queue(world: World) -> None:
    world.ran("short", 102, 103, queue=NARROW)


def _lowered_and_not_heeded(world: World) -> None:
    world.changed(AT_ONCE, 1, at=1100)
    for _ in range(2):
        world.ran("short", 1103, 1104, queue=NARROW)


def _paused(world: World, name: str, at: float, began: float, **values: object) -> None:
    world.changed(name, True, at=at)
    world.event(world.job("nothing", **values), "began", at=began)  # type: ignore[arg-type]


def _rolled_back_schedule(world: World) -> None:
    world.changed("schedule never", 1, at=0, fate="rolled back")
    world.tick("never", 5)


def _neighbour_killed(world: World) -> None:
    job = world.job("neighbour", "failed", attempt=3, failures=3)
    for attempt in (1, 2, 3):
        world.event(job, "began", attempt, pid=attempt)
        world.ended(job, attempt, "crashed", at=attempt)


def _repeated_once(world: World) -> None:
    job = world.done("once", attempt=2)
    world.ended(job, 1, "crashed", at=0)
    world.event(job, "began", 2)


def _repeated_without_a_trace(world: World) -> None:
    job = world.done("once", attempt=2)
    world.event(job, "began", 1)
    world.event(job, "began", 2)


def _cancelled_and_run(world: World) -> None:
    job = world.job("patient", "cancelled", attempt=2)
    world.transaction.cancelled.append(job.id.hex)
    world.ended(job, 1, "cancelled")
    world.event(job, "began", 2)


def _cancelled_with_an_effect(world: World) -> None:
    job = world.job("patient", "cancelled")
    world.transaction.cancelled.append(job.id.hex)
    world.ended(job, 1, "cancelled")
    world.effect(job)


def _part_of_a_lost_run(world: World) -> None:
    job = world.job("parts", "cancelled")
    world.transaction.cancelled.append(job.id.hex)
    world.ended(job, 1, "cancelled", at=1)
    world.effect(job, at=2, last=False)


def _parts_of_two_runs(world: World) -> None:
    job = world.job("parts", "cancelled", attempt=2)
    world.transaction.cancelled.append(job.id.hex)
    world.effect(job, 2, at=1, last=False)
    world.effect(job, 1, at=2, last=False)


def _overlapping(world: World) -> None:
    for at in (0, 1):
        started, finished = (BEGAN + timedelta(seconds=at + more) for more in (0, 2))
        times = {"started_at": started, "finished_at": finished}
        world.done("only", unique_key="only/2", unique_states=Unique().mask, **times)


def _twice_in_a_window(world: World) -> None:
    for _ in range(2):
        world.done("windowed", unique_key="windowed/1", finished_at=BEGAN)


def _effect_of_another_worker(world: World) -> None:
    effect = world.effect(world.done("write"))
    effect.worker_id = OTHER.hex


def _payload_of_a_rollback(world: World) -> None:
    world.effect(world.job("latest")).intent_id = "rolled back"


def _began_twice(world: World) -> None:
    job = world.done("write")
    world.event(job, "began")
    world.event(job, "began")


def _killed_too_many(world: World) -> None:
    job = world.job("poison", "failed", attempt=5, failures=4)
    for attempt in (1, 2, 3, 4, 5):
        world.ended(job, attempt, "crashed", at=attempt)
        world.event(job, "poisoned", attempt)


def _stand_in_missing(world: World) -> None:
    world.transaction.others.append(uuid.uuid4())


def _dangling(world: World) -> None:
    world.rows.append(Reference(id="dangling", job_id=uuid.uuid4()))


FAULTS: dict[str, Callable[[World], object]] = {
    "stuck": lambda world: world.job("nothing", "running"),
    "ended as failed": lambda world: world.job("nothing", "failed"),
    "has a worker": lambda world: world.job("nothing", worker_id=WORKER),
    "has 0 effects, wanted 1": lambda world: world.job("write"),
    "has 2 effects, wanted 1": lambda world: world.effect(world.done("write")),
    "has 1 effects, wanted 0": lambda world: world.done("doomed", state="failed"),
    "vanishing .* has 0 effects": lambda world: world.job("vanishing", row=False),
    "and still there": lambda world: world.done("brief"),
    "is not there": lambda world: world.job("write", row=False),
    "which did not commit, was there": lambda world: world.intents.clear(),
    "was committed, and its row is not there": lambda world: world.intents.clear(),
    "which did not commit$": _payload_of_a_rollback,
    "stands in, which is no job": _stand_in_missing,
    "reference .* is there or not": lambda world: world.transaction.references.append("lost"),
    "refers to .* which is gone": _dangling,
    "effects of snoozed runs": lambda world: world.done("sleepy"),
    "has 0 parts": lambda world: world.done("parts"),
    "was not its last": lambda world: world.effect(world.done("write"), last=False),
    "which is no job": lambda world: world.effect(Job(id=uuid.uuid4())),
    "ended 2 times": _effect_of_another_worker,
    "began 2 times": _began_twice,
    "and its row is at 1": lambda world: world.effect(world.job("write"), 2),
    "committed at .* attempt 2 at": _parts_of_two_runs,
    "and then committed a part": _part_of_a_lost_run,
    "was cancelled, and has an effect": _cancelled_with_an_effect,
    "was crashed, and has an effect": lambda world: world.ended(world.done("write"), 1, "crashed"),
    "was cancelled in attempt 1, and ran again": _cancelled_and_run,
    "is failed after 0 failures": lambda world: world.job("poison", "failed"),
    "once too often": _neighbour_killed,
    "has killed 5 workers": _killed_too_many,
    "crashed in attempt 1, and ran again": _repeated_once,
    "which had no end": _repeated_without_a_trace,
    "ran before .* had ended": _overlapping,
    "which is for one": _twice_in_a_window,
    "3 runs with key pair at once": lambda world: _pair(world, 1.5),
    "2 runs with key single/1 at once": _lost_run_lasts,
    "has seen 3 jobs running, and 2 may be": lambda world: world.event(
        _pair(world, 50), "counted", word="3"
    ),
    "4 runs of queue narrow at once": _one_more_in_the_queue,
    "2 runs of queue narrow at once": _lowered_and_not_heeded,
    "7 claims with key paced in": _too_fast,
    "31 claims with key /narrow in": _queue_too_fast,
    "ran before one that was enqueued earlier": lambda world: _ordered(world, 7, 4.5, 6),
    "the kind nothing was paused": lambda world: _paused(world, "kind nothing", 300, 321),
    "the queue aside was paused": lambda world: _paused(
        world, "queue aside", 1300, 1303, queue=ASIDE
    ),
    "schedule all has 2 jobs": lambda world: world.tick("all", 1),
    "schedule all carries": lambda world: world.tick("all", 3, carries=2),
    "schedule all has jobs of ticks .* and none between": lambda world: world.tick("all", 4),
    "schedule once is of .*, no tick": lambda world: world.tick("once", 5),
    "schedule load is of .*, no tick: it was every .3. seconds": lambda world: world.tick(
        "load", 14
    ),
    "schedule load is of .*, no tick: it was every .0. seconds": lambda world: world.tick(
        "load", 24
    ),
    "schedule never is of .*, no tick": _rolled_back_schedule,
    "its slot is only/3": lambda world: world.done(
        "only", unique_key="only/3", unique_slot="only/3", unique_states=Unique().mask
    ),
}


def test_nothing_is_found_where_all_is_well(world: World) -> None:
    assert world.violations() == []


@pytest.mark.parametrize("words", FAULTS)
def test_a_fault_is_found(words: str, world: World) -> None:
    FAULTS[words](world)
    found = world.violations()
    assert any(re.search(words, each) for each in found), found


def test_a_worker_that_ended_by_itself_is_found(world: World) -> None:
    popen = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    popen.wait()
    books = Books(world.rows, world.intents, world.entries, [world.transaction])
    (found,) = audit.violations(books, [Process(popen, Path("its.log"))])
    assert "a worker ended by itself, status 3" in found
