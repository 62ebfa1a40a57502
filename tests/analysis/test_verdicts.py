"""The rule of verdicts on hand-made tables: each kind of check holds, does not hold, and can't be decided."""

import dataclasses
import math

import numpy as np
import pytest

from switchmoe.analysis import intervals, verdicts
from switchmoe.analysis.sweeps import Routing, Run
from switchmoe.analysis.verdicts import HELD, NOT_HELD, NOT_RUN, UNDECIDED
from switchmoe.settings import Settings


def run(*losses, seconds=1.0, dropped=0.0):
    """A run with held-out losses at steps 100, 200, ..., and so many seconds a step."""
    step_V = 100.0 * np.arange(1, len(losses) + 1)
    routing = Routing(0.5, dropped, 0.0, 1.0, 1.0, 0.0)
    return Run(
        "run", Settings(), 2, 1, step_V, np.array(losses, dtype=float), step_V, seconds * step_V, seconds, routing, "cpu", {}
    )  # fmt: skip


def table(**arms):
    """Runs by arm; a number is a run that ends at that loss, None one that diverged."""
    made = {
        arm: [one if one is None or isinstance(one, Run) else run(one) for one in runs]
        for arm, runs in arms.items()
    }
    return {arm: dict(enumerate(runs)) for arm, runs in made.items()}


def outcome(check, **arms):
    return verdicts.verdict([check], table(**arms)).outcome


WORSE = [4.00, 4.05, 4.10]


@pytest.mark.parametrize(
    "better, by, expected",
    [
        (
            [3.90, 3.95, 4.01],
            0.0,
            HELD,
        ),  # 0.10, 0.10, 0.09 below, though the ranges overlap: seeds are paired
        ([4.10, 4.15, 4.19], 0.0, NOT_HELD),
        ([3.90, 4.10, 4.11], 0.0, UNDECIDED),  # 0.10, -0.05, -0.01
        ([4.00, 4.05, 4.10], 0.0, UNDECIDED),  # the very same decides nothing
        ([3.90, 3.95, 4.01], 0.05, HELD),
        ([3.90, 3.95, 4.01], 0.2, NOT_HELD),
        ([3.90, 3.95, 4.01], 0.1, UNDECIDED),
        ([4.001, 4.051, 4.101], -0.005, HELD),  # not better, but not worse by 0.005
        ([3.90, 3.95], 0.0, UNDECIDED),  # two seeds
        ([], 0.0, NOT_RUN),
        ([None, None, None], 0.0, NOT_HELD),  # diverged
        ([3.90, 3.95, None], 0.0, UNDECIDED),
    ],
)
def test_a_lower_loss(better, by, expected):
    check = verdicts.lower("better", "worse", by=by)
    assert outcome(check, better=better, worse=WORSE) == expected


@pytest.mark.parametrize(
    "worse, expected",
    [([None, None, None], HELD), ([4.0, 4.0, None], UNDECIDED), ([4.0, 4.01, None], HELD)],
)
def test_a_run_that_diverged_is_worse_than_any(worse, expected):
    """Of two differences that are left, 0.1 and 0.11, the interval is above 0; 0.1 and 0.2 are too far apart."""
    better = [3.9, 3.9, 3.9] if expected == HELD else [3.9, 3.8, 3.9]
    assert outcome(verdicts.lower("better", "worse"), better=better, worse=worse) == expected


def test_where_all_runs_diverged_nothing_is_said():
    assert outcome(verdicts.lower("a", "b"), a=[None] * 3, b=[None] * 3) == UNDECIDED


@pytest.mark.parametrize(
    "other, expected",
    [([4.001, 4.049, 4.1], HELD), ([4.02, 4.07, 4.12], NOT_HELD), ([4.01, 4.05, 4.09], UNDECIDED)],
)
def test_equal_losses_within_a_margin(other, expected):
    assert outcome(verdicts.equal("one", "other", within=0.005), one=WORSE, other=other) == expected


@pytest.mark.parametrize(
    "seconds, expected",
    [([0.5, 0.52, 0.51], HELD), ([2.0, 2.1, 2.0], NOT_HELD), ([0.5, 1.0, 2.0], UNDECIDED)],
)
def test_faster_steps(seconds, expected):
    runs = [run(4.0, seconds=one) for one in seconds]
    assert outcome(verdicts.faster("fast", "slow"), fast=runs, slow=[4.0] * 3) == expected


