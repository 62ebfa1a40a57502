"""Figures of a trace with their certainty: a bootstrap interval, and what shuffled tokens give.

A statistic is two functions. ``count(layer)`` puts the layer's tokens into cells: `Cells`, sums of which are all that the
figure needs. ``finish(table)`` makes the figure of the sums [..., *shape], for many tables at once. So the figure of a
sample drawn again is a product of weights with the documents' tables.

**Interval**: 95 %, of REPLICATES samples of documents drawn with replacement (of sequences, where there are fewer than
MIN_DOCUMENTS), as tokens of a document are alike. The replicates' quantiles are moved so that their mean is the figure's:
drawing again biases information and maxima upward once more. The bias that the figure itself has of few tokens, the baseline
has as well; that of few documents, whose tokens are alike, it has where documents stay whole (`labels`) and lacks elsewhere.

**Baseline**: the same figure where the tokens' choices are shuffled: `rows` gives each token the choices of another of its
layer, whatever token it is and wherever it stands; `ranks` draws each of a token's choices from another token; `uniform` draws
experts at random, all alike; `labels` gives documents each other's labels. The mean of SHUFFLES of them, with the lowest and the
highest.

Letters: N tokens, M contributions, X cells, R replicates, C documents, K choices, E experts.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

from switchmoe.analysis.routing.traces import Layer

REPLICATES, SHUFFLES, LEVEL, MIN_DOCUMENTS = 200, 20, 0.95, 10
CHUNK_CELLS = 20_000_000  # numbers in memory at once

Shuffle = Callable[[Layer, np.random.Generator], Layer]


class Cells(NamedTuple):
    """Contributions: into which cell of a table of this shape, how much, of which token."""

    cell_M: np.ndarray
    value_M: np.ndarray
    token_M: np.ndarray
    shape: tuple[int, ...]


class Statistic(NamedTuple):
    count: Callable[[Layer], Cells | None]  # None: the layer has no such figure
    finish: Callable[[np.ndarray], np.ndarray]
    shuffle: Shuffle
    unit: str  # share, nats, bits, ratio, count
    says: str  # in a line


class Figure(NamedTuple):
    value: float
    low: float
    high: float
    shuffled: float
    shuffled_low: float
    shuffled_high: float


def estimate(statistic: Statistic, layer: Layer, seed: int = 0) -> Figure | None:
    """A figure of the layer; None where it has none."""
    found = several(statistic, layer, seed)
    return found[0] if found else None


def several(statistic: Statistic, layer: Layer, seed: int = 0) -> list[Figure]:
    """The figures of a statistic whose ``finish`` makes [..., P] of them; [] where the layer has none."""
    cells = statistic.count(layer)
    if cells is None or not len(cells.cell_M):
        return []
    rng = np.random.default_rng(seed)
    value_P = _finished(statistic, cells)
    drawn_RP = _drawn_again(statistic, cells, clusters(layer), rng)
    shuffled = []
    for _ in range(SHUFFLES):
        found = statistic.count(statistic.shuffle(layer, rng))
        if found is not None and len(found.cell_M):
            shuffled.append(_finished(statistic, found))
    shuffled_SP = np.array(shuffled or [np.full(len(value_P), math.nan)])
    figures = []
    for value, drawn_R, shuffled_S in zip(value_P.tolist(), drawn_RP.T, shuffled_SP.T, strict=True):
        known = shuffled_S[~np.isnan(shuffled_S)].tolist() or [math.nan]
        low, high = _interval(value, drawn_R, statistic.unit)
        figures.append(Figure(value, low, high, float(np.mean(known)), min(known), max(known)))
    return figures


def _finished(statistic: Statistic, cells: Cells) -> np.ndarray:
    """[P]: one number, or several."""
    return np.asarray(statistic.finish(_total(cells)[None]), float).reshape(-1)


def _drawn_again(
    statistic: Statistic, cells: Cells, cluster_N: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """[R, P]: the figures over documents drawn again; of a single document NaN."""
    table_CX = _by_cluster(cells, cluster_N)
    documents, width = table_CX.shape
    if documents < 2:
        return np.full((1, len(_finished(statistic, cells))), math.nan)
    weight_RC = rng.multinomial(documents, np.full(documents, 1 / documents), REPLICATES)
    found = []
    step = max(1, CHUNK_CELLS // width)
    for first in range(0, REPLICATES, step):
        table_RX = np.asarray(weight_RC[first : first + step] @ table_CX)
        found.append(statistic.finish(table_RX.reshape(-1, *cells.shape)))
    return np.concatenate(found).reshape(REPLICATES, -1)


def _interval(value: float, drawn_R: np.ndarray, unit: str) -> tuple[float, float]:
    """(low, high) of a figure, of what documents drawn again give."""
    drawn_R = drawn_R[np.isfinite(drawn_R)]
    if not len(drawn_R):
        return math.nan, math.nan
    low, high = np.quantile(drawn_R, ((1 - LEVEL) / 2, (1 + LEVEL) / 2)) - drawn_R.mean() + value
    if (drawn_R >= 0).all():  # what can't be below 0
        low = max(low, 0.0)
    if unit == "share":
        high = min(high, 1.0)
    return float(low), float(high)


def clusters(layer: Layer) -> np.ndarray:
    """Of each token the number of what is drawn again: its document, or its sequence."""
    whole = layer.document_N if len(np.unique(layer.document_N)) >= MIN_DOCUMENTS else layer.sequence_N
    return np.unique(whole, return_inverse=True)[1]


def _total(cells: Cells) -> np.ndarray:
    size = math.prod(cells.shape)
    return np.bincount(cells.cell_M, cells.value_M, size).reshape(cells.shape)


def _by_cluster(cells: Cells, cluster_N: np.ndarray) -> Any:
    entries = (cells.value_M.astype(float), (cluster_N[cells.token_M], cells.cell_M))
    return sparse.csr_array(entries, shape=(int(cluster_N.max()) + 1, math.prod(cells.shape)))


def rows(layer: Layer, rng: np.random.Generator) -> Layer:
    """Each token with the choices of another."""
    return layer.of_choices(layer.take(rng.permutation(len(layer.token_N))))


def labels(layer: Layer, rng: np.random.Generator) -> Layer:
    """Each labelled document with the label of another, its tokens and their choices as they are.

    A label is of a whole document, whose tokens' choices are alike whatever it is of: tokens shuffled one by one would lose
    that, and any grouping of documents would seem to tell of experts.
    """
    row = np.flatnonzero(layer.label_N >= 0)
    if not len(row):
        return layer
    # Where a document has several labels, each of its parts is a document here.
    pair_NX = np.stack([layer.document_N[row], layer.label_N[row]], axis=1)
    document_DX, number = np.unique(pair_NX, axis=0, return_inverse=True)
    label_N = layer.label_N.copy()
    label_N[row] = rng.permutation(document_DX[:, 1])[number.ravel()]
    return layer._replace(label_N=label_N)


def ranks(layer: Layer, rng: np.random.Generator) -> Layer:
    """Each of a token's choices that of another token, at the same rank: what is left is the load of each expert at each rank.

    Where two of a token's choices became the same expert, which no router gives, the latter is void: loads are a little less.
    """
    expert_NK = rng.permuted(layer.expert_NK, axis=0)
    for later in range(1, expert_NK.shape[1]):
        twice_N = (expert_NK[:, :later] == expert_NK[:, later, None]).any(axis=1)
        expert_NK[twice_N, later] = -1
    return layer._replace(expert_NK=expert_NK, kept_NK=expert_NK >= 0)


def uniform(layer: Layer, rng: np.random.Generator) -> Layer:
    """Experts at random, all alike: as many different ones as each token has."""
    expert_NK = layer.expert_NK
    drawn_NK = np.full_like(expert_NK, -1)
    step = max(1, CHUNK_CELLS // layer.num_experts)
    for first in range(0, len(expert_NK), step):
        part_NK = drawn_NK[first : first + step]
        random_NE = rng.random((len(part_NK), layer.num_experts))
        part_NK[:, : layer.num_experts] = random_NE.argsort(axis=1)[:, : part_NK.shape[1]]
    return layer._replace(expert_NK=np.where(expert_NK >= 0, drawn_NK, -1))


def choices(layer: Layer) -> tuple[np.ndarray, np.ndarray]:
    """(token_M, expert_M): every choice that was made, kept or not."""
    token_M, rank_M = np.nonzero(layer.expert_NK >= 0)
    return token_M, layer.expert_NK[token_M, rank_M]


def mean_cells(value_M: np.ndarray, token_M: np.ndarray) -> Cells | None:
    """Cells [2] of a mean: a sum and a count; what is no number is left out. `mean` finishes it."""
    known = np.isfinite(value_M)
    value_M, token_M = value_M[known].astype(float), token_M[known]
    if not len(value_M):
        return None
    cell = np.repeat([0, 1], len(value_M))
    return Cells(cell, np.concatenate([value_M, np.ones(len(value_M))]), np.tile(token_M, 2), (2,))


def mean(table: np.ndarray) -> np.ndarray:
    """Sum over count, [...] of [..., 2]."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return table[..., 0] / table[..., 1]


def entropy(count: np.ndarray, axis: int = -1) -> np.ndarray:
    """Of the distribution that counts along an axis have, nats; 0 of none."""
    total = np.maximum(count.sum(axis=axis, keepdims=True), 1e-300)
    p = count / total
    return -(p * np.log(np.maximum(p, 1e-300))).sum(axis=axis)
