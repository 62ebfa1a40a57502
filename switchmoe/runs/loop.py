"""The loop: carries a run's parts from the first step to the report.

A run lives in a directory and is what its `config.json` says. The same call on the same directory
continues from the last checkpoint and gives what the uninterrupted run would have given.
"""

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from switchmoe.data.progress import told
from switchmoe.parallel import distributed, sharding
from switchmoe.planning import flops
from switchmoe.runs import buckets, checkpoints, text
from switchmoe.runs.integrity import damage
from switchmoe.runs.lock import Lock
from switchmoe.runs.parts import Context, Kind, Parts
from switchmoe.runs.placing import Rows
from switchmoe.runs.programs import Programs
from switchmoe.runs.reporting import Clock, Progress
from switchmoe.runs.resuming import Differences, flat
from switchmoe.runs.rundir import REPORT_FILE, check, claim, last_step, read_run
from switchmoe.runs.signals import Stop, Stopped, stop_signals
from switchmoe.runs.skipping import Skips
from switchmoe.runs.stopping import Patience, ended_early, patience
from switchmoe.runs.telling import Teller, versions
from switchmoe.settings import Settings, to_dict
from switchmoe.training import optimizers, train_state
from switchmoe.training.train_state import TrainState


class NonFiniteLoss(RuntimeError):
    """Training stopped at a loss or gradient that is not a number; one line."""


def run(
    settings: Settings,
    workdir: str | Path,
    progress: Progress,
    write_report: Callable[[Path], Any],
    kind: Kind = text.PRETRAINING,
) -> str:
    """Trains to ``train.num_steps`` in ``workdir``, a directory or a place in a bucket, and has its report written.

    Args:
      write_report: called with the run's directory when all is done, as `analysis.report.write_report`.
      kind: what is trained on what, how it is judged and where it starts (`parts`).

    Returns:
      where report.html is.

    Raises:
      ValueError: settings or data that can't work; nothing was written to the directory's run.
      NonFiniteLoss, Stopped, checkpoints.CheckpointError: see there.
    """
    shared = {name: value for name, value in flat(to_dict(settings)).items() if name != "mesh.process"}
    distributed.check_same(shared | versions() | {"workdir": str(workdir)})
    place = buckets.Place(workdir)
    with contextlib.ExitStack() as held, place.named():
        stop = held.enter_context(stop_signals())
        lock, differences = _open(settings, place, progress, held)
        if done := _done(settings, place, differences):
            if distributed.is_main():
                progress.note(done)
            return f"{place.name}/{REPORT_FILE}"
        teller = Teller(settings, place, progress)
        mesh, lengths = sharding.make_mesh(settings.mesh), kind.lengths(settings)
        group_tokens = sharding.check(settings, lengths, mesh.shape)
        tx = train_state.optimizer(settings)
        parts, saved = _make(kind, settings, place, mesh, teller, lock, differences, held)
        rows = Rows(settings.data, mesh)
        iterator = held.enter_context(contextlib.closing(parts.data.batches(rows.streams)))
        held.enter_context(teller.pushed_in_the_end())
        held.enter_context(jax.set_mesh(mesh))
        held.enter_context(sharding.rules(settings))
        with told(teller.note, "compiling the step and the evaluations", at_once=True):
            programs = Programs(settings, tx, parts, mesh, rows.shapes(parts.data.lengths))
        goes_on = saved.latest() is not None
        state = saved.restore(programs.abstract, iterator) if goes_on else parts.start.load(programs.init())
        start, peak = int(state.step), flops.matmul_peak(settings.model.dtype)
        iterator.start_prefetch()  # only now, as it would have slowed the measurement
        _describe(parts, teller, programs, peak, lengths, group_tokens)
        teller.resumed(start, differences)
        waits = patience(settings.train.patience, place.local, parts.best, start)
        if teller.main and start < settings.train.num_steps and not waits.over:  # a run's last acts, to come
            (place.local / REPORT_FILE).unlink(missing_ok=True)
            known = read_run(place.local)
            if over := [name for name in ("stopped_early", "not_finite") if known.get(name) is not None]:
                teller.update(**dict.fromkeys(over))
        places = settings.data.batch_size * sum(lengths.values())
        loop = _Loop(
            settings, place, parts, programs, teller, saved, rows, iterator, stop, waits, peak, places
        )
        with teller.recording(start):
            state = loop.steps(state)
        with told(teller.note, "measuring what the report shows", at_once=True):
            finished = parts.finish(state.params)
        if teller.main:
            teller.update(**finished)
            write_report(place.local)
            place.push_all()
        saved.wait()  # as it may say that the state could not be saved, after all else is done
        if waits.record:
            teller.note(ended_early(waits.record, settings.train.num_steps, place.name, saved.steps()))
    return f"{place.name}/{REPORT_FILE}"


