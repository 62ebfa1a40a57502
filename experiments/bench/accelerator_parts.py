"""What `experiments.bench accelerator` measures, a function a part, each in a process of its own.

A part is called with its sizes and the time that is left; it yields rows, each as soon as it is measured. What can't be
measured (no memory, no package) is a row with `error`, so that the others still are.

Letters: G groups, S tokens of a group, D model, F feed-forward, E experts, N tokens.
"""

import contextlib
import dataclasses
import importlib.util
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.bench import layer as bench_layer
from experiments.bench import step as bench_step
from switchmoe.analysis import timing
from switchmoe.dispatch import grouped
from switchmoe.model.layers import FeedForward
from switchmoe.model.moe import MoELayer
from switchmoe.planning import flops
from switchmoe.settings import ModelSettings, MoESettings, from_config

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of everything that is measured."""

    d_model: int = 768  # Switch-Base's
    d_ff: int = 3072
    heads: int = 12
    layers: int = 12
    vocab: int = 32128
    tokens: int = 32768  # of the layer
    group: int = 4096
    experts: tuple[int, ...] = (64, 8, 128)  # of the layer; the most telling first
    step_experts: tuple[int, ...] = (8, 64)
    batch: int = 64  # sequences of a step
    lengths: tuple[int, int] = (512, 114)
    checked: int = 1024  # tokens of which gradients are compared
    run_experts: tuple[int, ...] = (1, 8, 64)
    repeats: int = 10
    factor: float = 1.25
    dtype: str = "bfloat16"
    seed: int = 0


TINY = Sizes(64, 128, 2, 2, 640, 256, 128, (2,), (2,), 4, (32, 16), 64, (2,), 3)
RUN = ["--config=configs/sweeps/experts_small.py"]
RUN_TINY = [
    "--config.model.d_model=16", "--config.model.d_ff=32", "--config.model.num_layers=2", "--config.data.batch_size=4",
    "--config.model.num_heads=2", "--config.model.d_kv=8", "--config.data.input_length=64", "--config.data.streams=0",
    "--config.data.vocab_size=1000", "--config.train.eval_batches=1",
]  # fmt: skip


def error_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def measured(row: Row, make: Callable[[], timing.Case], repeats: int) -> Row:
    """The row with its time in ms, or with what went wrong."""
    try:
        case = make()
        found = timing.measure({"": case}, repeats)[""]
    except Exception as error:  # out of memory, a kernel that can't be compiled: the next case may do
        return row | {"error": error_line(error)}
    return row | timing.summary(found) | {"temporary_bytes": case.temporary_bytes}


@contextlib.contextmanager
def kernels(name: str) -> Iterator[None]:
    """Inside, the grouped product's kernels are this package's; one that is not there: JAX's own."""
    before, grouped.KERNELS = grouped.KERNELS, name
    try:
        yield
    finally:
        grouped.KERNELS = before


def back_ends() -> dict[str, tuple[str, str]]:
    """Name: (`moe.dispatch`, the kernels' package)."""
    found = {name: (name, "none") for name in ("gather", "einsum", "ragged")}
    if importlib.util.find_spec("tokamax") and jax.default_backend() != "cpu":
        found["ragged, tokamax"] = ("ragged", "tokamax")
    return found


