"""The vocabulary: T5's ids, the same model each time, one per corpus, clear refusals."""

import io
import json
import os
import random
import re
import sys

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from switchmoe.data import progress, sources
from switchmoe.data import vocabulary as library
from switchmoe.data.errors import DataError
from switchmoe.data.vocabulary import Vocabulary, load_vocabulary
from switchmoe.settings import DataSettings

SIZE = 400


def texts(seed: int, count: int = 200) -> list[str]:
    rng = random.Random(seed)
    syllables = [first + second for first in "bcdfglmnprst" for second in ("a", "e", "i", "o", "an", "er")]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(400)]
    return [" ".join(rng.choices(words, k=30)) for _ in range(count)]


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return texts(0)


@pytest.fixture(scope="module")
def vocabulary(corpus) -> Vocabulary:
    return Vocabulary.from_bytes(library.train(corpus, SIZE))


def settings(tmp_path, **values) -> DataSettings:
    return DataSettings(data_dir=str(tmp_path), **{"vocab_size": SIZE} | values)


def refusal(call, *arguments) -> str:
    with pytest.raises(DataError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_ids_are_those_of_t5(vocabulary):
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (0, 1, 2)
    assert vocabulary.size == SIZE + 100
    assert vocabulary.sentinel(0) == SIZE + 99
    assert vocabulary.sentinel(99) == SIZE
    for index in (-1, 100):
        with pytest.raises(ValueError, match="0 to 99"):
            vocabulary.sentinel(index)


def test_encode_gives_int32_pieces_and_decode_the_text(vocabulary, corpus):
    ids = vocabulary.encode(corpus[0])
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert 2 < ids.min() and ids.max() < SIZE
    assert vocabulary.decode(ids) == corpus[0]
    empty = vocabulary.encode("")
    assert empty.shape == (0,) and empty.dtype == np.int32


@given(st.text(st.characters(codec="utf-8", categories=("L", "N"), max_codepoint=0x24F), min_size=1))
def test_bytes_stand_in_for_letters_never_seen(vocabulary, text):
    ids = vocabulary.encode(text)
    assert vocabulary.unk_id not in ids
    processor = sentencepiece.SentencePieceProcessor(model_proto=vocabulary.model_bytes)
    assert (
        vocabulary.decode(ids) == processor.normalize(text).replace("\N{LOWER ONE EIGHTH BLOCK}", " ").strip()
    )


def test_decode_shows_sentinels_hides_pads_and_stops_at_eos(vocabulary):
    ids = vocabulary.encode("bera noti")
    shown = [vocabulary.sentinel(0), *ids, 0, vocabulary.sentinel(12), 1, *ids]
    assert vocabulary.decode(shown) == "<extra_id_0> bera noti<extra_id_12>"
    assert vocabulary.decode(np.array([0, 0, 1])) == ""


def test_decode_survives_ids_of_a_padded_embedding(vocabulary):
    assert vocabulary.decode([vocabulary.size, vocabulary.size + 27]).split() == ["⁇", "⁇"]


def test_letters_of_a_sentinel_in_the_text_are_not_a_sentinel(vocabulary):
    assert vocabulary.encode("<extra_id_0>").max() < SIZE


def test_sentinels_that_are_pieces_already_keep_their_ids(vocabulary):
    """As in mT5's file."""
    model = sentencepiece_model_pb2.ModelProto.FromString(vocabulary.model_bytes)
    for i in reversed(range(100)):
        model.pieces.add(piece=f"\u2581<extra_id_{i}>", score=0.0, type=4)
    there = Vocabulary.from_bytes(model.SerializeToString())
    assert (there.pieces, there.size) == (vocabulary.pieces, vocabulary.size)
    assert there.sentinel(3) == vocabulary.sentinel(3)


def test_training_gives_the_same_bytes_each_time(vocabulary, corpus):
    assert library.train(corpus, SIZE) == vocabulary.model_bytes
    assert Vocabulary.from_bytes(vocabulary.model_bytes) == vocabulary
    assert Vocabulary.from_bytes(vocabulary.model_bytes).sha256 == vocabulary.sha256


def test_training_is_silent(capfd):
    library.train(texts(1, 50), 320)
    assert capfd.readouterr() == ("", "")


def test_long_documents_are_trained_on_and_large_corpora_sampled_evenly(monkeypatch):
    """A word that only a 60,000-letter document holds becomes a piece; a sample reaches all of a corpus."""
    long = " ".join(["zyzzyva"] * 8000)
    model = Vocabulary.from_bytes(library.train([*texts(0), long], SIZE))
    assert len(model.encode("zyzzyva")) == 1
    sample = list(library._sample([str(n) for n in range(1000)], library._Seen()))
    assert sorted(sample) == sorted(str(n) for n in range(1000))
    monkeypatch.setattr(library, "TRAINING_BYTES", 300)
    taken = [int(text) for text in library._sample([f"{n:03}" for n in range(1000)], library._Seen())]
    assert len(taken) == 101
    assert np.histogram(taken, bins=10, range=(0, 1000))[0].min() >= 7


def test_lines_with_the_trainers_own_sign_are_trained_on(corpus):
    """It skips every line with U+2585, without a word; with it in all of them it fails inside."""
    signed = [f"{text} \u2585 zyzzyva zyzzyva" for text in corpus]
    model = Vocabulary.from_bytes(library.train(signed, SIZE))
    assert len(model.encode("zyzzyva")) == 1
    assert model.decode(model.encode("a\u2585b")) == "a\u2585b", "as bytes"


def test_text_of_any_shape_is_trained_on(corpus):
    """Long words make the trainer's sums overflow."""
    unbroken = "".join("".join(corpus).split())[:60_000]
    assert Vocabulary.from_bytes(library.train([unbroken], SIZE)).pieces == SIZE
    parts = list(library._digestible(unbroken))
    assert "".join(parts).replace(" ", "") == unbroken
    assert max(map(len, " ".join(parts).split())) <= library.LONGEST_WORD


def test_a_document_of_any_length_is_handed_over_in_parts(monkeypatch, corpus):
    monkeypatch.setattr(library, "LONGEST", 1000)
    text = " ".join(corpus)
    parts = list(library._digestible(text))
    assert "".join(parts) == text and max(map(len, parts)) <= 1000 and len(parts) > 10
    assert list(library._digestible("x" * 2500)) == ["x" * 1000, "x" * 1000, "x" * 500]


@pytest.mark.parametrize("documents", [["\u2585", " \u2585 "], ["  ", "\n"]])
def test_a_corpus_without_a_character_gets_one_line(documents):
    assert "have no character to train on" in refusal(library.train, documents, SIZE)


def test_progress_is_told_of_what_takes_long(corpus, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.02)
    lines = []
    library.train(corpus * 20, SIZE, note=lines.append)
    assert lines and re.fullmatch(
        r"training a vocabulary of 400 pieces: \d+ MB of text, \d+ s so far", lines[0]
    )


# Text that comes back as it was.


@pytest.fixture(scope="module")
def exact(corpus) -> Vocabulary:
    code = ["def f(x):\n    if x:\n        return x\n\n\treturn 'a  b'\r\n"] * 30
    return Vocabulary.from_bytes(library.train([*corpus, *code], SIZE, library.TRAINER | library.IDENTITY))


@given(st.text() | st.text("\u2581\u2585\u2047 \n\t\r\x00a<0xE>_"))
def test_identity_gives_every_character_back(exact, text):
    ids = exact.encode(text)
    assert exact.decode(ids) == text and ids.dtype == np.int32
    assert not {exact.pad_id, exact.eos_id, exact.unk_id} & set(ids.tolist())


@pytest.mark.parametrize(
    "text", ["def f(x):\n    return x", "  two  blanks ", "ｆｕｌｌ　ｗｉｄｔｈ", "a\u2581b", "a\u2047b", "<extra_id_0>", "e\u0301 \r\n"]
)  # fmt: skip
def test_what_t5s_normalization_changes(exact, vocabulary, text):
    assert exact.decode(exact.encode(text)) == text
    assert vocabulary.decode(vocabulary.encode(text)) != text or text == "<extra_id_0>"


def test_an_indentation_is_one_piece_and_sentinels_stay_at_the_top(exact):
    assert len(exact.encode("    ")) == 1
    assert exact.decode([exact.sentinel(3), *exact.encode(" x\n")]) == "<extra_id_3> x\n"
    assert exact.sentinel(0) == SIZE + 99 and exact.exact


def test_each_normalization_has_its_own_vocabulary(tmp_path, corpus, vocabulary):
    plain = load_vocabulary(settings(tmp_path), corpus)
    other = load_vocabulary(settings(tmp_path, normalization="identity"), corpus)
    assert other.exact and not plain.exact and plain == vocabulary
    path = tmp_path / "spiece.model"
    path.write_bytes(plain.model_bytes)
    given = settings(tmp_path, vocab=str(path), normalization="identity")
    assert "data.normalization=identity: " in refusal(load_vocabulary, given, [])


def test_identity_keeps_the_indentation_of_documents(tmp_path):
    path = tmp_path / "code.jsonl"
    path.write_text("".join(json.dumps({"text": f"  x = {n}\n    y\n"}) + "\n" for n in range(40)))
    given = DataSettings(source=str(path), normalization="identity", validation_share=0.3)
    assert sources.load(given, "train")[0] == "  x = 0\n    y\n"
    stripped = DataSettings(source=str(path), validation_share=0.3)
    assert sources.load(stripped, "train")[0].startswith("x = ")


def test_a_vocabulary_is_trained_once_per_corpus_and_size(tmp_path, corpus, monkeypatch):
    first = load_vocabulary(settings(tmp_path), corpus)
    assert [path.suffix for path in (tmp_path / "vocabularies").iterdir()] == [".model"]  # nothing temporary
    trained = []
    original = library.train
    monkeypatch.setattr(library, "train", lambda *given: trained.append(given) or original(*given))
    assert load_vocabulary(settings(tmp_path), list(corpus)) == first
    assert not trained
    load_vocabulary(settings(tmp_path), [*corpus, "one more"])
    load_vocabulary(settings(tmp_path, vocab_size=401), corpus)
    assert len(trained) == 2


def test_a_vocabulary_is_kept_beside_local_files(tmp_path):
    from switchmoe.data import sources

    (tmp_path / "a.txt").write_text("\n".join(texts(3)))
    local = DataSettings(source=str(tmp_path / "*.txt"), vocab_size=SIZE)
    load_vocabulary(local, sources.load(local, "train"))
    (model,) = tmp_path.glob("*.model")
    assert str(SIZE) in model.name
    elsewhere = DataSettings(source=local.source, vocab_size=SIZE, data_dir=str(tmp_path / "cache"))
    load_vocabulary(elsewhere, sources.load(elsewhere, "train"))
    assert len(list(tmp_path.glob("cache/vocabularies/*.model"))) == 1


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, corpus):
    (tmp_path / "vocabularies").write_text("a file where the directory would be")
    with pytest.warns(UserWarning, match="not cached"):
        found = load_vocabulary(settings(tmp_path), corpus)
    assert found == load_vocabulary(settings(tmp_path / "elsewhere"), corpus)


