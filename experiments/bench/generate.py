"""Cached generation: tokens/s, against Hugging Face's model with the same weights. See `experiments.bench`."""

import argparse
import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments.bench import tools
from switchmoe.analysis import timing
from switchmoe.inference.decoding import Choosing
from switchmoe.inference.generation import Generator
from switchmoe.settings import Settings, from_config
from switchmoe.training import train_state

SHAPE = dict(d_model=512, d_ff=2048, d_kv=64, num_heads=8, num_layers=6, activation="relu", scan=False)
TINY = SHAPE | dict(d_model=64, d_ff=128, d_kv=16, num_heads=4, num_layers=2)
ROWS, TINY_ROWS = 32128, 512  # of the vocabulary
PROMPT, NEW = 64, 64  # tokens
BATCHES = (1, 16)
OPTIONS = ("what", "experts", "repeats", "seed", "hf", "tiny")  # those that it reads
PROMPT_ONLY = ", prompt"  # ends the name of a case that generates one token: the prompt's time and a step's


def measure(experts: int, options: argparse.Namespace, found: dict[str, Any]) -> tools.Rows:
    """Rows of ours and Hugging Face's, float32 and bfloat16, for each batch size."""
    settings = model_settings(experts, options.tiny)
    state = None
    if options.hf == "auto" and experts == min(options.experts):
        models = tools.torch_cases(_models, settings, options.seed)
        if models:
            state = {name: leaf.numpy() for name, leaf in models["float32"].state_dict().items()}
    params = random_parameters(settings) if state is None else switch_parameters(state, settings)
    new, rows = (8 if options.tiny else NEW), []
    for batch in BATCHES:
        prompts = np.random.default_rng(options.seed).integers(2, settings.data.vocab_size, (batch, PROMPT))
        cases, sizes = {}, {}
        for dtype in ("float32", "bfloat16"):
            own = dataclasses.replace(settings, model=dataclasses.replace(settings.model, dtype=dtype))
            generator = generator_of(own, params, new, batch)
            first = generator.with_tokens(1)
            cases[f"switchmoe {dtype}"] = timing.Case(functools.partial(generator, prompts))
            cases[f"switchmoe {dtype}{PROMPT_ONLY}"] = timing.Case(functools.partial(first, prompts))
            sizes[f"switchmoe {dtype}"] = bytes_read(own)
            if state is not None:
                cases[f"Hugging Face {dtype}"] = hugging_face(models[dtype], prompts, new)
        seconds = timing.measure(cases, options.repeats)
        del generator, first, cases  # of 64 experts a model has 3 GB
        reference = seconds.get("Hugging Face float32")
        prompt = {name: times for name, times in seconds.items() if name.endswith(PROMPT_ONLY)}
        for name, times in seconds.items():
            if name in prompt:
                continue
            row = {"experts": experts, "case": name, "batch": batch, "new_tokens": new}
            row |= timing.summary(times, None if reference is None else reference)
            row["ms_per_token"] = row["median_ms"] / new
            row["tokens_per_second"] = batch * new / row["median_ms"] * 1e3
            if name in sizes:
                row["bytes_per_step"] = sizes[name]
                row["prompt_ms"] = timing.summary(prompt[name + PROMPT_ONLY])["median_ms"]
                row["ms_per_step"] = (row["median_ms"] - row["prompt_ms"]) / (new - 1)
            rows.append(row)
    return rows


def model_settings(experts: int, tiny: bool = False) -> Settings:
    """A Switch Transformer of 6 + 6 layers, every other one sparse, 32,128 rows of vocabulary."""
    data = dict(vocab_size=(TINY_ROWS if tiny else ROWS) - 100, input_length=PROMPT)
    moe = dict(num_experts=experts, jitter=0.0)
    return from_config(dict(model=(TINY if tiny else SHAPE) | dict(dtype="float32"), moe=moe, data=data))


def random_parameters(settings: Settings) -> dict:
    rng = np.random.default_rng(0)
    shapes = train_state.parameter_shapes(settings)
    return jax.tree.map(lambda s: rng.standard_normal(s.shape, np.float32) * np.float32(0.05), shapes)


def bytes_read(settings: Settings) -> int:
    """Of the weights that a step of one token of each sequence reads at least: of each sparse layer one expert."""
    shapes, size = train_state.parameter_shapes(settings), 0
    width = 2 if settings.model.dtype == "bfloat16" else 4
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes["decoder"]):
        keys = [getattr(key, "key", "") for key in path]
        of_encoder = "cross" in keys and keys[-1] in ("key", "value")
        size += 0 if of_encoder else leaf.size // (leaf.shape[0] if "experts" in keys else 1)
    return width * (size + shapes["embedding"].size)


def generator_of(settings: Settings, params: dict, new: int, batch: int) -> Generator:
    return Generator(settings, params, new, Choosing(stop_ids=()), batch_size=batch)


def hugging_face(model: Any, prompts: np.ndarray, new: int) -> timing.Case:
    import torch

    inputs = torch.tensor(prompts)

    def run() -> None:
        with torch.no_grad():
            model.generate(inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)

    return timing.Case(run)


