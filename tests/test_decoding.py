"""Greedy decoding agrees with teacher forcing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_transformer import apply, example, init, tiny

from switchmoe import decoding


@pytest.mark.parametrize("experts", [1, 4])
def test_each_token_is_the_best_given_those_before(experts):
    settings = tiny(moe=dict(num_experts=experts))
    variables, (inputs, _) = init(settings), example()
    decode = jax.jit(lambda i: decoding.greedy(variables["params"], i, 6, settings, eos_id=-1))
    tokens = decode(inputs)
    logits, _ = apply(settings, variables, inputs, tokens)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


def test_nothing_follows_the_end():
    settings = tiny()
    variables, (inputs, _) = init(settings), example()
    free = decoding.greedy(variables["params"], inputs, 6, settings, eos_id=-1)
    eos = int(free[0, 2])
    tokens = np.asarray(decoding.greedy(variables["params"], inputs, 6, settings, eos_id=eos))
    first = int(np.argmax(np.asarray(free[0]) == eos))
    np.testing.assert_array_equal(tokens[0, : first + 1], free[0, : first + 1])
    assert (tokens[0, first + 1 :] == 0).all()
    assert jnp.asarray(tokens).dtype == jnp.int32
