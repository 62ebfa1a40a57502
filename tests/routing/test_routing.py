"""The Switch router: tables by hand, capacity, order, padding, causality."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from switchmoe.routing import RouterSettings, contract, expert_capacity, switch


def route(logits_SE, mask_S=None, capacity=100):
    logits_SE = jnp.asarray(logits_SE)
    mask_S = jnp.ones(len(logits_SE), bool) if mask_S is None else jnp.asarray(mask_S)
    return _switch(logits_SE, mask_S, RouterSettings(capacity=capacity))


@functools.partial(jax.jit, static_argnums=2)
def _switch(logits_SE, mask_S, settings):
    return switch(logits_SE, mask_S, None, settings)


@pytest.mark.parametrize(
    "tokens, experts, factor, choices, expected",
    [
        (8, 4, 1.0, 1, 2),
        (8, 4, 1.25, 1, 3),  # ceil(2.5)
        (8, 4, 1.0, 2, 4),
        (10, 1, 1.1, 1, 10),  # never more slots than tokens
        (100, 10, 1.1, 1, 11),  # 11.000000000000002 in floating point
        (4, 512, 1.25, 1, 1),  # at least 1
        (4096, 8, 1.25, 1, 640),
        (512, 128, 2.0, 1, 8),
        (7, 3, 1.0, 1, 3),
    ],
)
def test_capacity_table(tokens, experts, factor, choices, expected):
    assert expert_capacity(tokens, experts, factor, choices) == expected


def test_by_hand():
    logits_SE = np.log([[0.6, 0.3, 0.1], [0.5, 0.1, 0.4], [0.2, 0.2, 0.6], [0.7, 0.2, 0.1]])
    routing = route(logits_SE, capacity=2)
    assert routing.expert_SK[:, 0].tolist() == [0, 0, 2, 0]
    assert routing.slot_SK[:, 0].tolist() == [0, 1, 0, 2]
    assert routing.kept_SK[:, 0].tolist() == [True, True, True, False]
    np.testing.assert_allclose(routing.gate_SK[:, 0], [0.6, 0.5, 0.6, 0.0], rtol=1e-6)
    np.testing.assert_allclose(routing.load_E, [0.75, 0.0, 0.25])
    assert routing.fraction_dropped == pytest.approx(0.25)
    p_E = np.array([2.0, 0.8, 1.2]) / 4
    assert routing.losses["balance"] == pytest.approx(3 * (0.75 * p_E[0] + 0.25 * p_E[2]), rel=1e-5)
    assert routing.losses["z"] == pytest.approx(0.0, abs=1e-10)  # logits that are log-probabilities


def test_one_expert_keeps_exactly_the_capacity():
    routing = route(np.zeros((10, 1)), capacity=4)
    assert routing.kept_SK[:, 0].tolist() == [True] * 4 + [False] * 6


def test_the_gate_is_the_probability_not_renormalised():
    routing = route(np.log([[0.6, 0.4]]))
    assert routing.gate_SK[0, 0] == pytest.approx(0.6, rel=1e-6)


def test_padding_takes_no_slot():
    """32 pads first, capacity 10: all four real tokens are kept."""
    mask_S = np.arange(36) >= 32
    routing = route(np.tile([5.0, 0.0], (36, 1)), mask_S, capacity=10)
    assert routing.kept_SK[:, 0].tolist() == mask_S.tolist()
    assert routing.fraction_dropped == 0
    np.testing.assert_allclose(routing.load_E, [1.0, 0.0])


@given(st.data())
def test_invariants(data):
    tokens, experts = data.draw(st.sampled_from([1, 24])), data.draw(st.sampled_from([1, 5]))
    capacity = data.draw(st.sampled_from([1, 4]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    logits_SE, mask_S = rng.normal(size=(tokens, experts)), rng.random(tokens) < 0.8
    routing = jax.device_get(route(logits_SE, mask_S, capacity))
    expert_S, kept_S = routing.expert_SK[:, 0], routing.kept_SK[:, 0]
    places = list(zip(expert_S[kept_S], routing.slot_SK[kept_S, 0], strict=True))
    assert len(set(places)) == len(places), "two tokens in one slot"
    assert all(slot < capacity for _, slot in places)
    for e in range(experts):
        asked = mask_S & (expert_S == e)
        assert (kept_S & asked).sum() == min(asked.sum(), capacity), "a free slot was left empty"
        assert kept_S[asked].tolist() == (np.arange(asked.sum()) < capacity).tolist(), (
            "not first come first served"
        )
    assert not kept_S[~mask_S].any()
    assert (routing.gate_SK[~kept_S] == 0).all()
    assert routing.load_E.sum() == pytest.approx(1.0 if mask_S.any() else 0.0)
    dropped = (mask_S & ~kept_S).sum() / max(mask_S.sum(), 1)
    assert routing.fraction_dropped == pytest.approx(dropped, abs=1e-6)
    assert 0 <= routing.entropy <= np.log(experts) + 1e-5


@pytest.mark.parametrize("choices, experts", [(1, 1), (63, 5), (64, 5), (65, 5), (1000, 200)])
def test_places_are_those_of_counting_one_after_the_other(choices, experts):
    rng = np.random.default_rng(0)
    wish_Q, filled_E = rng.integers(-1, experts, choices), rng.integers(0, 4, experts)
    place_Q, next_E = np.zeros(choices, int), filled_E.copy()
    for q, wish in enumerate(wish_Q):
        if wish >= 0:
            place_Q[q], next_E[wish] = next_E[wish], next_E[wish] + 1
    found_Q, found_E = contract._places(jnp.asarray(wish_Q), jnp.asarray(filled_E))
    np.testing.assert_array_equal(found_Q, place_Q)
    np.testing.assert_array_equal(found_E, next_E - filled_E)


def test_one_experts_block_is_counted_in_8_bits():
    assert contract._places(jnp.zeros(300, jnp.int32), jnp.zeros(2, jnp.int32))[0].tolist() == list(
        range(300)
    )


def test_slots_do_not_collide_beyond_bf16():
    """600 tokens for one expert: 600 slots (in bf16 the count stops being exact at 256)."""
    routing = route(np.tile([1.0, 0.0], (600, 1)).astype(jnp.bfloat16), capacity=600)
    assert len(set(routing.slot_SK[:, 0].tolist())) == 600


def test_appended_padding_changes_nothing():
    logits_SE = np.random.default_rng(0).normal(size=(20, 4))
    alone = route(logits_SE, capacity=4)
    padded = route(np.concatenate([logits_SE, np.zeros((12, 4))]), np.arange(32) < 20, capacity=4)
    for name in ("expert_SK", "slot_SK", "gate_SK", "kept_SK"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(padded, name)[:20])
    for name in ("load_E", "fraction_dropped", "entropy", "losses"):
        a, b = getattr(alone, name), getattr(padded, name)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), a, b)


def test_permuting_experts_permutes_the_answer():
    logits_SE = np.random.default_rng(1).normal(size=(30, 5))
    order = np.array([3, 0, 4, 1, 2])
    plain, permuted = route(logits_SE, capacity=5), route(logits_SE[:, order], capacity=5)
    np.testing.assert_array_equal(plain.expert_SK, order[permuted.expert_SK])
    np.testing.assert_array_equal(plain.slot_SK, permuted.slot_SK)
    np.testing.assert_allclose(plain.load_E[order], permuted.load_E)


def test_causal():
    """A later token changes nothing for the earlier ones, full buffers or not."""
    rng = np.random.default_rng(2)
    logits_SE = rng.normal(size=(16, 3))
    changed_SE = logits_SE.copy()
    changed_SE[10:] = rng.normal(size=(6, 3)) * 10
    a, b = route(logits_SE, capacity=4), route(changed_SE, capacity=4)
    for name in ("expert_SK", "slot_SK", "gate_SK", "kept_SK"):
        np.testing.assert_array_equal(getattr(a, name)[:10], getattr(b, name)[:10])


def test_gradient_reaches_the_logits_through_the_gate():
    gradient = jax.grad(lambda logits: route(logits).gate_SK.sum())(jnp.array([[1.0, 0.0], [0.0, 2.0]]))
    assert float(jnp.abs(gradient).min()) > 0.05
