"""What must be true when everything has settled. Each function is one audit, and yields what is not so."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import pairwise

from sqlalchemy_jobs import Job, JobState
from sqlalchemy_jobs.claims import ALONE_FROM
from tests.chaos.books import CLOCK, Books, run_of
from tests.chaos.faults import Process
from tests.chaos.kinds import FEW, NOT_KEPT, PARTS, SNOOZES
from tests.chaos.load import FINAL

SUCCEEDED, FAILED, CANCELLED = FINAL
ENDS = {
    "doomed": {FAILED},
    "overdue": {FAILED},
    "overdue_async": {FAILED},
    "resigned": {CANCELLED},
    "once": {SUCCEEDED, FAILED},
    "neighbour": {SUCCEEDED, FAILED},
    "poison": {SUCCEEDED, FAILED},
    "ordered": {SUCCEEDED, FAILED},
    "meet": {SUCCEEDED, CANCELLED},
    "meet_async": {SUCCEEDED, CANCELLED},
    "meet_once": {SUCCEEDED, FAILED},
}
"""By kind: how a job may end; else it has succeeded."""
WITHOUT_EFFECT = ("nothing", "blank", "meet", "meet_async", "meet_once")
IN_PARTS = ("parts", "meet_parts")
FAILURES = ("failed", "crashed", "timed_out")


def violations(books: Books, died: Iterable[Process]) -> list[str]:
    return [
        *_transactions(books),
        *_references(books),
        *_ends(books),
        *_effects(books),
        *_earlier_effects(books),
        *_retention(books),
        *_runs(books),
        *_order(books),
        *_lost_runs(books),
        *_cancelled_for_good(books),
        *_crashes(books),
        *_no_second_run(books),
        *_keys(books),
        *(f"a worker ended by itself, status {each.popen.returncode}: {each.log}" for each in died),
    ]


def _transactions(books: Books) -> Iterator[str]:
    """All of a transaction or nothing; a job that stands in for another is there."""
    begun = books.starts_of.keys() | {each.job_id for each in books.effects}
    for each in books.transactions:
        committed = each.id in books.intents
        if committed != (each.fate == "committed") and each.fate != "unknown":
            yield f"transaction {each.id} was {each.fate}, and its row is {'there' if committed else 'not there'}"
        for job_id, kind in each.jobs.items():
            if committed and job_id not in books.jobs and kind not in NOT_KEPT:
                yield f"{kind} {job_id} of the committed transaction {each.id} is not there"
            if not committed and (job_id in books.jobs or job_id in begun):
                yield f"{kind} {job_id} of the transaction {each.id}, which did not commit, was there"
        for other in each.others if committed else ():
            if other.hex not in books.jobs:
                yield f"transaction {each.id} was told that {other} stands in, which is no job"
    for effect in books.effects:
        if effect.intent_id is not None and effect.intent_id not in books.intents:
            yield f"{effect.job_id} had a payload of {effect.intent_id}, which did not commit"


def _references(books: Books) -> Iterator[str]:
    """The application's rows that refer to jobs are there, and refer to them for as long as they are."""
    for each in books.transactions:
        for reference in each.references:
            if (reference in books.references) != (each.id in books.intents):
                yield f"reference {reference} of transaction {each.id} ({each.fate}) is there or not"
    for reference in books.references.values():
        if reference.job_id is not None and reference.job_id.hex not in books.jobs:
            yield f"reference {reference.id} refers to {reference.job_id}, which is gone"


def _ends(books: Books) -> Iterator[str]:
    """Every job is final, in a state that its kind allows, and nobody's."""
    for job_id, job in books.jobs.items():
        states = ENDS.get(job.kind, {SUCCEEDED})
        if job_id in books.called_off:
            states = {CANCELLED} | (states if job_id in books.requeued else set())
        if job.state not in FINAL:
            yield f"{job.kind} {job_id} is {job.state}: stuck"
        elif job.state not in states:
            yield f"{job.kind} {job_id} ended as {job.state}"
        if job.worker_id is not None:
            yield f"{job.kind} {job_id} is {job.state} and has a worker"


