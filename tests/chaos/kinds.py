"""The payloads. A kind without a word of its own writes an Effect and succeeds, sooner or later."""

import random
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy_jobs import Limit, Unique, job
from sqlalchemy_jobs.payloads import declaration_of

SNOOZES = 2
"""How often a Sleepy job is put off."""
PARTS = 4
"""In how many commits a Parts job does its work, before the one that ends it."""
KEPT = timedelta(seconds=1)
"""For how long the row of a Brief job is kept."""
FEW = 3
"""max_attempts of what fails in the end."""
ENDLESS = 30_000
"""max_attempts of what shall succeed in the end, however often its worker is killed."""


def soon(failures: int) -> timedelta:
    return timedelta(milliseconds=100)


@job("write", max_attempts=ENDLESS, backoff=soon)
@dataclass(frozen=True)
class Write:
    n: int


@job("write_async", max_attempts=ENDLESS, backoff=soon)
@dataclass(frozen=True)
class WriteAsync:
    n: int


@job("follow", max_attempts=ENDLESS, backoff=soon)
@dataclass(frozen=True)
class Follow:
    """Enqueues a Write, in its own transaction."""

    n: int


@job("sleepy", max_attempts=ENDLESS, backoff=soon)
@dataclass(frozen=True)
class Sleepy:
    n: int


@job("flaky", max_attempts=ENDLESS, backoff=soon)
@dataclass(frozen=True)
class Flaky:
    """Writes, and raises in most of its runs."""

    n: int


@job("doomed", max_attempts=FEW, backoff=soon)
@dataclass(frozen=True)
class Doomed:
    """Writes, and always raises."""

    n: int


@job("resigned", max_attempts=ENDLESS, backoff=soon)
@dataclass(frozen=True)
class Resigned:
    """Writes, and cancels itself."""

    n: int


@job("nothing", max_attempts=ENDLESS, backoff=soon)
@dataclass(frozen=True)
class Nothing:
    """Does not touch its session: it is completed together with others."""

    n: int


# --- long ones --------------------------------------------------------------------------------------


@job("long", max_attempts=ENDLESS, backoff=soon)
@dataclass(frozen=True)
class Long:
    seconds: float


@job("long_async", max_attempts=ENDLESS, backoff=soon)
@dataclass(frozen=True)
class LongAsync:
    seconds: float


@job("patient", max_attempts=ENDLESS, backoff=soon)
@dataclass(frozen=True)
class Patient:
    """Is cancelled while it runs, now and then; does not give in, and writes."""

    seconds: float


@job("patient_async", max_attempts=ENDLESS, backoff=soon)
@dataclass(frozen=True)
class PatientAsync:
    seconds: float


@job("parts", max_attempts=ENDLESS, backoff=soon)
@dataclass(frozen=True)
class Parts:
    """Commits several times before its end: ``transaction="manual"``."""

    n: int


@job("overdue", max_attempts=2, backoff=soon, timeout=timedelta(seconds=0.3))
@dataclass(frozen=True)
class Overdue:
    """Writes, and takes longer than it may; it does not look whether it should stop."""

    n: int


@job("overdue_async", max_attempts=2, backoff=soon, timeout=timedelta(seconds=0.3))
@dataclass(frozen=True)
class OverdueAsync:
    n: int


# --- crashes ----------------------------------------------------------------------------------------


@job("once", max_attempts=ENDLESS, backoff=soon, on_crash="fail")
@dataclass(frozen=True)
class Once:
    """Is not run again after a crash."""

    seconds: float


@job("neighbour", max_attempts=FEW, backoff=soon)
@dataclass(frozen=True)
class Neighbour:
    """Would fail if its worker were killed by others again and again."""

    seconds: float


@job("poison", max_attempts=FEW, backoff=soon)
@dataclass(frozen=True)
class Poison:
    """Kills its own worker, in so many of its runs."""

    kills: int


# --- rows that do not stay --------------------------------------------------------------------------


@job("vanishing", max_attempts=ENDLESS, backoff=soon, keep=timedelta(0))
@dataclass(frozen=True)
class Vanishing:
    n: int


@job("blank", max_attempts=ENDLESS, backoff=soon, keep=timedelta(0))
@dataclass(frozen=True)
class Blank:
    """Does not touch its session: it is deleted together with others."""

    n: int


@job("brief", max_attempts=ENDLESS, backoff=soon, keep=KEPT)
@dataclass(frozen=True)
class Brief:
    """Writes, and refers to its own job."""

    n: int


NOT_KEPT = ("vanishing", "blank", "brief")

# --- one for each key -------------------------------------------------------------------------------


@job("only", max_attempts=ENDLESS, backoff=soon, unique=Unique())
@dataclass(frozen=True)
class Only:
    """A second one is left out while the first is unfinished."""

    n: int


@job(
    "latest",
    max_attempts=ENDLESS,
    backoff=soon,
    unique=Unique(fields=("n",), on_conflict="replace"),
)
@dataclass(frozen=True)
class Latest:
    """A second one takes the place of the first; writes which transaction it came from."""

    n: int
    intent_id: str


@job("sole", max_attempts=ENDLESS, backoff=soon, unique=Unique(on_conflict="raise"))
@dataclass(frozen=True)
class Sole:
    """A second one is refused."""

    n: int


