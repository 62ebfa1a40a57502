"""How many seeds decide a difference? From a few pilot runs, before any claim is tried. Pure functions.

A claim's part is decided if the 95 % interval of a mean over seeds (`intervals.t_interval`) lies on one side of its bound.
The chance of that, for a true difference of ``effect`` and differences that vary over seeds by ``spread`` (their standard
deviation), is the power of Student's t test.

Letters: P pilots (seeds), V evaluations.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from switchmoe.analysis.intervals import LEVEL
from switchmoe.analysis.sweeps import Run
from switchmoe.analysis.verdicts import MIN_SEEDS

POWER = 0.8  # the chance that an effect which is there is decided
MOST_SEEDS = 1000


class Spread(NamedTuple):
    """Of the differences in held-out loss between two arms' runs of the same seeds, at one evaluation."""

    step: int
    mean: float  # nats, one arm's loss less the other's
    paired: float  # standard deviation over seeds of the differences
    unpaired: float  # and what it would be if the seeds of the two arms had nothing in common
    high: float  # upper end of the one-sided 80 % interval of ``paired``: few pilots know it badly
    seeds: int


def spreads(one: Mapping[int, Run], other: Mapping[int, Run], last: int = 1) -> list[Spread]:
    """At each evaluation that all the runs share, from the ``last``-th on; losses are means of so many evaluations.

    Raises:
      ValueError: fewer than two seeds have both runs; one line.
    """
    seeds = sorted(one.keys() & other.keys())
    if len(seeds) < 2:
        raise ValueError(f"pilot runs of {len(seeds)} seeds: accepted are two seeds or more, of both arms")
    runs = [arm[seed] for arm in (one, other) for seed in seeds]
    steps = sorted(set.intersection(*(set(run.step_V.tolist()) for run in runs)))
    found = []
    for place in range(last - 1, len(steps)):
        window = steps[place - last + 1 : place + 1]
        losses = [[_mean_at(arm[seed], window) for seed in seeds] for arm in (one, other)]
        found.append(_spread(steps[place], np.array(losses)))
    return found


def _mean_at(run: Run, steps: Sequence[int]) -> float:
    return float(np.mean(run.loss_V[np.isin(run.step_V, steps)]))


def _spread(step: int, losses_2P: np.ndarray) -> Spread:
    difference_P = losses_2P[0] - losses_2P[1]
    paired = float(difference_P.std(ddof=1))
    unpaired = math.sqrt(float(losses_2P.var(axis=1, ddof=1).sum()))
    free = len(difference_P) - 1
    high = paired * math.sqrt(free / stats.chi2.ppf(1 - POWER, free))
    return Spread(int(step), float(difference_P.mean()), paired, unpaired, high, len(difference_P))


def chance(seeds: int, effect: float, spread: float) -> float:
    """That so many seeds decide a true difference ``effect``: the interval lies above 0."""
    if seeds < MIN_SEEDS:
        return 0.0
    if spread == 0:
        return 1.0
    free, centre = seeds - 1, abs(effect) / spread * math.sqrt(seeds)
    quantile = stats.t.ppf((1 + LEVEL) / 2, free)
    return float(stats.nct.sf(quantile, free, centre))


def seeds_needed(effect: float, spread: float, wanted: float = POWER) -> int | None:
    """The fewest seeds that decide a true difference with the chance ``wanted``; None: more than `MOST_SEEDS`."""
    for seeds in range(MIN_SEEDS, MOST_SEEDS + 1):
        if chance(seeds, effect, spread) >= wanted:
            return seeds
    return None


def smallest_effect(seeds: int, spread: float) -> float:
    """The true difference that so many seeds decide with the chance `POWER`; infinite below the fewest that may decide."""
    if seeds < MIN_SEEDS or spread == 0:
        return math.inf if seeds < MIN_SEEDS else 0.0
    low, high = 0.0, 100.0 * spread
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if chance(seeds, middle, spread) >= POWER else (middle, high)
    return high
