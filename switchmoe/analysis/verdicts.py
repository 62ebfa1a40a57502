"""Did a claim hold? What runs of several seeds say of it, by one rule set beforehand. Pure functions of the runs.

A `Check` takes a figure from the runs and says in which range it lies if the claim is true; the figure has a
95 % interval over the seeds. Mostly it is a mean over seeds of a difference between two runs of one seed (the
same batches in the same order), with Student's t.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from scipy import stats

from switchmoe.analysis.intervals import LEVEL, Interval, f_interval, log_ratio, ratio_interval, t_interval
from switchmoe.analysis.sweeps import Run, first_reached

MIN_SEEDS = 3
UNSTABLE = 0.1  # nats that the held-out loss ends above its lowest
HELD, NOT_HELD, UNDECIDED, NOT_RUN = "held", "did not hold", "not decidable at this scale", "not run"
RULE = (
    "Of each seed one figure is taken, such as the difference in held-out loss between two runs of that seed; the mean over "
    f"seeds has a {LEVEL:.0%} interval by Student's t (that of two variances' ratio is Fisher's F). A part of a claim held if the "
    "whole interval lies where the claim says, did not hold if all of it lies outside, and is not decidable at this scale if it "
    f"reaches across or if there are fewer seeds than the claim asks for, at least {MIN_SEEDS}: differences smaller than the noise decide nothing. A claim held "
    "if all its parts did, did not if one did not. A run that stopped at a loss that is not a number is worse than any other. "
    "Times are of steps timed in turn, a seed's of a process of its own; without such a measurement nothing about time is decided. Differences are positive and ratios above 1 where they speak for the claim. Of parts in which there is no difference, about "
    "one in twenty is decided by chance."
)

Table = Mapping[
    str, Mapping[int, Run | None]
]  # runs by arm and seed; None: stopped at a loss that is no number


class Check(NamedTuple):
    """One part of a claim: ``interval(table)`` lies between ``above`` and ``below`` if it is true."""

    says: str
    arms: tuple[str, ...]  # those it needs
    interval: Callable[[Table], Interval]
    above: float
    below: float
    unit: str  # nats | ratio | share | points: how the figure is written
    paper: str = ""  # the paper's figure, "" where it gives none
    timed: bool = False  # of how long a step takes


class Finding(NamedTuple):
    check: Check
    outcome: str
    interval: Interval | None  # None: not run


class Verdict(NamedTuple):
    outcome: str
    findings: list[Finding]


def verdict(checks: Sequence[Check], table: Table, seeds: int = MIN_SEEDS, measured: bool = True) -> Verdict:
    """What the runs say of a claim: see `RULE`.

    Args:
      seeds: that the claim asks for.
      measured: whether the runs' times were taken in turn.
    """
    findings = [_find(check, table, seeds, measured) for check in checks]
    outcomes = [finding.outcome for finding in findings]
    worst = next((one for one in (NOT_HELD, NOT_RUN, UNDECIDED) if one in outcomes), HELD)
    return Verdict(worst, findings)


def _find(check: Check, table: Table, wanted: int, measured: bool) -> Finding:
    seeds = set.intersection(*(set(table.get(arm, ())) for arm in check.arms))
    if not seeds:
        return Finding(check, NOT_RUN, None)
    common = {arm: {seed: table[arm][seed] for seed in sorted(seeds)} for arm in check.arms}
    found = check.interval(common)
    inside = (found.low > check.above or check.above == -math.inf) and (
        found.high < check.below or check.below == math.inf
    )
    if len(seeds) < max(wanted, MIN_SEEDS) or math.isnan(found.mean) or (check.timed and not measured):
        return Finding(check, UNDECIDED, found)
    if inside:
        return Finding(check, HELD, found)
    outside = found.high < check.above or found.low > check.below
    return Finding(check, NOT_HELD if outside else UNDECIDED, found)


def lower(better: str, worse: str, by: float = 0.0, paper: str = "") -> Check:
    """The held-out loss of ``better`` ends below that of ``worse``, by more than ``by`` nats; ``by`` < 0: at most so much above."""
    more = f" by more than {by:g} nats" if by > 0 else f", or above by less than {-by:g} nats" if by else ""
    return paired(
        f"loss of {better} below {worse}{more}",
        better,
        worse,
        _loss_difference,
        (by, math.inf),
        "nats",
        paper,
    )


def equal(one: str, other: str, within: float, paper: str = "") -> Check:
    """Held-out losses that differ by less than ``within`` nats."""
    says = f"loss of {one} within {within:g} nats of {other}"
    return paired(says, one, other, _loss_difference, (-within, within), "nats", paper)


def better(one: str, other: str, by: float = 0.0, metric: str = "score", paper: str = "") -> Check:
    """A metric of tasks of ``one`` ends above that of ``other``, by more than ``by`` points (of 0 to 100)."""

    def difference(one: Run | None, other: Run | None) -> float:
        return _score(one, metric) - _score(other, metric)

    more = f" by more than {by:g}" if by > 0 else f", or below by less than {-by:g}" if by else ""
    says = f"{metric} of {one} above {other}{more}"
    return paired(says, one, other, difference, (by, math.inf), "points", paper)


def gains_more(one: tuple[str, str], other: tuple[str, str], metric: str = "score", paper: str = "") -> Check:
    """From the first to the second of two arms a tasks' metric gains more points than it does from the first to the second of another two."""

    def interval(table: Table) -> Interval:
        def gain(pair: tuple[str, str], seed: int) -> float:
            before, after = (_score(table[arm][seed], metric) for arm in pair)
            return after - before

        return t_interval([gain(one, seed) - gain(other, seed) for seed in table[one[0]]])

    says = f"{metric} gains more from {one[0]} to {one[1]} than from {other[0]} to {other[1]}"
    return Check(says, (*one, *other), interval, 0.0, math.inf, "points", paper)


