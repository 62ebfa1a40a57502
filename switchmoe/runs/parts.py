"""What a run is made of: data x objective x judges x start. The contract between a kind of run and the loop.

A kind of run (`text.PRETRAINING` is one) is a `Kind`: from the settings, the lengths of its sequences, and from a
`Context` its `Parts`. The loop (`loop.run`) asks nothing else: it places batches on the mesh, compiles, steps, has the
judges measure, saves, resumes and reports. So checkpoints, faults, layouts, several hosts, sweeps and reports hold for
any kind. To add one: a function that returns `Parts`; most share the data, the judges or the start of another.

Order of calls: ``kind.lengths`` (nothing is read yet), ``kind.parts`` (may read; on the main process first),
``data.prepare`` (main process alone, the directory is not yet this run's), ``data.keep`` (main process, it is),
``data.batches``, ``judge.compile``, ``start.load`` (unless a checkpoint of the run's own is there), ``data.tell``; then
``judge.figures`` every `train.eval_every` steps, and ``finish`` at the end.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from jax.sharding import Mesh

from switchmoe.settings import Settings
from switchmoe.training.objective import Objective
from switchmoe.training.train_state import TrainState


@dataclasses.dataclass(frozen=True)
class Context:
    """What parts are made from."""

    settings: Settings
    workdir: Path  # the run's directory on this machine
    mesh: Mesh
    begun: bool  # a checkpoint of the run's own is there, from which it goes on
    note: Callable[[str], None]  # a line for the user, on the main process


class Data(Protocol):
    """What a batch is: a dictionary of int32 arrays, all of them [rows, length] with the same rows.

    ``identity``: hashes of what the batches are made of; all processes must have the same.
    ``lengths``: of a global batch's arrays, by their names.
    """

    identity: dict[str, str]
    lengths: dict[str, int]

    def prepare(self) -> None:
        """What takes long and is needed once a run, such as a baseline."""

    def keep(self) -> None:
        """Writes what the run is to have of its own into its directory, where it is not there."""

    def batches(self, streams: Sequence[int]) -> Any:
        """An endless iterator of the rows that these streams fill (`data.batches.stream_rows`).

        It has ``get_state`` and ``set_state`` (JSON; the position), ``start_prefetch`` and ``close``.
        """

    def tell(self) -> tuple[dict[str, Any], list[str]]:
        """(what `run.json` says of it, lines for the user)."""


class Judge(Protocol):
    """What is measured on held-out data. ``name`` is the records' `split`."""

    name: str

    def compile(self, params: Any) -> None:
        """Makes ready for parameters of these shapes, with their places on the mesh."""

    def of(self, settings: Settings) -> "Judge":
        """The same for a model of other settings."""

    def figures(self, params: Any) -> dict[str, Any]:
        """Numbers, and arrays with a value for each sparse layer."""


class Start(NamedTuple):
    """Where parameters come from: ``load`` puts them into a fresh first state; `run.json` gets ``record`` as `init`."""

    load: Callable[[TrainState], TrainState] = lambda state: state
    record: dict[str, Any] | None = None


class Parts(NamedTuple):
    data: Data
    objective: Objective
    judges: Sequence[Judge]
    best: tuple[
        str, str
    ]  # a judge's name and one of its figures: the checkpoints with the least are kept as the best
    start: Start
    flops: float  # the model's, of a step of the whole batch
    finish: Callable[[Any], dict[str, Any]] = lambda params: {}  # for `run.json`, from the last parameters


class Kind(NamedTuple):
    """A kind of run."""

    lengths: Callable[[Settings], dict[str, int]]  # tokens of a sequence in each stack
    parts: Callable[[Context], Parts]