def layer(sizes: Sizes, until: float) -> Iterator[Row]:
    """Forward + backward of the MoE layer, each back end, against a dense layer of the same work per token."""
    model = ModelSettings(
        d_model=sizes.d_model, d_ff=sizes.d_ff, num_heads=1, activation="relu", dtype=sizes.dtype, init_scale=1.0
    )  # fmt: skip
    keys = jax.random.split(jax.random.key(sizes.seed), 3)
    shape = (sizes.tokens // sizes.group, sizes.group, sizes.d_model)
    x_GSD, d_GSD = (jax.random.normal(key, shape, jnp.float32).astype(sizes.dtype) for key in keys[:2])
    peak = flops.matmul_peak(sizes.dtype)
    work = 3 * 2 * 2 * sizes.tokens * sizes.d_model * sizes.d_ff

    def case(module: nn.Module) -> timing.Case:
        rngs = {"params": keys[2], "router": keys[2]}
        params = nn.unbox(jax.jit(module.init)(rngs, x_GSD))
        return bench_layer.compiled(module, params, x_GSD, d_GSD, keys[2])

    def told(row: Row, dense_ms: float | None) -> Row:
        if "error" not in row:
            row["peak_share"] = work / (row["median_ms"] / 1e3) / peak
            row["ratio"] = row["median_ms"] / dense_ms if dense_ms else None
        return row | {"matmul_peak_flops": peak}

    row = measured({"experts": 1, "case": "dense"}, lambda: case(FeedForward(model)), sizes.repeats)
    dense_ms = row.get("median_ms")
    yield told(row, dense_ms)
    for experts in sizes.experts:
        for name, (dispatch, package) in back_ends().items():
            if time.monotonic() > until:
                return
            moe = MoESettings(
                num_experts=experts, dispatch=dispatch, capacity_factor=sizes.factor, jitter=0.0
            )
            module = MoELayer(model, moe, train=True)
            with kernels(package):
                make = lambda module=module: case(module)  # noqa: E731
                yield told(measured({"experts": experts, "case": name}, make, sizes.repeats), dense_ms)


def gradients(sizes: Sizes, until: float) -> Iterator[Row]:
    """Output and gradients of each back end, some experts without a token, against a float32 loop over experts."""
    experts, idle = 8, (0, 3, 7)
    keys = jax.random.split(jax.random.key(sizes.seed + 1), 3)
    shape = (1, sizes.checked, sizes.d_model)
    # The first feature is 1 everywhere: with it the router keeps all tokens from the idle experts.
    x_GSD = jax.random.normal(keys[0], shape, jnp.float32).at[..., 0].set(1.0)
    d_GSD = jax.random.normal(keys[1], shape, jnp.float32)
    for dtype in ("float32", "bfloat16"):
        model = ModelSettings(
            d_model=sizes.d_model, d_ff=sizes.d_ff, num_heads=1, activation="relu", dtype=dtype, init_scale=1.0
        )  # fmt: skip
        for name, (dispatch, package) in back_ends().items():
            if time.monotonic() > until:
                return
            moe = MoESettings(
                num_experts=experts, dispatch=dispatch, capacity_factor=float(experts), jitter=0.0,
                balance_loss_weight=0.0, z_loss_weight=0.0,
            )  # fmt: skip
            module = MoELayer(model, moe, train=True)
            rngs = {"params": keys[2], "router": keys[2]}
            params = nn.unbox(jax.jit(module.init)(rngs, x_GSD.astype(dtype)))
            router = params["params"]["router"]
            params["params"]["router"] = router.at[0, list(idle)].set(-1e4)
            rounded = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype).astype(jnp.float32), (x_GSD, d_GSD))
            row = {"case": name, "dtype": dtype, "experts": experts, "idle": list(idle)}
            try:
                with kernels(package):
                    yield row | compare(module, params, *rounded, dtype, idle)
            except Exception as error:
                yield row | {"error": error_line(error)}


