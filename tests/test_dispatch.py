"""Dispatchers: output and gradients of every back end equal a plain loop over experts."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchmoe.dispatch import DISPATCHERS
from switchmoe.routing import RouterSettings, Routing, switch

BACK_ENDS = sorted(DISPATCHERS)


def choices(seed, groups, tokens, experts, capacity, per_token=1, full_padding=False):
    """A random Routing with ``per_token`` different experts a token, some padding and some drops."""
    rng = np.random.default_rng(seed)
    expert = np.argsort(rng.random((groups, tokens, experts)), axis=-1)[..., :per_token]
    mask = np.zeros((groups, tokens)) if full_padding else rng.random((groups, tokens)) < 0.85
    slot, kept = np.zeros(expert.shape, int), np.zeros(expert.shape, bool)
    for g in range(groups):
        filled = np.zeros(experts, int)
        for k in range(per_token):
            for s in range(tokens):
                e = expert[g, s, k]
                slot[g, s, k] = filled[e]
                kept[g, s, k] = mask[g, s] and filled[e] < capacity
                filled[e] += bool(mask[g, s])
    gate = np.where(kept, rng.uniform(0.1, 1.0, expert.shape), 0.0)
    zeros = jnp.zeros(groups)
    return Routing(
        expert_SK=jnp.array(expert, jnp.int32),
        slot_SK=jnp.array(slot, jnp.int32),
        gate_SK=jnp.array(gate, jnp.float32),
        kept_SK=jnp.array(kept),
        load_E=jnp.zeros((groups, experts)),
        tokens=zeros,
        fraction_dropped=zeros,
        entropy=zeros,
        losses={},
        num_experts=experts,
        capacity=capacity,
    )


def through(back_end, routing, w_EDD, x_GSD, gate_GSK):
    dispatcher = DISPATCHERS[back_end](routing.replace(gate_SK=gate_GSK))
    return dispatcher.combine(jnp.tanh(dispatcher.matmul(dispatcher.dispatch(x_GSD), w_EDD)))


through_compiled = jax.jit(through, static_argnums=0)


def by_loop(routing, w_EDD, x_GSD, gate_GSK):
    """A plain loop over experts, each applied to every token, in float64."""
    w, x, gate = (jnp.asarray(a, jnp.float64) for a in (w_EDD, x_GSD, gate_GSK))
    y = jnp.zeros_like(x)
    for e in range(routing.num_experts):
        mine_GSK = routing.kept_SK & (routing.expert_SK == e)
        y += jnp.where(mine_GSK, gate, 0.0).sum(-1, keepdims=True) * jnp.tanh(x @ w[e])
    return y


CASES = {
    "plain": dict(groups=2, tokens=8, experts=3, capacity=3),
    "one group": dict(groups=1, tokens=9, experts=4, capacity=2),
    "room for all": dict(groups=3, tokens=4, experts=2, capacity=4),
    "more experts than tokens": dict(groups=2, tokens=3, experts=7, capacity=1),
    "one expert": dict(groups=2, tokens=5, experts=1, capacity=3),
    "two choices": dict(groups=2, tokens=6, experts=4, capacity=3, per_token=2),
    "no token at all": dict(groups=2, tokens=4, experts=2, capacity=2, full_padding=True),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_outputs_and_gradients_equal_a_loop(back_end, case):
    with jax.enable_x64(True):
        routing = choices(0, **CASES[case])
        rng = np.random.default_rng(1)
        x_GSD = jnp.array(rng.normal(size=(*routing.expert_SK.shape[:2], 5)), jnp.float32)
        w_EDD = jnp.array(rng.normal(size=(routing.num_experts, 5, 5)), jnp.float32)
        weight_GSD = jnp.array(rng.normal(size=x_GSD.shape))
        arguments = (w_EDD, x_GSD, routing.gate_SK)

        def outputs_and_gradients(function):
            def score(*arguments):
                y_GSD = function(*arguments)
                return (y_GSD.astype(jnp.float64) * weight_GSD).sum(), y_GSD

            (_, y_GSD), gradients = jax.jit(jax.value_and_grad(score, (0, 1, 2), has_aux=True))(*arguments)
            return y_GSD, *gradients

        y, d_w, d_x, d_gate = outputs_and_gradients(lambda *a: through(back_end, routing, *a))
        wanted_y, wanted_w, wanted_x, wanted_gate = outputs_and_gradients(lambda *a: by_loop(routing, *a))
        kept = np.asarray(routing.kept_SK)
        for got, wanted in (
            (y, wanted_y),
            (d_w, wanted_w),
            (d_x, wanted_x),
            (d_gate[kept], wanted_gate[kept]),
        ):
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
        # A choice that found no slot has no output: its gate has no gradient either.
        assert not np.asarray(d_gate)[~kept].any()


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_bf16_equals_float32_to_rounding(back_end):
    routing = choices(3, groups=2, tokens=16, experts=4, capacity=5)
    rng = np.random.default_rng(4)
    x_GSD, w_EDD = jnp.array(rng.normal(size=(2, 16, 8))), jnp.array(rng.normal(size=(4, 8, 8)))
    wanted = through_compiled(back_end, routing, w_EDD, x_GSD, routing.gate_SK)
    got = through_compiled(
        back_end, routing, w_EDD.astype(jnp.bfloat16), x_GSD.astype(jnp.bfloat16), routing.gate_SK
    )
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), wanted, atol=0.1)


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_a_dropped_token_gives_zero_and_an_empty_slot_holds_zeros(back_end):
    logits_GSE = jnp.array([[[5.0, 0.0]] * 3])
    routing = jax.vmap(lambda x, m: switch(x, m, None, RouterSettings(capacity=2)))(
        logits_GSE, jnp.ones((1, 3), bool)
    )
    dispatcher = DISPATCHERS[back_end](routing)
    rows = dispatcher.dispatch(jnp.ones((1, 3, 4)))
    np.testing.assert_array_equal(rows.sum(-1).reshape(-1)[:3], [4, 4, 0])  # expert 0's two, then none
    y_GSD = dispatcher.combine(jnp.ones_like(rows))
    assert (y_GSD[0, 2] == 0).all() and (y_GSD[0, :2] > 0.9).all()


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_a_gate_that_underflows_does_not_drop_its_token(back_end):
    routing = choices(5, groups=1, tokens=4, experts=2, capacity=4)
    dispatched = DISPATCHERS[back_end](routing).dispatch(jnp.ones((1, 4, 3)))
    tiny = DISPATCHERS[back_end](routing.replace(gate_SK=routing.gate_SK * 1e-45)).dispatch(
        jnp.ones((1, 4, 3))
    )
    assert dispatched.sum() > 0
    np.testing.assert_array_equal(dispatched, tiny)


@pytest.mark.parametrize("back_end", DISPATCHERS)
def test_a_nan_token_reaches_no_other(back_end):
    routing = choices(6, groups=2, tokens=8, experts=3, capacity=2)
    x_GSD = jnp.ones((2, 8, 4)).at[0, 0].set(jnp.nan)
    w_EDD = jnp.ones((3, 4, 4))
    y_GSD = through(back_end, routing, w_EDD, x_GSD, routing.gate_SK)
    clean = jnp.ones((2, 8), bool).at[0, 0].set(False)
    assert routing.kept_SK[0, 0].any() and not jnp.isfinite(y_GSD[0, 0]).any()
    assert jnp.isfinite(y_GSD[clean]).all()
    gradient = jax.grad(lambda x: through(back_end, routing, w_EDD, x, routing.gate_SK)[clean].sum())(x_GSD)
    assert jnp.isfinite(gradient[clean]).all()


def test_gather_has_no_scatter_of_rows_in_its_gradient():
    """The transpose of each move is a gather (the only scatter is that of the int32 indices)."""
    routing = choices(7, groups=2, tokens=8, experts=3, capacity=2)
    w_EDD, x_GSD = jnp.ones((3, 4, 4)), jnp.ones((2, 8, 4))
    grad = jax.grad(lambda w, x: through("gather", routing, w, x, routing.gate_SK).sum(), argnums=(0, 1))
    made_by_scatter = re.findall(r"(\w+)\[[\d,]*\] = scatter", str(jax.make_jaxpr(grad)(w_EDD, x_GSD)))
    assert made_by_scatter == ["i32"]
