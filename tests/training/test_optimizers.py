"""Adafactor sees single matrices; schedules by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from switchmoe.settings import OptimizerSettings
from switchmoe.training import optimizers

NAMES = {
    "experts": ("layers", "expert", "embed", "mlp"),
    "query": ("layers", "embed", "heads", "kv"),
    "scale": ("layers", "embed"),
}
SHAPES = {"experts": (2, 3, 128, 256), "query": (2, 128, 4, 64), "scale": (2, 128)}


def tree(seed):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {name: jax.random.normal(key, SHAPES[name]) for name, key in zip(SHAPES, keys, strict=True)}


def updates(tx, params, *gradients):
    state = tx.init(params)
    for gradient in gradients:
        update, state = jax.jit(tx.update)(gradient, state, params)
    return update


def adafactor(**fields):
    settings = OptimizerSettings(schedule="constant", learning_rate=0.1, **fields)
    return optimizers.create(settings, 10, NAMES)


def test_an_experts_update_does_not_depend_on_the_others():
    params, gradient, last = tree(0), tree(1), tree(2)
    plain = updates(adafactor(), params, gradient, last)["experts"]
    shout = [g | {"experts": g["experts"].at[:, 1].multiply(1e3)} for g in (gradient, last)]
    params = params | {"experts": params["experts"].at[:, 1].multiply(5.0)}
    other = updates(adafactor(), params, *shout)["experts"]
    np.testing.assert_array_equal(plain[:, [0, 2]], other[:, [0, 2]])
    assert float(jnp.abs(plain[:, 1] - other[:, 1]).max()) > 0


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_stacked_matrices_are_updated_as_if_each_stood_alone(momentum):
    """Against optax's own Adafactor on one matrix, heads and their width as one axis."""
    params, gradients = tree(0), (tree(1), tree(2))
    stacked = updates(adafactor(momentum=momentum), params, *gradients)
    alone = optax.adafactor(0.1, decay_rate=0.8, momentum=momentum or None)
    matrix = [t["experts"][1, 2] for t in (params, *gradients)]
    np.testing.assert_allclose(stacked["experts"][1, 2], updates(alone, *matrix), rtol=1e-5, atol=1e-8)
    matrix = [t["query"][1].reshape(128, 256) for t in (params, *gradients)]
    np.testing.assert_allclose(
        stacked["query"][1].reshape(128, 256), updates(alone, *matrix), rtol=1e-5, atol=1e-8
    )


def test_second_moments_are_factored_and_keep_the_expert_axis():
    state = adafactor().init(tree(0))
    sizes = {leaf.shape for leaf in jax.tree.leaves(state)}
    assert (2, 3, 128) in sizes and (2, 3, 256) in sizes
    assert not any(len(shape) > 3 for shape in sizes), "a full second moment is kept"
    assert not any(shape[:1] == (3,) for shape in sizes)


def test_clipping_is_global():
    settings = OptimizerSettings(name="adamw", schedule="constant", learning_rate=1.0, clip_norm=1.0)
    tx, params, gradient = optimizers.create(settings, 10, NAMES), tree(0), tree(1)
    norm = optax.global_norm(gradient)
    # A second gradient that is clipped to length 1, whatever its own: Adam alone would see the difference.
    unit = jax.tree.map(lambda g: g / norm, gradient)
    after = []
    for second in (jax.tree.map(lambda g: 1e6 * g, unit), unit):
        _, state = tx.update(jax.tree.map(lambda g: 0.1 * g, unit), tx.init(params), params)
        after.append(tx.update(second, state, params)[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), *after)


def test_weight_decay_spares_the_norms():
    settings = OptimizerSettings(name="adamw", schedule="constant", learning_rate=0.1, weight_decay=0.5)
    params = tree(0)
    update = updates(optimizers.create(settings, 10, NAMES), params, jax.tree.map(jnp.zeros_like, params))
    np.testing.assert_allclose(update["experts"], -0.05 * params["experts"], rtol=1e-5)
    assert (update["scale"] == 0).all()


@pytest.mark.parametrize(
    "schedule, step, expected",
    [
        ("rsqrt", 0, 0.1),
        ("rsqrt", 100, 0.1),
        ("rsqrt", 400, 0.05),
        ("warmup_rsqrt", 0, 0.001),
        ("warmup_rsqrt", 49, 0.05),
        ("warmup_rsqrt", 400, 0.05),
        ("warmup_cosine", 100, 1.0),
        ("warmup_cosine", 600, 0.5),
        ("warmup_cosine", 1100, 0.0),
        ("constant", 7, 1.0),
    ],
)
def test_schedules(schedule, step, expected):
    settings = OptimizerSettings(schedule=schedule, learning_rate=1.0, warmup_steps=100)
    assert float(optimizers.schedule(settings, 1100)(jnp.array(step))) == pytest.approx(expected, abs=1e-6)
