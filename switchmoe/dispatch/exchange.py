"""Dispatch on a mesh: each device routes its own groups, and rows travel to the devices of their experts.

GSPMD finds the two all-to-alls once rows lie in buffers x_EGCD. It does not see that what fills and
empties these stays within a group, nor can it send sorted rows: both run under `jax.shard_map` over the
mesh axes of the groups.

Letters as in `switchmoe.dispatch`; P devices along the experts' axis, M rows sent to one of them.
"""

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from switchmoe.dispatch.dispatchers import (
    DECODING,
    DISPATCHERS,
    IndexDispatcher,
    apart_dispatcher,
    gather_dispatcher,
    kept_choices,
    row_maps,
    spread,
)
from switchmoe.dispatch.grouped import grouped_matmul
from switchmoe.routing import Routing


def dispatcher(name: str, routing: Routing) -> Any:
    """The back end ``name`` (see `switchmoe.dispatch`), on the mesh and by the rules in force.

    Where the groups are whole on each device, or do not divide among the devices, it is the plain one.
    """
    axes, experts = _axes("group"), _axes("expert")
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    shards = math.prod(sizes.get(axis, 1) for axis in axes)
    if name == DECODING:
        return apart_dispatcher(routing)
    if shards == 1 or len(routing.expert_SK) % shards:
        return DISPATCHERS[name](routing)
    if name == "ragged":
        return RaggedExchange.create(routing, axes, experts, math.prod(sizes[axis] for axis in experts))
    return BufferExchange.create(routing, axes, DISPATCHERS[name])


def _axes(name: str) -> tuple[str, ...]:
    """Mesh axes of a logical axis."""
    (axes,) = nn.logical_to_mesh_axes((name,)) or ((),)
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _on_devices(function: Any, axes: tuple[str, ...], in_specs: Any, out_specs: Any) -> Any:
    return jax.shard_map(
        function, in_specs=in_specs, out_specs=out_specs, axis_names=set(axes), check_vma=False
    )


@struct.dataclass
class BufferExchange:
    """A back end of buffers x_EGCD, made and read by the device that has the groups.

    Between the two, the sharding of the buffers (groups' axis to experts' axis) is the all-to-all.
    """

    local: Any  # EinsumDispatcher, IndexDispatcher, or another back end's
    specs: Any = struct.field(pytree_node=False)
    axes: tuple[str, ...] = struct.field(pytree_node=False)

    @classmethod
    def create(cls, routing: Routing, axes: tuple[str, ...], make: Any) -> "BufferExchange":
        groups, buffers = PartitionSpec(axes), PartitionSpec(None, axes)
        # A back end has its leaves along the groups, but for the buffers' own indices.
        specs = IndexDispatcher(groups, buffers, groups) if make is gather_dispatcher else groups
        return cls(_on_devices(make, axes, groups, specs)(_indices(routing)), specs, axes)

    def dispatch(self, x_GSD: jax.Array) -> jax.Array:
        specs = self.specs, PartitionSpec(self.axes)
        run = _on_devices(type(self.local).dispatch, self.axes, specs, PartitionSpec(None, self.axes))
        return run(self.local, x_GSD)

    def matmul(self, x_EGCD: jax.Array, kernel_EDF: jax.Array) -> jax.Array:
        return self.local.matmul(x_EGCD, kernel_EDF)

    def combine(self, y_EGCD: jax.Array) -> jax.Array:
        specs = self.specs, PartitionSpec(None, self.axes)
        run = _on_devices(type(self.local).combine, self.axes, specs, PartitionSpec(self.axes))
        return run(self.local, y_EGCD)


