"""Which experts a layer will need, of what the layers before it chose: EdgeMoE's table (Yi et al. 2023, 2308.14352), learnt from a trace.

EdgeMoE keeps, for the experts of the two sparse layers before, how often each expert came next. With K choices of a token a
context is one choice of each of these layers, and each of its choices counts; what several contexts say is summed. Few
counts say little, so each context is mixed with the shorter one (Dirichlet prior; MacKay and Peto 1995):

    p_0(e) = (n(e) + 1) / (n + E)                               the layer's own shares
    p_d(e) = (n(context_d, e) + STRENGTH p_{d-1}(e)) / (n(context_d) + STRENGTH)     the d layers before, d = 1 .. order

Letters: T tokens, L sparse layers in the order in which a token meets them, K choices, E experts, C contexts, M entries.
"""

import itertools
import os
import zipfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

FORMAT = "switchmoe expert table 1"
STRENGTH = 4.0  # what the shorter context weighs, in counts
MOST_ENTRIES = 1 << 18  # of a layer and a length; the rarest are left out
MOST_ORDER = 3


class _Counts(NamedTuple):
    """Of a layer, of contexts of one length: how often each expert came next."""

    context_C: np.ndarray  # int64, sorted: the experts as digits of base E, the farthest layer's first
    start_C: np.ndarray  # int64 [C + 1]: where a context's entries begin
    expert_M: np.ndarray  # int32
    count_M: np.ndarray  # int64

    def of(self, context_N: np.ndarray, experts: int) -> np.ndarray:
        """[E] Counts summed over contexts."""
        if not len(self.context_C):
            return np.zeros(experts)
        place_N = np.searchsorted(self.context_C, context_N).clip(max=len(self.context_C) - 1)
        place_N = place_N[self.context_C[place_N] == context_N]
        begin_N, end_N = self.start_C[place_N], self.start_C[place_N + 1]
        # The entries of all these contexts in a row: each counts on from where its own begin.
        length_N = end_N - begin_N
        entry_M = np.arange(length_N.sum()) + np.repeat(end_N - np.cumsum(length_N), length_N)
        return np.bincount(self.expert_M[entry_M], self.count_M[entry_M], minlength=experts)


