"""Packed pairs: rows by hand, nothing lost or cut, less padding, going on, several processes; and a model reads each pair as if alone."""

import functools
from collections import Counter

import jax
import numpy as np
import pytest
from test_pairs import ALONE, BOTH, Letters

from switchmoe.data import pairs, tasks
from switchmoe.data.batches import joined_states
from switchmoe.data.tasks import Example, Task
from switchmoe.model.transformer import Transformer, example_tokens
from switchmoe.settings import DataSettings, TaskSettings, from_config

PACKED, FILLED = TaskSettings(packed=3), TaskSettings(filled=True)


def encoder(stacks=BOTH, batch_size=4):
    data = DataSettings(batch_size=batch_size, input_length=6, target_length=4, bos_id=3)
    return pairs.Encoder(data, stacks, Letters())


def task(name="a", count=30):
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("bcdefg"), rng.integers(1, 8))) for _ in range(count)]
    found = tuple(Example(f"{name}{word}", word[: 1 + n % 3]) for n, word in enumerate(words))
    return Task(name, lambda split: found, ("accuracy",))


def rows_of(made, texts, fill=2):
    return made.rows([[made.tokens(Example(*text)) for text in row] for row in texts], fill)


def test_rows_by_hand():
    batch = rows_of(encoder(), [[("ab", "c"), ("d", "ef")], []])
    assert {name: rows[0].tolist() for name, rows in batch.items()} == {
        "inputs": [10, 11, 1, 13, 1] + [0] * 7,
        "input_segments": [1, 1, 1, 2, 2] + [0] * 7,
        "targets": [12, 1, 14, 15, 1, 0, 0, 0],
        "segments": [1, 1, 2, 2, 2, 0, 0, 0],
        "positions": [0, 1, 0, 1, 2, 0, 0, 0],
    }
    assert not any(rows[1].any() for rows in batch.values())
    batch = rows_of(encoder(ALONE), [[("ab", "c"), ("d", "ef")]])
    assert {name: rows[0, :9].tolist() for name, rows in batch.items()} == {
        "targets": [10, 11, 12, 1, 13, 14, 15, 1, 0],
        "segments": [1] * 4 + [2] * 4 + [0],
        "positions": [0, 1, 2, 3, 0, 1, 2, 3, 0],
        "loss": [0, 0, 1, 1, 0, 1, 1, 1, 0],
    }


def unpacked(batch):
    """The (inputs, targets) of a batch."""
    found = []
    for row in range(len(batch["inputs"])):
        for number in range(1, batch["segments"][row].max() + 1):
            parts = (("inputs", "input_segments"), ("targets", "segments"))
            found.append(
                tuple(tuple(batch[name][row][batch[by][row] == number].tolist()) for name, by in parts)
            )
    return found


@pytest.mark.parametrize("settings, most", [(PACKED, 3), (FILLED, 1)])
def test_each_epoch_has_every_example_once_and_there_is_less_padding(settings, most):
    made, one = encoder(), task()
    found = []
    batches = pairs.train_batches([one], settings, made, 0)
    while len(found) < 60:
        found += unpacked(next(batches))
    wanted = Counter(
        tuple(tuple(np.append(part, 1).tolist()) for part in made.tokens(example))
        for example in one.examples("train")
    )
    epochs, more = divmod(len(found), 30)
    once = Counter({pair: epochs * count for pair, count in wanted.items()})
    assert not once - Counter(found) and not (Counter(found) - once) - wanted
    assert sum((Counter(found) - once).values()) == more and not set(found) - set(wanted)
    a_row, padding = pairs.filling([one], settings, made, 0)
    alone, padding_alone = pairs.filling([one], TaskSettings(), made, 0)
    assert alone == 1 and a_row > most and padding < padding_alone
    batch = next(pairs.train_batches([one], TaskSettings(), made, 0))
    assert set(batch) == {"inputs", "targets"} and 0 < padding_alone < 1


