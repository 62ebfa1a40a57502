"""A sweep's command line, and the loop that starts what is not done."""

import collections
import concurrent.futures
import contextlib
import multiprocessing
import signal
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments import exits
from experiments.exits import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_LOST, EXIT_STOPPED
from experiments.launchers import choice
from experiments.launchers.order import LOG_FILE, Order
from experiments.sweep import outcomes, study
from experiments.sweep.study import Run, Sweep
from switchmoe.runs.checkpoints import write_json
from switchmoe.runs.lock import Lock

COMMAND = "experiments.sweep"
LOST = (EXIT_LOST, EXIT_STOPPED, 128 + signal.SIGKILL)  # of a run that something else than the sweep ended
LOCK_FILE, CACHE_DIR = "sweep.lock", "compiled"
POLL = 1.0  # seconds between looks at the runs under way


def command(
    argv: Sequence[str],
    doc: str,
    only: Sequence[dict[str, Any]] | None = None,
    each: Callable[[], None] = lambda: None,
) -> int:
    """Runs the sweep of a command line, or of its runs those with the overrides ``only``; returns an exit code.

    Args:
      each: called whenever a run is done.

    Raises:
      ValueError: a mistake, before the first run; one line.
      OSError: a file that can't be written or read.
    """
    options, arguments = choice.read(argv)
    dry_run = "--dry_run" in arguments
    sweep = study.read([argument for argument in arguments if argument != "--dry_run"], doc, only)
    study.check_directory(sweep)
    if dry_run:
        costs, peak = _apart(study.survey, sweep.runs, True, options.launcher == "local")
        print(study.table(sweep, costs, peak, _results(sweep, costs)))
        return 0
    with contextlib.closing(choice.create(options, sweep.workdir)) as launcher:
        return run(sweep, launcher, each)


def run(sweep: Sweep, launcher: Any, each: Callable[[], None] = lambda: None) -> int:
    """Starts what is not done of a sweep by a launcher of `experiments.launchers`; returns the exit code.

    Raises:
      ValueError: a run that can't work, or a directory that is not this sweep's or in use; nothing was started.
      OSError: a file that can't be written or read.
    """
    study.check_directory(sweep)
    costs, _ = _apart(study.survey, sweep.runs, False, launcher.here)
    with _lock(sweep.workdir):
        study.check_directory(sweep)
        write_json(sweep.workdir / study.DEFINITION_FILE, study.definition(sweep))
        return _Loop(sweep, costs, launcher, each).run_all()


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
    lock = Lock(
        workdir, lambda text: print(f"{COMMAND}: {text}", file=sys.stderr), LOCK_FILE, "another sweep"
    )
    lock.take()
    with contextlib.closing(lock):
        yield


