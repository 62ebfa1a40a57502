"""The run: data, state, steps, evaluation, checkpoints, signals, report.

A run lives in a directory and is what its `config.json` says. The same call on the same directory
continues from the last checkpoint and gives what the uninterrupted run would have given.
"""

import contextlib
import functools
import importlib.metadata
import math
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import switchmoe
from switchmoe.data import batches, sources, vocabulary
from switchmoe.data.progress import told
from switchmoe.inference import decoding
from switchmoe.model import transformer
from switchmoe.model.moe import dispatch_name, group_shape, router_name, without_effect
from switchmoe.parallel import distributed, sharding
from switchmoe.planning import flops
from switchmoe.routing import expert_capacity
from switchmoe.runs import buckets, checkpoints
from switchmoe.runs.lock import Lock
from switchmoe.runs.origin import CHANGES_SUMS, commit, environment, machine
from switchmoe.runs.reporting import Clock, MetricsWriter, Progress
from switchmoe.runs.resuming import Differences, flat
from switchmoe.runs.rundir import REPORT_FILE, check, check_documents, claim, read_run, update_run
from switchmoe.runs.signals import Stop, Stopped, stop_signals
from switchmoe.runs.skipping import Skips
from switchmoe.settings import MoESettings, Settings, to_dict
from switchmoe.training import optimizers, train_state, train_step

NUM_EXAMPLES = 5
UNIGRAM_BATCHES = 200
UNKNOWN_WARNED, UNKNOWN_REFUSED = 0.01, 0.5  # shares of the held-out pieces
VOCABULARY_FILE = "vocabulary.model"
VERSIONS_OF = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class NonFiniteLoss(RuntimeError):
    """Training stopped at a loss or gradient that is not a number; one line."""


def run(
    settings: Settings, workdir: str | Path, progress: Progress, write_report: Callable[[Path], Path]
) -> str:
    """Trains to ``train.num_steps`` in ``workdir``, a directory or a place in a bucket, and has its report written.

    Args:
      write_report: called with the run's directory when all is done, as `analysis.report.write_report`.

    Returns:
      where report.html is.

    Raises:
      ValueError: settings or data that can't work; nothing was written to the directory's run.
      NonFiniteLoss, Stopped, checkpoints.CheckpointError: see there.
    """
    shared = {name: value for name, value in flat(to_dict(settings)).items() if name != "mesh.process"}
    distributed.check_same(shared | _versions() | {"workdir": str(workdir)})
    place = buckets.Place(workdir)
    with contextlib.ExitStack() as held, place.named():
        with distributed.main_first():
            held.callback(place.close)
            place.open(jax.process_count())
            workdir = place.local
            lock = Lock(workdir, progress.note)
            held.callback(lock.close)
            if distributed.is_main() and (workdir / "config.json").exists():
                lock.take()  # before anything of another run's is read or deleted
                place.take()
            differences = check(workdir, settings, place.checkpoints)
        with stop_signals() as stop:
            _Run(settings, place, progress, stop, lock, differences, write_report).train()
    return f"{place.name}/{REPORT_FILE}"


