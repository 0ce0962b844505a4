"""Does a worker's memory grow with the jobs that it has done?"""

from collections.abc import Iterator

from benchmarks.app import NEVER, Noop
from benchmarks.common import (
    Database,
    Options,
    Results,
    alternate,
    database,
    machine,
    main,
    postgresql,
    pss,
    wait_until,
    worker,
)


def measure(database: Database, few: int, many: int) -> tuple[float, float]:
    """Return the MiB of one worker after few and after many jobs."""
    database.empty()
    with worker(database, count=NEVER) as process:
        database.wait_for_workers(1)
        measured = []
        done = 0
        for wanted in (few, many):
            for first in range(done, wanted, 10_000):
                database.fill([Noop(n) for n in range(first, min(first + 10_000, wanted))])
            wait_until(lambda: not database.left(), 0.1)
            measured.append(pss(process.pid))
            done = wanted
    return measured[0], measured[1]


def answer(options: Options) -> Iterator[Results]:
    few, many = options.size(10_000, 200), options.size(200_000, 1_000)
    with postgresql(options) as server, database(server) as ours:
        measured = alternate(options.rounds, {"worker": lambda: measure(ours, few, many)})["worker"]
        table = Results(
            f"memory: a worker after {many:,} jobs, against the same after {few:,}",
            "PSS. The ratio is that of the memory after few to that after many; at least 0.91 is at most 1.1 times.",
            machine(options, ours.engine, "psycopg"),
        )
    after_few, after_many = zip(*measured, strict=True)
    table.compare("worker", after_many, after_few, "MiB", lower=True, wanted=0.91)
    yield table


if __name__ == "__main__":
    main(answer, __doc__)
