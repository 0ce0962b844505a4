"""What must be true of limits, pauses and schedules. As in ``audit``, each function yields what is not so.

Nothing is concluded from when a run was claimed to when its end was seen, but from a time in which its row was
`running` for certain (``Held``): so what is found here is none of the clocks, the network, or a handler that goes on
after its job was taken from it.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import datetime
from itertools import groupby, pairwise

from sqlalchemy_jobs import Job
from sqlalchemy_jobs.limits import Rate
from sqlalchemy_jobs.runs import SCHEDULE_HEADER
from tests.chaos.books import CLOCK, Books, Held, at_once
from tests.chaos.kinds import EVERY, LIMITS, NARROW, NARROW_AT_ONCE, NARROW_RATE
from tests.chaos.operator import AT_ONCE

HEEDED = 2.0
"""Seconds after its commit at which a change holds in every worker."""
CLOCKS = CLOCK.total_seconds()


def violations(books: Books, stalled: float) -> list[str]:
    """``stalled``: seconds for which a worker may be kept from going on, between looking at what holds and claiming too."""
    heeded = HEEDED + stalled
    return [
        *_at_once(books),
        *_counted(books),
        *_narrow(books, heeded),
        *_rates(books),
        *_in_order(books),
        *_pauses(books, heeded),
        *_ticks(books),
        *_no_tick_is_missing(books),
        *_rules(books),
    ]


# --- limits -----------------------------------------------------------------------------------------


def by_key(books: Books) -> dict[str, list[Held]]:
    """Return the runs that count against limits, by the name and key of these; those of the queue by the queue's."""
    runs: defaultdict[str, list[Held]] = defaultdict(list)
    for run in books.held:
        if run.job.limit_key is not None:
            runs[run.job.limit_key].append(run)
        if run.job.queue == NARROW:
            runs[f"/{NARROW}"].append(run)
    return runs


def most_of(kind: str) -> int | None:
    """Return how many jobs of a kind may run at once with one key; None: as many as there are."""
    return LIMITS[kind].numbers.concurrency if kind in LIMITS else None


def _at_once(books: Books) -> Iterator[str]:
    """By the rows and the diaries, no more runs with a key held their rows at once than its limit lets run."""
    for key, runs in by_key(books).items():
        most = most_of(runs[0].job.kind)
        for run, count in at_once(runs) if most and not key.startswith("/") else ():
            if count > most:
                yield f"{count} runs with key {key} at once when {run.job.id} began, and {most} may be"


def _counted(books: Books) -> Iterator[str]:
    """By what each handler has counted in one statement, no more rows with its key were running than may be."""
    for entry in books.counted:
        kind = books.kinds[entry.run[0]]
        most = most_of(kind)
        if most and int(entry.word) > most:
            yield f"{kind}: run {entry.run} has seen {entry.word} jobs running, and {most} may be"


def _narrow(books: Books, heeded: float) -> Iterator[str]:
    """No more runs of a queue held their rows at once than it was said to let run, since before the last was claimed."""
    for run, count in at_once(by_key(books).get(f"/{NARROW}", ())):
        since = run.claimed - _heeded(books, run.began, heeded)
        most = max(books.in_force(AT_ONCE, since, run.began, NARROW_AT_ONCE))
        if count > most:
            yield f"{count} runs of queue {NARROW} at once when {run.job.id} began, and {most} may be"


def _rates(books: Books) -> Iterator[str]:
    """By the server's clock at the claims, no window of a rate's length has more of them than it says."""
    for key, runs in by_key(books).items():
        text = NARROW_RATE if key.startswith("/") else LIMITS[runs[0].job.kind].rate
        if text is None:
            continue
        rate = Rate.parse(text)
        claimed = sorted(run.claimed for run in runs)
        for first, following in zip(claimed, claimed[rate.count :], strict=False):
            if following - first < rate.window.total_seconds() - CLOCKS:
                yield f"{rate.count + 1} claims with key {key} in {following - first:.3f} s, and {text} may be"


