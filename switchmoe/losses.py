"""Losses: cross-entropy of the vocabulary, and what keeps a router balanced and small.

Letters: B batch, L length, V vocabulary, S tokens of a group, E experts. All results are float32.
"""

import jax
import jax.numpy as jnp


def cross_entropy(
    logits_BLV: jax.Array, targets_BL: jax.Array, label_smoothing: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Per-token cross-entropy in nats, and the squared log-partition for the output z-loss.

    With label smoothing s the target distribution is (1 - s) one-hot + s / V.

    Returns:
      (nll_BL, z_BL), both float32: ``logsumexp(logits) - logits[target]`` and ``logsumexp(logits)**2``.
    """
    logits_BLV = logits_BLV.astype(jnp.float32)
    log_z_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
    target_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
    if label_smoothing:
        target_BL = (1 - label_smoothing) * target_BL + label_smoothing * logits_BLV.mean(axis=-1)
    return log_z_BL - target_BL, log_z_BL**2


def load_balancing(prob_SE: jax.Array, chosen_SE: jax.Array, mask_S: jax.Array) -> jax.Array:
    """Load-balancing loss without its weight alpha: ``E * sum_i f_i P_i`` (Switch, eq. 4-6).

    f_i is the share of the real tokens whose choice is expert i, P_i the mean probability of i over
    the real tokens; 1 at uniform routing, E at full collapse, 0 without a real token. The gradient
    flows through P alone.

    Args:
      prob_SE: router probabilities.
      chosen_SE: one-hot choices before capacity, of any numeric type.
      mask_S: True where the token is real.
    """
    weight_S1 = mask_S.astype(jnp.float32)[:, None]
    count = jnp.maximum(weight_S1.sum(), 1.0)
    f_E = (chosen_SE * weight_S1).sum(axis=0) / count
    p_E = (prob_SE * weight_S1).sum(axis=0) / count
    return prob_SE.shape[-1] * (jax.lax.stop_gradient(f_E) * p_E).sum()


def router_z(logits_SE: jax.Array, mask_S: jax.Array) -> jax.Array:
    """Mean over real tokens of ``logsumexp(logits)**2`` (ST-MoE, eq. 5), without its weight."""
    return masked_mean(jax.nn.logsumexp(logits_SE.astype(jnp.float32), axis=-1) ** 2, mask_S)


def masked_mean(value_S: jax.Array, mask_S: jax.Array) -> jax.Array:
    """Mean of ``value_S`` where ``mask_S``; 0 if it is nowhere."""
    return jnp.where(mask_S, value_S, 0.0).sum() / jnp.maximum(mask_S.sum(), 1)
