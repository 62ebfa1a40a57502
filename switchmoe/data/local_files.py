"""Documents from local .txt and .jsonl files, plain or packed with gzip or xz."""

import glob
import gzip
import hashlib
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from switchmoe.data.errors import DataError
from switchmoe.settings import DataSettings

SUFFIXES = tuple(kind + packing for kind in (".txt", ".jsonl") for packing in ("", ".gz", ".xz"))


def read(settings: DataSettings, split: str) -> tuple[list[str], str]:
    """The non-empty documents of one split, in memory, and the directory of the first file.

    A document is in `validation` if the hash of its text, as a fraction, is below
    ``validation_share``: neither other documents nor their order matter, and copies of a document
    stay on one side. Validation documents come in the order of that fraction, so that the first few
    are a fair sample of all files; train documents come in the order of the files.

    Raises:
      DataError: no file matches, a file cannot be read, or the split is empty.
    """
    paths = sorted(filter(os.path.isfile, glob.glob(os.path.expanduser(settings.source), recursive=True)))
    if not paths:
        raise DataError(
            f"data.source={settings.source}: no file matches; accepted is a path or glob of local files "
            f"ending in {', '.join(SUFFIXES)}"
        )
    parts = [(_fraction(text), text) for path in paths for text in _documents(path, settings)]
    if not parts:
        raise DataError(f"data.source={settings.source}: no text in {len(paths)} file(s)")
    share = settings.validation_share
    if split == "validation":
        texts = [text for fraction, text in sorted(parts) if fraction < share]
    else:
        texts = [text for fraction, text in parts if fraction >= share]
    if not texts:
        raise DataError(
            f"data.validation_share={share}: leaves no {split} document of the {len(parts)} in "
            f"{settings.source}; accepted is a share that leaves some on both sides, or more documents "
            "(data.documents says what a document is)"
        )
    return texts, os.path.dirname(os.path.abspath(paths[0]))


def _fraction(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _documents(path: str, settings: DataSettings) -> Iterator[str]:
    lines = _lines(path, settings.source)
    if path.removesuffix(".gz").removesuffix(".xz").endswith(".jsonl"):
        texts: Iterable[str] = _records(path, lines, settings)
    elif settings.documents == "block":
        texts = _blocks(lines)
    else:
        texts = (line for _, line in lines)
    if settings.normalization == "identity":  # indentation is text
        return (text for text in texts if text.strip())
    return (text.strip() for text in texts if text.strip())


def _lines(path: str, source: str) -> Iterator[tuple[int, str]]:
    """Numbered lines (from 1), decoded; whatever is wrong with the file names it and the line."""
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
    number = 0
    try:
        with openers.get(os.path.splitext(path)[1], open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"data.source={source}: {path}, line {number}: not UTF-8 text ({error.reason})"
        ) from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(
            f"data.source={source}: {path} cannot be read after line {number} ({error}); accepted is a "
            "complete file of the kind that its name says"
        ) from error


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


def _records(path: str, lines: Iterable[tuple[int, str]], settings: DataSettings) -> Iterator[str]:
    for number, line in lines:
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)
            raise DataError(
                f"data.source={settings.source}: {where}: not a JSON record ({reason})"
            ) from error
        if not isinstance(record, dict):
            raise DataError(f"data.source={settings.source}: {where}: accepted is a JSON object, one a line")
        if not isinstance(record.get(settings.text_field), str):
            texts = [name for name, value in record.items() if isinstance(value, str)]
            raise DataError(
                f"data.text_field={settings.text_field}: not a text field of {where}; accepted is "
                f"{'one of ' + ', '.join(texts) if texts else 'a record with a text field'}"
            )
        text = record[settings.text_field]
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise DataError(
                f"data.source={settings.source}: {where}: half of a surrogate pair, not Unicode text"
            )
        yield text
