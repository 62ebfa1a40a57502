"""The MoE layer, one group of tokens, against the dense feed-forward. See `experiments.bench`."""

import argparse
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

from experiments.bench import tools
from switchmoe.analysis import timing
from switchmoe.model.layers import FeedForward
from switchmoe.model.moe import MoELayer
from switchmoe.settings import ModelSettings, MoESettings

MODES = ("forward", "forward + backward")
OPTIONS = (
    "what", "experts", "dispatch", "tokens", "d_model", "d_ff", "factor", "dtype", "repeats", "seed", "hf",
)  # fmt: skip  # those that it reads


def measure(experts: int, options: argparse.Namespace, found: dict[str, Any]) -> tools.Rows:
    """Rows of every case and mode; the two modes are measured one after the other."""
    rows = []
    for mode in MODES:
        cases = _cases(experts, options, mode)
        seconds = timing.measure(cases, options.repeats)
        for name, case in cases.items():
            row = {"experts": experts, "case": name, "mode": mode}
            row |= timing.summary(seconds[name], seconds["dense"])
            rows.append(row | {"temporary_bytes": case.temporary_bytes})
    return rows


def _cases(experts: int, options: argparse.Namespace, mode: str) -> dict[str, timing.Case]:
    model = ModelSettings(
        d_model=options.d_model,
        d_ff=options.d_ff,
        num_heads=1,
        activation="relu",
        dtype=options.dtype,
        init_scale=1.0,
    )
    key_x, key_y, key_p = jax.random.split(jax.random.key(options.seed), 3)
    x_GSD, d_GSD = (
        jax.random.normal(key, (1, options.tokens, options.d_model), jnp.float32).astype(options.dtype)
        for key in (key_x, key_y)
    )

    def case(module: nn.Module, params: Any) -> timing.Case:
        return compiled(module, params, x_GSD, d_GSD, key_p, mode)

    dense = FeedForward(model)
    cases = {"dense": case(dense, nn.unbox(jax.jit(dense.init)(key_p, x_GSD)))}
    params = None
    for dispatch in options.dispatch:
        moe = MoESettings(num_experts=experts, dispatch=dispatch, capacity_factor=options.factor, jitter=0.0)
        layer = MoELayer(model, moe, train=True)
        if params is None:
            params = nn.unbox(jax.jit(layer.init)({"params": key_p, "router": key_p}, x_GSD))
        cases[dispatch] = case(layer, params)
    if options.hf == "auto" and options.dtype == "float32":
        cases |= tools.torch_cases(_hugging_face, experts, options, mode)
    return cases


def compiled(
    module: nn.Module,
    params: Any,
    x_GSD: jax.Array,
    d_GSD: jax.Array,
    key: jax.Array,
    mode: str = MODES[1],
) -> timing.Case:
    """A layer, dense or sparse, in a mode; ``d_GSD`` is its output's gradient, ``key`` the router's."""

    def forward(params: Any, x_GSD: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = module.apply(params, x_GSD, rngs={"router": key})
        return (out[0], out[1]["loss"]) if isinstance(out, tuple) else (out, jnp.zeros(()))

    def both(params: Any, x_GSD: jax.Array, d_GSD: jax.Array) -> Any:
        y, pull = jax.vjp(forward, params, x_GSD)
        return y, pull((d_GSD, jnp.ones(())))

    if mode == MODES[0]:
        return timing.compiled(forward, params, x_GSD)
    return timing.compiled(both, params, x_GSD, d_GSD)


def _hugging_face(experts: int, options: argparse.Namespace, mode: str) -> dict[str, timing.Case]:
    """Its layer, with as many slots an expert as ours; it counts them for each sequence."""
    import torch
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers import modeling_switch_transformers as hf

    from switchmoe.routing import expert_capacity

    torch.manual_seed(options.seed)
    config = SwitchTransformersConfig(
        d_model=options.d_model,
        d_ff=options.d_ff,
        num_experts=experts,
        expert_capacity=expert_capacity(options.tokens, experts, options.factor),
        router_jitter_noise=0.0,
        dropout_rate=0.0,
    )
    layer = hf.SwitchTransformersSparseMLP(config)
    x = torch.randn(1, options.tokens, options.d_model, requires_grad=True)
    d = torch.randn(1, options.tokens, options.d_model)

    def forward() -> torch.Tensor:
        y = layer(x)
        return y[0] if isinstance(y, tuple) else y

    def both() -> None:
        layer.zero_grad()
        x.grad = None
        forward().backward(d)

    def forward_alone() -> None:
        with torch.no_grad():
            forward()

    return {"Hugging Face": timing.Case(forward_alone if mode == "forward" else both)}


def line(row: dict[str, Any]) -> str:
    memory = row["temporary_bytes"]
    shown = "" if memory is None else f"  {memory / 2**20:8.0f} MiB beside the arguments"
    return (
        f"E={row['experts']:<4d} {row['mode']:18s} {row['case']:13s} {row['median_ms']:8.1f} ms"
        f"  ({row['quartile_1_ms']:.1f} - {row['quartile_3_ms']:.1f})  {row['ratio']:5.2f} x dense{shown}"
    )


def kernel_bytes(experts: int, options: dict[str, Any]) -> int:
    size = 2 if options["dtype"] == "bfloat16" else 4
    return 2 * experts * options["d_model"] * options["d_ff"] * size


def weight_traffic_ms(experts: int, found: dict[str, Any]) -> float:
    """Forward + backward reads the kernels twice and writes their gradients once, at the measured bandwidth."""
    return 3e3 * kernel_bytes(experts, found["options"]) / found["memory_bandwidth"]


def plot(found: dict[str, Any]) -> Figure:
    """Time and memory of forward + backward against E, with the traffic of the weights."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    rows = [row for row in found["rows"] if row["mode"] == MODES[1]]
    colours = dict(
        zip(
            dict.fromkeys(row["case"] for row in rows),
            ("#666666", "#D55E00", "#0072B2", "#009E73", "#CC79A7"),
            strict=False,
        )
    )
    for name, colour in colours.items():
        mine = [row for row in rows if row["case"] == name]
        experts = [row["experts"] for row in mine]
        panels[0].plot(experts, [row["median_ms"] for row in mine], "o-", color=colour, label=name, ms=3)
        if mine[0]["temporary_bytes"] is not None:
            memory = [row["temporary_bytes"] / 2**20 for row in mine]
            panels[1].plot(experts, memory, "o-", color=colour, ms=3)
    experts = sorted({row["experts"] for row in rows})
    traffic = [weight_traffic_ms(e, found) for e in experts]
    panels[0].plot(experts, traffic, "k:", label="weights' traffic")
    gradients = [kernel_bytes(e, found["options"]) / 2**20 for e in experts]
    panels[1].plot(experts, gradients, "k:", label="gradients of the weights")
    for panel, title in zip(
        panels, ("forward + backward, ms", "memory beside the arguments, MiB"), strict=True
    ):
        panel.set(xscale="log", yscale="log", xlabel="experts", title=title)
        panel.set_xticks(experts, [str(e) for e in experts])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7, frameon=False)
    return figure
