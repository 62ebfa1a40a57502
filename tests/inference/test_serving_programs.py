"""What a server's programs take: limits as arrays, and models of integers, of soft experts and of none."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decoding import init, settings
from test_serving import MAX_PROMPT, MAX_TOKENS, SLOTS, job

from switchmoe.inference import decoding
from switchmoe.inference.decoding import Choosing
from switchmoe.inference.generation import Generator
from switchmoe.inference.serving import programs as serving
from switchmoe.inference.serving.engine import Engine
from switchmoe.inference.serving.programs import Programs


def test_limits_given_as_arrays_are_those_given_as_numbers():
    logits_BV = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05], [0.25, 0.25, 0.3, 0.2]]))
    for top_k in (0, 1, 2, 3, 4, 9):
        for top_p in (1.0, 0.9, 0.79, 0.6, 0.5, 0.01):
            wanted = decoding.limited(logits_BV, top_k, top_p)
            found = jax.vmap(serving.limited, (0, None, None))(
                logits_BV, jnp.int32(top_k), jnp.float32(top_p)
            )
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder_decoder", "decoder_only"])
@pytest.mark.parametrize(
    "moe",
    [dict(expert_bits=8, router="top_k"), dict(router="soft", decoder_router="switch"), dict(num_experts=1)],
)
def test_other_models_are_served_too(kind, moe):
    if kind == "decoder_only" and "decoder_router" in moe:
        pytest.skip("soft experts are an encoder's")
    of = settings(kind, **moe)
    params = init(of)
    if moe.get("expert_bits"):
        from switchmoe.training import train_state

        params = jax.tree.map(
            lambda shape, value: jnp.ones(shape.shape, shape.dtype) if shape.dtype == jnp.int8 else value,
            train_state.parameter_shapes(of), params,
        )  # fmt: skip
    made = Programs(of, params, SLOTS, MAX_PROMPT, MAX_TOKENS)
    running = Engine(made, 9)
    running.start()
    while not running.ready:
        assert not running.failed, running.failed
        time.sleep(0.01)
    one = job([0, 5, 9, 1], 5, experts=True)
    running.submit(one)
    found = [event.token for event in one.listener.of()]
    assert found == Generator(of, params, 5, Choosing(stop_ids=()))([[0, 5, 9, 1]])[0].ids
    running.stop(10)
