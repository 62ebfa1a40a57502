"""A parent for one process of a job: passes signals on and says what happened when the job ends early.

JAX ends a process whose peer is lost by an abort, in which no Python code runs; so it is told from outside.
"""

import os
import re
import signal
import subprocess
import sys
import threading
from typing import IO

from experiments.exits import EXIT_INTERRUPTED, EXIT_LOST, EXIT_STOPPED
from switchmoe.runs.lock import handed_down

CHILD = "SWITCHMOE_CHILD"  # set in the environment of the process that does the work
FOLLOWS = "SWITCHMOE_FOLLOWS"  # set for a process that ends with its parent, from whom its input is a pipe
_NOISE = re.compile(
    r"coordination_service|preemption_(notifier|sync_manager)|distributed service|^\s+@ +0x|Check failure stack"
)
_LOST = re.compile(r"stopped sending heartbeats\):\s*(.*)")


def is_child() -> bool:
    return CHILD in os.environ


def leave_with_parent() -> None:
    """In the child: ends it when the parent is gone, even where that was killed.

    What SLURM announces by SIGUSR1 and SIGUSR2, on some clusters to every process of a job, is for the parent.
    """
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        os.read(0, 1)  # the parent's end of the pipe is never written to
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run(module: str, argv: list[str]) -> int:
    """Runs ``python -m module argv`` as a child until it ends; returns the exit code to leave with.

    SIGTERM and SIGINT reach it as SIGTERM, which its whole job notices. What JAX's runtime prints as it aborts
    is replaced by one line that names the lost process and says what to do.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", module, *argv],
        env=os.environ | {CHILD: "1"},
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=handed_down(),
        start_new_session=True,  # Ctrl-C is for this process alone
    )
    received: list[int] = []

    def forward(number: int, _: object) -> None:
        received.append(number)
        child.send_signal(signal.SIGTERM if len(received) == 1 else signal.SIGKILL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    held = _relay(child.stderr)
    code = child.wait()
    if code == -signal.SIGTERM and received:  # before it had begun to notice signals
        print(f"{module}: stopped by SIGTERM before the first step", file=sys.stderr)
        code = EXIT_STOPPED
    if code == EXIT_STOPPED and signal.SIGINT in received:
        return EXIT_INTERRUPTED
    if code == -signal.SIGABRT and held:
        lost = _LOST.search("\n".join(held))
        who = f"process {lost[1].strip()}" if lost else "process 0, or the network to it,"
        print(
            f"{module}: {who} of this job was lost, so all its processes end; start the same command on every"
            " host again: it continues from the last checkpoint",
            file=sys.stderr,
        )
        return EXIT_LOST
    # Where it failed in a way of its own, it may have said so after the runtime.
    if held and (code == 1 or code < 0):
        print("\n".join(held), file=sys.stderr)
    return code if code >= 0 else 128 - code


def _relay(stream: IO[bytes]) -> list[str]:
    """Passes a child's standard error on, but for what JAX's runtime says, which is returned."""
    held: list[str] = []
    for raw in stream:
        line = raw.decode(errors="replace").rstrip("\n")
        if _NOISE.search(line) or (held and not line.startswith("experiments.")):
            held.append(line)
        else:
            print(line, file=sys.stderr, flush=True)
    return held
