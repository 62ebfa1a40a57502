"""Pictures of a sweep (`switchmoe.analysis.sweeps`): each function returns a Figure, in the style of `plots`.

Experts are on a logarithmic axis to base 2. A line goes through the means over seeds; where there are
several, a bar or a band goes from the least to the greatest. Lines are named where they end, and groups,
where there are several, in a legend.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from switchmoe.analysis import plots, scaling, sweeps
from switchmoe.analysis.plots import BLUE, GREY, ORANGE
from switchmoe.analysis.scaling import Fit
from switchmoe.analysis.sweeps import Group, Run, Spread, spread

COLOURS = (
    BLUE,
    ORANGE,
    "#009E73",
    "#CC79A7",
    "#B8860B",
    "#56B4E9",
    "#000000",
)  # Okabe and Ito's, yellow darker
Colour = str | tuple[float, ...]
BAND = 0.18  # opacity of what lies between seeds
MAX_VALUES = 12  # up to so many points have their values beside them
SHOWN_FROM = 0.15  # curves are shown from the loss that the dense model has after this share of its steps


@plots.own_style
def save_all(
    groups: Sequence[Group], fits: Sequence[Fit | None], out_dir: str | os.PathLike
) -> list[tuple[Path, str]]:
    """Writes the pictures that the groups allow to ``out_dir`` as PNGs; returns paths, and whose picture each is.

    Args:
      groups: of `sweeps.group`.
      fits: for each group the fit of its family, None where there is none.

    Returns:
      paths, and the label of the group that a picture is of; "" for pictures of all. Pictures of groups have the
      group's number at the end of their names where there are several.
    """
    directory = Path(out_dir)
    directory.mkdir(parents=True, exist_ok=True)
    figures: dict[str, tuple[Figure, str]] = {"loss_experts": (loss_experts(groups, fits), "")}
    for number, one in enumerate(groups, start=1):
        suffix = f"_{number}" if len(groups) > 1 else ""
        figures[f"loss_steps{suffix}"] = loss_curves(one, "steps"), one.label
        if timed(run for runs in one.cells.values() for run in runs):
            figures[f"loss_time{suffix}"] = loss_curves(one, "time"), one.label
    if any(sweeps.speed_ups(one) for one in groups):
        figures["speedups"] = speed_ups(groups), ""
        figures["published"] = published(groups, fits), ""
    if any(run.routing for one in groups for runs in one.cells.values() for run in runs):
        figures["routing"] = routing(groups), ""
    figures["size"] = size(groups), ""
    saved = []
    for name, (figure, label) in figures.items():
        path = directory / f"{name}.png"
        figure.savefig(path, dpi=plots.DPI)
        saved.append((path, label))
    return saved


def loss_experts(groups: Sequence[Group], fits: Sequence[Fit | None]) -> Figure:
    """Final held-out loss against experts, with the fitted law; where there is none a line joins the points."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    ends = []
    for one, fit, colour in zip(groups, fits, _colours(groups), strict=True):
        found = _by_experts(one, lambda run: run.loss)
        end = found[max(found)].mean
        if fit:
            experts = np.geomspace(min(found), max(found), 200)
            curve = fit.law.loss(one.size, experts)
            axes.plot(experts, curve, color=colour, linestyle="--", linewidth=1.2)
            end = curve[-1]
        _line(axes, found, colour, "o" if fit else "o-")
        ends.append((max(found), end, "fitted law" if fit else "", colour))
        if len(groups) == 1:
            _values(axes, {experts: (s.mean, f"{s.mean:.3f}") for experts, s in found.items()})
    plots.finish(axes, "held-out loss (nats per target token)")
    _experts_axis(axes, groups)
    axes.margins(y=0.12)
    _name(figure, groups, {axes: ends})
    return figure


def loss_curves(one: Group, against: str) -> Figure:
    """Held-out loss over ``against`` = steps | time, a line for each expert count."""
    shade = ScalarMappable(Normalize(0, math.log2(max(*one.cells, 2))), plots.DEPTH_COLOURS.reversed())
    colours = ["#000000" if experts == 1 else shade.to_rgba(math.log2(experts)) for experts in one.cells]
    named = {
        "dense" if experts == 1 else f"E={experts}": (runs, colour)
        for (experts, runs), colour in zip(one.cells.items(), colours, strict=True)
    }
    return curves(named, against, sweeps.target(one.dense)[0] if one.dense else None)


