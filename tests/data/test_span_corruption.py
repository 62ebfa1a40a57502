"""Span corruption: T5's lengths, T5's masks, and nothing lost."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from switchmoe.data import span_corruption


class Sentinels:
    """1,000 pieces and 100 sentinels."""

    eos_id = 1
    size = 1100

    def sentinel(self, index: int) -> int:
        return self.size - 1 - index


VOCABULARY = Sentinels()


def noise_mask(length: int, seed: int = 0, *settings: float) -> np.ndarray:
    """[L]."""
    return span_corruption.noise_mask(1, length, np.random.default_rng(seed), *settings)[0]


def corrupt(tokens_L: np.ndarray, *arguments) -> tuple[np.ndarray, np.ndarray]:
    mask_L = noise_mask(len(tokens_L), *arguments)
    return tuple(part[0] for part in span_corruption.corrupt(tokens_L[None], mask_L[None], VOCABULARY))


DENSITIES = st.floats(0.02, 0.6)
MEANS = st.floats(1.0, 12.0)


def runs(mask: np.ndarray) -> list[tuple[bool, int]]:
    return [(bool(value), len(list(group))) for value, group in itertools.groupby(mask)]


def allowed(length: int, density: float, mean: float) -> bool:
    try:
        span_corruption.noise_and_spans(length, density, mean)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    "input_length, raw_length, target_length",
    # T5's published 512 -> 568, 114; the others by the formula, by hand:
    # 284 * .15 = 42.6 -> 43 noise, 43 / 3 = 14.33 -> 14 spans, 284 - 43 + 14 + 1 = 256, 43 + 14 + 1 = 58
    # 27 * .15 = 4.05 -> 4 noise, 4 / 3 -> 1 span, 27 - 4 + 1 + 1 = 25, 4 + 1 + 1 = 6
    [(512, 568, 114), (256, 284, 58), (25, 27, 6)],
)
def test_lengths_of_t5(input_length, raw_length, target_length):
    assert span_corruption.lengths(input_length) == (raw_length, target_length)


@given(st.integers(3, 900), DENSITIES, MEANS)
def test_lengths_are_met_exactly_by_the_longest_raw_piece(input_length, density, mean):
    try:
        raw_length, target_length = span_corruption.lengths(input_length, density, mean)
    except ValueError:
        assume(False)
    tokens_L = np.arange(2, 2 + raw_length) % 1000
    inputs, targets = corrupt(tokens_L, 0, density, mean)
    assert (len(inputs), len(targets)) == (input_length, target_length)
    assume(allowed(raw_length + 1, density, mean))
    longer, _ = corrupt(np.append(tokens_L, 2), 0, density, mean)
    assert len(longer) == input_length + 1


@given(st.integers(2, 600), DENSITIES, MEANS, st.integers(0, 2**32))
def test_masks_have_the_right_share_and_number_of_spans(length, density, mean, seed):
    assume(allowed(length, density, mean))
    mask = noise_mask(length, seed, density, mean)
    noise = int(mask.sum())
    assert len(mask) == length
    assert abs(noise - length * density) <= 0.5 or noise in (1, length - 1)
    assert not mask[0] and mask[-1]  # T5: non-noise first, noise last
    spans = sum(value for value, _ in runs(mask))
    assert abs(spans - noise / mean) <= 0.5 or spans == 1


def test_masks_are_uniform_over_all_cuts():
    """8 tokens at 0.5, mean 2: 4 noise in 2 spans, so 3 x 3 cuts, each as likely as the others."""
    draws = 9000
    masks = span_corruption.noise_mask(draws, 8, np.random.default_rng(0), 0.5, 2.0)
    seen = collections.Counter(mask.tobytes() for mask in masks)
    assert len(seen) == 9
    expected = draws / 9
    assert sum((count - expected) ** 2 / expected for count in seen.values()) < 26.1  # chi2, 8 dof, p = 0.001


@settings(max_examples=200)
@given(st.lists(st.integers(2, 999), min_size=2, max_size=400), DENSITIES, MEANS, st.integers(0, 2**32))
def test_the_original_is_rebuilt_from_inputs_and_targets(tokens, density, mean, seed):
    assume(allowed(len(tokens), density, mean))
    tokens_L = np.array(tokens, np.int32)
    inputs, targets = corrupt(tokens_L, seed, density, mean)
    assert inputs.dtype == targets.dtype == np.int32
    assert inputs[-1] == targets[-1] == VOCABULARY.eos_id
    padded = np.pad(targets, (0, 3))
    np.testing.assert_array_equal(span_corruption.restore(inputs, padded, VOCABULARY), tokens_L)
    sentinels = [token for token in inputs if token >= 1000]
    assert sentinels == [1099 - i for i in range(len(sentinels))]
    assert [token for token in targets if token >= 1000] == sentinels


@given(st.integers(20, 300), st.integers(0, 2**32))
def test_the_mask_says_what_is_kept(length, seed):
    tokens_L = np.arange(2, 2 + length)
    mask_L = noise_mask(length, seed)
    inputs, targets = corrupt(tokens_L, seed)
    np.testing.assert_array_equal(inputs[(inputs < 1000) & (inputs > 1)], tokens_L[~mask_L])
    np.testing.assert_array_equal(targets[(targets < 1000) & (targets > 1)], tokens_L[mask_L])


def test_restore_by_hand():
    inputs = np.array([5, 6, 1099, 7, 1098, 1, 0])
    targets = np.array([1099, 8, 9, 1098, 10, 1, 44])
    np.testing.assert_array_equal(span_corruption.restore(inputs, targets, VOCABULARY), [5, 6, 8, 9, 7, 10])
    # A model's own targets: junk before the first sentinel, an empty span, one left out.
    np.testing.assert_array_equal(
        span_corruption.restore(inputs, np.array([3, 1099, 1]), VOCABULARY), [5, 6, 7, 1098]
    )


def test_seed_decides():
    draw = [noise_mask(568, seed) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(draw[0], draw[1])
    assert (draw[0] != draw[2]).any()


def test_a_row_depends_on_no_other():
    tokens_BL = np.random.default_rng(1).integers(2, 999, (5, 568))
    masks = [span_corruption.noise_mask(rows, 568, np.random.default_rng(0)) for rows in (3, 5)]
    np.testing.assert_array_equal(masks[0], masks[1][:3])
    assert len(np.unique(masks[1], axis=0)) == 5
    together = span_corruption.corrupt(tokens_BL, masks[1], VOCABULARY)
    for row in range(5):
        alone = span_corruption.corrupt(tokens_BL[row : row + 1], masks[1][row : row + 1], VOCABULARY)
        assert all((a[0] == b[row]).all() for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize(
    "input_length, density, mean, words",
    [
        (2, 0.15, 3.0, ("data.input_length=2", ">= 3")),
        (4096, 0.15, 3.0, ("100 sentinels", "data.input_length", "data.mean_span_length=3.0")),
        (64, 0.9, 1.0, ("data.noise_density=0.9", "accepted")),
    ],
)
def test_impossible_settings_are_named(input_length, density, mean, words):
    with pytest.raises(ValueError) as error:
        span_corruption.lengths(input_length, density, mean)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_the_longest_input_uses_all_100_sentinels():
    """2009 * .15 = 301.35 -> 301 noise, 301 / 3 -> 100 spans; 2010 * .15 = 301.5 -> 302, 302 / 3 -> 101."""
    assert span_corruption.lengths(1809) == (2009, 402)
    with pytest.raises(ValueError, match="101 spans"):
        span_corruption.lengths(1810)
