"""The vocabulary's loss: hand-computed values, and its gradient is that of its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchmoe.model import output_loss


def test_cross_entropy_by_hand_and_with_smoothing():
    logits_BLV = jnp.log(jnp.array([[[0.5, 0.25, 0.25]]]))
    targets_BL = jnp.array([[0]])
    nll_BL, z_BL = output_loss.cross_entropy(logits_BLV + 2.0, targets_BL)
    assert nll_BL[0, 0] == pytest.approx(np.log(2), rel=1e-5)
    assert z_BL[0, 0] == pytest.approx(4.0, rel=1e-5)
    smooth_BL, _ = output_loss.cross_entropy(logits_BLV, targets_BL, label_smoothing=0.3)
    expected = 0.7 * np.log(2) + 0.1 * (np.log(2) + 2 * np.log(4))
    assert smooth_BL[0, 0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rows", [4, 512], ids=["in_chunks", "at_once"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_output_cross_entropy_has_the_gradient_of_its_formula(smoothing, rows, monkeypatch):
    """Its own gradient against autodiff through `cross_entropy`; bf16 to its rounding."""
    monkeypatch.setattr(output_loss, "_rows_at_once", lambda x_BLD: rows if rows < 15 else 0)
    keys = jax.random.split(jax.random.key(0), 3)
    targets_BL = jax.random.randint(keys[2], (3, 5), 0, 11)

    def plain(x_BLD, table_VD, smoothing=smoothing):
        return output_loss.cross_entropy(output_loss.logits(x_BLD, table_VD), targets_BL, smoothing)

    def total(outputs):
        nll_BL, z_BL = outputs
        weight_BL = jnp.arange(15.0).reshape(3, 5)
        return (weight_BL * nll_BL + 0.1 * (15 - weight_BL) * z_BL).sum()

    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)):
        x_BLD = jax.random.normal(keys[0], (3, 5, 7)).astype(dtype)
        table_VD = jax.random.normal(keys[1], (11, 7)).astype(dtype)
        found = jax.value_and_grad(
            lambda x, w: total(output_loss.output_cross_entropy(x, w, targets_BL, smoothing)[:2]), (0, 1)
        )(x_BLD, table_VD)
        inputs = x_BLD.astype(jnp.float32), table_VD.astype(jnp.float32)
        expected = jax.value_and_grad(lambda x, w: total(plain(x, w)), (0, 1))(*inputs)
        assert [a.dtype for a in found[1]] == [dtype, dtype]
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert jnp.abs(a.astype(jnp.float32) - b).max() < tolerance * jnp.abs(b).max()
        _, _, correct_BL, nll_BL = output_loss.output_cross_entropy(*inputs, targets_BL, smoothing)
        np.testing.assert_allclose(nll_BL, plain(*inputs, 0.0)[0], rtol=1e-5)
        assert (correct_BL == (output_loss.logits(*inputs).argmax(-1) == targets_BL)).all()


def test_logits_are_never_all_there_at_once():
    """But on several devices, and where they are few."""
    x_BLD, table_VD = jnp.ones((8, 200, 16)), jnp.ones((1000, 16))
    targets_BL = jnp.ones((8, 200), int)

    def temporary(x_BLD):
        loss = lambda x, w: output_loss.output_cross_entropy(x, w, targets_BL[: len(x)])[0].sum()  # noqa: E731
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(x_BLD, table_VD).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 4 * 1000 * targets_BL.size
    assert temporary(x_BLD) < 0.8 * logits
    with jax.set_mesh(jax.make_mesh((2,), ("data",))):
        assert temporary(x_BLD) >= logits
    assert temporary(x_BLD[:2]) >= logits / 4


def test_chunks_are_of_one_size():
    """A few places more than a chunk holds are no second chunk of zeros; wide models have one."""
    rows = [output_loss._rows_at_once(jnp.ones((1, size, 8))) for size in (1024, 1025, 2048, 2049, 3000)]
    assert rows == [0, 513, 1024, 683, 1000]
    assert output_loss._rows_at_once(jnp.ones((1, 2048, 129))) == 0


def test_of_some_places_alone_it_is_what_it_is_of_all():
    """Values and gradients; a row may have fewer than the most, or none."""
    keys = jax.random.split(jax.random.key(0), 3)
    x_BLD, table_VD = jax.random.normal(keys[0], (3, 6, 7)), jax.random.normal(keys[1], (11, 7))
    targets_BL = jax.random.randint(keys[2], (3, 6), 0, 11)
    predicted_BL = jnp.array([[0, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1], [0] * 6])

    def total(x_BLD, table_VD, most):
        given = (predicted_BL, most) if most else ()
        loss = output_loss.some_cross_entropy if most else output_loss.output_cross_entropy
        found = loss(x_BLD, table_VD, targets_BL, *given, label_smoothing=0.1)
        found = [jnp.where(predicted_BL, value_BL, 0) for value_BL in found]
        weight_BL = jnp.arange(18.0).reshape(3, 6)
        return (weight_BL * found[0] + 0.1 * found[1]).sum(), found

    (all_of, found) = (
        jax.value_and_grad(total, (0, 1), has_aux=True)(x_BLD, table_VD, most) for most in (0, 3)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(all_of), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert not found[1][0][2].any()


def test_the_loss_of_bf16_logits_is_float32():
    logits = jnp.ones((2, 3, 4), jnp.bfloat16)
    nll_BL, z_BL = output_loss.cross_entropy(logits, jnp.zeros((2, 3), jnp.int32))
    assert nll_BL.dtype == z_BL.dtype == jnp.float32


def test_a_tie_is_no_hit():
    """A model whose logits are all the same, or no numbers, is right nowhere; with one alone it is."""
    x_BLD, targets_BL = jnp.ones((1, 4, 2)), jnp.array([[0, 1, 2, 0]])

    def hits(table_VD):
        return output_loss.output_cross_entropy(x_BLD, jnp.asarray(table_VD, jnp.float32), targets_BL)[2][
            0
        ].tolist()

    assert hits([[0, 0]] * 3) == [False] * 4
    assert hits([[1, 1], [1, 1], [0, 0]]) == [False] * 4
    assert hits([[1, 1], [0, 0], [0, 0]]) == [True, False, False, True]
    assert hits([[jnp.nan, 0], [0, 0], [0, 0]]) == [False] * 4
    assert hits([[jnp.inf, 0], [0, 0], [0, 0]]) == [True, False, False, True]
