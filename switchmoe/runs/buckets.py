"""Where a run lives: a directory, or a place in a bucket with a directory here that mirrors its small files.

In a bucket (``gs://`` or ``s3://``) nothing is appended to or renamed. So metrics, notes and reports are written here and
copied as whole objects, at the latest before a checkpoint is; and a step of a checkpoint is complete when its last object
is there: `COMMIT` (``gs://``, where Orbax writes arrays to the bucket itself, of several processes as well) or `UPLOADED`
(``s3://``, which Orbax can't write to: it writes here, and the step is copied). A step without it is none.
"""

import contextlib
import errno
import json
import os
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from switchmoe.runs.lock import InUse

SCHEMES = {"gs://": ("gcsfs", "gcs"), "s3://": ("s3fs", "s3")}  # the package that reads it, and its extra
COMMIT, UPLOADED = "commit_success.txt", "uploaded.txt"
CHECKPOINTS = "checkpoints"
LEASE_FILE = "run.lock"
RENEWED, WATCHED = 5.0, 12.0  # seconds between renewals of a lease, and that one found is watched for one
OFTEN = 30.0  # seconds between copies of metrics


class Unreachable(OSError):
    """A bucket that can't be read or written; one line."""


def is_bucket(workdir: str | os.PathLike) -> bool:
    return os.fspath(workdir).startswith(tuple(SCHEMES))


