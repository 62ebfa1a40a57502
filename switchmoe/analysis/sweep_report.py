"""A sweep's analysis as files: `report.html` with its pictures in it, `points.csv`, `speedups.csv`, `fit.json`."""

import csv
import dataclasses
import io
import json
import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from switchmoe.analysis import report, scaling, sweep_plots, sweeps
from switchmoe.analysis.scaling import Fit
from switchmoe.analysis.sweeps import Group, Run, Spread, Sweep
from switchmoe.runs.reporting import duration
from switchmoe.runs.rundir import REPORT_FILE

POINTS_FILE, SPEED_UPS_FILE, FIT_FILE = "points.csv", "speedups.csv", "fit.json"
CAPTIONS = {
    "loss_experts": "Held-out loss at the end of training against the number of experts: mean over the seeds, and bars from the least "
    "to the greatest where there are several. Dashed: the fitted scaling law, where the loss falls as it has it. (The paper's figures 1, left, and 4.)",
    "loss_steps": "Held-out loss over the steps, a line for each number of experts; dashed the dense model's final loss. "
    "Bands go from the least to the greatest seed. (The paper's figure 4, right.)",
    "loss_time": "Held-out loss over the time spent in training steps, on the device named below; evaluations, checkpoints and "
    "compilation are left out. (The paper's figure 5.)",
    "speedups": "How much sooner than the dense model its final held-out loss is reached, in steps and in time of training. A cross: "
    "not every seed reaches it. \N{GREATER-THAN OR EQUAL TO}: it is reached by the first evaluation, and when before that is not known. Both axes are logarithmic.",
    "published": "Loss over that of the dense model, beside the S-BASE models of the nearest size of Clark et al. (2022, DeepMind, "
    "CC BY 4.0) after 10,000 steps and at the end (about 250,000), and their fitted law at this sweep's size. Their text, "
    "their tokens and their decoder-only models are others: shapes can be compared, levels cannot.",
    "routing": "Left: choices dropped because their expert was full, mean over the sparse layers, in the first tenth (dotted) and the last tenth of training. "
    "Right: load of the busiest and the idlest (dotted) expert of all sparse layers, mean over the last tenth of training.",
    "size": "Left: parameters, and those that a token uses (dotted). Right: bytes of parameters and optimizer state on one device, "
    "from their shapes; activations and gradients come on top.",
}
INTERPOLATION = (
    "A held-out curve is replaced by the lowest loss so far, which is taken to be linear in the step between two "
    "evaluations; a loss reached by the first evaluation counts as reached at it, which makes "
    "its speed-up a lower bound. The target is the mean over the dense "
    "model's seeds of their lowest loss (the final one of a curve that falls to its end), and the steps and the time are "
    "those at which they came to it. Spreads are over the seeds that reach the target; a mean is given where all do."
)


def write(sweep: Sweep, out_dir: str | os.PathLike, title: str) -> Path:
    """Analyses the runs and writes all files (each at once, or not at all) to ``out_dir``.

    Returns:
      the path of `report.html`.
    """
    directory = Path(out_dir)
    directory.mkdir(parents=True, exist_ok=True)
    groups = sweeps.group(sweep.runs)
    fits, reasons = fit_families(groups)
    pictures = sweep_plots.save_all(groups, drawn(groups, fits), directory / "plots")
    report.write_whole(directory / POINTS_FILE, _csv(point(one, run) for one, run in _members(groups)))
    lines = [speed_up_line(one, up) for one in groups for up in sweeps.speed_ups(one)]
    report.write_whole(directory / SPEED_UPS_FILE, _csv(lines))
    report.write_whole(directory / FIT_FILE, json.dumps(fits_as_json(groups, fits, reasons), indent=2) + "\n")
    sections = [
        f"<h1>{escape(title)}</h1>",
        report.tiles(headline(sweep, groups, fits)),
        *(report.picture(path, _caption(path, label)) for path, label in pictures),
        "<h2>Loss by experts</h2>", _losses(groups),
        "<h2>Speed-up to the dense model's final loss</h2>", _speed_ups(groups),
        "<h2>The scaling law</h2>", _fits(groups, fits, reasons),
        "<h2>Routing</h2>", _routing(groups),
        "<h2>Left out</h2>", _left_out(sweep.left_out),
        "<h2>Device and versions</h2>", _origins(sweep.runs),
    ]  # fmt: skip
    path = directory / REPORT_FILE
    report.write_whole(path, report.document(title, sections))
    return path


