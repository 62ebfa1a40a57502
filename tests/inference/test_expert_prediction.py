"""What the table of next experts says, by hand; its file comes back, and a damaged one is refused."""

import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from switchmoe.inference.offload.predict import STRENGTH, Table

# Four tokens, three layers, one choice of three experts.
CHOICES = np.array([[0, 1, 2], [0, 1, 2], [0, 2, 0], [1, 1, 0]])[..., None]


def test_scores_by_hand():
    table = Table.learn(CHOICES, 3)
    np.testing.assert_allclose(table.scores(0, []), [4 / 7, 2 / 7, 1 / 7])  # (n + 1) / (4 + 3)
    shares = np.array([1, 4, 2]) / 7
    np.testing.assert_allclose(table.scores(1, []), shares)
    one = (np.array([0, 2, 1]) + STRENGTH * shares) / (3 + STRENGTH)  # after 0: 1 twice, 2 once
    np.testing.assert_allclose(table.scores(1, [[0]]), one)
    shares = np.array([3, 1, 3]) / 7
    one = (np.array([1, 0, 2]) + STRENGTH * shares) / (3 + STRENGTH)  # after 1: 2 twice, 0 once
    two = (np.array([0, 0, 2]) + STRENGTH * one) / (2 + STRENGTH)  # after 0, 1: 2 twice
    np.testing.assert_allclose(table.scores(2, [[0], [1]]), two)
    np.testing.assert_allclose(table.scores(2, [[2], [1]]), one)  # never seen: the shorter context
    np.testing.assert_allclose(table.scores(2, [[9], [0], [1]]), two)  # what is farther is not asked
    assert table.scores(2, [[0], [1]]).argmax() == 2 and table.scores(2, [[1], [1]]).argmax() == 0


def test_the_contexts_of_a_tokens_choices_are_summed():
    """Two choices: after 0 comes 2, after 1 comes 3, in half of the counts each."""
    table = Table.learn(np.array([[[0, 1], [2, 3]]] * 4), 4, order=1)
    found = table.scores(1, [[0, 1]])
    np.testing.assert_allclose(
        found, (np.array([0, 0, 8, 8]) + STRENGTH * table.shares_LE[1]) / (16 + STRENGTH)
    )
    np.testing.assert_allclose(table.scores(1, [{1, 0}]), found)


def test_no_choice_is_no_context_and_no_count():
    """A decoder's layers after an encoder's: other tokens."""
    choices = np.array([[0, -1], [1, -1], [-1, 2], [-1, 2]])[..., None]
    table = Table.learn(choices, 3)
    np.testing.assert_allclose(table.shares_LE, [[2 / 5, 2 / 5, 1 / 5], [1 / 5, 1 / 5, 3 / 5]])
    np.testing.assert_allclose(table.scores(1, [[0]]), table.shares_LE[1])
    np.testing.assert_allclose(table.scores(1, [[]]), table.shares_LE[1])


def test_no_tokens_are_chance():
    np.testing.assert_allclose(Table.learn(np.zeros((0, 2, 1), int), 4).scores(1, [[3]]), 0.25)


choices = st.tuples(st.integers(0, 6), st.integers(1, 4), st.integers(1, 2)).flatmap(
    lambda shape: st.lists(st.integers(-1, 4), min_size=math.prod(shape), max_size=math.prod(shape)).map(
        lambda values: np.array(values, int).reshape(shape)
    )
)


@hypothesis.given(choices, st.integers(0, 3), st.lists(st.lists(st.integers(-1, 4), max_size=3), max_size=4))
def test_scores_are_a_distribution(expert_TLK, order, earlier):
    table = Table.learn(expert_TLK, 5, order)
    for layer in range(table.layers):
        scores_E = table.scores(layer, earlier)
        assert scores_E.shape == (5,) and (scores_E > 0).all()
        np.testing.assert_allclose(scores_E.sum(), 1)


def test_the_file_comes_back(tmp_path):
    table = Table.learn(CHOICES, 3)
    table.save(tmp_path / "table.npz")
    found = Table.load(tmp_path / "table.npz", layers=3, experts=3)
    assert [path.name for path in tmp_path.iterdir()] == ["table.npz"]
    for earlier in ([], [[0], [1]], [[1], [1]], [[2], [2]]):
        np.testing.assert_array_equal(found.scores(2, earlier), table.scores(2, earlier))


def test_a_file_that_is_no_table_is_refused_in_a_line(tmp_path):
    path = tmp_path / "table.npz"
    with pytest.raises(FileNotFoundError):
        Table.load(path)
    Table.learn(CHOICES, 3).save(path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    for content in (b"", b"text", whole[: len(whole) // 2], whole[:-1], bytes(flipped)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a table of experts, or damaged") as found:
            Table.load(path)
        assert "\n" not in str(found.value)
    np.savez(path.open("wb"), format="another")
    with pytest.raises(ValueError, match="another format"):
        Table.load(path)


def test_another_models_is_refused(tmp_path):
    Table.learn(CHOICES, 3).save(tmp_path / "table.npz")
    with pytest.raises(
        ValueError, match="a table of 3 sparse layers of 3 experts; accepted is one of the model's 4 of 3"
    ):
        Table.load(tmp_path / "table.npz", layers=4, experts=3)


@pytest.mark.parametrize(
    "choices, order, said",
    [
        (np.zeros((2, 2), int), 2, "accepted is \\[tokens, layers, choices\\]"),
        (np.full((1, 1, 1), 3), 2, "accepted are -1 to 2"),
        (CHOICES, 4, "order 4"),
    ],
)
def test_mistakes_are_named(choices, order, said):
    with pytest.raises(ValueError, match=said):
        Table.learn(choices, 3, order)
