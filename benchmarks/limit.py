"""How near does a worker come to the bare loops that claim and complete by psycopg alone?

The loops do what the worker's statements do to our table, and nothing else: no handler, no lease, no reaction to
anything that goes wrong. One connection: claim 100, complete them, again. Two connections: one claims 500 at
a time, the other completes what was claimed before.
"""

import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import psycopg

from benchmarks.app import Noop
from benchmarks.common import (
    Database,
    Drained,
    Options,
    Results,
    alternate,
    database,
    drain_ours,
    machine,
    main,
    postgresql,
)

CLAIM = """
UPDATE sajobs_job
SET state = 'running', attempt = attempt + 1, worker_id = %(me)s, started_at = now()
WHERE id = ANY (ARRAY(
  SELECT id
  FROM (SELECT set_config('synchronous_commit', 'off', true)) unflushed, sajobs_job
  WHERE state = 'ready' AND limit_key IS NULL AND queue = 'default' AND priority = 0 AND run_at <= now()
  ORDER BY run_at, id LIMIT %(most)s FOR NO KEY UPDATE OF sajobs_job SKIP LOCKED))
RETURNING id, kind, payload, attempt, failures, max_attempts, queue, headers, priority, run_at
"""
COMPLETE = """
UPDATE sajobs_job
SET state = 'succeeded', worker_id = NULL, finished_at = now()
WHERE id = ANY (ARRAY(
  SELECT id FROM sajobs_job
  WHERE id = ANY (%(ids)s) AND attempt = 1 AND worker_id = %(me)s
  ORDER BY id FOR NO KEY UPDATE SKIP LOCKED))
  AND attempt = 1 AND worker_id = %(me)s
RETURNING id
"""
ME = uuid.uuid4()


def claim(connection: psycopg.Connection[Any], most: int) -> list[uuid.UUID]:
    claimed = connection.execute(CLAIM, {"me": ME, "most": most}).fetchall()
    return [row[0] for row in claimed]


def complete(connection: psycopg.Connection[Any], ids: list[uuid.UUID]) -> None:
    done = connection.execute(COMPLETE, {"me": ME, "ids": ids}).fetchall()
    assert len(done) == len(ids)


def one_connection(dsn: str, most: int = 100) -> float:
    """Return when the first claim came back."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        ids = claim(connection, most)
        began = time.perf_counter()
        while ids:
            complete(connection, ids)
            ids = claim(connection, most)
    return began


def two_connections(dsn: str, most: int = 500) -> float:
    """Return when the first claim came back."""
    claimed: queue.Queue[list[uuid.UUID]] = queue.Queue(4)

    def complete_all() -> None:
        with psycopg.connect(dsn, autocommit=True) as connection:
            while ids := claimed.get():
                complete(connection, ids)

    completer = threading.Thread(target=complete_all)
    completer.start()
    with psycopg.connect(dsn, autocommit=True) as connection:
        ids = claim(connection, most)
        began = time.perf_counter()
        while ids:
            claimed.put(ids)
            ids = claim(connection, most)
    claimed.put([])
    completer.join()
    return began


def bare(database: Database, count: int, loop: Callable[[str], float]) -> Drained:
    database.empty()
    database.fill([Noop(n) for n in range(count)])
    database.settle()
    cpu = time.process_time()
    began = loop(database.dsn)
    seconds = time.perf_counter() - began
    assert not database.left()
    return Drained(count / seconds, (time.process_time() - cpu) / count * 1e6)


def answer(options: Options) -> Iterator[Results]:
    count = options.size(20_000, 500)
    with postgresql(options) as server, database(server) as ours:
        measured = alternate(
            options.rounds,
            {
                "worker": partial(drain_ours, ours, count),
                "one connection": partial(bare, ours, count, one_connection),
                "two connections": partial(bare, ours, count, two_connections),
                "worker, async def": partial(drain_ours, ours, count, Noop, "async"),
            },
        )
        table = Results(
            f"limit: drain {count:,} no-op jobs, one worker process",
            "Against loops that claim and complete by psycopg alone.",
            machine(options, ours.engine, "psycopg"),
        )
    rate, sync = rates(measured["worker"]), measured["worker"]
    table.compare(
        "claim 100 + complete, one connection",
        rate,
        rates(measured["one connection"]),
        "/s",
        wanted=1,
    )
    table.compare(
        "claimer and completer on two, 500",
        rate,
        rates(measured["two connections"]),
        "/s",
        wanted=0.6,
    )
    asynchronous = measured["worker, async def"]
    table.compare(
        "`async def` handlers, the same two",
        rates(asynchronous),
        rates(measured["two connections"]),
        "/s",
    )
    for what, runs in (("`def`", sync), ("`async def`", asynchronous)):
        table.value(
            f"CPU of the worker per job, {what}", [run.cpu for run in runs], "us", most="under 15"
        )
    table.value(
        "CPU of the loop with two connections per job",
        [run.cpu for run in measured["two connections"]],
        "us",
    )
    yield table


def rates(runs: Iterable[Drained]) -> list[float]:
    return [run.rate for run in runs]


if __name__ == "__main__":
    main(answer, __doc__)
