"""What a person, or the application, says about a queue or a kind at run time: pause it, resume it, set it.

Functions of a session that neither commit nor roll back. Each worker that claims heeds the commit within 2 seconds. The
rows are ``Queue`` and ``Kind``; read them, and write them by these functions. A queue or kind without a row has the
defaults, and need not have had a job yet.
"""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any, Literal, TypeAlias, TypedDict, Unpack, cast, get_args

from sqlalchemy import CursorResult, Table, bindparam, update
from sqlalchemy.orm import Session, scoped_session
from sqlalchemy.orm.util import identity_key

from sqlalchemy_jobs import bell
from sqlalchemy_jobs.errors import ControlError, DeclarationError
from sqlalchemy_jobs.inserts import insert_missing
from sqlalchemy_jobs.limits import MOST_AT_ONCE, Rate
from sqlalchemy_jobs.models import Kind, Queue, utcnow
from sqlalchemy_jobs.outcomes import checked_delay
from sqlalchemy_jobs.payloads import check_kind, check_queue, is_whole
from sqlalchemy_jobs.tables import TO_JOB, kinds, queues

Strategy: TypeAlias = Literal["priority", "fifo"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


class QueueOptions(TypedDict, total=False):
    """The keyword arguments of ``set_queue``."""

    concurrency: int | None
    rate: str | None
    strategy: Strategy
    ageing: timedelta | None


def pause_queue(session: Session | scoped_session[Any], name: str, /) -> bool:
    """Have no job of a queue begin, in the transaction of ``session``; False when it was paused before.

    What is running goes on, and what waits in a worker goes back to its queue. Jobs are enqueued as ever, and wait.
    With an AsyncSession: ``await session.run_sync(pause_queue, name)``.

    Raises: ControlError for what is no name of a queue.
    """
    check_queue(name, ControlError)
    return _set_paused(session, queues, name, True)


def resume_queue(session: Session | scoped_session[Any], name: str, /) -> bool:
    """Have the jobs of a queue begin again, in the transaction of ``session``; False when it was not paused."""
    return _set_paused(session, queues, name, False)


def pause_kind(session: Session | scoped_session[Any], kind: str, /) -> bool:
    """Have no job of a kind begin, in the transaction of ``session``; False when it was paused before.

    As ``pause_queue``. With its kind the ``aliases`` of a class are paused.

    Raises: ControlError for what is no kind.
    """
    check_kind(kind, ControlError)
    return _set_paused(session, kinds, kind, True)


def resume_kind(session: Session | scoped_session[Any], kind: str, /) -> bool:
    """Have the jobs of a kind begin again, in the transaction of ``session``; False when it was not paused."""
    return _set_paused(session, kinds, kind, False)


def set_queue(
    session: Session | scoped_session[Any], name: str, /, **options: Unpack[QueueOptions]
) -> None:
    """Set what holds for a queue in every worker, in the transaction of ``session``; what is not given stays.

    ``concurrency``: how many of its jobs may run at once, in all workers together; ``rate``: how many may begin in a
    time, such as ``"100/minute"``; None: no bound. ``strategy``: ``"priority"``, the better one first and among equals
    the longest due, or ``"fifo"``, the longest due first whatever its priority. ``ageing``: with ``"priority"``, how
    long a job has to wait to make up for one step of priority; None: it never does. With an AsyncSession:
    ``await session.run_sync(set_queue, name, strategy="fifo")``.

    Raises: ControlError for a value that cannot be.
    """
    check_queue(name, ControlError)
    known = QueueOptions.__annotations__
    if unknown := options.keys() - known.keys():
        raise ControlError(f"{', '.join(sorted(unknown))}: not among {', '.join(known)}")
    values: dict[str, Any] = dict(options)
    if (most := options.get("concurrency")) is not None and not is_whole(
        most, range(1, MOST_AT_ONCE + 1)
    ):
        raise ControlError(f"concurrency={most!r}: wanted a whole number from 1, or None")
    if (ageing := options.get("ageing")) is not None:
        try:
            values["ageing"] = checked_delay(ageing, "ageing") / timedelta(seconds=1)
        except (TypeError, ValueError) as error:
            raise ControlError(str(error)) from None
    if fault := fault_of_rate(options.get("rate")):
        raise ControlError(fault)
    if options.get("strategy") == "fifo" and ageing is not None:
        raise ControlError(
            'ageing is for strategy="priority": by time alone nothing waits behind a better priority'
        )
    if "strategy" in options and (fault := fault_of(options["strategy"], None)):
        raise ControlError(fault)
    session = _plain(session)
    _change(session, queues, name, values)
    bell.ring(session)


def fault_of(strategy: object, ageing: float | None) -> str | None:
    """Tell what is wrong with the order that is asked for; None: nothing."""
    if strategy not in STRATEGIES:
        return f"strategy={strategy!r}: wanted {' or '.join(STRATEGIES)}"
    if ageing is not None and not 0 <= ageing < math.inf:
        return f"ageing={ageing}: wanted seconds, zero or more"
    return None


def fault_of_rate(rate: str | None) -> str | None:
    """Tell what is wrong with a rate; None: nothing."""
    try:
        if rate is not None:
            Rate.parse(rate)
    except DeclarationError as error:
        return str(error)
    return None


# --- how it is done -------------------------------------------------------------------------------


def _set_paused(
    session: Session | scoped_session[Any], table: Table, name: str, paused: bool
) -> bool:
    session = _plain(session)
    changed = _change(session, table, name, {"paused": paused}, table.c.paused.is_not(paused))
    if changed:
        bell.ring(session)
    return changed


def _change(session: Session, table: Table, name: str, values: dict[str, Any], *where: Any) -> bool:
    """Change the row of a name, which is made if there is none; True when there was something to change."""
    session.execute(_MISSING[table], {"name": name}, bind_arguments=TO_JOB)
    statement = update(table).where(table.c.name == bindparam("of_name"), *where)
    changed = session.execute(
        statement.values(**values, updated_at=utcnow()), {"of_name": name}, bind_arguments=TO_JOB
    )
    mapped = Queue if table is queues else Kind
    if (known := session.identity_map.get(identity_key(mapped, name))) is not None:
        session.expire(known)
    return cast("CursorResult[Any]", changed).rowcount == 1


_MISSING = {queues: insert_missing(queues), kinds: insert_missing(kinds)}


def _plain(session: Session | scoped_session[Any]) -> Session:
    plain: Session = session() if isinstance(session, scoped_session) else session
    plain.flush()
    return plain
