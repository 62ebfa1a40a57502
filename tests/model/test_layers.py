"""Norm, attention and positions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchmoe.model.attention import Attention, relative_bucket
from switchmoe.model.layers import FeedForward, RMSNorm, activate
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
