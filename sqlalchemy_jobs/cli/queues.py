"""``sajobs queues`` and ``sajobs kinds``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, cast

import click
from click.core import ParameterSource
from sqlalchemy import ColumnElement, case, func, literal_column, or_, select
from sqlalchemy.orm import Session

from sqlalchemy_jobs import patterns
from sqlalchemy_jobs import queues as control
from sqlalchemy_jobs.cli.config import CONTEXT, ConfiguredGroup
from sqlalchemy_jobs.cli.databases import in_session, of_database
from sqlalchemy_jobs.cli.listing import laid_out
from sqlalchemy_jobs.columns import server_now
from sqlalchemy_jobs.queues import STRATEGIES, QueueOptions, fault_of, fault_of_rate
from sqlalchemy_jobs.states import JobState, WorkerState
from sqlalchemy_jobs.tables import TO_JOB, jobs, workers
from sqlalchemy_jobs.tables import kinds as kinds_table
from sqlalchemy_jobs.tables import queues as queues_table

NONE = "none"
MOST_NAMED = 3


def or_none(read: Callable[[str], Any], wanted: str) -> Callable[[str], Any]:
    """Return what reads an option, in which ``none`` takes a value back."""

    def read_or_none(value: str) -> Any:
        try:
            return None if value == NONE else read(value)
        except (ValueError, OverflowError):
            raise click.BadParameter(f"{value}: wanted {wanted}, or {NONE}") from None

    return read_or_none


@click.group(cls=ConfiguredGroup, context_settings=CONTEXT, invoke_without_command=True)
@of_database
@click.pass_context
def queues(context: click.Context, url: str | None, app_name: str | None) -> None:
    """List the queues: what waits in each, what holds for it, and which workers serve it.

    Or pause, resume and set one: in force in every worker within 2 seconds.
    """
    if context.invoked_subcommand is None:
        _print(in_session(url, app_name, _queues))


@queues.command("pause")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@of_database
def pause_queues(names: tuple[str, ...], url: str | None, app_name: str | None) -> None:
    """Have no job of these queues begin; what is running goes on."""
    _change(url, app_name, names, control.pause_queue, "paused", "was paused before")
    for name in in_session(url, app_name, partial(_unknown, by=jobs.c.queue, names=names)):
        click.echo(f"{name}: no job waits in this queue now, and no worker names it", err=True)


@queues.command("resume")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@of_database
def resume_queues(names: tuple[str, ...], url: str | None, app_name: str | None) -> None:
    """Have the jobs of these queues begin again."""
    _change(url, app_name, names, control.resume_queue, "resumed", "was not paused")


@queues.command("set")
@click.argument("name")
@click.option(
    "--concurrency",
    type=or_none(int, "a whole number from 1"),
    metavar="N",
    help="How many of its jobs may run at once, in all workers together.",
)
@click.option(
    "--rate",
    type=or_none(str, "a rate"),
    metavar="RATE",
    help="How many of its jobs may begin in a time, for example 100/minute.",
)
@click.option(
    "--strategy",
    type=click.Choice(STRATEGIES),
    help="Whether its jobs begin by priority, and then by time, or by time alone.",
)
@click.option(
    "--ageing",
    type=or_none(lambda value: timedelta(seconds=float(value)), "a number of seconds"),
    metavar="S",
    help="With --strategy priority: how many seconds of waiting make up for one step of priority.",
)
@of_database
@click.pass_context
def set_queue(
    context: click.Context, /, name: str, url: str | None, app_name: str | None, **options: Any
) -> None:
    """Set what holds for a queue in all workers together; none takes a bound back. What is not given stays."""
    # In the file they would be the worker's.
    given = {
        option: value
        for option, value in options.items()
        if context.get_parameter_source(option) is ParameterSource.COMMANDLINE
    }
    if not given:
        raise click.UsageError(f"nothing to set: give --{', --'.join(options)}")
    in_session(
        url, app_name, lambda session: control.set_queue(session, name, **cast(QueueOptions, given))
    )
    _print(in_session(url, app_name, partial(_queues, only=name)))


@click.group(cls=ConfiguredGroup, context_settings=CONTEXT, invoke_without_command=True)
@of_database
@click.pass_context
def kinds(context: click.Context, url: str | None, app_name: str | None) -> None:
    """List the kinds: what waits of each, and which workers have a handler for it.

    Or pause and resume one: in force in every worker within 2 seconds.
    """
    if context.invoked_subcommand is None:
        _print(in_session(url, app_name, _kinds))


@kinds.command("pause")
@click.argument("names", nargs=-1, required=True, metavar="KIND...")
@of_database
def pause_kinds(names: tuple[str, ...], url: str | None, app_name: str | None) -> None:
    """Have no job of these kinds begin; what is running goes on."""
    _change(url, app_name, names, control.pause_kind, "paused", "was paused before")
    for name in in_session(url, app_name, partial(_unknown, by=jobs.c.kind, names=names)):
        click.echo(f"{name}: no job of this kind waits now, and no worker handles it", err=True)


@kinds.command("resume")
@click.argument("names", nargs=-1, required=True, metavar="KIND...")
@of_database
def resume_kinds(names: tuple[str, ...], url: str | None, app_name: str | None) -> None:
    """Have the jobs of these kinds begin again."""
    _change(url, app_name, names, control.resume_kind, "resumed", "was not paused")


def _change(
    url: str | None,
    app_name: str | None,
    names: tuple[str, ...],
    change: Callable[[Session, str], bool],
    done: str,
    else_: str,
) -> None:
    def work(session: Session) -> list[bool]:
        return [change(session, name) for name in names]

    for name, changed in zip(names, in_session(url, app_name, work), strict=True):
        click.echo(f"{name}: {done if changed else else_}")


def _unknown(session: Session, by: ColumnElement[str], names: Sequence[str]) -> list[str]:
    """Return those of the names that nobody knows now: they may have been meant otherwise."""
    named = {
        name
        for each in _alive(session)
        for name in (each.queues if by is jobs.c.queue else each.kinds) or ()
    }
    unfinished = jobs.c.state.in_([JobState.READY, JobState.RUNNING])
    return [
        name
        for name in names
        if name not in named
        and session.scalar(select(by).where(by == name, unfinished).limit(1), bind_arguments=TO_JOB)
        is None
    ]


# --- what there is ---------------------------------------------------------------------------------


@dataclass
class Listed:
    """A table, and what is to be said about it."""

    rows: list[list[object]]
    faults: list[str]


def _print(listed: Listed) -> None:
    click.echo(laid_out(listed.rows))
    for fault in listed.faults:
        click.echo(fault, err=True)


def _queues(session: Session, only: str | None = None) -> Listed:
    waiting = _counts(session, jobs.c.queue)
    rows = {
        row.name: row
        for row in session.execute(select(*queues_table.c), bind_arguments=TO_JOB).all()
    }
    serving = _alive(session)
    named = {name for each in serving for name in each.queues or () if patterns.is_name(name)}
    listed = Listed(
        [["QUEUE", "READY", "RUNNING", "LATER", "PAUSED", "AT ONCE", "RATE", "ORDER", "WORKERS"]],
        [],
    )
    for name in sorted({*waiting, *rows, *named}) if only is None else [only]:
        row = rows.get(name)
        holds: tuple[object, ...] = (None, None, None, "priority")
        if row is not None:
            holds = ("yes" if row.paused else None, row.concurrency, row.rate, _order(row))
            if fault := fault_of(row.strategy, row.ageing):
                listed.faults.append(f"queue {name} has {fault}; it goes by priority")
            if fault := fault_of_rate(row.rate):
                listed.faults.append(f"queue {name} has {fault}; none of its jobs begins")
        by = _listed(each.name for each in serving if patterns.serves(each.queues, name))
        listed.rows.append([name, *waiting.get(name, (0, 0, 0)), *holds, by])
    return listed


def _order(row: Any) -> str:
    if row.strategy == "priority" and row.ageing is not None:
        return f"priority, ageing {row.ageing:g} s"
    return str(row.strategy)


def _kinds(session: Session) -> Listed:
    waiting = _counts(session, jobs.c.kind)
    paused = set(
        session.scalars(
            select(kinds_table.c.name).where(kinds_table.c.paused), bind_arguments=TO_JOB
        )
    )
    serving = _alive(session)
    rows: list[list[object]] = [["KIND", "READY", "RUNNING", "LATER", "PAUSED", "WORKERS"]]
    for name in sorted(
        {*waiting, *paused, *(kind for each in serving for kind in each.kinds or ())}
    ):
        by = _listed(each.name for each in serving if name in (each.kinds or ()))
        held = "yes" if name in paused else None
        rows.append([name, *waiting.get(name, (0, 0, 0)), held, by])
    return Listed(rows, [])


def _alive(session: Session) -> Sequence[Any]:
    alive = select(*workers.c["name", "queues", "kinds"]).order_by(workers.c.name)
    return session.execute(
        alive.where(workers.c.state == WorkerState.ALIVE.value), bind_arguments=TO_JOB
    ).all()


def _listed(names: Iterable[str]) -> str | None:
    """Name the first workers, and say how many more there are."""
    first, more = (given := list(names))[:MOST_NAMED], len(given) - MOST_NAMED
    return ", ".join(first) + (f" and {more} more" if more > 0 else "") or None


def _counts(session: Session, by: ColumnElement[str]) -> dict[str, tuple[int, int, int]]:
    """Return how many jobs are due, running, and to be run later, by queue or by kind."""
    ready = jobs.c.state == literal_column("'ready'")
    running = jobs.c.state == literal_column("'running'")
    due = jobs.c.run_at <= server_now()
    counts = [
        func.count(case((condition, literal_column("1"))))
        for condition in (ready & due, running, ready & ~due)
    ]
    found = session.execute(
        select(by, *counts).where(or_(ready, running)).group_by(by), bind_arguments=TO_JOB
    )
    return {row[0]: (row[1], row[2], row[3]) for row in found}
