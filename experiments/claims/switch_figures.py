"""The figures of Switch Transformers (2101.03961)."""

import itertools

from experiments.claims.claim import Claim, Scale, dense, switch
from switchmoe.analysis import effective, languages
from switchmoe.analysis.verdicts import Check, lower, sooner


def _name(experts: int) -> str:
    return "dense" if experts == 1 else f"E={experts}"


def _sweep(counts: tuple[int, ...]) -> dict:
    return {"dense": dense()} | {_name(experts): switch(experts) for experts in counts}


def _falls(scale: Scale) -> list[Check]:
    return [lower(_name(more), _name(fewer)) for fewer, more in itertools.pairwise((1, *scale.counts))]


def _speed_ups(against: str, paper: dict[int, str]):
    def checks(scale: Scale) -> list[Check]:
        return [
            sooner(_name(experts), "dense", against, paper=paper.get(experts, "")) for experts in scale.counts
        ]

    return checks


def _with_large(scale: Scale) -> dict:
    return {"T5-Large": dense(**scale.large), "Switch": switch(scale.counts[-1])}


# Table 7 has the losses at 16 experts and more; the figures' own values are not printed.
TABLE_7 = {
    "dense": "1.636",
    "E=16": "1.505",
    "E=32": "1.474",
    "E=64": "1.444",
    "E=128": "1.432",
    "E=256": "1.427",
}

CLAIMS = [
    Claim(
        "figure1",
        "Switch, Figure 1",
        "At the same FLOPs per token the loss falls with every step to more experts.",
        TABLE_7,
        lambda scale: _sweep(scale.counts),
        _falls,
        "About 0.03 from 1 to 2 experts, 0.10 or more at 8 to 16 after billions of tokens; after millions far less, and many "
        "experts may be behind few: they see fewer tokens each. The paper's figures are Table 7's.",
    ),
    Claim(
        "figure4",
        "Switch, Figure 4",
        "A Switch model reaches the dense model's loss in fewer steps.",
        TABLE_7,
        lambda scale: _sweep(scale.counts),
        _speed_ups("steps", {64: "7.5"}),
        "1.4 at 2 experts and 2.7 at 8 in runs of 50,000 steps of models up to 130 M (Clark et al. 2022); less in shorter ones. 7.5 "
        "belongs to T5-Base. Rates that fall to 0 over the run make these lower bounds.",
    ),
    Claim(
        "figure5",
        "Switch, Figure 5",
        "A Switch model reaches the dense model's loss in less time, on 32 TPU v3 cores.",
        {},
        lambda scale: _sweep(scale.counts),
        _speed_ups("time", {64: "7"}),
        "On one device routing and the update of all experts cost time that the paper spreads over 32 cores.",
    ),
    Claim(
        "figure6",
        "Switch, Figure 6",
        "A Switch model reaches the loss of a dense model with 3.5 times its FLOPs per token sooner.",
        {},
        _with_large,
        lambda scale: [
            sooner("Switch", "T5-Large", "time", paper="2.5"),
            sooner("Switch", "T5-Large", "steps"),
        ],
        "Small models far from convergence gain much by width and depth, so the larger dense one may be out of reach.",
    ),
    Claim(
        "effective_speed_up",
        "2202.01169, section 3",
        "A sparse model reaches what its dense twin would take more compute for.",
        {},
        lambda scale: _sweep(scale.counts),
        lambda scale: [effective.speed_up(_name(experts), "dense") for experts in scale.counts],
        "The dense model's curve is a power law with a floor, fitted to the last three quarters of its run: beyond its end it is a "
        "guess, and a loss below the floor is one that it would never reach. The claim was added when dense models and 16 experts had "
        "been run, for figure 1.",
    ),
    Claim(
        "figure7",
        "Switch, Figures 7 and 8",
        "Pre-trained on 101 languages, the Switch model is better on all of them, 5 times as fast in the mean, and 4 times as fast or "
        "more on 91 %.",
        {},
        lambda scale: {"mT5": dense(), "mSwitch": switch(scale.experts)},
        lambda scale: [
            languages.all_lower("mSwitch", "mT5", paper="all of 101"),
            languages.mean_sooner("mSwitch", "mT5", paper="5"),
            languages.share_sooner("mSwitch", "mT5", 4.0, 0.9, paper="91 %"),
        ],
        "Twenty languages of one manual. Speed-ups are in steps, and as small as those of the other figures, so that 4 is out of reach.",
        mixture=True,
    ),
    Claim(
        "figure9",
        "Switch, Figure 9",
        "Data, model and expert parallelism and their combinations lay tokens and weights over the cores, and compute the same.",
        elsewhere="`pytest tests/parallel/test_layouts.py` has all five layouts give one device's gradients on 8 virtual devices",
    ),
    Claim(
        "figure12",
        "Switch, Figure 12 (app. D)",
        "As few as 2, 4 or 8 experts are better than the dense model.",
        {},
        lambda scale: _sweep((2, 4, 8)),
        lambda scale: [lower(_name(experts), "dense") for experts in (2, 4, 8)],
        "0.03 at 2, 0.04 to 0.07 for each doubling after it, in long runs; near the noise of seeds in short ones. Its runs are figure 1's, "
        "so the two do not decide independently.",
    ),
]
