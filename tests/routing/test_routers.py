"""Every router: tables by hand. What holds for all of them is in test_router_properties.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchmoe.routing import ROUTERS, RouterSettings, losses

CHOICES = {"switch": 1, "hash": 1, "soft": 1, "hierarchical": 4}
WIDTH = {"noisy_top_k": 8, "hierarchical": 6, "loss_free": 8}  # of the scores, for 4 experts


def settings(name, capacity=100, **more):
    more.setdefault("choices", CHOICES.get(name, 2))
    return RouterSettings(capacity=capacity, num_experts=4, branches=2, **more)


def scores(name, seed=0, tokens=16):
    rng = np.random.default_rng(seed)
    if name == "hash":
        return rng.integers(0, 1000, tokens).astype(np.int32)
    return rng.normal(size=(tokens, WIDTH.get(name, 4))).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _route(name, scores, mask_S, key, settings):
    return ROUTERS[name](scores, mask_S, key, settings)


def route(name, scores, mask_S=None, key=None, **more):
    scores = jnp.asarray(scores, jnp.int32 if name == "hash" else jnp.float32)
    mask_S = jnp.ones(len(scores), bool) if mask_S is None else jnp.asarray(mask_S)
    return jax.device_get(_route(name, scores, mask_S, key, settings(name, **more)))


def close(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_switch_sampling_draws_from_the_distribution():
    logits_SE = np.log(np.tile([[0.7, 0.2, 0.1]], (20_000, 1)))
    drawn = route("switch", logits_SE, key=jax.random.key(0), explore="sample", capacity=20_000)
    np.testing.assert_allclose(drawn.load_E, [0.7, 0.2, 0.1], atol=0.01)
    close(drawn.gate_SK[:, 0], np.array([0.7, 0.2, 0.1])[drawn.expert_SK[:, 0]])
    assert route("switch", logits_SE, explore="sample").load_E.tolist() == [1, 0, 0], "not in evaluation"


def test_what_is_sampled_and_what_the_threshold_keeps_are_drawn_from_two_keys(monkeypatch):
    drawn = []

    def recorded(function):
        def draw(key, *rest):
            drawn.append(jax.random.key_data(key).tolist())
            return function(key, *rest)

        return draw

    for name in ("gumbel", "uniform"):
        monkeypatch.setattr(jax.random, name, recorded(getattr(jax.random, name)))
    finer = settings("switch", choices=2, explore="sample", threshold=0.2)
    ROUTERS["switch"](jnp.asarray(scores("switch")), jnp.ones(16, bool), jax.random.key(0), finer)
    assert drawn[0] == jax.random.key_data(jax.random.key(0)).tolist()
    assert len(drawn) == 2 and drawn[0] != drawn[1]


PROBS_SE = np.array([[0.5, 0.3, 0.1, 0.1], [0.2, 0.5, 0.2, 0.1], [0.6, 0.3, 0.05, 0.05]])


@pytest.mark.parametrize(
    "renormalize, gates",
    [(True, [[5 / 8, 3 / 8], [5 / 7, 2 / 7], [2 / 3, 1 / 3]]), (False, [[0.5, 0.3], [0.5, 0.2], [0.6, 0.3]])],
)
def test_top_k_by_hand(renormalize, gates):
    """First choices are seated before second ones: token 2's first goes before token 1's second."""
    routing = route("top_k", np.log(PROBS_SE), renormalize=renormalize, capacity=2)
    assert routing.expert_SK.tolist() == [[0, 1], [1, 0], [0, 1]]
    assert routing.slot_SK.tolist() == [[0, 1], [0, 2], [1, 2]]
    assert routing.kept_SK.tolist() == [[True, True], [True, False], [True, False]]
    close(routing.gate_SK, np.where(routing.kept_SK, gates, 0))
    close(routing.load_E, [0.5, 0.5, 0, 0])
    assert routing.fraction_dropped == pytest.approx(1 / 3)
    p_E = PROBS_SE.mean(axis=0)
    assert routing.losses["balance"] == pytest.approx(4 * (0.5 * p_E[0] + 0.5 * p_E[1]), rel=1e-5)


@pytest.mark.parametrize("counted, share", [("all", [0.5, 0.5]), ("first", [2 / 3, 1 / 3])])
def test_balance_loss_of_all_choices_or_of_the_first(counted, share):
    """GShard's l_aux (alg. 1) is that of the first choices over E squared: mean_e (c_e / S) m_e."""
    p_E = PROBS_SE.mean(axis=0)
    balance = route("top_k", np.log(PROBS_SE), balance_choices=counted).losses["balance"]
    assert balance == pytest.approx(4 * (share[0] * p_E[0] + share[1] * p_E[1]), rel=1e-5)
    c_E = np.bincount(PROBS_SE.argmax(axis=1), minlength=4)
    if counted == "first":
        assert balance / 4**2 == pytest.approx((c_E / 3 * p_E).mean(), rel=1e-5)
    # The other routers with a balance loss: switch (finer experts have choices), hierarchical.
    logits_SE = scores("hierarchical")
    found = route("hierarchical", logits_SE, balance_choices=counted)
    chosen_SK = found.expert_SK if counted == "all" else found.expert_SK[:, :1]
    f_E = np.bincount(chosen_SK.ravel(), minlength=4) / chosen_SK.size
    branch, leaf = logits_SE[:, :2], logits_SE[:, 2:].reshape(-1, 2, 2)
    p_SE = (jax.nn.softmax(branch)[..., None] * jax.nn.softmax(leaf)).reshape(-1, 4)
    assert found.losses["balance"] == pytest.approx(float(4 * (f_E * p_SE.mean(axis=0)).sum()), rel=1e-5)
    finer = route("switch", np.log(PROBS_SE), balance_choices=counted, choices=2)
    assert finer.losses["balance"] == balance


