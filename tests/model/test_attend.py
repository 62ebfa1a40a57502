"""Softmax attention: every form, and its gradient, is a plain loop's; cuDNN's terms are the mask's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchmoe.model import attend
from switchmoe.model.attention import rotate
from switchmoe.model.seen import MASKED, Seen
from switchmoe.model.transformer import Transformer
from switchmoe.settings import from_config


def parts(queries=5, keys=7, heads=4, kv_heads=4, batch=3, width=8):
    key = iter(jax.random.split(jax.random.key(0), 4))
    shapes = (batch, queries, heads, width), (batch, keys, kv_heads, width), (batch, keys, kv_heads, width)
    return [jax.random.normal(next(key), shape) for shape in shapes]


def seen(kind, queries=5, keys=7, heads=4, batch=3):
    bias = jax.random.normal(jax.random.key(9), (heads, queries, keys))
    ahead = jnp.arange(keys)[None, :] > jnp.arange(queries)[:, None]
    keys_B = jnp.array([7, 4, 1])[:batch]
    padded = (jnp.arange(keys)[None, :] >= keys_B[:, None])[:, None, None]
    return {
        "all": Seen(jnp.zeros((1, 1, 1, keys))),
        "bias, lengths": Seen(jnp.where(padded, MASKED, 0.0), bias=bias, keys_B=keys_B),
        "bias, causal": Seen(jnp.where(ahead, MASKED, 0.0)[None, None], bias=bias, causal=True),
        "packed": Seen(jnp.where(ahead[None, None] | padded, MASKED, 0.0), causal=True, by_mask=True),
    }[kind]


def naive(query_BQHK, key_BMJK, value_BMJK, seen, scale):
    repeats = query_BQHK.shape[2] // key_BMJK.shape[2]
    rows = []
    for b in range(len(query_BQHK)):
        heads = []
        for h in range(query_BQHK.shape[2]):
            logits = scale * query_BQHK[b, :, h] @ key_BMJK[b, :, h // repeats].T
            logits += seen.added_B1QM[b % len(seen.added_B1QM), 0]
            if seen.bias is not None:
                logits += seen.bias[h]
            heads.append(jax.nn.softmax(logits, axis=-1) @ value_BMJK[b, :, h // repeats])
        rows.append(jnp.stack(heads, axis=1))
    return jnp.stack(rows)


def by_head(query, key, value, seen, scale):
    repeats = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, repeats, axis=2) for x in (key, value))
    return attend.by_head(query, key, value, seen.bias, seen.added_B1QM, scale)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("kind", ["all", "bias, lengths", "bias, causal", "packed"])
@pytest.mark.parametrize("form", [attend.attend, by_head])
def test_every_form_and_its_gradient_is_a_loops(form, kind, kv_heads):
    given, weight = parts(kv_heads=kv_heads), jax.random.normal(jax.random.key(5), (3, 5, 4, 8))

    def total(function, given, bias):
        own = seen(kind).replace(bias=bias)
        return (function(*given, own, 0.3) * weight).sum()

    bias = seen(kind).bias
    of = (0,) if bias is None else (0, 1)
    both = [
        jax.jit(jax.value_and_grad(functools.partial(total, function), of))(given, bias)
        for function in (form, naive)
    ]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), *both)


@pytest.fixture
def cudnn_by_xla(monkeypatch):
    """What cuDNN is asked, answered by XLA."""
    asked = jax.nn.dot_product_attention

    def answered(*parts, implementation, **terms):
        assert implementation == "cudnn"
        return asked(*parts, implementation="xla", **terms)

    monkeypatch.setattr(jax.nn, "dot_product_attention", answered)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["all", "bias, lengths", "bias, causal", "packed"])
def test_cudnn_is_told_what_the_plain_form_sees(cudnn_by_xla, kind, batch):
    given, own = parts(batch=batch), seen(kind, batch=batch)
    if batch == 1 and own.keys_B is not None:  # the first row of `seen` has no padding
        own = own.replace(keys_B=own.keys_B - 3, added_B1QM=own.added_B1QM.at[..., 4:].set(MASKED))
    wanted = attend.plain(*given, own, 0.3)
    np.testing.assert_allclose(attend.by_cudnn(*given, own, 0.3), wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("stacks", ["encoder_decoder", "decoder_only"])
def test_packed_documents_do_not_see_each_other_by_cudnn(cudnn_by_xla, monkeypatch, stacks, rows):
    s = from_config(
        {
            "model": dict(d_model=16, d_ff=16, d_kv=8, num_heads=2, num_layers=2, dtype="float32")
            | dict(stacks=stacks, positions="rotary"),
            "moe": dict(num_experts=1),
            "data": dict(
                vocab_size=300, objective="causal_lm" if stacks == "decoder_only" else "span_corruption"
            ),
        }
    )
    ids_BL = jnp.tile(jnp.arange(2, 10), (rows, 1))
    segment_BL, position_BL = jnp.tile(
        jnp.array([[1] * 3 + [2] * 5, [*range(3), *range(5)]])[:, None], (1, rows, 1)
    )
    more = {} if stacks == "decoder_only" else {"input_segment_BL": segment_BL}
    given = None if stacks == "decoder_only" else ids_BL, ids_BL, segment_BL, position_BL
    model = Transformer(s)
    variables = model.init(jax.random.key(0), *given, **more)
    logits = {}
    for cudnn in (False, True):
        monkeypatch.setattr(attend, "_cudnn", lambda *_, cudnn=cudnn: cudnn)
        logits[cudnn] = model.apply(variables, *given, **more)[0]
    np.testing.assert_allclose(logits[True], logits[False], rtol=1e-4, atol=1e-4)


def test_head_by_head_keeps_no_logits_for_the_gradient():
    queries = keys = 64

    def kept(function):
        given, own = parts(queries, keys), seen("bias, causal", queries, keys)
        _, backward = jax.eval_shape(lambda given: jax.vjp(lambda g: function(*g, own, 1.0), given), given)
        return max(leaf.size for leaf in jax.tree.leaves(backward))

    assert kept(attend.plain) >= 3 * 4 * queries * keys > 4 * queries * keys >= kept(by_head)


def test_rotary_positions_by_hand_and_relative():
    x = jnp.array([1.0, 2.0, 3.0, 4.0])[None, None, None]
    place = jnp.array([[2]])
    turned = rotate(x, place, 100.0)[0, 0, 0]
    angles = 2 * np.array([1.0, 0.1])  # theta**0 and theta**-0.5
    cos, sin = np.cos(angles), np.sin(angles)
    wanted = [
        1 * cos[0] - 3 * sin[0],
        2 * cos[1] - 4 * sin[1],
        3 * cos[0] + 1 * sin[0],
        4 * cos[1] + 2 * sin[1],
    ]
    np.testing.assert_allclose(turned, wanted, rtol=1e-6)
    query, key = parts(1, 1)[:2]

    def logit(q, k):
        return (rotate(query, jnp.array([[q]]), 1e4) * rotate(key, jnp.array([[k]]), 1e4)).sum()

    np.testing.assert_allclose(logit(5, 2), logit(105, 102), rtol=1e-4)
    assert abs(float(logit(5, 2) - logit(5, 4))) > 1e-3
