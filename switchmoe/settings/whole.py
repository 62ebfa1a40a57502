"""All settings of a run, built from a ConfigDict and validated once."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from switchmoe.settings import data
from switchmoe.settings.checks import bad
from switchmoe.settings.data import DataSettings, TaskSettings
from switchmoe.settings.model import STACKS, ModelSettings, MoESettings
from switchmoe.settings.run import (
    CheckpointSettings,
    DistillSettings,
    InitSettings,
    MeshSettings,
    OptimizerSettings,
    TrainSettings,
)

NUM_SENTINELS = 100


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
            raise bad("data.objective", self.data.objective, f"{self._objectives} with {self.model.stacks}")
        if self.model.stacks == "decoder_only" and self.moe.decoder_every >= 0:
            raise bad("moe.decoder_every", self.moe.decoder_every, "-1 with model.stacks=decoder_only")
        for stack in self.stacks if self.moe.routed else ():
            every, _ = self._every(stack)
            decoders, first = stack == "decoder", self.moe.dense_first
            of = "num_decoder_layers" if decoders and self.model.num_decoder_layers else "num_layers"
            of = f"model.{of}={self.layers(stack)}"
            if first and (not every or first >= self.layers(stack)):
                raise bad(
                    "moe.dense_first", first, f"an integer below {of}, in a stack that has sparse blocks"
                )
            if every and (self.layers(stack) - first) % every:
                field = "decoder_every" if decoders and self.moe.decoder_every > 0 else "every"
                less = f" less moe.dense_first={first}" if first else ""
                raise bad(f"moe.{field}", every, f"a divisor of {of}{less}")
        if self.sparse and self.expert_width % self.moe.granularity:
            field = "moe.d_ff" if self.moe.d_ff else "model.d_ff"
            raise bad("moe.granularity", self.moe.granularity, f"a divisor of {field}={self.expert_width}")
        if self.moe.expert_bits and not self.sparse:
            raise bad("moe.expert_bits", self.moe.expert_bits, "0 with a dense model")
        for rows in (self.model.d_model, self.expert_width // self.moe.granularity):
            if self.moe.expert_bits == 4 and rows % 2:
                raise bad("moe.expert_bits", 4, f"8 or 0 with kernels of {rows} rows: two share a byte")
            if self.moe.expert_bits and rows % (self.moe.expert_group or rows):
                raise bad(
                    "moe.expert_group", self.moe.expert_group, f"0, or a divisor of a kernel's {rows} rows"
                )
        if self.model.vocab_rows and self.model.vocab_rows < self.data.vocab_size:
            raise bad(
                "model.vocab_rows",
                self.model.vocab_rows,
                f"0, or data.vocab_size={self.data.vocab_size} or more",
            )
        if self.init.upcycle and not self.sparse:
            raise bad("init.upcycle", True, "False with a dense model")
        if self.distill.teacher and self.distill.init and self.init.checkpoint:
            raise bad("distill.init", True, f"False with init.checkpoint={self.init.checkpoint}")
        if self.distill.top_k > self.embedding_rows:
            raise bad(
                "distill.top_k",
                self.distill.top_k,
                f"at most the {self.embedding_rows} rows of the embedding",
            )
        if self.data.batch_size % self.train.accumulate:
            raise bad(
                "train.accumulate",
                self.train.accumulate,
                f"a divisor of data.batch_size={self.data.batch_size}",
            )

    @property
    def _objectives(self) -> str:
        alone = self.model.stacks == "decoder_only"
        return ", ".join(name for name in data.OBJECTIVES if (name == "causal_lm") == alone)

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
            raise bad(name, config[name], f"one of the groups {', '.join(groups)}")
    return Settings(**{name: _group(name, groups[name], config.get(name, {})) for name in groups})


def to_dict(settings: Settings) -> dict[str, dict[str, Any]]:
    return dataclasses.asdict(settings)


def _group(group: str, cls: type, values: Mapping[str, Any]) -> Any:
    if not isinstance(values, Mapping) and not hasattr(values, "items"):
        raise bad(group, values, "a mapping of fields")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    arguments = {}
    for name, value in values.items():
        if name not in fields:
            raise bad(f"{group}.{name}", value, f"one of the fields {', '.join(fields)}")
        wanted = fields[name].type
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:
            raise bad(f"{group}.{name}", value, f"a value of type {wanted.__name__}")
        if wanted is float and not math.isfinite(value):
            raise bad(f"{group}.{name}", value, "a finite number")
        arguments[name] = value
    return cls(**arguments)


def default_config() -> Any:
    """The defaults as a ConfigDict, for config files to start from."""
    from ml_collections import ConfigDict

    return ConfigDict(to_dict(Settings()))