def test_sigmoid_gates_by_hand_where_they_underflow():
    """sigmoid(-120) : sigmoid(-121) is e : 1; in float32 both are 0."""
    logits_S2E = np.array([[-120.0, -121.0, -140.0, -150.0, 0, 0, 0, 0]])
    gate_SK = route("loss_free", logits_S2E, score="sigmoid").gate_SK
    close(gate_SK, [[np.e / (np.e + 1), 1 / (np.e + 1)]])
    close(route("sinkhorn", logits_S2E[:, :4]).gate_SK, gate_SK)


def test_renormalised_gates_are_the_softmax_of_the_best_logits():
    logits_SE = scores("top_k")
    routing = route("top_k", logits_SE)
    close(routing.gate_SK, jax.nn.softmax(jax.lax.top_k(logits_SE, 2)[0]))


def test_threshold_keeps_the_second_choice_in_proportion():
    """GShard: 2 g_2 > uniform; a gate of 0.3 is kept 60 % of the time, and always in evaluation."""
    logits_SE = np.log(np.tile([[0.7, 0.3, 1e-9, 1e-9]], (20_000, 1)))
    more = dict(threshold=0.5, capacity=20_000)
    drawn = route("top_k", logits_SE, key=jax.random.key(0), **more)
    assert drawn.kept_SK[:, 0].all()
    assert drawn.kept_SK[:, 1].mean() == pytest.approx(0.6, abs=0.02)
    assert drawn.fraction_dropped == 0, "what is not wanted is not dropped"
    assert route("top_k", logits_SE, **more).kept_SK.all()


def test_priority_seats_the_largest_gates():
    logits_SE = np.log([[0.6, 0.4], [0.9, 0.1], [0.7, 0.3], [0.8, 0.2]])
    assert route("switch", logits_SE, capacity=2).kept_SK[:, 0].tolist() == [True, True, False, False]
    first = route("switch", logits_SE, capacity=2, priority=True)
    assert first.kept_SK[:, 0].tolist() == [False, True, False, True]
    assert first.slot_SK[:, 0].tolist() == [3, 0, 2, 1]


def test_priority_goes_by_the_gates_of_the_noisy_router_too():
    """Token 1 is surer (gates 0.9975 and 0.0025), though token 0 has the larger logits (0.525 and 0.475)."""
    h_SE = np.array([[5, 4.9, -9, -9], [1, -5, -9, -9]])
    routing = route("noisy_top_k", np.concatenate([h_SE, 0 * h_SE], axis=1), capacity=1, priority=True)
    assert routing.kept_SK.tolist() == [[False, False], [True, True]]
    close(routing.gate_SK[1], [0.997527, 0.002473])


def test_rerouting_by_hand():
    """Three tokens want expert 0, which has one slot: the others try their next best, in order."""
    probs_SE = [[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.7, 0.2, 0.1]]
    wanted = {0: [[0], None, None], 1: [[0], [1], None], 2: [[0], [1], [2]]}
    for rounds, experts in wanted.items():
        routing = route("switch", np.log(probs_SE), capacity=1, reroute=rounds)
        assert routing.kept_SK[:, 0].tolist() == [e is not None for e in experts]
        for s, e in enumerate(experts):
            if e:
                assert routing.expert_SK[s].tolist() == e and routing.slot_SK[s, 0] == 0
                close(routing.gate_SK[s, 0], probs_SE[s][e[0]])
        assert routing.fraction_dropped == pytest.approx(experts.count(None) / 3)
        assert routing.load_E.tolist() == [1, 0, 0], "the load is that of the first wishes"


