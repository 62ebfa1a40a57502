"""The exponent of the routed scaling law, seed by seed: of losses that are on the law, and of runs that diverged."""

import math
from types import SimpleNamespace

import pytest

from switchmoe.analysis import exponents, scaling
from switchmoe.analysis.verdicts import HELD, UNDECIDED, verdict

LAW = scaling.PUBLISHED["S-BASE"]
ARMS = {"dense": 1} | {f"E={n}": n for n in (2, 8, 32, 128)}


def table(rise):
    """Runs of four seeds on S-BASE's law of 25 M parameters, of which each seed's are a little better or worse."""
    return {
        arm: {
            seed: SimpleNamespace(loss=float(LAW.loss(25e6, experts)) * rise(seed, experts))
            for seed in range(4)
        }
        for arm, experts in ARMS.items()
    }


def test_the_published_laws_own_exponent_is_found():
    check = exponents.falls(ARMS)
    exponent = LAW.b + LAW.c * math.log10(25e6)
    found = check.interval(table(lambda seed, experts: 1 + 0.01 * seed))
    assert found.mean == pytest.approx(-exponent * math.log(10)) and found.high == pytest.approx(found.low)
    assert found.seeds == 4 and verdict([check], table(lambda seed, experts: 1)).outcome == HELD


def test_a_loss_that_rises_with_the_experts_and_one_that_is_no_number():
    check = exponents.falls(ARMS)
    rises = table(lambda seed, experts: experts**0.1)
    assert check.interval(rises).high < 0
    rises["E=8"][1] = None
    assert verdict([check], rises).outcome == UNDECIDED
