"""Waiting for what another thread, process or server does."""

import time
from collections.abc import Callable
from typing import Any


def until(condition: Callable[[], Any], timeout: float = 30) -> None:
    """Return when the condition is true, which is asked a hundred times a second."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)
