"""The MoE layer: precision, gradients, jitter, initialisation, groups, and padding."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchmoe.dispatch.dispatchers import einsum_dispatcher
from switchmoe.model.moe import Experts, MoELayer
from switchmoe.model.moe_rules import group_shape
from switchmoe.routing import RouterSettings, expert_capacity, switch
from switchmoe.settings import ModelSettings, MoESettings

MODEL = ModelSettings(d_model=16, d_ff=32, d_kv=4, num_heads=4, num_layers=2, dtype="float32", init_scale=1.0)
MOE = MoESettings(num_experts=4, capacity_factor=4.0, eval_capacity_factor=4.0, jitter=0.0)


def layer(train=False, model=MODEL, **moe):
    return MoELayer(model, dataclasses.replace(MOE, **moe), train)


def tokens(seed=0, groups=2, size=12, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), (groups, size, 16), dtype)


def variables(module, x_GSD):
    return nn.unbox(module.init({"params": jax.random.key(1), "router": jax.random.key(2)}, x_GSD))


def by_hand(params, x_GSD):
    """Every expert for every token, with room for all: gate * expert(x)."""
    prob_GSE = jax.nn.softmax(x_GSD @ params["router"])
    wi, gate, wo = (params["experts"][name] for name in ("wi", "wi_gate", "wo"))
    h = jax.nn.gelu(jnp.einsum("GSD,EDF->GSEF", x_GSD, gate)) * jnp.einsum("GSD,EDF->GSEF", x_GSD, wi)
    y_GSED = jnp.einsum("GSEF,EFD->GSED", h, wo)
    best_GS = prob_GSE.argmax(-1)
    y_GSD = jnp.take_along_axis(y_GSED, best_GS[..., None, None], axis=2)[:, :, 0]
    return y_GSD * prob_GSE.max(-1)[..., None]


@pytest.mark.parametrize("dispatch", ["einsum", "gather", "ragged", "auto"])
def test_equals_every_expert_for_every_token(dispatch):
    module, x_GSD = layer(dispatch=dispatch), tokens()
    params = variables(module, x_GSD)
    y_GSD, _ = jax.jit(module.apply)(params, x_GSD)
    np.testing.assert_allclose(y_GSD, by_hand(params["params"], x_GSD), rtol=1e-4, atol=1e-5)


def test_runs_alone_and_its_aux_is_documented():
    module, x_GSD = layer(), tokens()
    y_GSD, aux = module.apply(variables(module, x_GSD), x_GSD, jnp.ones((2, 12), bool))
    assert y_GSD.shape == x_GSD.shape
    scalars = {"loss", "balance_loss", "z_loss", "fraction_dropped", "router_entropy"}
    assert {name: value.shape for name, value in aux.items()} == dict.fromkeys(scalars, ()) | {
        "expert_load": (4,)
    }
    wanted = MOE.balance_loss_weight * aux["balance_loss"] + MOE.z_loss_weight * aux["z_loss"]
    assert aux["loss"] == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.parametrize("experts", [2, 8, 128])
def test_fan_in_does_not_count_experts(experts):
    """Stacked kernels keep the standard deviation of one expert, and experts differ."""
    model = dataclasses.replace(MODEL, d_model=128, d_ff=64)
    module = Experts(model, dataclasses.replace(MOE, num_experts=experts))
    rows, matmul = jnp.zeros((experts, 1, 1, 128)), functools.partial(jnp.einsum, "EGCD,EDF->EGCF")
    params = nn.unbox(module.init(jax.random.key(0), rows, matmul))["params"]
    assert float(params["wi"].std()) == pytest.approx(128**-0.5, rel=0.05)
    assert float(params["wo"].std()) == pytest.approx(64**-0.5, rel=0.05)
    assert float(jnp.abs(params["wi"][0] - params["wi"][1]).max()) > 0.01


def test_init_scale_is_the_variances():
    narrow = dataclasses.replace(MODEL, init_scale=0.1)
    x_GSD = tokens()
    wide_std, narrow_std = (
        float(variables(layer(model=model), x_GSD)["params"]["experts"]["wi"].std())
        for model in (MODEL, narrow)
    )
    assert narrow_std / wide_std == pytest.approx(0.1**0.5, rel=1e-3)


def test_router_is_float32_in_a_bf16_model():
    """Logits, softmax and losses come from float32 products: equal to those of the float32 model."""
    model = dataclasses.replace(MODEL, dtype="bfloat16")
    x_GSD = tokens(dtype=jnp.bfloat16)
    params = variables(layer(model=model), x_GSD)
    y_GSD, aux = layer(model=model).apply(params, x_GSD)
    _, wanted = layer().apply(params, x_GSD.astype(jnp.float32))
    assert y_GSD.dtype == jnp.bfloat16
    assert all(value.dtype == jnp.float32 for value in aux.values())
    jax.tree.map(np.testing.assert_array_equal, aux, wanted)
    text = str(jax.make_jaxpr(lambda x: layer(model=model).apply(params, x))(x_GSD))
    assert "f32[2,12,4] = dot_general" in text, "the router's product is not float32"


def test_without_selective_precision_the_router_is_bfloat16_and_still_learns():
    """Its losses are those of float32 to bfloat16's three digits, and not the same; the gates' gradient reaches it."""
    model = dataclasses.replace(MODEL, dtype="bfloat16")
    x_GSD = tokens(size=64, dtype=jnp.bfloat16)
    params = variables(layer(model=model), x_GSD)
    module = layer(model=model, router_dtype="bfloat16")
    _, aux = jax.jit(module.apply)(params, x_GSD)
    _, exact = jax.jit(layer(model=model).apply)(params, x_GSD)
    assert aux["router_entropy"] != exact["router_entropy"]
    assert float(aux["balance_loss"]) == pytest.approx(float(exact["balance_loss"]), rel=0.02)
    text = str(jax.make_jaxpr(lambda x: module.apply(params, x))(x_GSD))
    assert "bf16[2,64,4] = dot_general" in text and "f32[2,64,4] = dot_general" not in text
    gradient = jax.grad(lambda params: (module.apply(params, x_GSD)[0].astype(jnp.float32) ** 2).sum())
    assert float(jnp.abs(jax.jit(gradient)(params)["params"]["router"]).max()) > 1e-3


def test_task_loss_alone_gives_the_router_a_gradient():
    module, x_GSD = layer(), tokens()
    params = variables(module, x_GSD)

    def task_loss(params):
        return (module.apply(params, x_GSD)[0] ** 2).sum()

    assert float(jnp.abs(jax.grad(task_loss)(params)["params"]["router"]).max()) > 1e-3


def test_jitter_changes_routing_only_and_in_training_only():
    x_GSD = tokens(size=64)
    params = variables(layer(), x_GSD)
    plain_y, plain = layer(train=True).apply(params, x_GSD, rngs={"router": jax.random.key(3)})
    noisy_y, noisy = layer(train=True, jitter=0.5).apply(params, x_GSD, rngs={"router": jax.random.key(3)})
    assert float(jnp.abs(noisy["router_entropy"] - plain["router_entropy"])) > 0
    # Where the choice is the same, the expert saw the same input: outputs differ by the gate alone.
    ratio_GSD = noisy_y / plain_y
    spread_GS = jnp.abs(ratio_GSD - ratio_GSD[..., :1]).max(-1)
    assert float((spread_GS < 1e-3).mean()) > 0.5
    eval_y, evaluated = layer(jitter=0.5).apply(params, x_GSD)
    np.testing.assert_array_equal(eval_y, layer().apply(params, x_GSD)[0])
    jax.tree.map(np.testing.assert_array_equal, evaluated, layer().apply(params, x_GSD)[1])


def test_jitter_is_multiplicative_on_the_input():
    """A zero input stays zero, whatever the jitter: its logits are 0 and its entropy ln E."""
    x_GSD = jnp.zeros((1, 6, 16))
    module = layer(train=True, jitter=0.9)
    _, aux = module.apply(variables(module, x_GSD), x_GSD, rngs={"router": jax.random.key(0)})
    assert aux["router_entropy"] == pytest.approx(np.log(4), rel=1e-6)


def test_first_step_load_is_spread():
    """A random router, not a zero one: no expert has nearly all of the first batch."""
    x_GSD = tokens(groups=1, size=512)
    _, aux = layer().apply(variables(layer(), x_GSD), x_GSD)
    assert float(aux["expert_load"].max()) < 0.6
    assert float(aux["expert_load"].min()) > 0.02


def test_padding_gives_zero_and_changes_no_loss():
    x_GSD = tokens()
    params = variables(layer(), x_GSD)
    alone_y, alone = layer().apply(params, x_GSD)
    padded_GSD = jnp.concatenate([x_GSD, 100 * jnp.ones((2, 12, 16))], axis=1)
    mask_GS = jnp.arange(24)[None, :] < jnp.full((2, 1), 12)
    padded_y, padded = layer().apply(params, padded_GSD, mask_GS)
    np.testing.assert_allclose(padded_y[:, :12], alone_y, rtol=1e-5, atol=1e-6)
    assert (padded_y[:, 12:] == 0).all()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), padded, alone)


def test_groups_are_weighted_by_their_real_tokens():
    x_GSD = tokens()
    params = variables(layer(), x_GSD)
    _, first = layer().apply(params, x_GSD[:1])
    mask_GS = jnp.stack([jnp.ones(12, bool), jnp.zeros(12, bool)])
    _, both = layer().apply(params, x_GSD, mask_GS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), both, first)


def test_expert_dropout_acts_inside_the_experts_only():
    x_GSD = tokens()
    module = layer(train=True, expert_dropout_rate=0.5)
    params = variables(layer(), x_GSD)
    rngs = {"dropout": jax.random.key(1)}
    dropped, aux = module.apply(params, x_GSD, rngs=rngs)
    plain, wanted = layer(train=True).apply(params, x_GSD, rngs=rngs)
    assert float(jnp.abs(dropped - plain).max()) > 1e-3
    jax.tree.map(np.testing.assert_array_equal, aux, wanted)


@pytest.mark.parametrize(
    "batch, length, group_size, expected",
    [
        (8, 128, 1024, (1, 1024)),
        (8, 128, 512, (2, 512)),
        (8, 128, 600, (2, 512)),  # whole sequences, as many as fit and divide the batch
        (6, 100, 450, (2, 300)),  # 4 would fit, but 3 divides 6
        (8, 128, 100, (16, 64)),  # less than a sequence: equal parts
        (3, 57, 0, (3, 57)),
        (1, 7, 5, (7, 1)),
    ],
)
def test_group_table(batch, length, group_size, expected):
    assert group_shape(batch, length, group_size) == expected


def test_512_experts_on_few_tokens():
    module = layer(num_experts=512, capacity_factor=1.25, eval_capacity_factor=1.25)
    x_GSD = tokens(groups=1, size=64)
    y_GSD, aux = module.apply(variables(module, x_GSD), x_GSD)
    assert jnp.isfinite(y_GSD).all()
    assert aux["expert_load"].shape == (512,)


@pytest.mark.parametrize("experts", [2, 8, 32])
def test_mask_memory_does_not_depend_on_the_number_of_experts(experts):
    """Einsum masks: factor * S**2 numbers a group, with the capacity rounded up."""
    settings = RouterSettings(capacity=expert_capacity(64, experts, 1.25))
    scores_GSE, mask_GS = jnp.zeros((1, 64, experts)), jnp.ones((1, 64), bool)
    routing = jax.vmap(lambda scores_SE, mask_S: switch(scores_SE, mask_S, None, settings))(
        scores_GSE, mask_GS
    )
    assert einsum_dispatcher(routing).slot_GSEC.size == pytest.approx(1.25 * 64**2, rel=0.25)
