"""Batches: one call of a handler for several jobs of a kind, which it ends in one transaction.

Each job has a run of its own, with its own fence. What the handler did for one of them cannot be told from
what it did for the others: so when one fence does not hold, nothing is committed, and the handler is called
again for those that are left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from sqlalchemy_jobs import transitions
from sqlalchemy_jobs.app import Handler
from sqlalchemy_jobs.claims import Claim
from sqlalchemy_jobs.codec import decode
from sqlalchemy_jobs.errors import ResultError
from sqlalchemy_jobs.runs import Batch, Run
from sqlalchemy_jobs.worker import execution
from sqlalchemy_jobs.worker.execution import Transition


@dataclass(frozen=True)
class Ends:
    """How the runs of a batch end: a transition that makes that of each, or none at all."""

    of: Mapping[Run, Transition]

    def __call__(self, session: Session, claim: Claim) -> bool:
        completed, discarded, others = [], [], []
        for run, transition in sorted(self.of.items(), key=lambda end: end[0].job_id):
            if transition is transitions.complete:
                completed.append(run.claim)
            elif transition is transitions.discard:
                discarded.append(run.claim)
            else:
                others.append((run.claim, transition))
        return (
            transitions.complete_all(session, completed)
            and transitions.discard_all(session, discarded)
            and all(transition(session, claim) for claim, transition in others)
        )


def of_each(run: Run, end: Callable[[Run], Transition]) -> Transition:
    """Return the transition that ``end`` returns for a run; of a batch, for each of its runs."""
    return Ends({each: end(each) for each in run.runs}) if isinstance(run, Batch) else end(run)


def each_of(batch: Batch, transition: Transition) -> Iterator[tuple[Run, Transition]]:
    """Yield the runs of a batch that are still to be ended, each with its own transition."""
    if isinstance(transition, Ends):
        yield from transition.of.items()
    else:
        yield from ((run, transition) for run in batch.runs)


def payloads_of(
    batch: Batch, handler: Handler, end_apart: Callable[[Batch, Run, Transition], None]
) -> dict[Run, Any]:
    """Decode the payloads of a batch; the run of one that does not decode is ended apart, as failed."""
    payloads = {}
    for run in batch.runs:
        try:
            payloads[run] = decode(handler.payload, run.claim.payload, handler.declaration.upgrade)
        except Exception as error:
            end_apart(batch, run, execution.classify_error(error, run, handler.declaration))
    return payloads


def work(payloads: Mapping[Run, Any], handler: Handler, call: Callable[[Any], Any]) -> Ends:
    """Call a batch handler and return what it asks for.

    Raises: what the handler raises, ResultError.
    """
    returned = call(list(payloads.values()))
    if returned is None:
        returned = [None] * len(payloads)
    if not isinstance(returned, (list, tuple)):
        raise ResultError(
            f"the batch handler returned a {type(returned).__name__}: wanted None, or a list with an entry for each "
            "payload; nothing was written"
        )
    if len(returned) != len(payloads):
        raise ResultError(
            f"the batch handler returned {len(returned)} entries for {len(payloads)} payloads: wanted one for each, "
            "in their order; nothing was written"
        )
    return Ends(
        {
            run: execution.classify_error(entry, run, handler.declaration)
            if isinstance(entry, Exception)
            else execution.classify(entry, handler.declaration)
            for run, entry in zip(payloads, returned, strict=True)
        }
    )
