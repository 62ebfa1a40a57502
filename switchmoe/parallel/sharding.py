"""Sharding as data: logical axis names on arrays, and per layout a table that maps them to mesh axes.

Model code names logical axes only. A layout is one entry of `LAYOUTS`; an axis that it leaves out is
replicated. Parameters' names: layers, vocab, embed, heads, kv, mlp, expert. Activations': batch,
group (groups of tokens), expert_group (groups inside the experts' buffers).
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from switchmoe.model.moe_rules import check as moe_check
from switchmoe.model.moe_rules import group_shape
from switchmoe.settings import MeshSettings, MoESettings, Settings

AXES = ("data", "expert", "model")
Rules = tuple[tuple[str, str | tuple[str, ...]], ...]

TOKENS: Rules = (("batch", ("data", "expert")), ("group", ("data", "expert")), ("expert_group", "data"))
EXPERTS: Rules = (("expert", "expert"),)
WIDTHS: Rules = (("vocab", "model"), ("heads", "model"), ("mlp", "model"))
# The experts' own axis is taken: what is left of the tokens' axes shards their kernels.
FSDP: Rules = (("embed", ("data", "expert")), ("embed", "data"))


class Layout(NamedTuple):
    """Mesh axes of logical axes, and the devices along a mesh axis, -1 for all that are left."""

    rules: Rules
    sizes: dict[str, int]


# Switch, figure 9.
LAYOUTS = {
    "data": Layout(TOKENS, {"data": -1, "expert": 1, "model": 1}),
    "model": Layout(TOKENS + WIDTHS, {"data": 1, "expert": 1, "model": -1}),
    "data_model": Layout(TOKENS + WIDTHS, {"data": -1, "expert": 1, "model": 2}),
    "data_expert": Layout(TOKENS + EXPERTS, {"data": 1, "expert": -1, "model": 1}),
    "data_expert_model": Layout(TOKENS + EXPERTS + WIDTHS, {"data": 1, "expert": -1, "model": 2}),
}


def axis_sizes(settings: MeshSettings, devices: int, slices: int = 1) -> tuple[tuple[int, ...], ...]:
    """Devices along data, expert and model within a slice, and slices along them.

    Raises:
      ValueError: no such layout, sizes that do not multiply to the devices there are, or several devices
        along an axis on which the layout lays nothing: they would all do the same.
    """
    if settings.layout not in LAYOUTS:
        raise ValueError(f"mesh.layout={settings.layout}: accepted is one of {', '.join(LAYOUTS)}")
    own = LAYOUTS[settings.layout].sizes
    inner = {axis: getattr(settings, axis) or own[axis] for axis in AXES}
    outer = {
        f"dcn_{axis}": getattr(settings, f"dcn_{axis}") or (-1 if axis == "data" else 1) for axis in AXES
    }
    filled = _filled(inner, devices // slices, "devices of a slice"), _filled(outer, slices, "slices")
    for axis in set(AXES) - used_axes(settings.layout):
        for field, size in zip(
            (axis, f"dcn_{axis}"), (sizes[AXES.index(axis)] for sizes in filled), strict=True
        ):
            if size > 1:
                raise ValueError(
                    f"mesh.{field}={size}: accepted with mesh.layout={settings.layout} is 0 or 1"
                    f" (nothing lies along {axis})"
                )
    return filled


def used_axes(layout: str) -> set[str]:
    """Mesh axes along which the layout lays anything."""
    named = [(axes,) if isinstance(axes, str) else axes for _, axes in LAYOUTS[layout].rules]
    return {axis for axes in named for axis in axes}


def _filled(sizes: dict[str, int], total: int, what: str) -> tuple[int, ...]:
    given = math.prod(size for size in sizes.values() if size > 0)
    free = [axis for axis, size in sizes.items() if size < 0]
    if len(free) > 1:
        raise ValueError(
            f"mesh.{free[1]}=-1: accepted is one axis that fills, which is mesh.{free[0]} already"
        )
    if total % given or (not free and given != total):
        said = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise ValueError(f"mesh: {said}: accepted are sizes whose product is the {total} {what}")
    return tuple(total // given if size < 0 else size for size in sizes.values())


def make_mesh(settings: MeshSettings, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices (or the given ones) along data, expert and model.

    Devices of one slice are neighbours along the axes within a slice. Where the devices know of no
    slices, but a ``mesh.dcn_`` size is set, a process is a slice.

    Raises:
      ValueError: as `axis_sizes`.
    """
    devices = jax.devices() if devices is None else list(devices)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    processes = slices == 1 and any(getattr(settings, f"dcn_{axis}") for axis in AXES)
    if processes:
        slices = len({device.process_index for device in devices})
    inner, outer = axis_sizes(settings, len(devices), slices)
    types = (AxisType.Auto,) * len(AXES)
    # Two axes of a mesh may have to share an axis of a slice: 16 chips by 4 in a torus of 4 x 4 x 4.
    if slices == 1:
        grid = mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(
            inner, outer, devices, process_is_granule=processes, allow_split_physical_axes=True
        )
    return Mesh(grid, AXES, axis_types=types)


