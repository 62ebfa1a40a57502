"""`experiments.serve` over HTTP: OpenAI's shape by its own client, what is refused, limits, readers that leave, draining."""

import concurrent.futures
import json
import socket
import threading
import time

import httpx
import pytest

openai = pytest.importorskip("openai")
from serving import LIMITS, SLOTS, Running, Scripted, parameters, scripted, settings, vocabulary  # noqa: E402

from experiments.serve import application, fields, server  # noqa: E402
from switchmoe.inference.decoding import Choosing  # noqa: E402
from switchmoe.inference.generation import Generator, prompt_ids  # noqa: E402
from switchmoe.inference.serving.programs import Programs  # noqa: E402

PROMPT = "The city of M\u00fcnchen"


@pytest.fixture(scope="module", params=["decoder", "switch"])
def either(request):
    with Running(request.param) as running:
        yield running.ready()


@pytest.fixture(scope="module")
def running():
    with Running() as found:
        yield found.ready()


@pytest.fixture(scope="module")
def client(running):
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=60)


def texts(response):
    return [choice["text"] for choice in response.json()["choices"]]


def chunks(response):
    """The objects of a stream, which ends as it should."""
    *data, last = [
        line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: ")
    ]
    assert last == "[DONE]"
    return [json.loads(one) for one in data]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["decoder", "switch"])
def test_greedy_answers_are_generates_tokens(kind):
    of, params = settings(kind), parameters(kind)
    made = Programs(of, params, SLOTS, LIMITS.max_prompt, LIMITS.max_tokens)
    with Running(kind, made=made) as either:
        answers_are_generates(either.ready(), of, params)


def answers_are_generates(either, of, params):
    generator = Generator(of, params, 12, Choosing(stop_ids=(vocabulary().eos_id,)))
    prompts = [PROMPT, "old", "the \u6771\u4eac tower"]
    wanted = [answer.ids for answer in generator([prompt_ids(text, of, vocabulary()) for text in prompts])]
    found = either.post(prompt=prompts, max_tokens=12, temperature=0, return_token_ids=True)
    choices = found.json()["choices"]
    assert [choice["token_ids"] for choice in choices] == wanted
    assert texts(found) == [vocabulary().decode(ids) for ids in wanted]
    ids = [prompt_ids(text, of, vocabulary()) for text in prompts]
    assert texts(either.post(prompt=ids, max_tokens=12, temperature=0)) == texts(found)
    assert texts(either.post(prompt=ids[0], max_tokens=12, temperature=0)) == texts(found)[:1]
    assert found.json()["usage"]["prompt_tokens"] == sum(map(len, ids))
    drawn = dict(temperature=1.5, top_k=9, top_p=0.8)
    how = Choosing(**drawn, stop_ids=(vocabulary().eos_id,))
    generator = Generator(of, params, 12, how, seed=3)
    wanted = [answer.ids for answer in generator([ids[0], ids[0], ids[1], ids[1]])]
    asked = dict(prompt=prompts[:2], n=2, seed=3, max_tokens=12, return_token_ids=True, **drawn)
    assert [choice["token_ids"] for choice in either.post(**asked).json()["choices"]] == wanted
    assert len(set(map(tuple, wanted))) == 4


def test_what_is_streamed_is_together_what_is_not(either):
    """Pieces of several answers, with stops, half characters and all that is asked for."""
    for seed in range(6):
        asked = dict(
            prompt=[PROMPT, "old"], n=2, max_tokens=20, temperature=1.8, seed=seed, stop=["e", "\u00fc", "ab"][: seed % 4],
            logprobs=2, routed_experts=True, return_token_ids=True, ignore_eos=True,
        )  # fmt: skip
        whole = either.post(**asked).json()
        parts = chunks(either.post(**asked, stream=True, stream_options={"include_usage": True}))
        assert parts.pop()["usage"] == whole["usage"]
        for number, choice in enumerate(whole["choices"]):
            own = [part["choices"][0] for part in parts if part["choices"][0]["index"] == number]
            assert "".join(part["text"] for part in own) == choice["text"]
            assert not any(stop in choice["text"] for stop in asked["stop"])
            assert [part["finish_reason"] for part in own] == [None] * (len(own) - 1) + [
                choice["finish_reason"]
            ]
            for name in ("token_ids", "routed_experts"):
                assert [one for part in own for one in part[name]] == choice[name]
            told = [part["logprobs"] for part in own if part["logprobs"]]
            for name, values in choice["logprobs"].items():
                assert [one for part in told for one in part[name]] == values
            layers = len(either.engine.programs.layers)
            assert all(len(token) == layers and len(token[0]) == 2 for token in choice["routed_experts"])
            assert (
                len(choice["token_ids"]) == len(choice["routed_experts"]) == len(choice["logprobs"]["tokens"])
            )


