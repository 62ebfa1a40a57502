"""What the experiments ask of the process they run in."""

import ctypes
import sys
from typing import Any

from absl import logging

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # glibc's malloc.h


def keep_memory() -> None:
    """Has glibc's malloc keep what is freed, for the next allocation; does nothing where there is no glibc.

    On a CPU, XLA allocates a program's temporaries at each call and frees them at its end. By default
    large ones go back to the system, so that each step has them zeroed and mapped anew, page by page:
    an addition over a large array then runs at a quarter of the memory's bandwidth. Called before JAX
    starts its threads, as their memory must come from the one heap that can be kept.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_ARENA_MAX, 1)):
        mallopt(parameter, value)


def keep_quiet() -> None:
    """Leaves out what concerns no user of a save that failed, as the failure itself is raised.

    Orbax logs it with its stack; TensorStore says of each array whose write ends later that nobody waits for it.
    """
    logging.set_verbosity(logging.FATAL)
    show = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    sys.unraisablehook = hook
