"""The runs of a sweep, read from their directories, and what compares them: groups, spreads, speed-ups.

Letters: T training records, V evaluations of the held-out text, R runs.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from switchmoe.analysis import answers, parts, plots
from switchmoe.analysis.report import STARVED
from switchmoe.parallel import sharding
from switchmoe.planning import memory
from switchmoe.runs.reporting import METRICS_FILE, Record, read_metrics
from switchmoe.runs.resuming import flat
from switchmoe.runs.rundir import last_step, read_run
from switchmoe.settings import Settings, from_config, to_dict

SHAPE = {f"model.{name}" for name in ("d_model", "d_ff", "d_kv", "num_heads", "num_layers")}
# What a comparison at equal settings does not ask about.
SAME = {
    "moe.num_experts",
    "train.seed",
    "train.log_every",
    "train.eval_every",
    "data.prefetch",
    "data.data_dir",
}
SAME_GROUPS = ("mesh.", "checkpoint.")


class Routing(NamedTuple):
    """Over all sparse layers; loads are multiples of the fair share 1/E."""

    dropped_first: float  # share of the choices dropped, mean over the first tenth of training
    dropped_last: float  # and over the last
    dropped_held_out: float  # at the last evaluation
    load_min: float  # over the last tenth
    load_max: float
    starved: float  # share of the experts with less than STARVED


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A run that is done."""

    name: str
    settings: Settings
    parameters: int
    parameters_active: int
    step_V: np.ndarray
    loss_V: np.ndarray  # held-out cross-entropy, nats a target token
    step_T: np.ndarray
    seconds_T: np.ndarray  # of training from the first step to this one, evaluations and checkpoints left out
    step_seconds: float  # median
    routing: Routing | None  # of a dense model
    device: str
    versions: dict[str, str]
    # Of a mixture's parts: step_V and loss_V of each
    parts: Mapping[str, tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict)
    # Of a fine-tuned run the tasks' metrics, 0 to 100, by name, and their mean `score`: steps and values
    scores: Mapping[str, tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict)

    @property
    def experts(self) -> int:
        return self.settings.moe.num_experts

    @property
    def seed(self) -> int:
        return self.settings.train.seed

    @property
    def loss(self) -> float:
        """Held-out loss at the end."""
        return float(self.loss_V[-1])

    @property
    def embeddings(self) -> int:
        model = self.settings.model
        return self.settings.embedding_rows * model.d_model * (1 if model.tie_embeddings else 2)

    def seconds_at(self, step: float | np.ndarray) -> np.ndarray:
        """Seconds of training up to a step, linear between records; NaN where none were recorded."""
        if not len(self.step_T):
            return np.full(np.shape(step), np.nan)
        return np.interp(step, np.append(0, self.step_T), np.append(0, self.seconds_T))


class Sweep(NamedTuple):
    """`runs` that are done, and the directories left out with the reason, one line each."""

    runs: list[Run]
    left_out: dict[str, str]