def check(settings: Settings, lengths: dict[str, int], mesh: Mapping[str, int]) -> dict[str, int]:
    """Refuses batches, groups, experts and widths that the mesh or the router cannot hold.

    Args:
      lengths: tokens per sequence in each stack, as of `data.batches.lengths`.
      mesh: devices along each axis (``make_mesh(...).shape``).

    Returns:
      The tokens of a group in training, for each stack that has sparse layers.

    Raises:
      ValueError: one line with field, value and what would be accepted.
    """
    moe, accumulate = settings.moe, settings.train.accumulate
    for stack in settings.sparse_stacks:
        moe_check(moe, causal=stack == "decoder")
    shards = mesh["data"] * mesh["expert"]
    batch = settings.data.batch_size // accumulate
    if batch % shards:
        raise ValueError(
            f"data.batch_size={settings.data.batch_size}: accepted is a multiple of {shards * accumulate}"
            f" ({shards} shards of the tokens x train.accumulate={accumulate})"
        )
    _check_widths(settings, mesh)
    if not settings.sparse:
        return {}
    if moe.total_experts % mesh["expert"]:
        raise ValueError(
            f"moe.num_experts={moe.num_experts}: accepted with mesh.layout={settings.mesh.layout} is a multiple"
            f" of the {mesh['expert']} devices along the expert axis (mesh.expert)"
        )
    tokens, routed = {}, {stack: lengths[stack] for stack in settings.sparse_stacks}
    for stack, length in routed.items():
        groups, tokens[stack] = group_shape(batch, length, moe.group_size)
        if moe.total_experts > tokens[stack] and not moe.capacity:  # by a factor less than a slot each
            raise ValueError(
                f"moe.num_experts={moe.num_experts}: accepted is at most {tokens[stack]}, the tokens of one of the"
                f" {stack}'s groups (moe.group_size={moe.group_size}, {batch} sequences of {length} tokens)"
            )
        if groups % shards:
            raise ValueError(
                f"moe.group_size={moe.group_size}: accepted is a size that gives each stack a multiple of {shards}"
                f" groups, one or more for each shard of the tokens{_largest(batch, routed, moe, shards)}; this"
                f" gives the {stack} {groups} of {tokens[stack]} tokens"
            )
    return tokens


def _largest(batch: int, lengths: dict[str, int], moe: MoESettings, shards: int) -> str:
    """The largest group size that would be accepted, if there is one, in words."""
    for size in range(moe.group_size, 0, -1):
        shapes = [group_shape(batch, length, size) for length in lengths.values()]
        if all(groups % shards == 0 and moe.total_experts <= tokens for groups, tokens in shapes):
            return f", {size} for one"
    return ""


def _check_widths(settings: Settings, mesh: Mapping[str, int]) -> None:
    """Refuses widths that do not divide among the devices along their axis."""
    model, moe = settings.model, settings.moe
    experts = "moe.d_ff" if moe.d_ff else "model.d_ff"
    finer = f"{experts} / moe.granularity={moe.granularity}" if moe.granularity > 1 else experts
    widths = {
        "model.num_heads": ("heads", model.num_heads),
        "model.num_kv_heads": ("heads", model.kv_heads),
        "model.d_ff": ("mlp", model.d_ff),
        finer: ("mlp", settings.expert_width // moe.granularity if settings.sparse else 0),
        "model.vocab_rows" if model.vocab_rows else "data.vocab_size": ("vocab", settings.embedding_rows),
        "model.d_model": ("embed", model.d_model),
    }
    used = dict(reversed(table(settings)))
    for field, (name, width) in widths.items():
        axes = used.get(name, ())
        devices = math.prod(mesh[axis] for axis in ((axes,) if isinstance(axes, str) else axes))
        if width % devices:
            raise ValueError(
                f"{field}: {width} along the axis {name}; accepted with mesh.layout={settings.mesh.layout} and"
                f" mesh.fsdp={settings.mesh.fsdp} is a multiple of the {devices} devices that share it"
            )


def table(settings: Settings) -> Rules:
    """The rules of the layout."""
    return LAYOUTS[settings.mesh.layout].rules + (FSDP if settings.mesh.fsdp else ())


def path_keys(path: tuple) -> tuple[str, ...]:
    """A leaf's path as names, alike for dictionaries, dataclasses and tuples."""
    return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays whose first axis is the batch."""
    return nn.logical_to_mesh_sharding(PartitionSpec("batch"), mesh, TOKENS)


def rules(settings: Settings):
    """Context in which `flax.linen.with_logical_constraint` follows the layout."""
    return nn.logical_axis_rules(table(settings))
