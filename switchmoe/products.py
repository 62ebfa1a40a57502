"""Matrix products, and sums, in the forms that XLA's back ends run fast.

Each gives what the plain expression gives, and its gradient, up to the order of sums. Times are of 2 cores of
an Intel Xeon (4th generation), float32.

Letters: B batch, N and S rows, D and F widths, E experts, G groups, C slots, H heads, Q queries, M keys.
"""

import functools
import os

import jax
import jax.numpy as jnp

FEW_ROWS, BF16_ROWS = 64, 16
_ONEDNN = "xla_cpu_experimental_onednn_custom_call"


def compiler_options() -> dict[str, bool]:
    """What to give `jax.jit` as ``compiler_options`` for a program of which most time goes into products.

    On a CPU, oneDNN then computes those that jax 0.12's own library leaves to Eigen: products with the first
    factor transposed, as a kernel's gradient is. Of 4,096 rows, widths 256 and 1024, that takes 9 ms instead of
    10.4; in bfloat16 a whole training step takes half the time. jax 0.10 knows the option and does as before.

    {} on other platforms, where XLA does not know the option or ``XLA_FLAGS`` says something of it, and where
    compiled programs are kept in a cache (``JAX_COMPILATION_CACHE_DIR``), as such a program cannot be.
    """
    said = _ONEDNN in os.environ.get("XLA_FLAGS", "")
    if said or jax.config.jax_compilation_cache_dir or jax.default_backend() != "cpu":
        return {}
    return {_ONEDNN: True} if _known(_ONEDNN) else {}


