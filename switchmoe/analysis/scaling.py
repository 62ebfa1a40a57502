"""The scaling law of routed language models, fitted and as published (Clark et al. 2022, arXiv:2202.01169).

    log10 L(N, E) = a log10 N + b log10 Ê + c log10 N log10 Ê + d
    1 / Ê = 1 / (E - 1 + (1 / E_start - 1 / E_max)^-1) + 1 / E_max

L is the loss in nats, N the parameters of the dense model without embeddings, E the experts. Ê is E
saturated: E_start for the dense model, at most E_max. With the shift s = (1 / E_start - 1 / E_max)^-1
this is Ê = (E - 1 + s) E_max / (E - 1 + s + E_max), so any s > 0 and E_max > 0 will do.

Models of one size tell b' = b + c log10 N and d' = a log10 N + d, not their parts: the law is then
log10 L = b' log10 Ê + d'.
"""

import csv
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import optimize, stats

TABLE = Path(__file__).with_name("routed_scaling.csv")
SHIFT_RANGE = (1e-2, 1e3)  # of s, and
MAX_RANGE = (2.0, 1e5)  # of E_max: a fit that ends at an edge has not found the value
ONE_SIZE, SEVERAL_SIZES = ("b'", "d'"), ("a", "b", "c", "d")


@dataclasses.dataclass(frozen=True)
class Law:
    """Coefficients of the law; of one size a = c = 0, b = b', d = d'."""

    a: float
    b: float
    c: float
    d: float
    e_start: float
    e_max: float

    def loss(self, size: float | np.ndarray, experts: float | np.ndarray) -> np.ndarray:
        """L(N, E) in nats; sizes and experts broadcast."""
        log_size, log_e = np.log10(size), np.log10(self.saturated(np.asarray(experts, float)))
        return 10 ** (self.a * log_size + (self.b + self.c * log_size) * log_e + self.d)

    def saturated(self, experts: np.ndarray) -> np.ndarray:
        """Ê."""
        shift = 1 / (1 / self.e_start - 1 / self.e_max)
        return 10 ** _log_saturated(experts, shift, self.e_max)

    def values(self, size: float) -> dict[str, float]:
        """The coefficients by the names of `Fit.values`, b' and d' at size N among them."""
        log_size = math.log10(size)
        names = dataclasses.asdict(self)
        start, top = names.pop("e_start"), names.pop("e_max")
        one_size = {"b'": self.b + self.c * log_size, "d'": self.a * log_size + self.d}
        return names | one_size | {"E_start": start, "E_max": top}


PUBLISHED = {  # Clark et al., fitted to 15M ... 1.3B parameters and 1 ... 512 experts
    "S-BASE": Law(-0.082, -0.108, 0.009, 1.104, 1.847, 314.478),
    "RL-R": Law(-0.083, -0.126, 0.012, 1.111, 1.880, 469.982),
    "HASH": Law(-0.087, -0.136, 0.012, 1.157, 4.175, 477.741),
}


@dataclasses.dataclass(frozen=True)
class Fit:
    """A law fitted to runs."""

    law: Law
    values: dict[str, float]  # of what the runs tell: b', d' or a, b, c, d, and E_start, E_max
    intervals: dict[str, tuple[float, float] | None]  # None: the runs do not tell it
    level: float
    residual: float | None  # standard deviation in log10 L; None where no run is left over
    runs: int
    notes: tuple[str, ...]
    falls: bool = True  # whether the loss falls with the experts, as the law has it: at each size; of one alone for sure


