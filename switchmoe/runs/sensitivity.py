"""What a trained model loses where experts have fewer bits: of each expert alone, and of any choice for all of them.

Kernels are rounded to what integers can say and stay floats, so the loss is that of the same integers in use. What was
measured is kept in a file, a line each; a command that was killed goes on behind its last whole line.

Letters: L layers, E experts, D rows, F columns.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from switchmoe.inference.offload.widths import WIDTHS
from switchmoe.parallel import sharding
from switchmoe.quantised import dequantised, quantise
from switchmoe.runs import slimming, trained
from switchmoe.runs.judges import HeldOut
from switchmoe.runs.measuring import Yardstick
from switchmoe.training import objective

Batches = Sequence[Any]


class Kept:
    """Numbers by name, in a file.

    Args:
      asked: what they are of.

    Raises:
      ValueError: the file's are of something else.
    """

    def __init__(self, path: Path, asked: dict[str, Any]):
        self._path, self._known = path, {}
        asked = json.loads(json.dumps(asked))
        whole, _, cut = path.read_text(encoding="utf-8").rpartition("\n") if path.exists() else ("", "", "")
        if whole:
            first, *lines = whole.splitlines()
            if json.loads(first) != asked:
                raise ValueError(
                    f"--target={path.parent}: {path.name} there is of another model, text or number of batches; accepted is a name"
                    " that is free, or the same one's"
                )
            self._known = {name: value for line in lines for name, value in json.loads(line).items()}
        if cut:
            path.write_text(whole + "\n" if whole else "", encoding="utf-8")
        if not whole:
            self._append(asked)

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def __getitem__(self, name: str) -> float:
        return self._known[name]

    def __setitem__(self, name: str, value: float) -> None:
        self._known[name] = value
        self._append({name: value})

    def _append(self, value: Any) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(value) + "\n")


class Rounded:
    """A model whose experts are rounded: losses on batches.

    Attributes:
      layers: their names, as `sparse_layer_names` has them.
      kernels: of each layer, (rows, columns) of each of an expert's kernels.
      groups: of each layer, rows that share scales, by bits.

    Raises:
      ValueError: a model that is dense, or integers already, or whose kernels can't have 2 bits; one line.
    """

    def __init__(self, model: trained.Source, ruler: Yardstick):
        slimming.settings_of(model.settings, slimming.Slimming(bits=8), 1)
        self.experts, self._ruler = model.settings.moe.total_experts, ruler
        self._settings = ruler.like(ruler.settings, model.settings)
        with jax.set_mesh(ruler.mesh), sharding.rules(self._settings):
            self._flat = flatten_dict(trained.parameters(model, self._settings, ruler.mesh), sep="/")
        found = slimming.kernels(model.settings)
        self.layers, self._places = list(found), list(found.values())
        self.kernels = [
            [self._rows(self._flat[name][index]) for name, index in places.values()]
            for places in self._places
        ]
        self.groups = [
            {bits: slimming.group_rows(bits, [rows for rows, _ in kernels]) for bits in WIDTHS}
            for kernels in self.kernels
        ]
        odd = [rows for kernels in self.kernels for rows, _ in kernels if rows % 4]
        if odd:
            raise ValueError(
                f"--source: its experts have kernels of {odd[0]} rows; accepted are multiples of 4, as four of 2 bits share a byte"
            )
        self._judges: dict[int, HeldOut] = {}

    def loss(self, batches: Batches, bits: dict[int, np.ndarray]) -> float:
        """Cross-entropy, nats a token.

        Args:
          bits: of the layers that are rounded, by number: [E] bits of each expert, 0: as it is.
        """
        flat = dict(self._flat)
        for layer, bits_E in bits.items():
            for name, index in self._places[layer].values():
                flat[name] = self._rounded(flat[name], index, bits_E, self.groups[layer])
        with jax.set_mesh(self._ruler.mesh), sharding.rules(self._settings):
            params = unflatten_dict(flat, sep="/")
            return float(self._judge(batches, params).figures(params)["cross_entropy"])

    def _judge(self, batches: Batches, params: Any) -> HeldOut:
        if id(batches) not in self._judges:
            like = next(iter(self._judges.values()), None)
            made = HeldOut(
                "validation", batches, objective.CROSS_ENTROPY, self._settings, self._ruler.mesh, like
            )
            made.compile(params)
            self._judges[id(batches)] = made
        return self._judges[id(batches)]

    def _rounded(
        self, leaf: jax.Array, index: tuple[int, ...], bits_E: np.ndarray, groups: dict[int, int]
    ) -> jax.Array:
        kernel = np.array(leaf[index])
        for bits in sorted(set(bits_E.tolist()) - {0}):
            some = bits_E == bits
            rows, columns = self._rows(kernel)
            codes, scale = quantise(kernel[some].reshape(-1, rows, columns), bits, groups[bits])
            made = np.asarray(dequantised(jnp.asarray(codes), jnp.asarray(scale), bits))
            kernel[some] = made.reshape(kernel[some].shape).astype(kernel.dtype)
        return jax.device_put(leaf.at[index].set(kernel), leaf.sharding)

    @staticmethod
    def _rows(kernel_ED: jax.Array | np.ndarray) -> tuple[int, int]:
        """(rows, columns) of an expert's kernel, whatever its columns' shape."""
        rows = kernel_ED.shape[1]
        return rows, int(np.prod(kernel_ED.shape[2:]))
