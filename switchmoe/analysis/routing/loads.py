"""How even and how sure routing is: loads, dead and overloaded experts, drops, entropy, confidence, margins.

Letters: N tokens, M choices, E experts, Q quarters of the positions.
"""

from collections.abc import Callable

import numpy as np

from switchmoe.analysis.routing.estimates import (
    Cells,
    Statistic,
    choices,
    entropy,
    mean,
    mean_cells,
    rows,
    uniform,
)
from switchmoe.analysis.routing.traces import Layer

OVERLOADED = 2.0  # fair shares
PLACES = 16  # parts of the sequence in which figures are told by position


def load_E(layer: Layer) -> np.ndarray:
    """Each expert's share of the choices, before drops."""
    count_E = np.bincount(choices(layer)[1], minlength=layer.num_experts)
    return count_E / max(1, count_E.sum())


def _loads(layer: Layer) -> Cells:
    token_M, expert_M = choices(layer)
    return Cells(expert_M, np.ones(len(expert_M)), token_M, (layer.num_experts,))


def _fair(table_RE: np.ndarray) -> np.ndarray:
    return table_RE * table_RE.shape[-1] / np.maximum(table_RE.sum(axis=-1, keepdims=True), 1)


def _dropped(layer: Layer) -> Cells | None:
    token_M, rank_M = np.nonzero(layer.expert_NK >= 0)
    return mean_cells(1.0 - layer.kept_NK[token_M, rank_M], token_M)


def _late_drops(layer: Layer) -> Cells | None:
    """Drops of the last quarter of the sequence less those of the first."""
    token_M, rank_M = np.nonzero(layer.expert_NK >= 0)
    quarter_M = place_N(layer, 4)[token_M]
    found = [_dropped_in(layer, token_M, rank_M, quarter_M == quarter) for quarter in (3, 0)]
    if any(one is None for one in found):
        return None
    joined = [np.concatenate([late, early]) for late, early in zip(found[0][:3], found[1][:3], strict=True)]
    joined[0][len(found[0].cell_M) :] += 2
    return Cells(*joined, (2, 2))


def _dropped_in(layer: Layer, token_M: np.ndarray, rank_M: np.ndarray, here_M: np.ndarray) -> Cells | None:
    return mean_cells(1.0 - layer.kept_NK[token_M, rank_M][here_M], token_M[here_M])


def place_N(layer: Layer, places: int) -> np.ndarray:
    """In which of so many equal parts of the longest sequence each token stands."""
    length = int(layer.position_N.max()) + 1
    return layer.position_N.astype(np.int64) * places // length


def dropped_N(layer: Layer) -> np.ndarray:
    """Share of each token's choices that found no slot; NaN of none."""
    there_NK = layer.expert_NK >= 0
    with np.errstate(invalid="ignore"):
        return (there_NK & ~layer.kept_NK).sum(axis=1) / np.where(there_NK.any(1), there_NK.sum(1), np.nan)


def by_place(value: Callable[[Layer], np.ndarray], unit: str, says: str, places: int = PLACES) -> Statistic:
    """Means of what ``value`` says of each token, by its place in the sequence (`estimates.several`); NaN where there is none."""

    def count(layer: Layer) -> Cells | None:
        cells = mean_cells(value(layer), np.arange(len(layer.token_N)))
        if cells is None:
            return None
        place_M = place_N(layer, places)[cells.token_M]
        return cells._replace(cell_M=cells.cell_M + 2 * place_M, shape=(places, 2))

    return Statistic(count, mean, rows, unit, says)


def _of_tokens(name: str) -> Statistic:
    unit, says = {
        "entropy": ("nats", "entropy of the router's distribution, mean over tokens"),
        "confidence": ("share", "largest probability, mean over tokens"),
        "margin": ("logits", "last choice ahead of the best expert not chosen, mean over tokens"),
    }[name]

    def count(layer: Layer) -> Cells | None:
        return mean_cells(getattr(layer, f"{name}_N"), np.arange(len(layer.token_N)))

    return Statistic(count, mean, rows, unit, says)


STATISTICS = {
    "busiest": Statistic(_loads, lambda t: _fair(t).max(axis=-1), uniform, "fair shares", "load of the busiest expert"),
    "idlest": Statistic(_loads, lambda t: _fair(t).min(axis=-1), uniform, "fair shares", "load of the idlest expert"),
    "dead": Statistic(_loads, lambda t: (t == 0).sum(axis=-1), uniform, "experts", "experts that no token chose"),
    "overloaded": Statistic(
        _loads, lambda t: (_fair(t) > OVERLOADED).sum(axis=-1), uniform, "experts",
        f"experts with more than {OVERLOADED:g} fair shares",
    ),
    "load_entropy": Statistic(_loads, entropy, uniform, "nats", "entropy of the loads: ln E where they are even"),
    "dropped": Statistic(_dropped, mean, rows, "share", "choices without a slot"),
    "late_drops": Statistic(
        _late_drops, lambda t: mean(t[..., 0, :]) - mean(t[..., 1, :]), rows, "share",
        "drops in the last quarter of the sequence less those in the first",
    ),
    "entropy": _of_tokens("entropy"),
    "confidence": _of_tokens("confidence"),
    "margin": _of_tokens("margin"),
}  # fmt: skip
ALONG = {  # the sequence
    "dropped": by_place(dropped_N, "share", "choices without a slot"),
    "entropy": by_place(lambda layer: layer.entropy_N, "nats", "entropy of the router's distribution"),
}
