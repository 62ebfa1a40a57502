"""A directory belongs to one run, or one sweep, at a time."""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

LOCK_FILE = "run.lock"
INHERITED = "SWITCHMOE_LOCK"  # names the descriptor of a lock that a parent took for this process
_UNABLE = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)


class InUse(ValueError):
    """Another process has the directory; one line that names it."""


class Lock:
    """Held from `take` until `close`, or until the process ends, however it ends.

    An advisory ``flock`` on a file in it, which the system lets go of with the process. Over NFS Linux makes it a lock
    of the server's; where the file system has no locks, ``note`` is told so, and nothing is locked.
    """

    def __init__(
        self,
        directory: Path,
        note: Callable[[str], None] = lambda _: None,
        name: str = LOCK_FILE,
        what: str = "a run",
        option: str = "",
    ):
        self._directory, self._note = Path(directory), note
        self._path, self._what = self._directory / name, what
        self._option = option or f"--workdir={directory}"  # what a message calls the directory
        self._file: IO | None = None

    def take(self, patience: float = 0.0) -> None:
        """No-op where it is held already, by this process or by the parent that started it with the lock.

        Args:
          patience: seconds to wait for whoever has it.

        Raises:
          InUse: another process has it.
          OSError: the directory can't be written.
        """
        if self._file or _inherited(self._path):
            return
        try:
            file = self._path.open("a+", encoding="utf-8")
        except OSError as error:
            where = str(self._directory)
            raise OSError(error.errno, f"can't be written: {error.strerror}", where) from error
        try:
            _wait(file, time.monotonic() + patience)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(500).strip()
            file.close()
            raise InUse(
                f"{self._option}: {self._what} is under way there{f' ({holder})' if holder else ''}; accepted is"
                " another directory, or the same one when that has ended"
            ) from None
        except OSError as error:
            if error.errno not in _UNABLE:
                file.close()
                raise
            self._note(
                f"warning: {self._directory} can't be locked ({error.strerror}): do not start a second one there"
            )
        self._file = file
        with contextlib.suppress(OSError):
            file.truncate(0)
            file.write(
                f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
            )
            file.flush()

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None


def _wait(file: IO, until: float) -> None:
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise
        time.sleep(0.1)


def _inherited(path: Path) -> bool:
    """Whether the parent has handed its lock on this very file down."""
    try:
        given = os.fstat(int(os.environ[INHERITED]))
        return os.path.samestat(given, path.stat())
    except (KeyError, ValueError, OSError):
        return False


def handed_down() -> list[int]:
    """Descriptors that a process between the two has to pass on."""
    try:
        descriptor = int(os.environ[INHERITED])
        os.fstat(descriptor)
    except (KeyError, ValueError, OSError):
        return []
    return [descriptor]
