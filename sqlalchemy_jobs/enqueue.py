"""Making jobs: ``enqueue`` returns a row for the caller's session, ``enqueue_many`` inserts thousands."""

from __future__ import annotations

import sys
import time
import uuid
import warnings
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Pool, bindparam, delete, event, select
from sqlalchemy.orm import InstanceState, Mapper, Session, scoped_session
from sqlalchemy.orm.attributes import instance_state

from sqlalchemy_jobs import bell
from sqlalchemy_jobs.codec import digest, encode, key_of
from sqlalchemy_jobs.columns import server_now
from sqlalchemy_jobs.copying import copy
from sqlalchemy_jobs.duplicates import ON_CONFLICT, Sent, expire_replaced, note, stand_ins
from sqlalchemy_jobs.errors import DuplicateJob, EnqueueError, JobNeverAdded
from sqlalchemy_jobs.ids import uuid7
from sqlalchemy_jobs.inserts import RUNG_AHEAD
from sqlalchemy_jobs.limits import limit_key
from sqlalchemy_jobs.models import UNIQUE_KEY_LENGTH, Job, utcnow
from sqlalchemy_jobs.outcomes import checked_delay
from sqlalchemy_jobs.payloads import Declaration, Payload, Stored, check_options, declaration_of
from sqlalchemy_jobs.states import JobState
from sqlalchemy_jobs.tables import TO_JOB, jobs
from sqlalchemy_jobs.unique import BY_KEY, OnConflict

MOST_TAGS = 20
TAG_LENGTH = 100


def enqueue(
    payload: Payload,
    /,
    *,
    queue: str | None = None,
    priority: int | None = None,
    run_at: datetime | None = None,
    delay: timedelta | None = None,
    max_attempts: int | None = None,
    tags: Sequence[str] = (),
    headers: Mapping[str, str] | None = None,
    unique_key: str | None = None,
) -> Job:
    """Return a job for ``payload``: a transient row, to be added to your own session.

    ``session.add(enqueue(SendReceipt(order_id=7)))``: the job commits or rolls back with whatever
    else is in that transaction. Its id is known at once (read it before the commit, which expires it). What is not given comes from the class's
    ``@job``. ``run_at`` is an aware datetime, ``delay`` a timedelta from now by the database server's
    clock; without either the job is due at once. A job with a ``unique_key``, or of a class with
    ``@job(unique=...)``, is left out at the flush when another one has its key: see ``Job.duplicate_of``.

    A job that is dropped without having been added warns with JobNeverAdded. ``session.merge`` and
    ``bulk_save_objects`` add a copy: use ``add``, ``add_all`` or ``enqueue_many``.

    Raises: EnqueueError; PayloadError when the payload cannot be stored or would not be read back
    as it was; DeclarationError when its class is not declared. The flush raises DuplicateJob for
    ``Unique(on_conflict="raise")``.
    """
    stored = encode(payload)
    check_options(queue=queue, priority=priority, max_attempts=max_attempts)
    common = _common(run_at, delay, tags, headers)
    values = _values(payload, stored, queue, priority, max_attempts, unique_key, common)
    made = Job()
    state = instance_state(made)
    caller = sys._getframe(1)
    values["_fresh"] = _Fresh(
        state,
        None if run_at else values["run_at"],
        caller.f_code.co_filename,
        caller.f_lineno,
    )
    if "unique_slot" in values:
        values[ON_CONFLICT] = _on_conflict(payload)
    state.dict.update(values)  # Job(**values) would note for each that there was nothing before
    return made


def enqueue_many(
    session: Session | scoped_session[Any],
    payloads: Iterable[Payload],
    /,
    *,
    queue: str | None = None,
    priority: int | None = None,
    run_at: datetime | None = None,
    delay: timedelta | None = None,
    max_attempts: int | None = None,
    tags: Sequence[str] = (),
    headers: Mapping[str, str] | None = None,
    unique_key: str | None = None,
) -> list[uuid.UUID]:
    """Insert a job for each payload, at once, in the transaction of ``session``; return their ids.

    Use it for hundreds and more. All options apply to every job; they and the errors are those of
    ``enqueue``, and nothing is inserted when one payload is refused. The payloads may be of
    different classes. With an AsyncSession: ``await session.run_sync(enqueue_many, payloads)``.

    The ids are in the order of the payloads. Where another job has the unique key, one of the same call too, its id
    is returned in place of a new one.

    Raises: EnqueueError, PayloadError, DeclarationError; DuplicateJob.
    """
    plain: Session = session() if isinstance(session, scoped_session) else session
    rows: list[dict[str, Any]] = []
    sent: list[Sent] = []
    check_options(queue=queue, priority=priority, max_attempts=max_attempts)
    common = _PLAIN | _common(run_at, delay, tags, headers)
    for payload in payloads:
        stored = encode(payload)
        row = _values(payload, stored, queue, priority, max_attempts, unique_key, common)
        rows.append(row)
        if row["unique_slot"] is not None:
            sent.append((row, _on_conflict(payload)))
    if not rows:
        return []
    connection = plain.connection(bind_arguments=TO_JOB)
    if run_at is None:
        offset = clock_offset(connection)
        due = common["run_at"] + offset
        for row in rows:
            row["run_at"] = due
    bell.tell_own(plain)
    if sent or not copy(connection, rows):
        plain.execute(jobs.insert(), rows, bind_arguments=TO_JOB)  # which rings
    elif common["run_at"] <= datetime.now(UTC) + timedelta(seconds=RUNG_AHEAD):
        bell.ring(plain, {row["queue"] for row in rows})
    try:
        others = stand_ins(plain, sent) if sent else {}
    except DuplicateJob:
        inserted = [{"made": row["id"]} for row in rows]
        plain.execute(_DELETE, inserted, bind_arguments=TO_JOB)
        raise
    for left_out, on_conflict in sent:
        if on_conflict == "replace" and left_out["id"] in others:
            expire_replaced(plain, others[left_out["id"]])
    ids: list[uuid.UUID] = [row["id"] for row in rows]
    return [others.get(job_id, job_id) for job_id in ids]


