"""What Flan-MoE (2305.14705) says of instruction tuning, on the packaged summaries' instructions (`Scale.instruct`).

The paper's absolute figures are not at hand; signs and differences are from reviews of it.
"""

from experiments.claims.claim import Claim, Overrides, Scale, dense, switch
from experiments.claims.fine_tuning import tuned
from switchmoe.analysis.verdicts import Check, better, gains_more

# Classes have 4 to 22 tokens at scale tiny: by all of an option's tokens the short ones would win before anything is learnt.
ZERO_SHOT, FEW_SHOT = "instruct_topic/ranked_mean", "instruct_topic@1/ranked_mean"


def instructed(scale: Scale, before: Overrides, **more: object) -> Overrides:
    """A pre-trained arm tuned on instructions; ``more`` are fields of moe."""
    return tuned(scale, before, **more) | scale.instruct


def _settings(scale: Scale) -> dict:
    arms = {}
    for name, before in (("T5", dense()), ("Switch", switch(scale.experts))):
        taught = instructed(scale, before)
        arms |= {f"{name} direct": tuned(scale, before), f"{name} instructed": taught}
        plain = {field: value for field, value in taught.items() if not field.startswith("task.")}
        arms[f"{name} instructed, then tuned"] = tuned(scale, plain) | {"init.checkpoint": taught}
    return arms


def _setting_checks(scale: Scale) -> list[Check]:
    sparse, plain = (f"{name} instructed, then tuned" for name in ("Switch", "T5"))
    return [
        better("T5 direct", "Switch direct"),
        better("Switch instructed", "T5 instructed", metric=ZERO_SHOT),
        better("Switch instructed", "T5 instructed", metric=FEW_SHOT),
        better(sparse, plain),
        gains_more(("Switch direct", sparse), ("T5 direct", plain)),
    ]


def _ablations(scale: Scale) -> dict:
    before = switch(scale.experts)
    whole = instructed(scale, before)
    return {
        "all": whole,
        "gate frozen": whole | {"train.trainable": "^(?!.*/moe/router)"},
        "experts frozen": whole | {"train.trainable": "^(?!.*/moe/experts)"},
        "without balance": instructed(scale, before, balance_loss_weight=0.0),
        "with z-loss": instructed(scale, before, z_loss_weight=1e-3),
    }


CLAIMS = [
    Claim(
        "flan_settings",
        "Flan-MoE, its three settings",
        "Fine-tuned directly a sparse model is behind its dense twin; instruction tuning turns that round, zero-shot, few-shot and fine-tuned after it.",
        {},
        _settings,
        _setting_checks,
        "Two families, topics and the odd one out, are held out; the last of the three settings is fine-tuned on topics, without an instruction.",
    ),
    Claim(
        "flan_ablation",
        "Flan-MoE, Table 1",
        "In instruction tuning a frozen gate helps a little, frozen experts hurt; losses of balance and of large logits help or hurt by model.",
        {"gate frozen": "0.3 to 0.4", "without balance": "1.6 (ST-MoE), -0.6 (expert choice)"},
        _ablations,
        lambda scale: [
            better("gate frozen", "all", paper="0.3 to 0.4"),
            better("all", "experts frozen"),
            better("without balance", "all", paper="1.6 with ST-MoE"),
            better("with z-loss", "all", paper="0.3 with ST-MoE"),
        ],
        "The score is the mean over all families, those held out among them.",
    ),
]
