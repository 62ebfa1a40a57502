"""What a router chose for each token, as a trace tells it.

Letters: G groups, S tokens per group, E experts, K choices per token.
"""

import jax
import jax.numpy as jnp

from switchmoe.routing import Routing


def told(routing: Routing) -> dict[str, jax.Array]:
    """Of each token of the groups, float32 where nothing else is said.

    ``expert`` int32 and ``gate`` [G, S, K], as the layer used them: 0 where a choice found no slot; ``kept`` bool.
    Where experts choose the tokens, K is E, best first, and ``expert`` is -1 for those that did not take the token.
    ``probability`` [G, S, E] is the router's distribution, ``entropy`` that of it (nats), ``confidence`` its largest
    value. ``margin`` [G, S] is by how much the last of the K best is ahead of the best expert beyond them, in what the
    router ranks (logits; of `loss_free` with a bias, score + bias), NaN where there is none.

    Raises:
      ValueError: a router that chooses nothing (soft).
    """
    if routing.prob_SE is None:
        raise ValueError(
            "moe.router=soft: each token has a share in every slot; accepted is a router that chooses"
        )
    expert_GSK, gate_GSK, kept_GSK = routing.expert_SK, routing.gate_SK, routing.kept_SK
    prob_GSE = routing.prob_SE.astype(jnp.float32)
    if routing.rank_SE is None:
        order_GSK = jnp.argsort(-gate_GSK, axis=-1)
        expert_GSK, gate_GSK, kept_GSK = (
            jnp.take_along_axis(value, order_GSK, axis=-1) for value in (expert_GSK, gate_GSK, kept_GSK)
        )
        expert_GSK = jnp.where(kept_GSK, expert_GSK, -1)
    return {
        "expert": expert_GSK,
        "gate": gate_GSK.astype(jnp.float32),
        "kept": kept_GSK,
        "margin": _margin(routing),
        "entropy": jax.scipy.special.entr(prob_GSE).sum(axis=-1),
        "confidence": prob_GSE.max(axis=-1),
        "probability": prob_GSE,
    }


def _margin(routing: Routing) -> jax.Array:
    choices = routing.expert_SK.shape[-1]
    if routing.rank_SE is None or choices >= routing.num_experts:
        return jnp.full(routing.expert_SK.shape[:2], jnp.nan, jnp.float32)
    best_GSK = jax.lax.top_k(routing.rank_SE.astype(jnp.float32), choices + 1)[0]
    return best_GSK[..., choices - 1] - best_GSK[..., choices]
