"""Experts of neighbours: of the next token, of the same token's other choices, of the next layer.

Letters: N tokens, P pairs, K choices, E experts.
"""

import math

import numpy as np

from switchmoe.analysis.routing.estimates import Cells, Statistic, mean, mean_cells, ranks, rows
from switchmoe.analysis.routing.specialisation import mutual
from switchmoe.analysis.routing.traces import Layer

MIXTRAL = {  # Jiang et al. 2024, Table 5: lowest and highest over eight data sets; 8 experts, 2 choices
    "first": {0: (0.136, 0.149), 15: (0.236, 0.284), 31: (0.197, 0.263)},
    "any": {0: (0.449, 0.499), 15: (0.616, 0.670), 31: (0.445, 0.536)},
}


def chance_of_any(num_experts: int, choices: int) -> float:
    """That two tokens whose experts are drawn at random, all alike, have one in common: 1 - C(E - K, K) / C(E, K)."""
    return 1 - math.comb(max(0, num_experts - choices), choices) / math.comb(num_experts, choices)


def neighbours(layer: Layer) -> np.ndarray:
    """Rows whose next row is the next token of the same sequence."""
    same = np.diff(layer.sequence_N) == 0
    return np.flatnonzero(same & (np.diff(layer.position_N) == 1))


def _first_again(layer: Layer) -> Cells | None:
    row_P = neighbours(layer)
    first_N = layer.expert_NK[:, 0]
    known_P = (first_N[row_P] >= 0) & (first_N[row_P + 1] >= 0)
    row_P = row_P[known_P]
    return mean_cells((first_N[row_P] == first_N[row_P + 1]).astype(float), row_P + 1)


def _any_again(layer: Layer) -> Cells | None:
    if layer.expert_NK.shape[1] < 2:
        return None
    row_P = neighbours(layer)
    return mean_cells(
        (overlap(layer.expert_NK[row_P], layer.expert_NK[row_P + 1]) > 0).astype(float), row_P + 1
    )


def even(layer: Layer) -> np.ndarray:
    """bool [N]: rows of even documents, or sequences where those are all or none; one half is to learn from, one to try on."""
    even_N = layer.document_N % 2 == 0
    return layer.sequence_N % 2 == 0 if even_N.all() or not even_N.any() else even_N


def overlap(one_NK: np.ndarray, other_NK: np.ndarray) -> np.ndarray:
    """How many experts two lists of different ones have in common, [N]."""
    same_N = np.zeros(len(one_NK), np.int32)
    for rank in range(one_NK.shape[1]):
        one_N1 = one_NK[:, rank, None]
        same_N += ((one_N1 == other_NK) & (one_N1 >= 0)).any(axis=1)
    return same_N


def _pairs(layer: Layer) -> Cells | None:
    """Cells [E, E] of all pairs of a token's different experts, each in both orders."""
    choices = layer.expert_NK.shape[1]
    return _of_pairs(layer, layer, [pair for pair in np.ndindex(choices, choices) if pair[0] != pair[1]])


def _of_pairs(one: Layer, other: Layer, at: list[tuple[int, int]]) -> Cells | None:
    """Cells [E, E'] of a token's expert in ``one`` and its expert in ``other``, at each of these pairs of ranks."""
    shape, parts = (one.num_experts, other.num_experts), []
    for mine, theirs in at:
        a_N, b_N = one.expert_NK[:, mine], other.expert_NK[:, theirs]
        row = np.flatnonzero((a_N >= 0) & (b_N >= 0))
        parts.append((a_N[row] * shape[1] + b_N[row], row))
    if not sum(len(row) for _, row in parts):
        return None
    cell, row = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Cells(cell, np.ones(len(cell)), row, shape)


def together(layer: Layer) -> np.ndarray | None:
    """[E, E]: of the tokens that chose e, the share that chose e' as well, over all pairs of choices; 0 on the diagonal.

    (OLMoE's script, `run_moe_analysis.py`, counts neighbours in rank alone.) None of a single choice.
    """
    cells = _pairs(layer)
    if cells is None:
        return None
    size = layer.num_experts
    pair_EE = np.bincount(cells.cell_M, minlength=size * size).reshape(size, size)
    own_E = np.bincount(layer.expert_NK[layer.expert_NK >= 0], minlength=size)
    return pair_EE / np.maximum(own_E, 1)[:, None]


