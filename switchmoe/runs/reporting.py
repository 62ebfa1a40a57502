"""What a run tells while it goes: a progress line, `metrics.jsonl` and TensorBoard files.

A record is one JSON object: `step` (int), `split` (`train` or `validation`), figures, and lists with
a value per sparse layer, in the order of `layers`.
"""

import contextlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

Record = dict[str, Any]

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIR = "tensorboard"


def read_metrics(path: str | os.PathLike) -> list[Record]:
    """The records of a `metrics.jsonl`, without the torn last line that a killed run may leave.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: any other line is not a record; names file and line.
    """
    return [record for _, record in _read_lines(Path(path))]


class MetricsWriter:
    """Appends records to a run's `metrics.jsonl` and `tensorboard/`, each of them on disk at once.

    With `resume_step` the records of later steps, written before the run was stopped, are dropped
    first (in one atomic replacement), so that the file of a stopped and resumed run reads like that
    of an uninterrupted one; TensorBoard is told to forget the same steps. A run that starts anew in a
    used directory passes -1, which drops all; None drops nothing but a torn last line.

    Raises:
      ValueError: the file that is there holds a line that is not a record.
      OSError: the disk is full, or the directory cannot be written.
    """

    def __init__(self, workdir: str | os.PathLike, resume_step: int | None = None):
        from switchmoe.runs.events import Events  # here, as it loads much

        directory = Path(workdir)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / METRICS_FILE
        if path.exists():
            _drop_after(path, math.inf if resume_step is None else resume_step)
        self._file = path.open("a", encoding="utf-8")
        self._events = Events(directory / TENSORBOARD_DIR, resume_step)

    def write(self, record: Record) -> None:
        """Writes one record; a NaN or an infinity becomes null, and is left out of TensorBoard."""
        record = _plain(record)
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        self._events.write(record["step"], scalars(record))

    def close(self) -> None:
        self._file.close()
        self._events.close()


def scalars(record: Record) -> dict[str, float]:
    """TensorBoard tags and values of a record, e.g. `train/encoder_1/fraction_dropped`.

    The load of a layer's experts becomes `load_min` and `load_max`, as multiples of the fair share 1/E.
    """
    split, found = record["split"], {}
    for key, value in record.items():
        if not key.startswith("layer_"):
            found[f"{split}/{key}"] = None if key == "step" else value
            continue
        for layer, figure in zip(record["layers"], value, strict=True):
            prefix = f"{split}/{layer.replace('/', '_')}"
            if key != "layer_expert_load":
                found[f"{prefix}/{key.removeprefix('layer_')}"] = figure
            elif all(map(_is_number, figure)):
                found[f"{prefix}/load_min"] = min(figure) * len(figure)
                found[f"{prefix}/load_max"] = max(figure) * len(figure)
    return {tag: value for tag, value in found.items() if _is_number(value)}


