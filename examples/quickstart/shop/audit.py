"""The audit: ``python -m shop.audit orders.csv MAILDIR`` compares file, database and mails. Status 1: a check failed.

The file's last column, which the application does not read, says what should become of each order.
"""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from mailbox import Maildir
from pathlib import Path

from sqlalchemy import select

from sqlalchemy_jobs import Attempt, Job, JobState, Outcome

from .database import SessionLocal
from .jobs import message_id
from .models import Order

Key = tuple[int, str]
"""Number and address: together they name a line of the file, also where a number was used twice."""


@dataclass(frozen=True)
class Books:
    """Everything that was written down anywhere."""

    expected: dict[Key, str]
    """What should become of each order: "taken", or why it must be rolled back."""
    orders: dict[Key, Order]
    jobs: Sequence[Job]
    crashed_runs: int
    mails: Counter[str]
    """By Message-ID."""


def read(orders: Path, maildir: Path) -> Books:
    with orders.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    crashed = select(Attempt).where(Attempt.outcome == Outcome.CRASHED)
    with SessionLocal() as session:
        return Books(
            expected={(int(row["number"]), row["email"]): row["expected"] for row in rows},
            orders={(order.number, order.email): order for order in session.scalars(select(Order))},
            jobs=session.scalars(select(Job)).all(),
            crashed_runs=len(session.scalars(crashed).all()),
            mails=Counter(mail["Message-ID"] for mail in Maildir(maildir, create=False)),
        )


def problems(books: Books) -> Iterator[str]:
    jobs = Counter((job.payload["order"], job.payload["email"]) for job in books.jobs)
    for key, expected in books.expected.items():
        name, order = f"order {key[0]} of {key[1]}", books.orders.get(key)
        if expected != "taken":
            if order:
                yield f"{name} should have been rolled back ({expected}), and is in the database"
            if jobs[key]:
                yield f"{name} was to be rolled back ({expected}), and has a job"
        elif order is None:
            yield f"{name} is valid, and is not in the database"
        else:
            if order.receipt_sent_at is None:
                yield f"{name} has no receipt_sent_at"
            if order.receipts_marked != 1:
                yield f"the receipt of {name} was marked {order.receipts_marked} times"
            if jobs[key] != 1:
                yield f"{name} has {jobs[key]} jobs"
    for unknown in (books.orders.keys() | jobs.keys()) - books.expected.keys():
        yield f"order {unknown[0]} of {unknown[1]} is not in the file"
    for job in books.jobs:
        if job.state != JobState.SUCCEEDED:
            yield f"job {job.id} is {job.state}"
        if message_id(job.id) not in books.mails:
            yield f"no mail was received for job {job.id}"
    for foreign in books.mails.keys() - {message_id(job.id) for job in books.jobs}:
        yield f"mail {foreign} belongs to no job"


def table(books: Books) -> Iterator[tuple[str, int, str]]:
    rejected = Counter(books.expected[key] for key in books.expected.keys() - books.orders.keys())
    received, different = books.mails.total(), len(books.mails)
    again = received - different
    yield "orders in the file", len(books.expected), ""
    yield "taken", len(books.orders), ""
    yield (
        "rolled back",
        rejected.total(),
        ", ".join(f"{n} {why}" for why, n in sorted(rejected.items())),
    )
    marked = [order for order in books.orders.values() if order.receipt_sent_at]
    yield "receipts marked in the database", len(marked), ""
    yield (
        "mails received",
        received,
        f"{different} different: {again} sent again after the kill" if again else "all different",
    )
    states = Counter(job.state for job in books.jobs)
    for state in JobState:
        yield f"jobs {state}", states[state], ""
    yield "runs that died with their worker", books.crashed_runs, ""


def main(orders: Path, maildir: Path) -> int:
    books = read(orders, maildir)
    print()
    for name, count, remark in table(books):
        print(f"  {name:<32} {count:>5}   {remark}".rstrip())
    print()
    found = list(problems(books))
    for problem in found[:10]:
        print(f"  {problem}")
    if found:
        print(f"FAILED: {len(found)} things are not as they should be")
        return 1
    rolled_back = len(books.expected) - len(books.orders)
    print(
        f"OK: each of the {len(books.orders)} valid orders has exactly one receipt_sent_at, "
        f"and none of the {rolled_back} rolled-back orders has a job"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
