"""Measuring compiled functions against one another: interleaved repeats, medians, spread, memory."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from switchmoe.products import compiler_options


@dataclasses.dataclass(frozen=True)
class Case:
    """A call that returns when its work is done, and what it needs beside its arguments, in bytes."""

    run: Callable[[], Any]
    temporary_bytes: int | None = None


def compiled(function: Callable, *arguments: Any) -> Case:
    """A JAX function on its arguments, compiled; temporaries as XLA's own memory analysis counts them."""
    program = jax.jit(function).lower(*arguments).compile(compiler_options())
    analysis = program.memory_analysis()
    memory = None if analysis is None else analysis.temp_size_in_bytes + analysis.output_size_in_bytes
    return Case(lambda: jax.block_until_ready(program(*arguments)), memory)


def measure(cases: dict[str, Case], repeats: int, warm_up: int = 2) -> dict[str, np.ndarray]:
    """Seconds of each case in each of ``repeats`` rounds.

    A round runs every case once, in an order that turns from round to round, so that a slow spell of the
    machine and what a neighbour leaves in the caches fall on all alike: compare within rounds.
    """
    names = list(cases)
    for name in names * warm_up:
        cases[name].run()
    seconds = {name: np.zeros(repeats) for name in names}
    for n in range(repeats):
        for name in names[n % len(names) :] + names[: n % len(names)]:
            start = time.perf_counter()
            cases[name].run()
            seconds[name][n] = time.perf_counter() - start
    return seconds


def summary(seconds: np.ndarray, reference: np.ndarray | None = None) -> dict[str, float]:
    """Median and quartiles in ms and, against a reference, the median of the ratios within rounds."""
    low, median, high = (float(q) for q in np.percentile(seconds * 1e3, (25, 50, 75)))
    figures = {"median_ms": median, "quartile_1_ms": low, "quartile_3_ms": high}
    return figures | ({} if reference is None else {"ratio": float(np.median(seconds / reference))})


def memory_bandwidth(megabytes: int = 512, repeats: int = 5) -> float:
    """Bytes a second that adding 1 to a large float32 array reads and writes."""
    x = jnp.zeros(megabytes * 2**18, jnp.float32)
    case = compiled(lambda x: x + 1, x)
    return 2 * x.nbytes / float(measure({"add": case}, repeats)["add"].min())
