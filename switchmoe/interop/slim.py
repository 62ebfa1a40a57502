"""A run's directory of a trained model made smaller (`runs.slimming`), written a layer at a time, and what it is compared by."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from switchmoe.data import local_files
from switchmoe.data.tasks import files as task_files
from switchmoe.interop import growing, run_files
from switchmoe.model import moe_rules
from switchmoe.model.transformer import sparse_layer_names
from switchmoe.quantised import SCALE
from switchmoe.runs import buckets, integrity, measuring, slimming, start, trained
from switchmoe.runs.checkpoints import write_json
from switchmoe.runs.origin import commit
from switchmoe.runs.reporting import MetricsWriter
from switchmoe.runs.rundir import update_run
from switchmoe.runs.slimming import Slimming
from switchmoe.runs.telling import versions
from switchmoe.settings import Settings, to_dict
from switchmoe.training import places, train_state

SLIM_FILE = "slim.json"  # what was asked, and of each layer of which experts each is made
USE_FILE = "use.json"  # each layer's use of its experts, where it was counted: once, whatever stops the rest
Use = dict[str, np.ndarray]  # of each layer: of its experts


def asked(model: trained.Source, how: Slimming, counted: dict[str, Any]) -> dict[str, Any]:
    """By which a slim model is known again; ``counted``: what its experts' use was counted on (`counted_on`)."""
    return {"source": identity(model), **dataclasses.asdict(how), "counted": counted if how.experts else {}}


def identity(model: trained.Source) -> list[Any]:
    return growing.step_identity(Path(model.step))


def counted_on(
    model: trained.Source, text: str, task: str, overrides: dict[str, Any], batches: int
) -> dict[str, Any]:
    """A text and a task, by which they are known again: of local files their sizes and when they were written, too."""
    source = overrides.get("data.source", text or model.settings.data.source)
    found = local_files.paths(source) if (text or not task) and local_files.is_local(source) else []
    for name in task.split(","):
        found += task_files.paths(name) if task_files.is_files(name) else []
    files = [growing.identity(Path(path)) for path in found]
    return {"text": text, "task": task, "batches": batches, "config": overrides, "files": files}


