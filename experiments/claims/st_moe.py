"""ST-MoE (2202.08906), as far as it can be tried with Switch routing: what it adds to Switch Transformers."""

from experiments.claims.claim import Claim, Scale, switch
from switchmoe.analysis.verdicts import lower, stabler


def _z_loss(scale: Scale) -> dict:
    return {"baseline": switch(scale.experts), "z-loss": switch(scale.experts, z_loss_weight=1e-3)}


def _stability(scale: Scale) -> dict:
    hot = {"optimizer.learning_rate": scale.hot}
    plain = switch(scale.experts, explore="argmax") | hot
    return {
        "baseline": plain,
        "z-loss": plain | {"moe.z_loss_weight": 1e-3},
        "jitter": plain | {"moe.explore": "jitter"},
        "dropout 0.1": plain | {"model.dropout_rate": 0.1},
    }


def _capacities(scale: Scale) -> dict:
    return {
        f"train {factor:g}, eval {other:g}": switch(
            scale.experts, capacity_factor=factor, eval_capacity_factor=other
        )
        for factor, other in ((0.75, 0.75), (0.75, 2.0), (1.25, 1.25), (1.25, 2.0))
    }


CLAIMS = [
    Claim(
        "z_loss",
        "ST-MoE, Table 4",
        "The router z-loss, weight 1e-3, costs no quality.",
        {"baseline": "1.755", "z-loss": "1.741"},
        _z_loss,
        lambda scale: [lower("z-loss", "baseline", by=-0.005, paper="0.014 nats")],
        "That it is better (0.014, with a spread of 0.02 in the paper) is below the noise: the criterion is not worse by 0.005.",
    ),
    Claim(
        "stability",
        "ST-MoE, Tables 2 to 4",
        "The router z-loss makes unstable training stable; noise does too, but costs quality: input jitter, and dropout more.",
        {
            "baseline": "1.755, 4 of 6 stable",
            "z-loss": "1.741, 3 of 3 stable",
            "jitter": "1.777, 3 of 3 stable",
            "dropout 0.1": "1.822, 3 of 3 stable",
        },
        _stability,
        lambda scale: [
            stabler("z-loss", "baseline", paper="2 of 6 against 0 of 3"),
            lower("z-loss", "jitter", paper="0.036 nats"),
            lower("z-loss", "dropout 0.1", paper="0.081 nats"),
        ],
        "At a learning rate far above the best, as small models are stable at theirs. If the baseline is stable, the first part "
        "is not decidable.",
    ),
    Claim(
        "eval_capacity",
        "ST-MoE, Table 8",
        "A higher capacity factor at evaluation than in training lowers the loss, and a higher one in training does too.",
        {
            "train 0.75, eval 0.75": "1.428",
            "train 0.75, eval 2": "1.404",
            "train 1.25, eval 1.25": "1.378",
            "train 1.25, eval 2": "1.373",
        },
        _capacities,
        lambda scale: [
            lower("train 0.75, eval 2", "train 0.75, eval 0.75", paper="0.024 nats"),
            lower("train 1.25, eval 2", "train 1.25, eval 1.25", paper="0.005 nats"),
            lower("train 1.25, eval 2", "train 0.75, eval 2", paper="0.031 nats"),
        ],
        "The two factors at evaluation are tried on the same training, so that this difference has almost no noise, if both were made on "
        "one kind of machine.",
    ),
]
