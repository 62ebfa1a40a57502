"""Losses: hand-computed values, and nothing changes when padding is appended."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchmoe import losses


def one_hot(expert_S, num_experts):
    return jax.nn.one_hot(jnp.array(expert_S), num_experts)


def test_balance_is_one_when_uniform_and_e_when_collapsed():
    mask_S = jnp.ones(8, bool)
    uniform = losses.load_balancing(jnp.full((8, 4), 0.25), one_hot([0, 1, 2, 3] * 2, 4), mask_S)
    collapsed = losses.load_balancing(one_hot([2] * 8, 4), one_hot([2] * 8, 4), mask_S)
    assert uniform == pytest.approx(1.0)
    assert collapsed == pytest.approx(4.0)


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


def test_cross_entropy_by_hand_and_with_smoothing():
    logits_BLV = jnp.log(jnp.array([[[0.5, 0.25, 0.25]]]))
    targets_BL = jnp.array([[0]])
    nll_BL, z_BL = losses.cross_entropy(logits_BLV + 2.0, targets_BL)
    assert nll_BL[0, 0] == pytest.approx(np.log(2), rel=1e-5)
    assert z_BL[0, 0] == pytest.approx(4.0, rel=1e-5)
    smooth_BL, _ = losses.cross_entropy(logits_BLV, targets_BL, label_smoothing=0.3)
    expected = 0.7 * np.log(2) + 0.1 * (np.log(2) + 2 * np.log(4))
    assert smooth_BL[0, 0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_output_cross_entropy_has_the_gradient_of_its_formula(smoothing):
    """Its own gradient against autodiff through `cross_entropy`; bf16 to its rounding."""
    keys = jax.random.split(jax.random.key(0), 3)
    targets_BL = jax.random.randint(keys[2], (3, 5), 0, 11)

    def plain(x_BLD, table_VD):
        return losses.cross_entropy(losses.logits(x_BLD, table_VD), targets_BL, smoothing)

    def total(outputs):
        nll_BL, z_BL = outputs
        weight_BL = jnp.arange(15.0).reshape(3, 5)
        return (weight_BL * nll_BL + 0.1 * (15 - weight_BL) * z_BL).sum()

    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)):
        x_BLD = jax.random.normal(keys[0], (3, 5, 7)).astype(dtype)
        table_VD = jax.random.normal(keys[1], (11, 7)).astype(dtype)
        found = jax.value_and_grad(
            lambda x, w: total(losses.output_cross_entropy(x, w, targets_BL, smoothing)[:2]), (0, 1)
        )(x_BLD, table_VD)
        inputs = x_BLD.astype(jnp.float32), table_VD.astype(jnp.float32)
        expected = jax.value_and_grad(lambda x, w: total(plain(x, w)), (0, 1))(*inputs)
        assert [a.dtype for a in found[1]] == [dtype, dtype]
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert jnp.abs(a.astype(jnp.float32) - b).max() < tolerance * jnp.abs(b).max()
        correct_BL = losses.output_cross_entropy(*inputs, targets_BL)[2]
        assert (correct_BL == (losses.logits(*inputs).argmax(-1) == targets_BL)).all()


def test_losses_of_bf16_logits_are_float32():
    logits = jnp.ones((2, 3, 4), jnp.bfloat16)
    nll_BL, z_BL = losses.cross_entropy(logits, jnp.zeros((2, 3), jnp.int32))
    assert nll_BL.dtype == z_BL.dtype == jnp.float32
    assert losses.router_z(logits[0], jnp.ones(3, bool)).dtype == jnp.float32


def test_a_tie_is_no_hit():
    """A model whose logits are all the same, or no numbers, is right nowhere; with one alone it is."""
    x_BLD, targets_BL = jnp.ones((1, 4, 2)), jnp.array([[0, 1, 2, 0]])

    def hits(table_VD):
        return losses.output_cross_entropy(x_BLD, jnp.asarray(table_VD, jnp.float32), targets_BL)[2][
            0
        ].tolist()

    assert hits([[0, 0]] * 3) == [False] * 4
    assert hits([[1, 1], [1, 1], [0, 0]]) == [False] * 4
    assert hits([[1, 1], [0, 0], [0, 0]]) == [True, False, False, True]
    assert hits([[jnp.nan, 0], [0, 0], [0, 0]]) == [False] * 4
    assert hits([[jnp.inf, 0], [0, 0], [0, 0]]) == [True, False, False, True]