def differing(there: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """The names of what differs; of what was written before it was noted, text and files are not compared."""
    counted = there.get("counted") or wanted["counted"]
    if wanted["counted"]:
        there = there | {"counted": {"files": wanted["counted"]["files"]} | counted}
    return [name for name in wanted if there.get(name) != wanted[name]]


def is_there(target: Path, wanted: dict[str, Any]) -> bool:
    """Whether the target is this very model, whole.

    Raises:
      ValueError: it is something else.
    """
    if not target.exists():
        return False
    path = target / SLIM_FILE
    there = growing.read_json(path).get("asked") if path.exists() else None
    differ = [] if there is None else differing(there, wanted)
    if there is None or differ:
        what = (
            "it is there and no slim model"
            if there is None
            else f"another slim model is there ({', '.join(differ)} differ)"
        )
        raise ValueError(f"--target={target}: {what}; accepted is a name that is free, or the same one's")
    return True


def make(
    model: trained.Source, target: Path, how: Slimming, wanted: dict[str, Any], count: Callable[[], Use]
) -> None:
    """Writes the directory: parameters alone, of one step, the source's (1 where that is 0).

    Args:
      wanted: of `asked`.
      count: gives how much experts are used; called where it is needed, once.

    Raises:
      ValueError: settings that can't be, a damaged step, a target that is there.
    """
    step = max(1, int(model.step.name))
    settings = slimming.settings_of(model.settings, how, step)
    trained.check(model)
    with growing.grown(target, wanted) as work:
        use = _used(model.settings, how, work / USE_FILE, count)
        directory = work / buckets.CHECKPOINTS / str(step)
        kept = trained.dtype(model)
        found = places.names(settings)
        lead = {name: len(next(places.places(settings, name))[2]) for name in found}
        parameters = {name: (shape, lead[name]) for name, shape in found.items()}
        writer = run_files.Writer(directory, parameters, kept, _integers(settings))
        groups = _layers(model, settings, how, use, writer)
        _rest(model, settings, writer)
        (directory / integrity.MANIFEST).write_text(json.dumps(writer.finish(), indent=1))
        if model.vocabulary is not None:
            (work / start.VOCABULARY_FILE).write_bytes(model.vocabulary.model_bytes)
        write_json(work / "config.json", to_dict(settings))
        write_json(work / SLIM_FILE, {"asked": wanted, "experts": groups})


def _integers(settings: Settings) -> dict[str, str]:
    """The types of what is not of the others' type, by name."""
    params = flatten_dict(train_state.parameter_shapes(settings), sep="/")
    found = {name: "int8" for name, leaf in params.items() if leaf.dtype == np.int8}
    return found | dict.fromkeys((name + SCALE for name in found), "float32")


def _used(settings: Settings, how: Slimming, file: Path, count: Callable[[], Use]) -> Use:
    names, experts = sparse_layer_names(settings), settings.moe.total_experts
    if not how.experts:
        return {layer: np.ones(experts) for layer in names}
    if not file.exists():
        write_json(file, {layer: use_E.tolist() for layer, use_E in count().items()})
    return {layer: np.array(use_E) for layer, use_E in growing.read_json(file).items()}


def _layers(
    model: trained.Source, settings: Settings, how: Slimming, use: Use, writer: run_files.Writer
) -> dict[str, list[list[int]]]:
    """Writes routers and experts; returns of which experts each kept one is made, by layer."""
    there, moe, told = slimming.layers(model.settings), model.settings.moe, {}
    new_places = slimming.layers(settings)
    # One for each parameter, as a reader keeps what it read last.
    readers = {
        name: run_files.Reader(Path(model.step)) for parts in there.values() for name, _ in parts.values()
    }
    for layer, parts in there.items():
        router = moe_rules.router_name(moe, layer.startswith("decoder"))
        kernels = {
            inner: readers[name].read(f"params/{name}", index) for inner, (name, index) in parts.items()
        }
        mixed = {inner: kernels.pop(inner) for inner in ("router", "router_bias") if inner in kernels}
        groups = slimming.grouped(use[layer], mixed.get("router"), moe, router, how)
        for inner, kernel in mixed.items():
            old, new = slimming.columns(moe, router), slimming.columns(settings.moe, router)
            if inner == "router_bias":
                old, new = old[:, :1], new[:, :1]
            if how.experts:
                kernel = slimming.slim_router(kernel, old, new, groups, use[layer])
            writer.write(*parts[inner], kernel)
        kernels = slimming.slim_experts(kernels, groups, use[layer], how.align)
        kernels = slimming.integers(kernels, settings.moe) if how.bits else kernels
        here = new_places[layer]
        for inner, kernel in kernels.items():
            writer.write(*here[inner], kernel)
        told[layer] = [members.tolist() for members in groups]
    return told


def _rest(model: trained.Source, settings: Settings, writer: run_files.Writer) -> None:
    """Copies what is no router's and no expert's."""
    reader, done = run_files.Reader(Path(model.step)), slimming.layers(settings).values()
    done = {name for parts in done for name, _ in parts.values()}
    for name in places.names(settings):
        for _, _, index in places.places(settings, name) if name not in done else ():
            writer.write(name, index, reader.read(f"params/{name}", index))


class Row(NamedTuple):
    """A line of the table."""

    model: str
    experts: int
    parameters: int
    bytes_on_disk: int  # of the parameters' values, without what else is in their files' directory
    bytes_in_memory: int  # of the parameters, as they are held
    loss: float
    score: float | None  # the task's
    tokens_per_second: float  # generated


def measured(name: str, model: trained.Source, ruler: measuring.Yardstick, slim: bool) -> Row:
    """Measures a model; a slim one's directory gets the metrics and facts that a run's has."""
    found = measuring.figures(model, ruler)
    total, active = train_state.parameter_counts(model.settings)
    disk = total * jnp.dtype(trained.dtype(model)).itemsize
    if slim:
        directory = Path(model.step)
        disk = run_files.size(directory)
        run = directory.parent.parent
        device = jax.devices()[0]
        update_run(
            run, parameters=total, parameters_active=active, platform=device.platform, versions=versions(),
            device=f"{jax.device_count()} x {device.device_kind}", commit=commit(), processes=jax.process_count(),
        )  # fmt: skip
        _record(run, int(model.step.name), sparse_layer_names(model.settings), found["records"])
    return Row(
        name, model.settings.moe.num_experts, total, disk, found["memory"],
        float(found["records"]["validation"]["cross_entropy"]), found["score"], found["tokens_per_second"],
    )  # fmt: skip


def _record(run: Path, step: int, layers: list[str], records: dict[str, dict[str, Any]]) -> None:
    """Writes `metrics.jsonl`, whatever is there."""
    writer = MetricsWriter(run, resume_step=-1)
    for split, figures in records.items():
        plain = {name: np.asarray(value).tolist() for name, value in figures.items()}
        if "cross_entropy" in plain:
            plain["perplexity"] = float(np.exp(min(plain["cross_entropy"], 700.0)))
        writer.write({"step": step, "split": split, "layers": layers if split != "tasks" else []} | plain)
    writer.close()
