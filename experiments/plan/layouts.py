"""The layouts as a picture, drawn from `sharding.LAYOUTS`. See `experiments.plan`."""

import math

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from switchmoe.parallel import sharding
from switchmoe.settings import MeshSettings

INK, FAINT, WHOLE = "#26323f", "#75828f", "#5b7fa6"
ROWS = {  # what is drawn: logical axes down and across
    "tokens of the batch": ("batch", None),
    "dense feed-forward:\nits width (across)": (None, "mlp"),
    "experts (down)\nand their width (across)": ("expert", "mlp"),
}


def picture(down: int, across: int) -> Figure:
    """A grid of down x across devices per layout and kind of array.

    A device's square is the whole array; what it holds of it is coloured, the same part in the same
    colour. Layouts with a model axis beside another one have it across.
    """
    figure = Figure(figsize=(2.55 * len(sharding.LAYOUTS) + 1.75, 8.9), layout="constrained")
    grid = figure.subplots(len(ROWS), len(sharding.LAYOUTS))
    for column, (name, layout) in enumerate(sharding.LAYOUTS.items()):
        free = [axis for axis, size in layout.sizes.items() if size < 0]
        both = layout.sizes["model"] > 1 and free != ["model"]
        mesh = MeshSettings(layout=name, model=across if both else 0)
        sizes, _ = sharding.axis_sizes(mesh, down * across)
        for row, (title, names) in enumerate(ROWS.items()):
            axes = grid[row, column]
            _devices(axes, dict(layout.rules), names, sizes, (down, across))
            if column == 0:
                axes.set_ylabel(title, color=INK, fontsize=11.5, labelpad=12)
        used = [f"{axis} {size}" for axis, size in zip(sharding.AXES, sizes, strict=True) if size > 1]
        grid[0, column].set_title(f"{name}\n", color=INK, fontsize=13, fontweight="bold", family="monospace")
        grid[0, column].text(
            across / 2, -0.28, " × ".join(used), ha="center", color=FAINT, fontsize=10.5
        )  # below the title
    figure.supxlabel(
        f"{down * across} devices. Each square is a device and stands for the whole array; strongly coloured is the part that "
        "it holds, equal parts in equal colours; a full square holds all.",
        color=FAINT,
        fontsize=11,
    )
    return figure


def _devices(
    axes: Axes,
    rules: dict[str, str | tuple[str, ...]],
    names: tuple[str | None, str | None],
    sizes: tuple[int, ...],
    grid: tuple[int, int],
) -> None:
    axes.set(xlim=(-0.05, grid[1] + 0.05), ylim=(grid[0] + 0.05, -0.05), aspect="equal", xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    for device in range(grid[0] * grid[1]):
        at = dict(zip(sharding.AXES, np.unravel_index(device, sizes), strict=True))
        extent = dict(zip(sharding.AXES, sizes, strict=True))
        (i, n), (j, m) = (_part(rules.get(name, ()), at, extent) for name in names)
        y, x = divmod(device, grid[1])
        _device(axes, x, y, (i, n), (j, m))


def _part(axes: str | tuple[str, ...], at: dict[str, int], sizes: dict[str, int]) -> tuple[int, int]:
    """(which part, of how many) a device holds along a logical axis."""
    axes = (axes,) if isinstance(axes, str) else axes
    index = 0
    for axis in axes:
        index = index * sizes[axis] + int(at[axis])
    return index, math.prod(sizes[axis] for axis in axes)


def _device(axes: Axes, x: int, y: int, down: tuple[int, int], across: tuple[int, int]) -> None:
    (i, n), (j, m) = down, across
    side, gap = 0.8, 0.1
    left, top = x + gap, y + gap
    part = (i * m + j) / (n * m)
    colour = colormaps["turbo"](0.08 + 0.86 * part) if n * m > 1 else WHOLE
    axes.add_patch(Rectangle((left, top), side, side, facecolor="white", edgecolor="none"))
    axes.add_patch(Rectangle((left, top), side, side, facecolor=colour, edgecolor="none", alpha=0.16))
    axes.add_patch(
        Rectangle(
            (left + side * j / m, top + side * i / n), side / m, side / n, facecolor=colour, edgecolor="none"
        )
    )
    axes.add_patch(
        FancyBboxPatch(
            (left, top),
            side,
            side,
            boxstyle="square,pad=0.03",
            facecolor="none",
            edgecolor=FAINT,
            linewidth=0.8,
        )
    )
