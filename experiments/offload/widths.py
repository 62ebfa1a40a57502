"""Chooses how many bits each expert may have: ``python -m experiments.offload widths --source=RUN --target=DIR [--OPTION=VALUE ...]``

RUN is a run's directory with experts (its newest step), DIR|STEP or DIR/checkpoints/STEP. Measures the loss on held-out text with each
expert alone at 8, 4 and 2 bits, narrows the experts in the order of what a saved byte costs, and stops where the loss of
them all together would have risen by more than asked. Writes to DIR:

  widths.json             bits of each layer's experts, for experiments.convert --experts_on_disk --widths=FILE
  table.json, table.md    bytes of the experts, held-out loss, tokens a second of `experiments.generate` with all of them at hand (on Linux):
                          as they are, all of 8, 4 or 2 bits, and as chosen
  losses.jsonl            what was measured; the same command goes on after a kill

  --loss=SHARE    by which the loss may rise (0.02, EdgeMoE's)
  --text=TEXT     as data.source (the run's own)
  --batches=N     of held-out text, at least 2; the choice is made on every other one, the table is of the rest (16; 0: all)

Exit codes: 0 done; 2 bad input; 4 a file that can't be written or read.
"""

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import process
from experiments.analyze.routing import Bar
from experiments.offload import reading

PROMPT, TOKENS, ANSWERS, REPEATS = 16, 32, 2, 3  # of a row's tokens a second
DEFAULTS = {"source": "", "target": "", "text": "", "loss": "0.02", "batches": "16"}


def parse(arguments: Sequence[str]) -> dict[str, Any]:
    """The options. Raises ValueError, one line that names the argument, its value and what would be accepted."""
    needed = {"source": "a run with experts", "target": "a directory's name that is free"}
    found: dict[str, Any] = reading.values(arguments, DEFAULTS, needed)
    found["batches"] = reading.whole("batches", found["batches"], 0)
    if found["batches"] == 1:
        raise ValueError("--batches=1: accepted is an integer >= 2, or 0")
    try:
        share = float(found["loss"])
    except ValueError:
        share = -1.0
    if not 0 <= share < math.inf:
        raise ValueError(f"--loss={found['loss']}: accepted is a number >= 0, such as 0.02")
    return found | {"loss": share, "target": Path(found["target"]).expanduser()}


def run(options: dict[str, Any]) -> int:
    process.keep_quiet()
    process.check_devices()
    from switchmoe.inference.offload import widths
    from switchmoe.interop import slim
    from switchmoe.runs import measuring, sensitivity, trained

    model, target, text = trained.find(options["source"]), options["target"], options["text"]
    if (target / "config.json").exists() or target.is_file():
        raise ValueError(f"--target={target}: accepted is a directory that is not a run's own")
    note = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    ruler = measuring.yardstick(model, text, "", {}, options["batches"], target, note)
    chosen_on, judged_on = ruler.held_out[::2], ruler.held_out[1::2]
    if not judged_on:
        raise ValueError(f"--text={text}: one batch of held-out text; accepted are two or more")
    rounded = sensitivity.Rounded(model, ruler)
    target.mkdir(parents=True, exist_ok=True)
    asked = {"source": slim.identity(model), "on": slim.counted_on(model, text, "", {}, options["batches"])}
    losses = Losses(rounded, sensitivity.Kept(target / "losses.jsonl", asked), chosen_on, judged_on)
    bytes_LW = np.array(
        [
            [widths.size(own, bits, groups[bits]) for bits in widths.WIDTHS]
            for own, groups in zip(rounded.kernels, rounded.groups, strict=True)
        ]
    )
    order = widths.moves(losses.alone(), bytes_LW)
    shape = len(rounded.layers), rounded.experts
    limit = losses.of("chosen_on", None) * (1 + options["loss"])
    count = _furthest(len(order), lambda n: losses.of("chosen_on", widths.after(order, n, shape)) <= limit)
    losses.end()
    if count < 0:
        rise = losses.of("chosen_on", widths.after(order, 0, shape)) / losses.of("chosen_on", None) - 1
        raise ValueError(
            f"--loss={options['loss']:g}: all of 8 bits the loss rises by {rise:.2%}; accepted is more"
        )
    bits_LE = widths.after(order, count, shape)
    _table(model, target, rounded, losses, bits_LE, bytes_LW)
    widths.save(target / widths.WIDTHS_FILE, dict(zip(rounded.layers, bits_LE.tolist(), strict=True)))
    print(target / widths.WIDTHS_FILE)
    return 0