class Place:
    """A run's directory on this machine; of a bucket, its mirror, which `push` copies there."""

    def __init__(self, workdir: str | os.PathLike):
        self.name = os.fspath(workdir)
        self.remote: epath.Path | None = None
        self.local = Path(workdir)
        self._pushed: dict[str, tuple[int, int]] = {}
        self._kept = False  # whether the mirror has what the bucket lacks, and stays
        self._fetched: set[int] = set()  # steps that were complete there
        self._last = 0.0
        self._lease: _Lease | None = None

    @property
    def stages(self) -> bool:
        """Whether checkpoints are written here and copied, step by step."""
        return self.remote is not None and self.name.startswith("s3://")

    @property
    def checkpoints(self) -> Path | epath.Path:
        return (self.local if self.remote is None or self.stages else self.remote) / CHECKPOINTS

    def open(self, processes: int) -> None:
        """Of a bucket: makes the mirror and fetches what is there.

        Raises:
          ValueError: a package is missing, the bucket is not there, or can't hold the job's checkpoints.
        """
        if not is_bucket(self.name):
            return
        scheme = self.name[:5]
        package, extra = SCHEMES[scheme]
        if scheme == "s3://" and processes > 1:
            raise ValueError(
                f"--workdir={self.name}: accepted with several processes is gs:// or a directory that all share (Orbax writes"
                " no s3://)"
            )
        try:
            self.remote = epath.Path(self.name)
            self._probe()
        except ImportError as error:
            raise ValueError(
                f"--workdir={self.name}: {package} is not installed; accepted is after pip install '.[{extra}]'"
            ) from error
        except Exception as error:
            raise ValueError(
                f"--workdir={self.name}: can't be read ({_line(error)}); accepted is a place in a bucket that is there, with"
                " the credentials for it"
            ) from error
        self.local = Path(tempfile.mkdtemp(prefix="switchmoe-")) / self.remote.name
        self.local.mkdir()
        with self._named():
            self._fetch(self.remote, self.local, skip={CHECKPOINTS, LEASE_FILE})
            if self.stages:  # all of them: the best is kept, and one before a damaged one is gone on from
                self._fetched = complete_steps(self.remote / CHECKPOINTS)
                for step in map(str, self._fetched):
                    here = self.local / CHECKPOINTS / step
                    self._fetch(self.remote / CHECKPOINTS / step, here, {UPLOADED})
        self._pushed = self._signs()

    def _probe(self) -> None:
        """Reads the bucket itself: of one that is not there, a place in it only looks empty."""
        bucket = epath.Path("/".join(self.name.split("/")[:3]))
        list(bucket.iterdir())

    def take(self) -> None:
        """Of a bucket: has it for this process, as far as that is possible without locks (docs/faults.md).

        Raises:
          ValueError: another process renews its lease on it.
        """
        if self.remote is not None and self._lease is None:
            with self._named():
                self._lease = _Lease(self.remote / LEASE_FILE, self.name)

    def push(self, at_least_every: float = 0.0) -> None:
        """Copies what has changed here since the last time, if that is so many seconds ago.

        Raises:
          Unreachable: it can't be written.
        """
        if self.remote is None or time.monotonic() - self._last < at_least_every:
            return
        signs = self._signs()
        with self._named():
            for name, sign in signs.items():
                if self._pushed.get(name) != sign:
                    _copy(self.local / name, self.remote / name)
                    self._pushed[name] = sign
            for name in self._pushed.keys() - signs.keys():
                (self.remote / name).unlink(missing_ok=True)
                del self._pushed[name]
        self._last = time.monotonic()

    def push_steps(self) -> None:
        """Where checkpoints are staged: copies the new steps, each with `UPLOADED` last, and removes those that are gone.

        What was found damaged here and set aside is set aside there first, as another of that step is to come.

        Raises:
          Unreachable: it can't be written; what is there of a step does not count.
        """
        here, there = self.local / CHECKPOINTS, self.remote / CHECKPOINTS
        with self._named():
            for left in here.glob("*.damaged*"):
                step = there / left.name.partition(".")[0]
                if int(step.name) in self._fetched:
                    _copy_all(left, damaged_name(step))
                    self._remove(step)
            complete = complete_steps(there)
            kept = {int(path.name) for path in here.iterdir() if path.name.isdigit()}
            for step in sorted(kept - complete):
                _copy_all(here / str(step), there / str(step))
                (there / str(step) / UPLOADED).write_text(time.strftime("%Y-%m-%d %H:%M:%S"))
            for step in complete - kept:
                if step < max(kept):
                    self._remove(there / str(step))

    def push_all(self) -> None:
        """Copies what is not there yet, at the end of a run.

        Raises:
          Unreachable: it can't be written, whatever ``on_error``; names the mirror, which then stays.
        """
        if self.remote is None:
            return
        try:
            self.push()
            if self.stages:
                self.push_steps()
        except Unreachable as error:
            self._kept = True
            raise Unreachable(f"{error}; what is not there yet is in {self.local}") from error

    def _remove(self, step: epath.Path) -> None:
        """The marker first: what is left is no step."""
        (step / UPLOADED).unlink(missing_ok=True)
        step.rmtree(missing_ok=True)
        self._fetched.discard(int(step.name))

    def close(self) -> None:
        """Gives the bucket back, and removes the mirror, unless `push_all` failed."""
        if self._lease:
            self._lease.free()
        if self.remote is not None and not self._kept:
            shutil.rmtree(self.local.parent, ignore_errors=True)

    def _signs(self) -> dict[str, tuple[int, int]]:
        found = {}
        for path in self.local.rglob("*"):
            name = str(path.relative_to(self.local))
            if path.is_file() and not name.startswith((CHECKPOINTS, LEASE_FILE)) and ".tmp" not in name:
                status = path.stat()
                found[name] = (status.st_size, status.st_mtime_ns)
        return found

    def _fetch(self, there: epath.Path, here: Path, skip: set[str] = frozenset()) -> None:
        if not there.exists():
            return
        here.mkdir(parents=True, exist_ok=True)
        for path in there.iterdir():
            if path.name in skip or not path.name:
                continue
            if path.is_dir():
                self._fetch(path, here / path.name)
            else:
                (here / path.name).write_bytes(path.read_bytes())

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Mistakes that name the mirror name the place instead."""
        try:
            yield
        except ValueError as error:
            if self.remote is None or str(self.local) not in str(error):
                raise
            raise ValueError(str(error).replace(str(self.local), self.name)) from error

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """What each library raises in its own way, as one kind."""
        try:
            yield
        except ValueError:
            raise
        except Exception as error:
            raise Unreachable(f"{self.name}: can't be read or written ({_line(error)})") from error


def complete_steps(checkpoints: Any) -> set[int]:
    """The steps in a bucket, or a directory, whose last object is there."""
    if not (checkpoints.exists() if is_bucket(checkpoints) else checkpoints.is_dir()):
        return set()
    steps = [path for path in checkpoints.iterdir() if path.name.isdigit()]
    if not is_bucket(checkpoints):
        return {int(path.name) for path in steps}
    marker = UPLOADED if os.fspath(checkpoints).startswith("s3://") else COMMIT
    return {int(path.name) for path in steps if (path / marker).exists()}


def damaged_name(step_directory: Path | epath.Path) -> Path | epath.Path:
    """Beside the step: a name that is free, by which it is none."""
    kept, number = step_directory.with_name(f"{step_directory.name}.damaged"), 1
    while kept.exists():
        number += 1
        kept = step_directory.with_name(f"{step_directory.name}.damaged-{number}")
    return kept


class _Lease:
    """An object that says who is at work, written again and again by a thread for as long as that is so.

    One that is found is watched: where it is renewed, its holder is alive. No clocks are compared.

    Raises:
      InUse: another process is at work there.
    """

    def __init__(self, path: epath.Path, name: str):
        self._path, self._over = path, threading.Event()
        self._me = {"holder": f"process {os.getpid()} on {socket.gethostname()}", "id": uuid.uuid4().hex}
        first, until = read_lease(self._path), time.monotonic() + WATCHED
        while first and time.monotonic() < until:
            time.sleep(min(1.0, WATCHED / 10))
            found = read_lease(self._path)
            if not found:
                break
            if found != first:
                raise InUse(
                    f"--workdir={name}: a run is under way there ({found.get('holder', 'unknown')}); accepted is another place, or"
                    " the same one when that run has ended"
                )
        self._write()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def _write(self) -> None:
        self._path.write_text(json.dumps(self._me | {"renewed": time.time()}))

    def _renew(self) -> None:
        while not self._over.wait(RENEWED):
            with contextlib.suppress(Exception):  # the bucket is away: it is for the run to say so
                self._write()

    def free(self) -> None:
        self._over.set()
        self._thread.join()
        with contextlib.suppress(Exception):
            self._path.unlink(missing_ok=True)


def read_lease(path: epath.Path) -> dict[str, Any]:
    """The lease that is there, {} if there is none.

    It is looked for again before it counts as gone: some stores show none while one is written over another.
    """
    for wait in (0.1, 0.2, 0.4, 0.0):
        try:
            found = json.loads(path.read_text())
            if isinstance(found, dict) and found:
                return found
        except (FileNotFoundError, ValueError):
            pass
        except OSError as error:
            if error.errno != errno.EBUSY or not wait:  # s3fs: written over between its size and its text
                raise
        time.sleep(wait)
    return {}


def guarded(action: Callable[[], Any], on_error: str, note: Callable[[str], None]) -> None:
    """Copies to a bucket; with ``on_error="continue"`` a failure is a warning, and is made good by the next copy."""
    try:
        action()
    except Unreachable as error:
        if on_error == "stop":
            raise
        note(f"warning: {error}; continuing (checkpoint.on_error=continue)")


def _copy(here: Path, there: epath.Path) -> None:
    there.write_bytes(here.read_bytes())


def _copy_all(here: Path, there: epath.Path) -> None:
    for path in sorted(path for path in here.rglob("*") if path.is_file()):
        _copy(path, there / str(path.relative_to(here)))


def _line(error: BaseException) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) < 200 else f"{text[:200]} ..."