def fit(
    size_R: Sequence[float], experts_R: Sequence[float], loss_R: Sequence[float], level: float = 0.95
) -> Fit:
    """Least squares in log10 L, every run alike.

    Given s and E_max the law is linear in the other coefficients, so that the search is over these two
    (from the best of a grid). Intervals are those of the linearised law at the solution, with Student's
    t; those of E_start and E_max are taken in their logarithms.

    Args:
      size_R: N of each run; runs of one model have exactly the same.
      experts_R, loss_R: E, and the loss in nats.
      level: of the intervals, that of a coefficient by itself.

    Raises:
      ValueError: there are too few pairs of N and E, or a loss is not above 0.
    """
    size_R, experts_R, loss_R = (np.asarray(values, float) for values in (size_R, experts_R, loss_R))
    if not (np.isfinite(loss_R) & (loss_R > 0)).all():
        raise ValueError("a fit takes finite losses above 0")
    sizes = len(np.unique(size_R))
    names = ONE_SIZE if sizes == 1 else SEVERAL_SIZES
    pairs = len(np.unique(np.stack([size_R, experts_R]), axis=1).T)
    counts = len(np.unique(experts_R))
    if pairs < len(names) + 2 or counts < 4:
        raise ValueError(
            f"a fit of {sizes} model size{'s' * (sizes > 1)} takes at least {len(names) + 2} pairs of size and"
            f" experts and 4 expert counts; there are {pairs} and {counts}"
        )
    log_size_R, log_loss_R = np.log10(size_R), np.log10(loss_R)

    def solved(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        columns = _columns(log_size_R, _log_saturated(experts_R, *np.exp(theta)), sizes)
        linear = np.linalg.lstsq(columns, log_loss_R, rcond=None)[0]
        return linear, columns, columns @ linear - log_loss_R

    bounds = np.log([SHIFT_RANGE, MAX_RANGE])
    grid = [
        np.array([shift, top]) for shift in np.linspace(*bounds[0], 16) for top in np.linspace(*bounds[1], 16)
    ]
    start = min(grid, key=lambda theta: (solved(theta)[2] ** 2).sum())
    start = np.clip(start, bounds[:, 0] + 1e-3, bounds[:, 1] - 1e-3)
    found = optimize.least_squares(
        lambda theta: solved(theta)[2], start, bounds=tuple(bounds.T), xtol=1e-12, ftol=1e-12, gtol=1e-14
    ).x
    linear, columns, residual_R = solved(found)
    at_edge = np.isclose(found, bounds[:, 0], atol=1e-2) | np.isclose(found, bounds[:, 1], atol=1e-2)
    slope_R = linear[0] if sizes == 1 else linear[1] + linear[2] * log_size_R
    jacobian = np.column_stack([columns, _saturation_slopes(experts_R, slope_R, *np.exp(found))])
    shift, e_max = np.exp(found).tolist()
    e_start = 1 / (1 / shift + 1 / e_max)
    kept = np.array([True] * len(names) + (~at_edge).tolist())
    errors, residual = _standard_errors(jacobian, residual_R, kept, (e_start / shift, e_start / e_max))
    values = dict(zip(names, linear.tolist(), strict=True)) | {"E_start": e_start, "E_max": e_max}
    reach = float(stats.t.ppf((1 + level) / 2, max(len(residual_R) - int(kept.sum()), 1)))
    intervals = {
        name: None if error is None else _interval(value, reach * error, name.startswith("E_"))
        for (name, value), error in zip(values.items(), errors, strict=True)
    }
    a, b, c, d = (0.0, values["b'"], 0.0, values["d'"]) if sizes == 1 else linear.tolist()
    falls = bool(np.all(slope_R < 0)) if sizes > 1 else intervals["b'"] is None or intervals["b'"][1] < 0
    notes = _notes(sizes, at_edge, residual, falls)
    return Fit(Law(a, b, c, d, e_start, e_max), values, intervals, level, residual, len(loss_R), notes, falls)


def _columns(log_size_R: np.ndarray, log_e_R: np.ndarray, sizes: int) -> np.ndarray:
    one = np.ones_like(log_e_R)
    parts = [log_e_R, one] if sizes == 1 else [log_size_R, log_e_R, log_size_R * log_e_R, one]
    return np.column_stack(parts)


def _log_saturated(experts: np.ndarray, shift: float, e_max: float) -> np.ndarray:
    """log10 Ê."""
    seen = experts - 1 + shift
    return np.log10(seen) + math.log10(e_max) - np.log10(seen + e_max)


def _saturation_slopes(
    experts_R: np.ndarray, slope_R: np.ndarray | float, shift: float, e_max: float
) -> np.ndarray:
    """Derivatives [R, 2] of log10 L by ln s and ln E_max; ``slope_R`` is that by log10 Ê."""
    seen = experts_R - 1 + shift
    by_shift, by_max = shift * (1 / seen - 1 / (seen + e_max)), seen / (seen + e_max)
    return np.stack([slope_R * by_shift, slope_R * by_max], axis=1) / math.log(10)


def _standard_errors(
    jacobian: np.ndarray, residual_R: np.ndarray, kept: np.ndarray, start_by: tuple[float, float]
) -> tuple[list[float | None], float | None]:
    """Of the linear coefficients, ln E_start and ln E_max, and of the residuals.

    Args:
      jacobian: [R, P], its last two columns by ln s and ln E_max.
      kept: [P], False for what ended at an edge; it is taken as known, and has no error.
      start_by: derivatives of ln E_start by ln s and ln E_max.
    """
    free = len(residual_R) - int(kept.sum())
    if free < 1:
        return [None] * len(kept), None
    variance = float(residual_R @ residual_R) / free
    used = jacobian[:, kept]
    scale = np.linalg.norm(used, axis=0)  # columns of one length: their sizes are far apart
    covariance = np.zeros((len(kept), len(kept)))
    covariance[np.ix_(kept, kept)] = (
        variance * np.linalg.pinv((used / scale).T @ (used / scale)) / np.outer(scale, scale)
    )
    to_start = np.eye(len(kept))
    to_start[-2, -2:] = start_by
    errors = np.sqrt(np.maximum(np.diag(to_start @ covariance @ to_start.T), 0)).tolist()
    return [error if keep else None for error, keep in zip(errors, kept, strict=True)], variance**0.5


def _interval(value: float, reach: float, in_logarithm: bool) -> tuple[float, float]:
    if not in_logarithm:
        return value - reach, value + reach
    factor = math.exp(min(reach, 500.0))
    return value / factor, value * factor


def _notes(sizes: int, at_edge: np.ndarray, residual: float | None, falls: bool) -> tuple[str, ...]:
    said = {
        "one model size: found are b' = b + c log10 N and d' = a log10 N + d, not their parts": sizes == 1,
        "b + c log10 N is not below 0 at each of the sizes: the loss does not fall with the experts as the law has it": sizes
        > 1
        and not falls,
        "b' is not below 0 for sure: these runs do not say whether the loss falls with the experts as the law has it": sizes
        == 1
        and not falls,
        "E_start is not determined by these runs: its search ended at an edge of its range": at_edge[0],
        "E_max is not determined by these runs: its search ended at an edge of its range": at_edge[1],
        "no runs are left over to tell how sure the coefficients are": residual is None,
    }
    return tuple(note for note, holds in said.items() if holds)


@dataclasses.dataclass(frozen=True)
class Published:
    """A row of `routed_scaling.csv`: N, E, and the validation loss after 10,000 steps and at the end."""

    size: int
    experts: int
    loss_10k: float
    loss_final: float


def published(size: float | None = None) -> list[Published]:
    """S-BASE models of Clark et al., all of them or those of the size nearest to ``size`` by ratio."""
    lines = (line for line in TABLE.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    rows = [
        Published(int(n), int(e), float(early), float(final))
        for n, e, early, final in list(csv.reader(lines))[1:]
    ]
    if size is None:
        return rows
    nearest = min((row.size for row in rows), key=lambda n: abs(math.log(n / size)))
    return [row for row in rows if row.size == nearest]
