"""Products and sums against the plain expressions, with their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchmoe import products


def random(seed: int, *shape: int, dtype: str = "float32") -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def check(ours, plain, *inputs: jax.Array, rtol: float = 1e-5) -> None:
    """Values and gradients, which must have the inputs' types, to ``rtol`` of the largest."""
    weight = random(9, *jax.eval_shape(plain, *inputs).shape)

    def both(function):
        def value(*inputs):
            y = function(*inputs)
            return (y.astype(jnp.float32) * weight).sum(), y

        return jax.jit(jax.grad(value, tuple(range(len(inputs))), has_aux=True))(*inputs)

    (ours_grads, ours_y), (plain_grads, plain_y) = both(ours), both(plain)
    for got, expected in zip((*ours_grads, ours_y), (*plain_grads, plain_y), strict=True):
        assert got.dtype == expected.dtype and got.shape == expected.shape
        got, expected = (np.asarray(x.astype(jnp.float32)) for x in (got, expected))
        np.testing.assert_allclose(got, expected, rtol=0, atol=rtol * np.abs(expected).max())


@pytest.mark.parametrize(
    ("spec", "x", "y"),
    [
        ("SD,DF->SF", (6, 3), (3, 5)),
        ("END,EDF->ENF", (2, 6, 3), (2, 3, 5)),
        ("BQHK,BMHK->BHQM", (2, 5, 3, 4), (2, 7, 3, 4)),
        ("BHQM,BMHK->BQHK", (2, 3, 5, 7), (2, 7, 3, 4)),
    ],
)
@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_product_is_einsum(spec, x, y, dtype, rtol):
    check(
        lambda x, y: products.product(spec, x, y),
        lambda x, y: jnp.einsum(spec, x, y),
        random(0, *x, dtype=dtype),
        random(1, *y, dtype=dtype),
        rtol=rtol,
    )


def test_product_in_float32_of_bf16_factors_is_not_rounded():
    x, y = random(0, 4, 64, dtype="bfloat16"), random(1, 64, 4, dtype="bfloat16")
    exact = np.asarray(x, np.float64) @ np.asarray(y, np.float64)
    ours = products.product("SD,DF->SF", x, y, jnp.float32)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda x: products.product("SD,DF->SF", x, y, jnp.float32).sum())(x)
    assert gradient.dtype == jnp.bfloat16


def test_matmul_keeps_the_axes():
    check(
        products.matmul,
        lambda x, kernel: jnp.einsum("BLD,DHK->BLHK", x, kernel),
        random(0, 2, 5, 6),
        random(1, 6, 3, 4),
    )


def test_buffers_meet_their_experts():
    check(
        products.buffers_matmul,
        lambda x, kernel: jnp.einsum("EGCD,EDF->EGCF", x, kernel),
        random(0, 3, 2, 4, 5),
        random(1, 3, 5, 6),
    )


def test_add_to_all_sums_the_biases_gradient():
    check(products.add_to_all, lambda x, bias: x + bias[None], random(0, 4, 2, 3, 3), random(1, 2, 3, 3))


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_rms_norm_by_its_formula(dtype, rtol):
    def plain(x, scale):
        x32 = x.astype(jnp.float32)
        return (x32 / jnp.sqrt((x32**2).mean(-1, keepdims=True) + 1e-6) * scale[None, None]).astype(x.dtype)

    check(products.rms_norm, plain, random(0, 2, 5, 8, dtype=dtype), 1 + random(1, 8), rtol=rtol)


def test_rms_norm_of_zeros_is_finite():
    value, gradient = jax.value_and_grad(lambda x: products.rms_norm(x, jnp.ones(4)).sum())(jnp.zeros((2, 4)))
    assert value == 0 and np.isfinite(gradient).all()


@pytest.fixture
def no_cache():
    """As in a process for which no compilation cache is set."""
    kept = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", kept)


def test_compiler_options_are_for_a_cpu_without_cache_or_a_users_word(no_cache, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert products.compiler_options() == {products._ONEDNN: True}
    monkeypatch.setenv("XLA_FLAGS", f"--{products._ONEDNN}=false")
    assert products.compiler_options() == {}
    monkeypatch.delenv("XLA_FLAGS")
    jax.config.update("jax_compilation_cache_dir", "anywhere")
    assert products.compiler_options() == {}


def test_an_option_that_xla_does_not_know_is_not_given(no_cache, monkeypatch):
    monkeypatch.setattr(products, "_ONEDNN", "xla_cpu_of_no_version")
    assert products.compiler_options() == {}


def test_onednn_adds_nothing_to_a_kernels_gradient(no_cache):
    """Where XLA has it add a column to a product, its slowest code runs: seconds."""
    x, kernel, column = random(0, 512, 256), random(1, 256, 512), random(2, 256, 1)

    def program(gradient):
        lowered = jax.jit(lambda kernel: gradient(kernel) + column).lower(kernel)
        return lowered.compile({products._ONEDNN: True})

    def fused(kernel):
        return jnp.einsum("SD,SF->DF", x, 2 * jnp.einsum("SD,DF->SF", x, kernel))

    if "BINARY_ADD" not in program(fused).as_text():
        pytest.skip("this version of XLA has nothing added by oneDNN")
    ours = program(jax.grad(lambda kernel: (products.matmul(x, kernel) ** 2).sum()))
    assert "__onednn$matmul" in ours.as_text() and "BINARY_ADD" not in ours.as_text()
    x_SD, kernel_DF = (np.asarray(value, np.float64) for value in (x, kernel))
    expected = 2 * x_SD.T @ (x_SD @ kernel_DF) + np.asarray(column)
    np.testing.assert_allclose(ours(kernel), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("shape", [(5, 3), (4, 64), (2, 3, 100), (7, 512)])
def test_argmax_is_numpys(shape):
    """With ties, and values that are not finite."""
    x = np.array(random(0, *shape)).round(1)
    x[0, ..., 1], x[1, ..., 2], x[1, ..., 0] = np.nan, np.inf, np.inf
    x[2:] = -np.inf
    np.testing.assert_array_equal(products.argmax(jnp.asarray(x)), x.argmax(axis=-1))
    harmed = np.array(random(1, 60, shape[-1]))  # XLA's maximum passes over a NaN in some places
    harmed[np.arange(60), np.arange(60) * 7 % shape[-1]] = np.nan
    np.testing.assert_array_equal(products.argmax(jnp.asarray(harmed)), harmed.argmax(axis=-1))
