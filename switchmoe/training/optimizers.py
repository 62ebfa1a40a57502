"""Adafactor as T5 uses it, AdamW, and learning-rate schedules.

Adafactor (Shazeer & Stern 2018) sees each parameter as a batch of matrices: the layer axis of a scan
and the expert axis are batch axes, heads and their width are one axis. Factors, clipping and scale
are those of one matrix, so the update of an expert never depends on another.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from switchmoe.settings import OptimizerSettings

BATCH_AXES = ("layers", "expert")


def schedule(settings: OptimizerSettings, num_steps: int) -> Callable[[jax.Array], jax.Array]:
    """Learning rate by step, counted from 0. With f = learning_rate, w = warmup_steps:

    - rsqrt: ``f / sqrt(max(step, w))``, T5's, flat until w;
    - warmup_rsqrt: ``f / sqrt(max(step, w)) * min(1, (step + 1) / w)``, ST-MoE's;
    - warmup_cosine: up to f over w steps, then by a half cosine to 0 at num_steps;
    - constant: f.
    """
    f, w = settings.learning_rate, settings.warmup_steps

    def rsqrt(step: jax.Array) -> jax.Array:
        return f / jnp.sqrt(jnp.maximum(step, w))

    def warmup_rsqrt(step: jax.Array) -> jax.Array:
        return rsqrt(step) * jnp.minimum(1.0, (step + 1) / w)

    return {
        "rsqrt": rsqrt,
        "warmup_rsqrt": warmup_rsqrt,
        "warmup_cosine": optax.warmup_cosine_decay_schedule(f / w, f, w, max(num_steps, w + 1)),
        "constant": optax.constant_schedule(f),
    }[settings.schedule]


def create(
    settings: OptimizerSettings, num_steps: int, names: dict, bias_rate: float = 0.0
) -> optax.GradientTransformation:
    """The optimizer.

    Args:
      names: a tree like the parameters' with a tuple of logical axis names at each leaf.
      bias_rate: by so much a ``router_bias`` moves each step against the sign of its gradient (Wang et
        al. 2024), whatever the optimizer and its schedule.
    """

    def label(path: tuple, _: tuple[str, ...]) -> str:
        return "bias" if is_bias(path) else "rest"

    labels = jax.tree_util.tree_map_with_path(label, names, is_leaf=is_names)
    if "bias" not in jax.tree.leaves(labels):
        return _create(settings, num_steps, names)
    rest = jax.tree.map(
        lambda n, label: n if label == "rest" else optax.MaskedNode(), names, labels, is_leaf=is_names
    )
    return optax.partition(
        {"rest": _create(settings, num_steps, rest), "bias": optax.sign_sgd(bias_rate)}, labels
    )


def is_bias(path: tuple) -> bool:
    """Whether a parameter is a ``router_bias``, whose gradient is none of the loss."""
    return path[-1].key == "router_bias"


def updates(state: Any) -> int:
    """How many an optimizer's state has made: the place in its schedule."""

    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    return int(next(node.count for node in jax.tree.leaves(state, is_leaf=is_schedule) if is_schedule(node)))


def _create(settings: OptimizerSettings, num_steps: int, names: dict) -> optax.GradientTransformation:
    # Norm scales and position biases are left out of weight decay.
    decayed = jax.tree.map(lambda n: "embed" in n and len(n) - _batch_axes(n) > 1, names, is_leaf=is_names)
    if settings.name == "adamw":
        core = optax.scale_by_adam(settings.beta1, settings.beta2)
    else:
        core = _per_matrix(
            optax.chain(
                optax.scale_by_factored_rms(decay_rate=settings.decay_rate),
                optax.clip_by_block_rms(1.0),
                optax.scale_by_param_block_rms(),
                optax.ema(settings.momentum, debias=False) if settings.momentum else optax.identity(),
            ),
            names,
        )
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm) if settings.clip_norm else optax.identity(),
        core,
        optax.add_decayed_weights(settings.weight_decay, decayed)
        if settings.weight_decay
        else optax.identity(),
        optax.scale_by_learning_rate(schedule(settings, num_steps)),
    )


def _per_matrix(tx: optax.GradientTransformation, names: dict) -> optax.GradientTransformation:
    """Applies ``tx`` to each matrix of each parameter by itself."""

    def lift(function: Callable, leaf_names: tuple[str, ...]) -> Callable:
        for _ in range(_batch_axes(leaf_names)):
            function = jax.vmap(function)
        return function

    def init(params):
        def leaf(n, p):
            return lift(tx.init, n)(_as_matrices(p, n))

        return jax.tree.map(leaf, names, params, is_leaf=is_names)

    def update(updates, state, params):
        def leaf(n, u, s, p):
            new_u, new_s = lift(tx.update, n)(_as_matrices(u, n), s, _as_matrices(p, n))
            return new_u.reshape(u.shape), new_s

        # A leaf's state is a tree of its own, which tree.map hands over whole: names is the prefix.
        pairs = jax.tree.map(leaf, names, updates, state, params, is_leaf=is_names)
        return tuple(
            jax.tree.map(lambda _, pair, i=i: pair[i], names, pairs, is_leaf=is_names) for i in (0, 1)
        )

    return optax.GradientTransformation(init, update)


def is_names(node) -> bool:
    """Whether a node of a tree of names is a leaf: one parameter's tuple."""
    return isinstance(node, tuple) and not isinstance(node, optax.MaskedNode)


def _batch_axes(names: tuple[str, ...]) -> int:
    return sum(name in BATCH_AXES for name in names)


def _as_matrices(p: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """Batch axes, then the matrix; (heads, kv) is one axis of it, as in T5's kernels."""
    return p.reshape(list(_matrix(p.shape, names).values()))


def _matrix(shape: tuple[int, ...], names: tuple[str, ...]) -> dict[str, int]:
    sizes = dict(zip(names, shape, strict=True))
    if "heads" in sizes:
        sizes["heads"] *= sizes.pop("kv", 1)
    return sizes


def state_names(
    path: tuple[str, ...], shape: tuple[int, ...], names: tuple[str, ...], of: tuple[int, ...]
) -> tuple[str, ...]:
    """Logical names of a leaf of the optimizer's state, from those of its parameter, of shape ``of``.

    A moment has the parameter's, or those of its matrices; a factor lacks the axis that it sums over,
    which for ``v_row`` is the longest of a matrix, for ``v_col`` the other; else only the batch axes'.
    """
    if shape == of:
        return names
    matrix = _matrix(of, names)
    batch = [name for name in matrix if name in BATCH_AXES]
    if shape != tuple(matrix.values()) and len(matrix) == len(batch) + 2:
        shorter, longer = sorted((name for name in matrix if name not in batch), key=matrix.__getitem__)
        del matrix[longer if "v_row" in path else shorter]
    return tuple(matrix if shape == tuple(matrix.values()) else batch)
