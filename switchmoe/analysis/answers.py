"""What a fine-tuned model's answers came to: learning curves of the tasks' metrics, tables, confusion matrices, experts' load.

Letters: C classes, E experts.
"""

import json
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from switchmoe.analysis import plots
from switchmoe.runs.reporting import Record
from switchmoe.runs.rundir import PREDICTIONS_FILE, read_run

SPLIT = "tasks"
HEADS = ("metric", "first", "best", "last")
MOST_CLASSES = 30
MOST_LINES, LEGEND_COLUMNS = 12, 3


def rows(records: Sequence[Record]) -> list[list[str]]:
    """Each metric at the first, the best and the last evaluation; [] of a run without tasks."""
    found = [record for record in records if record["split"] == SPLIT]
    values = {name: [record[name] for record in found] for name in metrics(records)}
    return [[name, *(f"{value:.2f}" for value in (of[0], max(of), of[-1]))] for name, of in values.items()]


def metrics(records: Sequence[Record]) -> list[str]:
    """The names of a run's metrics, of each task and their mean; [] of a run without tasks."""
    last = next((record for record in reversed(records) if record["split"] == SPLIT), None)
    return [] if last is None else [name for name in last if "/" in name] + ["score"]


@plots.own_style
def save_all(records: Sequence[Record], directory: Path, out_dir: Path) -> list[Path]:
    """Writes the pictures of a run with tasks as PNGs; returns their paths. [] of one without."""
    if not rows(records):
        return []
    figures = {"scores": scores(records)} | confusions(directory / PREDICTIONS_FILE)
    load = read_run(directory).get("expert_load", {})
    if "before" in load:
        figures["load_change"] = load_change(
            load["layers"], np.array(load["before"]), np.array(load["after"])
        )
    paths = []
    for name, figure in figures.items():
        paths.append(out_dir / f"{name}.png")
        figure.savefig(paths[-1], dpi=plots.DPI)
    return paths


def scores(records: Sequence[Record]) -> Figure:
    """The metrics over the training steps, 0 to 100; of many the first one of each task."""
    found = [record for record in records if record["split"] == SPLIT]
    names = metrics(records)
    many = len(names) > MOST_LINES
    if many:
        names = list({name.rpartition("/")[0]: name for name in reversed(names)}.values())[::-1]
    rows = -(-len(names) // LEGEND_COLUMNS)
    figure = Figure(figsize=(8, 4.2 + (0.18 * rows if many else 0)), layout="constrained")
    axes = figure.subplots()
    for name in names:
        # Of one task the score is its first metric: its line is wide, and below that one.
        style = dict(color="black", linewidth=3, zorder=1) if name == "score" else dict(linewidth=1.2)
        label = "/".join(name.split("/")[-2:])  # of a file's path its name
        axes.plot(
            [r["step"] for r in found], [r[name] for r in found], "o-", markersize=3, label=label, **style
        )
    plots.finish(axes, "metric (0 to 100)")
    axes.set_xlabel("step")
    if many:
        figure.legend(loc="outside lower center", ncols=LEGEND_COLUMNS, fontsize=7, frameon=False)
    else:
        axes.legend(fontsize=8, frameon=False)
    return figure


def load_change(layers: Sequence[str], before_LE: np.ndarray, after_LE: np.ndarray) -> Figure:
    """A panel for each layer: each expert's load before and after, as a multiple of the fair share 1/E.

    Above `plots.NAMED_EXPERTS` experts they are sorted by their load before.
    """
    experts = before_LE.shape[1]
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(8, 0.9 + 1.7 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for index, axes in enumerate(panels.flat):
        if index >= len(layers):
            axes.set_visible(False)
            continue
        order = np.argsort(before_LE[index]) if experts > plots.NAMED_EXPERTS else np.arange(experts)
        for shift, load_LE, colour, label in (
            (-0.2, before_LE, plots.GREY, "before"),
            (0.2, after_LE, plots.ORANGE, "after"),
        ):
            height_E = load_LE[index, order] * experts
            axes.bar(np.arange(experts) + shift, height_E, 0.4, color=colour, label=label)
        axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
        plots.finish(axes, "load / fair share" if index % columns == 0 else "")
        axes.set_title(layers[index], fontsize=9, loc="left")
    figure.supxlabel(
        "expert" if experts <= plots.NAMED_EXPERTS else "expert, sorted by load before", fontsize=9
    )
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(),
        loc="outside lower right",
        ncols=2,
        frameon=False,
        fontsize=9,
    )
    return figure


def confusions(path: Path) -> dict[str, Figure]:
    """A picture for each task with classes: `confusion_TASK`, how often a class (row) is taken for another (column)."""
    if not path.exists():
        return {}
    answers = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    classed = [answer for answer in answers if "ranked" in answer]
    figures = {}
    for task in dict.fromkeys(answer["task"] for answer in classed):
        pairs = [(a["targets"], a["ranked"]) for a in classed if a["task"] == task]
        classes = in_order({label for pair in pairs for label in pair})
        if len(classes) <= MOST_CLASSES:
            name = "".join(letter if letter.isalnum() else "_" for letter in Path(task).stem)
            figures[f"confusion_{name}"] = _confusion(pairs, classes)
    return figures


def in_order(classes: Collection[str]) -> list[str]:
    """By their values where all are numbers, else by their letters."""
    try:
        return sorted(classes, key=float)
    except ValueError:
        return sorted(classes)


def _confusion(pairs: Sequence[tuple[str, str]], classes: Sequence[str]) -> Figure:
    count_CC = np.zeros((len(classes), len(classes)), int)
    for target, found in pairs:
        count_CC[classes.index(target), classes.index(found)] += 1
    share_CC = count_CC / np.maximum(1, count_CC.sum(axis=1, keepdims=True))
    size = 2.5 + 0.45 * len(classes)
    figure = Figure(figsize=(size + 1.5, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share_CC, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(count_CC):
        if count:
            colour = "white" if share_CC[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(len(classes)), classes, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(classes)), classes, fontsize=8)
    axes.set_xlabel("the likeliest class")
    axes.set_ylabel("the right one")
    figure.colorbar(image, label="share of the row", shrink=0.7)
    return figure