def test_the_official_client(running, client):
    (only,) = client.models.list().data
    assert only.id == "decoder" and client.models.retrieve("decoder").id == "decoder"
    found = client.completions.create(
        model="decoder", prompt=PROMPT, max_tokens=5, temperature=0, logprobs=2, echo=True
    )
    choice = found.choices[0]
    assert (
        choice.text.startswith(PROMPT)
        and found.usage.completion_tokens == 5
        and choice.finish_reason == "length"
    )
    prompt = prompt_ids(PROMPT, settings("decoder"), vocabulary())
    assert len(choice.logprobs.tokens) == len(prompt) + 5 and choice.logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in choice.logprobs.token_logprobs[1:])
    greedy = choice.logprobs.token_logprobs[-5:]
    assert greedy == [max(best.values()) for best in choice.logprobs.top_logprobs[-5:]]
    scored = client.completions.create(
        model="decoder", prompt=PROMPT, max_tokens=0, logprobs=1, echo=True
    ).choices[0]
    assert (
        scored.text == PROMPT
        and scored.logprobs.token_logprobs == choice.logprobs.token_logprobs[: len(prompt)]
    )
    drawn = [
        client.completions.create(model="decoder", prompt=PROMPT, seed=seed, n=2, max_tokens=9)
        for seed in (1, 1, 2)
    ]
    first, again, other = ([one.text for one in answer.choices] for answer in drawn)
    assert first == again != other and first[0] != first[1]
    stream = client.completions.create(model="decoder", prompt=PROMPT, seed=1, max_tokens=9, stream=True)
    assert "".join(part.choices[0].text for part in stream) == first[0]
    asked = dict(
        model="decoder", messages=[{"role": "user", "content": "old"}], seed=3, max_completion_tokens=9
    )
    talk = client.chat.completions.create(**asked, logprobs=True, top_logprobs=1)
    message = talk.choices[0].message
    assert (
        message.role == "assistant" and len(talk.choices[0].logprobs.content) == talk.usage.completion_tokens
    )
    parts = [part.choices[0].delta for part in client.chat.completions.create(**asked, stream=True)]
    assert parts[0].role == "assistant" and "".join(part.content for part in parts) == message.content
    same = running.post(prompt="Q: old\nA:", seed=3, max_tokens=9, stop="Q:")
    assert texts(same) == [message.content]
    with pytest.raises(openai.NotFoundError, match="accepted is decoder"):
        client.completions.create(model="other", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError, match="temperature=3: accepted is a number from 0 to 2"):
        client.completions.create(model="decoder", prompt=PROMPT, temperature=3)


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


def test_an_encoder_decoders_prompt_is_not_echoed(either):
    answer = either.post(prompt="old", echo=True, max_tokens=1)
    if either.service.encodes:
        assert (
            answer.status_code == 400
            and "echo=true: accepted with an encoder-decoder" in answer.json()["error"]["message"]
        )
        layers = either.client().get("/v1/models").json()["data"][0]["switchmoe"]["prompt_layers"]
        found = either.post(prompt="old", max_tokens=2, routed_experts=True).json()["choices"][0]
        ids = prompt_ids("old", settings("switch"), vocabulary())
        assert len(found["prompt_routed_experts"]) == len(ids) and len(
            found["prompt_routed_experts"][0]
        ) == len(layers)
    else:
        assert answer.status_code == 200 and texts(answer)[0].startswith("old")


