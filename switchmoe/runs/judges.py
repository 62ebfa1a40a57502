"""Judges: what is measured on held-out data."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from switchmoe.data.batches import Batch
from switchmoe.data.vocabulary import Vocabulary
from switchmoe.inference import generation
from switchmoe.runs import placing
from switchmoe.settings import Settings
from switchmoe.training import train_step
from switchmoe.training.objective import Objective

NUM_EXAMPLES = 5


class HeldOut:
    """The objective's own metrics over batches that are the same each time; ``done`` of them so far.

    Args:
      like: a judge of batches of the same shapes, whose program serves this one as well.
    """

    def __init__(
        self,
        name: str,
        batches: Sequence[Batch],
        objective: Objective,
        settings: Settings,
        mesh: Mesh,
        like: "HeldOut | None" = None,
    ):
        self.name, self.done = name, 0
        self._batches, self._objective, self._settings, self._mesh = batches, objective, settings, mesh
        self._like = like

    def of(self, settings: Settings) -> "HeldOut":
        """The same batches for another model."""
        return HeldOut(self.name, self._batches, self._objective, settings, self._mesh)

    def compile(self, params: Any) -> None:
        if self._like:
            self._step = self._like._step
            return
        step = functools.partial(train_step.eval_step, settings=self._settings, objective=self._objective)
        whole = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec())
        batch = placing.whole(self._batches[0], self._mesh)
        self._step = jax.jit(step, out_shardings=whole).lower(params, batch).compile()

    def figures(self, params: Any) -> dict[str, Any]:
        found = []
        for number, batch in enumerate(self._batches):
            self.done = number
            found.append(self._step(params, placing.whole(batch, self._mesh)))
        sums, counts = jax.tree.map(lambda *values: sum(values), *jax.device_get(found))
        return jax.device_get(self._objective.summarize(sums, counts, self._settings))


class Examples:
    """The model's own answers to the first held-out examples, one token after the other, each time the likeliest.

    A decoder alone continues documents: of each row's longest the second half.
    """

    def __init__(self, batch: Batch, vocabulary: Vocabulary, settings: Settings, mesh: Mesh):
        self._vocabulary, self._mesh = vocabulary, mesh
        shards = mesh.shape["data"] * mesh.shape["expert"]
        # As many as divide among the shards of the tokens.
        batch = {name: rows[: -(-NUM_EXAMPLES // shards) * shards] for name, rows in batch.items()}
        self._inputs, self._targets = (
            (batch["inputs"], batch["targets"]) if "inputs" in batch else _halves(batch, settings.data.bos_id)
        )
        length = self._targets.shape[1]
        self._decode = functools.partial(generation.greedy, tokens=length, settings=settings)

    def __call__(self, params: Any) -> dict[str, list[dict[str, str]]]:
        whole = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec())
        decode = jax.jit(self._decode, out_shardings=whole)
        # What is padding is at a row's end, but for what a decoder begins with.
        counts = np.maximum(1, (np.cumsum(self._inputs[:, ::-1], axis=1) > 0).sum(axis=1)).astype(np.int32)
        prompts = placing.whole({"inputs": self._inputs, "counts": counts}, self._mesh)
        answers = jax.device_get(decode(params, prompts["inputs"], prompts["counts"]))
        rows = zip(self._inputs, self._targets, answers, strict=True)
        return {"examples": [self._texts(row) for row in list(rows)[:NUM_EXAMPLES]]}

    def _texts(self, row: tuple[np.ndarray, ...]) -> dict[str, str]:
        return dict(zip(("input", "target", "prediction"), map(self._vocabulary.decode, row), strict=True))


def _halves(batch: Batch, bos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """(what a decoder alone reads first, what comes then), of each row's longest document, up to a row's half each."""
    targets_BL, half = batch["targets"], max(1, batch["targets"].shape[1] // 2)
    inputs, rest = np.zeros((len(targets_BL), half), np.int32), np.zeros((len(targets_BL), half), np.int32)
    inputs[:, 0] = bos_id
    for row, (tokens_L, segment_L) in enumerate(zip(targets_BL, batch["segments"], strict=True)):
        document = tokens_L[segment_L == np.bincount(segment_L).argmax()]
        cut = len(document) // 2
        inputs[row, 1:cut] = document[: cut - 1] if cut else []  # behind what it begins with
        rest[row, : len(document) - max(cut - 1, 0)] = document[max(cut - 1, 0) :][:half]
    return inputs, rest
