"""A run's compiled programs: the first state, the step, and the norm of the parameters."""

import functools
import time
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from switchmoe.runs.parts import Parts
from switchmoe.settings import Settings
from switchmoe.training import train_state, train_step


class Programs:
    """Compiled ahead of time, on the mesh and by the rules in force; the judges' as well.

    ``abstract``: the state's shapes and places. ``init()`` makes the first one. ``step(state, batch)`` is an update, and
    takes the state's arrays for its own. ``norm(params)`` is a number.

    Args:
      batch: a global batch's shapes and places.
    """

    def __init__(
        self,
        settings: Settings,
        tx: optax.GradientTransformation,
        parts: Parts,
        mesh: Mesh,
        batch: dict[str, jax.ShapeDtypeStruct],
    ):
        self.abstract: train_state.TrainState = train_state.sharded_state(settings, tx, mesh)
        where = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        started = time.monotonic()
        # An argument of the programs, so that runs of all seeds find them in the compilation cache.
        key = jax.jit(jax.random.key, out_shardings=where.step)(np.uint32(settings.train.seed))
        init = jax.jit(functools.partial(train_state.init_state, settings, tx), out_shardings=where)
        self.init: Any = functools.partial(init.lower(key).compile(), key)
        constants = parts.objective.constants()
        step = train_step.compile_step(settings, tx, self.abstract, batch, key, parts.objective, constants)
        self.step: Any = functools.partial(step, key=key, **({"constants": constants} if constants else {}))
        for judge in parts.judges:
            judge.compile(self.abstract.params)
        self.norm = jax.jit(optax.global_norm, out_shardings=where.step)
        self.compile_seconds = time.monotonic() - started
