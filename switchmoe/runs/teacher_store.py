"""A teacher's likeliest tokens of each step's batch, written once and read by the students that see the same batches.

A directory: ``teacher.json`` (what they are of, how many steps are done, the place in the data), ``ids.npy`` (unsigned integers)
and ``log_probs.npy`` (float16), both [steps, B, L * K]. A kill costs the steps since the last `SAVED`. One process writes at a time.

Letters: B batch, L length, K likeliest tokens.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from switchmoe.data import progress
from switchmoe.data.batches import Batch
from switchmoe.parallel import sharding
from switchmoe.runs import placing
from switchmoe.runs.checkpoints import write_json
from switchmoe.runs.lock import Lock
from switchmoe.runs.parts import Context, Data
from switchmoe.runs.resuming import BITS, RULES, flat
from switchmoe.settings import Settings, to_dict
from switchmoe.training import distillation

DIRECTORY, FILE, LOCK_FILE = "teacher", "teacher.json", "store.lock"
SAVED = 25  # steps
READ = "setting of data or task"
EVALUATED = ("task.shots", "task.eval_examples")  # what is measured alone depends on them


class Kept:
    """Data (`parts.Data`) whose batches have the teacher's likeliest tokens as well.

    Raises:
      ValueError: several processes, or a store that is another teacher's, or of other batches.
    """

    def __init__(
        self, data: Data, context: Context, name: str, teacher: Settings, parameters: Callable[[], Any]
    ):
        self._data, self._context, self._name = data, context, name
        self._teacher, self._parameters = teacher, parameters
        settings = self._settings = context.settings
        if jax.process_count() > 1:
            raise ValueError(
                f"distill.top_k={settings.distill.top_k}: accepted with {jax.process_count()} processes is 0, the teacher beside"
                " the student"
            )
        self._count, self._length = settings.distill.top_k, data.lengths["targets"]
        own = {name: self._length * self._count for name in (distillation.IDS, distillation.LOG_PROBS)}
        self.identity, self.lengths = data.identity, data.lengths | own
        self.directory = (
            Path(settings.distill.store).expanduser()
            if settings.distill.store
            else context.workdir / DIRECTORY
        )
        self._check()

    def prepare(self) -> None:
        self._data.prepare()

    def keep(self) -> None:
        self._data.keep()
        self._write()

    def batches(self, streams: Sequence[int] | None = None) -> "_Batches":
        ids, log_probs = (np.load(path, mmap_mode="r") for path in self._files)
        return _Batches(self._data.batches(streams), ids, log_probs)

    def tell(self) -> tuple[dict[str, Any], list[str]]:
        record, lines = self._data.tell()
        size = sum(path.stat().st_size for path in self._files)
        line = (
            f"the teacher's {self._count} likeliest tokens of each: {size / 1e6:,.1f} MB in {self.directory}"
        )
        return record | {"teacher_bytes": size}, [*lines, line]

    @property
    def _files(self) -> tuple[Path, Path]:
        return self.directory / "ids.npy", self.directory / "log_probs.npy"

    @property
    def _shape(self) -> tuple[int, int, int]:
        settings = self._settings
        return settings.train.num_steps, settings.data.batch_size, self._length * self._count

    def _known(self) -> dict[str, Any]:
        """What the store must be of."""
        distill = self._settings.distill
        return {
            "teacher": self._name, "temperature": distill.temperature, "top_k": distill.top_k,
            "shape": list(self._shape), "seed": self._settings.train.seed, "data": self._data.identity, READ: self._how_read(),
        }  # fmt: skip

    def _how_read(self) -> str:
        """A hash of the settings by which the same text and tasks give other batches, by the rules of resuming."""
        told = {
            name: value
            for name, value in flat(to_dict(self._settings)).items()
            if name.startswith(("data.", "task.")) and RULES[name].kind != BITS and name not in EVALUATED
        }
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def _read(self) -> dict[str, Any]:
        path = self.directory / FILE
        return json.loads(path.read_text()) if path.exists() else {}

    def _check(self) -> None:
        there, known = self._read().get("of"), self._known()
        if there is None:
            return
        differ = [
            name if name == READ else f"{name} ({there.get(name)} there)"
            for name in known
            if there.get(name) != known[name]
        ]
        if differ:
            raise ValueError(
                f"distill.store={self.directory}: it is of another {', '.join(differ)}; accepted is a store of the same teacher and"
                " batches, or another directory"
            )

    def _write(self) -> None:
        """The steps that are not there yet.

        Raises:
          InUse: another process writes them.
          OSError: there is no room for them.
        """
        if self._read().get("done") == self._settings.train.num_steps:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        option = f"distill.store={self.directory}"
        lock = Lock(self.directory, self._context.note, LOCK_FILE, "the writing of a store", option)
        with contextlib.closing(lock):
            lock.take()
            self._check()  # again, as what is there may be of whoever had the lock
            self._fill(self._read())

    def _fill(self, there: dict[str, Any]) -> None:
        done, steps = there.get("done", 0), self._settings.train.num_steps
        rows = self._teacher.embedding_rows
        kinds = (np.uint16 if rows <= 2**16 else np.uint32, np.float16)
        opened = [
            np.lib.format.open_memmap(path, mode="r+" if done else "w+", dtype=kind, shape=self._shape)
            for path, kind in zip(self._files, kinds, strict=True)
        ]
        try:
            for path in self._files:
                _reserve(path, 1 - done / steps)
        except OSError:
            for path in [] if done else self._files:  # what was had of the room is given back
                path.unlink()
            raise
        run, batches = self._program(), self._data.batches(None)
        if done:
            batches.set_state(there["state"])
        size = sum(array.nbytes for array in opened) / 1e6
        what = f"writing the teacher's {self._count} likeliest tokens ({size:,.1f} MB)"
        reached = [done]
        with progress.told(self._context.note, what, lambda: f"step {reached[0]} of {steps}"):
            for step in range(done, steps):
                found = distillation.as_rows(*map(np.asarray, run(next(batches))))
                opened[0][step] = found[distillation.IDS]
                opened[1][step] = found[distillation.LOG_PROBS].view(np.float32)
                reached[0] = step + 1
                if (step + 1) % SAVED == 0 or step + 1 == steps:
                    for array in opened:
                        array.flush()
                    state = batches.get_state()
                    write_json(self.directory / FILE, {"of": self._known(), "done": step + 1, "state": state})
        batches.close()

    def _program(self) -> Callable[[Batch], Any]:
        mesh, distill = self._context.mesh, self._settings.distill
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        likeliest = functools.partial(
            distillation.likeliest, settings=self._teacher, temperature=distill.temperature, count=self._count
        )
        compiled, parameters = jax.jit(likeliest, out_shardings=whole), self._parameters()

        def run(batch: Batch) -> Any:
            with jax.set_mesh(mesh), sharding.rules(self._teacher):
                return compiled(parameters, placing.whole(batch, mesh))

        return run


def _reserve(path: Path, left: float) -> None:
    """The file's place on the disk: where that is full later on, a write to its map would be the process's end (SIGBUS).

    Args:
      left: the share of it that is not written yet.
    """
    with path.open("r+b") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # in its place glibc writes each block
            elif shutil.disk_usage(path.parent).free < size * left:  # macOS
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            what = f"no room for the teacher's likeliest tokens ({size / 1e6:,.1f} MB): {error.strerror}"
            raise OSError(error.errno, what, str(path)) from error


class _Batches(Iterator):
    """The batches of an iterator, each with the rows of its step."""

    def __init__(self, inner: Any, ids: np.ndarray, log_probs: np.ndarray):
        self._inner, self._ids, self._log_probs, self._step = inner, ids, log_probs, 0
        self.start_prefetch, self.close, self.get_state = inner.start_prefetch, inner.close, inner.get_state

    def __next__(self) -> Batch:
        batch, step = next(self._inner), self._step
        self._step += 1
        rows = self._ids[step].astype(np.int32), self._log_probs[step].astype(np.float32)
        return batch | {distillation.IDS: rows[0], distillation.LOG_PROBS: rows[1].view(np.int32)}

    def set_state(self, state: dict[str, Any]) -> None:
        self._inner.set_state(state)
        self._step = next(iter(state.values()))["batch"]
