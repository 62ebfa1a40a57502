"""Local text of any size: read once, kept as shards of documents that are read by their number.

A corpus that is small stays in memory. A larger one goes into array_record files in the cache, under a name made of
what the files hold and of the settings that say what a document is, so that it is read again only when one of these
changes. Memory is some 40 bytes a held-out document while it is made, 8 once it is there, and one shard's buffers.
"""

import array
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from switchmoe.data import local_files
from switchmoe.data.errors import DataError
from switchmoe.data.progress import Note, told
from switchmoe.settings import DataSettings

IN_MEMORY = (
    32_000_000  # letters of text, or of packed files a quarter of it, up to which a corpus stays in memory
)
SHARD = 256_000_000  # letters of text after which a shard is closed, and what is there so far outlasts a kill
SPLITS = ("train", "validation")
DONE, JOURNAL = "done.json", "journal.json"


@dataclasses.dataclass(frozen=True)
class Split:
    """Documents of one split: those to train on in the files' order, held-out ones in the order of their hashes.

    ``files`` has the numbers of each file's own documents, where `data.parts` asks for them.
    """

    records: Sequence[Any] = dataclasses.field(repr=False)
    fingerprint: str
    files: Sequence[Sequence[int]] = ()


def splits(settings: DataSettings, cache: str, note: Note = lambda _: None) -> dict[str, Split]:
    """Both splits of the local files that `data.source` names.

    Validation documents come in the order of their `local_files.fraction`, so that the first few are a fair sample of
    all files. Which way the text is kept changes neither the documents nor the fingerprint.

    Raises:
      DataError: a file that can't be read, no text, a cache that can't be written.
    """
    paths = local_files.paths(settings.source)
    reading = local_files.Reading(paths)
    packed = any(path.lower().endswith((".parquet", *local_files.PACKINGS[1:])) for path in paths)
    if reading.total <= (IN_MEMORY // 4 if packed else IN_MEMORY):
        found = _in_memory(reading, settings)
        if found:
            return found
    return _Preparation(paths, settings, pathlib.Path(cache), note).splits()


def _in_memory(reading: local_files.Reading, settings: DataSettings) -> dict[str, Split] | None:
    """None where it is too much."""
    train, held_out, size = [], [], 0
    for number, text, place in reading.documents(settings):
        size += len(text)
        if size > IN_MEMORY:
            return None
        if place < settings.validation_share:
            held_out.append((local_files.fraction(text), text, number))
        else:
            train.append((text, number))
    held_out.sort()
    if not (train or held_out):
        raise no_text(settings, len(reading.paths))
    found = {"train": train, "validation": [(text, number) for _, text, number in held_out]}
    return {name: _split(pairs, len(reading.paths)) for name, pairs in found.items()}


def _split(pairs: Sequence[tuple[str, int]], files: int) -> Split:
    texts = [text for text, _ in pairs]
    file_N = np.array([number for _, number in pairs], int)
    return Split(texts, fingerprint(texts), [np.flatnonzero(file_N == file) for file in range(files)])


def _of_files(counts: Sequence[int], order_N: np.ndarray | None) -> list[Sequence[int]]:
    """The numbers of each file's documents, of which there are so many, in the files' order or in another."""
    ends = np.cumsum(counts).tolist()
    if order_N is None:
        return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]
    file_N = np.searchsorted(ends, order_N, "right")
    return [np.flatnonzero(file_N == file) for file in range(len(ends))]


