"""Norm, attention and positions."""

import dataclasses
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchmoe.model.attention import Attention, relative_bucket
from switchmoe.model.layers import FeedForward, RMSNorm, activate, dropout
from switchmoe.model.seen import Seen
from switchmoe.settings import ModelSettings

MODEL = ModelSettings(d_model=16, d_ff=32, d_kv=8, num_heads=2, num_layers=2, dtype="float32", init_scale=1.0)


def test_rms_norm_by_hand_and_in_float32():
    x = jnp.array([[3.0, 4.0]])
    y, _ = RMSNorm().init_with_output(jax.random.key(0), x)
    np.testing.assert_allclose(y, x / np.sqrt(12.5), rtol=1e-5)
    # In bf16 a sum of 1,024 ones stops at 256: the norm would be twice as large.
    y, _ = RMSNorm().init_with_output(jax.random.key(0), jnp.ones((1, 1024), jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), 1.0, rtol=0.01)


def test_bucket_table_bidirectional():
    distance = jnp.array([0, -1, -7, -8, -15, -127, -128, -1000, 1, 7, 8, 1000])
    buckets = relative_bucket(distance, True, 32, 128)
    assert buckets.tolist() == [0, 1, 7, 8, 9, 15, 15, 15, 17, 23, 24, 31]


def test_bucket_table_causal():
    distance = jnp.array([5, 0, -1, -15, -16, -127, -500])
    assert relative_bucket(distance, False, 32, 128).tolist() == [0, 0, 1, 15, 16, 31, 31]


def test_activations():
    up = {"wi": jnp.array([-1.0, 2.0]), "wi_gate": jnp.array([3.0, -1.0])}.__getitem__
    assert activate("relu", up).tolist() == [0.0, 2.0]
    # gelu(3) = 2.9964, gelu(-1) = -0.1588 in the tanh form
    np.testing.assert_allclose(activate("geglu", up), [-2.9964, -0.3176], atol=1e-3)


def test_query_variance_folds_the_logit_scale_in():
    x = jnp.zeros((1, 4, 16))
    params = nn.unbox(Attention(MODEL).init(jax.random.key(0), x, x, Seen(jnp.zeros((1, 1, 4, 4)))))["params"]
    ratio = float(params["key"].std() / params["query"].std())
    assert ratio == pytest.approx(8**0.5, rel=0.25)


def test_masked_keys_have_no_influence():
    key = jax.random.key(0)
    x, kv = jax.random.normal(key, (1, 3, 16)), jax.random.normal(key, (1, 5, 16))
    seen = Seen(jnp.where(jnp.arange(5) < 3, 0.0, -1e9)[None, None, None, :])
    params = Attention(MODEL).init(key, x, kv, seen)
    changed = kv.at[:, 3:].set(7.0)
    same = [Attention(MODEL).apply(params, x, k, seen)[0] for k in (kv, changed)]
    np.testing.assert_array_equal(*same)


def test_no_biases_anywhere():
    x = jnp.zeros((1, 4, 16))
    attention = Attention(MODEL).init(jax.random.key(0), x, x, Seen(jnp.zeros((1, 1, 4, 4))))
    feed_forward = FeedForward(MODEL).init(jax.random.key(0), x)
    assert not any("bias" in name for tree in (attention, feed_forward) for name in tree["params"])
    assert (FeedForward(MODEL).apply(feed_forward, x) == 0).all()


@pytest.mark.parametrize("shared", [False, True])
def test_a_shared_mask_is_one_for_all_tokens_of_a_row(shared):
    model = dataclasses.replace(MODEL, dropout_rate=0.25, shared_dropout=shared)
    x_BLD = jnp.ones((6, 5, 400))
    y_BLD = dropout(model, train=True).apply({}, x_BLD, rngs={"dropout": jax.random.key(0)})
    assert jnp.unique(y_BLD).tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert float(y_BLD.mean()) == pytest.approx(1.0, abs=0.05)
    assert bool((y_BLD == y_BLD[:, :1]).all()) == shared
    assert bool((y_BLD[0] != y_BLD[1]).any())
    assert dropout(model, train=False).apply({}, x_BLD) is x_BLD


def drawn(program):
    """Sizes of what a program draws at random."""
    return [
        math.prod(map(int, re.findall(r"\d+", shape))) for shape in re.findall(r"shape=\(([^)]*)\)", program)
    ]


@pytest.mark.parametrize("kv_heads", [0, 1])
def test_attention_with_a_shared_mask_drops_keys_for_all_queries(kv_heads):
    """Its mean is attention without dropout. Nothing is drawn for a pair of tokens."""
    model = dataclasses.replace(MODEL, dropout_rate=0.5, shared_dropout=True, num_kv_heads=kv_heads)
    B, L = 3, 7
    seen = Seen(jnp.zeros((1, 1, 1, L)))
    x_BLD = jax.random.normal(jax.random.key(1), (B, L, 16))
    variables = Attention(model).init(jax.random.key(0), x_BLD, x_BLD, seen)
    rngs = {"dropout": jax.random.key(2)}
    apply = lambda x: Attention(model, train=True).apply(variables, x, x, seen, rngs=rngs)[0]  # noqa: E731
    sizes = drawn(str(jax.make_jaxpr(apply)(x_BLD)))
    assert sizes and max(sizes) <= B * L * model.num_heads
    total = sum(
        Attention(model, train=True).apply(
            variables, x_BLD, x_BLD, seen, rngs={"dropout": jax.random.key(n)}
        )[0]
        for n in range(400)
    )
    whole, _ = Attention(model).apply(variables, x_BLD, x_BLD, seen)
    assert float(jnp.abs(total / 400 - whole).mean()) < 0.1 * float(jnp.abs(whole).mean())
    constant = jnp.ones(
        (B, L, 16)
    )  # all weights equal: with a mask for all queries each of them reads the same
    y_BLD = apply(constant)
    np.testing.assert_allclose(y_BLD, jnp.broadcast_to(y_BLD[:, :1], y_BLD.shape), rtol=1e-5, atol=1e-6)
    own = dataclasses.replace(model, shared_dropout=False)
    y_BLD, _ = Attention(own, train=True).apply(variables, constant, constant, seen, rngs=rngs)
    assert float(jnp.abs(y_BLD - y_BLD[:, :1]).max()) > 0.1
