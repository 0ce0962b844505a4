"""Which queues a worker serves, whose room they share, and in which order they are claimed."""

import itertools
from collections import Counter
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import NullPool, create_engine, literal, select

from sqlalchemy_jobs import patterns
from sqlalchemy_jobs.errors import ConfigurationError
from sqlalchemy_jobs.worker.pools import Place, Pools
from sqlalchemy_jobs.worker.slots import Slots
from tests.unit.test_worker_parts import a_run


def firsts(pools: Pools, *queues: str) -> Counter[str]:
    """Which queue came first how often, in 2,000 turns."""
    return Counter(next(iter(pools.in_turn(queues, pools.concurrency))) for _ in range(2000))


# --- which ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "served", "others"),
    [
        ([], ["default", "mail"], []),
        (["*"], ["default", "mail"], []),
        (["mail"], ["mail"], ["mail.eu", "Mail", "mai", "default"]),
        (["mail.*"], ["mail.eu", "mail."], ["mail", "mailx", "MAIL.eu"]),
        (["a,b"], ["a", "b"], ["a,b", "c"]),
        (["a>b@3"], ["a", "b"], ["b@3", "c"]),
        (["*,!bulk"], ["default", "bulky"], ["bulk"]),
        (["!bulk.*,*"], ["default", "bulk"], ["bulk.eu"]),
        (["bulk.eu", "*,!bulk.*"], ["bulk.eu", "default"], ["bulk.us"]),
        (["*", "mail.*,!mail.eu.*,mail.eu.vip"], ["x", "mail.eu.vip"], ["mail.eu.x"]),
    ],
)
def test_the_most_specific_pattern_decides_whether_a_queue_is_served(
    given: list[str], served: list[str], others: list[str]
) -> None:
    for order in itertools.permutations(given):
        pools = Pools(dict.fromkeys(order))
        assert [each for each in served + others if pools.serves(each)] == served


@pytest.mark.parametrize(
    "order", list(itertools.permutations(["*", "mail.*", "mail.eu,mail.eu.*"]))
)
def test_the_most_specific_pattern_names_the_pool(order: tuple[str, ...]) -> None:
    pools = Pools(dict.fromkeys(order, 1))
    assert pools.place("mail.eu") == Place("mail.eu,mail.eu.*", 0, 1)
    assert pools.place("mail.eu.vip") == Place("mail.eu,mail.eu.*", 0, 1)
    assert pools.place("mail.us") == Place("mail.*", 0, 1)
    assert pools.place("mail") == Place("*", 0, 1)


NAMES = st.text("abA._%", min_size=1, max_size=3)


@given(
    st.lists(
        st.tuples(st.sampled_from(["", "!"]), NAMES, st.sampled_from(["", "*"])),
        unique_by=lambda each: each[1:],
    ),
    st.lists(NAMES, min_size=1),
)
def test_the_database_decides_as_python_does(
    given: list[tuple[str, str, str]], queues: list[str]
) -> None:
    """And names that are no names of queues do no harm."""
    chosen = ["".join(each) for each in given] or ["*"]
    with create_engine("sqlite://", poolclass=NullPool).connect() as connection:
        for queue in queues:
            of_sql = connection.scalar(select(patterns.fitting(chosen, literal(queue))))
            assert of_sql == patterns.serves(chosen, queue)


def test_queues_are_asked_for_by_name_where_all_of_them_have_one() -> None:
    assert Pools({"a>b": 1, "c,!d": None}).names == ["a", "b", "c"]
    assert Pools({"a": 1, "b*": None}).names == []
    assert Pools({}).names == []


def test_what_a_worker_serves_can_be_told_to_people_and_to_others() -> None:
    pools = Pools({"mail": 2, "critical>default@3,*,!bulk": 8, "x": None})
    assert str(pools) == "mail=2; critical>default@3,*,!bulk=8; x"
    assert pools.patterns == ["mail", "critical", "default", "*", "!bulk", "x"]
    for all_of_them in ({}, {"*": None}, {"*": 8}):
        assert Pools(all_of_them).patterns == []
    assert str(Pools({})) == "all queues"