def fingerprint(texts: Sequence[str]) -> str:
    """A SHA-256 that changes when any text, their number or their order does."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(_digest(text))
    return digest.hexdigest()


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def no_text(settings: DataSettings, files: int) -> DataError:
    return DataError(
        f"data.source={settings.source}: no text in {files} file(s); accepted are files with some"
    )


def order(places_N: np.ndarray, share: float) -> dict[str, np.ndarray]:
    """Numbers of the documents of each split, from their fractions: in their own order, held-out ones in that of these."""
    held_out = np.flatnonzero(places_N < share)
    return {
        "train": np.flatnonzero(places_N >= share),
        "validation": held_out[np.argsort(places_N[held_out], kind="stable")],
    }


class Reordered(Sequence):
    """Records in another order, or some of them."""

    def __init__(self, records: Sequence[Any], order: np.ndarray):
        self._records, self._order = records, order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Any:
        return self._records[int(self._order[index])]


class _Preparation:
    """Makes the shards of a corpus, or finds them."""

    def __init__(self, paths: list[str], settings: DataSettings, cache: pathlib.Path, note: Note):
        self.paths, self.settings, self.note = paths, settings, note
        self.root = cache / "prepared"

    def splits(self) -> dict[str, Split]:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            directory = self.root / self._key()
            if not self._done(directory):
                directory.mkdir(exist_ok=True)
                with self._alone(directory):
                    if not self._done(directory):
                        self._make(directory)
            return self._open(directory)
        except (OSError, RuntimeError) as error:  # array_record's own errors are the latter
            raise DataError(
                f"data.data_dir={self.root.parent}: text of {self._size()} cannot be prepared there ({error}); accepted is a"
                " directory that can be written, with as much room as the text takes unpacked"
            ) from error

    def _done(self, directory: pathlib.Path) -> bool:
        """Not that of an earlier version, which does not tell how many documents a file has, where that is asked."""
        path = directory / DONE
        return path.exists() and not (
            self.settings.parts and '"files"' not in path.read_text(encoding="utf-8")
        )

    def _size(self) -> str:
        return f"{local_files.Reading(self.paths).total / 1e6:,.0f} MB"

    @contextlib.contextmanager
    def _alone(self, directory: pathlib.Path) -> Iterator[None]:
        """One process prepares, others wait for it; the system lets go of the lock however it ends."""
        with (directory / "lock").open("w", encoding="utf-8") as file:
            with (
                told(self.note, "waiting for another process to prepare the text"),
                contextlib.suppress(OSError),
            ):
                fcntl.flock(file, fcntl.LOCK_EX)  # a file system without locks: each prepares for itself
            yield

    def _key(self) -> str:
        """A name for what the files hold and for what makes documents of it."""
        s = self.settings
        digests = [self._file_digest(path) for path in self.paths]
        kinds = [pathlib.Path(path).suffixes[-2:] for path in self.paths]
        said = [digests, kinds, s.text_field, s.documents, s.validation_share, s.normalization]
        said += [s.split_field] if s.split_field else []  # else the name that it always had
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]

    def _file_digest(self, path: str) -> str:
        """SHA-256 of a file, remembered for as long as its size and time of change stay."""
        status, note = os.stat(path), self.root / "digests.json"
        sign = [status.st_size, status.st_mtime_ns]
        try:
            known = json.loads(note.read_text(encoding="utf-8"))
            if known[os.path.abspath(path)][:2] == sign:
                return known[os.path.abspath(path)][2]
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            known = {}
        with open(path, "rb") as file:
            with told(
                self.note,
                f"looking through {path}",
                lambda: f"{file.tell() / 1e9:.1f} of {status.st_size / 1e9:.1f} GB",
            ):
                found = hashlib.file_digest(file, "sha256").hexdigest()
        _write(note, {**(known if isinstance(known, dict) else {}), os.path.abspath(path): [*sign, found]})
        return found

    def _make(self, directory: pathlib.Path) -> None:
        reading, began = local_files.Reading(self.paths), time.monotonic()
        total = reading.total

        def state() -> str:
            rate = reading.done() / max(time.monotonic() - began, 1e-3) / 1e6
            return f"{reading.done() / 1e9:.2f} of {total / 1e9:.2f} GB, {rate:.0f} MB/s"

        writer = _Shards(directory, self.settings.validation_share, len(self.paths))
        self.note(f"preparing {self._size()} of text in {directory}, once")
        with told(self.note, "preparing text", state):
            file, skipped = writer.resume()
            for number, text, place in reading.documents(self.settings, first=file):
                if number == file and skipped:
                    skipped -= 1
                    continue
                writer.write(number, text, place)
            writer.finish()

    def _open(self, directory: pathlib.Path) -> dict[str, Split]:
        from array_record.python import array_record_data_source

        try:
            done = json.loads((directory / DONE).read_text(encoding="utf-8"))
            found = {}
            for name in SPLITS:
                shards = [str(directory / shard) for shard in done["shards"][name]]
                records = array_record_data_source.ArrayRecordDataSource(shards) if shards else []
                order_N = np.load(directory / "order.npy") if name == "validation" else None
                if order_N is not None:
                    records = Reordered(records, order_N)
                if len(records) != done["documents"][name]:
                    raise ValueError(f"{len(records)} documents of {done['documents'][name]}")
                files = _of_files(done["files"][name], order_N) if self.settings.parts else ()
                found[name] = Split(records, done["fingerprints"][name], files)
        except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
            raise DataError(
                f"data.source={self.settings.source}: what was prepared of it in {directory} is damaged ({error}); accepted is"
                " to delete that directory: it is prepared again"
            ) from error
        if not any(done["documents"].values()):
            raise no_text(self.settings, len(self.paths))
        return found


class _Shards:
    """Writes documents into shards of both splits; a shard that is closed is never written again."""

    def __init__(self, directory: pathlib.Path, share: float, files: int):
        self.directory, self.share = directory, share
        self.shards: dict[str, list[str]] = {name: [] for name in SPLITS}
        self.files = {name: [0] * files for name in SPLITS}  # documents of each
        self.file, self.in_file = 0, 0  # where the text has been read to
        self.size, self.open = 0, {}
        self._forget()

    def _forget(self) -> None:
        """No document has been met."""
        self.counts = dict.fromkeys(SPLITS, 0)
        self.train = hashlib.sha256()
        self.places, self.digests = array.array("d"), bytearray()  # of the held-out documents

    def resume(self) -> tuple[int, int]:
        """(file, documents of it) that the closed shards end at; what they hold is looked through again.

        Where one of them is damaged or gone, all is made anew.
        """
        from array_record.python import array_record_data_source

        try:
            journal = json.loads((self.directory / JOURNAL).read_text(encoding="utf-8"))
            file, in_file, shards, files = (journal[name] for name in ("file", "in_file", "shards", "files"))
        except (OSError, ValueError, KeyError):
            return 0, 0
        try:
            for name in SPLITS:
                paths = [str(self.directory / shard) for shard in shards[name]]
                for record in array_record_data_source.ArrayRecordDataSource(paths) if paths else ():
                    self._note(name, record.decode())
        except (OSError, RuntimeError, ValueError):
            self._forget()
            return 0, 0
        self.file, self.in_file, self.shards, self.files = file, in_file, shards, files
        return self.file, self.in_file

    def write(self, file: int, text: str, place: float) -> None:
        name = "validation" if place < self.share else "train"
        if name not in self.open:
            self.open[name] = self._new(name)
        self.open[name].write(text.encode())
        self._note(name, text)
        self.files[name][file] += 1
        self.in_file = self.in_file + 1 if file == self.file else 1
        self.file, self.size = file, self.size + len(text)
        if self.size > SHARD:
            self.close()

    def _new(self, name: str) -> Any:
        from array_record.python import array_record_module

        shard = f"{name}-{len(self.shards[name]):05d}.array_record"
        self.shards[name].append(shard)
        return array_record_module.ArrayRecordWriter(str(self.directory / shard), "group_size:1")

    def _note(self, name: str, text: str) -> None:
        self.counts[name] += 1
        if name == "train":
            self.train.update(_digest(text))
        else:
            self.places.append(local_files.fraction(text))
            self.digests += _digest(text)

    def close(self) -> None:
        for writer in self.open.values():
            writer.close()
        self.open, self.size = {}, 0
        journal = {"file": self.file, "in_file": self.in_file, "shards": self.shards, "files": self.files}
        _write(self.directory / JOURNAL, journal)

    def finish(self) -> None:
        self.close()
        numbers = np.argsort(np.array(self.places), kind="stable")
        held_out = hashlib.sha256()
        for index in numbers:
            held_out.update(self.digests[32 * index : 32 * index + 32])
        np.save(self.directory / "order.npy", numbers)
        fingerprints = {"train": self.train.hexdigest(), "validation": held_out.hexdigest()}
        done = {
            "shards": self.shards,
            "documents": self.counts,
            "files": self.files,
            "fingerprints": fingerprints,
        }
        _write(self.directory / DONE, done)


def _write(path: pathlib.Path, value: Any) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    temporary.replace(path)
