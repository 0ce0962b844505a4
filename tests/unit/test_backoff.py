"""Backoff policies: how long each of them waits."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from sqlalchemy_jobs import backoff

SECOND, HOUR = timedelta(seconds=1), timedelta(hours=1)


def waits(policy: Callable[[int], timedelta], *failures: int) -> list[float]:
    return [policy(each).total_seconds() for each in failures]


def test_exponential_grows_by_its_factor_up_to_its_cap() -> None:
    policy = backoff.exponential(3 * SECOND, factor=2, cap=HOUR, jitter=0)
    assert waits(policy, 1, 2, 3, 4, 20, 10_000) == [3, 6, 12, 24, 3600, 3600]


def test_fixed_is_always_the_same() -> None:
    assert waits(backoff.fixed(5 * SECOND), 1, 2, 1000) == [5, 5, 5]


def test_listed_stays_at_its_last() -> None:
    assert waits(backoff.listed(SECOND, 10 * SECOND, HOUR), 1, 2, 3, 4, 99) == [
        1,
        10,
        3600,
        3600,
        3600,
    ]


def test_jitter_is_a_share_in_both_directions() -> None:
    found = {backoff.fixed(100 * SECOND, jitter=0.5)(1).total_seconds() for _ in range(200)}
    assert 50 <= min(found) < 75 and 125 < max(found) <= 150


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: backoff.exponential(3), "is not a timedelta"),  # type: ignore[arg-type]
        (lambda: backoff.exponential(SECOND, factor=0.5), "factor=0.5: wanted 1 or more"),
        (lambda: backoff.fixed(SECOND, jitter=2), "jitter=2: wanted a share from 0 to 1"),
        (lambda: backoff.fixed(-SECOND), "negative"),
        (lambda: backoff.listed(), "give it at least one"),
        (lambda: backoff.listed(SECOND, 5), "is not a timedelta"),  # type: ignore[arg-type]
    ],
)
def test_a_policy_that_makes_no_sense_is_refused_when_it_is_made(
    make: Callable[[], Any], said: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        make()


def test_a_policy_by_error_is_given_the_exception() -> None:
    error = OSError()
    seen: list[tuple[object, ...]] = []

    def of_both(failures: int, error: BaseException) -> timedelta:
        seen.append((failures, error))
        return SECOND

    assert backoff.wait(backoff.ByError(of_both), 3, error) == SECOND
    assert backoff.wait(lambda failures: failures * SECOND, 3, error) == 3 * SECOND
    assert seen == [(3, error)]
