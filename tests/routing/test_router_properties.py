"""What holds for every router, or for those named: seats, sums of gates, padding, order of experts, causality, groups."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_routers import close, route, scores, settings

from switchmoe.routing import GROUPS, NOT_CAUSAL, ROUTERS

TOKEN_CHOICE = [name for name in ROUTERS if name not in NOT_CAUSAL]


@pytest.mark.parametrize("spread", [1, 60])
@pytest.mark.parametrize("shift", [0, -25, -120, 120])
@pytest.mark.parametrize(
    "name, more",
    [
        ("top_k", {}),
        ("switch", {"choices": 2}),
        ("noisy_top_k", {}),
        ("hierarchical", {}),
        ("sinkhorn", {}),
        ("loss_free", {"score": "sigmoid"}),
        ("loss_free", {"score": "softmax"}),
        ("loss_free", {"score": "sigmoid", "reroute": 1, "capacity": 5}),
        ("top_k", {"reroute": 1, "capacity": 5, "priority": True}),
    ],
)
def test_renormalised_gates_sum_to_one_at_any_shift(name, more, shift, spread):
    given_SE = scores(name) * spread
    moved = slice(None, 4) if name in ("loss_free", "noisy_top_k") else slice(None)
    given_SE[:, moved] += shift
    if name == "loss_free":
        given_SE[:, 4:] = 0.0
    chosen = settings(name, **more)

    def total(scores_SE):
        routing = ROUTERS[name](scores_SE, jnp.ones(16, bool), None, chosen)
        best_S = jnp.where(routing.kept_SK.all(axis=1), routing.gate_SK[:, 0], 0.0)
        return best_S.sum(), routing

    gradient, routing = jax.jit(jax.grad(total, has_aux=True))(jnp.asarray(given_SE, jnp.float32))
    seated_S = routing.kept_SK.all(axis=1)
    assert seated_S.any()
    np.testing.assert_allclose(routing.gate_SK.sum(axis=1)[seated_S], 1.0, rtol=1e-5)
    assert jnp.isfinite(gradient).all()
    if name in ("sinkhorn", "loss_free"):  # the best logits, also where all scores are 0 or 1
        order_SE = np.argsort(-given_SE[:, :4], axis=1, kind="stable")
        if not more.get("reroute"):
            np.testing.assert_array_equal(routing.expert_SK, order_SE[:, :2])


def test_padding_may_hold_anything():
    for name in ROUTERS:
        given, mask_S = scores(name), np.arange(16) != 5
        room = {"capacity": 1 if name == "soft" else 5}
        wanted = route(name, given, mask_S, **room)
        if name != "hash":
            given[5] = np.nan
        found = route(name, given, mask_S, **room)
        for field in ("expert_SK", "slot_SK", "gate_SK"):
            np.testing.assert_array_equal(
                getattr(found, field)[mask_S], getattr(wanted, field)[mask_S], err_msg=name
            )
        assert not found.kept_SK[5].any() and not found.gate_SK[5].any(), name
        jax.tree.map(np.testing.assert_array_equal, found.losses, wanted.losses)


@pytest.mark.parametrize("key", [None, 3])
@pytest.mark.parametrize("capacity", [1, 3])
@pytest.mark.parametrize("more", [{}, {"causal": True}, {"priority": True}, {"reroute": 2}], ids=str)
@pytest.mark.parametrize("name", TOKEN_CHOICE)
def test_token_choice_invariants(name, more, capacity, key):
    """No slot twice, none beyond capacity, no free slot refused, no expert twice, padding nowhere."""
    mask_S = np.random.default_rng(1).random(16) < 0.8
    key = None if key is None else jax.random.key(key)
    routing = route(name, scores(name), mask_S, key, capacity=capacity, **more)
    kept_SK = routing.kept_SK
    assert not kept_SK[~mask_S].any() and not routing.gate_SK[~kept_SK].any()
    places = list(zip(routing.expert_SK[kept_SK], routing.slot_SK[kept_SK], strict=True))
    assert len(set(places)) == len(places) and all(0 <= slot < capacity for _, slot in places)
    for s in range(16):
        mine = routing.expert_SK[s][kept_SK[s]]
        assert len(set(mine)) == len(mine)
    filled_E = np.bincount(routing.expert_SK[kept_SK], minlength=4)
    for e in range(4):
        assert sorted(slot for expert, slot in places if expert == e) == list(range(filled_E[e]))
    for s in np.flatnonzero(mask_S & ~kept_SK.all(axis=1)):
        best = np.argsort(-routing.rank_SE[s], kind="stable")[: kept_SK.shape[1] + more.get("reroute", 0)]
        tried = set(best) - set(routing.expert_SK[s][kept_SK[s]])
        assert all(filled_E[e] == capacity for e in tried), "a free slot was refused"
    assert routing.load_E.sum() == pytest.approx(1)
    dropped = 1 - kept_SK.sum() / (mask_S.sum() * kept_SK.shape[1])
    assert routing.fraction_dropped == pytest.approx(dropped, abs=1e-6)


@pytest.mark.parametrize("name", [n for n in ROUTERS if n not in ("hash", "soft", "sinkhorn", "loss_free")])
def test_gates_conserve_mass(name):
    """With room for all, a token's gates sum to 1 where they are renormalised, and never to more."""
    routing = route(name, scores(name))
    total_S = routing.gate_SK.sum(axis=1)
    assert (total_S <= 1 + 1e-5).all()
    if name in ("top_k", "noisy_top_k", "hierarchical", "expert_choice"):
        close(total_S, 1.0)


