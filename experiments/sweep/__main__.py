"""Runs a sweep: ``python -m experiments.sweep [--config=FILE.py] [--workdir=DIR] [--dry_run] [--config.GROUP.FIELD=VALUE ...]``

A sweep's config has a ``get_sweep()`` beside ``get_config()``: see `experiments.sweep.study`. Overrides change
the base of all runs. Each run is `experiments.run` in a process of its own, in DIR/NAME with NAME made of what
it overrides; what it prints is in DIR/NAME/log.txt. The same command does what is missing: done runs are
skipped, one that was cut short continues from its checkpoint, one that failed is tried again. `results.csv` has
a line a run. ``--dry_run`` lists the runs with parameters, FLOPs, tokens and time, and starts nothing.

  --launcher=local              on this machine: one run after the other, or with --resources=CPU=N as many at a
                                time as get N cores of their own
  --launcher=ray [--address=auto|local|HOST:PORT|ray://HOST:PORT]     on a Ray cluster
  --launcher=slurm [--slurm.NAME=VALUE ...] [--address=local]         as SLURM jobs
  --resources=CPU=1[,GPU=1,...] what one run gets
  --retries=2                   with the last two: how often a run whose machine was lost is started again

With Ray and SLURM DIR and the current directory are those of every node. See docs/several_hosts.md.

Exit codes: 0 all runs are done; 1 some failed; 2 bad input; 4 a file that can't be written or read; 75 stopped
by SIGTERM and 130 by Ctrl-C, with the states of the runs under way saved.
"""

from collections.abc import Sequence

from experiments import exits
from experiments.sweep.command import COMMAND, command


def main(argv: Sequence[str]) -> int:
    return exits.guarded(COMMAND, lambda: command(argv, __doc__))


if __name__ == "__main__":
    exits.leave(COMMAND, main)
