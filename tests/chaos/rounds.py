"""What is tried when all has become quiet: whether every slot is there, a cancel is heard, a death is noticed.

Nothing else goes on, so the times depend on the settings and the machine alone. ``PATIENCE`` is for the machine.
"""

import signal
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime

from sqlalchemy import Engine, func, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from sqlalchemy_jobs import Job, Schedule, cancel, enqueue_many
from sqlalchemy_jobs.limits import Rate
from sqlalchemy_jobs.runs import SCHEDULE_HEADER
from sqlalchemy_jobs.worker.loops import LONGEST_PAUSE
from sqlalchemy_jobs.worker.maintenance import BROKEN_VIEW, LOOK, PRUNE, SWEEP
from sqlalchemy_jobs.worker.timeouts import GRACE
from tests.chaos import signs
from tests.chaos.faults import Process, Workers
from tests.chaos.flow import HEEDED
from tests.chaos.kinds import (
    ASIDE,
    EVERY,
    KEPT,
    NARROW,
    NARROW_RATE,
    NOT_KEPT,
    Meet,
    MeetAsync,
    MeetOnce,
    MeetParts,
    MeetWrite,
    Nothing,
    Short,
    Tick,
    Write,
)
from tests.chaos.operator import AT_ONCE, Operator

UNFINISHED = ("ready", "running", "blocked")
PATIENCE = 60.0
"""Seconds that are added to every bound, since the machine may be busy."""
LONGEST_SETTLING = 600.0
"""Seconds after which even what goes on has gone on for too long."""


def death_bound(lease: float) -> float:
    """Return after how many seconds at the latest the jobs of a dead worker are brought back.

    The lease passes, the others look; or one of them has just begun to look, or has just had a disturbance.
    """
    return max(lease + lease / 3, BROKEN_VIEW) + LOOK + PATIENCE


def standstill_bound(lease: float) -> float:
    """Return for how many seconds at most nothing changes while there is something to do.

    A worker is dead, a handler hangs, loops pause after errors, and then orphans wait for the next sweep. A job
    that waits for its backoff is made due.
    """
    return death_bound(lease) + SWEEP + GRACE + LONGEST_PAUSE


