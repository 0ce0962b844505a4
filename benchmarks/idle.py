"""What does a worker cost that has nothing to do?

Statements are those that pg_stat_statements counts, when the server has it loaded (shared_preload_libraries);
transactions are those of pg_stat_database, which every server has.
"""

import time
from collections.abc import Iterator

from sqlalchemy import URL, NullPool, create_engine, text

from benchmarks.common import (
    Database,
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


class Traffic:
    """How much a database is sent in a minute, by what is counted."""

    def __init__(self, server: URL, database: Database) -> None:
        # From another database, so that asking is not counted.
        self._outside = create_engine(server, poolclass=NullPool)
        self._named = {"database": database.url.database}
        self._queries = {"transactions": TRANSACTIONS}
        with self._outside.begin() as connection:
            if "pg_stat_statements" in str(
                connection.scalar(text("SHOW shared_preload_libraries"))
            ):
                connection.execute(text("CREATE EXTENSION IF NOT EXISTS pg_stat_statements"))
                self._queries["statements"] = STATEMENTS
        self.rates: dict[str, list[float]] = {name: [] for name in self._queries}

    def measure(self, seconds: float) -> None:
        """Add the rates of so many seconds from now."""
        before = self._count()
        time.sleep(seconds)
        after = self._count()
        for name, rates in self.rates.items():
            rates.append((after[name] - before[name]) * 60 / seconds)

    def tell(self, table: Results, whose: str = "") -> None:
        """Add a line for each rate."""
        for name, rates in self.rates.items():
            table.value(f"{name} a minute{whose}", rates, "", most="under 30")
        if "statements" not in self.rates:
            table.note(
                f"statements a minute{whose}", "not counted: pg_stat_statements is not loaded"
            )

    def _count(self) -> dict[str, int]:
        with self._outside.connect() as connection:
            return {
                name: int(connection.scalar(text(query), self._named) or 0)
                for name, query in self._queries.items()
            }


def answer(options: Options) -> Iterator[Results]:
    with postgresql(options) as server, database(server) as ours:
        seconds = options.size(60, 3)
        traffic = Traffic(server, ours)
        memory = []
        with worker(ours) as process:
            ours.wait_for_workers(1)
            ours.engine.dispose()
            time.sleep(options.size(int(SETTLED), 1))
            for _ in range(options.rounds):
                traffic.measure(seconds)
                memory.append(pss(process.pid))
        table = Results(
            "idle: a worker alone, with nothing to do",
            f"Each round is {seconds} s long.",
            machine(options, ours.engine, "psycopg"),
        )
    traffic.tell(table)
    table.value("memory (PSS)", memory, "MiB", most="under 60")
    yield table


if __name__ == "__main__":
    main(answer, __doc__)
