"""Experts in files: a directory with one file a sparse layer, an expert a record, and ``index.json``, which is written last.

A file begins with whole pages that hold JSON (`layout.Layer`, and where records begin), padded with blanks. A record is whole
pages as well. The index has the checksum (XXH3, 64 bits) of each file's head and of each record, by which what is read is
checked: what is damaged is named, and not used. Without its index a store is unfinished.

Read in one of three ways (`WAYS`): ``direct``, past the page cache into the buffer (O_DIRECT; ``pread`` where the file system
has none), ``pread``, and ``mmap``, copied out of a map of the file.
"""

import dataclasses
import json
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from switchmoe.inference.offload import WAYS
from switchmoe.inference.offload.layout import FORMS, PAGE, Layer, rounded

INDEX = "index.json"
FORMAT = "switchmoe experts 1"


class StoreError(OSError):
    """A store that can't be read or written; one line that names the file, and the layer and the expert if it is one's."""


class Writer:
    """Writes a store's files; each part of each expert once, in any order. What an earlier process has written stays.

    Raises:
      OSError: here, before anything is computed, if the disk has no room for all of it.
    """

    def __init__(self, directory: Path, layers: Sequence[Layer]):
        self._directory, self.layers = directory, layers
        self._heads = [_head(layer) for layer in layers]
        self._files: list[int] = []
        created = []
        for layer, (raw, places) in zip(layers, self._heads, strict=True):
            path = directory / file_name(layer)
            created += [] if path.exists() else [path]
            try:
                self._files.append(os.open(path, os.O_RDWR | os.O_CREAT, 0o644))
                os.posix_fallocate(self._files[-1], 0, places[-1])
                os.pwrite(self._files[-1], raw, 0)
            except OSError as error:
                self.close()
                for made in created:  # a disk is not left full
                    made.unlink(missing_ok=True)
                size = sizes(layers)
                raise StoreError(
                    f"{path} can't be written: {error.strerror}; the experts take {size:,} bytes"
                ) from error

    def write(self, layer: int, expert: int, parts: Mapping[str, np.ndarray]) -> None:
        record, (_, places) = self.layers[layer].record(expert), self._heads[layer]
        for name, value in parts.items():
            part = record.part(name)
            raw = memoryview(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
            if len(raw) != part.size or value.shape != part.shape:
                raise ValueError(f"{name} of shape {value.shape}: accepted is {part.shape}, {part.dtype}")
            done = 0
            while done < len(raw):
                done += os.pwrite(self._files[layer], raw[done:], places[expert] + part.offset + done)

    def sync(self) -> None:
        """What was written so far survives a power cut."""
        for file in self._files:
            os.fsync(file)

    def finish(self, of: Mapping[str, Any]) -> None:
        """Writes the index. ``of``: by which the model is known again."""
        self.sync()
        listed = []
        for layer, (raw, places), file in zip(self.layers, self._heads, self._files, strict=True):
            sums = [
                _checksum(os.pread(file, end - start, start))
                for start, end in zip(places, places[1:], strict=False)
            ]
            listed.append(
                {"file": file_name(layer), "head": len(raw), "head_sum": _checksum(raw), "sums": sums}
            )
        path = self._directory / INDEX
        temporary = path.with_name(f"{INDEX}.tmp")
        temporary.write_text(json.dumps({"format": FORMAT, "of": of, "layers": listed}, indent=1))
        temporary.replace(path)
        self.close()

    def close(self) -> None:
        for file in self._files:
            os.close(file)
        self._files = []


class Store:
    """A finished store, open for reading by several threads.

    Raises:
      StoreError: it is unfinished, damaged as far as that can be seen without reading records, or can't be read.
    """

    def __init__(self, directory: Path, way: str = "direct"):
        if way not in WAYS:
            raise ValueError(f"way {way}: accepted is one of {', '.join(WAYS)}")
        self.directory, self._way = directory, way
        path = directory / INDEX
        try:
            index = json.loads(path.read_bytes())
            if index["format"] != FORMAT:
                raise ValueError(f"its format is {index['format']}, not {FORMAT}")
            self.of, entries = index["of"], index["layers"]
            self._sums = [[int(value) for value in entry["sums"]] for entry in entries]
            self._paths = [directory / entry["file"] for entry in entries]
            heads = [(int(entry["head"]), int(entry["head_sum"])) for entry in entries]
            if not isinstance(self.of, dict):
                raise ValueError("what its experts are of is no object")
        except FileNotFoundError as error:
            raise StoreError(
                f"{path} is not there: the experts' files are unfinished, or moved away"
            ) from error
        except OSError as error:
            raise _told(path, error) from error
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path} is damaged: {_line(error)}") from error
        self._files: list[int] = []
        self._maps: list[mmap.mmap] = []
        self.layers: list[Layer] = []
        self._places: list[list[int]] = []
        for file, head in zip(self._paths, heads, strict=True):
            self._open(file, *head)

    def _open(self, path: Path, size: int, checksum: int) -> None:
        try:
            head = os.open(path, os.O_RDONLY)
            try:
                raw, there = os.pread(head, size, 0), os.fstat(head).st_size
            finally:
                os.close(head)
            if _checksum(raw) != checksum:
                raise StoreError(f"{path} is damaged: its head is not what was written")
            layer = _layer(json.loads(raw))
            places = _head(layer)[1]
            if there != places[-1]:
                raise StoreError(f"{path} is damaged: it has {there:,} bytes instead of {places[-1]:,}")
            sums = self._sums[len(self.layers)]
            if len(sums) != len(layer.forms):
                index = self.directory / INDEX
                raise StoreError(
                    f"{index} is damaged: it has {len(sums)} checksums of {layer.name}'s {len(layer.forms)} experts"
                )
            self._files.append(_opened(path, self._way == "direct"))
            if self._way == "mmap":
                self._maps.append(mmap.mmap(self._files[-1], there, prot=mmap.PROT_READ))
        except StoreError:
            raise
        except OSError as error:
            raise _told(path, error) from error
        self.layers.append(layer)
        self._places.append(places)

    def path(self, layer: int) -> Path:
        return self._paths[layer]

    def place(self, layer: int, expert: int) -> tuple[int, int]:
        """(where its record begins in the file, its bytes)."""
        start, end = self._places[layer][expert : expert + 2]
        return start, end - start

    def read(self, layer: int, expert: int, buffer: memoryview) -> None:
        """Fills the buffer with a record, whose bytes it has; page-aligned.

        Raises:
          StoreError: it can't be read, or is not what was written.
        """
        start, size = self.place(layer, expert)
        what = f"expert {expert} of {self.layers[layer].name} in {self._paths[layer]}"
        try:
            done = self._fill(layer, start, buffer[:size])
        except OSError as error:
            raise StoreError(f"{what} can't be read: {error.strerror or error}") from error
        if done < size:
            raise StoreError(f"{what} is damaged: the file ends after {done:,} of its {size:,} bytes")
        if _checksum(buffer[:size]) != self._sums[layer][expert]:
            raise StoreError(f"{what} is damaged: it is not what was written (its checksum)")

    def _fill(self, layer: int, start: int, buffer: memoryview) -> int:
        """Returns how many bytes there were."""
        file, done = self._files[layer], 0
        if self._way == "mmap":
            done = max(0, min(len(buffer), os.fstat(file).st_size - start))  # beyond it is a bus error
            buffer[:done] = memoryview(self._maps[layer])[start : start + done]
            return done
        while done < len(buffer):
            count = os.preadv(file, [buffer[done:]], start + done)
            done += count
            if not count or done % PAGE and self._way == "direct":  # the end: what is left is no page
                break
        return done

    def close(self) -> None:
        for file in self._files:
            os.close(file)
        self._files = []


