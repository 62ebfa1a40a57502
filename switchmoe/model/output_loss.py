"""The vocabulary's loss: cross-entropy of the logits, with label smoothing and what the output z-loss needs.

Letters: B batch, L length, D model, V vocabulary, N chunks of it of C. All results are float32.
"""

import functools

import jax
import jax.numpy as jnp

from switchmoe.products import few_rows

CHUNK = 64


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
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """`cross_entropy` of the logits ``x @ table.T``, the `hits`, and what is told of a smoothed loss.

    Its own gradient takes the probabilities from the logits and their log-partition in one pass, and
    hands them to the products in the type of ``x``.

    Returns:
      (loss_BL, z_BL, correct_BL, nll_BL): the last is the loss without label smoothing, and has no gradient.
    """
    return _output_forward(x_BLD, table_VD, targets_BL, label_smoothing)[0]


def some_cross_entropy(
    x_BLD: jax.Array,
    table_VD: jax.Array,
    targets_BL: jax.Array,
    predicted_BL: jax.Array,
    most: int,
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """`output_cross_entropy` at the places where ``predicted`` is not 0, ``most`` of a row or fewer; elsewhere it means nothing.

    Logits are computed of ``most`` places a row.
    """
    place_BS = jnp.argsort(predicted_BL == 0, axis=1, stable=True)[:, :most]
    x_BSD = jnp.take_along_axis(x_BLD, place_BS[..., None], axis=1)
    target_BS = jnp.take_along_axis(targets_BL, place_BS, axis=1)
    found = output_cross_entropy(x_BSD, table_VD, target_BS, label_smoothing)
    rows = jnp.zeros_like(targets_BL)
    put = jax.vmap(lambda row_L, place_S, value_S: row_L.astype(value_S.dtype).at[place_S].set(value_S))
    return tuple(put(rows, place_BS, value_BS) for value_BS in found)


def logits(x_BLD: jax.Array, table_VD: jax.Array) -> jax.Array:
    """Float32 ``x @ table.T`` [..., V]."""
    if x_BLD.ndim == 2 and jax.default_backend() == "cpu":  # of a step of decoding
        return few_rows(x_BLD, table_VD, jnp.float32)
    return jnp.einsum("...D,VD->...V", x_BLD, table_VD, preferred_element_type=jnp.float32)


def likeliest(logits_BLV: jax.Array) -> jax.Array:
    """Their argmax, int32: of the largest of each `CHUNK`, then in that chunk.

    On a CPU, XLA takes a maximum ten times as fast as the place of one.
    """
    more = -logits_BLV.shape[-1] % CHUNK
    padded_BLV = jnp.pad(logits_BLV, ((0, 0), (0, 0), (0, more)), constant_values=-jnp.inf)
    chunks_BLNC = padded_BLV.reshape(*logits_BLV.shape[:2], -1, CHUNK)
    place_BL = chunks_BLNC.max(axis=-1).argmax(axis=-1)
    best_BLC = jnp.take_along_axis(chunks_BLNC, place_BL[..., None, None], axis=2)[:, :, 0]
    return (place_BL * CHUNK + best_BLC.argmax(axis=-1)).astype(jnp.int32)


def hits(logits_BLV: jax.Array, targets_BL: jax.Array) -> jax.Array:
    """Whether the target's logit is above all others, bool [B, L].

    A tie is no hit: a model that says the same of every token would else be right everywhere.
    """
    # Not by argmax: on a CPU it takes half as long as the whole loss.
    target_BL1 = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)
    own_BLV = jax.nn.one_hot(targets_BL, logits_BLV.shape[-1], dtype=bool)
    others_BLV = jnp.where(own_BLV, -jnp.inf, logits_BLV)
    return target_BL1[..., 0] > others_BLV.max(axis=-1)


def _output_forward(x_BLD: jax.Array, table_VD: jax.Array, targets_BL: jax.Array, label_smoothing: float):
    logits_BLV = logits(x_BLD, table_VD)
    loss_BL, z_BL = cross_entropy(logits_BLV, targets_BL, label_smoothing)
    nll_BL = cross_entropy(logits_BLV, targets_BL)[0] if label_smoothing else loss_BL
    outputs = loss_BL, z_BL, hits(logits_BLV, targets_BL), nll_BL
    return outputs, (x_BLD, table_VD, targets_BL, jax.nn.logsumexp(logits_BLV, axis=-1))


def _output_backward(label_smoothing: float, saved: tuple, gradients: tuple):
    x_BLD, table_VD, targets_BL, log_z_BL = saved
    loss_BL, z_BL, *_ = gradients
    vocabulary = len(table_VD)
    target_BLV = jax.nn.one_hot(targets_BL, vocabulary, dtype=bool)
    prob_BLV = jnp.exp(logits(x_BLD, table_VD) - log_z_BL[..., None])
    wanted_BLV = jnp.where(target_BLV, 1 - label_smoothing, 0.0) + label_smoothing / vocabulary
    grad_BLV = prob_BLV * (loss_BL + 2 * log_z_BL * z_BL)[..., None] - wanted_BLV * loss_BL[..., None]
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
