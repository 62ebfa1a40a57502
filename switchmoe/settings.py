"""Settings of a run: frozen dataclasses, built from a ConfigDict and validated once.

Each field is documented where it is declared; `configs/*.py` only name what differs from these
defaults. A ``ValueError`` raised here is one line: the field, its value, what would be accepted.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

NUM_SENTINELS = 100
ACTIVATIONS = ("relu", "geglu", "swiglu")
DTYPES = ("float32", "bfloat16")
OBJECTIVES = ("span_corruption", "prefix_lm", "causal_lm")
STACKS = {"encoder_decoder": ("encoder", "decoder"), "decoder_only": ("decoder",)}
LOSS_WEIGHTS = {  # a router's loss: the field of its weight
    "balance": "balance_loss_weight",
    "importance": "importance_loss_weight",
    "load": "load_loss_weight",
    "z": "z_loss_weight",
}


def _bad(field: str, value: Any, accepted: str) -> ValueError:
    return ValueError(f"{field}={value}: accepted is {accepted}")


def _at_least(group: str, settings: Any, field: str, least: int) -> None:
    if getattr(settings, field) < least:
        raise _bad(f"{group}.{field}", getattr(settings, field), f"an integer >= {least}")


def _positive(group: str, settings: Any, field: str) -> None:
    if not getattr(settings, field) > 0:
        raise _bad(f"{group}.{field}", getattr(settings, field), "a number > 0")


def _not_negative(group: str, settings: Any, field: str) -> None:
    if not getattr(settings, field) >= 0:
        raise _bad(f"{group}.{field}", getattr(settings, field), "a number >= 0")


def _rate(group: str, settings: Any, field: str) -> None:
    if not 0 <= getattr(settings, field) < 1:
        raise _bad(f"{group}.{field}", getattr(settings, field), "a number >= 0 and < 1")


def _one_of(group: str, settings: Any, field: str, accepted: tuple[str, ...]) -> None:
    if getattr(settings, field) not in accepted:
        raise _bad(f"{group}.{field}", getattr(settings, field), f"one of {', '.join(accepted)}")


def _expression(group: str, settings: Any, field: str) -> None:
    try:
        re.compile(getattr(settings, field))
    except re.error as error:
        raise _bad(f"{group}.{field}", getattr(settings, field), f"a regular expression ({error})") from error


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """A T5 encoder-decoder (Raffel et al. 2020), version 1.1 feed-forwards with `geglu`; or a decoder alone."""

    d_model: int = 768  # width of embeddings and residuals
    stacks: str = "encoder_decoder"  # encoder_decoder | decoder_only (with data.objective=causal_lm)
    d_ff: int = 2048  # width of a feed-forward and of each expert
    d_kv: int = 64  # width of one attention head
    num_heads: int = 12  # num_heads x d_kv need not be d_model (T5 1.1 small: 6 x 64 of 512)
    num_kv_heads: int = (
        0  # heads of keys and values, each read by as many of queries (grouped-query); 0: num_heads
    )
    num_layers: int = 12  # per stack
    num_decoder_layers: int = 0  # of an encoder-decoder's decoder, where it differs; 0: num_layers
    activation: str = "geglu"  # relu | geglu | swiglu
    dtype: str = "bfloat16"  # activations; parameters, router, softmax, losses are float32
    dropout_rate: float = 0.0  # of embeddings, attention and feed-forwards, in training
    vocab_rows: int = 0  # of the embedding; 0: pieces and sentinels, rounded up to a multiple of 128
    tie_embeddings: bool = True  # share input and output embeddings
    scale_logits: bool = True  # logits of tied embeddings times d_model**-0.5 (T5)
    init_scale: float = 0.1  # s of the truncated normal with variance s / fan_in (Switch, 2.4)
    norm_eps: float = 1e-6  # added to the mean square in RMSNorm
    qk_norm: str = (
        "none"  # RMSNorm of queries and keys: none | head (each head's) | all (over all heads' width)
    )
    qkv_bias: bool = False  # biases on queries, keys and values
    attention_scale: float = (
        1.0  # of the attention's logits; 1: T5's, folded into the first queries; 0: d_kv**-0.5
    )
    positions: str = (
        "relative"  # relative (T5's learned biases) | rotary (halves of a head's width turned, RoFormer)
    )
    rotary_theta: float = 10000.0  # the longest wavelength over 2 pi, in tokens
    relative_buckets: int = 32  # of relative positions, each with a learned bias
    relative_max_distance: int = 128  # tokens from which on all distances share a bucket
    scan: bool = True  # False: a loop, parameters for each repeat; compiles longer, copies less on a CPU
    scan_unroll: int = 1  # repeats of the scan over layers unrolled; on CPU 2 or more saves 15-20 %
    remat: bool = False  # recompute each block's activations in the backward pass

    def __post_init__(self) -> None:
        for field in ("d_model", "d_ff", "d_kv", "num_heads", "num_layers", "scan_unroll"):
            _at_least("model", self, field, 1)
        for field in ("num_kv_heads", "num_decoder_layers", "vocab_rows"):
            _at_least("model", self, field, 0)
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise _bad(
                "model.num_kv_heads", self.num_kv_heads, f"0, or a divisor of num_heads={self.num_heads}"
            )
        _one_of("model", self, "stacks", tuple(STACKS))
        if self.stacks == "decoder_only" and self.num_decoder_layers:
            raise _bad("model.num_decoder_layers", self.num_decoder_layers, "0 with decoder_only: num_layers")
        _at_least("model", self, "relative_buckets", 4)
        _at_least("model", self, "relative_max_distance", self.relative_buckets)
        _one_of("model", self, "activation", ACTIVATIONS)
        _one_of("model", self, "dtype", DTYPES)
        _rate("model", self, "dropout_rate")
        _one_of("model", self, "qk_norm", ("none", "head", "all"))
        _one_of("model", self, "positions", ("relative", "rotary"))
        if self.positions == "rotary" and self.d_kv % 2:
            raise _bad("model.d_kv", self.d_kv, "an even number with model.positions=rotary")
        for field in ("init_scale", "norm_eps", "rotary_theta"):
            _positive("model", self, field)
        _not_negative("model", self, "attention_scale")

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def logit_scale(self) -> float:
        """What the attention's products of queries and keys are multiplied by."""
        return self.attention_scale or self.d_kv**-0.5

    @property
    def gated(self) -> bool:
        """Whether a feed-forward has a gate beside its first kernel."""
        return self.activation != "relu"