_DELETE = delete(jobs).where(jobs.c.id == bindparam("made"))


def _values(
    payload: Payload,
    stored: Stored,
    queue: str | None,
    priority: int | None,
    max_attempts: int | None,
    unique_key: str | None,
    common: Mapping[str, Any],
) -> dict[str, Any]:
    declared = declaration_of(type(payload))
    values = {
        **common,  # the same columns for every row of one statement
        "id": uuid7(),
        "kind": declared.kind,
        "queue": declared.queue if queue is None else queue,
        "priority": declared.priority if priority is None else priority,
        "payload": stored,
        "max_attempts": declared.max_attempts if max_attempts is None else max_attempts,
    }
    if declared.unique or unique_key is not None:
        values |= _uniqueness(payload, stored, unique_key, common["created_at"])
    if declared.limit:
        values["limit_key"] = _limit_key(type(payload), stored, declared)
    return values


_READY = JobState.READY.value


def _common(
    run_at: datetime | None,
    delay: timedelta | None,
    tags: Sequence[str],
    headers: Mapping[str, str] | None,
) -> dict[str, Any]:
    """Return what does not depend on the payload."""
    now = utcnow()
    return {
        "state": _READY,
        "run_at": _due(now, run_at, delay),
        "attempt": 0,
        "failures": 0,
        "crashes": 0,
        "tags": checked_tags(tags),
        "headers": checked_headers(headers),
        "created_at": now,
    }


_PLAIN: dict[str, Any] = {
    "unique_key": None,
    "unique_slot": None,
    "unique_states": 0,
    "limit_key": None,
}


def _limit_key(cls: type[Payload], stored: Stored, declared: Declaration) -> str | None:
    fields = declared.limit.fields if declared.limit else ()
    value = key_of(cls, stored, fields) if fields else None
    return None if fields and value is None else limit_key(declared.limit_names[0], value)


def _uniqueness(
    payload: Payload, stored: Stored, unique_key: str | None, now: datetime
) -> dict[str, Any]:
    declared = declaration_of(type(payload))
    unique = declared.unique or BY_KEY
    if unique_key is None:
        subject = digest(type(payload), stored, unique.fields)
    else:
        subject = checked_unique_key(unique_key)
    key = unique.key(declared.kind, subject, now)
    if len(key) > UNIQUE_KEY_LENGTH:
        raise EnqueueError(
            f"unique_key={unique_key!r} is too long: with its kind it has {len(key)} characters, and at most "
            f"{UNIQUE_KEY_LENGTH} are kept; use a digest of it"
        )
    # The slot is taken in every state from ready on that Unique allows.
    return {"unique_key": key, "unique_slot": key, "unique_states": unique.mask}


def _on_conflict(payload: Payload) -> OnConflict:
    return (declaration_of(type(payload)).unique or BY_KEY).on_conflict


def checked_unique_key(key: str) -> str:
    """Return it. Raises: EnqueueError."""
    # Where it ends in a space, MySQL would take it for the same without.
    if not isinstance(key, str) or not key or not key.isprintable() or key != key.strip():
        raise EnqueueError(
            f"unique_key={key!r}: wanted printable characters, without spaces at the ends"
        )
    return key


def _due(now: datetime, run_at: datetime | None, delay: timedelta | None) -> datetime:
    if run_at is None:
        if delay is None:
            return now
        try:
            return now + checked_delay(delay, "delay")
        except (TypeError, ValueError, OverflowError) as error:
            raise EnqueueError(str(error)) from None
    if delay is not None:
        raise EnqueueError(f"run_at={run_at!r} and delay={delay!r} were both given: choose one")
    return checked_run_at(run_at)


