"""What a conversion writes grows beside its target, is renamed to it when it is whole, and goes on after a kill."""

import contextlib
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from switchmoe.runs.checkpoints import write_json

PROGRESS = "converting.json"


class Report(NamedTuple):
    tensors: int
    size: int  # bytes written
    kept: int  # of these written by an earlier process
    seconds: float

    def __str__(self) -> str:
        new = (self.size - self.kept) / 1e6
        again = f", {self.kept / 1e6:,.0f} MB were there" if self.kept else ""
        return f"{self.tensors} tensors, {self.size / 1e6:,.0f} MB{again}; {new / self.seconds:,.0f} MB/s"


@contextlib.contextmanager
def removed_if_wrong(work: Path) -> Iterator[None]:
    """Nothing is kept of a source that turns out to be damaged; of a full disk or a signal what was done is."""
    try:
        yield
    except ValueError:
        shutil.rmtree(work, ignore_errors=True)
        raise


def step_identity(step: Path) -> list[Any]:
    """By which an interrupted conversion knows a run's step again: what its files are, and when they were written."""
    files = sorted(path for path in step.rglob("*") if path.is_file())
    found = [[str(path.relative_to(step)), *identity(path)[1:]] for path in files]
    return [str(step.absolute()), hashlib.sha256(json.dumps(found).encode()).hexdigest()]


def identity(file: Path) -> list[Any]:
    status = file.stat()
    return [str(file.absolute()), status.st_size, status.st_mtime_ns]


class Counter:
    """Bytes that are done, by several threads."""

    def __init__(self, total: int):
        self._total, self._done, self._kept, self._lock = total, 0, 0, threading.Lock()
        self._began = time.monotonic()

    def add(self, size: int, kept: bool = False) -> None:
        with self._lock:
            self._done += size
            self._kept += size if kept else 0

    def state(self) -> str:
        share = self._done / max(self._total, 1)
        rate = (self._done - self._kept) / max(time.monotonic() - self._began, 1e-9)
        bar = "#" * int(20 * share)
        left = f", {(self._total - self._done) / rate:,.0f} s left" if rate else ""
        return f"[{bar:20}] {share:4.0%} of {self._total / 1e6:,.0f} MB, {rate / 1e6:,.0f} MB/s{left}"

    def report(self, tensors: int) -> Report:
        return Report(tensors, self._total, self._kept, max(time.monotonic() - self._began, 1e-9))


def begun(target: Path, asked: dict[str, Any]) -> Path:
    """The directory in which the target grows; an earlier process's of the same conversion goes on.

    Raises:
      ValueError: the target is there, or another conversion to it is half done.
    """
    if os.path.lexists(target):
        raise ValueError(f"--target={target}: it is there; accepted is a name that is free")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".{target.name}.converting")
    file = work / PROGRESS
    if work.exists() and file.exists():
        there = read_json(file)
        if there != asked:
            differ = ", ".join(name for name in asked if there.get(name) != asked[name])
            raise ValueError(
                f"--target={target}: another conversion is half done in {work} ({differ} differ); accepted is the same one, or"
                " that directory removed"
            )
        return work
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    write_json(file, asked)
    return work


def ended(work: Path, target: Path) -> None:
    (work / PROGRESS).unlink()
    work.rename(target)


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError: not an object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: can't be read ({error}); accepted is a JSON object") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: accepted is a JSON object")
    return found
