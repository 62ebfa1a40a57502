"""torch's zip files without torch: where each tensor lies. No code of a file is run.

A file is a zip of ``NAME/data.pkl`` and an uncompressed ``NAME/data/KEY`` a storage. The pickle is read by an unpickler that
admits the few names that tensors are built of; any other is refused by its name.
"""

import collections
import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

STORAGES = {
    "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16", "DoubleStorage": "float64",
    "LongStorage": "int64", "IntStorage": "int32", "BoolStorage": "bool", "ByteStorage": "uint8", "CharStorage": "int8",
    "ShortStorage": "int16",
}  # fmt: skip
BYTES = {"float16": 2, "bfloat16": 2, "float64": 8, "int64": 8, "bool": 1, "uint8": 1, "int8": 1, "int16": 2}


class PickleError(ValueError):
    """Not torch's zip format, or a pickle that names more than tensors; one line."""


class Where(NamedTuple):
    """A tensor in a file: its place in bytes, and steps between neighbours along each axis in elements; None: row by row."""

    offset: int
    shape: tuple[int, ...]
    dtype: str
    strides: tuple[int, ...] | None


class _Storage(NamedTuple):
    dtype: str
    key: str
    count: int


class _Found(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _tensor(storage: _Storage, offset: int, shape: tuple, strides: tuple, *_: Any) -> _Found:
    return _Found(storage, offset, tuple(shape), tuple(strides))


def _parameter(data: _Found, *_: Any) -> _Found:
    return data


ADMITTED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    **{("torch", name): dtype for name, dtype in STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ADMITTED:
            raise PickleError(
                f"its pickle names {module}.{name}, which is not run; accepted are tensors alone, or safetensors"
            )
        return ADMITTED[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        if not (
            isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and pid[1] in STORAGES.values()
        ):
            raise PickleError(f"its pickle refers to {str(pid)[:60]}; accepted are storages")
        return _Storage(pid[1], str(pid[2]), int(pid[4]))


def read(file: Path) -> dict[str, Where]:
    """Where each tensor of a state lies.

    Raises:
      PickleError: as the class says, or a file that is cut short.
    """
    try:
        with zipfile.ZipFile(file) as opened:
            entries = {entry.filename: entry for entry in opened.infolist()}
            inner = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
            if len(inner) != 1:
                raise PickleError("a zip file without a data.pkl; accepted is torch's zip format")
            state = _Unpickler(io.BytesIO(opened.read(inner[0]))).load()
            root = inner[0].removesuffix("data.pkl")
            order = root + "byteorder"
            if order in entries and opened.read(order) != b"little":
                raise PickleError("its byte order is not little; accepted is little")
    except zipfile.BadZipFile as error:
        raise PickleError(
            "not a zip file, or cut short (torch's pickles of before 1.6 are not read); accepted is torch's zip format, or"
            " safetensors"
        ) from error
    except PickleError:
        raise
    except (
        OSError,
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
        KeyError,
        OverflowError,
        MemoryError,
    ) as error:
        raise PickleError(
            f"its pickle can't be read ({type(error).__name__}: {error}); accepted is a state of tensors"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(one, _Found) for one in state.values()):
        raise PickleError("its pickle is no dictionary of tensors; accepted is a model's state alone")
    with file.open("rb") as opened:
        return {str(name): _where(opened, entries, root, name, one) for name, one in state.items()}


def _where(opened: Any, entries: dict[str, zipfile.ZipInfo], root: str, name: str, found: _Found) -> Where:
    storage, entry = found.storage, entries.get(f"{root}data/{found.storage.key}")
    item = BYTES.get(storage.dtype, 4)
    if entry is None or entry.compress_type != zipfile.ZIP_STORED or entry.file_size != storage.count * item:
        size = "none" if entry is None else f"{entry.file_size:,} bytes"
        raise PickleError(
            f"tensor {name}: its storage has {size}, expected {storage.count * item:,}, uncompressed"
        )
    last = found.offset + sum(
        (size - 1) * step for size, step in zip(found.shape, found.strides, strict=True)
    )
    if min((found.offset, *found.strides)) < 0 or (all(found.shape) and last >= storage.count):
        raise PickleError(f"tensor {name}: it reaches beyond its storage of {storage.count:,} elements")
    opened.seek(entry.header_offset + 26)
    lengths = struct.unpack("<HH", opened.read(4))
    begin = entry.header_offset + 30 + sum(lengths)
    plain, step = [], 1
    for size in reversed(found.shape):
        plain.insert(0, step)
        step *= size
    strides = None if tuple(plain) == found.strides else found.strides
    return Where(begin + found.offset * item, found.shape, storage.dtype, strides)
