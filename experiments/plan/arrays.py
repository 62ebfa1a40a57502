"""Where a model's arrays lie on the devices there are, and what a step sends between them, as pictures.

Read from the shardings and the compiled step, not from the layouts' tables (`layouts` draws those). Nothing is allocated.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from switchmoe.analysis import plots
from switchmoe.analysis.sweep_plots import COLOURS
from switchmoe.data import batches
from switchmoe.parallel import sharding
from switchmoe.planning import aot
from switchmoe.settings import Settings
from switchmoe.training import train_state

DRAWN = {  # a title: an array with these logical axes, which are drawn down and across
    "embedding\npieces x width": ("vocab", "embed"),
    "dense feed-forward\nwidth x its width": ("embed", "mlp"),
    "experts\nexperts x their width": ("expert", "mlp"),
}
TOKENS = "tokens\nsequences x places"


class Array(NamedTuple):
    shape: tuple[int, ...]
    dims: tuple[int, int]  # those that are drawn
    where: jax.sharding.Sharding


class Placed(NamedTuple):
    """One layout on the devices there are."""

    sizes: dict[str, int]  # devices along each axis of the mesh
    arrays: dict[str, Array]
    state_bytes: int  # of parameters and optimizer's state, on one device
    collectives: dict[str, dict[str, int]]  # `aot.collectives` of the compiled training step


def placed(settings: Settings, layout: str) -> Placed:
    """The layout's arrays and, from a compilation ahead of time, its collectives.

    Raises:
      ValueError: the settings do not fit the devices.
    """
    settings = dataclasses.replace(settings, mesh=dataclasses.replace(settings.mesh, layout=layout))
    mesh, lengths = sharding.make_mesh(settings.mesh), batches.lengths(settings.data)
    sharding.check(settings, lengths, mesh.shape)
    state = train_state.sharded_state(settings, train_state.optimizer(settings), mesh)
    rows = settings.data.batch_size, next(iter(batches.array_lengths(lengths).values()))
    arrays = {TOKENS: Array(rows, (0, 1), sharding.batch_sharding(mesh))}
    return Placed(
        sizes=dict(mesh.shape),
        arrays=arrays | _parameters(settings, state.params),
        state_bytes=sum(map(_local_bytes, jax.tree.leaves(state))),
        collectives=aot.collectives(aot.compile_step(settings, lengths, mesh).as_text()),
    )


def _parameters(settings: Settings, params: Any) -> dict[str, Array]:
    """For each of DRAWN the first parameter that has its axes; one of experts only where it names them."""
    names = jax.tree.leaves(train_state.axis_names(settings), is_leaf=lambda leaf: isinstance(leaf, tuple))
    leaves, found = jax.tree.leaves(params), {}
    for title, axes in DRAWN.items():
        for own, leaf in zip(names, leaves, strict=True):
            if set(axes) <= set(own) and ("expert" in own) == ("expert" in axes):
                found[title] = Array(leaf.shape, tuple(map(own.index, axes)), leaf.sharding)
                break
    return found


def _local_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    size = leaf.dtype.itemsize
    for extent in leaf.sharding.shard_shape(leaf.shape):
        size *= extent
    return size


def regions(array: Array) -> dict[tuple[tuple[float, float], ...], list[int]]:
    """Devices by the part of the array that they hold: (from, to) along each drawn axis, as shares of it."""
    found: dict[tuple[tuple[float, float], ...], list[int]] = {}
    for device, slices in array.where.devices_indices_map(array.shape).items():
        part = []
        for dim in array.dims:
            start, stop, _ = slices[dim].indices(array.shape[dim])
            part.append((start / array.shape[dim], stop / array.shape[dim]))
        found.setdefault(tuple(part), []).append(device.id)
    return {part: sorted(devices) for part, devices in sorted(found.items())}


def numbered(devices: list[int]) -> str:
    """0-3 for 0, 1, 2, 3; 0,2,4,6."""
    runs = []
    for _, run in itertools.groupby(enumerate(devices), lambda item: item[1] - item[0]):
        own = [device for _, device in run]
        runs.append(f"{own[0]}-{own[-1]}" if len(own) > 2 else ",".join(map(str, own)))
    return ",".join(runs)


@plots.own_style
def picture(found: Mapping[str, Placed]) -> Figure:
    """A column for each layout, a row for each array: its parts, with the numbers of the devices that hold each."""
    titles = list(next(iter(found.values())).arrays)
    figure = Figure(figsize=(2.6 * len(found) + 1, 2.3 * len(titles)), layout="constrained")
    grid = figure.subplots(len(titles), len(found), squeeze=False)
    for column, (layout, one) in enumerate(found.items()):
        sizes = " x ".join(f"{axis} {size}" for axis, size in one.sizes.items() if size > 1)
        for row, title in enumerate(titles):
            axes = grid[row, column]
            _draw(axes, one.arrays[title])
            axes.set_xlabel(" x ".join(map(str, one.arrays[title].shape)), fontsize=8, color=plots.GREY)
            if not column:
                axes.set_ylabel(title, fontsize=10)
        grid[0, column].set_title(f"{layout}\n{sizes}", fontsize=10)
    return figure


def _draw(axes: Axes, array: Array) -> None:
    axes.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[])
    for number, (((top, bottom), (left, right)), devices) in enumerate(regions(array).items()):
        colour = COLOURS[number % len(COLOURS)]
        box = Rectangle(
            (left, top), right - left, bottom - top, facecolor=colour, edgecolor="white", alpha=0.5
        )
        axes.add_patch(box)
        narrow = right - left < 0.2 <= bottom - top
        axes.text(
            (left + right) / 2, (top + bottom) / 2, numbered(devices), ha="center", va="center",
            fontsize=8, rotation=90 if narrow and len(devices) > 1 else 0,
        )  # fmt: skip


@plots.own_style
def collectives(found: Mapping[str, Placed]) -> Figure:
    """Calls of each kind in the compiled step, and the bytes of their results on one device."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    kinds = [kind for kind in aot.COLLECTIVES if any(kind in one.collectives for one in found.values())]
    for axes, what, scale, label in (
        (panels[0], "count", 1, "calls in the step's program"),
        (panels[1], "bytes", 2**20, "their results on one device (MiB)"),
    ):
        left = [0.0] * len(found)
        for kind, colour in zip(kinds, COLOURS, strict=False):
            width = [one.collectives.get(kind, {}).get(what, 0) / scale for one in found.values()]
            axes.barh(list(found), width, left=left, color=colour, label=kind)
            left = [a + b for a, b in zip(left, width, strict=True)]
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=9
    )
    return figure
