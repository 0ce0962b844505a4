"""How long a job waits after a failure.

A policy is a function of the number of failures so far (1 after the first); ``ByError`` makes one of a function
that is given the exception, too. Give it to ``@job(backoff=...)``; it is read from the class when a run has
failed. A handler may also call one itself: ``raise Retry(policy(current_run().failures + 1))``.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeAlias

from sqlalchemy_jobs.outcomes import checked_delay

Failures: TypeAlias = Callable[[int], timedelta]


@dataclass(frozen=True)
class ByError:
    """A policy that looks at the exception with which the run ended: ``policy(failures, error)``."""

    policy: Callable[[int, BaseException], timedelta]


Backoff: TypeAlias = Failures | ByError
"""What ``@job(backoff=...)`` takes."""

LONGEST = timedelta(hours=24)


def quartic(failures: int) -> timedelta:
    """Return ``failures ** 4`` seconds, ten per cent more or less, at most 24 hours.

    The default: 1 s, 16 s, 81 s, 4 min, 10 min ..., the twentieth failure about six days after the
    first. It grows with failures, not with attempts: a job that is snoozed or released often does
    not wait longer for it. The jitter keeps jobs that failed together from returning together.

    Source: River's and Redwood's default retry policies.
    """
    seconds = min(float(failures) ** 4, LONGEST.total_seconds())
    return _jittered(seconds, 0.1)


def exponential(
    base: timedelta = timedelta(seconds=1),
    *,
    factor: float = 2.0,
    cap: timedelta = LONGEST,
    jitter: float = 0.1,
) -> Failures:
    """Wait ``base`` after the first failure and ``factor`` times longer after each further one, at most ``cap``.

    ``jitter`` is the share by which a wait may be shorter or longer: 0.1 is ten per cent.

    Raises: TypeError, ValueError.
    """
    checked_delay(base, "base")
    most = checked_delay(cap, "cap").total_seconds()
    if factor < 1:
        raise ValueError(f"factor={factor!r}: wanted 1 or more, or the waits would become shorter")
    _check_jitter(jitter)

    def policy(failures: int) -> timedelta:
        try:
            seconds = base.total_seconds() * factor ** (failures - 1)
        except OverflowError:
            seconds = most
        return _jittered(min(seconds, most), jitter)

    return policy


def fixed(delay: timedelta, *, jitter: float = 0.0) -> Failures:
    """Wait ``delay`` after every failure; ``jitter`` as in ``exponential``.

    Raises: TypeError, ValueError.
    """
    return exponential(delay, factor=1, cap=delay, jitter=jitter)


def listed(*delays: timedelta) -> Failures:
    """Wait the first delay after the first failure, the second after the second, then always the last.

    Raises: TypeError, ValueError.
    """
    if not delays:
        raise ValueError("listed() has no delays: give it at least one")
    for delay in delays:
        checked_delay(delay, "delay")
    return lambda failures: delays[min(failures, len(delays)) - 1]


def wait(policy: Backoff, failures: int, error: BaseException) -> timedelta:
    """Return what a policy says. For the worker."""
    if isinstance(policy, ByError):
        return policy.policy(failures, error)
    return policy(failures)


def _jittered(seconds: float, jitter: float) -> timedelta:
    return timedelta(seconds=seconds * random.uniform(1 - jitter, 1 + jitter))


def _check_jitter(jitter: float) -> None:
    if not 0 <= jitter <= 1:
        raise ValueError(f"jitter={jitter!r}: wanted a share from 0 to 1, for example 0.1")
