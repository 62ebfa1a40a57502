"""The same logits here and in `transformers`? For the same weights, on random sequences.

Letters: B batch, L length, V vocabulary rows.
"""

import contextlib
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from switchmoe.inference import decoding
from switchmoe.model.attention import empty_memory
from switchmoe.model.transformer import Transformer
from switchmoe.settings import Settings
from switchmoe.training import train_state

ROWS, LENGTH, LONGEST = 4, 24, 512
MEMORY = (  # files of Linux, what is said there, in how many bytes
    ("/proc/meminfo", r"MemAvailable: +(\d+) kB", 1024),
    ("/sys/fs/cgroup/memory.max", r"^(\d+)$", 1),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", r"^(\d+)$", 1),
)
TOLERANCE = 1e-4  # of the largest logit: both models compute in float32


class Batch(NamedTuple):
    """Random tokens, padded in the last rows on the right and on the left; a decoder alone has no ``targets_BL``."""

    tokens_BL: np.ndarray
    real_BL: np.ndarray
    targets_BL: np.ndarray | None


class Found(NamedTuple):
    largest: float  # difference
    scale: float  # the largest logit there
    place: tuple[int, ...]  # row, position, id

    def __str__(self) -> str:
        row, position, token = self.place
        share = self.largest / self.scale if self.scale else 0.0
        return f"logits differ by {self.largest:.2g} at most, {share:.1g} of the largest (row {row}, position {position}, id {token})"


def with_their_slots(settings: Settings, path: Path) -> Settings:
    """The settings with the slots of a Hugging Face directory's Switch, as theirs can't say a factor or groups of sequences."""
    slots = json.loads((path / "config.json").read_text(encoding="utf-8")).get("expert_capacity")
    if slots is None or not settings.sparse:
        return settings
    moe = dataclasses.replace(
        settings.moe, capacity=slots, group_size=0, eval_group_size=0, route_padding=True, dropless=False
    )
    return dataclasses.replace(settings, moe=moe)


def batch(settings: Settings, rows: int = ROWS, length: int = LENGTH, seed: int = 0) -> Batch:
    """Of an encoder's slots there are fewer than tokens, where `LONGEST` allows, and a row of one token makes an expert's run out."""
    rng, size = np.random.default_rng(seed), settings.embedding_rows
    encoder = "encoder" in settings.stacks
    over = settings.moe.capacity + length
    length = over if settings.moe.capacity and over <= LONGEST else length
    tokens_BL = rng.integers(2 if encoder else 0, size, (rows, length))
    if settings.moe.capacity:
        tokens_BL[0] = tokens_BL[0, 0]
    real_BL = np.ones((rows, length), bool)
    real_BL[rows - 2, length - length // 3 :] = False
    real_BL[rows - 1, : length // 4] = False
    if not encoder:
        return Batch(tokens_BL, real_BL, None)
    return Batch(np.where(real_BL, tokens_BL, 0), real_BL, rng.integers(2, size, (rows, length)))


def ours(settings: Settings, params: Any, batch: Batch) -> np.ndarray:
    """Float32 logits [B, L, V]; of a decoder alone as it reads prompts."""
    tokens_BL = jnp.asarray(batch.tokens_BL, jnp.int32)
    if batch.targets_BL is not None:
        targets_BL = jnp.asarray(batch.targets_BL, jnp.int32)
        return np.asarray(Transformer(settings).apply({"params": params}, tokens_BL, targets_BL)[0])
    settings, params = decoding.prepared(settings, params)
    rows, length = tokens_BL.shape
    memory = empty_memory(settings.model, settings.layers("decoder"), rows, length)
    model = Transformer(settings)
    place_BL = np.where(batch.real_BL, np.cumsum(batch.real_BL, axis=1) - 1, -1)
    given = tokens_BL, jnp.asarray(place_BL, jnp.int32), memory
    x_BLD, _ = model.apply({"params": params}, *given, method="read")
    return np.asarray(model.apply({"params": params}, x_BLD, method="logits"))


def theirs(model: Any, batch: Batch, first: int = 0) -> np.ndarray:
    """Of a model of `transformers`; ``first``: what a decoder reads first."""
    import torch

    tokens_BL, real_BL = torch.tensor(batch.tokens_BL), torch.tensor(batch.real_BL.astype(np.int64))
    with torch.no_grad():
        if batch.targets_BL is None:
            place_BL = (real_BL.cumsum(dim=1) - 1).clamp(min=0)
            found = model(input_ids=tokens_BL, attention_mask=real_BL, position_ids=place_BL)
        else:
            shifted_BL = np.pad(batch.targets_BL[:, :-1], ((0, 0), (1, 0)), constant_values=first)
            decoder = torch.tensor(shifted_BL)
            found = model(input_ids=tokens_BL, attention_mask=real_BL, decoder_input_ids=decoder)
    return found.logits.float().numpy()


def compared(one_BLV: np.ndarray, other_BLV: np.ndarray, batch: Batch) -> Found:
    """Where two models' logits differ most, at real tokens."""
    difference_BLV = np.abs(one_BLV - other_BLV)
    if batch.targets_BL is None:
        difference_BLV = np.where(batch.real_BL[..., None], difference_BLV, 0.0)
    difference_BLV = np.nan_to_num(difference_BLV, nan=np.inf)
    place = np.unravel_index(difference_BLV.argmax(), difference_BLV.shape)
    scale = float(np.abs(other_BLV[batch.real_BL] if batch.targets_BL is None else other_BLV).max())
    return Found(float(difference_BLV[place]), scale, tuple(map(int, place)))


def directory(path: Path, settings: Settings, params: Any, rounded: bool) -> Found:
    """Of a Hugging Face directory and our parameters, both in float32 (a directory's other types are read so).

    Args:
      rounded: to bfloat16 first, both of them, as one of the two has it.

    Raises:
      ValueError: transformers can't load the directory.
    """
    import torch
    import transformers

    cls = (
        transformers.AutoModelForCausalLM
        if settings.stacks == ("decoder",)
        else transformers.AutoModelForSeq2SeqLM
    )
    try:
        model = cls.from_pretrained(path, dtype=torch.float32).eval()
    except Exception as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: transformers can't load it ({line})") from error
    if rounded:
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(leaf.dtype), params)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16).to(torch.float32)
    given = batch(settings)
    with jax.default_matmul_precision("highest"):
        found = ours(settings, params, given)
    return compared(found, theirs(model, given, settings.data.bos_id), given)


def lacking(settings: Settings) -> str:
    """What keeps `directory` from comparing a model: memory for two of it in float32; "": nothing."""
    needed, free = 8 * train_state.parameter_counts(settings)[0], free_memory()
    return f"it takes {needed / 1e9:,.1f} GB, {free / 1e9:,.1f} are free" if needed > free else ""


def free_memory() -> float:
    """Bytes that this process may take, as far as the system tells."""
    found = [math.inf]
    for file, pattern, unit in MEMORY:
        with contextlib.suppress(OSError):
            found += [int(number) * unit for number in re.findall(pattern, Path(file).read_text())]
    return min(found)


def available() -> bool:
    """Whether a `transformers` is installed whose Switch routes as it should, and torch."""
    try:
        import torch  # noqa: F401
        import transformers
    except ImportError:
        return False
    return tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 18)