@pytest.mark.parametrize("name", ROUTERS)
def test_appended_padding_changes_nothing(name):
    """Expert choice and soft scale with the group: their capacity is given for its whole length."""
    given = scores(name)
    more = {"capacity": 1 if name == "soft" else 3}
    padded = np.concatenate([given, np.zeros_like(given)])
    alone = route(name, given, **more)
    if name == "expert_choice":
        more = {"capacity": 6}
    both = route(name, padded, np.arange(32) < 16, **more)
    for field in ("expert_SK", "gate_SK", "kept_SK"):
        close(getattr(both, field)[:16], getattr(alone, field))
    for field in ("load_E", "fraction_dropped", "entropy", "tokens"):
        close(getattr(both, field), getattr(alone, field))
    jax.tree.map(close, both.losses, alone.losses)


@pytest.mark.parametrize("name", ["switch", "top_k", "noisy_top_k", "sinkhorn", "loss_free", "expert_choice"])
def test_permuting_experts_permutes_the_answer(name):
    given, order = scores(name), np.array([2, 0, 3, 1])
    columns = np.concatenate([order + start for start in range(0, given.shape[1], 4)])

    def gate_SE(routing):
        total_SE = np.zeros((16, 4))
        np.add.at(total_SE, (np.arange(16)[:, None], routing.expert_SK), routing.gate_SK)
        return total_SE

    plain, permuted = (route(name, g, capacity=6) for g in (given, given[:, columns]))
    close(gate_SE(permuted), gate_SE(plain)[:, order])
    close(permuted.load_E, plain.load_E[order])
    jax.tree.map(close, permuted.losses, plain.losses)


@pytest.mark.parametrize("name", ROUTERS)
def test_causal_in_evaluation_or_named_as_not(name):
    """A later token changes no earlier one, full buffers or not, or the router is in NOT_CAUSAL."""
    more = {"capacity": 1 if name == "soft" else 3, "causal": True}
    given = scores(name)
    changed = given.copy()
    changed[10:] = scores(name, seed=9)[10:] * 5
    a, b = route(name, given, **more), route(name, changed, **more)
    shares = [np.where(r.kept_SK, r.gate_SK, 0) if r.mix_SK is None else r.mix_SK for r in (a, b)]
    same = all(
        np.array_equal(x[:10], y[:10])
        for x, y in ((a.expert_SK, b.expert_SK), (a.kept_SK, b.kept_SK), (a.slot_SK, b.slot_SK), shares)
    )
    assert same == (name not in NOT_CAUSAL)


def test_what_is_not_causal_is_refused_where_it_must_be():
    """Priority, re-routing, and first choices before second ones let a later token take a slot."""
    probs_SE = np.array([[0.6, 0.4], [0.1, 0.9]])
    assert route("top_k", np.log(probs_SE), capacity=1).kept_SK.tolist() == [[True, False], [True, False]]
    in_order = route("top_k", np.log(probs_SE), capacity=1, causal=True)
    assert in_order.kept_SK.tolist() == [[True, True], [False, False]]
    for more in ({"priority": True}, {"reroute": 1}):
        with pytest.raises(ValueError, match="causal=True: accepted is priority=False and reroute=0"):
            route("switch", np.log(probs_SE), causal=True, **more)


@pytest.mark.parametrize("name", ["switch", "top_k", "noisy_top_k", "hierarchical"])
def test_statistics_over_the_global_batch(name):
    """Pooled over groups, the balancing losses are those of all tokens as one group."""
    given = jnp.asarray(scores(name, tokens=24)).reshape(3, 8, -1)
    mask_GS = jnp.asarray(np.random.default_rng(2).random((3, 8)) < 0.7)
    alone = settings(name, choices=1)
    pooled = dataclasses.replace(alone, balance_axis=GROUPS)
    router = ROUTERS[name]
    groups = jax.vmap(lambda x, m: router(x, m, None, pooled), axis_name=GROUPS)(given, mask_GS)
    whole = router(given.reshape(24, -1), mask_GS.reshape(24), None, alone)
    apart = jax.vmap(lambda x, m: router(x, m, None, alone))(given, mask_GS)
    for loss in {"balance", "importance", "load"} & whole.losses.keys():
        close(groups.losses[loss], jnp.broadcast_to(whole.losses[loss], 3))
        assert float(jnp.abs(apart.losses[loss] - whole.losses[loss]).max()) > 1e-3
