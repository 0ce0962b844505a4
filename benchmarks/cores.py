"""Do two worker processes on two cores do twice the CPU work of one?"""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

from benchmarks.app import Burn
from benchmarks.common import (
    Database,
    Options,
    Results,
    alternate,
    database,
    machine,
    main,
    postgresql,
    wait_until,
    worker,
)


def burn(database: Database, count: int, processes: int) -> float:
    """Return the rate, from the commit that adds the jobs until the last is written down."""
    database.empty()
    with ExitStack() as stack:
        for _ in range(processes):
            stack.enter_context(worker(database, count=count))
        database.wait_for_workers(processes)
        database.fill([Burn(n) for n in range(count)])
        began = time.perf_counter()
        wait_until(lambda: not database.left(), 0.02)
        return count / (time.perf_counter() - began)


def answer(options: Options) -> Iterator[Results]:
    count = options.size(4_000, 100)
    with postgresql(options) as server, database(server) as ours:
        measured = alternate(
            options.rounds,
            {f"{n}": partial(burn, ours, count, n) for n in (1, 2)},
        )
        table = Results(
            f"cores: {count:,} jobs of some ms of CPU in Python, two processes against one",
            "From the commit that adds the jobs until the last one is written down.",
            machine(options, ours.engine, "psycopg"),
        )
    table.compare("2 processes", measured["2"], measured["1"], "/s", wanted=1.8)
    yield table


if __name__ == "__main__":
    main(answer, __doc__)
