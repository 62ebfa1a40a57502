"""T5, mT5 and Switch Transformers, as Hugging Face and T5X have them: tables, and configs both ways."""

from collections.abc import Mapping
from typing import Any

from switchmoe.interop.tables import KERNEL, LINEAR, SAME, Entry, Family
from switchmoe.model.moe_rules import slots
from switchmoe.settings import Settings

Shapes = Mapping[str, tuple[int, ...]]


def _attention(theirs: str, ours: str) -> list[Entry]:
    names = {"q": "query", "k": "key", "v": "value", "o": "out"}
    return [Entry(f"{theirs}.{letter}.weight", f"{ours}/{name}") for letter, name in names.items()]


def _kernels(gated: bool) -> dict[str, str]:
    return {"wi_0": "wi_gate", "wi_1": "wi", "wo": "wo"} if gated else {"wi": "wi", "wo": "wo"}


def _feed_forward(theirs: str, ours: str, gated: bool) -> list[Entry]:
    return [Entry(f"{theirs}.{a}.weight", f"{ours}/{b}") for a, b in _kernels(gated).items()]


def _stack(stack: str, dense: str, gated: bool) -> list[Entry]:
    """``dense``: what a feed-forward that is not sparse is called."""
    block, ff = f"{stack}.block.{{n}}.layer", 2 if stack == "decoder" else 1
    found = _attention(f"{block}.0.SelfAttention", f"{stack}/self")
    found.append(Entry(f"{block}.0.layer_norm.weight", f"{stack}/self_norm/scale", SAME))
    if stack == "decoder":
        found += _attention(f"{block}.1.EncDecAttention", f"{stack}/cross")
        found.append(Entry(f"{block}.1.layer_norm.weight", f"{stack}/cross_norm/scale", SAME))
    found.append(Entry(f"{block}.{ff}.layer_norm.weight", f"{stack}/ff_norm/scale", SAME))
    found += _feed_forward(f"{block}.{ff}.{dense}", f"{stack}/ff", gated)
    found.append(Entry(f"{block}.{ff}.mlp.router.classifier.weight", f"{stack}/moe/router"))
    found += _feed_forward(f"{block}.{ff}.mlp.experts.expert_{{e}}", f"{stack}/moe/experts", gated)
    bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    found.append(Entry(bias, f"{stack}/relative_bias/table"))
    found.append(Entry(f"{stack}.final_layer_norm.weight", f"{stack}/norm/scale", SAME))
    return found


def _hugging_face(name: str, dense: str, gated: bool) -> Family:
    # Safetensors keep one of the names that share a tensor, and not always the first.
    embeddings = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    entries = [Entry(theirs, "embedding", SAME) for theirs in embeddings]
    entries.append(Entry("lm_head.weight", "output", SAME))
    entries += _stack("encoder", dense, gated) + _stack("decoder", dense, gated)
    return Family(
        name,
        tuple(entries),
        dict.fromkeys((*embeddings, "lm_head.weight"), "embedding"),
        # T5's first releases have it, and no model reads it
        ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
    )


def family(sparse: bool, gated: bool) -> Family:
    """Of the files that Hugging Face's classes read."""
    if sparse:
        return _hugging_face("SwitchTransformers", "mlp", gated)
    return _hugging_face("T5", "DenseReluDense", gated)


def written_copies(settings: Settings) -> dict[str, str]:
    """Of names, the tensors that they copy: without these `transformers` 5 leaves an untied Switch's inputs random."""
    untied = (
        settings.sparse and settings.stacks == ("encoder", "decoder") and not settings.model.tie_embeddings
    )
    return {f"{stack}.embed_tokens.weight": "shared.weight" for stack in settings.stacks} if untied else {}


# Configs: a field of theirs, and ours.
FIELDS = {
    "d_model": "model.d_model", "d_kv": "model.d_kv", "d_ff": "model.d_ff", "num_heads": "model.num_heads",
    "num_layers": "model.num_layers", "layer_norm_epsilon": "model.norm_eps",
    "relative_attention_num_buckets": "model.relative_buckets",
    "relative_attention_max_distance": "model.relative_max_distance",
}  # fmt: skip
CLASSES = {
    "switch_transformers": "SwitchTransformersForConditionalGeneration",
    "t5": "T5ForConditionalGeneration",
    "mt5": "MT5ForConditionalGeneration",
}
ACTIVATIONS = {"relu": "relu", "gated-gelu": "geglu", "gated-silu": "swiglu"}


