"""Attention: projections, positions, and what a decoder keeps of the tokens it has read.

Letters: B batch, L length (Q of the queries, M of the keys), D model, H heads, J heads of keys and values, K width of a
head, R relative buckets.
"""

import functools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from switchmoe.model.attend import attend
from switchmoe.model.layers import Initializer, kernel_init, param
from switchmoe.model.seen import Seen
from switchmoe.products import matmul, rms_norm
from switchmoe.settings import ModelSettings

JOINED = "joined"  # a parameter in place of the kernels of queries, keys and values: these side by side, [D, (H + 2 J) * K]
KeysValues = tuple[jax.Array, jax.Array]  # [B, J, M, K] each


@struct.dataclass
class Memory:
    """What a decoder keeps of the tokens that it has read.

    ``blocks``: of each block ``{"self": KeysValues, "cross": KeysValues}``, the latter of the encoder's output, made at
    the first call. ``position_BM`` is the place of a slot's token in its own sequence, -1 where there is none (yet).
    """

    blocks: tuple[dict[str, KeysValues], ...]
    position_BM: jax.Array  # int32
    used: (
        jax.Array
    )  # int32, slots that are filled: a number where all sequences fill theirs together, else [B]
    encoded_BM: jax.Array | None = None  # bool, which of the encoder's tokens are real
    told: dict[str, jax.Array] | None = (
        None  # with a trace: `choices.told` of the tokens read last, by sparse layer
    )


def empty_memory(model: ModelSettings, layers: int, batch: int, slots: int) -> Memory:
    """A memory of ``slots`` tokens that has read nothing."""
    shape = (batch, model.kv_heads, slots, model.d_kv)
    blocks = tuple({"self": (jnp.zeros(shape, model.dtype),) * 2} for _ in range(layers))
    return Memory(blocks, jnp.full((batch, slots), -1, jnp.int32), jnp.zeros((), jnp.int32))


def filled(old: jax.Array, new: jax.Array, used: jax.Array, axis: int) -> jax.Array:
    """A memory's array [B, ...] with ``new`` in its slots from ``used`` on."""
    if used.ndim == 0:
        return jax.lax.dynamic_update_slice_in_dim(old, new, used, axis)
    return jax.vmap(lambda *row: jax.lax.dynamic_update_slice_in_dim(*row, axis - 1))(old, new, used)


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
    def __call__(self, distance: jax.Array) -> jax.Array:
        """Of key minus query, [Q, M] or [B, Q, M]: the bias [H, Q, M] or [B, H, Q, M], float32."""
        model = self.model
        init = nn.initializers.normal(model.d_model**-0.5)
        shape = (model.num_heads, model.relative_buckets)
        table_HR = param(self, "table", init, ("heads", None), shape, jnp.float32)
        bucket = relative_bucket(
            distance, self.bidirectional, model.relative_buckets, model.relative_max_distance
        )
        return jnp.moveaxis(table_HR[:, bucket], 0, -3)


def rotate(x_BLHK: jax.Array, position_BL: jax.Array, theta: float) -> jax.Array:
    """Rotary positions (2104.09864), half-split form: coordinates i and i + K/2 are turned by position * theta**(-2i/K).

    Computed in float32; position_BL may have B = 1.
    """
    half = x_BLHK.shape[-1] // 2
    rate_K = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BL1K = position_BL[..., None, None].astype(jnp.float32) * rate_K[None, None, None]
    cos, sin = jnp.cos(angle_BL1K), jnp.sin(angle_BL1K)
    first, second = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    return jnp.concatenate(turned, axis=-1).astype(x_BLHK.dtype)


def projections(model: ModelSettings) -> dict[str, tuple[int, int, int]]:
    """Shapes [D, H or J, K] of the kernels of queries, keys and values."""
    heads = {"query": model.num_heads, "key": model.kv_heads, "value": model.kv_heads}
    return {name: (model.d_model, count, model.d_kv) for name, count in heads.items()}


