"""``sajobs``: the command line."""

from __future__ import annotations

import click

from sqlalchemy_jobs.cli.config import CONTEXT
from sqlalchemy_jobs.cli.migrations import migrate, migration
from sqlalchemy_jobs.cli.queues import kinds, queues
from sqlalchemy_jobs.cli.schedules import schedules
from sqlalchemy_jobs.cli.worker import worker


@click.group(context_settings=CONTEXT)
@click.version_option(package_name="sqlalchemy-jobs", prog_name="sajobs")
def main() -> None:
    """Jobs that commit with your data: a transactional outbox for SQLAlchemy.

    Options come from the command line, then from environment variables, then from [tool.sajobs] in the
    pyproject.toml of this folder or the nearest above it.
    """


for command in (worker, queues, kinds, schedules, migrate, migration):
    main.add_command(command)