@struct.dataclass
class RaggedExchange:
    """The ragged back end: rows sorted by expert on the device that has the expert.

    A device sends each other one M = min(choices, slots of the other's experts) rows of its own groups,
    of which those beyond the choices made are empty: all-to-all moves blocks of one size. Without a
    capacity M is all of a device's choices, so that rows take P times the memory they need (XLA has no
    ragged all-to-all on a CPU).
    """

    local: IndexDispatcher  # tokens to and from the blocks that are sent
    row_N1: jax.Array  # int32, where the row of a received block goes among those sorted by expert
    source_N: jax.Array  # int32, its inverse
    sizes_E: jax.Array  # int32, rows of each of the device's experts
    axes: tuple[str, ...] = struct.field(pytree_node=False)
    experts: tuple[str, ...] = struct.field(pytree_node=False)

    @classmethod
    def create(
        cls, routing: Routing, axes: tuple[str, ...], experts: tuple[str, ...], peers: int
    ) -> "RaggedExchange":
        make = partial(_blocks, axis=experts, peers=peers)
        local, *order = _on_devices(make, axes, PartitionSpec(axes), PartitionSpec(axes))(_indices(routing))
        return cls(local, *order, axes, experts)

    def dispatch(self, x_GSD: jax.Array) -> jax.Array:
        def send(plan: RaggedExchange, x_GSD: jax.Array) -> jax.Array:
            return spread(_exchanged(plan.local.dispatch(x_GSD), plan.experts), plan.row_N1, plan.source_N)

        return _on_devices(send, self.axes, PartitionSpec(self.axes), PartitionSpec(self.axes))(self, x_GSD)

    def matmul(self, x_ND: jax.Array, kernel_EDF: jax.Array) -> jax.Array:
        rows = PartitionSpec(self.axes)
        run = _on_devices(grouped_matmul, self.axes, (rows, PartitionSpec(self.experts), rows), rows)
        return run(x_ND, kernel_EDF, self.sizes_E)

    def combine(self, y_ND: jax.Array) -> jax.Array:
        def back(plan: RaggedExchange, y_ND: jax.Array) -> jax.Array:
            received_ND = spread(y_ND, plan.source_N[:, None], plan.row_N1[:, 0])
            return plan.local.combine(_exchanged(received_ND, plan.experts))

        return _on_devices(back, self.axes, PartitionSpec(self.axes), PartitionSpec(self.axes))(self, y_ND)


def _indices(routing: Routing) -> Routing:
    """What a dispatcher reads, all of it along the groups."""
    return routing.replace(losses={}, prob_SE=None, rank_SE=None)


def _exchanged(rows_ND: jax.Array, axis: tuple[str, ...]) -> jax.Array:
    """Block p goes to device p, and the block of device p comes back in its place."""
    return jax.lax.all_to_all(rows_ND, axis, 0, 0, tiled=True) if axis else rows_ND


def _blocks(
    routing: Routing, axis: tuple[str, ...], peers: int
) -> tuple[IndexDispatcher, jax.Array, jax.Array, jax.Array]:
    """One device's part of `RaggedExchange`: (local, row_N1, source_N, sizes_E)."""
    groups, tokens, choices = routing.expert_SK.shape
    mine = routing.num_experts // peers
    size = groups * min(tokens * choices, mine * routing.capacity)
    kept_EG = kept_choices(routing)
    kept_PN = kept_EG.reshape(peers, -1)
    first_PN = jnp.arange(peers, dtype=jnp.int32)[:, None] * size + jnp.cumsum(kept_PN, axis=1) - kept_PN
    row_GSK, choice_N = row_maps(routing, first_PN.reshape(kept_EG.shape), peers * size)
    sent_PE = kept_EG.sum(axis=1).reshape(peers, mine)
    received_PE = jax.lax.all_gather(sent_PE, axis)[:, jax.lax.axis_index(axis)] if axis else sent_PE
    ends_PE = jnp.cumsum(received_PE, axis=1)
    place_M = jnp.arange(size, dtype=jnp.int32)
    expert_PM = jax.vmap(partial(jnp.searchsorted, v=place_M, side="right"))(ends_PE)
    # Before a row: all rows of the experts before its own, and those of its expert from devices before.
    total_E = received_PE.sum(axis=0)
    first_PE = (jnp.cumsum(total_E) - total_E)[None] + jnp.cumsum(received_PE, axis=0) - received_PE
    shift_PE = first_PE - (ends_PE - received_PE)
    row_PM = place_M[None] + jnp.take_along_axis(shift_PE, jnp.minimum(expert_PM, mine - 1), axis=1)
    row_N = jnp.where(expert_PM < mine, row_PM, peers * size).reshape(-1)
    index_N = jnp.arange(len(row_N), dtype=jnp.int32)
    source_N = jnp.full(len(row_N), len(row_N), jnp.int32).at[row_N].set(index_N, mode="drop")
    return IndexDispatcher(row_GSK, choice_N, routing.gate_SK), row_N[:, None], source_N, total_E
