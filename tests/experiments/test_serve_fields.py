"""Fields, bodies, paths and methods that `experiments.serve` is asked with: what is accepted, and what is refused with its name."""

import json
import socket

import httpx
import pytest
import serving
from serving import LIMITS

from experiments.serve import fields

running = serving.running  # a fixture
BAD = [
    ({"prompt": None}, "prompt", "no prompt; accepted is a string, a list"),
    ({"prompt": ""}, None, ""),  # an empty text is one: a decoder's begins with its first token
    ({"prompt": []}, "prompt", "prompt=[]: accepted is a string"),
    ({"prompt": [[]]}, "prompt", "accepted is a string"),
    ({"prompt": ["a", 1]}, "prompt", "accepted is a string"),
    ({"prompt": [1, -1]}, "prompt", "accepted is a string"),
    ({"prompt": [0, 99999]}, "prompt", "the id 99999: accepted is an integer from 0 to"),
    ({"prompt": "a b c d e f g h i j k l m n o p q r s t u v w x y z"}, "prompt", "accepted are at most 32"),
    ({"prompt": "\ud800"}, "prompt", "accepted is a string"),
    ({"max_tokens": -1}, "max_tokens", "max_tokens=-1: accepted is an integer from 0 to 24"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens=0: accepted without echo is an integer >= 1"),
    ({"max_tokens": 25}, "max_tokens", "max_tokens=25"),
    ({"max_tokens": 1.5}, "max_tokens", "max_tokens=1.5"),
    ({"max_tokens": True}, "max_tokens", "max_tokens=true"),
    ({"n": 10**30}, "n", "accepted is an integer from 1 to 16"),
    ({"n": 9, "prompt": ["a", "b"]}, "n", "n=9: of 2 prompts; accepted are at most 16 answers in all"),
    ({"temperature": "hot"}, "temperature", 'temperature="hot"'),
    ({"temperature": 1e999}, "temperature", "temperature=Infinity"),
    ({"top_p": 0}, "top_p", "top_p=0: accepted is a number above 0"),
    ({"seed": -5}, "seed", "seed=-5"),
    ({"stop": ["a"] * 5}, "stop", "or a list of at most 4"),
    ({"stop": ""}, "stop", 'stop="": accepted is a string of 1 to 256'),
    ({"logprobs": 21}, "logprobs", "logprobs=21: accepted is an integer from 0 to 20"),
    ({"stream": "yes"}, "stream", 'stream="yes": accepted is true or false'),
    ({"stream_options": {"include_usage": True}}, "stream_options", "accepted with stream=true"),
    ({"min_tokens": False}, "min_tokens", "min_tokens=false: it is not supported; accepted is null or 0"),
    ({"best_of": 2}, "best_of", "best_of=2: it is not supported; accepted is null or 1"),
    ({"presence_penalty": 0.5}, "presence_penalty", "it is not supported; accepted is null or 0"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "it is not supported"),
    ({"model": 5}, "model", "model=5"),
]  # fmt: skip


@pytest.mark.parametrize("given, param, message", BAD, ids=[str(given)[:40] for given, *_ in BAD])
def test_a_bad_field_is_named_with_what_is_accepted(running, given, param, message):
    asked = {"prompt": "old", "max_tokens": 1} | given
    answer = httpx.post(
        f"{running.url}/v1/completions",
        content=json.dumps(asked),
        headers={"content-type": "application/json"},
        timeout=60,
    )
    if param is None:
        assert answer.status_code == 200
        return
    if given.get("temperature") == float("inf"):
        param, message = None, "the body has Infinity, which is no JSON"
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (
        error["param"] == param and message in error["message"] and error["type"] == "invalid_request_error"
    )
    assert "\n" not in error["message"] and len(error["message"]) < 400


def test_a_chats_newer_limit_goes_before_the_older(running):
    asked = dict(messages=[{"role": "user", "content": "a"}], max_tokens=0, max_completion_tokens=3)
    answer = running.post("/v1/chat/completions", **asked, ignore_eos=True)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] <= 3


