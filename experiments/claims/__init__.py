"""The papers' claims, and the runs that they take: one sweep a scale, in which claims share runs.

A run is named by what it overrides in the scale's base config, so that two claims' arms with the same settings
are one run: the Switch model with factor 1.25 of Table 1 is that with jitter of Table 11.
"""

import functools
import importlib
import itertools
from collections.abc import Iterable
from typing import Any

from experiments.claims import (
    distilling,
    fine_tuning,
    instructions,
    many_experts,
    st_moe,
    switch_figures,
    switch_tables,
    switch_text,
    upcycling,
)
from experiments.claims.claim import SCALES, Claim, Overrides, Scale, dense, switch
from experiments.sweep import study

CLAIMS = {
    claim.name: claim
    for family in (
        switch_tables,
        switch_figures,
        switch_text,
        st_moe,
        many_experts,
        upcycling,
        distilling,
        fine_tuning,
        instructions,
    )
    for claim in family.CLAIMS
}


PILOT_SEEDS = (100, 101, 102, 103)
RATES_SEED = 200  # of pilots too


def products(scale: str) -> list[dict[str, list]]:
    """What a sweep's ``get_sweep()`` returns: every run of every claim, once, with the claims' first arms first; then the pilots."""
    found = [run for claim in tried(scale) for run in runs(claim, scale)]
    found += [*pilots(scale).values(), *rate_runs(scale)]
    return [{field: [value] for field, value in run.items()} for run in unique(found)]


def why_not(claim: Claim, scale: str) -> str:
    """Why a claim has no runs at a scale; "" if it has."""
    if claim.not_run or claim.mixture == SCALES[scale].mixture:
        return claim.not_run
    others = [name for name, other in SCALES.items() if other.mixture == claim.mixture]
    return f"tried at another scale: {', '.join(others)}"


def tried(scale: str) -> list[Claim]:
    """The claims that have runs at a scale."""
    return [claim for claim in CLAIMS.values() if not why_not(claim, scale)]


def pilots(scale: str) -> dict[tuple[str, int], Overrides]:
    """By arm and seed the runs that tell how much noise there is, of seeds that no claim uses.

    Two are sparse, as two sparse models differ less over seeds than a sparse and a dense one.
    """
    experts = SCALES[scale].experts
    arms = {"dense": dense(), "sparse": switch(experts), "argmax": switch(experts, explore="argmax")}
    return {(arm, seed): run_of(asked, seed, scale) for seed in PILOT_SEEDS for arm, asked in arms.items()}


def rate_pilots(scale: str) -> dict[tuple[str, float, str], Overrides]:
    """Arms by task, rate and model that tell at which rate models are tuned.

    Empty at a scale of no such claims.
    """
    size = SCALES[scale]
    if size.mixture:
        return {}
    return {
        (task, rate, arm): how(size, before) | {"optimizer.learning_rate": rate} | size.pilots.get(task, {})
        for task, how in (("topics", fine_tuning.tuned), ("instructions", instructions.instructed))
        for rate in size.rates
        for arm, before in (("dense", dense()), ("sparse", switch(size.experts)))
    }


def rate_runs(scale: str) -> list[Overrides]:
    """The runs of these arms, and before them those that they begin with."""
    return _with_first(rate_pilots(scale).values(), [RATES_SEED], scale)


def runs(claim: Claim, scale: str) -> list[Overrides]:
    """The overrides of a claim's runs, seed by seed: what is cut short has whole seeds."""
    return _with_first(claim.arms(SCALES[scale]).values(), range(seeds(claim, scale)), scale)


def _with_first(arms: Iterable[Overrides], chosen: Iterable[int], scale: str) -> list[Overrides]:
    return unique(
        [
            run
            for seed, arm in itertools.product(chosen, arms)
            for run in [*_before(arm, seed, scale), run_of(arm, seed, scale)]
        ]
    )


def _before(arm: Overrides, seed: int, scale: str) -> list[Overrides]:
    """The runs that an arm's run begins with or learns from, what they need first."""
    other = _other_seed(seed, scale)
    needed = [arm[field] for field in study.REFERENCES if field in arm]
    return [run for one in needed for run in [*_before(one, other, scale), run_of(one, other, scale)]]


def _other_seed(seed: int, scale: str) -> int:
    """Of what a run begins with: so it goes on with other batches than that was trained with. A claim's is a claim's."""
    return seed + 1 if seed >= min(PILOT_SEEDS) else (seed + 1) % SCALES[scale].seeds


def seeds(claim: Claim, scale: str) -> int:
    """How many a claim takes: its own number, or the scale's where that is more."""
    return max(claim.seeds, SCALES[scale].seeds)


def run_of(arm: Overrides, seed: int, scale: str) -> Overrides:
    """The overrides of an arm's run with a seed, without those that are the base's own values."""
    base, named = _base(scale), {"moe.num_experts", "train.seed"}
    asked = arm | {"train.seed": seed}
    for field in study.REFERENCES:
        if field in arm:
            asked[field] = study.reference(run_of(arm[field], _other_seed(seed, scale), scale))
    if asked["moe.num_experts"] == 1:  # a dense model has no use for a router's fields
        asked = {field: v for field, v in asked.items() if field in named or not field.startswith("moe.")}
    differ = {field for field, value in asked.items() if value != base[field]} | named
    order = ["moe.num_experts", *sorted(differ - named), "train.seed"]
    return {field: asked[field] for field in order}


def base_config(scale: str) -> Any:
    """The scale's config, a ConfigDict."""
    return importlib.import_module(SCALES[scale].config.removesuffix(".py").replace("/", ".")).get_config()


@functools.cache
def _base(scale: str) -> dict[str, Any]:
    config = base_config(scale)
    return {f"{group}.{field}": value for group in config for field, value in config[group].items()}


def unique(found: list[Overrides]) -> list[Overrides]:
    """Each once, in their order."""
    return [run for place, run in enumerate(found) if run not in found[:place]]


__all__ = [
    "CLAIMS", "SCALES", "Claim", "Overrides", "Scale", "base_config", "pilots", "products", "rate_pilots", "rate_runs", "run_of", "runs", "seeds", "tried", "unique", "why_not",
]  # fmt: skip
