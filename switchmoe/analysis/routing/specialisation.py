"""What experts are for: token classes, tokens, labels; information in bits, vocabulary, favourites.

Letters: N tokens, M choices, T classes or ids, E experts, V vocabulary.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from switchmoe.analysis.routing import estimates
from switchmoe.analysis.routing.estimates import Cells, Shuffle, Statistic, choices, entropy, rows
from switchmoe.analysis.routing.traces import Info, Layer

CLASSES = ("sentinel", "special", "punctuation", "digits", "capital", "word start", "sub-word", "byte")
ST_MOE = {  # Zoph et al. 2022, Table 14: entropy of sentinels' experts, nats, by sparse layer; 32 experts, ln 32 = 3.5
    "encoder": (2.2, 1.8, 1.6, 1.7, 1.7, 1.2),
    "decoder": (3.4,) * 6,
}
OFTEN = 8  # times an id is read for its favourite expert to be told
BLANKS = "\u2581\u0120"  # SentencePiece's sign and that of byte-level BPE


def class_of(piece: str, sentinel: bool = False) -> int:
    """The number in `CLASSES` of what an id is written as."""
    text = piece.lstrip(BLANKS)
    if sentinel:
        return CLASSES.index("sentinel")
    if piece.startswith("<0x") and piece.endswith(">"):
        return CLASSES.index("byte")
    if len(piece) > 2 and piece.startswith("<") and piece.endswith(">"):
        return CLASSES.index("special")
    if piece and not text:
        return CLASSES.index("word start")
    if not any(letter.isalnum() for letter in text):
        return CLASSES.index("punctuation")
    if any(letter.isdigit() for letter in text) and not any(letter.isalpha() for letter in text):
        return CLASSES.index("digits")
    if text[0].isupper():
        return CLASSES.index("capital")
    return CLASSES.index("word start" if text != piece else "sub-word")


def class_V(pieces: Sequence[str], info: Info) -> np.ndarray:
    """Of each id, int32 [V]; empty where the trace has no vocabulary."""
    first, last = info.sentinels
    found = [class_of(piece, first <= token < last) for token, piece in enumerate(pieces)]
    return np.array(found, np.int32)


def class_N(layer: Layer, class_V: np.ndarray) -> np.ndarray:
    """Of each token read; -1 unknown."""
    if not len(class_V):
        return np.full(len(layer.token_N), -1, np.int32)
    known_N = (layer.token_N >= 0) & (layer.token_N < len(class_V))
    return np.where(known_N, class_V[np.where(known_N, layer.token_N, 0)], -1)


def information(key: Callable[[Layer], np.ndarray], says: str, shuffle: Shuffle = rows) -> Statistic:
    """Mutual information of a token's ``key`` (-1: left out) and its experts, bits: sum p(t, e) log2 p(t, e) / (p(t) p(e))."""

    def count(layer: Layer) -> Cells | None:
        return joint(layer, key(layer))

    return Statistic(count, mutual, shuffle, "bits", says)


def joint(layer: Layer, key_N: np.ndarray) -> Cells | None:
    """Cells [T, E] of keys and chosen experts; None where there are not two keys."""
    token_M, expert_M = choices(layer)
    known = key_N[token_M] >= 0
    token_M, expert_M = token_M[known], expert_M[known]
    names, key_M = np.unique(key_N[token_M], return_inverse=True)
    if len(names) < 2:
        return None
    shape = (len(names), layer.num_experts)
    return Cells(key_M * layer.num_experts + expert_M, np.ones(len(key_M)), token_M, shape)


def mutual(table_RTE: np.ndarray) -> np.ndarray:
    """Mutual information of tables of counts, bits [R]."""
    flat = table_RTE.reshape(len(table_RTE), -1)
    both = entropy(table_RTE.sum(axis=1)) + entropy(table_RTE.sum(axis=2)) - entropy(flat)
    return np.maximum(both, 0) / np.log(2)


def _spread_of(number: int, class_V: np.ndarray) -> Statistic:
    def count(layer: Layer) -> Cells | None:
        token_M, expert_M = choices(layer)
        here = class_N(layer, class_V)[token_M] == number
        if not here.any():
            return None
        return Cells(expert_M[here], np.ones(int(here.sum())), token_M[here], (layer.num_experts,))

    name = CLASSES[number]
    return Statistic(
        count, entropy, rows, "nats", f"entropy of the experts that tokens of the class {name} go to"
    )


