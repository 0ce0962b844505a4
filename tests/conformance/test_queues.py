"""Queues: pools of them in one worker, and what holds for them at run time."""

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from sqlalchemy_jobs import Job, JobApp, Worker, current_run, enqueue_many, job, transitions
from sqlalchemy_jobs.claims import Claim, Wanted
from sqlalchemy_jobs.worker import claiming
from sqlalchemy_jobs.worker.maintenance import find_unserved
from tests.conformance.test_transitions import Bench
from tests.databases import Database


@job("errand")
@dataclass(frozen=True)
class Errand:
    n: int = 0


class App(JobApp[Any, Any]):
    """Notes the queue of each job that runs."""

    def __init__(self, database: Database) -> None:
        super().__init__(database.sessions())
        self.ran: list[str] = []
        self.at_once: dict[str, int] = {}
        self._running: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.handler(Errand)(self._run)

    def _run(self, session: Session, payload: Errand) -> None:
        queue = current_run().queue
        with self._lock:
            self.ran.append(queue)
            self._running[queue] += 1
            for each in (queue, "*"):
                running = self._running.total() if each == "*" else self._running[each]
                self.at_once[each] = max(self.at_once.get(each, 0), running)
        session.scalar(select(Job.id).limit(1))
        with self._lock:
            self._running[queue] -= 1


def add(database: Database, count: int, *queues: str, **options: Any) -> None:
    with database.sessions().begin() as session:
        for queue in queues:
            enqueue_many(session, [Errand(n) for n in range(count)], queue=queue, **options)


@pytest.fixture
def bench(database: Database) -> Iterator[Bench]:
    bench = Bench(database)
    yield bench
    bench.control.close()


# --- pools ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [3, 5, 20])
def test_queues_that_share_a_room_get_no_more_than_it(
    database: Database, bench: Bench, total: int
) -> None:
    add(database, 4, "a", "b", "c")
    worker = bench.worker()

    def claim(session: Session) -> list[Claim]:
        lanes = [(queue, 0) for queue in "abc"]
        room = {"b": 3, "c": 9, "a": 3}
        pools = {"b": "a,b", "a": "a,b"}
        return transitions.claim(session, Wanted(worker, ["errand"], lanes, room, total, pools))

    assert (
        Counter(claimed.queue for claimed in bench.do(claim))
        == {
            3: {"b": 3},
            5: {"b": 3, "c": 2},
            20: {"b": 3, "c": 4},
        }[total]
    )


def test_a_worker_serves_what_its_pools_name_and_no_more_at_once(database: Database) -> None:
    add(database, 12, "mail.eu", "mail.us", "default", "bulk", "mail")
    app = App(database)
    assert Worker(app, queues={"mail.*": 2, "*,!bulk": 3, "slow": 1}, drain=True).run()
    assert Counter(app.ran) == {"mail.eu": 12, "mail.us": 12, "default": 12, "mail": 12}
    assert max(app.at_once["mail.eu"], app.at_once["mail.us"]) <= 2
    assert max(app.at_once["default"], app.at_once["mail"]) <= 3


def test_of_a_strict_pool_the_lower_queue_waits_until_the_better_one_is_empty(
    database: Database,
) -> None:
    add(database, 30, "default", "critical", "bulk")
    app = App(database)
    assert Worker(app, queues={"critical>default>bulk": 1}, drain=True).run()
    assert app.ran == ["critical"] * 30 + ["default"] * 30 + ["bulk"] * 30


def test_with_a_backlog_in_both_the_share_of_the_runs_is_that_of_the_weights(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the claim: many that are claimed ahead at once count as one."""
    monkeypatch.setattr(claiming.Speed, "ahead", lambda self: {})
    add(database, 160, "often", "seldom")
    app = App(database)
    assert Worker(app, queues={"often@4,seldom": 1}, drain=True).run()
    assert len(app.ran) == 320
    share = app.ran[:150].count("often") / 150
    assert 0.65 < share < 0.93


def test_a_queue_that_a_worker_serves_by_a_pattern_is_not_reported(
    database: Database, bench: Bench
) -> None:
    add(database, 1, "mail.eu", "bulk", "default")
    app = App(database)
    with app.worker(queues=["mail.*,!mail.us", "none"]) as worker:
        while worker._parts is None or worker._parts._lease.worker_id is None:
            threading.Event().wait(0.01)
        assert bench.do(find_unserved) == {("bulk", None), ("default", None)}
