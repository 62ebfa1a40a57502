"""Batches: exact shapes, nothing lost, the same in the seed, resumable, shared out by process."""

import dataclasses
import itertools
import json
import random

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from switchmoe.data import batches, span_corruption, vocabulary
from switchmoe.data.errors import DataError
from switchmoe.settings import DataSettings

SETTINGS = DataSettings(vocab_size=320, batch_size=4, input_length=25, streams=1, prefetch=2)
FOUR = dataclasses.replace(SETTINGS, streams=0)


def texts(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(200)]
    return [" ".join(rng.choices(words, k=rng.randint(1, 40))) for _ in range(count)]


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return texts(0, 83)


@pytest.fixture(scope="module")
def words(documents) -> vocabulary.Vocabulary:
    return vocabulary.Vocabulary.from_bytes(vocabulary.train(documents, SETTINGS.vocab_size))


@pytest.fixture
def start(documents, words):
    """Starts iterators as train_batches does, and ends their threads after the test."""
    started = []

    def begin(settings=SETTINGS, seed=0, **process):
        started.append(batches.train_batches(settings, words, documents, seed, **process))
        return started[-1]

    yield begin
    for iterator in started:
        iterator.close()


def take(iterator, count: int) -> list[dict[str, np.ndarray]]:
    return list(itertools.islice(iterator, count))


def same(left, right) -> bool:
    assert len(left) == len(right)
    return all(
        np.array_equal(a[name], b[name])
        for a, b in zip(left, right, strict=True)
        for name in ("inputs", "targets")
    )


def restored(taken, words) -> np.ndarray:
    """The raw tokens of batches, in order."""
    rows = [pair for batch in taken for pair in zip(batch["inputs"], batch["targets"], strict=True)]
    return np.concatenate([span_corruption.restore(inputs, targets, words) for inputs, targets in rows])


# Target length.


@pytest.mark.parametrize("asked, given", [(0, 6), (6, 6), (9, 9)])
def test_target_length_is_solved_or_padded(start, asked, given):
    settings = DataSettings(vocab_size=320, batch_size=4, input_length=25, target_length=asked)
    assert batches.target_length(settings) == given
    (batch,) = take(start(settings), 1)
    assert batch["inputs"].shape == (4, 25) and batch["targets"].shape == (4, given)
    assert batch["inputs"].dtype == batch["targets"].dtype == np.int32
    assert (batch["inputs"] != 0).all() and (batch["inputs"][:, -1] == 1).all()
    assert (batch["targets"][:, :6] != 0).all() and (batch["targets"][:, 5] == 1).all()
    assert (batch["targets"][:, 6:] == 0).all()


def test_a_target_length_that_would_cut_is_refused():
    settings = DataSettings(target_length=113)
    with pytest.raises(
        DataError, match=r"data.target_length=113: .*114 .*accepted is 0 or an integer >= 114"
    ):
        batches.target_length(settings)


# Training.


