"""A server in this very process, for tests of `experiments.serve`."""

import functools
import json
import random
import socket
import threading
import time

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_transformer import tiny

from experiments.serve import application, exchange, server
from experiments.serve.chat import Template
from experiments.serve.fields import Limits
from experiments.serve.metrics import Metrics
from switchmoe.data import vocabulary as vocabularies
from switchmoe.data.vocabulary import IDENTITY, TRAINER, Vocabulary
from switchmoe.inference.serving import programs as serving_programs
from switchmoe.inference.serving.engine import Engine
from switchmoe.inference.serving.programs import MOST_TOLD, Prefilled, Scores, Stepped
from switchmoe.training import train_state

TEXT = "The river Main, the city of M\u00fcnchen and the \u6771\u4eac tower; caf\u00e9s \U0001f600 of the old town. "
TEMPLATE = {
    "user": "Q: {content}\n",
    "assistant": "A: {content}\n",
    "system": "{content}\n",
    "prompt": "A:",
    "stop": ["Q:"],
}
LIMITS = Limits(max_prompt=32, max_tokens=24, queue=16, max_body=20_000, timeout=30.0, connections=40)
SLOTS = 4


@functools.cache
def vocabulary(normalised=False):
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefghij") for _ in range(rng.randrange(2, 7))) for _ in range(300)]
    return Vocabulary.from_bytes(
        vocabularies.train([TEXT * 20, " ".join(words)], 380, TRAINER | ({} if normalised else IDENTITY))
    )


@functools.cache
def settings(kind):
    alone = dict(stacks="decoder_only", positions="rotary", num_kv_heads=1, attention_scale=0.0)
    data = dict(
        vocab_size=380, objective="causal_lm" if kind == "decoder" else "span_corruption", input_length=12
    )
    return tiny(alone if kind == "decoder" else {}, dict(router="top_k", choices=2), data=data)


@functools.cache
def parameters(kind):
    """With which answers are of some variety."""
    rng = np.random.default_rng(0)

    def value(shape):
        mean = 1.0 if len(shape.shape) < 3 else 0.0
        return jnp.asarray(mean + rng.normal(0, 0.3, shape.shape), jnp.float32)

    return jax.tree.map(value, train_state.parameter_shapes(settings(kind)))


class Scripted:
    """What `Programs` has, without a model: a token is drawn by a hash of the prompt, the key and what came before.

    HTTP is tested with it; with real programs in one test, and in those of the engine.
    """

    def __init__(self, kind):
        self.slots, self.max_prompt, self.max_tokens = SLOTS, LIMITS.max_prompt, LIMITS.max_tokens
        self.settings, self.encodes = settings(kind), kind == "switch"
        self.prompt_layers, self.layers = serving_programs.layer_names(self.settings)
        self.pause = 0.0  # seconds of a step
        self._slots = {}

    def warm(self):
        yield "nothing"

    def reset(self):
        self._slots = {}

    def key(self, seed, number):
        return np.array([seed, number], np.uint32)

    def _experts(self, draw, layers, tokens):
        return np.array([[draw.sample(range(4), 2) for _ in range(tokens)] for _ in range(layers)], np.int32)

    def prefill(self, ids):
        expert_LPK = self._experts(random.Random(str(ids)), len(self.prompt_layers), len(ids))
        return Prefilled(None, None, np.array(ids, np.int32), len(ids), expert_LPK)

    def first_position(self, prefilled):
        return 1 if self.encodes else prefilled.count

    def insert(self, prefilled, slot):
        self._slots[slot] = prefilled.ids_P.tolist()

    def _best(self, draw):
        values = sorted((-draw.uniform(1, 9) for _ in range(MOST_TOLD)), reverse=True)
        return draw.sample(range(2, vocabulary().size), MOST_TOLD), values

    def scores(self, prefilled):
        best = [
            self._best(random.Random(str(prefilled.ids_P[:n].tolist()))) for n in range(1, prefilled.count)
        ]
        tokens, values = (np.array([one[k] for one in best]) for k in (0, 1))
        return Scores(values[:, 0] - 0.5, tokens, values)

    def step(self, controls):
        time.sleep(self.pause)
        rows = []
        for slot in range(SLOTS):
            drawn = controls.temperature_B[slot] > 0
            key = controls.key_BN[slot].tolist() if drawn else None
            draw = random.Random(str((self._slots.get(slot), key, int(controls.count_B[slot]))))
            best = self._best(draw)
            place = draw.randrange(MOST_TOLD) if drawn else 0
            byte = int(draw.choice(vocabulary().byte_ids))
            token = byte if drawn and draw.random() < 0.3 else best[0][place]
            rows.append((token, best[1][place], *best, self._experts(draw, len(self.layers), 1)[:, 0]))
        token, value, tokens, values, experts = (np.array(column) for column in zip(*rows, strict=True))
        return Stepped(token.astype(np.int32), value, tokens, values, experts.swapaxes(0, 1))


@functools.cache
def scripted(kind):
    return Scripted(kind)


class Running:
    """A server on loopback; ``url`` is its address."""

    def __init__(self, kind="decoder", token="", chat=True, limits=LIMITS, made=None):
        made = made or scripted(kind)
        experts = made.settings.moe.total_experts
        self.metrics = Metrics(kind, made.prompt_layers, made.layers, experts)
        self.notes = []
        self.engine = Engine(made, limits.queue, self.metrics, self.notes.append)
        template = Template.read(json.dumps(TEMPLATE).encode(), "chat.json") if chat else None
        self.service = exchange.Service(kind, self.engine, vocabulary(), limits, self.metrics, template)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.token = token
        self.server = server.made(
            self.service, application.application(self.service), token, self.notes.append
        )
        self._thread = threading.Thread(target=self.server.run, args=([self._listener],), daemon=True)

    def __enter__(self):
        self.engine.start()
        self._thread.start()
        return self

    def ready(self):
        deadline = time.monotonic() + 400
        while not self.engine.ready and time.monotonic() < deadline:
            assert not self.engine.failed, self.engine.failed
            time.sleep(0.02)
        return self

    def client(self, **options):
        headers = {"authorization": f"Bearer {self.token}"} if self.token else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, **options)

    def post(self, path="/v1/completions", **fields):
        with self.client() as client:
            return client.post(path, json=fields)

    def idle(self):
        deadline = time.monotonic() + 30
        while (self.engine.running or self.engine.waiting) and time.monotonic() < deadline:
            time.sleep(0.01)
        return not (self.engine.running or self.engine.waiting)

    def __exit__(self, *_):
        self.server.handle_exit(15, None)
        self._thread.join(40)
        self.engine.stop(5)


@pytest.fixture(scope="module")
def running():
    with Running() as found:
        yield found.ready()


def chunks(response):
    """The objects of a stream, which ends as it should."""
    *data, last = [
        line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: ")
    ]
    assert last == "[DONE]"
    return [json.loads(one) for one in data]
