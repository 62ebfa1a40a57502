"""`experiments.serve` over HTTP: answers and streams in OpenAI's shape, by its own client and as `Generator` has them; metrics."""

import concurrent.futures
import threading
import time

import pytest

openai = pytest.importorskip("openai")
import serving  # noqa: E402
from serving import (  # noqa: E402
    LIMITS,
    SLOTS,
    Running,
    Scripted,
    chunks,
    parameters,
    settings,
    vocabulary,
)

from switchmoe.inference.decoding import Choosing  # noqa: E402
from switchmoe.inference.generation import Generator, prompt_ids  # noqa: E402
from switchmoe.inference.serving.programs import Programs  # noqa: E402

running = serving.running  # a fixture
PROMPT = "The city of M\u00fcnchen"


@pytest.fixture(scope="module", params=["decoder", "switch"])
def either(request):
    with Running(request.param) as running:
        yield running.ready()


@pytest.fixture(scope="module")
def client(running):
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=60)


def texts(response):
    return [choice["text"] for choice in response.json()["choices"]]


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
