"""A start of a run as data, and the process that it becomes on whatever machine."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from experiments.supervisor import FOLLOWS
from switchmoe.runs.lock import INHERITED, Lock

LOG_FILE = "log.txt"
RETRIES = 2


@dataclasses.dataclass(frozen=True)
class Order:
    """One start of one run; its paths are the same wherever it is started."""

    arguments: list[str]  # of `experiments.run`
    workdir: Path  # as it was given: absolute, or as seen from cwd
    cwd: Path
    cache: Path  # of compiled programs, absolute

    @property
    def directory(self) -> Path:
        return self.cwd / self.workdir


@dataclasses.dataclass(frozen=True)
class Options:
    """What a sweep's command line says of the launcher."""

    launcher: str = "local"
    address: str = "auto"
    resources: dict[str, float] = dataclasses.field(default_factory=dict)  # of one run
    retries: int = RETRIES
    slurm: dict[str, Any] = dataclasses.field(default_factory=dict)


def spawn(order: Order, patience: float) -> subprocess.Popen:
    """Starts the run as a process that ends with this one.

    It holds a lock on its directory as long as it lives, so that two starts of one run never write there at
    once: where a machine was only thought dead, or a sweep was killed, its run has to be gone first.

    Args:
      patience: seconds to wait for that.

    Raises:
      InUse: the directory is still another process's.
      OSError: it can't be written.
    """
    order.directory.mkdir(exist_ok=True)
    lock = Lock(order.directory)
    try:
        lock.take(patience)
        with (order.directory / LOG_FILE).open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "experiments.run", *order.arguments, f"--workdir={order.workdir}"],
                cwd=order.cwd,
                env={"JAX_COMPILATION_CACHE_DIR": str(order.cache)}
                | os.environ
                | {FOLLOWS: "1", INHERITED: str(lock.fileno())},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[lock.fileno()],  # the lock is let go of when all that have it open are gone
                start_new_session=True,  # Ctrl-C is for the sweep alone, which passes it on
            )
    finally:
        lock.close()
