"""What stands in a sparse layer's parameters in place of its experts', where these are on disk.

The program is that of the resident model, product for product. Before a layer's products it asks the host, in a callback, for
the experts that have rows; the answer are the rows' counts, unchanged. What reads kernels is a loop of so many steps as the
counts say, so none is read before the host has answered. The other way would be pieces of a block, compiled by themselves, with the
experts chosen as arguments: they would end sums and products elsewhere than the one program does, and sampling, beams and the
server's steps would be written again. A call of the host costs 0.2 to 0.4 ms of a core (2 cores of an AMD EPYC, jax 0.12).

Letters: G groups, S tokens per group, D model, F a kernel's columns, E experts, N rows, K choices.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.experimental import io_callback

from switchmoe.dispatch.dispatchers import IndexDispatcher
from switchmoe.inference.offload.layout import FORMS, Layer, Record, numpy_type
from switchmoe.quantised import SCALE, dequantised

Host = Callable[..., np.ndarray]  # (the layer's number, rows_E, anything, what is likely next [E]) -> rows_E


@struct.dataclass
class Apart:
    """A kernel of few experts, each an array of its own that is read where it lies."""

    parts: tuple[jax.Array, ...]  # [F, D] each
    shape: tuple[int, int, int] = struct.field(pytree_node=False)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, expert: int) -> jax.Array:
        return self.parts[expert].T


@struct.dataclass
class Lying:
    """A kernel of many experts, or of integers: an expert's own is made by ``kernel[e]``, all of them by `jnp.asarray`."""

    memory: dict[str, jax.Array]  # by type: [E, a place's numbers], the same bytes
    order_E: jax.Array  # 0 .. E - 1, known when the host has answered
    name: str = struct.field(pytree_node=False)
    layer: Layer = struct.field(pytree_node=False)
    dtype: Any = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, int, int]:
        return (len(self), *dict(self.layer.kernels)[self.name])

    def __len__(self) -> int:
        return len(self.layer.forms)

    def __getitem__(self, expert: Any) -> jax.Array:
        ways = [functools.partial(self._made, record) for record in self.layer.records.values()]
        if len(ways) == 1:
            return ways[0](expert)
        known = list(self.layer.records)
        kind_E = jnp.array([known.index(form) for form in self.layer.forms])
        return jax.lax.switch(kind_E[expert], ways, expert)

    def __jax_array__(self) -> jax.Array:
        return jax.lax.map(self.__getitem__, self.order_E)

    def _made(self, record: Record, expert: Any) -> jax.Array:
        kernel = self._part(record, self.name, expert)
        if FORMS[record.form]:
            kernel = dequantised(kernel, self._part(record, self.name + SCALE, expert), FORMS[record.form])
        return (kernel.T if self.layer.turned else kernel).astype(self.dtype)

    def _part(self, record: Record, name: str, expert: Any) -> jax.Array:
        part = record.part(name)
        first = part.offset // numpy_type(part.dtype).itemsize
        size = part.size // numpy_type(part.dtype).itemsize
        return jax.lax.dynamic_slice(self.memory[part.dtype], (expert, first), (1, size)).reshape(part.shape)


@struct.dataclass
class Shelf:
    """A layer's experts for a program: `at_hand` waits for them."""

    memory: Any  # of `Apart`: {kernel: its arrays}; of `Lying`: by type
    next_router_DE: jax.Array | None  # of the sparse layer after this one, to tell what it is likely to need
    number: int = struct.field(pytree_node=False)
    layer: Layer = struct.field(pytree_node=False)
    apart: bool = struct.field(pytree_node=False)
    host: Host = struct.field(pytree_node=False)
    check: Callable[[int, int], None] = struct.field(pytree_node=False)  # (layer, experts at once)

    def at_hand(
        self, dispatcher: Any, rows: jax.Array, x_GSD: jax.Array, mask_GS: jax.Array
    ) -> tuple[Any, dict[str, Apart | Lying]]:
        """(the dispatcher, whose products wait for the experts; their kernels).

        Args:
          rows: the experts' rows, of which one number is told to the host: so that it is asked when the layers before are done.

        Raises:
          ValueError: as ``check``, of so many experts as the rows may need.
        """
        experts = len(self.layer.forms)
        ragged = isinstance(dispatcher, IndexDispatcher) and dispatcher.sizes_E is not None
        self.check(self.number, min(experts, len(rows)) if ragged else experts)
        asked_E = dispatcher.sizes_E if ragged else jnp.ones(experts, jnp.int32)
        likely = () if self.next_router_DE is None else (self._likely(x_GSD, mask_GS),)
        host = functools.partial(self.host, self.number)
        rows_E = io_callback(host, jax.ShapeDtypeStruct(asked_E.shape, jnp.int32), asked_E, rows.reshape(-1)[0], *likely)  # fmt: skip
        order_E = jnp.cumsum(jnp.minimum(rows_E, 1)) - 1 if not ragged else rows_E
        kernels = {
            name: Apart(self.memory[name], (experts, *shape))
            if self.apart
            else Lying(self.memory, order_E, name, self.layer, rows.dtype)
            for name, shape in self.layer.kernels
        }
        return (dispatcher.replace(sizes_E=rows_E) if ragged else dispatcher), kernels

    def _likely(self, x_GSD: jax.Array, mask_GS: jax.Array) -> jax.Array:
        """float32 [E]: what the next sparse layer's router would say of this layer's input, summed over real tokens.

        As mixtral-offloading has it (Eliseev and Mazur 2023, 2312.17238, section 3.2).
        """
        logits_GSE = jnp.einsum(
            "GSD,DE->GSE", x_GSD.astype(jnp.float32), self.next_router_DE.astype(jnp.float32)
        )
        share_GSE = jnp.where(mask_GS[..., None], jax.nn.softmax(logits_GSE, axis=-1), 0.0)
        return share_GSE.sum(axis=(0, 1))
