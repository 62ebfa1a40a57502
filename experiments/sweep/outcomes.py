"""What a sweep's runs have come to: their states, read from their directories, as a table and as a CSV."""

import csv
import io
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from experiments.sweep.study import Cost, Run, Sweep
from switchmoe.runs import buckets, reporting
from switchmoe.runs.buckets import CHECKPOINTS
from switchmoe.runs.rundir import REPORT_FILE, last_step, read_run

RESULTS_FILE = "results.csv"


def result(directory: Path, run: Run, cost: Cost) -> dict[str, Any]:
    """What a run's directory says of it, None for what it does not (yet).

    ``state`` is waiting (nothing there), unfinished or done. Cross-entropies and the load (smallest and
    largest of all layers' experts, in multiples of the fair share) are held-out; ``dropped`` is the mean
    over layers in the last training step that was logged, ``heldout_dropped`` in the last evaluation.
    ``seconds`` are of training steps alone, ``tokens`` without padding.
    """
    path = directory / reporting.METRICS_FILE
    records = reporting.read_metrics(path) if path.exists() else []
    known = read_run(directory)
    train = [r for r in records if r["split"] == "train"]
    held_out = [r for r in records if r["split"] == "validation"]
    steps = last_step(run.settings, known)
    ended = bool(held_out) and held_out[-1]["step"] == steps and (directory / REPORT_FILE).exists()
    # A report without the last checkpoint is of a run whose last save failed, but where all checkpoints were removed.
    ended = ended and max(buckets.complete_steps(directory / CHECKPOINTS), default=steps) == steps
    losses = [r["cross_entropy"] for r in held_out if r["cross_entropy"] is not None]
    last = held_out[-1] if held_out else {}
    layers = last.get("layer_expert_load", [])
    loads = [[share * len(layer) for share in layer if share is not None] for layer in layers]
    loads = [layer for layer in loads if layer]
    seconds = known.get("train_seconds")
    step = max((r["step"] for r in records), default=0)
    return {
        "run": run.name,
        "state": "done" if ended else "unfinished" if records else "waiting",
        **run.overrides,
        "parameters": cost.parameters,
        "parameters_active": cost.parameters_active,
        "flops": cost.flops * step,
        "cross_entropy": last.get("cross_entropy"),
        "best_cross_entropy": min(losses, default=None),
        "dropped": _mean(train[-1] if train else {}),
        "heldout_dropped": _mean(last),
        "load_min": min(map(min, loads), default=None),
        "load_max": max(map(max, loads), default=None),
        "step": step,
        "tokens": step * cost.tokens,
        "seconds": seconds,
        "tokens_per_second": known["steps_timed"] * cost.tokens / seconds if seconds else None,
        "padded_tokens_per_second": known["steps_timed"] * cost.places / seconds if seconds else None,
    }


def _mean(record: dict[str, Any]) -> float | None:
    layers = [share for share in record.get("layer_fraction_dropped") or () if share is not None]
    return sum(layers) / len(layers) if layers else None


def write(sweep: Sweep, results: Sequence[dict[str, Any]]) -> None:
    """Writes `results.csv`, whole or not at all: a line a run, overrides under the names of their fields."""
    varied = dict.fromkeys(field for run in sweep.runs for field in run.overrides)
    columns = ["run", "state", *varied, *(name for name in results[0] if name not in varied)]
    columns = list(dict.fromkeys(columns))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(results)
    path = sweep.workdir / RESULTS_FILE
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text.getvalue(), encoding="utf-8")
    temporary.replace(path)


def status(directory: Path, run: Run, state: str, live: bool = True) -> str:
    """One line of a run: step, losses, tokens/s, ETA, as far as known; if not ``live``, at its last evaluation."""
    steps = run.settings.train.num_steps
    path = directory / reporting.METRICS_FILE
    records = reporting.read_metrics(path) if path.exists() else []
    while records and not live and records[-1]["split"] == "train":
        del records[-1]
    train = [r for r in records if r["split"] == "train"]
    if not train:
        return state
    last = train[-1]
    fields = [
        f"{state} step {last['step']}/{steps}",
        f"loss {reporting.figure(last['cross_entropy'], '.3f')}",
    ]
    held_out = [r for r in records if r["split"] == "validation"]
    if held_out:
        fields.append(f"held out {reporting.figure(held_out[-1]['cross_entropy'], '.3f')}")
    fields.append(f"{reporting.figure(last['tokens_per_second'], ',.0f')} tokens/s")
    if state == "running" and last["step_seconds"] is not None:
        fields.append(f"ETA {reporting.duration((steps - last['step']) * last['step_seconds'])}")
    return "  ".join(fields)


class Table:
    """The runs' states: rewritten in place on a terminal, else a line for each that changes."""

    def __init__(self, names: Sequence[str], stream: TextIO | None = None):
        self._names, self._stream = names, sys.stdout if stream is None else stream
        self.live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._shown: dict[str, str] = {}
        self._height = 0

    def show(self, states: dict[str, str], current: str) -> None:
        """``states`` by run; where there are more than fit, those around ``current`` are shown."""
        width = max(map(len, self._names))
        if not self.live:
            for name, state in states.items():
                if state != self._shown.get(name) and state != "waiting":
                    self._stream.write(f"{name.ljust(width)}  {state}\n")
            self._shown = dict(states)
            self._stream.flush()
            return
        columns, rows = shutil.get_terminal_size()
        lines = [f"{name.ljust(width)}  {states[name]}"[: columns - 1] for name in self._names]
        first = max(0, min(self._names.index(current) - rows // 2, len(lines) - rows + 1))
        lines = lines[first : first + rows - 1]
        up = f"\x1b[{self._height}A" if self._height else ""
        self._stream.write(up + "".join(f"\r\x1b[2K{line}\n" for line in lines) + "\x1b[J")
        self._stream.flush()
        self._height = len(lines)