@dataclasses.dataclass(frozen=True)
class MoESettings:
    """Where the sparse layers are, how they route, and how they move tokens."""

    num_experts: int = 8  # 1: a dense model; no other field of moe has an effect then, but route_one
    route_one: bool = False  # a single expert has its router and its slots, as Hugging Face's Switch with one
    every: int = 2  # the last of each `every` blocks is sparse
    offset: int = (
        -1
    )  # or another of them: from 0 on, or from the end, -1 being the last; with every=0 there is none
    decoder_every: int = -1  # an encoder-decoder's decoder's own `every`; -1: as the encoder, offset included
    decoder_offset: int = -1  # read with decoder_every
    dense_first: int = 0  # first blocks of each stack that are dense, after which `every` counts
    d_ff: int = 0  # width of an expert; 0: model.d_ff
    router: str = "switch"  # a name in routing.ROUTERS
    decoder_router: str = ""  # the decoder's, where it differs: expert_choice and soft are not causal
    choices: int = 1  # experts a token goes to; 1 with switch, hash and soft
    granularity: int = 1  # each expert split into so many narrower ones, so many times the choices
    num_shared: int = 0  # experts, of the split ones' width, that every token passes through
    shared_gate: bool = False  # the shared experts' output times a sigmoid of x (Qwen2)
    attention: bool = False  # experts in the sparse blocks' self-attention, too (Switch, app. A)
    dispatch: str = "auto"  # auto | einsum | gather | ragged
    dropless: bool = False  # no capacity at all; with ragged (or auto)
    capacity_factor: float = 1.25  # slots over choices in training; what finds no slot is dropped
    eval_capacity_factor: float = 2.0  # the same at evaluation
    # Slots of each expert in a group, whatever its size, in training and evaluation; 0: by the factors. Hugging Face's Switch has
    # 64 a sequence (group_size=0), and lets padding take them; Flaxformer, which trained the released models, has factors.
    capacity: int = 0
    route_padding: bool = False  # encoder: padding is routed, and takes slots, like any token
    group_size: int = 4096  # at most so many tokens compete for capacity: whole sequences, or parts; 0: one
    # The same at evaluation; 0: a sequence, so neighbours never matter (nothing is dropped in a decoder alone, whose
    # rows hold several documents)
    eval_group_size: int = 0
    balance_loss_weight: float = 1e-2  # alpha, for each sparse layer; the layers are summed
    z_loss_weight: float = 1e-3  # ST-MoE's router z-loss, likewise; 0 leaves it out
    importance_loss_weight: float = 0.1  # noisy_top_k's
    load_loss_weight: float = 0.1  # noisy_top_k's
    balance: str = "group"  # group | global: the tokens over which the balancing losses' shares are taken
    balance_choices: str = "all"  # all | first: choices that the balance loss counts; GShard's: the first
    explore: str = "jitter"  # in training: argmax | sample | input_dropout | jitter (Switch, app. C)
    jitter: float = 1e-2  # router input times U(1 - jitter, 1 + jitter)
    input_dropout_rate: float = 0.1  # dropout of the router's input, with explore=input_dropout
    renormalize: bool = True  # gates of a token's choices sum to 1, where it has several
    # They do also where there is one, or without renormalize, in value alone: divided by their sum without its gradient. So
    # copies of one expert, as of a model made sparse, are that expert.
    unit_gates: bool = False
    choice_threshold: float = 0.0  # later choices kept with probability gate / threshold; 0.5 is GShard's
    priority: bool = False  # encoder: slots go to the largest gates first (batch-prioritised routing)
    reroute: int = 0  # encoder: rounds in which choices without a slot try the next best expert
    score: str = "softmax"  # loss_free: softmax | sigmoid
    bias_rate: float = 1e-3  # loss_free: change of an expert's bias a step
    branches: int = 2  # hierarchical: branches of the first level
    slots: int = 1  # soft: slots per expert
    expert_dropout_rate: float = 0.0  # dropout inside the experts, instead of model.dropout_rate
    # Experts' kernels are integers of 8 or 4 bits and scales, as `experiments.slim` writes them, and can't be trained; 0: float32
    expert_bits: int = 0
    expert_group: int = 0  # rows of such a kernel with a scale of their own for each column; 0: all rows
    router_init_stddev: float = 0.02  # of the router's first kernel
    router_dtype: str = (
        "float32"  # bfloat16: without selective precision (Switch, 2.4), to see what it is for
    )

    def __post_init__(self) -> None:
        for field in ("num_experts", "choices", "granularity", "branches", "slots"):
            _at_least("moe", self, field, 1)
        for field in (
            "group_size",
            "eval_group_size",
            "num_shared",
            "reroute",
            "every",
            "dense_first",
            "d_ff",
            "capacity",
            "expert_group",
        ):
            _at_least("moe", self, field, 0)
        _at_least("moe", self, "decoder_every", -1)
        for every, field in ((self.every, "offset"), (self.decoder_every, "decoder_offset")):
            last = max(every, 1) - 1
            if not -last - 1 <= getattr(self, field) <= last:
                raise _bad(f"moe.{field}", getattr(self, field), f"an integer from {-last - 1} to {last}")
        for field in ("capacity_factor", "eval_capacity_factor", "router_init_stddev"):
            _positive("moe", self, field)
        for field in (*LOSS_WEIGHTS.values(), "choice_threshold", "bias_rate"):
            _not_negative("moe", self, field)
        for field in ("jitter", "input_dropout_rate", "expert_dropout_rate"):
            _rate("moe", self, field)
        if self.expert_bits not in (0, 4, 8):
            raise _bad("moe.expert_bits", self.expert_bits, "0, 8 or 4")
        _one_of("moe", self, "balance", ("group", "global"))
        _one_of("moe", self, "balance_choices", ("all", "first"))
        _one_of("moe", self, "explore", ("argmax", "sample", "input_dropout", "jitter"))
        _one_of("moe", self, "score", ("softmax", "sigmoid"))
        _one_of("moe", self, "router_dtype", DTYPES)

    @property
    def routed(self) -> bool:
        """Whether there are experts at all."""
        return self.num_experts > 1 or self.route_one

    @property
    def total_experts(self) -> int:
        """Experts after they are split."""
        return self.num_experts * self.granularity

    @property
    def total_choices(self) -> int:
        """Experts a token goes to after they are split."""
        return self.choices * self.granularity


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Text, its vocabulary, and what is asked of it."""

    # `wiki_vital_en` (embedded), a tfds name such as `c4/en`, or a glob of files: .txt, a JSON record a line in .jsonl, .json
    # or .ndjson (all of these also .gz, .xz, .bz2, .zst), .parquet
    source: str = "wiki_vital_en"
    data_dir: str = ""  # prepared tfds data and trained vocabularies; "": ~/.cache/switchmoe
    text_field: str = "text"  # the field of a record that holds the text
    documents: str = "line"  # in .txt files: `line`, or `block` (blank line between documents)
    validation_share: float = (
        0.05  # held out by a hash of the document: of files, and of tfds sets with train alone
    )
    split_field: str = (
        ""  # a JSON record's field by whose hash it is held out, as pages of one id; "": by the text's
    )
    # "" or file: each file of the source is a part of a mixture, such as a language, measured by itself as well
    parts: str = ""
    parts_exponent: float = (
        1.0  # a part's share of what is read goes with its documents to this power; 0: all alike
    )
    train_split: str = ""  # of a tfds set, such as train[:90%]; "": train
    validation_split: str = ""  # likewise; "": validation, or test, or else a share of train
    batch_size: int = 128  # sequences a step, over all devices
    input_length: int = 512  # encoder tokens, all of them used
    # decoder tokens; 0: what the objective writes (prefix=full and causal_lm: input_length)
    target_length: int = 0
    vocab: str = ""  # a SentencePiece model file such as T5's spiece.model; "": train one
    vocab_size: int = 32000  # SentencePiece pieces; 100 sentinels join them at the top
    # nmt_nfkc (T5's): blanks and line breaks are joined, letters unified. identity: every character comes back
    normalization: str = "nmt_nfkc"
    bos_id: int = 0  # what a decoder reads first, and before each document
    eos_id: int = 1  # ends a document, an encoder's input and what is generated
    # span_corruption (T5, 3.1.4); prefix_lm: a text's beginning in, its continuation out; causal_lm: documents side by
    # side, a loss at every token
    objective: str = "span_corruption"
    prefix: str = "random"  # of prefix_lm: random (T5's: where a piece is cut is drawn), or full (no padding)
    noise_density: float = 0.15  # share of the tokens that span corruption takes out
    mean_span_length: float = 3.0  # tokens of a span, on average
    streams: int = 0  # documents go round so many streams, each of which fills rows of its own; 0: one a row
    prefetch: int = 8  # batches made ahead

    def __post_init__(self) -> None:
        for field, least in (
            ("batch_size", 1),
            ("input_length", 4),
            ("target_length", 0),
            ("streams", 0),
            ("bos_id", 0),
            ("eos_id", 0),
        ):
            _at_least("data", self, field, least)
        if self.streams and self.batch_size % self.streams:
            raise _bad("data.streams", self.streams, f"0, or a divisor of data.batch_size={self.batch_size}")
        _at_least("data", self, "vocab_size", 300)
        _at_least("data", self, "prefetch", 1)
        _one_of("data", self, "documents", ("line", "block"))
        _one_of("data", self, "normalization", ("nmt_nfkc", "identity"))
        _one_of("data", self, "objective", OBJECTIVES)
        _one_of("data", self, "parts", ("", "file"))
        if not 0 <= self.parts_exponent <= 1:
            raise _bad("data.parts_exponent", self.parts_exponent, "a number from 0 to 1")
        _one_of("data", self, "prefix", ("random", "full"))
        if not self.source:
            raise _bad("data.source", "''", "wiki_vital_en, a tfds name, or a glob of text files")
        for field in ("noise_density", "validation_share"):
            if not 0 < getattr(self, field) < 1:
                raise _bad(f"data.{field}", getattr(self, field), "a number between 0 and 1, both excluded")
        if self.mean_span_length < 1:
            raise _bad("data.mean_span_length", self.mean_span_length, "a number >= 1")


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """Adafactor with T5's settings, or AdamW."""

    name: str = "adafactor"  # adafactor | adamw
    learning_rate: float = 1.0  # the schedule's factor; for rsqrt the rate is factor / sqrt(step)
    schedule: str = "rsqrt"  # rsqrt | warmup_rsqrt | warmup_cosine | constant
    warmup_steps: int = 10000  # up to which the rate is flat (rsqrt) or rises
    clip_norm: float = 0.0  # global gradient norm; 0: off
    decay_rate: float = 0.8  # Adafactor: second-moment decay 1 - step**-decay_rate
    momentum: float = 0.0  # Adafactor's beta1: its updates averaged, at the price of a copy; T5 has none
    beta1: float = 0.9  # AdamW
    beta2: float = 0.98  # AdamW
    weight_decay: float = 0.0  # of kernels, not of norms and biases

    def __post_init__(self) -> None:
        _one_of("optimizer", self, "name", ("adafactor", "adamw"))
        _one_of("optimizer", self, "schedule", ("rsqrt", "warmup_rsqrt", "warmup_cosine", "constant"))
        _positive("optimizer", self, "learning_rate")
        _at_least("optimizer", self, "warmup_steps", 1)
        if self.warmup_steps >= 2**31:
            raise _bad("optimizer.warmup_steps", self.warmup_steps, "an integer < 2**31")
        for field in ("clip_norm", "weight_decay"):
            _not_negative("optimizer", self, field)
        _rate("optimizer", self, "momentum")
        for field in ("decay_rate", "beta1", "beta2"):
            if not 0 < getattr(self, field) < 1:
                raise _bad(
                    f"optimizer.{field}", getattr(self, field), "a number between 0 and 1, both excluded"
                )


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    num_steps: int = 524288  # updates of the whole run
    log_every: int = 100  # steps between lines of metrics.jsonl
    eval_every: int = 1000  # steps between evaluations on held-out text
    eval_batches: int = 16  # the same ones each time
    patience: int = (
        0  # evaluations in a row that are no better than the best, after which the run is done; 0: none
    )
    accumulate: int = 1  # microbatches a step; gradients are those of the whole batch
    label_smoothing: float = 0.0  # share of the target spread over the vocabulary
    output_z_loss_weight: float = 1e-4  # on the vocabulary logits; 0 leaves it out
    skip_nonfinite: int = 0  # updates in a row left out as loss or gradient is not finite; one more: a stop
    trainable: str = ""  # regular expression of the parameters that are trained (found in encoder/blocks/...), or a name of train_state.SUBSETS; "": all
    seed: int = 0  # of parameters, batches, dropout and routers

    def __post_init__(self) -> None:
        for field in ("num_steps", "log_every", "eval_every", "eval_batches", "accumulate"):
            _at_least("train", self, field, 1)
        for field in ("seed", "skip_nonfinite", "patience"):
            _at_least("train", self, field, 0)
        if self.seed >= 2**32:  # what a JAX key has room for: larger seeds would repeat smaller ones
            raise _bad("train.seed", self.seed, "an integer < 2**32")
        _expression("train", self, "trainable")
        _rate("train", self, "label_smoothing")
        _not_negative("train", self, "output_z_loss_weight")


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """Which devices hold what, and the processes that have them. A run may go on with other settings here.

    A layout's axes: data (tokens), expert (tokens and experts), model (widths). Sizes are devices along an
    axis within a slice (ICI), and with ``dcn_`` slices along it (their network); 0 is the layout's own, -1
    all that are left.
    """

    layout: str = "data"  # data | model | data_model | data_expert | data_expert_model: sharding.LAYOUTS
    fsdp: bool = False  # parameters and optimizer state are sharded over the axes of the tokens as well
    data: int = 0  # devices over which tokens lie
    expert: int = 0  # devices over which experts lie, and tokens as well
    model: int = 0  # devices over which widths lie
    dcn_data: int = 0  # slices along data
    dcn_expert: int = 0  # slices along expert
    dcn_model: int = 0  # slices along model
    # Where process 0 listens, HOST:PORT; auto: as the environment says (`distributed.job`); none: one process
    coordinator: str = "auto"
    processes: int = 0  # of the job, with HOST:PORT
    process: int = -1  # this one's number, with HOST:PORT

    def __post_init__(self) -> None:
        for field in ("data", "expert", "model", "dcn_data", "dcn_expert", "dcn_model", "process"):
            _at_least("mesh", self, field, -1)
        if self.coordinator in ("auto", "none"):
            for field, unset in (("processes", 0), ("process", -1)):
                if getattr(self, field) != unset:
                    raise _bad(
                        f"mesh.{field}", getattr(self, field), "a number with mesh.coordinator=HOST:PORT"
                    )
            return
        host, colon, port = self.coordinator.rpartition(":")
        if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
            raise _bad("mesh.coordinator", self.coordinator, "auto, none, or HOST:PORT of process 0")
        _at_least("mesh", self, "processes", 1)
        if not 0 <= self.process < self.processes:
            raise _bad("mesh.process", self.process, f"an integer from 0 to {self.processes - 1}")


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
    every: int = 1000  # steps
    keep: int = 2  # the newest so many
    keep_best: int = 1  # and the best so many by validation cross-entropy
    on_damage: str = "stop"  # stop | previous: where the newest is damaged, go on from the good one before it
    on_error: str = "stop"  # stop | continue: where one can't be written, warn and try again at the next

    def __post_init__(self) -> None:
        for field, least in (("every", 1), ("keep", 1), ("keep_best", 0)):
            _at_least("checkpoint", self, field, least)
        _one_of("checkpoint", self, "on_damage", ("stop", "previous"))
        _one_of("checkpoint", self, "on_error", ("stop", "continue"))


