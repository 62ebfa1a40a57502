"""Runs a sweep: ``python -m experiments.sweep [--config=FILE.py] [--workdir=DIR] [--dry_run] [--config.GROUP.FIELD=VALUE ...]``

A sweep's config has a ``get_sweep()`` beside ``get_config()``: see `experiments.sweep_plan`. Overrides change
the base of all runs. Each run is `experiments.run` in a process of its own, in DIR/NAME with NAME made of what
it overrides; what it prints is in DIR/NAME/log.txt. The same command does what is missing: done runs are
skipped, one that was cut short goes on from its checkpoint, one that failed is tried again. `results.csv` has
a line a run. ``--dry_run`` lists the runs with parameters, FLOPs, tokens and time, and starts nothing.

Exit codes: 0 all runs are done; 1 some failed; 2 bad input; 4 a file that can't be written or read; 75 stopped
by SIGTERM and 130 by Ctrl-C, with the state of the run under way saved.
"""

import concurrent.futures
import contextlib
import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments import sweep_plan, sweep_results
from experiments.supervisor import EXIT_INTERRUPTED, EXIT_STOPPED, FOLLOWS
from experiments.sweep_plan import Run, Sweep
from switchmoe.checkpoints import write_json

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_IO = 1, 2, 4
LOCK_FILE, LOG_FILE, CACHE_DIR = "sweep.lock", "log.txt", "compiled"
POLL = 1.0  # seconds between looks at the run under way


def main(argv: Sequence[str]) -> int:
    try:
        return command(argv, __doc__)
    except ValueError as error:
        return _fail(error, EXIT_BAD_INPUT)
    except OSError as error:
        return _fail(error, EXIT_IO)
    except KeyboardInterrupt:
        return _fail("interrupted before the first run", EXIT_INTERRUPTED)


def command(argv: Sequence[str], doc: str, only: Sequence[dict[str, Any]] | None = None) -> int:
    """Runs the sweep of a command line, or of its runs those with the overrides ``only``; returns an exit code.

    Raises:
      ValueError: a mistake, before the first run; one line.
    """
    dry_run = "--dry_run" in argv
    sweep = sweep_plan.read([argument for argument in argv if argument != "--dry_run"], doc, only)
    sweep_plan.check_directory(sweep)
    costs, peak = _apart(sweep_plan.survey, sweep.runs, dry_run)
    if dry_run:
        print(sweep_plan.table(sweep, costs, peak, _Local(sweep, costs).results()))
        return 0
    with _lock(sweep.workdir):
        sweep_plan.check_directory(sweep)
        write_json(sweep.workdir / sweep_plan.DEFINITION_FILE, sweep_plan.definition(sweep))
        return _Local(sweep, costs).run_all()


def _apart(function: Callable, *arguments: Any) -> Any:
    """The function's value, from a process that is gone afterwards and with it what it held of the devices."""
    with concurrent.futures.ProcessPoolExecutor(
        1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    ) as pool:
        return pool.submit(function, *arguments).result()


@contextlib.contextmanager
def _lock(workdir: Path) -> Iterator[None]:
    """The sweep's directory is this process's; the system lets go of it however the process ends.

    Raises:
      ValueError: another sweep has it.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / LOCK_FILE).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"--workdir={workdir}: another sweep is under way there; accepted is another directory, or later"
            ) from None
        yield


class _Local:
    """Runs a sweep on this machine, one run after the other."""

    def __init__(self, sweep: Sweep, costs: Sequence[sweep_plan.Cost]):
        self.sweep, self.costs = sweep, costs
        self.table = sweep_results.Table([run.name for run in sweep.runs])
        self.child: subprocess.Popen | None = None
        self.signals: list[int] = []

    def results(self) -> list[dict[str, Any]]:
        return [
            sweep_results.result(self.sweep.workdir / run.name, run, cost)
            for run, cost in zip(self.sweep.runs, self.costs, strict=True)
        ]

    def run_all(self) -> int:
        """Starts what is not done, whatever became of the runs before; returns the exit code to leave with."""
        states = {one["run"]: self._state(one) for one in self.results()}
        failed: dict[str, str] = {}
        with self._stop_signals():
            for run, cost in zip(self.sweep.runs, self.costs, strict=True):
                if self.signals:
                    break
                directory = self.sweep.workdir / run.name
                if sweep_results.result(directory, run, cost)["state"] != "done":
                    code = self._run(run, states)
                    done = sweep_results.result(directory, run, cost)["state"] == "done"
                    if not done and not self.signals:
                        failed[run.name] = states[run.name] = f"failed (exit {code}): {_last_line(directory)}"
                    else:
                        states[run.name] = sweep_results.status(directory, run, "done" if done else "stopped")
                self.table.show(states, run.name)
                self._write(failed)
        for name, what in failed.items():
            print(
                f"experiments.sweep: {name} {what}; {self.sweep.workdir / name / LOG_FILE}", file=sys.stderr
            )
        if self.signals:
            name = signal.Signals(self.signals[0]).name
            text = f"stopped by {name}; the same command goes on from there"
            return _fail(text, EXIT_INTERRUPTED if self.signals[0] == signal.SIGINT else EXIT_STOPPED)
        print(f"{len(states) - len(failed)} of {len(states)} runs done: {self.sweep.workdir}")
        return EXIT_FAILED if failed else 0

    def _state(self, one: dict[str, Any]) -> str:
        run = next(run for run in self.sweep.runs if run.name == one["run"])
        return sweep_results.status(self.sweep.workdir / run.name, run, one["state"])

    def _write(self, failed: dict[str, str]) -> None:
        results = self.results()
        for one in results:
            one["state"] = "failed" if one["run"] in failed else one["state"]
        sweep_results.write(self.sweep, results)

    def _run(self, run: Run, states: dict[str, str]) -> int:
        """Starts `experiments.run` and shows how it gets on until it ends; returns its exit code."""
        directory = self.sweep.workdir / run.name
        directory.mkdir(exist_ok=True)
        # Programs are compiled once for all runs of their shapes, and not again when a run goes on. train.seed is a
        # constant of the first state's program, and of the step's where something is drawn in it (jitter, dropout,
        # sampling): there runs that differ in the seed compile anew, and share only evaluation and decoding.
        cache = {"JAX_COMPILATION_CACHE_DIR": str((self.sweep.workdir / CACHE_DIR).absolute())}
        overrides = [f"--config.{field}={value}" for field, value in run.overrides.items()]
        with (directory / LOG_FILE).open("ab") as log:
            self.child = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "experiments.run",
                    *self.sweep.arguments,
                    *overrides,
                    f"--workdir={directory}",
                ],
                env=cache | dict(os.environ) | {FOLLOWS: "1"},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the sweep alone, which passes it on
            )
        with self.child:
            if self.signals:  # since before there was a child to pass it on to
                self.child.send_signal(self.signals[0])
            while True:
                states[run.name] = sweep_results.status(directory, run, "running", self.table.live)
                self.table.show(states, run.name)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return self.child.wait(POLL)

    @contextlib.contextmanager
    def _stop_signals(self) -> Iterator[None]:
        """Passes SIGTERM and Ctrl-C on to the run under way; a second one kills it."""

        def forward(number: int, _: object) -> None:
            self.signals.append(number)
            if self.child:
                self.child.send_signal(number if len(self.signals) == 1 else signal.SIGKILL)

        before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _last_line(directory: Path) -> str:
    lines = (directory / LOG_FILE).read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


def _fail(error: object, code: int) -> int:
    print(f"experiments.sweep: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv))
