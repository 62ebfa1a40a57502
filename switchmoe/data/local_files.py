"""Documents from local files: .txt, JSON records a line, and .parquet, plain or packed."""

import bz2
import dataclasses
import glob
import gzip
import hashlib
import json
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, Any

from switchmoe.data.errors import DataError
from switchmoe.settings import DataSettings

RECORDS = (".jsonl", ".json", ".ndjson")  # a JSON object a line
PACKINGS = ("", ".gz", ".xz", ".bz2", ".zst")
SUFFIXES = (*(kind + packing for kind in (".txt", *RECORDS) for packing in PACKINGS), ".parquet")
ACCEPTED = ".txt, .jsonl, .json or .ndjson (also .gz, .xz, .bz2, .zst), .parquet"


def is_local(source: str) -> bool:
    """Whether a `data.source` means files here rather than a tfds dataset."""
    return (
        source.lower().endswith(SUFFIXES)
        or glob.has_magic(source)
        or source.startswith(("/", "./", "../", "~"))
        or os.path.isfile(source)
    )


def paths(
    source: str, suffixes: tuple[str, ...] = SUFFIXES, accepted: str = ACCEPTED, field: str = "data.source"
) -> list[str]:
    """The files that a glob names, in order; ``field`` is where it was given.

    Raises:
      DataError: there is none, or one is not of a kind that can be read.
    """
    pattern = os.path.expanduser(source)
    if os.path.isdir(pattern):
        raise DataError(
            f"{field}={source}: a directory; accepted is a glob of its files, such as {source.rstrip('/')}/*{suffixes[0]}"
        )
    whole = os.path.isfile(pattern)  # a name may have a glob's signs
    found = [pattern] if whole else sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
    if not found:
        raise DataError(
            f"{field}={source}: no file matches; accepted is a path or glob of local files ending in {accepted}"
        )
    for path in found:
        if not path.lower().endswith(suffixes):
            raise DataError(
                f"{field}={source}: {path} is of an unknown kind; accepted are files ending in {accepted}"
            )
    return found


@dataclasses.dataclass
class Reading:
    """How far the files have been read, in bytes as they lie on the disk; a file can be left out from the start."""

    paths: list[str]
    before: int = 0
    file: IO[bytes] | None = None

    @property
    def total(self) -> int:
        return sum(map(os.path.getsize, self.paths))

    def done(self) -> int:
        return self.before + (self.file.tell() if self.file and not self.file.closed else 0)

    def documents(self, settings: DataSettings, first: int = 0) -> Iterator[tuple[int, str, float]]:
        """(number of the file, document, place): the non-empty ones, of the files from ``first`` on.

        The place is the `fraction` of what says whether the document is held out: its text, or `data.split_field`.

        Raises:
          DataError: names the file and the line that can't be read.
        """
        for number, text, key in self.keyed(settings, first):
            yield number, text, fraction(key)

    def keyed(self, settings: DataSettings, first: int = 0) -> Iterator[tuple[int, str, str]]:
        """The same, with what a document is held out by in place of its fraction."""
        for number, path in enumerate(self.paths):
            if number >= first:
                with open(path, "rb") as self.file:
                    for text, key in _documents(path, self.file, settings):
                        yield number, text, key
            self.before += os.path.getsize(path)


def fraction(text: str) -> float:
    """A document's place between 0 and 1, by the hash of its text: below `data.validation_share` it is held out.

    Neither other documents nor their order matter, and copies of a document stay on one side.
    """
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _documents(path: str, file: IO[bytes], settings: DataSettings) -> Iterator[tuple[str, str]]:
    """(text, what it is held out by)."""
    name = path.lower()
    kind = os.path.splitext(os.path.splitext(name)[0] if name.endswith(PACKINGS[1:]) else name)[1]
    if kind in RECORDS:
        return _stripped(
            _records(path, lines(path, file, f"data.source={settings.source}"), settings), settings
        )
    if settings.split_field:
        raise DataError(
            f"data.split_field={settings.split_field}: {path} has no fields; accepted is '', or files of JSON records"
        )
    if kind == ".parquet":
        texts: Iterable[str] = _columns(path, file, settings)
    elif settings.documents == "block":
        texts = _blocks(lines(path, file, f"data.source={settings.source}"))
    else:
        texts = (line for _, line in lines(path, file, f"data.source={settings.source}"))
    return _stripped(((text, "") for text in texts), settings)


def _stripped(found: Iterable[tuple[str, str]], settings: DataSettings) -> Iterator[tuple[str, str]]:
    """Those with text; "" in place of a key stands for the text."""
    for text, key in found:
        if text.strip():
            kept = text if settings.normalization == "identity" else text.strip()  # indentation is text
            yield kept, key or kept