def read_config(config: Mapping[str, Any], refuse: Any) -> dict[str, dict[str, Any]]:
    """Our config of theirs, by group. ``refuse(field, accepted)`` raises."""
    sparse = config["model_type"] == "switch_transformers"
    if config["pad_token_id"] not in (0, None):
        refuse("pad_token_id", "0")
    found: dict[str, dict[str, Any]] = {"model": {}, "moe": {"num_experts": 1}, "data": {}}
    for field, ours in FIELDS.items():
        found["model"][ours.removeprefix("model.")] = config[field]
    model, layers = found["model"], config["num_layers"]
    decoders = config.get("num_decoder_layers") or layers
    model["num_decoder_layers"] = 0 if decoders == layers else decoders
    field = "dense_act_fn" if sparse else "feed_forward_proj"
    known = ("relu",) if sparse else tuple(ACTIVATIONS)  # their Switch has no gated feed-forward
    if config[field] not in known:
        refuse(field, f"one of {', '.join(known)}")
    model["activation"] = ACTIVATIONS[config[field]]
    tied = config["tie_word_embeddings"]
    if tied not in (True, False):
        refuse("tie_word_embeddings", "true or false")
    # mT5's logits are never scaled, T5's where the embeddings were said to be tied, whether they are or not.
    scaled = {"mt5": False, "t5": config.get("scale_decoder_outputs", tied)}
    model |= {"tie_embeddings": tied, "scale_logits": scaled.get(config["model_type"], tied)}
    model["dropout_rate"] = float(config["dropout_rate"])
    found["data"]["objective"] = "span_corruption"
    return found | {"moe": _read_sparse(config, layers, decoders, refuse)} if sparse else found


def _step(count: int, sparse: int) -> int:
    """Their distance between sparse blocks; without any, all the blocks, which leaves block 1 sparse."""
    return count // sparse if sparse else count


def _sparse_blocks(count: int, step: int) -> list[int]:
    """As their model has it."""
    return [i for i in range(count) if step == 1 or i % step == 1]


def _read_sparse(config: Mapping[str, Any], layers: int, decoders: int, refuse: Any) -> dict[str, Any]:
    if config["num_experts"] < 1:
        refuse("num_experts", "1 or more")
    if config["router_bias"]:
        refuse("router_bias", "false")
    if config["router_dtype"] == "float16":
        refuse("router_dtype", "float32 or bfloat16")
    steps, first = {}, {}
    for stack, count in (("encoder", layers), ("decoder", decoders)):
        field = f"num_sparse_{stack}_layers"
        step = _step(count, config[field])
        # Ours repeats whole periods, behind `dense_first` blocks; theirs has its first sparse block at 1, or everywhere.
        first[stack] = count % step if step else 0
        if step < 1 or first[stack] > 1:
            refuse(
                field, f"a number that gives a step ({count} // {field}) that divides {count} or {count - 1}"
            )
        steps[stack] = step, 0 if step == 1 else 1 - first[stack]
    if first["encoder"] != first["decoder"]:
        refuse(
            "num_sparse_decoder_layers", "one whose step divides the blocks if and only if the encoder's does"
        )
    (every, offset), (decoder_every, decoder_offset) = steps["encoder"], steps["decoder"]
    moe = {
        "num_experts": config["num_experts"], "route_one": config["num_experts"] == 1,
        "every": every, "offset": offset, "dense_first": first["encoder"],
        "router_dtype": config["router_dtype"], "jitter": float(config["router_jitter_noise"]),
        # Theirs: so many slots for each expert and sequence, which padding takes as well.
        "capacity": config["expert_capacity"], "group_size": 0, "eval_group_size": 0, "route_padding": True,
        "balance_loss_weight": float(config["router_aux_loss_coef"]), "z_loss_weight": float(config["router_z_loss_coef"]),
        "expert_dropout_rate": float(config["dropout_rate"]),
    }  # fmt: skip
    if (decoder_every, decoder_offset) != (every, offset):
        moe |= {"decoder_every": decoder_every, "decoder_offset": decoder_offset}
    return moe


