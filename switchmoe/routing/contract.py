"""What passes from a router to a dispatcher, what a router is told, and how slots are given out.

Letters: S tokens per group, E experts, K choices per token, R experts that a token may try in all rounds of
seating, Q = S * K choices in the order of seating, N blocks of them of B.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import struct

from switchmoe.products import argmax
from switchmoe.routing import losses

GROUPS = "groups"  # the vmap axis over which a router of one group is lifted
BLOCK = 64  # choices of which places are counted at once, at most 127


@struct.dataclass
class Routing:
    """Who goes where: all that passes from a router to a dispatcher.

    ``slot_SK`` counts from 0 in the order in which an expert's buffer fills; a choice that found no
    slot, or whose token is padding, has ``kept_SK`` False and a gate of 0. A slot holds one choice,
    unless ``mix_SK`` is given: then K is all slots, and every token has a share in each (Soft MoE).
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
    mix_SK: jax.Array | None = None  # float32, what the token is multiplied by on its way into the slot
    prob_SE: jax.Array | None = None  # the router's distribution; for traces alone, as the next
    rank_SE: jax.Array | None = None  # what experts were ranked by; None where they choose the tokens


@dataclasses.dataclass(frozen=True)
class RouterSettings:
    """What a router needs to know beside the logits; each router says what it uses."""

    capacity: int  # slots per expert and group
    choices: int = 1  # experts a token goes to; with expert choice, the mean over tokens
    renormalize: bool = True  # gates of a token's choices sum to 1, where it has several
    threshold: float = 0.0  # a choice after the first is kept with probability gate / threshold; 0: always
    explore: str = "argmax"  # switch: argmax | sample
    causal: bool = False  # slots are given token by token, so that no later token takes an earlier one's
    priority: bool = False  # slots go to the tokens with the largest gates first
    reroute: int = 0  # rounds in which choices without a slot try the next best expert
    score: str = "softmax"  # loss_free: softmax | sigmoid
    num_experts: int = 0  # hash, which has no logits
    branches: int = 1  # hierarchical: the experts form so many groups
    balance_choices: str = "all"  # all | first: the choices that the balance loss counts
    balance_axis: str | None = None  # a vmap axis over which statistics of the losses are pooled


def expert_capacity(tokens: int, num_experts: int, factor: float, choices: int = 1) -> int:
    """Slots per expert: ``ceil(choices * tokens * factor / num_experts)``, within 1 and ``tokens``.

    The effective factor is ``capacity * num_experts / (choices * tokens)``; more slots than tokens
    can never fill, as no token chooses an expert twice. (Switch, eq. 3, leaves the rounding open.)
    """
    # Rounded first: 10 * 1.1 / 1 is 11.000000000000002 in floating point.
    return min(tokens, max(1, math.ceil(round(choices * tokens * factor / num_experts, 6))))


def token_choice(
    rank_SE: jax.Array,
    mask_S: jax.Array,
    settings: RouterSettings,
    gate_SE: jax.Array,
    log_gate_SE: jax.Array,
    prob_SE: jax.Array,
    key: jax.Array | None = None,
    **named_losses: jax.Array,
) -> Routing:
    """Each token takes the ``choices`` experts it ranks highest; the routers of this kind end here.

    First choices are seated before second ones (GShard, alg. 1), among equals in the order of the
    tokens, or of their best gates with ``priority`` (V-MoE's batch-prioritised routing). A choice that
    found no slot tries, ``reroute`` times, the token's next best expert (below its K best, each tried once),
    after all others of that round are seated (Switch, app. B). In each of these a later token may take an
    earlier one's slot: where ``causal``, all choices of a token are seated before those of the next, and the
    other two are refused.

    Args:
      rank_SE: what is ranked, larger first, ties to the lower index.
      gate_SE: the gates, before they are renormalised over a token's choices.
      log_gate_SE: their logarithms, which also tell gates apart that underflow or saturate.
      prob_SE: the distribution of which the entropy is reported.
      key: draws which choices after the first are kept where ``threshold`` is set; None keeps all.
    """
    if settings.causal and (settings.priority or settings.reroute):
        raise ValueError("causal=True: accepted is priority=False and reroute=0")
    num_experts, k = rank_SE.shape[-1], settings.choices
    ranks = min(k * (settings.reroute + 1), num_experts)
    ranked_SR = _best(rank_SE, ranks)
    first_SK = ranked_SR[:, :k]
    gate_SK = _gates(gate_SE, log_gate_SE, first_SK, settings)
    wanted_SK = jnp.broadcast_to(mask_S[:, None], gate_SK.shape)
    if key is not None and settings.threshold and k > 1:
        keep_SK = jax.random.uniform(key, gate_SK.shape) * settings.threshold < gate_SK
        wanted_SK &= keep_SK.at[:, 0].set(True)
    order_S = jnp.argsort(-log_gate_SE.max(axis=-1)) if settings.priority else None

    expert_SK, slot_SK, kept_SK = first_SK, jnp.zeros_like(first_SK), jnp.zeros_like(wanted_SK)
    filled_E, next_S = jnp.zeros(num_experts, jnp.int32), jnp.full(len(rank_SE), k, jnp.int32)
    for again in range(1 + min(settings.reroute, num_experts - k)):
        tried_SK, trying_SK = first_SK, wanted_SK & ~kept_SK
        if again:
            rank_SK = next_S[:, None] + jnp.cumsum(trying_SK, axis=1) - trying_SK
            trying_SK &= rank_SK < ranks
            next_S += trying_SK.sum(axis=1)
            tried_SK = jnp.take_along_axis(ranked_SR, jnp.minimum(rank_SK, ranks - 1), axis=1)
        place_SK, wanted_E = _seat(tried_SK, trying_SK, filled_E, settings, order_S)
        filled_E = jnp.minimum(filled_E + wanted_E, settings.capacity)
        if not again:
            load_E = wanted_E
        seated_SK = trying_SK & (place_SK < settings.capacity)
        expert_SK = jnp.where(seated_SK, tried_SK, expert_SK)
        slot_SK = jnp.where(seated_SK | (not again), place_SK, slot_SK)
        kept_SK |= seated_SK
    if settings.reroute:
        gate_SK = _gates(gate_SE, log_gate_SE, expert_SK, settings)

    wanted = jnp.maximum(wanted_SK.sum(), 1)
    return Routing(
        expert_SK=expert_SK,
        slot_SK=slot_SK,
        gate_SK=jnp.where(kept_SK, gate_SK, 0.0),
        kept_SK=kept_SK,
        load_E=load_E / wanted,
        tokens=mask_S.sum().astype(jnp.float32),
        fraction_dropped=(wanted_SK & ~kept_SK).sum() / wanted,
        entropy=losses.entropy(prob_SE, mask_S),
        losses=named_losses,
        num_experts=num_experts,
        capacity=settings.capacity,
        prob_SE=prob_SE,
        rank_SE=rank_SE,
    )


