"""What a larger machine should run next: the claims that are open at the scales tried, and what they cost at larger ones."""

import functools
from collections.abc import Collection

from experiments import claims
from experiments.paper import finished, power, scorecard
from experiments.sweep.study import ASSUMED_PEAK_SHARE, REFERENCES
from switchmoe.planning.planner import DEVICES
from switchmoe.runs.reporting import duration
from switchmoe.settings import from_config, to_dict

DEVICE = DEVICES["h100"]
ALIKE = {"train.seed": 0} | dict.fromkeys(REFERENCES, "another")
LARGER = ("small", "base")  # scales for such a machine


def section(tried: Collection[str], decided: Collection[str]) -> list[str]:
    """Lines of Markdown: what is not ``decided``, at each larger scale that is not ``tried``."""
    scales = [scale for scale in LARGER if scale not in tried]
    rows = [
        [name, claim.says, *(cell for scale in scales for cell in _cells(name, scale))]
        for name, claim in claims.CLAIMS.items()
        if name not in decided and not all(claims.why_not(claim, scale) for scale in scales)
    ]
    if not rows:
        return []
    heads = [
        "claim",
        "says",
        *(f"{scale}: {what}" for scale in scales for what in ("runs", "FLOPs", "time")),
    ]
    return [
        "## What a larger machine should run next",
        "",
        "What is open above, at the scales that are made for more (`python -m experiments.paper NAME --scale=SCALE`). Times are of one "
        f"H100, predicted: the model's FLOPs at {ASSUMED_PEAK_SHARE:.0%} of {DEVICE.flops / 1e12:.0f} TFLOP/s "
        f"({DEVICE.source.partition(',')[0]}); compiling and evaluation come on top, and small models reach less of the peak. Claims "
        "share runs, so together they cost less than the sum.",
        "",
        *scorecard.markdown_rows(heads, rows),
        "",
    ]


def _cells(name: str, scale: str) -> list[str]:
    """Runs, FLOPs and time of a claim; empty where it is not tried at that scale."""
    if claims.why_not(claims.CLAIMS[name], scale):
        return ["", "", ""]
    base = to_dict(from_config(claims.base_config(scale)))

    @functools.cache
    def cost(kind: tuple) -> float:
        return power.run_flops(from_config(finished.merged(base, dict(kind))))

    # Seeds cost the same, and so do the runs of other seeds that they begin with or learn from.
    runs = claims.runs(claims.CLAIMS[name], scale)
    work = sum(cost(tuple((field, ALIKE.get(field, value)) for field, value in run.items())) for run in runs)
    return [str(len(runs)), f"{work:.2g}", duration(work / (DEVICE.flops * ASSUMED_PEAK_SHARE))]
