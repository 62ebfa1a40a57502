"""Greedy decoding agrees with teacher forcing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_transformer import apply, example, init, tiny

from switchmoe.inference import decoding


@pytest.mark.parametrize("experts", [1, 4])
def test_each_token_is_the_best_given_those_before_whoever_is_beside(experts):
    """Also where evaluation has all sequences in one group, with too few slots."""
    settings = tiny(moe=dict(num_experts=experts, eval_group_size=64))
    ample = tiny(moe=dict(num_experts=experts, eval_capacity_factor=float(experts)))
    variables, (inputs, _) = init(settings), example()
    decode = jax.jit(lambda i: decoding.greedy(variables["params"], i, 6, settings, eos_id=-1))
    tokens = decode(inputs)
    logits, _ = apply(ample, variables, inputs, tokens)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    np.testing.assert_array_equal(tokens[2:3], decode(inputs[2:3]))


def test_an_encoder_whose_experts_choose_decodes_too():
    settings = tiny(moe=dict(router="expert_choice", decoder_router="switch", eval_group_size=64))
    variables, (inputs, _) = init(settings), example()
    decode = jax.jit(lambda i: decoding.greedy(variables["params"], i, 6, settings, eos_id=-1))
    np.testing.assert_array_equal(decode(inputs)[2:3], decode(inputs[2:3]))


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
