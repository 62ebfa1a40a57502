"""The layer with each router and option: what it learns, what it refuses, what it equals."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from switchmoe.model.moe import AttentionExperts, MoELayer
from switchmoe.model.moe_rules import check, dispatch_name
from switchmoe.routing import NOT_CAUSAL, ROUTERS
from switchmoe.settings import ModelSettings, MoESettings, from_config
from switchmoe.training import optimizers, train_state, train_step

MODEL = ModelSettings(d_model=16, d_ff=32, d_kv=4, num_heads=4, num_layers=2, dtype="float32", init_scale=1.0)
ROOM = dict(num_experts=4, capacity_factor=4.0, eval_capacity_factor=4.0, jitter=0.0, router_init_stddev=0.3)
MORE = {"noisy_top_k": {"choices": 2}, "top_k": {"choices": 2}, "hierarchical": {"choices": 4}}


def make(train=False, causal=False, model=MODEL, **moe):
    return MoELayer(model, MoESettings(**ROOM | moe), train, causal)


def tokens(seed=0, groups=2, size=12):
    return jax.random.normal(jax.random.key(seed), (groups, size, 16))


IDS_GS = jax.random.randint(jax.random.key(9), (2, 12), 0, 500)


def params_of(layer, x_GSD):
    keys = {name: jax.random.key(n) for n, name in enumerate(("params", "router", "dropout"))}
    return nn.unbox(jax.jit(layer.init)(keys, x_GSD, None, IDS_GS))


@pytest.mark.parametrize("router", ROUTERS)
def test_the_task_alone_teaches_the_router(router):
    layer, x_GSD = make(train=True, router=router, **MORE.get(router, {})), tokens()
    params = params_of(layer, x_GSD)
    if router == "noisy_top_k":  # its kernels start at zero, where the order is the noise's alone
        params["params"]["router"] += 0.1 * jax.random.normal(
            jax.random.key(5), params["params"]["router"].shape
        )

    def task_loss(params):
        return (layer.apply(params, x_GSD, None, IDS_GS, rngs={"router": jax.random.key(3)})[0] ** 2).sum()

    gradient = jax.jit(jax.grad(task_loss))(params)["params"]
    assert float(jnp.abs(gradient["experts"]["wo"]).max()) > 1e-3
    if router == "hash":
        assert "router" not in gradient, "the hash has no parameters"
    else:
        assert float(jnp.abs(gradient["router"]).max()) > 1e-3


@pytest.mark.parametrize(
    "explore", [dict(explore="jitter", jitter=0.3), dict(explore="input_dropout", input_dropout_rate=0.5), dict(explore="sample")], ids=str
)  # fmt: skip
def test_exploration_is_for_training_and_for_the_router_alone(explore):
    x_GSD, rngs = tokens(size=64), {"router": jax.random.key(3)}
    params = params_of(make(), x_GSD)
    plain_y, _ = make(explore="argmax").apply(params, x_GSD)
    drawn_y, _ = make(train=True, **explore).apply(params, x_GSD, rngs=rngs)
    assert float(jnp.abs(plain_y - drawn_y).max()) > 1e-3
    np.testing.assert_array_equal(make(**explore).apply(params, x_GSD)[0], plain_y)
    # Where the choice stayed, the expert saw the same input: outputs differ by the gate alone.
    ratio_GSD = drawn_y / plain_y
    assert float((jnp.abs(ratio_GSD - ratio_GSD[..., :1]).max(-1) < 1e-3).mean()) > 0.3


@pytest.mark.parametrize("router", [name for name in ROUTERS if name not in NOT_CAUSAL])
def test_dropless_is_room_for_all(router):
    x_GSD, more = tokens(), MORE.get(router, {}) | {"router": router}
    layer = make(dropless=True, capacity_factor=0.1, eval_capacity_factor=0.1, **more)
    params = params_of(layer, x_GSD)
    y_GSD, aux = layer.apply(params, x_GSD, None, IDS_GS)
    assert aux["fraction_dropped"] == 0
    np.testing.assert_allclose(
        y_GSD, make(**more).apply(params, x_GSD, None, IDS_GS)[0], rtol=1e-4, atol=1e-5
    )


def test_shared_experts_see_every_token():
    x_GSD = tokens()
    layer = make(num_shared=2, capacity_factor=0.1, eval_capacity_factor=0.1)
    params = params_of(layer, x_GSD)
    assert params["params"]["shared"]["wo"].shape == (64, 16)
    y_GSD, aux = layer.apply(params, x_GSD)
    routed = {"params": {k: v for k, v in params["params"].items() if k != "shared"}}
    alone_GSD, _ = make(capacity_factor=0.1, eval_capacity_factor=0.1).apply(routed, x_GSD)
    assert aux["fraction_dropped"] > 0.5
    assert float(jnp.abs(y_GSD - alone_GSD).min(axis=-1).max()) > 1e-3
    kernels = params["params"]["shared"]
    h = jax.nn.gelu(x_GSD @ kernels["wi_gate"]) * (x_GSD @ kernels["wi"])
    np.testing.assert_allclose(y_GSD - alone_GSD, h @ kernels["wo"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("router", ["switch", "hash", "expert_choice", "soft", "loss_free"])
def test_finer_experts_have_the_same_parameters_and_work(router):
    x_GSD = tokens()
    layer = make(granularity=4, router=router)
    params = params_of(layer, x_GSD)["params"]["experts"]
    assert params["wi"].shape == (16, 16, 8) and params["wo"].shape == (16, 8, 16)
    _, aux = layer.apply({"params": params_of(layer, x_GSD)["params"]}, x_GSD, None, IDS_GS)
    assert aux["expert_load"].shape == (16,)
    assert float(aux["expert_load"].sum()) == pytest.approx(1, rel=1e-5)


def test_attention_experts_project_each_token_by_its_own():
    layer = MoELayer(MODEL, MoESettings(**ROOM), experts=AttentionExperts)
    x_GSD = tokens()
    params = params_of(layer, x_GSD)
    y_GSD, _ = layer.apply(params, x_GSD)
    kernels = params["params"]["experts"]
    prob_GSE = jax.nn.softmax(x_GSD @ params["params"]["router"])
    best_GS = prob_GSE.argmax(-1)
    for n, name in enumerate(("query", "key", "value")):
        all_GSEP = jnp.einsum("GSD,EDP->GSEP", x_GSD, kernels[name].reshape(4, 16, 16))
        mine_GSP = jnp.take_along_axis(all_GSEP, best_GS[..., None, None], axis=2)[:, :, 0]
        wanted = mine_GSP * prob_GSE.max(-1)[..., None]
        np.testing.assert_allclose(y_GSD[..., 16 * n : 16 * (n + 1)], wanted, rtol=1e-4, atol=1e-5)
    ratio = float(kernels["key"].std() / kernels["query"].std())
    assert ratio == pytest.approx(MODEL.d_kv**0.5, rel=0.1), "the query's scale is in its initialiser"


@pytest.mark.parametrize(
    "moe, causal, message",
    [
        (dict(router="magic"), False, "moe.router=magic: accepted is one of switch"),
        (dict(router="expert_choice"), True, "moe.router=expert_choice: accepted is in a decoder"),
        (dict(decoder_router="soft"), True, "moe.decoder_router=soft: accepted is in a decoder"),
        (dict(choices=2), False, "moe.choices=2: accepted is 1 with the router switch"),
        (dict(router="top_k", choices=9), False, "moe.choices=9: accepted is at most"),
        (dict(router="noisy_top_k"), False, "moe.choices=1: accepted is 2 or more"),
        (dict(router="hierarchical", branches=3), False, "moe.branches=3: accepted is a divisor"),
        (dict(router="hierarchical", choices=2), False, "moe.choices=2: accepted is with hierarchical a square"),
        (dict(router="top_k", explore="sample"), False, "moe.explore=sample: accepted is argmax"),
        (dict(router="hash", reroute=1), False, "moe.reroute=1: accepted is 0"),
        (dict(dropless=True, dispatch="gather"), False, "moe.dropless=True: accepted is True with"),
        (dict(router="expert_choice", dropless=True), False, "moe.dropless=True"),
        (dict(router="soft", dispatch="ragged"), False, "moe.dispatch=ragged: accepted is einsum"),
        (dict(dispatch="magic"), False, "moe.dispatch=magic: accepted is one of auto"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(moe, causal, message):
    with pytest.raises(ValueError) as error:
        check(MoESettings(**ROOM | moe), causal)
    assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError):
        make(causal=causal, **moe).init(jax.random.key(0), tokens())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    "router, dispatch",
    [(router, "auto") for router in ROUTERS] + [("top_k", name) for name in ("einsum", "gather", "ragged")],
)
def test_a_bad_token_spoils_its_own_output_and_nothing_else(router, dispatch, bad):
    """Token 3 is not finite, and neither is token 5, which is padding; no loss reads either."""
    layer = make(train=True, router=router, dispatch=dispatch, num_shared=1, **MORE.get(router, {}))
    x_GSD, mask_GS = tokens().at[:, 5].set(0.0), jnp.ones((2, 12), bool).at[:, 5].set(False)
    params = params_of(layer, x_GSD)

    def loss(params, x_GSD):
        y_GSD, aux = layer.apply(params, x_GSD, mask_GS, IDS_GS, rngs={"router": jax.random.key(3)})
        return (y_GSD[:, 6:] ** 2).sum() + (y_GSD[:, :3] ** 2).sum() + aux["loss"], y_GSD

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    grads, y_GSD = gradient(params, x_GSD.at[:, 3, 2].set(bad).at[:, 5].set(bad))
    assert np.isnan(y_GSD[:, 3]).all() and not y_GSD[:, 5].any()
    wanted, wanted_GSD = gradient(params, x_GSD.at[:, 3].set(0.0))
    others = np.delete(np.arange(12), [3, 5])
    np.testing.assert_array_equal(y_GSD[:, others], wanted_GSD[:, others])
    jax.tree.map(np.testing.assert_array_equal, grads, wanted)


def test_auto_says_what_it_takes():
    assert dispatch_name(MoESettings()) == "gather"
    assert dispatch_name(MoESettings(dropless=True)) == "ragged"
    assert dispatch_name(MoESettings(router="soft", decoder_router="switch")) == "einsum"
    assert dispatch_name(MoESettings(router="soft", decoder_router="switch"), causal=True) == "gather"


def transformer_settings(**moe):
    model = dict(d_model=16, d_ff=16, d_kv=8, num_heads=2, num_layers=1, dtype="float32")
    data = dict(batch_size=4, input_length=12, vocab_size=400)
    return from_config(dict(model=model, moe=dict(num_experts=4, every=1, group_size=48) | moe, data=data))


def step(settings, tx, state):
    inputs = jax.random.randint(jax.random.key(0), (4, 12), 1, 400)
    batch = {"inputs": inputs, "targets": inputs[:, :6].at[1, 4:].set(0)}
    return jax.jit(lambda state: train_step.train_step(state, batch, settings, tx))(state)


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_trains_a_transformer(router):
    moe = dict(
        router=router,
        decoder_router="top_k" if router in NOT_CAUSAL else "",
        attention=router == "switch",
        num_shared=1,
    )
    s = transformer_settings(**moe, **MORE.get(router, {}))
    s = dataclasses.replace(s, optimizer=dataclasses.replace(s.optimizer, name="adamw", learning_rate=1e-3))
    tx = optimizers.create(s.optimizer, 10, train_state.axis_names(s), s.moe.bias_rate)
    state, metrics = step(s, tx, jax.jit(lambda: train_state.init_state(s, tx))())
    assert all(np.isfinite(value).all() for value in jax.device_get(metrics).values())
    layers = 4 if router == "switch" else 2  # attention and feed-forward of one block a stack
    assert metrics["layer_expert_load"].shape == (layers, 4)
    if router not in ("hash", "noisy_top_k"):
        assert (metrics["layer_z_loss"] >= 0).all() and float(metrics["z_loss"]) > 0


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_the_bias_of_loss_free_follows_the_load_by_its_rate(name):
    s = transformer_settings(router="loss_free", bias_rate=0.01)
    s = dataclasses.replace(s, optimizer=dataclasses.replace(s.optimizer, name=name, clip_norm=1e-9))
    tx = optimizers.create(s.optimizer, 10, train_state.axis_names(s), s.moe.bias_rate)
    state = jax.jit(lambda: train_state.init_state(s, tx))()
    bias_LE = state.params["encoder"]["blocks"]["block_0"]["moe"]["router_bias"]
    assert bias_LE.shape == (1, 4) and not bias_LE.any()
    state, metrics = step(s, tx, state)
    load_E = np.asarray(metrics["layer_expert_load"])[0]
    moved_E = state.params["encoder"]["blocks"]["block_0"]["moe"]["router_bias"][0]
    np.testing.assert_allclose(moved_E, 0.01 * np.sign(0.25 - load_E), atol=1e-7)


def test_the_rest_of_the_optimizer_is_left_as_it_was():
    """Beside a bias, every other parameter moves as without one."""
    names = {"a": ("embed", "mlp"), "moe": {"router_bias": (None,)}}
    settings = transformer_settings().optimizer
    params = {"a": jnp.ones((3, 4)), "moe": {"router_bias": jnp.zeros(2)}}
    grads = {"a": jnp.arange(12.0).reshape(3, 4), "moe": {"router_bias": jnp.array([2.0, -3.0])}}
    both, alone = (
        optimizers.create(settings, 10, names, 0.1),
        optimizers.create(settings, 10, {"a": names["a"]}),
    )
    got, _ = both.update(grads, both.init(params), params)
    wanted, _ = alone.update({"a": grads["a"]}, alone.init({"a": params["a"]}), {"a": params["a"]})
    np.testing.assert_allclose(got["a"], wanted["a"])
    np.testing.assert_allclose(optax.apply_updates(params, got)["moe"]["router_bias"], [-0.1, 0.1], rtol=1e-6)
