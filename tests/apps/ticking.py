"""Makes the jobs of due ticks in a process of its own and dies at a chosen moment: see conformance/test_schedules.py.

    python -m tests.apps.ticking URL

reads lines "moment" and forks for each a child that dies by SIGKILL; answers with a line when the child is gone.
"""

import sys
from dataclasses import dataclass
from functools import partial

from sqlalchemy.orm import Session

from sqlalchemy_jobs import job
from sqlalchemy_jobs.payloads import declaration_of
from sqlalchemy_jobs.schedules import ticks
from sqlalchemy_jobs.schedules.ticks import Firing, Known
from tests.apps.transition import in_child, work_and_die


@job("note")
@dataclass(frozen=True)
class Note:
    text: str = ""


KNOWN = Known({"note": (Note, declaration_of(Note))}, {})


def fire_due(session: Session, known: Known = KNOWN) -> list[Firing]:
    """What a worker does when it has woken up."""
    rows, now = ticks.upcoming(session, known)
    due = [row for row in rows if row.next_tick is None or (now and row.next_tick <= now)]
    return ticks.fire(session, [ticks.plan(row, now, known) for row in due])


if __name__ == "__main__":
    for line in sys.stdin:
        in_child(partial(work_and_die, sys.argv[1], line.strip(), fire_due))
