"""The dense parts of a T5 block: RMSNorm, attention with relative positions, feed-forward.

No biases anywhere. Kernels are float32 parameters, cast to the activations' type where they are used.

Letters: B batch, L length (Q of the queries, M of the keys), D model, H heads, K width of a head,
F feed-forward.
"""

import functools
import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from switchmoe.products import add_to_all, matmul, product, rms_norm
from switchmoe.settings import ModelSettings

Initializer = Callable[..., jax.Array]


def kernel_init(
    scale: float,
    in_axis: int | Sequence[int],
    out_axis: int | Sequence[int],
    batch_axis: Sequence[int] | int = (),
) -> Initializer:
    """Truncated normal with variance scale / fan-in (Switch, 2.4: scale 0.1 instead of 1).

    The standard deviation is that after truncation at two of the untruncated ones.
    """
    return nn.initializers.variance_scaling(
        scale, "fan_in", "truncated_normal", in_axis=in_axis, out_axis=out_axis, batch_axis=batch_axis
    )


def param(
    module: nn.Module,
    name: str,
    init: Initializer,
    names: tuple[str | None, ...],
    shape: tuple[int, ...],
    dtype: jnp.dtype,
) -> jax.Array:
    """A float32 parameter with logical axis names, as ``dtype``; whole along ``embed`` where it is used."""
    value = module.param(name, nn.with_logical_partitioning(init, names), shape, jnp.float32).astype(dtype)
    return nn.with_logical_constraint(value, tuple(None if name == "embed" else name for name in names))


def activate(activation: str, up: Callable[[str], jax.Array]) -> jax.Array:
    """``relu(up(wi))``, or ``gelu(up(wi_gate)) * up(wi)`` for GEGLU (Shazeer 2020)."""
    if activation == "relu":
        return jax.nn.relu(up("wi"))
    return jax.nn.gelu(up("wi_gate"), approximate=True) * up("wi")


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x**2) + 1e-6) * scale``, computed in float32."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale_D = param(self, "scale", nn.initializers.ones, ("embed",), x.shape[-1:], jnp.float32)
        return rms_norm(x, scale_D)


def relative_bucket(distance: jax.Array, bidirectional: bool, buckets: int, max_distance: int) -> jax.Array:
    """T5's bucket of a relative position, key minus query: exact when near, logarithmic when far.

    Of the buckets of one direction, half are exact; the other half grow with the logarithm up to
    ``max_distance``, beyond which all share the last. Both directions have their own half if
    ``bidirectional``; otherwise keys ahead of the query share bucket 0 with the query's own.
    """
    offset = 0
    if bidirectional:
        buckets //= 2
        offset = jnp.where(distance > 0, buckets, 0)
        behind = jnp.abs(distance)
    else:
        behind = jnp.maximum(-distance, 0)
    exact = buckets // 2
    log_ratio = jnp.log(jnp.maximum(behind, 1) / exact) / math.log(max_distance / exact)
    far = exact + (log_ratio * (buckets - exact)).astype(jnp.int32)
    return offset + jnp.where(behind < exact, behind, jnp.minimum(far, buckets - 1))


class RelativeBias(nn.Module):
    """A learned scalar per head and bucket, added to the attention logits; one for a whole stack."""

    model: ModelSettings
    bidirectional: bool

    @nn.compact
    def __call__(self, length: int) -> jax.Array:
        """Returns bias_HLL, float32."""
        model = self.model
        init = nn.initializers.normal(model.d_model**-0.5)
        shape = (model.num_heads, model.relative_buckets)
        table_HR = param(self, "table", init, ("heads", None), shape, jnp.float32)
        position_L = jnp.arange(length)
        bucket_LL = relative_bucket(
            position_L[None, :] - position_L[:, None],
            self.bidirectional,
            model.relative_buckets,
            model.relative_max_distance,
        )
        return table_HR[:, bucket_LL]


