"""Checkpoints: train state, data iterator and settings, saved and restored as one.

Orbax writes in the background and renames when complete, or in a bucket writes a marker last: a killed save
leaves the steps before it as they were. Each step has a manifest, by which it is verified before it is read (`integrity`). Loading
executes no code from a checkpoint: arrays and JSON only.
"""

import contextlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from switchmoe.data.batches import joined_states
from switchmoe.parallel import distributed
from switchmoe.parallel.sharding import path_keys
from switchmoe.runs import buckets, integrity
from switchmoe.settings import CheckpointSettings

REMOVED = "removed"  # where a step goes that is no longer to be kept
APART = 2**20  # bytes: a layer's or an expert's share of an array, from which on it is a chunk of its own


class CheckpointError(RuntimeError):
    """A checkpoint that can't be written or read; one line that names it."""


class NoSpace(OSError):
    """The disk has no room for a checkpoint; nothing of it was written."""


class Checkpoints:
    """The checkpoints of one run's directory: the newest ``keep`` and the best ``keep_best``.

    Opening them verifies the newest. A damaged one is refused, or with ``on_damage="previous"`` kept
    under another name, so that the newest good one is the newest.

    Args:
      note: told of what was set aside and of saves that failed, a line each.

    Raises:
      CheckpointError: the newest is damaged, or none is good; nothing was changed.
    """

    def __init__(
        self,
        directory: Path | epath.Path,
        settings: CheckpointSettings,
        note: Callable[[str], None] = lambda _: None,
    ):
        self._settings, self._note = settings, note
        self.directory = directory if buckets.is_bucket(directory) else Path(directory).absolute()
        self._started: int | None = None  # the step of the last save
        self._failed: CheckpointError | None = None  # what became of it
        self._alone = False  # whether that is something the other processes don't know
        self._set_damaged_aside()
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        self._sweep()
        policies = [ocp.checkpoint_managers.LatestN(self._settings.keep)]
        if self._settings.keep_best:
            best = ocp.checkpoint_managers.BestN(
                get_metric_fn=_quality, n=self._settings.keep_best, keep_checkpoints_without_metrics=False
            )
            policies.append(best)
        # In a bucket Orbax's own way to delete has no second name for a step: it removes its objects.
        removed = {} if buckets.is_bucket(self.directory) else {"todelete_subdir": REMOVED}
        try:
            return ocp.CheckpointManager(
                self.directory,
                item_handlers={
                    "state": ocp.StandardCheckpointHandler(),
                    "data": ocp.JsonCheckpointHandler(),
                    "config": ocp.JsonCheckpointHandler(),
                },
                options=ocp.CheckpointManagerOptions(
                    best_fn=_quality,
                    preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
                    async_options=ocp.AsyncOptions(
                        post_finalization_callback=self._write_manifest, barrier_sync_fn=_barrier()
                    ),
                    **removed,
                ),
            )
        except Exception as error:
            raise CheckpointError(f"checkpoints in {self.directory} can't be read: {_line(error)}") from error

    def _sweep(self) -> None:
        """Deletes what no save is at work on: what was removed, and what killed or failed saves have left.

        Orbax would delete a step where it lies, so that a kill could leave one half there.
        """
        if not distributed.is_main():
            return
        if not buckets.is_bucket(self.directory):
            for left in (*self.directory.glob("*.orbax-checkpoint-tmp*"), self.directory / REMOVED):
                shutil.rmtree(left, ignore_errors=True)
        elif self.directory.exists():
            complete = buckets.complete_steps(self.directory)
            for left in self.directory.iterdir():
                if (
                    left.name.isdigit()
                    and int(left.name) not in complete
                    or "orbax-checkpoint-tmp" in left.name
                ):
                    left.rmtree(missing_ok=True)

    def latest(self) -> int | None:
        """The newest complete step, None if there is none."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """The complete ones; Orbax's own list has the step that it is at work on, too."""
        return sorted(_steps(self.directory))

    def save(self, step: int, state: Any, iterator: Any, config: dict, validation: float | None) -> None:
        """Starts to save, after the save before it is complete; no-op if the step is there already.

        Args:
          iterator: a grain iterator of `batches.train_batches`, of which the position is saved.
          config: the settings, for whoever finds the checkpoint alone.
          validation: held-out cross-entropy, by which the best are kept (of equal ones the newer); None, or not
            finite: this one is none of them.

        Raises:
          CheckpointError: with ``on_error="stop"``, this save or the one before it failed (a full disk,
            say); names the last complete step. With "continue" that is only noted, but where one of several
            processes failed alone: no other can then go on.
        """
        if step in self._manager.all_steps():
            return
        items = {
            "state": ocp.args.StandardSave(state, save_args=_layers_apart(state)),
            "data": ocp.args.JsonSave(joined_states(distributed.gathered(iterator.get_state()))),
            "config": ocp.args.JsonSave(config),
        }
        known = validation is not None and math.isfinite(validation)
        metrics = {"cross_entropy": validation} if known else None

        def start() -> None:
            _check_space(self.directory, state)
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

        self._guard(self._manager.wait_until_finished)
        self._sweep()
        self._started, self._failed = step, None
        self._guard(start)

    def settle(self) -> None:
        """Returns when the last save is over. Raises CheckpointError: as `save`."""
        self._guard(self._manager.wait_until_finished)

    def wait(self) -> None:
        """Returns when the last save is complete.

        Raises:
          CheckpointError: it failed, whatever ``on_error``.
        """
        self.settle()
        if self._failed:
            raise self._failed

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
        """Ends the background work. A save that fails only now is noted: `wait` is where it is raised."""
        if self._alone:
            return
        try:
            self._manager.close()
            self._sweep()
        except Exception as error:
            self._note(f"warning: {self._failure(error)}")

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

    def _guard(self, action: Callable[[], Any]) -> None:
        """Does a part of the last save; after a failure, what it left is removed.

        Where the other processes don't know of the failure they wait for this one's part of the save. It leaves
        at once, which ends them; to close or open a manager it would need them.

        Raises:
          jax.errors.JaxRuntimeError: another process was lost in the meantime.
        """
        try:
            action()
        except Exception as error:
            self._alone = jax.process_count() > 1 and not isinstance(error, NoSpace)
            if self._alone and isinstance(error.__cause__, jax.errors.JaxRuntimeError):
                raise error.__cause__ from None
            if self._alone:
                raise self._failure(error) from error
            with contextlib.suppress(Exception):
                self._manager.close()  # it would raise the same error at every later save
            self._manager = self._open()
            self._failed = self._failure(error)
            if self._settings.on_error == "stop":
                raise self._failed from error
            self._note(f"warning: {self._failed}; continuing (checkpoint.on_error=continue)")

    def _failure(self, error: Exception) -> CheckpointError:
        good = self.latest()
        return CheckpointError(
            f"the checkpoint of step {self._started} can't be written to {self.directory}: {_line(error)};"
            f" last complete: {'none' if good is None else good}"
        )

    def _write_manifest(self) -> None:
        """Orbax calls this in the background when all files of a save are written, before it makes the step complete.

        To that end it renames a directory, or in a bucket writes its marker.
        """
        if distributed.is_main():
            written = self.directory / str(self._started)
            if not buckets.is_bucket(self.directory):
                (written,) = self.directory.glob(f"{self._started}.*tmp*")
            integrity.write_manifest(written)

    def _set_damaged_aside(self) -> None:
        good, damaged = distributed.gathered(_screen(self.directory) if distributed.is_main() else None)[0]
        if not damaged:
            return
        found = "; ".join(f"checkpoint {self.directory / step} is damaged: {why}" for step, why in damaged)
        if good is None:
            raise CheckpointError(
                f"{found}. No good one is left, nothing was changed; accepted is a good copy, or another --workdir"
            )
        if self._settings.on_damage == "stop":
            raise CheckpointError(
                f"{found}. Nothing was changed; accepted is a good copy, or checkpoint.on_damage=previous, which"
                f" renames it to *.damaged and continues from step {good}"
            )
        if distributed.is_main():
            for step, _ in damaged:
                damaged_step = self.directory / step
                damaged_step.rename(buckets.damaged_name(damaged_step))
        distributed.gathered("set aside")
        self._note(
            f"warning: {found}. Kept as *.damaged; continuing from step {good} (checkpoint.on_damage=previous)"
        )


