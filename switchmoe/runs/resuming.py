"""What may change when a run resumes: a rule for each field of the settings.

`RULES` is the table of docs/resuming.md. A field without a rule is a mistake, which a test finds.
"""

import dataclasses
from typing import Any, NamedTuple

from switchmoe.settings import Settings, to_dict

BITS, MAY, NOT = "may, same bits", "may", "may not"


class Rule(NamedTuple):
    kind: str  # BITS | MAY | NOT
    why: str


_MODEL = Rule(NOT, "it is another model")
_ROUTING = Rule(NOT, "tokens would go to other experts")
_LOSS = Rule(NOT, "another loss is minimised")
_HELD_OUT = Rule(NOT, "held-out figures before and after could not be compared")
_POSITION = Rule(NOT, "the saved position in the text is of these batches")
_UPDATES = Rule(NOT, "the optimizer's state is of these updates")
_ROUNDING = Rule(MAY, "the same sums in another order: the last digits may differ")
_PLACE = Rule(BITS, "the text and the vocabulary are known by their hashes; a moved file is the same file")
_KEPT = Rule(BITS, "it changes what is kept, not what is computed")
_TOLD = Rule(BITS, "it changes what is reported, not what is computed")

RULES: dict[str, Rule] = (
    dict.fromkeys(
        (f"model.{name}" for name in ("d_model", "d_ff", "d_kv", "num_heads", "num_layers", "activation", "dtype"))
        , _MODEL
    )
    | dict.fromkeys(
        (
            *(f"model.{name}" for name in ("tie_embeddings", "scale_logits", "vocab_rows", "relative_buckets", "relative_max_distance", "stacks")),
            *(f"model.{name}" for name in ("num_decoder_layers", "num_kv_heads", "positions", "rotary_theta")),
            *(f"model.{name}" for name in ("attention_scale", "qk_norm", "qkv_bias", "norm_eps")),
        ),
        _MODEL,
    )
    | {
        "model.dropout_rate": _LOSS,
        "model.shared_dropout": _LOSS,
        "model.init_scale": Rule(NOT, "only the first parameters are made with it"),
        "model.scan": Rule(NOT, "the parameters lie in another tree"),
        "model.scan_unroll": _ROUNDING,
        "model.remat": _ROUNDING,
        "moe.dispatch": _ROUNDING,
        "moe.router_init_stddev": Rule(NOT, "only the first parameters are made with it"),
        "moe.eval_capacity_factor": _HELD_OUT,
        "moe.eval_group_size": _HELD_OUT,
        "moe.expert_dropout_rate": _LOSS,
        "moe.bias_rate": _UPDATES,
    }
    | dict.fromkeys(
        (
            f"moe.{name}"
            for name in ("num_experts", "every", "offset", "decoder_every", "decoder_offset", "granularity")
            + ("num_shared", "shared_gate", "attention", "slots", "dense_first", "d_ff", "route_one", "expert_bits", "expert_group")
        )
        , _MODEL
    )
    | dict.fromkeys(
        (
            f"moe.{name}"
            for name in (
                "router", "decoder_router", "choices", "dropless", "capacity", "route_padding", "unit_gates", "capacity_factor", "group_size", "explore", "jitter",
                "input_dropout_rate", "renormalize", "choice_threshold", "priority", "reroute", "score", "branches",
                "router_dtype",
            )
        ),
        _ROUTING,
    )
    | dict.fromkeys(
        (
            f"moe.{name}"
            for name in (
                "balance_loss_weight", "z_loss_weight", "importance_loss_weight", "load_loss_weight", "balance",
                "balance_choices",
            )
        ),
        _LOSS,
    )
    | dict.fromkeys(("data.source", "data.data_dir", "data.vocab"), _PLACE)
    | dict.fromkeys(
        (
            f"data.{name}"
            for name in (
                "text_field", "documents", "validation_share", "split_field", "parts", "parts_exponent", "train_split", "validation_split",
                "batch_size", "input_length", "target_length", "vocab_size",
                "normalization", "bos_id", "eos_id", "objective", "prefix", "noise_density", "mean_span_length", "streams",
            )
        ),
        _POSITION,
    )
    | {"data.prefetch": Rule(BITS, "it changes how early batches are made, not which ones")}
    | dict.fromkeys(
        (
            f"optimizer.{name}"
            for name in (
                "name", "learning_rate", "schedule", "warmup_steps", "clip_norm", "decay_rate", "momentum", "beta1",
                "beta2", "weight_decay",
            )
        ),
        _UPDATES,
    )
    | {
        "train.num_steps": Rule(BITS, "where the schedule does not end with it (all but warmup_cosine)"),
        "train.log_every": _TOLD,
        "train.eval_every": Rule(BITS, "it changes what is reported, not what is computed; another checkpoint may be the best"),
        "train.eval_batches": _HELD_OUT,
        "train.patience": Rule(BITS, "it changes when the run is done, not what a step computes"),
        "train.accumulate": Rule(NOT, "tokens would share capacity in other groups"),
        "train.label_smoothing": _LOSS,
        "train.output_z_loss_weight": _LOSS,
        "train.skip_nonfinite": Rule(BITS, "it changes what happens on a fault"),
        "train.trainable": Rule(NOT, "the optimizer's state is of what was trained"),
        "train.seed": Rule(NOT, "all random numbers would differ"),
    }
    | dict.fromkeys(("init.checkpoint", "init.params", "init.optimizer", "init.upcycle"), Rule(NOT, "the run began with other parameters"))
    | dict.fromkeys(("task.held_out", "task.eval_examples", "task.shots"), _HELD_OUT)
    | dict.fromkeys(
        (f"task.{name}" for name in ("names", "inputs", "targets", "options", "metrics", "mixture", "ceiling", "temperature", "rates", "packed", "filled")),
        Rule(NOT, "other examples, or in another order"),
    )
    | dict.fromkeys(("distill.teacher", "distill.init"), Rule(NOT, "the run began with another teacher"))
    | dict.fromkeys(("distill.weight", "distill.temperature", "distill.top_k"), _LOSS)
    | {
        "distill.store": _PLACE,
        "distill.baseline": _HELD_OUT,
    }
    | {f"mesh.{field.name}": _ROUNDING for field in dataclasses.fields(Settings().mesh)}
    | {f"checkpoint.{field.name}": _KEPT for field in dataclasses.fields(Settings().checkpoint)}
)  # fmt: skip