def gain_kept(
    student: str,
    baseline: str,
    teacher: str,
    accepted: tuple[float, float],
    metric: str = "",
    paper: str = "",
) -> Check:
    """The share of the teacher's gain over ``baseline`` that the student keeps, of the loss or of a tasks' metric.

    The ratio of two means over seeds, of what student and teacher gain, so that one seed's small gain does not blow up its share
    (`ratio_interval`). Unknown where the teacher's gain is not above 0 for sure.
    """

    def value(run: Run | None) -> float:
        return -_loss(run) if not metric else _score(run, metric)

    def interval(table: Table) -> Interval:
        kept, whole = (
            [value(table[arm][seed]) - value(table[baseline][seed]) for seed in table[arm]]
            for arm in (student, teacher)
        )
        return ratio_interval(kept, whole)

    low, high = accepted
    what = f"share of the gain of {teacher} that {student} keeps"
    says = f"{what} between {low:.0%} and {high:.0%}" if high < math.inf else f"{what} above {low:.0%}"
    return Check(says, (student, baseline, teacher), interval, low, high, "share", paper)


def faster(fast: str, slow: str, paper: str = "") -> Check:
    """A step of ``fast`` takes less time."""

    def speed_up(fast: Run | None, slow: Run | None) -> float:
        return math.nan if fast is None or slow is None else log_ratio(slow.step_seconds, fast.step_seconds)

    says = f"steps of {fast} faster than {slow}"
    return paired(says, fast, slow, speed_up, (0.0, math.inf), "ratio", paper)._replace(timed=True)


def sooner(fast: str, slow: str, against: str, to: str = "", paper: str = "") -> Check:
    """``fast`` reaches the lowest held-out loss of ``to`` (default: of ``slow``) in less time or fewer steps than ``slow``.

    Args:
      against: time | steps.
    """
    goal = to or slow

    def interval(table: Table) -> Interval:
        return t_interval(
            [
                log_ratio(*(_reached(table[arm][seed], table[goal][seed], against) for arm in (slow, fast)))
                for seed in table[fast]
            ]
        )

    says = f"{fast} reaches the loss of {goal} in less {against} than {slow}".replace(
        "less steps", "fewer steps"
    )
    arms = tuple(dict.fromkeys((fast, slow, goal)))
    return Check(says, arms, interval, 0.0, math.inf, "ratio", paper, timed=against == "time")


def below(arm: str, figure: Callable[[Run], float], what: str, bound: float, paper: str = "") -> Check:
    """A share of each run of ``arm`` is below ``bound``."""

    def interval(table: Table) -> Interval:
        return t_interval([math.inf if run is None else figure(run) for run in table[arm].values()])

    return Check(f"{what} of {arm} below {bound:g}", (arm,), interval, -math.inf, bound, "share", paper)


