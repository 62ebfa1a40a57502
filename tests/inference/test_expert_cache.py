"""Which expert leaves under each policy, by hand; bytes stay within the budget; no policy beats Belady's bound."""

import functools

import hypothesis
import hypothesis.strategies as st
import pytest

from switchmoe.inference.offload.cache import BELADY, POLICIES, Cache, simulate


def one(_):
    return 1


def run(cache, keys):
    """Of each key in turn what left for it; True: it was there."""
    return [cache.used(key) or cache.admit(key) for key in keys]


A, B, C = (0, 0), (0, 1), (0, 2)


@pytest.mark.parametrize(
    "policy, keys, last",
    [
        ("lru", [A, B, A, C], [B]),
        ("lru", [A, A, A, B, C], [A]),
        ("lfu", [A, A, A, B, C], [B]),  # 3 uses and 1
        ("lfu", [A, B, C], [A]),  # one each: the least recent
        (
            "lfu",
            [A, B, C, A, C, B, B, A],
            [C],
        ),  # A has had 3 uses, B 3, C 2, with those while they were not there
        ("lfru", [A, A, A, B, C], [B]),  # 3 / 3 and 1 / 2
        ("lfru", [A, A, A, B, B, C], [A]),  # 3 / 4 and 2 / 2
    ],
)
def test_who_leaves(policy, keys, last):
    assert run(Cache(2, one, policy, 1), keys)[-1] == last


def test_a_server_that_has_run_for_days_still_keeps_the_most_used():
    cache = Cache(2, one, "lfu", 1)
    cache._count[A] = 1 << 23
    assert run(cache, [A, B, C]) == [[], [], [B]]


def test_of_experts_of_earlier_passes_that_of_the_first_layer_leaves_first():
    """(2, 0) was used in the first pass, (0, 0) and (1, 0) in the second; the third begins with (0, 1)."""
    keys = [(2, 0), (0, 0), (1, 0), (0, 1)]
    assert run(Cache(3, one, "least_stale", 3), keys)[-1] == [(0, 0)]
    assert run(Cache(3, one, "lru", 3), keys)[-1] == [(2, 0)]


def test_an_expert_of_this_pass_stays_while_there_is_a_stale_one():
    keys = [(0, 0), (1, 0), (2, 0), (0, 0), (1, 1), (2, 1), (2, 2)]
    found = run(Cache(3, one, "least_stale", 3), keys)
    assert found[3:] == [True, [(1, 0)], [(2, 0)], [(0, 0)]]  # at the end all are of this pass: the oldest


def test_as_many_leave_as_there_must():
    size = dict(zip([A, B, C], [2, 2, 3], strict=True)).get
    cache = Cache(4, size, "lru", 1)
    assert run(cache, [A, B, C]) == [[], [], [A, B]]
    assert (A in cache, C in cache, cache.held, len(cache)) == (False, True, 3, 1)


def test_what_is_pinned_stays_and_nothing_changes_where_there_is_no_room():
    cache = Cache(2, one, "lru", 1)
    run(cache, [A, B])
    assert cache.admit(C, {A, B}) is None and A in cache and B in cache and C not in cache
    assert cache.admit(C, {A}) == [B]
    assert Cache(0, one, "lru", 1).admit(A) is None


def test_read_ahead_is_no_use_but_recent():
    cache = Cache(2, one, "lru", 1)
    run(cache, [A])
    cache.admit(B)
    assert run(cache, [C]) == [[A]]
    cache = Cache(2, one, "lfu", 1)
    run(cache, [A])
    cache.admit(B)
    assert run(cache, [C]) == [[B]]


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="policy magic: accepted is one of lru, lfu, lfru, least_stale"):
        Cache(1, one, "magic", 1)
    with pytest.raises(ValueError, match="budget of -1 bytes"):
        Cache(-1, one, "lru", 1)
    with pytest.raises(ValueError, match="budget of -1 bytes"):
        simulate([], -1, one, BELADY, 1)
    with pytest.raises(ValueError, match="expert 0 of layer 2: accepted is a layer from 0 to 1"):
        Cache(1, one, "lru", 2).used((2, 0))


def test_belady_lets_pass_what_is_needed_later_than_all_else():
    found = simulate([(0, [0]), (0, [1]), (0, [0])], 1, one, BELADY, 1)
    assert (found.hits_L.tolist(), found.accesses_L.tolist(), found.read, found.rate) == ([1], [3], 2, 1 / 3)
    assert simulate([(0, [0]), (0, [1]), (0, [0])], 1, one, "lru", 1).rate == 0


def test_a_visit_keeps_its_own():
    """Two of a token's choices in a cache of two: neither leaves for the other, and of a third one finds no room."""
    found = simulate([(0, [0]), (0, [1, 2]), (0, [1, 2]), (0, [0, 1, 2])], 2, one, "lru", 1)
    assert found.hits_L.tolist() == [4] and found.read == 4


def test_hits_are_by_layer():
    found = simulate([(0, [0]), (1, [0]), (0, [0]), (1, [1])], 9, one, "lru", 3)
    assert found.hits_L.tolist() == [1, 0, 0] and found.accesses_L.tolist() == [2, 2, 0]


keys = st.tuples(st.integers(0, 2), st.integers(0, 3))
sets = st.sets(st.integers(0, 3), min_size=1, max_size=3).map(sorted)


@hypothesis.given(st.lists(st.tuples(keys, st.sets(keys))), st.integers(0, 20), st.sampled_from(POLICIES))
def test_bytes_are_those_of_what_is_there_and_never_over_the_budget(steps, budget, policy):
    size = lambda key: 1 + 2 * key[0] + key[1]  # noqa: E731
    cache, there = Cache(budget, size, policy, 3), set()
    for key, pinned in steps:
        if cache.used(key):
            assert key in there
            continue
        leaving = cache.admit(key, pinned)
        if leaving is None:
            assert size(key) + sum(size(other) for other in there & pinned) > budget
            continue
        assert set(leaving) <= there - pinned and len(leaving) == len(set(leaving))
        there = (there - set(leaving)) | {key}
        assert cache.held == sum(map(size, there)) <= budget
        assert all(other in cache for other in there) and len(cache) == len(there)


@hypothesis.given(st.lists(st.tuples(st.integers(0, 2), sets), max_size=40), st.integers(0, 9))
def test_no_policy_has_more_hits_than_belady(visits, budget):
    bound = simulate(visits, budget, one, BELADY, 3)
    for policy in POLICIES:
        found = simulate(visits, budget, one, policy, 3)
        assert found.hits_L.sum() <= bound.hits_L.sum()
        assert (found.accesses_L == bound.accesses_L).all()


@hypothesis.given(st.lists(st.integers(0, 3), max_size=9).map(tuple), st.integers(0, 3))
def test_belady_is_the_best_there_is(experts, budget):
    """Against trying everything: what to keep after each use."""

    @functools.cache
    def most(at, there):
        if at == len(experts):
            return 0
        may = there | {experts[at]}
        kept = [may] if len(may) <= budget else [may - {out} for out in may]
        return (experts[at] in there) + max(most(at + 1, after) for after in kept)

    found = simulate([(0, [expert]) for expert in experts], budget, one, BELADY, 1)
    assert found.hits_L.sum() == (most(0, frozenset()) if budget else 0)
