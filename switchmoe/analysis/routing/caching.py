"""Hit rates of a cache of experts, by budget and policy, from a routing trace: `switchmoe.inference.offload.cache` along it.

The order is that of decoding: sequence by sequence; of a sequence its encoder's tokens at once, so that a layer is visited once
for the experts of them all; then token by token through the decoder's layers, prompts and answers alike. The cache is empty
at first and lives on from sequence to sequence. Choices count as they were made, whether a slot was found or not.

Letters: N tokens of a layer, T tokens of the trace, L layers, K choices, S shuffles.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure as Picture

from switchmoe.analysis import plots
from switchmoe.analysis.routing import traces
from switchmoe.inference.offload import cache
from switchmoe.inference.offload.cache import Visit

POLICIES = (*cache.POLICIES, cache.BELADY)
COLOURS = {
    "lru": plots.BLUE,
    "lfu": plots.ORANGE,
    "lfru": "#009E73",
    "least_stale": "#CC79A7",
    "belady": "black",
}
SHAPES = {"lru": "o", "lfu": "s", "lfru": "D", "least_stale": "^", "belady": "v"}
PANEL_SHARE = 0.25  # the layers are shown at the budget nearest to it


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A trace's tokens, in the order of stacks, sequences and positions.

    ``expert_TLK`` is -1 where a token has no choice: fewer than K, or a layer of the other stack.
    """

    layers: tuple[traces.LayerName, ...]
    num_experts: int
    encoder_T: np.ndarray  # whether it is one of the encoder's
    sequence_T: np.ndarray
    document_T: np.ndarray
    expert_TLK: np.ndarray

    def take(self, rows: np.ndarray) -> "Tokens":
        own = {
            name: getattr(self, name)[rows]
            for name in ("encoder_T", "sequence_T", "document_T", "expert_TLK")
        }
        return dataclasses.replace(self, **own)


def read(directory: Path, tokens: int = 0) -> Tokens:
    """A trace's tokens: those of its first sequences, until there are so many (0: all).

    Raises:
      ValueError: it can't be read, or has no rows of a layer.
    """
    info = traces.read_info(directory)
    if not info.layers:
        raise ValueError(f"--trace={directory}: no layers; accepted is a trace with rows of a layer at least")
    found = [traces.read_layer(directory, name) for name in info.layers]
    parts = []
    for encoder in (True, False):
        own = {at: layer for at, layer in enumerate(found) if (layer.name.stack == "encoder") == encoder}
        if not own:
            continue
        keys = {at: (layer.sequence_N.astype(np.int64) << 32) + layer.position_N for at, layer in own.items()}
        key_T, first_T = np.unique(np.concatenate(list(keys.values())), return_index=True)
        document_T = np.concatenate([layer.document_N for layer in own.values()])[first_T]
        expert_TLK = np.full((len(key_T), len(found), info.choices), -1, np.int32)
        for at, layer in own.items():
            expert_TLK[np.searchsorted(key_T, keys[at]), at] = layer.expert_NK
        parts.append((np.full(len(key_T), encoder), (key_T >> 32).astype(np.int32), document_T, expert_TLK))
    whole = Tokens(
        info.layers, info.num_experts, *(np.concatenate(values) for values in zip(*parts, strict=True))
    )
    if not tokens or len(whole.sequence_T) <= tokens:
        return whole
    sequence, count = np.unique(whole.sequence_T, return_counts=True)
    last = sequence[min(np.searchsorted(np.cumsum(count), tokens), len(sequence) - 1)]
    return whole.take(whole.sequence_T <= last)


def visits(tokens: Tokens) -> list[Visit]:
    """Which experts each layer needs at once, one visit after the other."""
    encoder = [at for at, name in enumerate(tokens.layers) if name.stack == "encoder"]
    decoder = [at for at, name in enumerate(tokens.layers) if name.stack != "encoder"]
    order = np.argsort(tokens.sequence_T, kind="stable")
    bounds = np.flatnonzero(np.diff(tokens.sequence_T[order])) + 1
    found: list[Visit] = []
    for rows in np.split(order, bounds):
        batch = rows[tokens.encoder_T[rows]]
        if len(batch):
            found += [(at, tuple(np.unique(tokens.expert_TLK[batch, at]).tolist())) for at in encoder]
        for token in tokens.expert_TLK[rows[~tokens.encoder_T[rows]]][:, decoder].tolist():
            found += zip(decoder, token, strict=True)
    whole = ((at, tuple(dict.fromkeys(expert for expert in experts if expert >= 0))) for at, experts in found)
    return [visit for visit in whole if visit[1]]


def shuffled(tokens: Tokens, rng: np.random.Generator) -> Tokens:
    """In each layer each token with the choices of another, as `estimates.rows` has it."""
    expert_TLK = tokens.expert_TLK.copy()
    for at, name in enumerate(tokens.layers):
        rows = np.flatnonzero(tokens.encoder_T == (name.stack == "encoder"))
        expert_TLK[rows, at] = expert_TLK[rng.permutation(rows), at]
    return dataclasses.replace(tokens, expert_TLK=expert_TLK)


class Point(NamedTuple):
    """Of a policy within a budget; the rates' last place is that of all layers."""

    policy: str
    budget: int  # bytes
    share: float  # of all experts' bytes
    hits: np.ndarray  # [L + 1]
    accesses: np.ndarray  # [L + 1]
    read: int  # bytes
    shuffled: np.ndarray  # [S, L + 1] rates

    @property
    def rates(self) -> np.ndarray:
        return _rates(self.hits, self.accesses)


