"""A server in this very process, with random weights, for tests of `experiments.serve`."""

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
from test_transformer import tiny

from experiments.serve import application, server
from experiments.serve.chat import Template
from experiments.serve.fields import Limits
from experiments.serve.metrics import Metrics
from switchmoe.data import vocabulary as vocabularies
from switchmoe.data.vocabulary import IDENTITY, TRAINER, Vocabulary
from switchmoe.inference.serving.engine import Engine
from switchmoe.inference.serving.programs import Programs
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
def vocabulary():
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefghij") for _ in range(rng.randrange(2, 7))) for _ in range(300)]
    return Vocabulary.from_bytes(vocabularies.train([TEXT * 20, " ".join(words)], 380, TRAINER | IDENTITY))


@functools.cache
def model(kind):
    """(settings, parameters) whose answers are of some variety."""
    alone = dict(stacks="decoder_only", positions="rotary", num_kv_heads=1, attention_scale=0.0)
    data = dict(
        vocab_size=380, objective="causal_lm" if kind == "decoder" else "span_corruption", input_length=12
    )
    of = tiny(alone if kind == "decoder" else {}, dict(router="top_k", choices=2), data=data)
    rng = np.random.default_rng(0)

    def value(shape):
        mean = 1.0 if len(shape.shape) < 3 else 0.0
        return jnp.asarray(mean + rng.normal(0, 0.3, shape.shape), jnp.float32)

    return of, jax.tree.map(value, train_state.parameter_shapes(of))


@functools.cache
def programs(kind):
    of, params = model(kind)
    return Programs(of, params, SLOTS, LIMITS.max_prompt, LIMITS.max_tokens)


class Running:
    """A server on loopback; ``url`` is its address."""

    def __init__(self, kind="decoder", token="", chat=True, limits=LIMITS, made=None):
        made = made or programs(kind)
        experts = made.settings.moe.total_experts
        self.metrics = Metrics(kind, made.prompt_layers, made.layers, experts)
        self.notes = []
        self.engine = Engine(made, limits.queue, self.metrics, self.notes.append)
        template = Template.read(json.dumps(TEMPLATE), "chat.json") if chat else None
        self.service = application.Service(kind, self.engine, vocabulary(), limits, self.metrics, template)
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
