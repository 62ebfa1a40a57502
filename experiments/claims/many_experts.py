"""What others say of the number of experts: the routed scaling law (2202.01169), and no capacity (MegaBlocks, 2211.15841)."""

from experiments.claims.claim import Claim, Scale, dense, switch
from switchmoe.analysis import exponents
from switchmoe.analysis.verdicts import Check, lower

LAW = {"dense": 1} | {f"E={experts}": experts for experts in (2, 8, 32, 64, 128)}


def _law(scale: Scale) -> dict:
    return {arm: dense() if experts == 1 else switch(experts) for arm, experts in LAW.items()}


def _both_forms(scale: Scale) -> dict:
    counts = (scale.counts[-1], *scale.many)
    forms = {"": {}, " dropless": {"dropless": True}}
    return {
        f"E={experts}{name}": switch(experts, **form) for experts in counts for name, form in forms.items()
    }


def _without_capacity(scale: Scale) -> list[Check]:
    return [lower(f"E={experts} dropless", f"E={experts}") for experts in (scale.counts[-1], *scale.many)]


CLAIMS = [
    Claim(
        "routed_law",
        "2202.01169, equation 1",
        "The loss falls as a power of the number of experts, which saturates at some hundreds.",
        {},
        _law,
        lambda scale: [exponents.falls(LAW, paper="10^(0.108 - 0.009 log10 N)"), lower("E=128", "E=64")],
        "The paper's are decoders of 15 M parameters and more after 130 G tokens. After few tokens the last experts have seen too few of "
        "their own. It was added to the list when runs of the same kind up to 64 experts were known.",
        seeds=5,
    ),
    Claim(
        "dropless",
        "MegaBlocks, 2211.15841",
        "Without a capacity nothing is dropped, and the loss is lower for it, with many experts too.",
        {},
        _both_forms,
        _without_capacity,
        "Where hundreds of experts share a batch, each has few slots, and in the first steps a third of the choices finds none.",
    ),
]