def test_one_epoch_holds_every_token_of_every_document_once(start, documents, words):
    """The pieces are the shuffled documents, joined without a separator; the next epoch has another order."""
    encoded = [words.encode(text) for text in documents]
    total = sum(map(len, encoded))
    tokens = restored(take(start(), 2 * total // (4 * 27) + 1), words)
    orders = []
    for epoch in range(2):
        ordered = batches.document_order(documents, seed=0)
        order = [ordered[epoch * len(documents) + n] for n in range(len(documents))]
        assert sorted(order) == sorted(documents)
        orders.append(order)
        expected = np.concatenate([words.encode(text) for text in order])
        np.testing.assert_array_equal(tokens[epoch * total : (epoch + 1) * total], expected)
    assert orders[0] != orders[1] != documents


def test_the_seed_decides(start):
    first, again, other = (take(start(seed=seed), 40) for seed in (3, 3, 4))
    assert same(first, again)
    assert not any(same([a], [b]) for a, b in itertools.product(first, other))


def test_neighbouring_seeds_do_not_share_epochs(documents):
    def epoch(seed: int, number: int) -> list[str]:
        ordered = batches.document_order(documents, seed)
        return [ordered[number * len(documents) + n] for n in range(len(documents))]

    assert epoch(0, 1) != epoch(1, 0)


def test_noise_differs_between_examples_and_epochs(documents, words):
    """One document, one piece long: what changes from example to example is the noise."""
    settings = DataSettings(vocab_size=320, batch_size=4, input_length=100)
    raw_length, _ = span_corruption.lengths(100)
    text = words.decode(np.concatenate([words.encode(text) for text in documents])[:raw_length])
    assert len(words.encode(text)) == raw_length
    iterator = batches.train_batches(settings, words, [text], 0)
    taken = take(iterator, 5)
    iterator.close()
    assert len({row.tobytes() for batch in taken for row in batch["inputs"]}) == 20
    assert len(np.unique(restored(taken, words).reshape(20, raw_length), axis=0)) == 1


@pytest.mark.parametrize("settings", [SETTINGS, FOUR])
@pytest.mark.parametrize("taken", [0, 1, 7, 60])
def test_a_saved_state_resumes_bit_for_bit(start, taken, settings):
    iterator = start(settings)
    take(iterator, taken)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 30)
    for resumed in (start(settings), start(settings)):
        take(resumed, 3)  # wherever it was
        resumed.set_state(state)
        assert resumed.get_state() == state
        assert same(take(resumed, 30), expected)


def test_a_state_after_every_batch_resumes(documents, words):
    """Also where a document ends with a batch, which is where one could be lost or repeated."""
    text = [words.encode(text) for text in documents]
    aligned = [words.decode(tokens[:27]) for tokens in text if len(tokens) >= 27]
    aligned = [text for text in aligned if len(words.encode(text)) == 27]
    assert len(aligned) >= 5
    settings = DataSettings(vocab_size=320, batch_size=1, input_length=25)
    for corpus in (aligned, documents):
        iterator = batches.train_batches(settings, words, corpus, 0)
        states, taken = [], []
        for _ in range(12):
            states.append(json.loads(json.dumps(iterator.get_state())))
            taken += take(iterator, 1)
        for n, state in enumerate(states):
            iterator.set_state(state)
            assert same(take(iterator, 12 - n), taken[n:])
        iterator.close()


def test_a_state_survives_an_orbax_checkpoint(start, tmp_path):
    iterator = start()
    take(iterator, 5)
    with ocp.CheckpointManager(tmp_path) as manager:
        params = {"w": np.arange(3.0)}
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(params), data=grain.checkpoint.CheckpointSave(iterator)
        )
        manager.save(5, args=arguments)
        expected = take(iterator, 10)
        manager.wait_until_finished()
        resumed = start()
        manager.restore(
            5,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(params), data=grain.checkpoint.CheckpointRestore(resumed)
            ),
        )
    assert same(take(resumed, 10), expected)