def test_metrics_have_vllms_names(either):
    before = either.client().get("/metrics").text

    def value(text, name):
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))

    either.post(prompt="old", max_tokens=3, n=2, ignore_eos=True)
    text = either.client().get("/metrics").text
    for name, more in (
        ("vllm:generation_tokens_total", 6), ("vllm:request_success_total", 2), ("vllm:time_to_first_token_seconds_count", 1),
        ("vllm:e2e_request_latency_seconds_count", 1), ("vllm:request_prompt_tokens_count", 1),
    ):  # fmt: skip
        assert value(text, name) - value(before, name) == more, name
    assert 'vllm:num_requests_running{model_name="' in text and "vllm:num_requests_waiting" in text
    layer = either.engine.programs.layers[0]
    choices = sum(
        value(text, f'switchmoe:expert_tokens_total{{expert="{e}",layer="{layer}"') for e in range(4)
    )
    assert choices > 0 and value(text, "switchmoe:dropped_tokens_total") == 0


def test_what_tokens_wait_for_each_other_is_told():
    """With what lies between steps: prompts of others, which are read then."""
    made = Scripted("decoder")
    with Running(made=made) as found, concurrent.futures.ThreadPoolExecutor(1) as pool:
        found.ready()
        prefill, begun = made.prefill, threading.Event()

        def slow(ids):
            if begun.is_set():
                time.sleep(0.6)
            begun.set()
            return prefill(ids)

        made.prefill, made.pause = slow, 0.2
        first = pool.submit(found.post, prompt="old", max_tokens=20, ignore_eos=True)
        assert begun.wait(20)
        assert found.post(prompt="a", max_tokens=1, ignore_eos=True).status_code == 200
        assert first.result().status_code == 200
        text = found.client().get("/metrics").text
    told = dict(
        line.removeprefix("vllm:inter_token_latency_seconds").replace('model_name="decoder"', "").split(" ")
        for line in text.splitlines()
        if line.startswith("vllm:inter_token_latency_seconds_")
    )
    assert float(told["_count{}"]) == 19, "one token of the other answer waits for none"
    assert float(told["_sum{}"]) >= 0.6 + 18 * 0.2
    assert float(told['_bucket{le="0.5",}']) < 19


def test_many_at_once_get_what_each_gets_alone(either):
    asked = [
        dict(prompt=PROMPT[: 3 + n % 9], max_tokens=3 + n % 15, temperature=n % 2 * 1.0, seed=n, logprobs=1)
        for n in range(12)
    ]
    alone = [either.post(**one).json()["choices"] for one in asked]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda one: either.post(**one).json()["choices"], asked))
    assert together == alone


def test_readers_that_leave_free_their_slots(running):
    asked = json.dumps(dict(prompt="old", max_tokens=24, n=8, ignore_eos=True, stream=True)).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    running.engine.programs.pause = 0.05
    try:
        for body in (asked, asked.replace(b"true}", b"false}")):
            with socket.create_connection(("127.0.0.1", running.port)) as raw:
                raw.sendall(head % len(body) + body)
                deadline = time.monotonic() + 20
                while not running.engine.running and time.monotonic() < deadline:
                    time.sleep(0.005)
            began = time.monotonic()
            assert (
                running.idle() and time.monotonic() - began < 0.05 * 24 * 2 * 0.8
            )  # of what it would have taken
        assert running.post(prompt="old", max_tokens=1).status_code == 200
    finally:
        running.engine.programs.pause = 0.0


@pytest.fixture
def strict():
    """A server with a token and little patience, of the same programs."""
    limits = LIMITS._replace(timeout=1.0, connections=6, queue=2)
    with Running(token="s3cret", chat=False, limits=limits) as found:
        yield found.ready()