STATISTICS = {
    "first_repeats": Statistic(
        _first_again, mean, rows, "share", "next tokens with the same first expert (Mixtral, Table 5)"
    ),
    "any_repeats": Statistic(
        _any_again, mean, rows, "share", "next tokens with an expert in common (Mixtral, Table 5, first or second)"
    ),
    "pair_information": Statistic(
        _pairs, mutual, ranks, "bits", "information of one of a token's experts in another of them, all pairs"
    ),
}  # fmt: skip


def next_layer(following: Layer) -> dict[str, Statistic]:
    """What a layer's choices tell of the choices of the ``following`` one, row by row the same tokens; shuffled is the former.

    A predictor counts on even documents which experts follow which, and is tried on odd ones, and the other way round: a
    token's next experts are the K with the largest sum over its experts of their frequencies. What is counted are the
    next layer's choices that are among the K, or 2 K, of a prefetcher's bet; K is the number of choices that the token makes
    in the next layer, however long the trace's lists are.
    """

    def shuffle(layer: Layer, rng: np.random.Generator) -> Layer:
        return rows(layer, rng)

    def hits(times: int) -> Statistic:
        def count(layer: Layer) -> Cells | None:
            return _hits(layer, following, times)

        says = f"of the next layer's choices, those among {times} x K that this layer's choices let expect"
        return Statistic(count, mean, shuffle, "share", says)

    def both(layer: Layer) -> Cells | None:
        choices = (layer.expert_NK.shape[1], following.expert_NK.shape[1])
        return _of_pairs(layer, following, list(np.ndindex(choices)))

    found = {
        "next_information": Statistic(
            both,
            mutual,
            shuffle,
            "bits",
            "information of an expert in one of the next layer, all pairs of ranks",
        ),
        "next_hits": hits(1),
    }
    choices = (following.expert_NK >= 0).sum(axis=1).mean()
    return found | ({"next_hits_twice": hits(2)} if 2 * choices < following.num_experts else {})


def _hits(layer: Layer, following: Layer, times: int) -> Cells | None:
    even_N = even(layer)
    if even_N.all() or not even_N.any():
        return None
    value_N, known_N = np.zeros(len(even_N)), np.zeros(len(even_N))
    for half_N in (even_N, ~even_N):
        share_EE = _follows(layer.expert_NK[half_N], following.expert_NK[half_N], layer.num_experts)
        rest = np.flatnonzero(~half_N)
        for first in range(0, len(rest), 65536):
            row = rest[first : first + 65536]
            mine_NK, next_NK = layer.expert_NK[row], following.expert_NK[row]
            score_NE = sum(
                share_EE[mine_NK[:, rank]] for rank in range(mine_NK.shape[1])
            )  # -1: a row of zeros
            rank_NE = np.argsort(np.argsort(-score_NE, axis=1, kind="stable"), axis=1)
            rank_NK = np.take_along_axis(rank_NE, np.maximum(next_NK, 0), axis=1)
            known_N[row] = (next_NK >= 0).sum(axis=1)
            value_N[row] = ((rank_NK < times * known_N[row, None]) & (next_NK >= 0)).sum(axis=1)
    token_N = np.arange(len(value_N))
    cell = np.repeat([0, 1], len(value_N))
    return Cells(cell, np.concatenate([value_N, known_N]), np.tile(token_N, 2), (2,))


def _follows(mine_NK: np.ndarray, next_NK: np.ndarray, size: int) -> np.ndarray:
    """[E + 1, E]: how often each expert follows each, over how often any follows the former; a last row of zeros."""
    table = np.zeros((size, size))
    for one in range(mine_NK.shape[1]):
        for other in range(next_NK.shape[1]):
            a_N, b_N = mine_NK[:, one], next_NK[:, other]
            known = (a_N >= 0) & (b_N >= 0)
            table += np.bincount(a_N[known] * size + b_N[known], minlength=size * size).reshape(size, size)
    return np.vstack([table / np.maximum(table.sum(axis=1, keepdims=True), 1), np.zeros((1, size))])
