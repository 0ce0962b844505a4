"""Making the jobs of ticks: functions over a Session.

Who has locked a schedule's row and found it as it was moves ``next_tick`` on and inserts the jobs in the same
transaction: so each tick has its job once, whoever else is about to make it and whoever dies.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from itertools import islice
from typing import Any, TypeAlias

from sqlalchemy import Table, and_, bindparam, false, or_, select, true, union_all, update
from sqlalchemy.orm import Session

from sqlalchemy_jobs import bell
from sqlalchemy_jobs.codec import decode
from sqlalchemy_jobs.columns import server_now
from sqlalchemy_jobs.duplicates import ON_CONFLICT
from sqlalchemy_jobs.enqueue import enqueue
from sqlalchemy_jobs.errors import ControlError
from sqlalchemy_jobs.inserts import insert_missing
from sqlalchemy_jobs.models import Job
from sqlalchemy_jobs.payloads import Declaration, Payload
from sqlalchemy_jobs.runs import SCHEDULE_HEADER
from sqlalchemy_jobs.schedules import cron as crons
from sqlalchemy_jobs.schedules.cron import Rule
from sqlalchemy_jobs.schedules.declared import Declared
from sqlalchemy_jobs.schedules.rows import Schedule, check_catch_up, checked_options, window_of
from sqlalchemy_jobs.states import WorkerState
from sqlalchemy_jobs.tables import TO_JOB, workers

schedules: Table = Schedule.__table__  # type: ignore[assignment]

BATCH = 100
"""How many schedules, and how many ticks of one, have their jobs made in one transaction."""
SHORTEST_GRACE = timedelta(seconds=5)
LONGEST_GRACE = timedelta(seconds=60)
"""How late a tick may be without being a missed one: as long as it is until the next one, within these bounds."""
_INSTANT = timedelta(microseconds=1)

Kinds: TypeAlias = Mapping[str, tuple[type[Any], Declaration]]
"""The payload classes that a worker has handlers for, by kind."""


@dataclass(frozen=True)
class Known:
    """Which schedules a worker makes jobs for."""

    kinds: Kinds
    declared: Mapping[str, Declared]
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    """Entered around the application's functions."""

    def has(self, row: Any) -> bool:
        """Tell whether a row is one of them: of the code's only those that are as the own code has them."""
        if not row.in_code:
            return row.kind in self.kinds
        mine = self.declared.get(row.name)
        return mine is not None and not _differs(row, mine)

    def makes_unique(self, row: Any) -> bool:
        """Tell whether the jobs of a row have unique keys, which others may hold in open transactions."""
        options = row.options if isinstance(row.options, Mapping) else {}
        return "unique_key" in options or self.kinds[row.kind][1].unique is not None


@dataclass(frozen=True)
class Firing:
    """What is to become of a schedule."""

    row: Any
    """As it was seen."""
    payloads: Sequence[tuple[datetime, Payload]] = ()
    """The ticks that get a job, and what it carries."""
    next_tick: datetime | None = None
    error: str | None = None

    @property
    def pauses(self) -> bool:
        """Whether the row makes no sense; what the code makes of a tick may be mended by the next one."""
        return self.error is not None and not self.row.in_code


# --- looking --------------------------------------------------------------------------------------


def upcoming(session: Session, known: Known) -> tuple[list[Any], datetime | None]:
    """Return the schedules to be seen to next, first those whose next tick is to be worked out; and the time.

    The time is None where there are none.
    """
    which = {"names": list(known.declared), "kinds": list(known.kinds)}
    found = session.execute(_UPCOMING, which, bind_arguments=TO_JOB).all()
    rows = sorted(found, key=lambda row: (row.next_tick is not None, row.next_tick, row.name))
    mine = [row for row in rows if known.has(row)]
    return mine, mine[0].now if mine else None