class Losses:
    """Measured once each."""

    def __init__(self, rounded: Any, kept: Any, chosen_on: Any, judged_on: Any):
        self._rounded, self._kept = rounded, kept
        self._batches = {"chosen_on": chosen_on, "judged_on": judged_on}
        self._bar = Bar("measuring")

    def of(self, which: str, bits_LE: np.ndarray | None) -> float:
        """Of all experts; None: as they are."""
        name = _named(which, bits_LE)
        if name not in self._kept:
            self._bar.says("the experts together")
            self._kept[name] = self._rounded.loss(
                self._batches[which], dict(enumerate([] if bits_LE is None else bits_LE))
            )
        return self._kept[name]

    def speed(self, name: str, bits_LE: np.ndarray | None, model: Any, target: Path) -> float | None:
        """Tokens a second with the experts on disk of this form; None: not on this machine."""
        import jax

        from switchmoe.inference.offload.memory import available

        if not available() or jax.default_backend() != "cpu":
            return None
        forms: Any = "float32"
        key = _named("speed", bits_LE)
        if key not in self._kept:
            self._bar.says(f"tokens a second of {name}")
            if bits_LE is not None:
                named = [[f"int{bits}" for bits in of] for of in bits_LE.tolist()]
                forms = dict(zip(self._rounded.layers, named, strict=True))
            self._kept[key] = _speed(model, target / "measured", forms)
        return self._kept[key]

    def alone(self) -> np.ndarray:
        """[L, E, W] Of each expert alone."""
        from switchmoe.inference.offload.widths import WIDTHS

        shape = len(self._rounded.layers), self._rounded.experts, len(WIDTHS)
        found, total = np.zeros(shape), math.prod(shape)
        for done, place in enumerate(np.ndindex(*shape)):
            layer, expert, width = place
            name = f"{self._rounded.layers[layer]} {expert} {WIDTHS[width]}"
            if name not in self._kept:
                filled = round(Bar.WIDTH * done / total)
                self._bar.says(
                    f"[{'#' * filled}{'.' * (Bar.WIDTH - filled)}] {done:,} of {total:,} losses of an expert alone"
                )
                bits_E = np.zeros(shape[1], int)
                bits_E[expert] = WIDTHS[width]
                self._kept[name] = self._rounded.loss(self._batches["chosen_on"], {layer: bits_E})
            found[place] = self._kept[name]
        return found

    def end(self) -> None:
        self._bar.end()


def _named(what: str, bits_LE: np.ndarray | None) -> str:
    return f"{what} " + ("float" if bits_LE is None else " ".join("".join(map(str, of)) for of in bits_LE))


def _speed(model: Any, where: Path, forms: Any) -> float:
    """Of one answer at a time, the median of some rounds, with a budget that holds all. ``where`` is there as long as it takes."""
    import contextlib
    import shutil
    import statistics
    import time

    from experiments import expert_memory
    from switchmoe.inference.decoding import Choosing
    from switchmoe.inference.generation import Generator
    from switchmoe.interop import expert_store
    from switchmoe.runs import trained

    quiet, seconds = lambda _: contextlib.nullcontext(), []  # noqa: E731
    if where.exists():
        shutil.rmtree(where)  # of one that was killed, perhaps of another form
    expert_store.into_run(model, where, forms, quiet)
    own = trained.find(str(where))
    budget = sum(file.stat().st_size for file in where.glob("experts/*/*"))
    settings, params, pager = expert_memory.opened(
        own, own.settings, *expert_memory.checked({"expert_memory": str(budget)}), lambda _: None
    )
    how = Choosing(temperature=1.0, stop_ids=())
    generator = Generator(settings, params, TOKENS, how, batch_size=1, check=pager.check)
    shape = ANSWERS, PROMPT
    prompts = np.random.default_rng(0).integers(2, settings.data.vocab_size, shape).tolist()
    for _ in range(1 + REPEATS):  # the first one compiles, and reads what the others use
        began = time.perf_counter()
        generator(prompts)
        seconds.append(time.perf_counter() - began)
    pager.close()
    shutil.rmtree(where)
    return ANSWERS * TOKENS / statistics.median(seconds[1:])


def _furthest(most: int, within: Callable[[int], bool]) -> int:
    """The largest of 0 .. most that is within, where all before it are; -1: none."""
    low, high = -1, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if within(middle) else (low, middle)
    return low


def _table(
    model: Any, target: Path, rounded: Any, losses: Losses, bits_LE: np.ndarray, bytes_LW: np.ndarray
) -> None:
    import json

    from experiments.bench import tools
    from switchmoe.analysis import report
    from switchmoe.inference.offload.widths import WIDTHS

    own = losses.of("judged_on", None)
    floats = (
        4 * rounded.experts * sum(rows * columns for kernels in rounded.kernels for rows, columns in kernels)
    )
    rows: list[dict[str, Any]] = [{"experts": "float32", "bytes": floats, "loss": own, "rise": 0.0}]
    rows[0]["tokens_per_second"] = losses.speed("float32", None, model, target)
    choices = {f"int{bits}": np.full_like(bits_LE, bits) for bits in WIDTHS} | {"chosen": bits_LE}
    for name, bits in choices.items():
        held = sum(int(bytes_LW[layer, WIDTHS.index(one)]) for layer, of in enumerate(bits) for one in of)
        loss = losses.of("judged_on", bits)
        rows.append({"experts": name, "bytes": held, "loss": loss, "rise": loss / own - 1})
        rows[-1]["tokens_per_second"] = losses.speed(name, bits, model, target)
    losses.end()
    shares = {f"share_of_{bits}_bits": float((bits_LE == bits).mean()) for bits in WIDTHS}
    report.write_whole(
        target / "table.json",
        json.dumps(shares | {"rows": rows, "machine": tools.machine()}, indent=1) + "\n",
    )
    lines = [["experts", "bytes", "held-out loss", "rise", "tokens/s"], ["---"] * 5]
    for row in rows:
        speed = row["tokens_per_second"]
        cells = f"{row['bytes']:,}", f"{row['loss']:.4f}", f"{row['rise']:.2%}"
        lines.append([row["experts"], *cells, "" if speed is None else f"{speed:.1f}"])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    report.write_whole(target / "table.md", text + "\n")
    print(text)
    print(
        ", ".join(
            f"{share:.0%} {name.removeprefix('share_of_').replace('_', ' ')}"
            for name, share in shares.items()
        )
    )
