"""Checks of claims about every part of a mixture, such as every language: see `verdicts`.

Letters: P parts.
"""

import math
from collections.abc import Callable

import numpy as np

from switchmoe.analysis.sweeps import Run, first_reached
from switchmoe.analysis.verdicts import Check, paired


def all_lower(better: str, worse: str, paper: str = "") -> Check:
    """The held-out loss of ``better`` ends below that of ``worse`` in each part: the least difference of a seed, nats."""

    def least(better: Run | None, worse: Run | None) -> float:
        if better is None or worse is None:
            return math.nan
        _alike(better, worse)
        return float(min(worse.parts[part][1][-1] - loss_V[-1] for part, (_, loss_V) in better.parts.items()))

    says = f"loss of {better} below {worse} in every language, least difference"
    return paired(says, better, worse, least, (0.0, math.inf), "nats", paper)


def mean_sooner(fast: str, slow: str, paper: str = "") -> Check:
    """``fast`` reaches the lowest loss of ``slow`` in fewer steps, in the geometric mean over the parts."""

    def mean(speed_up_P: np.ndarray) -> float:
        return float(np.log(speed_up_P).mean()) if speed_up_P.all() else -math.inf

    says = f"{fast} reaches the loss of {slow} in fewer steps, mean over languages"
    return paired(says, fast, slow, _of_speed_ups(mean), (0.0, math.inf), "ratio", paper)


def share_sooner(fast: str, slow: str, times: float, share: float, paper: str = "") -> Check:
    """In more than ``share`` of the parts ``fast`` is so many times as fast in steps."""

    def faster(speed_up_P: np.ndarray) -> float:
        return float((speed_up_P >= times).mean())

    says = f"share of languages in which {fast} is {times:g} times as fast as {slow} above {share:g}"
    return paired(says, fast, slow, _of_speed_ups(faster), (share, math.inf), "share", paper)


def speed_ups(fast: Run, slow: Run) -> dict[str, float]:
    """By part: steps of ``slow`` to its lowest held-out loss / steps of ``fast`` to that loss; 0 if it is not reached."""
    _alike(fast, slow)
    found = {}
    for part, (step_V, loss_V) in slow.parts.items():
        goal = float(loss_V.min())
        step = first_reached(*fast.parts[part], goal)
        found[part] = 0.0 if step is None else float(first_reached(step_V, loss_V, goal)) / step
    return found


def _alike(one: Run, other: Run) -> None:
    if not one.parts or one.parts.keys() != other.parts.keys():
        raise ValueError(
            f"runs {one.name} and {other.name}: parts {', '.join(one.parts) or 'none'} and {', '.join(other.parts) or 'none'};"
            " accepted are runs of one mixture (data.parts)"
        )


def _of_speed_ups(figure: Callable[[np.ndarray], float]) -> Callable[[Run | None, Run | None], float]:
    def of(fast: Run | None, slow: Run | None) -> float:
        if fast is None or slow is None:
            return math.nan
        return figure(np.array(list(speed_ups(fast, slow).values())))

    return of