@pytest.mark.parametrize("count", [2, 3])
def test_streams_share_the_documents_out(documents, count):
    numbered = [f"{n} {text}" for n, text in enumerate(documents)]
    shares = [batches.document_order(numbered, 0, stream, count) for stream in range(count)]
    first_epoch = [
        [share[n] for n in range(-(-(len(numbered) - stream) // count))]
        for stream, share in enumerate(shares)
    ]
    together = list(itertools.chain(*first_epoch))
    assert sorted(together) == sorted(numbered)
    assert not set(first_epoch[0]) & set(first_epoch[1])


def test_batches_do_not_depend_on_who_reads_which_stream(start):
    """One reader of four streams, then two, then four: each goes on from the joined states of those before."""
    whole = take(start(FOUR), 15)
    state = None
    for streams in ([[0, 1, 2, 3]], [[0, 3], [1, 2]], [[0], [1], [2], [3]]):
        readers = [start(FOUR, streams=mine) for mine in streams]
        if state:
            for reader in readers:
                reader.set_state(state)
        seen, expected = [take(reader, 5) for reader in readers], whole[:5]
        del whole[:5]
        for mine, parts in zip(streams, seen, strict=True):
            rows = batches.stream_rows(FOUR)[mine].ravel()
            assert same(parts, [{name: batch[name][rows] for name in batch} for batch in expected])
        state = json.loads(json.dumps(batches.joined_states(reader.get_state() for reader in readers)))


def test_a_stream_fills_rows_of_its_own_from_documents_of_its_own(start, documents, words):
    taken = take(start(dataclasses.replace(SETTINGS, streams=2)), 6)
    for stream in (0, 1):
        rows = [{name: batch[name][2 * stream : 2 * stream + 2] for name in batch} for batch in taken]
        order = batches.document_order(documents, 0, stream, 2)
        expected = np.concatenate([words.encode(order[n]) for n in range(40)])
        np.testing.assert_array_equal(restored(rows, words), expected[: 6 * 2 * 27])


def test_documents_without_text_are_refused_rather_than_read_for_ever(words):
    with pytest.raises(DataError, match="none of its 3 documents has any text"):
        batches.train_batches(SETTINGS, words, ["", " ", ""], 0)
    iterator = batches.train_batches(SETTINGS, words, ["", "abcde " * 50, ""], 0)
    assert len(take(iterator, 2)) == 2  # an empty one among others does no harm
    iterator.close()


# Evaluation.


def test_evaluation_batches_are_the_documents_in_order(documents, words):
    taken = batches.eval_batches(SETTINGS, words, documents, 3)
    assert [batch["inputs"].shape for batch in taken] == [(4, 25)] * 3
    assert [batch["targets"].shape for batch in taken] == [(4, 6)] * 3
    expected = np.concatenate([words.encode(text) for text in documents])[: 3 * 4 * 27]
    np.testing.assert_array_equal(restored(taken, words), expected)
    assert same(taken, batches.eval_batches(SETTINGS, words, documents, 3))
    assert same(taken[:2], batches.eval_batches(SETTINGS, words, documents, 2))


def test_evaluation_takes_what_there_is_and_at_least_one_batch(documents, words):
    total = sum(len(words.encode(text)) for text in documents)
    assert len(batches.eval_batches(SETTINGS, words, documents, 10_000)) == total // (4 * 27)
    large = DataSettings(vocab_size=320, batch_size=100_000, input_length=25)
    with pytest.raises(DataError, match=rf"data.batch_size=100000: .* accepted is at most {total // 27}$"):
        batches.eval_batches(large, words, documents, 1)
    with pytest.raises(DataError, match="0 sequences .* accepted is a smaller data.input_length"):
        batches.eval_batches(SETTINGS, words, ["abc"], 1)


def test_unigram_cross_entropy_by_hand():
    """V = 4; train targets 1 2 2 3 3 3 (pads left out) give (1, 2, 3, 4) / 10 with one added to each."""
    train = [{"targets": np.array([[1, 2, 0], [2, 3, 0]])}, {"targets": np.array([[3, 3, 0]])}]
    held_out = [{"targets": np.array([[3, 1, 0]])}, {"targets": np.array([[2, 3, 0]])}]
    expected = -(2 * np.log(0.4) + np.log(0.2) + np.log(0.3)) / 4
    assert batches.unigram_cross_entropy(train, held_out, 4, num_batches=2) == pytest.approx(expected)
    fewer = -(2 * np.log(2 / 8) + np.log(2 / 8) + np.log(3 / 8)) / 4
    assert batches.unigram_cross_entropy(iter(train), held_out, 4, num_batches=1) == pytest.approx(fewer)


def test_unigram_cross_entropy_reads_no_more_than_it_is_told(start, documents, words):
    iterator, reference = start(), start()
    held_out = batches.eval_batches(SETTINGS, words, documents, 2)
    value = batches.unigram_cross_entropy(iterator, held_out, words.size, num_batches=5)
    assert 0 < value < np.log(words.size)
    take(reference, 5)
    assert same(take(iterator, 3), take(reference, 3))


def test_few_documents_for_many_rows_are_told_of():
    """With a stream a row, 5 documents are read by 32 rows at once; with 4 streams of 8 rows all rows differ."""
    few = dataclasses.replace(SETTINGS, batch_size=32, streams=0)
    warning = batches.repeated_rows(few, 5)
    assert (
        "5 documents for the 32 rows of a batch" in warning
        and "data.streams=4 gives rows that differ" in warning
    )
    assert (
        batches.repeated_rows(few, 32) == ""
        and batches.repeated_rows(dataclasses.replace(few, streams=4), 5) == ""
    )
    assert "data.streams=1 " in batches.repeated_rows(few, 1)
    rng = np.random.default_rng(0)
    long = [" ".join(f"{n}" for n in rng.integers(0, 10**6, 4000)) for _ in range(5)]

    found_vocabulary = vocabulary.Vocabulary.from_bytes(vocabulary.train(long, few.vocab_size))

    def different(settings):
        found = next(batches.train_batches(settings, found_vocabulary, long, seed=0))["inputs"]
        return len(np.unique(found, axis=0))

    assert different(few) <= 5
    assert different(dataclasses.replace(few, streams=4)) == 32
