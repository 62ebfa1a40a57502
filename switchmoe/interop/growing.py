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
from switchmoe.runs.lock import LOCK_FILE, Lock

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


def step_identity(step: Path) -> list[Any]:
    """By which an interrupted conversion knows a run's step again: what its files are, and when they were written."""
    files = sorted(path for path in step.rglob("*") if path.is_file())
    found = [[str(path.relative_to(step)), *identity(path)[1:]] for path in files]
    return [str(step.absolute()), hashlib.sha256(json.dumps(found).encode()).hexdigest()]


def identity(file: Path) -> list[Any]:
    status = file.stat()
    return [str(file.absolute()), status.st_size, status.st_mtime_ns]


class Counter:
    """Bytes that are done, by several threads, since ``began`` of `time.monotonic` (None: now)."""

    def __init__(self, total: int, began: float | None = None):
        self._total, self._done, self._kept, self._lock = total, 0, 0, threading.Lock()
        self._began = time.monotonic() if began is None else began

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


@contextlib.contextmanager
def grown(target: Path, asked: dict[str, Any]) -> Iterator[Path]:
    """The directory in which the target grows, and which becomes it when the block has ended.

    It belongs to one process at a time. What an earlier process has of the same conversion goes on. Nothing is kept of a
    source that turns out to be damaged (ValueError); of a full disk or a signal what was done is.

    Raises:
      ValueError: the target is there, another conversion to it is half done, or another process is making it.
    """
    _free(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".{target.name}.converting")
    lock = _locked(work, target)
    try:
        _begin(work, target, asked)
        try:
            yield work
        except ValueError:
            shutil.rmtree(work, ignore_errors=True)
            raise
        (work / PROGRESS).unlink()
        work.rename(
            target
        )  # with its lock, so that no one who waits for this name takes it for an unfinished one
        (target / LOCK_FILE).unlink(missing_ok=True)
    finally:
        lock.close()


def _free(target: Path) -> None:
    if os.path.lexists(target):
        raise ValueError(f"--target={target}: it is there; accepted is a name that is free")


def _locked(work: Path, target: Path) -> Lock:
    while True:
        with contextlib.suppress(FileExistsError):  # not `exist_ok`, which raises if it is renamed just then
            work.mkdir()
        lock = Lock(work, what="a conversion", option=f"--target={target}")
        try:
            lock.take()
            if os.path.samestat(os.fstat(lock.fileno()), (work / LOCK_FILE).stat()):
                return lock
        except FileNotFoundError:  # who had it has just ended
            pass
        lock.close()


def _begin(work: Path, target: Path, asked: dict[str, Any]) -> None:
    """Makes the directory, locked, one of this conversion."""
    file = work / PROGRESS
    if os.path.lexists(target):  # whoever had the lock has made it
        shutil.rmtree(work)
        _free(target)
    if file.exists():
        there = read_json(file)
        if there != asked:
            differ = ", ".join(name for name in asked if there.get(name) != asked[name])
            raise ValueError(
                f"--target={target}: another conversion is half done in {work} ({differ} differ); accepted is the same one, or"
                " that directory removed"
            )
        return
    for path in work.iterdir():
        if path.name != LOCK_FILE:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    write_json(file, asked)


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError: not an object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: can't be read ({error}); accepted is a JSON object") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: accepted is a JSON object")
    return found
