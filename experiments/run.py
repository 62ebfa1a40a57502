"""Trains a model: ``python -m experiments.run [--config=FILE.py[:ARGS]] [--workdir=DIR] [--config.GROUP.FIELD=VALUE ...]``

Without arguments it runs configs/quickstart.py into runs/quickstart. The same command on the same
directory goes on where it stopped.

Exit codes: 0 done; 2 bad input; 3 a loss that is not a number; 4 a checkpoint or a file that can't be
written or read; 5 another process of the job was lost; 75 stopped by SIGTERM and 130 by Ctrl-C, with the
state saved.
"""

import contextlib
import functools
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence

from experiments import command_line, exits, process, supervisor
from experiments.exits import (
    EXIT_BAD_INPUT,
    EXIT_INTERRUPTED,
    EXIT_IO,
    EXIT_LOST,
    EXIT_NON_FINITE,
    EXIT_STOPPED,
)
from switchmoe.settings import Settings

DEFAULT_CONFIG = "configs/quickstart.py"
COMMAND = "experiments.run"
PEERS_LEAVE = 30  # seconds within which JAX ends a process whose peer is lost


def main(argv: list[str]) -> int:
    return exits.guarded(COMMAND, lambda: _run(argv))


def _run(argv: list[str]) -> int:
    if supervisor.FOLLOWS in os.environ:
        supervisor.leave_with_parent()
    settings, workdir = command_line.parse(argv, DEFAULT_CONFIG, __doc__, buckets=True)
    return carry_out(COMMAND, argv, settings, workdir)


def carry_out(command: str, argv: Sequence[str], settings: Settings, workdir: str) -> int:
    """Trains, in one process or as one of several; returns the exit code.

    Args:
      command: such as ``experiments.run``, which with ``argv`` starts this very run.
    """
    try:
        from switchmoe.parallel import distributed

        several = distributed.job(settings.mesh, os.environ) is not None
    except ValueError as error:
        return exits.fail(command, error, EXIT_BAD_INPUT)
    if several and not supervisor.is_child():
        return supervisor.run(command, argv[1:])
    process.keep_quiet()
    if several:
        supervisor.leave_with_parent()
    try:
        code = _train(command, settings, workdir)
    except BaseException as error:
        if several:  # the interpreter's own way out waits minutes for the others, who wait for this one
            if not isinstance(error, BrokenPipeError):
                traceback.print_exc()
            _leave_at_once(exits.EXIT_FAILED, wait=distributed.is_main())
        raise
    if several and code not in (0, EXIT_STOPPED):
        _leave_at_once(code, wait=distributed.is_main())
    return code


def _train(command: str, settings: Settings, workdir: str) -> int:
    import jax

    from switchmoe.analysis import report
    from switchmoe.parallel import distributed
    from switchmoe.runs import checkpoints, kinds, loop, signals
    from switchmoe.runs.reporting import Progress

    fail = functools.partial(exits.fail, command)
    progress = Progress(settings.train.num_steps, sys.stdout)
    try:
        with contextlib.closing(progress):
            distributed.initialize(settings.mesh)
            process.check_devices()
            path = loop.run(settings, workdir, progress, report.write_report, kinds.of(settings))
    except ValueError as error:
        return fail(error, EXIT_BAD_INPUT)
    except (loop.NonFiniteLoss, FloatingPointError) as error:  # the latter with JAX_DEBUG_NANS
        return fail(error, EXIT_NON_FINITE)
    except checkpoints.CheckpointError as error:
        return fail(error, EXIT_IO)
    except BrokenPipeError:  # whoever reads the output has seen enough: `exits.leave`
        raise
    except OSError as error:
        return fail(error if error.filename else f"{workdir}: {error}", EXIT_IO)
    except signals.Stopped as stopped:
        message, number = stopped.args
        return fail(message, EXIT_STOPPED if number == signal.SIGTERM else EXIT_INTERRUPTED)
    except jax.errors.JaxRuntimeError as error:
        if not supervisor.is_child():
            raise
        time.sleep(PEERS_LEAVE)  # until then JAX has found out who is lost, and ended this process
        return fail(f"{str(error).splitlines()[0]} (or another process of the job was lost)", EXIT_LOST)
    except KeyboardInterrupt:
        return fail("interrupted at once; what is saved is the last checkpoint", EXIT_INTERRUPTED)
    if distributed.is_main():
        print(f"done: {path}")
    return 0


def _leave_at_once(code: int, wait: bool) -> None:
    """Without JAX's farewell to the others, which may not come; they end when this one is missed.

    The main process goes last, as the others end with it before they have said what ails them.
    """
    time.sleep(2 if wait else 0)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    process.use_huge_pages()
    exits.leave(COMMAND, main)
