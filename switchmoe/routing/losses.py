"""Losses: cross-entropy of the vocabulary, and what keeps a router balanced and small.

Letters: B batch, L length, V vocabulary, S tokens of a group, E experts. All results are float32.
"""

import functools

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def output_cross_entropy(
    x_BLD: jax.Array, table_VD: jax.Array, targets_BL: jax.Array, label_smoothing: float = 0.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`cross_entropy` of the logits ``x @ table.T``, and whether the target's logit is above all others.

    A tie is no hit: a model that says the same of every token would else be right everywhere.

    Its own gradient takes the probabilities from the logits and their log-partition in one pass, and
    hands them to the products in the type of ``x``.

    Returns:
      (nll_BL, z_BL, correct_BL).
    """
    return _output_forward(x_BLD, table_VD, targets_BL, label_smoothing)[0]


def logits(x_BLD: jax.Array, table_VD: jax.Array) -> jax.Array:
    """Float32 ``x @ table.T`` [..., V]."""
    return jnp.einsum("...D,VD->...V", x_BLD, table_VD, preferred_element_type=jnp.float32)


def _output_forward(x_BLD: jax.Array, table_VD: jax.Array, targets_BL: jax.Array, label_smoothing: float):
    logits_BLV = logits(x_BLD, table_VD)
    # Not by argmax: on a CPU it takes half as long as all else in here.
    target_BL1 = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)
    own_BLV = jax.nn.one_hot(targets_BL, len(table_VD), dtype=bool)
    others_BLV = jnp.where(own_BLV, -jnp.inf, logits_BLV)
    correct_BL = target_BL1[..., 0] > others_BLV.max(axis=-1)
    outputs = *cross_entropy(logits_BLV, targets_BL, label_smoothing), correct_BL
    return outputs, (x_BLD, table_VD, targets_BL, jax.nn.logsumexp(logits_BLV, axis=-1))


def _output_backward(label_smoothing: float, saved: tuple, gradients: tuple):
    x_BLD, table_VD, targets_BL, log_z_BL = saved
    nll_BL, z_BL, _ = gradients
    vocabulary = len(table_VD)
    target_BLV = jax.nn.one_hot(targets_BL, vocabulary, dtype=bool)
    prob_BLV = jnp.exp(logits(x_BLD, table_VD) - log_z_BL[..., None])
    wanted_BLV = jnp.where(target_BLV, 1 - label_smoothing, 0.0) + label_smoothing / vocabulary
    grad_BLV = prob_BLV * (nll_BL + 2 * log_z_BL * z_BL)[..., None] - wanted_BLV * nll_BL[..., None]
    grad_BLV = grad_BLV.astype(x_BLD.dtype)
    x_grad_BLD = jnp.einsum("BLV,VD->BLD", grad_BLV, table_VD)
    if x_BLD.dtype == jnp.float32:
        # Transposed is then the narrow factor. XLA's CPU back end would compute all of grad_BLV once
        # more, in the other order; its products of bfloat16 are slow in this one.
        table_grad_VD = jnp.einsum("BLD,BLV->DV", x_BLD, grad_BLV).T
    else:
        table_grad_VD = jnp.einsum("BLV,BLD->VD", grad_BLV, x_BLD)
    return x_grad_BLD, table_grad_VD.astype(table_VD.dtype), None


output_cross_entropy.defvjp(_output_forward, _output_backward)


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
    return masked_mean(jax.scipy.special.entr(prob_SE).sum(axis=-1), mask_S)


def masked_mean(value_S: jax.Array, mask_S: jax.Array) -> jax.Array:
    """Mean of ``value_S`` where ``mask_S``; 0 if it is nowhere."""
    return jnp.where(mask_S, value_S, 0.0).sum() / jnp.maximum(mask_S.sum(), 1)


def mean_over_tokens(value_SE: jax.Array, mask_S: jax.Array, axis: str | None = None) -> jax.Array:
    """Mean over the real tokens, of all groups of the vmap axis ``axis`` if given; float32 [E]."""
    total_E, count = jnp.where(mask_S[:, None], value_SE, 0.0).sum(axis=0), mask_S.sum()
    if axis:
        total_E, count = jax.lax.psum((total_E, count), axis)
    return total_E / jnp.maximum(count, 1)
