"""How near does a worker come to a bare loop of the driver on SQLite and on MariaDB?

The loop claims 100 and completes them, on one connection and in two transactions. On SQLite it waits for the disk as
little as the worker's own transactions do.
"""

import argparse
import os
import sys
import time
import uuid
from collections.abc import Iterator
from functools import partial
from typing import Any

from sqlalchemy import Connection, make_url, text

from benchmarks.app import Noop
from benchmarks.common import (
    Database,
    Options,
    Results,
    alternate,
    answers,
    database,
    drain_ours,
    machine,
    main,
)

DRIVERS = {"sqlite": (), "mysql": ("pymysql",)}
BATCH = 100
ME = uuid.uuid4().hex

NOW = {"sqlite": "strftime('%Y-%m-%d %H:%M:%f000', 'now')", "mysql": "UTC_TIMESTAMP(6)"}
FIND = """
SELECT id, kind, payload, attempt, failures, max_attempts, queue, headers, priority, run_at FROM sajobs_job
WHERE state = 'ready' AND limit_key IS NULL AND queue = 'default' AND priority = 0 AND run_at <= {now}
ORDER BY run_at, id LIMIT {most} {lock}
"""
CLAIM = "UPDATE sajobs_job SET state = 'running', attempt = attempt + 1, worker_id = {me}, started_at = {now} WHERE id IN ({ids})"
COMPLETE = (
    "UPDATE sajobs_job SET state = 'succeeded', worker_id = NULL, finished_at = {now} "
    "WHERE id IN ({ids}) AND attempt = 1 AND worker_id = {me}"
)


def work(database: Database, count: int) -> float:
    return drain_ours(database, count).rate


def bare(database: Database, count: int) -> float:
    database.empty()
    database.fill([Noop(n) for n in range(count)])
    with database.engine.connect() as connection:
        dialect = connection.dialect.name
        if dialect == "sqlite":
            connection.connection.cursor().execute("PRAGMA synchronous = NORMAL")
        else:
            connection.execute(text("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED"))
        connection.rollback()
        began = time.perf_counter()
        while ids := _claim(connection):
            _update(connection, COMPLETE, ids)
        seconds = time.perf_counter() - began
        connection.invalidate()  # with its settings
    assert not database.left()
    return count / seconds


def _claim(connection: Connection) -> list[Any]:
    dialect = connection.dialect.name
    lock = "FOR UPDATE SKIP LOCKED" if dialect == "mysql" else ""
    find = FIND.format(now=NOW[dialect], most=BATCH, lock=lock)
    ids = [row[0] for row in connection.exec_driver_sql(find)]
    if ids:
        _update(connection, CLAIM, ids)
    else:
        connection.rollback()
    return ids


def _update(connection: Connection, statement: str, ids: list[Any]) -> None:
    now = NOW[connection.dialect.name]
    listed = ", ".join(f"'{each}'" for each in ids)
    changed = connection.exec_driver_sql(statement.format(me=f"'{ME}'", now=now, ids=listed))
    assert changed.rowcount == len(ids)
    connection.commit()


def answer(options: Options) -> Iterator[Results]:
    urls = {
        "sqlite": "sqlite+pysqlite://",
        "mysql": os.environ.get("SAJOBS_BENCH_MYSQL_URL", "mysql+pymysql://root@127.0.0.1:3306/"),
    }
    for name, url in urls.items():
        server = make_url(url)
        if options.extra.only not in (None, name):
            continue
        if name == "mysql" and not answers(server):
            print(f"{name}: no server answers; set SAJOBS_BENCH_MYSQL_URL", file=sys.stderr)
            continue
        count = options.size(20_000 if name == "sqlite" else 10_000, 300)
        with database(server) as ours:
            measured = alternate(
                options.rounds,
                {
                    "worker": partial(work, ours, count),
                    "loop": partial(bare, ours, count),
                },
            )
            table = Results(
                f"servers: drain {count:,} no-op jobs on {name}",
                f"Against a loop that claims {BATCH} and completes them, on one connection.",
                machine(options, ours.engine, *DRIVERS[name]),
            )
        table.compare("worker", measured["worker"], measured["loop"], "/s")
        yield table


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", choices=tuple(DRIVERS))


if __name__ == "__main__":
    main(answer, __doc__, add)
