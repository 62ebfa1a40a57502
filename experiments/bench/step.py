"""The whole training step, its budget by part, and Hugging Face's. See `experiments.bench`."""

import argparse
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

from experiments.bench import tools
from switchmoe.analysis import timing
from switchmoe.model import output_loss
from switchmoe.model.attention import Attention
from switchmoe.model.layers import FeedForward
from switchmoe.model.moe import MoELayer
from switchmoe.model.moe_rules import group_shape
from switchmoe.model.seen import Seen
from switchmoe.planning import flops
from switchmoe.settings import Settings, from_config
from switchmoe.training import objective, optimizers, train_state, train_step

HEADS = 4
OPTIONS = (
    "what", "experts", "d_model", "d_ff", "factor", "dtype", "layers", "vocab", "batch", "lengths", "repeats", "seed", "hf",
)  # fmt: skip  # those that it reads


def measure(experts: int, options: argparse.Namespace, found: dict[str, Any]) -> tools.Rows:
    """A row for our step, one for Hugging Face's, and one for each part of ours."""
    settings = _settings(experts, options)
    steps = {"switchmoe": compiled_step(settings, _batch(options))}
    if options.hf == "auto" and options.dtype == "float32":
        steps |= tools.torch_cases(hugging_face, experts, options)
    # Before the parts are there: among a dozen programs' buffers on the heap the step took 13 % longer.
    seconds = timing.measure(steps, options.repeats)
    tokens = options.batch * sum(options.lengths)
    work = flops.train_flops(settings, stack_lengths(options.lengths))
    rows = []
    for name in steps:
        row = {"experts": experts, "case": name, "part": False}
        row |= timing.summary(seconds[name], seconds["switchmoe"])
        second = row["median_ms"] / 1e3
        row["tokens_per_second"] = tokens / second
        row["peak_share"] = work / second / found["matmul_peak_flops"]
        rows.append(row)
    return rows + _budget(settings, options, rows[0]["median_ms"])


def _budget(settings: Settings, options: argparse.Namespace, step_ms: float) -> tools.Rows:
    """A row for each part of the step, for as many of it as the step has, and one for the rest."""
    parts = _parts(settings, options)
    seconds = timing.measure({name: case for name, (case, _) in parts.items()}, options.repeats)
    found = {name: timing.summary(seconds[name] * count) for name, (_, count) in parts.items()}
    rest = step_ms - sum(row["median_ms"] for row in found.values())
    found["rest"] = {"median_ms": rest, "quartile_1_ms": rest, "quartile_3_ms": rest}
    return [
        {"experts": settings.moe.num_experts, "case": name, "part": True}
        | row
        | {"ratio": row["median_ms"] / step_ms}
        for name, row in found.items()
    ]


def _settings(experts: int, options: argparse.Namespace) -> Settings:
    model = dict(
        d_model=options.d_model,
        d_ff=options.d_ff,
        num_heads=HEADS,
        d_kv=options.d_model // HEADS,
        num_layers=options.layers,
        activation="relu",
        dtype=options.dtype,
        scan=False,
    )
    moe = dict(num_experts=experts, capacity_factor=options.factor, jitter=0.0)
    data = dict(batch_size=options.batch, input_length=options.lengths[0], vocab_size=options.vocab - 100)
    optimizer = dict(name="adamw", schedule="constant", learning_rate=1e-4)
    return from_config(
        dict(model=model, moe=moe, data=data, optimizer=optimizer, train=dict(seed=options.seed))
    )


def stack_lengths(lengths: Sequence[int]) -> dict[str, int]:
    return dict(zip(("encoder", "decoder"), lengths, strict=True))


def _batch(options: argparse.Namespace) -> objective.Batch:
    keys = jax.random.split(jax.random.key(options.seed))
    return {
        name: jax.random.randint(key, (options.batch, length), 1, options.vocab)
        for name, key, length in zip(("inputs", "targets"), keys, options.lengths, strict=True)
    }


def compiled_step(settings: Settings, batch: objective.Batch) -> timing.Case:
    """The training step on a batch, from the first state on."""
    tx = optimizers.create(settings.optimizer, 1000, train_state.axis_names(settings))
    state = [jax.jit(lambda: train_state.init_state(settings, tx))()]
    step = train_step.compile_step(settings, tx, state[0], batch)

    def run() -> None:
        state[0], metrics = step(state[0], batch)
        jax.block_until_ready((state[0], metrics))

    return timing.Case(run)


