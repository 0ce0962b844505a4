"""What do limits cost the jobs that have them, where they do not bind, and those that have none?

Blocked jobs of one key lie in the table while others are drained, against a table without them. And jobs with a limit
that is never reached are drained, of one key and of many, against the same without a limit.
"""

from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial

from sqlalchemy import URL, delete, update
from sqlalchemy.orm import Session

from benchmarks.app import MOST_LIMITED, Insert, Limited, LimitedInsert, Noop, RatedInsert
from benchmarks.common import (
    Database,
    Options,
    Results,
    alternate,
    database,
    drain,
    machine,
    main,
    postgresql,
    worker,
)
from sqlalchemy_jobs import Job, JobState, enqueue
from sqlalchemy_jobs.worker import leases

SLOTS = 10
MANY_SLOTS = 100


def fill_blocked(database: Database, count: int) -> None:
    """Add so many jobs of a key whose limit is reached, by jobs that a living worker runs."""
    database.multiply(enqueue(Limited("blocked", 0)), count)
    with Session(database.engine) as session, session.begin():
        running = session.query(Job.id).limit(MOST_LIMITED)
        other = leases.register(session, timedelta(days=1))
        session.execute(
            update(Job)
            .where(Job.id.in_(running.scalar_subquery()))
            .values(state=JobState.RUNNING, worker_id=other)
        )


def others(database: Database, count: int) -> float:
    """Drain so many jobs without a limit; return the rate."""
    with database.engine.begin() as connection:
        connection.execute(delete(Job).where(Job.state == JobState.SUCCEEDED))
    database.fill([Noop(n) for n in range(count)])
    database.settle()
    return drain(worker(database, *slots(SLOTS), count=count), count, lambda: False).rate


def slots(count: int) -> tuple[str, str]:
    return "--concurrency", str(count)


def limited(
    database: Database, count: int, at_once: int, payload: Callable[[int], object]
) -> float:
    database.empty()
    database.fill(map(payload, range(count)))
    database.settle()
    return drain(
        worker(database, "--drain", *slots(at_once), count=count), count, database.left
    ).rate


def blocked(options: Options, server: URL) -> Results:
    count, behind = options.size(20_000, 300), options.size(100_000, 2_000)
    with database(server) as without, database(server) as with_them:
        fill_blocked(with_them, behind)
        sides = {"with": with_them, "without": without}
        measured = alternate(
            options.rounds, {name: partial(others, each, count) for name, each in sides.items()}
        )
        table = Results(
            f"limits: {behind:,} blocked jobs of one key",
            f"Drain rate of {count:,} no-op jobs without a limit by one worker, against a table without the others.",
            machine(options, without.engine, "psycopg"),
        )
    table.compare("beside blocked jobs", measured["with"], measured["without"], "/s", wanted=0.9)
    return table


def unbound(
    options: Options,
    server: URL,
    at_once: int,
    limit: str = "a limit",
    what: str = "no-op jobs",
    free: Callable[[int], object] = Noop,
    bound: Callable[[str, int], object] = Limited,
    most: int = 10_000,
) -> Results:
    count = options.size(most, 300)
    payloads: dict[str, Callable[[int], object]] = {
        f"{keys:,} {'key' if keys == 1 else 'keys'}": lambda n, keys=keys: bound(str(n % keys), n)  # type: ignore[misc]
        for keys in (1, 200, 10_000)
    }
    with database(server) as ours:
        measured = alternate(
            options.rounds,
            {
                name: partial(limited, ours, count, at_once, payload)
                for name, payload in {"no limit": free, **payloads}.items()
            },
        )
        table = Results(
            f"limits: drain {count:,} {what} with {limit} that does not bind, {at_once} at once",
            "By one worker, against the same jobs without a limit.",
            machine(options, ours.engine, "psycopg"),
        )
    for name in payloads:
        table.compare(name, measured[name], measured["no limit"], "/s", wanted=0.5)
    return table


def answer(options: Options) -> Iterator[Results]:
    with postgresql(options) as server:
        yield blocked(options, server)
        yield unbound(options, server, SLOTS)
        yield unbound(options, server, MANY_SLOTS)
        work = "jobs that insert an ORM row"
        yield unbound(options, server, SLOTS, "a limit", work, Insert, LimitedInsert)
        yield unbound(options, server, SLOTS, "a rate", work, Insert, RatedInsert, 3_000)


if __name__ == "__main__":
    main(answer, __doc__)