BAD_CHATS = [
    ({"messages": []}, "messages", "messages=[]: accepted is a list of"),
    ({"messages": [{"role": "user"}]}, "messages", "accepted is a list of"),
    ({"messages": [{"role": "user", "content": None}]}, "messages", "accepted is a list of"),
    ({"messages": [{"role": None, "content": "a"}]}, "messages", "accepted is a list of"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages", "accepted is a list of"),
    ({"messages": [{"role": "user", "content": ["a"]}]}, "messages", "accepted is a list of"),
    ({"messages": [None]}, "messages", "accepted is a list of"),
    ({"top_logprobs": 2}, "top_logprobs", "top_logprobs=2: accepted with logprobs=true"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "accepted is an integer from 1 to 24"),
]  # fmt: skip


@pytest.mark.parametrize("given, param, message", BAD_CHATS, ids=[str(given)[:60] for given, *_ in BAD_CHATS])
def test_a_bad_field_of_a_chat_is_named_too(running, given, param, message):
    answer = running.post("/v1/chat/completions", **{"messages": [{"role": "user", "content": "a"}]} | given)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and message in error["message"] and "\n" not in error["message"]


def test_fields_that_change_nothing_are_accepted(running):
    harmless = dict(
        best_of=1,
        presence_penalty=0.0,
        logit_bias={},
        user="me",
        suffix=None,
        top_k=-1,
        unknown=1,
        seed=None,
        tools=[],
    )
    assert running.post(prompt="old", max_tokens=1, **harmless).status_code == 200


@pytest.mark.parametrize(
    "body, status, message",
    [
        (b'{"prompt": "a", ', 400, "the body is not JSON"),
        (b"\xff\xfe{}", 400, "the body is not UTF-8"),
        (b"[]", 400, "the body is a list; accepted is an object"),
        (b'{"prompt": ' + b"[" * 9000 + b"]" * 9000 + b"}", 400, "nested"),
        (b'{"a": ' + b'{"a": ' * 50 + b"1" + b"}" * 51, 400, "nested more than 20 deep"),
        (b'{"prompt": "a", "temperature": NaN}', 400, "NaN, which is no JSON"),
        (b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", 400, "the body is not JSON"),
        (b'{"prompt": "' + b"a" * 30_000 + b'"}', 413, "accepted are at most 20000"),
        (b"", 400, "the body is not JSON"),
    ],
    ids=["cut", "bytes", "list", "bomb", "nested", "nan", "digits", "large", "empty"],
)
def test_bodies_that_are_no_requests(running, body, status, message):
    answer = httpx.post(
        f"{running.url}/v1/completions", content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code == status and message in answer.json()["error"]["message"]


def test_other_bodies_paths_and_methods(running):
    def parts():
        for _ in range(30):
            yield b" " * 1000

    large = httpx.post(
        f"{running.url}/v1/completions", content=parts(), headers={"content-type": "application/json"}
    )
    assert large.status_code == 413 and large.json()["error"]["code"] == "body_too_large"
    form = httpx.post(f"{running.url}/v1/completions", data={"prompt": "a"})
    assert form.status_code == 415 and "accepted is application/json" in form.json()["error"]["message"]
    missing = httpx.get(f"{running.url}/v1/../../etc/passwd")
    assert missing.status_code == 404 and "accepted are /, /health" in missing.json()["error"]["message"]
    lines = running.post(model="a\nb", prompt="old")
    assert lines.status_code == 404
    assert lines.json()["error"]["message"] == r'model="a\nb": accepted is decoder'
    wrong = httpx.get(f"{running.url}/v1/completions")
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST" and wrong.json()["error"]["message"]
    with socket.create_connection(("127.0.0.1", running.port)) as raw:
        raw.sendall(b"NO HTTP AT ALL\r\n\r\n")
        said = raw.makefile("rb").read()
    assert said.startswith(b"HTTP/1.1 400") and b'"invalid_request_error"' in said


def test_the_description_is_of_the_table(running):
    told = httpx.get(f"{running.url}/openapi.json").json()
    schema = told["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["properties"].keys() == {*fields.completion(LIMITS), *fields.UNSUPPORTED} and schema[
        "required"
    ] == ["prompt"]
    import jsonschema

    whole = jsonschema.Draft202012Validator(schema)
    for given, param, _ in BAD:
        if param not in (None, "n", "prompt", "stream_options") and "max_tokens" not in given:
            assert not whole.is_valid({"prompt": "a"} | given), given
