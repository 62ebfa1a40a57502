"""What Switch Transformers (2101.03961) says in its text."""

from experiments.claims.claim import Claim, Scale, dense, switch
from switchmoe.analysis.verdicts import alike, below, dropped, fewer, lower

DROPPED = "choices dropped at the end of training"
ALPHAS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)


def _alphas(scale: Scale) -> dict:
    return {f"alpha {alpha:g}": switch(scale.experts, balance_loss_weight=alpha) for alpha in ALPHAS}


def _counts(scale: Scale) -> dict:
    return {f"E={experts}": switch(experts) for experts in scale.counts}


def _twins(scale: Scale) -> dict:
    return {"dense": dense(), "wide": dense(**scale.wide), "Switch": switch(scale.experts)}


CLAIMS = [
    Claim(
        "dropped_tokens",
        "Switch, 2.2",
        "With the balancing loss fewer than 1 % of the tokens are dropped, whatever the number of experts.",
        {},
        _counts,
        lambda scale: [
            *(below(arm, dropped, DROPPED, 0.01, paper="< 1 %") for arm in _counts(scale)),
            alike(f"E={scale.counts[-1]}", f"E={scale.counts[0]}", dropped, DROPPED, within=0.01),
        ],
        "Few tokens for each expert of a group vary more: experts with 100 slots overflow where those with 1,000 would not.",
    ),
    Claim(
        "alpha",
        "Switch, 2.2",
        "Of 1e-1 to 1e-5 the weight 1e-2 of the balancing loss is the best: it balances the load and leaves the loss alone.",
        {},
        _alphas,
        lambda scale: [
            *(lower("alpha 0.01", f"alpha {alpha:g}") for alpha in ALPHAS if alpha != 1e-2),
            fewer("alpha 0.01", f"alpha {ALPHAS[-1]:g}", dropped, DROPPED),
        ],
        "Neighbours, 1e-1 and 1e-3, may be within the noise; the best may be another for small groups.",
    ),
    Claim(
        "no_token_left_behind",
        "Switch, app. B",
        "To send tokens that found no slot to their next best expert brings no benefit.",
        {},
        lambda scale: {
            "dropped": switch(scale.experts) | scale.encoder,
            "rerouted": switch(scale.experts, reroute=1) | scale.encoder,
        },
        lambda scale: [lower("dropped", "rerouted", by=-0.005)],
        "A benefit below 0.005 counts as none. Here only the encoder can reroute, as it would not be causal in the decoder: where the "
        "scale's model is a decoder alone, these runs are of an encoder-decoder and span corruption.",
    ),
    Claim(
        "twins",
        "2605.13769",
        "A sparse model is better than the dense one of the same work a token, and worse than the dense one of as many parameters.",
        {},
        _twins,
        lambda scale: [
            lower("Switch", "dense", paper="0.076 nats"),
            lower("wide", "Switch", paper="0.018 nats"),
        ],
        "The paper's are of under 25 M parameters, 4 experts, two a token. Where the text is short, width may be no better than "
        "experts.",
    ),
]
