"""Text of tokens as they come is, together, what all of them decode to; stops are cut, wherever tokens end."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchmoe.data import vocabulary as vocabularies
from switchmoe.data.vocabulary import IDENTITY, TRAINER, Vocabulary
from switchmoe.inference.serving.text import TextStream

TEXT = "The river Main, the city of M\u00fcnchen and the \u6771\u4eac tower; caf\u00e9s \U0001f600 of the old town. "


def words():
    rng = random.Random(0)
    return ["".join(rng.choice("abcdefghij") for _ in range(rng.randrange(2, 7))) for _ in range(300)]


VOCABULARIES = {
    name: Vocabulary.from_bytes(vocabularies.train([TEXT * 20, " ".join(words())], 340, TRAINER | more))
    for name, more in (("normalised", {}), ("exact", IDENTITY))
}


def streamed(vocabulary, ids, stops=(), continues=False):
    """(pieces as they come, the stream)."""
    stream, pieces = TextStream(vocabulary, stops, continues), []
    for token in ids:
        ended = stream.feed(token)
        pieces.append(stream.take().text)
        if ended:
            break
    pieces.append(stream.finish().text)
    return pieces, stream


@pytest.mark.parametrize("name", VOCABULARIES)
@given(data=st.data())
def test_pieces_are_together_what_all_tokens_decode_to(name, data):
    """Any ids: bytes of half characters, sentinels, pads, ids that no vocabulary has."""
    vocabulary = VOCABULARIES[name]
    byte = st.sampled_from([int(token) for token in vocabulary.byte_ids])
    one = st.integers(0, vocabulary.size + 5).filter(lambda token: token != vocabulary.eos_id)
    ids = data.draw(st.lists(st.one_of(byte, one), max_size=30))
    pieces, stream = streamed(vocabulary, ids)
    assert "".join(pieces) == vocabulary.decode(ids)
    assert len(stream.offsets) == len(ids) and stream.offsets == sorted(stream.offsets)


@pytest.mark.parametrize("name", VOCABULARIES)
@given(text=st.text(min_size=1, max_size=20))
def test_no_piece_has_half_a_character(name, text):
    vocabulary = VOCABULARIES[name]
    ids = [int(token) for token in vocabulary.encode(text)]
    pieces, _ = streamed(vocabulary, ids)
    whole = vocabulary.decode(ids)
    assert "".join(pieces) == whole
    assert "".join(pieces).count("\ufffd") == whole.count("\ufffd") == text.count("\ufffd")


def test_an_emoji_comes_whole_and_a_broken_one_at_the_end():
    vocabulary = VOCABULARIES["exact"]
    ids = [int(vocabulary.byte_ids[value]) for value in "\U0001f6b2".encode()]
    assert streamed(vocabulary, ids)[0] == ["", "", "", "\U0001f6b2", ""]
    assert streamed(vocabulary, ids[:2])[0] == ["", "", "\ufffd"]
    with_pad = [*ids[:2], vocabulary.pad_id, *ids[2:]]
    assert streamed(vocabulary, with_pad)[0] == ["", "", "", "", "\U0001f6b2", ""]


@pytest.mark.parametrize("name", VOCABULARIES)
@given(data=st.data())
def test_a_stop_is_cut_wherever_it_lies(name, data):
    vocabulary = VOCABULARIES[name]
    text = data.draw(
        st.sampled_from(["the city of M\u00fcnchen and the town", "abcabd cafe the the theatre"])
    )
    ids = [int(token) for token in vocabulary.encode(text)]
    whole = vocabulary.decode(ids)
    begin = data.draw(st.integers(0, len(whole) - 1))
    stops = [
        whole[begin : begin + data.draw(st.integers(1, 6))],
        data.draw(st.sampled_from(["zz", "town", "the t"])),
    ]
    places = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
    pieces, stream = streamed(vocabulary, ids, stops)
    assert stream.stopped and "".join(pieces) == whole[: min(places)[1]]


@given(data=st.data())
def test_an_answer_goes_on_with_its_prompts_text(data):
    """Wherever a text is cut in two; also where the vocabulary takes the blank off a text's beginning."""
    vocabulary = VOCABULARIES["normalised"]
    text = data.draw(
        st.sampled_from(["the city of M\u00fcnchen and the old town", "caf\u00e9s \u6771\u4eac abcabd"])
    )
    ids = [int(token) for token in vocabulary.encode(text)]
    cut = data.draw(st.integers(1, len(ids)))
    while "\ufffd" in vocabulary.decode(ids[:cut]):  # within a character there is no text before
        cut += 1
    prompt = vocabulary.decode(ids[:cut])
    assert prompt + "".join(streamed(vocabulary, ids[cut:], continues=True)[0]) == vocabulary.decode(ids)


def test_a_stop_that_begins_with_a_blank_matches_the_first_word_of_an_answer():
    vocabulary = VOCABULARIES["normalised"]
    ids = [int(token) for token in vocabulary.encode("the city of the old town")]
    cut = len(vocabulary.encode("the city of"))
    assert vocabulary.decode(ids[:cut]) == "the city of"
    pieces, stream = streamed(vocabulary, ids[cut:], [" the"], continues=True)
    assert stream.stopped and "".join(pieces) == ""
    assert "".join(streamed(vocabulary, ids[cut:])[0]) == "the old town", (
        "an answer that is a text of its own"
    )


@pytest.mark.parametrize("name", VOCABULARIES)
def test_each_token_is_decoded_once(name, monkeypatch):
    vocabulary, handed = VOCABULARIES[name], []
    ids = ([int(token) for token in vocabulary.encode("the city of M\u00fcnchen " * 100)])[:500]
    decode = Vocabulary.decode
    monkeypatch.setattr(Vocabulary, "decode", lambda own, ids: handed.append(len(ids)) or decode(own, ids))
    pieces, _ = streamed(vocabulary, ids)
    assert "".join(pieces) == decode(vocabulary, ids) and len(ids) == 500
    assert sum(handed) < 10 * len(ids)


def test_what_may_begin_a_stop_is_held_back_and_shown_if_it_does_not_become_one():
    vocabulary = VOCABULARIES["exact"]
    ids = [int(token) for token in vocabulary.encode("the city")]
    pieces, stream = streamed(vocabulary, ids, ["the sea", "city hall"])
    assert "".join(pieces) == "the city" and pieces[-1] == "city" and not stream.stopped


def test_an_eos_that_is_ignored_is_no_end():
    vocabulary = VOCABULARIES["exact"]
    ids = [int(token) for token in vocabulary.encode("the city")]
    assert "".join(streamed(vocabulary, [*ids, vocabulary.eos_id, *ids])[0]) == "the citythe city"
