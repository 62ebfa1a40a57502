"""What a run tells, and where: lines to the user, records to `metrics.jsonl`, facts to `run.json`, all of it to a bucket."""

import contextlib
import importlib.metadata
import math
import platform
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

import switchmoe
from switchmoe.model.moe_rules import dispatch_name, group_shape, router_name, slots, without_effect
from switchmoe.model.transformer import sparse_layer_names
from switchmoe.parallel import distributed
from switchmoe.runs import buckets
from switchmoe.runs.origin import CHANGES_SUMS, commit, environment, machine
from switchmoe.runs.reporting import MetricsWriter, Progress
from switchmoe.runs.resuming import Differences
from switchmoe.runs.rundir import read_run, update_run
from switchmoe.settings import MoESettings, Settings
from switchmoe.training import train_state

VERSIONS_OF = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def versions() -> dict[str, str]:
    """Of this code, Python, and the libraries on which the numbers depend."""
    return {"switchmoe": switchmoe.__version__, "python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in VERSIONS_OF
    }


def origin() -> dict[str, Any]:
    """What `run.json` has of the code and the machine that a start is of."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": f"{jax.device_count()} x {device.device_kind}",
        "processes": jax.process_count(),
        "versions": versions(),
        "machine": machine(),
        "commit": commit(),
        "environment": environment(),
    }


OF_A_START = {  # variables that differ from start to start and change nothing
    f"environment.{name}"
    for name in (
        "JAX_COORDINATOR_ADDRESS",
        "JAX_PROCESS_ID",
        "JAX_NUM_PROCESSES",
        "JAX_COMPILATION_CACHE_DIR",
    )
}


def moved(known: dict[str, Any], here: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """(at the last start, here), by name, of what differs in two records of `origin`; what the first lacks is not known."""
    pairs: dict[str, tuple[Any, Any]] = {}
    for name in here.keys() & known.keys():
        there, now = known[name], here[name]
        if isinstance(now, dict):
            pairs |= {f"{name}.{key}": (there.get(key, "none"), now.get(key, "none")) for key in there | now}
        else:
            pairs[name] = there, now
    return {
        name: pair for name, pair in sorted(pairs.items()) if pair[0] != pair[1] and name not in OF_A_START
    }


class Teller:
    """The main process's voice; the others' say nothing."""

    def __init__(self, settings: Settings, place: buckets.Place, progress: Progress):
        self._settings, self._place, self._progress = settings, place, progress
        self._writer: MetricsWriter | None = None
        self.main = distributed.is_main()
        self.layers = sparse_layer_names(settings)
        self._moved: dict[str, tuple[Any, Any]] = {}

    def note(self, text: str) -> None:
        if self.main:
            self._progress.note(text)

    def update(self, **values: Any) -> None:
        """Sets values in `run.json`; those of ``add`` are added to what is there."""
        if self.main:
            update_run(self._place.local, **values)

    @contextlib.contextmanager
    def recording(self, start: int) -> Iterator[None]:
        """While inside, records are written behind those of the steps up to ``start``; later ones are dropped."""
        if not self.main:
            yield
            return
        with contextlib.closing(MetricsWriter(self._place.local, resume_step=start)) as self._writer:
            yield

    def record(self, step: int, split: str, figures: dict[str, Any]) -> dict[str, Any]:
        """Writes a line of `metrics.jsonl`, and shows it."""
        routed = any(name.startswith("layer_") for name in figures)
        record = {"step": step, "split": split, "layers": self.layers if routed else []}
        record |= {name: np.asarray(value).tolist() for name, value in figures.items()}
        if "cross_entropy" in record:
            # Capped: an untrained model's perplexity is no use, and exp overflows.
            record["perplexity"] = math.exp(min(record["cross_entropy"], 700.0))
        if self.main:
            self._writer.write(record)
            self._progress.update(record)
            self.push(buckets.OFTEN)
        return record

    def push(self, at_least_every: float = 0.0) -> None:
        """Copies what is new to the bucket, if the run lives in one and that is so many seconds ago."""
        if self.main:
            on_error = self._settings.checkpoint.on_error
            buckets.guarded(lambda: self._place.push(at_least_every), on_error, self.note)

    @contextlib.contextmanager
    def pushed_in_the_end(self) -> Iterator[None]:
        """What is known when the run ends, in whatever way, is in the bucket."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(buckets.Unreachable):  # the first error is the one to tell
                self.push()
            raise
        self.push()

    def describe(self, facts: dict[str, Any], lengths: dict[str, int], tokens: dict[str, int]) -> None:
        """What the run is, before its first step.

        Args:
          facts: for `run.json`; among them ``matmul_peak_flops`` and ``compile_seconds``.
          lengths: of a sequence in each stack.
          tokens: of a group in training, for each stack with sparse layers.
        """
        total, active = train_state.parameter_counts(self._settings)
        trained = train_state.trained_count(self._settings)
        device = jax.devices()[0]
        count = jax.device_count()
        self.update(
            parameters=total,
            parameters_active=active,
            parameters_trained=trained,
            group_tokens=tokens,
            **facts,
        )
        for line in _model(self._settings, self.layers, total, active, trained):
            self.note(line)
        for line in _routing(self._settings, lengths, tokens):
            self.note(line)
        self.note(
            f"device: {count} x {device.device_kind}, matrix products {facts['matmul_peak_flops'] / 1e9:,.0f} GFLOP/s;"
            f" compiled in {facts['compile_seconds']:.0f} s"
        )
        for name in sorted(environment().keys() & CHANGES_SUMS):
            self.note(
                f"environment: {name}={environment()[name]} (the last digits of results may depend on it)"
            )

    def begins(self, step: int, differences: Differences) -> dict[str, Any]:
        """For `run.json`: the start's `origin`, and in ``changed`` what is not as it was at the last one, at which step."""
        known, here = read_run(self._place.local), origin()
        self._moved = moved(known, here)
        changed = {name: list(values) for name, values in (differences.changed | self._moved).items()}
        return here | ({"changed": [*known.get("changed", []), {"step": step} | changed]} if changed else {})

    def resumed(self, start: int, differences: Differences) -> None:
        """Says that the run goes on, and what is not as it was."""
        if start:
            self.note(f"resuming from the checkpoint of step {start} in {self._place.name}")
        if differences.missing:
            names = ", ".join(differences.missing)
            self.note(
                f"this run began with an earlier version; settings that it did not have are at their defaults: {names}"
            )
        for what, changed in (("settings", differences.changed), ("code or machine", self._moved)):
            if changed:
                told = ", ".join(f"{name} ({old} -> {new})" for name, (old, new) in changed.items())
                self.note(f"{what} changed since the last start: {told}")


