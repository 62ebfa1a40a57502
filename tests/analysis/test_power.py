"""Seeds that decide a difference: as simulated, and from pilots made by hand."""

import math

import numpy as np
import pytest
from test_verdicts import run

from switchmoe.analysis import intervals, power, verdicts


@pytest.mark.parametrize("effect, seeds", [(0.5, 34), (0.8, 15), (1.0, 10)])
def test_seeds_are_those_of_the_tables_for_paired_t_tests(effect, seeds):
    """At 0.05 on two sides and a power of 0.8, as Cohen's tables and G*Power have them."""
    assert power.seeds_needed(0.01 * effect, 0.01) == seeds
    assert power.smallest_effect(seeds, 0.01) <= 0.01 * effect < power.smallest_effect(seeds - 1, 0.01)


def test_the_chance_is_how_often_the_rule_decides():
    rng, effect, spread, seeds = np.random.default_rng(0), 0.012, 0.01, 5
    samples = rng.normal(effect, spread, (4000, seeds))
    share = np.mean([intervals.t_interval(sample).low > 0 for sample in samples])
    assert share == pytest.approx(power.chance(seeds, effect, spread), abs=0.025)


def test_too_few_seeds_decide_nothing_and_some_effects_no_number_of_them():
    assert power.chance(2, 100.0, 0.01) == 0 and power.smallest_effect(2, 0.01) == math.inf
    assert power.seeds_needed(1.0, 0.0) == verdicts.MIN_SEEDS
    assert power.seeds_needed(1e-6, 1.0) is None


def test_pairs_of_one_seed_vary_less_than_their_runs():
    noise = [0.0, 0.3, -0.3, 0.1]
    dense = {seed: run(5.0, 4.0 + noise[seed]) for seed in range(4)}
    sparse = {seed: run(5.0, 3.9 + noise[seed] + 0.01 * (seed % 2)) for seed in range(3)}
    first, last = power.spreads(dense, sparse)
    assert (first.step, last.step, last.seeds) == (100, 200, 3)
    assert first.paired == 0 and last.mean == pytest.approx(0.1 - 0.01 / 3)
    assert last.paired == pytest.approx(np.std([0.1, 0.09, 0.1], ddof=1))
    assert last.paired < last.high < 0.02 < 0.4 < last.unpaired
    (both,) = power.spreads(dense, sparse, last=2)
    assert (both.step, both.mean) == (200, pytest.approx(last.mean / 2))
    with pytest.raises(ValueError, match="pilot runs of 1 seeds: accepted are two seeds or more"):
        power.spreads(dense, {0: sparse[0]})
