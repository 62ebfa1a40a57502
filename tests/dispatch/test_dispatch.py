"""Dispatchers: output and gradients of every back end equal a plain loop over experts."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchmoe.dispatch import grouped
from switchmoe.dispatch.dispatchers import DISPATCHERS
from switchmoe.routing import ROUTERS, RouterSettings, Routing, switch

BACK_ENDS = sorted(DISPATCHERS)
REFUSED = [("soft", "gather"), ("soft", "ragged")]


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


def outputs_and_gradients(function, arguments, weight_GSD):
    def score(*arguments):
        y_GSD = function(*arguments)
        return (y_GSD.astype(jnp.float64) * weight_GSD).sum(), y_GSD

    (_, y_GSD), gradients = jax.jit(jax.value_and_grad(score, (0, 1, 2), has_aux=True))(*arguments)
    return jax.device_get((y_GSD, *gradients))


def compare(back_end, routing, loop, dtype=jnp.float32, rtol=1e-5, atol=1e-6):
    """Output and gradients (kernels, tokens, gates) of the back end and of a plain loop in float64."""
    rng = np.random.default_rng(1)
    x_GSD = jnp.array(rng.normal(size=(*routing.expert_SK.shape[:2], 5)), dtype)
    w_EDD = jnp.array(rng.normal(size=(routing.num_experts, 5, 5)), dtype)
    weight_GSD = jnp.array(rng.normal(size=x_GSD.shape))
    arguments = (w_EDD, x_GSD, routing.gate_SK)
    got = outputs_and_gradients(lambda *a: through(back_end, routing, *a), arguments, weight_GSD)
    wanted = outputs_and_gradients(lambda *a: loop(routing, *a), arguments, weight_GSD)
    assert got[0].dtype == dtype and got[1].dtype == dtype
    kept = np.asarray(routing.kept_SK)
    for index, (a, b) in enumerate(zip(got, wanted, strict=True)):
        if index == 3:  # a choice that found no slot has no output: its gate has no gradient either
            assert routing.mix_SK is not None or not a[~kept].any()
            a, b = a[kept], b[kept]
        a, b = a.astype(np.float64), b.astype(np.float64)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol * max(1.0, np.abs(b).max(initial=0)))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_outputs_and_gradients_equal_a_loop(back_end, case):
    with jax.enable_x64(True):
        compare(back_end, choices(0, **CASES[case]), by_loop)


def routed(router):
    """A router's own Routing of 2 groups of 8 tokens, padding and drops included."""
    width = {"noisy_top_k": 8, "hierarchical": 6, "loss_free": 8}.get(router, 4)
    count = {"switch": 1, "hash": 1, "hierarchical": 4, "soft": 1}.get(router, 2)
    rng = np.random.default_rng(0)
    scores = jnp.array(rng.normal(size=(2, 8, width)), jnp.float32)
    if router == "hash":
        scores = jnp.array(rng.integers(0, 99, (2, 8)), jnp.int32)
    mask = jnp.array(rng.random((2, 8)) < 0.85)
    settings = RouterSettings(1 if router == "soft" else 3, count, num_experts=4, branches=2)
    return jax.vmap(lambda x, m: ROUTERS[router](x, m, None, settings))(scores, mask)


def soft_loop(routing, w_EDD, x_GSD, gate_GSK):
    """Each slot (one an expert) by itself, in float64."""
    w, x, gate, mix = (jnp.asarray(a, jnp.float64) for a in (w_EDD, x_GSD, gate_GSK, routing.mix_SK))
    y = jnp.zeros_like(x)
    for e in range(routing.num_experts):
        slot_GD = (mix[:, :, e, None] * x).sum(axis=1)
        y += gate[:, :, e, None] * jnp.tanh(slot_GD @ w[e])[:, None]
    return y


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "router, back_end",
    [(router, back_end) for router in ROUTERS for back_end in BACK_ENDS if (router, back_end) not in REFUSED],
)
def test_every_router_through_every_back_end(router, back_end, dtype):
    with jax.enable_x64(True):
        routing = routed(router)
        assert routing.kept_SK.any()
        loop = soft_loop if router == "soft" else by_loop
        tolerance = (1e-5, 1e-6) if dtype == jnp.float32 else (0.05, 0.05)
        compare(back_end, routing, loop, dtype, *tolerance)


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


