"""Dispatchers: from a `Routing` to the experts' rows, and from their outputs to tokens again.

A dispatcher is a pytree with ``dispatch(x_GSD)``, ``matmul(rows, kernel_EDF)``, each row times its expert's
kernel, and ``combine(rows) -> y_GSD``. Rows are buffers x_EGCD, of which empty slots hold zeros, or
(ragged) x_ND, sorted by expert. Every back end gives the output and gradients of a plain loop over
experts: a token's output is the sum over its choices of gate * expert output, 0 if all were dropped.
A dispatcher does not know how the choice was made.

Letters: G groups, S tokens per group, D model, F the product's width, E experts, C capacity (slots per
expert and group), K choices per token, T = G * S tokens, N rows: E * G * C slots, or at most T * K.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from switchmoe.dispatch.grouped import apart_matmul, grouped_matmul
from switchmoe.products import buffers_matmul
from switchmoe.routing import Routing


@struct.dataclass
class EinsumDispatcher:
    """One-hot masks: the reference, and the form that GSPMD turns into all-to-all (GShard, alg. 2).

    The masks take 2 * S * E * C = 2 * factor * S**2 numbers a group, whatever E is.
    """

    slot_GSEC: jax.Array  # 1 where token s sits in slot c of expert e; its share of the slot in Soft MoE
    gate_GSEC: jax.Array  # the gate there
    # int32, where the choice is among the E * C slots, E * C where it was dropped; None: each token is in every slot
    place_GSK: jax.Array | None

    def dispatch(self, x_GSD: jax.Array) -> jax.Array:
        x_GSD, bad_GS = _finite(x_GSD)
        x_EGCD = jnp.einsum("GSEC,GSD->EGCD", self.slot_GSEC.astype(x_GSD.dtype), x_GSD)
        if self.place_GSK is None:
            reached_EGC = _reached("GSEC,GS->EGC", self.slot_GSEC, bad_GS)
        else:
            reached_GN = jax.vmap(partial(_places, self.slot_GSEC[0, 0].size))(bad_GS, self.place_GSK)
            reached_EGC = jnp.moveaxis(reached_GN.reshape(-1, *self.slot_GSEC.shape[2:]), 0, 1)
        return jnp.where(reached_EGC[..., None], jnp.nan, x_EGCD)

    def matmul(self, x_EGCD: jax.Array, kernel_EDF: jax.Array) -> jax.Array:
        return buffers_matmul(x_EGCD, kernel_EDF)

    def combine(self, y_EGCD: jax.Array) -> jax.Array:
        y_EGCD, bad_EGC = _finite(y_EGCD)
        y_GSD = jnp.einsum("GSEC,EGCD->GSD", self.gate_GSEC.astype(y_EGCD.dtype), y_EGCD)
        if self.place_GSK is None:
            reached_GS = _reached("GSEC,EGC->GS", self.gate_GSEC, bad_EGC)
        else:
            bad_GN = jnp.moveaxis(bad_EGC, 1, 0).reshape(len(y_GSD), -1)
            reached_GS = jax.vmap(_take)(bad_GN, self.place_GSK).any(axis=-1)
        return jnp.where(reached_GS[..., None], jnp.nan, y_GSD)


# As 0 * NaN is NaN, a bare product would spread one bad token to its whole group. So rows that are not finite are left
# out of it, and what they reach is said apart: by the choices' places, as the masks are the largest arrays here and are
# read once. (A bad gate's gradient still spreads.)


def _finite(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(the rows, zeros where one is not finite; where that is)."""
    good = jnp.isfinite(rows).all(axis=-1)
    return jnp.where(good[..., None], rows, 0), ~good


def _reached(spec: str, mask_GSEC: jax.Array, bad: jax.Array) -> jax.Array:
    return jnp.einsum(spec, (mask_GSEC != 0).astype(jnp.float32), bad.astype(jnp.float32)) > 0


def _places(size: int, bad_S: jax.Array, place_SK: jax.Array) -> jax.Array:
    """Where the choices of bad tokens are, bool [size]."""
    bad_SK = jnp.broadcast_to(bad_S[:, None], place_SK.shape)
    return jnp.zeros(size, bool).at[place_SK].set(bad_SK, mode="drop")