def begun(directory: Path, layers: Iterable[Layer]) -> bool:
    """Whether an earlier `Writer` has made all files of such a store, and none is gone, cut or another's since."""
    for layer in layers:
        path, (raw, places) = directory / file_name(layer), _head(layer)
        if not path.is_file() or path.stat().st_size != places[-1]:
            return False
        with path.open("rb") as file:
            if file.read(len(raw)) != raw:
                return False
    return True


def file_name(layer: Layer) -> str:
    return f"{layer.name.replace('/', '.')}.experts"


def sizes(layers: Iterable[Layer]) -> int:
    """Bytes of the files."""
    return sum(_head(layer)[1][-1] for layer in layers)


def _head(layer: Layer) -> tuple[bytes, list[int]]:
    """(a file's first pages, where each record begins and the last one ends)."""
    told = dataclasses.asdict(layer) | {"format": FORMAT}
    told |= {
        "parts": {form: [part._asdict() for part in record.parts] for form, record in layer.records.items()}
    }
    raw = json.dumps(told).encode()
    raw = raw.ljust(rounded(len(raw), PAGE))
    places = [len(raw)]
    for expert in range(len(layer.forms)):
        places.append(places[-1] + layer.record(expert).size)
    return raw, places


def _layer(told: dict[str, Any]) -> Layer:
    return Layer(
        told["name"],
        tuple((name, tuple(shape)) for name, shape in told["kernels"]),
        tuple(form for form in told["forms"] if form in FORMS),
        tuple((form, group) for form, group in told["groups"]),
        told["turned"],
    )


def _opened(path: Path, direct: bool) -> int:
    if direct:
        try:
            return os.open(path, os.O_RDONLY | os.O_DIRECT)
        except OSError:  # a file system without it
            pass
    return os.open(path, os.O_RDONLY)


def _checksum(raw: bytes | memoryview) -> int:
    return xxhash.xxh3_64_intdigest(raw)


def _told(path: Path, error: OSError) -> StoreError:
    return StoreError(f"{path}: {error.strerror or error}")


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