@pytest.mark.parametrize("at", [(0, 0), (1, 5)])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("back_end", DISPATCHERS)
def test_a_bad_row_reaches_the_tokens_it_is_of_and_no_other(back_end, bad, at):
    """Of a token: its slots; of a slot: its token, whose other choice is finite."""
    routing = choices(6, groups=2, tokens=8, experts=3, capacity=3, per_token=2)
    dispatcher = DISPATCHERS[back_end](routing)
    clean = jnp.full((2, 8, 4), 2.0)
    x_GSD = clean.at[at].set(bad)
    rows, wanted = dispatcher.dispatch(x_GSD), dispatcher.dispatch(clean)
    mine = ~jnp.isfinite(rows).all(axis=-1)
    assert mine.sum() == routing.kept_SK[at].sum() > 0
    np.testing.assert_array_equal(rows[~mine], wanted[~mine])
    one = jnp.argmax(mine.reshape(-1))
    broken = wanted.reshape(-1, 4).at[one].set(bad).reshape(wanted.shape)
    y_GSD = dispatcher.combine(broken)
    assert not jnp.isfinite(y_GSD[at]).any()
    others = jnp.ones((2, 8), bool).at[at].set(False)
    np.testing.assert_array_equal(y_GSD[others], dispatcher.combine(wanted)[others])


def test_the_einsum_back_end_reads_its_masks_once_each_way():
    """Bytes accessed, of a CPU's program, against those of the two products alone."""
    routing = choices(0, groups=1, tokens=256, experts=8, capacity=40)
    dispatcher = DISPATCHERS["einsum"](routing)

    def guarded(dispatcher, x_GSD):
        return dispatcher.combine(jnp.tanh(dispatcher.dispatch(x_GSD)))

    def bare(dispatcher, x_GSD):
        y_EGCD = jnp.tanh(jnp.einsum("GSEC,GSD->EGCD", dispatcher.slot_GSEC, x_GSD))
        return jnp.einsum("GSEC,EGCD->GSD", dispatcher.gate_GSEC, y_EGCD)

    x_GSD = jax.random.normal(jax.random.key(0), (1, 256, 64))
    found, wanted = (jax.jit(function).lower(dispatcher, x_GSD).compile() for function in (guarded, bare))
    assert found.cost_analysis()["bytes accessed"] < 1.4 * wanted.cost_analysis()["bytes accessed"]
    np.testing.assert_allclose(found(dispatcher, x_GSD), wanted(dispatcher, x_GSD), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("back_end", DISPATCHERS)
def test_a_bad_token_that_no_loss_reads_adds_nothing_to_kernels_and_gates(back_end, bad):
    routing = choices(6, groups=2, tokens=8, experts=3, capacity=2, per_token=2)
    w_EDD = jax.random.normal(jax.random.key(0), (3, 4, 4))
    clean = jnp.ones((2, 8), bool).at[0, 0].set(False)

    def gradients(x_GSD):
        def score(w_EDD, gate_GSK):
            return through(back_end, routing, w_EDD, x_GSD, gate_GSK)[clean].sum()

        return jax.grad(score, (0, 1))(w_EDD, routing.gate_SK)

    x_GSD = jax.random.normal(jax.random.key(1), (2, 8, 4))
    assert routing.kept_SK[0, 0].any()
    found, wanted = gradients(x_GSD.at[0, 0].set(bad)), gradients(x_GSD)
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-5, atol=1e-6)


def grouped_products():
    """Each library's grouped product by its name, as a CPU, a GPU and a TPU would call it."""
    return {"blocked": grouped.blocked_matmul, "ragged_dot": grouped._library_matmul}


