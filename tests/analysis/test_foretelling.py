"""How right a table of next experts is, by hand; what is held out is not learnt."""

import numpy as np
import pytest

from switchmoe.analysis.routing import caching, foretelling
from switchmoe.analysis.routing.traces import LayerName
from switchmoe.inference.offload.predict import Table

LAYERS = (LayerName("decoder", 0), LayerName("decoder", 1))


def tokens(expert_TLK, document_T, experts=4):
    document_T = np.array(document_T)
    return caching.Tokens(
        LAYERS, experts, np.zeros(len(document_T), bool), document_T, document_T, np.array(expert_TLK)
    )


def test_documents_are_held_out_whole_and_evenly():
    whole = tokens(np.zeros((20, 2, 1), int), np.repeat(np.arange(10), 2))
    learnt, held_out = foretelling.split(whole, 0.2)
    assert held_out.document_T.tolist() == [4, 4, 9, 9]
    assert (
        sorted({*learnt.document_T, *held_out.document_T}) == list(range(10)) and len(learnt.document_T) == 16
    )


@pytest.mark.parametrize("documents, share", [([0, 0], 0.5), ([0, 1, 2], 0.2), ([], 0.5)])
def test_a_part_that_would_be_empty_is_refused(documents, share):
    with pytest.raises(ValueError, match="--held_out"):
        foretelling.split(tokens(np.zeros((len(documents), 2, 1), int), documents), share)


def test_recall_and_useful_bytes_by_hand():
    """Of two choices the table knows both after {0, 1} (2 and 3), the shares alone put 0 and 1 first."""
    learnt = [[[0, 1], [2, 3]]] * 2 + [[[2, 3], [0, 1]]] * 3
    table = Table.learn(np.array(learnt), 4, order=1)
    held_out = tokens([[[0, 1], [2, 3]], [[0, 1], [2, -1]]], [0, 0])
    found = {(right.layer, right.times): right for right in foretelling.measure(table, held_out)}
    once, twice = found["decoder/1", 1], found["decoder/1", 2]
    assert (once.choices, once.recall, once.useful) == (3, 1, 1)  # 2 is before 3
    assert (once.recall_of_shares, once.useful_of_shares) == (0, 0)
    assert once.chance == pytest.approx((2 * 2 / 4 + 1 / 4) / 3)
    assert (twice.recall, twice.useful) == (1, 3 / 6)
    assert twice.recall_of_shares == 2 / 3  # both of four guesses, not the one of two


def test_a_layer_without_choices_has_no_line():
    table = Table.learn(np.zeros((2, 2, 1), int), 4)
    found = foretelling.measure(table, tokens([[[0], [-1]]], [0]))
    assert {right.layer for right in found} == {"decoder/0"} and all(right.recall == 1 for right in found)
