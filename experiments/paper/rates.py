"""At which rate are models tuned? Pilots of a dense and a sparse model at a few rates, before the claims about tuning are run."""

import math
from pathlib import Path

from experiments import claims
from experiments.paper import finished, scorecard
from switchmoe.analysis import report, sweeps

ARMS = ("dense", "sparse")
HEADS = ["task", "rate", *(f"{what}, {arm}" for arm in ARMS for what in ("loss", "score")), "mean loss"]


def write(workdir: Path, scale: str, kept: Path | None = None) -> tuple[str, Path]:
    """Reads the pilots' runs in a scale's directory; returns the table as Markdown, and the file it is in.

    Raises:
      ValueError: a pilot is not done; one line.
    """
    done, rows, best = finished.read(workdir, scale, kept), [], {}
    pilots = claims.rate_pilots(scale)
    for task, rate in dict.fromkeys((task, rate) for task, rate, _ in pilots):
        found = [_run(done, scale, pilots[task, rate, arm]) for arm in ARMS]
        mean = sum(run.loss if run else math.inf for run in found) / len(found)
        rows.append([task, f"{rate:g}", *(cell for run in found for cell in _cells(run)), f"{mean:.4f}"])
        best[task] = min(best.get(task, (mean, rate)), (mean, rate))
    told = {task: f"{rate:g}" if math.isfinite(mean) else "none" for task, (mean, rate) in best.items()}
    chosen = "; ".join(f"{task} {rate}" for task, rate in told.items())
    lines = [f"# Rates of fine-tuning at scale `{scale}`", "", *scorecard.markdown_rows(HEADS, rows), ""]
    lines += [
        f"Held-out loss in nats a token of the answer, and the mean of the tasks' scores, at the end; seed {claims.RATES_SEED}, "
        f"which no claim uses. Of the lowest mean loss of both models: {chosen}. So the choice does not depend on which of them is ahead."
    ]
    path = workdir / "report" / "rates.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    report.write_whole(path, "\n".join(lines) + "\n")
    return path.read_text(encoding="utf-8"), path


def _run(done: finished.Finished, scale: str, arm: claims.Overrides) -> sweeps.Run | None:
    """None: its loss was no number."""
    overrides = claims.run_of(arm, claims.RATES_SEED, scale)
    outcome = done.run(overrides)
    if outcome is None:
        named = ", ".join(f"{field}={value}" for field, value in overrides.items())
        raise ValueError(f"--scale={scale}: the pilot {named} is not done; accepted is after all of them are")
    return outcome[0]


def _cells(run: sweeps.Run | None) -> list[str]:
    if run is None:
        return ["diverged", ""]
    return [f"{run.loss:.4f}", f"{run.scores['score'][1][-1]:.1f}"]
