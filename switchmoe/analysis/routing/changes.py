"""How routing differs between two models on the same text: of two seeds, before and after fine-tuning, along a run.

Letters: N tokens, K choices, E experts.
"""

import numpy as np
from scipy import optimize

from switchmoe.analysis.routing import traces
from switchmoe.analysis.routing.chains import even, overlap
from switchmoe.analysis.routing.estimates import Cells, Statistic, mean, rows
from switchmoe.analysis.routing.traces import Layer


def matching(one: Layer, other: Layer) -> np.ndarray:
    """[E]: of each expert of ``one`` the expert of ``other`` that it is matched with, so that tokens share most (Hungarian).

    Counted over all pairs of a token's choices in the two; each expert of ``other`` is taken once.
    """
    size = max(one.num_experts, other.num_experts)
    table = np.zeros((size, size))
    for mine in range(one.expert_NK.shape[1]):
        for theirs in range(other.expert_NK.shape[1]):
            a_N, b_N = one.expert_NK[:, mine], other.expert_NK[:, theirs]
            known = (a_N >= 0) & (b_N >= 0)
            cell = a_N[known].astype(np.int64) * size + b_N[known]
            table += np.bincount(cell, minlength=size * size).reshape(size, size)
    return optimize.linear_sum_assignment(-table)[1]


def agreement(other: Layer, matched: bool) -> Statistic:
    """Share of a token's experts that it has in ``other`` as well (OLMoE's saturation, where that is the last checkpoint).

    Args:
      matched: experts of the layer are first renamed by `matching`: on even documents for odd ones and the other way
        round, as a matching fits by chance what it was made on. Shuffled tokens are matched anew.
    """

    def count(layer: Layer) -> Cells | None:
        mine_NK = _renamed(layer, other) if matched else layer.expert_NK
        same_N = overlap(mine_NK, other.expert_NK)
        size_N = np.maximum((layer.expert_NK >= 0).sum(axis=1), (other.expert_NK >= 0).sum(axis=1))
        token_N = np.arange(len(same_N))
        value = np.concatenate([same_N, size_N]).astype(float)
        return Cells(np.repeat([0, 1], len(same_N)), value, np.tile(token_N, 2), (2,))

    says = "a token's experts that it has in the other model as well" + (
        ", experts matched" if matched else ""
    )
    return Statistic(count, mean, rows, "share", says)


def _renamed(layer: Layer, other: Layer) -> np.ndarray:
    even_N = even(layer)
    found_NK = np.full_like(layer.expert_NK, -1)
    for half_N in (even_N, ~even_N):
        if half_N.any():
            # Of one sequence alone there is no other half.
            fit = np.flatnonzero(~half_N) if (~half_N).any() else np.flatnonzero(half_N)
            name_E = np.append(matching(layer.take(fit), other.take(fit)), -1)
            found_NK[half_N] = name_E[layer.expert_NK[half_N]]
    return found_NK


def check(one: traces.Info, other: traces.Info) -> None:
    """Raises ValueError: the two have not the same tokens and layers."""
    different = traces.differing(one.reading, other.reading)
    if different:
        raise ValueError(
            f"--against={other.source}: {', '.join(different)} is another; accepted is a model of the same vocabulary, or a"
            " trace of the same text"
        )
    if one.layers != other.layers:
        raise ValueError(
            f"--against={other.source}: its sparse layers are {', '.join(map(str, other.layers))}; accepted are"
            f" {', '.join(map(str, one.layers))}"
        )


def check_rows(one: Layer, other: Layer) -> None:
    """Raises ValueError: the rows of the two are not the same tokens."""
    if not traces.same_rows(one, other, ("sequence_N", "position_N", "token_N")):
        raise ValueError(f"--against: {other.name} has other tokens; accepted is a trace of the same text")
