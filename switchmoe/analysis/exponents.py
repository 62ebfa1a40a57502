"""Does the loss fall with the number of experts as the law of Clark et al. 2022 (2202.01169) has it? A check: see `verdicts`.

Of one model size the law is log10 L = b' log10 Ê + d' (`scaling`). With E_start and E_max as they were published for S-BASE it is a
straight line, whose slope b' each seed's runs tell by least squares.
"""

import math
from collections.abc import Mapping

import numpy as np

from switchmoe.analysis import scaling
from switchmoe.analysis.intervals import Interval, t_interval
from switchmoe.analysis.sweeps import Run
from switchmoe.analysis.verdicts import Check, Table

S_BASE = scaling.PUBLISHED["S-BASE"]


def falls(experts: Mapping[str, int], paper: str = "") -> Check:
    """Ten times the Ê divide the loss by 10**-b', which is above 1.

    Args:
      experts: the arms, and how many each has; 1: the dense model.
    """

    def interval(table: Table) -> Interval:
        seeds = table[next(iter(experts))]
        return t_interval([_fall({n: table[arm][seed] for arm, n in experts.items()}) for seed in seeds])

    says = f"loss divided by more than 1 for ten times the saturated experts, {min(experts.values())} to {max(experts.values())}"
    return Check(says, tuple(experts), interval, 0.0, math.inf, "ratio", paper)


def _fall(runs: Mapping[int, Run | None]) -> float:
    """-b' ln 10 of one seed's runs, by experts; no number where one diverged."""
    if None in runs.values():
        return math.nan
    log_e = np.log10(S_BASE.saturated(np.array([*runs], float)))
    log_loss = np.log10([run.loss for run in runs.values()])
    return -float(np.polyfit(log_e, log_loss, 1)[0]) * math.log(10)