def curves(named: Mapping[str, tuple[Sequence[Run], Colour]], against: str, target: float | None) -> Figure:
    """Held-out loss over ``against`` = steps | time, a line of its colour for each name's runs, which differ in the seed."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    everything = [run for runs, _ in named.values() for run in runs]
    scale, unit = _time_unit(everything) if against == "time" else (1.0, "step")
    ends = []
    for name, (runs, colour) in named.items():
        step_V = runs[0].step_V
        curves_RV = np.array([np.interp(step_V, run.step_V, run.loss_V) for run in runs])
        x_V = step_V
        if against == "time":
            x_V = np.mean([run.seconds_at(step_V) for run in runs], axis=0) / scale
        mean_V = curves_RV.mean(0)
        axes.plot(x_V, mean_V, color=colour, linewidth=2 if colour == "#000000" else 1.5)
        if len(runs) > 1:
            axes.fill_between(x_V, curves_RV.min(0), curves_RV.max(0), color=colour, alpha=BAND, linewidth=0)
        ends.append((x_V[-1], mean_V[-1], name, colour))
    plots.finish(axes, "held-out loss (nats per target token)")
    axes.set_xlabel(unit)
    axes.set_xlim(left=0)
    _loss_limits(axes, everything)
    if target is not None:
        axes.axhline(target, color=GREY, linestyle="--", linewidth=1)
    _name_ends(axes, ends)
    if against == "time":
        for x, y, _, colour in ends:
            axes.plot(x, y, "o", color=colour, markersize=4)
    return figure


def speed_ups(groups: Sequence[Group]) -> Figure:
    """Step and time speed-up to the dense model's final loss against experts."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    colours = _colours(groups)
    for axes, name in zip(panels, ("step", "time"), strict=True):
        missing = []
        for one, colour in zip(groups, colours, strict=True):
            ups = [up for up in sweeps.speed_ups(one) if up.reached == up.runs and getattr(up, name)]
            missing += [(up.experts, colour) for up in sweeps.speed_ups(one) if up.reached < up.runs]
            if not one.dense:
                continue
            found = {1: Spread(1, 1, 1)} | {up.experts: getattr(up, name) for up in ups}
            _line(axes, found, colour)
            if len(groups) == 1:
                bound = {True: "\N{GREATER-THAN OR EQUAL TO}", False: ""}
                told = {up.experts: f"{bound[up.at_first > 0]}{found[up.experts].mean:.1f}" for up in ups}
                _values(axes, {experts: (found[experts].mean, text) for experts, text in told.items()})
        plots.finish(axes, "speed-up over the dense model" if name == "step" else "")
        axes.set_title(
            f"{name}s to its final loss" if name == "step" else "time to its final loss", fontsize=10
        )
        axes.axhline(1, color=GREY, linestyle="--", linewidth=1)
        _experts_axis(axes, groups)
        low = dict(transform=axes.get_xaxis_transform(), clip_on=False)  # at the axis
        for experts, colour in missing:
            axes.plot(experts, 0.03, "x", color=colour, markersize=7, **low)
        if missing:
            axes.text(
                0.98, 0.08, "x: not reached", transform=axes.transAxes, fontsize=9, color=GREY, ha="right"
            )
        if name == "time":
            _log_axis(axes, "{:g}x")
            axes.margins(y=0.15)
    _name(figure, groups)
    return figure