def _unpacked(path: str, file: IO[bytes], asked: str) -> Any:
    """The file's own bytes, line by line."""
    packing = os.path.splitext(path.lower())[1]
    if packing in PACKINGS[1:] and not os.fstat(file.fileno()).st_size:
        raise EOFError("empty")
    if packing == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise DataError(
                f"{asked}: {path} needs the package zstandard; accepted is after pip install '.[zstd]'"
            ) from error
        return _zst_lines(zstandard.ZstdDecompressor(), file)
    openers = {
        ".gz": lambda: gzip.GzipFile(fileobj=file),
        ".xz": lambda: lzma.LZMAFile(file),
        ".bz2": lambda: bz2.BZ2File(file),
    }
    return openers.get(packing, lambda: file)()


def _zst_lines(decompressor: Any, file: IO[bytes]) -> Iterator[bytes]:
    """Of all frames; the library's own reader ends without a word where a file does within one."""
    frame, open_frame, rest = decompressor.decompressobj(), False, b""
    while block := file.read(2**20):
        while block:
            *lines, rest = (rest + frame.decompress(block)).split(b"\n")
            yield from (line + b"\n" for line in lines)
            block, open_frame = frame.unused_data, not frame.eof
            if frame.eof:
                frame = decompressor.decompressobj()
    if open_frame:
        raise EOFError("ended before the end of a frame")
    if rest:
        yield rest


def lines(path: str, file: IO[bytes], asked: str) -> Iterator[tuple[int, str]]:
    """Numbered lines (from 1), decoded; whatever is wrong with the file names it and the line, behind what was ``asked``."""
    number = 0
    try:
        for number, line in enumerate(_unpacked(path, file, asked), 1):
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{asked}: {path}, line {number}: not UTF-8 text ({error.reason}); accepted is UTF-8"
        ) from error
    except DataError:
        raise
    except Exception as error:  # each packing has errors of its own
        if (
            not isinstance(error, (OSError, EOFError, lzma.LZMAError, zlib.error))
            and "zst" not in type(error).__module__
        ):
            raise
        raise DataError(
            f"{asked}: {path} cannot be read after line {number} ({error}); accepted is a "
            "complete file of the kind that its name says"
        ) from error


def _columns(path: str, file: IO[bytes], settings: DataSettings) -> Iterator[str]:
    """The text column of a .parquet file, a few rows at a time."""
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        table = pyarrow.parquet.ParquetFile(file)
        if settings.text_field not in table.schema_arrow.names:
            raise _no_text_field(settings, path, table.schema_arrow.names)
        for batch in table.iter_batches(1024, columns=[settings.text_field]):
            for value in batch.column(0).to_pylist():
                row += 1
                if not isinstance(value, str):
                    raise _no_text_field(settings, f"{path}, row {row}", [])
                yield value
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"data.source={settings.source}: {path} cannot be read after row {row} ({str(error).splitlines()[0]}); accepted"
            " is a complete .parquet file"
        ) from error


def _no_text_field(settings: DataSettings, where: str, texts: Iterable[str]) -> DataError:
    return DataError(
        f"data.text_field={settings.text_field}: not a text field of {where}; accepted is "
        f"{'one of ' + ', '.join(texts) if texts else 'a record with a text field'}"
    )


def _blocks(lines: Iterable[tuple[int, str]]) -> Iterator[str]:
    block: list[str] = []
    for _, line in lines:
        if line.strip():
            block.append(line)
        elif block:
            yield "\n".join(block)
            block = []
    if block:
        yield "\n".join(block)


def _records(
    path: str, lines: Iterable[tuple[int, str]], settings: DataSettings
) -> Iterator[tuple[str, str]]:
    """(text, the value of `data.split_field` or "")."""
    for number, line in lines:
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)
            raise DataError(
                f"data.source={settings.source}: {where}: not a JSON record ({reason}); accepted is a JSON object a line"
                " (of an array over many lines: jq -c '.[]')"
            ) from error
        if not isinstance(record, dict):
            raise DataError(
                f"data.source={settings.source}: {where}: accepted is a JSON object, one a line (of an array: jq -c '.[]')"
            )
        if not isinstance(record.get(settings.text_field), str):
            texts = [name for name, value in record.items() if isinstance(value, str)]
            raise _no_text_field(settings, where, texts)
        text, key = record[settings.text_field], _split_key(record, where, settings)
        for value in (text, key):
            if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
                raise DataError(
                    f"data.source={settings.source}: {where}: half of a surrogate pair; accepted is Unicode text"
                )
        yield text, key


def _split_key(record: dict[str, Any], where: str, settings: DataSettings) -> str:
    if not settings.split_field:
        return ""
    value = record.get(settings.split_field)
    if not isinstance(value, (str, int)) or value == "":
        raise DataError(
            f"data.split_field={settings.split_field}: neither a string nor an integer in {where}; accepted is a field that has one in"
            " each record"
        )
    return str(value)


def part_names(found: list[str], settings: DataSettings) -> list[str]:
    """Names of a mixture's parts: those of the files without what says their kind.

    Raises:
      DataError: two of them are called alike.
    """
    names = [
        next(
            (
                name[: -len(end)]
                for end in sorted(SUFFIXES, key=len, reverse=True)
                if name.lower().endswith(end)
            ),
            name,
        )
        for name in map(os.path.basename, found)
    ]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(
            f"data.parts=file: two files are called {twice}; accepted are files with names of their own"
        )
    return names
