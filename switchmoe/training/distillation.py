"""Distillation: a student learns a teacher's probabilities beside the true tokens (Hinton et al. 2015; Switch, section 4.2).

    loss = (1 - w) * cross-entropy + w * T**2 * soft cross-entropy + the routers' losses

The soft cross-entropy is ``-sum_V p_V log q_V``, p the teacher's and q the student's probabilities, both of logits over the
temperature T; T**2 keeps its gradient's size. Switch's w is 0.25. Of the teacher there is either all, run beside the student
in the same step, or its likeliest tokens with their log-probabilities, in the batch.

Letters: B batch, L length, V vocabulary, K likeliest tokens.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from switchmoe.model.output_loss import cross_entropy, hits
from switchmoe.settings import Settings
from switchmoe.training import objective
from switchmoe.training.objective import Batch, Objective

IDS, LOG_PROBS = "teacher_ids", "teacher_log_probs"  # of a batch: int32 [B, L * K], and float32 as its bits


def beside(teacher: Settings, parameters: Callable[[], Any]) -> Objective:
    """With the teacher in the step. ``parameters()`` gives its parameters, on the mesh."""

    def soft(log_q_BLV: jax.Array, batch: Batch, settings: Settings, params: Any) -> jax.Array:
        log_p_BLV = jax.lax.stop_gradient(log_probs(params, batch, teacher, settings.distill.temperature))
        return -(jnp.exp(log_p_BLV) * log_q_BLV).sum(-1)

    return _objective(soft, lambda: (parameters(),))


def kept() -> Objective:
    """With the teacher's K likeliest tokens in the batch. All others are one event, of the probability that is left."""

    def soft(log_q_BLV: jax.Array, batch: Batch, settings: Settings) -> jax.Array:
        shape = (*log_q_BLV.shape[:2], -1)
        ids_BLK = batch[IDS].reshape(shape)
        log_p_BLK = jax.lax.bitcast_convert_type(batch[LOG_PROBS], jnp.float32).reshape(shape)
        return soft_of_likeliest(log_q_BLV, ids_BLK, log_p_BLK)

    return _objective(soft)


def soft_of_likeliest(log_q_BLV: jax.Array, ids_BLK: jax.Array, log_p_BLK: jax.Array) -> jax.Array:
    """[B, L] The soft cross-entropy of the teacher's likeliest tokens and the rest, as one event of K + 1."""
    log_q_BLK = jnp.take_along_axis(log_q_BLV, ids_BLK, axis=-1)
    soft_BL = -(jnp.exp(log_p_BLK) * log_q_BLK).sum(-1)
    if ids_BLK.shape[-1] == log_q_BLV.shape[-1]:
        return soft_BL  # nothing is left
    rest_BL = jnp.maximum(1 - jnp.exp(log_p_BLK).sum(-1), 0.0)
    # Of the student summed, never 1 - sum: where that rounds to 0 the student is most wrong, and would learn nothing.
    kept_BLV = jnp.put_along_axis(jnp.zeros(log_q_BLV.shape, bool), ids_BLK, True, axis=-1, inplace=False)
    log_rest_BL = jax.nn.logsumexp(jnp.where(kept_BLV, -jnp.inf, log_q_BLV), axis=-1)
    return soft_BL - rest_BL * log_rest_BL


def log_probs(params: Any, batch: Batch, settings: Settings, temperature: float) -> jax.Array:
    """[B, L, V] A model's log-probabilities of a batch's targets, as at evaluation."""
    logits_BLV, _ = objective.applied(params, batch, settings, None, method="batch_logits")
    return jax.nn.log_softmax(logits_BLV / temperature)


def likeliest(
    params: Any, batch: Batch, settings: Settings, temperature: float, count: int
) -> tuple[jax.Array, jax.Array]:
    """(ids_BLK, log_probs_BLK): the tokens of the highest probability."""
    log_p_BLK, ids_BLK = jax.lax.top_k(log_probs(params, batch, settings, temperature), count)
    return ids_BLK, log_p_BLK


def as_rows(ids_BLK: np.ndarray, log_p_BLK: np.ndarray) -> Batch:
    """The arrays of a batch that hold a teacher's likeliest tokens."""
    rows = len(ids_BLK)
    bits = np.ascontiguousarray(log_p_BLK, np.float32).view(np.int32)
    return {IDS: ids_BLK.reshape(rows, -1).astype(np.int32), LOG_PROBS: bits.reshape(rows, -1)}


def _objective(soft: Callable[..., jax.Array], constants: Callable[[], tuple] = tuple) -> Objective:
    def sums(params: Any, batch: Batch, settings: Settings, key: jax.Array | None, *fixed: Any) -> dict:
        logits_BLV, aux = objective.applied(params, batch, settings, key, method="batch_logits")
        smoothing = 0.0 if key is None else settings.train.label_smoothing
        nll_BL, z_BL = cross_entropy(logits_BLV, batch["targets"])
        soft_BL = soft(jax.nn.log_softmax(logits_BLV / settings.distill.temperature), batch, settings, *fixed)
        correct_BL = hits(logits_BLV, batch["targets"])
        values = {"nll": nll_BL, "output_z": z_BL, "correct": correct_BL, "soft": soft_BL}
        if smoothing:
            values["smoothed"], _ = cross_entropy(logits_BLV, batch["targets"], smoothing)
        return objective.summed(values, aux, batch)

    def summarize(sums: dict, counts: dict[str, jax.Array], settings: Settings) -> dict[str, jax.Array]:
        rest = {name: value for name, value in sums.items() if name != "soft"}
        metrics, distill = objective.summarize(rest, counts, settings), settings.distill
        tokens = jnp.maximum(counts.get("predicted", counts["decoder"]), 1.0)
        metrics["soft_cross_entropy"] = sums["soft"] / tokens
        soft = distill.temperature**2 * metrics["soft_cross_entropy"]
        hard = sums["smoothed"] / tokens if "smoothed" in sums else metrics["cross_entropy"]
        metrics["loss"] += distill.weight * (soft - hard)
        return metrics

    return Objective(sums, objective.token_counts, summarize, constants)