def compare(
    module: nn.Module, params: dict, x_GSD: jax.Array, d_GSD: jax.Array, dtype: str, idle: tuple[int, ...]
) -> Row:
    """Relative errors (norms) of the output and of each gradient; whether all is finite, and idle experts' are 0."""

    @jax.jit
    def ours(params: dict, x_GSD: jax.Array, d_GSD: jax.Array) -> tuple:
        def output(params: dict, x_GSD: jax.Array) -> jax.Array:
            rngs = {"router": jax.random.key(0)}
            return module.apply({"params": params}, x_GSD.astype(dtype), rngs=rngs)[0].astype(jnp.float32)

        return _with_gradients(output, params, x_GSD, d_GSD)

    rounded = jax.tree.map(lambda k: k.astype(dtype).astype(jnp.float32), params["params"]["experts"])
    found = ours(params["params"], x_GSD, d_GSD)
    wanted = loop_over_experts(params["params"] | {"experts": rounded}, x_GSD, d_GSD)
    errors = {}
    for name, a, b in zip(("output", "params", "x"), found, wanted, strict=True):
        flat_a, flat_b = jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b)
        for (path, leaf), other in zip(flat_a, flat_b, strict=True):
            label = name + jax.tree_util.keystr(path)
            errors[label] = float(jnp.linalg.norm(leaf.astype(jnp.float32) - other) / jnp.linalg.norm(other))
    experts = found[1]["experts"]
    zero = all(bool((experts[kernel][jnp.array(idle)] == 0).all()) for kernel in ("wi", "wo"))
    worst = max(errors, key=lambda name: errors[name] if math.isfinite(errors[name]) else math.inf)
    limit = {"float32": 5e-3, "bfloat16": 3e-2}[dtype]  # TF32's products in float32, where a GPU uses them
    largest = errors[worst] if math.isfinite(errors[worst]) else None
    right = largest is not None and largest < limit and zero
    return {"worst": worst, "relative_error": largest, "idle_are_zero": zero, "right": right}


@jax.jit
def loop_over_experts(params: dict, x_GSD: jax.Array, d_GSD: jax.Array) -> tuple:
    """(output, gradients of the parameters, of x) of the layer as a plain loop, in float32."""

    def output(params: dict, x_GSD: jax.Array) -> jax.Array:
        experts, y_GSD = params["experts"], jnp.zeros_like(x_GSD)
        prob_GSE = jax.nn.softmax(jnp.einsum("GSD,DE->GSE", x_GSD, params["router"]), axis=-1)
        for e in range(prob_GSE.shape[-1]):
            gate_GS = jnp.where(prob_GSE.argmax(-1) == e, prob_GSE[..., e], 0.0)
            h_GSF = nn.relu(jnp.einsum("GSD,DF->GSF", x_GSD, experts["wi"][e]))
            y_GSD += gate_GS[..., None] * jnp.einsum("GSF,FD->GSD", h_GSF, experts["wo"][e])
        return y_GSD

    with jax.default_matmul_precision("highest"):
        return _with_gradients(output, params, x_GSD, d_GSD)


def _with_gradients(output: Callable, params: dict, x_GSD: jax.Array, d_GSD: jax.Array) -> tuple:
    y_GSD, pull = jax.vjp(output, params, x_GSD)
    return y_GSD, *pull(d_GSD)


def step(sizes: Sizes, until: float) -> Iterator[Row]:
    """The whole training step of Switch-Base's shape: tokens/s, and the share of the matrix products' peak."""
    peak = flops.matmul_peak(sizes.dtype)
    for experts in sizes.step_experts:
        if time.monotonic() > until:
            return
        settings = _settings(sizes, experts)
        keys = jax.random.split(jax.random.key(sizes.seed))
        batch = {
            name: jax.random.randint(key, (sizes.batch, length), 1, sizes.vocab)
            for name, key, length in zip(("inputs", "targets"), keys, sizes.lengths, strict=True)
        }
        row = {"experts": experts, "case": "switchmoe"}
        make = lambda settings=settings, batch=batch: bench_step.compiled_step(settings, batch)  # noqa: E731
        yield _speed(
            measured(row, make, sizes.repeats),
            sizes,
            flops.train_flops(settings, bench_step.stack_lengths(sizes.lengths)),
            peak,
        )