def test_noisy_top_k_starts_even_and_noise_is_for_training():
    zeros = np.zeros((4000, 8))
    drawn = route("noisy_top_k", zeros, key=jax.random.key(0), capacity=4000)
    np.testing.assert_allclose(drawn.load_E, 0.25, atol=0.02)
    close(drawn.gate_SK.sum(axis=1), 1.0)
    assert drawn.losses["importance"] < 0.01 and drawn.losses["load"] < 0.01
    assert route("noisy_top_k", zeros).expert_SK[:, 0].tolist() == [0] * 4000


def test_noisy_top_k_losses_by_hand():
    """Against the formulas, expert by expert, with the noise drawn again by the same key."""
    given, key = scores("noisy_top_k", tokens=6), jax.random.key(5)
    routing = route("noisy_top_k", given, key=key)
    h_SE, spread_SE = given[:, :4], np.log1p(np.exp(given[:, 4:]))
    noisy_SE = h_SE + np.asarray(jax.random.normal(key, (6, 4))) * spread_SE
    importance_E, load_E = np.zeros(4), np.zeros(4)
    for s in range(6):
        best = np.argsort(-noisy_SE[s])[:2]
        weight = np.exp(noisy_SE[s, best])
        importance_E[best] += weight / weight.sum()
        for i in range(4):
            kth = np.sort(np.delete(noisy_SE[s], i))[-2]
            load_E[i] += jax.scipy.stats.norm.cdf((h_SE[s, i] - kth) / spread_SE[s, i])
    for name, value_E in (("importance", importance_E), ("load", load_E)):
        assert routing.losses[name] == pytest.approx((value_E.std() / value_E.mean()) ** 2, rel=1e-4)


def test_load_loss_has_a_gradient_where_the_choice_has_none():
    def load(scores):
        mask_S = jnp.ones(16, bool)
        return ROUTERS["noisy_top_k"](scores, mask_S, jax.random.key(0), settings("noisy_top_k")).losses[
            "load"
        ]

    gradient = jax.grad(load)(jnp.asarray(scores("noisy_top_k")))
    assert float((jnp.abs(gradient) > 1e-6).mean()) > 0.9


def test_hierarchical_by_hand():
    """Branches of experts (0, 1) and (2, 3): the best of each level, with the product of both."""
    branch, leaf = np.log([0.6, 0.4]), np.log([0.1, 0.9, 0.95, 0.05])
    routing = route("hierarchical", np.concatenate([branch, leaf])[None], choices=1)
    assert routing.expert_SK.tolist() == [[1]]
    close(routing.gate_SK, [[0.54]])
    routing = route("hierarchical", np.concatenate([branch, leaf])[None], choices=4, renormalize=False)
    assert sorted(routing.expert_SK[0].tolist()) == [0, 1, 2, 3]
    close(sorted(routing.gate_SK[0]), sorted([0.06, 0.54, 0.38, 0.02]))


def test_hierarchical_stays_in_its_branches():
    """One branch, one expert: never the globally best expert of a worse branch."""
    given = np.concatenate([np.log([0.55, 0.45]), np.log([0.5, 0.5, 0.99, 0.01])])[None]
    assert route("hierarchical", given, choices=1).expert_SK.tolist() == [[0]]


def test_hash_depends_on_the_id_alone_and_spreads():
    ids_S = np.arange(40_000)
    routing = route("hash", ids_S, capacity=40_000)
    np.testing.assert_allclose(routing.load_E, 0.25, atol=0.01)
    again = route("hash", ids_S[::-1], capacity=40_000)
    np.testing.assert_array_equal(routing.expert_SK[::-1], again.expert_SK)
    assert (routing.gate_SK == 1).all() and not routing.losses
    two = route("hash", ids_S, choices=2, capacity=40_000)
    assert (two.expert_SK[:, 0] != two.expert_SK[:, 1]).all()


def test_sinkhorn_balances_in_training_and_is_greedy_in_evaluation():
    logits_SE = scores("sinkhorn", tokens=400) + np.array([3.0, 0, 0, 0], np.float32)
    greedy = route("sinkhorn", logits_SE, choices=1, capacity=400)
    balanced = route("sinkhorn", logits_SE, key=jax.random.key(0), choices=1, capacity=400)
    assert greedy.expert_SK[:, 0].tolist() == logits_SE.argmax(-1).tolist() and greedy.load_E[0] > 0.8
    np.testing.assert_allclose(balanced.load_E, 0.25, atol=0.05)
    close(balanced.gate_SK[:, 0], jax.nn.sigmoid(logits_SE)[np.arange(400), balanced.expert_SK[:, 0]])


