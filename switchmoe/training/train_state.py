"""A run's state: parameters, the optimizer's state and the step; as shapes, as arrays, and where they lie on a mesh."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from switchmoe.model.transformer import Transformer, example_tokens
from switchmoe.parallel import sharding
from switchmoe.settings import Settings
from switchmoe.training import optimizers


@struct.dataclass
class TrainState:
    step: jax.Array  # int32, updates done
    params: Any
    opt_state: Any


@functools.cache  # a trace of the whole model, which several callers need
def abstract_variables(settings: Settings) -> dict:
    """The model's variables as shapes with logical axis names; nothing is allocated."""
    return jax.eval_shape(Transformer(settings).init, jax.random.key(0), *example_tokens(settings))


def axis_names(settings: Settings) -> dict:
    """Tuples of logical axis names, in a tree like the parameters'."""
    return _boxes(lambda box: tuple(box.names), abstract_variables(settings)["params"])


def parameter_shapes(settings: Settings) -> dict:
    """The parameters as shapes; nothing is allocated."""
    return _boxes(lambda box: box.value, abstract_variables(settings)["params"])


def parameter_counts(settings: Settings) -> tuple[int, int]:
    """(all parameters, those that one token uses: its choices of each sparse layer); of integers the weights they stand for."""
    settings = dataclasses.replace(settings, moe=dataclasses.replace(settings.moe, expert_bits=0))
    params = abstract_variables(settings)["params"]
    total = _boxes(lambda box: box.value.size, params)
    experts, choices = settings.moe.total_experts, settings.moe.total_choices
    active = _boxes(
        lambda box: box.value.size * choices // experts if "expert" in box.names else box.value.size, params
    )
    return sum(jax.tree.leaves(total)), sum(jax.tree.leaves(active))


def trained_count(settings: Settings) -> int:
    """Parameters that ``train.trainable`` has."""
    trained, _ = split(parameter_shapes(settings), settings)
    return sum(leaf.size for leaf in jax.tree.leaves(trained))


def _boxes(function: Callable[[nn.Partitioned], Any], params: dict) -> dict:
    return jax.tree.map(function, params, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def parameter_names(settings: Settings) -> list[str]:
    """``encoder/blocks/...``, of all parameters."""
    leaves = jax.tree_util.tree_leaves_with_path(axis_names(settings), is_leaf=optimizers.is_names)
    return ["/".join(sharding.path_keys(path)) for path, _ in leaves]


# ST-MoE's fine-tuned subsets (2202.08906, figure 5), which `train.trainable` may name. Of a sparse layer are its
# shared experts, too; those that make queries, keys and values (`moe.attention`) are also attention.
SUBSETS = {
    "all": "",
    "non_moe": r"^(?!.*/(self_)?moe/)",
    "moe_only": r"/(self_)?moe/",
    "attention": r"/(self|cross|self_moe)/",
    "ffn": r"/(ff|moe)/",
    "router": r"/(self_)?moe/router",
}


def is_trained(name: str, settings: Settings) -> bool:
    """Whether ``train.trainable`` has this parameter."""
    wanted = settings.train.trainable
    return re.search(SUBSETS.get(wanted, wanted), name) is not None


def split(params: Any, settings: Settings) -> tuple[Any, Any]:
    """(what is trained, what is frozen): trees like the parameters', with None for what the other one has.

    None is no leaf: gradients, and the optimizer's state, are of the first tree alone.

    Args:
      params: also a tree of their shapes, or of their axes' names.
    """
    if not settings.train.trainable:
        return params, jax.tree.map(lambda _: None, params, is_leaf=optimizers.is_names)

    def one(kept: bool) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: (
                leaf if is_trained("/".join(sharding.path_keys(path)), settings) == kept else None
            ),
            params,
            is_leaf=optimizers.is_names,
        )

    return one(True), one(False)


def merge(trained: Any, frozen: Any) -> Any:
    """The parameters of which these are the parts."""
    return jax.tree.map(
        lambda one, other: other if one is None else one, trained, frozen, is_leaf=lambda x: x is None
    )


def optimizer(settings: Settings) -> optax.GradientTransformation:
    """The run's optimizer, see `optimizers.create`; of what is trained.

    Raises:
      ValueError: ``train.trainable`` has no parameter; the experts are integers.
    """
    if settings.moe.expert_bits:
        raise ValueError(
            f"moe.expert_bits={settings.moe.expert_bits}: accepted in training is 0: integers can't be trained"
        )
    names, _ = split(axis_names(settings), settings)
    if not jax.tree.leaves(names):
        known = ", ".join(parameter_names(settings)[:8])
        raise ValueError(
            f"train.trainable={settings.train.trainable}: no parameter has such a name; accepted is a regular"
            f" expression that is found in one, such as {known}"
        )
    return optimizers.create(settings.optimizer, settings.train.num_steps, names, settings.moe.bias_rate)


def init_state(
    settings: Settings, tx: optax.GradientTransformation, key: jax.Array | None = None
) -> TrainState:
    """Parameters from the run's key (see `train_step`), the optimizer's first state, step 0."""
    key = jax.random.fold_in(jax.random.key(settings.train.seed) if key is None else key, 2**31 - 1)
    params = nn.unbox(Transformer(settings).init(key, *example_tokens(settings)))["params"]
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(split(params, settings)[0]))


def sharded_state(
    settings: Settings, tx: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> TrainState:
    """The first state as shapes that say where each array lies on the mesh; nothing is allocated."""
    state = jax.eval_shape(functools.partial(init_state, settings, tx))
    where = state_shardings(state, abstract_variables(settings)["params"], settings, mesh)
    return jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), state, where)


def state_shardings(state: Any, params: dict, settings: Settings, mesh: Mesh) -> Any:
    """NamedShardings of a train state: what belongs to a parameter lies where the parameter lies.

    A leaf belongs to the parameter whose path its own path contains, and has those of its axes that
    `optimizers.state_names` finds in it. Leaves that belong to none are replicated.

    Args:
      state: a tree of arrays or ShapeDtypeStructs.
      params: the boxed parameters of `abstract_variables`.
    """
    boxes = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: isinstance(x, nn.Partitioned))
    owners = {sharding.path_keys(path): box for path, box in boxes}

    def place(path: tuple, leaf: Any) -> NamedSharding:
        keys = sharding.path_keys(path)
        parts = (keys[i:j] for i in range(len(keys)) for j in range(len(keys), i, -1))
        box = next((owners[part] for part in parts if part in owners), None)
        names = optimizers.state_names(keys, leaf.shape, box.names, box.value.shape) if box else ()
        spec = PartitionSpec(*names, *[None] * (leaf.ndim - len(names)))
        return nn.logical_to_mesh_sharding(spec, mesh, sharding.table(settings))

    return jax.tree_util.tree_map_with_path(place, state)
