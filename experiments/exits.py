"""How a command ends: its exit codes, and the one line that says why it did not do what was asked."""

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from experiments import process

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_NON_FINITE, EXIT_IO, EXIT_LOST = 1, 2, 3, 4, 5
EXIT_STOPPED, EXIT_INTERRUPTED = 75, 130  # by SIGTERM, by Ctrl-C


def fail(command: str, error: object, code: int) -> int:
    """Says so on standard error; returns the code."""
    print(f"{command}: {error}", file=sys.stderr)
    return code


def guarded(command: str, action: Callable[[], int]) -> int:
    """The exit code that the action returns, or that of what it raises: a mistake, a file error, Ctrl-C; one line."""
    try:
        return action()
    except ValueError as error:
        return fail(command, error, EXIT_BAD_INPUT)
    except BrokenPipeError:
        raise
    except OSError as error:
        return fail(command, error, EXIT_IO)
    except KeyboardInterrupt:
        return fail(command, "interrupted", EXIT_INTERRUPTED)


def leave(command: str, main: Callable[[list[str]], int]) -> NoReturn:
    """Runs a command in the environment that `process.settle` leaves, and ends with what ``main(sys.argv)`` returns.

    Quietly where whoever reads the output has seen enough (``| head``): the code is then that of SIGPIPE.
    """
    process.settle(command)
    try:
        try:
            code = main(sys.argv)
        except SystemExit as done:
            code = done.code
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    sys.exit(code)
