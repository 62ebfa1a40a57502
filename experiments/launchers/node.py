"""A run on a node that a cluster's scheduler chose: the part of the launchers `ray` and `slurm` that works there.

It meets the sweep in the run's directory, which both must see under one path: the sweep writes signals to
`stop`, a line each, and the node writes to `node.json` where it has begun.
"""

import contextlib
import os
import signal
import socket
import subprocess
from pathlib import Path

from experiments.exits import EXIT_STOPPED
from experiments.launchers.order import LOG_FILE, Order, spawn
from switchmoe.runs.checkpoints import write_json
from switchmoe.runs.lock import InUse

STOP_FILE, NODE_FILE = "stop", "node.json"
POLL = 1.0  # seconds between looks at `stop`
PATIENCE = 300.0  # seconds; a node that lost the cluster ends its work before that


def prepare(order: Order) -> None:
    """The sweep's side, before a start: nothing is asked of it yet, and it has not begun."""
    order.directory.mkdir(exist_ok=True)
    (order.directory / NODE_FILE).unlink(missing_ok=True)
    (order.directory / STOP_FILE).write_text("", encoding="utf-8")


def ask(order: Order, number: int) -> None:
    """The sweep's side: has the run get the signal."""
    with (order.directory / STOP_FILE).open("a", encoding="utf-8") as file:
        file.write(f"{number}\n")


def began(order: Order) -> bool:
    """The sweep's side: whether the run has a machine."""
    return (order.directory / NODE_FILE).exists()


def note(order: Order, text: str) -> None:
    """The sweep's side: what became of a start, in the run's log, whose last line tells of a failure."""
    with (order.directory / LOG_FILE).open("a", encoding="utf-8") as log:
        log.write(f"\nexperiments.sweep: {text}\n")


def look_again(order: Order) -> None:
    """The sweep's side: has a network file system show what the node wrote last, by a change to the directory."""
    os.utime(order.directory)


class Work:
    """Called on the node: runs the order to its end; returns its exit code."""

    def __init__(self, order: Order):
        self.order = order
        self.process: subprocess.Popen | None = None

    def __call__(self) -> int:
        try:
            if _asked(self.order.directory):
                return EXIT_STOPPED
            self.process = spawn(self.order, PATIENCE)
            node = {"host": socket.gethostname(), "pid": self.process.pid, "parent": os.getpid()}
            write_json(self.order.directory / NODE_FILE, node)
            return self._attend()
        except (OSError, InUse) as error:
            raise RuntimeError(
                f"{socket.gethostname()}: {error} (the sweep's --workdir and current directory must be those of"
                " every node)"
            ) from error
        finally:
            self.end()

    def _attend(self) -> int:
        passed_on = 0
        while True:
            try:
                return self.process.wait(POLL)
            except subprocess.TimeoutExpired:
                asked = _asked(self.order.directory)
            for number in asked[passed_on:]:
                self.process.send_signal(number)
            passed_on = len(asked)

    def end(self) -> None:
        """Has the run save its state and end, where it has not."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(ChildProcessError):
                # Not Popen.wait: that may be what the signal handler that calls this has interrupted.
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)


def _asked(directory: Path) -> list[int]:
    return [int(line) for line in (directory / STOP_FILE).read_text(encoding="utf-8").split()]