def read_sweep(directory: Path, skip: Sequence[Path] = ()) -> Sweep:
    """Reads the runs in the directories of a directory; hidden ones and those in ``skip`` are none.

    Raises:
      ValueError: there is no such directory, or no run in it is done.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory; accepted is a sweep's, with runs in it")
    skipped = {path.resolve() for path in skip}
    runs, left_out = [], {}
    for path in sorted(directory.iterdir()):
        if not path.is_dir() or path.name.startswith(".") or path.resolve() in skipped:
            continue
        try:
            runs.append(read(path))
        except (ValueError, OSError) as error:
            left_out[path.name] = str(error)
    if not runs:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:3])
        raise ValueError(f"{directory}: no run in it is done{f' ({reasons})' if reasons else ''}")
    return Sweep(runs, left_out)


def read(directory: Path) -> Run:
    """Reads a run's `config.json`, `run.json` and `metrics.jsonl`.

    Raises:
      ValueError: one of them is missing or damaged, or the run is not done; one line.
    """
    path = directory / "config.json"
    for file in (path, directory / METRICS_FILE):
        if not file.is_file():
            raise ValueError(f"no {file.name}: it failed or stopped before its first step")
    try:
        settings = from_config(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"its config.json is not a run's ({_line(error)})") from error
    known = read_run(directory)
    counts = [known.get(name) for name in ("parameters", "parameters_active")]
    if not all(isinstance(count, int) and count > 0 for count in counts):
        raise ValueError("its run.json does not tell parameters and parameters_active")
    records = read_metrics(directory / METRICS_FILE)
    try:
        series = _series(records)
        _check_done(series["step_V"], series["loss_V"], last_step(settings, known))
        routing = _routing(records) if settings.moe.routed else None
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"its {METRICS_FILE} is not a run's ({type(error).__name__}: {_line(error)})"
        ) from error
    finite = np.isfinite(series["loss_V"])
    series |= {name: series[name][finite] for name in ("step_V", "loss_V")}
    return Run(
        directory.name, settings, *counts, **series, routing=routing,
        device=str(known.get("device", "not recorded")), versions=dict(known.get("versions") or {}),
        parts=_parts(records, series["step_V"][-1]), scores=_scores(records),
    )  # fmt: skip


def _parts(records: Sequence[Record], last: float) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    found = {}
    for part in parts.names(records):
        step_V, loss_V = plots.series(records, parts.PREFIX + part, "cross_entropy")
        finite = np.isfinite(loss_V)
        if step_V[-1] != last or not finite[-1]:
            raise ValueError(f"it has no held-out loss of {part} at step {last:.0f}")
        found[part] = step_V[finite], loss_V[finite]
    return found


def _scores(records: Sequence[Record]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {name: plots.series(records, answers.SPLIT, name) for name in answers.metrics(records)}


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def _series(records: Sequence[Record]) -> dict[str, Any]:
    step_V, loss_V = plots.series(records, "validation", "cross_entropy")
    step_T, seconds_T = plots.series(records, "train", "step_seconds")
    known = np.isfinite(seconds_T)
    step_T, seconds_T = step_T[known], seconds_T[known]
    steps_T = np.diff(step_T, prepend=0)
    median = float(np.median(seconds_T)) if len(seconds_T) else float("nan")
    return {
        "step_V": step_V, "loss_V": loss_V, "step_T": step_T,
        "seconds_T": np.cumsum(steps_T * seconds_T), "step_seconds": median,
    }  # fmt: skip


def _check_done(step_V: np.ndarray, loss_V: np.ndarray, last: int) -> None:
    if not len(step_V):
        raise ValueError("it has no held-out loss: it failed or stopped before its first evaluation")
    if step_V[-1] < last:
        raise ValueError(f"it is not done: the last evaluation is that of step {step_V[-1]:.0f} of {last}")
    if not (np.isfinite(loss_V[-1]) and loss_V[-1] > 0):
        raise ValueError(f"its held-out loss at step {step_V[-1]:.0f} is {loss_V[-1]}, not a number above 0")


def _routing(records: Sequence[Record]) -> Routing:
    _, dropped_TL = plots.layer_series(records, "train", "layer_fraction_dropped")
    _, load_TLE = plots.layer_series(records, "train", "layer_expert_load")
    _, held_out_VL = plots.layer_series(records, "validation", "layer_fraction_dropped")
    load_LE = plots.last_tenth(load_TLE) * load_TLE.shape[-1]
    return Routing(
        dropped_first=float(plots.last_tenth(dropped_TL[::-1]).mean()),
        dropped_last=float(plots.last_tenth(dropped_TL).mean()),
        dropped_held_out=float(held_out_VL[-1].mean()),
        load_min=float(load_LE.min()),
        load_max=float(load_LE.max()),
        starved=float((load_LE < STARVED).mean()),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in experts and seed alone; a dense run belongs to every group with its other settings.

    Groups of one ``family`` differ in the size of the model alone.
    """

    label: str  # the fields in which the groups differ; "" where there is one
    family: str
    size: int  # N of the scaling law: parameters a token uses, without embeddings; of the dense model if there is one
    cells: dict[int, list[Run]]  # by experts, increasing

    @property
    def dense(self) -> list[Run]:
        return self.cells.get(1, [])


def group(runs: Sequence[Run]) -> list[Group]:
    """The groups of a sweep; what a dense model has no use for (`moe.`) does not set dense runs apart."""
    sparse: dict[tuple, list[Run]] = {}
    dense: dict[tuple, list[Run]] = {}
    for run in runs:
        (dense if run.experts == 1 else sparse).setdefault(_key(run), []).append(run)
    used = {_without_routing(key) for key in sparse}
    members = {key: dense.get(_without_routing(key), []) + found for key, found in sparse.items()}
    members |= {key: found for key, found in dense.items() if key not in used}
    fields = [dict(key) for key in members]
    names = sorted({name for key in fields for name in key})
    # A field that a dense group has no use for does not set it apart.
    differ = [name for name in names if len({str(key[name]) for key in fields if name in key}) > 1]
    groups = []
    for key, found in zip(fields, members.values(), strict=True):
        cells = {
            experts: [run for run in found if run.experts == experts]
            for experts in sorted({run.experts for run in found})
        }
        first = next(iter(cells.values()))[0]
        groups.append(
            Group(
                label=_label(key, differ),
                family=_label(key, [name for name in differ if name not in SHAPE]),
                size=first.parameters_active - first.embeddings,
                cells=cells,
            )
        )
    return sorted(groups, key=lambda one: (one.family, one.size, one.label))


