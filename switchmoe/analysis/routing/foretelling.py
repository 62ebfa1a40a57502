"""How often a table of next experts (`switchmoe.inference.offload.predict`) is right, on sequences that it was not learnt from.

Of each token and layer the table ranks the experts; n times as many as the token has choices are guessed (one to three
for a token of one choice). By layer:

    recall = choices that were among the guesses / choices,     useful = guesses that were choices / guesses

With experts of equal size the latter is the share of useful bytes, if every guess is read; what a cache has need not be.
Beside them the same of the layer's shares alone (the most used experts of the learnt part, whatever came before), and of
experts guessed at random, n K / E.

Letters: T tokens, L layers, K choices, E experts.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from switchmoe.analysis.routing.caching import Tokens
from switchmoe.inference.offload.predict import Table

TIMES = (1, 2, 3)


class Right(NamedTuple):
    """Of a layer and so many times the guesses."""

    layer: str
    times: int
    choices: int  # made in the held-out part
    recall: float
    useful: float
    recall_of_shares: float
    useful_of_shares: float
    chance: float  # of the recall


def split(tokens: Tokens, held_out: float) -> tuple[Tokens, Tokens]:
    """(to learn from, held out): whole documents, evenly spread, as neighbours are often of one kind.

    Raises:
      ValueError: one of the two parts would be empty.
    """
    documents, number_T = np.unique(tokens.document_T, return_inverse=True)
    count = len(documents)
    share = np.floor((np.arange(count) + 1) * held_out + 1e-9) > np.floor(np.arange(count) * held_out + 1e-9)
    if share.all() or not share.any():
        raise ValueError(
            f"--held_out={held_out:g}: of {count} sequences or documents it leaves one part empty; accepted is a trace with more"
        )
    return tokens.take(~share[number_T]), tokens.take(share[number_T])


def measure(table: Table, held_out: Tokens, told: Callable[[str], None] = lambda _: None) -> list[Right]:
    """A line for each layer and number of guesses; a layer without choices has none."""
    found = []
    for at, name in enumerate(held_out.layers):
        told(f"{name}, layer {at + 1} of {len(held_out.layers)}")
        rows = held_out.expert_TLK[(held_out.expert_TLK[:, at] >= 0).any(axis=1)]
        if not len(rows):
            continue
        before, truth_TK = rows[:, max(0, at - table.order) : at].tolist(), rows[:, at]
        ranked_TE = np.stack([np.argsort(-table.scores(at, earlier), kind="stable") for earlier in before])
        shares_TE = np.broadcast_to(np.argsort(-table.shares_LE[at], kind="stable"), ranked_TE.shape)
        for times in TIMES:
            own, of_shares = (_right(order_TE, truth_TK, times) for order_TE in (ranked_TE, shares_TE))
            chosen_T = (truth_TK >= 0).sum(axis=1)
            chance = np.minimum(1, times * chosen_T / table.experts)
            chance = float((chance * chosen_T).sum() / chosen_T.sum())
            found.append(Right(str(name), times, int(chosen_T.sum()), *own, *of_shares, chance))
    return found


def _right(order_TE: np.ndarray, truth_TK: np.ndarray, times: int) -> tuple[float, float]:
    """(recall, useful)."""
    rank_TE = np.argsort(order_TE, axis=1)
    known_TK = truth_TK >= 0
    guesses_T = np.minimum(times * known_TK.sum(axis=1), order_TE.shape[1])
    rank_TK = np.take_along_axis(rank_TE, np.maximum(truth_TK, 0), axis=1)
    hits = ((rank_TK < guesses_T[:, None]) & known_TK).sum()
    return float(hits / known_TK.sum()), float(hits / guesses_T.sum())
