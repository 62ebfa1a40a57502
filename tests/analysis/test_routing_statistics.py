"""Figures of routing on traces made by hand, whose answers are known; intervals that cover; baselines."""

import math
import tracemalloc

import numpy as np
import pytest

from switchmoe.analysis.routing import chains, changes, estimates, loads, specialisation, traces
from switchmoe.analysis.routing.estimates import Statistic, estimate
from switchmoe.analysis.routing.traces import Info, Layer, LayerName

RANDOM = np.random.default_rng(0)


def layer(expert_NK, experts=4, length=20, documents=None, **columns):
    """Rows of sequences of one length, a document each."""
    expert_NK = np.asarray(expert_NK, np.int32)
    expert_NK = expert_NK[:, None] if expert_NK.ndim == 1 else expert_NK
    place, none = np.arange(len(expert_NK)), np.full(len(expert_NK), -1, np.int32)
    sequence, nan = place // length, np.full(len(expert_NK), np.nan)
    gate = np.ones(expert_NK.shape, np.float32)
    made = Layer(
        LayerName("decoder", 0), experts, sequence if documents is None else documents, sequence, place % length,
        none, none, none, none, expert_NK, gate, expert_NK >= 0, nan, nan, nan,
    )  # fmt: skip
    return made._replace(**{name: np.asarray(value) for name, value in columns.items()})


def test_information_of_planted_specialisation():
    """Experts that follow the key: log2 of the keys; half the time: p log p by hand; never: nothing, the bias apart."""
    key = RANDOM.integers(0, 4, 8000)
    found = estimate(specialisation.information(lambda of: of.token_N, ""), layer(key, token_N=key))
    assert found.value == pytest.approx(2, abs=0.01) and found.shuffled < 0.01
    assert found.low < found.value < found.high and found.high - found.low < 0.02
    mixed = np.where(RANDOM.random(8000) < 0.5, key, RANDOM.integers(0, 4, 8000))
    p = np.array([0.5 + 0.125, 0.125, 0.125, 0.125])
    found = estimate(specialisation.information(lambda of: of.token_N, ""), layer(mixed, token_N=key))
    assert found.value == pytest.approx(2 + (p * np.log2(p)).sum(), abs=0.03)
    bias = estimate(
        specialisation.information(lambda of: of.token_N, ""), layer(RANDOM.integers(0, 4, 8000), token_N=key)
    )
    assert bias.value < 0.005 and bias.value == pytest.approx(bias.shuffled, abs=0.002)
    assert estimate(specialisation.information(lambda of: of.label_N, ""), layer(key)) is None  # no labels


def test_labels_that_mean_nothing_tell_no_more_than_shuffled_ones():
    """Each of 30 documents has experts of its own and a label at random; then each label has its expert, half the time."""
    rng = np.random.default_rng(1)
    share_DE = rng.dirichlet(np.full(4, 0.3), 30)
    expert = np.concatenate([rng.choice(4, 100, p=share_E) for share_E in share_DE])
    statistic = specialisation.statistics(np.zeros(0, int))["label_information"]
    inside = []
    for _ in range(10):
        label = np.repeat(rng.integers(0, 3, 30), 100)
        found = estimate(statistic, layer(expert, length=100, label_N=label))
        assert found.value > 0.005  # documents of a label differ from the others' by chance
        inside.append(found.shuffled_low <= found.value <= found.shuffled_high)
    assert sum(inside) >= 7  # of 21 alike one is the lowest or highest 2 times in 21
    planted = np.where(rng.random(3000) < 0.5, label, rng.integers(0, 4, 3000))
    found = estimate(statistic, layer(planted, length=100, label_N=label))
    assert found.low > found.shuffled_high
    unlabelled = np.where(np.arange(3000) < 300, -1, label)
    shuffled = estimates.labels(layer(expert, length=100, label_N=unlabelled), rng)
    assert (shuffled.label_N[:300] == -1).all() and (
        shuffled.label_N[300:].reshape(-1, 100).std(axis=1) == 0
    ).all()
    np.testing.assert_array_equal(np.bincount(shuffled.label_N[300:]), np.bincount(label[300:]))


