"""Sharding as data: logical axis names on arrays, and per layout a table that maps them to mesh axes.

Model code names logical axes only. A layout is one entry of `LAYOUTS`; an axis that it leaves out is
replicated. Parameters' names: layers, vocab, embed, heads, kv, mlp, expert. Activations': batch,
group (groups of tokens), expert_group (groups inside the experts' buffers).
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from switchmoe.moe import check as moe_check
from switchmoe.moe import group_shape
from switchmoe.optimizers import BATCH_AXES
from switchmoe.settings import Settings

LAYOUTS: dict[str, tuple[tuple[str, str], ...]] = {
    "data": (("batch", "data"), ("group", "data"), ("expert_group", "data")),
    "data_expert": (("batch", "data"), ("group", "data"), ("expert", "data")),
}


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices (or the given ones) along the axis ``data``."""
    devices = jax.devices() if devices is None else list(devices)
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def check(settings: Settings, lengths: dict[str, int], num_devices: int) -> dict[str, int]:
    """Refuses batches, groups and experts that the mesh or the router cannot hold.

    Args:
      lengths: tokens per sequence in each stack, ``{"encoder": ..., "decoder": ...}``.

    Returns:
      The tokens of a group in training, for each stack that has sparse layers.

    Raises:
      ValueError: one line with field, value and what would be accepted.
    """
    layout, data, moe = settings.mesh.layout, settings.data, settings.moe
    if layout not in LAYOUTS:
        raise ValueError(f"mesh.layout={layout}: accepted is one of {', '.join(LAYOUTS)}")
    for stack in lengths:
        moe_check(moe, causal=stack == "decoder")
    batch = data.batch_size // settings.train.accumulate
    if batch % num_devices:
        raise ValueError(
            f"data.batch_size={data.batch_size}: accepted is a multiple of {num_devices * settings.train.accumulate}"
            f" ({num_devices} devices x train.accumulate={settings.train.accumulate})"
        )
    if not settings.sparse:
        return {}
    if dict(LAYOUTS[layout]).get("expert") and moe.total_experts % num_devices:
        raise ValueError(
            f"moe.num_experts={moe.num_experts}: accepted with mesh.layout={layout} is a multiple of the"
            f" {num_devices} devices"
        )
    tokens = {}
    for stack, length in lengths.items():
        groups, tokens[stack] = group_shape(batch, length, moe.group_size)
        if moe.total_experts > tokens[stack]:
            raise ValueError(
                f"moe.num_experts={moe.num_experts}: accepted is at most {tokens[stack]}, the tokens of one of the"
                f" {stack}'s groups (moe.group_size={moe.group_size}, {batch} sequences of {length} tokens)"
            )
        if groups % num_devices:
            raise ValueError(
                f"moe.group_size={moe.group_size}: accepted is a size that gives the {stack} a multiple of"
                f" {num_devices} groups, one or more a device; this gives {groups} of {tokens[stack]} tokens"
            )
    return tokens


def state_shardings(state: Any, params: dict, settings: Settings, mesh: Mesh) -> Any:
    """NamedShardings of a train state: what belongs to a parameter lies where the parameter lies.

    A leaf belongs to the parameter whose path its own path contains. A moment of the parameter's shape
    has all of its axes; a factor or a count has the leading batch axes (layers, experts), and whatever
    follows them is replicated. Leaves that belong to none are replicated.

    Args:
      state: a tree of arrays or ShapeDtypeStructs.
      params: the boxed parameters of `training.abstract_variables`.
    """
    boxes = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: isinstance(x, nn.Partitioned))
    owners = {path_keys(path): box for path, box in boxes}

    def place(path: tuple, leaf: Any) -> NamedSharding:
        keys = path_keys(path)
        parts = (keys[i:j] for i in range(len(keys)) for j in range(len(keys), i, -1))
        box = next((owners[part] for part in parts if part in owners), None)
        names: tuple[str | None, ...] = box.names if box else ()
        if box and leaf.shape != box.value.shape:
            names = tuple(name for name in names if name in BATCH_AXES)
        spec = PartitionSpec(*names, *[None] * (leaf.ndim - len(names)))
        return nn.logical_to_mesh_sharding(spec, mesh, LAYOUTS[settings.mesh.layout])

    return jax.tree_util.tree_map_with_path(place, state)


def path_keys(path: tuple) -> tuple[str, ...]:
    """A leaf's path as names, alike for dictionaries, dataclasses and tuples."""
    return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec("data"))


def rules(settings: Settings):
    """Context in which `flax.linen.with_logical_constraint` follows the layout."""
    return nn.logical_axis_rules(LAYOUTS[settings.mesh.layout])


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
