"""Pictures of a trace's figures (`summary.figures`): PNG files with captions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture

from switchmoe.analysis import plots
from switchmoe.analysis.routing import specialisation, summary
from switchmoe.analysis.routing.estimates import Figure

MOST_PANELS = 6
DPI = 110  # of a page that is to be small
SHAPES = "osD^v"


@plots.own_style
def save_all(
    found: dict[str, Any], directory: Path, saturation: dict[str, dict[int, Figure]] | None = None
) -> list[tuple[Path, str]]:
    """Writes those that the figures allow; returns paths and captions."""
    directory.mkdir(parents=True, exist_ok=True)
    made = {
        "routing_loads": (loads(found), "Load of each expert by layer, as multiples of the fair share 1/E; experts sorted."),
        "routing_information": (
            lines(found, ("class_information", "token_information", "label_information"), "bits"),
            "Information of class, token and label in a token's experts, with 95 % intervals; hollow: shuffled tokens, for labels shuffled documents.",
        ),
        "routing_repeats": (
            lines(found, ("first_repeats", "any_repeats"), "share of next tokens"),
            "Next tokens with the same first expert, or any in common, with 95 % intervals; hollow: shuffled tokens.",
        ),
        "routing_next": (
            lines(found, ("next_hits", "next_hits_twice"), "share of the next layer's choices"),
            "What a prefetcher can hope for: choices of the next layer among K, or 2 K, that this layer's let expect; hollow: shuffled.",
        ),
        "routing_positions": (positions(found), "Drops and entropy by the place in the sequence, a line a layer, with 95 % intervals; dotted: shuffled tokens."),
        "routing_classes": (classes(found), "Each class of tokens over the experts, as multiples of the experts' loads."),
        "routing_together": (
            together(found), "Of the tokens that chose one expert (row) the share that chose another (column) as well, all pairs."
        ),
        "routing_saturation": (
            over_steps(saturation or {}), "Share of a token's experts that are those of the last checkpoint, by layer; bars: 95 %."
        ),
        "routing_agreement": (
            lines(found, ("agreement", "matched_agreement"), "share of a token's experts"),
            "Experts that a token has in both models, as they are and matched, with 95 % intervals; hollow: shuffled tokens.",
        ),
    }  # fmt: skip
    paths = []
    for name, (picture, caption) in made.items():
        if picture is not None:
            path = directory / f"{name}.png"
            picture.savefig(path, dpi=DPI)
            paths.append((path, caption))
    return paths


def loads(found: dict[str, Any]) -> Picture:
    layers = list(found["loads"])
    table_LE = np.stack([np.sort(of)[::-1] * len(of) for of in found["loads"].values()])
    figure = Picture(figsize=(8, max(2.0, 1.2 + 0.28 * len(layers))), layout="constrained")
    axes = figure.subplots()
    _heat(axes, table_LE, layers, range(1, table_LE.shape[1] + 1))
    plots.load_bar(figure, [axes], "load / fair share")
    axes.set_xlabel("experts of the layer, the busiest first", fontsize=9)
    return figure


def classes(found: dict[str, Any]) -> Picture | None:
    names = _panels(list(found["classes"]))
    if not names:
        return None
    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    figure = Picture(figsize=(8, rows * (1.1 + 0.24 * len(specialisation.CLASSES))), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axes, name in zip(panels, names, strict=False):
        share_CE, load_E = found["classes"][name], found["loads"][name]
        # Rows and columns without any token have nothing to show.
        there, used = np.flatnonzero(share_CE.any(axis=1)), np.flatnonzero(load_E)
        labels = [specialisation.CLASSES[number] for number in there]
        _heat(axes, share_CE[np.ix_(there, used)] / load_E[used], labels, used)
        idle = len(load_E) - len(used)
        axes.set_title(
            name + (f" ({idle} of {len(load_E)} experts idle)" if idle else ""), fontsize=9, loc="left"
        )
        axes.set_xlabel("expert", fontsize=8)
    plots.load_bar(figure, panels[: len(names)], "share of the class / of all tokens")
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    return figure


def together(found: dict[str, Any]) -> Picture | None:
    names = _panels(list(found["together"]))
    if not names:
        return None
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Picture(figsize=(8, 2.8 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axes, name in zip(panels, names, strict=False):
        image = axes.imshow(found["together"][name], cmap="cividis", vmin=0, interpolation="nearest")
        axes.set_title(name, fontsize=9, loc="left")
        axes.set_xlabel("chosen as well", fontsize=8)
        axes.set_ylabel("expert", fontsize=8)
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=axes, shrink=0.8)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    return figure


def lines(found: dict[str, Any], names: Sequence[str], unit: str) -> Picture | None:
    """Figures by layer, with intervals; hollow what is shuffled."""
    known = [name for name in names if any(name in of for of in found["layers"].values())]
    if not known:
        return None
    layers = [layer for layer, of in found["layers"].items() if any(name in of for name in known)]
    figure, axes = _axes()
    for number, name in enumerate(known):
        colour = (plots.BLUE, plots.ORANGE, "#009E73")[number % 3]
        at = [place for place, layer in enumerate(layers) if name in found["layers"][layer]]
        figures = [found["layers"][layers[place]][name] for place in at]
        shift = np.array(at) + 0.12 * (number - (len(known) - 1) / 2)
        _bars(axes, shift, figures, colour, SHAPES[number], summary.shown(name))
        axes.plot(
            shift, [one.shuffled for one in figures], SHAPES[number], mfc="none", mec=colour, markersize=6
        )
    axes.plot([], [], "o", mfc="none", mec=plots.GREY, markersize=6, label="hollow: shuffled")
    axes.set_xticks(range(len(layers)), labels=layers, rotation=45 if len(layers) > 6 else 0, fontsize=8)
    _finish(axes, unit)
    return figure


def over_steps(saturation: dict[str, dict[int, Figure]]) -> Picture | None:
    if not saturation:
        return None
    figure, axes = _axes()
    colours = plots.DEPTH_COLOURS(np.linspace(0, 1, len(saturation)))
    for number, (layer, of) in enumerate(saturation.items()):
        _bars(axes, np.array(list(of)), list(of.values()), colours[number], SHAPES[number % 5], layer, "-")
    axes.set_xlabel("step")
    steps = sorted({step for of in saturation.values() for step in of})
    axes.set_xticks(steps[:: -(-len(steps) // plots.NAMED_EXPERTS)])
    _finish(axes, "share of a token's experts")
    return figure


def positions(found: dict[str, Any]) -> Picture | None:
    layers = list(found["places"])
    figure = Picture(figsize=(8, 3.4), layout="constrained")
    colours = plots.DEPTH_COLOURS(np.linspace(0, 1, len(layers)))
    for axes, name, unit in zip(
        figure.subplots(1, 2), ("dropped", "entropy"), ("share dropped", "entropy, nats"), strict=True
    ):
        for number, layer in enumerate(layers):
            figures = found["places"][layer][name]
            # Short sequences leave places between their tokens.
            known = [at for at, one in enumerate(figures) if np.isfinite(one.value)]
            place = (np.array(known) + 0.3 + 0.4 * (number + 1) / (len(layers) + 1)) / max(1, len(figures))
            there = [figures[at] for at in known]
            dashes = "-" if layer.startswith("encoder") else "--"
            _bars(axes, place, there, colours[number], "", layer, dashes)
            axes.plot(place, [one.shuffled for one in there], ":", color=colours[number], linewidth=1.2)
        _finish(axes, unit, legend=name == "dropped" and len(layers) <= 8)
        axes.set_xlabel("place in the sequence, 0 to 1")
    return figure


def _axes() -> tuple[Picture, Axes]:
    figure = Picture(figsize=(8, 3.6), layout="constrained")
    return figure, figure.subplots()


def _bars(
    axes: Axes, at: np.ndarray, figures: list[Figure], colour: Any, shape: str, label: str, line: str = "none"
) -> None:  # fmt: skip
    value = np.array([one.value for one in figures])
    low, high = (np.array([getattr(one, name) for one in figures]) for name in ("low", "high"))
    error = np.nan_to_num(np.maximum([value - low, high - value], 0))
    axes.errorbar(
        at, value, error, fmt=shape, linestyle=line, color=colour, capsize=3, markersize=5, label=label
    )


def _finish(axes: Axes, unit: str, legend: bool = True) -> None:
    axes.set_ylabel(unit)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        lines = axes.get_legend_handles_labels()
        axes.figure.legend(*lines, loc="outside lower center", ncols=4, fontsize=8, frameon=False)


def _heat(axes: Axes, load_YX: np.ndarray, labels: Sequence[str], columns: Sequence[int]) -> None:
    plots.load_cells(axes, load_YX)
    axes.set_xticks(*plots.expert_ticks(np.asarray(columns)), fontsize=8)
    axes.set_yticks(range(len(labels)), labels=labels, fontsize=8, parse_math=False)
    axes.invert_yaxis()


def _panels(names: list[str], most: int = MOST_PANELS) -> list[str]:
    """So many of the layers, spread evenly."""
    if len(names) <= most:
        return names
    return [names[round(place)] for place in np.linspace(0, len(names) - 1, most)]
