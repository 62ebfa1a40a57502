"""What it takes to decide the claims: pilot runs, how they vary over seeds, and from that seeds and hours for each claim."""

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import claims
from experiments.claims import SCALES
from experiments.paper import finished, scorecard
from switchmoe.analysis import power, report, sweeps
from switchmoe.analysis.power import Spread
from switchmoe.analysis.verdicts import Check
from switchmoe.data import batches
from switchmoe.planning import flops
from switchmoe.runs import kinds
from switchmoe.runs.reporting import duration
from switchmoe.settings import Settings, from_config

SMALLEST = 0.01  # nats: below it a difference is of no use to anybody here
MEANS = (1, 2, 3)  # evaluations of which a loss is the mean
SPREAD_HEADS = [
    "after step",
    "loss is the mean of",
    "{} less {}",
    "st. dev. over seeds",
    "unpaired",
    "3 seeds decide",
]
# Of pilots' arms: a part of a claim is planned with the spread of the first pair if it has a dense arm, else of the second.
PAIRS = (("dense", "sparse"), ("sparse", "argmax"))
CLAIM_HEADS = ["claim", "part", "effect", "nats", "seeds", "hours of one core"]


def write(workdir: Path, scale: str, kept: Path | None = None) -> tuple[str, Path]:
    """Reads the pilots' runs in a scale's directory; returns the tables as Markdown, and the file they are in.

    Raises:
      ValueError: as `table`.
    """
    text, _ = table(workdir, scale, kept)
    path = workdir / "report" / "power.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    report.write_whole(path, text)
    return text, path


def table(workdir: Path, scale: str, kept: Path | None = None) -> tuple[str, list[list[str]]]:
    """(the tables as Markdown, lines of `CLAIM_HEADS`).

    Raises:
      ValueError: no pilots of two seeds are done; one line.
    """
    done = finished.read(workdir, scale, kept)
    arms = _pilots(done, scale)
    lines = [f"# Power at scale `{scale}`", "", *_origin(arms), ""]
    ends = {}  # a verdict is of the last evaluation
    for one, other in PAIRS:
        found = {last: power.spreads(arms[one], arms[other], last) for last in MEANS}
        ends[one, other] = found[1][-1]
        heads = [head.format(one, other) for head in SPREAD_HEADS]
        lines += [
            *scorecard.markdown_rows(heads, _spread_rows(found, [spread.step for spread in found[1]])),
            "",
        ]
    claimed = _claim_rows(scale, ends, done.base, _seconds_a_flop(arms))
    lines += [_explained(ends), "", *scorecard.markdown_rows(CLAIM_HEADS, claimed)]
    return "\n".join(lines) + "\n", claimed


def _pilots(done: finished.Finished, scale: str) -> dict[str, dict[int, sweeps.Run]]:
    """The pilots that are done, by arm and seed."""
    pilots = claims.pilots(scale)
    arms: dict[str, dict[int, sweeps.Run]] = {arm: {} for arm, _ in pilots}
    for (arm, seed), overrides in pilots.items():
        outcome = done.run(overrides)
        if outcome and outcome[0]:
            arms[arm][seed] = outcome[0]
    lacking = [arm for arm, runs in arms.items() if not runs]
    if lacking:
        raise ValueError(
            f"--scale={scale}: no pilot of {', '.join(lacking)} is done; accepted is after experiments.paper power"
        )
    return arms


def _seconds(run: sweeps.Run) -> float:
    """Of training."""
    return run.step_seconds * run.settings.train.num_steps


def run_flops(settings: Settings) -> float:
    """Of a run."""
    return flops.train_flops(settings, kinds.of(settings).lengths(settings)) * settings.train.num_steps


def _seconds_a_flop(arms: dict[str, dict[int, sweeps.Run]]) -> float:
    """Of the slower of the two arms, the median over its runs."""
    return max(
        float(np.median([_seconds(run) / run_flops(run.settings) for run in runs.values()]))
        for runs in arms.values()
    )


def millions(run: sweeps.Run) -> float:
    """Of tokens in a run; of a fine-tuned one with padding."""
    settings, data = run.settings, run.settings.data
    places = sum(kinds.of(settings).lengths(settings).values())
    row = places if settings.task.names else batches.real_tokens(data)
    return settings.train.num_steps * data.batch_size * row / 1e6


def _origin(arms: dict[str, dict[int, sweeps.Run]]) -> list[str]:
    run = next(iter(next(iter(arms.values())).values()))
    train = run.settings.train
    told = "; ".join(f"{name}: seeds {', '.join(map(str, runs))}" for name, runs in arms.items())
    times = "; ".join(
        f"{name} {duration(float(np.median([*map(_seconds, runs.values())])))}" for name, runs in arms.items()
    )
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


def _explained(ends: dict[tuple[str, str], Spread]) -> str:
    told = "; ".join(
        f"{end.high:.4f} nats for {one} against {other} ({end.paired:.4f} measured, {end.seeds} seeds), with which five seeds "
        f"decide a difference of {power.smallest_effect(5, end.high):.4f} nats with a chance of {power.POWER:.0%}"
        for (one, other), end in ends.items()
    )
    return (
        "The last column is the least difference that three seeds decide four times in five. Planned is with the upper end of "
        f"the 80 % interval of the spread at the end: {told}. A part between two sparse arms is planned with the second. Seeds "
        "are those at which the 95 % interval lies on one side of the claim's bound with that chance, if the true difference is "
        "as said. Parts whose figure is a ratio or a share are not in the table."
    )


def _claim_rows(
    scale: str, ends: dict[tuple[str, str], Spread], base: dict[str, Any], seconds: float
) -> list[list[str]]:
    """``seconds`` a FLOP: an arm's time goes with its FLOPs."""
    rows = []
    for claim in claims.tried(scale):
        arms = {
            name: from_config(finished.merged(base, claims.run_of(arm, 0, scale)))
            for name, arm in claim.arms(SCALES[scale]).items()
        }
        # Figures of a mixture's parts, or of tasks, have another spread.
        if claim.mixture or any(settings.task.names for settings in arms.values()):
            continue
        hours_a_seed = sum(map(run_flops, arms.values())) * seconds / 3600
        for check in claim.checks(SCALES[scale]):
            if check.unit != "nats":
                continue
            end = ends[PAIRS[all(arms[arm].sparse for arm in check.arms)]]
            for label, effect, distance, chance in _effects(check):
                seeds = power.seeds_needed(distance, end.high, chance)
                hours = "" if seeds is None else f"{seeds * hours_a_seed:.1f}"
                told = f"more than {power.MOST_SEEDS}" if seeds is None else str(seeds)
                rows.append([claim.name, check.says, label, f"{effect:g}", told, hours])
    return rows


def _effects(check: Check) -> Iterator[tuple[str, float, float, float]]:
    """(name, true difference in nats, how far that is from the claim's bound, chance to decide it at that bound)."""
    if math.isfinite(check.above) and math.isfinite(check.below):
        # Decided if both ends of the interval are: each is missed by half of those that may miss.
        yield "none", 0.0, check.below, (1 + power.POWER) / 2
        return
    if check.above < 0:  # "not worse by more than": decided where there is no difference
        yield "none", 0.0, -check.above, power.POWER
        return
    printed = re.match(r"(\d+\.?\d*) nats", check.paper)
    named = {"the paper's": float(printed[1])} if printed else {}
    for name, effect in (named | {"smallest worth knowing": SMALLEST}).items():
        yield name, effect, effect - check.above, power.POWER