def attention_inits(model: ModelSettings, batch_axis: Sequence[int] | int = ()) -> dict[str, Initializer]:
    """Initialisers of [..., D, H, K] kernels; with `model.attention_scale` 1 the logits' scale is in the query's (T5)."""
    first = 0 if batch_axis == () else 1
    init = functools.partial(
        kernel_init, in_axis=first, out_axis=(first + 1, first + 2), batch_axis=batch_axis
    )
    scale = model.init_scale
    return {
        "query": init(scale / (model.d_kv * model.logit_scale**2)),
        "key": init(scale),
        "value": init(scale),
    }


class Attention(nn.Module):
    """Multi-head attention, of all heads with their own keys and values or several with the same (2305.13245)."""

    model: ModelSettings
    train: bool = False

    @nn.compact
    def __call__(
        self,
        x_BQD: jax.Array,
        kv_BMD: jax.Array | None,
        seen: Seen,
        projected: jax.Array | None = None,
        position_BQ: jax.Array | None = None,
        memory: KeysValues | None = None,
        used: jax.Array | None = None,
    ) -> tuple[jax.Array, KeysValues]:
        """Returns (y_BQD, the keys and values that it attended to, [B, J, M, K]).

        Args:
          kv_BMD: the keys' input; None: they are ``memory``'s.
          projected: queries, keys and values side by side, [B, Q, (H + 2 J) * K], where experts have made them.
          position_BQ: the tokens' places, with `model.positions=rotary`.
          memory: earlier keys and values, among which those of ``kv_BMD`` take the slots from ``used`` on.
        """
        model = self.model
        parts = self._projected(x_BQD, kv_BMD, projected)
        if model.qk_norm != "none":
            parts |= {name: self._normed(name, parts[name]) for name in parts.keys() & {"query", "key"}}
        if position_BQ is not None:
            turned = {name: parts[name] for name in parts.keys() & {"query", "key"}}
            parts |= {name: rotate(x, position_BQ, model.rotary_theta) for name, x in turned.items()}
        query_BQHK = parts["query"]
        if memory is None:
            value_BMJK, dropped = self._dropout(parts["value"])
            mixed_BQHK = attend(query_BQHK, parts["key"], value_BMJK, seen, model.logit_scale, dropped)
            memory = parts["key"].swapaxes(1, 2), parts["value"].swapaxes(1, 2)
        else:
            if kv_BMD is not None:
                new = parts["key"].swapaxes(1, 2), parts["value"].swapaxes(1, 2)
                memory = tuple(
                    filled(old, x.astype(old.dtype), used, axis=2) for old, x in zip(memory, new, strict=True)
                )
            mixed_BQHK = recall(query_BQHK, *memory, seen, model.logit_scale)
        init = kernel_init(model.init_scale, in_axis=(0, 1), out_axis=2)
        shape = (model.num_heads, model.d_kv, model.d_model)
        out_HKD = param(self, "out", init, ("heads", "kv", "embed"), shape, x_BQD.dtype)
        mixed_BQD = mixed_BQHK.reshape(*mixed_BQHK.shape[:2], -1)
        return matmul(mixed_BQD, out_HKD.reshape(-1, model.d_model)), memory

    def _dropout(self, value_BMJK: jax.Array) -> tuple[jax.Array, nn.Dropout | None]:
        """(values, what is to drop the weights). A mask that all queries share is one of the values: ``(w m) v = w (m v)``.

        So nothing is drawn for each pair of tokens, and the weights may stay unmade. Heads that share their values
        (`model.num_kv_heads`) share their mask.
        """
        model = self.model
        if not self.train or not model.dropout_rate:
            return value_BMJK, None
        if not model.shared_dropout:
            return value_BMJK, nn.Dropout(model.dropout_rate, deterministic=False)
        return nn.Dropout(model.dropout_rate, broadcast_dims=(-1,), deterministic=False)(value_BMJK), None

    def _projected(
        self, x_BQD: jax.Array, kv_BMD: jax.Array | None, projected: jax.Array | None
    ) -> dict[str, jax.Array]:
        """Queries, keys and values, [B, length, heads, K], with their biases."""
        model, shapes = self.model, projections(self.model)
        if projected is None and self.has_variable("params", JOINED):
            projected = matmul(x_BQD, self.get_variable("params", JOINED))
        if projected is not None:
            ends = [model.num_heads * model.d_kv, (model.num_heads + model.kv_heads) * model.d_kv]
            cut = zip(shapes, jnp.split(projected, ends, axis=-1), strict=True)
            parts = {name: part.reshape(*part.shape[:2], *shapes[name][1:]) for name, part in cut}
        else:
            inputs = {"query": x_BQD, "key": kv_BMD, "value": kv_BMD}
            inits = attention_inits(model)
            parts = {
                name: matmul(
                    x, param(self, name, inits[name], ("embed", "heads", "kv"), shapes[name], x.dtype)
                )
                for name, x in inputs.items()
                if x is not None
            }
        if model.qkv_bias:
            for name, part in parts.items():
                axes, shape = ("heads", "kv"), shapes[name][1:]
                bias_HK = param(self, f"{name}_bias", nn.initializers.zeros, axes, shape, part.dtype)
                parts[name] = part + bias_HK[None, None]
        return parts

    def _normed(self, name: str, x_BLHK: jax.Array) -> jax.Array:
        """RMSNorm of each head (Qwen3), or of all of them as one vector (OLMoE)."""
        width = x_BLHK.shape[-1:] if self.model.qk_norm == "head" else x_BLHK.shape[-2:]
        axes = ("kv",) if self.model.qk_norm == "head" else ("heads", "kv")
        scale = param(self, f"{name}_norm", nn.initializers.ones, axes, width, jnp.float32)
        if self.model.qk_norm == "all":
            x_BLN = x_BLHK.reshape(*x_BLHK.shape[:2], -1)
            return rms_norm(x_BLN, scale.reshape(-1), self.model.norm_eps).reshape(x_BLHK.shape)
        # Not `rms_norm`, which joins the heads' axis with others: where that is split, heads would be gathered.
        exact_BLHK = x_BLHK.astype(jnp.float32)
        mean_BLH1 = (exact_BLHK**2).mean(axis=-1, keepdims=True)
        normed_BLHK = exact_BLHK * jax.lax.rsqrt(mean_BLH1 + self.model.norm_eps)
        return (normed_BLHK * scale[None, None, None]).astype(x_BLHK.dtype)


