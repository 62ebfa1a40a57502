"""Softmax attention in the forms that back ends run fast; all give the same.

On a GPU cuDNN computes it, where it takes the bias, the mask and the type (it is asked once for each shape). Elsewhere
on accelerators it is computed head by head: the logits of one head alone are in memory, and the gradient makes them anew
from their log-partition. On a CPU the plain products over all heads are as fast in a whole step.

Letters: B batch, Q queries, M keys, H heads of the queries, J of keys and values (H is a multiple), K width of a head.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from switchmoe.model.seen import Seen
from switchmoe.products import add_to_all, product, sum_of_all


def attend(
    query_BQHK: jax.Array,
    key_BMJK: jax.Array,
    value_BMJK: jax.Array,
    seen: Seen,
    scale: float = 1.0,
    dropout: Any = None,
) -> jax.Array:
    """``softmax(scale * q k^T + bias + added) v``, in the type of the queries.

    Args:
      dropout: a function of the weights, in training; only the plain form has one.
    """
    if dropout is None and _cudnn(query_BQHK, key_BMJK, seen):
        return by_cudnn(query_BQHK, key_BMJK, value_BMJK, seen, scale)
    repeats = query_BQHK.shape[2] // key_BMJK.shape[2]
    if repeats > 1:
        key_BMJK, value_BMJK = (jnp.repeat(x, repeats, axis=2) for x in (key_BMJK, value_BMJK))
    parts = query_BQHK, key_BMJK, value_BMJK
    if dropout is None and _one_by_one() and (seen.bias is None or seen.bias.ndim == 3):
        return by_head(*parts, seen.bias, seen.added_B1QM, scale)
    return plain(*parts, seen, scale, dropout)


def plain(
    query_BQHK: jax.Array,
    key_BMHK: jax.Array,
    value_BMHK: jax.Array,
    seen: Seen,
    scale: float = 1.0,
    dropout: Any = None,
) -> jax.Array:
    """Products over all heads at once; the logits are kept for the gradient."""
    dtype = query_BQHK.dtype
    # Else XLA's CPU back end writes bias and mask out for all sequences, and each layer reads that.
    query_BQHK, seen = jax.lax.optimization_barrier((query_BQHK, seen))
    logits_BHQM = product("BQHK,BMHK->BHQM", _scaled(query_BQHK, scale), key_BMHK, jnp.float32)
    if seen.bias is not None:
        add = add_to_all if seen.bias.ndim == 3 else jnp.add
        logits_BHQM = add(logits_BHQM, seen.bias)
    logits_BHQM += seen.added_B1QM
    # The softmax's division comes after the product with the values, of which there are fewer.
    highest_BHQ1 = jax.lax.stop_gradient(logits_BHQM.max(axis=-1, keepdims=True))
    weight_BHQM = jnp.exp(logits_BHQM - highest_BHQ1)
    total_BQH1 = jnp.moveaxis(weight_BHQM.sum(axis=-1), 1, 2)[..., None]
    weight_BHQM = weight_BHQM.astype(dtype)
    if dropout is not None:
        weight_BHQM = dropout(weight_BHQM)
    mixed_BQHK = product("BHQM,BMHK->BQHK", weight_BHQM, value_BMHK)
    return (mixed_BQHK / total_BQH1).astype(dtype)


def _scaled(query: jax.Array, scale: float) -> jax.Array:
    return query if scale == 1.0 else (query * jnp.float32(scale)).astype(query.dtype)


# --- Head by head --------------------------------------------------------------------------------------


def _one_by_one() -> bool:
    if jax.sharding.get_abstract_mesh().shape.get("model", 1) > 1:
        return False  # the heads lie on several devices, which would wait for one another
    return jax.default_backend() != "cpu"


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def by_head(
    query_BQHK: jax.Array,
    key_BMHK: jax.Array,
    value_BMHK: jax.Array,
    bias_HQM: jax.Array | None,
    added_B1QM: jax.Array,
    scale: float = 1.0,
) -> jax.Array:
    """One head after the other. No residual of [heads, queries, keys]; ``added`` has no gradient.

    16 sequences of 256 tokens, 4 heads of 64, float32, 2 cores of an Intel Xeon (4th generation), jax 0.10, forward /
    forward and backward: 10 - 12 / 58 - 65 ms, `plain` 24 - 25 / 90 - 100. A whole training step there (4 + 4 layers, width 256)
    takes as long with either: attention's products are a fifth of it.
    """
    return _forward(query_BQHK, key_BMHK, value_BMHK, bias_HQM, added_B1QM, scale)[0]


def _logits(query_BQK: jax.Array, key_BMK: jax.Array, bias_QM: Any, added_B1QM: jax.Array) -> jax.Array:
    logits_BQM = jnp.einsum("BQK,BMK->BQM", query_BQK, key_BMK, preferred_element_type=jnp.float32)
    if bias_QM is not None:
        logits_BQM += bias_QM[None]
    return logits_BQM + added_B1QM[:, 0]


def _forward(query_BQHK, key_BMHK, value_BMHK, bias_HQM, added_B1QM, scale):
    dtype, outputs, log_partitions = query_BQHK.dtype, [], []
    query_HBQK, key_HBMK, value_HBMK = (jnp.moveaxis(x, 2, 0) for x in (query_BQHK, key_BMHK, value_BMHK))
    for h in range(len(query_HBQK)):
        bias_QM = None if bias_HQM is None else bias_HQM[h]
        logits_BQM = _logits(_scaled(query_HBQK[h], scale), key_HBMK[h], bias_QM, added_B1QM)
        highest_BQ1 = logits_BQM.max(axis=-1, keepdims=True)
        weight_BQM = jnp.exp(logits_BQM - highest_BQ1)
        total_BQ1 = weight_BQM.sum(axis=-1, keepdims=True)
        mixed_BQK = jnp.einsum("BQM,BMK->BQK", weight_BQM.astype(dtype), value_HBMK[h])
        outputs.append((mixed_BQK / total_BQ1).astype(dtype))
        log_partitions.append(highest_BQ1 + jnp.log(total_BQ1))
    mixed_BQHK = jnp.stack(outputs, axis=2)
    return mixed_BQHK, (query_BQHK, key_BMHK, value_BMHK, bias_HQM, added_B1QM, mixed_BQHK, log_partitions)


def _backward(scale, saved, grad_BQHK):
    *parts, bias_HQM, added_B1QM, mixed_BQHK, log_partitions = saved
    dtype, found = grad_BQHK.dtype, []
    by_heads = zip(*(jnp.moveaxis(x, 2, 0) for x in (*parts, mixed_BQHK, grad_BQHK)), strict=True)
    for h, (query_BQK, key_BMK, value_BMK, mixed_BQK, g_BQK) in enumerate(by_heads):
        query_BQK = _scaled(query_BQK, scale)
        bias_QM = None if bias_HQM is None else bias_HQM[h]
        weight_BQM = jnp.exp(_logits(query_BQK, key_BMK, bias_QM, added_B1QM) - log_partitions[h])
        d_value_BMK = jnp.einsum("BQM,BQK->BMK", weight_BQM.astype(dtype), g_BQK)
        d_weight_BQM = jnp.einsum("BQK,BMK->BQM", g_BQK, value_BMK, preferred_element_type=jnp.float32)
        own_BQ1 = (g_BQK.astype(jnp.float32) * mixed_BQK.astype(jnp.float32)).sum(axis=-1, keepdims=True)
        d_logits_BQM = weight_BQM * (d_weight_BQM - own_BQ1)
        d_bias_QM = None if bias_QM is None else sum_of_all(d_logits_BQM)
        d_logits_BQM = d_logits_BQM.astype(dtype)
        d_query_BQK = _scaled(jnp.einsum("BQM,BMK->BQK", d_logits_BQM, key_BMK), scale)
        d_key_BMK = jnp.einsum("BQM,BQK->BMK", d_logits_BQM, query_BQK)
        found.append((d_query_BQK, d_key_BMK, d_value_BMK, d_bias_QM))
    d_query, d_key, d_value, d_bias = zip(*found, strict=True)
    d_heads = (jnp.stack(heads, axis=2) for heads in (d_query, d_key, d_value))
    return *d_heads, None if bias_HQM is None else jnp.stack(d_bias), jnp.zeros_like(added_B1QM)


by_head.defvjp(_forward, _backward)


# --- cuDNN ---------------------------------------------------------------------------------------------


def by_cudnn(query_BQHK: jax.Array, key_BMJK: jax.Array, value_BMJK: jax.Array, seen: Seen, scale: float):
    """By cuDNN's kernels: bias and lengths, or the mask, as both would be one bias of the logits' size."""
    terms: dict[str, Any] = {"is_causal": seen.causal, "key_value_seq_lengths": seen.keys_B}
    if seen.by_mask:
        terms = {"mask": seen.added_B1QM == 0}
    if seen.bias is not None:
        terms["bias"] = seen.bias.astype(query_BQHK.dtype)[None]
    return jax.nn.dot_product_attention(
        query_BQHK, key_BMJK, value_BMJK, scale=scale, implementation="cudnn", **terms
    )


def _cudnn(query_BQHK: jax.Array, key_BMJK: jax.Array, seen: Seen) -> bool:
    if jax.default_backend() != "gpu":
        return False
    if seen.bias is not None and (seen.by_mask or seen.bias.ndim != 3):
        return False
    shapes = jax.eval_shape(lambda *parts: parts, query_BQHK, key_BMJK, seen)
    leaves, structure = jax.tree.flatten(shapes)
    return _cudnn_takes(tuple((leaf.shape, leaf.dtype) for leaf in leaves), structure)


@functools.cache
def _cudnn_takes(leaves: tuple, structure: Any) -> bool:
    """Whether it compiles, with its gradient."""
    query, key, seen = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*leaf) for leaf in leaves])

    def total(query: jax.Array, key: jax.Array, value: jax.Array, seen: Seen) -> jax.Array:
        return by_cudnn(query, key, value, seen, 1.0).astype(jnp.float32).sum()

    of = (0, 1, 2) if seen.bias is None else (0, 1, 2, 3)
    try:
        jax.jit(jax.grad(total, of, allow_int=True)).lower(query, key, key, seen).compile()
    except Exception:  # it says no in many ways: ValueError, NotImplementedError, XLA's own
        return False
    return True