_T5 = {
    "num_layers": 6, "layer_norm_epsilon": 1e-6, "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128, "feed_forward_proj": "relu", "tie_word_embeddings": True, "dropout_rate": 0.1,
    "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_heads": 8, "vocab_size": 32128, "decoder_start_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
_SWITCH = _T5 | {
    "d_model": 768, "num_layers": 12, "num_heads": 12, "dense_act_fn": "relu", "expert_capacity": 64, "num_experts": 8,
    "num_sparse_encoder_layers": 3, "num_sparse_decoder_layers": 3, "router_bias": False, "router_jitter_noise": 0.01,
    "router_dtype": "float32", "router_aux_loss_coef": 0.001, "router_z_loss_coef": 0.001,
}  # fmt: skip
_MT5 = _T5 | {
    "d_ff": 1024, "num_layers": 8, "num_heads": 6, "vocab_size": 250112, "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}  # fmt: skip
DEFAULTS = {"switch_transformers": _SWITCH, "t5": _T5, "mt5": _MT5}


def write_config(settings: Settings, refuse: Any) -> dict[str, Any]:
    """Their config of our settings. ``refuse(field, value, accepted)`` raises where theirs can't say it."""
    model, moe = settings.model, settings.moe
    plain = {
        "positions": "relative",
        "qk_norm": "none",
        "qkv_bias": False,
        "attention_scale": 1.0,
        "num_kv_heads": 0,
    }
    for field, value in plain.items():
        if getattr(model, field) != value and not (
            field == "num_kv_heads" and model.kv_heads == model.num_heads
        ):
            refuse(f"model.{field}", getattr(model, field), value)
    if model.tie_embeddings and not model.scale_logits and settings.sparse:
        refuse("model.scale_logits", False, True)
    kind = "switch_transformers" if settings.sparse else "t5"
    config: dict[str, Any] = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "is_encoder_decoder": True,
    }
    config |= {field: getattr(model, ours.removeprefix("model.")) for field, ours in FIELDS.items()}
    activations = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    config |= {
        "num_decoder_layers": settings.layers("decoder"), "vocab_size": settings.embedding_rows,
        "dropout_rate": model.dropout_rate, "tie_word_embeddings": model.tie_embeddings and model.scale_logits, "pad_token_id": 0,
        "eos_token_id": settings.data.eos_id, "decoder_start_token_id": settings.data.bos_id,
    }  # fmt: skip
    if not settings.sparse:
        return config | {"feed_forward_proj": activations[model.activation]}
    if model.activation != "relu":
        refuse("model.activation", model.activation, "relu, with experts")
    allowed = {
        "router": "switch", "decoder_router": "", "granularity": 1, "num_shared": 0, "attention": False,
        "unit_gates": False, "priority": False, "reroute": 0,
    }  # fmt: skip
    for field, value in allowed.items():
        if getattr(moe, field) != value:
            refuse(f"moe.{field}", getattr(moe, field), repr(value))
    if settings.expert_width != model.d_ff:
        refuse("moe.d_ff", moe.d_ff, "0")
    for stack in ("encoder", "decoder"):
        sparse, count = list(settings.sparse_blocks(stack)), settings.layers(stack)
        numbers = [n for n in range(1, count + 1) if _sparse_blocks(count, _step(count, n)) == sparse]
        if not numbers:
            refuse(
                "moe.offset",
                moe.offset,
                f"one by which the {stack}'s sparse blocks are 1, 1 + step, 1 + 2 step, ...",
            )
        config[f"num_sparse_{stack}_layers"] = min(numbers, key=lambda n: abs(n - len(sparse)))
    # Without a capacity of its own: as many as a sequence of the run's length has at evaluation.
    length = max(settings.data.input_length, settings.data.target_length)
    capacity = moe.capacity or (length if moe.dropless else slots(moe, length, moe.eval_capacity_factor))
    return config | {
        "num_experts": moe.num_experts, "expert_capacity": capacity, "dense_act_fn": "relu",
        "router_bias": False, "router_dtype": moe.router_dtype,
        "router_jitter_noise": moe.jitter if moe.explore == "jitter" else 0.0,
        "router_aux_loss_coef": moe.balance_loss_weight, "router_z_loss_coef": moe.z_loss_weight,
        "feed_forward_proj": "relu",
    }  # fmt: skip


# T5X (flaxformer's and T5X's own models): kernels are [inputs, outputs] as ours, experts side by side.


def _t5x_stack(stack: str, gated: bool) -> list[Entry]:
    block = f"target.{stack}.layers_{{n}}"
    own = "attention" if stack == "encoder" else "self_attention"
    found = []
    pairs = [(own, "self")] + ([("encoder_decoder_attention", "cross")] if stack == "decoder" else [])
    for theirs, ours in pairs:
        found += [
            Entry(f"{block}.{theirs}.{name}.kernel", f"{stack}/{ours}/{name}", KERNEL)
            for name in ("query", "key", "value", "out")
        ]
    norms = {"self": own, "cross": "cross_attention", "ff": "mlp"}
    found += [
        Entry(f"{block}.pre_{theirs}_layer_norm.scale", f"{stack}/{ours}_norm/scale", SAME)
        for ours, theirs in norms.items()
    ]
    found += [Entry(f"{block}.mlp.{a}.kernel", f"{stack}/ff/{b}", KERNEL) for a, b in _kernels(gated).items()]
    found.append(Entry(f"{block}.mlp.router.router_weights.w.kernel", f"{stack}/moe/router", KERNEL))
    found += [
        Entry(f"{block}.mlp.expert.{a}.kernel", f"{stack}/moe/experts/{b}", KERNEL)
        for a, b in _kernels(gated).items()
    ]
    found.append(Entry(f"target.{stack}.relpos_bias.rel_embedding", f"{stack}/relative_bias/table", SAME))
    found.append(Entry(f"target.{stack}.{stack}_norm.scale", f"{stack}/norm/scale", SAME))
    return found


def t5x_family(gated: bool) -> Family:
    entries = (
        Entry("target.token_embedder.embedding", "embedding", SAME),
        # [inputs, rows] there, rows first here
        Entry("target.decoder.logits_dense.kernel", "output", LINEAR),
        *_t5x_stack("encoder", gated),
        *_t5x_stack("decoder", gated),
    )
    return Family("T5X", entries)


def t5x_config(shapes: Shapes, missing: Any) -> dict[str, dict[str, Any]]:
    """Our config, of the shapes alone: T5X keeps a model's settings in a gin file elsewhere. ``missing(name)`` raises."""

    def shape(name: str) -> tuple[int, ...]:
        return shapes[name] if name in shapes else missing(name)

    def matrix(name: str) -> tuple[int, ...]:
        return shape(name) if len(shape(name)) == 2 else missing(f"{name} of two axes")

    rows, d_model = matrix("target.token_embedder.embedding")
    heads, buckets = matrix("target.encoder.relpos_bias.rel_embedding")
    query = shape("target.encoder.layers_0.attention.query.kernel")
    layers = {stack: _count(shapes, f"target.{stack}.layers_") for stack in ("encoder", "decoder")}
    gated = any(name.endswith(".wi_0.kernel") for name in shapes)
    wi = "wi_0" if gated else "wi"
    dense = next((name for name in shapes if name.endswith(f".mlp.{wi}.kernel")), "")
    expert = next((name for name in shapes if name.endswith(f".mlp.expert.{wi}.kernel")), "")
    if not (dense or expert):
        missing(f"target.encoder.layers_0.mlp.{wi}.kernel")
    model = {
        "d_model": d_model, "num_heads": heads, "relative_buckets": buckets, "d_ff": shapes[dense or expert][-1],
        "d_kv": query[-1] if len(query) == 3 else query[-1] // heads, "num_layers": layers["encoder"],
        "num_decoder_layers": 0 if layers["decoder"] == layers["encoder"] else layers["decoder"],
        "activation": "geglu" if gated else "relu", "vocab_rows": rows,
        "tie_embeddings": "target.decoder.logits_dense.kernel" not in shapes,
    }  # fmt: skip
    moe: dict[str, Any] = {"num_experts": 1}
    if expert:
        # Flaxformer's groups, of Switch Base; it has no jitter
        moe = {"num_experts": shapes[expert][0], "group_size": 8192, "jitter": 0.0}
        for stack, prefix in (("encoder", ""), ("decoder", "decoder_")):
            sparse = [
                n
                for n in range(layers[stack])
                if f"target.{stack}.layers_{n}.mlp.expert.{wi}.kernel" in shapes
            ]
            every = layers[stack] // len(sparse) if sparse else 0
            moe |= {f"{prefix}every": every, f"{prefix}offset": sparse[0] if sparse else -1}
        if (moe["decoder_every"], moe["decoder_offset"]) == (moe["every"], moe["offset"]):
            del moe["decoder_every"], moe["decoder_offset"]
    return {"model": model, "moe": moe, "data": {"objective": "span_corruption"}}


def _count(shapes: Shapes, prefix: str) -> int:
    return 1 + max(
        (int(n.removeprefix(prefix).split(".")[0]) for n in shapes if n.startswith(prefix)), default=-1
    )
