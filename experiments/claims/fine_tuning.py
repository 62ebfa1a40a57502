"""What Switch Transformers and ST-MoE say of fine-tuning, on the scale's task (`Scale.tune`)."""

from experiments.claims.claim import Claim, Overrides, Scale, dense, switch
from switchmoe.analysis.verdicts import Check, better, equal, gain_kept, lower


def tuned(scale: Scale, before: Overrides, expert_dropout: float = 0.4, **more: object) -> Overrides:
    """A pre-trained arm fine-tuned on the task; ``more`` are fields of moe."""
    arm = before | scale.tune | {"init.checkpoint": before}
    if before["moe.num_experts"] == 1:
        return arm
    return arm | {"moe.expert_dropout_rate": expert_dropout} | {f"moe.{name}": v for name, v in more.items()}


def _dropouts(scale: Scale) -> dict:
    sparse = switch(scale.experts)
    arms = {"T5 0.1": tuned(scale, dense())}
    for rate in (0.1, 0.2, 0.3):
        arms[f"Switch {rate}"] = tuned(scale, sparse, rate) | {"model.dropout_rate": rate}
    return arms | {"Switch 0.1, experts 0.4": tuned(scale, sparse)}


def _dropout_checks(scale: Scale) -> list[Check]:
    best = "Switch 0.1, experts 0.4"
    return [
        better(best, "Switch 0.1", paper="0.5 on GLUE"),
        better(best, "Switch 0.2", paper="0.8 on GLUE"),
        better(best, "Switch 0.3", paper="1.3 on GLUE"),
        better(best, "T5 0.1", paper="2.3 on GLUE"),
        lower(best, "Switch 0.1"),
        lower(best, "Switch 0.2"),
        lower(best, "Switch 0.3"),
        lower(best, "T5 0.1"),
    ]


SAME = 0.01  # nats a token of the right answers; to guess a class by its share costs but 0.2 or so
SUBSETS = ("all", "non_moe", "moe_only", "attention", "ffn")


def _subsets(scale: Scale) -> dict:
    whole = tuned(scale, switch(scale.experts))
    same = ("all", "ffn") if scale.all_sparse else ("all",)  # without dense feed-forwards `ffn` is `moe_only`
    rest = {name: whole | {"train.trainable": name} for name in SUBSETS if name not in same}
    return {"all": whole} | rest


def _drops(scale: Scale) -> dict:
    sparse = switch(scale.experts)
    return {
        f"{aux}, {train:g} / {other:g}": tuned(
            scale, sparse, capacity_factor=train, eval_capacity_factor=other, balance_loss_weight=weight
        )
        for aux, weight in (("balanced", 1e-2), ("free", 0.0))
        for train, other in ((0.75, 2.0), (1.25, 2.0))
    }


def _drop_checks(scale: Scale) -> list[Check]:
    return [
        equal("balanced, 0.75 / 2", "balanced, 1.25 / 2", within=SAME, paper="86.5 and 86.7"),
        equal("free, 0.75 / 2", "free, 1.25 / 2", within=SAME, paper="85.7 and 85.8"),
        better("balanced, 1.25 / 2", "free, 1.25 / 2", paper="0.9"),
        lower("balanced, 1.25 / 2", "free, 1.25 / 2"),
    ]


def _students(scale: Scale) -> dict:
    """The pre-trained dense model, tuned alone and beside a fine-tuned sparse one that teaches it."""
    teacher, alone = tuned(scale, switch(scale.experts)), tuned(scale, dense())
    return {
        "T5": alone,
        "Switch": teacher,
        # With the teacher's parameters (`distill.init`) no feed-forward would be pre-trained where every block is sparse.
        "distilled": alone | {"distill.teacher": teacher, "distill.init": False},
    }


CLAIMS = [
    Claim(
        "table4",
        "Switch, Table 4",
        "Fine-tuning with dropout 0.1, and 0.4 inside the experts, is better than with 0.1, 0.2 or 0.3 everywhere.",
        {
            "T5 0.1": "82.9 GLUE, 72.4 SuperGLUE",
            "Switch 0.1": "84.7, 73.0",
            "Switch 0.2": "84.4, 73.2",
            "Switch 0.3": "83.9, 70.7",
            "Switch 0.1, experts 0.4": "85.2, 73.0",
        },
        _dropouts,
        _dropout_checks,
        "Differences of half a point are far below what one small task can tell. The losses are those of the right answers.",
    ),
    Claim(
        "table8",
        "Switch, Table 8",
        "A dense student of a fine-tuned Switch model keeps 30 % of its gain on SuperGLUE.",
        {"T5": "74.6", "Switch": "81.3", "distilled": "76.6"},
        _students,
        lambda scale: [
            better("distilled", "T5", paper="2.0"),
            lower("distilled", "T5"),
            gain_kept("distilled", "T5", "Switch", (0.15, 0.6), "score", paper="30 %"),
        ],
        "Student and dense model begin with the same pre-trained dense weights, so they differ by the teacher's soft labels alone.",
    ),
    Claim(
        "frozen_subsets",
        "ST-MoE, Figure 5",
        "Fine-tuning all but the experts is as good as fine-tuning all; of the experts alone much worse.",
        {},
        _subsets,
        lambda scale: [
            equal("non_moe", "all", within=SAME, paper="about the same"),
            equal("attention", "all", within=SAME, paper="about the same"),
            *([] if scale.all_sparse else [lower("ffn", "moe_only", paper="drastic")]),
            lower("all", "moe_only", paper="drastic"),
            better("all", "moe_only", paper="drastic"),
        ],
        "Where each block is sparse, all feed-forwards are experts, and tuning them is tuning the experts.",
    ),
    Claim(
        "dropped_fine_tuning",
        "ST-MoE, Table 5",
        "10 to 15 % of dropped tokens do not hurt fine-tuning; the balancing loss helps it.",
        {
            "balanced, 0.75 / 2": "86.5, 10.6 % dropped",
            "balanced, 1.25 / 2": "86.7, 0.3 %",
            "free, 0.75 / 2": "85.7, 15.6 %",
            "free, 1.25 / 2": "85.8, 2.9 %",
        },
        _drops,
        _drop_checks,
        "Within 0.01 nats of the right answers counts as no difference. The losses are at the factor of evaluation; the score is not, "
        "as answers are written without capacities.",
    ),
]