def owed(
    rule: Rule, first: datetime, now: datetime, catch_up: str, window: timedelta
) -> tuple[list[datetime], datetime]:
    """Return which of the ticks from ``first`` to ``now`` are to have a job, and which tick is to be seen to next."""
    if catch_up == "all":
        if now - first > window:
            first = rule.after(now - window - _INSTANT)
        found = list(islice(crons.ticks(rule, first, now), BATCH))
        return found, rule.after(found[-1]) if found else first
    recent = first if now - first <= LONGEST_GRACE else rule.after(now - LONGEST_GRACE - _INSTANT)
    found = [tick for tick in crons.ticks(rule, recent, now) if now - tick <= _grace(rule, tick)]
    if (
        not found
        and catch_up == "once"
        and now - (last := crons.latest(rule, first, now)) <= window
    ):
        found = [last]
    return found, rule.after(now)


def plan(row: Any, now: datetime, known: Known) -> Firing:
    """Decide what is to become of a schedule that is due, or whose next tick is to be worked out."""
    following = None
    try:
        rule = crons.rule(row.cron, row.timezone)
        if row.next_tick is None:
            since = min(row.updated_at, now)
            return Firing(row, next_tick=rule.after(max(since, row.last_tick or since)))
        check_catch_up(row.catch_up)
        window = window_of(row.window_seconds)
        ticks, following = owed(rule, row.next_tick, now, row.catch_up, window)
        make = _maker(row, known)
        return Firing(row, [(tick, make(tick)) for tick in ticks], following)
    except (
        BaseException
    ) as error:  # of a row that was edited by hand, or of the application's function, sys.exit too
        return broken(Firing(row, next_tick=following), error)


def broken(firing: Firing, error: BaseException) -> Firing:
    """Make no job and note why; the row of an application is paused by it."""
    return replace(firing, payloads=(), error=f"{type(error).__name__}: {error}")


def _maker(row: Any, known: Known) -> Callable[[datetime], Payload]:
    if row.in_code:
        return partial(_made_by_code, known, row.name)
    checked_options(row.options or {})
    cls, declaration = known.kinds[row.kind]
    payload = decode(cls, json.dumps(row.payload), declaration.upgrade)
    return lambda tick: payload


def _made_by_code(known: Known, name: str, tick: datetime) -> Payload:
    with known.context():
        return known.declared[name].payload(tick)


def _grace(rule: Rule, tick: datetime) -> timedelta:
    return min(max(rule.after(tick) - tick, SHORTEST_GRACE), LONGEST_GRACE)


# --- firing ---------------------------------------------------------------------------------------


def fire(session: Session, firings: Sequence[Firing]) -> list[Firing]:
    """Move the schedules on and add the jobs of their ticks; return those that were still as they had been seen.

    The others have been changed, or another worker is seeing to them.
    """
    seen = {firing.row.name: firing for firing in firings}
    locked = session.execute(_LOCK, {"names": sorted(seen)}, bind_arguments=TO_JOB).all()
    done = []
    for row in locked:
        firing = seen[row.name]
        if row != firing.row[: len(row)]:
            continue
        try:
            jobs = [_job(firing, tick, payload) for tick, payload in firing.payloads]
        except Exception as error:
            firing, jobs = broken(firing, error), []
        session.add_all(jobs)
        done.append(firing)
    if done:
        session.execute(_MOVE, [_moved(firing) for firing in done], bind_arguments=TO_JOB)
    return done


def _job(firing: Firing, tick: datetime, payload: Payload) -> Job:
    options = dict(firing.row.options or {})
    options["headers"] = {**options.get("headers", {}), SCHEDULE_HEADER: firing.row.name}
    job = enqueue(payload, run_at=tick, **options)
    job.scheduled_at = tick
    if vars(job).get(ON_CONFLICT) == "raise":  # nobody hears it; that one does for this tick
        del vars(job)[ON_CONFLICT]
    return job


def _moved(firing: Firing) -> dict[str, Any]:
    row = firing.row
    return {
        "of_name": row.name,
        "following": None if firing.pauses else firing.next_tick,
        "latest": max((tick for tick, _ in firing.payloads), default=row.last_tick),
        "trouble": firing.error,
        "pauses": firing.pauses,
    }