def _favourite(field: str, says: str) -> Statistic:
    """Of ids met `OFTEN` times or more: share of their choices that goes to each one's favourite expert.

    Of K choices, which are different experts, one can be the favourite: the share is 1 / K at most.
    """

    def count(layer: Layer) -> Cells | None:
        id_N = getattr(layer, field)
        times_V = np.bincount(id_N[id_N >= 0], minlength=1)
        often_N = (id_N >= 0) & (times_V[np.maximum(id_N, 0)] >= OFTEN)
        return joint(layer, np.where(often_N, id_N, -1))

    def finish(table_RTE: np.ndarray) -> np.ndarray:
        return table_RTE.max(axis=-1).sum(axis=-1) / np.maximum(table_RTE.sum(axis=(-1, -2)), 1)

    return Statistic(count, finish, rows, "share", says)


def statistics(class_V: np.ndarray) -> dict[str, Statistic]:
    """By name, of a trace with these classes of ids."""
    by_class = functools.partial(class_N, class_V=class_V)
    favourite = "of a token's K choices, those of the favourite expert (1 / K at most) of its"
    found = {
        "class_information": information(by_class, "information of the token's class in its expert"),
        "token_information": information(lambda layer: layer.token_N, "information of the token's id in its expert"),
        "label_information": information(lambda layer: layer.label_N, "information of the document's label in the expert", estimates.labels),
        "input_specialisation": _favourite("token_N", f"{favourite} id"),
        "target_specialisation": _favourite("target_N", f"{favourite} target's id"),
        "predicted_specialisation": _favourite("predicted_N", f"{favourite} predicted id"),
    }  # fmt: skip
    spread = {f"{name.replace(' ', '_').replace('-', '_')}_entropy": _spread_of(number, class_V) for number, name in enumerate(CLASSES)}  # fmt: skip
    return found | (spread if len(class_V) else {})


def shares(layer: Layer, key_N: np.ndarray, keys: int) -> np.ndarray:
    """Of each key its experts' shares of the choices, [T, E]; 0 of a key that does not occur."""
    token_M, expert_M = choices(layer)
    known = key_N[token_M] >= 0
    cell = key_N[token_M][known] * layer.num_experts + expert_M[known]
    table_TE = np.bincount(cell, minlength=keys * layer.num_experts).reshape(keys, -1)
    return table_TE / np.maximum(table_TE.sum(axis=1, keepdims=True), 1)


class Favourite(NamedTuple):
    """An id that an expert likes: of ``times`` choices that tokens of it made, ``share`` were this expert, ``lift`` fair shares of its load."""

    token: int
    times: int
    share: float
    lift: float
    rows: list[int]  # of the layer, where the expert was surest of it


def favourites(layer: Layer, expert: int, count: int = 8, snippets: int = 2) -> list[Favourite]:
    """The ids, of those read `OFTEN` times or more, that an expert gets more often than its load says.

    The best have the largest excess share * log(lift) * times.
    """
    token_M, expert_M = choices(layer)
    known = layer.token_N[token_M] >= 0
    token_M, expert_M = token_M[known], expert_M[known]
    if not len(token_M):
        return []
    id_M = layer.token_N[token_M]
    times_V = np.bincount(id_M)
    here_V = np.bincount(id_M[expert_M == expert], minlength=len(times_V))
    often_V = np.bincount(layer.token_N[layer.token_N >= 0], minlength=len(times_V))[: len(times_V)] >= OFTEN
    load = here_V.sum() / len(id_M)
    share_V = here_V / np.maximum(times_V, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        excess_V = np.where(often_V & (here_V > 0), here_V * np.log(share_V / load), -np.inf)
    found = []
    for token in np.argsort(-excess_V)[:count]:
        if excess_V[token] <= 0:
            break
        at = np.flatnonzero((layer.token_N == token) & (layer.expert_NK == expert).any(axis=1))
        gate_N = np.where(layer.expert_NK[at] == expert, np.nan_to_num(layer.gate_NK[at]), 0).max(axis=1)
        best = at[np.argsort(-gate_N, kind="stable")[:snippets]].tolist()
        found.append(
            Favourite(
                int(token), int(times_V[token]), float(share_V[token]), float(share_V[token] / load), best
            )
        )
    return found


def snippet(layer: Layer, row: int, pieces: Sequence[str], around: int = 6) -> tuple[str, str, str]:
    """The text before a token, the token, and that after it, of its sequence."""
    first, last = max(0, row - around), min(len(layer.token_N), row + around + 1)
    here = layer.sequence_N[first:last] == layer.sequence_N[row]
    shown = [
        pieces[token] if 0 <= token < len(pieces) else f"[{token}]" for token in layer.token_N[first:last]
    ]
    shown = [text.replace(BLANKS[0], " ").replace(BLANKS[1], " ") for text in shown]
    middle = row - first
    before = "".join(text for text, of in zip(shown[:middle], here[:middle], strict=True) if of)
    return (
        before,
        shown[middle],
        "".join(text for text, of in zip(shown[middle + 1 :], here[middle + 1 :], strict=True) if of),
    )