class _Run:
    """What the steps of `run` share."""

    def __init__(
        self,
        settings: Settings,
        place: buckets.Place,
        progress: Progress,
        stop: Stop,
        lock: Lock,
        differences: Differences,
        write_report: Callable[[Path], Path],
    ):
        self.write_report = write_report
        self.settings, self.place, self.progress, self.stop = settings, place, progress, stop
        self.workdir = workdir = place.local
        self.main = distributed.is_main()
        self.lock, self.differences = lock, differences
        length = batches.target_length(settings.data)
        lengths = {"encoder": settings.data.input_length, "decoder": length}
        self.mesh = sharding.make_mesh(settings.mesh)
        self.group_tokens = sharding.check(settings, lengths, self.mesh.shape)
        self.target_length = length
        with distributed.main_first():
            documents = sources.load_splits(settings.data, self._note)
            self.vocabulary = _vocabulary(settings, workdir, documents["train"], self._note)
            self.fingerprints = {split: found.fingerprint for split, found in documents.items()}
            check_documents(workdir, settings.data.source, self.fingerprints)
        self.document_counts = {split: len(found) for split, found in documents.items()}
        distributed.check_same(self.fingerprints | {"vocabulary": self.vocabulary.sha256})
        self.evaluation = batches.eval_batches(
            settings.data, self.vocabulary, documents["validation"], settings.train.eval_batches
        )
        self.rare = _rare_shares(settings, self.evaluation, self.vocabulary)
        arguments = (settings.data, self.vocabulary, documents["train"], settings.train.seed)
        with distributed.main_first():
            if self.main:
                self._claim(arguments)
        self.rows, streams = _rows(settings, self.mesh)
        self.iterator = batches.train_batches(*arguments, streams)
        self.layers = transformer.sparse_layer_names(settings)

    def _claim(self, arguments: tuple) -> None:
        """Makes the directory this run's; what is known before the first step goes into it."""
        self.unigram = read_run(self.workdir).get("unigram_cross_entropy")
        if self.unigram is None:
            counting = told(self._note, "counting the unigram baseline")
            with counting, contextlib.closing(batches.train_batches(*arguments)) as fresh:
                self.unigram = batches.unigram_cross_entropy(
                    fresh,
                    self.evaluation,
                    self.settings.embedding_rows,
                    _unigram_batches(self.settings, arguments[2]),
                )
        claim(self.workdir, self.settings, self.lock)
        self.place.take()
        _keep_vocabulary(self.vocabulary, self.workdir)

    def train(self) -> None:
        with (
            self._told_in_the_end(),
            jax.set_mesh(self.mesh),
            sharding.rules(self.settings),
            contextlib.closing(self.iterator),
            contextlib.closing(
                checkpoints.Checkpoints(self.place.checkpoints, self.settings.checkpoint, self._note)
            ) as self.saved,
        ):
            state = self._compile()
            start = int(state.step)
            self.peak = flops.matmul_peak(self.settings.model.dtype)
            self.iterator.start_prefetch()  # only now, as it would have slowed the measurement
            if self.main:
                self._describe(start)
            with contextlib.ExitStack() as writing:
                if self.main:
                    writer = MetricsWriter(self.workdir, resume_step=start)
                    self.write = writing.enter_context(contextlib.closing(writer)).write
                self.skips = Skips(self.workdir, start)
                state = self._steps(state, start)
            examples = self._examples(state.params)
            if self.main:
                update_run(self.workdir, examples=examples)
                self.write_report(self.workdir)
            self.saved.wait()  # last, as it may say that the state could not be saved

    @contextlib.contextmanager
    def _told_in_the_end(self) -> Iterator[None]:
        """What is known when the run ends, in whatever way, is in the bucket."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(buckets.Unreachable):  # the first error is the one to tell
                self._push()
            raise
        self._push()

    def _push(self, at_least_every: float = 0.0) -> None:
        if self.main:
            on_error = self.settings.checkpoint.on_error
            buckets.guarded(lambda: self.place.push(at_least_every), on_error, self._note)

    def _compile(self) -> train_state.TrainState:
        """Compiles both steps ahead of time; returns the first state, or the last saved one."""
        settings = self.settings
        tx = train_state.optimizer(settings)
        self.schedule = optimizers.schedule(settings.optimizer, settings.train.num_steps)
        abstract = train_state.sharded_state(settings, tx, self.mesh)
        where = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        whole = where.step
        started = time.monotonic()
        # An argument of the programs, so that runs of all seeds find them in the compilation cache.
        key = jax.jit(jax.random.key, out_shardings=whole)(np.uint32(settings.train.seed))
        init = jax.jit(functools.partial(train_state.init_state, settings, tx), out_shardings=where)
        init = functools.partial(init.lower(key).compile(), key)
        batch = self._put_global(self.evaluation[0])
        self.step = functools.partial(train_step.compile_step(settings, tx, abstract, batch, key), key=key)
        evaluate = functools.partial(train_step.eval_step, settings=settings)
        self.evaluate = jax.jit(evaluate, out_shardings=whole).lower(abstract.params, batch).compile()
        self.norm = jax.jit(optax.global_norm, out_shardings=whole)
        greedy = functools.partial(decoding.greedy, length=self.target_length, settings=settings)
        self.decode = jax.jit(greedy, out_shardings=whole)
        self.compile_seconds = time.monotonic() - started
        if self.saved.latest() is not None:
            return self.saved.restore(abstract, self.iterator)
        return init()

    def _describe(self, start: int) -> None:
        settings = self.settings
        total, active = train_state.parameter_counts(settings)
        device = jax.devices()[0]
        update_run(
            self.workdir,
            parameters=total,
            parameters_active=active,
            unigram_cross_entropy=self.unigram,
            unknown_pieces=self.rare["unknown"],
            byte_pieces=self.rare["bytes"],
            matmul_peak_flops=self.peak,
            platform=device.platform,
            device=f"{jax.device_count()} x {device.device_kind}",
            group_tokens=self.group_tokens,
            compile_seconds=self.compile_seconds,
            vocabulary_sha256=self.vocabulary.sha256,
            documents=self.document_counts,
            documents_sha256=self.fingerprints,
            processes=jax.process_count(),
            versions=_versions(),
            machine=machine(),
            commit=commit(),
            environment=environment(),
        )
        say = self.progress.note
        repeats = batches.repeated_rows(settings.data, self.document_counts["train"])
        if repeats:
            say(repeats)
        experts = (
            f"{settings.moe.num_experts} experts in each of {len(self.layers)} layers"
            if self.layers
            else "dense"
        )
        say(f"model: {total / 1e6:.1f} M parameters, {active / 1e6:.1f} M for a token, {experts}")
        idle = without_effect(settings.moe)
        if idle:
            say(f"settings without effect here: {', '.join(f'moe.{name}' for name in idle)}")
        for stack, tokens in self.group_tokens.items():
            causal = stack == "decoder"
            names = router_name(settings.moe, causal), dispatch_name(settings.moe, causal)
            say(f"{stack}: router {names[0]}, dispatch {names[1]}")
            batch, length = self.evaluation[0]["inputs" if stack == "encoder" else "targets"].shape
            _, held_out = group_shape(batch, length, settings.moe.eval_group_size)
            say(
                f"{stack}: {_group(tokens, settings.moe, settings.moe.capacity_factor)} (moe.group_size);"
                f" held out {_group(held_out, settings.moe, settings.moe.eval_capacity_factor)}"
            )
        say(
            f"device: {jax.device_count()} x {device.device_kind}, matrix products {self.peak / 1e9:,.0f} GFLOP/s"
        )
        say(
            f"unigram baseline: {self.unigram:.3f} nats a target token; compiled in {self.compile_seconds:.0f} s"
        )
        say(
            f"vocabulary: {self.rare['unknown']:.2%} unknown, {self.rare['bytes']:.2%} single bytes of the held-out pieces"
        )
        if self.rare["unknown"] > UNKNOWN_WARNED:
            say(
                f"warning: the vocabulary does not fit the text: {self.rare['unknown']:.1%} of its pieces are unknown, and"
                " easy to predict; the loss says little (data.vocab, or '' to train one)"
            )
        for name in sorted(environment().keys() & CHANGES_SUMS):
            say(f"environment: {name}={environment()[name]} (the last digits of results may depend on it)")
        if start:
            say(f"resuming from the checkpoint of step {start} in {self.place.name}")
        if start < settings.train.num_steps:  # a run's last act, which is to come
            (self.workdir / REPORT_FILE).unlink(missing_ok=True)
        if self.differences.missing:
            names = ", ".join(self.differences.missing)
            say(
                f"this run began with an earlier version; settings that it did not have are at their defaults: {names}"
            )
        if self.differences.changed:
            changed = {name: list(values) for name, values in self.differences.changed.items()}
            known = read_run(self.workdir).get("changed", [])
            update_run(self.workdir, changed=[*known, {"step": start} | changed])
            say(
                "settings changed since the last start: "
                + ", ".join(f"{n} ({a} -> {b})" for n, (a, b) in changed.items())
            )

    def _steps(self, state: train_state.TrainState, start: int) -> train_state.TrainState:
        """Steps start + 1 ... num_steps; a step's metrics are read when the next one is under way."""
        train, every = self.settings.train, self.settings.checkpoint.every
        self.stop.deferred = True
        clock = Clock()
        running: tuple[int, dict] | None = None
        for step in range(start + 1, train.num_steps + 1):
            if self.stop.due(step):
                break
            with clock.waiting():
                batch = self._put(next(self.iterator))
            state, metrics = self.step(state, batch)
            if running:
                self._read(*running, clock)
            running = step, metrics
            last = step == train.num_steps
            evaluates, saves = step % train.eval_every == 0 or last, step % every == 0 or last
            if evaluates or saves:
                self._read(*running, clock)
                running = None
                with clock.paused():
                    self._check(step, parameter_norm=float(self.norm(state.params)))
                    quality = self._evaluate(step, state.params) if evaluates else None
                    if saves:
                        self._save(step, state, quality)
        if running:
            self._read(*running, clock)
        if self.main:
            update_run(self.workdir, add=clock.totals())
        if self.stop.number and int(state.step) < train.num_steps:
            self._leave(state)
        return state

    def _read(self, step: int, metrics: dict, clock: "Clock") -> None:
        """Waits for a step; stops the run if it went wrong; logs it if it is due."""
        train = self.settings.train
        skipped = bool(metrics.get("skipped", False))
        seen = {name: float(metrics[name]) for name in ("loss", "grad_norm")}
        if skipped:
            self.skips.add(step)
        if not skipped or self.skips.in_a_row(step) > train.skip_nonfinite:
            self._check(step, **seen)
        else:
            self._note(f"warning: step {step}: {_values(seen)}; this update is skipped")
        clock.step(int(metrics["tokens"]))
        if step % train.log_every and step not in (1, train.num_steps) and not skipped:
            return
        seconds, waited, tokens = clock.lap()
        record = self._record(step, "train", jax.device_get(metrics))
        work = flops.train_flops(self.settings, self.target_length)
        places = self.settings.data.batch_size * (self.settings.data.input_length + self.target_length)
        record |= {
            "learning_rate": float(self.schedule(self.skips.updates_before(step))),
            "step_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "padded_tokens_per_second": places / seconds,
            "input_wait_share": waited / seconds,
            "model_flops": work,
            "peak_share": work / seconds / (self.peak * jax.device_count()),
        }
        self._tell(record)

    def _check(self, step: int, **seen: float) -> None:
        """Stops the run where a number is not finite."""
        if not all(map(math.isfinite, seen.values())):
            if self.main:
                update_run(self.workdir, not_finite=step)
            with contextlib.suppress(checkpoints.CheckpointError):  # the last save may be under way
                self.saved.wait()
            size, good = self.settings.data.batch_size, self.saved.latest()
            skipped = self.skips.in_a_row(step - 1)
            raise NonFiniteLoss(
                f"step {step}: {_values(seen)}{f', after {skipped} skipped' if skipped else ''}. Batch {step} of the"
                f" data's order (sequences {(step - 1) * size} to {step * size - 1}); last good checkpoint:"
                f" {'none' if good is None else self.saved.directory / str(good)}"
            )

    def _evaluate(self, step: int, params: Any) -> float:
        started = time.monotonic()
        parts = [self.evaluate(params, self._put_global(batch)) for batch in self.evaluation]
        sums, counts = jax.tree.map(lambda *values: sum(values), *jax.device_get(parts))
        record = self._record(
            step, "validation", jax.device_get(train_step.summarize(sums, counts, self.settings))
        )
        record["seconds"] = time.monotonic() - started
        self._tell(record)
        return record["cross_entropy"]

    def _tell(self, record: dict) -> None:
        if self.main:
            self.write(record)
            self.progress.update(record)
            self._push(buckets.OFTEN)

    def _note(self, text: str) -> None:
        if self.main:
            self.progress.note(text)

    def _record(self, step: int, split: str, metrics: dict[str, np.ndarray]) -> dict:
        record = {"step": step, "split": split, "layers": self.layers}
        record |= {name: np.asarray(value).tolist() for name, value in metrics.items()}
        # Capped: an untrained model's perplexity is no use, and exp overflows.
        return record | {"perplexity": math.exp(min(record["cross_entropy"], 700.0))}

    def _save(self, step: int, state: train_state.TrainState, quality: float | None = None) -> None:
        """``quality``: cross-entropy of this very state, where it was evaluated; an older one would mislead."""
        self._push()  # what was told up to this step is there before the step is
        self.saved.save(step, state, self.iterator, to_dict(self.settings), quality)
        if self.place.stages:
            self.saved.wait()
            buckets.guarded(self.place.push_steps, self.settings.checkpoint.on_error, self._note)

    def _leave(self, state: train_state.TrainState) -> None:
        step = int(state.step)
        if step:
            self._check(step, parameter_norm=float(self.norm(state.params)))
            self._save(step, state)
            self.saved.wait()
        kept = f"saved in {self.place.name}" if step else "with nothing to save yet"
        raise Stopped(
            f"stopped by {self.stop.name} after step {step}, {kept}; the same command continues from there",
            self.stop.number,
        )

    def _examples(self, params: Any) -> list[dict[str, str]]:
        """The model's own fill-ins of the first held-out examples."""
        batch = self.evaluation[0]
        shards = self.mesh.shape["data"] * self.mesh.shape["expert"]
        # As many as divide among the shards of the tokens.
        first = {name: rows[: -(-NUM_EXAMPLES // shards) * shards] for name, rows in batch.items()}
        predictions = jax.device_get(self.decode(params, self._put_global(first)["inputs"]))
        return [
            dict(zip(("input", "target", "prediction"), map(self.vocabulary.decode, texts), strict=True))
            for texts in list(zip(first["inputs"], first["targets"], predictions, strict=True))[:NUM_EXAMPLES]
        ]

    def _put(self, batch: batches.Batch) -> dict[str, jax.Array]:
        """The global batch of whose rows this process has read its own."""

        def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
            rows = np.arange(self.settings.data.batch_size)[index[0]]
            return batch[name][np.searchsorted(self.rows, rows)]

        shape, where = self.settings.data.batch_size, sharding.batch_sharding(self.mesh)
        return {
            name: jax.make_array_from_callback((shape, value.shape[1]), where, functools.partial(read, name))
            for name, value in batch.items()
        }

    def _put_global(self, batch: batches.Batch) -> dict[str, jax.Array]:
        """A batch that every process has in full."""
        where = sharding.batch_sharding(self.mesh)
        return {
            name: jax.make_array_from_callback(rows.shape, where, rows.__getitem__)
            for name, rows in batch.items()
        }


def _versions() -> dict[str, str]:
    return {"switchmoe": switchmoe.__version__, "python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in VERSIONS_OF
    }


def _rows(settings: Settings, mesh: jax.sharding.Mesh) -> tuple[np.ndarray, list[int]]:
    """(rows of a batch that this process reads, the streams that fill them): those that its devices need."""
    rows_RN = batches.stream_rows(settings.data)
    where = sharding.batch_sharding(mesh).addressable_devices_indices_map((settings.data.batch_size,))
    needed = np.concatenate([np.arange(settings.data.batch_size)[index] for index in where.values()])
    streams = [n for n, rows_N in enumerate(rows_RN) if np.isin(rows_N, needed).any()]
    return rows_RN[streams].ravel(), streams


def _values(seen: dict[str, float]) -> str:
    return ", ".join(f"{name} {value}" for name, value in seen.items())


def _group(tokens: int, moe: MoESettings, factor: float) -> str:
    slots = expert_capacity(tokens, moe.total_experts, factor, moe.total_choices)
    return f"groups of {tokens} tokens" + ("" if moe.dropless else f", {slots} slots an expert")


def _rare_shares(
    settings: Settings, evaluation: list[batches.Batch], found: vocabulary.Vocabulary
) -> dict[str, float]:
    shares = batches.rare_shares(evaluation, found)
    if shares["unknown"] > UNKNOWN_REFUSED:
        raise ValueError(
            f"data.vocab={settings.data.vocab}: {shares['unknown']:.0%} of the pieces of {settings.data.source} are unknown"
            f" to it; accepted is a vocabulary of that language (at most {UNKNOWN_REFUSED:.0%}), or '' to train one"
        )
    return shares


def _vocabulary(
    settings: Settings, workdir: Path, documents: Any, note: Callable[[str], None]
) -> vocabulary.Vocabulary:
    """The run's own copy, so that a run never changes its vocabulary; else the corpus's."""
    path = workdir / VOCABULARY_FILE
    if path.exists():
        found = vocabulary.Vocabulary.from_bytes(path.read_bytes(), str(path))
        known = read_run(workdir).get("vocabulary_sha256", found.sha256)
        if found.sha256 != known:
            raise ValueError(f"{path}: accepted is the vocabulary that this run began with (SHA-256 {known})")
        return found
    return vocabulary.load_vocabulary(settings.data, documents, note)


def _keep_vocabulary(found: vocabulary.Vocabulary, workdir: Path) -> None:
    path = workdir / VOCABULARY_FILE
    if not path.exists():
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(found.model_bytes)
        temporary.replace(path)


def _unigram_batches(settings: Settings, documents: Any) -> int:
    """Enough batches to count about one pass over a small corpus, and no more than it is worth."""
    return max(1, min(UNIGRAM_BATCHES, len(documents) // settings.data.batch_size))