class Table:
    """Learnt counts; `learn` or `load` makes one.

    ``shares_LE`` are p_0 of each layer.
    """

    def __init__(self, order: int, count_LE: np.ndarray, counts: dict[tuple[int, int], _Counts]):
        self.order, (self.layers, self.experts) = order, count_LE.shape
        self._count_LE, self._counts = count_LE, counts  # the latter by (layer, length)
        self.shares_LE = (count_LE + 1) / (count_LE.sum(axis=1, keepdims=True) + self.experts)

    @classmethod
    def learn(cls, expert_TLK: np.ndarray, experts: int, order: int = 2) -> "Table":
        """Of tokens' choices, -1: no choice (a token of the encoder has none in the decoder's layers).

        Raises:
          ValueError: an array of another shape, an expert that is not one, or contexts that are too long.
        """
        expert_TLK = np.asarray(expert_TLK)
        if expert_TLK.ndim != 3 or not expert_TLK.shape[1]:
            raise ValueError(f"choices of shape {expert_TLK.shape}: accepted is [tokens, layers, choices]")
        if expert_TLK.size and not -1 <= expert_TLK.min() <= expert_TLK.max() < experts:
            raise ValueError(
                f"experts {expert_TLK.min()} to {expert_TLK.max()}: accepted are -1 to {experts - 1}"
            )
        if not 0 <= order <= MOST_ORDER:
            raise ValueError(f"order {order}: accepted is an integer from 0 to {MOST_ORDER}")
        layers = expert_TLK.shape[1]
        count_LE = np.stack(
            [np.bincount(expert_TLK[:, layer][expert_TLK[:, layer] >= 0], minlength=experts) for layer in range(layers)]
        )  # fmt: skip
        counts = {
            (layer, length): _count(expert_TLK[:, layer - length : layer + 1], experts)
            for layer in range(layers)
            for length in range(1, min(order, layer) + 1)
        }
        return cls(order, count_LE.astype(np.int64), counts)

    def scores(self, layer: int, earlier: Sequence[Collection[int]]) -> np.ndarray:
        """[E] How likely each expert is a choice in this layer, in all 1.

        Args:
          earlier: the choices in the layers before it, the last one last; may be fewer or more than ``order``.
        """
        if not 0 <= layer < self.layers:
            raise ValueError(f"layer {layer}: accepted is 0 to {self.layers - 1}")
        found_E = self.shares_LE[layer]
        for length in range(1, min(self.order, layer, len(earlier)) + 1):
            context_N = np.zeros(1, np.int64)
            for chosen in earlier[-length:]:
                digit_K = np.fromiter((expert for expert in chosen if expert >= 0), np.int64)
                context_N = (context_N[:, None] * self.experts + digit_K[None]).ravel()
            count_E = self._counts[layer, length].of(context_N, self.experts)
            found_E = (count_E + STRENGTH * found_E) / (count_E.sum() + STRENGTH)
        return found_E

    def save(self, path: str | os.PathLike) -> None:
        """At once, or not at all."""
        path = Path(path)
        arrays = {"format": np.array(FORMAT), "order": np.array(self.order), "count_LE": self._count_LE}
        for (layer, length), counts in self._counts.items():
            arrays |= {f"{layer}/{length}/{name}": value for name, value in counts._asdict().items()}
        temporary = path.with_name(f".{path.name}")
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | os.PathLike, layers: int = 0, experts: int = 0) -> "Table":
        """What `save` wrote.

        Args:
          layers, experts: the model's; 0: any.

        Raises:
          OSError: it can't be read.
          ValueError: it is damaged, no table, or another model's; one line.
        """
        accepted = "accepted is what python -m experiments.offload predict wrote"
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            if str(arrays["format"]) != FORMAT:
                raise ValueError("another format")
            order, count_LE = int(arrays["order"]), arrays["count_LE"]
            counts = {
                (layer, length): _Counts(*(arrays[f"{layer}/{length}/{name}"] for name in _Counts._fields))
                for layer in range(len(count_LE))
                for length in range(1, min(order, layer) + 1)
            }
            found = cls(order, count_LE, counts)
        except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zipfile.zlib.error) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{path}: not a table of experts, or damaged ({reason}); {accepted}") from error
        if (layers or found.layers, experts or found.experts) != (found.layers, found.experts):
            raise ValueError(
                f"{path}: a table of {found.layers} sparse layers of {found.experts} experts; accepted is one of the"
                f" model's {layers} of {experts}"
            )
        return found


def _count(expert_TNK: np.ndarray, experts: int) -> _Counts:
    """Of the choices in a layer (the last of N) and in those before it: every combination of one choice of each."""
    tokens, layers, choices = expert_TNK.shape
    code = np.concatenate(
        [
            _code(np.stack([expert_TNK[:, at, chosen] for at, chosen in enumerate(ranks)], axis=1), experts)
            for ranks in itertools.product(range(choices), repeat=layers)
        ]
    )
    code_M, count_M = np.unique(code, return_counts=True)
    if len(code_M) > MOST_ENTRIES:
        kept = np.sort(np.argsort(-count_M, kind="stable")[:MOST_ENTRIES])
        code_M, count_M = code_M[kept], count_M[kept]
    context_C, start_C = np.unique(code_M // experts, return_index=True)
    return _Counts(context_C, np.append(start_C, len(code_M)), (code_M % experts).astype(np.int32), count_M)


def _code(expert_TN: np.ndarray, experts: int) -> np.ndarray:
    """A number for each row without -1."""
    rows = expert_TN[(expert_TN >= 0).all(axis=1)].astype(np.int64)
    return rows @ (experts ** np.arange(rows.shape[1])[::-1])
