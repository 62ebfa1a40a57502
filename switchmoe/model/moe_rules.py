"""What the settings of a mixture-of-experts layer come to: its groups, its router, its back end, its widths and slots; and which go together.

Letters: G groups, S tokens per group.
"""

import dataclasses

from switchmoe.dispatch.dispatchers import DECODING, DISPATCHERS
from switchmoe.routing import NOT_CAUSAL, ROUTERS, expert_capacity
from switchmoe.settings import ModelSettings, MoESettings


def group_shape(batch: int, length: int, group_size: int) -> tuple[int, int]:
    """(G, S) for ``batch`` sequences of ``length`` tokens, with S <= group_size as large as can be.

    A group is whole sequences (so many that they divide the batch) or, where group_size < length, an
    equal part of one. The tokens of a group compete for the experts' slots: with several sequences
    in it, a sequence's output depends on its neighbours. ``group_size=0`` is one sequence.
    """
    if group_size == 0:
        return batch, length
    if group_size >= length:
        together = max(n for n in range(1, min(batch, group_size // length) + 1) if batch % n == 0)
        return batch // together, together * length
    tokens = max(n for n in range(1, group_size + 1) if length % n == 0)
    return batch * length // tokens, tokens


def router_name(moe: MoESettings, causal: bool) -> str:
    return (causal and moe.decoder_router) or moe.router


def router_columns(moe: MoESettings, name: str) -> int:
    """Columns of the router's kernel, 0 where it has none."""
    experts = moe.total_experts
    special = {
        "hash": 0,
        "noisy_top_k": 2 * experts,
        "hierarchical": moe.branches + experts,
        "soft": experts * moe.slots,
    }
    return special.get(name, experts)


def dispatch_name(moe: MoESettings, causal: bool = False) -> str:
    """What ``moe.dispatch=auto`` stands for.

    Ragged where there is no capacity; einsum for soft, whose slots mix all tokens; else gather, on every
    platform (compared on CPU: `experiments.bench`).
    """
    if moe.dispatch != "auto":
        return moe.dispatch
    if moe.dropless:
        return "ragged"
    return "einsum" if router_name(moe, causal) == "soft" else "gather"


def check(moe: MoESettings, causal: bool) -> None:
    """Refuses routers, back ends and options that do not go together.

    Raises:
      ValueError: one line with field, value and what would be accepted.
    """

    def refuse(field: str, accepted: str) -> None:
        raise ValueError(f"moe.{field}={getattr(moe, field)}: accepted is {accepted}")

    field = "decoder_router" if causal and moe.decoder_router else "router"
    router, dispatch = router_name(moe, causal), dispatch_name(moe, causal)
    if router not in ROUTERS:
        refuse(field, f"one of {', '.join(ROUTERS)}")
    if dispatch not in (*DISPATCHERS, DECODING):
        refuse("dispatch", f"one of auto, {', '.join(DISPATCHERS)}")
    if causal and router in NOT_CAUSAL:
        fit = ", ".join(name for name in ROUTERS if name not in NOT_CAUSAL)
        refuse(field, f"in a decoder, which is causal, one of {fit} (moe.decoder_router)")
    if moe.choices > 1 and router in ("switch", "hash", "soft"):
        refuse("choices", f"1 with the router {router}")
    if moe.choices > moe.num_experts:
        refuse("choices", f"at most moe.num_experts={moe.num_experts}")
    if router == "noisy_top_k" and moe.total_choices < 2:
        refuse("choices", "2 or more with noisy_top_k: the gate of a single choice is constant")
    if router == "hierarchical":
        per_level = round(moe.total_choices**0.5)
        if moe.total_experts % moe.branches or moe.branches < per_level:
            refuse("branches", f"a divisor of the {moe.total_experts} experts, {per_level} or more")
        if per_level**2 != moe.total_choices or per_level > moe.total_experts // moe.branches:
            refuse("choices", "with hierarchical a square: so many branches, so many experts in each")
    if moe.explore == "sample" and router != "switch":
        refuse("explore", f"argmax, input_dropout or jitter with the router {router}")
    if moe.reroute and router in ("noisy_top_k", "hash", *NOT_CAUSAL):
        refuse("reroute", f"0 with the router {router}")
    if moe.dropless and (dispatch not in ("ragged", DECODING) or router in NOT_CAUSAL):
        refuse("dropless", "True with moe.dispatch=ragged or auto, and a router in which tokens choose")
    if router == "soft" and dispatch != "einsum":
        refuse("dispatch", "einsum or auto with the router soft, whose slots mix all tokens")


def without_effect(moe: MoESettings, stacks: tuple[str, ...] = ("encoder", "decoder")) -> list[str]:
    """The fields that are set to other than their defaults, but that nothing reads with the others as they are.

    Args:
      stacks: of the model.
    """
    changed = [
        field.name
        for field in dataclasses.fields(moe)
        if field.name != "num_experts" and getattr(moe, field.name) != field.default
    ]
    if not moe.routed:
        return changed
    routers = {router_name(moe, stack == "decoder") for stack in stacks}
    encoder = "encoder" in stacks
    balanced = routers & {"switch", "top_k", "hierarchical"}
    noisy, free = "noisy_top_k" in routers, "loss_free" in routers
    has_effect = {
        "branches": "hierarchical" in routers,
        "slots": "soft" in routers,
        "score": free,
        "bias_rate": free,
        "importance_loss_weight": noisy,
        "load_loss_weight": noisy,
        "balance_loss_weight": balanced,
        "balance_choices": balanced and moe.total_choices > 1,
        "balance": balanced or noisy,
        "z_loss_weight": routers - {"hash", "soft", "noisy_top_k"},
        "explore": routers != {"hash"},
        "jitter": moe.explore == "jitter" and routers != {"hash"},
        "input_dropout_rate": moe.explore == "input_dropout" and routers != {"hash"},
        "renormalize": moe.total_choices > 1 and routers - {"hash", *NOT_CAUSAL},
        "choice_threshold": moe.total_choices > 1 and balanced,
        "router_init_stddev": routers - {"hash", "noisy_top_k"},
        "priority": encoder and moe.router not in ("hash", *NOT_CAUSAL) and not moe.dropless,
        "reroute": encoder and not moe.dropless,
        "route_padding": encoder,
        "expert_group": moe.expert_bits > 0,
        "shared_gate": moe.num_shared > 0,
        "decoder_offset": moe.decoder_every > 0,
        "capacity": not moe.dropless and routers != {"soft"},
        "capacity_factor": not (moe.dropless or moe.capacity) and routers != {"soft"},
        "eval_capacity_factor": not (moe.dropless or moe.capacity) and routers != {"soft"},
    }
    return [name for name in changed if not has_effect.get(name, True)]


def expert_width(model: ModelSettings, moe: MoESettings) -> int:
    """Of each of the split experts."""
    return (moe.d_ff or model.d_ff) // moe.granularity


def slots(moe: MoESettings, tokens: int, factor: float) -> int:
    """Of each expert in a group of so many tokens."""
    return min(moe.capacity, tokens) or expert_capacity(tokens, moe.total_experts, factor, moe.total_choices)
