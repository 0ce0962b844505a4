"""What a person, or the application, does to a schedule: pause it, resume it.

Functions of a session that neither commit nor roll back. Whatever else is to be changed is an attribute of the
``Schedule``.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session, scoped_session

from sqlalchemy_jobs.errors import ControlError
from sqlalchemy_jobs.schedules.rows import Schedule


def pause_schedule(session: Session | scoped_session[Any], name: str, /) -> bool:
    """Have a schedule's ticks pass by, in the transaction of ``session``; False when it was paused before.

    Also one that code declares: it stays paused through deploys. Jobs that it has made already are left alone. With
    an AsyncSession: ``await session.run_sync(pause_schedule, name)``.

    Raises: ControlError when there is none of that name.
    """
    return _set_paused(session, name, True)


def resume_schedule(session: Session | scoped_session[Any], name: str, /) -> bool:
    """Have a schedule tick again, in the transaction of ``session``; False when it was not paused.

    From now on: what has passed by is not caught up. Its ``error`` is cleared; a worker pauses it again if it still
    makes no sense.

    Raises: ControlError when there is none of that name.
    """
    return _set_paused(session, name, False)


def _set_paused(session: Session | scoped_session[Any], name: str, paused: bool) -> bool:
    plain: Session = session() if isinstance(session, scoped_session) else session
    plain.flush()
    schedule = plain.get(Schedule, name, populate_existing=True, with_for_update=True)
    if schedule is None:
        raise ControlError(f'there is no schedule "{name}"')
    was, schedule.paused = schedule.paused, paused
    plain.flush()
    return was != paused
