"""Where a sweep's runs are started: what all launchers share, and the one that starts them on this machine.

A launcher has

    here                how its runs are checked: they get this machine's devices
    at_once             the number of runs that it takes at a time
    retries             how often a run that was lost or stopped from outside is started again
    start(order) -> Job
    close()

and a job, which is one start of one run,

    queued              whether it waits for a machine
    wait(seconds)       its exit code, None if it has not ended by then
    stop(number)        passes a signal on; called by a signal handler
"""

import contextlib
import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.supervisor import FOLLOWS
from switchmoe.lock import INHERITED, Lock

LOG_FILE = "log.txt"
OPTIONS = ("launcher", "address", "resources", "retries")
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


def read(arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """(the launcher's options, the other arguments).

    Raises:
      ValueError: one line that names the option, its value and what would be accepted.
    """
    found: dict[str, str] = {}
    others: list[str] = []
    pending = ""
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        if pending:
            found[pending], pending = argument, ""
        elif not argument.startswith("--") or not (name in OPTIONS or name.startswith("slurm.")):
            others.append(argument)
        elif equals:
            found[name] = value
        else:
            pending = name
    if pending:
        raise ValueError(f"--{pending}: accepted is --{pending}=VALUE")
    return _options(found), others


def _options(found: dict[str, str]) -> Options:
    name = found.get("launcher", "local")
    if name not in LAUNCHERS:
        raise ValueError(f"--launcher={name}: accepted are {', '.join(LAUNCHERS)}")
    for option, value in found.items():
        every = option in ("launcher", "resources")
        takes = tuple(LAUNCHERS) if every else ("slurm",) if "." in option else ("ray", "slurm")
        if name not in takes:
            others = " or ".join(f"--launcher={other}" for other in takes)
            raise ValueError(f"--{option}={value}: accepted is with {others}")
        if not value:
            raise ValueError(f"--{option}=: accepted is --{option}=VALUE")
    retries = found.get("retries", str(RETRIES))
    if not retries.isdecimal():
        raise ValueError(f"--retries={retries}: accepted is an integer >= 0")
    options = Options(name, found.get("address", "auto"), retries=int(retries))
    slurm = {key.partition(".")[2]: _typed(value) for key, value in found.items() if "." in key}
    resources = _resources(found["resources"]) if "resources" in found else {}
    default = {} if name == "local" else {"CPU": 1.0}
    return dataclasses.replace(options, resources=default | resources, slurm=slurm)


def _resources(text: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, amount = part.partition("=")
        if not (re.fullmatch(r"[\w.:-]+", name) and re.fullmatch(r"\d+(\.\d+)?", amount)) or name in found:
            raise ValueError(
                f"--resources={text}: accepted are NAME=AMOUNT of one run, with commas between, as CPU=2,GPU=1"
            )
        found[name] = float(amount)
    return found


def _typed(value: str) -> Any:
    if value in ("true", "false"):
        return value == "true"
    return int(value) if value.isdecimal() else value


def create(options: Options, workdir: Path) -> Any:
    """The launcher, ready to start runs.

    Raises:
      ValueError: what it needs is not installed, not there, or does not take these options.
    """
    needed = NEEDS.get(options.launcher)
    if needed and importlib.util.find_spec(needed) is None:
        extra = f"pip install 'switchmoe[{options.launcher}]'"
        raise ValueError(
            f"--launcher={options.launcher}: {needed} is not installed; accepted is after {extra}"
        )
    return LAUNCHERS[options.launcher](options, workdir)


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


def _ray(options: Options, _: Path) -> Any:
    from experiments.launch_ray import Ray

    return Ray(options)


def _slurm(options: Options, workdir: Path) -> Any:
    from experiments.launch_slurm import Slurm

    return Slurm(options, workdir)


NEEDS = {"ray": "ray", "slurm": "submitit"}
LAUNCHERS = {"local": lambda options, _: Local(options), "ray": _ray, "slurm": _slurm}
