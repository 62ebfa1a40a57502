"""Routers: from logits to who goes where, with what gate. Pure functions of one group of tokens.

A router is a function ``(logits_SE, mask_S, key, settings) -> Routing``, lifted over groups with
``jax.vmap``. It knows neither how logits were made nor how tokens are moved.

Letters: S tokens per group, E experts, K choices per token.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import struct

from switchmoe import losses


@struct.dataclass
class Routing:
    """Who goes where: all that passes from a router to a dispatcher.

    ``slot_SK`` counts from 0 in the order in which an expert's buffer fills; a choice that found no
    slot, or whose token is padding, has ``kept_SK`` False and a gate of 0.
    """

    expert_SK: jax.Array  # int32, the chosen experts, best first
    slot_SK: jax.Array  # int32, the place in that expert's buffer, < capacity where kept
    gate_SK: jax.Array  # float32, what the expert's output is multiplied by
    kept_SK: jax.Array  # bool
    load_E: jax.Array  # float32, share of the real tokens' choices for each expert, before capacity
    tokens: jax.Array  # float32, real tokens in the group: the weight of its losses and metrics
    fraction_dropped: jax.Array  # float32, share of the real tokens' choices without a slot
    entropy: jax.Array  # float32, nats, mean over the real tokens of the router's distribution
    losses: dict[str, jax.Array]  # unweighted
    num_experts: int = struct.field(pytree_node=False)
    capacity: int = struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class RouterSettings:
    """What a router needs to know beside the logits."""

    capacity: int  # slots per expert and group


def expert_capacity(tokens: int, num_experts: int, factor: float, choices: int = 1) -> int:
    """Slots per expert: ``ceil(choices * tokens * factor / num_experts)``, within 1 and ``tokens``.

    The effective factor is ``capacity * num_experts / (choices * tokens)``; more slots than tokens
    can never fill, as no token chooses an expert twice. (Switch, eq. 3, leaves the rounding open.)
    """
    # Rounded first: 10 * 1.1 / 1 is 11.000000000000002 in floating point.
    return min(tokens, max(1, math.ceil(round(choices * tokens * factor / num_experts, 6))))


def switch(
    logits_SE: jax.Array, mask_S: jax.Array, key: jax.Array | None, settings: RouterSettings
) -> Routing:
    """Top-1 routing: p = softmax(logits), expert = argmax p, gate = p[expert] (Switch, 2.1).

    The gate is not renormalised: it is what gives the router a gradient from the task's loss.
    Slots fill in the order of the tokens. Losses: ``balance`` and ``z``.

    Args:
      logits_SE: float32.
      mask_S: True where the token is real; padding is never routed and never counted.
      key: not used.
      settings: the capacity.
    """
    del key
    num_experts = logits_SE.shape[-1]
    prob_SE = jax.nn.softmax(logits_SE, axis=-1)
    expert_S = jnp.argmax(prob_SE, axis=-1).astype(jnp.int32)
    chosen_SE = jax.nn.one_hot(expert_S, num_experts, dtype=jnp.int32) * mask_S[:, None]
    slot_S = _first_come_slots(chosen_SE)
    kept_S = mask_S & (slot_S < settings.capacity)
    gate_S = jnp.where(kept_S, jnp.take_along_axis(prob_SE, expert_S[:, None], axis=-1)[:, 0], 0.0)
    entropy_S = -(prob_SE * jax.nn.log_softmax(logits_SE, axis=-1)).sum(axis=-1)
    return Routing(
        expert_SK=expert_S[:, None],
        slot_SK=slot_S[:, None],
        gate_SK=gate_S[:, None],
        kept_SK=kept_S[:, None],
        load_E=chosen_SE.sum(axis=0) / jnp.maximum(mask_S.sum(), 1),
        tokens=mask_S.sum().astype(jnp.float32),
        fraction_dropped=losses.masked_mean(1.0 - kept_S, mask_S),
        entropy=losses.masked_mean(entropy_S, mask_S),
        losses={
            "balance": losses.load_balancing(prob_SE, chosen_SE, mask_S),
            "z": losses.router_z(logits_SE, mask_S),
        },
        num_experts=num_experts,
        capacity=settings.capacity,
    )


def _first_come_slots(chosen_SE: jax.Array) -> jax.Array:
    """How many earlier tokens chose the same expert, for each token; int32, as bf16 would collide."""
    before_SE = jnp.cumsum(chosen_SE, axis=0) - chosen_SE
    return (before_SE * chosen_SE).sum(axis=-1)


ROUTERS = {"switch": switch}