@pytest.mark.parametrize(
    "against, seconds, last, expected",
    [
        ("steps", 1.0, [3.5, 3.4, 3.5], HELD),
        ("steps", 1.0, [4.5, 4.4, 4.5], NOT_HELD),  # the loss is never reached
        ("steps", 1.0, [3.5, 3.4, 4.5], UNDECIDED),
        ("time", 1.0, [3.5, 3.4, 3.5], HELD),
        ("time", 3.0, [3.5, 3.4, 3.5], NOT_HELD),  # in fewer steps, each of which takes three times as long
        ("time", 1.0, [], NOT_RUN),
    ],
)
def test_a_loss_reached_sooner(against, seconds, last, expected):
    fast = [run(5.0, one, one, seconds=seconds) for one in last]
    slow = [run(6.0, 5.0, 4.0)] * 3
    assert outcome(verdicts.sooner("fast", "slow", against), fast=fast, slow=slow) == expected


def test_a_speed_up_by_hand():
    """4.0 is reached at step 300 by the slow one, and at 150 by the fast one, whose steps take 1.5 s: 2 and 4 / 3."""
    arms = table(fast=[run(5.0, 3.0, seconds=1.5)] * 3, slow=[run(6.0, 5.0, 4.0)] * 3)
    for against, speed_up in (("steps", 2.0), ("time", 4 / 3)):
        found = verdicts.sooner("fast", "slow", against).interval(arms)
        assert math.exp(found.mean) == pytest.approx(speed_up)
        assert intervals.written(found, "ratio") == f"{speed_up:.2f} ({speed_up:.2f} to {speed_up:.2f})"


def test_the_loss_to_reach_may_be_a_third_ones():
    goal = [run(6.0, 5.5)] * 3
    check = verdicts.sooner("fast", "slow", "steps", to="goal")
    arms = table(fast=[run(5.5, 5.0)] * 3, slow=[run(6.5, 5.5)] * 3, goal=goal)
    assert math.exp(check.interval(arms).mean) == pytest.approx(2) and check.arms == ("fast", "slow", "goal")
    never = arms | table(slow=[run(6.5, 6.4)] * 3)
    assert verdicts.verdict([check], never).outcome == HELD
    assert intervals.written(check.interval(never), "ratio") == "the other did not reach it"
    assert "1.50 or more" in intervals.written(
        intervals.Interval(math.inf, math.log(1.5), math.inf, 3), "ratio"
    )
    assert "of either" in intervals.written(intervals.Interval(math.nan, -math.inf, math.inf, 3), "ratio")
    unreached = verdicts.sooner("slow", "fast", "steps", to="goal").interval(never)
    assert intervals.written(unreached, "ratio") == "not reached"
    assert verdicts.verdict([check], never | table(fast=[run(6.5, 6.4)] * 3)).outcome == UNDECIDED


@pytest.mark.parametrize(
    "steady, other, expected",
    [
        ([4.00, 4.01, 4.02, 4.01, 4.00], [4.0, 4.5, 3.5, 4.2, 3.9], HELD),
        ([4.0, 4.5, 3.5, 4.2, 3.9], [4.00, 4.01, 4.02, 4.01, 4.00], NOT_HELD),
        ([4.00, 4.01, 4.02, 4.01, 4.00], [4.00, 4.02, 4.04, 4.02, 4.00], UNDECIDED),  # 4, below 9.6
        ([4.0, 4.1, 4.2], [4.0, None, 4.1], HELD),
        ([4.0, None, 4.2], [4.0, None, 4.1], UNDECIDED),
    ],
)
def test_a_smaller_variance(steady, other, expected):
    assert outcome(verdicts.steadier("steady", "other"), steady=steady, other=other) == expected


@pytest.mark.parametrize(
    "shares, expected",
    [([0.004, 0.005, 0.006], HELD), ([0.05, 0.06, 0.05], NOT_HELD), ([0.005, 0.005, 0.02], UNDECIDED)],
)
def test_a_share_below_a_bound(shares, expected):
    check = verdicts.below("arm", verdicts.dropped, "dropped", 0.01)
    assert outcome(check, arm=[run(4.0, dropped=share) for share in shares]) == expected