ENDLESS = ("rsqrt", "warmup_rsqrt", "constant")  # schedules that do not depend on train.num_steps


class Differences(NamedTuple):
    """Of the settings that are asked for from those that a run has."""

    missing: list[str]  # fields that an earlier version did not have: the defaults
    changed: dict[str, tuple[Any, Any]]  # fields that may change: (there, here)


def compare(there: dict[str, dict[str, Any]], asked: Settings, where: str) -> Differences:
    """What differs, where it may.

    Args:
      there: the groups of a `config.json`; a field that they lack has its default.
      where: what has these settings, in messages.

    Raises:
      ValueError: names the fields that may not differ, and why.
    """
    had, defaults, here = flat(there), flat(to_dict(Settings())), flat(to_dict(asked))
    missing = sorted(here.keys() - had.keys())
    had |= {name: defaults[name] for name in missing}
    different = {
        name: (had[name], here.get(name, "none")) for name in sorted(had) if had[name] != here.get(name)
    }
    refused = [
        f"{name} ({old} there, {new} asked: {why})"
        for name, (old, new) in different.items()
        if (why := _refusal(name, had))
    ]
    if refused:
        raise ValueError(
            f"{where} with other settings: {'; '.join(refused)}. Accepted is the same there, or another --workdir"
            " (docs/resuming.md: what may change)"
        )
    return Differences(missing, different)


def _refusal(name: str, had: dict[str, Any]) -> str:
    """Why this field may not differ, "" if it may."""
    rule = RULES.get(name, Rule(NOT, "this version does not know it"))
    if name == "train.num_steps" and had["optimizer.schedule"] not in ENDLESS:
        return f"optimizer.schedule={had['optimizer.schedule']} ends there, so that every step's rate would be another"
    return rule.why if rule.kind == NOT else ""


def flat(groups: dict) -> dict[str, Any]:
    return {f"{group}.{name}": value for group, fields in groups.items() for name, value in fields.items()}


def table() -> str:
    """`RULES` as Markdown, a line for the fields of one group that share a rule."""
    lines = ["| field | when a run resumes | why |", "|---|---|---|"]
    rows: dict[tuple[str, Rule], list[str]] = {}
    for name in flat(to_dict(Settings())):
        rows.setdefault((name.partition(".")[0], RULES[name]), []).append(name.partition(".")[2])
    for (group, rule), names in rows.items():
        lines.append(f"| `{group}.` {', '.join(f'`{name}`' for name in names)} | {rule.kind} | {rule.why} |")
    return "\n".join(lines)
