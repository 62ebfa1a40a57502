"""Routers: from logits to who goes where, with what gate; and the losses that keep them balanced and small.

A router is a function ``(logits_SE, mask_S, key, settings) -> Routing`` of one group of S tokens and E experts; the MoE
layer lifts it over groups with ``jax.vmap``. `Routing` has for each token and choice the expert, the slot in its buffer
and the gate, and for the group the loads, the drops and the unweighted losses. ``key`` is None in evaluation, where
every router is deterministic.

A router knows neither how logits were made nor how tokens are moved. To add one: a function here, its entry in
`ROUTERS`, and a test with a table worked out by hand (tests/routing/test_routers.py; test_router_properties.py beside
it runs all of them through the contract).
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
