"""Seconds a step of the arms that claims about time compare: interleaved, on a machine that does nothing else.

What a run's own records say of time is of no use for such a claim: other runs and the machine's moods were beside it.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import claims
from experiments.claims import SCALES, Claim, Overrides
from experiments.paper import finished
from switchmoe.analysis import report, sweeps
from switchmoe.settings import Settings, from_config

FILE = "times.json"
REPEATS = 15


def place(workdir: Path, kept: Path | None) -> Path:
    """Beside the file of the kept runs, else in the directory."""
    return (kept.parent if kept else workdir) / FILE


def arms(claim: Claim, scale: str) -> list[Overrides]:
    """Those that the claim's parts about time compare, as runs of seed 0."""
    names = {name for check in claim.checks(SCALES[scale]) if check.timed for name in check.arms}
    return [
        claims.run_of(overrides, 0, scale)
        for name, overrides in claim.arms(SCALES[scale]).items()
        if name in names
    ]


def measure(base: dict[str, Any], wanted: Sequence[Overrides], repeats: int, path: Path) -> None:
    """Times a step of each arm in turn, in so many rounds, and writes the file at once or not at all."""
    import jax

    from experiments.bench import step
    from switchmoe.analysis import timing
    from switchmoe.runs import origin, telling

    cases = {}
    for number, overrides in enumerate(wanted):
        settings = from_config(finished.merged(base, overrides))
        print(f"compiling {number + 1} of {len(wanted)}: {overrides}", file=sys.stderr, flush=True)
        cases[_key(overrides)] = step.compiled_step(settings, _batch(settings))
    print(f"{repeats} rounds of {len(cases)} steps", file=sys.stderr, flush=True)
    seconds = timing.measure(cases, repeats)
    found = {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "machine": origin.machine(),
        "versions": telling.versions(),
        "commit": origin.commit(),
        "seconds": {key: [float(f"{value:.5g}") for value in values] for key, values in seconds.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    report.write_whole(path, json.dumps(found, indent=1) + "\n")


def read(path: Path) -> dict[str, np.ndarray]:
    """Seconds of each round by arm; {} if none were measured.

    Raises:
      ValueError: the file is not what `measure` writes; one line.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["seconds"]
        return {key: np.array(values, float) for key, values in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: not what `times` writes ({error}); accepted is to measure again"
        ) from error


def timed(run: sweeps.Run | None, arm: Overrides, seed: int, seeds: int, found: dict[str, np.ndarray]) -> Any:
    """The run with the measured time of its arm: of each seed that of rounds of its own, the median."""
    seconds = found.get(_key(arm))
    if run is None or seconds is None:
        return run
    second = float(np.median(seconds[seed::seeds]))
    steps = run.settings.train.num_steps
    return dataclasses.replace(
        run, step_seconds=second, step_T=np.array([steps]), seconds_T=np.array([steps * second])
    )


def _key(arm: Overrides) -> str:
    """Of a run of any seed."""
    return json.dumps({field: value for field, value in arm.items() if field != "train.seed"})


def _batch(settings: Settings) -> dict[str, Any]:
    """Tokens at random, of one document a row."""
    from switchmoe.data import batches

    rng, rows = np.random.default_rng(0), settings.data.batch_size
    lengths = batches.array_lengths(batches.lengths(settings.data))
    fixed = {"segments": lambda length: np.ones(length), "positions": np.arange}
    return {
        name: np.broadcast_to(fixed[name](length), (rows, length)).astype(np.int32)
        if name in fixed
        else rng.integers(2, settings.data.vocab_size, (rows, length)).astype(np.int32)
        for name, length in lengths.items()
    }