def steadier(steady: str, other: str, paper: str = "") -> Check:
    """The final loss of ``steady`` varies less over seeds: the ratio of the variances, with the interval of F."""

    def interval(table: Table) -> Interval:
        return f_interval(*([_loss(run) for run in table[arm].values()] for arm in (other, steady)))

    says = f"variance over seeds of {steady} below {other}"
    return Check(says, (steady, other), interval, 0.0, math.inf, "ratio", paper)


def stabler(stable: str, other: str, paper: str = "") -> Check:
    """Fewer runs of ``stable`` are unstable: stop at a loss that is no number, or end UNSTABLE above their lowest loss.

    A difference of two shares, with the interval of Newcombe (1998, method 10): Student's t takes three of three for certain.
    """

    def interval(table: Table) -> Interval:
        mean, low, high = 0.0, 0.0, 0.0
        for arm, sign in ((other, 1), (stable, -1)):
            count, runs = sum(map(_unstable, table[arm].values())), len(table[arm])
            wilson = stats.binomtest(count, runs).proportion_ci(LEVEL, "wilson")
            ends = sorted(sign * (end - count / runs) for end in (wilson.low, wilson.high))
            mean, low, high = mean + sign * count / runs, low + ends[0] ** 2, high + ends[1] ** 2
        return Interval(mean, mean - math.sqrt(low), mean + math.sqrt(high), len(table[stable]))

    says = f"fewer unstable runs of {stable} than of {other}"
    return Check(says, (stable, other), interval, 0.0, math.inf, "share", paper)


def dropped(run: Run) -> float:
    """Share of the choices dropped, mean over sparse layers and over the last tenth of training."""
    return run.routing.dropped_last if run.routing else 0.0


def fewer(one: str, other: str, figure: Callable[[Run], float], what: str, paper: str = "") -> Check:
    """A share of each run of ``one`` is below that of ``other``."""
    return _shares(f"{what} of {one} below {other}", one, other, figure, (0.0, math.inf), paper)


def alike(
    one: str, other: str, figure: Callable[[Run], float], what: str, within: float, paper: str = ""
) -> Check:
    """A share of each run of ``one`` differs by less than ``within`` from that of ``other``."""
    says = f"{what} of {one} within {within:g} of {other}"
    return _shares(says, one, other, figure, (-within, within), paper)


def paired(
    says: str,
    one: str,
    other: str,
    figure: Callable[[Run | None, Run | None], float],
    accepted: tuple[float, float],
    unit: str,
    paper: str,
) -> Check:
    """A check of a figure of two arms' runs of one seed: its mean over the seeds lies between ``accepted``."""

    def interval(table: Table) -> Interval:
        return t_interval([figure(table[one][seed], table[other][seed]) for seed in table[one]])

    return Check(says, (one, other), interval, *accepted, unit, paper)


def _shares(
    says: str,
    one: str,
    other: str,
    figure: Callable[[Run], float],
    accepted: tuple[float, float],
    paper: str,
) -> Check:
    def difference(one: Run | None, other: Run | None) -> float:
        return math.nan if one is None or other is None else figure(other) - figure(one)

    return paired(says, one, other, difference, accepted, "share", paper)


def _loss(run: Run | None) -> float:
    return math.inf if run is None else run.loss


def _score(run: Run | None, metric: str) -> float:
    """At the end; no number of a run that diverged or has no such metric."""
    return math.nan if run is None or metric not in run.scores else float(run.scores[metric][1][-1])


def _loss_difference(better: Run | None, worse: Run | None) -> float:
    both = better is None and worse is None
    return math.nan if both else _loss(worse) - _loss(better)


def _reached(run: Run | None, goal: Run | None, against: str) -> float:
    """Seconds or steps until a run has the goal's lowest loss; infinite if it never has."""
    if goal is None:
        return math.nan
    step = None if run is None else first_reached(run.step_V, run.loss_V, float(goal.loss_V.min()))
    if step is None:
        return math.inf
    return step if against == "steps" else float(run.seconds_at(step))


def _unstable(run: Run | None) -> bool:
    return run is None or run.loss > float(run.loss_V.min()) + UNSTABLE
