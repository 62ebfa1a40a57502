"""torch's zip files without torch: where each tensor lies. No code of a file is run.

A file is a zip of ``NAME/data.pkl`` and an uncompressed ``NAME/data/KEY`` a storage. The pickle is read by an unpickler that
admits the few names that tensors are built of; any other is refused by its name.
"""

import collections
import io
import pickle
import pickletools
import reprlib
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

STORAGES = {
    "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16", "DoubleStorage": "float64",
    "LongStorage": "int64", "IntStorage": "int32", "BoolStorage": "bool", "ByteStorage": "uint8", "CharStorage": "int8",
    "ShortStorage": "int16",
}  # fmt: skip
BYTES = {"float16": 2, "bfloat16": 2, "float64": 8, "int64": 8, "bool": 1, "uint8": 1, "int8": 1, "int16": 2}
LARGEST = 64_000_000  # bytes of a pickle: half a million tensors
ENCRYPTED = 1  # of an entry's flags
UNREADABLE = (
    OSError, pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError, OverflowError, MemoryError,
    RuntimeError, zlib.error, struct.error,
)  # fmt: skip


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


class _Tensor:
    """Without attributes, as `_Parameter`: a pickle can set those of what it is given."""

    __slots__ = ()

    def __call__(self, storage: _Storage, offset: int, shape: tuple, strides: tuple, *_: Any) -> _Found:
        numbers = (offset, *shape, *strides)
        good = isinstance(storage, _Storage) and len(shape) == len(strides)
        if not good or not all(type(number) is int and number >= 0 for number in numbers):
            raise PickleError(
                "a tensor is built of other things than a storage and sizes; accepted are tensors"
            )
        return _Found(storage, offset, tuple(shape), tuple(strides))


class _Parameter:
    __slots__ = ()

    def __call__(self, data: _Found, *_: Any) -> _Found:
        return data


ADMITTED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor(),
    ("torch._utils", "_rebuild_parameter"): _Parameter(),
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
        kinds = tuple(map(type, pid)) if isinstance(pid, tuple) else ()
        if kinds != (str, str, str, str, int) or pid[0] != "storage" or pid[1] not in STORAGES.values():
            raise PickleError(f"its pickle refers to {reprlib.repr(pid)}; accepted are storages")
        return _Storage(pid[1], pid[2], pid[4])


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
            state = _state(_plain(opened, entries[inner[0]]))
            root = inner[0].removesuffix("data.pkl")
            order = root + "byteorder"
            if order in entries and _plain(opened, entries[order]) != b"little":
                raise PickleError("its byte order is not little; accepted is little")
        if not isinstance(state, dict) or not all(
            isinstance(name, str) and isinstance(one, _Found) for name, one in state.items()
        ):
            raise PickleError("its pickle is no dictionary of tensors; accepted is a model's state alone")
        with file.open("rb") as opened:
            return {name: _where(opened, entries, root, name, one) for name, one in state.items()}
    except zipfile.BadZipFile as error:
        raise PickleError(
            "not a zip file, or cut short (torch's pickles of before 1.6 are not read); accepted is torch's zip format, or"
            " safetensors"
        ) from error
    except PickleError:
        raise
    except UNREADABLE as error:
        raise PickleError(
            f"its pickle can't be read ({type(error).__name__}: {error}); accepted is a state of tensors"
        ) from error


def _plain(opened: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """A small entry's bytes. They are no more than the file has: nothing is unpacked."""
    if not _is_stored(entry) or entry.file_size > LARGEST:
        raise PickleError(
            f"{entry.filename} has {entry.file_size:,} bytes, expected {LARGEST:,} at most, uncompressed and not encrypted"
        )
    return opened.read(entry)


def _is_stored(entry: zipfile.ZipInfo) -> bool:
    return entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & ENCRYPTED


def _state(raw: bytes) -> Any:
    for opcode, number, _ in pickletools.genops(raw):
        # The unpickler's list of what it has made grows to the largest number that it is told.
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and number > len(raw):
            raise PickleError(
                f"its pickle numbers an object {number:,}, more than it has; accepted are tensors"
            )
    return _Unpickler(io.BytesIO(raw)).load()


def _where(opened: Any, entries: dict[str, zipfile.ZipInfo], root: str, name: str, found: _Found) -> Where:
    storage, entry = found.storage, entries.get(f"{root}data/{found.storage.key}")
    item = BYTES.get(storage.dtype, 4)
    if entry is None or not _is_stored(entry) or entry.file_size != storage.count * item:
        size = "none" if entry is None else f"{entry.file_size:,} bytes"
        raise PickleError(
            f"tensor {name}: its storage has {size}, expected {storage.count * item:,}, uncompressed and not encrypted"
        )
    last = found.offset + sum(
        (size - 1) * step for size, step in zip(found.shape, found.strides, strict=True)
    )
    if all(found.shape) and last >= storage.count:
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