def fit_families(groups: Sequence[Group]) -> tuple[dict[str, Fit], dict[str, str]]:
    """The law fitted to each family of groups; of those that can't be fitted, why."""
    fits, reasons = {}, {}
    for family in dict.fromkeys(one.family for one in groups):
        points = [
            (one.size, experts, run.loss)
            for one in groups
            if one.family == family
            for experts, runs in one.cells.items()
            for run in runs
        ]
        try:
            fits[family] = scaling.fit(*zip(*points, strict=True))
        except ValueError as error:
            reasons[family] = str(error)
    return fits, reasons


def drawn(groups: Sequence[Group], fits: dict[str, Fit]) -> list[Fit | None]:
    """Of each group the law for its pictures: one that the runs do not determine is no picture of them."""
    found = [fits.get(one.family) for one in groups]
    return [fit if fit and fit.falls else None for fit in found]


def point(one: Group, run: Run) -> dict[str, Any]:
    """A line of `points.csv`: shares, not percentages; nats, seconds, bytes; empty where it does not apply."""
    tokens = run.settings.data.batch_size * run.step_V[-1]
    dense = sweeps.spread([dense.loss for dense in one.dense])
    row = {
        "run": run.name, "group": one.label, "num_experts": run.experts, "seed": run.seed,
        "parameters": run.parameters, "parameters_active": run.parameters_active, "size": one.size,
        "state_bytes": sweeps.state_bytes(run), "steps": int(run.step_V[-1]), "sequences": int(tokens),
        "loss": run.loss, "loss_lowest": float(run.loss_V.min()),
        "gain_over_dense": dense.mean - run.loss if dense else None,
        "train_seconds": float(run.seconds_T[-1]) if len(run.seconds_T) else None,
        "step_seconds": run.step_seconds if len(run.seconds_T) else None,
    }  # fmt: skip
    return row | (run.routing._asdict() if run.routing else dict.fromkeys(sweeps.Routing._fields))


SPEED_UP_FIELDS = (
    "group", "num_experts", "target_loss", "runs", "reached", "at_first", "step_mean", "step_min", "step_max",
    "time_mean", "time_min", "time_max",
)  # fmt: skip


def speed_up_line(one: Group, up: sweeps.SpeedUp) -> dict[str, Any]:
    """A line of `speedups.csv`; a mean is empty where not every run reaches the target."""
    loss, _, _ = sweeps.target(one.dense)
    found = [one.label, up.experts, loss, up.runs, up.reached, up.at_first]
    for values in (up.step, up.time):
        found += (
            [None] * 3 if values is None else [values.mean if up.reached == up.runs else None, *values[1:]]
        )
    return dict(zip(SPEED_UP_FIELDS, found, strict=True))


def fits_as_json(groups: Sequence[Group], fits: dict[str, Fit], reasons: dict[str, str]) -> dict[str, Any]:
    """The contents of `fit.json`."""
    found = []
    for family, fit in fits.items():
        sizes = sorted({one.size for one in groups if one.family == family})
        coefficients = {
            name: {"value": value, "interval": fit.intervals[name]} for name, value in fit.values.items()
        }
        found.append(
            {
                "family": family,
                "sizes": sizes,
                "runs": fit.runs,
                "level": fit.level,
                "coefficients": coefficients,
                "residual_log10": fit.residual,
                "notes": fit.notes,
            }
        )
    return {
        "law": "log10 L = a log10 N + b log10 Ê + c log10 N log10 Ê + d; one size: log10 L = b' log10 Ê + d'",
        "source": "Clark et al. 2022, arXiv:2202.01169",
        "fits": found,
        "not_fitted": reasons,
        "published": {name: dataclasses.asdict(law) for name, law in scaling.PUBLISHED.items()},
    }


