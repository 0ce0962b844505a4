"""How many connections a worker says that it holds at most."""

from typing import Any

import pytest
from sqlalchemy import NullPool, create_engine
from sqlalchemy.ext.asyncio import create_async_engine

from sqlalchemy_jobs import dialects
from sqlalchemy_jobs.app import Handler
from sqlalchemy_jobs.worker.connections import most

POSTGRESQL = "postgresql+psycopg://nobody@nowhere.invalid/nothing"


def handler(*, is_async: bool) -> Handler:
    def function(session: Any, payload: Any) -> None: ...

    async def async_function(session: Any, payload: Any) -> None: ...

    unused: Any = None
    return Handler(async_function if is_async else function, int, unused, "wrapped")


SYNC, ASYNC = handler(is_async=False), handler(is_async=True)


@pytest.mark.parametrize(
    ("options", "total", "said"),
    [
        ({}, 10, "15 + 10 = 25"),
        ({}, 2, "3 + 10 = 13"),  # one more than the runs, for one may hang
        ({}, 40, "15 + 10 = 25"),
        ({"pool_size": 2, "max_overflow": 1}, 10, "3 + 6 = 9"),
        ({"pool_size": 5, "max_overflow": -1}, 40, "60 + 10 = 70"),
        ({"pool_size": 0}, 40, "60 + 10 = 70"),
        ({"poolclass": NullPool}, 40, "60 + 10 = 70"),
    ],
)
def test_the_pool_bounds_the_handlers_and_the_workers_own(
    options: dict[str, Any], total: int, said: str
) -> None:
    found = most(
        [SYNC], create_engine(POSTGRESQL, **options), None, total, dialects.named("postgresql")
    )
    assert found.told() == f"connections: {said} at most (of the handlers + the worker's own)"


def test_each_colour_counts_that_has_handlers() -> None:
    engines = create_engine(POSTGRESQL), create_async_engine(POSTGRESQL)
    postgresql = dialects.named("postgresql")
    assert most([SYNC, ASYNC], *engines, 10, postgresql) == (30, 10)
    assert most([SYNC], *engines, 10, postgresql) == (16, 10)
    assert most([ASYNC], None, engines[1], 10, postgresql) == (15, 10)


def test_without_a_lock_there_is_one_less_and_processes_multiply_the_sum() -> None:
    found = most([SYNC], create_engine("sqlite:///nothing"), None, 1, dialects.named("sqlite"))
    assert found.told(3).startswith("connections: 3 x (2 + 8) = 30 at most")