@dataclass
class Rounds:
    engine: Engine
    workers: Workers
    operator: Operator
    lease: float
    violations: list[str] = field(default_factory=list)
    learned: list[float] = field(default_factory=list)
    """Seconds until a cancelled handler came to its end."""
    recovered: list[float] = field(default_factory=list)
    """Seconds until the jobs of a killed worker ran again."""
    left_out: Process | None = None
    """A worker whose runs do not count now."""

    # --- settling ---------------------------------------------------------------------------------

    def settle(self) -> float:
        """Wait until every job is final, for as long as it goes on; return how many seconds it took."""
        began = changed = time.monotonic()
        before: tuple[int, int] | None = None
        bound = standstill_bound(self.lease)
        while (now := time.monotonic()) < min(changed + bound, began + LONGEST_SETTLING):
            self.workers.replace_poisoned()
            progress = self._progress()
            if progress is not None and progress[0] == 0:
                return now - began
            if progress != before:
                before, changed = progress, now
            time.sleep(0.3)
        self.violations.append(
            f"not settled after {now - began:.0f} s: {before} jobs unfinished, with so many attempts, "
            f"which is so for {now - changed:.0f} s"
        )
        return now - began

    def _progress(self) -> tuple[int, int] | None:
        """Return how many jobs are unfinished and how many runs they have had; make due what waits for a retry."""
        unfinished = select(func.count(), func.sum(Job.attempt)).where(Job.state.in_(UNFINISHED))
        now = datetime.now(UTC)
        waiting = update(Job).where(Job.state == "ready", Job.run_at > now).values(run_at=now)
        with suppress(SQLAlchemyError), self.engine.begin() as connection:
            count, attempts = connection.execute(unfinished).one()
            connection.execute(waiting)
            return count, int(attempts or 0)
        return None  # the server may still be starting

    # --- rounds -----------------------------------------------------------------------------------

    def play(self) -> None:
        """Have all slots in use at once, by threads and on the loop; kill a worker; stop and continue another one.

        And see that what is said about queues and kinds is heeded, and what becomes of ticks that were missed.
        """
        self._set()
        self._pause()
        self._fill("threads", Meet)
        self._fill("loop", MeetAsync)
        if len(self.workers.alive) > 1:
            self._kill()
            self.workers.start()
            self._suspend()
            self._fill("again", Meet)

    def _fill(self, round_: str, payload: type[Meet | MeetAsync]) -> None:
        """Use every slot of every worker at once, and then cancel half of the runs."""
        count = self.workers.slots * len(self.workers.alive)
        job_ids = self._begin([payload(round_)] * count)
        if self._meet(round_, count, PATIENCE):
            self._cancel(round_, job_ids[::2])
        signs.open_(self.workers.folder, round_)
        self.settle()

    def _begin(self, payloads: Sequence[object], queue: str = "default") -> list[uuid.UUID]:
        with Session(self.engine) as session, session.begin():
            return enqueue_many(session, payloads, queue=queue)

    def _present(self, round_: str) -> list[tuple[int, str]]:
        """Return the processes and jobs that are in the round, without those of the worker that is left out."""
        alive = {each.popen.pid for each in self.workers.alive if each is not self.left_out}
        return [each for each in signs.present(self.workers.folder, round_) if each[0] in alive]

    def _meet(self, round_: str, count: int, bound: float) -> bool:
        """Wait until so many jobs run at once."""
        met = _wait_for(lambda: len(self._present(round_)) == count, bound)
        if not met:
            by_worker = Counter(pid for pid, _ in self._present(round_))
            self.violations.append(
                f"round {round_}: not {count} jobs at once in {bound:.0f} s, but {sorted(by_worker.values())}"
            )
        return met

    def _cancel(self, round_: str, job_ids: Sequence[uuid.UUID]) -> None:
        """Cancel running jobs: their handlers come to their end, although they wait for others."""
        with Session(self.engine) as session, session.begin():
            for job_id in job_ids:
                if not cancel(session, job_id, "by chaos"):
                    self.violations.append(f"round {round_}: {job_id} could not be cancelled")
        since = time.monotonic()
        left = {job_id.hex for job_id in job_ids}
        while left and time.monotonic() < since + PATIENCE:
            time.sleep(0.02)
            gone = left - {job_id for _, job_id in self._present(round_)}
            self.learned += [time.monotonic() - since] * len(gone)
            left -= gone
        if left:
            self.violations.append(
                f"round {round_}: {len(left)} of {len(job_ids)} runs did not learn in {PATIENCE:.0f} s "
                "that they were cancelled"
            )

    def _kill(self) -> None:
        """Kill the worker with the most runs: the others run again what may be run again."""
        count = self.workers.slots * (len(self.workers.alive) - 1)
        job_ids = self._begin([Meet("kill"), MeetAsync("kill")] * (count // 3))
        once = self._begin([MeetOnce("kill")] * (count - len(job_ids)))
        if self._meet("kill", count, PATIENCE):
            victim, lost = self._busiest("kill")
            lost_for_good = lost & {job_id.hex for job_id in once}
            self.workers.kill(victim)
            since = time.monotonic()
            if self._meet("kill", count - len(lost_for_good), death_bound(self.lease)):
                self.recovered += [time.monotonic() - since] * len(lost - lost_for_good)
        signs.open_(self.workers.folder, "kill")
        self.settle()

    def _suspend(self) -> None:
        """Stop the worker with the most runs until the others run its jobs: once it goes on, it gives them up.

        Again when it was stopped in the midst of a transaction: it keeps what that has locked, its own row maybe,
        and on SQLite the whole database. With other jobs, since one that is lost twice waits for a worker without any.
        """
        usual = 2 * self.lease + LOOK + SWEEP
        bounds = (usual, usual, usual, usual, death_bound(self.lease) + SWEEP)
        if not any(self._replace(f"suspend{n}", bound) for n, bound in enumerate(bounds)):
            self.violations.append("round suspend: the jobs of a stopped worker did not run again")

    def _replace(self, round_: str, bound: float) -> bool:
        """Stop the worker with the most runs for so long at most; tell whether the others came to run its jobs."""
        count = self.workers.slots * (len(self.workers.alive) - 1) // 2 * 2
        self._begin([MeetParts(round_), MeetWrite(round_)] * (count // 2))
        is_replaced = self._meet(round_, count, PATIENCE)
        if is_replaced:
            stopped, lost = self._busiest(round_)
            self.left_out = stopped
            stopped.popen.send_signal(signal.SIGSTOP)
            is_replaced = _wait_for(lambda: len(self._present(round_)) == count, bound)
            stopped.popen.send_signal(signal.SIGCONT)
            self.left_out = None
            if is_replaced and not _wait_for(lambda: len(self._present(round_)) == count, PATIENCE):
                self.violations.append(
                    f"round {round_}: worker {stopped.popen.pid} still runs some of {len(lost)} jobs that were taken from it"
                )
        signs.open_(self.workers.folder, round_)
        self.settle()
        return is_replaced

    def _busiest(self, round_: str) -> tuple[Process, set[str]]:
        """Return the worker that has the most jobs of the round, and these."""
        present = self._present(round_)
        pid = Counter(pid for pid, _ in present).most_common(1)[0][0]
        (busiest,) = (each for each in self.workers.alive if each.popen.pid == pid)
        return busiest, {job_id for at, job_id in present if at == pid}

    def _set(self) -> None:
        """Let more and more jobs of a queue run at once, and then less: so many do, and the audit tells of one more.

        And have more of them wait than its rate lets begin at once: the audit tells of those too.
        """
        self.operator.change(AT_ONCE, 1)
        time.sleep(HEEDED)
        self._begin([Meet("narrow")] * 10, NARROW)
        for count in (1, 3, 5):
            self.operator.change(AT_ONCE, count)
            self._meet("narrow", count, PATIENCE)
        self.operator.change(AT_ONCE, 2)
        time.sleep(HEEDED)
        signs.open_(self.workers.folder, "narrow")
        self._begin([Short(0.0)] * 2 * Rate.parse(NARROW_RATE).count, NARROW)
        self.settle()

    def _pause(self) -> None:
        """Pause a queue and a kind while their jobs run, wait and come: the audit tells of one that begins."""
        some = 5 * self.workers.slots * len(self.workers.alive)
        self._begin([Short(0.3)] * some, ASIDE)
        self._begin([Nothing(n) for n in range(some)])
        for name in (f"queue {ASIDE}", "kind nothing"):
            self.operator.change(name, True)
        missed = self._miss()
        time.sleep(HEEDED)
        self._begin([Write(n) for n in range(some)], ASIDE)
        self._begin([Nothing(n) for n in range(some)])
        self._see_what_was_missed(*missed)
        for name in (f"queue {ASIDE}", "kind nothing"):
            self.operator.change(name, False)
        self.settle()

    # --- schedules --------------------------------------------------------------------------------

    def _miss(self) -> tuple[int, float]:
        """Have schedules that three ticks have passed by, hours ago: as after an outage. Return the interval and the last."""
        # The last one is older than what is only late, and the next one does not come yet.
        now = time.time()
        every = next(
            60 * minutes for minutes in range(50, 120) if 120 < now % (60 * minutes) < 45 * minutes
        )
        last = now // every * every
        with self.operator.transaction() as (session, transaction):
            for name in EVERY:
                schedule = Schedule(f"missed-{name}", f"@every {every}s", Tick(), catch_up=name)
                session.add(schedule)
                session.flush()
                schedule.next_tick = datetime.fromtimestamp(last - 2 * every, UTC)
                transaction.changes[f"schedule missed-{name}"] = every
        return every, last

    def _see_what_was_missed(self, every: int, last: float) -> None:
        """See that each tick, the last one or none was caught up, as was asked for."""
        wanted = {"all": [last - 2 * every, last - every, last], "once": [last], "skip": []}
        behind = select(func.count()).where(Schedule.next_tick <= datetime.now(UTC))

        def has_looked() -> bool:
            with Session(self.engine) as session:
                return session.scalar(behind.where(Schedule.name.startswith("missed-"))) == 0

        if not _wait_for(has_looked, LOOK + PATIENCE):
            self.violations.append("round missed: no worker saw to ticks that were missed")
        with Session(self.engine) as session:
            jobs = session.scalars(select(Job).where(Job.kind == "tick")).all()
        for name, expected in wanted.items():
            found = sorted(
                job.scheduled_at.timestamp()
                for job in jobs
                if (job.headers or {}).get(SCHEDULE_HEADER) == f"missed-{name}" and job.scheduled_at
            )
            if found != expected:
                self.violations.append(
                    f"round missed: catch_up={name} has jobs of {found}, wanted {expected}"
                )

    # --- pruning ----------------------------------------------------------------------------------

    def wait_for_pruning(self) -> None:
        """Wait until nothing is left of the kinds that are not kept, or for as long as that may take."""
        left = select(func.count()).where(Job.kind.in_(NOT_KEPT))

        def is_pruned() -> bool:
            with self.engine.begin() as connection:
                return connection.scalar(left) == 0

        self.workers.start()  # a worker that has just started looks what is to be pruned
        if not _wait_for(is_pruned, KEPT.total_seconds() + PRUNE + PATIENCE):
            self.violations.append("what is not to be kept is not pruned")


def _wait_for(condition: Callable[[], bool], bound: float) -> bool:
    until = time.monotonic() + bound
    while not (true := condition()) and time.monotonic() < until:
        time.sleep(0.05)
    return true