@pytest.mark.parametrize("score, function", [("softmax", jax.nn.softmax), ("sigmoid", jax.nn.sigmoid)])
def test_loss_free_bias_selects_but_does_not_weigh(score, function):
    logits_SE = np.array([[1.0, 0.5, 0.0, -1.0]])
    bias_SE = np.array([[0.0, 0.0, 5.0, 0.0]])
    routing = route("loss_free", np.concatenate([logits_SE, bias_SE], axis=1), choices=1, score=score)
    assert routing.expert_SK.tolist() == [[2]]
    close(routing.gate_SK[0, 0], function(logits_SE)[0, 2])
    assert routing.losses["bias"] == 0


def test_loss_free_pulls_the_bias_by_the_load():
    """The pseudo-gradient with respect to the bias is load - 1 / E, padding left out."""
    logits_SE, mask_S = jnp.asarray(scores("top_k")), jnp.arange(16) < 12

    def bias_loss(bias_E):
        given = jnp.concatenate([logits_SE, jnp.broadcast_to(bias_E, logits_SE.shape)], axis=1)
        return ROUTERS["loss_free"](given, mask_S, None, settings("loss_free")).losses["bias"]

    bias_E = jnp.array([0.1, 0.0, -0.2, 0.0])
    given = np.concatenate([logits_SE, np.tile(bias_E, (16, 1))], axis=1)
    close(jax.grad(bias_loss)(bias_E), route("loss_free", given, mask_S).load_E - 0.25)


def test_expert_choice_by_hand():
    """Each of 2 experts takes its 2 best of 4 tokens: token 0 gets both, token 3 none."""
    probs_SE = np.array([[0.5, 0.5], [0.9, 0.1], [0.3, 0.7], [0.45, 0.55]]) * [[1, 1], [1, 1], [1, 1], [1, 1]]
    probs_SE[3] = [0.495, 0.505]
    probs_SE[0] = [0.496, 0.504]
    routing = route("expert_choice", np.log(probs_SE), capacity=2, choices=1)
    assert routing.kept_SK.tolist() == [[True, False], [True, False], [False, True], [False, True]]
    assert routing.slot_SK[1, 0] == 0 and routing.slot_SK[0, 0] == 1 and routing.slot_SK[2, 1] == 0
    close(routing.gate_SK, np.where(routing.kept_SK, probs_SE, 0))
    close(routing.load_E, 0.5)
    assert routing.fraction_dropped == 0
    crowded = route("expert_choice", np.zeros((4, 2)), capacity=1)
    assert crowded.kept_SK.tolist() == [[True, True]] + [[False, False]] * 3, "ties to the earlier token"
    assert crowded.fraction_dropped == 0.75


def test_soft_by_hand():
    logits_SP = np.log([[1.0, 3.0], [3.0, 1.0], [9.0, 9.0]])
    routing = route("soft", logits_SP, [True, True, False], capacity=1)
    close(routing.mix_SK, [[0.25, 0.75], [0.75, 0.25], [0, 0]])  # over the real tokens
    close(routing.gate_SK, [[0.25, 0.75], [0.75, 0.25], [0, 0]])  # over the slots
    close(routing.load_E, [0.5, 0.5])


def test_a_choice_is_rerouted_to_the_next_best_expert():
    """Token 1's second choice, expert 1, is full; the next it ranks is expert 3, then expert 0."""
    probs_SE = np.array([[0.5, 0.4, 0.06, 0.04], [0.04, 0.3, 0.6, 0.06]])
    assert route("top_k", np.log(probs_SE), capacity=1).kept_SK.tolist() == [[True, True], [True, False]]
    for reroute in (1, 7):
        routing = route("top_k", np.log(probs_SE), capacity=1, reroute=reroute)
        assert routing.expert_SK.tolist() == [[0, 1], [2, 3]] and routing.kept_SK.all()
        close(routing.gate_SK[1], [0.6 / 0.66, 0.06 / 0.66])
    # Both choices of token 1 are refused: the first of them tries first.
    probs_SE = np.array([[0.5, 0.4, 0.06, 0.04], [0.5, 0.4, 0.04, 0.06]])
    routing = route("top_k", np.log(probs_SE), capacity=1, reroute=1)
    assert routing.expert_SK.tolist() == [[0, 1], [3, 2]] and routing.kept_SK.all()


def test_squared_cv_by_hand():
    mask_S = jnp.array([True, True, False])
    value_SE = jnp.array([[1.0, 2.0], [1.0, 4.0], [9.0, 0.0]])
    assert losses.squared_cv(value_SE, mask_S) == pytest.approx((2 / 4) ** 2)
