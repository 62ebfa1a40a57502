"""Measures the MoE layer and the training step: ``python -m experiments.bench [layer|step|generate|trace|serving|offload|accelerator] [--OPTION=VALUE ...]``

``layer``: forward, and forward + backward, of each back end against a dense feed-forward with the same
FLOPs per token and, with transformers and torch installed (extra `hf`), Hugging Face's Switch layer.
``step``: the whole training step in tokens/s, against Hugging Face's model of the same shape, with its
budget by part. Random data, one process, interleaved repeats, medians of the ratios within rounds. Writes
NAME.json and NAME.png into --out and prints a table.
``generate``: 64 new tokens after prompts of 64, width 512, 6 + 6 layers, 32,128 rows, one prompt and 16 at once, float32
and bfloat16, against Hugging Face's model with the same weights; with more --experts ours alone.
``trace``: a routing trace of a run's text, against evaluating the run on the same batches (see its --help).
``serving``: a server of a run, against batch 1 and a plain loop; or for a while with clients of all kinds (see its --help).
``offload``: experts on disk under a memory limit, by predictor, form and way of reading (see its --help).
``accelerator``: all that is to be known of a GPU or TPU, within ``--budget=480`` seconds (see its --help).

Exit codes: 0 done; 2 bad input; 4 --out can't be written.
"""

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

from experiments import exits, process
from experiments.bench import tools
from switchmoe.analysis import timing
from switchmoe.planning import flops


def _list_of(convert):
    return lambda text: [convert(part) for part in text.split(",")]


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = tools.Parser(
        "experiments.bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    positive = tools.at_least(1)
    parser.add_argument("what", nargs="?", choices=("layer", "step", "generate"), default="layer")
    parser.add_argument(
        "--experts", type=_list_of(tools.at_least(2)), help="layer: 2,8,...,512; others: 8,64"
    )
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
    parser.add_argument("--repeats", type=tools.at_least(3), default=9)
    parser.add_argument("--seed", type=tools.at_least(0), default=0)
    parser.add_argument("--hf", choices=("auto", "no"), default="auto")
    parser.add_argument("--tiny", action="store_true", help="generate: a small model, to see that it runs")
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
    read = _bench(options.what).OPTIONS
    for name in vars(options):
        if name not in (*read, "out") and any(a.split("=")[0] == f"--{name}" for a in argv):
            accepted = ", ".join(f"--{one}" for one in read[1:])
            parser.error(
                f"argument --{name}: {options.what} does not read it; accepted are {accepted}, --out"
            )
    layer = options.what == "layer"
    options.experts = options.experts or ([2, 8, 32, 64, 128, 256, 512] if layer else [8, 64])
    for experts in options.experts:
        if layer and experts > options.tokens:
            parser.error(f"argument --experts: {experts}: accepted is at most --tokens={options.tokens}")
    return options


def _bench(what: str) -> Any:
    return importlib.import_module(f"experiments.bench.{what}")


def main(argv: list[str]) -> int:
    if argv[:1] == ["accelerator"]:
        from experiments.bench import accelerator

        return accelerator.main(argv[1:])
    if argv[:1] == ["offload"]:
        from experiments.bench import offload

        return offload.main(argv)
    if argv[:1] == ["serving"]:
        from experiments.bench import serving

        return serving.main(argv)
    if argv[:1] == ["trace"]:
        from experiments.bench import tracing

        return tracing.main(argv)
    options = _parse(argv)
    process.keep_memory()
    return exits.guarded("experiments.bench", lambda: _measured(options, argv))


def _measured(options: argparse.Namespace, argv: list[str]) -> int:
    process.check_devices()
    options.out.mkdir(parents=True, exist_ok=True)  # before hours of measuring
    bench = _bench(options.what)
    settings = {name: value for name, value in vars(options).items() if name in bench.OPTIONS}
    found = tools.origin(argv) | {
        "options": settings,
        "machine": tools.machine(),
        "matmul_peak_flops": flops.matmul_peak(options.dtype),
        "memory_bandwidth": timing.memory_bandwidth(),
    }
    rows: tools.Rows = []
    print(f"{found['machine']['processor']}, {found['machine']['cores']} cores, {found['machine']['device']}")
    for experts in options.experts:
        new = bench.measure(experts, options, found)
        rows += new
        for row in new:
            print(bench.line(row), flush=True)
    found["rows"] = rows
    path = options.out / f"{options.what}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    picture = bench.plot(found)
    picture.savefig(path.with_suffix(".png"), dpi=160)
    print(f"{path}, {path.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    process.use_huge_pages()
    exits.leave("experiments.bench", lambda argv: main(argv[1:]))
