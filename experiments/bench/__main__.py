"""Measures the MoE layer and the training step: ``python -m experiments.bench [layer|step] [--OPTION=VALUE ...]``

``layer``: forward, and forward + backward, of each back end against a dense feed-forward with the same
FLOPs per token and, with transformers and torch installed (extra `hf`), Hugging Face's Switch layer.
``step``: the whole training step in tokens/s, against Hugging Face's model of the same shape, with its
budget by part. Random data, one process, interleaved repeats, medians of the ratios within rounds. Writes
NAME.json and NAME.png into --out and prints a table.

Exit codes: 0 done; 2 bad input.
"""

import argparse
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any, NoReturn

import jax

from experiments import exits, process
from switchmoe import flops
from switchmoe.analysis import timing

Rows = list[dict[str, Any]]
COLOURS = (
    "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#F0E442", "#CC79A7", "#8c6d31", "#999999", "#333333",
)  # fmt: skip
VERSIONS_OF = ("jax", "jaxlib", "flax", "torch", "transformers")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"experiments.bench: {message}; see --help\n")


def _at_least(least: int):
    def convert(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value}: accepted is an integer >= {least}")
        return value

    return convert


def _list_of(convert):
    return lambda text: [convert(part) for part in text.split(",")]


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser("experiments.bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    positive = _at_least(1)
    parser.add_argument("what", nargs="?", choices=("layer", "step"), default="layer")
    parser.add_argument("--experts", type=_list_of(_at_least(2)), help="layer: 2,8,...,512; step: 8,64")
    parser.add_argument(
        "--dispatch", type=lambda text: text.split(","), default=["einsum", "gather", "ragged"]
    )
    parser.add_argument("--tokens", type=positive, default=4096, help="layer: tokens, one group (4096)")
    parser.add_argument("--d_model", type=positive, default=256)
    parser.add_argument("--d_ff", type=positive, default=1024)
    parser.add_argument("--factor", type=float, default=1.25, help="capacity factor (1.25)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--layers", type=positive, default=4, help="step: per stack (4)")
    parser.add_argument("--vocab", type=positive, default=8192, help="step: vocabulary rows (8192)")
    parser.add_argument("--batch", type=positive, default=16, help="step: sequences (16)")
    parser.add_argument("--lengths", type=_list_of(positive), default=[256, 64], help="step: 256,64")
    parser.add_argument("--repeats", type=_at_least(3), default=9)
    parser.add_argument("--seed", type=_at_least(0), default=0)
    parser.add_argument("--hf", choices=("auto", "no"), default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args(argv)
    known = ("einsum", "gather", "ragged")
    for name in options.dispatch:
        if name not in known:
            parser.error(f"argument --dispatch: {name}: accepted are {', '.join(known)}")
    if not options.factor > 0:
        parser.error(f"argument --factor: {options.factor}: accepted is a number > 0")
    if len(options.lengths) != 2:
        parser.error("argument --lengths: accepted are two integers, of the encoder and the decoder")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"argument --out: {options.out}: accepted is a directory")
    layer = options.what == "layer"
    options.experts = options.experts or ([2, 8, 32, 64, 128, 256, 512] if layer else [8, 64])
    for experts in options.experts:
        if layer and experts > options.tokens:
            parser.error(f"argument --experts: {experts}: accepted is at most --tokens={options.tokens}")
    return options


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    versions = {}
    for name in VERSIONS_OF:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    return {
        "device": f"{device.platform}: {device.device_kind}",
        "processor": _processor(),
        "cores": len(_affinity()),
        "python": platform.python_version(),
        "versions": versions,
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _affinity() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def torch_cases(make, *arguments: Any) -> dict[str, timing.Case]:
    """Hugging Face's cases, or none where torch and transformers aren't installed."""
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError:
        return {}
    torch.set_num_threads(len(_affinity()))
    return make(*arguments)


def main(argv: list[str]) -> int:
    options = _parse(argv)
    process.keep_memory()
    try:
        process.check_devices()
    except ValueError as error:
        return exits.fail("experiments.bench", error, exits.EXIT_BAD_INPUT)
    from experiments import bench_layer, bench_step

    bench = bench_layer if options.what == "layer" else bench_step
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    found = {
        "command": " ".join(["python -m experiments.bench", *(a for a in argv if not a.startswith("--out"))]),
        "options": settings,
        "machine": machine(),
        "matmul_peak_flops": flops.matmul_peak(options.dtype),
        "memory_bandwidth": timing.memory_bandwidth(),
    }
    rows: Rows = []
    print(f"{found['machine']['processor']}, {found['machine']['cores']} cores, {found['machine']['device']}")
    for experts in options.experts:
        new = bench.measure(experts, options, found)
        rows += new
        for row in new:
            print(bench.line(row), flush=True)
    found["rows"] = rows
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.what}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    picture = bench.plot(found)
    picture.savefig(path.with_suffix(".png"), dpi=160)
    print(f"{path}, {path.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    process.use_huge_pages()
    exits.leave("experiments.bench", lambda argv: main(argv[1:]))