def test_limits_are_answered_with_their_status(running, strict):
    assert running.idle()  # the two share their programs
    bare = httpx.get(f"{strict.url}/v1/models")
    assert (
        bare.status_code == 401
        and bare.json()["error"]["code"] == "invalid_api_key"
        and "bearer" in bare.headers["www-authenticate"].lower()
    )
    wrong = httpx.get(f"{strict.url}/metrics", headers={"authorization": "Bearer s3cre"})
    assert wrong.status_code == 401 and httpx.get(f"{strict.url}/health").status_code == 200
    assert (
        httpx.get(f"{strict.url}/").status_code == 200
        and strict.client().get("/v1/models").status_code == 200
    )
    none = strict.post("/v1/chat/completions", messages=[{"role": "user", "content": "a"}])
    assert none.status_code == 400 and none.json()["error"]["code"] == "no_chat_template"
    strict.engine.programs.pause = 0.2
    try:
        with concurrent.futures.ThreadPoolExecutor(5) as pool:
            slow = [
                pool.submit(strict.post, prompt="old", max_tokens=24, ignore_eos=True, n=2) for _ in range(3)
            ]
            time.sleep(0.4)
            full = strict.post(prompt="old", max_tokens=2, n=2)
            assert (
                full.status_code == 429
                and full.headers["retry-after"] == "1"
                and full.json()["error"]["code"] == "queue_full"
            )
            late = [one.result() for one in slow]
        assert [one.status_code for one in late] == [504] * 3 and late[0].json()["error"]["code"] == "timeout"
        stream = strict.post(prompt="old", max_tokens=24, ignore_eos=True, stream=True)
        assert chunks(stream)[-1]["error"]["code"] == "timeout"
    finally:
        strict.engine.programs.pause = 0.0
    assert strict.idle()
    lines = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer s3cret\r\ncontent-type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", strict.port), timeout=20) as raw:
        raw.sendall(lines + b'content-length: 50\r\n\r\n{"prompt": ')
        assert raw.recv(4096).startswith(b"HTTP/1.1 408")
    with socket.create_connection(("127.0.0.1", strict.port), timeout=20) as raw:
        raw.sendall(lines[:30])
        began = time.monotonic()
        assert raw.recv(4096) == b"" and time.monotonic() - began < 10
    held = [socket.create_connection(("127.0.0.1", strict.port)) for _ in range(6)]
    crowded = strict.client().get("/v1/models")
    assert crowded.status_code == 503 and crowded.json()["error"]["code"] == "too_many_connections"
    for raw in held:
        raw.close()


def test_a_server_drains():
    with Running() as found:
        found.ready()
        found.engine.programs.pause = 0.03
        try:
            with concurrent.futures.ThreadPoolExecutor(SLOTS + 2) as pool:
                asked = dict(prompt="old", max_tokens=20, ignore_eos=True)
                slow = [pool.submit(found.post, **asked, stream=n % 2 == 0) for n in range(SLOTS + 2)]
                while found.engine.running + found.engine.waiting < SLOTS + 2:
                    time.sleep(0.01)
                found.server.handle_exit(15, None)
                answers = [one.result() for one in slow]
        finally:
            found.engine.programs.pause = 0.0
        assert [one.status_code for one in answers] == [200] * len(answers)
        assert all(chunks(one)[-1]["choices"][0]["finish_reason"] == "length" for one in answers[::2])
        with pytest.raises(httpx.ConnectError):
            httpx.get(found.url)


def test_a_server_that_warms_up_says_so(monkeypatch):
    made = scripted("decoder")
    monkeypatch.setattr(made, "warm", slowly)
    with Running(made=made) as found:
        answer = found.post(prompt="old", max_tokens=1)
        health = httpx.get(f"{found.url}/health")
        assert answer.status_code == health.status_code == 503 and answer.headers["retry-after"]
        found.ready()
        assert httpx.get(f"{found.url}/health").json() == {"status": "ok"}


def test_a_server_whose_files_cannot_be_read_at_its_start_ends(monkeypatch):
    made = scripted("decoder")

    def broken():
        yield "first"
        raise OSError("expert 3 of decoder/1 is damaged")

    monkeypatch.setattr(made, "warm", broken)
    found = Running(made=made)
    inner = application.application(found.service)
    with pytest.raises(OSError, match="expert 3 of decoder/1 is damaged"):
        server.serve(found.service, inner, "", found._listener, found.notes.append)


def slowly():
    yield "first"
    time.sleep(2)
    yield "second"


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
