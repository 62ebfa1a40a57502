"""Kernels of experts as integers of 8, 4 or 2 bits and scales: weights alone; activations stay as they are.

Symmetric, ``w = scale * code`` with one scale for the rows of a group and each column, of the group's largest |w| over
2**(bits - 1) - 1/2: so no weight is off by more than half a scale (qwix has the same). A package such as qwix finds products by
replacing `jax.lax.dot_general`; ours are loops over experts, which read a kernel at a time, and its int4 takes a byte on a CPU.

Letters: E experts, D rows of a kernel (a product's inputs), F columns, N groups of rows.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

SCALE = "_scale"  # ends the name of the scales' parameter


@struct.dataclass
class Quantised:
    """Experts' kernels [E, D, F]. An expert's own is made by ``kernel[e]``, all of them by `jnp.asarray`.

    ``codes`` is int8 [E, D, F]; of 4 bits [E, D / 2, F]: row d lies in a byte's low half, row d + D / 2 in its high half. Of 2
    bits it is [E, D / 4, F], rows d, d + D / 4, d + D / 2 and d + 3 D / 4 from a byte's lowest bits to its highest.
    """

    codes: jax.Array
    scale_ENF: jax.Array  # float32
    bits: int = struct.field(pytree_node=False)
    dtype: Any = struct.field(pytree_node=False)  # of the kernels that are made

    @property
    def shape(self) -> tuple[int, int, int]:
        experts, rows, columns = self.codes.shape
        return experts, rows * (8 // self.bits), columns

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, expert: Any) -> jax.Array:
        return dequantised(self.codes[expert], self.scale_ENF[expert], self.bits).astype(self.dtype)

    def __jax_array__(self) -> jax.Array:
        return dequantised(self.codes, self.scale_ENF, self.bits).astype(self.dtype)


def dequantised(codes: jax.Array, scale: jax.Array, bits: int) -> jax.Array:
    """Float32 [..., D, F]."""
    if bits < 8:  # each part's bits to the top, then down with their sign
        parts = [(codes << (8 - bits - low)) >> (8 - bits) for low in range(0, 8, bits)]
        codes = jnp.concatenate(parts, axis=-2)
    *lead, rows, columns = codes.shape
    grouped = codes.reshape(*lead, scale.shape[-2], -1, columns).astype(jnp.float32)
    return (grouped * scale[..., None, :]).reshape(*lead, rows, columns)


def shapes(kernel: tuple[int, int, int], bits: int, group: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of codes and scales; a group is so many rows, 0: all."""
    experts, rows, columns = kernel
    return (experts, rows * bits // 8, columns), (experts, rows // (group or rows), columns)


def quantise(kernel_EDF: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """(codes, scale_ENF), as `Quantised` has them."""
    experts, rows, columns = kernel_EDF.shape
    grouped = kernel_EDF.astype(np.float32).reshape(experts, -1, group or rows, columns)
    limit = 2 ** (bits - 1)
    scale = np.abs(grouped).max(axis=2) / np.float32(limit - 0.5)
    scale = np.where(scale > 0, scale, 1).astype(np.float32)
    codes = np.rint(grouped / scale[:, :, None]).clip(-limit, limit - 1).astype(np.int8)
    codes = codes.reshape(kernel_EDF.shape)
    if bits < 8:
        parts = np.split(codes, 8 // bits, axis=1)
        codes = sum((part & (2 * limit - 1)) << (bits * place) for place, part in enumerate(parts))
        codes = codes.astype(np.uint8).view(np.int8)
    return codes, scale