def _open(
    settings: Settings, place: buckets.Place, progress: Progress, held: contextlib.ExitStack
) -> tuple[Lock, Differences]:
    """Fetches what is in the place, and looks whether the run that is there is this one."""
    with distributed.main_first():
        held.callback(place.close)
        place.open(jax.process_count())
        lock = Lock(place.local, progress.note)
        held.callback(lock.close)
        if distributed.is_main() and (place.local / "config.json").exists():
            lock.take()  # before anything of another run's is read or deleted
            place.take()
        return lock, check(place.local, settings, place.checkpoints)


def _done(settings: Settings, place: buckets.Place, differences: Differences) -> str | None:
    """Says of a run with these very settings, a good checkpoint of its last step and a report that it is done; None of others.

    A run without all of them goes the long way, which makes good what is missing, or says what is wrong.
    """
    done = None
    if distributed.is_main() and not differences.changed and (place.local / REPORT_FILE).exists():
        known = read_run(place.local)
        early, last = known.get("stopped_early"), last_step(settings, known)
        steps = buckets.complete_steps(place.checkpoints)
        newest = max(steps, default=None)
        if newest == last and not damage(place.checkpoints / str(last)):
            how = (
                ended_early(early, settings.train.num_steps, place.name, steps)
                if early
                else f"step {last} was its last"
            )
            done = f"nothing to do: the run in {place.name} is done; {how}"
    return distributed.gathered(done)[0]


def _make(
    kind: Kind,
    settings: Settings,
    place: buckets.Place,
    mesh: Mesh,
    teller: Teller,
    lock: Lock,
    differences: Differences,
    held: contextlib.ExitStack,
) -> tuple[Parts, checkpoints.Checkpoints]:
    """The run's parts and its checkpoints; when both are known to be good the directory is made this run's."""

    def opened() -> checkpoints.Checkpoints:
        saved = checkpoints.Checkpoints(place.checkpoints, settings.checkpoint, teller.note)
        return held.enter_context(contextlib.closing(saved))

    begun = distributed.gathered(bool(buckets.complete_steps(place.checkpoints)))[0]
    with distributed.main_first():
        parts = kind.parts(Context(settings, place.local, mesh, begun, teller.note))
    distributed.check_same(parts.data.identity | {"init": parts.start.record})
    with distributed.main_first():
        if teller.main:
            parts.data.prepare()
    # Where there are none Orbax makes their directory, which is to be this run's by then.
    saved = opened() if begun else None
    with distributed.main_first():
        if teller.main:
            claim(place.local, settings, lock, **teller.begins((saved and saved.latest()) or 0, differences))
            place.take()
            parts.data.keep()
    return parts, saved or opened()


def _describe(
    parts: Parts, teller: Teller, programs: Programs, peak: float, lengths: dict, group_tokens: dict
) -> None:
    if not teller.main:
        return
    record, lines = parts.data.tell()
    record |= {"matmul_peak_flops": peak, "compile_seconds": programs.compile_seconds}
    if parts.start.record:
        record["init"] = parts.start.record
    teller.describe(record, lengths, group_tokens)
    for line in lines:
        teller.note(line)