def test_a_damaged_cached_model_is_named(tmp_path, corpus):
    load_vocabulary(settings(tmp_path), corpus)
    (model,) = (tmp_path / "vocabularies").iterdir()
    os.truncate(model, 1000)
    assert str(model) in refusal(load_vocabulary, settings(tmp_path), corpus)


def test_an_existing_model_is_used(tmp_path, vocabulary):
    path = tmp_path / "spiece.model"
    path.write_bytes(vocabulary.model_bytes)
    assert load_vocabulary(settings(tmp_path, vocab=str(path)), []) == vocabulary
    message = refusal(load_vocabulary, settings(tmp_path, vocab=str(path), vocab_size=32000), [])
    assert "data.vocab_size=32000" in message and f"accepted is data.vocab_size={SIZE}" in message


def test_a_bucket_without_its_package_is_named(monkeypatch, corpus):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    message = refusal(load_vocabulary, settings("gs://nobody", vocab="gs://nobody/spiece.model"), [])
    assert "data.vocab=gs://nobody/spiece.model: cannot be read" in message and "gcsfs" in message
    message = refusal(load_vocabulary, settings("gs://nobody"), corpus)
    assert "data.data_dir=gs://nobody: cannot be read" in message and "gcsfs" in message


@pytest.mark.parametrize("content", [None, b"", b"no model at all", "half"])
def test_missing_truncated_and_foreign_models_are_named(tmp_path, vocabulary, content):
    path = tmp_path / "spiece.model"
    if content is not None:
        path.write_bytes(vocabulary.model_bytes[:5000] if content == "half" else content)
    message = refusal(load_vocabulary, settings(tmp_path, vocab=str(path)), [])
    assert f"data.vocab={path}" in message and "accepted" in message


def test_a_model_with_other_special_ids_is_refused(tmp_path, corpus):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_writer=model, vocab_size=300, minloglevel=2
    )
    path = tmp_path / "foreign.model"
    path.write_bytes(model.getvalue())
    assert "-1, 2 and 0" in refusal(load_vocabulary, settings(tmp_path, vocab=str(path)), [])


def test_a_size_that_the_corpus_cannot_fill_names_the_one_that_it_can(corpus):
    message = refusal(library.train, corpus, 90000)
    assert "data.vocab_size=90000: accepted is at most " in message
    most = int(message.split("at most ")[1].split()[0])
    assert Vocabulary.from_bytes(library.train(corpus, most)).pieces == most


def test_a_size_below_the_corpus_letters_names_the_least():
    letters = [" ".join(chr(0x4E00 + n) for n in range(200))] * 3
    message = refusal(library.train, letters, 300)
    assert "data.vocab_size=300: accepted is at least 4" in message
