"""A trained model made smaller: its experts pruned or merged to fewer, or made integers (numpy, a layer at a time).

Letters: E experts there, K experts kept, D model, F an expert's width, R columns of the router.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from switchmoe.model import moe_rules
from switchmoe.model.transformer import sparse_layer_names
from switchmoe.quantised import SCALE, quantise
from switchmoe.settings import MoESettings, Settings, from_config, to_dict
from switchmoe.training import places

BY = ("use", "merge", "task")
LEAST_GROUP = 8  # rows: a float32 scale for each is 4 bits a weight
ALIGNMENTS = ("hungarian", "greedy", "none")
UNROUTED = ("hash", "hierarchical")  # routers without columns of their own for each expert

Kernels = dict[str, np.ndarray]  # of a layer's experts, by name, each [E, ...]


@dataclasses.dataclass(frozen=True)
class Slimming:
    """What becomes of a sparse model."""

    experts: int = 0  # kept in each layer; 0: all
    by: str = "use"  # use: the most used | merge: the others are averaged into these | task: those a task's sentences go to
    align: str = "hungarian"  # how units are matched before experts are averaged: hungarian | greedy | none
    bits: int = 0  # of the experts' weights, 8 or 4; 0: as they are
    group: int = -1  # rows of a kernel that share scales, 0: all; -1: all of 8 bits, of 4 bits 32 or what divides the widths

    def __post_init__(self) -> None:
        for field, known in (("by", BY), ("align", ALIGNMENTS)):
            if getattr(self, field) not in known:
                raise ValueError(f"--{field}={getattr(self, field)}: accepted is one of {', '.join(known)}")
        if self.bits not in (0, 4, 8):
            raise ValueError(f"--bits={self.bits}: accepted is 8 or 4")


def settings_of(source: Settings, how: Slimming, step: int) -> Settings:
    """Those of the slim model, a run that is at its end.

    Args:
      step: how far it was trained.

    Raises:
      ValueError: a dense model, a router or a number of experts that can't be; one line.
    """
    if not source.sparse:
        raise ValueError("--source: it is dense; accepted is a model with experts")
    if source.moe.expert_bits:
        raise ValueError(
            f"--source: its experts are integers of {source.moe.expert_bits} bits; accepted is the model they were made of"
        )
    groups = to_dict(source)
    if how.bits:
        width = source.expert_width // source.moe.granularity
        own = group_rows(how.bits, (source.model.d_model, width)) if how.group < 0 else how.group
        groups["moe"] |= {"expert_bits": how.bits, "expert_group": own}
    if how.experts:
        there = source.moe.num_experts
        if not 1 <= how.experts <= there:
            raise ValueError(f"--experts={how.experts}: accepted is an integer from 1 to the model's {there}")
        for stack in source.sparse_stacks:
            name = moe_rules.router_name(source.moe, stack == "decoder")
            if name in UNROUTED:
                raise ValueError(
                    f"--experts={how.experts}: accepted with the router {name} is 0: it has no column for each expert"
                )
        groups["moe"] |= {"num_experts": how.experts, "route_one": source.moe.route_one or how.experts == 1}
    groups["init"] = to_dict(Settings())["init"]
    groups["train"]["num_steps"] = step
    try:
        found = from_config(groups)
        for stack in found.sparse_stacks:
            moe_rules.check(found.moe, stack == "decoder")
    except ValueError as error:
        field = "experts" if how.experts else "bits"
        raise ValueError(f"--{field}={getattr(how, field)}: as settings of a run: {error}") from error
    return found


def group_rows(bits: int, rows: Sequence[int]) -> int:
    """Rows that share scales where nobody says how many: all (0) of 8 bits, else 32, or what divides the kernels' ``rows``."""
    few = math.gcd(32, *rows) if bits < 8 else 0
    return few if few >= LEAST_GROUP else 0  # else the scales would be larger than the integers


