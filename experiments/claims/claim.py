"""What a claim is, and what a scale is: the size at which the claims are tried."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from switchmoe.analysis.verdicts import Check

Overrides = dict[str, Any]  # of fields of the scale's base config


@dataclasses.dataclass(frozen=True)
class Scale:
    """``config`` is the base of all runs; claims say what differs from it."""

    config: str
    experts: int  # the paper has 32 in most tables
    experts_table_1: int  # and 128 in this one
    counts: tuple[int, ...]  # of the figures
    large: Overrides  # the dense model with about 3.5 times the FLOPs a token (T5-Large)
    hot: float  # optimizer.learning_rate of ST-MoE's stability runs, well above the base's
    early: Overrides = dataclasses.field(default_factory=dict)  # of what the paper shows early in training
    many: tuple[int, ...] = ()  # more experts than the figures', of which each sees few tokens
    wide: Overrides = dataclasses.field(
        default_factory=dict
    )  # the dense model of as many parameters as the sparse one
    encoder: Overrides = dataclasses.field(
        default_factory=dict
    )  # of runs that need one, where the base has none
    # of fine-tuning, with room for 95 % of the examples whole, as of instruction tuning with a solved one before them
    tune: Overrides = dataclasses.field(default_factory=dict)
    instruct: Overrides = dataclasses.field(default_factory=dict)  # of instruction tuning, what differs
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)  # of learning of both: pilots tell which is best
    pilots: dict[str, Overrides] = dataclasses.field(default_factory=dict)  # what differs in them, by task
    all_sparse: bool = False  # each block has experts
    mixture: bool = False  # the text is one of languages (`data.parts`), for the claims about them alone
    seeds: int = 3  # of a claim that does not ask for more


# As Switch Transformers fine-tunes (table 4), on the packaged summaries' topic. Pre-training may have read the held-out passages, not
# their topics, as a text with Wikipedia's articles has them: all arms alike.
TUNE = {
    "task.names": "topic",
    "task.eval_examples": 0,
    "data.batch_size": 64,
    "optimizer.schedule": "constant",
    "optimizer.learning_rate": 1e-3,
    "model.dropout_rate": 0.1,
    "model.shared_dropout": True,
    "train.num_steps": 500,
    "train.eval_every": 100,
    "train.log_every": 20,
}
# Two families are held out and measured zero-shot, one of them with a solved example as well.
INSTRUCT = {
    "task.names": "instruct,instruct@1",
    "task.held_out": "instruct_topic,instruct_topic@1,instruct_odd",
    "task.eval_examples": 100,
    "data.batch_size": 32,
    "train.num_steps": 1000,
    "train.eval_every": 1000,
}
SMALL_CAUSAL = dict(
    experts=16,
    experts_table_1=16,
    large={"model.d_model": 96, "model.d_ff": 96, "model.d_kv": 24, "model.num_layers": 4},
    hot=0.5,
    all_sparse=True,
    wide={"model.d_ff": 512},
    encoder={"model.stacks": "encoder_decoder", "data.objective": "span_corruption"},
    # 400 pieces make long texts. Adafactor's rate is a share of each parameter, and 300 steps of T5's 1e-3 would move little: the
    # pilots (`experiments.paper rates`, seed 200) have losses of 0.295, 0.190, 0.165 and 0.172 on topics, the mean of both models.
    rates=(3e-3, 1e-2, 3e-2, 1e-1),
    # An evaluation takes 40 s, as long as 40 steps (each of 11 classes is ranked): the claims' runs have one, at the end.
    pilots={"topics": {"train.eval_every": 100}},
    tune=TUNE
    | {
        "train.num_steps": 300,
        "train.eval_every": 300,
        "optimizer.learning_rate": 3e-2,
        "data.input_length": 448,
        "data.target_length": 24,
    },
    instruct=INSTRUCT
    | {
        "data.batch_size": 5,
        "task.filled": True,  # 15 examples in 5 rows of 960 places, 11 % of them padding; of one example each 71 % would be
        "data.input_length": 768,
        "data.target_length": 192,
        "train.num_steps": 400,
        "train.eval_every": 400,
    },
)
SCALES = {
    "tiny": Scale("configs/paper_tiny.py", counts=(2, 4, 8, 16, 64), many=(256, 512), **SMALL_CAUSAL),
    "laptop": Scale(
        "configs/paper_laptop.py", counts=(2, 4, 8, 16, 32, 64, 128), many=(256, 512), **SMALL_CAUSAL
    ),
    "languages": Scale("configs/paper_languages.py", counts=(16,), mixture=True, **SMALL_CAUSAL),
    "small": Scale(
        "configs/paper_small.py",
        experts=32,
        experts_table_1=32,
        counts=(2, 8, 32, 128),
        many=(512,),
        large={"model.d_model": 512, "model.d_ff": 2048, "model.num_heads": 8, "model.num_layers": 8},
        hot=0.3,
        wide={"model.d_ff": 33 * 1536 // 2},
        tune=TUNE | {"data.input_length": 192, "data.target_length": 8},
        instruct=INSTRUCT | {"data.input_length": 384, "data.target_length": 72, "task.packed": 2},
    ),
    "base": Scale(
        "configs/paper_base.py",
        experts=32,
        experts_table_1=128,
        counts=(2, 4, 8, 16, 32, 64, 128, 256),
        many=(512,),
        large={
            "model.d_model": 1024,
            "model.d_ff": 4096,
            "model.activation": "relu",
            "model.num_heads": 16,
            "model.num_layers": 24,
        },
        hot=10.0,
        wide={"model.d_ff": 33 * 3072 // 2},
        early={"train.num_steps": 3500},
        tune=TUNE | {"data.input_length": 192, "data.target_length": 8},
        instruct=INSTRUCT | {"data.input_length": 384, "data.target_length": 72, "task.packed": 2},
    ),
}


@dataclasses.dataclass(frozen=True)
class Claim:
    """One of a paper's claims.

    ``paper`` has the paper's figures by arm: held-out loss in nats per target token (its tables print the
    negative), and what else it gives. An arm's ``init.checkpoint`` and ``distill.teacher`` are other arms, with whose
    run it begins or from which it learns. A claim that is no matter of runs has ``elsewhere`` instead of arms and checks.
    """

    name: str  # as on the command line
    source: str
    says: str
    paper: dict[str, str] = dataclasses.field(default_factory=dict)
    arms: Callable[[Scale], dict[str, Overrides]] = lambda scale: {}
    checks: Callable[[Scale], Sequence[Check]] = lambda scale: ()
    expected: str = ""  # at small scale
    seeds: int = 3
    mixture: bool = False  # of languages: tried at the scales with such a text
    elsewhere: str = ""  # what checks it, where that is no matter of training runs

    @property
    def not_run(self) -> str:
        """Why it has no runs; "" if it has."""
        return f"no matter of training runs: {self.elsewhere}" if self.elsewhere else ""


def dense(**more: Any) -> Overrides:
    return {"moe.num_experts": 1, **more}


def switch(experts: int, **moe: Any) -> Overrides:
    """Top-1 with so many experts; ``moe`` are fields of that group."""
    return {"moe.num_experts": experts} | {f"moe.{field}": value for field, value in moe.items()}