class _Loop:
    """The steps: a step's metrics are read when the next one is under way."""

    def __init__(
        self,
        settings: Settings,
        place: buckets.Place,
        parts: Parts,
        programs: Programs,
        teller: Teller,
        saved: checkpoints.Checkpoints,
        rows: Rows,
        iterator: Any,
        stop: Stop,
        waits: Patience,
        peak: float,
        places: int,
    ):
        self.settings, self.place, self.parts, self.programs = settings, place, parts, programs
        self.teller, self.saved, self.rows, self.iterator = teller, saved, rows, iterator
        self.stop, self.waits, self.peak, self.places = stop, waits, peak, places
        self.schedule = optimizers.schedule(settings.optimizer, settings.train.num_steps)

    def steps(self, state: TrainState) -> TrainState:
        """From the state's step to num_steps, or to where patience ends."""
        train, every, start = self.settings.train, self.settings.checkpoint.every, int(state.step)
        self.stop.deferred = True
        self.clock = Clock()
        self.skips = Skips(self.place.local, start)
        # Updates of another run, whose optimizer's state this one began with.
        self.earlier = optimizers.updates(state.opt_state) - self.skips.updates_before(start + 1)
        running: tuple[int, dict] | None = None
        for step in range(start + 1, train.num_steps + 1):
            if self.waits.over or self.stop.due(step):
                break
            with self.clock.waiting():
                batch = self.rows.put(next(self.iterator))
            state, metrics = self.programs.step(state, batch)
            if running:
                self._read(*running)
            running = step, metrics
            last = step == train.num_steps
            evaluates, saves = step % train.eval_every == 0 or last, step % every == 0 or last
            if evaluates or saves:
                self._read(*running)
                running = None
                with self.clock.paused():
                    self._check(step, parameter_norm=float(self.programs.norm(state.params)))
                    quality = self._judge(step, state.params) if evaluates else None
                    if saves or self.waits.over:
                        self._save(step, state, quality)
        if running:
            self._read(*running)
        self.teller.update(add=self.clock.news())
        if train.patience:
            self.teller.update(stopped_early=self.waits.record)
        if self.stop.number and int(state.step) < train.num_steps and not self.waits.over:
            self._leave(state)
        return state

    def _read(self, step: int, metrics: dict) -> None:
        """Waits for a step; stops the run if it went wrong; logs it if it is due."""
        train = self.settings.train
        skipped = bool(metrics.get("skipped", False))
        seen = {name: float(metrics[name]) for name in ("loss", "grad_norm")}
        if skipped:
            self.skips.add(step)
        if not skipped or self.skips.in_a_row(step) > train.skip_nonfinite:
            self._check(step, **seen)
        else:
            self.teller.note(f"warning: step {step}: {_values(seen)}; this update is skipped")
        self.clock.step(int(metrics["tokens"]))
        if step % train.log_every and step not in (1, train.num_steps) and not skipped:
            return
        seconds, waited, tokens = self.clock.lap()
        figures = jax.device_get(metrics) | {
            "learning_rate": float(self.schedule(self.earlier + self.skips.updates_before(step))),
            "step_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "padded_tokens_per_second": self.places / seconds,
            "input_wait_share": waited / seconds,
            "model_flops": self.parts.flops,
            "peak_share": self.parts.flops / seconds / (self.peak * jax.device_count()),
        }
        self.teller.record(step, "train", figures)

    def _check(self, step: int, **seen: float) -> None:
        """Stops the run where a number is not finite."""
        if all(map(math.isfinite, seen.values())):
            return
        self.teller.update(not_finite=step)
        with contextlib.suppress(checkpoints.CheckpointError):  # the last save may be under way
            self.saved.wait()
        size, good = self.settings.data.batch_size, self.saved.latest()
        skipped = self.skips.in_a_row(step - 1)
        raise NonFiniteLoss(
            f"step {step}: {_values(seen)}{f', after {skipped} skipped' if skipped else ''}. Batch {step} of the"
            f" data's order (sequences {(step - 1) * size} to {step * size - 1}); last good checkpoint:"
            f" {'none' if good is None else self.saved.directory / str(good)}"
        )

    def _judge(self, step: int, params: Any) -> float:
        """Has all judges measure; returns the figure by which the best checkpoints are kept."""
        found = {}
        for judge in self.parts.judges:
            started = time.monotonic()
            with told(self.teller.note, f"step {step}, measuring {judge.name}"):
                figures = judge.figures(params)
            figures["seconds"] = time.monotonic() - started
            found[judge.name] = self.teller.record(step, judge.name, figures)
        judge, figure = self.parts.best
        self.waits.add(step, found[judge][figure])
        return found[judge][figure]

    def _save(self, step: int, state: TrainState, quality: float | None = None) -> None:
        """``quality``: of this very state, where it was judged; an older one would mislead."""
        self.teller.update(add=self.clock.news())  # of these steps, which a kill from here on leaves done
        self.teller.push()  # what was told up to this step is there before the step is
        self.saved.save(step, state, self.iterator, to_dict(self.settings), quality)
        if self.place.stages:
            self.saved.settle()
            buckets.guarded(self.place.push_steps, self.settings.checkpoint.on_error, self.teller.note)

    def _leave(self, state: TrainState) -> None:
        step = int(state.step)
        if step:
            self._check(step, parameter_norm=float(self.programs.norm(state.params)))
            self._save(step, state)
            if self.teller.main:
                self.place.push_all()
            self.saved.wait()
        kept = f"saved in {self.place.name}" if step else "with nothing to save yet"
        raise Stopped(
            f"stopped by {self.stop.name} after step {step}, {kept}; the same command continues from there",
            self.stop.number,
        )


def _values(seen: dict[str, float]) -> str:
    return ", ".join(f"{name} {value}" for name, value in seen.items())