def test_repeats_of_a_planted_chain():
    """A token keeps its neighbour's expert with probability 1/2, else draws among four: repeats are 1/2 + 1/8."""
    expert = RANDOM.integers(0, 4, 20_000)
    for n in range(1, len(expert)):
        if n % 20 and RANDOM.random() < 0.5:
            expert[n] = expert[n - 1]
    found = estimate(chains.STATISTICS["first_repeats"], layer(expert))
    assert found.value == pytest.approx(0.625, abs=0.015) and found.shuffled == pytest.approx(0.25, abs=0.005)
    assert found.low < 0.625 < found.high
    one = layer([0, 0, 1, 1, 1, 1], length=3)  # 2 sequences: pairs 00, 01 and 11, 11
    assert estimate(chains.STATISTICS["first_repeats"], one).value == 0.75


def test_the_papers_chance_of_a_common_expert():
    assert chains.chance_of_any(8, 2) == pytest.approx(0.4643, abs=1e-4)  # Mixtral: 46 %
    assert chains.chance_of_any(8, 1) == pytest.approx(1 / 8)
    pairs = np.array([RANDOM.permutation(8)[:2] for _ in range(20_000)])
    found = estimate(chains.STATISTICS["any_repeats"], layer(pairs, 8))
    assert found.value == pytest.approx(0.464, abs=0.015)


def test_pairs_are_all_pairs():
    together = chains.together(layer([[0, 1, 2], [0, 2, 3]]))
    np.testing.assert_array_equal(
        together[0], [0, 0.5, 1, 0.5]
    )  # 0 and 2 are not neighbours in rank in the first row
    np.testing.assert_array_equal(together[3], [1, 0, 1, 0])
    partners = RANDOM.integers(0, 2, 4000)
    found = estimate(chains.STATISTICS["pair_information"], layer(np.stack([partners, partners + 2], 1)))
    apart = estimate(
        chains.STATISTICS["pair_information"], layer(np.stack([partners, 2 + RANDOM.integers(0, 2, 4000)], 1))
    )
    assert found.value == pytest.approx(2, abs=0.01) and apart.value == pytest.approx(1, abs=0.01)
    assert apart.shuffled == pytest.approx(1, abs=0.02)  # which ranks an expert comes at is kept


def test_next_layer_from_this_one():
    first = RANDOM.integers(0, 4, 4000)
    follows = (first + 1) % 4
    follows[::2] = RANDOM.integers(0, 4, 2000)
    found = {name: estimate(one, layer(first)) for name, one in chains.next_layer(layer(follows)).items()}
    assert found["next_hits"].value == pytest.approx(0.625, abs=0.02)
    assert found["next_hits_twice"].value == pytest.approx(0.5 + 0.5 * 0.5, abs=0.02)
    assert found["next_hits"].shuffled == pytest.approx(0.25, abs=0.03)


def test_what_a_second_choice_tells_of_the_next_layer_counts():
    """The next layer follows the second of two choices: half of the pairs are (e, e), half a random other one and e."""
    second = RANDOM.integers(0, 16, 8000)
    first = (second + RANDOM.integers(1, 16, 8000)) % 16
    statistic = chains.next_layer(layer(second, 16))["next_information"]
    found = estimate(statistic, layer(np.stack([first, second], 1), 16))
    assert found.value == pytest.approx(4 - (0.5 + 0.5 * math.log2(30)), abs=0.03) and found.shuffled < 0.05
    planted = np.stack([second, (second + 8) % 16], 1)  # and where both of the next layer's choices do
    both = estimate(chains.next_layer(layer(planted, 16))["next_information"], layer(second, 16))
    assert both.value == pytest.approx(3, abs=0.01)


