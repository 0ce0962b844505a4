"""Migrations in processes of their own: several at once, or one that is killed in the middle."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from click.testing import CliRunner
from sqlalchemy import URL, Engine, event

from sqlalchemy_jobs import migrations
from sqlalchemy_jobs.cli import main
from tests.environments import configure
from tests.processes import forking

PATIENCE = 100
"""Seconds after which a process is taken to hang."""


def command_line(url: URL) -> list[str]:
    return ["migrate", "--database-url", url.render_as_string(hide_password=False)]


# ------------------------------------------------------------------------------- what they do


def migrate(url: URL, folder: Path, to: int = migrations.LATEST) -> str:
    """`sajobs migrate`; return what it says."""
    result = CliRunner().invoke(main, [*command_line(url), "--to", str(to)])
    assert result.exit_code == 0, result.output
    return result.output


def migrate_to_none(url: URL, folder: Path) -> str:
    return migrate(url, folder, to=0)


def upgrade(url: URL, folder: Path) -> str:
    """`alembic upgrade head`"""
    command.upgrade(configure(Config(), folder, url), "head")
    return "upgraded"


def downgrade(url: URL, folder: Path) -> str:
    command.downgrade(configure(Config(), folder, url), "base")
    return "downgraded"


Work = Callable[[URL, Path], str]


# ------------------------------------------------------------------------------- how


def at_once(url: URL, folder: Path, *works: Work) -> list[str]:
    """Start a process for each, all at the same moment; return what they say."""
    barrier = forking.Barrier(len(works))
    with forking.Pool(len(works), _meet, [barrier]) as pool:
        started = [pool.apply_async(_together, (each, url, folder)) for each in works]
        return [each.get(PATIENCE) for each in started]


def apart(work: Callable[..., None], *arguments: Any) -> None:
    """Run it in a process of its own, in which it may change what a process has once; raise what it raises."""
    with forking.Pool(1) as pool:
        pool.apply_async(work, arguments).get(PATIENCE)


_barrier: Any = None


def _meet(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


def _together(work: Work, url: URL, folder: Path) -> str:
    _barrier.wait(PATIENCE)
    return work(url, folder)


def killed_after_one_step(work: Work, url: URL, folder: Path) -> bool:
    """Do it in a process that SIGKILLs itself before its second statement that changes a table.

    Return whether it came to that; else the work was done.
    """
    process = forking.Process(target=_die, args=(work, url, folder))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def _die(work: Work, url: URL, folder: Path) -> None:
    count = 0

    @event.listens_for(Engine, "before_cursor_execute")
    def _(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        nonlocal count
        here = connection.engine.url.database == url.database
        if here and statement.split()[0] in ("CREATE", "DROP") and "sajobs_" in statement:
            count += 1
            if count == 2:
                os.kill(os.getpid(), signal.SIGKILL)

    work(url, folder)
