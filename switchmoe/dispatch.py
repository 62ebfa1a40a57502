"""Dispatchers: from a `Routing` to expert buffers, and from the experts' outputs to tokens again.

A dispatcher is a pytree with ``dispatch(x_GSD) -> x_EGCD`` and ``combine(y_EGCD) -> y_GSD``. Every
back end gives the output and gradients of a plain loop over experts: token s of group g sits in slot
c of expert e, empty slots hold zeros, and the output of a token is the sum over its choices of
gate * expert output, 0 if all were dropped. It does not know how the choice was made.

Letters: G groups, S tokens per group, D model, E experts, C capacity (slots per expert and group),
K choices per token, T = G * S tokens, N = E * G * C slots.
"""

import jax
import jax.numpy as jnp
from flax import struct

from switchmoe.routing import Routing


@struct.dataclass
class EinsumDispatcher:
    """One-hot masks: the reference, and the form that GSPMD turns into all-to-all (GShard, alg. 2).

    The masks take 2 * S * E * C = 2 * factor * S**2 numbers a group, whatever E is.
    """

    slot_GSEC: jax.Array  # 1 where token s sits in slot c of expert e
    gate_GSEC: jax.Array  # the gate there

    def dispatch(self, x_GSD: jax.Array) -> jax.Array:
        return _masked_sum("GSEC,GSD->EGCD", self.slot_GSEC, x_GSD)

    def combine(self, y_EGCD: jax.Array) -> jax.Array:
        return _masked_sum("GSEC,EGCD->GSD", self.gate_GSEC, y_EGCD)


def _masked_sum(spec: str, mask_GSEC: jax.Array, rows: jax.Array) -> jax.Array:
    """The product, but a row that is not finite reaches only those whose mask is not 0.

    As 0 * NaN is NaN, the bare product would spread one bad token to its whole group. (So does still
    the gradient of a bad gate.)
    """
    bad = ~jnp.isfinite(rows).all(axis=-1, keepdims=True)
    total = jnp.einsum(spec, mask_GSEC.astype(rows.dtype), jnp.where(bad, 0, rows))
    reached = jnp.einsum(spec, (mask_GSEC != 0).astype(rows.dtype), bad.astype(rows.dtype)) > 0
    return jnp.where(reached, jnp.nan, total)


def einsum_dispatcher(routing: Routing) -> EinsumDispatcher:
    """Masks from the choices' indices, never from ``gate > 0``: a gate may underflow."""
    expert_GSKE = jax.nn.one_hot(routing.expert_SK, routing.num_experts) * routing.kept_SK[..., None]
    slot_GSKC = jax.nn.one_hot(routing.slot_SK, routing.capacity)
    return EinsumDispatcher(
        slot_GSEC=jnp.einsum("GSKE,GSKC->GSEC", expert_GSKE, slot_GSKC),
        gate_GSEC=jnp.einsum("GSKE,GSKC,GSK->GSEC", expert_GSKE, slot_GSKC, routing.gate_SK),
    )


@struct.dataclass
class GatherDispatcher:
    """Indices both ways: each slot reads its token, each token reads its slots."""

    slot_GSK: jax.Array  # int32, index into the N slots; N where the choice was dropped
    choice_EGC: jax.Array  # int32, index into the T * K choices; T * K where the slot is empty
    gate_GSK: jax.Array

    def dispatch(self, x_GSD: jax.Array) -> jax.Array:
        x_TD = x_GSD.reshape(-1, x_GSD.shape[-1])
        return _to_slots(x_TD, self.slot_GSK.reshape(x_TD.shape[0], -1), self.choice_EGC)

    def combine(self, y_EGCD: jax.Array) -> jax.Array:
        groups, tokens, choices = self.gate_GSK.shape
        y_ND = y_EGCD.reshape(-1, y_EGCD.shape[-1])
        y_TKD = _to_choices(y_ND, self.slot_GSK.reshape(-1, choices), self.choice_EGC)
        gate_TK1 = self.gate_GSK.reshape(-1, choices, 1)
        return (y_TKD * gate_TK1).sum(axis=1).astype(y_EGCD.dtype).reshape(groups, tokens, -1)


def gather_dispatcher(routing: Routing) -> GatherDispatcher:
    groups, tokens, choices = routing.expert_SK.shape
    slots = routing.num_experts * groups * routing.capacity
    group_G11 = jnp.arange(groups, dtype=jnp.int32)[:, None, None]
    slot_GSK = (routing.expert_SK * groups + group_G11) * routing.capacity + routing.slot_SK
    slot_GSK = jnp.where(routing.kept_SK, slot_GSK, slots)
    choice = jnp.arange(groups * tokens * choices, dtype=jnp.int32)
    choice_N = jnp.full(slots, choice.size, jnp.int32).at[slot_GSK.reshape(-1)].set(choice, mode="drop")
    return GatherDispatcher(
        slot_GSK=slot_GSK,
        choice_EGC=choice_N.reshape(routing.num_experts, groups, routing.capacity),
        gate_GSK=routing.gate_SK,
    )


# A slot holds at most one choice, so each of the two moves below is the other's transpose. Said here,
# because XLA's own transpose of a gather is a scatter-add, which is slow.


@jax.custom_vjp
def _to_slots(x_TD: jax.Array, slot_TK: jax.Array, choice_EGC: jax.Array) -> jax.Array:
    return _take(x_TD, choice_EGC // slot_TK.shape[-1])


@jax.custom_vjp
def _to_choices(y_ND: jax.Array, slot_TK: jax.Array, choice_EGC: jax.Array) -> jax.Array:
    return _take(y_ND, slot_TK)


def _to_slots_backward(indices: tuple[jax.Array, jax.Array], d_EGCD: jax.Array) -> tuple:
    slot_TK, choice_EGC = indices
    d_ND = d_EGCD.reshape(-1, d_EGCD.shape[-1])
    return _to_choices(d_ND, slot_TK, choice_EGC).sum(axis=1).astype(d_ND.dtype), None, None


def _to_choices_backward(indices: tuple[jax.Array, jax.Array], d_TKD: jax.Array) -> tuple:
    slot_TK, choice_EGC = indices
    d_ND = _take(d_TKD.reshape(-1, d_TKD.shape[-1]), choice_EGC.reshape(-1))
    return d_ND, None, None


def _take(rows: jax.Array, index: jax.Array) -> jax.Array:
    """Rows by index; zeros where the index is past the end (JAX's default would clamp it)."""
    return jnp.take(rows, index, axis=0, mode="fill", fill_value=0)


_to_slots.defvjp(lambda x, slot, choice: (_to_slots(x, slot, choice), (slot, choice)), _to_slots_backward)
_to_choices.defvjp(
    lambda y, slot, choice: (_to_choices(y, slot, choice), (slot, choice)), _to_choices_backward
)

DISPATCHERS = {"einsum": einsum_dispatcher, "gather": gather_dispatcher}
