"""How long is it from a commit to the start of the handler, when the worker is idle? Against the peers.

All workers are up at once, each in a database of its own; the samples go round. A peer's job is added by a
process of its own client library. The time is taken when the commit has returned, so it can be negative.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

from sqlalchemy.orm import sessionmaker

from benchmarks import peers
from benchmarks.app import Noop
from benchmarks.common import (
    Options,
    Process,
    Results,
    alternate,
    database,
    machine,
    main,
    postgresql,
    worker,
)
from sqlalchemy_jobs import enqueue

WARM_UP = 5


def answer(options: Options) -> Iterator[Results]:
    samples = options.size(100, 5)
    with ExitStack() as stack:
        server = stack.enter_context(postgresql(options))
        ours = stack.enter_context(database(server))
        found = stack.enter_context(peers.installed(options, server))
        sessions = sessionmaker(ours.engine)

        def add() -> float:
            with sessions() as session:
                session.add(enqueue(Noop(0)))
                session.commit()
                return time.time()

        own = stack.enter_context(worker(ours))
        ours.wait_for_workers(1)
        variants: dict[str, Callable[[], float]] = {"worker": partial(sample, add, own)}
        for name, peer in found.items():
            if isinstance(peer, peers.Peer):
                adder = stack.enter_context(peer.start("add"))
                adder.wait_for("ready")
                working = stack.enter_context(peer.start("work", "0"))
                variants[name] = partial(sample, partial(add_to, adder), working)
        for each in variants.values():
            for _ in range(WARM_UP):
                each()
        rounds = [alternate(samples, variants, quiet=True) for _ in range(options.rounds)]
        table = Results(
            f"latency: commit to start of the handler, idle worker, {options.rounds} x {samples} jobs",
            "In ms. The ratio is that of the peer's time to ours, in each round.",
            machine(options, ours.engine, "psycopg"),
        )
    for name, peer in found.items():
        if isinstance(peer, str):
            table.note(name, peer)
            continue
        for what, quantile in (("p50", 50), ("p99", 99)):
            table.compare(
                f"{what}, {name}",
                [percentile(each["worker"], quantile) for each in rounds],
                [percentile(each[name], quantile) for each in rounds],
                "ms",
                lower=True,
                wanted=1 if name == "graphile-worker" else None,
            )
    everything = [each for one in rounds for each in one["worker"]]
    table.value("worker, all samples: p99", [percentile(everything, 99)], "ms")
    yield table


def sample(add: Callable[[], float], process: Process) -> float:
    """Add a job; return how many ms later its handler started."""
    time.sleep(random.uniform(0.02, 0.12))  # long enough to be idle, and not in step with a poll
    committed_at = add()
    started_at: float = process.wait_for("start")["at"]
    return (started_at - committed_at) * 1000


def add_to(process: Process) -> float:
    process.send("0")
    added_at: float = process.wait_for("added")["at"]
    return added_at


def percentile(values: list[float], n: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[n - 1]


if __name__ == "__main__":
    main(answer, __doc__, peers.add_option)