def layers(settings: Settings) -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
    """Of each MoE layer (as `sparse_layer_names` has them) where its router and experts are: (parameter, place in it) by name."""
    found: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for name in places.names(settings):
        for key, number, index in places.places(settings, name):
            stack, _, rest = key.partition("/")
            layer, _, inner = rest.partition("/")
            if layer not in ("moe", "self_moe") or not inner.startswith(("router", "experts/")):
                continue
            part = "/attention" if layer == "self_moe" else ""
            found.setdefault(f"{stack}/{number}{part}", {})[inner.removeprefix("experts/")] = name, index
    return found


def kernels(settings: Settings) -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
    """Of each sparse layer, in the order in which a token meets them, where its experts' kernels are: as `layers`, without routers."""
    there = layers(settings)
    return {
        name: {inner: place for inner, place in there[name].items() if not inner.startswith("router")}
        for name in sparse_layer_names(settings)
    }


def grouped(score_E: np.ndarray, router_DR: np.ndarray | None, moe: MoESettings, router: str, how: Slimming) -> list[np.ndarray]:  # fmt: skip
    """The experts of which each kept one is made, in the order of the kept; the first of each is the one it stands for.

    Kept are those of the highest scores (the first of equals). With ``merge`` each other joins the kept one whose router's
    column is most like its own (cosine), as in M-SMoE (Li et al. 2024, 2310.01334).
    """
    kept = how.experts * moe.granularity if how.experts else moe.total_experts
    kept_K = np.sort(np.argsort(-score_E, kind="stable")[:kept])
    groups = [[int(expert)] for expert in kept_K]
    if how.by == "merge":
        column_EN = np.stack([router_DR[:, place].ravel() for place in columns(moe, router)]).astype(float)
        column_EN /= np.maximum(np.linalg.norm(column_EN, axis=1, keepdims=True), 1e-30)
        for expert in np.setdiff1d(np.arange(len(score_E)), kept_K):
            groups[int(np.argmax(column_EN[kept_K] @ column_EN[expert]))].append(int(expert))
    return [np.array(members) for members in groups]


def columns(moe: MoESettings, router: str) -> np.ndarray:
    """[E, n] The columns of the router's kernel that are an expert's."""
    expert_E1 = np.arange(moe.total_experts)[:, None]
    if router == "noisy_top_k":
        return np.concatenate([expert_E1, expert_E1 + moe.total_experts], axis=1)
    if router == "soft":
        return expert_E1 * moe.slots + np.arange(moe.slots)[None]
    return expert_E1


def shares(use: np.ndarray) -> np.ndarray:
    """Weights of an average that go with use; equal where there was none."""
    return use / use.sum() if use.sum() > 0 else np.full(len(use), 1 / len(use))


def mean(parts: Sequence[np.ndarray], share: np.ndarray) -> np.ndarray:
    """The weighted mean, in float64, given in the parts' type; a single one as it is."""
    if len(parts) == 1:
        return parts[0]
    total = sum(weight * part.astype(np.float64) for weight, part in zip(share, parts, strict=True))
    return total.astype(parts[0].dtype)


def slim_router(
    router: np.ndarray,
    place_EN: np.ndarray,
    new_KN: np.ndarray,
    groups: Sequence[np.ndarray],
    use_E: np.ndarray,
) -> np.ndarray:
    """The router's kernel [D, R], or its bias [R], with the mean column of each group's members by their use.

    The probability of a group is the sum of its members', of which the logit is ``log sum_m exp(x . w_m)``. That is no
    linear function of x; its gradient is the mean of the w_m by their shares of the group's probability, for which
    the text's use stands. What is left out is a constant, which a router without a bias can't say.

    Args:
      place_EN: which columns are an expert's (`columns`), there and (``new_KN``) in the slim model.
    """
    found = np.zeros((*router.shape[:-1], new_KN.size), router.dtype)
    for members, new_N in zip(groups, new_KN, strict=True):
        for place_M, new in zip(place_EN[members].T, new_N, strict=True):
            found[..., new] = mean([router[..., place] for place in place_M], shares(use_E[members]))
    return found