def recall(
    query_BQHK: jax.Array, key_BJMK: jax.Array, value_BJMK: jax.Array, seen: Seen, scale: float
) -> jax.Array:
    """`attend` of few queries to what a memory holds; all queries of a head of keys read it once."""
    batch, queries, heads, width = query_BQHK.shape
    dtype = query_BQHK.dtype
    if jax.default_backend() == "cpu":  # whose small products of bfloat16 are slow
        query_BQHK, key_BJMK, value_BJMK = (x.astype(jnp.float32) for x in (query_BQHK, key_BJMK, value_BJMK))
    rows = heads // key_BJMK.shape[1] * queries
    query_BJNK = query_BQHK.swapaxes(1, 2).reshape(batch, -1, rows, width)
    logits_BJNM = jnp.einsum("BJNK,BJMK->BJNM", query_BJNK, key_BJMK, preferred_element_type=jnp.float32)
    logits_BHQM = logits_BJNM.reshape(batch, heads, queries, -1) * scale + seen.added_B1QM
    if seen.bias is not None:
        logits_BHQM += seen.bias if seen.bias.ndim == 4 else seen.bias[None]
    weight_BHQM = jax.nn.softmax(logits_BHQM, axis=-1).astype(query_BQHK.dtype)
    mixed_BJNK = jnp.einsum("BJNM,BJMK->BJNK", weight_BHQM.reshape(logits_BJNM.shape), value_BJMK)
    return mixed_BJNK.reshape(batch, heads, queries, width).swapaxes(1, 2).astype(dtype)
