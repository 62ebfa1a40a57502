"""What the collectives of a training step move, from shapes alone, within a slice (ICI) and across (DCN).

Bytes are those that a device sends in a ring, hierarchically where an axis spans slices: over i devices
within a slice and o slices, an all-to-all of b bytes sends ``b (o - 1) / o`` across slices and the rest of
``b (io - 1) / io`` within; an all-gather to b bytes, or a reduce-scatter of b, ``b (i - 1) / i`` within and
``(b / i) (o - 1) / o`` across; an all-reduce is both. Scalars, norms and routing indices are left out.

Letters: B batch, L length, D model, E experts, G groups, C capacity.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from switchmoe.model.moe_rules import dispatch_name, group_shape, router_name, slots
from switchmoe.parallel import sharding
from switchmoe.settings import Settings
from switchmoe.training import train_state

Sizes = dict[str, int]  # devices along each axis


class Transfer(NamedTuple):
    """Collectives of one kind for one purpose, over a step."""

    kind: str
    purpose: str
    count: int
    ici: float  # bytes that a device sends within its slice
    dcn: float  # and to other slices


def transfers(
    settings: Settings, boxes: dict, lengths: dict[str, int], inner: Sizes, outer: Sizes
) -> list[Transfer]:
    """The step's collectives.

    Args:
      boxes: the boxed parameters of `training.abstract_variables`.
      inner: devices along each axis within a slice; outer: slices along it.
    """
    mesh = {axis: inner[axis] * outer[axis] for axis in inner}
    batch = settings.data.batch_size // settings.train.accumulate // (mesh["data"] * mesh["expert"])
    found = [
        *_experts(settings, lengths, batch, inner, outer),
        *_widths(settings, lengths, batch, inner, outer),
        *_parameters(settings, boxes, inner, outer),
    ]
    return [transfer for transfer in found if transfer.ici or transfer.dcn]


def buffer_rows(settings: Settings, stack: str, length: int, batch: int, mesh: Sizes) -> int:
    """Rows that a device sends to experts in one sparse layer: E * G * C of its own G groups."""
    moe, causal = settings.moe, stack == "decoder"
    groups, tokens = group_shape(batch, length, moe.group_size)
    experts = moe.total_experts
    capacity = slots(moe, tokens, moe.capacity_factor)
    if router_name(moe, causal) == "soft":
        capacity = moe.slots
    if dispatch_name(moe, causal) != "ragged":
        return groups * experts * capacity
    # Blocks of one size to each device, as `exchange.RaggedExchange` sends them.
    capacity = tokens if moe.dropless else capacity
    peers = mesh["expert"] if _has("expert", settings) else 1
    return groups * peers * min(tokens * moe.total_choices, experts // peers * capacity)


def _has(name: str, settings: Settings) -> bool:
    return name in dict(sharding.table(settings))


def _passes(settings: Settings) -> int:
    """Forward and backward, and the forward again with remat."""
    return 3 if settings.model.remat else 2


def _item(settings: Settings) -> int:
    return jnp.dtype(settings.model.dtype).itemsize


def _experts(
    settings: Settings, lengths: Sizes, batch: int, inner: Sizes, outer: Sizes
) -> Iterator[Transfer]:
    """Rows to their experts and back: two all-to-alls a layer and pass."""
    mesh = {axis: inner[axis] * outer[axis] for axis in inner}
    if not _has("expert", settings):
        return
    o, peers = outer["expert"], mesh["expert"]
    model, sent, calls = settings.model, 0, 0
    for stack in settings.sparse_stacks:
        passes = 2 * _passes(settings) * len(settings.sparse_blocks(stack)) * settings.train.accumulate
        rows = buffer_rows(settings, stack, lengths[stack], batch, mesh)
        width = model.d_model
        if settings.moe.attention:  # out come queries, keys and values
            width += (width + (model.num_heads + 2 * model.kv_heads) * model.d_kv) // 2
        sent += passes * rows * width * _item(settings)
        calls += passes * (2 if settings.moe.attention else 1)
    across = (o - 1) / o
    yield Transfer("all-to-all", "experts' rows", calls, sent * ((peers - 1) / peers - across), sent * across)


def _widths(settings: Settings, lengths: Sizes, batch: int, inner: Sizes, outer: Sizes) -> Iterator[Transfer]:
    """Sums over the model axis: after a product whose width is split, and in the backward pass before it."""
    if not _has("mlp", settings):
        return
    mesh = {axis: inner[axis] * outer[axis] for axis in inner}
    model, passes, accumulate = settings.model, _passes(settings), settings.train.accumulate
    tokens = {stack: batch * length for stack, length in lengths.items()}
    ups = 2 if model.gated else 1
    rows = calls = 0
    for stack, count in tokens.items():
        layers, sparse = settings.layers(stack), len(settings.sparse_blocks(stack))
        # Forward: the attention's and the feed-forward's output. Backward: the inputs of query, key and
        # value, and of the feed-forward, each product by itself.
        attention = (passes - 1) + 3
        feed_forward = (passes - 1) + ups
        rows += layers * count * attention + (layers - sparse) * count * feed_forward
        calls += layers * attention + (layers - sparse) * feed_forward
        if stack == "decoder" and "encoder" in tokens:
            rows += layers * (passes * count + 2 * tokens["encoder"])
            calls += layers * (passes + 2)
        if sparse:
            experts_rows = buffer_rows(settings, stack, lengths[stack], batch, mesh)
            shared = 1 if settings.moe.num_shared else 0  # side by side, one feed-forward
            rows += sparse * (experts_rows + shared * count) * feed_forward
            calls += sparse * (1 + shared) * feed_forward
        rows, calls = rows + count, calls + 1  # the embedding's rows, of which each device has a part
    rows, calls = rows + tokens["decoder"], calls + 1  # the output's input
    size = rows * model.d_model * _item(settings) * accumulate
    ici, dcn = _all_reduce(size, ["model"], inner, outer)
    yield Transfer("all-reduce", "split widths", calls * accumulate, ici, dcn)


def _parameters(settings: Settings, boxes: dict, inner: Sizes, outer: Sizes) -> Iterator[Transfer]:
    """Gradients, summed over the tokens' axes; with fsdp parameters as well, gathered where they are used.

    What is frozen has no gradient. Each array is counted once. XLA sums a tied embedding's gradient where it
    arises, in the encoder, the decoder and the output, and that of relative positions over all pairs of tokens, in the
    scans' bodies: of a step in float32 with layout data, 8 devices, 1 + 1 dense layers (d 64, 1,024 rows of vocabulary,
    128 / 32 tokens) 1,459,988 bytes are reduced and 658,176 planned. The larger the model beside its embedding, the
    less it matters.
    """
    plain = sharding.LAYOUTS[settings.mesh.layout].rules
    tokens = [axis for axis in ("data", "expert") if inner[axis] * outer[axis] > 1]
    passes, accumulate = _passes(settings) - 1, settings.train.accumulate
    reduced, gathered, scattered = [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]
    reduces = gathers = scatters = 0
    leaves = jax.tree_util.tree_leaves_with_path(boxes, is_leaf=lambda x: isinstance(x, nn.Partitioned))
    for path, box in leaves:
        trained = train_state.is_trained("/".join(sharding.path_keys(path)), settings)
        split, used = (_split(rules, box.names) for rules in (sharding.table(settings), plain))
        size = box.value.size * _item(settings) / math.prod(inner[a] * outer[a] for a in used)
        shared = [axis for axis in split if axis not in used]
        rest = [axis for axis in tokens if axis not in split]
        if shared:
            part = _gather(size, shared, inner, outer)
            gathered = [a + passes * accumulate * b for a, b in zip(gathered, part, strict=True)]
            gathers += accumulate
            if trained:
                scattered = [a + accumulate * b for a, b in zip(scattered, part, strict=True)]
                scatters += accumulate
        if rest and trained:
            size /= math.prod(inner[a] * outer[a] for a in shared)
            part = _all_reduce(size, rest, inner, outer)
            reduced = [a + accumulate * b for a, b in zip(reduced, part, strict=True)]
            reduces += accumulate
    yield Transfer("all-reduce", "gradients", reduces, *reduced)
    yield Transfer("all-gather", "parameters", passes * gathers, *gathered)
    yield Transfer("reduce-scatter", "gradients", scatters, *scattered)


def _split(rules: sharding.Rules, names: tuple[str | None, ...]) -> list[str]:
    """Mesh axes along which an array lies apart."""
    spec = nn.logical_to_mesh_axes(names, rules)
    return [axis for part in spec if part for axis in ((part,) if isinstance(part, str) else part)]


def _gather(size: float, axes: list[str], inner: Sizes, outer: Sizes) -> tuple[float, float]:
    i, o = (math.prod(sizes[axis] for axis in axes) for sizes in (inner, outer))
    return size * (i - 1) / i, size / i * (o - 1) / o


def _all_reduce(size: float, axes: list[str], inner: Sizes, outer: Sizes) -> tuple[float, float]:
    ici, dcn = _gather(size, axes, inner, outer)
    return 2 * ici, 2 * dcn
