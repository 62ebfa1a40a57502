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

    Raises:
      ValueError: a source that is sparse or can't be read, a target that is there; nothing is left at ``target``.
    """
    if target.exists():
        raise ValueError(f"--target={target}: it is there; accepted is a name that is free")
    if not convert.is_run(source):
        dense, found = target.with_name(f".{target.name}.dense"), convert.recognised(source)
        upcycling.settings_of(found.settings, how)  # before anything is written
        shutil.rmtree(dense, ignore_errors=True)  # of an earlier process, and maybe of another source
        try:
            convert.into_run(found, dense, dtype, told)
            return upcycle(dense, target, dtype, how, told, note)
        finally:
            shutil.rmtree(dense, ignore_errors=True)
    model = trained.find(str(source))
    settings = upcycling.settings_of(model.settings, how)
    if dtype:
        settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, dtype=dtype))
    damage = integrity.damage(model.step, "state")
    if damage:
        raise ValueError(f"--source={source}: it is damaged: {damage}; accepted is a good one")
    reader = run_files.Reader(Path(model.step))
    plan = upcycling.Plan(model.settings, settings, how, upcycling.Saved(reader.shape, reader.read))
    asked = {
        "files": growing.step_identity(Path(model.step)),
        "upcycle": dataclasses.asdict(how),
        "dtype": dtype,
    }
    with growing.grown(target, asked) as work:
        report = _write(plan, work / buckets.CHECKPOINTS / "0", dtype or "float32", how, told, note)
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