def test_guesses_are_as_many_as_the_token_has_choices_in_the_next_layer():
    """Lists as long as the layer has experts, of which a token fills one (a decoder beside expert choice), or one or two."""
    first = RANDOM.integers(0, 4, 4000)
    follows = np.full((4000, 4), -1)
    follows[:, 0] = np.where(np.arange(4000) % 2, (first + 1) % 4, RANDOM.integers(0, 4, 4000))
    found = {name: estimate(one, layer(first)) for name, one in chains.next_layer(layer(follows)).items()}
    assert found["next_hits"].value == pytest.approx(0.625, abs=0.02)
    assert found["next_hits"].shuffled == pytest.approx(0.25, abs=0.03)
    assert found["next_hits_twice"].value == pytest.approx(0.75, abs=0.02)
    follows[:, 0], follows[::2, 1] = (first + 1) % 4, (first[::2] + 2) % 4
    # Of expert 1: 2 follows always, 3 half the time; who has one choice has one guess, who has two has two.
    assert estimate(chains.next_layer(layer(follows))["next_hits"], layer(first)).value == 1


def test_loads_by_hand():
    expert = [0] * 5 + [1] * 3 + [2] * 2
    of = {name: estimate(one, layer(expert)).value for name, one in loads.STATISTICS.items() if name in ("busiest", "idlest", "dead", "overloaded", "dropped")}  # fmt: skip
    assert of == {"busiest": 2.0, "idlest": 0.0, "dead": 1.0, "overloaded": 0.0, "dropped": 0.0}
    late = layer(np.zeros(400, int), length=8)
    late.kept_NK[late.position_N >= 6] = False
    found = estimate(loads.STATISTICS["late_drops"], late)
    assert found.value == 1 and abs(found.shuffled) < 0.1


def test_drops_by_the_place_have_intervals_and_what_shuffled_tokens_give():
    """Documents of 8 tokens; of the last 2 most are dropped, of the others a few."""
    made = layer(np.zeros(1600, int), length=8)
    share_N = np.where(made.position_N >= 6, 0.9, 0.1)
    made.kept_NK[:, 0] = np.random.default_rng(3).random(1600) >= share_N
    first, *_, last = figures = estimates.several(loads.by_place(loads.dropped_N, "share", "", 4), made)
    assert [one.value for one in figures] == pytest.approx([0.1, 0.1, 0.1, 0.9], abs=0.05)
    assert all(one.low < one.value < one.high and one.high - one.low < 0.15 for one in figures)
    assert first.high < first.shuffled_low and last.low > last.shuffled_high
    assert last.shuffled == pytest.approx(0.3, abs=0.02)
    gaps = estimates.several(loads.by_place(loads.dropped_N, "share", "", 4), layer([0] * 4, length=2))
    assert [math.isnan(one.value) for one in gaps] == [False, True, False, True]
    assert estimates.several(loads.ALONG["entropy"], layer([0, 1])) == []  # the trace does not know it


def test_entropies_of_sentinels_against_other_tokens():
    info = Info((), 4, 1, sentinels=(3, 4))
    class_V = specialisation.class_V(
        ["\u2581the", "ing", ",", "<extra_id_0>", "\u25812", "\u2581Nile", "</s>", "<0x0A>"], info
    )
    assert [specialisation.CLASSES[number] for number in class_V] == [
        "word start", "sub-word", "punctuation", "sentinel", "digits", "capital", "special", "byte",
    ]  # fmt: skip
    token = RANDOM.choice([0, 3], 6000)
    expert = np.where(token == 3, RANDOM.integers(0, 2, 6000), RANDOM.integers(0, 4, 6000))
    made = layer(expert, token_N=token)
    statistics = specialisation.statistics(class_V)
    found = estimate(statistics["sentinel_entropy"], made)
    assert found.value == pytest.approx(math.log(2), abs=0.01) and found.shuffled > math.log(3)
    assert estimate(statistics["word_start_entropy"], made).value == pytest.approx(math.log(4), abs=0.01)
    assert estimate(statistics["digits_entropy"], made) is None


def test_an_experts_favourite_tokens_and_where_they_stand():
    token = np.tile([0, 1, 2, 1], 50)
    expert = np.where(token == 2, 3, RANDOM.integers(0, 3, 200))
    made = layer(expert, token_N=token, length=4)
    (best,) = specialisation.favourites(made, 3)
    assert (best.token, best.times, best.share, best.lift) == (2, 50, 1.0, 4.0)
    assert specialisation.snippet(made, best.rows[0], ["\u2581a", "b", "\u2581c"]) == (" ab", " c", "b")
    found = estimate(specialisation.statistics(np.zeros(3, int))["input_specialisation"], made)
    assert found.value > 0.5 and found.shuffled < 0.45


