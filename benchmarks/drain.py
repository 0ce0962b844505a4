"""Is a peer faster at 20k no-op jobs, each with its best documented settings and one worker process?"""

from collections.abc import Callable, Iterator
from functools import partial

from benchmarks import peers
from benchmarks.common import (
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


def answer(options: Options) -> Iterator[Results]:
    count = options.size(20_000, 500)
    with (
        postgresql(options) as server,
        database(server) as ours,
        peers.installed(options, server) as found,
    ):
        variants: dict[str, Callable[[], Drained]] = {"worker": partial(drain_ours, ours, count)}
        for name, peer in found.items():
            if isinstance(peer, peers.Peer):
                variants[name] = partial(peer.drain, count)
        measured = alternate(options.rounds, variants)
        table = Results(
            f"drain: {count:,} no-op jobs, one worker process, against the peers",
            "Each with its best documented settings; ours with the defaults.",
            machine(options, ours.engine, "psycopg"),
        )
    own = [run.rate for run in measured["worker"]]
    for name, peer in found.items():
        what = f"{name} {(peers.NPM | peers.PIP)[name]}"
        if isinstance(peer, str):
            table.note(what, peer)
        else:
            table.compare(what, own, [run.rate for run in measured[name]], "/s", wanted=1)
    for name, runs in measured.items():
        table.value(f"CPU of the process per job, {name}", [run.cpu for run in runs], "us")
    yield table


if __name__ == "__main__":
    main(answer, __doc__, peers.add_option)