def published(groups: Sequence[Group], fits: Sequence[Fit | None]) -> Figure:
    """Loss over the dense model's against experts, beside published models of the size nearest to the first group's."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    chosen = [one for one in groups if one.dense and len(one.cells) > 1]
    rows = scaling.published(chosen[0].size)
    ends = []
    for name, losses, style in (
        ("10k steps", [row.loss_10k for row in rows], "^-"),
        ("final", [row.loss_final for row in rows], "s-"),
    ):
        ratios = np.array(losses) / losses[0]
        axes.plot([row.experts for row in rows], ratios, style, color=GREY, markersize=4, linewidth=1)
        ends.append((rows[-1].experts, ratios[-1], f"S-BASE {rows[0].size / 1e6:.0f}M, {name}", GREY))
    experts = np.geomspace(1, rows[-1].experts, 200)
    law = scaling.PUBLISHED["S-BASE"].loss(chosen[0].size, experts)
    axes.plot(experts, law / law[0], color=GREY, linestyle=":", linewidth=1.4)
    ends.append((experts[-1], law[-1] / law[0], f"S-BASE law at {chosen[0].size / 1e6:.2g}M", GREY))
    for one, fit, colour in zip(groups, fits, _colours(groups), strict=True):
        if one not in chosen:
            continue
        dense = float(np.mean([run.loss for run in one.dense]))
        found = _by_experts(one, lambda run, dense=dense: run.loss / dense)
        _line(axes, found, colour)
        ends.append((max(found), found[max(found)].mean, "" if len(groups) > 1 else "this sweep", colour))
        if fit:
            within = np.geomspace(1, max(found), 200)
            axes.plot(
                within, fit.law.loss(one.size, within) / dense, "--", color=colour, linewidth=1, alpha=0.8
            )
    plots.finish(axes, "loss / loss of the dense model")
    _experts_axis(axes, groups, rows[-1].experts)
    _name_ends(axes, ends)
    _name(figure, groups)
    return figure


def routing(groups: Sequence[Group]) -> Figure:
    """Drop rate and load against experts, of the sparse models."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    ends: dict[Axes, list] = {left: [], right: []}
    for one, colour in zip(groups, _colours(groups), strict=True):
        for axes, figure_of, name, style in (
            (left, lambda r: 100 * r.dropped_first, "first tenth", "o:"),
            (left, lambda r: 100 * r.dropped_last, "last tenth", "o-"),
            (right, lambda r: r.load_max, "busiest", "o-"),
            (right, lambda r: r.load_min, "idlest", "o:"),
        ):
            found = _by_experts(one, lambda run, of=figure_of: of(run.routing) if run.routing else math.nan)
            if found:
                _line(axes, found, colour, style)
                ends[axes].append((max(found), found[max(found)].mean, name, colour))
    right.axhline(1, color=GREY, linestyle="--", linewidth=1)
    for axes, label in ((left, "choices dropped (%)"), (right, "load / fair share")):
        plots.finish(axes, label)
        _experts_axis(axes, groups, least=2)
    left.set_ylim(bottom=0)
    right.set_yscale("symlog", linthresh=0.1, linscale=0.5)
    right.set_ylim(bottom=0)
    ticks = [0, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64]
    top = right.get_ylim()[1]
    right.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if tick <= top]))
    right.yaxis.set_minor_locator(NullLocator())
    right.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    _name(figure, groups, ends)
    return figure


def size(groups: Sequence[Group]) -> Figure:
    """Parameters and bytes of the training state against experts."""
    figure = Figure(figsize=(8, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    ends: dict[Axes, list] = {left: [], right: []}
    for one, colour in zip(groups, _colours(groups), strict=True):
        for axes, value, name, style in (
            (left, lambda run: run.parameters, "all", "o-"),
            (left, lambda run: run.parameters_active, "a token's", "o:"),
            (right, sweeps.state_bytes, "", "o-"),
        ):
            found = _by_experts(one, value)
            _line(axes, found, colour, style)
            ends[axes].append((max(found), found[max(found)].mean, name, colour))
    for axes, label, unit in ((left, "parameters", ""), (right, "parameters and optimizer state", "B")):
        plots.finish(axes, label)
        _experts_axis(axes, groups)
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _, unit=unit: _short(y) + unit))
    _name(figure, groups, ends)
    return figure


def _colours(groups: Sequence[Group]) -> list[str]:
    return [COLOURS[n % len(COLOURS)] for n in range(len(groups))]


def _by_experts(one: Group, value: Callable[[Run], float]) -> dict[int, Spread]:
    spreads = {experts: spread([value(run) for run in runs]) for experts, runs in one.cells.items()}
    return {experts: found for experts, found in spreads.items() if found}


def _line(axes: Axes, found: dict[int, Spread], colour: str, style: str = "o-") -> None:
    experts, mean = list(found), np.array([one.mean for one in found.values()])
    axes.plot(experts, mean, style, color=colour, markersize=5, linewidth=1.6)
    reach = np.array(
        [[one.mean - one.low for one in found.values()], [one.high - one.mean for one in found.values()]]
    )
    if reach.any():
        axes.errorbar(
            experts, mean, np.maximum(reach, 0), fmt="none", ecolor=colour, capsize=3, linewidth=1.2
        )