@job("windowed", max_attempts=ENDLESS, backoff=soon, unique=Unique(period=timedelta(seconds=2)))
@dataclass(frozen=True)
class Windowed:
    """One in two seconds."""

    n: int


UNIQUE = (Only, Latest, Sole, Windowed)

# --- so many at once, so fast, in order -------------------------------------------------------------

NARROW = "narrow"
"""A queue that has limits itself."""
NARROW_AT_ONCE = 2
"""How many of its jobs may run at once, until an operator says otherwise."""
NARROW_RATE = "30/5s"
ASIDE = "aside"
"""A queue that is paused now and then."""
KEYS = 2
"""How many values each limit with a key is met with; of ``Ordered`` for each thread that enqueues."""


@job("pair", max_attempts=ENDLESS, backoff=soon, limit=Limit(concurrency=2))
@dataclass(frozen=True)
class Pair:
    seconds: float


@job("single", max_attempts=ENDLESS, backoff=soon, limit=Limit(concurrency=1, key="of"))
@dataclass(frozen=True)
class Single:
    of: int
    seconds: float


@job("paced", max_attempts=ENDLESS, backoff=soon, limit=Limit(rate="6/2s"))
@dataclass(frozen=True)
class Paced:
    seconds: float


@job("both", max_attempts=ENDLESS, backoff=soon, limit=Limit(concurrency=2, rate="3/2s", key="of"))
@dataclass(frozen=True)
class Both:
    of: int
    seconds: float


@job("ordered", max_attempts=ENDLESS, backoff=soon, limit=Limit(key="of", ordered=True))
@dataclass(frozen=True)
class Ordered:
    """Raises, is snoozed, asks for a retry or fails in its first run, according to ``n``."""

    of: int
    n: int


@job("short", max_attempts=ENDLESS, backoff=soon)
@dataclass(frozen=True)
class Short:
    seconds: float


LIMITS: dict[str, Limit] = {
    declaration.kind: declaration.limit
    for declaration in map(declaration_of, (Pair, Single, Paced, Both, Ordered))
    if declaration.limit is not None
}


def limited_payload(random: random.Random, thread: int) -> object:
    """A payload of a kind that has a limit; an ordered one of a key that only this thread enqueues for."""
    of, seconds = random.randrange(KEYS), round(random.uniform(0.05, 1), 2)
    match random.randrange(5):
        case 0:
            return Pair(seconds)
        case 1:
            return Single(of, seconds)
        case 2:
            return Paced(seconds)
        case 3:
            return Both(of, seconds)
        case _:
            return Ordered(thread * KEYS + of, random.randrange(8))


# --- of schedules -----------------------------------------------------------------------------------


@job("tick", max_attempts=ENDLESS, backoff=soon)
@dataclass(frozen=True)
class Tick:
    at: float | None = None
    """The tick that it is for, where the code makes the payload."""


EVERY = {"all": 1, "once": 2, "skip": 3}
"""The schedules of the code: by their ``catch_up``, with the seconds from one tick to the next."""


# --- when all is quiet ------------------------------------------------------------------------------


@job("meet", max_attempts=ENDLESS, backoff=soon)
@dataclass(frozen=True)
class Meet:
    """Waits until it is told that all jobs of its round run at once."""

    round: str


@job("meet_once", max_attempts=ENDLESS, backoff=soon, on_crash="fail")
@dataclass(frozen=True)
class MeetOnce:
    round: str


@job("meet_async", max_attempts=ENDLESS, backoff=soon)
@dataclass(frozen=True)
class MeetAsync:
    round: str


@job("meet_parts", max_attempts=ENDLESS, backoff=soon)
@dataclass(frozen=True)
class MeetParts:
    """Commits again and again meanwhile: ``transaction="manual"``."""

    round: str


@job("meet_write", max_attempts=ENDLESS, backoff=soon)
@dataclass(frozen=True)
class MeetWrite:
    """Writes when it is told to stop, too."""

    round: str


def any_payload(random: random.Random, intent_id: str, *, quick: bool) -> object:
    """A payload of a random kind; ``quick``: none that takes long or raises when it is added."""
    n = random.randrange(1_000_000)
    if random.random() < 0.15:
        few = n % 10
        unique = [Only(few), Windowed(few), Latest(few, intent_id), Sole(few)]
        return random.choice(unique[:3] if quick else unique)
    if not quick and random.random() < 0.2:
        return _long(random, n)
    kinds = [Write, WriteAsync, Follow, Sleepy, Flaky, Doomed, Resigned, Nothing]
    return random.choice([*kinds, Vanishing, Blank, Brief])(n)


def _long(random: random.Random, n: int) -> object:
    match random.randrange(10):
        case 0:
            return random.choice([Overdue, OverdueAsync])(n)
        case 1 | 2:
            return random.choice([Patient, PatientAsync])(round(random.uniform(1, 6), 1))
        case 3 | 4 | 8:
            return Parts(n)
        case 5 | 6 | 7:
            return random.choice([Once, Neighbour])(round(random.uniform(0.05, 1.5), 2))
        case _:
            return random.choice([Long, LongAsync])(round(random.uniform(0.2, 4), 1))