class _Loop:
    """Starts what is not done, as many runs at a time as the launcher takes, and shows how they get on."""

    def __init__(self, sweep: Sweep, costs: Sequence[study.Cost], launcher: Any, each: Callable[[], None]):
        self.sweep, self.launcher, self.each = sweep, launcher, each
        self.costs = dict(zip((run.name for run in sweep.runs), costs, strict=True))
        self.runs = {run.name: run for run in sweep.runs}
        self.table = outcomes.Table([run.name for run in sweep.runs])
        self.states: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.jobs: dict[str, Any] = {}  # under way, by run
        self.told: dict[str, int] = {}  # how many of the signals a job was told of
        self.tries: collections.Counter[str] = collections.Counter()
        self.signals: list[int] = []

    def run_all(self) -> int:
        """Starts what is not done, whatever became of the runs before; returns the exit code to leave with."""
        waiting, runs = list(self.sweep.runs), self.runs
        states = [one["state"] for one in _results(self.sweep, self.costs.values())]
        self.states = {run.name: self._status(run, state) for run, state in zip(waiting, states, strict=True)}
        with self._stop_signals():
            while self.jobs or (waiting and not self.signals):
                while len(self.jobs) < self.launcher.at_once and not self.signals:
                    ready = [run for run in waiting if self._parents_are(run, ("done", "failed"))]
                    if not ready:
                        break
                    waiting.remove(ready[0])
                    self._start(ready[0])
                self._look()
                for number, (name, job) in enumerate(list(self.jobs.items())):
                    code = job.wait(0 if number else POLL)
                    if code is not None and self._ended(runs[name], code):
                        waiting.insert(0, runs[name])
        for name, what in self.failed.items():
            log = self.sweep.workdir / name / LOG_FILE
            print(f"experiments.sweep: {name} {what}" + (f"; {log}" if log.exists() else ""), file=sys.stderr)
        if self.signals:
            name = signal.Signals(self.signals[0]).name
            text = f"stopped by {name}; the same command continues from there"
            code = EXIT_INTERRUPTED if self.signals[0] == signal.SIGINT else EXIT_STOPPED
            return exits.fail(COMMAND, text, code)
        print(f"{len(runs) - len(self.failed)} of {len(runs)} runs done: {self.sweep.workdir}")
        return EXIT_FAILED if self.failed else 0

    def _parents_are(self, run: Run, states: Sequence[str]) -> bool:
        """Whether the runs that this one needs have come to one of these states."""

        def state(name: str) -> str:
            if self._done(self.runs[name]):
                return "done"
            return "failed" if name in self.failed else "running"

        return all(state(name) in states for name in run.parents.values())

    def _start(self, run: Run) -> None:
        """Has the launcher start the run, if it is not done."""
        if self._done(run):
            return self._show(run, self._status(run, "done"))
        if not self._parents_are(run, ("done",)):
            failed = [name for name in run.parents.values() if name in self.failed]
            self.failed[run.name] = f"not started, as {' and '.join(failed)} failed"
            return self._show(run, self.failed[run.name])
        # Programs are compiled once for all runs of their shapes, whatever their seeds, and not again when a run goes on.
        cache = (self.sweep.workdir / CACHE_DIR).absolute()
        own = run.overrides | {field: str(self.sweep.workdir / name) for field, name in run.parents.items()}
        overrides = [f"--config.{field}={value}" for field, value in own.items()]
        order = Order([*self.sweep.arguments, *overrides], self.sweep.workdir / run.name, Path.cwd(), cache)
        self.told[run.name] = 0
        try:
            self.jobs[run.name] = self.launcher.start(order)
        except (OSError, ValueError) as error:  # another sweep has it; no process or job can be made
            self.failed[run.name] = f"can't start: {error}"
            return self._show(run, self.failed[run.name])
        self._pass_on(run.name)  # what came since before there was a job to pass it on to

    def _look(self) -> None:
        """Shows how the runs under way get on."""
        for name, job in self.jobs.items():
            queued, live = job.queued, self.table.live
            self.states[name] = "queued" if queued else self._status(self.runs[name], "running", live)
        if self.jobs:
            self.table.show(self.states, next(iter(self.jobs)))

    def _ended(self, run: Run, code: int) -> bool:
        """Notes what became of the run; returns whether it is to be started again."""
        del self.jobs[run.name]
        if self._done(run):
            self._show(run, self._status(run, "done"))
            self.each()
        elif self.signals:
            self._show(run, self._status(run, "stopped"))
        elif (code < 0 or code in LOST) and self.tries[run.name] < self.launcher.retries:
            self.tries[run.name] += 1
            again = f"started again ({self.tries[run.name]} of {self.launcher.retries})"
            self._show(run, f"{again} after exit {code}: {_last_line(self.sweep.workdir / run.name)}")
            return True
        else:
            self.failed[run.name] = f"failed (exit {code}): {_last_line(self.sweep.workdir / run.name)}"
            self._show(run, self.failed[run.name])
        return False

    def _show(self, run: Run, state: str) -> None:
        """Shows and writes down a run's new state."""
        self.states[run.name] = state
        self.table.show(self.states, run.name)
        outcomes.write(self.sweep, _results(self.sweep, self.costs.values(), self.failed))

    def _done(self, run: Run) -> bool:
        found = outcomes.result(self.sweep.workdir / run.name, run, self.costs[run.name])
        return found["state"] == "done"

    def _status(self, run: Run, state: str, live: bool = True) -> str:
        return outcomes.status(self.sweep.workdir / run.name, run, state, live)

    @contextlib.contextmanager
    def _stop_signals(self) -> Iterator[None]:
        """Passes SIGTERM and Ctrl-C on to the runs under way; a second one kills them."""

        def forward(number: int, _: object) -> None:
            self.signals.append(number)
            for name in list(self.jobs):
                self._pass_on(name)

        before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_on(self, name: str) -> None:
        while self.told[name] < len(self.signals):
            first = self.told[name] == 0
            self.told[name] += 1
            self.jobs[name].stop(self.signals[0] if first else signal.SIGKILL)


def _results(sweep: Sweep, costs: Iterable[study.Cost], failed: Collection[str] = ()) -> list[dict[str, Any]]:
    found = [
        outcomes.result(sweep.workdir / run.name, run, cost)
        for run, cost in zip(sweep.runs, costs, strict=True)
    ]
    return [one | ({"state": "failed"} if one["run"] in failed else {}) for one in found]


def _last_line(directory: Path) -> str:
    lines = (directory / LOG_FILE).read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