@pytest.mark.parametrize("bad", [jnp.inf, jnp.nan])
@pytest.mark.parametrize("name", grouped_products())
def test_rows_that_belong_to_nobody_add_nothing_to_kernels(name, bad):
    product, kernel_EDF = grouped_products()[name], jnp.ones((2, 4, 5))

    def score(kernel_EDF, x_ND, sizes, read):
        return product(x_ND, kernel_EDF, jnp.array(sizes))[:read].sum()

    x_ND = jnp.ones((6, 4)).at[4].set(bad)
    gradient = jax.jit(jax.grad(score), static_argnums=(2, 3))
    for sizes, read, wanted in (
        ((3, 3), 3, (3.0, 0.0)),  # a row of expert 1 on which nothing depends
        ((3, 3), 4, (3.0, 1.0)),
        ((4, 0), 4, (4.0, 0.0)),  # a row of no expert
        ((0, 4), 4, (0.0, 4.0)),
        ((0, 0), 6, (0.0, 0.0)),
    ):
        wanted_EDF = jnp.broadcast_to(jnp.array(wanted)[:, None, None], kernel_EDF.shape)
        np.testing.assert_array_equal(gradient(kernel_EDF, x_ND, sizes, read), wanted_EDF)


def test_gather_has_no_scatter_of_rows_in_its_gradient():
    """The transpose of each move is a gather (the only scatter is that of the int32 indices)."""
    routing = choices(7, groups=2, tokens=8, experts=3, capacity=2)
    w_EDD, x_GSD = jnp.ones((3, 4, 4)), jnp.ones((2, 8, 4))
    grad = jax.grad(lambda w, x: through("gather", routing, w, x, routing.gate_SK).sum(), argnums=(0, 1))
    made_by_scatter = re.findall(r"(\w+)\[[\d,]*\] = scatter", str(jax.make_jaxpr(grad)(w_EDD, x_GSD)))
    assert made_by_scatter == ["i32"]


@pytest.mark.parametrize("library", ["jax", "tokamax"])
def test_the_grouped_product_of_an_accelerator(monkeypatch, library):
    """What a GPU or TPU would call, on a CPU: an expert without rows, sizes no tile divides, rows of no expert."""
    if library == "tokamax":
        pytest.importorskip("tokamax")
    monkeypatch.setattr(grouped.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(
        grouped.importlib.util, "find_spec", lambda name: library if name == library == "tokamax" else None
    )
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((40, 16), (4, 16, 24), (33, 24))
    x_ND, kernel_EDF, d_NF = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    sizes_E = jnp.array([8, 0, 20, 5])
    owner_N = np.repeat(np.arange(4), np.array(sizes_E))

    def loop(x_ND, kernel_EDF):
        return jnp.einsum("ND,NDF->NF", x_ND[:33], kernel_EDF[owner_N], precision="highest")

    def product(x_ND, kernel_EDF):
        return grouped.grouped_matmul(x_ND, kernel_EDF, sizes_E)[:33]

    (found, back), (wanted, back_wanted) = (jax.vjp(f, x_ND, kernel_EDF) for f in (product, loop))
    for a, b in zip((found, *back(d_NF)), (wanted, *back_wanted(d_NF)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.05)])
@pytest.mark.parametrize(
    "sizes", [[1, 0, 0], [0, 5, 2], [3, 3, 3], [0, 0, 0], [4, 17, 2], [0, 40, 16], [40, 0, 30]]
)
def test_products_apart_are_each_experts_own(sizes, dtype, tolerance):
    """Whatever the number of rows; those at the end belong to none."""
    rng, rows = np.random.default_rng(0), max(1, sum(sizes))
    x_ND = jnp.asarray(rng.normal(size=(rows, 8)), dtype)
    kernel_EDF = jnp.asarray(rng.normal(size=(3, 8, 6)), dtype)
    y_NF = jax.jit(grouped.apart_matmul)(x_ND, kernel_EDF, jnp.array(sizes))
    assert y_NF.shape == (rows, 6) and y_NF.dtype == x_ND.dtype
    expert_N = np.repeat(np.arange(3), sizes)
    wanted = [np.float32(x_ND[n]) @ np.float32(kernel_EDF[e]) for n, e in enumerate(expert_N)]
    np.testing.assert_allclose(
        np.float32(y_NF[: len(expert_N)]), np.reshape(wanted, (-1, 6)), atol=tolerance * 8
    )
