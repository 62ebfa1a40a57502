"""What keeps a router balanced and small.

Letters: S tokens of a group, E experts. All results are float32.
"""

import jax
import jax.numpy as jnp


def load_balancing(
    prob_SE: jax.Array, chosen_SE: jax.Array, mask_S: jax.Array, axis: str | None = None
) -> jax.Array:
    """Load-balancing loss without its weight alpha: ``E * sum_i f_i P_i`` (Switch, eq. 4-6).

    f_i is the share of the real tokens whose choice is expert i, P_i the mean probability of i over
    the real tokens; 1 at uniform routing, E at full collapse, 0 without a real token. The gradient
    flows through P alone.

    Args:
      prob_SE: router probabilities.
      chosen_SE: one-hot choices before capacity, of any numeric type; 1 / K each for K choices.
      mask_S: True where the token is real.
      axis: a vmap axis over which f and P are pooled; None: of this group alone.
    """
    f_E, p_E = (mean_over_tokens(value_SE, mask_S, axis) for value_SE in (chosen_SE, prob_SE))
    return prob_SE.shape[-1] * (jax.lax.stop_gradient(f_E) * p_E).sum()


def squared_cv(value_SE: jax.Array, mask_S: jax.Array, axis: str | None = None) -> jax.Array:
    """``(standard deviation / mean)**2`` over experts of the sum over real tokens (2017, eq. 7 and 11).

    The importance and load losses, without their weights; 0 at even values.
    """
    mean_E = mean_over_tokens(value_SE, mask_S, axis)
    return mean_E.var() / jnp.maximum(mean_E.mean() ** 2, 1e-20)


def router_z(logits_SE: jax.Array, mask_S: jax.Array) -> jax.Array:
    """Mean over real tokens of ``logsumexp(logits)**2`` (ST-MoE, eq. 5), without its weight.

    Axes between the first and the last are independent softmaxes, of which the mean is taken.
    """
    z = jax.nn.logsumexp(logits_SE.astype(jnp.float32), axis=-1) ** 2
    return masked_mean(z.reshape(len(z), -1).mean(axis=-1), mask_S)


def entropy(prob_SE: jax.Array, mask_S: jax.Array) -> jax.Array:
    """Mean over real tokens of the distribution's entropy, in nats."""
    return masked_mean(jax.scipy.special.entr(prob_SE.astype(jnp.float32)).sum(axis=-1), mask_S)


def masked_mean(value_S: jax.Array, mask_S: jax.Array) -> jax.Array:
    """Mean of ``value_S`` where ``mask_S``; 0 if it is nowhere."""
    return jnp.where(mask_S, value_S.astype(jnp.float32), 0.0).sum() / jnp.maximum(mask_S.sum(), 1)


def mean_over_tokens(value_SE: jax.Array, mask_S: jax.Array, axis: str | None = None) -> jax.Array:
    """Mean over the real tokens, of all groups of the vmap axis ``axis`` if given; float32 [E]."""
    total_E = jnp.where(mask_S[:, None], value_SE.astype(jnp.float32), 0.0).sum(axis=0)
    count = mask_S.sum()
    if axis:
        total_E, count = jax.lax.psum((total_E, count), axis)
    return total_E / jnp.maximum(count, 1)
