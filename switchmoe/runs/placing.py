"""Batches on a mesh: which rows of a global batch this process reads, and how they become global arrays.

Letters: R streams, N rows of each.
"""

import functools

import jax
import numpy as np
from jax.sharding import Mesh

from switchmoe.data import batches
from switchmoe.parallel import sharding
from switchmoe.settings import DataSettings


class Rows:
    """The rows that this process's devices need, and the ``streams`` that fill them."""

    def __init__(self, settings: DataSettings, mesh: Mesh):
        rows_RN, self._count = batches.stream_rows(settings), settings.batch_size
        self._where = sharding.batch_sharding(mesh)
        indices = self._where.addressable_devices_indices_map((self._count,)).values()
        needed = np.concatenate([np.arange(self._count)[index] for index in indices])
        self.streams = [n for n, rows_N in enumerate(rows_RN) if np.isin(rows_N, needed).any()]
        self._rows = rows_RN[self.streams].ravel()

    def shapes(self, lengths: dict[str, int]) -> dict[str, jax.ShapeDtypeStruct]:
        """A global batch, abstract."""
        return {
            name: jax.ShapeDtypeStruct((self._count, length), np.int32, sharding=self._where)
            for name, length in lengths.items()
        }

    def put(self, batch: batches.Batch) -> dict[str, jax.Array]:
        """The global batch of whose rows this process has read its own."""

        def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
            rows = np.arange(self._count)[index[0]]
            return batch[name][np.searchsorted(self._rows, rows)]

        return {
            name: jax.make_array_from_callback(
                (self._count, value.shape[1]), self._where, functools.partial(read, name)
            )
            for name, value in batch.items()
        }


def whole(batch: batches.Batch, mesh: Mesh) -> dict[str, jax.Array]:
    """A batch that every process has in full."""
    where = sharding.batch_sharding(mesh)
    return {
        name: jax.make_array_from_callback(rows.shape, where, rows.__getitem__)
        for name, rows in batch.items()
    }
