"""Seconds a step of the arms that claims about time compare: interleaved, on a machine that does nothing else.

What a run's own records say of time is of no use for such a claim: other runs and the machine's moods were beside it. In a
process of its own for each seed, as where a program's memory lies matters too, the arms' steps are timed in turn in each of
some rounds; a seed's time is the median of its process.
"""

import concurrent.futures
import dataclasses
import json
import math
import multiprocessing
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import claims
from experiments.claims import SCALES, Claim, Overrides
from experiments.paper import finished
from switchmoe.analysis import report, sweeps
from switchmoe.runs import origin
from switchmoe.settings import from_config

REPEATS = 15
Times = list[
    dict[str, Any]
]  # measurements, the newest last: machine, base, and `seconds` by arm: a list for each seed


def place(workdir: Path, scale: str, kept: Path | None) -> Path:
    """Beside the file of the kept runs, else in the directory."""
    return (kept.parent if kept else workdir) / f"times_{scale}.json"


def arms(claim: Claim, scale: str) -> list[Overrides]:
    """Those that the claim's parts about time compare, as runs of seed 0."""
    names = {name for check in claim.checks(SCALES[scale]) if check.timed for name in check.arms}
    return [
        claims.run_of(overrides, 0, scale)
        for name, overrides in claim.arms(SCALES[scale]).items()
        if name in names
    ]


def measure(base: dict[str, Any], wanted: Sequence[Overrides], seeds: int, repeats: int, path: Path) -> None:
    """Times the arms' steps, and adds them to the file, at once or not at all."""
    names = [_key(arm) for arm in wanted]
    seconds: dict[str, list[list[float]]] = {name: [] for name in names}
    for seed in range(seeds):
        print(
            f"process {seed + 1} of {seeds}: {len(names)} arms, {repeats} rounds", file=sys.stderr, flush=True
        )
        settings = [finished.merged(base, arm | {"train.seed": seed}) for arm in wanted]
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            for name, found in zip(names, pool.submit(_seconds, settings, repeats).result(), strict=True):
                seconds[name].append(found)
    told = {"machine": origin.machine(), "commit": origin.commit()}
    measured = read(path) + [told | {"base": finished.portable(base), "seconds": seconds}]
    path.parent.mkdir(parents=True, exist_ok=True)
    report.write_whole(path, json.dumps(measured, indent=1) + "\n")


def _seconds(settings: Sequence[dict[str, Any]], repeats: int) -> list[list[float]]:
    """Of each of the settings in each round."""
    from experiments.bench import step
    from switchmoe.analysis import timing

    cases = {}
    for number, groups in enumerate(settings):
        one = from_config(groups)
        print(f"compiling {number + 1} of {len(settings)}", file=sys.stderr, flush=True)
        cases[str(number)] = step.compiled_step(one, _batch(one))
    return [[float(f"{second:.5g}") for second in found] for found in timing.measure(cases, repeats).values()]


def read(path: Path) -> Times:
    """The measurements; [] if there is no file.

    Raises:
      ValueError: the file is not what `measure` writes; one line.
    """
    if not path.exists():
        return []
    try:
        found = list(json.loads(path.read_text(encoding="utf-8")))
        if not found:
            raise ValueError("it is empty")
        for one in found:
            from_config(one["base"]), str(one["machine"]), str(one["commit"])
            [float(second) for seeds in one["seconds"].values() for rounds in seeds for second in rounds]
        return found
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: not what `times` writes ({error}); accepted is to measure again"
        ) from error


def newest(claim: Claim, scale: str, base: dict[str, Any], found: Times) -> dict[str, Any] | None:
    """The newest measurement of runs of this base that has all arms of the claim's parts about time; None: there is none."""
    wanted = {_key(arm) for arm in arms(claim, scale)}
    same = [one for one in found if not finished.different(one["base"], base)]
    return next((one for one in reversed(same) if wanted and wanted <= one["seconds"].keys()), None)


def timed(run: sweeps.Run | None, arm: Overrides, seed: int, measured: dict[str, Any] | None) -> Any:
    """The run with its arm's time of its seed, or without one; as it is where nothing was measured."""
    seconds = measured["seconds"].get(_key(arm), []) if measured else []
    if run is None or measured is None:
        return run
    if seed >= len(seconds):  # beside times that were measured a run's own record says nothing
        return without(run) if seconds else dataclasses.replace(run, step_seconds=math.nan)
    second, steps = float(np.median(seconds[seed])), run.settings.train.num_steps
    return dataclasses.replace(
        run, step_seconds=second, step_T=np.array([0, steps]), seconds_T=np.array([0, steps * second])
    )


def in_turn(run: sweeps.Run) -> bool:
    """Whether its time is one that `measure` took: from step 0, of which a run's own record says nothing."""
    return bool(run.step_T.size) and run.step_T[0] == 0


def without(run: sweeps.Run) -> sweeps.Run:
    """The run without times."""
    return dataclasses.replace(run, step_seconds=math.nan, step_T=np.array([]), seconds_T=np.array([]))


def _key(arm: Overrides) -> str:
    """Of a run of any seed."""
    return json.dumps({field: value for field, value in sorted(arm.items()) if field != "train.seed"})


def _batch(settings: Any) -> dict[str, Any]:
    """Tokens at random, of one document a row."""
    from switchmoe.data import batches

    rng, rows = np.random.default_rng(settings.train.seed), settings.data.batch_size
    lengths = batches.array_lengths(batches.lengths(settings.data))
    fixed = {"segments": lambda length: np.ones(length), "positions": np.arange}
    return {
        name: np.broadcast_to(fixed[name](length), (rows, length)).astype(np.int32)
        if name in fixed
        else rng.integers(2, settings.data.vocab_size, (rows, length)).astype(np.int32)
        for name, length in lengths.items()
    }