def curves(
    tokens: Tokens,
    budgets: Sequence[int],
    policies: Sequence[str] = POLICIES,
    record: int = 1,
    shuffles: int = 3,
    told: Callable[[str], None] = lambda _: None,
) -> list[Point]:
    """A point for each policy and budget, and what shuffled tokens give.

    Args:
      budgets: bytes.
      record: bytes of an expert.
      told: called with what is being simulated.
    """
    layers, rng = len(tokens.layers), np.random.default_rng(0)
    whole = layers * tokens.num_experts * record
    found: dict[tuple[str, int], list[cache.Hits]] = {}
    for shuffle in range(shuffles + 1):
        way = visits(shuffled(tokens, rng) if shuffle else tokens)
        for policy in policies:
            for budget in budgets:
                done = f"{policy}, {budget / whole:.0%}, {len(way):,} visits"
                told(done + (f", shuffled {shuffle} of {shuffles}" if shuffle else ""))
                one = cache.simulate(way, budget, lambda _: record, policy, layers)
                found.setdefault((policy, budget), []).append(one)
    points = []
    for (policy, budget), (own, *others) in found.items():
        rates_SL = np.array([_rates(_with_sum(one.hits_L), _with_sum(one.accesses_L)) for one in others])
        sums = _with_sum(own.hits_L), _with_sum(own.accesses_L)
        points.append(
            Point(policy, budget, budget / whole, *sums, own.read, rates_SL.reshape(shuffles, layers + 1))
        )
    return points


def _with_sum(value_L: np.ndarray) -> np.ndarray:
    return np.append(value_L, value_L.sum())


def _rates(hits: np.ndarray, accesses: np.ndarray) -> np.ndarray:
    return np.where(accesses > 0, hits / np.maximum(accesses, 1), np.nan)


def rows(points: Sequence[Point], layers: Sequence[traces.LayerName]) -> list[dict[str, str | int | float]]:
    """A row for each policy, budget and layer, and for ``all`` of them; a rate is missing where a layer has no access."""
    found = []
    for point in points:
        for at, layer in enumerate([*map(str, layers), "all"]):
            row = {
                "policy": point.policy,
                "budget_share": point.share,
                "budget_bytes": point.budget,
                "layer": layer,
            }
            row |= {"accesses": int(point.accesses[at]), "hits": int(point.hits[at])}
            if point.accesses[at]:
                row["hit_rate"] = float(point.rates[at])
                if len(point.shuffled):
                    own = point.shuffled[:, at]
                    row |= {
                        name: float(value)
                        for name, value in zip(
                            ("shuffled", "shuffled_low", "shuffled_high"),
                            (own.mean(), own.min(), own.max()),
                            strict=True,
                        )
                    }
            found.append(row)
    return found


def table(points: Sequence[Point]) -> list[list[str]]:
    """Of all layers: a line for each budget, a column for each policy; in brackets shuffled tokens."""
    policies = list(dict.fromkeys(point.policy for point in points))
    lines = [["budget", "bytes", *policies]]
    for budget in dict.fromkeys(point.budget for point in points):
        own = {point.policy: point for point in points if point.budget == budget}
        cells = []
        for policy in policies:
            point = own[policy]
            beside = f" ({point.shuffled[:, -1].mean():.3f})" if len(point.shuffled) else ""
            cells.append(f"{point.rates[-1]:.3f}{beside}")
        lines.append([f"{own[policies[0]].share:.1%}", f"{budget:,}", *cells])
    return lines


@plots.own_style
def picture(points: Sequence[Point], layers: Sequence[traces.LayerName]) -> Picture:
    """Hit rates by budget in all layers; by layer, at one budget. Hollow: shuffled tokens."""
    figure = Picture(figsize=(8, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    shares = sorted({point.share for point in points})
    shown = min(shares, key=lambda share: abs(share - PANEL_SHARE))
    for policy in dict.fromkeys(point.policy for point in points):
        own = sorted((point for point in points if point.policy == policy), key=lambda point: point.share)
        look = {"color": COLOURS[policy], "marker": SHAPES[policy], "markersize": 4.5, "linewidth": 1.3}
        look["linestyle"] = "--" if policy == cache.BELADY else "-"
        x = 100 * np.array([point.share for point in own])
        left.plot(x, [point.rates[-1] for point in own], label=policy.replace("_", "-"), **look)
        at = next(point for point in own if point.share == shown)
        right.plot(range(len(layers)), at.rates[:-1], **look)
        hollow = look | {"markerfacecolor": "none", "linestyle": "none"}
        if at.shuffled.size:
            left.plot(x, [point.shuffled[:, -1].mean() for point in own], **hollow)
            right.plot(range(len(layers)), at.shuffled[:, :-1].mean(axis=0), **hollow)
    left.set_xlim(0, 100)
    left.set_xlabel("budget, % of the experts' bytes")
    left.set_ylabel("hit rate")
    left.legend(fontsize=8, frameon=False)
    left.set_title("all layers; hollow: shuffled tokens", fontsize=9, loc="left")
    right.set_title(f"by layer, budget {shown:.0%}", fontsize=9, loc="left")
    every = -(-len(layers) // 12)
    ticks = range(0, len(layers), every)
    right.set_xticks(ticks, [str(layers[at]) for at in ticks], rotation=45, ha="right", fontsize=8)
    for axes in (left, right):
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
