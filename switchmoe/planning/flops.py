"""Model FLOPs, counted from the settings, and the machine's measured matrix-product peak."""

import functools
import time

import jax
import jax.numpy as jnp

from switchmoe.model.moe_rules import expert_width, group_shape, router_columns, router_name, slots
from switchmoe.routing import NOT_CAUSAL
from switchmoe.settings import ModelSettings, Settings


def forward_flops(settings: Settings, lengths: dict[str, int]) -> dict[str, float]:
    """FLOPs (2 per multiply-add) of one sequence's forward pass in training, by part.

    Matrix products only. Where tokens choose, a choice costs one expert, whatever the capacity factor: a Switch
    model counts like the dense model whose layers it makes sparse, plus its routers. Where experts choose, and
    in Soft MoE, all slots are full and each costs one row (`expert_rows`). One-hot masks are not counted, Soft
    MoE's mixing is: it is what that model computes.

    Returns:
      ``encoder`` and ``decoder`` (projections and feed-forwards of their own tokens),
      ``cross_keys_values`` (the decoder's projections of the encoder's tokens), ``attention`` (logits
      and mixing), ``more_experts`` (what experts cost beyond the dense layer: second choices, shared experts;
      below 0 where there are fewer slots than tokens), ``mixing`` (Soft MoE's sums over tokens and slots),
      ``router``, ``output`` (vocabulary logits).

    Args:
      lengths: tokens of a sequence in each stack; ``predicted``, where logits are computed of some of the decoder's. Packed
        documents count as one: of attention all pairs of a row.
    """
    model, targets = settings.model, lengths["decoder"]
    queries = 2 * model.d_model * model.num_heads * model.d_kv  # and the output
    keys = 2 * model.d_model * model.kv_heads * model.d_kv  # and the values
    feed_forward = kernels(model) * model.d_model * model.d_ff
    layers = {stack: settings.layers(stack) for stack in settings.stacks}
    inputs = lengths.get("encoder", 0)
    cross = queries if "encoder" in layers else 0
    pairs = (
        sum(layers[stack] * lengths[stack] ** 2 for stack in layers) + layers["decoder"] * inputs * targets
    )
    multiply_adds = {
        "encoder": layers.get("encoder", 0) * inputs * (queries + keys + feed_forward),
        "decoder": layers["decoder"] * targets * (queries + keys + cross + feed_forward),
        "cross_keys_values": layers["decoder"] * inputs * keys,
        "attention": 2 * pairs * model.num_heads * model.d_kv,
        "more_experts": 0.0,
        "mixing": 0.0,
        "router": 0.0,
        "output": lengths.get("predicted", targets) * model.d_model * settings.embedding_rows,
    }
    for stack in settings.sparse_stacks:
        for part, count in _sparse_layer(settings, stack == "decoder", lengths[stack]).items():
            multiply_adds[part] += len(settings.sparse_blocks(stack)) * count
    return {part: 2.0 * count for part, count in multiply_adds.items()}


def kernels(model: ModelSettings) -> int:
    """Of a feed-forward."""
    return 3 if model.gated else 2


def _sparse_layer(settings: Settings, causal: bool, length: int) -> dict[str, float]:
    """Multiply-adds of a sequence in one sparse block, beyond those of a dense one."""
    model, moe = settings.model, settings.moe
    dense = kernels(model) * model.d_model * model.d_ff
    expert = kernels(model) * model.d_model * expert_width(model, moe)
    projections = attention_expert(model)
    rows, name = expert_rows(settings, causal, length), router_name(moe, causal)
    more = (rows + length * moe.num_shared) * expert - length * dense
    widths = [2 * model.d_model]  # of what is mixed on the way to the slots and back
    if moe.attention:
        more += (rows - length) * projections
        widths.append(model.d_model + projections // model.d_model)
    _, tokens = _groups(settings, length)
    columns = router_columns(moe, name)
    return {
        "more_experts": more,
        "mixing": tokens * rows * sum(widths) if name == "soft" else 0.0,
        "router": length * len(widths) * model.d_model * columns,
    }


def attention_expert(model: ModelSettings) -> int:
    """Multiply-adds of a row in an expert of attention: queries, keys and values."""
    return model.d_model * (model.num_heads + 2 * model.kv_heads) * model.d_kv


def expert_rows(settings: Settings, causal: bool, length: int) -> float:
    """Rows that the experts of one sparse layer compute for a sequence of ``length`` tokens, empty slots left out."""
    moe, name = settings.moe, router_name(settings.moe, causal)
    if name not in NOT_CAUSAL:
        return length * moe.total_choices
    groups, tokens = _groups(settings, length)
    capacity = moe.slots
    if name == "expert_choice":
        capacity = slots(moe, tokens, moe.capacity_factor)
    return groups * moe.total_experts * capacity


def _groups(settings: Settings, length: int) -> tuple[float, int]:
    """(groups a sequence, tokens of each)."""
    batch = settings.data.batch_size // settings.train.accumulate
    groups, tokens = group_shape(batch, length, settings.moe.group_size)
    return groups / batch, tokens


def train_flops(settings: Settings, lengths: dict[str, int]) -> float:
    """FLOPs of one training step: forward, and twice that backward; recomputation is not counted."""
    return 3.0 * settings.data.batch_size * sum(forward_flops(settings, lengths).values())


@functools.cache
def matmul_peak(dtype: str, repeats: int = 5) -> float:
    """FLOP/s of the fastest of ``repeats`` square matrix products on the first device; a process measures it once."""
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