class Progress:
    """On a terminal one live line, rewritten in place; otherwise a plain line per record.

    The ETA goes by the steps seen since the first record, so it holds for resumed runs and leaves
    compilation out, but counts evaluations and checkpoints.

    Args:
      num_steps: the step at which the run ends.
      stream: where to print; None is standard error.
      clock: seconds, for tests.
    """

    def __init__(
        self, num_steps: int, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ):
        self._num_steps = num_steps
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._is_live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._line = ""
        self._first: tuple[int, float] | None = None  # step and time of the first training record

    def update(self, record: Record) -> None:
        """Shows a training record on the live line, or prints a validation record as a line of its own.

        Those of a mixture's parts, such as `validation/de`, are in the report.
        """
        if "/" in record["split"]:
            return
        if record["split"] != "train":
            self.note("  ".join(_fields(record, self._num_steps)))
            return
        fields = _fields(record, self._num_steps)
        seconds = self._seconds_left(record)
        if seconds is not None:
            fields.append(f"ETA {duration(seconds)}")
        if not self._is_live:
            self._print("  ".join(fields) + "\n")
            return
        blank = self._blank()
        self._line = fit(fields, _columns(self._stream) - 1)
        self._print(blank + self._line)

    def note(self, text: str) -> None:
        """Prints text on lines of its own; a live line goes on below it."""
        self._print(f"{self._blank()}{text}\n{self._line}")

    def close(self) -> None:
        """Leaves the live line where it is and ends it."""
        if self._line:
            self._line = ""
            self._print("\n")

    def _seconds_left(self, record: Record) -> float | None:
        step, now = record["step"], self._clock()
        if self._first is None:
            self._first = step, now
        first_step, first_time = self._first
        if step > first_step:
            seconds_per_step = (now - first_time) / (step - first_step)
        else:
            seconds_per_step = record.get("step_seconds")
        return (self._num_steps - step) * seconds_per_step if _is_number(seconds_per_step) else None

    def _blank(self) -> str:
        return f"\r{' ' * len(self._line)}\r" if self._line else ""

    def _print(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def fit(fields: list[str], width: int) -> str:
    """Joins fields to at most `width` characters: the first and the last stay longest."""
    fields = list(fields)
    while len(fields) > 2 and len("  ".join(fields)) > width:
        del fields[-2]
    return "  ".join(fields)[: max(width, 0)]


def duration(seconds: float) -> str:
    """Two leading units: `45s`, `3m20s`, `2h05m`, `3d04h`; `?` for what is not finite."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


def _fields(record: Record, num_steps: int) -> list[str]:
    fields = [f"step {record['step']}/{num_steps}"]
    validation = "" if record["split"] == "train" else f"{record['split']} "
    if "cross_entropy" in record:
        fields.append(f"{validation}loss {figure(record['cross_entropy'], '.3f')}")
    if validation and "perplexity" in record:
        fields.append(f"perplexity {figure(record['perplexity'], ',.1f')}")
    if "tokens_per_second" in record:
        fields.append(f"{figure(record['tokens_per_second'], ',.0f')} tokens/s")
    fields += [f"{name} {figure(record[name], '.1f')}" for name in record if "/" in name and validation]
    dropped = [value for value in record.get("layer_fraction_dropped", []) if _is_number(value)]
    if dropped:
        fields.append(f"dropped {sum(dropped) / len(dropped):.1%}")
    return fields


def figure(value: Any, spec: str) -> str:
    """A number of a record, in which None stands for one that is not finite."""
    return format(float(value), spec) if value is not None else "nan"


def _columns(stream: TextIO) -> int:
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError, AttributeError):
        columns = 0
    return columns or shutil.get_terminal_size().columns


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _plain(value: Any) -> Any:
    """Python's own numbers, lists and dicts for those of NumPy and JAX; None for what is not finite."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read_lines(path: Path) -> list[tuple[bytes, Record]]:
    *lines, rest = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is None:
            raise ValueError(
                f"{path}, line {number}: not a JSON object with a step and a split: {line[:60]!r}"
            )
        found.append((line, record))
    last = _parse(rest)
    return found if last is None else [*found, (rest, last)]


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(
            line, parse_constant=lambda _: None
        )  # NaN and infinities, which other tools write
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    return record if isinstance(record.get("split"), str) else None


def _drop_after(path: Path, last_step: float) -> None:
    kept = b"".join(line + b"\n" for line, record in _read_lines(path) if record["step"] <= last_step)
    if kept != path.read_bytes():
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            file.write(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


class Clock:
    """Seconds and real tokens a step, and seconds of waiting for input, without evaluations and checkpoints."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._steps, self._tokens, self._waited = 0, 0, 0.0
        self._paused: float | None = None
        self._total = {"steps_timed": 0, "train_seconds": 0.0, "input_wait_seconds": 0.0}
        self._told = dict(self._total)

    def _now(self) -> float:
        return time.monotonic() if self._paused is None else self._paused

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._waited += time.monotonic() - started

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self._paused = started = time.monotonic()
        yield
        self._start, self._paused = self._start + time.monotonic() - started, None

    def step(self, tokens: int) -> None:
        self._steps += 1
        self._tokens += tokens

    def lap(self) -> tuple[float, float, float]:
        """(seconds, seconds waited, tokens) a step since the last lap."""
        seconds, steps, waited = self._now() - self._start, max(self._steps, 1), self._waited
        seconds = max(seconds, 1e-9)  # of a clock that did not move
        tokens = self._tokens
        self._total["steps_timed"] += self._steps
        self._total["train_seconds"] += seconds
        self._total["input_wait_seconds"] += waited
        self._start, self._steps, self._tokens, self._waited = self._now(), 0, 0, 0.0
        return seconds / steps, waited / steps, tokens / steps

    def news(self) -> dict[str, float]:
        """Totals since the last call, those of the lap under way among them."""
        found = dict(self._total)
        if self._steps:
            found["steps_timed"] += self._steps
            found["train_seconds"] += self._now() - self._start
            found["input_wait_seconds"] += self._waited
        news = {name: value - self._told[name] for name, value in found.items()}
        self._told = found
        return news
