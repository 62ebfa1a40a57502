"""Routers' losses: hand-computed values, and nothing changes when padding is appended."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchmoe.routing import losses


def one_hot(expert_S, num_experts):
    return jax.nn.one_hot(jnp.array(expert_S), num_experts)


def test_balance_is_one_when_uniform_and_e_when_collapsed():
    mask_S = jnp.ones(8, bool)
    uniform = losses.load_balancing(jnp.full((8, 4), 0.25), one_hot([0, 1, 2, 3] * 2, 4), mask_S)
    collapsed = losses.load_balancing(one_hot([2] * 8, 4), one_hot([2] * 8, 4), mask_S)
    assert uniform == pytest.approx(1.0)
    assert collapsed == pytest.approx(4.0)


def test_all_is_float32_of_a_router_in_bfloat16():
    prob_SE, mask_S = jax.ShapeDtypeStruct((8, 4), jnp.bfloat16), jax.ShapeDtypeStruct((8,), bool)
    value_S = jax.ShapeDtypeStruct((8,), jnp.bfloat16)
    for function, value in (
        (lambda value, mask_S: losses.load_balancing(value, value, mask_S), prob_SE),
        (losses.squared_cv, prob_SE),
        (losses.router_z, prob_SE),
        (losses.entropy, prob_SE),
        (losses.mean_over_tokens, prob_SE),
        (losses.masked_mean, value_S),
    ):
        assert jax.eval_shape(function, value, mask_S).dtype == jnp.float32


def test_balance_by_hand():
    prob_SE = jnp.array([[0.7, 0.3], [0.6, 0.4], [0.2, 0.8]])
    # f = (2/3, 1/3), P = (0.5, 0.5): 2 * (1/3 + 1/6) = 1
    assert losses.load_balancing(prob_SE, one_hot([0, 0, 1], 2), jnp.ones(3, bool)) == pytest.approx(1.0)
    # f = (1, 0): 2 * 0.5
    prob_SE = jnp.array([[0.7, 0.3], [0.6, 0.4], [0.8, 0.2]])
    assert losses.load_balancing(prob_SE, one_hot([0, 0, 0], 2), jnp.ones(3, bool)) == pytest.approx(1.4)


def test_router_z_is_of_logits_not_of_probabilities():
    logits_SE = jnp.array([[0.0, 0.0], [np.log(3.0), 0.0]])
    expected = (np.log(2.0) ** 2 + np.log(4.0) ** 2) / 2
    assert losses.router_z(logits_SE, jnp.ones(2, bool)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("pads", [1, 7, 64])
def test_padding_changes_no_router_loss(pads):
    key = jax.random.key(0)
    logits_SE = jax.random.normal(key, (16, 4))
    padded_SE = jnp.concatenate([logits_SE, 100 * jnp.ones((pads, 4))])
    mask_S = jnp.arange(16 + pads) < 16
    chosen = [one_hot(logits.argmax(-1), 4) for logits in (logits_SE, padded_SE)]
    for loss in (
        lambda logits, chosen, mask: losses.load_balancing(jax.nn.softmax(logits), chosen, mask),
        lambda logits, chosen, mask: losses.router_z(logits, mask),
    ):
        alone = loss(logits_SE, chosen[0], jnp.ones(16, bool))
        assert loss(padded_SE, chosen[1], mask_S) == pytest.approx(float(alone), rel=1e-6)


def test_no_real_token_is_zero_not_nan():
    logits_SE = jnp.ones((4, 2))
    none_S = jnp.zeros(4, bool)
    assert losses.router_z(logits_SE, none_S) == 0
    assert losses.load_balancing(logits_SE / 2, one_hot([0] * 4, 2), none_S) == 0


def test_the_z_loss_of_bf16_logits_is_float32():
    assert losses.router_z(jnp.ones((3, 4), jnp.bfloat16), jnp.ones(3, bool)).dtype == jnp.float32
