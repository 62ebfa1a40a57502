"""What the experiments ask of the process they run in."""

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

from absl import logging

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # glibc's malloc.h
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_TUNABLES = "GLIBC_TUNABLES"  # read by glibc (2.35 or newer) as a process starts


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

    Orbax logs it with its stack; TensorStore says of each array whose write ends later that nobody waits for it.
    """
    logging.set_verbosity(logging.FATAL)
    show = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    sys.unraisablehook = hook
