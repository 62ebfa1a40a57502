"""A run's directory with a dense model made sparse (`runs.upcycling`)."""

import dataclasses
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from switchmoe.interop import convert, growing, run_files
from switchmoe.interop.growing import Report
from switchmoe.runs import checkpoints, integrity, start, trained, upcycling
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
    began, model = time.monotonic(), trained.find(str(source))
    settings = upcycling.settings_of(model.settings, how)
    if dtype:
        settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, dtype=dtype))
    damage = integrity.damage(model.step, "state")
    if damage:
        raise ValueError(f"--source={source}: it is damaged: {damage}; accepted is a good one")
    reader = run_files.Reader(Path(model.step))

    def read(name: str) -> np.ndarray:
        return reader.read(name, ())

    with told(lambda: "copying"):
        params = upcycling.parameters(model.settings, settings, how, read)
        if dtype:
            params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        state = TrainState(np.zeros((), np.int32), params, {})
        if how.optimizer:
            found = upcycling.optimizer_state(model.settings, settings, params, read)
            note(
                "with the optimizer's state"
                if found is not None
                else "without an optimizer's state: the source has none of its kind"
            )
            state = state.replace(opt_state={} if found is None else found)
        asked = {
            "files": growing.step_identity(Path(model.step)),
            "upcycle": dataclasses.asdict(how),
            "dtype": dtype,
        }
        with growing.grown(target, asked) as work:
            step = work / "checkpoints" / "0"
            shutil.rmtree(step, ignore_errors=True)
            step.mkdir(parents=True)
            ocp.Checkpointer(ocp.StandardCheckpointHandler()).save(
                step.absolute() / "state", args=ocp.args.StandardSave(state)
            )
            integrity.write_manifest(step)
            if model.vocabulary is not None:
                (work / start.VOCABULARY_FILE).write_bytes(model.vocabulary.model_bytes)
            checkpoints.write_json(work / "config.json", to_dict(settings))
    leaves = jax.tree.leaves(state)
    return Report(len(leaves), sum(leaf.nbytes for leaf in leaves), 0, time.monotonic() - began)
