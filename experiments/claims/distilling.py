"""Distillation of pre-trained models (Switch Transformers, section 4.2)."""

import math

from experiments.claims.claim import Claim, Overrides, Scale, dense, switch
from switchmoe.analysis.verdicts import Check, gain_kept, lower


def student(teacher: Overrides, init: bool = True, weight: float = 0.25) -> Overrides:
    return dense() | {"distill.teacher": teacher, "distill.init": init, "distill.weight": weight}


def _steps(scale: Scale) -> dict:
    teacher = switch(scale.experts)
    return {
        "T5": dense(),
        "Switch": teacher,
        "soft alone": student(teacher, init=False, weight=1.0),
        "weights alone": student(teacher, weight=0.0),
        "soft, with weights": student(teacher, weight=1.0),
        "mixed, with weights": student(teacher),
    }


def _step_checks(scale: Scale) -> list[Check]:
    best = "mixed, with weights"
    return [
        lower(best, "T5", paper="0.056 nats"),
        lower("soft, with weights", "soft alone", paper="0.033 nats"),
        lower(best, "soft, with weights", paper="0.018 nats"),
        lower(best, "weights alone", paper="0.059 nats"),
        gain_kept(best, "T5", "Switch", (0.15, 0.6), paper="29 %"),
    ]


def _teachers(scale: Scale) -> list[int]:
    """Their numbers of experts; of two there is too little to keep."""
    return [experts for experts in scale.counts if experts > 2]


def _sizes(scale: Scale) -> dict:
    arms = {"T5": dense()}
    for experts in _teachers(scale):
        teacher = switch(experts)
        arms |= {f"E={experts}": teacher, f"student of E={experts}": student(teacher)}
    return arms


def _size_checks(scale: Scale) -> list[Check]:
    paper = {16: "37 %", 32: "32 %", 64: "30 %", 128: "27 %", 256: "28 %"}
    return [
        gain_kept(f"student of E={e}", "T5", f"E={e}", (0.15, math.inf), paper=paper.get(e, ""))
        for e in _teachers(scale)
    ]


CLAIMS = [
    Claim(
        "table6",
        "Switch, Table 6",
        "A dense student keeps about 30 % of a Switch teacher's gain with its non-expert weights and a mix of hard and soft labels.",
        {
            "T5": "1.636",
            "Switch": "1.444",
            "soft alone": "1.631, 3 %",
            "weights alone": "1.639",
            "soft, with weights": "1.598, 20 %",
            "mixed, with weights": "1.580, 29 %",
        },
        _steps,
        _step_checks,
        "The teacher was trained for as long as the student, on other batches of the same text.",
    ),
    Claim(
        "table7",
        "Switch, Table 7",
        "Compressed by up to 99 %, a Switch model's dense student keeps 27 to 37 % of its gain.",
        {"student of E=16": "1.587", "student of E=32": "1.585", "student of E=64": "1.579"},
        _sizes,
        _size_checks,
        "Small models have few parameters outside their experts, so the compression is as high with fewer experts.",
    ),
]
