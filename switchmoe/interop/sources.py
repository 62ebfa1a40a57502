"""Tensors on disk, read one at a time: safetensors, torch's zip files, and T5X's zarr leaves.

A `Source` has the shapes and types of all tensors before any is read, so that a wrong file is refused first.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401, numpy's bfloat16
import numpy as np

from switchmoe.interop import torch_files

DTYPES = ("float32", "bfloat16", "float16")
_SAFETENSORS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
LARGEST_HEADER = 100_000_000  # bytes: the library's own limit


class SourceError(ValueError):
    """A file that can't be read as what it should be; one line."""


class Tensor(NamedTuple):
    shape: tuple[int, ...]
    dtype: str
    read: Callable[
        [tuple[int, ...], slice], np.ndarray
    ]  # (the first axes' places, rows of the next one) -> that part


class Source(NamedTuple):
    """``files``: what it is made of, by which an interrupted conversion knows it again."""

    tensors: Mapping[str, Tensor]
    files: tuple[Path, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}


def hugging_face(directory: Path) -> Source:
    """The tensors of a Hugging Face directory: safetensors, or torch's zip files, whole or with an index.

    Raises:
      SourceError: none, an index that names a file that is not there, a file cut short, a foreign type or tensor.
    """
    for stem, suffix, read in (("model", "safetensors", safetensors), ("pytorch_model", "bin", torch_zip)):
        index, single = directory / f"{stem}.{suffix}.index.json", directory / f"{stem}.{suffix}"
        if index.exists():
            return _sharded(index, read)
        if single.exists():
            return Source(_checked(single, read(single)), (single,))
    raise SourceError(
        f"{directory}: no weights; accepted are model.safetensors, pytorch_model.bin, or either with its .index.json"
    )


