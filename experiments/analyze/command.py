"""Analyses a sweep: ``python -m experiments.analyze DIR [--out=DIR/analysis]``

DIR holds the runs' directories (those of `experiments.sweep`, or any that `experiments.run` wrote); runs that
are not done are left out and listed. Writes to --out:

  report.html    held-out loss against experts, steps and time, speed-ups to the dense model's final loss, the
                 fitted scaling law beside the published one, load and drops, parameters and memory; one file
  plots/*.png    its pictures
  points.csv     a line for each run
  speedups.csv   a line for each expert count
  fit.json       coefficients and their confidence intervals

``python -m experiments.analyze routing --source=RUN`` is of one model, token by token; routing --help says more.

Exit codes: 0 done; 2 bad input; 4 a file that can't be written.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import exits
from experiments.analyze import routing


def main(argv: Sequence[str]) -> int:
    if _of_routing(argv[1:]):
        return routing.main(argv[1:])
    if {"--help", "-h"} & set(argv[1:]):
        print(__doc__.strip())
        return 0
    return exits.guarded("experiments.analyze", lambda: _write(argv[1:]))


def _of_routing(arguments: Sequence[str]) -> bool:
    """Whether it is the sub-command, not a sweep in a directory of that name."""
    named = any(argument.startswith(("--source", "--trace", "--help", "-h")) for argument in arguments)
    return list(arguments[:1]) == ["routing"] and (named or not Path("routing").is_dir())


def _write(arguments: Sequence[str]) -> int:
    # A report needs no accelerator, and one in use by a run would be waited for.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from experiments.sweep.command import CACHE_DIR
    from switchmoe.analysis import sweep_report, sweeps

    directory, out = _arguments(arguments)
    sweep = sweeps.read_sweep(directory, skip=[out, directory / CACHE_DIR])
    for name, reason in sweep.left_out.items():
        print(f"left out: {directory / name}: {reason}", file=sys.stderr)
    print(sweep_report.write(sweep, out, title=directory.resolve().name))
    return 0


def _arguments(arguments: Sequence[str]) -> tuple[Path, Path]:
    directories, out = [], ""
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name == "--out":
            if not value:
                raise ValueError(f"{argument}: accepted is --out=DIR")
            out = value
        elif argument.startswith("-"):
            raise ValueError(f"argument {argument}: accepted are DIR and --out=DIR")
        else:
            directories.append(argument)
    if len(directories) != 1:
        raise ValueError(
            f"{len(directories)} directories: accepted is one, python -m experiments.analyze DIR"
        )
    directory = Path(directories[0])
    found = Path(out) if out else directory / "analysis"
    if found.exists() and not found.is_dir():
        raise ValueError(f"--out={found}: accepted is a directory")
    if (found / "config.json").exists() or found.resolve() == directory.resolve():
        raise ValueError(
            f"--out={found}: accepted is a directory that is neither a run's nor the sweep's own"
        )
    return directory, found
