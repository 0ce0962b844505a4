"""How long is it from a tick to its job being ready, and to the start of the handler, when the worker is idle?

A row says when its job was made, by the clock of the worker, and when it was claimed, by the server's: between the two
it became ready. Both run on this machine. And how much does a worker send whose only schedule is hourly?
"""

import time
from collections import defaultdict
from collections.abc import Iterator

from sqlalchemy import URL, select
from sqlalchemy.orm import Session

from benchmarks.app import Tick
from benchmarks.common import (
    Database,
    Options,
    Results,
    database,
    machine,
    main,
    postgresql,
    worker,
)
from benchmarks.idle import SETTLED, Traffic
from benchmarks.latency import percentile
from sqlalchemy_jobs import Job, Schedule

CRONS = ("@every 1s", "* * * * * */2", "* * * * * 1-59/3")
"""Of the schedules of the measured worker: one to three jobs a second."""
MADE, CLAIMED, BEGAN = "made", "claimed, so ready before", "start of the handler"
WARM_UP = 5.0
"""Seconds after its first run from which a worker is measured."""


def answer(options: Options) -> Iterator[Results]:
    seconds = options.size(30, 2)
    late: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    with postgresql(options) as server:
        for _ in range(options.rounds):
            for colour in ("sync", "async"):
                for what, found in ticks(server, colour, seconds).items():
                    late[what, colour] += found
        with database(server) as hourly:
            traffic = Traffic(server, hourly)
            add(hourly, "@hourly")
            with worker(hourly):
                hourly.wait_for_workers(1)
                hourly.engine.dispose()
                time.sleep(options.size(int(SETTLED), 1))
                for _ in range(options.rounds):
                    traffic.measure(options.size(60, 3))
            table = Results(
                f"ticks: {len(CRONS)} schedules of an idle worker, {options.rounds} x {seconds} s",
                "In ms after the tick.",
                machine(options, hourly.engine, "psycopg"),
            )
    for (what, colour), found in late.items():
        for name, value in (
            ("p50", percentile(found, 50)),
            ("p99", percentile(found, 99)),
            ("max", max(found)),
        ):
            wanted = "under 100" if what == CLAIMED else ""
            table.value(f"{colour}, {what}: {name}", [value], "ms", most=wanted)
    traffic.tell(table, ", the only schedule is hourly")
    yield table


def add(database: Database, *crons: str) -> None:
    with Session(database.engine) as session, session.begin():
        session.add_all(Schedule(cron, cron, Tick()) for cron in crons)


def ticks(server: URL, colour: str, seconds: float) -> dict[str, list[float]]:
    """Watch a worker for so long; return how many ms after its tick each job was made, was claimed, and began."""
    with database(server) as ours:
        add(ours, *CRONS)
        with worker(ours, colour=colour) as process:
            since = process.wait_for("tick")["tick"] + WARM_UP
            began = []
            while (run := process.wait_for("tick"))["tick"] <= since + seconds:
                if run["tick"] > since:
                    began.append(run["at"] - run["tick"])
        with Session(ours.engine) as session:
            made, claimed = [], []
            for job in session.scalars(select(Job).where(Job.started_at.is_not(None))):
                assert job.scheduled_at is not None
                assert job.started_at is not None
                if since < job.scheduled_at.timestamp() <= since + seconds:
                    made.append((job.created_at - job.scheduled_at).total_seconds())
                    claimed.append((job.started_at - job.scheduled_at).total_seconds())
    found = {MADE: made, CLAIMED: claimed, BEGAN: began}
    return {what: [1000 * each for each in late] for what, late in found.items()}


if __name__ == "__main__":
    main(answer, __doc__)
