"""A checkpoint's manifest: size and CRC-32 of each of its files, to tell a damaged step from a good one.

Orbax reads some damage without a word (a flipped bit in its metadata, a file that is not there), names
other damage by its own insides, and writes no checksum of the files as a whole. The manifest is a file
of the step itself, so that it is committed, kept and removed with it.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from etils import epath

from switchmoe.runs import buckets

MANIFEST = "files.json"
ITEMS = ("state", "data")  # what a step without a manifest must have


def write_manifest(step_directory: Path | epath.Path) -> None:
    """Called before the step is renamed to its final name: that makes the manifest whole, or absent.

    What lies beside the items (Orbax's own notes of the commit) is written later, and is nothing that is needed.
    In a bucket only sizes are noted: it keeps checksums of its own, and the files would all have to be read back.
    """
    files = [path for item in sorted(step_directory.iterdir()) if item.is_dir() for path in _files(item)]
    entry = _size_only if buckets.is_bucket(step_directory) else _entry
    with ThreadPoolExecutor() as pool:
        entries = dict(
            zip((str(p.relative_to(step_directory)) for p in files), pool.map(entry, files), strict=True)
        )
    (step_directory / MANIFEST).write_text(json.dumps(entries, indent=1))


def fingerprint(step_directory: Path | epath.Path) -> str:
    """By which a step is known again, wherever it is: SHA-256 of its manifest; "" of a step without one.

    In a bucket manifests have sizes alone: there steps whose files are as long have the same.
    """
    file = step_directory / MANIFEST
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else ""


def _files(directory: Path | epath.Path) -> list[Path | epath.Path]:
    found = []
    for path in sorted(directory.iterdir()):
        found += _files(path) if path.is_dir() else [path]
    return found


def damage(
    step_directory: Path, under: str = "", needed: Callable[[str], bool] = lambda name: True
) -> str | None:
    """What is wrong with a step, naming the first such file; None if nothing is, as far as can be told.

    A step without a manifest is one of an earlier version: it must have its items, nothing more is known.

    Args:
      under: check only the files whose path begins so.
      needed: and of which this is true.
    """
    try:
        entries = json.loads((step_directory / MANIFEST).read_bytes())
        expected = {
            name: (int(size), None if crc is None else int(crc)) for name, (size, crc) in entries.items()
        }
    except FileNotFoundError:
        return next((f"{item}/ is missing" for item in ITEMS if not (step_directory / item).is_dir()), None)
    except OSError as error:
        return f"{MANIFEST} can't be read ({error.strerror})"
    except (ValueError, TypeError, AttributeError):
        return f"{MANIFEST}, the list of its files, is not what was written"
    names = [name for name in expected if name.startswith(under) and needed(name)]
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda name: _problem(step_directory / name, *expected[name]), names)
        return next(
            (f"{name} {problem}" for name, problem in zip(names, found, strict=True) if problem), None
        )


def _problem(path: Path, size: int, crc: int | None) -> str | None:
    try:
        found = _size_only(path)[0]
        if found != size:
            return f"has {found:,} bytes instead of {size:,}"
        return (
            None if crc is None or _entry(path)[1] == crc else "has other content than was written (CRC-32)"
        )
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"can't be read ({error.strerror})"


def _size_only(path: Path | epath.Path) -> tuple[int, None]:
    status = path.stat()
    return (status.st_size if isinstance(status, os.stat_result) else status.length), None


def _entry(path: Path) -> tuple[int, int]:
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc
