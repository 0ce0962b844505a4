"""How fast is `enqueue_many`, against a Core bulk INSERT of the same rows into a table like ours?"""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from sqlalchemy import delete, insert, inspect, select
from sqlalchemy.orm import Session

from benchmarks.adding import TABLE, Plain, PlainBase
from benchmarks.app import Noop
from benchmarks.common import (
    Database,
    Options,
    Results,
    alternate,
    database,
    machine,
    main,
    postgresql,
)
from sqlalchemy_jobs import Job, enqueue_many


def jobs(database: Database, count: int) -> float:
    database.empty()
    database.settle()
    payloads = [Noop(n) for n in range(count)]
    began = time.perf_counter()
    with Session(database.engine) as session, session.begin():
        enqueue_many(session, payloads)
    return count / (time.perf_counter() - began)


def rows(database: Database, values: list[dict[str, Any]]) -> float:
    with database.engine.begin() as connection:
        connection.execute(delete(Plain))
    database.settle()
    began = time.perf_counter()
    with database.engine.begin() as connection:
        connection.execute(insert(TABLE), values)
    return len(values) / (time.perf_counter() - began)


def answer(options: Options) -> Iterator[Results]:
    count = options.size(50_000, 1_000)
    with postgresql(options) as server, database(server) as ours:
        PlainBase.metadata.create_all(ours.engine)
        jobs(ours, count)
        with ours.engine.connect() as connection:
            values = [
                dict(row) for row in connection.execute(select(inspect(Job).local_table)).mappings()
            ]
        measured = alternate(
            options.rounds,
            {"enqueue_many": partial(jobs, ours, count), "Core": partial(rows, ours, values)},
        )
        table = Results(
            f"bulk: enqueue {count:,}, against a Core bulk INSERT of the same rows",
            "Ours makes the rows from payloads; those of the INSERT were made before.",
            machine(options, ours.engine, "psycopg"),
        )
    table.compare("enqueue_many", measured["enqueue_many"], measured["Core"], "/s", wanted=1)
    yield table


if __name__ == "__main__":
    main(answer, __doc__)
