"""Which keys a query sees: real ones, those before it, those of its own document, those that a memory holds.

Letters: B batch, L length, Q queries, M keys, H heads.
"""

import jax
import jax.numpy as jnp
from flax import struct

MASKED = -1e9  # added to a float32 logit: its weight is exactly 0


@struct.dataclass
class Seen:
    """Which keys a query sees, said twice: as what is added to the logits, and for cuDNN in its own terms."""

    added_B1QM: jax.Array  # float32, 0 or MASKED; broadcast over B and Q
    bias: jax.Array | None = None  # a learned one, float32, [H, Q, M], or [B, H, Q, M]
    keys_B: jax.Array | None = None  # int32: the first so many keys are real; None: all are, or see `by_mask`
    causal: bool = struct.field(pytree_node=False, default=False)  # a query sees no later key
    by_mask: bool = struct.field(pytree_node=False, default=False)  # only `added` says all (packed documents)


def real(real_BM: jax.Array, query_BQ: jax.Array | None = None, key_BM: jax.Array | None = None) -> Seen:
    """The keys that are real; where rows hold several documents, numbered for queries and keys, those of the query's own."""
    if key_BM is None:
        added_B11M = jnp.where(real_BM[:, None, None, :], 0.0, MASKED)
        return Seen(added_B11M, keys_B=real_BM.sum(axis=1, dtype=jnp.int32))
    own_BQM = (query_BQ[:, :, None] == key_BM[:, None, :]) & real_BM[:, None, :]
    return Seen(jnp.where(own_BQM[:, None], 0.0, MASKED), by_mask=True)


def not_later(distance_LL: jax.Array, segment_BL: jax.Array | None = None) -> Seen:
    """The query itself and the keys before it, of its own document; ``distance`` is key minus query.

    Real tokens come first, so this alone keeps padding from them.
    """
    visible = (distance_LL <= 0)[None, None]
    if segment_BL is not None:
        visible &= (segment_BL[:, None, :] == segment_BL[:, :, None])[:, None]
    return Seen(jnp.where(visible, 0.0, MASKED), causal=True, by_mask=segment_BL is not None)


def remembered(slots_BM: jax.Array, position_BL: jax.Array) -> tuple[Seen, jax.Array]:
    """(what a memory's slots hold that is not later than tokens at these places, key minus query).

    Args:
      slots_BM: the place of what a slot holds, below 0 for nothing.
    """
    distance_BLM = slots_BM[:, None, :] - position_BL[:, :, None]
    visible_BLM = (slots_BM[:, None, :] >= 0) & (distance_BLM <= 0)
    return Seen(jnp.where(visible_BLM, 0.0, MASKED)[:, None], by_mask=True), distance_BLM