def _in_order(books: Books) -> Iterator[str]:
    """No run of an ordered job begins before those of its key that were enqueued and committed before it are final.

    A key is enqueued for by one thread, whose next transaction begins when the commit of the one before is known.
    """
    known = {id_ for each in books.transactions if each.fate == "committed" for id_ in each.jobs}
    jobs = sorted(
        ((job.limit_key or "", job.id.int, job) for _, job in books.of_kind("ordered")),
        key=lambda found: found[:2],
    )
    for key, of_key in groupby(jobs, key=lambda found: found[0]):
        ended = 0.0
        for _, _, job in of_key:
            starts = books.starts_of[job.id.hex]
            if starts and starts[0].at + CLOCKS < ended:
                yield f"{job.id} with key {key} ran before one that was enqueued earlier had ended"
            if job.id.hex in known and job.finished_at is not None:
                ended = max(ended, job.finished_at.timestamp())


def _heeded(books: Books, at: float, heeded: float) -> float:
    """Return for how many seconds before an instant something must have been in force, so that it holds."""
    return HEEDED + CLOCKS if at > books.calm_at else heeded


# --- pauses -----------------------------------------------------------------------------------------


def _pauses(books: Books, heeded: float) -> Iterator[str]:
    """Nothing begins of a queue or a kind that has been paused for long enough."""
    for entry in books.starts:
        kind, job = books.kinds.get(entry.run[0]), books.jobs.get(entry.run[0])
        since = entry.at - _heeded(books, entry.at, heeded)
        for name in (f"kind {kind}", f"queue {job.queue if job else None}"):
            if books.in_force(name, since, entry.at, False) == {True}:
                yield f"{kind}: run {entry.run} began while the {name} was paused, and had been for long"


# --- schedules --------------------------------------------------------------------------------------


def ticks(books: Books) -> dict[str, list[tuple[datetime, Job]]]:
    """Return the jobs of each schedule with their ticks, in order."""
    found: defaultdict[str, list[tuple[datetime, Job]]] = defaultdict(list)
    for job in books.jobs.values():
        if (name := (job.headers or {}).get(SCHEDULE_HEADER)) is not None:
            assert job.scheduled_at is not None
            found[name].append((job.scheduled_at, job))
    return {name: sorted(jobs, key=lambda job: job[0]) for name, jobs in found.items()}


def schedules(books: Books) -> list[str]:
    """Return of which schedule each tick with a job is, all that the load has added as one."""
    return [name.partition("-")[0] for name, jobs in ticks(books).items() for _ in jobs]


def _ticks(books: Books) -> Iterator[str]:
    """A tick has one job, which carries it where the code makes the payload."""
    for name, jobs in ticks(books).items():
        for tick, count in Counter(tick for tick, _ in jobs).items():
            if count > 1:
                yield f"the tick {tick} of schedule {name} has {count} jobs"
        for tick, job in jobs:
            if job.payload["at"] not in (None, tick.timestamp()):
                yield f"the job of tick {tick} of schedule {name} carries {job.payload}"


def _no_tick_is_missing(books: Books) -> Iterator[str]:
    """Under catch_up="all" every tick from the first to the last has a job, whoever was dead at which of them."""
    for (tick, _), (following, _) in pairwise(ticks(books).get("all", ())):
        if following.timestamp() - tick.timestamp() > EVERY["all"]:
            yield f"schedule all has jobs of ticks {tick} and {following}, and none between"


def _rules(books: Books) -> Iterator[str]:
    """A job is of a tick of its schedule, as that was by a committed transaction when the job was made.

    Who makes it has locked the schedule's row: a change that was known to be committed before holds for it.
    """
    for name, jobs in ticks(books).items():
        for tick, job in jobs:
            made_at = job.created_at.timestamp()
            every = books.in_force(f"schedule {name}", made_at, made_at, EVERY.get(name, 0))
            if not any(each and tick.timestamp() % each == 0 for each in every):
                yield f"{job.id} of schedule {name} is of {tick}, no tick: it was every {every} seconds"