def _effects(books: Books) -> Iterator[str]:
    """A job that has succeeded has its effect once, any other one has none."""
    last = Counter(each.job_id for each in books.effects if each.last)
    for job_id, kind in books.kinds.items():
        job = books.jobs.get(job_id)
        if kind in WITHOUT_EFFECT:
            wanted = 0
        elif job is None or kind == "resigned":
            wanted = job_id not in books.called_off
        else:
            wanted = (job.state == SUCCEEDED) + books.requeued.get(job_id, 0)
        if last[job_id] != wanted:
            yield f"{kind} {job_id} has {last[job_id]} effects, wanted {int(wanted)}"
    for job_id in {each.job_id for each in books.effects} - books.kinds.keys():
        yield f"an effect of {job_id}, which is no job"


def _earlier_effects(books: Books) -> Iterator[str]:
    """What a job committed before its end: each snooze once; each part at least once, and all of them in its last run."""
    earlier = [each for each in books.effects if not each.last]
    snoozed = Counter(each.job_id for each in earlier)
    parts = Counter(map(run_of, earlier))
    for job_id, _ in books.of_kind("sleepy"):
        found = snoozed[job_id]
        if found != SNOOZES and not (job_id in books.called_off and found < SNOOZES):
            yield f"sleepy {job_id} has {found} effects of snoozed runs"
    for each in books.effects:
        if books.kinds.get(each.job_id) == "parts" and each.last and parts[run_of(each)] != PARTS:
            yield f"run {run_of(each)} has {parts[run_of(each)]} parts"
    for each in earlier:
        if (kind := books.kinds.get(each.job_id)) not in ("sleepy", *IN_PARTS):
            yield f"{kind} {each.job_id} has an effect of a run that was not its last"


def _retention(books: Books) -> Iterator[str]:
    """Rows that are not to be kept are gone."""
    for job_id, job in books.of_kind(*NOT_KEPT):
        yield f"{job.kind} {job_id} is {job.state}, and still there"


def _runs(books: Books) -> Iterator[str]:
    """(job, attempt, worker) names one run, and a job's attempt is committed once."""
    # An effect of a snoozed or cancelled run and its Attempt are two traces of one committed end.
    ends = {run_of(each) for each in (*books.attempts, *books.effects)}
    for (job_id, attempt), count in Counter(end[:2] for end in ends).items():
        if count > 1:
            yield f"attempt {attempt} of {job_id} ended {count} times"
    doubled = Counter(run_of(each) for each in books.effects if each.last)
    yield from (f"run {run} has {n} effects" for run, n in doubled.items() if n > 1)
    begun = Counter(each.run for each in books.starts)
    yield from (f"run {run} began {n} times" for run, n in begun.items() if n > 1)
    for job_id, attempt, _ in ends:
        if job_id in books.jobs and attempt > books.jobs[job_id].attempt:
            yield f"attempt {attempt} of {job_id} ended, and its row is at {books.jobs[job_id].attempt}"


def _order(books: Books) -> Iterator[str]:
    """By the server's clock, what the runs of a job have committed follows the order of their attempts."""
    commits: defaultdict[str, list[tuple[datetime, int]]] = defaultdict(list)
    for attempt in books.attempts:
        commits[attempt.job_id.hex].append((attempt.finished_at, attempt.attempt))
    for effect in books.effects:
        commits[effect.job_id].append((effect.at, effect.attempt))
    for job_id, found in commits.items():
        for one, following in pairwise(sorted(found, key=lambda commit: commit[::-1])):
            if following[0] + CLOCK < one[0]:
                yield f"attempt {one[1]} of {job_id} committed at {one[0]}, attempt {following[1]} at {following[0]}"


