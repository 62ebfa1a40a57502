"""Settings of how a run trains, where it runs, what it keeps and what it begins with."""

import dataclasses

from switchmoe.settings.checks import at_least, bad, expression, not_negative, one_of, positive, rate


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
        one_of("optimizer", self, "name", ("adafactor", "adamw"))
        one_of("optimizer", self, "schedule", ("rsqrt", "warmup_rsqrt", "warmup_cosine", "constant"))
        positive("optimizer", self, "learning_rate")
        at_least("optimizer", self, "warmup_steps", 1)
        if self.warmup_steps >= 2**31:
            raise bad("optimizer.warmup_steps", self.warmup_steps, "an integer < 2**31")
        for field in ("clip_norm", "weight_decay"):
            not_negative("optimizer", self, field)
        rate("optimizer", self, "momentum")
        for field in ("decay_rate", "beta1", "beta2"):
            if not 0 < getattr(self, field) < 1:
                raise bad(
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
    # Microbatches a step; gradients are those of the whole batch where one holds whole groups (batch_size / accumulate x length
    # a multiple of moe.group_size). Else groups are smaller, with slots and balance of their own.
    accumulate: int = 1
    label_smoothing: float = 0.0  # share of the target spread over the vocabulary
    output_z_loss_weight: float = 1e-4  # on the vocabulary logits; 0 leaves it out
    skip_nonfinite: int = 0  # updates in a row left out as loss or gradient is not finite; one more: a stop
    trainable: str = ""  # regular expression of the parameters that are trained (found in encoder/blocks/...), or a name of train_state.SUBSETS; "": all
    seed: int = 0  # of parameters, batches, dropout and routers

    def __post_init__(self) -> None:
        for field in ("num_steps", "log_every", "eval_every", "eval_batches", "accumulate"):
            at_least("train", self, field, 1)
        for field in ("seed", "skip_nonfinite", "patience"):
            at_least("train", self, field, 0)
        if self.seed >= 2**32:  # what a JAX key has room for: larger seeds would repeat smaller ones
            raise bad("train.seed", self.seed, "an integer < 2**32")
        expression("train", self, "trainable")
        rate("train", self, "label_smoothing")
        not_negative("train", self, "output_z_loss_weight")


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
            at_least("mesh", self, field, -1)
        if self.coordinator in ("auto", "none"):
            for field, unset in (("processes", 0), ("process", -1)):
                if getattr(self, field) != unset:
                    raise bad(
                        f"mesh.{field}", getattr(self, field), "a number with mesh.coordinator=HOST:PORT"
                    )
            return
        host, colon, port = self.coordinator.rpartition(":")
        if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
            raise bad("mesh.coordinator", self.coordinator, "auto, none, or HOST:PORT of process 0")
        at_least("mesh", self, "processes", 1)
        if not 0 <= self.process < self.processes:
            raise bad("mesh.process", self.process, f"an integer from 0 to {self.processes - 1}")


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
    every: int = 1000  # steps
    keep: int = 2  # the newest so many
    keep_best: int = 1  # and the best so many by validation cross-entropy
    on_damage: str = "stop"  # stop | previous: where the newest is damaged, go on from the good one before it
    on_error: str = "stop"  # stop | continue: where one can't be written, warn and try again at the next

    def __post_init__(self) -> None:
        for field, least in (("every", 1), ("keep", 1), ("keep_best", 0)):
            at_least("checkpoint", self, field, least)
        one_of("checkpoint", self, "on_damage", ("stop", "previous"))
        one_of("checkpoint", self, "on_error", ("stop", "continue"))


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
        expression("init", self, "params")
        if self.optimizer and (self.params or not self.checkpoint):
            raise bad("init.optimizer", True, "False without init.checkpoint or with init.params")
        if self.upcycle and (self.params or not self.checkpoint):
            raise bad("init.upcycle", True, "False without init.checkpoint or with init.params")
        if self.params and not self.checkpoint:
            raise bad("init.params", self.params, "empty without init.checkpoint")


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
            raise bad("distill.weight", self.weight, "a number from 0 to 1")
        positive("distill", self, "temperature")
        at_least("distill", self, "top_k", 0)
        if self.store and not self.top_k:
            raise bad("distill.store", self.store, "'' without distill.top_k")
        if self.baseline and not self.teacher:
            raise bad("distill.baseline", self.baseline, "'' without distill.teacher")
