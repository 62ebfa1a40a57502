"""Intervals over seeds, and how they are written: Student's t of a mean, Fieller's of a ratio of means, Fisher's F of variances."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95


class Interval(NamedTuple):
    """A figure over ``seeds`` seeds; infinite where a run diverged or a loss was never reached."""

    mean: float
    low: float
    high: float
    seeds: int


def t_interval(values: Sequence[float]) -> Interval:
    """Mean and interval by Student's t; an infinite value is beyond all others, and opens the interval on its side.

    Unknown (-inf to inf, mean NaN) where a value is NaN or both infinities occur.
    """
    found = np.array(values, dtype=float)
    up, down = (found == math.inf).any(), (found == -math.inf).any()
    if np.isnan(found).any() or (up and down):
        return Interval(math.nan, -math.inf, math.inf, len(found))
    finite = found[np.isfinite(found)]
    if not len(finite):
        return Interval(*[float(found[0])] * 3, len(found))
    half = math.inf
    if len(finite) > 1:
        quantile = stats.t.ppf((1 + LEVEL) / 2, len(finite) - 1)
        half = float(quantile * finite.std(ddof=1) / math.sqrt(len(finite)))
    mean = float(finite.mean())
    low, high = -math.inf if down else mean - half, math.inf if up else mean + half
    return Interval(float(found.mean()), low, high, len(found))


def ratio_interval(tops: Sequence[float], bottoms: Sequence[float]) -> Interval:
    """The ratio of two means of pairs, with the interval of Fieller (1954).

    Its ends r solve (mean top - r mean bottom)^2 = t^2 var(top - r bottom) / n. Unknown (NaN) where a value is no number, and without
    bounds (mean infinite, -inf to inf) where the mean of ``bottoms`` is not above 0 for sure.
    """
    pairs, count = np.array([tops, bottoms], float), len(tops)
    unknown = Interval(math.nan, -math.inf, math.inf, count)
    if count < 2 or not np.isfinite(pairs).all():
        return unknown
    top, bottom = pairs.mean(axis=1)
    noise = np.cov(pairs) * stats.t.ppf((1 + LEVEL) / 2, count - 1) ** 2 / count
    square, middle, rest = bottom**2 - noise[1, 1], top * bottom - noise[0, 1], top**2 - noise[0, 0]
    if square <= 0 or bottom <= 0:
        return unknown._replace(mean=math.inf)
    half = math.sqrt(max(middle**2 - square * rest, 0.0))
    return Interval(top / bottom, (middle - half) / square, (middle + half) / square, count)


def f_interval(larger: Sequence[float], smaller: Sequence[float]) -> Interval:
    """Logarithm of the ratio of two samples' variances, with the interval by Fisher's F; no number varies most."""
    infinite = [not np.isfinite(values).all() for values in (larger, smaller)]
    seeds = min(len(larger), len(smaller))
    if all(infinite) or seeds < 2:
        return Interval(math.nan, -math.inf, math.inf, seeds)
    top, bottom = (
        math.inf if no_number else float(np.var(values, ddof=1))
        for values, no_number in zip((larger, smaller), infinite, strict=True)
    )
    if top == bottom == 0:
        return Interval(math.nan, -math.inf, math.inf, seeds)
    middle = log_ratio(top, bottom)
    quantiles = (
        stats.f.ppf((1 + LEVEL) / 2, len(a) - 1, len(b) - 1)
        for a, b in ((larger, smaller), (smaller, larger))
    )
    down, up = (math.log(quantile) for quantile in quantiles)
    return Interval(middle, middle - down, middle + up, seeds)


def written(found: Interval, unit: str) -> str:
    """``+0.0060 nats (-0.0010 to +0.0130)``; logarithms of ratios as ratios, of which 0 is a loss never reached. One seed has no interval."""
    form = {"nats": "{:+.4f}", "ratio": "{:.2f}", "share": "{:.2%}", "points": "{:+.2f}"}[unit]
    if unit == "ratio" and not math.isfinite(found.mean):
        return _without_number(found)
    if math.isnan(found.mean):
        return "not known: a seed's run diverged"
    if unit == "share" and math.isinf(found.mean):
        return "not known: the gain to keep is not above 0 for sure"
    values = [float(np.exp(x)) if unit == "ratio" else x for x in found[:3]]
    mean, low, high = (form.format(value) for value in values)
    between = "one seed" if found.seeds == 1 else f"{low} to {high}"
    return f"{mean}{f' {unit}' if unit in ('nats', 'points') else ''} ({between})"


def _without_number(found: Interval) -> str:
    """Of a ratio: a run of an arm, or of both, diverged or did not reach the loss."""
    if math.isnan(found.mean):
        return "not known: diverged or not reached by a seed of either"
    if found.mean < 0:
        return "not reached by each seed" if found.high > -math.inf else "not reached"
    if found.low == math.inf:
        return "the other did not reach it"
    return f"{np.exp(found.low):.2f} or more, as the other did not reach it with each seed"


def log_ratio(top: float, bottom: float) -> float:
    if math.isnan(top) or math.isnan(bottom) or (top == bottom and not 0 < top < math.inf):
        return math.nan
    return (
        math.inf
        if bottom == 0 or top == math.inf
        else -math.inf
        if bottom == math.inf or top == 0
        else math.log(top / bottom)
    )