# --- in which order -------------------------------------------------------------------------------


def test_a_lower_level_comes_after_all_of_a_better_one() -> None:
    pools = Pools({"critical>b.*,a>*": 1})
    for _ in range(50):
        first, *middle, last = pools.in_turn(
            ["x", "b.1", "a", "critical", "b.2"], ["critical>b.*,a>*"]
        )
        assert (first, last) == ("critical", "x")
        assert set(middle) == {"b.1", "b.2", "a"}


def test_queues_of_one_level_and_pools_take_turns() -> None:
    for pools in (Pools({}), Pools({"a,b": 1}), Pools({"a": 1, "b": 1})):
        assert 850 < firsts(pools, "a", "b")["a"] < 1150


def test_a_weight_is_how_often_a_queue_comes_first() -> None:
    came = firsts(Pools({"a@6,b@3,c": 1}), "a", "b", "c")
    assert 1080 < came["a"] < 1320
    assert 480 < came["b"] < 720
    assert 120 < came["c"] < 280


def test_only_queues_whose_pool_has_room_have_a_turn() -> None:
    pools = Pools({"a,b": 1, "c": 1, "*,!d": 1})
    assert pools.in_turn(["a", "c", "d", "e"], ["c", "*,!d"]).keys() == {"c", "e"}
    assert pools.in_turn(["a", "b", "c"], ["a,b"]) == {"a": "a,b", "b": "a,b"}


def test_the_queues_of_a_pool_share_its_room() -> None:
    held = Slots(10, Pools({"a,b": 3, "c": None}), lambda: None)
    runs = [a_run("a"), a_run("b"), a_run("a"), a_run("b"), a_run("c")]
    assert held.room() == (10, {"a,b": 3, "c": 10})
    for run in runs:
        held.take([run])
    assert held.room() == (5, {"c": 5})
    assert [held.next() for _ in range(5)] == [*runs[:3], runs[4], None]
    held.ended(runs[1])
    assert held.next() is runs[3]
    assert held.room() == (6, {"c": 6})


def test_of_those_that_wait_the_best_level_of_each_pool_goes_first_and_pools_take_turns() -> None:
    held = Slots(10, Pools({"a>b": None, "c>d": None}), lambda: None)
    d, b, a, c = (a_run(queue) for queue in "dbac")
    for run in (d, b, a, c):
        held.take([run])
    assert [held.next() for _ in range(4)] == [a, b, c, d]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "at", "told"),
    [
        ("mail,", 6, "queue '': wanted"),
        ("mail>>bulk", 6, "queue '': wanted"),
        ("mail, bulk", 6, "queue ' bulk': wanted"),
        ("mail,a*b", 6, "queue 'a*b': wanted"),
        ("mail,**", 6, "queue '*': wanted"),
        ("a>b@0", 3, "'b@0': wanted QUEUE@N"),
        ("a>b@", 3, "'b@': wanted QUEUE@N"),
        ("a>b@1.5", 3, "'b@1.5': wanted QUEUE@N"),
        ("*,!b@2", 3, "'!b@2': wanted QUEUE@N"),
        ("a,b,a", 5, "queue 'a' is named twice"),
        ("a*,!a*", 4, "queue 'a*' is named twice"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(given: str, at: int, told: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        Pools({given: 1})
    assert str(refused.value).startswith(f"queues {given!r}, character {at}: {told}")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"a": 1, "b,a": 1}, "queues 'b,a', character 3: queue 'a' is named twice"),
        ({"!bulk": 1}, "queues '!bulk' names none to serve"),
        ({"a,b": 0}, "queue a,b=0: wanted a concurrency of 1 or more"),
        ({"a": True}, "queue a=True: wanted a concurrency of 1 or more"),
        ({7: 1}, "queue 7: wanted a name"),
    ],
)
def test_pools_that_cannot_be_are_refused(given: Mapping[str, int], told: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        Pools(given)
    assert str(refused.value).startswith(told)
