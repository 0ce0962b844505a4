"""pgqueuer on asyncpg and uvloop. It does as it is told, like the harnesses in JavaScript (harness.mjs)."""

import asyncio
import itertools
import json
import signal
import sys
import time
from typing import Any

import asyncpg
import uvloop
from pgqueuer import PgQueuer
from pgqueuer.queries import Queries

_calls = itertools.count(1)


def say(event: str) -> None:
    print(json.dumps({"event": event, "at": time.time(), "cpu": time.process_time()}), flush=True)


def called(count: int) -> None:
    number = next(_calls)
    if count == 0:
        say("start")
    elif number == 1:
        say("first")
    if number == count:
        say("last")


async def main(url: str, command: str, count: int) -> None:
    connection = await asyncpg.connect(url)
    queries = Queries.from_asyncpg_connection(connection)
    if command == "work":
        worker = PgQueuer.from_asyncpg_connection(connection)

        async def noop(job: Any) -> None:
            called(count)

        worker.entrypoint("noop")(noop)

        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, worker.shutdown.set)
        await worker.run(batch_size=500 if count else 10)
    elif command == "install":
        await queries.install()
    elif command == "fill":
        for first in range(0, count, 5000):
            some = range(first, min(first + 5000, count))
            payloads: list[bytes | None] = [b'{"n": %d}' % n for n in some]
            await queries.enqueue(["noop"] * len(some), payloads, [0] * len(some))
    elif command == "add":
        say("ready")
        while line := await asyncio.to_thread(sys.stdin.readline):
            await queries.enqueue("noop", b'{"n": %d}' % int(line))
            say("added")
    await connection.close()
    say("done")


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 0))
