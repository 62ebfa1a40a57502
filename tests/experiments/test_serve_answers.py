"""What `experiments.serve` tells of tokens: where their text is, and their bytes; with both kinds of vocabularies."""

import numpy as np
import pytest
from serving import Running, settings, vocabulary

from experiments.serve import answers
from experiments.serve.answers import Answer, Prompt, Wanted
from switchmoe.inference import generation
from switchmoe.inference.serving.engine import Ended, Opened, Token
from switchmoe.inference.serving.programs import Scores


def choice(of, before, tokens, **wanted):
    """The choice of a prompt and the tokens that came, as it is told at once."""
    ids = generation.prompt_ids(before, settings("decoder"), of)
    prompt = Prompt(ids, before, generation.continues(before, settings("decoder")))
    answer = Answer(
        0,
        prompt,
        of,
        [],
        Wanted(**dict(chat=False, logprobs=0, echo=True, ids=False, experts=False) | wanted),
    )
    count = len(ids) - 1
    parts = [
        answer.take(Opened(Scores(np.zeros(count), np.zeros((count, 0), int), np.zeros((count, 0))), None))
    ]
    for token in tokens:
        answer.stream.feed(token)
        parts.append(answer.take(Token(0, token, 0.0, [], None)))
    parts.append(answer.take(Ended(0, "length")))
    return answer.choice(answers.joined(list(filter(None, parts))), False)


@pytest.mark.parametrize("normalised", [False, True])
def test_text_stands_where_it_is_said_to(normalised):
    of, before, after = (
        vocabulary(normalised),
        "The \U0001f6b2 city of M\u00fcnchen",
        " and the \u6771\u4eac tower",
    )
    tokens = [int(token) for token in of.encode(before + after)][len(of.encode(before)) :]
    found = choice(of, before, tokens)
    text, told = found["text"], found["logprobs"]
    assert text == before + after
    assert told["text_offset"] == sorted(told["text_offset"])
    whole = [
        (token, offset)
        for token, offset in zip(told["tokens"][1:], told["text_offset"][1:], strict=True)
        if token not in map("<0x{:02X}>".format, range(256))
    ]
    assert len(whole) > 10
    for token, offset in whole:
        assert text[offset:].startswith(token if offset else token.lstrip())
    places = {
        offset for token, offset in zip(told["tokens"], told["text_offset"], strict=True) if token == "<0xF0>"
    }
    assert places == {text.index("\U0001f6b2")}


@pytest.mark.parametrize("normalised", [False, True])
def test_bytes_of_a_chats_tokens_are_together_its_content(normalised):
    of, text = vocabulary(normalised), " the \U0001f6b2 city of M\u00fcnchen"
    tokens = [*map(int, of.encode("x" + text))][len(of.encode("x")) :]
    tokens += [of.pad_id, of.unk_id, of.sentinel(3), of.eos_id]
    found = choice(of, "A:", tokens, chat=True, echo=False)
    told = found["logprobs"]["content"]
    assert any(token["token"] == "<0xF0>" and token["bytes"] == [0xF0] for token in told)
    together = b"".join(bytes(token["bytes"]) for token in told)
    assert together.decode() == found["message"]["content"] and text in together.decode()


def test_a_prompt_of_ids_is_echoed_whole():
    of = vocabulary()
    ids = [0, *map(int, of.encode("the city")), of.eos_id, *map(int, of.encode("old"))]
    with Running() as running:
        running.ready()
        found = running.post(prompt=ids, echo=True, max_tokens=0, logprobs=1).json()["choices"][0]
    assert found["text"] == "the cityold" and len(found["logprobs"]["tokens"]) == len(ids)
