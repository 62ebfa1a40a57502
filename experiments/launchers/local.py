"""A sweep's runs on this machine: ``--launcher=local``."""

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator

from experiments.launchers.order import Options, Order, spawn


class Local:
    """Starts runs on this machine: one at a time, or with ``--resources=CPU=N`` as many as get N cores of their own.

    Raises:
      ValueError: other resources than cores, or more than there are.
    """

    here, retries = True, 0

    def __init__(self, options: Options):
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        each = options.resources.get("CPU", 0)
        if options.resources and (
            options.resources.keys() != {"CPU"} or each not in range(1, len(cores) + 1)
        ):
            text = ",".join(f"{name}={amount:g}" for name, amount in options.resources.items())
            raise ValueError(
                f"--resources={text}: accepted with --launcher=local are CPU=1 to CPU={len(cores)}; others with "
                "--launcher=ray --address=local"
            )
        n = int(each)
        self._free = [cores[i : i + n] for i in range(0, len(cores) - n + 1, n)] if n else [[]]
        self.at_once = len(self._free)

    def start(self, order: Order) -> "_Child":
        cores = self._free[0]
        with _only(cores):
            process = spawn(order, patience=10)
        self._free.pop(0)
        return _Child(process, lambda: self._free.append(cores))

    def close(self) -> None:
        """Nothing is left open."""


@contextlib.contextmanager
def _only(cores: list[int]) -> Iterator[None]:
    """What this thread starts meanwhile has these cores; none: has all that there are."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class _Child:
    queued = False

    def __init__(self, process: subprocess.Popen, ended: Callable[[], None]):
        self._process, self._ended = process, ended

    def wait(self, seconds: float) -> int | None:
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        self._process.stdin.close()
        self._ended()
        return code

    def stop(self, number: int) -> None:
        self._process.send_signal(number)
