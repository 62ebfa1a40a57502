"""The parts of a mixture, such as languages (`data.parts`): how well each is modelled, and which experts it uses."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from switchmoe.analysis import plots
from switchmoe.runs.reporting import Record

HEADS = ["part", "cross-entropy, nats", "perplexity", "busiest expert"]
PREFIX = "validation/"  # of the records of a part


def names(records: Sequence[Record]) -> list[str]:
    """The parts that the records tell of, in their order."""
    splits = dict.fromkeys(str(record["split"]) for record in records)
    return [split.removeprefix(PREFIX) for split in splits if split.startswith(PREFIX)]


def rows(records: Sequence[Record]) -> list[list[str]]:
    """A line of `HEADS` for each part, of its last evaluation: the busiest expert's load in fair shares, of all layers."""
    found = []
    for part in names(records):
        last = next(record for record in reversed(records) if record["split"] == PREFIX + part)
        loss = last.get("cross_entropy")
        loads = np.array(last.get("layer_expert_load") or [[np.nan]], float)
        busiest = "" if np.isnan(loads).any() else f"{(loads * loads.shape[-1]).max():.2f}"
        shown = ["nan", "nan"] if loss is None else [f"{loss:.3f}", f"{math.exp(min(loss, 700)):,.1f}"]
        found.append([part, *shown, busiest])
    return found


@plots.own_style
def save_loads(records: Sequence[Record], path: Path) -> Path:
    """Writes the picture of `loads` as a PNG."""
    loads(records).savefig(path, dpi=plots.DPI)
    return path


def loads(records: Sequence[Record]) -> Figure:
    """Parts x experts at the last evaluation, in the last sparse layer of each stack: multiples of the fair share 1/E.

    Experts are in the order of the part that uses them most, so that those of one part stand together.
    """
    layers = plots.layer_names(records)
    last = {layer.split("/")[0]: place for place, layer in enumerate(layers)}  # of each stack
    parts = names(records)
    found = [plots.layer_series(records, PREFIX + part, "layer_expert_load")[1][-1] for part in parts]
    load_PLE = np.stack(found) * found[0].shape[-1]
    figure = Figure(figsize=(8, max(2.8, 1.2 + 0.24 * len(parts))), layout="constrained")
    panels = figure.subplots(1, len(last), sharey=True, squeeze=False)[0]
    for axes, place in zip(panels, last.values(), strict=True):
        load_PE = load_PLE[:, place]
        order = np.lexsort((-load_PE.max(0), load_PE.argmax(0)))
        plots.load_cells(axes, load_PE[:, order])
        axes.set_title(layers[place], fontsize=9, loc="left")
        axes.set_xlabel("expert, by the part that uses it most", fontsize=9)
        axes.set_xticks(*plots.expert_ticks(order), fontsize=8)
        axes.set_yticks(np.arange(len(parts)), labels=parts, fontsize=8, parse_math=False)
        axes.tick_params(labelsize=8)
    panels[0].invert_yaxis()
    plots.load_bar(figure, panels, "load / fair share")
    return figure
