"""Bytes of a device in a training step, from shapes alone: nothing is allocated and no device is needed.

What lies where follows from the layout's rules (`train_state.state_shardings` on an abstract mesh). What the
backward pass keeps is read off JAX itself: the residuals of the loss, traced at one device's share of the
batch, the heads and the widths. An expert's device holds as many slots of the buffers as its own groups
fill, so the share of the buffers is that of the tokens; but for the ragged back end, which sends blocks of one
size with empty rows to each of the others: those are added by their count, which is right to 30 %.

Three figures are not derived but were fitted to XLA's memory analysis on a CPU: `LOGITS`, `LAYER` and
`UPDATES`. `tests/planning/test_planning.py` holds the whole to 15 % of it, and those to 30 %.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from switchmoe.data.batches import array_lengths
from switchmoe.model.moe_rules import expert_width
from switchmoe.model.transformer import Transformer
from switchmoe.parallel import sharding
from switchmoe.planning import communication, flops
from switchmoe.settings import MeshSettings, Settings
from switchmoe.training import objective, train_state

LOGITS = 4  # float32 arrays of the size of the logits that live at once around the output's gradient
LAYER = 6  # float32 arrays of the size of a layer's largest activation within its backward pass
UPDATES = {"adafactor": 1.5, "adamw": 0.75}  # arrays of the size of the parameters within the update


class Saved(NamedTuple):
    """Bytes that a device keeps from the forward for the backward pass, kernels left out."""

    total: int  # of all layers, or with remat of all layers' inputs
    encoder: int  # the encoder's part of it
    layer: int  # of the larger of the stacks' super-blocks, as if without remat
    largest: int  # of the largest array of one layer, in float32


class Memory(NamedTuple):
    """Bytes of one device."""

    parameters: int
    optimizer: int
    gradients: int
    kernels: int  # of the activations' type, kept for the backward pass
    activations: int
    batch: int
    peak: int  # of the step; not all of the above is alive then
    phase: str  # where that is: output, backward pass or update
    working: int  # what the phase itself needs


def abstract_mesh(sizes: tuple[int, ...]) -> AbstractMesh:
    """Devices along data, expert and model, none of which need exist."""
    return AbstractMesh(sizes, sharding.AXES, axis_types=(AxisType.Auto,) * len(sizes))


@functools.cache
def abstract_state(settings: Settings) -> tuple[train_state.TrainState, dict]:
    """The first train state as shapes, and the boxed parameters; the same for all layouts."""
    # Integers are not trained, and have no optimizer.
    tx = optax.identity() if settings.moe.expert_bits else train_state.optimizer(settings)
    state = jax.eval_shape(functools.partial(train_state.init_state, settings, tx))
    return state, train_state.abstract_variables(settings)["params"]


def without_mesh(settings: Settings) -> Settings:
    return dataclasses.replace(settings, mesh=MeshSettings())


def nbytes(shape: tuple[int, ...], dtype: Any) -> int:
    return math.prod(shape) * jnp.dtype(dtype).itemsize


def state_bytes(settings: Settings, mesh: dict[str, int]) -> tuple[int, int]:
    """Bytes of a device's parameters and of its optimizer state, which are exact."""
    state, _ = abstract_state(without_mesh(settings))
    return _local(state.params, settings, mesh), _local(state.opt_state, settings, mesh)


def trained_bytes(settings: Settings, mesh: dict[str, int]) -> int:
    """Bytes of a device's part of the gradients: of what ``train.trainable`` has."""
    state, _ = abstract_state(without_mesh(settings))
    return _local(train_state.split(state.params, settings)[0], settings, mesh)


def _local(tree: Any, settings: Settings, mesh: dict[str, int]) -> int:
    boxes = abstract_state(without_mesh(settings))[1]
    where = train_state.state_shardings(tree, boxes, settings, abstract_mesh(tuple(mesh.values())))
    leaves = jax.tree.leaves(tree), jax.tree.leaves(where)
    return sum(nbytes(at.shard_shape(leaf.shape), leaf.dtype) for leaf, at in zip(*leaves, strict=True))


