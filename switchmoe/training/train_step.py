"""The training step: loss, gradients over microbatches, update; and the evaluation step.

Everything is first summed over tokens, then divided by the totals of the whole batch (`objective`), so that
padding changes nothing, nor do microbatches that hold whole groups (`train_step`).
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from switchmoe.products import compiler_options
from switchmoe.settings import Settings
from switchmoe.training import optimizers, train_state
from switchmoe.training.objective import CROSS_ENTROPY, Batch, Objective
from switchmoe.training.train_state import TrainState


def compile_step(
    settings: Settings,
    tx: optax.GradientTransformation,
    state: TrainState,
    batch: Batch,
    key: jax.Array | None = None,
    objective: Objective = CROSS_ENTROPY,
    constants: tuple = (),
) -> jax.stages.Compiled:
    """`train_step` ahead of time, on the mesh and by the rules in force; its metrics are whole on each device.

    Args:
      state: of `sharded_state`; the state that the step is called with is donated.
      batch: arrays, or shapes with their shardings.
      key: of the run, if it is to be an argument of the program.
      objective: what is minimised.
      constants: the objective's; to be given at each call, too, where there are some.
    """
    where = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = functools.partial(train_step, settings=settings, tx=tx, objective=objective)
    step = jax.jit(step, donate_argnums=0, out_shardings=(where, where.step))
    named = ({} if key is None else {"key": key}) | ({"constants": constants} if constants else {})
    lowered = step.lower(state, batch, **named)
    return lowered.compile(compiler_options())


def train_step(
    state: TrainState,
    batch: Batch,
    settings: Settings,
    tx: optax.GradientTransformation,
    key: jax.Array | None = None,
    objective: Objective = CROSS_ENTROPY,
    constants: tuple = (),
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update; gradients are those of the mean over the whole batch, whatever ``train.accumulate``, where a microbatch
    holds whole groups (``batch_size / accumulate x length`` a multiple of ``moe.group_size``) and their losses are their
    own (``moe.balance=group``). Else its groups are smaller, and ``moe.balance=global`` is over one microbatch.

    The step's key is ``fold_in(key, step)``: a resumed run draws what it would have drawn.

    Beside the metrics of the objective there are ``grad_norm``, of the loss's gradients (so without a ``router_bias``),
    and ``tokens``, the batch's real ones of both stacks.

    With ``train.skip_nonfinite`` a step whose loss or gradient norm is not finite leaves parameters and
    optimizer as they were, and ``skipped`` is 1; the step is counted all the same.

    Args:
      key: the run's, ``jax.random.key(train.seed)``, as an argument: all seeds share one compiled program.
        None: the same key, a constant of the program.
      constants: the objective's.
    """
    key = jax.random.fold_in(jax.random.key(settings.train.seed) if key is None else key, state.step)
    counts = objective.counts(batch)
    trained, frozen = train_state.split(state.params, settings)

    def loss_and_sums(trained: Any, micro: Batch, key: jax.Array) -> tuple[jax.Array, dict]:
        sums = objective.sums(train_state.merge(trained, frozen), micro, settings, key, *constants)
        return objective.summarize(sums, counts, settings)["loss"], sums

    gradient = jax.grad(loss_and_sums, has_aux=True)
    if settings.train.accumulate == 1:
        grads, sums = gradient(trained, batch, key)
    else:
        grads, sums = _accumulate(gradient, trained, batch, key, settings.train.accumulate)
    updates, opt_state = tx.update(grads, state.opt_state, trained)
    params = train_state.merge(optax.apply_updates(trained, updates), frozen)
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    norm = optax.global_norm([leaf for path, leaf in leaves if not optimizers.is_bias(path)])
    metrics = objective.summarize(sums, counts, settings) | {"grad_norm": norm}
    metrics["tokens"] = sum(count for name, count in counts.items() if name != "predicted").astype(jnp.int32)
    if settings.train.skip_nonfinite:
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        metrics["skipped"] = 1 - finite.astype(jnp.int32)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
    return TrainState(state.step + 1, params, opt_state), metrics


def _accumulate(gradient: Any, params: Any, batch: Batch, key: jax.Array, parts: int) -> tuple[Any, dict]:
    """Adds up (gradients, sums) over ``parts`` consecutive slices of the batch."""
    micros = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
    micros = jax.tree.map(lambda x: nn.with_logical_constraint(x, (None, "batch", None)), micros)

    def add(total: Any, part: tuple[jax.Array, Batch]) -> tuple[Any, None]:
        index, micro = part
        return jax.tree.map(jnp.add, total, gradient(params, micro, jax.random.fold_in(key, index))), None

    shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], micros), key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, (jnp.arange(parts), micros))[0]


def eval_step(
    params: Any, batch: Batch, settings: Settings, objective: Objective = CROSS_ENTROPY
) -> tuple[dict, dict[str, jax.Array]]:
    """(sums, counts) of a held-out batch; add them up over batches, then `Objective.summarize`."""
    return objective.sums(params, batch, settings, None), objective.counts(batch)