def _lost_runs(books: Books) -> Iterator[str]:
    """A run that has not succeeded has committed nothing; one that commits in parts, nothing after it was lost."""
    ended = {run_of(each): each for each in books.attempts}
    for effect in books.effects:
        attempt, kind = ended.get(run_of(effect)), books.kinds.get(effect.job_id)
        if attempt is None or attempt.outcome == "snoozed":
            continue
        if kind in IN_PARTS and not effect.last:
            if effect.at > attempt.finished_at + CLOCK:
                yield f"run {run_of(effect)} was {attempt.outcome}, and then committed a part"
        elif (attempt.outcome, kind) != ("cancelled", "resigned"):
            yield f"{kind}: run {run_of(effect)} was {attempt.outcome}, and has an effect"


def _cancelled_for_good(books: Books) -> Iterator[str]:
    """A job that was cancelled while it ran does not run again."""
    for job_id, attempts in books.attempts_of.items():
        for each in attempts:
            if each.outcome != "cancelled" or job_id in books.requeued:
                continue
            if any(start.run[1] > each.attempt for start in books.starts_of[job_id]):
                yield f"{job_id} was cancelled in attempt {each.attempt}, and ran again"


def _crashes(books: Books) -> Iterator[str]:
    """A job fails after as many failures as it may have, and not by another one that kills their worker."""
    killers = {each.pid for each in books.poisoned}
    for job_id, job in books.of_kind("poison", "neighbour"):
        failed = [each for each in books.attempts_of[job_id] if each.outcome in FAILURES]
        if (job.state == FAILED) != (job.failures >= FEW):
            yield f"{job.kind} {job_id} is {job.state} after {job.failures} failures"
        if (
            not 0 <= len(failed) - job.failures <= 1
        ):  # the first crash of a job that was claimed ahead
            yield f"{job.kind} {job_id} failed {len(failed)} times and counts {job.failures}"
        crashed = [run_of(each) for each in failed if each.outcome == "crashed"]
        for run in crashed[ALONE_FROM:] if job.kind == "neighbour" else ():
            if (
                run in books.start_of
                and books.start_of[run].pid in killers
                and run not in books.over
            ):
                yield f"neighbour {job_id} ran beside a job that killed their worker, once too often"
    kills = Counter(e.run[0] for e in books.poisoned if books.outcomes.get(e.run) != "released")
    for job_id, count in kills.items():
        if count > FEW + 1:  # the first one counts no failure where the job was claimed ahead
            yield f"poison {job_id} has killed {count} workers"


def _no_second_run(books: Books) -> Iterator[str]:
    """A job with on_crash="fail" is not run again: neither by its rows, nor by the diaries of the processes."""
    for job_id, job in books.of_kind("once", "meet_once"):
        starts = books.starts_of[job_id]
        for each in books.attempts_of[job_id]:
            if each.outcome == "crashed" and any(s.run[1] > each.attempt for s in starts):
                yield f"{job.kind} {job_id} crashed in attempt {each.attempt}, and ran again"
        for one, following in pairwise(starts):
            if one.run not in books.over and books.outcomes.get(one.run) != "released":
                yield f"{job.kind} {job_id} ran as {following.run} after {one.run}, which had no end"


def _keys(books: Books) -> Iterator[str]:
    """Jobs with one key come one after the other: each is inserted when the one before has ended."""
    by_key: defaultdict[str, list[Job]] = defaultdict(list)
    for job_id, job in books.jobs.items():
        # One that was put back and then cancelled has the times of two lives.
        two_lives = job_id in books.called_off and job_id in books.requeued
        if job.unique_key is not None and job.finished_at is not None and not two_lives:
            by_key[job.unique_key].append(job)
    for key, same in by_key.items():
        if same[0].kind == "windowed" and len(same) > 1:
            yield f"{len(same)} jobs with key {key}, which is for one"
        same.sort(key=lambda job: job.finished_at or job.created_at)
        for one, following in pairwise(same):
            # One that was cancelled before it ran has no start.
            if following.started_at and one.finished_at and following.started_at < one.finished_at:
                yield f"{following.id} with key {key} ran before {one.id} had ended"
    for job_id, job in books.jobs.items():
        holds = job.unique_key is not None and JobState(job.state).bit & job.unique_states
        if bool(holds) != (job.unique_slot is not None):
            yield f"{job.kind} {job_id} is {job.state}, and its slot is {job.unique_slot}"
