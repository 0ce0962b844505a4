"""``sajobs schedules``."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from uuid import UUID

import click
from sqlalchemy import select
from sqlalchemy.orm import Session

from sqlalchemy_jobs.cli.config import CONTEXT, ConfiguredGroup, Refused
from sqlalchemy_jobs.cli.databases import in_session, of_database
from sqlalchemy_jobs.cli.listing import laid_out
from sqlalchemy_jobs.cli.loading import importing, load_app
from sqlalchemy_jobs.columns import server_now
from sqlalchemy_jobs.errors import ConfigurationError
from sqlalchemy_jobs.schedules import cron as crons
from sqlalchemy_jobs.schedules import manage
from sqlalchemy_jobs.schedules.rows import Schedule
from sqlalchemy_jobs.states import WorkerState
from sqlalchemy_jobs.tables import TO_JOB, workers


@click.group(cls=ConfiguredGroup, context_settings=CONTEXT, invoke_without_command=True)
@click.option(
    "--next",
    "ticks",
    type=click.IntRange(min=1, max=1000),
    metavar="N",
    help="Show the next N ticks of each, by the clock of its zone.",
)
@of_database
@click.pass_context
def schedules(
    context: click.Context, ticks: int | None, url: str | None, app_name: str | None
) -> None:
    """List the schedules: when they tick, what they make, and what is wrong with them.

    Or pause, resume and run one. What an app declares is in the list once a worker of it has started.
    """
    if context.invoked_subcommand is None:
        table, faults = in_session(url, app_name, partial(_list, ticks=ticks))
        click.echo(table)
        for fault in faults:
            click.echo(fault, err=True)


@schedules.command("pause")
@click.argument("name")
@of_database
def pause(name: str, url: str | None, app_name: str | None) -> None:
    """Have a schedule's ticks pass by, through deploys too."""
    changed = in_session(url, app_name, lambda session: manage.pause_schedule(session, name))
    click.echo(f"{name}: {'paused' if changed else 'was paused before'}")


@schedules.command("resume")
@click.argument("name")
@of_database
def resume(name: str, url: str | None, app_name: str | None) -> None:
    """Have a schedule tick again, from now on."""
    changed = in_session(url, app_name, lambda session: manage.resume_schedule(session, name))
    click.echo(f"{name}: {'resumed' if changed else 'was not paused'}")


@schedules.command("run")
@click.argument("name")
@importing
@of_database
def run(name: str, modules: tuple[str, ...], url: str | None, app_name: str | None) -> None:
    """Add a job of a schedule, due at once; its ticks are left as they are."""
    try:
        if app_name is None:
            raise ConfigurationError(
                "which app? A schedule's payload, and what its jobs have by default, are in the code: name it by --app"
            )
        app = load_app(app_name, modules)
    except ConfigurationError as error:
        raise Refused(error) from error

    def work(session: Session) -> tuple[UUID, UUID | None]:
        made = app.run_schedule(session, name)
        session.flush()
        return made.id, made.duplicate_of

    with app.context():
        job_id, other = in_session(url, app_name, work)
    if other is None:
        click.echo(f"{name}: added job {job_id}")
    else:
        click.echo(f"{name}: job {other} has its unique key, so none was added")


def _list(session: Session, ticks: int | None) -> tuple[str, list[str]]:
    now = session.scalar(select(server_now()), bind_arguments=TO_JOB)
    assert now is not None
    serving = session.scalars(
        select(workers.c.kinds).where(workers.c.state == WorkerState.ALIVE.value),
        bind_arguments=TO_JOB,
    )
    served = {kind for kinds in serving for kind in kinds or ()}
    rows = session.scalars(select(Schedule).order_by(Schedule.name)).all()
    faults = [f"{row.name}: {row.error}" for row in rows if row.error is not None]
    if ticks is None:
        heading = ["NAME", "CRON", "ZONE", "KIND", "FROM", "STATE", "LAST", "NEXT"]
        return laid_out([heading, *(_line(row, now, served) for row in rows)]), faults
    every: list[list[object]] = [
        [row.name if number == 0 else "", tick]
        for row in rows
        for number, tick in enumerate(_next(row, now, ticks) or (None,))
    ]
    return laid_out([["NAME", "NEXT"], *every]), faults


def _line(row: Schedule, now: datetime, served: Collection[str]) -> list[object]:
    state = "on" if row.kind in served else "unserved"
    if row.error is not None:
        state = "wrong"
    elif row.paused:
        state = "paused"
    return [
        row.name,
        row.cron,
        row.timezone,
        row.kind,
        "code" if row.in_code else "row",
        state,
        None if row.last_tick is None else _shown(row.last_tick, row.timezone),
        *(_next(row, now, 1) or (None,)),
    ]


def _next(row: Schedule, now: datetime, count: int) -> list[str]:
    """Return the ticks to come; none while it is paused."""
    shown: list[str] = []
    with suppress(*_NONSENSE):
        rule = crons.rule(row.cron, row.timezone)
        first = max(row.next_tick or now, rule.after(now))
        every = crons.ticks(rule, first, datetime.max.replace(tzinfo=UTC))
        for tick in islice(every, 0 if row.paused else count):
            shown.append(_shown(tick, row.timezone))
    return shown


def _shown(tick: datetime, timezone: str) -> str:
    with suppress(*_NONSENSE):
        tick = tick.astimezone(crons.zone(timezone))
    return tick.isoformat(" ", "seconds")


# Of a row that was edited by hand: a worker will say so.
_NONSENSE = (ValueError, OverflowError)
