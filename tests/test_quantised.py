"""Kernels as integers: how far they are off, how many bytes they take, and that every back end multiplies by them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchmoe import quantised
from switchmoe.model.moe import MoELayer
from switchmoe.parallel import sharding
from switchmoe.planning import memory
from switchmoe.quantised import Quantised, dequantised, quantise
from switchmoe.settings import ModelSettings, MoESettings, from_config
from switchmoe.training import train_state

KERNEL_EDF = np.random.default_rng(0).standard_normal((3, 16, 10)).astype(np.float32)


@pytest.mark.parametrize("bits, group", [(8, 0), (8, 4), (4, 0), (4, 8), (2, 0), (2, 4)])
def test_no_weight_is_off_by_more_than_half_a_scale(bits, group):
    codes, scale_ENF = quantise(KERNEL_EDF, bits, group)
    assert (codes.shape, scale_ENF.shape) == quantised.shapes(KERNEL_EDF.shape, bits, group)
    assert codes.dtype == np.int8 and codes.nbytes == KERNEL_EDF.size * bits // 8
    scale_EDF = np.repeat(scale_ENF, group or 16, axis=1)
    largest = np.abs(KERNEL_EDF.reshape(3, -1, group or 16, 10)).max(axis=2)
    np.testing.assert_allclose(scale_ENF, largest / (2 ** (bits - 1) - 0.5), rtol=1e-6)
    off = np.abs(np.asarray(dequantised(jnp.asarray(codes), jnp.asarray(scale_ENF), bits)) - KERNEL_EDF)
    assert (off <= scale_EDF / 2 * (1 + 1e-4)).all() and off.max() > scale_EDF.min() / 4


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_what_integers_can_say_comes_back_exactly(bits):
    limit = 2 ** (bits - 1)
    whole = np.random.default_rng(1).integers(1 - limit, limit, (2, 64, 6)).astype(np.float32)
    whole[:, 0] = 0.5 - limit  # of which the scale is 1
    codes, scale = quantise(whole, bits, 0)
    found = np.asarray(dequantised(jnp.asarray(codes), jnp.asarray(scale), bits))
    assert (scale == 1).all()
    np.testing.assert_array_equal(found[:, 1:], whole[:, 1:])


def test_a_byte_holds_two_numbers_of_four_bits():
    """Rows d and d + D / 2: -8 and 7 are bits 1000 and 0111."""
    codes = jnp.array([[[(7 << 4) | 8], [(0b1111 << 4) | 1]]], jnp.uint8).astype(jnp.int8)
    found = dequantised(codes, jnp.ones((1, 1, 1)), 4)
    assert found[0, :, 0].tolist() == [-8, 1, 7, -1]


def test_a_byte_holds_four_numbers_of_two_bits():
    """Rows d, d + D / 4, ...: -2, -1, 0 and 1 are bits 10, 11, 00 and 01; the first row is the lowest."""
    codes = np.array([[[0b01_00_11_10]]], np.uint8).view(np.int8)
    found = dequantised(jnp.asarray(codes), jnp.ones((1, 1, 1)), 2)
    assert found[0, :, 0].tolist() == [-2, -1, 0, 1]
    kernel = np.array([-1.5, -1, 0, 1], np.float32)[None, :, None]  # the scale is 1
    np.testing.assert_array_equal(quantise(kernel, 2, 0)[0], codes)


def test_a_kernel_of_zeros_stays_one():
    codes, scale = quantise(np.zeros((1, 4, 2), np.float32), 8, 0)
    assert not codes.any() and (scale == 1).all()


def test_qwix_finds_the_same_integers():
    qwix = pytest.importorskip("qwix")
    codes, scale = quantise(KERNEL_EDF, 8, 4)
    theirs = qwix.quantize(jnp.asarray(KERNEL_EDF), "int8", channelwise_axes=(0, 2), tiled_axes={1: 4})
    np.testing.assert_allclose(np.asarray(theirs.scale).reshape(scale.shape), scale, rtol=1e-6)
    differ = (
        np.asarray(theirs.qvalue) != codes
    )  # where a group's largest is -127.5 of its scale, which rounds either way
    assert (codes[differ] <= -127).all() and not differ.all()


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
@pytest.mark.parametrize("dispatch", ["einsum", "gather", "ragged"])
@pytest.mark.parametrize("bits, group", [(8, 0), (4, 8)])
def test_every_back_end_gives_what_the_kernels_give_that_the_integers_stand_for(dispatch, bits, group, activation):  # fmt: skip
    model = ModelSettings(d_model=16, d_ff=24, d_kv=4, num_heads=2, dtype="float32", activation=activation)
    moe = MoESettings(num_experts=3, dispatch=dispatch, expert_bits=bits, expert_group=group)
    x_GSD = jnp.asarray(np.random.default_rng(2).standard_normal((2, 8, 16)), jnp.float32)
    whole = MoELayer(model, dataclasses.replace(moe, expert_bits=0))
    params = jax.tree.map(lambda box: box.value, whole.init(jax.random.key(0), x_GSD)["params"], is_leaf=lambda x: hasattr(x, "value"))  # fmt: skip
    small, large = {}, {}
    for name, kernel in params["experts"].items():
        parts = list(map(jnp.asarray, quantise(np.asarray(kernel), bits, group)))
        small |= {name: parts[0], name + quantised.SCALE: parts[1]}
        large[name] = dequantised(*parts, bits)
    y, _ = MoELayer(model, moe).apply({"params": params | {"experts": small}}, x_GSD)
    wanted, _ = whole.apply({"params": params | {"experts": large}}, x_GSD)
    np.testing.assert_allclose(y, wanted, rtol=1e-6, atol=1e-7)
    other, _ = whole.apply({"params": params}, x_GSD)
    assert np.abs(other - y).max() > 1e-5


def test_an_experts_kernel_is_its_part_of_all():
    codes, scale = quantise(KERNEL_EDF, 4, 8)
    kernel = Quantised(jnp.asarray(codes), jnp.asarray(scale), 4, jnp.float32)
    assert kernel.shape == KERNEL_EDF.shape and len(kernel) == 3
    np.testing.assert_array_equal(jnp.stack([kernel[e] for e in range(3)]), jnp.asarray(kernel))


@pytest.mark.parametrize(
    "moe, message",
    [
        (dict(expert_bits=5), "moe.expert_bits=5: accepted is 0, 8 or 4"),
        (dict(expert_bits=4, d_ff=15), "moe.expert_bits=4: accepted is 8 or 0 with kernels of 15 rows"),
        (dict(expert_bits=8, expert_group=5), "moe.expert_group=5: accepted is 0, or a divisor"),
        (dict(expert_bits=8, num_experts=1), "moe.expert_bits=8: accepted is 0 with a dense model"),
    ],
)
def test_settings_that_cannot_be_are_refused(moe, message):
    with pytest.raises(ValueError, match=message):
        from_config({"model": {"d_model": 16}, "moe": moe})


def test_integers_are_not_trained_and_counted_as_the_weights_they_are():
    config = {
        "model": dict(d_model=16, d_ff=16, d_kv=4, num_heads=2, num_layers=2),
        "data": {"vocab_size": 300},
    }
    settings = from_config(config | {"moe": dict(expert_bits=4, expert_group=8, num_experts=4)})
    with pytest.raises(ValueError, match="moe.expert_bits=4: accepted in training is 0"):
        train_state.optimizer(settings)
    whole = from_config(config | {"moe": dict(num_experts=4)})
    assert train_state.parameter_counts(settings) == train_state.parameter_counts(whole)
    parameters, optimizer = memory.state_bytes(settings, dict.fromkeys(sharding.AXES, 1))
    leaves = jax.tree.leaves(train_state.parameter_shapes(settings))
    assert (parameters, optimizer) == (sum(leaf.size * leaf.dtype.itemsize for leaf in leaves), 0)