def test_a_token_read_a_few_times_is_no_favourite():
    """Id 1 is read 7 times, id 2 8 times, each at expert 3 alone."""
    token = np.repeat([0, 1, 2], [85, 7, 8])
    made = layer(np.where(token > 0, 3, RANDOM.integers(0, 3, 100)), token_N=token)
    assert [best.token for best in specialisation.favourites(made, 3)] == [2]
    two = layer(np.where(token[:, None] > 0, [3, 2], [0, 1]), token_N=token)  # choices are not occurrences
    assert [best.token for best in specialisation.favourites(two, 3)] == [2]


def test_permuted_experts_are_matched():
    order = np.array([2, 0, 3, 1])
    expert = np.array([RANDOM.permutation(4)[:2] for _ in range(4000)])
    one, other = layer(expert), layer(order[expert])
    np.testing.assert_array_equal(changes.matching(one, other), order)
    assert estimate(changes.agreement(other, True), one).value == 1
    plain = estimate(changes.agreement(other, False), one)
    assert plain.value == pytest.approx(1 / 3, abs=0.03)
    unrelated = layer(np.array([RANDOM.permutation(4)[:2] for _ in range(4000)]))
    found = estimate(changes.agreement(unrelated, True), one)
    assert found.value == pytest.approx(
        found.shuffled, abs=0.03
    )  # no more than chance, as halves are matched across


def test_intervals_cover_the_truth():
    """Documents differ, and tokens of one are alike: of 60 samples' intervals some 95 % hold the mean."""
    truth, hits = 0.5, 0
    statistic = Statistic(loads.STATISTICS["entropy"].count, estimates.mean, estimates.rows, "", "")
    for seed in range(60):
        rng = np.random.default_rng(seed)
        value = np.repeat(rng.normal(truth, 1, 40), 20)
        found = estimate(statistic, layer(np.zeros(800, int), entropy_N=value), seed)
        hits += found.low <= truth <= found.high
        width = found.high - found.low
        assert 0.3 < width < 1.0  # 2 * 1.96 / sqrt(40) = 0.62; if tokens were drawn alone, 0.14
    assert 50 <= hits <= 60


def test_shuffling_moves_choices_and_leaves_tokens():
    made = layer(RANDOM.integers(0, 4, (100, 2)), token_N=np.arange(100))
    found = estimates.rows(made, np.random.default_rng(0))
    np.testing.assert_array_equal(found.token_N, made.token_N)
    assert (found.expert_NK != made.expert_NK).any()
    assert sorted(map(tuple, found.expert_NK)) == sorted(map(tuple, made.expert_NK))
    at_random = estimates.uniform(layer(np.zeros(4000, int)), np.random.default_rng(0))
    np.testing.assert_allclose(loads.load_E(at_random), 0.25, atol=0.03)


def test_experts_at_random_are_drawn_a_part_at_a_time(monkeypatch):
    """640,000 numbers to rank, of which 10,000 are there at once; the draw is the same."""
    made = layer(np.zeros((20_000, 2), int), experts=32)
    whole = estimates.uniform(made, np.random.default_rng(0))
    monkeypatch.setattr(estimates, "CHUNK_CELLS", 10_000)
    tracemalloc.start()
    parts = estimates.uniform(made, np.random.default_rng(0))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(parts.expert_NK, whole.expert_NK)
    assert most < 2_000_000  # 10 MB of all at once


def test_traces_of_other_tokens_are_not_compared():
    info = Info((LayerName("decoder", 0),), 4, 1, reading={"text": "a"})
    with pytest.raises(ValueError, match="text is another"):
        changes.check(info, traces.Info(info.layers, 4, 1, reading={"text": "b"}))
    with pytest.raises(ValueError, match="sparse layers are decoder/1"):
        changes.check(info, traces.Info((LayerName("decoder", 1),), 4, 1, reading={"text": "a"}))
    with pytest.raises(ValueError, match="other tokens"):
        changes.check_rows(layer(np.zeros(40, int)), layer(np.zeros(60, int)))
