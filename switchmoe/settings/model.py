"""Settings of the model: its stacks, and its experts."""

import dataclasses

from switchmoe.settings.checks import at_least, bad, not_negative, one_of, positive, rate

ACTIVATIONS = ("relu", "geglu", "swiglu")
DTYPES = ("float32", "bfloat16")
STACKS = {"encoder_decoder": ("encoder", "decoder"), "decoder_only": ("decoder",)}
LOSS_WEIGHTS = {  # a router's loss: the field of its weight
    "balance": "balance_loss_weight",
    "importance": "importance_loss_weight",
    "load": "load_loss_weight",
    "z": "z_loss_weight",
}


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
    shared_dropout: bool = (
        False  # one mask for all tokens of a row (T5X, Mesh TensorFlow); False: each has its own
    )
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
            at_least("model", self, field, 1)
        for field in ("num_kv_heads", "num_decoder_layers", "vocab_rows"):
            at_least("model", self, field, 0)
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise bad(
                "model.num_kv_heads", self.num_kv_heads, f"0, or a divisor of num_heads={self.num_heads}"
            )
        one_of("model", self, "stacks", tuple(STACKS))
        if self.stacks == "decoder_only" and self.num_decoder_layers:
            raise bad("model.num_decoder_layers", self.num_decoder_layers, "0 with decoder_only: num_layers")
        at_least("model", self, "relative_buckets", 4)
        at_least("model", self, "relative_max_distance", self.relative_buckets)
        one_of("model", self, "activation", ACTIVATIONS)
        one_of("model", self, "dtype", DTYPES)
        rate("model", self, "dropout_rate")
        one_of("model", self, "qk_norm", ("none", "head", "all"))
        one_of("model", self, "positions", ("relative", "rotary"))
        if self.positions == "rotary" and self.d_kv % 2:
            raise bad("model.d_kv", self.d_kv, "an even number with model.positions=rotary")
        for field in ("init_scale", "norm_eps", "rotary_theta"):
            positive("model", self, field)
        not_negative("model", self, "attention_scale")

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
    # 64 a sequence (group_size=0). Flaxformer, which trained the released models, has factors, 1.25 and 2.0 at evaluation, of
    # groups of 8,192 tokens.
    capacity: int = 0
    # Encoder: padding is routed, and takes slots, like any token, as in Hugging Face's Switch. Flaxformer's masked router leaves it
    # out, its scatter router only weighs it down.
    route_padding: bool = False
    group_size: int = 4096  # at most so many tokens compete for capacity: whole sequences, or parts; 0: one
    # The same at evaluation; 0: a sequence, so neighbours never matter (nothing is dropped in a decoder alone, whose
    # rows hold several documents)
    eval_group_size: int = 0
    balance_loss_weight: float = 1e-2  # alpha, for each sparse layer; the layers are summed
    z_loss_weight: float = 1e-3  # ST-MoE's router z-loss, likewise; 0 leaves it out
    importance_loss_weight: float = 0.1  # noisy_top_k's
    load_loss_weight: float = 0.1  # noisy_top_k's
    # group | global: the tokens over which the balancing losses' shares are taken; global: all of a microbatch (train.accumulate)
    balance: str = "group"
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
    reroute: int = 0  # encoder: rounds in which choices without a slot try the token's next best expert
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
            at_least("moe", self, field, 1)
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
            at_least("moe", self, field, 0)
        at_least("moe", self, "decoder_every", -1)
        for every, field in ((self.every, "offset"), (self.decoder_every, "decoder_offset")):
            last = max(every, 1) - 1
            if not -last - 1 <= getattr(self, field) <= last:
                raise bad(f"moe.{field}", getattr(self, field), f"an integer from {-last - 1} to {last}")
        for field in ("capacity_factor", "eval_capacity_factor", "router_init_stddev"):
            positive("moe", self, field)
        for field in (*LOSS_WEIGHTS.values(), "choice_threshold", "bias_rate"):
            not_negative("moe", self, field)
        for field in ("jitter", "input_dropout_rate", "expert_dropout_rate"):
            rate("moe", self, field)
        if self.expert_bits not in (0, 4, 8):
            raise bad("moe.expert_bits", self.expert_bits, "0, 8 or 4")
        one_of("moe", self, "balance", ("group", "global"))
        one_of("moe", self, "balance_choices", ("all", "first"))
        one_of("moe", self, "explore", ("argmax", "sample", "input_dropout", "jitter"))
        one_of("moe", self, "score", ("softmax", "sigmoid"))
        one_of("moe", self, "router_dtype", DTYPES)

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