def transformers(sizes: Sizes, until: float) -> Iterator[Row]:
    """The same of Hugging Face's model, in torch."""
    peak = flops.matmul_peak(sizes.dtype)
    experts = sizes.step_experts[0]
    row = {"experts": experts, "case": "Hugging Face"}
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            yield row | {"error": f"{package} is not installed"}
            return
    work = flops.train_flops(_settings(sizes, experts), bench_step.stack_lengths(sizes.lengths))
    make = lambda: bench_step.hugging_face(experts, sizes, sizes.heads)["Hugging Face"]  # noqa: E731
    yield _speed(measured(row, make, max(3, sizes.repeats // 2)), sizes, work, peak)


def _speed(row: Row, sizes: Sizes, work: float, peak: float) -> Row:
    if "error" not in row:
        second = row["median_ms"] / 1e3
        row["tokens_per_second"] = sizes.batch * sum(sizes.lengths) / second
        row["model_flops"], row["peak_share"] = work, work / second / peak
    return row | {"matmul_peak_flops": peak}


def _settings(sizes: Sizes, experts: int) -> Any:
    model = dict(
        d_model=sizes.d_model, d_ff=sizes.d_ff, d_kv=sizes.d_model // sizes.heads, num_heads=sizes.heads,
        num_layers=sizes.layers, activation="relu", dtype=sizes.dtype,
    )  # fmt: skip
    moe = dict(num_experts=experts, jitter=0.0, z_loss_weight=0.0, group_size=8192)
    data = dict(batch_size=sizes.batch, input_length=sizes.lengths[0], vocab_size=sizes.vocab - 128)
    return from_config(dict(model=model, moe=moe, data=data, train=dict(seed=sizes.seed)))


def runs(sizes: Sizes, until: float) -> Iterator[Row]:
    """`configs/sweeps/experts_small.py`, shortened to the time that is left: dense, and with experts."""
    needed = ("grain", "tensorflow_datasets", "array_record", "ml_collections", "sentencepiece")
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    for index, experts in enumerate(sizes.run_experts):
        row = {"experts": experts, "case": "run"}
        if missing:
            yield row | {"error": f"not installed: {', '.join(missing)}"}
            continue
        left = (until - time.monotonic()) / (len(sizes.run_experts) - index)
        if left < 20:
            return
        yield row | _run(sizes, experts, left)


def _run(sizes: Sizes, experts: int, seconds: float) -> Row:
    from switchmoe.runs.reporting import read_metrics

    tiny = sizes == TINY
    steps = 2 if tiny else max(20, min(640, int((seconds - 50) / 0.3) // 20 * 20))
    with tempfile.TemporaryDirectory() as directory:
        workdir = Path(directory) / "run"
        arguments = [
            *RUN, *(RUN_TINY if tiny else []), f"--config.moe.num_experts={experts}",
            f"--config.train.num_steps={steps}", f"--config.train.log_every={max(1, steps // 10)}",
            f"--config.train.eval_every={steps}", f"--config.checkpoint.every={steps}", f"--workdir={workdir}",
            f"--config.optimizer.warmup_steps={max(1, steps // 8)}",
        ]  # fmt: skip
        try:
            done = subprocess.run(
                [sys.executable, "-m", "experiments.run", *arguments],
                capture_output=True,
                text=True,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            return {"steps": steps, "error": f"not done after {seconds:.0f} s"}
        if done.returncode:
            return {"steps": steps, "error": (done.stderr.strip().splitlines() or ["it said nothing"])[-1]}
        records = read_metrics(workdir / "metrics.jsonl")
    held_out = [r for r in records if r["split"] == "validation"][-1]
    train = [r for r in records if r["split"] == "train"][1:] or records[:1]
    middle = train[len(train) // 2]
    return {
        "steps": steps,
        "cross_entropy": held_out["cross_entropy"],
        "tokens_per_second": middle["tokens_per_second"],
        "median_ms": 1e3 * middle["step_seconds"],
        "peak_share": middle["peak_share"],
        "input_wait_share": middle["input_wait_share"],
        "dropped": held_out.get("layer_fraction_dropped"),
    }


PARTS = {  # name: (the part, its share of the budget)
    "layer": (layer, 0.35),
    "gradients": (gradients, 0.15),
    "step": (step, 0.2),
    "transformers": (transformers, 0.1),
    "runs": (runs, 1.0),
}
