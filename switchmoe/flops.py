"""Model FLOPs, counted from the settings, and the machine's measured matrix-product peak."""

import time

import jax
import jax.numpy as jnp

from switchmoe.settings import Settings


def forward_flops(settings: Settings, target_length: int) -> dict[str, float]:
    """FLOPs (2 per multiply-add) of one sequence's forward pass, by part.

    Matrix products only. A choice costs one expert, whatever the capacity factor: a Switch model
    counts like the dense model whose layers it makes sparse, plus its routers.

    Returns:
      ``encoder`` and ``decoder`` (projections and feed-forwards of their own tokens),
      ``cross_keys_values`` (the decoder's projections of the encoder's tokens), ``attention`` (logits
      and mixing), ``more_experts`` (second choices, shared experts), ``router``, ``output`` (vocabulary
      logits).
    """
    model = settings.model
    inputs, layers = settings.data.input_length, model.num_layers
    projection = model.d_model * model.num_heads * model.d_kv
    feed_forward = (3 if model.activation == "geglu" else 2) * model.d_model * model.d_ff
    pairs = inputs**2 + target_length**2 + inputs * target_length
    sparse_layers = layers // settings.moe.every if settings.sparse else 0
    # A token's experts over those of the dense layer; attention's have the dense layer's FLOPs.
    extra = settings.moe.choices - 1 + settings.moe.num_shared / settings.moe.granularity
    routers = sparse_layers * (2 if settings.moe.attention else 1)
    multiply_adds = {
        "encoder": layers * inputs * (4 * projection + feed_forward),
        "decoder": layers * target_length * (6 * projection + feed_forward),
        "cross_keys_values": layers * inputs * 2 * projection,
        "attention": layers * 2 * pairs * model.num_heads * model.d_kv,
        "more_experts": sparse_layers * (inputs + target_length) * feed_forward * extra,
        "router": routers * (inputs + target_length) * model.d_model * settings.moe.total_experts,
        "output": target_length * model.d_model * settings.embedding_rows,
    }
    return {part: 2.0 * count for part, count in multiply_adds.items()}


def train_flops(settings: Settings, target_length: int) -> float:
    """FLOPs of one training step: forward, and twice that backward; recomputation is not counted."""
    return 3.0 * settings.data.batch_size * sum(forward_flops(settings, target_length).values())


def matmul_peak(dtype: str, repeats: int = 5) -> float:
    """FLOP/s of the fastest of ``repeats`` square matrix products on the first device."""
    n = 2048 if jax.default_backend() == "cpu" else 8192
    a, b = jax.random.normal(jax.random.key(0), (2, n, n), jnp.float32).astype(dtype)
    product = jax.jit(lambda a, b: a @ b)
    product(a, b).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(a, b).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2.0 * n**3 / min(seconds)