def estimate(settings: Settings, lengths: dict[str, int], mesh: dict[str, int]) -> Memory:
    """Bytes of one device of the mesh ``{axis: devices}``; see the module's docstring."""
    # Counted along the layers' axis, which ``model.scan=False`` has not.
    train = settings.train if settings.model.scan else dataclasses.replace(settings.train, trainable="")
    model = dataclasses.replace(settings.model, scan=True)
    settings = dataclasses.replace(settings, model=model, train=train)  # without the scan names are others
    parameters, optimizer = state_bytes(settings, mesh)
    boxes = abstract_state(without_mesh(settings))[1]
    shards, accumulate = mesh["data"] * mesh["expert"], settings.train.accumulate
    batch = settings.data.batch_size // accumulate // shards
    widths = mesh["model"] if "mlp" in dict(sharding.table(settings)) else 1
    saved = saved_activations(without_mesh(settings), batch, tuple(lengths.items()), widths)
    saved = _exchanged(saved, settings, lengths, batch, mesh, widths)
    kernels = {stack: _kernels(settings, boxes, mesh, stack, whole=True) for stack in lengths}
    repeats = {stack: settings.repeats(stack) for stack in lengths}
    # With fsdp the kernels of a super-block and their gradients are whole for as long as it runs.
    parts = {stack: _kernels(settings, boxes, mesh, stack, whole=False) for stack in lengths}
    gathered = 2 * max((kernels[stack] - parts[stack]) // repeats[stack] for stack in lengths)
    if settings.model.remat:
        kernels = {stack: size // repeats[stack] for stack, size in kernels.items()}
    copies = sum(kernels.values())
    logits = 4 * batch * lengths["decoder"] * settings.embedding_rows // widths
    trained = trained_bytes(settings, mesh)
    gradients, so_far = trained, 0
    if accumulate > 1:  # a microbatch's beside the sum of those before it
        gradients, so_far = 2 * trained, trained
    layer = saved.layer if settings.model.remat else LAYER * saved.largest
    kept, updates = saved.total + copies, int(UPDATES[settings.optimizer.name] * trained)
    phases = {  # what is alive, and what the phase itself needs
        "output": (kept + so_far, LOGITS * logits),
        "backward pass": (kept + gradients, gathered + layer),
        "update": (
            saved.encoder + kernels.get("encoder", 0) + gradients,
            updates,
        ),  # the decoder's comes first
    }
    phase = max(phases, key=lambda name: sum(phases[name]))
    tokens = 4 * (settings.data.batch_size // shards) * sum(array_lengths(lengths).values())
    peak = parameters + optimizer + tokens + sum(phases[phase])
    return Memory(
        parameters, optimizer, gradients, copies, saved.total, tokens, peak, phase, phases[phase][1]
    )


def _exchanged(
    saved: Saved, settings: Settings, lengths: dict[str, int], batch: int, mesh: dict[str, int], widths: int
) -> Saved:
    """With the empty rows that the ragged back end sends: a trace without a mesh has none of them.

    A row is kept as it comes and as it leaves, and with the experts' width after each of their first products.
    """
    item = jnp.dtype(settings.model.dtype).itemsize
    width = expert_width(settings.model, settings.moe) // widths
    row = (2 * settings.model.d_model + flops.kernels(settings.model) * width) * item
    apart, alone = (
        {
            stack: communication.buffer_rows(settings, stack, lengths[stack], batch, sizes)
            for stack in settings.sparse_stacks
        }
        for sizes in (mesh, dict.fromkeys(mesh, 1))
    )
    more = {stack: (apart[stack] - alone[stack]) * row for stack in apart}  # of a layer
    if not any(more.values()):
        return saved
    all_layers = {stack: size * len(settings.sparse_blocks(stack)) for stack, size in more.items()}
    at_once = {stack: all_layers[stack] // settings.repeats(stack) for stack in more}
    kept = {} if settings.model.remat else all_layers
    return Saved(
        total=saved.total + sum(kept.values()),
        encoder=saved.encoder + kept.get("encoder", 0),
        layer=saved.layer + 2 * max(at_once.values()),  # computed again, and their gradients
        largest=max(saved.largest, 4 * max(apart.values()) * max(settings.model.d_model, width)),
    )


def _kernels(settings: Settings, boxes: dict, mesh: dict[str, int], stack: str, whole: bool) -> int:
    """Bytes of a stack's parameters in the activations' type; ``whole`` along ``embed``, as they are used."""
    rules = sharding.LAYOUTS[settings.mesh.layout].rules if whole else sharding.table(settings)
    total = 0
    blocks = {name: part for name, part in boxes[stack].items() if name.startswith(("blocks", "first"))}
    for box in jax.tree.leaves(blocks, is_leaf=lambda x: isinstance(x, nn.Partitioned)):
        at = nn.logical_to_mesh_sharding(
            PartitionSpec(*box.names), abstract_mesh(tuple(mesh.values())), rules
        )
        total += nbytes(at.shard_shape(box.value.shape), settings.model.dtype)
    return total


@functools.cache
def saved_activations(
    settings: Settings, batch: int, lengths: tuple[tuple[str, int], ...], widths: int
) -> Saved:
    """What one device keeps that has ``batch`` sequences and one part in ``widths`` of heads and widths."""
    whole = settings.model
    width = dataclasses.replace(
        whole,
        num_heads=whole.num_heads // widths,
        num_kv_heads=whole.num_kv_heads // widths,
        d_ff=whole.d_ff // widths,
    )
    moe = dataclasses.replace(settings.moe, d_ff=settings.moe.d_ff // widths)
    settings = dataclasses.replace(settings, model=width, moe=moe)
    plain = dataclasses.replace(settings, model=dataclasses.replace(width, remat=False))
    kept = _residuals(settings, batch, lengths, "loss")
    encoder = _residuals(settings, batch, lengths, "encoder")
    if width.remat:
        everything, first = (_residuals(plain, batch, lengths, part) for part in ("loss", "encoder"))
    else:
        everything, first = kept, encoder
    repeats = {stack: settings.repeats(stack) for stack in settings.stacks}
    layers = {
        stack: [x for x in arrays if x.ndim > 2 and x.shape[0] == repeats[stack]]
        for stack, arrays in (("encoder", first), ("decoder", everything))
        if stack in repeats
    }
    sizes = {stack: _bytes(arrays) // repeats[stack] for stack, arrays in layers.items()}
    if repeats.get("encoder") == repeats["decoder"]:
        sizes["decoder"] -= sizes["encoder"]
    return Saved(
        total=_bytes(kept),
        encoder=_bytes(encoder),
        layer=max(sizes.values()),
        largest=max(4 * x.size // repeats[stack] for stack, arrays in layers.items() for x in arrays),
    )


def _bytes(arrays: list[jax.ShapeDtypeStruct]) -> int:
    return sum(nbytes(x.shape, x.dtype) for x in arrays)


def _residuals(settings: Settings, batch: int, lengths: tuple[tuple[str, int], ...], part: str) -> list:
    """Shapes of what JAX saves of the loss, or of the encoder alone, without parameters and their copies."""
    if part not in ("loss", *settings.stacks):
        return []
    params = nn.unbox(abstract_state(settings)[1])
    data = {
        name: jax.ShapeDtypeStruct((batch, length), jnp.int32)
        for name, length in array_lengths(dict(lengths)).items()
    }
    kernels = {leaf.shape for leaf in jax.tree.leaves(params)}

    def saved(params: dict, data: dict[str, jax.Array]) -> list[jax.Array]:
        key, counts = jax.random.key(0), objective.token_counts(data)

        def loss(params: dict) -> jax.Array:
            return objective.summarize(objective.token_sums(params, data, settings, key), counts, settings)[
                "loss"
            ]

        def encode(params: dict) -> jax.Array:
            rngs = {name: key for name in ("dropout", "router")}
            model = Transformer(settings, train=True)
            return model.apply({"params": params}, data["inputs"], rngs=rngs, method="encode")

        _, backward = jax.vjp(loss if part == "loss" else encode, params)
        given = {id(leaf) for leaf in jax.tree.leaves((params, data))}
        # An array that several operations keep is there once.
        return list({id(leaf): leaf for leaf in jax.tree.leaves(backward) if id(leaf) not in given}.values())

    kept = jax.eval_shape(saved, params, data)
    return [x for x in kept if x.shape not in kernels and not jnp.issubdtype(x.dtype, jax.dtypes.extended)]
