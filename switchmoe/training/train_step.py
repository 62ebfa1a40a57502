"""The training step: loss, gradients over microbatches, update; and the evaluation step.

Everything is first summed over tokens, then divided by the totals of the whole batch, so that
microbatches and padding change nothing. Auxiliary losses are defined per group of tokens
(`moe.group_shape`) and averaged with the groups' real tokens as weights.

Letters: B batch, L length, E experts.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from switchmoe.model.transformer import PAD_ID, STACKS, Transformer
from switchmoe.products import compiler_options
from switchmoe.settings import Settings
from switchmoe.training.train_state import TrainState

Batch = dict[str, jax.Array]  # inputs_BL and targets_BL, int32, 0 where padded


def compile_step(
    settings: Settings,
    tx: optax.GradientTransformation,
    state: TrainState,
    batch: Batch,
    key: jax.Array | None = None,
) -> jax.stages.Compiled:
    """`train_step` ahead of time, on the mesh and by the rules in force; its metrics are whole on each device.

    Args:
      state: of `sharded_state`; the state that the step is called with is donated.
      batch: arrays, or shapes with their shardings.
      key: of the run, if it is to be an argument of the program.
    """
    where = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = functools.partial(train_step, settings=settings, tx=tx)
    step = jax.jit(step, donate_argnums=0, out_shardings=(where, where.step))
    lowered = step.lower(state, batch) if key is None else step.lower(state, batch, key=key)
    return lowered.compile(compiler_options())


def token_sums(params: Any, batch: Batch, settings: Settings, key: jax.Array | None = None) -> dict:
    """Sums over the batch's real tokens: ``nll``, ``output_z``, ``correct``, and per stack its aux.

    A key makes it a training pass, with the streams ``dropout`` and ``router``.
    """
    rngs = None if key is None else dict(zip(("dropout", "router"), jax.random.split(key), strict=True))
    model = Transformer(settings, train=key is not None)
    smoothing = 0.0 if key is None else settings.train.label_smoothing
    (nll_BL, z_BL, correct_BL), aux = model.apply(
        {"params": params}, batch["inputs"], batch["targets"], smoothing, rngs=rngs, method="token_losses"
    )
    real_BL = batch["targets"] != PAD_ID
    sums = {
        name: jnp.where(real_BL, value_BL, 0.0).sum()
        for name, value_BL in (("nll", nll_BL), ("output_z", z_BL), ("correct", correct_BL))
    }
    counts = token_counts(batch)
    return sums | {stack: jax.tree.map(lambda a, c=counts[stack]: a * c, aux[stack]) for stack in STACKS}


def token_counts(batch: Batch) -> dict[str, jax.Array]:
    """Real tokens of each stack, float32."""
    return {
        stack: (batch[name] != PAD_ID).sum().astype(jnp.float32)
        for stack, name in zip(STACKS, ("inputs", "targets"), strict=True)
    }


def summarize(sums: dict, counts: dict[str, jax.Array], settings: Settings) -> dict[str, jax.Array]:
    """Metrics of a batch (or several) from the sums and token counts over all of it.

    ``loss`` is what is minimised: cross-entropy + output z-loss + the routers' losses summed over
    layers, each with its weight. All others are unweighted: ``cross_entropy`` in nats per target
    token, ``balance_loss`` and ``z_loss`` summed over layers; ``layer_*`` are arrays over the sparse
    layers, the encoder's first.
    """
    scale = {stack: 1.0 / jnp.maximum(counts[stack], 1.0) for stack in STACKS}
    tokens = scale["decoder"]
    metrics = {
        "cross_entropy": sums["nll"] * tokens,
        "accuracy": sums["correct"] * tokens,
        "output_z_loss": sums["output_z"] * tokens,
    }
    loss = metrics["cross_entropy"] + settings.train.output_z_loss_weight * metrics["output_z_loss"]
    if settings.sparse:
        # By name: a compiled function returns a dictionary's entries in alphabetical order.
        per_stack = [jax.tree.map(lambda a, s=scale[stack]: a * s, sums[stack]) for stack in STACKS]
        layers = jax.tree.map(lambda *a: jnp.concatenate(a), *per_stack)
        loss += layers.pop("loss").sum()
        metrics |= {name: layers[name].sum() for name in ("balance_loss", "z_loss")}
        metrics |= {f"layer_{name}": value for name, value in layers.items()}
    return metrics | {"loss": loss}


def train_step(
    state: TrainState,
    batch: Batch,
    settings: Settings,
    tx: optax.GradientTransformation,
    key: jax.Array | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update; gradients are those of the mean over the whole batch, whatever ``train.accumulate``.

    The step's key is ``fold_in(key, step)``: a resumed run draws what it would have drawn.

    Beside the metrics of `summarize` there are ``grad_norm`` and ``tokens``, the batch's real ones of both stacks.

    With ``train.skip_nonfinite`` a step whose loss or gradient norm is not finite leaves parameters and
    optimizer as they were, and ``skipped`` is 1; the step is counted all the same.

    Args:
      key: the run's, ``jax.random.key(train.seed)``, as an argument: all seeds share one compiled program.
        None: the same key, a constant of the program.
    """
    key = jax.random.fold_in(jax.random.key(settings.train.seed) if key is None else key, state.step)
    counts = token_counts(batch)

    def loss_and_sums(params: Any, micro: Batch, key: jax.Array) -> tuple[jax.Array, dict]:
        sums = token_sums(params, micro, settings, key)
        return summarize(sums, counts, settings)["loss"], sums

    gradient = jax.grad(loss_and_sums, has_aux=True)
    if settings.train.accumulate == 1:
        grads, sums = gradient(state.params, batch, key)
    else:
        grads, sums = _accumulate(gradient, state.params, batch, key, settings.train.accumulate)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = summarize(sums, counts, settings) | {"grad_norm": optax.global_norm(grads)}
    metrics["tokens"] = sum(counts.values()).astype(jnp.int32)
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


def eval_step(params: Any, batch: Batch, settings: Settings) -> tuple[dict, dict[str, jax.Array]]:
    """(token sums, token counts) of a held-out batch; add them up over batches, then `summarize`."""
    return token_sums(params, batch, settings), token_counts(batch)