def starts(session: Session, worker_id: uuid.UUID, known: Known) -> list[Firing]:
    """Return the start ticks: of the schedules that have one, whose kind no older live worker handles.

    Of two workers that start together, either sees the other one, or the other one's tick.

    Raises: LookupError, when this worker is not alive by its row.
    """
    found = session.execute(
        _STARTING,
        {"names": list(known.declared), "kinds": list(known.kinds)},
        bind_arguments=TO_JOB,
    ).all()
    if not found:
        return []
    alive = _alive(session)
    me = _among(alive, worker_id)
    served = {kind for row in alive if _age(row) < _age(me) for kind in row.kinds or ()}
    firings = []
    for row in found:
        if known.has(row) and row.kind not in served and not _has_ticked_since(row, me.started_at):
            try:
                payload = _maker(row, known)(row.now)
            except BaseException as error:
                firings.append(broken(Firing(row, next_tick=row.next_tick), error))
            else:
                firings.append(Firing(row, [(row.now, payload)], row.next_tick))
    return firings


def _has_ticked_since(row: Any, instant: datetime) -> bool:
    return row.last_tick is not None and row.last_tick >= instant


def _alive(session: Session) -> Sequence[Any]:
    return session.execute(_ALIVE, bind_arguments=TO_JOB).all()


def _among(alive: Sequence[Any], worker_id: uuid.UUID) -> Any:
    me = next((row for row in alive if row.id == worker_id), None)
    if me is None:
        raise LookupError(f"worker {worker_id} is not alive")
    return me


def _age(worker: Any) -> tuple[datetime, uuid.UUID]:
    return worker.started_at, worker.id


# --- by hand --------------------------------------------------------------------------------------


def run(session: Session, name: str, known: Known) -> Job:
    """Add a job of a schedule that is due at once; its ticks are left as they are.

    Raises: ControlError; what the application's function does.
    """
    row = session.execute(_BY_NAME, {"of_name": name}, bind_arguments=TO_JOB).first()
    if row is None:
        raise ControlError(f'there is no schedule "{name}"')
    if row.in_code and name not in known.declared:
        raise ControlError(f'schedule "{name}" is declared by code, and not by this app')
    if row.kind not in known.kinds:
        raise ControlError(
            f'schedule "{name}" makes jobs of kind "{row.kind}", for which this app has no handler'
        )
    job = _job(Firing(row), row.now, _maker(row, known)(row.now))
    session.add(job)
    return job


# --- the schedules of the code ----------------------------------------------------------------------


def taken(session: Session, declared: Collection[str]) -> list[str]:
    """Return which of these names are those of an application's rows."""
    rows = session.scalars(
        select(schedules.c.name).where(schedules.c.name.in_(declared), ~schedules.c.in_code),
        bind_arguments=TO_JOB,
    )
    return sorted(rows)


def is_synced(session: Session, known: Known) -> bool:
    """Tell whether the rows of the code's schedules are as this worker's code has them."""
    return not any(_differences(session, known))


def sync(
    session: Session, worker_id: uuid.UUID, known: Known, *, starting: bool = False
) -> list[str]:
    """Add, change and delete rows of the code's schedules, as this worker's code has them; say what was done.

    A kind's youngest live worker decides, or one that is just ``starting``: so a deploy holds from its first worker
    on, and an old worker that is started once more leaves nothing behind when it has gone. Pauses are kept.

    Raises: LookupError, when this worker is not alive by its row.
    """
    alive = _alive(session)
    me = _among(alive, worker_id)
    ones = [] if starting else [row for row in alive if _age(row) > _age(me)]
    younger = {kind for row in ones for kind in row.kinds or ()}
    new, changed, gone = _differences(session, known)
    done = []
    for mine in new:
        if mine.kind not in younger:
            values = _values(mine) | _RESTARTED
            made = {"paused": False, "in_code": True, "created_at": server_now()}
            session.execute(
                insert_missing(schedules).values(**values, **made), bind_arguments=TO_JOB
            )
            done.append(f"{mine.name} added")
    for row, mine in changed:
        if mine.kind not in younger:
            values = _values(mine) | {"error": None}
            if (row.cron, row.timezone) != (values["cron"], values["timezone"]):
                values |= _RESTARTED
            session.execute(
                update(schedules).where(schedules.c.name == row.name).values(values),
                bind_arguments=TO_JOB,
            )
            done.append(f"{row.name} changed")
    for row in gone:
        if row.kind not in younger:
            of_code = and_(schedules.c.name == row.name, schedules.c.in_code)
            session.execute(schedules.delete().where(of_code), bind_arguments=TO_JOB)
            done.append(f"{row.name} retired")
    if done:
        bell.ring_schedules(session)
    return done


