"""Routers in which experts choose tokens, or slots mix them: not causal, for encoders only.

Letters: S tokens per group, E experts, C slots per expert, P = E * C slots.
"""

import jax
import jax.numpy as jnp

from switchmoe.routing import losses
from switchmoe.routing.contract import RouterSettings, Routing


def expert_choice(
    logits_SE: jax.Array, mask_S: jax.Array, key: jax.Array | None, settings: RouterSettings
) -> Routing:
    """Each expert takes the C tokens that like it best: p = softmax(logits), gate p (Zhou et al. 2022, 3.2).

    Loads are even by construction, so there is no balance loss; a token may have no expert or several.
    Padding is never taken, and leaves the experts their share: of n real tokens in a group of S an expert
    takes ceil(C n / S). ``fraction_dropped`` is the share of the real tokens that no expert took. ``z``.
    """
    del key
    tokens, num_experts = logits_SE.shape
    prob_SE = jax.nn.softmax(logits_SE, axis=-1)
    order_ES = jnp.argsort(-jnp.where(mask_S[:, None], prob_SE, -1.0), axis=0).T
    place_SE = jnp.argsort(order_ES, axis=-1).astype(jnp.int32).T
    taken = -(-settings.capacity * mask_S.sum() // tokens)
    kept_SE = mask_S[:, None] & (place_SE < taken)
    load_E = kept_SE.sum(axis=0) / jnp.maximum(kept_SE.sum(), 1)
    return Routing(
        expert_SK=jnp.broadcast_to(jnp.arange(num_experts, dtype=jnp.int32), prob_SE.shape),
        slot_SK=place_SE,
        gate_SK=jnp.where(kept_SE, prob_SE, 0.0),
        kept_SK=kept_SE,
        load_E=load_E,
        tokens=mask_S.sum().astype(jnp.float32),
        fraction_dropped=losses.masked_mean(1.0 - kept_SE.any(axis=-1), mask_S),
        entropy=losses.entropy(prob_SE, mask_S),
        losses={"z": losses.router_z(logits_SE, mask_S)},
        num_experts=num_experts,
        capacity=settings.capacity,
        prob_SE=prob_SE,
    )


def soft(logits_SP: jax.Array, mask_S: jax.Array, key: jax.Array | None, settings: RouterSettings) -> Routing:
    """Soft MoE: each slot is a mean of all tokens, each token a mean of all slots (Puigcerver et al. 2023, 2.1).

    Slot p holds sum_s D_sp x_s with D = softmax over the real tokens of the logits; token s gets
    sum_p G_sp y_p with G = softmax over the slots. Nothing is chosen or dropped; ``load_E`` is the mean of
    G over the real tokens. No losses. (The paper's normalisation of both factors, its 2.3, is left to
    the layer's input, which a block has normalised.)

    Args:
      logits_SP: P = E * C, the slots of expert 0 first.
    """
    del key
    tokens, slots = logits_SP.shape
    real_S1 = mask_S[:, None]
    mix_SP = jax.nn.softmax(jnp.where(real_S1, logits_SP, -1e30), axis=0) * real_S1
    logits_SP = jnp.where(real_S1, logits_SP, 0.0)
    gate_SP = jax.nn.softmax(logits_SP, axis=-1) * real_S1
    slot_P = jnp.arange(slots, dtype=jnp.int32)
    num_experts = slots // settings.capacity
    return Routing(
        expert_SK=jnp.broadcast_to(slot_P // settings.capacity, (tokens, slots)),
        slot_SK=jnp.broadcast_to(slot_P % settings.capacity, (tokens, slots)),
        gate_SK=gate_SP,
        kept_SK=jnp.broadcast_to(real_S1, (tokens, slots)),
        load_E=losses.mean_over_tokens(gate_SP, mask_S).reshape(num_experts, -1).sum(axis=-1),
        tokens=mask_S.sum().astype(jnp.float32),
        fraction_dropped=jnp.zeros(()),
        entropy=losses.entropy(jax.nn.softmax(logits_SP, axis=-1), mask_S),
        losses={},
        num_experts=num_experts,
        capacity=settings.capacity,
        mix_SK=mix_SP,
    )
