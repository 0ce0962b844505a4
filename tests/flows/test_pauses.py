"""A pause is in force in every worker process two seconds after its commit."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from sqlalchemy_jobs import (
    Job,
    enqueue,
    enqueue_many,
    pause_kind,
    pause_queue,
    resume_kind,
    resume_queue,
)
from tests.databases import Database
from tests.processes import WorkerProcess
from tests.waiting import until

IN_FORCE = 2.0
"""Seconds after the commit, by the promise."""
WATCHED = 1.5
"""Seconds more for which jobs are added, and none may begin."""
KINDS = ("plain", "limited", "batched", "awaited")
BUSY, CALM = "busy", "calm"


@pytest.fixture
def payloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The module that the worker processes run; here only for its payload classes."""
    monkeypatch.setenv("SAJOBS_TEST_URL", "sqlite://")
    monkeypatch.setenv("SAJOBS_TEST_FOLDER", str(tmp_path))
    from tests.apps import pausing

    return pausing


class Began(NamedTuple):
    """A run, as its handler has noted it."""

    process: int
    kind: str
    at: float


class Diary:
    """What the handlers note."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "began"

    def since(self, at: float) -> list[Began]:
        """Those that began after an instant."""
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        found = (line.split() for line in lines)
        began = [Began(int(process), kind, float(when)) for process, kind, when in found]
        return [each for each in began if each.at > at]


class Load(threading.Thread):
    """Adds more jobs to one queue than its worker can do, and to the other one now and then."""

    def __init__(self, database: Database, payloads: Any) -> None:
        super().__init__(daemon=True)
        self._sessions = database.sessions()
        self._payloads = payloads
        self._ended = threading.Event()
        self.lets_sleep = threading.Event()
        """Whether nothing is added to the other queue for now."""
        self.added_at = 0.0
        """When the latest were committed."""

    def run(self) -> None:
        every = self._payloads
        many = [
            *[every.Plain()] * 60,
            *[every.Limited(n % 5) for n in range(10)],
            *[every.Batched()] * 40,
            *[every.Awaited()] * 10,
        ]
        while not self._ended.is_set():
            with self._sessions.begin() as session:
                enqueue_many(session, many, queue=BUSY)
                if not self.lets_sleep.is_set():
                    session.add(enqueue(every.Plain(), queue=CALM))
            self.added_at = time.time()
            self._ended.wait(0.3)

    def __enter__(self) -> "Load":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join(60)


@contextmanager
def two_workers(database: Database, folder: Path) -> Iterator[list[int]]:
    """A worker process for each queue; whatever happens, none outlives the block."""
    with ExitStack() as stack:
        processes = []
        for queue in (BUSY, CALM):
            options = ("--queue", queue, "--concurrency", "2")
            each = WorkerProcess(database.url, folder, *options, app="tests.apps.pausing:jobs")
            stack.callback(each.wait)
            stack.callback(each.process.kill)
            processes.append(each)
        for each in processes:
            each.wait_for(" serves ")
        yield [each.process.pid for each in processes]


WAYS: dict[str, tuple[tuple[str, ...], Callable[..., bool], Callable[..., bool]]] = {
    "queues": ((BUSY, CALM), pause_queue, resume_queue),
    "kinds": (KINDS, pause_kind, resume_kind),
}


@pytest.mark.parametrize("way", WAYS)
def test_two_seconds_after_the_commit_of_a_pause_nothing_of_it_begins_in_any_process(
    database: Database, tmp_path: Path, payloads: Any, way: str
) -> None:
    """In a busy one, and in one that is woken by the first job after it; of jobs with limits, in batches, async, and such as were claimed ahead."""
    names, pause, resume = WAYS[way]
    sessions = database.sessions()
    diary = Diary(tmp_path)

    def set_all(change: Callable[[Session, str], bool]) -> None:
        with sessions.begin() as session:
            assert all(change(session, name) for name in names)

    with two_workers(database, tmp_path) as processes, Load(database, payloads) as load:

        def all_at_work(since: float) -> bool:
            began = diary.since(since)
            by = {each.process for each in began}
            return by == {*processes} and {each.kind for each in began} == {*KINDS}

        until(lambda: all_at_work(0.0))
        load.lets_sleep.set()
        set_all(pause)
        paused_at = time.time()
        until(lambda: load.added_at > paused_at + IN_FORCE)
        load.lets_sleep.clear()
        until(lambda: load.added_at > paused_at + IN_FORCE + WATCHED)
        resumed_at = time.time()
        assert [each for each in diary.since(paused_at + IN_FORCE) if each.at < resumed_at] == []
        with sessions() as session:
            ready = select(Job.queue, Job.kind).where(Job.state == "ready").distinct()
            waiting = session.execute(ready).all()
        assert {*waiting} == {(CALM, "plain"), *((BUSY, kind) for kind in KINDS)}
        set_all(resume)
        until(lambda: all_at_work(resumed_at))
