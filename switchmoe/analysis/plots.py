"""Pictures of a run from its records (`switchmoe.runs.reporting`): each function returns a Figure.

Figures are 8 inches wide and made to be read at 800 pixels. Colours are safe for colour-blind
readers: Okabe and Ito's for single lines, `viridis` for depth, blue - white - orange for load.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure

from switchmoe.runs.reporting import Record

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
DPI = 160
LOAD_COLOURS = LinearSegmentedColormap.from_list(
    "load", ["#08519c", "#6baed6", "#f7f7f7", "#fdae6b", "#a63603"]
)
DEPTH_COLOURS = LinearSegmentedColormap.from_list("depth", colormaps["viridis"](np.linspace(0, 0.88, 256)))
LOAD_RANGE = 4.0  # the colours run from 1/4 of the fair share to 4 times it
LOAD_CELLS = LOAD_COLOURS.with_extremes(under="#04203f", bad="#bbbbbb")
LOAD_NORM = LogNorm(1 / LOAD_RANGE, LOAD_RANGE)
MAX_COLUMNS = 200  # time bins of a load panel
NAMED_EXPERTS = 16  # up to so many experts keep their numbers; more are sorted by load
LEGEND_DEPTHS = 7  # up to so many depths are named in a legend; more get a colour bar


own_style = matplotlib.style.context("default")  # whatever a user's matplotlibrc says


@own_style
def save_all(records: Sequence[Record], run: dict[str, Any], out_dir: str | os.PathLike) -> list[Path]:
    """Writes the pictures that the records allow to `out_dir` as PNGs; returns their paths.

    Args:
      records: of `metrics.jsonl`; without sparse layers the two pictures of routing are left out.
      run: of `run.json`; only `unigram_cross_entropy` is used, and may be missing.
      out_dir: is made where it does not exist.
    """
    directory = Path(out_dir)
    directory.mkdir(parents=True, exist_ok=True)
    figures = {"loss": loss_curves(records, run.get("unigram_cross_entropy"))}
    if layer_names(records):
        figures |= {"expert_load": expert_load(records), "routing": drop_and_entropy(records)}
    figures["speed"] = speed(records)
    paths = []
    for name, figure in figures.items():
        paths.append(directory / f"{name}.png")
        figure.savefig(paths[-1], dpi=DPI)
    return paths


def loss_curves(records: Sequence[Record], unigram: float | None = None) -> Figure:
    """Cross-entropy over steps: training raw and smoothed, validation, and the unigram baseline (nats).

    Of a run that has none, it is whatever its loss is.
    """
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    has_it = any("cross_entropy" in record for record in records)
    name, label = ("cross_entropy", "cross-entropy (nats per target token)") if has_it else ("loss", "loss")
    steps, values = series(records, "train", name)
    smooth = smoothed(values)
    if not np.array_equal(smooth, values, equal_nan=True):
        axes.plot(steps, values, color=BLUE, alpha=0.5, linewidth=0.8, label="training")
        axes.plot(steps, smooth, color=BLUE, linewidth=1.8, label="training, smoothed")
    elif len(steps):
        axes.plot(steps, values, color=BLUE, linewidth=1.8, label="training", **_marker(steps))
    steps, values = series(records, "validation", name)
    if len(steps):
        last = f"validation, last {values[-1]:.3f}"
        axes.plot(steps, values, "o-", color=ORANGE, markersize=4, linewidth=1, label=last)
    if unigram is not None and has_it:
        baseline = f"unigram baseline {unigram:.3f}"
        axes.axhline(unigram, color=GREY, linestyle="--", linewidth=1.2, label=baseline)
    finish(axes, label)
    axes.set_xlabel("step")
    _legend(axes)
    return figure


def expert_load(records: Sequence[Record]) -> Figure:
    """A panel per sparse layer: experts x steps, coloured by load as a multiple of the fair share 1/E.

    Above NAMED_EXPERTS experts the rows are sorted by their load over the last tenth of the run. A
    panel's title has the least and the greatest load over that time. At least one layer is needed.
    """
    layers = layer_names(records)
    steps, load_TLE = layer_series(records, "train", "layer_expert_load")
    load_TLE = load_TLE * load_TLE.shape[-1]
    final_LE = last_tenth(load_TLE)
    num_experts = load_TLE.shape[-1]
    columns = min(4, math.ceil(math.sqrt(len(layers))))
    rows = math.ceil(len(layers) / columns)
    figure = Figure(figsize=(8, 0.9 + rows * (2.1 if rows < 3 else 1.5)), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    binned_steps, binned_TLE = _binned(steps, load_TLE)
    edges = _edges(binned_steps)
    for index, axes in enumerate(panels.flat):
        if index >= len(layers):
            axes.set_visible(False)
            continue
        order = np.arange(num_experts) if num_experts <= NAMED_EXPERTS else np.argsort(final_LE[index])
        load_cells(axes, binned_TLE[:, index, order].T, edges)
        low, high = final_LE[index].min(), final_LE[index].max()
        size = 9 if columns < 4 else 7.5
        axes.set_title(layers[index], fontsize=size, loc="left")
        axes.set_title(f"{low:.2f}\N{EN DASH}{high:.2f}", fontsize=size, loc="right")
        axes.tick_params(labelsize=8)
        axes.locator_params(axis="x", nbins=4 if columns < 4 else 3, integer=True, min_n_ticks=1)
    if num_experts <= NAMED_EXPERTS:
        panels[0, 0].set_yticks(range(0, num_experts, 1 if num_experts <= 8 else 2))
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("expert" if num_experts <= NAMED_EXPERTS else "expert, sorted by load", fontsize=9)
    load_bar(figure, panels, "load / fair share", shrink=min(1.0, 4 / rows))
    return figure


def load_cells(axes: Axes, load_YX: np.ndarray, edges: np.ndarray | None = None) -> None:
    """A cell for each load, a multiple of the fair share, around whole numbers from 0; grey where there is none.

    Args:
      edges: of the columns, if they are not around whole numbers.
    """
    rows, columns = (np.arange(size + 1) - 0.5 for size in load_YX.shape)
    shown = np.ma.masked_where(~(load_YX > 0), load_YX)
    edges = columns if edges is None else edges
    axes.pcolormesh(edges, rows, shown, cmap=LOAD_CELLS, norm=LOAD_NORM, rasterized=True)


def expert_ticks(experts: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """(places, numbers) of the columns of `load_cells` that are of these experts; of many some."""
    places = np.arange(0, len(experts), max(1, math.ceil(len(experts) / NAMED_EXPERTS)))
    return places, [str(experts[place]) for place in places]


def load_bar(figure: Figure, panels: Any, says: str, shrink: float = 1.0) -> None:
    """What the colours of `load_cells` mean."""
    bar = figure.colorbar(
        ScalarMappable(LOAD_NORM, LOAD_CELLS), ax=panels, extend="both", aspect=30, shrink=shrink
    )
    bar.set_ticks([1 / 4, 1 / 2, 1, 2, 4], labels=["1/4", "1/2", "fair", "2", "4"], fontsize=8)
    bar.minorticks_off()
    bar.set_label(f"{says} (grey: none)", fontsize=9)


def drop_and_entropy(records: Sequence[Record]) -> Figure:
    """Share of tokens dropped (%) and router entropy (nats, with ln E) over steps, a line per layer.

    A column per stack; colours go with depth, and a block's experts in its attention are dotted. At least one layer is needed.
    """
    names = layer_names(records)
    layers = [_parted(layer) for layer in names]
    stacks = list(dict.fromkeys(stack for stack, *_ in layers))
    depths = sorted({depth for _, depth, _ in layers})
    steps, dropped_TL = layer_series(records, "train", "layer_fraction_dropped")
    _, entropy_TL = layer_series(records, "train", "layer_router_entropy")
    num_experts = layer_series(records, "train", "layer_expert_load")[1].shape[-1]
    shade = ScalarMappable(Normalize(depths[0], max(depths[-1], depths[0] + 1)), DEPTH_COLOURS)
    figure = Figure(figsize=(8, 5.8), layout="constrained")
    panels = figure.subplots(2, len(stacks), sharex=True, sharey="row", squeeze=False)
    lines: dict[
        tuple[int, str], tuple[list[str], Any]
    ] = {}  # by depth and part: names, and a line that looks so
    for index, (stack, depth, part) in enumerate(layers):
        upper, lower = panels[:, stacks.index(stack)]
        look = dict(linewidth=1.4, linestyle=":" if part else "-")
        style = dict(color=shade.to_rgba(depth), **look, **_marker(steps))
        upper.plot(steps, 100 * smoothed(dropped_TL[:, index]), **style)
        (line,) = lower.plot(steps, smoothed(entropy_TL[:, index]), **style)
        lines.setdefault((depth, part), ([], line))[0].append(names[index])
    for column, stack in enumerate(stacks):
        panels[0, column].set_title(stack, fontsize=10)
        panels[1, column].set_xlabel("step")
        maximum = panels[1, column].axhline(math.log(num_experts), color=GREY, linestyle="--", linewidth=1.2)
        for row, label in enumerate(["tokens dropped (%)", "router entropy (nats)"]):
            finish(panels[row, column], label if column == 0 else "")
            panels[row, column].set_ylim(bottom=0)
    if len(depths) > LEGEND_DEPTHS:
        bar = figure.colorbar(shade, ax=panels, aspect=40)
        bar.set_ticks(depths[:: math.ceil(len(depths) / 12)])
        bar.set_label(f"N of {', '.join(f'{stack}/N' for stack in stacks)}")
        lines = {}
    named = {", ".join(of): line for of, line in lines.values()}
    named[f"greatest entropy, ln {num_experts} = {math.log(num_experts):.2f}"] = maximum
    columns = 4 if max(map(len, named)) < 32 else 2
    figure.legend(
        named.values(), named.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )
    return figure


def speed(records: Sequence[Record]) -> Figure:
    """Tokens a second, and the share of the time spent waiting for input (%), over steps."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for axes, key, label, scale in (
        (panels[0], "tokens_per_second", "tokens per second", 1),
        (panels[1], "input_wait_share", "input wait (% of time)", 100),
    ):
        steps, values = series(records, "train", key)
        if len(steps):
            axes.plot(steps, scale * values, color=BLUE, linewidth=1.2, **_marker(steps))
        median = median_of(values)
        if median is not None:
            median *= scale
            text = f"median {median:,.0f}" if scale == 1 else f"median {median:.2f}%"
            axes.axhline(median, color=ORANGE, linestyle="--", linewidth=1.2, label=text)
        finish(axes, label)
        axes.set_ylim(bottom=0)
        _legend(axes)
    panels[0].yaxis.set_major_formatter("{x:,.0f}")
    panels[1].set_xlabel("step")
    return figure


