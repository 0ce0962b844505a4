"""What does a worker cost that has nothing to do?

Statements are those that pg_stat_statements counts, when the server has it loaded (shared_preload_libraries);
transactions are those of pg_stat_database, which every server has.
"""

import time
from collections.abc import Iterator

from sqlalchemy import NullPool, create_engine, text

from benchmarks.common import (
    Options,
    Results,
    database,
    machine,
    main,
    postgresql,
    pss,
    worker,
)

STATEMENTS = """
SELECT sum(calls) FROM pg_stat_statements JOIN pg_database ON dbid = oid
WHERE datname = :database AND query NOT IN ('BEGIN', 'COMMIT', 'ROLLBACK')
"""
TRANSACTIONS = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = :database"
SETTLED = 20.0
"""Seconds after its start from which a worker is taken for idle."""


def answer(options: Options) -> Iterator[Results]:
    with postgresql(options) as server, database(server) as ours:
        # From another database, so that asking is not counted.
        outside = create_engine(server, poolclass=NullPool)
        with outside.connect() as connection:
            preloaded = "pg_stat_statements" in str(
                connection.scalar(text("SHOW shared_preload_libraries"))
            )
        queries = {"transactions": TRANSACTIONS}
        if preloaded:
            with outside.begin() as connection:
                connection.execute(text("CREATE EXTENSION IF NOT EXISTS pg_stat_statements"))
            queries["statements"] = STATEMENTS

        def count() -> dict[str, int]:
            with outside.connect() as connection:
                named = {"database": ours.url.database}
                return {
                    name: int(connection.scalar(text(query), named) or 0)
                    for name, query in queries.items()
                }

        seconds = options.size(60, 3)
        rates: dict[str, list[float]] = {name: [] for name in queries}
        memory = []
        with worker(ours) as process:
            ours.wait_for_workers(1)
            ours.engine.dispose()
            time.sleep(options.size(int(SETTLED), 1))
            for _ in range(options.rounds):
                before = count()
                time.sleep(seconds)
                after = count()
                for name in queries:
                    rates[name].append((after[name] - before[name]) * 60 / seconds)
                memory.append(pss(process.pid))
        table = Results(
            "idle: a worker alone, with nothing to do",
            f"Each round is {seconds} s long.",
            machine(options, ours.engine, "psycopg"),
        )
    for name, values in rates.items():
        table.value(f"{name} a minute", values, "", most="under 30")
    if not preloaded:
        table.note("statements a minute", "not counted: pg_stat_statements is not loaded")
    table.value("memory (PSS)", memory, "MiB", most="under 60")
    yield table


if __name__ == "__main__":
    main(answer, __doc__)
