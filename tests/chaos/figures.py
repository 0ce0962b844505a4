"""The times that depend on the machine as well: printed, and judged only where nothing was in the way."""

from collections.abc import Iterable, Mapping
from itertools import pairwise

from tests.chaos.books import Books, at_once
from tests.chaos.faults import Process
from tests.chaos.flow import by_key
from tests.chaos.kinds import ASIDE, NARROW


def recoveries(books: Books, ended: Iterable[Process]) -> list[float]:
    """Seconds from the death of a worker to the next start of what it was running, at a job's first crash."""
    killed = {each.popen.pid: each.killed_at for each in ended}
    found = []
    for job_id, attempts in books.attempts_of.items():
        if books.kinds[job_id].startswith("meet") or _waits_for_more(books, job_id):
            continue  # of a round
        first = next((each for each in attempts if each.outcome == "crashed"), None)
        for one, following in pairwise(books.starts_of[job_id]):
            died_at = killed.get(one.pid)
            if first is None or died_at is None or one.run[1] != first.attempt:
                continue
            if first.finished_at.timestamp() > died_at:  # else it was believed dead before it was
                found.append(following.at - died_at)
    return found


def learned(books: Books, cancelled_at: Mapping[str, float]) -> list[float]:
    """Seconds from the commit of a cancel to when the handler came to its end because of it."""
    return [
        max(0.0, over.at - cancelled_at[run[0]])
        for run, over in books.over.items()
        if run[0] in cancelled_at and over.word == "told" and books.outcomes.get(run) == "cancelled"
    ]


def suspects_waited(books: Books) -> list[float]:
    """Seconds from a job's second crash, or a later one, to its next start; its backoff is part of that."""
    found = []
    for job_id, attempts in books.attempts_of.items():
        if _waits_for_more(books, job_id):
            continue
        for each in [each for each in attempts if each.outcome == "crashed"][1:]:
            starts = [s.at for s in books.starts_of[job_id] if s.run[1] > each.attempt]
            if starts:
                found.append(starts[0] - each.finished_at.timestamp())
    return found


def _waits_for_more(books: Books, job_id: str) -> bool:
    """Tell whether a job may wait for a limit, or because it is paused; where its row is gone, that is not known."""
    job = books.jobs.get(job_id)
    return (
        job is None
        or job.kind == "nothing"
        or job.limit_key is not None
        or job.queue in (NARROW, ASIDE)
    )


def most_at_once(books: Books) -> str:
    """Return how many runs with a key of each limit were seen at once: how near the limits came."""
    most: dict[str, int] = {}
    for key, runs in by_key(books).items():
        name = key.removeprefix("/").partition("/")[0]
        most[name] = max(most.get(name, 0), *(count for _, count in at_once(runs)), 0)
    return ", ".join(f"{name} {count}" for name, count in sorted(most.items()))


def spread(seconds: Iterable[float]) -> str:
    """Return p50, p95 and the maximum."""
    found = sorted(seconds)
    if not found:
        return "-"
    at = [found[min(int(len(found) * part), len(found) - 1)] for part in (0.5, 0.95, 1)]
    return " / ".join(f"{each:.2f} s" for each in at)
