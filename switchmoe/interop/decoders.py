"""Mixtral, OLMoE, Qwen2-MoE and Qwen3-MoE, as Hugging Face has them: tables, and configs both ways."""

from collections.abc import Mapping
from typing import Any

from switchmoe.interop.tables import FLAT, SAME, Entry, Family
from switchmoe.settings import Settings

BLOCK = "model.layers.{n}"


def _gated(
    theirs: str, ours: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> list[Entry]:
    names = {gate: "wi_gate", up: "wi", down: "wo"}
    return [Entry(f"{theirs}.{a}.weight", f"{ours}/{b}") for a, b in names.items()]


def _fused(moe: str) -> list[Entry]:
    """All experts in one tensor, the gates' outputs before the others: what `transformers` 5 has in memory."""
    experts = "decoder/moe/experts"
    return [
        Entry(f"{moe}.experts.gate_up_proj", f"{experts}/wi_gate", part=0, parts=2),
        Entry(f"{moe}.experts.gate_up_proj", f"{experts}/wi", part=1, parts=2),
        Entry(f"{moe}.experts.down_proj", f"{experts}/wo"),
    ]


def _family(name: str, experts: list[Entry], *others: Entry) -> Family:
    attention = f"{BLOCK}.self_attn"
    letters = {"q": "query", "k": "key", "v": "value"}
    entries = [
        Entry("model.embed_tokens.weight", "embedding", SAME),
        Entry("lm_head.weight", "output", SAME),
        Entry("model.norm.weight", "decoder/norm/scale", SAME),
        Entry(f"{BLOCK}.input_layernorm.weight", "decoder/self_norm/scale", SAME),
        Entry(f"{BLOCK}.post_attention_layernorm.weight", "decoder/ff_norm/scale", SAME),
        *(
            Entry(f"{attention}.{a}_proj.weight", f"decoder/self/{b}")
            for a, b in (letters | {"o": "out"}).items()
        ),
        *_gated(f"{BLOCK}.mlp", "decoder/ff"),
        *others,
        *experts,
        *_fused(f"{BLOCK}.mlp"),
    ]
    unused = ("model.layers.*.self_attn.rotary_emb.inv_freq",)  # older files have it
    return Family(name, tuple(entries), {"lm_head.weight": "embedding"}, unused)


_MLP = [
    Entry(f"{BLOCK}.mlp.gate.weight", "decoder/moe/router"),
    *_gated(f"{BLOCK}.mlp.experts.{{e}}", "decoder/moe/experts"),
]
_QK_NORMS = [
    Entry(f"{BLOCK}.self_attn.{a}_norm.weight", f"decoder/self/{b}_norm", FLAT)
    for a, b in (("q", "query"), ("k", "key"))
]
_BIASES = [
    Entry(f"{BLOCK}.self_attn.{a}_proj.bias", f"decoder/self/{b}_bias", FLAT)
    for a, b in (("q", "query"), ("k", "key"), ("v", "value"))
]
_SPARSE = f"{BLOCK}.block_sparse_moe"
FAMILIES = {
    "mixtral": _family(
        "Mixtral",
        [
            Entry(f"{_SPARSE}.gate.weight", "decoder/moe/router"),
            Entry(f"{BLOCK}.mlp.gate.weight", "decoder/moe/router"),
            *_gated(f"{_SPARSE}.experts.{{e}}", "decoder/moe/experts", "w1", "w3", "w2"),
        ],
    ),
    "olmoe": _family("OLMoE", _MLP, *_QK_NORMS),
    "qwen2_moe": _family(
        "Qwen2-MoE",
        _MLP,
        *_BIASES,
        *_gated(f"{BLOCK}.mlp.shared_expert", "decoder/moe/shared"),
        Entry(f"{BLOCK}.mlp.shared_expert_gate.weight", "decoder/moe/shared_gate"),
    ),
    "qwen3_moe": _family("Qwen3-MoE", _MLP, *_QK_NORMS),
}
CLASSES = {
    "mixtral": "MixtralForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
_COMMON = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "num_key_value_heads": None, "head_dim": None,
    "rope_parameters": None, "rope_theta": None, "rope_scaling": None, "attention_bias": False, "sliding_window": None,
    "use_sliding_window": None, "output_router_logits": False, "router_aux_loss_coef": 0.001, "attention_dropout": 0.0,
    "layer_types": None,
}  # fmt: skip
_QWEN = _COMMON | {
    "hidden_size": 2048, "num_hidden_layers": 24, "vocab_size": 151936, "norm_topk_prob": False, "decoder_sparse_step": 1,
    "mlp_only_layers": None, "eos_token_id": None,
}  # fmt: skip
DEFAULTS = {
    "mixtral": _COMMON | {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "num_experts_per_tok": 2,
        "num_local_experts": 8, "rope_theta": 1e6, "bos_token_id": 1, "eos_token_id": 2, "router_jitter_noise": 0.0,
    },
    "olmoe": _COMMON | {
        "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 16,
        "num_attention_heads": 16, "rms_norm_eps": 1e-5, "num_experts_per_tok": 8, "num_experts": 64, "clip_qkv": None,
        "norm_topk_prob": False, "router_aux_loss_coef": 0.01, "eos_token_id": 50279,
    },
    "qwen2_moe": _QWEN | {
        "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16, "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632, "num_experts_per_tok": 4, "num_experts": 60, "qkv_bias": True,
    },
    "qwen3_moe": _QWEN | {
        "intermediate_size": 6144, "num_attention_heads": 32, "num_key_value_heads": 4, "moe_intermediate_size": 768,
        "num_experts_per_tok": 8, "num_experts": 128,
    },
}  # fmt: skip


def read_config(config: Mapping[str, Any], refuse: Any) -> dict[str, dict[str, Any]]:
    """Our config of theirs, by group. ``refuse(field, accepted)`` raises."""
    kind = config["model_type"]
    if config["hidden_act"] != "silu":
        refuse("hidden_act", "silu")
    for field, accepted in (("attention_bias", False), ("clip_qkv", None), ("rope_scaling", None)):
        if config.get(field, accepted) not in (accepted, None):
            refuse(field, str(accepted).lower())
    if config["use_sliding_window"] or (kind == "mixtral" and config["sliding_window"]):
        refuse("sliding_window", "none")
    if any(one != "full_attention" for one in config["layer_types"] or ()):
        refuse("layer_types", "full_attention")
    rope = config["rope_parameters"] or {}
    if not isinstance(rope, Mapping):
        refuse("rope_parameters", "an object")
    if rope.get("rope_type", "default") != "default":
        refuse("rope_parameters", "the rope_type default")
    heads, d_model = config["num_attention_heads"], config["hidden_size"]
    kv_heads = config["num_key_value_heads"] or heads
    model = {
        "stacks": "decoder_only", "positions": "rotary", "attention_scale": 0.0, "activation": "swiglu",
        "d_model": d_model, "d_kv": config["head_dim"] or d_model // heads, "num_heads": heads,
        "num_kv_heads": 0 if kv_heads == heads else kv_heads, "num_layers": config["num_hidden_layers"],
        "norm_eps": float(config["rms_norm_eps"]), "rotary_theta": float(rope.get("rope_theta") or config["rope_theta"] or 1e4),
        "tie_embeddings": config["tie_word_embeddings"], "scale_logits": not config["tie_word_embeddings"],
        "qk_norm": {"olmoe": "all", "qwen3_moe": "head"}.get(kind, "none"),
        "qkv_bias": kind == "qwen2_moe" and config["qkv_bias"],
        "d_ff": config["intermediate_size"],
    }  # fmt: skip
    return {"model": model, "moe": _read_experts(config, refuse), "data": {"objective": "causal_lm"}}


def _read_experts(config: Mapping[str, Any], refuse: Any) -> dict[str, Any]:
    kind, layers = config["model_type"], config["num_hidden_layers"]
    renormalize, choices = kind == "mixtral" or config["norm_topk_prob"], config["num_experts_per_tok"]
    moe = {
        "num_experts": config["num_local_experts" if kind == "mixtral" else "num_experts"],
        "choices": choices, "router": "top_k", "dropless": True, "every": 1,
        # Ours leaves a single choice its gate, theirs makes it 1.
        "unit_gates": renormalize and choices == 1, "renormalize": renormalize,
        "jitter": float(config.get("router_jitter_noise") or 0.0),
        "z_loss_weight": 0.0,
    }  # fmt: skip
    coefficient = config["router_aux_loss_coef"]
    if not kind.startswith("qwen"):
        return moe | {"balance_loss_weight": _per_layer(coefficient, choices, layers)}
    first, step = sorted(config["mlp_only_layers"] or []), config["decoder_sparse_step"]
    if first != list(range(len(first))) or (first and step != 1) or len(first) >= layers:
        refuse("mlp_only_layers", "none, or the first ones with decoder_sparse_step=1")
    if layers % step:
        refuse("decoder_sparse_step", f"a divisor of num_hidden_layers={layers}")
    width = config["moe_intermediate_size"]
    moe |= {
        "balance_loss_weight": _per_layer(coefficient, choices, (layers - len(first)) // step),
        "dense_first": len(first),
        "every": step,
        "d_ff": 0 if width == config["intermediate_size"] else width,
    }
    if kind == "qwen2_moe":
        shared = config["shared_expert_intermediate_size"]
        if shared % width:
            refuse("shared_expert_intermediate_size", f"a multiple of moe_intermediate_size={width}")
        moe |= {"num_shared": shared // width, "shared_gate": True}
    return moe


def _per_layer(coefficient: float, choices: int, sparse_layers: int) -> float:
    """Our weight of a layer's balance loss. Theirs is K times it, once over all layers; ours are summed over them."""
    return float(coefficient) * choices / sparse_layers


def _of_all_layers(weight: float, choices: int, sparse_layers: int) -> float:
    """The shortest number of which `_per_layer` makes this weight: theirs again, where it was read."""
    exact = weight * sparse_layers / choices
    shorter = (float(f"{exact:.{digits}g}") for digits in range(1, 17))
    return next((one for one in shorter if _per_layer(one, choices, sparse_layers) == weight), exact)


def kind_of(settings: Settings) -> str:
    """Which family a decoder alone is of: by its query/key norm, shared experts and biases."""
    if settings.moe.num_shared or settings.model.qkv_bias:
        return "qwen2_moe"
    return {"head": "qwen3_moe", "all": "olmoe", "none": "mixtral"}[settings.model.qk_norm]


def write_config(settings: Settings, refuse: Any) -> dict[str, Any]:
    """Their config of our settings. ``refuse(field, value, accepted)`` raises where theirs can't say it."""
    model, moe, kind = settings.model, settings.moe, kind_of(settings)
    plain = {"positions": "rotary", "activation": "swiglu"}
    for field, value in plain.items():
        if getattr(model, field) != value:
            refuse(f"model.{field}", getattr(model, field), value)
    if model.attention_scale not in (0.0, model.d_kv**-0.5):
        refuse("model.attention_scale", model.attention_scale, "0")
    if model.tie_embeddings and model.scale_logits:
        refuse("model.scale_logits", True, "False with tied embeddings")
    if not settings.sparse:
        refuse("moe.num_experts", moe.num_experts, "2 or more in a decoder alone")
    allowed = {"granularity": 1, "attention": False, "router": "top_k", "dropless": True}
    allowed |= {"unit_gates": moe.choices == 1 and (kind == "mixtral" or moe.unit_gates)}
    qwen = kind.startswith("qwen")
    allowed |= {"shared_gate": kind == "qwen2_moe"}
    if not qwen:
        allowed |= {"dense_first": 0, "every": 1}
    for field, value in allowed.items():
        if getattr(moe, field) != value:
            refuse(f"moe.{field}", getattr(moe, field), f"{value} with {CLASSES[kind]}")
    if moe.dense_first and moe.every != 1:
        refuse("moe.dense_first", moe.dense_first, "0, or moe.every=1")
    if settings.period("decoder") > 1 and moe.offset % moe.every != moe.every - 1:
        refuse("moe.offset", moe.offset, "-1")
    if kind == "qwen2_moe" and not moe.num_shared:
        refuse("moe.num_shared", 0, "1 or more with model.qkv_bias=True")
    if kind == "mixtral" and not moe.renormalize and moe.choices > 1:
        refuse("moe.renormalize", False, "True without a norm of queries and keys")
    sparse_layers = len(settings.sparse_blocks("decoder"))
    coefficient = _of_all_layers(moe.balance_loss_weight, moe.choices, sparse_layers)
    config: dict[str, Any] = {
        "architectures": [CLASSES[kind]], "model_type": kind, "hidden_size": model.d_model, "hidden_act": "silu",
        "num_attention_heads": model.num_heads, "num_key_value_heads": model.kv_heads,
        "num_hidden_layers": model.num_layers, "rms_norm_eps": model.norm_eps, "vocab_size": settings.embedding_rows,
        "head_dim": model.d_kv, "rope_theta": model.rotary_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_theta},
        "tie_word_embeddings": model.tie_embeddings, "num_experts_per_tok": moe.choices, "attention_bias": False,
        "router_aux_loss_coef": coefficient, "bos_token_id": settings.data.bos_id,
        "eos_token_id": settings.data.eos_id, "sliding_window": None, "pad_token_id": None,
        "max_position_embeddings": max(4096, settings.data.input_length),
        "num_local_experts" if kind == "mixtral" else "num_experts": moe.num_experts,
        "intermediate_size": model.d_ff if qwen else settings.expert_width,
    }  # fmt: skip
    if kind == "mixtral":
        config["router_jitter_noise"] = moe.jitter if moe.explore == "jitter" else 0.0
    else:
        config["norm_topk_prob"] = moe.unit_gates if moe.choices == 1 else moe.renormalize
    if qwen:
        config |= {
            "moe_intermediate_size": settings.expert_width, "decoder_sparse_step": settings.period("decoder"),
            "mlp_only_layers": list(range(settings.first("decoder"))),
        }  # fmt: skip
    if kind == "qwen2_moe":
        config |= {
            "shared_expert_intermediate_size": moe.num_shared * settings.expert_width,
            "qkv_bias": model.qkv_bias,
        }
    if kind != "qwen3_moe" and model.d_kv * model.num_heads != model.d_model and kind != "mixtral":
        refuse("model.d_kv", model.d_kv, f"model.d_model / model.num_heads with {CLASSES[kind]}")
    return config