def _model(settings: Settings, layers: list[str], total: int, active: int, trained: int) -> list[str]:
    experts = f"{settings.moe.num_experts} experts in each of {len(layers)} layers" if layers else "dense"
    lines = [f"model: {total / 1e6:.1f} M parameters, {active / 1e6:.1f} M for a token, {experts}"]
    if trained < total:
        lines.append(
            f"trained: {trained / 1e6:.3g} M parameters (train.trainable={settings.train.trainable})"
        )
    idle = without_effect(settings.moe, settings.stacks)
    if idle:
        lines.append(f"settings without effect here: {', '.join(f'moe.{name}' for name in idle)}")
    parts = settings.train.accumulate
    if settings.moe.balance == "global" and parts > 1 and "balance" not in idle and layers:
        lines.append(
            f"moe.balance=global: over each of the {parts} microbatches by itself (train.accumulate)"
        )
    return lines


def _routing(settings: Settings, lengths: dict[str, int], tokens: dict[str, int]) -> list[str]:
    moe, lines = settings.moe, []
    for stack, count in tokens.items():
        causal = stack == "decoder"
        router, dispatch = router_name(moe, causal), dispatch_name(moe, causal)
        _, tokens = group_shape(settings.data.batch_size, lengths[stack], moe.eval_group_size)
        held_out = _group(tokens, moe, moe.eval_capacity_factor)
        if settings.stacks == ("decoder",) and not moe.eval_group_size:
            held_out = "nothing is dropped"
        lines.append(f"{stack}: router {router}, dispatch {dispatch}")
        lines.append(
            f"{stack}: {_group(count, moe, moe.capacity_factor)} (moe.group_size); held out {held_out}"
        )
    return lines


def _group(tokens: int, moe: MoESettings, factor: float) -> str:
    return f"groups of {tokens} tokens" + (
        "" if moe.dropless else f", {slots(moe, tokens, factor)} slots an expert"
    )
