"""The vocabulary's loss: cross-entropy of the logits, with label smoothing and what the output z-loss needs.

Letters: B batch, L length, D model, V vocabulary. All results are float32.
"""

import functools
import math

import jax
import jax.numpy as jnp

from switchmoe.products import few_rows

CHUNK = 1024  # places of which logits are there at once
WIDEST = 128  # the width up to which that is faster


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
    return _whole_logits(x_BLD, table_VD)


def _whole_logits(x: jax.Array, table_VD: jax.Array) -> jax.Array:
    return jnp.einsum("...D,VD->...V", x, table_VD, preferred_element_type=jnp.float32)


def hits(logits_BLV: jax.Array, targets_BL: jax.Array) -> jax.Array:
    """Whether the target's logit is above all others, bool [B, L].

    A tie is no hit: a model that says the same of every token would else be right everywhere.
    """
    # Not by argmax: on a CPU it takes half as long as the whole loss.
    target_BL1 = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)
    own_BLV = jax.nn.one_hot(targets_BL, logits_BLV.shape[-1], dtype=bool)
    others_BLV = jnp.where(own_BLV, -jnp.inf, logits_BLV)
    return target_BL1[..., 0] > others_BLV.max(axis=-1)


def _rows_at_once(x_BLD: jax.Array) -> int:
    """Of how many places the logits are there at once; 0: of all.

    On one CPU they stay in its cache, and are no large array that the system has zeroed at each step. Not where the model is wide:
    the table's gradient is read and written for each chunk. On several devices each sum would be over all of them.
    """
    size = x_BLD[..., 0].size
    devices = math.prod(jax.sharding.get_abstract_mesh().shape.values())
    if jax.default_backend() != "cpu" or devices > 1 or x_BLD.shape[-1] > WIDEST or size <= CHUNK:
        return 0
    return -(-size // -(-size // CHUNK))  # of one size, so that the last one is not mostly zeros


def _in_chunks(rows: int, *values: jax.Array) -> tuple[jax.Array, ...]:
    """[B, L, ...] as [N, rows, ...], with zeros at the end."""
    flat = (value.reshape(-1, *value.shape[2:]) for value in values)
    ended = (jnp.pad(value, ((0, -len(value) % rows), *((0, 0),) * (value.ndim - 1))) for value in flat)
    return tuple(value.reshape(-1, rows, *value.shape[1:]) for value in ended)


def _out_of_chunks(value: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    flat = value.reshape(-1, *value.shape[2:])[: math.prod(shape)]
    return flat.reshape(*shape, *flat.shape[1:])


def _output_forward(x_BLD: jax.Array, table_VD: jax.Array, targets_BL: jax.Array, label_smoothing: float):
    rows = _rows_at_once(x_BLD)
    if not rows:
        *outputs, log_z_BL = _losses(x_BLD, table_VD, targets_BL, label_smoothing)
    else:
        chunks = _in_chunks(rows, x_BLD, targets_BL)
        found = jax.lax.map(lambda chunk: _losses(chunk[0], table_VD, chunk[1], label_smoothing), chunks)
        *outputs, log_z_BL = (_out_of_chunks(value, targets_BL.shape) for value in found)
    return tuple(outputs), (x_BLD, table_VD, targets_BL, log_z_BL)


def _losses(x: jax.Array, table_VD: jax.Array, targets: jax.Array, label_smoothing: float) -> tuple:
    """The outputs of `output_cross_entropy`, and the log-partition, of any leading axes."""
    of_V = _whole_logits(x, table_VD)
    loss, z = cross_entropy(of_V, targets, label_smoothing)
    nll = cross_entropy(of_V, targets)[0] if label_smoothing else loss
    return loss, z, hits(of_V, targets), nll, jax.nn.logsumexp(of_V, axis=-1)


def _output_backward(label_smoothing: float, saved: tuple, gradients: tuple):
    x_BLD, table_VD, targets_BL, log_z_BL = saved
    given = x_BLD, targets_BL, log_z_BL, *gradients[:2]
    rows, of = _rows_at_once(x_BLD), functools.partial(_gradients, table_VD, label_smoothing)
    if not rows:
        x_grad_BLD, table_grad = of(x_BLD.dtype, *given)
    else:
        shape = table_VD.T.shape if x_BLD.dtype == jnp.float32 else table_VD.shape

        def added(sum_so_far: jax.Array, chunk: tuple) -> tuple[jax.Array, jax.Array]:
            x_grad, table_grad = of(jnp.float32, *chunk)
            return sum_so_far + table_grad, x_grad

        table_grad, x_grad = jax.lax.scan(added, jnp.zeros(shape), _in_chunks(rows, *given))
        x_grad_BLD = _out_of_chunks(x_grad, targets_BL.shape)
    table_grad_VD = table_grad.T if x_BLD.dtype == jnp.float32 else table_grad
    return x_grad_BLD, table_grad_VD.astype(table_VD.dtype), None


def _gradients(
    table_VD: jax.Array, label_smoothing: float, dtype: jnp.dtype, x: jax.Array, targets: jax.Array,
    log_z: jax.Array, loss: jax.Array, z: jax.Array,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """x's gradient, and in ``dtype`` the table's, [D, V] where x is float32; of any leading axes."""
    vocabulary = len(table_VD)
    prob_V = jnp.exp(_whole_logits(x, table_VD) - log_z[..., None])
    target_V = jax.nn.one_hot(targets, vocabulary, dtype=bool)
    wanted_V = jnp.where(target_V, 1 - label_smoothing, 0.0) + label_smoothing / vocabulary
    grad_V = prob_V * (loss + 2 * log_z * z)[..., None] - wanted_V * loss[..., None]
    grad_V = grad_V.astype(x.dtype)
    x_grad = jnp.einsum("...V,VD->...D", grad_V, table_VD)
    # Transposed is then the narrow factor. XLA's CPU back end would compute all of grad_V once more, in the
    # other order; its products of bfloat16 are slow in this one.
    factors = (x, grad_V) if x.dtype == jnp.float32 else (grad_V, x)
    leading = tuple(range(targets.ndim))
    return x_grad, jnp.tensordot(*factors, (leading, leading), preferred_element_type=dtype)


output_cross_entropy.defvjp(_output_forward, _output_backward)