def layer_names(records: Sequence[Record]) -> list[str]:
    """The sparse layers of the training records, in the order of their lists; [] for a dense model."""
    return next(
        (record["layers"] for record in records if record["split"] == "train" and record["layers"]), []
    )


def series(records: Sequence[Record], split: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps [T] and values [T] of one figure of a split; null is NaN; records without it are left out."""
    chosen = [record for record in records if record["split"] == split and key in record]
    return _array([record["step"] for record in chosen]), _array([record[key] for record in chosen])


def layer_series(records: Sequence[Record], split: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps [T] and values [T, layers] (of loads [T, layers, E]) of one per-layer list of a split."""
    return series([record for record in records if record.get("layers")], split, key)


def median_of(values: np.ndarray) -> float | None:
    """The median over a run's records without the first, whose step waits for what is done once; of one record that."""
    found = values[1:] if len(values) > 1 else values
    found = found[np.isfinite(found)]
    return float(np.median(found)) if len(found) else None


def last_tenth(values: np.ndarray) -> np.ndarray:
    """Mean over the last tenth of the first axis, at least one entry; NaN entries do not count."""
    tail = values[-max(1, len(values) // 10) :]
    count = np.isfinite(tail).sum(0)
    return np.where(count > 0, np.nansum(tail, 0) / np.maximum(count, 1), np.nan)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Centred moving average over 1/25 of the points, narrower at the ends; NaN entries do not count."""
    half = len(values) // 50
    if half == 0:
        return values
    found = np.isfinite(values)
    sums = np.concatenate([[0], np.cumsum(np.where(found, values, 0))])
    counts = np.concatenate([[0], np.cumsum(found)])
    index = np.arange(len(values))
    reach = np.minimum(half, np.minimum(index, len(values) - 1 - index))
    low, high = index - reach, index + reach + 1
    count = counts[high] - counts[low]
    return np.where(count > 0, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)


def _array(values: list) -> np.ndarray:
    return np.array(values, dtype=float)


def _binned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MAX_COLUMNS entries along time: means of neighbours."""
    parts = np.array_split(np.arange(len(steps)), min(len(steps), MAX_COLUMNS))
    return _array([steps[part].mean() for part in parts]), _array([values[part].mean(0) for part in parts])


def _edges(centres: np.ndarray) -> np.ndarray:
    """Borders of cells around increasing centres, half-way between neighbours."""
    if len(centres) == 1:
        return centres[0] + np.array([-0.5, 0.5])
    middles = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middles[0]], middles, [2 * centres[-1] - middles[-1]]])


def _marker(steps: np.ndarray) -> dict[str, Any]:
    """Points for series too short to show as a line."""
    return {"marker": "o", "markersize": 4} if len(steps) < 10 else {}


def finish(axes: Axes, label: str) -> None:
    """The look of all axes: a label, a light grid, no frame above and at the right."""
    axes.set_ylabel(label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=9)


def _parted(layer: str) -> tuple[str, int, str]:
    """(stack, block, part): ``decoder/3`` or ``decoder/3/attention``."""
    stack, depth, *part = layer.split("/")
    return stack, int(depth), "".join(part)