def _values(axes: Axes, told: dict[int, tuple[float, str]]) -> None:
    """Texts beside the points of a line, on the side of it that is free, and of the bars of its ranges."""
    if not told or len(told) > MAX_VALUES:
        return
    heights = [y for y, _ in told.values()]
    for n, (experts, (y, text)) in enumerate(told.items()):
        rises = y >= heights[n - 1] if n else heights[min(1, len(heights) - 1)] > y
        offset, side = ((-3, 5), "right") if rises else ((3, 5), "left")
        if y < min(heights[max(n - 1, 0) : n] + heights[n + 1 : n + 2], default=y):  # a valley
            offset, side = ((5, -11), "left") if n + 1 < len(heights) else ((-5, -11), "right")
        axes.annotate(text, (experts, y), offset, textcoords="offset points", ha=side, fontsize=8)


def _experts_axis(axes: Axes, groups: Sequence[Group], most: int = 1, least: int = 1) -> None:
    counts = sorted({experts for one in groups for experts in one.cells} | {most})
    powers = range(int(math.log2(least)), math.ceil(math.log2(max(counts[-1], least))) + 1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator([2**n for n in powers]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.set_xlabel("experts")


def _log_axis(axes: Axes, form: str) -> None:
    low, high = axes.get_ylim()
    axes.set_yscale("log", base=2)
    powers = range(math.floor(math.log2(max(low, 1 / 64))), math.ceil(math.log2(max(high, 1))) + 1)
    ticks = [2.0**n for n in powers]
    if sum(low <= tick <= high for tick in ticks) < 3:
        ticks = [tick for tick in MaxNLocator(6).tick_values(low, high) if tick > 0]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: form.format(y)))


def _name(figure: Figure, groups: Sequence[Group], ends: dict[Axes, list] | None = None) -> None:
    """Names lines at their ``ends`` where there is one group; a legend names the groups where there are several."""
    if len(groups) == 1:
        for axes, named in (ends or {}).items():
            _name_ends(axes, named)
        return
    lines = [Line2D([], [], color=colour, marker="o", markersize=5) for colour in _colours(groups)]
    labels = [one.label for one in groups]
    columns = 2 if max(map(len, labels)) < 60 else 1
    figure.legend(lines, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _name_ends(axes: Axes, ends: Sequence[tuple[float, float, str, object]]) -> None:
    """Names at the right of the axes, beside the ends of their lines, moved apart where they would touch."""
    named = sorted((end for end in ends if end[2]), key=lambda end: end[1])
    if not named:
        return
    axes.get_ylim()  # has pending limits worked out
    to_axes = axes.transAxes.inverted()
    heights = [to_axes.transform(axes.transData.transform((x, y)))[1] for x, y, *_ in named]
    gap = 12 / (axes.figure.get_figheight() * 72 * 0.8)
    heights = _apart(heights, gap)
    for (_, _, text, colour), height in zip(named, heights, strict=True):
        axes.text(1.015, height, text, transform=axes.transAxes, va="center", fontsize=9, color=colour)


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Increasing heights moved as little as it takes (least squares) for neighbours to be ``gap`` apart."""
    blocks: list[list] = []  # neighbours in touch: sum of their heights, how many
    for height in heights:
        blocks.append([height, 1])
        while len(blocks) > 1 and _start(blocks[-1], gap) < _start(blocks[-2], gap) + gap * blocks[-2][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    return [_start(block, gap) + gap * place for block in blocks for place in range(block[1])]


def _start(block: Sequence[float], gap: float) -> float:
    total, count = block
    return total / count - gap * (count - 1) / 2


def timed(runs: Iterable[Run]) -> bool:
    """Whether all runs have times on record."""
    return all(len(run.step_T) for run in runs)


def _time_unit(runs: Sequence[Run]) -> tuple[float, str]:
    longest = max(float(run.seconds_T[-1]) for run in runs)
    for seconds, unit in ((3600.0, "hours"), (60.0, "minutes")):
        if longest > 2 * seconds:
            return seconds, f"{unit} of training"
    return 1.0, "seconds of training"


def _loss_limits(axes: Axes, runs: Sequence[Run]) -> None:
    """From the lowest loss up to that of the first model after SHOWN_FROM of its steps: before it, all are alike."""
    first = runs[0]
    lowest = min(float(run.loss_V.min()) for run in runs)
    highest = float(np.interp(SHOWN_FROM * first.step_V[-1], first.step_V, first.loss_V))
    highest = max(highest, *(float(run.loss_V[-1]) for run in runs))
    margin = max(0.06 * (highest - lowest), 1e-3)
    axes.set_ylim(lowest - margin, highest + margin)


def _short(value: float) -> str:
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:g} {unit}"
    return f"{value:g}"
