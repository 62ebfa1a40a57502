"""safetensors files written tensor by tensor, in any order: the library's own writer needs all of a file in memory."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class Writer:
    """The tensors of a directory, in shards of at most ``limit`` bytes (or one tensor), with an index if there are several.

    Args:
      shapes: of all tensors, in the order in which the files have them.
    """

    def __init__(self, directory: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, limit: int):
        self._item = np.dtype(dtype).itemsize
        self._shapes, self._places = shapes, {}
        groups: list[list[str]] = []
        size = limit
        for name, shape in shapes.items():
            own = math.prod(shape) * self._item
            if size + own > limit:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += own
        self.total = sum(math.prod(shape) for shape in shapes.values()) * self._item
        several = len(groups) > 1
        index = {}
        for number, group in enumerate(groups, 1):
            file = f"model-{number:05}-of-{len(groups):05}.safetensors" if several else "model.safetensors"
            self._start(directory / file, group, dtype)
            index |= dict.fromkeys(group, file)
        if several:
            text = json.dumps({"metadata": {"total_size": self.total}, "weight_map": index}, indent=2)
            (directory / "model.safetensors.index.json").write_text(text + "\n")

    def _start(self, path: Path, names: list[str], dtype: str) -> None:
        """Writes the header; the tensors' places are then known."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            begin, end = end, end + math.prod(self._shapes[name]) * self._item
            header[name] = {
                "dtype": _NAMES[dtype],
                "shape": list(self._shapes[name]),
                "data_offsets": [begin, end],
            }
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        if not path.exists():  # else an earlier process began it, and wrote some of the tensors
            temporary = path.with_suffix(".tmp")
            with temporary.open("wb") as file:
                file.write(len(raw).to_bytes(8, "little") + raw)
                file.truncate(8 + len(raw) + end)
            temporary.replace(path)
        for name in names:
            self._places[name] = path, 8 + len(raw) + header[name]["data_offsets"][0]

    def write(self, name: str, part: np.ndarray, first: int = 0) -> None:
        """A part of a tensor, row by row, from its element ``first`` on."""
        path, place = self._places[name]
        with path.open("r+b") as file:
            file.seek(place + first * self._item)
            file.write(memoryview(np.ascontiguousarray(part).reshape(-1).view(np.uint8)))