@dataclasses.dataclass(frozen=True)
class InitSettings:
    """Where the first parameters come from. Read before the first step only: a run that goes on has its own."""

    # a run's directory (its newest step), DIR|STEP, or a step's own directory, DIR/checkpoints/STEP; "": random ones
    checkpoint: str = ""
    params: str = (
        ""  # regular expression of what is taken (found in encoder/blocks/...), the rest is random; "": all
    )
    optimizer: bool = (
        False  # its optimizer's state too, and with it the place in the learning rate's schedule
    )
    # the checkpoint is of a dense model, and each expert begins as a copy of its feed-forward (2212.05055); see moe.unit_gates
    upcycle: bool = False

    def __post_init__(self) -> None:
        _expression("init", self, "params")
        if self.optimizer and (self.params or not self.checkpoint):
            raise _bad("init.optimizer", True, "False without init.checkpoint or with init.params")
        if self.upcycle and (self.params or not self.checkpoint):
            raise _bad("init.upcycle", True, "False without init.checkpoint or with init.params")
        if self.params and not self.checkpoint:
            raise _bad("init.params", self.params, "empty without init.checkpoint")


@dataclasses.dataclass(frozen=True)
class TaskSettings:
    """What is fine-tuned on (`experiments.finetune`). Pre-training reads none of it."""

    names: str = (
        ""  # of tasks, with commas between them; one may be a glob of .jsonl, .json, .csv or .tsv files
    )
    held_out: str = ""  # of tasks that are measured and not trained on
    shots: int = 0  # solved examples before each question that is measured, but of tasks named NAME@COUNT
    inputs: str = (
        "{inputs}"  # of files: a template of a record's fields, which the model reads (SQuAD's has its own)
    )
    targets: str = "{targets}"  # and what it is to write
    options: str = ""  # of files: the classes, with commas between them; "": any text
    metrics: str = ""  # of files: names in data.tasks.metrics; "": accuracy of classes, else exact_match,f1
    # A task's share of the batches: proportional (to its examples, at most `ceiling` of them, to the power 1 / `temperature`),
    # equal, or rates
    mixture: str = "proportional"
    ceiling: int = 0  # 0: none
    temperature: float = 1.0  # above 1 small tasks get more
    rates: str = ""  # with mixture=rates: a number for each task, with commas between them
    eval_examples: int = 256  # of each task at most, for the metrics; 0: all
    packed: int = 1  # in training a row is so many times data.input_length and data.target_length, filled with examples; 1: it is one

    def __post_init__(self) -> None:
        _one_of("task", self, "mixture", ("proportional", "equal", "rates"))
        for field in ("ceiling", "eval_examples", "shots"):
            _at_least("task", self, field, 0)
        _at_least("task", self, "packed", 1)
        _positive("task", self, "temperature")
        if (self.mixture == "rates") != bool(self.rates):
            raise _bad("task.rates", self.rates or "''", "numbers with task.mixture=rates, else ''")
        try:
            found = [float(rate) for rate in self.rates.split(",")] if self.rates else []
        except ValueError:
            found = [0.0]
        if any(not rate > 0 for rate in found) or (found and len(found) != self.names.count(",") + 1):
            raise _bad("task.rates", self.rates, f"a number above 0 for each of task.names={self.names}")


