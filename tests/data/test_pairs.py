"""Pairs: rows of both kinds of model, shares of a mixture, order, epochs, positions, and several processes' rows."""

import numpy as np
import pytest

from switchmoe.data import pairs, tasks
from switchmoe.data.batches import joined_states
from switchmoe.data.tasks import Example, Task
from switchmoe.settings import DataSettings, TaskSettings

BOTH, ALONE = ("encoder", "decoder"), ("decoder",)


class Letters:
    """A vocabulary of letters: a is 10."""

    eos_id, pad_id, size = 1, 0, 40

    def encode(self, text):
        return np.array([ord(letter) - 87 for letter in text], np.int32)


def encoder(stacks=BOTH, batch_size=4, streams=0):
    data = DataSettings(batch_size=batch_size, input_length=6, target_length=4, streams=streams, bos_id=3)
    return pairs.Encoder(data, stacks, Letters())


def task(name, count):
    found = tuple(Example(f"{name}{'bcdefghijk'[n]}", "z") for n in range(count))
    return Task(name, lambda split: found, ("accuracy",))


def test_rows_of_an_encoder_decoder_end_and_are_cut():
    batch = encoder().batch([Example("ab", "c"), Example("abcdefgh", "abcdef"), None])
    assert batch["inputs"].tolist() == [[10, 11, 1, 0, 0, 0], [10, 11, 12, 13, 14, 1], [0] * 6]
    assert batch["targets"].tolist() == [[12, 1, 0, 0], [10, 11, 12, 1], [0] * 4]
    assert encoder().is_cut(Example("abcdef", "c")) == (True, False)


def test_rows_of_a_decoder_alone_count_the_targets_and_their_end():
    batch = encoder(ALONE).batch([Example("ab", "c")])
    assert batch["targets"].tolist() == [[10, 11, 12, 1] + [0] * 6]
    assert batch["loss"].tolist() == [[0, 0, 1, 1] + [0] * 6]
    assert batch["segments"].tolist() == [[1] * 4 + [0] * 6]
    assert batch["positions"].tolist() == [[0, 1, 2, 3] + [0] * 6]
    assert encoder(ALONE).prompt(Example("ab", "c")).tolist() == [3, 10, 11]
    assert encoder().prompt(Example("ab", "c")).tolist() == [10, 11, 1]


@pytest.mark.parametrize(
    "settings, wanted",
    [
        (dict(), [6 / 8, 2 / 8]),
        (dict(ceiling=2), [0.5, 0.5]),
        (dict(temperature=2.0), [6**0.5 / (6**0.5 + 2**0.5), 2**0.5 / (6**0.5 + 2**0.5)]),
        (dict(mixture="equal"), [0.5, 0.5]),
        (dict(mixture="rates", rates="3,1", names="a,b"), [0.75, 0.25]),
    ],
)
def test_shares(settings, wanted):
    np.testing.assert_allclose(pairs.shares([task("a", 6), task("b", 2)], TaskSettings(**settings)), wanted)


def first_letters(batch):
    return batch["inputs"][:, 0].tolist()


def test_a_mixture_keeps_its_shares_and_each_epoch_has_every_example_once():
    chosen = [task("a", 6), task("b", 2)]
    with_streams = pairs.train_batches(chosen, TaskSettings(), encoder(batch_size=8), 0)
    batches = [next(with_streams) for _ in range(6)]
    assert all(sorted(first_letters(batch)) == [10] * 6 + [11] * 2 for batch in batches)
    for batch in batches:  # of `a` 6 rows a batch are an epoch
        rows = batch["inputs"][batch["inputs"][:, 0] == 10]
        assert sorted(rows[:, 1].tolist()) == [11, 12, 13, 14, 15, 16]
    assert (
        len({tuple(map(tuple, batch["inputs"].tolist())) for batch in batches}) == 6
    )  # another order each time


def test_it_goes_on_where_it_was_and_processes_share_the_rows():
    chosen, settings = [task("a", 7), task("b", 3)], TaskSettings(temperature=2.0)
    whole = pairs.train_batches(chosen, settings, encoder(), 5)
    wanted = [next(whole) for _ in range(5)]
    parts = [pairs.train_batches(chosen, settings, encoder(), 5, streams) for streams in ([0, 1], [2, 3])]
    for _ in range(3):
        found = [next(part) for part in parts]
    joined = np.concatenate([part["inputs"] for part in found])
    np.testing.assert_array_equal(joined, wanted[2]["inputs"])
    again = pairs.train_batches(chosen, settings, encoder(), 5)
    again.set_state(joined_states([part.get_state() for part in parts]))
    for batch in wanted[3:]:
        np.testing.assert_array_equal(next(again)["inputs"], batch["inputs"])


def test_lengths_hold_nearly_all_examples():
    examples = tuple(Example("a" * (10 if n < 99 else 30), "b") for n in range(100))
    assert pairs.fitting([Task("a", lambda split: examples, ("accuracy",))], Letters(), share=0.9) == (16, 8)
    assert pairs.fitting([Task("a", lambda split: examples, ("accuracy",))], Letters(), share=1.0) == (32, 8)


def test_what_is_measured_is_spread_over_sorted_examples():
    """The packaged summaries are sorted by topic."""
    examples = tuple(Example(f"a{n}", "x" if n < 90 else "y") for n in range(100))
    found = pairs.held_out(Task("a", lambda split: examples, ("accuracy",)), TaskSettings(eval_examples=20))
    assert [example.targets for example in found].count("y") == 2 and len(set(found)) == 20
    assert (
        len(pairs.held_out(Task("a", lambda split: examples, ("accuracy",)), TaskSettings(eval_examples=0)))
        == 100
    )
    (topic,) = tasks.find(TaskSettings(names="topic"), DataSettings())
    assert len({example.targets for example in pairs.held_out(topic, TaskSettings())}) == 11
