"""Routers: from logits to who goes where, with what gate. Pure functions of one group of tokens.

A router is a function ``(logits, mask_S, key, settings) -> Routing``, lifted over groups with
``jax.vmap``. It knows neither how logits were made nor how tokens are moved. ``key`` is None in
evaluation, where every router is deterministic.
"""

from switchmoe.routing.contract import GROUPS, RouterSettings, Routing, expert_capacity
from switchmoe.routing.expert_choice import expert_choice, soft
from switchmoe.routing.token_choice import (
    hashed,
    hierarchical,
    loss_free,
    noisy_top_k,
    sinkhorn,
    switch,
    top_k,
)

ROUTERS = {
    "switch": switch,
    "top_k": top_k,
    "noisy_top_k": noisy_top_k,
    "hierarchical": hierarchical,
    "hash": hashed,
    "sinkhorn": sinkhorn,
    "loss_free": loss_free,
    "expert_choice": expert_choice,
    "soft": soft,
}
NOT_CAUSAL = ("expert_choice", "soft")  # a later token can change an earlier one's output

__all__ = [
    "GROUPS",
    "NOT_CAUSAL",
    "ROUTERS",
    "RouterSettings",
    "Routing",
    "expert_capacity",
    "expert_choice",
    "hashed",
    "hierarchical",
    "loss_free",
    "noisy_top_k",
    "sinkhorn",
    "soft",
    "switch",
    "top_k",
]