@dataclasses.dataclass(frozen=True)
class DistillSettings:
    """The teacher of a run (`experiments.distill`)."""

    teacher: str = ""  # a run's directory (its newest step), DIR|STEP, or a step's own directory; "": none
    weight: float = 0.25  # of the teacher's probabilities, the true tokens' is 1 less it; 0: it is not read
    temperature: float = 1.0  # by which both models' logits are divided for it
    # The first parameters are the teacher's, of all parts that both have in the same shape: of a sparse teacher all but its experts
    init: bool = True
    # So many of the teacher's likeliest tokens are written once, with their log-probabilities, and read; 0: it runs beside
    # the student
    top_k: int = 0
    store: str = ""  # the directory where they are written, which runs may share; "": the run's own
    baseline: str = ""  # the run of such a student without a teacher: what the teacher's gain is counted from

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise _bad("distill.weight", self.weight, "a number from 0 to 1")
        _positive("distill", self, "temperature")
        _at_least("distill", self, "top_k", 0)
        if self.store and not self.top_k:
            raise _bad("distill.store", self.store, "'' without distill.top_k")
        if self.baseline and not self.teacher:
            raise _bad("distill.baseline", self.baseline, "'' without distill.teacher")


@dataclasses.dataclass(frozen=True)
class Settings:
    """All groups; the checks that need more than one group are here."""

    model: ModelSettings = ModelSettings()
    moe: MoESettings = MoESettings()
    data: DataSettings = DataSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    train: TrainSettings = TrainSettings()
    mesh: MeshSettings = MeshSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    init: InitSettings = InitSettings()
    task: TaskSettings = TaskSettings()
    distill: DistillSettings = DistillSettings()

    def __post_init__(self) -> None:
        if (self.data.objective == "causal_lm") != (self.model.stacks == "decoder_only"):
            raise _bad("data.objective", self.data.objective, f"{self._objectives} with {self.model.stacks}")
        if self.model.stacks == "decoder_only" and self.moe.decoder_every >= 0:
            raise _bad("moe.decoder_every", self.moe.decoder_every, "-1 with model.stacks=decoder_only")
        for stack in self.stacks if self.moe.routed else ():
            every, _ = self._every(stack)
            decoders, first = stack == "decoder", self.moe.dense_first
            of = "num_decoder_layers" if decoders and self.model.num_decoder_layers else "num_layers"
            of = f"model.{of}={self.layers(stack)}"
            if first and (not every or first >= self.layers(stack)):
                raise _bad(
                    "moe.dense_first", first, f"an integer below {of}, in a stack that has sparse blocks"
                )
            if every and (self.layers(stack) - first) % every:
                field = "decoder_every" if decoders and self.moe.decoder_every > 0 else "every"
                less = f" less moe.dense_first={first}" if first else ""
                raise _bad(f"moe.{field}", every, f"a divisor of {of}{less}")
        if self.sparse and self.expert_width % self.moe.granularity:
            field = "moe.d_ff" if self.moe.d_ff else "model.d_ff"
            raise _bad("moe.granularity", self.moe.granularity, f"a divisor of {field}={self.expert_width}")
        if self.moe.expert_bits and not self.sparse:
            raise _bad("moe.expert_bits", self.moe.expert_bits, "0 with a dense model")
        for rows in (self.model.d_model, self.expert_width // self.moe.granularity):
            if self.moe.expert_bits == 4 and rows % 2:
                raise _bad("moe.expert_bits", 4, f"8 or 0 with kernels of {rows} rows: two share a byte")
            if self.moe.expert_bits and rows % (self.moe.expert_group or rows):
                raise _bad(
                    "moe.expert_group", self.moe.expert_group, f"0, or a divisor of a kernel's {rows} rows"
                )
        if self.model.vocab_rows and self.model.vocab_rows < self.data.vocab_size:
            raise _bad(
                "model.vocab_rows",
                self.model.vocab_rows,
                f"0, or data.vocab_size={self.data.vocab_size} or more",
            )
        if self.init.upcycle and not self.sparse:
            raise _bad("init.upcycle", True, "False with a dense model")
        if self.distill.teacher and self.distill.init and self.init.checkpoint:
            raise _bad("distill.init", True, f"False with init.checkpoint={self.init.checkpoint}")
        if self.distill.top_k > self.embedding_rows:
            raise _bad(
                "distill.top_k",
                self.distill.top_k,
                f"at most the {self.embedding_rows} rows of the embedding",
            )
        if self.data.batch_size % self.train.accumulate:
            raise _bad(
                "train.accumulate",
                self.train.accumulate,
                f"a divisor of data.batch_size={self.data.batch_size}",
            )

    @property
    def _objectives(self) -> str:
        alone = self.model.stacks == "decoder_only"
        return ", ".join(name for name in OBJECTIVES if (name == "causal_lm") == alone)

    @property
    def stacks(self) -> tuple[str, ...]:
        """``encoder`` and ``decoder``, or the decoder alone; per-layer metrics have this order."""
        return STACKS[self.model.stacks]

    def layers(self, stack: str) -> int:
        """Blocks of a stack."""
        return (stack == "decoder" and self.model.num_decoder_layers) or self.model.num_layers

    def _every(self, stack: str) -> tuple[int, int]:
        if stack == "decoder" and self.moe.decoder_every >= 0:
            return self.moe.decoder_every, self.moe.decoder_offset
        return self.moe.every, self.moe.offset

    def period(self, stack: str) -> int:
        """Blocks after which a stack repeats itself: one of them is sparse, or it is a dense stack's single one."""
        every, _ = self._every(stack)
        return every if self.moe.routed and every else 1

    def first(self, stack: str) -> int:
        """Dense blocks of a stack before those that repeat."""
        return self.moe.dense_first if self.moe.routed and self._every(stack)[0] else 0

    def repeats(self, stack: str) -> int:
        """How often a stack repeats its period."""
        return (self.layers(stack) - self.first(stack)) // self.period(stack)

    def sparse_blocks(self, stack: str) -> range:
        """The numbers of a stack's sparse blocks."""
        every, offset = self._every(stack)
        if not self.moe.routed or not every:
            return range(0)
        first = self.first(stack)
        return range(first + offset % every, self.layers(stack), every)

    @property
    def sparse_stacks(self) -> tuple[str, ...]:
        return tuple(stack for stack in self.stacks if self.sparse_blocks(stack))

    @property
    def sparse(self) -> bool:
        return bool(self.sparse_stacks)

    @property
    def expert_width(self) -> int:
        """Of an expert before it is split (`moe.granularity`)."""
        return self.moe.d_ff or self.model.d_ff

    @property
    def embedding_rows(self) -> int:
        """`model.vocab_rows`, or pieces + sentinels, rounded up to a multiple of 128 (T5: 32,000 + 100 -> 32,128)."""
        return self.model.vocab_rows or math.ceil((self.data.vocab_size + NUM_SENTINELS) / 128) * 128


def from_config(config: Mapping[str, Any]) -> Settings:
    """Builds and validates settings from a ConfigDict or a plain nested mapping.

    Raises:
      ValueError: a group or field that does not exist, a wrong type, an impossible value.
    """
    groups = {field.name: field.type for field in dataclasses.fields(Settings)}
    for name in config:
        if name not in groups:
            raise _bad(name, config[name], f"one of the groups {', '.join(groups)}")
    return Settings(**{name: _group(name, groups[name], config.get(name, {})) for name in groups})


def to_dict(settings: Settings) -> dict[str, dict[str, Any]]:
    return dataclasses.asdict(settings)


def _group(group: str, cls: type, values: Mapping[str, Any]) -> Any:
    if not isinstance(values, Mapping) and not hasattr(values, "items"):
        raise _bad(group, values, "a mapping of fields")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    arguments = {}
    for name, value in values.items():
        if name not in fields:
            raise _bad(f"{group}.{name}", value, f"one of the fields {', '.join(fields)}")
        wanted = fields[name].type
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:
            raise _bad(f"{group}.{name}", value, f"a value of type {wanted.__name__}")
        if wanted is float and not math.isfinite(value):
            raise _bad(f"{group}.{name}", value, "a finite number")
        arguments[name] = value
    return cls(**arguments)


def default_config() -> Any:
    """The defaults as a ConfigDict, for config files to start from."""
    from ml_collections import ConfigDict

    return ConfigDict(to_dict(Settings()))