def test_a_row_of_a_decoder_alone_has_no_more_targets_than_logits_are_computed_of():
    """Three times `data.target_length`, though more would fit; in a row of one example always."""
    long = tuple(Example("a", "bcd") for _ in range(30))
    made = encoder(ALONE)
    batch = next(pairs.train_batches([Task("a", lambda split: long, ("accuracy",))], PACKED, made, 0))
    assert batch["targets"].shape[1] == 30 and made.room(3) == (30, made.data.most_predicted(30)) == (30, 12)
    assert batch["segments"].max(axis=1).tolist() == [3] * 4 and set(batch["loss"].sum(axis=1)) == {12}
    short = tuple(Example("abcde", "b") for _ in range(30))
    batch = next(pairs.train_batches([Task("a", lambda split: short, ("accuracy",))], PACKED, made, 0))
    assert batch["segments"].max(axis=1).tolist() == [4] * 4 and set(batch["loss"].sum(axis=1)) == {8}
    assert made.data.most_predicted(10) == 4 and made.data.most_predicted(3) == 3


def test_it_goes_on_where_it_was_and_processes_share_the_rows():
    chosen = [task("a"), task("b", 9)]
    whole = pairs.train_batches(chosen, PACKED, encoder(), 5)
    wanted = [next(whole) for _ in range(5)]
    parts = [pairs.train_batches(chosen, PACKED, encoder(), 5, streams) for streams in ([0, 1], [2, 3])]
    for _ in range(3):
        found = [next(part) for part in parts]
    for name in wanted[2]:
        np.testing.assert_array_equal(np.concatenate([part[name] for part in found]), wanted[2][name])
    again = pairs.train_batches(chosen, PACKED, encoder(), 5)
    again.set_state(joined_states([part.get_state() for part in parts]))
    for batch in wanted[3:]:
        new = next(again)
        assert all(np.array_equal(new[name], batch[name]) for name in batch)


@pytest.mark.parametrize("positions", ["relative", "rotary"])
@pytest.mark.parametrize("stacks", [BOTH, ALONE])
def test_a_model_reads_each_pair_as_if_it_were_alone(stacks, positions):
    model = dict(d_model=16, d_ff=32, d_kv=8, num_heads=2, num_layers=2, dtype="float32", positions=positions)
    data = dict(vocab_size=300, batch_size=4, input_length=6, target_length=4, bos_id=3)
    if stacks == ALONE:
        model, data = model | {"stacks": "decoder_only"}, data | {"objective": "causal_lm"}
    moe = dict(num_experts=4, capacity_factor=8.0, eval_capacity_factor=8.0, group_size=0, jitter=0.0)
    settings = from_config({"model": model, "moe": moe, "data": data})
    params = jax.jit(Transformer(settings).init)(jax.random.key(0), *example_tokens(settings))
    losses = jax.jit(functools.partial(Transformer(settings).apply, method="token_losses"))

    def nll(batch, everywhere=False):
        read = {name: np.asarray(rows) for name, rows in batch.items() if name != "loss" or not everywhere}
        (nll_BL, *_), _ = losses(params, read)
        counted = batch.get("loss", batch["targets"]) != 0
        return np.asarray(nll_BL)[counted]

    made = encoder(stacks)
    texts = [("abc", "de"), ("fg", "h"), ("bcde", "bcd"), ("g", "f")]
    rows = rows_of(made, [texts[:3], texts[3:]], fill=3)
    together = nll(rows)
    np.testing.assert_allclose(together, nll(rows, everywhere=True), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(
        together, nll(made.batch([Example(*text) for text in texts])), rtol=2e-5, atol=2e-5
    )


def test_the_embedded_tasks_in_rows_of_four():
    """Padding of topic and description: more than a third of the places, packed less than a tenth."""

    class Words:
        eos_id, pad_id, size = 1, 0, 40

        def encode(self, text):
            return np.full(len(text.split()), 5, np.int32)

    chosen = tasks.find(TaskSettings(names="topic,description"), DataSettings())
    longest = dict(zip(("input_length", "target_length"), pairs.fitting(chosen, Words()), strict=True))
    shares = []
    for packed, size in ((1, 32), (4, 8)):
        made = pairs.Encoder(DataSettings(batch_size=size, **longest), BOTH, Words())
        shares.append(
            pairs.filling(chosen, TaskSettings(names="topic,description", packed=packed), made, 0)[1]
        )
    assert shares[0] > 1 / 3 and shares[1] < shares[0] / 2
