"""Which jobs stand for one another, and the key that says so."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal, TypeAlias, get_args

from sqlalchemy_jobs.errors import DeclarationError
from sqlalchemy_jobs.states import FINAL, UNFINISHED, JobState

OnConflict: TypeAlias = Literal["keep", "replace", "raise"]

SHORTEST_PERIOD = timedelta(seconds=1)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, kw_only=True)
class Unique:
    """Say in ``@job(unique=...)`` which jobs of the class stand for one another: only one of them is kept.

    Two jobs do when ``fields`` have the same values in both (none given: when all fields have). A job keeps
    others out while it is in one of ``states``: by default until it is final. With a ``period`` there is at
    most one job in each window of that length, counted from 1970 in UTC by the clock of the
    enqueuing process; then the states are all by default.

    ``on_conflict`` tells what becomes of a later job: "keep" leaves it out; "replace" does so too, and gives
    its payload and run_at to the first if that is still ready; "raise" raises DuplicateJob at the flush.

    Raises: DeclarationError.
    """

    fields: Sequence[str] = ()
    period: timedelta | None = None
    states: Collection[JobState] | None = None
    on_conflict: OnConflict = "keep"

    def __post_init__(self) -> None:
        if isinstance(self.fields, str):
            raise DeclarationError(
                f"fields={self.fields!r} is one string: write fields=[{self.fields!r}]"
            )
        if self.period is not None and not (
            isinstance(self.period, timedelta) and self.period >= SHORTEST_PERIOD
        ):
            raise DeclarationError(
                f"period={self.period!r}: wanted a timedelta of one second or more"
            )
        if self.on_conflict not in get_args(OnConflict):
            raise DeclarationError(
                f"on_conflict={self.on_conflict!r}: wanted one of {', '.join(get_args(OnConflict))}"
            )
        if self.states is not None:
            self._check_states(self.states)

    @staticmethod
    def _check_states(states: Collection[JobState]) -> None:
        if isinstance(states, str) or not set(states) <= set(JobState):
            raise DeclarationError(f"states={states!r}: wanted several of JobState")
        needed = {JobState.READY} | ({JobState.RUNNING} if set(states) & set(FINAL) else set())
        if missing := needed - set(states):
            raise DeclarationError(
                f"states={states!r} is without {missing.pop().value}: a job that has ceased to keep others "
                "out does not begin again, so name every state from ready on"
            )

    @property
    def mask(self) -> int:
        """The states as ``Job.unique_states`` holds them. A blocked job counts as a ready one."""
        states = self.states
        if states is None:
            states = UNFINISHED if self.period is None else tuple(JobState)
        return sum(state.bit for state in {*states, JobState.BLOCKED})

    def holds_in(self, state: JobState) -> bool:
        """Tell whether a job keeps others out in a state."""
        return bool(self.mask & state.bit)

    def key(self, kind: str, subject: str, now: datetime) -> str:
        """Return the key of a job: no kind has a slash in it, so those of two kinds differ."""
        window = "" if self.period is None else f"/{(now - _EPOCH) // self.period}"
        return f"{kind}/{subject}{window}"


BY_KEY = Unique()
"""What holds for a job that has a key by ``enqueue(..., unique_key=...)`` alone."""
