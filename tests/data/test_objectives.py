"""Objectives on text: by hand, nothing lost, a row on its own, what does not fit is refused."""

import numpy as np
import pytest

from switchmoe.data import batches, objectives
from switchmoe.data.errors import DataError
from switchmoe.settings import OBJECTIVES, DataSettings


class Words:
    eos_id = 1


def settings(**fields):
    return DataSettings(objective="prefix_lm", batch_size=4, **{"input_length": 6} | fields)


def pairs(data, rows=4, seed=0):
    """Pieces of text 10, 11, ... and what becomes of them."""
    objective = objectives.OBJECTIVES[data.objective]
    raw = objectives.lengths(data).raw
    tokens_BL = 10 + np.arange(rows * raw, dtype=np.int32).reshape(rows, raw)
    draws = objective.draws(rows, data, np.random.default_rng(seed))
    return tokens_BL, draws, *objective.example(tokens_BL, draws, data, Words).values()


def test_the_settings_know_all_of_them():
    assert tuple(objectives.OBJECTIVES) == OBJECTIVES


def test_a_prefix_by_hand():
    data = settings()
    assert objectives.lengths(data) == (6, 6, 8, 6)
    tokens_BL = np.array([[10, 11, 12, 13, 14, 15]] * 3, np.int32)
    prefix_B = np.array([1, 3, 5])
    made = objectives.OBJECTIVES["prefix_lm"].example(tokens_BL, prefix_B, data, Words)
    inputs, targets = made["inputs"], made["targets"]
    assert inputs.tolist() == [[10, 1, 0, 0, 0, 0], [10, 11, 12, 1, 0, 0], [10, 11, 12, 13, 14, 1]]
    assert targets.tolist() == [[11, 12, 13, 14, 15, 1], [13, 14, 15, 1, 0, 0], [15, 1, 0, 0, 0, 0]]
    assert inputs.dtype == targets.dtype == np.int32


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"target_length": 3},
        {"target_length": 9},
        {"prefix": "full"},
        {"prefix": "full", "target_length": 4},
    ],
)
def test_every_token_is_in_one_of_both_and_lengths_are_as_said(fields):
    data = settings(**fields)
    tokens_BL, prefix_B, inputs, targets = pairs(data, rows=300)
    found = objectives.lengths(data)
    assert inputs.shape == (300, 6) and targets.shape == (300, found.targets)
    assert ((inputs != 0).sum(1) + (targets != 0).sum(1) == found.real).all()
    for tokens, first, rest in zip(tokens_BL, inputs, targets, strict=True):
        first, rest = first[first != 0], rest[rest != 0]
        assert first[-1] == rest[-1] == 1 and len(first) > 1 and len(rest) > 1
        assert [*first[:-1], *rest[:-1]] == tokens.tolist()
    longest = min(found.targets - 1, found.raw - 1)
    cuts = {5} if data.prefix == "full" else set(range(6 - longest, 6))
    assert set(prefix_B) == cuts, "every cut that leaves room is drawn"


def test_a_full_prefix_has_no_padding():
    _, _, inputs, targets = pairs(settings(prefix="full"))
    assert (inputs != 0).all() and (targets != 0).all() and targets.shape == (4, 6)


def test_a_row_does_not_depend_on_those_after_it():
    few, many = pairs(settings(), rows=3), pairs(settings(), rows=9)
    assert few[1].tolist() == many[1][:3].tolist()


def test_a_length_that_leaves_no_room():
    with pytest.raises(
        DataError, match="data.target_length=1: accepted with data.objective=prefix_lm is 0 or"
    ):
        batches.target_length(settings(target_length=1))
    with pytest.raises(
        ValueError, match="data.objective=rotate: accepted is one of span_corruption, prefix_lm"
    ):
        DataSettings(objective="rotate")
    with pytest.raises(ValueError, match="data.prefix=half: accepted is one of random, full"):
        DataSettings(prefix="half")


def test_packed_documents_by_hand():
    data = DataSettings(objective="causal_lm", input_length=8, batch_size=1)
    assert objectives.lengths(data) == (8, 8, 8, 0)
    assert batches.lengths(data) == {"decoder": 8}
    tokens_BL = np.array([[10, 11, 1, 12, 1, 13, 14, 15], [1, 10, 11, 12, 13, 14, 15, 1]], np.int32)
    made = objectives.OBJECTIVES["causal_lm"].example(tokens_BL, np.zeros((2, 0)), data, Words)
    assert made["targets"].tolist() == tokens_BL.tolist()
    assert made["segments"].tolist() == [[1, 1, 1, 2, 2, 3, 3, 3], [1, 2, 2, 2, 2, 2, 2, 2]]
    assert made["positions"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], [0, 0, 1, 2, 3, 4, 5, 6]]
    assert all(rows.dtype == np.int32 for rows in made.values())
    assert list(made) == list(batches.array_lengths(batches.lengths(data)))


def test_documents_are_joined_with_their_ends():
    class Letters(Words):
        size, pieces = 1000, 900

        def encode(self, text):
            return np.array([ord(letter) for letter in text], np.int32)

    data = DataSettings(objective="causal_lm", input_length=4, batch_size=1)
    (first, second) = batches.eval_batches(data, Letters(), ["ab", "", "cde", "f"])
    assert first["targets"].tolist() == [[97, 98, 1, 99]]
    assert second["targets"].tolist() == [[100, 101, 1, 102]]
    assert second["segments"].tolist() == [[1, 1, 1, 2]]