def einsum_dispatcher(routing: Routing) -> EinsumDispatcher:
    """Masks from the choices' indices, never from ``gate > 0``: a gate may underflow."""
    if routing.mix_SK is not None:  # every token has a share in every slot: no one-hot needed
        shape = (*routing.gate_SK.shape[:2], routing.num_experts, routing.capacity)
        return EinsumDispatcher(routing.mix_SK.reshape(shape), routing.gate_SK.reshape(shape), None)
    expert_GSKE = jax.nn.one_hot(routing.expert_SK, routing.num_experts) * routing.kept_SK[..., None]
    slot_GSKC = jax.nn.one_hot(routing.slot_SK, routing.capacity)
    return EinsumDispatcher(
        slot_GSEC=jnp.einsum("GSKE,GSKC->GSEC", expert_GSKE, slot_GSKC),
        gate_GSEC=jnp.einsum("GSKE,GSKC,GSK->GSEC", expert_GSKE, slot_GSKC, routing.gate_SK),
        place_GSK=jnp.where(
            routing.kept_SK,
            routing.expert_SK * routing.capacity + routing.slot_SK,
            routing.num_experts * routing.capacity,
        ),
    )


@struct.dataclass
class IndexDispatcher:
    """Indices both ways: each row reads its token, each token reads its rows."""

    row_GSK: jax.Array  # int32, where the choice's row is; N where the choice was dropped
    choice: jax.Array  # int32 [E, G, C] or [N], the row's index among the T * K choices; T * K if empty
    gate_GSK: jax.Array
    sizes_E: jax.Array | None = None  # int32, rows of each expert; None: buffers
    apart: bool = struct.field(pytree_node=False, default=False)  # products by `grouped.apart_matmul`

    def dispatch(self, x_GSD: jax.Array) -> jax.Array:
        x_TD = x_GSD.reshape(-1, x_GSD.shape[-1])
        rows_ND = spread(x_TD, self.row_GSK.reshape(len(x_TD), -1), self.choice.reshape(-1))
        return rows_ND.reshape(*self.choice.shape, -1)

    def matmul(self, rows: jax.Array, kernel_EDF: jax.Array) -> jax.Array:
        if self.sizes_E is None:
            return buffers_matmul(rows, kernel_EDF)
        if self.apart:
            return apart_matmul(rows, kernel_EDF, self.sizes_E)
        return grouped_matmul(rows, kernel_EDF, self.sizes_E)

    def combine(self, rows: jax.Array) -> jax.Array:
        groups, tokens, choices = self.gate_GSK.shape
        rows_ND = rows.reshape(-1, rows.shape[-1])
        gate_TK, row_TK = self.gate_GSK.reshape(-1, choices), self.row_GSK.reshape(-1, choices)
        return _gather_up(rows_ND, gate_TK, row_TK, self.choice.reshape(-1)).reshape(groups, tokens, -1)


def gather_dispatcher(routing: Routing) -> IndexDispatcher:
    """Buffers of ``capacity`` slots for each expert and group."""
    groups = routing.expert_SK.shape[0]
    first_EG = jnp.arange(routing.num_experts * groups, dtype=jnp.int32) * routing.capacity
    shape = (routing.num_experts, groups, routing.capacity)
    row_GSK, choice_N = row_maps(routing, first_EG.reshape(shape[:2]), shape[0] * shape[1] * shape[2])
    return IndexDispatcher(row_GSK, choice_N.reshape(shape), routing.gate_SK)


def ragged_dispatcher(routing: Routing) -> IndexDispatcher:
    """Rows sorted by expert, as many as there are kept choices; those left at the end belong to none.

    No sort is needed: a choice's place is the number of rows before its expert and group, and its slot.
    """
    groups, tokens, choices = routing.expert_SK.shape
    kept_EG = kept_choices(routing)
    first_EG = (jnp.cumsum(kept_EG.reshape(-1)) - kept_EG.reshape(-1)).reshape(kept_EG.shape)
    rows = groups * min(tokens * choices, routing.num_experts * routing.capacity)
    row_GSK, choice_N = row_maps(routing, first_EG, rows)
    return IndexDispatcher(row_GSK, choice_N, routing.gate_SK, kept_EG.sum(axis=1))


def apart_dispatcher(routing: Routing) -> IndexDispatcher:
    """The ragged one for decoding: without a gradient, on one device."""
    return ragged_dispatcher(routing).replace(apart=True)


