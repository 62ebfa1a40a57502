"""Measures a GPU or TPU within a budget: ``python -m experiments.bench accelerator [--budget=480] [--out=DIR] [--tiny]``

The most telling first, each part in a process of its own, which is ended when its time is over, and written as
soon as it is measured:

  layer         forward + backward of the MoE layer in bfloat16 (d 768, ff 3072, 32k tokens, E = 64, 8, 128), each
                back end, with tokamax's kernels where they are installed; ratio to a dense layer, share of peak
  gradients     of all back ends with experts that no token goes to, against a float32 loop over experts
  step          the training step of Switch-Base's shape, E = 8 and 64: tokens/s, share of peak (MFU)
  attention     softmax attention, forward + backward, plain, head by head, and by cuDNN on a GPU
  generate      cached generation of `experiments.bench generate`'s shape: tokens/s, share of the memory's bandwidth
  transformers  Hugging Face's step of that shape, E = 8, where torch and transformers are installed
  runs          `configs/sweeps/experts_small.py`, E = 1, 8 and 64, shortened to what is left

Writes results.json, table.md and layer.png into DIR/DEVICE (default: experiments/results/accelerator). Until `runs`
nothing is needed but JAX, Flax, Optax and Matplotlib. ``--tiny`` is the same code on shapes that a CPU is done with
in minutes; ``--only=PART`` leaves out the others.

Exit codes: 0 done (a part that failed says so in the table); 2 bad input; 4 a file that can't be written.
"""

import argparse
import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments import exits
from experiments.bench import tools

NAMES = ("layer", "gradients", "step", "attention", "generate", "transformers", "runs")
RESERVE = 5.0  # seconds for the last picture and table


def main(argv: list[str]) -> int:
    options = _parse(argv)
    if options.child:
        return _child(options)
    return exits.guarded("experiments.bench", lambda: _measure(options, argv))


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = tools.Parser(
        "experiments.bench accelerator", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--budget", type=tools.at_least(30), default=480, help="seconds (480)")
    parser.add_argument("--out", type=Path, default=Path("experiments/results/accelerator"))
    parser.add_argument("--tiny", action="store_true", help="shapes for a CPU")
    parser.add_argument("--only", choices=NAMES)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"argument --out: {options.out}: accepted is a directory")
    return options


def _parts() -> dict[str, tuple]:
    """Name: (the part, its share of the budget)."""
    from experiments.bench import accelerator_decoding, accelerator_parts

    return accelerator_decoding.PARTS | accelerator_parts.PARTS


def _child(options: argparse.Namespace) -> int:
    """Measures one part, a line of JSON a row; one line is the machine: the first, but for `runs` the last."""
    from experiments.bench import accelerator_parts as parts

    until = time.monotonic() + options.budget
    sizes = parts.TINY if options.tiny else parts.Sizes()

    def machine() -> Iterator[dict[str, Any]]:
        yield {"machine": tools.machine(), "sizes": dataclasses.asdict(sizes)}

    rows = _parts()[options.only][0](sizes, until)
    # `runs` leaves the device to its own processes until they are done.
    for row in itertools.chain(*((rows, machine()) if options.only == "runs" else (machine(), rows))):
        print(json.dumps(row), flush=True)
    return 0


def _measure(options: argparse.Namespace, argv: list[str]) -> int:
    began, parts = time.monotonic(), _parts()
    found: dict[str, Any] = tools.origin(["accelerator", *argv]) | {
        "parts": {},
        "seconds": {},
        "notes": {},
    }
    for name in [options.only] if options.only else NAMES:
        left = options.budget - RESERVE - (time.monotonic() - began)
        share = left if options.only else min(left, parts[name][1] * options.budget)
        if share < RESERVE:
            found["notes"][name] = "not reached: the budget was used up"
            continue
        started = time.monotonic()
        _part(name, share, options, found)
        found["seconds"][name] = round(time.monotonic() - started, 1)
        _write(options.out, found)
    directory = _write(options.out, found)
    files = [name for name in ("results.json", "table.md", "layer.png") if (directory / name).exists()]
    print(f"{directory}: {', '.join(files)} ({time.monotonic() - began:.0f} s)")
    return 0


