"""The accelerator's parts of attention and cached generation, see `accelerator_parts`.

Letters: B sequences, L tokens, H heads, K width of a head.
"""

import dataclasses
import functools
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import generate as bench_generate
from experiments.bench.accelerator_parts import TINY, Row, Sizes, measured
from switchmoe.analysis import timing
from switchmoe.model import attend
from switchmoe.model.seen import MASKED, Seen
from switchmoe.settings import Settings

FORMS = {
    "plain": attend.plain,
    "head by head": lambda query, key, value, seen, scale: attend.by_head(
        query, key, value, seen.bias, seen.added_B1QM, scale
    ),
    "cuDNN": attend.by_cudnn,
}


def attention(sizes: Sizes, until: float) -> Iterator[Row]:
    """Forward + backward of softmax attention: an encoder's, with learned bias and lengths; a decoder's alone, packed."""
    length, width = 4 * sizes.lengths[0], sizes.d_model // sizes.heads
    batch = max(1, sizes.batch // 8)
    keys = jax.random.split(jax.random.key(sizes.seed), 4)
    parts = [
        jax.random.normal(key, (batch, length, sizes.heads, width), jnp.float32).astype(sizes.dtype)
        for key in keys[:3]
    ]
    place_L = jnp.arange(length)
    ahead = place_L[None, :] > place_L[:, None]
    apart = (place_L[None, :] // (length // 4)) != (place_L[:, None] // (length // 4))
    packed = jnp.broadcast_to(ahead | apart, (batch, 1, length, length))
    seens = {
        "encoder": Seen(
            jnp.zeros((batch, 1, 1, length)),
            bias=jax.random.normal(keys[3], (sizes.heads, length, length)),
            keys_B=jnp.full(batch, length, jnp.int32),
        ),
        "decoder": Seen(jnp.where(ahead, MASKED, 0.0)[None, None], causal=True),
        "decoder, packed": Seen(jnp.where(packed, MASKED, 0.0), causal=True, by_mask=True),
    }
    for name, seen in seens.items():
        for form, function in FORMS.items():
            if form == "cuDNN" and jax.default_backend() != "gpu":
                continue
            if time.monotonic() > until:
                return

            def total(parts: list, bias: jax.Array | None, seen: Seen = seen, function=function) -> jax.Array:
                y_BLHK = function(*parts, seen.replace(bias=bias), width**-0.5)
                return (y_BLHK.astype(jnp.float32) ** 2).sum()

            def make(seen: Seen = seen, total=total) -> timing.Case:
                of = (0,) if seen.bias is None else (0, 1)
                return timing.compiled(jax.grad(total, of), parts, seen.bias)

            row = {"case": form, "attention": name, "tokens": batch * length, "length": length}
            yield measured(row, make, sizes.repeats)


def generate(sizes: Sizes, until: float) -> Iterator[Row]:
    """Cached generation of `bench generate`'s shape: ms a token, and a step's share of the memory's bandwidth.

    A step is what a token takes once the prompt, and with it the first token, is there.
    """
    tiny, new = sizes == TINY, 4 if sizes == TINY else bench_generate.NEW
    bandwidth = timing.memory_bandwidth(16 if tiny else 512)
    for experts in sizes.step_experts:
        settings = bench_generate.model_settings(experts, tiny)
        model = dataclasses.replace(settings.model, dtype=sizes.dtype)
        settings = dataclasses.replace(settings, model=model)
        params = bench_generate.random_parameters(settings)
        for batch in (1,) if tiny else bench_generate.BATCHES:
            if time.monotonic() > until:
                return
            rng = np.random.default_rng(sizes.seed)
            prompts = rng.integers(2, settings.data.vocab_size, (batch, bench_generate.PROMPT))
            row = {"experts": experts, "case": "switchmoe", "batch": batch}
            row, prompt = (
                measured(kept, functools.partial(_decoding, settings, params, prompts, new, n), sizes.repeats)
                for kept, n in ((row, new), ({}, 1))
            )
            if "error" in prompt:
                row = {"error": prompt["error"]} | row
            if "error" not in row:
                row["prompt_ms"] = prompt["median_ms"]
                row["ms_per_token"] = row["median_ms"] / new
                row["ms_per_step"] = (row["median_ms"] - row["prompt_ms"]) / (new - 1)
                row["tokens_per_second"] = 1e3 * batch * new / row["median_ms"]
                read = bench_generate.bytes_read(settings)
                row["bandwidth_share"] = read / (row["ms_per_step"] / 1e3) / bandwidth
            yield row


def _decoding(settings: Settings, params: dict, prompts: np.ndarray, new: int, tokens: int) -> timing.Case:
    """The first tokens of those that ``new`` would make."""
    generator = bench_generate.generator_of(settings, params, new, len(prompts)).with_tokens(tokens)
    return timing.Case(lambda: generator(prompts))


PARTS = {"attention": (attention, 0.15), "generate": (generate, 0.15)}