def _barrier() -> Callable[..., None]:
    """Where the threads that save wait for those of the other processes.

    One whose own part of the save has failed does not: the others wait for that part, and it would keep its
    failure until their time of ten minutes is over.
    """
    wait = ocp.multihost.get_barrier_sync_fn()

    def meet(*, key: str, timeout_ms: int) -> None:
        if sys.exception() is None:
            wait(key=key, timeout_ms=timeout_ms)

    return meet


def _screen(directory: Path) -> tuple[int | None, list[tuple[str, str]]]:
    """(newest good step, (step, damage) of others): of those before it, only what Orbax reads to open them."""
    good, damaged = None, []
    for step in sorted(_steps(directory), reverse=True):
        problem = integrity.damage(directory / str(step), "" if good is None else "metrics")
        if problem:
            damaged.append((str(step), problem))
        elif good is None:
            good = step
    return good, damaged


def _steps(directory: Path | epath.Path) -> list[int]:
    return list(buckets.complete_steps(directory))


def _check_space(directory: Path, state: Any) -> None:
    """Before Orbax starts: a disk that fills up under its threads ends in pages of their tracebacks.

    Raises:
      NoSpace: on all processes, or on none.
    """
    if buckets.is_bucket(directory):
        return
    needed, free = sum(x.nbytes for x in jax.tree.leaves(state)), shutil.disk_usage(directory).free
    free = distributed.gathered(free)[0]
    if needed > free:
        raise NoSpace(
            f"it takes up to {needed / 2**20:,.1f} MiB, {free / 2**20:,.1f} MiB are free on that disk"
        )


def _layers_apart(state: Any) -> Any:
    """How Orbax is to lay out each array: of a stack of layers a chunk a layer, or an expert of one, where that is large.

    So whoever reads a model in parts (`interop.run_files`) has one part of an array in memory.
    """

    def one(path: Any, leaf: Any) -> ocp.SaveArgs:
        keys = tuple(path_keys(path))
        lead = min(leaf.ndim, ("blocks" in keys) + ("experts" in keys))
        while lead and leaf.nbytes < APART * math.prod(leaf.shape[:lead]):
            lead -= 1
        return ocp.SaveArgs(shard_axes=tuple(range(lead)))

    return jax.tree_util.tree_map_with_path(one, state)


def write_json(path: Path, value: Any) -> None:
    """Writes a file that is there whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def _quality(metrics: dict) -> float:
    return -metrics["cross_entropy"]


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by path, alike for a train state and for what Orbax has of it."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(path_keys(path)): tuple(leaf.shape) for path, leaf in leaves}


def _line(error: BaseException) -> str:
    """The first line of an error; of a long one both ends, as systems say last what was wrong."""
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line if len(line) < 300 else f'{line[:140]} ... {line[-150:]}'}"
