"""The dense parts of a block: RMSNorm and feed-forward, without biases; attention is in `attention`.

Kernels are float32 parameters, cast to the activations' type where they are used.

Letters: B batch, L length, D model, F feed-forward.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from switchmoe.products import matmul, rms_norm
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
    kept: jnp.dtype = jnp.float32,
) -> jax.Array:
    """A parameter of the type ``kept`` with logical axis names, as ``dtype``; whole along ``embed`` where it is used."""
    value = module.param(name, nn.with_logical_partitioning(init, names), shape, kept).astype(dtype)
    return nn.with_logical_constraint(value, tuple(None if name == "embed" else name for name in names))


def activate(activation: str, up: Callable[[str], jax.Array]) -> jax.Array:
    """``relu(up(wi))``, or gated, ``gelu(up(wi_gate)) * up(wi)`` for GEGLU and silu for SwiGLU (Shazeer 2020)."""
    if activation == "relu":
        return jax.nn.relu(up("wi"))
    if activation == "swiglu":
        return jax.nn.silu(up("wi_gate")) * up("wi")
    return jax.nn.gelu(up("wi_gate"), approximate=True) * up("wi")


def dropout(model: ModelSettings, train: bool) -> nn.Dropout:
    """Of activations [B, L, width], by `model.dropout_rate`; with `model.shared_dropout` by one mask [B, 1, width]."""
    shared = (-2,) if model.shared_dropout else ()
    return nn.Dropout(model.dropout_rate, broadcast_dims=shared, deterministic=not train)


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x**2) + eps) * scale``, computed in float32."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale_D = param(self, "scale", nn.initializers.ones, ("embed",), x.shape[-1:], jnp.float32)
        return rms_norm(x, scale_D, self.eps)


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
        h_BLF = dropout(self.model, self.train)(h_BLF)
        return matmul(h_BLF, param(self, "wo", init, ("mlp", "embed"), (f, d), x_BLD.dtype))