def _key(run: Run) -> tuple:
    fields = tuple(
        (name, value)
        for name, value in flat(to_dict(run.settings)).items()
        if name not in SAME and not name.startswith(SAME_GROUPS)
    )
    return _without_routing(fields) if run.experts == 1 else fields


def _without_routing(key: tuple) -> tuple:
    return tuple((name, value) for name, value in key if not name.startswith("moe."))


def _label(key: dict[str, Any], names: Sequence[str]) -> str:
    return ", ".join(f"{name.partition('.')[2]}={key[name]}" for name in names if name in key)


class Spread(NamedTuple):
    """Over the runs of one cell; of one run all three are the same."""

    mean: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread | None:
    """Mean, least and greatest of finite values; None if there are none."""
    found = [float(value) for value in values if np.isfinite(value)]
    return Spread(sum(found) / len(found), min(found), max(found)) if found else None


def first_reached(step_V: np.ndarray, loss_V: np.ndarray, target: float) -> float | None:
    """The step at which a held-out curve reaches a loss; None if it does not.

    The curve is replaced by the lowest loss so far, and that is linear in the step between two
    evaluations. What is reached by the first evaluation counts as reached at that evaluation.
    """
    lowest_V = np.minimum.accumulate(loss_V)
    if not len(lowest_V) or lowest_V[-1] > target:
        return None
    after = int(np.argmax(lowest_V <= target))
    if after == 0:
        return float(step_V[0])
    above, below = lowest_V[after - 1], lowest_V[after]
    share = (above - target) / (above - below)
    return float(step_V[after - 1] + share * (step_V[after] - step_V[after - 1]))


class SpeedUp(NamedTuple):
    """How much sooner runs of one expert count reach the dense model's final loss.

    The spread is over the runs that reach it; its mean stands for the cell where all of them do.
    """

    experts: int
    runs: int
    reached: int
    at_first: int  # of those that reach it, how many by their first evaluation: theirs are lower bounds
    step: Spread | None  # steps of the dense model / steps
    # Likewise of seconds of training, of the runs that have times; None also where none has
    time: Spread | None


def target(dense: Sequence[Run]) -> tuple[float, float, float]:
    """(loss, steps, seconds) of the dense model: means over its runs of the lowest held-out loss, and of when it came; seconds
    over those with times.

    It is the final loss wherever a curve falls to its end.
    """
    best = [int(np.argmin(run.loss_V)) for run in dense]
    steps = [float(run.step_V[at]) for run, at in zip(dense, best, strict=True)]
    losses = [float(run.loss_V[at]) for run, at in zip(dense, best, strict=True)]
    seconds = spread([float(run.seconds_at(step)) for run, step in zip(dense, steps, strict=True)])
    return float(np.mean(losses)), float(np.mean(steps)), seconds.mean if seconds else float("nan")


def speed_ups(one: Group) -> list[SpeedUp]:
    """For each expert count above 1; [] without a dense model."""
    if not one.dense:
        return []
    loss, steps, seconds = target(one.dense)
    found = []
    for experts, runs in one.cells.items():
        if experts == 1:
            continue
        when = [(run, first_reached(run.step_V, run.loss_V, loss)) for run in runs]
        when = [(run, step) for run, step in when if step is not None]
        by_step = spread([steps / step for _, step in when])
        by_time = spread([seconds / float(run.seconds_at(step)) for run, step in when])
        at_first = sum(step == run.step_V[0] for run, step in when)
        found.append(SpeedUp(experts, len(runs), len(when), at_first, by_step, by_time))
    return found


def state_bytes(run: Run) -> int:
    """Bytes of the parameters and the optimizer's state on one device; exact, nothing is allocated."""
    train = dataclasses.replace(run.settings.train, seed=0)
    return _state_bytes(dataclasses.replace(memory.without_mesh(run.settings), train=train))


@functools.cache
def _state_bytes(settings: Settings) -> int:
    return sum(memory.state_bytes(settings, dict.fromkeys(sharding.AXES, 1)))
