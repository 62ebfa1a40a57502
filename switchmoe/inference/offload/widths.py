"""How many bits each expert's weights have: the order in which experts are narrowed, and the file that says what was chosen.

EdgeMoE (Yi et al. 2023, 2308.14352) lowers the experts that lose the least at 2 bits, one after the other, until the loss has risen by what a
user allows (2 %). Here an expert goes down in two moves, 8 to 4 and 4 to 2 bits, and a move's place in the order is by the loss that
it costs for each byte that it saves, as measured of this expert alone. How far to go in that order is measured of them together.

Letters: L layers, E experts, W widths (in the order of `WIDTHS`).
"""

import heapq
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from switchmoe import quantised

WIDTHS = (8, 4, 2)
WIDTHS_FILE = "widths.json"


def size(kernels: Sequence[tuple[int, int]], bits: int, group: int) -> int:
    """Bytes of an expert's codes and scales.

    Args:
      kernels: (rows, columns) of each.
      group: rows that share scales, 0: all.
    """
    found = 0
    for rows, columns in kernels:
        codes, scales = quantised.shapes((1, rows, columns), bits, group)
        found += int(np.prod(codes) + 4 * np.prod(scales))
    return found


def moves(loss_LEW: np.ndarray, bytes_LW: np.ndarray) -> list[tuple[int, int]]:
    """(layer, expert) in the order in which they are narrowed, each twice: to 4 bits, then to 2.

    The next is always the move of the smallest rise of the loss a byte, of equals that of the first layer and expert.
    What falls counts as no rise: a loss that is lower by chance is no reason.

    Args:
      loss_LEW: with this expert alone at each of `WIDTHS`.
      bytes_LW: of an expert of each layer.
    """
    layers, experts, widths = loss_LEW.shape
    rise_LEW = np.maximum(np.diff(loss_LEW, axis=2), 0) / -np.diff(bytes_LW, axis=1)[:, None]
    waiting = [
        (rise_LEW[layer, expert, 0], layer, expert, 0) for layer in range(layers) for expert in range(experts)
    ]
    heapq.heapify(waiting)
    found = []
    while waiting:
        _, layer, expert, step = heapq.heappop(waiting)
        found.append((layer, expert))
        if step + 2 < widths:
            heapq.heappush(waiting, (rise_LEW[layer, expert, step + 1], layer, expert, step + 1))
    return found


def after(order: Sequence[tuple[int, int]], count: int, shape: tuple[int, int]) -> np.ndarray:
    """[L, E] Bits after so many moves."""
    place_LE = np.zeros(shape, int)
    for layer, expert in order[:count]:
        place_LE[layer, expert] += 1
    return np.array(WIDTHS)[place_LE]


def save(path: str | os.PathLike, bits: Mapping[str, Sequence[int]]) -> None:
    """``{"bits": {layer: [bits of each expert]}}``, by the layers' names; at once, or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}")
    lines = [f"  {json.dumps(name)}: {json.dumps([int(one) for one in of])}" for name, of in bits.items()]
    temporary.write_text('{"bits": {\n' + ",\n".join(lines) + "\n}}\n", encoding="utf-8")
    os.replace(temporary, path)