def _part(name: str, seconds: float, options: argparse.Namespace, found: dict[str, Any]) -> None:
    """Has a process measure the part; what it has said when its time is over counts."""
    command = [sys.executable, "-m", "experiments.bench", "accelerator", f"--only={name}", "--child"]
    command += [f"--budget={max(30, int(seconds))}", *(["--tiny"] if options.tiny else [])]
    # Its memory is its own: torch and JAX, or one process after the other, share the device.
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ
    if options.tiny:  # nearly all of its time is compilation
        flags = os.environ.get("XLA_FLAGS", "")
        environment["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0".strip()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        found["notes"][name] = f"ended after its {seconds:.0f} s; what is missing was not reached"
    rows = []
    for line in out.splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # a library's own word, or a line cut short
            continue
        if "machine" in row:
            found |= row
        elif isinstance(row, dict):
            rows.append(row)
            print(f"{name}: {_line(row)}", flush=True)
    found["parts"][name] = rows
    if process.returncode and name not in found["notes"]:  # else it was ended here
        last = (err.strip().splitlines() or ["it said nothing"])[-1]
        by = f" by {signal.Signals(-process.returncode).name}" if process.returncode < 0 else ""
        found["notes"][name] = f"failed{by}: {last[:300]}"
        print(f"{name}: {found['notes'][name]}", flush=True)


def _line(row: dict[str, Any]) -> str:
    return "  ".join(f"{name} {_shown(value)}" for name, value in row.items() if name not in HIDDEN)


HIDDEN = ("quartile_1_ms", "quartile_3_ms", "matmul_peak_flops", "model_flops", "temporary_bytes", "dropped")
SHARES = ("peak_share", "input_wait_share", "bandwidth_share")


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (str, list)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}"


def _write(out: Path, found: dict[str, Any]) -> Path:
    """results.json, table.md and layer.png, each whole or not at all."""
    kind = found.get("machine", {}).get("device", "unknown").partition(": ")[2] or "unknown"
    directory = out / re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in (("results.json", json.dumps(found, indent=1) + "\n"), ("table.md", table(found))):
        temporary = directory / f"{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(directory / name)
    rows = [row for row in found["parts"].get("layer", []) if "error" not in row]
    if rows:
        picture(rows).savefig(directory / "layer.png", dpi=130)
    return directory


def table(found: dict[str, Any]) -> str:
    """The results as Markdown, a table a part."""
    machine = found.get("machine", {})
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    lines = [f"# {machine.get('device', 'unknown device')}", "", f"`{found['command']}`", "", versions, ""]
    if "sizes" in found:
        sizes = ", ".join(f"{name} {value}" for name, value in found["sizes"].items())
        lines += [f"Sizes: {sizes}.", ""]
    for name in NAMES:
        rows, note = found["parts"].get(name, []), found["notes"].get(name)
        if not rows and not note:
            continue
        seconds = found["seconds"].get(name)
        lines += [f"## {name}" + (f" ({seconds:.0f} s)" if seconds else ""), ""]
        lines += [note, ""] if note else []
        heads = [head for head in dict.fromkeys(key for row in rows for key in row) if head not in HIDDEN]
        if rows:
            lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
            for row in rows:
                cells = (
                    f"{row[head]:.1%}"
                    if head in SHARES and row.get(head) is not None
                    else _shown(row.get(head))
                    for head in heads
                )
                lines.append(f"| {' | '.join(cells)} |")
            lines.append("")
    return "\n".join(lines)


def picture(rows: list[dict[str, Any]]) -> Any:
    """Time of the layer by experts, a line a back end, the dense layer's as a dashed one."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, ScalarFormatter

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    cases = dict.fromkeys(row["case"] for row in rows if row["case"] != "dense")
    for case, colour in zip(cases, tools.COLOURS, strict=False):
        mine = sorted((row["experts"], row["median_ms"]) for row in rows if row["case"] == case)
        axes.plot(*zip(*mine, strict=True), "o-", color=colour, label=case, markersize=4)
    for row in rows:
        if row["case"] == "dense":
            axes.axhline(row["median_ms"], color="#666666", linestyle="--", label="dense")
    experts = sorted({row["experts"] for row in rows if row["case"] != "dense"})
    axes.set(xscale="log", yscale="log", xlabel="experts", title="MoE layer, forward + backward, ms")
    axes.set_xticks(experts, [str(e) for e in experts])
    axes.xaxis.set_minor_locator(NullLocator())
    for setter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        setter(ScalarFormatter())  # within a decade there may be one power of ten, or none
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    return figure
