"""Checkpoints: train state, data iterator and settings, saved and restored as one.

Orbax writes in the background and renames when complete: a killed save leaves the steps before it as
they were. Loading executes no code from a checkpoint: arrays and JSON only.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from switchmoe import distributed
from switchmoe.data.batches import joined_states
from switchmoe.settings import CheckpointSettings
from switchmoe.sharding import path_keys


class CheckpointError(RuntimeError):
    """A checkpoint that can't be written or read; one line that names it."""


class Checkpoints:
    """The checkpoints of one run's directory: the newest ``keep`` and the best ``keep_best``."""

    def __init__(self, directory: Path, settings: CheckpointSettings):
        self.directory = Path(directory).absolute()
        policies = [ocp.checkpoint_managers.LatestN(settings.keep)]
        if settings.keep_best:
            best = ocp.checkpoint_managers.BestN(
                get_metric_fn=_quality, n=settings.keep_best, keep_checkpoints_without_metrics=False
            )
            policies.append(best)
        try:
            self._manager = ocp.CheckpointManager(
                self.directory,
                item_handlers={
                    "state": ocp.StandardCheckpointHandler(),
                    "data": ocp.JsonCheckpointHandler(),
                    "config": ocp.JsonCheckpointHandler(),
                },
                options=ocp.CheckpointManagerOptions(
                    best_fn=_quality,
                    preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
                ),
            )
        except Exception as error:
            raise CheckpointError(f"checkpoints in {self.directory} can't be read: {_line(error)}") from error

    def latest(self) -> int | None:
        """The newest complete step, None if there is none."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, iterator: Any, config: dict, validation: float | None) -> None:
        """Starts to save, after the save before it is complete; no-op if the step is there already.

        Args:
          iterator: a grain iterator of `batches.train_batches`, of which the position is saved.
          config: the settings, for whoever finds the checkpoint alone.
          validation: held-out cross-entropy, by which the best are kept; None if not known.

        Raises:
          CheckpointError: this save or the one before it failed (a full disk, say); names the last
            complete step.
        """
        if step in self._manager.all_steps():
            return
        items = {
            "state": ocp.args.StandardSave(state),
            "data": ocp.args.JsonSave(joined_states(distributed.gathered(iterator.get_state()))),
            "config": ocp.args.JsonSave(config),
        }
        metrics = None if validation is None else {"cross_entropy": validation}

        def start() -> None:
            self._manager.wait_until_finished()
            _check_space(self.directory, state)
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

        self._guard(step, start)

    def wait(self) -> None:
        """Returns when what was started is written."""
        self._guard(None, self._manager.wait_until_finished)

    def restore(self, state: Any, iterator: Any | None = None, step: int | None = None) -> Any:
        """Reads a step (None: the newest), into the shapes, types and shardings of ``state``.

        Args:
          state: a tree of arrays or ShapeDtypeStructs.
          iterator: one of `batches.train_batches`, moved to its saved position; None: left alone.

        Raises:
          CheckpointError: nothing there, unreadable, or of another shape. Nothing is overwritten.
        """
        step = self.latest() if step is None else step
        if step is None:
            raise CheckpointError(f"no checkpoint in {self.directory}")
        self._check_shapes(step, state)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        items = {"state": ocp.args.StandardRestore(abstract)}
        if iterator is not None:
            items["data"] = ocp.args.JsonRestore()
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(**items))
            if iterator is not None:
                iterator.set_state(found["data"])
            return found["state"]
        except Exception as error:
            others = [s for s in self.steps() if s != step]
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} can't be restored: {_line(error)};"
                f" other steps here: {others or 'none'} (move {step} away to go on from the newest of them)"
            ) from error

    def close(self) -> None:
        self._manager.close()

    def _check_shapes(self, step: int, state: Any) -> None:
        try:
            saved = self._manager.item_metadata(step)["state"]
            saved = _shapes(saved.tree)
        except Exception as error:
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} can't be read: {_line(error)}"
            ) from error
        asked = _shapes(state)
        different = sorted(path for path in saved.keys() | asked.keys() if saved.get(path) != asked.get(path))
        if different:
            path = different[0]
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} is of another model: {path} has shape"
                f" {saved.get(path, 'none')} there, {asked.get(path, 'none')} here ({len(different)} differ)"
            )

    def _guard(self, step: int | None, action: Any) -> None:
        try:
            action()
        except Exception as error:
            what = "a checkpoint" if step is None else f"the checkpoint of step {step} (or the one before it)"
            good = [s for s in self.steps() if (self.directory / str(s)).exists()]
            raise CheckpointError(
                f"{what} can't be written to {self.directory}: {_line(error)};"
                f" last complete: {good[-1] if good else 'none'}"
            ) from error


def _check_space(directory: Path, state: Any) -> None:
    """Before Orbax starts: a disk that fills up under its threads ends in pages of their tracebacks."""
    needed, free = sum(x.nbytes for x in jax.tree.leaves(state)), shutil.disk_usage(directory).free
    free = distributed.gathered(free)[0]  # all processes go on, or none
    if needed > free:
        raise OSError(
            f"it takes up to {needed / 2**20:,.1f} MiB, {free / 2**20:,.1f} MiB are free on that disk"
        )


def write_json(path: Path, value: Any) -> None:
    """Writes a file that is there whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)


def _quality(metrics: dict) -> float:
    return -metrics["cross_entropy"]


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by path, alike for a train state and for what Orbax has of it."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(path_keys(path)): tuple(leaf.shape) for path, leaf in leaves}


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]
