"""What a handler can say besides returning a result.

Return commits, raise rolls back: ``Snooze`` and ``Cancel`` are returned and keep what the handler
wrote, ``Retry`` and ``Fail`` are raised and discard it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

LONGEST_DELAY = timedelta(days=36500)
"""More would not fit into every database's calendar."""


def checked_delay(delay: object, name: str) -> timedelta:
    """Refuse anything that is not a timedelta of zero or more, up to a hundred years.

    Raises: TypeError, ValueError.
    """
    if not isinstance(delay, timedelta):
        hint = f": say timedelta(seconds={delay})" if isinstance(delay, (int, float)) else ""
        raise TypeError(f"{name}={delay!r} ({type(delay).__name__}) is not a timedelta{hint}")
    if delay < timedelta(0):
        raise ValueError(f"{name}={delay!r} is negative: the past cannot be waited for")
    if delay > LONGEST_DELAY:
        raise ValueError(f"{name}={delay!r} is more than a hundred years")
    return delay


@dataclass(frozen=True)
class Snooze:
    """Return it to run the job again after ``delay``, keeping what the handler wrote.

    Use it when the world is not ready yet. It is no failure: it does not count towards
    ``max_attempts`` and does not stretch the backoff. Commits in the run's own transaction.
    """

    delay: timedelta

    def __post_init__(self) -> None:
        checked_delay(self.delay, "Snooze(delay)")


@dataclass(frozen=True)
class Cancel:
    """Return it to call the job off for good, keeping what the handler wrote.

    Use it when the job has become pointless. Commits in the run's own transaction; the reason is
    kept in the job's ``Attempt`` row.
    """

    reason: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.reason, str):
            raise TypeError(f"Cancel({self.reason!r}): the reason is a string")


class Retry(Exception):
    """Raise it to roll back and run the job again after ``delay``.

    It counts as a failure. Without ``delay`` the job's backoff decides. ``raise Retry() from
    error`` keeps the cause in the attempt's traceback.
    """

    def __init__(self, delay: timedelta | None = None) -> None:
        self.delay = None if delay is None else checked_delay(delay, "Retry(delay)")
        super().__init__("retry" if delay is None else f"retry in {delay}")


class Fail(Exception):
    """Raise it to roll back and fail the job at once, whatever attempts are left."""

    def __init__(self, reason: str) -> None:
        if not isinstance(reason, str):
            raise TypeError(f"Fail({reason!r}): the reason is a string")
        self.reason = reason
        super().__init__(reason)
