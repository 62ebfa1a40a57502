"""What it takes to decide the claims: pilot runs, how they vary over seeds, and from that seeds and hours for each claim."""

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from experiments import claims
from experiments.claims import SCALES
from experiments.paper import finished, scorecard
from switchmoe.analysis import power, report, sweeps
from switchmoe.analysis.power import Spread
from switchmoe.analysis.verdicts import Check
from switchmoe.data import batches
from switchmoe.runs.reporting import duration

SMALLEST = 0.01  # nats: below it a difference is of no use to anybody here
MEANS = (1, 2, 3)  # evaluations of which a loss is the mean
SPREAD_HEADS = [
    "after step",
    "loss is the mean of",
    "dense less sparse",
    "st. dev. over seeds",
    "unpaired",
    "3 seeds decide",
]
CLAIM_HEADS = ["claim", "part", "effect", "nats", "seeds", "hours of one core"]


def write(workdir: Path, scale: str, kept: Path | None = None) -> tuple[str, Path]:
    """Reads the pilots' runs in a scale's directory; returns the tables as Markdown, and the file they are in.

    Raises:
      ValueError: no pilots of two seeds are done; one line.
    """
    arms = _pilots(finished.read(workdir, scale, kept), scale)
    found, best, seconds = _measured(arms)
    lines = [f"# Power at scale `{scale}`", "", *_origin(arms, seconds), ""]
    lines += scorecard.markdown_rows(SPREAD_HEADS, _spread_rows(found, [spread.step for spread in found[1]]))
    lines += ["", _explained(best), ""]
    lines += scorecard.markdown_rows(CLAIM_HEADS, _claim_rows(scale, best, max(seconds.values())))
    path = workdir / "report" / "power.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines) + "\n"
    report.write_whole(path, text)
    return text, path


def costs(workdir: Path, scale: str, kept: Path) -> list[list[str]]:
    """Lines of `CLAIM_HEADS`.

    Raises:
      ValueError: as `write`.
    """
    _, best, seconds = _measured(_pilots(finished.read(workdir, scale, kept), scale))
    return _claim_rows(scale, best, max(seconds.values()))


def _measured(
    arms: dict[str, dict[int, sweeps.Run]],
) -> tuple[dict[int, list[Spread]], Spread, dict[str, float]]:
    """Spreads by how many evaluations a loss is the mean of, the least at the end, and seconds of a run by arm."""
    one, other = arms.values()
    found = {last: power.spreads(one, other, last) for last in MEANS}
    best = min((spreads[-1] for spreads in found.values() if spreads), key=lambda spread: spread.paired)
    return found, best, {name: _seconds(list(runs.values())) for name, runs in arms.items()}


def _pilots(done: finished.Finished, scale: str) -> dict[str, dict[int, sweeps.Run]]:
    """The pilots that are done, by arm and seed."""
    pilots = claims.pilots(scale)
    arms: dict[str, dict[int, sweeps.Run]] = {arm: {} for arm, _ in pilots}
    for (arm, seed), overrides in pilots.items():
        outcome = done.run(overrides)
        if outcome and outcome[0]:
            arms[arm][seed] = outcome[0]
    return arms


def _seconds(runs: Sequence[sweeps.Run]) -> float:
    """Of training a run."""
    return float(np.median([run.step_seconds * run.settings.train.num_steps for run in runs]))


def millions(run: sweeps.Run) -> float:
    """Of tokens in a run."""
    data = run.settings.data
    return run.settings.train.num_steps * data.batch_size * batches.real_tokens(data) / 1e6


def _origin(arms: dict[str, dict[int, sweeps.Run]], seconds: dict[str, float]) -> list[str]:
    run = next(iter(next(iter(arms.values())).values()))
    train = run.settings.train
    told = "; ".join(f"{name}: seeds {', '.join(map(str, runs))}" for name, runs in arms.items())
    times = "; ".join(f"{name} {duration(seconds[name])}" for name in arms)
    return [
        f"- Pilots, which no claim uses: {told}",
        f"- {train.num_steps} steps of {run.settings.data.batch_size} examples ({millions(run):.1f} M tokens), "
        f"{train.eval_batches} batches of held-out text",
        f"- Training a run: {times} ({run.device})",
    ]


def _spread_rows(found: dict[int, list[Spread]], steps: Sequence[int]) -> list[list[str]]:
    shown = [
        step for place, step in enumerate(steps) if (len(steps) - 1 - place) % max(1, len(steps) // 4) == 0
    ]
    return [
        [
            str(one.step),
            str(last),
            f"{one.mean:+.4f}",
            f"{one.paired:.4f}",
            f"{one.unpaired:.4f}",
            f"{power.smallest_effect(3, one.high):.4f}",
        ]
        for last, spreads in found.items()
        for one in spreads
        if one.step in shown
    ]


def _explained(best: Spread) -> str:
    least = power.smallest_effect(5, best.high)
    return (
        f"The last column is the least difference that three seeds decide four times in five. Planned is with the upper end of the 80 % interval of the smallest spread at the end, {best.high:.4f} nats "
        f"({best.paired:.4f} measured, {best.seeds} seeds). Five seeds then decide a difference of {least:.4f} nats with a "
        f"chance of {power.POWER:.0%}. Seeds are those at which the 95 % interval lies on one side of the claim's bound with that chance, if the true difference is as said. "
        f"Parts whose figure is a ratio or a share are not in the table."
    )


def _claim_rows(scale: str, best: Spread, seconds: float) -> list[list[str]]:
    rows = []
    for claim in claims.tried(scale):
        arms = len(claim.arms(SCALES[scale]))
        for check in claim.checks(SCALES[scale]):
            if check.unit != "nats":
                continue
            for label, effect, distance, chance in _effects(check):
                seeds = power.seeds_needed(distance, best.high, chance)
                hours = "" if seeds is None else f"{arms * seeds * seconds / 3600:.1f}"
                told = f"more than {power.MOST_SEEDS}" if seeds is None else str(seeds)
                rows.append([claim.name, check.says, label, f"{effect:g}", told, hours])
    return rows


def _effects(check: Check) -> Iterator[tuple[str, float, float, float]]:
    """(name, true difference in nats, how far that is from the claim's bound, chance to decide it at that bound)."""
    if math.isfinite(check.above) and math.isfinite(check.below):
        # Decided if both ends of the interval are: each is missed by half of those that may miss.
        yield "none", 0.0, check.below, (1 + power.POWER) / 2
        return
    printed = re.match(r"(\d+\.?\d*) nats", check.paper)
    named = {"the paper's": float(printed[1])} if printed else {}
    for name, effect in (named | {"smallest worth knowing": SMALLEST}).items():
        yield name, effect, effect - check.above, power.POWER
