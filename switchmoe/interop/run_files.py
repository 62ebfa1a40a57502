"""A run's checkpoint written and read in parts: a layer's, or an expert's, at a time.

What is written is Orbax's own layout (`use_ocdbt=False`): a zarr array (version 2) a parameter, here without compression, of
which a chunk is what one layer, or one expert of a layer, has. So a chunk's file is that part as it lies in memory.
"""

import json
import math
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from switchmoe.interop.tables import Move
from switchmoe.parallel.sharding import path_keys

STATE = "state"
BLOCK = 128  # elements a side: two blocks of float32 fit a core's cache
_TYPES = {"float32": "<f4", "bfloat16": "bfloat16", "float16": "<f2", "int32": "<i4", "int8": "|i1"}


class Writer:
    """Writes the arrays of a step, each part once and whole; what an earlier process has written stays.

    Args:
      step: the step's directory.
      arrays: shapes by name, and how many first axes of each are written part by part.
      dtype: of those that are not in ``dtypes``.
      above: what comes before their names in the step's state; "": nothing.
    """

    def __init__(
        self,
        step: Path,
        arrays: Mapping[str, tuple[tuple[int, ...], int]],
        dtype: str,
        dtypes: Mapping[str, str] | None = None,
        above: str = "params",
    ):
        self._state, self._arrays, self._above = step / STATE, arrays, [above] if above else []
        self._dtypes = dict.fromkeys(arrays, dtype) | dict(dtypes or {})
        self._checksums: dict[str, tuple[int, int]] = {}
        for name, (shape, lead) in arrays.items():
            leaf = self._leaf(name)
            leaf.mkdir(parents=True, exist_ok=True)
            self._small(leaf / ".zarray", _zarray(shape, (*(1,) * lead, *shape[lead:]), self._dtypes[name]))

    def _leaf(self, name: str) -> Path:
        return self._state / ".".join((*self._above, *name.split("/")))

    def file(self, name: str, index: tuple[int, ...]) -> Path:
        shape, lead = self._arrays[name]
        places = (*index, *(0,) * (len(shape) - lead)) if shape else ()
        return self._leaf(name) / (".".join(map(str, places)) or "0")

    def write(self, name: str, index: tuple[int, ...], part: np.ndarray) -> None:
        self._write(self.file(name, index), memoryview(np.ascontiguousarray(part).reshape(-1).view(np.uint8)))

    def _small(self, path: Path, value: Any) -> None:
        self._write(path, memoryview(json.dumps(value).encode()))

    def _write(self, path: Path, raw: memoryview) -> None:
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_bytes(raw)
        temporary.replace(path)
        self._checksums[str(path.relative_to(self._state.parent))] = len(raw), zlib.crc32(raw)

    def has(self, name: str, index: tuple[int, ...]) -> bool:
        """Whether an earlier process wrote this part; notes its checksum if so."""
        path = self.file(name, index)
        shape, lead = self._arrays[name]
        if (
            not path.exists()
            or path.stat().st_size != math.prod(shape[lead:]) * np.dtype(self._dtypes[name]).itemsize
        ):
            return False
        raw = path.read_bytes()
        self._checksums[str(path.relative_to(self._state.parent))] = len(raw), zlib.crc32(raw)
        return True

    def finish(self, tree: Any = None) -> dict[str, tuple[int, int]]:
        """Writes Orbax's list of the arrays; returns size and CRC-32 of each file, for the manifest.

        Args:
          tree: the whole state, of which they are the leaves; None: a dict of dicts.
        """
        tree = (
            unflatten_dict({"/".join((*self._above, name)): 0 for name in self._arrays}, sep="/")
            if tree is None
            else tree
        )
        listed = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_empty):
            keys, empty = tuple(path_keys(path)), _is_empty(leaf)
            name = "/".join(keys[len(self._above) :])
            shape = [] if empty else list(self._arrays[name][0])
            listed[str(keys)] = {
                "key_metadata": [
                    {"key": key, "key_type": 1 if isinstance(part, jax.tree_util.SequenceKey) else 2}
                    for key, part in zip(keys, path, strict=True)
                ],
                "value_metadata": {
                    "value_type": "Dict" if isinstance(leaf, dict) else "None",
                    "skip_deserialize": True,
                }
                if empty
                else {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": shape},
            }
        metadata = {
            "tree_metadata": listed, "use_ocdbt": False, "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True, "custom_metadata": None,
        }  # fmt: skip
        self._small(self._state / "_METADATA", metadata)
        return self._checksums


def _is_empty(node: Any) -> bool:
    """What Orbax notes of a tree beside its leaves: a node with nothing below it."""
    found = jax.tree.structure(node)
    return found.num_nodes == 1 and not found.num_leaves


def size(step: Path) -> int:
    """Bytes of the values that `Writer` wrote, without what its files tell of them."""
    files = (step / STATE).glob("params.*/[0-9]*")
    return sum(path.stat().st_size for path in files)


def _zarray(shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str) -> dict[str, Any]:
    return {
        "chunks": list(chunks), "compressor": None, "dimension_separator": ".", "dtype": _TYPES[dtype], "fill_value": None,
        "filters": None, "order": "C", "shape": list(shape), "zarr_format": 2,
    }  # fmt: skip


class Reader:
    """Reads parts of a step's arrays, ``params/...`` or ``opt_state/...``, whether Orbax or `Writer` wrote them.

    Of an array that lies in larger chunks than the parts asked for (all layers, where a run saved them so: earlier versions, and
    where a layer's share is small), the chunks of a part are read once and kept until a part of others is asked for.
    """

    def __init__(self, step: Path):
        self._state = step / STATE
        self._ocdbt = (self._state / "manifest.ocdbt").exists()
        self._array: tuple[str, Any] = "", None
        self._held: tuple[tuple[str, tuple[int, ...]], Any] = ("", ()), None  # (name, first place), values

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open(name).shape)

    def _open(self, name: str) -> Any:
        import tensorstore

        path = name.replace("/", ".") + "/"
        base = {"driver": "file", "path": f"{self._state.absolute()}/"}
        store = (
            {"driver": "ocdbt", "base": base, "path": path}
            if self._ocdbt
            else base | {"path": base["path"] + path}
        )
        return tensorstore.open({"driver": "zarr", "kvstore": store}, read=True).result()

    def read(self, name: str, index: tuple[int, ...]) -> np.ndarray:
        if self._array[0] != name:
            self._array = name, self._open(name)
        array = self._array[1]
        sizes = (array.chunk_layout.read_chunk.shape or ())[: len(index)]
        if math.prod(sizes) == 1:
            return np.asarray(array[index].read().result())
        first = tuple(place - place % size for place, size in zip(index, sizes, strict=True))
        if self._held[0] != (name, first):
            self._held = ("", ()), None  # before the next is read
            pairs = zip(first, sizes, array.shape, strict=False)
            block = tuple(slice(place, min(place + size, end)) for place, size, end in pairs)
            self._held = (name, first), np.asarray(array[block].read().result())
        return self._held[1][tuple(place - begin for place, begin in zip(index, first, strict=True))]


def parts(
    moves: Iterable[Move], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[tuple[int, ...], int]]:
    """`Writer`'s ``arrays`` for these moves."""
    lead = {move.ours: len(move.index) for move in moves}
    return {name: (shape, lead[name]) for name, shape in shapes.items()}


def transposed(part: np.ndarray) -> np.ndarray:
    """The last two axes swapped, as a copy, block by block: column after column would miss the cache at each element."""
    whole = part.view(np.uint16) if part.dtype.itemsize == 2 else part
    rows, columns = whole.shape
    found = np.empty((columns, rows), whole.dtype)
    for i in range(0, rows, BLOCK):
        for j in range(0, columns, BLOCK):
            found[j : j + BLOCK, i : i + BLOCK] = whole[i : i + BLOCK, j : j + BLOCK].T
    return found.view(part.dtype)
