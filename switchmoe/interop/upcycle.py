"""A run's directory with a dense model made sparse (`runs.upcycling`)."""

import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from switchmoe.interop import convert, growing, run_files
from switchmoe.interop.growing import Report
from switchmoe.parallel.sharding import path_keys
from switchmoe.runs import buckets, checkpoints, integrity, start, trained, upcycling
from switchmoe.runs.upcycling import Upcycling
from switchmoe.settings import to_dict
from switchmoe.training.train_state import TrainState

Told = Callable[[Callable[[], str]], Any]


def upcycle(
    source: Path, target: Path, dtype: str, how: Upcycling, told: Told, note: Callable[[str], None]
) -> Report:
    """Writes a run's directory of one step, 0, with parameters, and the optimizer's state where it is asked for and there.

    Args:
      dtype: of the parameters and the activations; "": the source's.

    Raises:
      ValueError: a source that is sparse or can't be read, a target that is there; nothing is left at ``target``.
    """
    if target.exists():
        raise ValueError(f"--target={target}: it is there; accepted is a name that is free")
    if not convert.is_run(source):
        return _from_others(convert.recognised(source), target, dtype, how, told, note)
    model = trained.find(str(source))
    upcycling.settings_of(model.settings, how)  # before anything is written
    damage = integrity.damage(model.step, "state")
    if damage:
        raise ValueError(f"--source={source}: it is damaged: {damage}; accepted is a good one")
    with growing.grown(target, _asked(growing.step_identity(Path(model.step)), how, dtype)) as work:
        return _into(work, model, dtype, how, told, note)


def _asked(files: list[Any], how: Upcycling, dtype: str) -> dict[str, Any]:
    return {"files": files, "upcycle": dataclasses.asdict(how), "dtype": dtype}


def _from_others(
    found: convert.Model, target: Path, dtype: str, how: Upcycling, told: Told, note: Callable[[str], None]
) -> Report:
    """Of another code base's directory, by a dense run's that lies where the target grows until that is whole."""
    upcycling.settings_of(found.settings, how)
    files = [growing.identity(file) for file in found.source.files]
    with growing.grown(target, _asked(files, how, dtype)) as work:
        dense, spent = work / "dense", work / "spent"
        shutil.rmtree(spent, ignore_errors=True)
        if not dense.exists():  # whole, where it is there
            convert.into_run(found, dense, dtype, told)
        report = _into(work, trained.find(str(dense)), dtype, how, told, note)
        dense.rename(spent)  # so that no half of it is ever taken for it
        shutil.rmtree(spent)
    return report


def _into(
    work: Path, model: trained.Source, dtype: str, how: Upcycling, told: Told, note: Callable[[str], None]
) -> Report:
    """Writes the sparse run of a dense one to the directory ``work``."""
    settings = upcycling.settings_of(model.settings, how)
    if dtype:
        settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, dtype=dtype))
    reader = run_files.Reader(Path(model.step))
    plan = upcycling.Plan(model.settings, settings, how, upcycling.Saved(reader.shape, reader.read))
    report = _write(plan, work / buckets.CHECKPOINTS / "0", dtype or trained.dtype(model), how, told, note)
    if model.vocabulary is not None:
        (work / start.VOCABULARY_FILE).write_bytes(model.vocabulary.model_bytes)
    checkpoints.write_json(work / "config.json", to_dict(settings))
    return report


def _write(
    plan: upcycling.Plan, step: Path, dtype: str, how: Upcycling, told: Told, note: Callable[[str], None]
) -> Report:
    """The step, a part at a time."""
    parts = [
        (f"params/{name}", index, functools.partial(plan.part, name, index))
        for name in plan.shapes
        for index in plan.parts(name)
    ]
    parts.append(("step", (), lambda: np.zeros((), np.int32)))
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), plan.like(dtype), {})
    if how.optimizer:
        try:
            like, more = plan.optimizer()
            note("with the optimizer's state")
            state, parts = state.replace(opt_state=like), parts + more
        except ValueError:
            note("without an optimizer's state: the source has none of its kind")
    leads = {name: len(index) for name, index, _ in parts}
    leaves = {"/".join(path_keys(path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    arrays = {name: (leaf.shape, leads[name]) for name, leaf in leaves.items()}
    dtypes = {name: str(leaf.dtype) for name, leaf in leaves.items()}
    writer = run_files.Writer(step, arrays, dtype, dtypes, above="")
    counter = growing.Counter(sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values()))
    with told(counter.state):
        for name, index, make in parts:
            there = writer.has(name, index)
            if not there:
                writer.write(name, index, make().astype(dtypes[name], copy=False))
            leaf = leaves[name]
            counter.add(math.prod(leaf.shape[len(index) :]) * leaf.dtype.itemsize, there)
    (step / integrity.MANIFEST).write_text(json.dumps(writer.finish(state), indent=1))
    return counter.report(len(leaves))
