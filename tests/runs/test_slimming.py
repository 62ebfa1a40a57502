"""Fewer experts: which are kept, which are merged, how units are matched, and what becomes of the router."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchmoe.model.moe import MoELayer
from switchmoe.runs import slimming
from switchmoe.runs.slimming import Slimming
from switchmoe.settings import ModelSettings, MoESettings, from_config

D, F = 8, 12
RNG = np.random.default_rng(0)


def experts(count, gated=True):
    names = {"wi": (D, F), "wo": (F, D)} | ({"wi_gate": (D, F)} if gated else {})
    return {name: RNG.standard_normal((count, *shape)).astype(np.float32) for name, shape in names.items()}


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("align", ["hungarian", "greedy"])
def test_units_in_another_order_are_found_again(align, gated):
    kernels = experts(1, gated)
    order_F = RNG.permutation(F)
    mixed = {name: slimming.reordered(name, kernel[0], order_F)[None] for name, kernel in kernels.items()}
    both = {name: np.concatenate([kernels[name], mixed[name]]) for name in kernels}
    found = slimming.matching(slimming.one(both, 0), slimming.one(both, 1), align)
    np.testing.assert_array_equal(order_F[found], np.arange(F))
    merged = slimming.slim_experts(both, [np.array([0, 1])], np.array([0.25, 0.75]), align)
    for name in kernels:
        np.testing.assert_array_equal(merged[name], kernels[name])
    apart = slimming.slim_experts(both, [np.array([0, 1])], np.array([0.25, 0.75]), "none")
    assert np.abs(apart["wi"] - kernels["wi"]).max() > 0.1


def test_hungarian_is_the_best_of_all_orders_and_greedy_is_not():
    """Likenesses 3 2 / 2 0: greedy takes 3 and 0, the best sum is 2 and 2."""
    expert = {"wi": np.eye(2), "wo": np.zeros((2, 2))}
    other = {"wi": np.array([[3.0, 2.0], [2.0, 0.0]]), "wo": np.zeros((2, 2))}
    assert slimming.matching(expert, other, "hungarian").tolist() == [1, 0]
    assert slimming.matching(expert, other, "greedy").tolist() == [0, 1]
    assert slimming.matching(expert, other, "none") is None


def test_greedy_takes_the_largest_that_is_left():
    like_FF = RNG.standard_normal((30, 30))
    wanted, left = np.zeros(30, int), like_FF.copy()
    for _ in range(30):
        row, column = np.unravel_index(left.argmax(), left.shape)
        wanted[row], left[row], left[:, column] = column, -np.inf, -np.inf
    np.testing.assert_array_equal(slimming._greedy(like_FF), wanted)


def test_the_most_used_are_kept_and_the_others_join_the_likest():
    moe, use_E = MoESettings(num_experts=4), np.array([0.1, 0.4, 0.1, 0.4])
    router_DR = np.array([[1.0, 0.9, 0.0, 0.0], [0.1, 0.0, 5.0, 0.2]])
    found = slimming.grouped(use_E, router_DR, moe, "switch", Slimming(2, "merge"))
    assert [members.tolist() for members in found] == [[1, 0], [3, 2]]
    found = slimming.grouped(use_E, router_DR, moe, "switch", Slimming(3, "use"))
    assert [members.tolist() for members in found] == [[0], [1], [3]]


@pytest.mark.parametrize(
    "router, moe, there, kept",
    [
        ("switch", {}, [[0], [1], [2]], [2]),
        ("noisy_top_k", {"choices": 2}, [[0, 3], [1, 4], [2, 5]], [2, 5]),
        ("soft", {"slots": 2}, [[0, 1], [2, 3], [4, 5]], [4, 5]),
    ],
)
def test_an_experts_columns(router, moe, there, kept):
    moe = MoESettings(num_experts=3, router=router, **moe)
    assert slimming.columns(moe, router).tolist() == there
    new = slimming.columns(MoESettings(num_experts=2, router=router, slots=moe.slots), router)
    kernel = np.arange(len(there[0]) * 3)[None].astype(np.float32)
    groups = [np.array([0]), np.array([2])]
    found = slimming.slim_router(kernel, np.array(there), new, groups, np.ones(3))
    assert found[0, new[1]].tolist() == kept and found[0, new[0]].tolist() == there[0]


def test_a_merged_column_is_the_mean_by_use():
    kernel = np.array([[1.0, 5.0, 7.0]], np.float32)
    place, groups = np.arange(3)[:, None], [np.array([0, 1]), np.array([2])]
    assert slimming.slim_router(kernel, place, place[:2], groups, np.array([3, 1, 0])).tolist() == [[2, 7]]
    assert slimming.slim_router(kernel, place, place[:2], groups, np.zeros(3)).tolist() == [[3, 7]]


def test_experts_that_are_the_same_are_merged_without_a_trace():
    model = ModelSettings(d_model=D, d_ff=F, d_kv=4, num_heads=2, dtype="float32", activation="swiglu")
    settings = dict(unit_gates=True, eval_capacity_factor=8.0)
    x_GSD = jnp.asarray(RNG.standard_normal((2, 6, D)), jnp.float32)
    half, router_DR = experts(2), RNG.standard_normal((D, 2)).astype(np.float32)
    order = [0, 1, 0, 1]
    twice = {name: kernel[order] for name, kernel in half.items()}
    moe, use_E = MoESettings(num_experts=4, **settings), np.array([0.4, 0.3, 0.2, 0.1])
    there = {"router": router_DR[:, order], "experts": twice}
    groups = slimming.grouped(use_E, there["router"], moe, "switch", Slimming(2, "merge"))
    assert [members.tolist() for members in groups] == [[0, 2], [1, 3]]
    place = np.arange(4)[:, None]
    slim = {
        "router": slimming.slim_router(there["router"], place, place[:2], groups, use_E),
        "experts": slimming.slim_experts(twice, groups, use_E, "hungarian"),
    }
    y, _ = MoELayer(model, moe).apply({"params": there}, x_GSD)
    found, _ = MoELayer(model, MoESettings(num_experts=2, **settings)).apply({"params": slim}, x_GSD)
    np.testing.assert_allclose(found, y, rtol=1e-6, atol=1e-6)
    assert jax.tree.map(np.shape, slim["experts"]) == jax.tree.map(np.shape, half)


@pytest.mark.parametrize(
    "moe, how, message",
    [
        ({}, dict(experts=5), "--experts=5: accepted is an integer from 1 to the model's 4"),
        (
            dict(router="top_k", choices=2),
            dict(experts=1),
            "--experts=1: as settings of a run: moe.choices=2",
        ),
        (dict(router="hash"), dict(experts=2), "--experts=2: accepted with the router hash is 0"),
        (dict(num_experts=1), dict(experts=1), "--source: it is dense; accepted is a model with experts"),
        (dict(expert_bits=8), dict(experts=2), "--source: its experts are integers of 8 bits"),
        ({}, dict(bits=8, group=7), "--bits=8: as settings of a run: moe.expert_group=7"),
        ({}, dict(experts=2, by="chance"), "--by=chance: accepted is one of use, merge, task"),
        ({}, dict(experts=2, align="x"), "--align=x: accepted is one of hungarian, greedy, none"),
        ({}, dict(bits=3), "--bits=3: accepted is 8 or 4"),
    ],
)
def test_what_cannot_be_is_refused(moe, how, message):
    source = from_config({"model": dict(d_model=8, d_ff=16, num_layers=2), "moe": dict(num_experts=4) | moe})
    with pytest.raises(ValueError, match=message) as error:
        slimming.settings_of(source, Slimming(**how), 1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("width, group", [(64, 32), (24, 8), (18, 0)])
def test_scales_are_never_larger_than_their_integers(width, group):
    source = from_config({"model": dict(d_model=64, d_ff=width, num_layers=2), "moe": dict(num_experts=4)})
    assert slimming.settings_of(source, Slimming(bits=4), 1).moe.expert_group == group
