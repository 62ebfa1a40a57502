"""What a step minimises: sums over tokens, the counts they are divided by, and the metrics that come of both.

A batch is cut into microbatches, padded, and spread over devices; so an objective first sums over real tokens, and
`train_step` divides by the totals of the whole batch. Auxiliary losses are defined per group of tokens
(`moe.group_shape`) and averaged with the groups' real tokens as weights.

Letters: B batch, L length, E experts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from switchmoe.model.transformer import PAD_ID, Transformer
from switchmoe.settings import Settings

# int32, 0 where padded: inputs_BL and targets_BL; or for a decoder alone targets_BL, segments_BL and positions_BL. With loss_BL only
# the targets where it is 1 are to be predicted. With input_segments_BL, segments_BL and positions_BL a row of both has several examples.
Batch = dict[str, jax.Array]
STACK_OF = {"inputs": "encoder", "targets": "decoder", "loss": "predicted"}


class Objective(NamedTuple):
    """Pure functions.

    ``sums(params, batch, settings, key, *constants)`` is a dictionary of sums over the batch, in training with a key, held
    out with None; sums of microbatches are added up. ``counts(batch)`` is what they are divided by, known before any pass.
    ``summarize(sums, counts, settings)`` makes metrics of both; ``loss`` is minimised, the others are told.

    ``constants()`` gives trees of arrays that no step changes, such as another model's parameters, on the mesh. They are
    arguments of the compiled step, as constants of a program would be copied into it.
    """

    sums: Callable[..., dict]
    counts: Callable[[Batch], dict[str, jax.Array]]
    summarize: Callable[[dict, dict[str, jax.Array], Settings], dict[str, jax.Array]]
    constants: Callable[[], tuple] = tuple


def token_sums(params: Any, batch: Batch, settings: Settings, key: jax.Array | None = None) -> dict:
    """Sums over the batch's real tokens: ``nll``, ``output_z``, ``correct``, and per stack its aux.

    A key makes it a training pass, with the streams ``dropout`` and ``router``, and with ``train.label_smoothing`` a sum
    ``smoothed``, which is minimised in place of ``nll``.
    """
    smoothing = 0.0 if key is None else settings.train.label_smoothing
    found, aux = applied(params, batch, settings, key, smoothing, method="token_losses")
    loss_BL, z_BL, correct_BL, nll_BL = found
    values = {"nll": loss_BL, "output_z": z_BL, "correct": correct_BL}
    if smoothing:
        values |= {"nll": nll_BL, "smoothed": loss_BL}
    return summed(values, aux, batch)


def applied(
    params: Any, batch: Batch, settings: Settings, key: jax.Array | None, *args: Any, method: str
) -> tuple[Any, dict]:
    """(what a method of the model gives of a batch, aux); with a key in training."""
    rngs = None if key is None else dict(zip(("dropout", "router"), jax.random.split(key), strict=True))
    model = Transformer(settings, train=key is not None)
    return model.apply({"params": params}, batch, *args, rngs=rngs, method=method)


def summed(values: dict[str, jax.Array], aux: dict, batch: Batch) -> dict:
    """Sums of [B, L] values over what is to be predicted, and of each stack's aux over its tokens."""
    real_BL = batch.get("loss", batch["targets"]) != PAD_ID
    sums = {name: jnp.where(real_BL, value_BL, 0.0).sum() for name, value_BL in values.items()}
    counts = token_counts(batch)
    return sums | {stack: jax.tree.map(lambda a, c=counts[stack]: a * c, aux[stack]) for stack in aux}


def token_counts(batch: Batch) -> dict[str, jax.Array]:
    """Real tokens of each stack, and of what is to be predicted where that is not all of the decoder's, float32."""
    return {
        stack: (batch[name] != PAD_ID).sum().astype(jnp.float32)
        for name, stack in STACK_OF.items()
        if name in batch
    }


def summarize(sums: dict, counts: dict[str, jax.Array], settings: Settings) -> dict[str, jax.Array]:
    """Metrics of a batch (or several) from the sums and token counts over all of it.

    ``loss`` is what is minimised: cross-entropy (smoothed, see `token_sums`) + output z-loss + the routers' losses
    summed over layers, each with its weight. All others are unweighted: ``cross_entropy`` in nats per target
    token, ``balance_loss`` and ``z_loss`` summed over layers; ``layer_*`` are arrays over the sparse
    layers, the encoder's first.
    """
    scale = {stack: 1.0 / jnp.maximum(count, 1.0) for stack, count in counts.items()}
    tokens = scale.get("predicted", scale["decoder"])
    metrics = {
        "cross_entropy": sums["nll"] * tokens,
        "accuracy": sums["correct"] * tokens,
        "output_z_loss": sums["output_z"] * tokens,
    }
    hard = sums["smoothed"] * tokens if "smoothed" in sums else metrics["cross_entropy"]
    loss = hard + settings.train.output_z_loss_weight * metrics["output_z_loss"]
    if settings.sparse:
        # By name: a compiled function returns a dictionary's entries in alphabetical order.
        per_stack = [
            jax.tree.map(lambda a, s=scale[stack]: a * s, sums[stack]) for stack in settings.sparse_stacks
        ]
        layers = jax.tree.map(lambda *a: jnp.concatenate(a), *per_stack)
        loss += layers.pop("loss").sum()
        metrics |= {name: layers[name].sum() for name in ("balance_loss", "z_loss")}
        metrics |= {f"layer_{name}": value for name, value in layers.items()}
    return metrics | {"loss": loss}


CROSS_ENTROPY = Objective(token_sums, token_counts, summarize)