def headline(sweep: Sweep, groups: Sequence[Group], fits: dict[str, Fit]) -> list[tuple[str, str]]:
    """Names and values of the figures that sum the sweep up."""
    counts = sorted({run.experts for run in sweep.runs})
    seeds = sorted({run.seed for run in sweep.runs})
    found = [
        ("Runs", f"{len(sweep.runs)}" + (f", {len(sweep.left_out)} left out" if sweep.left_out else "")),
        ("Experts", f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])),
        ("Seeds", ", ".join(map(str, seeds))),
        (
            "Training time, all runs",
            duration(sum(float(r.seconds_T[-1]) for r in sweep.runs if len(r.seconds_T))),
        ),
    ]
    if len(groups) > 1:
        return [*found, ("Groups", str(len(groups)))]
    one = groups[0]
    losses = {experts: sweeps.spread([run.loss for run in runs]).mean for experts, runs in one.cells.items()}
    lowest = min(losses.values())
    best = ", ".join(str(experts) for experts, loss in losses.items() if loss == lowest)
    found.append(("Size of the dense model, without embeddings", report.count(one.size)))
    if one.dense:
        found.append(("Dense model's held-out loss", f"{losses[1]:.3f} nats / token"))
    found.append(("Lowest held-out loss", f"{lowest:.3f} at E={best}"))
    ups = [up for up in sweeps.speed_ups(one) if up.step and up.reached == up.runs]
    if ups:
        up = max(ups, key=lambda up: up.step.mean)
        found.append(("Greatest step speed-up", f"{up.step.mean:.2f} at E={up.experts}"))
    for fit in fits.values():
        found += [(f"Fitted {name}", value(fit, name)) for name in fit.values if name in ("b'", "E_max")]
    return found


def _caption(path: Path, label: str) -> str:
    caption = CAPTIONS[path.stem.rstrip("_0123456789")]
    return f"{label}: {caption}" if label else caption


def _members(groups: Sequence[Group]) -> Iterable[tuple[Group, Run]]:
    """Every run of every group: a dense one as often as it is compared with."""
    return ((one, run) for one in groups for runs in one.cells.values() for run in runs)


def _csv(rows: Iterable[dict[str, Any]]) -> str:
    rows, text = list(rows), io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else SPEED_UP_FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _losses(groups: Sequence[Group]) -> str:
    rows = []
    for one in groups:
        dense = sweeps.spread([run.loss for run in one.dense])
        for experts, runs in one.cells.items():
            loss = sweeps.spread([run.loss for run in runs])
            gain = f"{dense.mean - loss.mean:+.4f}" if dense and experts > 1 else report.MDASH
            step = sweeps.spread([run.step_seconds for run in runs])
            rows.append(
                [
                    one.label or report.MDASH, experts, len(runs), _range(loss, ".4f", len(runs)), gain,
                    report.count(runs[0].parameters), report.count(runs[0].parameters_active),
                    f"{step.mean:.3f}" if step else report.MISSING,
                ]
            )  # fmt: skip
    heads = ["group", "experts", "runs", "held-out loss", "gain", "parameters", "a token's", "seconds a step"]
    note = "Loss in nats per target token: mean (least to greatest) over seeds. Gain: below the dense model's mean."
    return f'<p class="note">{note}</p>{report.grid(heads, rows)}'


def _speed_ups(groups: Sequence[Group]) -> str:
    rows = [
        [
            one.label or report.MDASH, up.experts, f"{sweeps.target(one.dense)[0]:.4f}", f"{up.reached} of {up.runs}",
            _reached(up, up.step), _reached(up, up.time),
        ]
        for one in groups
        for up in sweeps.speed_ups(one)
    ]  # fmt: skip
    if not rows:
        return "<p>There is no dense model (E=1) beside a sparse one: nothing to be compared with.</p>"
    heads = ["group", "experts", "target", "reached by", "steps", "time"]
    devices = {run.device for _, run in _members(groups)}
    warning = (
        "<p>The runs are of several devices: their times are no comparison.</p>" if len(devices) > 1 else ""
    )
    return f'<p class="note">{INTERPOLATION}</p>{warning}{report.grid(heads, rows)}'


