"""Threads of the worker: one that does the same thing again and again, one that runs an event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from sqlalchemy_jobs.worker.availability import is_lost

log = logging.getLogger("sqlalchemy_jobs")

T = TypeVar("T")

SHORTEST_PAUSE = 0.1
LONGEST_PAUSE = 5.0
LONGEST_WAIT = 3600.0
LAST_STEP = 10.0
"""Seconds that a loop is given to end its present step; it may hang in a dead connection."""


class Loop:
    """Calls ``step`` in a thread of its own until it is stopped.

    ``step`` returns how many seconds to wait before the next call (None: until ``wake``). After an error it
    is called again with growing pauses, 0.1 to 5 s; that the database is away is told elsewhere, once.
    """

    def __init__(self, name: str, step: Callable[[], float | None]) -> None:
        self._step = step
        self._woken = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=f"sajobs-{name}", daemon=True)

    def start(self) -> None:
        """Start, if it was not started before."""
        if self._thread.ident is None:
            self._thread.start()

    def wake(self) -> None:
        """Cut the present wait short, or skip the next one."""
        if (
            not self._woken.is_set()
        ):  # setting it costs more than the rest of what wakes for each job
            self._woken.set()

    def stop(self, within: float = LAST_STEP) -> None:
        """End after the present step, and wait for that, but not for ever."""
        self._stopped = True
        self._woken.set()
        if self._thread.is_alive():
            self._thread.join(within)

    def _run(self) -> None:
        pause = 0.0
        while not self._stopped:
            self._woken.clear()
            try:
                wait = self._step()
                pause = 0.0
            except Exception as error:
                if not is_lost(error):
                    log.exception("%s: trying again", threading.current_thread().name)
                pause = wait = min(max(pause * 2, SHORTEST_PAUSE), LONGEST_PAUSE)
            if not self._stopped and wait != 0.0:
                self._woken.wait(None if wait is None else min(wait, LONGEST_WAIT))


def stop_together(*loops: Loop) -> None:
    """Stop loops at the same time: one that hangs does not add to the wait for another."""
    for loop in loops:
        loop.stop(within=0)
    end = time.monotonic() + LAST_STEP
    for loop in loops:
        loop.stop(within=max(end - time.monotonic(), 0))


class LoopThread:
    """An event loop in a thread of its own."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._is_ending = False
        self._thread = threading.Thread(target=self._run, name=f"sajobs-{name}", daemon=True)
        self._thread.start()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and wait for it, from another thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def close(self, last: Coroutine[Any, Any, object]) -> None:
        """Run a last coroutine and stop the loop; wait for that, but not for ever.

        The loop may be blocked by a handler, or a connection be dead.
        """
        ending = asyncio.run_coroutine_threadsafe(last, self.loop)
        ending.add_done_callback(lambda _: self.loop.call_soon_threadsafe(self._end))
        self._thread.join(LAST_STEP)

    def _end(self) -> None:
        self._is_ending = True
        self.loop.stop()

    def _run(self) -> None:
        try:
            while not self._is_ending:
                try:
                    self.loop.run_forever()
                except (KeyboardInterrupt, SystemExit):
                    # asyncio lets these out of any task, one that a handler has made among them.
                    log.exception("%s: going on", self._thread.name)
            self.loop.run_until_complete(self._cancel_all())
        finally:
            self.loop.close()

    @staticmethod
    async def _cancel_all() -> None:
        """End the calls in flight: whoever waits for one must not wait for ever."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