def checked_run_at(run_at: datetime) -> datetime:
    """Return it in UTC. Raises: EnqueueError."""
    if not isinstance(run_at, datetime):
        raise EnqueueError(f"run_at={run_at!r} is a {type(run_at).__name__}, not a datetime")
    if run_at.tzinfo is None:
        raise EnqueueError(
            f"run_at={run_at!r} has no time zone: give it one, for example "
            "run_at.replace(tzinfo=timezone.utc), or use delay="
        )
    try:
        return run_at.astimezone(UTC)
    except OverflowError:
        raise EnqueueError(f"run_at={run_at!r} is beyond the calendar in UTC") from None


def checked_tags(tags: Sequence[str]) -> list[str] | None:
    """Return them as the row has them. Raises: EnqueueError."""
    if isinstance(tags, str):
        raise EnqueueError(f"tags={tags!r} is one string: write tags=[{tags!r}]")
    if len(tags) > MOST_TAGS:
        raise EnqueueError(f"{len(tags)} tags were given: at most {MOST_TAGS} are kept")
    for tag in tags:
        if not isinstance(tag, str) or not 1 <= len(tag) <= TAG_LENGTH or not tag.isprintable():
            raise EnqueueError(f"tag {tag!r}: wanted 1 to {TAG_LENGTH} printable characters")
    return list(tags) or None


def checked_headers(headers: Mapping[str, str] | None) -> dict[str, str] | None:
    """Return them as the row has them. Raises: EnqueueError."""
    if headers is not None and not isinstance(headers, Mapping):
        raise EnqueueError(f"headers={headers!r}: wanted a mapping of strings to strings")
    for name, value in (headers or {}).items():
        if not (isinstance(name, str) and isinstance(value, str)):
            raise EnqueueError(f"header {name!r}: {value!r}: wanted a string for a string")
        if not all(_is_storable(each) for each in (name, value)):
            raise EnqueueError(f"header {name!r}: {value!r} has a NUL or a lone surrogate in it")
    return dict(headers) if headers else None


def _is_storable(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= char <= "\udfff" for char in text)


# --- what a fresh job carries until it is added ------------------------------------------------


class _Fresh:
    """Sits in a fresh job's ``__dict__``: warns when it dies with the job unadded.

    A ``__del__`` on the mapped class would make SQLAlchemy warn of unreachable cycles. The state's
    ``insert_order`` is set by the first ``session.add`` and never reset, so no event is needed.
    """

    __slots__ = ("file", "line", "run_at", "state")

    def __init__(
        self, state: InstanceState[Any], run_at: datetime | None, file: str, line: int
    ) -> None:
        self.state = state
        self.run_at = run_at  # to be corrected to the server's clock; None: given by the caller
        self.file = file
        self.line = line

    def __del__(
        self, is_finalizing: Any = sys.is_finalizing, warn: Any = warnings.warn_explicit
    ) -> None:
        if self.state.insert_order is None and self.state.key is None and not is_finalizing():
            warn(
                "a job was enqueued but never added to a session, so it will not run: "
                "session.add(enqueue(...))",
                JobNeverAdded,
                self.file,
                self.line,
            )

    # A copy of the job is not watched.
    def __reduce__(self) -> Any:
        return type(None), ()


# --- the server's clock decides what "now" and "in an hour" mean --------------------------------

_OFFSET_KEPT = 600.0
"""Seconds for which a measured offset is believed."""

_QUICK = timedelta(seconds=0.5)
"""A slower answer is not exact enough to be kept."""

_offsets: WeakKeyDictionary[Pool, tuple[float, timedelta]] = WeakKeyDictionary()


def clock_offset(connection: Connection) -> timedelta:
    """Return how far the server's clock is ahead of ours; one SELECT per pool and ten minutes."""
    if connection.dialect.name == "sqlite":
        return -timedelta(milliseconds=1)  # the same clock, in whole milliseconds
    pool = connection.engine.pool
    until, offset = _offsets.get(pool, (0.0, timedelta(0)))
    if time.monotonic() >= until:
        before = utcnow()
        server = connection.scalar(select(server_now()))
        after = utcnow()
        assert server is not None
        # The answer came from some moment between the two. Believe the clocks to agree when they may, and else
        # the least that they differ: a job without a delay is to be due at once.
        agree = before <= server <= after
        offset = timedelta(0) if agree else server - after
        if timedelta(0) <= after - before < _QUICK:
            _offsets[pool] = (time.monotonic() + _OFFSET_KEPT, offset)
    return offset


# --- the ORM's own INSERT -------------------------------------------------------------------------


@event.listens_for(Job, "before_insert", raw=True)  # the only one: each costs a microsecond or two
def _before_insert(mapper: Mapper[Job], connection: Connection, state: InstanceState[Job]) -> None:
    values, session = state.dict, state.session
    assert session is not None
    fresh: _Fresh | None = values.get("_fresh")
    if fresh is not None and fresh.run_at is not None and fresh.run_at is values.get("run_at"):
        fresh.run_at = None
        values["run_at"] += clock_offset(connection)
    if values.get("unique_slot") is not None:
        note(session, state)
    bell.tell_own(session)