def _parts(settings: Settings, options: argparse.Namespace) -> dict[str, tuple[timing.Case, int]]:
    """Forward + backward of each kind of layer, and how many of it the step has."""
    model, moe, layers = settings.model, settings.moe, settings.model.num_layers
    sparse = layers // moe.every
    key = jax.random.key(options.seed)

    def random(*shape: int) -> jax.Array:
        return jax.random.normal(key, shape, jnp.float32).astype(options.dtype)

    def both(module: nn.Module, *inputs: jax.Array) -> timing.Case:
        params = nn.unbox(jax.jit(module.init)({"params": key, "router": key}, *inputs))

        def value(params: Any, inputs: tuple) -> jax.Array:
            out = module.apply(params, *inputs, rngs={"router": key})
            y, beside = out if isinstance(out, tuple) else (out, {})
            return (y * y).sum() + (beside["loss"] if "loss" in beside else 0.0)

        return timing.compiled(jax.grad(value, (0, 1)), params, inputs)

    parts = {}
    lengths = stack_lengths(options.lengths)
    x = {stack: random(options.batch, length, model.d_model) for stack, length in lengths.items()}
    for name, query, memory in (
        ("encoder attention", "encoder", "encoder"),
        ("decoder attention", "decoder", "decoder"),
        ("cross attention", "decoder", "encoder"),
    ):
        seen = Seen(jnp.zeros((1, 1, 1, x[memory].shape[1])))
        if query == memory:
            seen = seen.replace(bias=random(HEADS, *[x[query].shape[1]] * 2).astype(jnp.float32))
        parts[name] = both(Attention(model, True), x[query], x[memory], seen), layers
    for stack, x_BLD in x.items():
        groups = group_shape(*x_BLD.shape[:2], moe.group_size)
        parts[f"{stack} dense"] = both(FeedForward(model, True), x_BLD), layers - sparse
        parts[f"{stack} experts"] = both(MoELayer(model, moe, True), x_BLD.reshape(*groups, -1)), sparse
    parts["output, cross-entropy"] = _output(settings, x["decoder"], options), 1
    parts["optimizer"] = _optimizer(settings), 1
    return parts


def _output(settings: Settings, x_BLD: jax.Array, options: argparse.Namespace) -> timing.Case:
    targets_BL = _batch(options)["targets"]
    table_VD = jax.random.normal(jax.random.key(1), (settings.embedding_rows, x_BLD.shape[-1]), jnp.float32)

    def value(table_VD: jax.Array, x_BLD: jax.Array) -> jax.Array:
        nll_BL, z_BL, *_ = output_loss.output_cross_entropy(x_BLD, table_VD.astype(x_BLD.dtype), targets_BL)
        return nll_BL.sum() + 1e-4 * z_BL.sum()

    return timing.compiled(jax.grad(value, (0, 1)), table_VD, x_BLD)


def _optimizer(settings: Settings) -> timing.Case:
    tx = optimizers.create(settings.optimizer, 1000, train_state.axis_names(settings))
    state = jax.jit(lambda: train_state.init_state(settings, tx))()

    def update(params: Any, opt_state: Any, grads: Any) -> Any:
        updates, opt_state = tx.update(grads, opt_state, params)
        return jax.tree.map(jnp.add, params, updates), opt_state

    # Donated buffers go to outputs by their order: what comes in first goes out first, or is copied.
    held = [state.params, state.opt_state]
    update = jax.jit(update, donate_argnums=(0, 1))
    grads = jax.tree.map(jnp.copy, state.params)

    def run() -> None:
        held[0], held[1] = jax.block_until_ready(update(*held, grads))

    return timing.Case(run)


def hugging_face(experts: int, options: Any, heads: int = HEADS) -> dict[str, timing.Case]:
    """Its model, slots for each sequence by the same factor, torch's fused AdamW; bfloat16 as torch's autocast has it."""
    import torch
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    from switchmoe.routing import expert_capacity

    torch.manual_seed(options.seed)
    config = SwitchTransformersConfig(
        vocab_size=options.vocab,
        d_model=options.d_model,
        d_ff=options.d_ff,
        d_kv=options.d_model // heads,
        num_heads=heads,
        num_layers=options.layers,
        num_decoder_layers=options.layers,
        num_sparse_encoder_layers=options.layers // 2,
        num_sparse_decoder_layers=options.layers // 2,
        num_experts=experts,
        expert_capacity=expert_capacity(options.lengths[0], experts, options.factor),
        router_jitter_noise=0.0,
        dropout_rate=0.0,
        use_cache=False,
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    model = SwitchTransformersForConditionalGeneration(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    inputs, labels = (
        torch.randint(1, options.vocab, (options.batch, length), device=device) for length in options.lengths
    )

    def run() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            loss = model(input_ids=inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return {"Hugging Face": timing.Case(run)}


def line(row: dict[str, Any]) -> str:
    shown = (
        f"  {row['ratio']:5.1%} of the step"
        if row["part"]
        else f"  {row['tokens_per_second']:8,.0f} tokens/s  {row['peak_share']:.0%} of the matrix-product peak"
    )
    indent = "  " if row["part"] else ""
    spread = f"({row['quartile_1_ms']:.1f} - {row['quartile_3_ms']:.1f})"
    return f"E={row['experts']:<4d} {indent + row['case']:24s} {row['median_ms']:8.1f} ms  {spread}{shown}"


def plot(found: dict[str, Any]) -> Figure:
    """The budget of our step as stacked bars, Hugging Face's step beside it."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    rows = found["rows"]
    parts = list(dict.fromkeys(row["case"] for row in rows if row["part"]))
    colours = dict(zip(parts, tools.COLOURS, strict=False))
    labels = []
    for experts in dict.fromkeys(row["experts"] for row in rows):
        mine = {row["case"]: row for row in rows if row["experts"] == experts}
        left = 0.0
        for part in parts:
            width = max(mine[part]["median_ms"], 0.0)
            label = part if not labels else None
            axes.barh(len(labels), width, left=left, color=colours[part], label=label)
            left += width
        labels.append(f"switchmoe, E={experts}")
        if "Hugging Face" in mine:
            axes.barh(len(labels), mine["Hugging Face"]["median_ms"], color="#bbbbbb")
            labels.append(f"Hugging Face, E={experts}")
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("training step, ms")
    figure.legend(loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    return figure
