"""Trains a model: ``python -m experiments.run [--config=FILE.py[:ARGS]] [--workdir=DIR] [--config.GROUP.FIELD=VALUE ...]``

Without arguments it runs configs/quickstart.py into runs/quickstart. The same command on the same
directory goes on where it stopped.

Exit codes: 0 done; 2 bad input; 3 a loss that is not a number; 4 a checkpoint or a file that can't be
written or read; 75 stopped by SIGTERM and 130 by Ctrl-C, with the state saved.
"""

import signal
import sys
from pathlib import Path

from absl import logging

from experiments import command_line, process

DEFAULT_CONFIG = "configs/quickstart.py"
EXIT_BAD_INPUT, EXIT_NON_FINITE, EXIT_IO, EXIT_STOPPED, EXIT_INTERRUPTED = 2, 3, 4, 75, 130


def main(argv: list[str]) -> int:
    try:
        settings, workdir = command_line.parse(argv, DEFAULT_CONFIG, __doc__)
    except ValueError as error:
        return _fail(error, EXIT_BAD_INPUT)
    # Orbax logs what it also raises, with its stack; what concerns the user is raised.
    logging.set_verbosity(logging.FATAL)
    process.keep_memory()
    # Imported once the settings are known to be good: an error in them shows at once.
    from switchmoe import checkpoints, loop
    from switchmoe.reporting import Progress

    progress = Progress(settings.train.num_steps, sys.stdout)
    try:
        path = loop.run(settings, Path(workdir), progress)
    except ValueError as error:
        progress.close()
        return _fail(error, EXIT_BAD_INPUT)
    except loop.NonFiniteLoss as error:
        progress.close()
        return _fail(error, EXIT_NON_FINITE)
    except checkpoints.CheckpointError as error:
        progress.close()
        return _fail(error, EXIT_IO)
    except OSError as error:
        progress.close()
        return _fail(error if error.filename else f"{workdir}: {error}", EXIT_IO)
    except loop.Stopped as stopped:
        progress.close()
        message, number = stopped.args
        return _fail(message, EXIT_STOPPED if number == signal.SIGTERM else EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        progress.close()
        return _fail("interrupted twice; saved is the last checkpoint", EXIT_INTERRUPTED)
    progress.close()
    print(f"done: {path}")
    return 0


def _fail(error: object, code: int) -> int:
    print(f"experiments.run: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv))