def _reached(up: sweeps.SpeedUp, values: Spread | None) -> str:
    if not up.reached:
        return "not reached"
    if values is None:
        return report.MISSING
    if up.reached < up.runs:
        return f"not reached by {up.runs - up.reached} ({values.low:.2f} to {values.high:.2f})"
    bound = "at least " if up.at_first else ""
    return bound + _range(values, ".2f", up.runs)


def _range(values: Spread, form: str, runs: int) -> str:
    mean = format(values.mean, form)
    return f"{mean} ({format(values.low, form)} to {format(values.high, form)})" if runs > 1 else mean


def _fits(groups: Sequence[Group], fits: dict[str, Fit], reasons: dict[str, str]) -> str:
    parts = [
        '<p class="note">log10 L = a log10 N + b log10 Ê + c log10 N log10 Ê + d, '
        "1/Ê = 1/(E - 1 + (1/E_start - 1/E_max)^-1) + 1/E_max (Clark et al. 2022), by least squares in log10 L over the runs; "
        "N counts the dense model's parameters without embeddings. Intervals are those of the linearised law, with Student's "
        "t; they take the law to be true and the runs to be independent. Beside them the published S-BASE law, at this size.</p>"
    ]
    for family, fit in fits.items():
        size = next(one.size for one in groups if one.family == family)
        theirs = scaling.PUBLISHED["S-BASE"].values(size)
        rows = [[name, value(fit, name), f"{theirs[name]:.4g}"] for name in fit.values]
        parts += [f"<h3>{escape(family)}</h3>"] if family else []
        parts.append(report.grid(["", f"fitted, {fit.level:.0%} interval", "S-BASE, published"], rows))
        if fit.residual is not None:
            parts.append(
                f"<p>{fit.runs} runs; residual standard deviation {fit.residual:.2g} in log10 L.</p>"
            )
        parts += [f"<p>{escape(note)}.</p>" for note in fit.notes]
    parts += [
        f"<p>{escape(f'{family}: ' if family else '')}{escape(why)}.</p>" for family, why in reasons.items()
    ]
    return "".join(parts)


def value(fit: Fit, name: str) -> str:
    """A coefficient with its interval."""
    interval = fit.intervals[name]
    told = f"{fit.values[name]:.4g}"
    return f"{told} ({interval[0]:.4g} to {interval[1]:.4g})" if interval else f"{told} (no interval)"


def _routing(groups: Sequence[Group]) -> str:
    rows = []
    for one in groups:
        for experts, runs in one.cells.items():
            found = [run.routing for run in runs if run.routing]
            if found:
                mean = [sum(values) / len(found) for values in zip(*found, strict=True)]
                forms = (".2%", ".2%", ".2%", ".2f", ".2f", ".1%")
                told = [format(value, form) for value, form in zip(mean, forms, strict=True)]
                rows.append([one.label or report.MDASH, experts, *told])
    if not rows:
        return "<p>No sparse run.</p>"
    heads = [
        "group",
        "experts",
        "dropped, first tenth",
        "last tenth",
        "held out",
        "min load",
        "max load",
        "starved",
    ]
    note = (
        "Means over seeds. Dropped: over the sparse layers. Loads: the least and the greatest of all sparse layers over the last "
        "tenth of training, as multiples of the fair share 1/E; a starved expert gets less than a tenth of it."
    )
    return f'<p class="note">{note}</p>{report.grid(heads, rows)}'


def _left_out(left_out: dict[str, str]) -> str:
    if not left_out:
        return "<p>Nothing: every run is done.</p>"
    return f'<div class="wide">{report.table(left_out.items())}</div>'


def _origins(runs: Sequence[Run]) -> str:
    devices = sorted({run.device for run in runs})
    versions = sorted(
        {", ".join(f"{k} {v}" for k, v in run.versions.items()) or report.MISSING for run in runs}
    )
    return report.table([("device", "; ".join(devices)), ("versions", "; ".join(versions))])
