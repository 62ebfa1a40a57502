"""Where a run comes from: the commit of this code and the machine, as `run.json` and reports name them."""

import os
import platform
import re
import subprocess
from pathlib import Path


def commit() -> str:
    """The commit of the checkout that this code is in, with ``-dirty`` if files were changed; "" if it is in none."""
    here = Path(__file__).resolve()
    try:
        # An installed copy inside somebody's checkout is not that checkout's code.
        _git(here.parent, "ls-files", "--error-unmatch", here.name)
        return _git(here.parent, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return ""


CHANGES_SUMS = {
    "XLA_FLAGS",
    "JAX_DEFAULT_MATMUL_PRECISION",
    "LIBTPU_INIT_ARGS",
}  # variables of the environment


def environment() -> dict[str, str]:
    """The variables that JAX and XLA read."""
    return {
        name: os.environ[name] for name in sorted(os.environ) if name.startswith(("JAX_", "XLA_", "LIBTPU_"))
    }


def machine() -> str:
    """The processor and how many of its cores this process may use, such as `2 x AMD EPYC`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        found = re.search(
            r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE
        )
    except OSError:
        found = None
    return f"{cores} x {found[1].strip() if found else platform.processor() or platform.machine()}"


def _git(directory: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(directory), *arguments], capture_output=True, text=True, check=True, timeout=30
    )
    return done.stdout.strip()