def _sharded(index: Path, read: Callable[[Path], dict[str, Tensor]]) -> Source:
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({str(file) for file in named.values()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise SourceError(
            f"{index}: not an index ({error}); accepted is an object with weight_map"
        ) from error
    if not files:
        raise SourceError(f"{index}: it names no tensors; accepted is an object with weight_map")
    missing = [file for file in files if not (index.parent / file).is_file()]
    if missing:
        first = next(name for name, file in named.items() if str(file) == missing[0])
        raise SourceError(
            f"tensor {first}: not found, expected in {missing[0]}, which {index} names and is not there; accepted is a directory with"
            " all its shards"
        )
    found: dict[str, Tensor] = {}
    for file in files:
        inside = _checked(index.parent / file, read(index.parent / file))
        for name in inside:
            if named.get(name) != file:
                raise SourceError(
                    f"tensor {name}: found in {file}, expected in {named.get(name, 'no shard')} by {index.name}"
                )
        found |= inside
    lost = sorted(named.keys() - found.keys())
    if lost:
        raise SourceError(f"tensor {lost[0]}: not found in {named[lost[0]]}, where {index.name} has it")
    return Source(found, (index, *(index.parent / file for file in files)))


def _checked(file: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise SourceError(
                f"tensor {name}: found with dtype {tensor.dtype} in {file.name}, expected one of {', '.join(DTYPES)}"
            )
    return tensors


def safetensors(file: Path) -> dict[str, Tensor]:
    """Raises SourceError: not a whole file of its kind."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= min(size - 8, LARGEST_HEADER):
                raise SourceError(
                    f"{file}: not a safetensors file, or cut short ({size:,} bytes, of which the header's are {length:,})"
                )
            header = json.loads(opened.read(length))
        ends = [_end(entry) for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
        if size != expected:
            beyond = (
                name for name in header if name != "__metadata__" and _end(header[name]) > size - 8 - length
            )
            what = f"tensor {next(beyond)}: found cut short in {file}" if size < expected else str(file)
            raise SourceError(f"{what}: it has {size:,} bytes, expected {expected:,} by its header")
        return {
            name: _safetensor(file, name, entry, 8 + length)
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"{file}: not a safetensors file, or cut short ({error})") from error


def _end(entry: Mapping[str, Any]) -> Any:
    return entry["data_offsets"][1]


def _safetensor(file: Path, name: str, entry: Mapping[str, Any], start: int) -> Tensor:
    shape, dtype = tuple(entry["shape"]), _SAFETENSORS.get(entry["dtype"], entry["dtype"])
    begin, end = entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise SourceError(
            f"tensor {name}: found shape {shape} at {begin} to {end} in {file.name}, expected integers >= 0"
        )
    if dtype in DTYPES and end - begin != int(np.prod(shape)) * np.dtype(dtype).itemsize:
        raise SourceError(
            f"tensor {name}: found {end - begin:,} bytes in {file.name}, expected those of {shape} {dtype}"
        )
    return Tensor(shape, dtype, _raw(file, start + begin, shape, dtype))


def torch_zip(file: Path) -> dict[str, Tensor]:
    """Raises SourceError: not torch's zip format, or a pickle that names anything but tensors."""
    try:
        found = torch_files.read(file)
    except torch_files.PickleError as error:
        raise SourceError(f"{file}: {error}") from error
    return {
        name: Tensor(
            where.shape, where.dtype, _raw(file, where.offset, where.shape, where.dtype, where.strides)
        )
        for name, where in found.items()
    }


def _raw(
    file: Path, offset: int, shape: tuple[int, ...], dtype: str, strides: tuple[int, ...] | None = None
) -> Callable[[tuple[int, ...], slice], np.ndarray]:
    """Reads parts of an array that lies in a file as it is; ``strides`` in elements, None: row by row."""

    def read(lead: tuple[int, ...], rows: slice) -> np.ndarray:
        item = np.dtype(dtype).itemsize
        if strides is not None:
            flat = np.memmap(file, np.uint8, "r", offset, (_extent(shape, strides) * item,)).view(dtype)
            steps = tuple(step * item for step in strides)
            return np.array(np.lib.stride_tricks.as_strided(flat, shape, steps, writeable=False)[lead][rows])
        inner = shape[len(lead) :]
        place = int(np.ravel_multi_index(lead, shape[: len(lead)])) if lead else 0
        start, stop, _ = rows.indices(inner[0]) if inner else (0, 1, 1)
        row = int(np.prod(inner[1:]))
        count = (stop - start) * row
        first = place * int(np.prod(inner)) + start * row
        # Read, not mapped: what was read of a mapping counts as this program's memory until the system takes it back.
        found = np.fromfile(file, np.dtype(dtype), count, offset=offset + first * item)
        if found.size != count:
            raise SourceError(f"{file}: cut short")
        return found.reshape((stop - start, *inner[1:]) if inner else ())

    return read


def _extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True)) if all(shape) else 0


def t5x(directory: Path) -> Source:
    """The parameters of a T5X checkpoint: a directory with an index, ``checkpoint``, and a zarr array a leaf.

    Raises:
      SourceError: no leaves, or one that can't be read.
    """
    leaves = sorted(path.parent for path in directory.glob("target.*/.zarray"))
    if not leaves:
        raise SourceError(f"{directory}: no T5X parameters; accepted is a directory with target.*/.zarray")
    found = {leaf.name: zarr(leaf) for leaf in leaves}
    return Source(
        _checked(directory, found), tuple(file for leaf in leaves for file in sorted(leaf.iterdir()))
    )


def zarr(leaf: Path) -> Tensor:
    """Raises SourceError: not an array that can be read."""
    import tensorstore

    try:
        store = tensorstore.open(
            {
                "driver": "zarr",
                "kvstore": {"driver": "file", "path": f"{leaf}/"},
                "fill_missing_data_reads": False,  # a chunk that is not there is no chunk of zeros
            },
            read=True,
        ).result()
    except ValueError as error:
        line = str(error).splitlines()[0]
        raise SourceError(
            f"tensor {leaf.name}: its array can't be read ({line}); expected zarr, version 2"
        ) from error

    def read(lead: tuple[int, ...], rows: slice) -> np.ndarray:
        part = store[(*lead, ...)] if lead else store
        try:
            found = (part[rows] if rows != slice(None) else part).read().result()
        except ValueError as error:
            raise SourceError(
                f"tensor {leaf.name}: a part can't be read ({str(error).splitlines()[0]})"
            ) from error
        return np.asarray(found)

    return Tensor(tuple(store.shape), store.dtype.name, read)


def same(one: Tensor, other: Tensor, rows: int = 4096) -> bool:
    """Whether two tensors of one shape hold the same values; read in parts."""
    count = one.shape[0]
    parts: Iterable[slice] = (slice(i, min(i + rows, count)) for i in range(0, count, rows))
    return all(np.array_equal(one.read((), part), other.read((), part)) for part in parts)
