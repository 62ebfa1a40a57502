"""What the experiments ask of the process they run in."""

import ctypes
import logging as standard_logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from absl import logging

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # glibc's malloc.h
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_TUNABLES = "GLIBC_TUNABLES"  # read by glibc (2.35 or newer) as a process starts


IGNORED = {  # variables of the environment that would change a run's results, or end it, and what they do
    "JAX_ENABLE_X64": "sums would have another precision",
    "JAX_DEFAULT_DTYPE_BITS": "sums would have another precision",
    "JAX_DEFAULT_PRNG_IMPL": "all random numbers would differ",
    "JAX_RANDOM_SEED_OFFSET": "all random numbers would differ",
    "JAX_THREEFRY_PARTITIONABLE": "all random numbers would differ",
    "JAX_NUMPY_DTYPE_PROMOTION": "JAX's own libraries fail",
    "JAX_NUMPY_RANK_PROMOTION": "JAX's own libraries may fail",
    "JAX_DISABLE_JIT": "steps are compiled ahead of time",
    "JAX_TRANSFER_GUARD": "batches could not reach the device",
    "JAX_TRANSFER_GUARD_HOST_TO_DEVICE": "batches could not reach the device",
    "JAX_TRANSFER_GUARD_DEVICE_TO_HOST": "metrics could not be read",
    "JAX_TRANSFER_GUARD_DEVICE_TO_DEVICE": "arrays could not be moved",
    "PYTHONWARNINGS": "libraries that warn would end the run",
}


def settle(command: str) -> None:
    """Makes a command independent of what its user has set for other work. To be called before JAX is imported.

    The variables of `IGNORED` are removed, with a line each. Pictures are files whatever ``MPLBACKEND`` says, and what the
    output's encoding can't show is escaped.
    """
    for name, effect in IGNORED.items():
        value = os.environ.pop(name, "")
        if value:
            print(f"{command}: {name}={value} is ignored ({effect})", file=sys.stderr)
            if name == "PYTHONWARNINGS":
                warnings.resetwarnings()
                warnings.simplefilter("ignore", DeprecationWarning)
    os.environ["MPLBACKEND"] = "agg"
    sys.stdout.reconfigure(errors="backslashreplace")


def check_devices() -> None:
    """Raises ValueError, one line, where JAX finds none of the platform that ``JAX_PLATFORMS`` names."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        named = os.environ.get("JAX_PLATFORMS", "")
        reason = (str(error).strip() or "no such device here").splitlines()[0]
        raise ValueError(
            f"JAX_PLATFORMS={named}: {reason}; accepted is cpu, or the variable unset"
        ) from error


def use_huge_pages() -> None:
    """Starts this process anew, with glibc's malloc asking for huge pages, where the system has them on request.

    On a CPU, XLA allocates a program's temporaries at each call and frees them at its end, so that each step
    has them zeroed and mapped anew. Of 145 MB on one core of an Intel Xeon that took the system 58 of a step's
    202 ms by pages of 4 KiB, 23 of 165 ms by pages of 2 MiB. Does nothing where the user has set
    ``GLIBC_TUNABLES``. To be called before anything else.
    """
    try:
        offered = "[madvise]" in _HUGE_PAGES.read_text(encoding="utf-8")
    except OSError:
        return
    if offered and _TUNABLES not in os.environ:
        os.environ[_TUNABLES] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def keep_memory() -> None:
    """Has glibc's malloc keep what is freed, for the next allocation; does nothing where there is no glibc.

    On a CPU, XLA allocates a program's temporaries at each call and frees them at its end. By default
    large ones go back to the system, so that each step has them zeroed and mapped anew, page by page:
    an addition over a large array then runs at a quarter of the memory's bandwidth. Called before JAX
    starts its threads, as their memory must come from the one heap that can be kept. It takes up to twice
    the memory, and threads wait for one another at the heap: a run uses huge pages instead.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_ARENA_MAX, 1)):
        mallopt(parameter, value)


def keep_quiet() -> None:
    """Leaves out what concerns no user of a save that failed, as the failure itself is raised.

    Orbax logs it with its stack; TensorStore and asyncio say of each array whose write ends later that nobody waits
    for it.
    """
    logging.set_verbosity(logging.FATAL)
    standard_logging.getLogger("asyncio").setLevel(standard_logging.CRITICAL)
    show = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    sys.unraisablehook = hook