def _seat(
    expert_SK: jax.Array,
    wanted_SK: jax.Array,
    filled_E: jax.Array,
    settings: RouterSettings,
    order_S: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """(place_SK, wanted_E): the slot that each wanted choice would take, and how many want each expert.

    Counted in integers, as slots counted in bf16 collide.
    """
    wish_SK = jnp.where(wanted_SK, expert_SK, -1)
    if order_S is not None:
        wish_SK = wish_SK[order_S]
    # In the order of seating: token by token, or all first choices, all second ones, ...
    wish_Q = (wish_SK if settings.causal else wish_SK.T).reshape(-1)
    place_Q, wanted_E = _places(wish_Q, filled_E)
    place_SK = place_Q.reshape(expert_SK.shape) if settings.causal else place_Q.reshape(-1, len(expert_SK)).T
    if order_S is not None:
        place_SK = place_SK[jnp.argsort(order_S)]
    return place_SK, wanted_E


def _places(wish_Q: jax.Array, filled_E: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which of those who wish the same expert each is, from ``filled`` on (0 of who wishes none, -1), and how many they are.

    Counted within blocks, then over the blocks: one sum over all in turn, of [Q, E], takes 177 ms on a CPU core for 24,576
    choices of 512 experts, this 8.
    """
    size = min(BLOCK, len(wish_Q))
    wish_NB = jnp.pad(wish_Q, (0, -len(wish_Q) % size), constant_values=-1).reshape(-1, size)
    earlier_NB = jnp.tril(wish_NB[:, :, None] == wish_NB[:, None, :], -1).sum(axis=-1, dtype=jnp.int32)
    wishes_NBE = wish_NB[..., None] == jnp.arange(filled_E.size)[None, None]
    # Of 8 bits a block's counts are summed four times as fast, and there is room for them.
    count_NE = wishes_NBE.astype(jnp.int8).sum(axis=1, dtype=jnp.int8).astype(jnp.int32)
    before_NE = jnp.cumsum(count_NE, axis=0) - count_NE + filled_E[None]
    place_NB = jnp.take_along_axis(before_NE, jnp.maximum(wish_NB, 0), axis=1) + earlier_NB
    return jnp.where(wish_NB < 0, 0, place_NB).reshape(-1)[: len(wish_Q)], count_NE.sum(axis=0)


def chosen(rank_SE: jax.Array, choices: int) -> jax.Array:
    """1 where a token ranks an expert among its best ``choices``, else 0; float32 [S, E]."""
    return jax.nn.one_hot(_best(rank_SE, choices), rank_SE.shape[-1]).sum(axis=1)


def _best(rank_SE: jax.Array, count: int) -> jax.Array:
    if count == 1:
        return argmax(rank_SE)[:, None]
    return jax.lax.top_k(rank_SE, count)[1].astype(jnp.int32)


def _gates(
    gate_SE: jax.Array, log_gate_SE: jax.Array, expert_SK: jax.Array, settings: RouterSettings
) -> jax.Array:
    # A single gate would become a constant 1, and the router lose its gradient.
    if settings.renormalize and settings.choices > 1:
        # g / sum(g), from logarithms: gates that all underflow sum to 1 as well.
        return jax.nn.softmax(jnp.take_along_axis(log_gate_SE, expert_SK, axis=-1), axis=-1)
    return jnp.take_along_axis(gate_SE, expert_SK, axis=-1)