def slim_experts(
    kernels: Mapping[str, np.ndarray], groups: Sequence[np.ndarray], use_E: np.ndarray, align: str
) -> Kernels:
    """The experts' kernels [K, ...]: of each group the mean by use, of units matched to those of its first member."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in kernels}
    for members in groups:
        share, (first, *others) = shares(use_E[members]), members
        orders = [matching(one(kernels, first), one(kernels, other), align) for other in others]
        for name, kernel in kernels.items():
            parts = [kernel[first]]
            parts += [reordered(name, kernel[m], order) for m, order in zip(others, orders, strict=True)]
            found[name].append(mean(parts, share))
    return {name: np.stack(parts) for name, parts in found.items()}


def one(kernels: Mapping[str, np.ndarray], expert: int) -> Kernels:
    return {name: kernel[expert] for name, kernel in kernels.items()}


def reordered(name: str, kernel: np.ndarray, order_F: np.ndarray | None) -> np.ndarray:
    """An expert's kernel, [D, F] or the way back's [F, D], with its units in another order; None: as they are."""
    if order_F is None:
        return kernel
    return kernel[order_F] if name == "wo" else kernel[:, order_F]


def matching(expert: Kernels, other: Kernels, align: str) -> np.ndarray | None:
    """order_F: which unit of the other is most like each of the expert's; None where units can't change places.

    A unit is its columns of ``wi`` and ``wi_gate`` and its row of ``wo``; in any order of its units an expert is the same
    function. Hungarian: the order of the largest sum of inner products, which is that of the least squared distance
    (Ainsworth et al. 2023, 2209.04836). Greedy: the largest inner product first, then that of what is left.
    Heads of attention experts keep their places, as the way back is not theirs.
    """
    if align == "none" or "wo" not in expert:
        return None
    units, theirs = (
        np.concatenate([k.astype(np.float64) if name == "wo" else k.T.astype(np.float64) for name, k in sorted(kernels.items())], axis=1)
        for kernels in (expert, other)
    )  # fmt: skip
    like_FF = units @ theirs.T
    if align == "hungarian":
        from scipy.optimize import linear_sum_assignment  # here, as few need it

        return linear_sum_assignment(like_FF, maximize=True)[1]
    return _greedy(like_FF)


def _greedy(like_FF: np.ndarray) -> np.ndarray:
    """Pairs in the order of their likeness: in each round those that are each other's best are found at once."""
    order_F = np.zeros(len(like_FF), int)
    rows, cols = np.arange(len(like_FF)), np.arange(len(like_FF))
    while len(rows):
        best_row, best_col = like_FF.argmax(axis=0), like_FF.argmax(axis=1)
        mutual = best_row[best_col] == np.arange(len(rows))
        order_F[rows[mutual]] = cols[best_col[mutual]]
        left = np.setdiff1d(np.arange(len(cols)), best_col[mutual])
        rows, cols, like_FF = rows[~mutual], cols[left], like_FF[~mutual][:, left]
    return order_F


def integers(kernels: Mapping[str, np.ndarray], moe: MoESettings) -> Kernels:
    """Codes, by the kernels' names, and scales, of experts' kernels [K, D, ...]."""
    found = {}
    for name, kernel in kernels.items():
        parts = quantise(kernel.reshape(*kernel.shape[:2], -1), moe.expert_bits, moe.expert_group)
        found |= dict(zip((name, name + SCALE), parts, strict=True))
    return found


def sweep(kept: int, align: str, group: int, task: bool) -> dict[str, Slimming]:
    """What is compared, by the name of its directory: each way, and each with integers."""
    named = {"pruned": "use", "merged": "merge"} | ({"task": "task"} if task else {})
    found = {f"{name}_{kept}": Slimming(kept, by, align) for name, by in named.items()}
    for bits in (8, 4):
        found[f"int{bits}"] = Slimming(bits=bits, group=group)
    for name, by in named.items():
        for bits in (8, 4):
            found[f"{name}_{kept}_int{bits}"] = Slimming(kept, by, align, bits, group)
    return found