def kept_choices(routing: Routing) -> jax.Array:
    """kept_EG, int32: each group's rows for each expert."""
    count = partial(jnp.bincount, length=routing.num_experts + 1)
    expert_GSK = jnp.where(routing.kept_SK, routing.expert_SK, routing.num_experts)
    return jax.vmap(count)(expert_GSK.reshape(len(expert_GSK), -1))[:, :-1].T.astype(jnp.int32)


def row_maps(routing: Routing, first_EG: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """(row_GSK, choice_N), each the inverse of the other, from the first row of each expert and group."""
    group_G11 = jnp.arange(first_EG.shape[1], dtype=jnp.int32)[:, None, None]
    row_GSK = first_EG[routing.expert_SK, group_G11] + routing.slot_SK
    row_GSK = jnp.where(routing.kept_SK, row_GSK, rows)
    choice = jnp.arange(row_GSK.size, dtype=jnp.int32)
    return row_GSK, jnp.full(rows, choice.size, jnp.int32).at[row_GSK.reshape(-1)].set(choice, mode="drop")


# A row holds at most one choice, so the inverse permutation is each move's transpose. Said here, because
# XLA's own transpose of a gather is a scatter-add, which is slow.


@jax.custom_vjp
def spread(x_TD: jax.Array, row_TK: jax.Array, choice_N: jax.Array) -> jax.Array:
    """x_ND: each row's token; zeros where it has none."""
    return _take(x_TD, choice_N // row_TK.shape[-1])


def _spread_backward(indices: tuple[jax.Array, jax.Array], d_ND: jax.Array) -> tuple:
    row_TK, choice_N = indices
    return _sum_of_rows(d_ND, None, row_TK, choice_N), None, None


@jax.custom_vjp
def _gather_up(y_ND: jax.Array, gate_TK: jax.Array, row_TK: jax.Array, choice_N: jax.Array) -> jax.Array:
    """y_TD: the sum over a token's choices of gate * its row."""
    return _sum_of_rows(y_ND, gate_TK, row_TK, choice_N)


def _gather_up_backward(saved: tuple[jax.Array, ...], d_TD: jax.Array) -> tuple:
    y_ND, gate_TK, row_TK, choice_N = saved
    d_ND = _take(d_TD, choice_N // row_TK.shape[-1])
    gate_N1 = _take(gate_TK.reshape(-1), choice_N)[:, None]
    # The gate's gradient by rows, of which there may be far fewer than choices. A row on which nothing depends
    # has none, even where it is not finite (0 * NaN is NaN).
    d_gate_ND = jnp.where(d_ND == 0, 0.0, d_ND.astype(jnp.float32) * y_ND.astype(jnp.float32))
    d_gate_N = d_gate_ND.sum(axis=-1)
    return (gate_N1 * d_ND).astype(y_ND.dtype), _take(d_gate_N, row_TK), None, None


def _sum_of_rows(
    rows_ND: jax.Array, gate_TK: jax.Array | None, row_TK: jax.Array, choice_N: jax.Array
) -> jax.Array:
    """Sums each token's rows, by reading its choices or, where these are more than the rows, by adding rows."""
    (tokens, choices), dtype = row_TK.shape, rows_ND.dtype
    if row_TK.size <= 2 * choice_N.size:
        rows_TKD = _take(rows_ND, row_TK)
        if gate_TK is not None:
            rows_TKD = rows_TKD * gate_TK[..., None]
        return rows_TKD.sum(axis=1).astype(dtype)
    if gate_TK is not None:
        rows_ND = rows_ND * _take(gate_TK.reshape(-1), choice_N)[:, None]
    total_TD = jnp.zeros((tokens, rows_ND.shape[-1]), jnp.float32)
    return total_TD.at[choice_N // choices].add(rows_ND, mode="drop").astype(dtype)


def _take(rows: jax.Array, index: jax.Array) -> jax.Array:
    """Rows by index; zeros where the index is past the end (JAX's default would clamp it)."""
    return jnp.take(rows, index, axis=0, mode="fill", fill_value=0)


spread.defvjp(lambda x, row, choice: (spread(x, row, choice), (row, choice)), _spread_backward)
_gather_up.defvjp(lambda *saved: (_gather_up(*saved), saved), _gather_up_backward)

DISPATCHERS = {"einsum": einsum_dispatcher, "gather": gather_dispatcher, "ragged": ragged_dispatcher}
DECODING = "apart"  # what decoding asks for instead; nobody else
