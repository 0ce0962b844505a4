"""What a worker can be told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import TypedDict, cast

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from sqlalchemy_jobs.errors import ConfigurationError
from sqlalchemy_jobs.worker.pools import Pools, is_count


class Options(TypedDict, total=False):
    """The keyword arguments of ``Worker`` and ``JobApp.worker``: the fields of ``Settings``."""

    queues: Sequence[str] | Mapping[str, int | None]
    concurrency: int | None
    poll_interval: timedelta
    lease: timedelta
    shutdown_timeout: timedelta | None
    keep: timedelta | None
    keep_failed: timedelta | None
    drain: bool
    listen: bool
    listen_url: str | URL | None


@dataclass(frozen=True)
class Settings:
    """The settings of one worker.

    Raises: ConfigurationError.
    """

    queues: Sequence[str] | Mapping[str, int | None] = ()
    """Which queues to serve; empty: all. Each item is a pool: a queue, or several that share a concurrency, as
    ``"mail"``, ``"default,bulk.*"``, ``"critical>default"`` or ``"*,!bulk"``. A mapping says how many runs each
    may have at once; None: as many as there are."""
    concurrency: int | None = None
    """How many runs at once, in this process. None: the sum of the pools' own when each has one,
    else 10, on SQLite 1 (it has one write lock)."""
    poll_interval: timedelta = timedelta(seconds=1)
    """How long an idle worker waits at most before it looks again, where it is not told of new jobs."""
    lease: timedelta = timedelta(seconds=30)
    """For how long the worker is believed alive without renewing; renewed every sixth of it, at
    least every 2 s, or 5 s while there is no other worker. A dead worker's jobs are brought back when it has
    passed: at the next look of another worker, every 2 s; a worker that has just started waits a third of its
    lease before it judges others. On PostgreSQL, MariaDB and MySQL, unless behind a pooler, the server
    tells of a death within 3 s."""
    shutdown_timeout: timedelta | None = None
    """How long runs may go on once the worker is told to stop; then they are released. None: 30 s,
    inside an application 5 s (so that a reload does not hang)."""
    keep: timedelta | None = timedelta(days=1)
    """How long the rows of jobs that succeeded or were cancelled are kept at least, for kinds whose ``@job``
    does not say it. None: for ever."""
    keep_failed: timedelta | None = timedelta(days=14)
    """The same for jobs that failed."""
    drain: bool = False
    """Stop by itself when no job is due and none is running, here or in another worker."""
    listen: bool = True
    """Whether to be told of new jobs, on PostgreSQL. An idle worker that is told looks by itself every 15 s only,
    or every ``poll_interval`` if that is longer, but each minute; one that is not told every ``poll_interval``."""
    listen_url: str | URL | None = field(default=None, repr=False)
    """How to connect for that, and for the lock beside the lease, when the engine leads through a pooler. The same
    database of the same server. None: as the engine does."""

    def __post_init__(self) -> None:
        if isinstance(self.queues, str):
            raise ConfigurationError(
                f"queues={self.queues!r} is one string: write [{self.queues!r}]"
            )
        _ = self.pools  # refuses what is wrong with it
        if self.concurrency is not None and not is_count(self.concurrency):
            raise ConfigurationError(f"concurrency={self.concurrency!r}: wanted 1 or more")
        if self.listen_url is not None:
            _check_url(self.listen_url)
        _check_duration("poll_interval", self.poll_interval, "more than zero", timedelta(0), False)
        _check_duration("lease", self.lease, "one second or more", timedelta(seconds=1))
        for name in ("shutdown_timeout", "keep", "keep_failed"):
            if (value := getattr(self, name)) is not None:
                _check_duration(name, value, "zero or more", timedelta(0))

    @cached_property
    def pools(self) -> Pools:
        """The queues to serve."""
        given = self.queues
        return Pools(given if isinstance(given, Mapping) else dict.fromkeys(given))

    def total(self, default: int) -> int:
        """Return how many runs at once, given the database's default."""
        if self.concurrency is not None:
            return self.concurrency
        own = [most for most in self.pools.concurrency.values() if most is not None]
        return sum(own) if len(own) == len(self.pools.concurrency) else default


def _check_url(url: object) -> None:
    try:
        make_url(cast("str | URL", url)).get_dialect()
    except (ArgumentError, NoSuchModuleError, ImportError) as error:
        # The URL itself may hold a password.
        raise ConfigurationError(
            f"listen_url: {type(error).__name__}: wanted an SQLAlchemy URL"
        ) from None


def _check_duration(
    name: str, value: object, wanted: str, least: timedelta, itself: bool = True
) -> None:
    if not isinstance(value, timedelta):
        raise ConfigurationError(f"{name}={value!r}: wanted a timedelta of {wanted}")
    if value < least or (value == least and not itself):
        raise ConfigurationError(f"{name}={value}: wanted {wanted}")