def _models(settings: Settings, seed: int) -> dict[str, Any]:
    """Hugging Face's models, of the same random weights."""
    import torch
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    torch.manual_seed(seed)
    model, moe = settings.model, settings.moe
    config = SwitchTransformersConfig(
        vocab_size=settings.embedding_rows,
        d_model=model.d_model,
        d_ff=model.d_ff,
        d_kv=model.d_kv,
        num_heads=model.num_heads,
        num_layers=model.num_layers,
        num_decoder_layers=model.num_layers,
        num_sparse_encoder_layers=model.num_layers // 2,
        num_sparse_decoder_layers=model.num_layers // 2,
        num_experts=moe.num_experts,
        expert_capacity=PROMPT,
        router_jitter_noise=0.0,
        dropout_rate=0.0,
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    found = {"float32": SwitchTransformersForConditionalGeneration(config).eval()}
    found["bfloat16"] = SwitchTransformersForConditionalGeneration(config).eval()
    found["bfloat16"].load_state_dict(found["float32"].state_dict())
    found["bfloat16"].to(torch.bfloat16)
    for one in found.values():
        one.generation_config.eos_token_id = None
    return found


def switch_parameters(state: dict[str, np.ndarray], settings: Settings) -> dict:
    """Our parameters, without the scan, of a state of Hugging Face's T5 or Switch; torch's kernels are [out, in]."""
    model = settings.model
    into, out = (model.d_model, model.num_heads, model.d_kv), (model.num_heads, model.d_kv, model.d_model)

    def attention(name: str) -> dict[str, np.ndarray]:
        kernels = {"query": "q", "key": "k", "value": "v", "out": "o"}
        return {
            own: state[f"{name}.{letter}.weight"].T.reshape(out if own == "out" else into)
            for own, letter in kernels.items()
        }

    def feed_forward(name: str) -> dict[str, np.ndarray]:
        names = {"wi_gate": "wi_0", "wi": "wi_1", "wo": "wo"} if model.gated else {"wi": "wi", "wo": "wo"}
        return {own: state[f"{name}.{theirs}.weight"].T for own, theirs in names.items()}

    def block(name: str, decoder: bool, sparse: bool) -> dict[str, Any]:
        last = 2 if decoder else 1
        found = {"self": attention(f"{name}.layer.0.SelfAttention")}
        norms = {"self_norm": 0, "ff_norm": last}
        if decoder:
            found["cross"], norms["cross_norm"] = attention(f"{name}.layer.1.EncDecAttention"), 1
        found |= {own: {"scale": state[f"{name}.layer.{n}.layer_norm.weight"]} for own, n in norms.items()}
        inner = f"{name}.layer.{last}.mlp"
        if not sparse:
            t5 = f"{name}.layer.{last}.DenseReluDense"
            return found | {"ff": feed_forward(t5 if f"{t5}.wo.weight" in state else inner)}
        experts = [feed_forward(f"{inner}.experts.expert_{e}") for e in range(settings.moe.num_experts)]
        router = state[f"{inner}.router.classifier.weight"].T
        stacked = jax.tree.map(lambda *kernels: np.stack(kernels), *experts)
        return found | {"moe": {"router": router, "experts": stacked}}

    params: dict[str, Any] = {"embedding": state["shared.weight"]}
    if not model.tie_embeddings:
        params["output"] = state["lm_head.weight"]
    for stack in ("encoder", "decoder"):
        first = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        own = {"relative_bias": {"table": state[first].T}}
        own["norm"] = {"scale": state[f"{stack}.final_layer_norm.weight"]}
        period = settings.period(stack)
        for n in range(settings.layers(stack)):
            parts = block(f"{stack}.block.{n}", stack == "decoder", n in settings.sparse_blocks(stack))
            own.setdefault(f"blocks_{n // period}", {})[f"block_{n % period}"] = parts
        params[stack] = own
    return params


def line(row: dict[str, Any]) -> str:
    spread = f"({row['quartile_1_ms']:.0f} - {row['quartile_3_ms']:.0f})"
    against = f"  {1 / row['ratio']:5.2f} x Hugging Face float32" if "ratio" in row else ""
    read = ""
    if "bytes_per_step" in row:
        read = f"  prompt {row['prompt_ms']:.0f} ms, a step {row['ms_per_step']:.2f} ms"
        read += f": {row['bytes_per_step'] / row['ms_per_step'] / 1e6:.1f} GB/s of weights"
    return (
        f"E={row['experts']:<4d} batch {row['batch']:<3d} {row['case']:22s} {row['ms_per_token']:7.2f} ms a token {spread}"
        f"  {row['tokens_per_second']:8,.0f} tokens/s{against}{read}"
    )


def plot(found: dict[str, Any]) -> Figure:
    """Tokens a second of each case, a panel for each batch size."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, len(BATCHES))
    for axes, batch in zip(panels, BATCHES, strict=True):
        rows = [row for row in found["rows"] if row["batch"] == batch]
        labels = [f"{row['case']}, E={row['experts']}" for row in rows]
        colours = ["#bbbbbb" if "Hugging" in row["case"] else tools.COLOURS[0] for row in rows]
        bars = axes.barh(range(len(rows)), [row["tokens_per_second"] for row in rows], color=colours)
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=7)
        axes.margins(x=0.12)
        axes.set_yticks(range(len(rows)), labels, fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel(f"tokens/s, batch {batch}")
    return figure