@functools.cache
def _known(option: str) -> bool:
    try:
        jax.jit(jnp.negative).lower(0.0).compile({option: True})
    except jax.errors.JaxRuntimeError:
        return False
    return True


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def product(spec: str, x: jax.Array, y: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """``jnp.einsum(spec, x, y)``, summed and given in ``dtype``, that of the factors by default.

    Its gradients are products with the factors in the order of ``spec``. JAX's own are of the other order and
    then transposed, for which XLA's CPU back end copies a kernel's gradient, or the larger factor. They take
    their factors in the type of ``x`` and ``y``, where JAX's own go on in float32 if ``dtype`` is that.
    """
    return jnp.einsum(spec, x, y, preferred_element_type=dtype)


def _product_backward(spec: str, dtype: jnp.dtype | None, factors: tuple, g: jax.Array) -> tuple:
    return _before_what_follows(*_product_gradients(spec, factors, g))


def _product_gradients(spec: str, factors: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, y = factors
    x_axes, y_axes, axes = spec.replace("->", ",").split(",")
    g = g.astype(x.dtype)
    x_grad = jnp.einsum(f"{axes},{y_axes}->{x_axes}", g, y)
    return x_grad, jnp.einsum(f"{x_axes},{axes}->{y_axes}", x, g)


def _before_what_follows(x_grad: jax.Array, y_grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    if jax.default_backend() != "cpu":
        return x_grad, y_grad
    # What follows would run beside the second and compete for the threads (a step with 64 experts takes 6 %
    # longer). And oneDNN, where XLA has it add a column to its product, takes seconds.
    return jax.lax.optimization_barrier((x_grad, y_grad))


product.defvjp(lambda spec, x, y, dtype: (product(spec, x, y, dtype), (x, y)), _product_backward)


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """``x[..., D]`` times ``kernel[D, ...]``, as a product of two matrices.

    A dense feed-forward of 16 x 256 tokens, widths 256 and 1024, takes 50 ms forward and backward on jax 0.10,
    and 55 on 0.12; with the tokens' two axes in its products 71 and 79.
    """
    x_SD, kernel_DF = x.reshape(-1, x.shape[-1]), kernel.reshape(len(kernel), -1)
    if len(x_SD) <= FEW_ROWS and jax.default_backend() == "cpu":
        y = few_rows(x_SD, kernel_DF.T)
    else:
        y = product("SD,DF->SF", x_SD, kernel_DF)
    return y.reshape(*x.shape[:-1], *kernel.shape[1:])


def few_rows(x_SD: jax.Array, kernel_FD: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """``x @ kernel.T``, given in ``dtype``, of a step of decoding, which takes as long as it takes to read the kernel.

    In bfloat16 fewer than 16 rows are padded: 24 kernels of 2048 x 512 take 40 ms with one row, 3.5 with 16 (jax 0.12).
    """
    rows = len(x_SD)
    if x_SD.dtype == jnp.bfloat16 and rows < BF16_ROWS:
        x_SD = jnp.pad(x_SD, ((0, BF16_ROWS - rows), (0, 0)))
    return product("SD,FD->SF", x_SD, kernel_FD, dtype)[:rows]


def buffers_matmul(x_EGCD: jax.Array, kernel_EDF: jax.Array) -> jax.Array:
    """Each expert's buffers times its kernel (or `Quantised` one), as a product of two matrices for each expert.

    A row that is not finite comes out so, and adds nothing to the kernels' gradient: 0 * inf is NaN, so one
    bad row would spoil its expert's kernel even where the loss does not depend on that row.
    """
    experts, groups, slots, width = x_EGCD.shape
    y = _rows_product(x_EGCD.reshape(experts, groups * slots, width), jnp.asarray(kernel_EDF))
    return y.reshape(experts, groups, slots, -1)


@jax.custom_vjp
def _rows_product(x_END: jax.Array, kernel_EDF: jax.Array) -> jax.Array:
    return jnp.einsum(_ROWS, x_END, kernel_EDF)


_ROWS = "END,EDF->ENF"


def _rows_forward(x_END: jax.Array, kernel_EDF: jax.Array) -> tuple[jax.Array, tuple]:
    y_ENF = _rows_product(x_END, kernel_EDF)
    # One column tells of the whole row: a sum with inf or NaN in it is not finite.
    return y_ENF, (x_END, kernel_EDF, jnp.isfinite(y_ENF[..., :1]))


def _rows_backward(saved: tuple, g_ENF: jax.Array) -> tuple:
    x_END, kernel_EDF, good_EN1 = saved
    x_grad_END, _ = _product_gradients(_ROWS, (x_END, kernel_EDF), g_ENF)
    good = (jnp.where(good_EN1, x_END, 0), kernel_EDF)
    _, kernel_grad_EDF = _product_gradients(_ROWS, good, jnp.where(good_EN1, g_ENF, 0))
    return _before_what_follows(x_grad_END, kernel_grad_EDF)


_rows_product.defvjp(_rows_forward, _rows_backward)


def argmax(x: jax.Array) -> jax.Array:
    """That of the last axis, int32; on a CPU of the largest of each chunk, then in that chunk.

    XLA's CPU back end takes a maximum ten times as fast as the place of one: of [24576, 512] 18 ms in place of 44. Its maximum
    may pass over a NaN, which is the largest to `jnp.argmax`.
    """
    if x.shape[-1] < 64 or jax.default_backend() != "cpu":
        return jnp.argmax(x, axis=-1).astype(jnp.int32)
    size = 1 << (x.shape[-1].bit_length() // 2)
    padding = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)]
    chunks = jnp.pad(x, padding, constant_values=-jnp.inf).reshape(*x.shape[:-1], -1, size)
    harmed = jnp.isnan(chunks).sum(axis=-1, dtype=jnp.int8) != 0  # twice as fast as `any`
    place = jnp.where(harmed.any(axis=-1), harmed.argmax(axis=-1), chunks.max(axis=-1).argmax(axis=-1))
    best = jnp.take_along_axis(chunks, place[..., None, None], axis=-2)[..., 0, :]
    return (place * size + best.argmax(axis=-1)).astype(jnp.int32)


@jax.custom_vjp
def add_to_all(x_BHQM: jax.Array, bias_HQM: jax.Array) -> jax.Array:
    """``x + bias``, whose gradient is `sum_of_all`."""
    return x_BHQM + bias_HQM[None]


def sum_of_all(x: jax.Array) -> jax.Array:
    """The sum over the first axis, by a matrix product.

    XLA's CPU back end of jax 0.10 takes 18 ms to add up [16, 4, 256, 256] float32, 0.6 ms so.
    """
    ones = jnp.ones(x.shape[:1], x.dtype)
    return jnp.einsum("B,B...->...", ones, x, precision=jax.lax.Precision.HIGHEST)


def _add_to_all_backward(_: None, g_BHQM: jax.Array) -> tuple[jax.Array, jax.Array]:
    return g_BHQM, sum_of_all(g_BHQM)


add_to_all.defvjp(lambda x_BHQM, bias_HQM: (add_to_all(x_BHQM, bias_HQM), None), _add_to_all_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, scale_D: jax.Array, eps: float = 1e-6) -> jax.Array:
    """``x / sqrt(mean(x**2) + eps) * scale`` in float32, given in the type of ``x``.

    With JAX's own gradient XLA's CPU back end writes a copy of the root for every element of ``x``.
    """
    return _rms_norm_forward(x, scale_D, eps)[0]


def _rms_norm_forward(x: jax.Array, scale_D: jax.Array, eps: float) -> tuple[jax.Array, tuple]:
    x_ND = x.reshape(-1, len(scale_D)).astype(jnp.float32)
    inverse_N1 = jax.lax.rsqrt(jnp.mean(x_ND**2, axis=-1, keepdims=True) + eps)
    y_ND = x_ND * inverse_N1 * scale_D[None]
    return y_ND.reshape(x.shape).astype(x.dtype), (x, scale_D, inverse_N1)


def _rms_norm_backward(_: float, saved: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, scale_D, inverse_N1 = jax.lax.optimization_barrier(saved)
    x_ND, g_ND = (value.reshape(-1, len(scale_D)).astype(jnp.float32) for value in (x, g))
    scaled_ND = g_ND * scale_D[None]
    along_N1 = (scaled_ND * x_ND).mean(axis=-1, keepdims=True)
    x_grad_ND = inverse_N1 * scaled_ND - inverse_N1**3 * along_N1 * x_ND
    highest = jax.lax.Precision.HIGHEST
    scale_grad_D = jnp.einsum("N,ND->D", inverse_N1[:, 0], g_ND * x_ND, precision=highest)
    return x_grad_ND.reshape(x.shape).astype(x.dtype), scale_grad_D


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)
