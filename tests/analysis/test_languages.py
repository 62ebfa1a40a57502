"""Checks of every language on hand-made runs: the least difference, the mean speed-up, the share that is fast."""

import dataclasses

import numpy as np
import pytest
from test_verdicts import outcome, run

from switchmoe.analysis import languages
from switchmoe.analysis.verdicts import HELD, NOT_HELD, UNDECIDED


def of(**ends):
    """A run whose loss in each language falls by 0.1 every 100 steps from 1 above its end; ends by language."""
    steps = 100.0 * np.arange(1, 12)
    parts = {part: (steps, end + 1 - 0.1 * np.arange(11)) for part, end in ends.items()}
    return dataclasses.replace(run(4.0), parts=parts)


SLOW = [of(de=3.0 + noise, fi=3.5 + noise) for noise in (0.0, 0.01, 0.02)]


@pytest.mark.parametrize(
    "finnish, expected", [((3.4, 3.41, 3.42), HELD), ((3.6, 3.61, 3.62), NOT_HELD), ((3.4, 3.61, 3.42), UNDECIDED)]
)  # fmt: skip
def test_every_language_must_be_better(finnish, expected):
    fast = [of(de=2.5, fi=end) for end in finnish]
    assert outcome(languages.all_lower("fast", "slow"), fast=fast, slow=SLOW) == expected


def test_speed_ups_are_in_steps_to_the_others_last_loss():
    """0.5 below at the end is 500 of 1,100 steps sooner; what is never reached is 0."""
    found = languages.speed_ups(of(de=2.5, fi=3.6), SLOW[0])
    assert found == pytest.approx({"de": 1100 / 600, "fi": 0.0})


def test_the_mean_speed_up_and_the_share_that_is_so_many_times_as_fast():
    fast = [of(de=2.5 + noise, fi=3.4 + noise) for noise in (0.0, 0.01, 0.03)]
    mean = languages.mean_sooner("fast", "slow")
    assert outcome(mean, fast=fast, slow=SLOW) == HELD
    one = np.exp(mean.interval({"fast": {0: fast[0]}, "slow": {0: SLOW[0]}}).mean)
    assert one == pytest.approx((1100 / 600 * 1100 / 1000) ** 0.5)
    behind = [of(de=2.5, fi=3.6)] * 3
    assert outcome(mean, fast=behind, slow=SLOW) == NOT_HELD
    share = languages.share_sooner("fast", "slow", 1.5, 0.4)
    assert share.interval({"fast": {0: fast[0]}, "slow": {0: SLOW[0]}}).mean == 0.5
    assert outcome(share, fast=fast, slow=SLOW) == HELD
    assert outcome(languages.share_sooner("fast", "slow", 4.0, 0.9), fast=fast, slow=SLOW) == NOT_HELD
    assert outcome(mean, fast=[None] * 3, slow=SLOW) == UNDECIDED
