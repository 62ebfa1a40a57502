"""Effective speed-up: the compute at which a dense model would reach a sparse one's loss, over the sparse one's.

The dense model's held-out losses over its compute C are fitted by

    L(C) = L_0 + (C / C_0)**-k

and the fit is solved for the sparse model's loss at its end, be that before the dense run's end or beyond it. A loss at or below
L_0 is one that this dense model reaches with no compute.
"""

import math

import numpy as np
from scipy import optimize

from switchmoe.analysis.sweeps import Run
from switchmoe.analysis.verdicts import Check, paired
from switchmoe.data import batches
from switchmoe.planning import flops

FITTED = 0.75  # of the steps, the last ones: the first follow another curve


def speed_up(fast: str, slow: str, paper: str = "") -> Check:
    """The effective speed-up of ``fast`` over the dense ``slow`` is above 1."""

    def ratio(fast: Run | None, slow: Run | None) -> float:
        if fast is None or slow is None:
            return math.nan
        try:
            compute = dense_compute(*curve(slow), fast.loss)
        except ValueError:  # too few evaluations to tell
            return math.nan
        return compute if math.isinf(compute) else math.log(compute / float(curve(fast)[0][-1]))

    says = f"compute of {slow} for the loss of {fast}, over that of {fast}"
    return paired(says, fast, slow, ratio, (0.0, math.inf), "ratio", paper)


def curve(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """(compute_V in FLOPs, loss_V) of a run's evaluations."""
    data = run.settings.data
    step = flops.train_flops(run.settings, batches.lengths(data))
    return step * run.step_V, run.loss_V


def fit(compute_V: np.ndarray, loss_V: np.ndarray) -> tuple[float, float, float]:
    """(L_0, ln C_0, k), by least squares in the loss.

    Raises:
      ValueError: fewer than four evaluations.
    """
    chosen = compute_V >= (1 - FITTED) * compute_V[-1]
    log_C, loss_V = np.log(compute_V[chosen]), loss_V[chosen]
    if len(loss_V) < 4:
        raise ValueError(
            f"{len(loss_V)} evaluations; a fit takes at least four in the last {FITTED:.0%} of a run"
        )
    middle = log_C.mean()  # a curve in relation to it has coefficients of one size

    def residual(theta: np.ndarray) -> np.ndarray:
        floor, log_scale, log_k = theta
        return floor + np.exp(log_scale - np.exp(log_k) * (log_C - middle)) - loss_V

    spread = max(float(loss_V.max() - loss_V.min()), 1e-6)
    starts = [
        (loss_V.min() - room * spread, math.log(room * spread), math.log(k))
        for room in (0.3, 1.0, 3.0)
        for k in (0.3, 1.0)
    ]
    bounds = ([0.0, -20.0, math.log(0.01)], [float(loss_V.min()), 10.0, math.log(10.0)])
    solved = [
        optimize.least_squares(
            residual, np.clip(start, np.add(bounds[0], 1e-6), np.subtract(bounds[1], 1e-6)), bounds=bounds
        )
        for start in starts
    ]
    floor, log_scale, log_k = min(solved, key=lambda one: one.cost).x
    k = math.exp(log_k)
    return float(floor), middle + log_scale / k, k


def dense_compute(compute_V: np.ndarray, loss_V: np.ndarray, goal: float) -> float:
    """FLOPs at which the fitted curve reaches a loss; infinite where it never does."""
    floor, log_start, k = fit(compute_V, loss_V)
    return math.inf if goal <= floor else math.exp(min(log_start - math.log(goal - floor) / k, 700.0))
