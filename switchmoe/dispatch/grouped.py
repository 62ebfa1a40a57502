"""Grouped matrix product: rows sorted by expert, each times its own expert's kernel.

Letters: N rows, E experts, D and F the widths, B rows of a block.
"""

import importlib.util

import jax
import jax.numpy as jnp

from switchmoe.products import BF16_ROWS, FEW_ROWS, few_rows

KERNELS = "tokamax"  # the package whose kernels are used, where it is installed


def grouped_matmul(x_ND: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """y_NF with y_n = x_n @ kernel_e for the sizes_0 rows of expert 0, then those of expert 1, ...

    Rows beyond ``sum(sizes_E)`` come out as anything and are given no gradient to pass on. Neither they nor a
    row that is not finite (which comes out so) add anything to the kernels' gradient. On a CPU by blocks of
    rows (`blocked_matmul`); elsewhere by tokamax's kernels, if it is installed, or else by
    `jax.lax.ragged_dot`, which on a CPU pays for every expert. Of a `Quantised` kernel a CPU makes an expert's part
    at a time, of experts that have rows.
    """
    if jax.default_backend() == "cpu":
        return blocked_matmul(x_ND, kernel_EDF, sizes_E)
    return _library_matmul(x_ND, jnp.asarray(kernel_EDF), sizes_E)


@jax.custom_vjp
def _library_matmul(x_ND: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    return _library_product(x_ND, kernel_EDF, sizes_E)


def _library_product(x_ND: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    if importlib.util.find_spec(KERNELS):
        import tokamax
        from absl import flags

        if (
            not flags.FLAGS.is_parsed()
        ):  # else tokamax reads the command line, and fails at what isn't its own
            flags.FLAGS.mark_as_parsed()
        return tokamax.ragged_dot(x_ND, kernel_EDF, sizes_E)
    return jax.lax.ragged_dot(x_ND, kernel_EDF, sizes_E)


def _library_forward(x_ND: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array) -> tuple:
    y_NF = _library_matmul(x_ND, kernel_EDF, sizes_E)
    good_N1 = (jnp.arange(len(x_ND)) < sizes_E.sum())[:, None] & jnp.isfinite(y_NF[:, :1])
    return y_NF, (x_ND, kernel_EDF, sizes_E, good_N1)


def _library_backward(saved: tuple[jax.Array, ...], d_NF: jax.Array) -> tuple:
    x_ND, kernel_EDF, sizes_E, good_N1 = saved
    good_ND = jnp.where(good_N1, x_ND, 0)
    _, gradients = jax.vjp(lambda x, k: _library_product(x, k, sizes_E), good_ND, kernel_EDF)
    return *gradients(jnp.where(good_N1, d_NF, 0)), None


_library_matmul.defvjp(_library_forward, _library_backward)


def apart_matmul(x_ND: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """The product as loops over blocks of rows for each expert, all of them written out; without a gradient.

    For decoding, where reading kernels is what a step costs: none is copied, and that of an expert without rows is not
    read. The code grows with the experts.
    """
    experts, sizes = len(kernel_EDF), _few(len(x_ND), x_ND.dtype)
    x_ND, rows = jnp.pad(x_ND, ((0, sizes[-1]), (0, 0))), len(x_ND)
    start_E = jnp.cumsum(sizes_E) - sizes_E
    y_NF = jnp.zeros((len(x_ND), kernel_EDF.shape[2]), x_ND.dtype)
    for e in range(experts):  # in order: an expert's surplus rows are overwritten by the next one's
        kernel_FD, least = kernel_EDF[e].T, 0
        for size in sizes:

            def block(
                n: jax.Array, y_NF: jax.Array, e: int = e, size: int = size, kernel_FD: jax.Array = kernel_FD
            ) -> jax.Array:
                start = start_E[e] + n * size
                y_BF = few_rows(jax.lax.dynamic_slice_in_dim(x_ND, start, size), kernel_FD)
                return jax.lax.dynamic_update_slice_in_dim(y_NF, y_BF, start, axis=0)

            mine = (sizes_E[e] > least) & ((sizes_E[e] <= size) | (size == sizes[-1]))
            y_NF = jax.lax.fori_loop(0, jnp.where(mine, -(-sizes_E[e] // size), 0), block, y_NF)
            least = size
    return y_NF[:rows]


def _few(rows: int, dtype: jnp.dtype) -> tuple[int, ...]:
    """Rows of `apart_matmul`'s blocks: an expert's rows lie in one of the first kind that holds them, or in several of the last.

    A kernel of 2048 x 512 takes 0.27 ms with 4 rows, 0.40 with 16 (float32, 2 cores of an Intel Xeon, 4th generation).
    """
    if rows == 1:
        return (1,)
    if rows > FEW_ROWS:
        return (FEW_ROWS,)
    return (BF16_ROWS,) if dtype == jnp.bfloat16 else (4, 16)


@jax.custom_vjp
def blocked_matmul(x_ND: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """The product as loops over experts and over blocks of an expert's rows.

    Rows lie without gaps: an expert's last block runs into the next one's rows, which that one then
    overwrites. So the work is that of the rows, rounded up to a block for each expert, and memory
    beyond rows and kernels is that of one block and one kernel.
    """
    return _forward(x_ND, kernel_EDF, sizes_E)[0]


def _product(spec: str, x_ND: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array, width: int) -> jax.Array:
    size = _block_size(len(x_ND), len(kernel_EDF))
    x_ND, rows = jnp.pad(x_ND, ((0, size), (0, 0))), len(x_ND)

    def expert(e: jax.Array, y_NF: jax.Array) -> jax.Array:
        kernel_DF = kernel_EDF[e]

        def block(start: jax.Array, y_NF: jax.Array) -> jax.Array:
            y_BF = jnp.einsum(spec, jax.lax.dynamic_slice_in_dim(x_ND, start, size), kernel_DF)
            return jax.lax.dynamic_update_slice_in_dim(y_NF, y_BF, start, axis=0)

        return _blocks(sizes_E, e, size, block, y_NF)

    y_NF = jnp.zeros((len(x_ND), width), x_ND.dtype)
    used_E = jnp.argsort(sizes_E == 0)  # those with rows first, in their order: no other's kernel is read
    return jax.lax.fori_loop(0, (sizes_E > 0).sum(), lambda n, y_NF: expert(used_E[n], y_NF), y_NF)[:rows]


def _kernel_gradient(x_ND: jax.Array, d_NF: jax.Array, sizes_E: jax.Array, good_N1: jax.Array) -> jax.Array:
    """d_EDF, summed over each expert's good rows in float32."""
    size = _block_size(len(x_ND), len(sizes_E))
    x_ND, d_NF, good_N1 = (jnp.pad(rows, ((0, size), (0, 0))) for rows in (x_ND, d_NF, good_N1))
    ends_E = jnp.cumsum(sizes_E)

    def expert(e: jax.Array) -> jax.Array:
        def block(start: jax.Array, total_DF: jax.Array) -> jax.Array:
            mine_B1 = (start + jnp.arange(size) < ends_E[e])[:, None]
            x_BD = jax.lax.dynamic_slice_in_dim(x_ND, start, size)
            good_B1 = mine_B1 & jax.lax.dynamic_slice_in_dim(good_N1, start, size)
            x_BD = jnp.where(good_B1, x_BD, 0)
            d_BF = jnp.where(good_B1, jax.lax.dynamic_slice_in_dim(d_NF, start, size), 0)
            return total_DF + jnp.dot(x_BD.T, d_BF, preferred_element_type=jnp.float32)

        zeros_DF = jnp.zeros((x_ND.shape[1], d_NF.shape[1]), jnp.float32)
        return _blocks(sizes_E, e, size, block, zeros_DF).astype(x_ND.dtype)

    return jax.lax.map(expert, jnp.arange(len(sizes_E)))


def _blocks(sizes_E: jax.Array, e: jax.Array, size: int, body, carry: jax.Array) -> jax.Array:
    """Runs ``carry = body(start, carry)`` over the starts of expert ``e``'s blocks."""
    ends_E = jnp.cumsum(sizes_E)
    blocks = -(-sizes_E[e] // size)
    first = ends_E[e] - sizes_E[e]
    return jax.lax.fori_loop(0, blocks, lambda n, carry: body(first + n * size, carry), carry)


def _block_size(rows: int, experts: int) -> int:
    """A power of two, at most an expert's mean share: smaller ones round up less, but their products are slow.

    4,096 rows, 64 experts, widths 256 and 1024, forward and backward on 2 cores of an Intel Xeon (4th generation),
    jax 0.12: 258 ms with 64 rows a block, 288 with 32, 278 with 128.
    """
    share = max(rows // experts, 1)
    return min(max(1 << (share.bit_length() - 1), 16), 128)


def _backward(saved: tuple[jax.Array, ...], d_NF: jax.Array) -> tuple:
    x_ND, kernel_EDF, sizes_E, good_N1 = saved
    # The kernel is read as it lies: a transposed copy of all experts costs more than the product.
    d_ND = _product("BF,DF->BD", d_NF, kernel_EDF, sizes_E, x_ND.shape[1])
    return d_ND, _kernel_gradient(x_ND, d_NF, sizes_E, good_N1), None


def _forward(x_ND: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array) -> tuple:
    y_NF = _product("BD,DF->BF", x_ND, kernel_EDF, sizes_E, kernel_EDF.shape[2])
    return y_NF, (x_ND, kernel_EDF, sizes_E, jnp.isfinite(y_NF[:, :1]))


blocked_matmul.defvjp(_forward, _backward)
