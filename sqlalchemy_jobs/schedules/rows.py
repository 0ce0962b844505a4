"""The rows of schedules: an application adds, changes, pauses and deletes them in its own transactions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal, TypeAlias, TypedDict, Unpack, get_args

from sqlalchemy import Connection, Double, Index, event, inspect
from sqlalchemy.orm import (
    Mapped,
    Mapper,
    Session,
    UOWTransaction,
    mapped_column,
    object_session,
    validates,
)
from sqlalchemy.orm.attributes import flag_modified

from sqlalchemy_jobs import bell, columns
from sqlalchemy_jobs.codec import encode
from sqlalchemy_jobs.enqueue import (
    checked_headers,
    checked_tags,
    checked_unique_key,
    clock_offset,
)
from sqlalchemy_jobs.errors import EnqueueError, ScheduleError
from sqlalchemy_jobs.models import INNODB, Base, utcnow
from sqlalchemy_jobs.outcomes import LONGEST_DELAY, checked_delay
from sqlalchemy_jobs.payloads import KIND_LENGTH, Payload, check_options, declaration_of
from sqlalchemy_jobs.schedules import cron as crons

CatchUp: TypeAlias = Literal["skip", "once", "all"]

NAME_LENGTH = 200
WINDOW = timedelta(days=1)
"""How late a tick may be caught up, unless the schedule says it."""


class JobOptions(TypedDict, total=False):
    """What ``enqueue`` is given for each job of a schedule."""

    queue: str
    priority: int
    max_attempts: int
    tags: Sequence[str]
    headers: Mapping[str, str]
    unique_key: str


class _Encoded(dict[str, Any]):
    """What is stored of a payload: a session that merges a schedule copies it from one to the other."""


class Schedule(Base):
    """A rule that makes jobs: one at each of its ticks, by whichever worker is first.

    ``session.add(Schedule("nightly-report", "0 4 * * *", NightlyReport(), timezone="Europe/Berlin"))``: it holds from
    the commit on, for the workers that have a handler for its payload. Change its attributes, or delete it, in a
    transaction of yours; ``session.merge(Schedule(...))`` adds it or changes the one of that name. The parameters are those of ``JobApp.schedule``; the options of its jobs are those
    of ``enqueue``. The name is the primary key.

    Raises: ScheduleError, with the position of the fault in ``cron``; PayloadError, DeclarationError.
    """

    __tablename__ = "sajobs_schedule"
    __table_args__ = (Index("sajobs_schedule_next", "paused", "next_tick"), INNODB)

    name: Mapped[str] = mapped_column(columns.name(NAME_LENGTH), primary_key=True)
    cron: Mapped[str] = mapped_column(columns.name(crons.CRON_LENGTH))
    """When: five or six fields, ``@hourly`` and the like, or ``@every 90s``."""
    timezone: Mapped[str] = mapped_column(columns.name(crons.ZONE_LENGTH), default="UTC")
    """The zone whose clock ``cron`` is about."""
    kind: Mapped[str] = mapped_column(columns.name(KIND_LENGTH))
    """The kind of its jobs. Set by ``payload``."""
    payload: Mapped[Any | None] = mapped_column(columns.json(), default=None)
    """What its jobs carry, as a JSON object; set it to a payload. NULL: the code that declares it makes one for
    each tick."""
    options: Mapped[Any | None] = mapped_column(columns.json(), default=None)
    """What else ``enqueue`` is given for its jobs."""
    catch_up: Mapped[str] = mapped_column(columns.name(12), default="skip")
    """What becomes of ticks that no worker was there for: ``skip``, ``once`` or ``all``."""
    window_seconds: Mapped[float | None] = mapped_column("catch_up_window", Double, default=None)
    """How many seconds late a tick may be caught up; NULL: a day. See ``window``."""
    run_on_start: Mapped[bool] = mapped_column(default=False)
    """Whether there is a tick when the first worker starts."""
    in_code: Mapped[bool] = mapped_column(default=False)
    """Whether ``JobApp.schedule`` declares it: then only workers that do so make its jobs."""
    paused: Mapped[bool] = mapped_column(default=False)
    """Whether its ticks pass by without a job."""
    error: Mapped[str | None] = mapped_column(columns.text(), default=None)
    """Why a worker has paused it, or why the latest tick has no job."""
    next_tick: Mapped[datetime | None] = mapped_column(columns.utc_datetime(), default=None)
    """The tick that comes next; who moves it on has made its job. NULL: to be worked out."""
    last_tick: Mapped[datetime | None] = mapped_column(columns.utc_datetime(), default=None)
    """The latest tick that a job was made for."""
    created_at: Mapped[datetime] = mapped_column(columns.utc_datetime(), default=utcnow)
    """When it was made (the client's clock)."""
    updated_at: Mapped[datetime] = mapped_column(columns.utc_datetime(), default=utcnow)
    """When its rule was changed, or it was paused or resumed: from then on it ticks (the server's clock)."""

    def __init__(
        self,
        name: str,
        cron: str,
        payload: Payload,
        /,
        *,
        timezone: str = "UTC",
        catch_up: CatchUp = "skip",
        window: timedelta | None = None,
        run_on_start: bool = False,
        paused: bool = False,
        **options: Unpack[JobOptions],
    ) -> None:
        rule = definition(name, cron, timezone, catch_up, window, run_on_start, options)
        super().__init__(**rule, payload=payload)
        if paused:  # else it stays as it is where a session merges this one
            self.paused = True

    @property
    def window(self) -> timedelta | None:
        """How late a tick may be caught up; None: a day."""
        return None if self.window_seconds is None else timedelta(seconds=self.window_seconds)

    @window.setter
    def window(self, window: timedelta | None) -> None:
        self.window_seconds = _checked_window(window)

    @validates("cron", "timezone", "catch_up")
    def _check_rule(self, attribute: str, value: Any) -> Any:
        match attribute:
            case "cron":
                crons.rule(value)
            case "timezone":
                crons.zone(value)
            case _:
                check_catch_up(value)
        return value

    @validates("options")
    def _check_options(self, attribute: str, options: Mapping[str, Any] | None) -> Any:
        return checked_options(options or {})

    @validates("payload")
    def _encode(self, attribute: str, payload: Any) -> Any:
        if isinstance(payload, _Encoded):
            return payload  # that of another Schedule, as its kind is
        stored = _Encoded(encode(payload))
        self.kind = declaration_of(type(payload)).kind
        return stored

    def __repr__(self) -> str:
        return f"<Schedule {self.name} {self.cron!r}>"


def definition(
    name: str,
    cron: str,
    timezone: str,
    catch_up: CatchUp,
    window: timedelta | None,
    run_on_start: bool,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what is declared about a schedule, but for its payload, as the attributes of its row.

    Raises: ScheduleError.
    """
    if (
        not isinstance(name, str)
        or not 1 <= len(name) <= NAME_LENGTH
        or not name.isprintable()
        or name != name.strip()
    ):
        raise ScheduleError(
            f"schedule {name!r}: wanted a name of 1 to {NAME_LENGTH} printable characters, without spaces at the ends"
        )
    try:
        crons.rule(cron, timezone)
        check_catch_up(catch_up)
        if window is not None and catch_up == "skip":
            raise ScheduleError('window is for catch_up="once" and "all": leave it away')
        return {
            "name": name,
            "cron": cron,
            "timezone": timezone,
            "catch_up": catch_up,
            "window_seconds": _checked_window(window),
            "run_on_start": bool(run_on_start),
            "options": checked_options(options),
        }
    except ScheduleError as error:
        raise ScheduleError(f'schedule "{name}": {error}', position=error.position) from None


def checked_options(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the options of a schedule's jobs as the row has them. Raises: ScheduleError."""
    known = JobOptions.__annotations__
    if not isinstance(options, Mapping):
        raise ScheduleError(f"options={options!r}: wanted an object with {', '.join(known)}")
    if unknown := options.keys() - known.keys():
        raise ScheduleError(
            f"{', '.join(sorted(unknown))}: no option of a schedule's jobs, which are {', '.join(known)}"
        )
    check_options(
        queue=options.get("queue"),
        priority=options.get("priority"),
        max_attempts=options.get("max_attempts"),
        error=ScheduleError,
    )
    try:
        checked = {
            **options,
            "tags": checked_tags(options.get("tags") or ()),
            "headers": checked_headers(options.get("headers")),
        }
        if "unique_key" in options:
            checked_unique_key(options["unique_key"])
    except EnqueueError as error:
        raise ScheduleError(str(error)) from None
    return {name: value for name, value in checked.items() if value is not None} or None


def check_catch_up(catch_up: object) -> None:
    """Refuse what is none of the ways to catch up. Raises: ScheduleError."""
    if catch_up not in get_args(CatchUp):
        raise ScheduleError(f'catch_up={catch_up!r}: wanted "skip", "once" or "all"')


def _checked_window(window: timedelta | None) -> float | None:
    if window is None:
        return None
    try:
        return checked_delay(window, "window").total_seconds()
    except (TypeError, ValueError) as error:
        raise ScheduleError(str(error)) from None


def window_of(seconds: float | None) -> timedelta:
    """Return how late a tick may be caught up by the word of a row. Raises: ScheduleError."""
    if seconds is None:
        return WINDOW
    if not 0 <= seconds <= LONGEST_DELAY.total_seconds():
        raise ScheduleError(
            f"catch_up_window={seconds:g}: wanted seconds, zero or more, up to a hundred years"
        )
    return timedelta(seconds=seconds)


# --- what a change of a row entails -----------------------------------------------------------------

_CHANGED = "sqlalchemy_jobs.schedules"
_RESTARTS = ("cron", "timezone", "paused")
_CORRECTS = (*_RESTARTS, "payload", "options", "catch_up", "window_seconds")


@event.listens_for(Schedule, "before_insert")
@event.listens_for(Schedule, "before_update")
def _restart(mapper: Mapper[Schedule], connection: Connection, schedule: Schedule) -> None:
    """Have its ticks worked out anew from now on, when its rule is new; what was wrong with it may be mended."""
    session = object_session(schedule)
    assert session is not None
    session.info[_CHANGED] = True
    changed = {each.key for each in inspect(schedule).attrs if each.history.has_changes()}
    if changed.intersection(_CORRECTS) and schedule.error is not None:
        schedule.error = None
        if "paused" not in changed:
            schedule.paused = False
            changed.add("paused")
    if changed.intersection(_RESTARTS):
        schedule.next_tick = None
        flag_modified(
            schedule, "next_tick"
        )  # it was NULL when it was read; a worker may have set it since
        schedule.updated_at = utcnow() + clock_offset(connection)


@event.listens_for(Session, "after_flush")
def _ring(session: Session, flush: UOWTransaction) -> None:
    if session.info.pop(_CHANGED, False):
        bell.ring_schedules(session)