@pytest.mark.parametrize(
    "shares, fewer, alike",
    [
        ([0.01, 0.02, 0.01], HELD, NOT_HELD),
        ([0.30, 0.31, 0.30], NOT_HELD, NOT_HELD),
        ([0.10, 0.101, 0.099], UNDECIDED, HELD),
        ([0.05, 0.20, 0.01], UNDECIDED, UNDECIDED),
    ],
)
def test_shares_of_two_arms(shares, fewer, alike):
    runs = [run(4.0, dropped=share) for share in shares]
    others = [run(4.0, dropped=0.1)] * 3
    checks = [
        verdicts.fewer("one", "other", verdicts.dropped, "dropped"),
        verdicts.alike("one", "other", verdicts.dropped, "dropped", within=0.01),
    ]
    found = verdicts.verdict(checks, table(one=runs, other=others))
    assert [finding.outcome for finding in found.findings] == [fewer, alike]


@pytest.mark.parametrize(
    "other, expected",
    [([None, None, run(4.0, 4.2)], HELD), ([None, 4.0, None], UNDECIDED), ([4.0, 4.0, 4.0], UNDECIDED)],
)
def test_fewer_unstable_runs(other, expected):
    """A run that diverged, and one that ends 0.2 above its lowest loss, are unstable."""
    assert outcome(verdicts.stabler("stable", "other"), stable=[4.0] * 3, other=other) == expected
    assert outcome(verdicts.stabler("stable", "other"), stable=[None] * 3, other=[4.0] * 3) == NOT_HELD


def test_shares_of_unstable_runs_by_hand():
    """Wilson, 3 of 3: from 0.4385; 0 of 3: to 0.5615. Newcombe: 1 - sqrt(2) 0.5615."""
    check = verdicts.stabler("stable", "other")
    found = check.interval(table(stable=[4.0] * 3, other=[None] * 3))
    assert found == pytest.approx((1.0, 1 - math.sqrt(2) * 0.5615, 1.0, 3), abs=1e-4)


def test_a_ratio_of_means_by_hand():
    """Over numbers without noise its ends are Student's over them; else where the means' distance is t standard errors."""
    half = 4.30265 / math.sqrt(3)
    found = intervals.ratio_interval([1.0, 2.0, 3.0], [10.0] * 3)
    assert found == pytest.approx((0.2, (2 - half) / 10, (2 + half) / 10, 3), rel=1e-5)
    low, high = intervals.ratio_interval([1.0, 2.0, 3.5], [9.0, 10.0, 12.0])[1:3]
    for end in (low, high):
        gaps = [top - end * bottom for top, bottom in zip([1.0, 2.0, 3.5], [9.0, 10.0, 12.0], strict=True)]
        mean = sum(gaps) / 3
        deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / 2)
        assert abs(mean) == pytest.approx(4.30265 * deviation / math.sqrt(3), rel=1e-5)


@pytest.mark.parametrize(
    "teacher, why",
    [([5.0, 5.1, 5.2], "not above 0 for sure"), ([3.0, 4.1, 3.9], "not above 0 for sure"), ([None, 3.0, 3.0], "diverged")],
    ids=["no gain", "maybe", "diverged"],
)  # fmt: skip
def test_nothing_is_kept_of_a_gain_that_is_none(teacher, why):
    check = verdicts.gain_kept("student", "dense", "teacher", (0.15, math.inf))
    losses = dict(student=[4.2, 4.21, 4.2], dense=[4.0, 4.01, 4.0], teacher=teacher)
    assert outcome(check, **losses) == UNDECIDED
    assert intervals.written(check.interval(table(**losses)), "share").endswith(why)


def test_a_claim_that_asks_for_more_seeds_waits_for_them():
    arms = table(low=[3.0] * 4, high=[4.0] * 4)
    check = verdicts.lower("low", "high")
    assert [verdicts.verdict([check], arms, seeds).outcome for seeds in (1, 4, 5)] == [HELD, HELD, UNDECIDED]


