"""Sparse upcycling (Komatsuzaki et al. 2022, 2212.05055): a dense model that is trained on, with its feed-forwards copied to experts."""

from experiments.claims.claim import Claim, Scale, dense, switch
from switchmoe.analysis.verdicts import lower, sooner


def _arms(scale: Scale) -> dict:
    """As many steps again as the dense model had, from its parameters or from the beginning.

    The schedule begins anew in each arm: with the optimizer's state (`init.optimizer`) comes its place in the schedule, and a
    cosine has ended there.
    """
    further = {"init.checkpoint": dense()}
    return {
        "upcycled": switch(scale.experts, unit_gates=True) | further | {"init.upcycle": True},
        "dense continued": dense() | further,
        "from scratch": switch(scale.experts),
    }


CLAIMS = [
    Claim(
        "upcycling",
        "Sparse upcycling, section 4",
        "A dense model made sparse and trained on ends ahead of the dense model trained on, and reaches what a sparse model of as many "
        "steps from scratch does in fewer of them.",
        {
            "upcycled": "ahead of both, for about 50 % of the dense model's cost (T5 Base, Large, XL; SuperGLUE)"
        },
        _arms,
        lambda scale: [
            lower("upcycled", "dense continued", paper="ahead"),
            lower("upcycled", "from scratch", paper="ahead"),
            sooner("upcycled", "from scratch", "steps", paper="2"),
        ],
        "The paper's routers take two experts a token (decoder) or choose tokens (encoder), ours one; its gates are not normalised. "
        "It goes on with its rate, an inverse square root, and its optimizer; here both begin anew.",
    ),
]
