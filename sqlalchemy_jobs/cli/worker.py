"""``sajobs worker``."""

from __future__ import annotations

import gc
import logging
import signal
from collections.abc import Iterable
from datetime import timedelta
from itertools import chain
from typing import Any

import click

from sqlalchemy_jobs.cli.config import ARGUMENTS, CONTEXT, Configured, Refused
from sqlalchemy_jobs.cli.loading import importing, load_app
from sqlalchemy_jobs.errors import ConfigurationError


def pools(value: str) -> list[tuple[str, int | None]]:
    """Read ``QUEUES`` or ``QUEUES=N``, or several of them with ``;`` between."""
    found: list[tuple[str, int | None]] = []
    for each in value.split(";"):
        queues, equals, most = each.partition("=")
        if equals and (not most.isdecimal() or int(most) < 1):
            raise click.BadParameter(f"{each}: wanted NAME=N with N 1 or more, for example mail=2")
        found.append((queues, int(most) if equals else None))
    return found


def _once(given: Iterable[tuple[str, int | None]]) -> dict[str, int | None]:
    """Return the pools with the concurrency of each.

    Raises: ConfigurationError when one is given twice.
    """
    pools: dict[str, int | None] = {}
    for queues, most in given:
        if queues in pools:
            raise ConfigurationError(f"--queue: {queues!r} is named twice")
        pools[queues] = most
    return pools


def days(value: str) -> timedelta | None:
    """Read a number of days, or ``off``."""
    if value == "off":
        return None
    try:
        return timedelta(days=float(value))
    except (ValueError, OverflowError):
        raise click.BadParameter(
            f"{value}: wanted a number of days, for example 0.5, or off"
        ) from None


def one_line(record: logging.LogRecord) -> bool:
    """Have SQLAlchemy's pool tell of a broken connection in one line, as the worker does.

    A rollback on the way back to the pool may be the first to notice; the pool logs its traceback and goes on.
    """
    from sqlalchemy_jobs.worker.availability import brief

    error = record.exc_info[1] if record.exc_info else None
    if record.name.startswith("sqlalchemy.pool") and isinstance(error, Exception):
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        record.msg, record.args = "a connection was lost: %s", (brief(error),)
        record.exc_info = record.exc_text = None
    return True


def seconds(minimum: float, *, open_: bool = False) -> dict[str, Any]:
    """An option that takes seconds and passes a timedelta on."""
    return {
        "type": click.FloatRange(min=minimum, min_open=open_),
        "callback": lambda context, parameter, value: timedelta(seconds=value),
        "metavar": "S",
        "show_default": True,
    }


@click.command(cls=Configured, context_settings=CONTEXT)
@click.option(
    "--app",
    "name",
    required=True,
    envvar="SAJOBS_APP",
    metavar="MODULE:NAME",
    help="Where the JobApp is, for example shop.jobs:jobs.",
)
@importing
@click.option(
    "--queue",
    "queues",
    multiple=True,
    type=pools,
    envvar="SAJOBS_QUEUE",
    metavar="QUEUES[=N]",
    help="A queue to serve, or several with commas between, with at most N runs at once; * stands for the rest of a "
    "name. May be repeated, also as 'mail=2;default,bulk=8'; without it all queues are served.",
)
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    envvar="SAJOBS_CONCURRENCY",
    metavar="N",
    help="How many runs at once in each process. Default: the sum of the pools' N when each has one, else 10; 1 on SQLite.",
)
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    envvar="SAJOBS_PROCESSES",
    metavar="N",
    help="How many processes, which are started again when they die. Each has all of the --concurrency and of the "
    "pools' N, and connections of its own.",
)
@click.option(
    "--poll-interval",
    default=1.0,
    envvar="SAJOBS_POLL_INTERVAL",
    help="How many seconds an idle worker waits at most, where it is not told of new jobs.",
    **seconds(0, open_=True),
)
@click.option(
    "--listen/--no-listen",
    default=True,
    envvar="SAJOBS_LISTEN",
    help="Whether to be told of new jobs by PostgreSQL's LISTEN.",
)
@click.option(
    "--listen-url",
    envvar="SAJOBS_LISTEN_URL",
    metavar="URL",
    help="How to connect for that, and for the lock beside the lease, where the app connects through a pooler.",
)
@click.option(
    "--lease",
    default=30.0,
    envvar="SAJOBS_LEASE",
    help="For how many seconds the worker is believed alive without renewing; then its jobs are brought back.",
    **seconds(1),
)
@click.option(
    "--shutdown-timeout",
    default=30.0,
    envvar="SAJOBS_SHUTDOWN_TIMEOUT",
    help="How many seconds runs may go on once the worker is told to stop; then they are released.",
    **seconds(0),
)
@click.option(
    "--keep",
    default="1",
    type=days,
    envvar="SAJOBS_KEEP",
    metavar="DAYS",
    show_default=True,
    help="How many days jobs that succeeded or were cancelled are kept, unless their @job says it; off: for ever.",
)
@click.option(
    "--keep-failed",
    default="14",
    type=days,
    envvar="SAJOBS_KEEP_FAILED",
    metavar="DAYS",
    show_default=True,
    help="The same for jobs that failed.",
)
@click.option(
    "--drain",
    is_flag=True,
    envvar="SAJOBS_DRAIN",
    help="Stop when no job is due and none is running, here or in another worker.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    envvar="SAJOBS_LOG_LEVEL",
)
@click.pass_context
def worker(
    context: click.Context,
    name: str,
    modules: tuple[str, ...],
    queues: tuple[list[tuple[str, int | None]], ...],
    concurrency: int | None,
    processes: int,
    poll_interval: timedelta,
    listen: bool,
    listen_url: str | None,
    lease: timedelta,
    shutdown_timeout: timedelta,
    keep: timedelta | None,
    keep_failed: timedelta | None,
    drain: bool,
    log_level: str,
) -> None:
    """Run jobs until told to stop.

    The first SIGINT or SIGTERM: claim nothing more and let the runs finish. The second: release them at
    once. Exit status: 0 when every run came to its end, 1 when some were released, 2 when the worker
    cannot start like this.
    """
    from sqlalchemy_jobs.worker import Worker  # after the options are parsed: --help is quick
    from sqlalchemy_jobs.worker.supervisor import Line, supervise

    process = "%(process)d " if processes > 1 else ""
    logging.basicConfig(
        level=log_level.upper(),
        format=f"%(asctime)s %(levelname)-7s {process}%(message)s",
        datefmt="%H:%M:%S",
    )
    for handler in logging.getLogger().handlers:
        handler.addFilter(one_line)
    line = Line.of_this_process()
    if processes > 1 and line is None:
        raise SystemExit(supervise(context.meta[ARGUMENTS], processes, drain=drain))
    try:
        made = Worker(
            load_app(name, modules),
            queues=_once(chain.from_iterable(queues)),
            concurrency=concurrency,
            poll_interval=poll_interval,
            listen=listen,
            listen_url=listen_url,
            lease=lease,
            shutdown_timeout=shutdown_timeout,
            keep=keep,
            keep_failed=keep_failed,
            drain=drain,
        )
        # What is loaded stays: the garbage collector need not look through all of it again and again.
        gc.collect()
        gc.freeze()
        if line is None:
            for each in (signal.SIGINT, signal.SIGTERM):
                signal.signal(each, lambda number, frame: made.stop())
            every_run_ended = made.run()
        else:
            line.heed(made.stop)
            every_run_ended = made._run(line.begun)
    except ConfigurationError as error:
        raise Refused(error) from error
    raise SystemExit(0 if every_run_ended else 1)