_RESTARTED: dict[str, Any] = {"next_tick": None, "updated_at": server_now()}


def _differences(
    session: Session, known: Known
) -> tuple[list[Declared], list[tuple[Any, Declared]], list[Any]]:
    rows = session.execute(
        _OF_CODE, {"names": list(known.declared), "kinds": list(known.kinds)}, bind_arguments=TO_JOB
    ).all()
    found = {row.name for row in rows}
    of_code = [row for row in rows if row.in_code]
    return (
        [mine for name, mine in known.declared.items() if name not in found],
        [
            (row, mine)
            for row in of_code
            if (mine := known.declared.get(row.name)) is not None and _differs(row, mine)
        ],
        [row for row in of_code if row.name not in known.declared],
    )


def _values(mine: Declared) -> dict[str, Any]:
    """Return its columns by their names in the table's ``c``."""
    return {_COLUMN.get(name, name): value for name, value in mine.columns.items()}


_COLUMN = {"window_seconds": "catch_up_window"}


def _differs(row: Any, mine: Declared) -> bool:
    return any(getattr(row, name) != value for name, value in mine.columns.items())


# --- the statements -------------------------------------------------------------------------------

_ROW = [
    each.label("window_seconds") if each.name == "catch_up_window" else each
    for each in schedules.columns
]
_MINE = and_(
    schedules.c.paused == false(),
    or_(
        and_(
            schedules.c.in_code == false(), schedules.c.kind.in_(bindparam("kinds", expanding=True))
        ),
        schedules.c.name.in_(bindparam("names", expanding=True)),
    ),
)


def _first(rows: Any) -> Any:
    return select(rows.limit(BATCH).subquery())


_SEEN = select(*_ROW, server_now().label("now"))
# Apart, since NULLs come first in the index of one server and last in that of another.
_UPCOMING = union_all(
    _first(_SEEN.where(_MINE, schedules.c.next_tick.is_(None))),
    _first(_SEEN.where(_MINE, schedules.c.next_tick.is_not(None)).order_by(schedules.c.next_tick)),
)
_BY_NAME = _SEEN.where(schedules.c.name == bindparam("of_name"))
_STARTING = _SEEN.where(_MINE, schedules.c.run_on_start == true())
_LOCK = (
    select(*_ROW)
    .where(schedules.c.name.in_(bindparam("names", expanding=True)))
    .order_by(schedules.c.name)
    .with_for_update(skip_locked=True)
)
_MOVE = (
    update(schedules)
    .where(schedules.c.name == bindparam("of_name"))
    .values(
        next_tick=bindparam("following", type_=schedules.c.next_tick.type),
        last_tick=bindparam("latest", type_=schedules.c.last_tick.type),
        error=bindparam("trouble", type_=schedules.c.error.type),
        paused=bindparam("pauses", type_=schedules.c.paused.type),
    )
)
_OF_CODE = select(*_ROW).where(
    or_(
        and_(
            schedules.c.in_code == true(), schedules.c.kind.in_(bindparam("kinds", expanding=True))
        ),
        schedules.c.name.in_(bindparam("names", expanding=True)),
    )
)
_ALIVE = select(workers.c.id, workers.c.kinds, workers.c.started_at).where(
    workers.c.state == WorkerState.ALIVE.value, workers.c.lease_until > server_now()
)