def test_times_that_were_not_measured_decide_nothing():
    arms = table(fast=[run(4.0, seconds=0.5)] * 3, slow=[4.0] * 3)
    checks = [verdicts.faster("fast", "slow"), verdicts.equal("fast", "slow", within=0.1)]
    for measured, expected in ((True, [HELD, HELD]), (False, [UNDECIDED, HELD])):
        found = verdicts.verdict(checks, arms, measured=measured)
        assert [finding.outcome for finding in found.findings] == expected


def test_intervals_by_hand():
    """t(0.975, 2) = 4.3027, F(0.975, 2, 2) = 39."""
    half = 4.30265 / math.sqrt(3)
    assert intervals.t_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - half, 2 + half, 3), rel=1e-5)
    found = intervals.f_interval([0.0, 2.0, 4.0], [0.0, 1.0, 2.0])
    assert [math.exp(x) for x in found[:3]] == pytest.approx([4, 4 / 39, 4 * 39])
    assert intervals.t_interval([math.inf, 1.0, 1.0]) == (math.inf, 1.0, math.inf, 3)
    assert intervals.t_interval([math.inf, -math.inf])[1:3] == (-math.inf, math.inf)


@pytest.mark.parametrize(
    "parts, whole",
    [
        ((HELD, HELD), HELD),
        ((HELD, UNDECIDED), UNDECIDED),
        ((HELD, NOT_HELD, UNDECIDED, NOT_RUN), NOT_HELD),
        ((HELD, NOT_RUN, UNDECIDED), NOT_RUN),
    ],
)
def test_a_claim_holds_where_all_its_parts_do(parts, whole):
    arms = table(low=[3.0] * 3, lower=[2.0] * 3, mixed=[2.9, 3.2, 3.0])
    against = {
        HELD: ("lower", "low"),
        NOT_HELD: ("low", "lower"),
        UNDECIDED: ("mixed", "low"),
        NOT_RUN: ("none", "low"),
    }
    found = verdicts.verdict([verdicts.lower(*against[part]) for part in parts], arms)
    assert (found.outcome, tuple(finding.outcome for finding in found.findings)) == (whole, parts)


def test_only_seeds_that_all_arms_have_are_compared():
    arms = table(a=[3.0, 3.0, 3.0, 9.0], b=[4.0, 4.0, 4.0])
    (finding,) = verdicts.verdict([verdicts.lower("a", "b")], arms).findings
    assert finding.outcome == HELD and finding.interval == (1.0, 1.0, 1.0, 3)
    assert intervals.written(finding.interval, "nats") == "+1.0000 nats (+1.0000 to +1.0000)"


def test_what_has_no_interval_is_written_without_one():
    one = intervals.t_interval([0.25])
    assert intervals.written(one, "nats") == "+0.2500 nats (one seed)"
    assert intervals.written(one, "ratio") == "1.28 (one seed)"
    assert "not known" in intervals.written(intervals.t_interval([1.0, math.nan]), "nats")
    assert (
        intervals.written(intervals.t_interval([1.0, 1.0, math.inf]), "nats") == "+inf nats (+1.0000 to +inf)"
    )


@pytest.mark.parametrize("seconds", [0.0, math.nan, math.inf])
def test_a_speed_that_is_no_number_decides_nothing(seconds):
    """Of steps whose time was not measured on either side, or without end."""
    strange = [dataclasses.replace(run(4.0), step_seconds=seconds) for _ in range(3)]
    assert outcome(verdicts.faster("a", "b"), a=strange, b=strange) == UNDECIDED


@pytest.mark.parametrize(
    "after, expected", [([62, 63, 65], HELD), ([52, 53, 55], NOT_HELD), ([58, 57, 58], UNDECIDED)]
)
def test_a_larger_gain(after, expected):
    """Dense gains 6, 6 and 7 points; the other from 50, 51 and 52 to these."""

    def scored(points):
        return [
            dataclasses.replace(run(4.0), scores={"score": (np.array([100.0]), np.array([float(p)]))})
            for p in points
        ]

    check = verdicts.gains_more(("sparse", "sparse tuned"), ("dense", "dense tuned"))
    arms = {"sparse": [50, 51, 52], "sparse tuned": after, "dense": [40, 41, 42], "dense tuned": [46, 47, 49]}
    assert outcome(check, **{arm: scored(points) for arm, points in arms.items()}) == expected