def attention_inits(model: ModelSettings, batch_axis: Sequence[int] | int = ()) -> dict[str, Initializer]:
    """Initialisers of [..., D, H, K] kernels; the logits' scale is folded into the query's (T5)."""
    first = 0 if batch_axis == () else 1
    init = functools.partial(
        kernel_init, in_axis=first, out_axis=(first + 1, first + 2), batch_axis=batch_axis
    )
    scale = model.init_scale
    return {"query": init(scale / model.d_kv), "key": init(scale), "value": init(scale)}


class Attention(nn.Module):
    """Multi-head attention without biases."""

    model: ModelSettings
    train: bool = False

    @nn.compact
    def __call__(
        self,
        x_BQD: jax.Array,
        kv_BMD: jax.Array,
        mask_B1QM: jax.Array,
        bias_HQM: jax.Array | None = None,
        projected: jax.Array | None = None,
    ) -> jax.Array:
        """Args: queries' and keys' inputs; what is added to the logits, float32, broadcast over B and Q,
        -inf-like where masked; a learned bias of all sequences, float32; queries, keys and values side
        by side, [B, Q, 3 * H * K], where experts have made them.
        """
        model = self.model
        shape = (model.d_model, model.num_heads, model.d_kv)
        if projected is not None:
            parts = jnp.split(projected, 3, axis=-1)
            query_BQHK, key_BMHK, value_BMHK = (p.reshape(*p.shape[:2], *shape[1:]) for p in parts)
        else:
            inputs = {"query": x_BQD, "key": kv_BMD, "value": kv_BMD}
            query_BQHK, key_BMHK, value_BMHK = (
                matmul(inputs[name], param(self, name, init, ("embed", "heads", "kv"), shape, x_BQD.dtype))
                for name, init in attention_inits(model).items()
            )
        # Else XLA's CPU back end writes bias and mask out for all sequences, and each layer reads that.
        query_BQHK, bias_HQM, mask_B1QM = jax.lax.optimization_barrier((query_BQHK, bias_HQM, mask_B1QM))
        logits_BHQM = product("BQHK,BMHK->BHQM", query_BQHK, key_BMHK, jnp.float32)
        if bias_HQM is not None:
            logits_BHQM = add_to_all(logits_BHQM, bias_HQM)
        logits_BHQM += mask_B1QM
        # The softmax's division comes after the product with the values, of which there are fewer.
        highest_BHQ1 = jax.lax.stop_gradient(logits_BHQM.max(axis=-1, keepdims=True))
        weight_BHQM = jnp.exp(logits_BHQM - highest_BHQ1)
        total_BQH1 = jnp.moveaxis(weight_BHQM.sum(axis=-1), 1, 2)[..., None]
        weight_BHQM = weight_BHQM.astype(x_BQD.dtype)
        weight_BHQM = nn.Dropout(model.dropout_rate, deterministic=not self.train)(weight_BHQM)
        mixed_BQHK = product("BHQM,BMHK->BQHK", weight_BHQM, value_BMHK)
        mixed_BQHK = (mixed_BQHK / total_BQH1).astype(x_BQD.dtype)
        init = kernel_init(model.init_scale, in_axis=(0, 1), out_axis=2)
        out_HKD = param(self, "out", init, ("heads", "kv", "embed"), (*shape[1:], shape[0]), x_BQD.dtype)
        return matmul(mixed_BQHK.reshape(*mixed_BQHK.shape[:2], -1), out_HKD.reshape(-1, model.d_model))


class FeedForward(nn.Module):
    """``wo(activation(wi(x)))``, of width ``d_ff``, or the model's where that is 0."""

    model: ModelSettings
    train: bool = False
    d_ff: int = 0

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        d, f = self.model.d_model, self.d_ff or self.model.d_ff
        init = kernel_init(self.model.init_scale, in_axis=0, out_axis=1)

        def up(name: str) -> jax.Array:
            return matmul(x_BLD, param(self, name, init, ("embed", "mlp"), (d, f), x_BLD.dtype))

        h_BLF = activate(self.model.activation, up)
        h_BLF = nn.Dropout(self.model.dropout_rate, deterministic=not self.train)(h_BLF)
        return matmul(h_BLF, param(self, "wo", init, ("mlp", "embed"), (f, d), x_BLD.dtype))
