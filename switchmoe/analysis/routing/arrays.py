"""Traces from what other systems tell: arrays of expert indices, as servers return them with their answers.

vLLM (``routed_experts`` of a completion) and SGLang give int [tokens, layers, choices] for each request; Hugging Face's models
give router logits, of which ``argsort(-logits)[:, :K]`` is that. docs/routing_traces.md says how they are put together.

Letters: T tokens, L layers, K choices.
"""

import json
import shutil
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from switchmoe.analysis.routing import traces
from switchmoe.analysis.routing.traces import Layer, LayerName

SUFFIXES = (".npz", ".npy")
MADE_OF = "made_of.json"  # in a trace made of a file: which one, its size and time
ARRAYS = "experts [tokens, layers, choices], and if known num_experts, tokens, documents, sequences [tokens], gates as experts, pieces (strings by id)"


def write(
    directory: Path,
    expert_TLK: np.ndarray,
    token_T: np.ndarray | None = None,
    gate_TLK: np.ndarray | None = None,
    sequence_T: np.ndarray | None = None,
    document_T: np.ndarray | None = None,
    pieces: Sequence[str] = (),
    num_experts: int = 0,
    system: str = "arrays",
    stack: str = "decoder",
) -> traces.Info:
    """A trace in ``directory`` (that has none) of experts that were chosen elsewhere.

    Args:
      expert_TLK: of each token in the order of reading, best first; -1 where there is none.
      token_T: ids. gate_TLK: what experts' outputs were multiplied by.
      sequence_T: number of the request that a token is of, None: one. document_T: the same, of its document.
      pieces: a string for each id.
      num_experts: 0: guessed, the largest index and one; experts after it, that nothing went to, are then not counted.

    Raises:
      ValueError: arrays that do not go together.
    """
    expert_TLK = np.asarray(expert_TLK)
    if expert_TLK.ndim != 3 or not expert_TLK.size or expert_TLK.dtype.kind not in "iu":
        raise ValueError(
            f"experts={expert_TLK.dtype}{list(expert_TLK.shape)}: accepted is an integer array [tokens, layers, choices]"
        )
    count, layers, choices = expert_TLK.shape
    experts = num_experts or int(expert_TLK.max()) + 1
    if expert_TLK.min() < -1 or expert_TLK.max() >= experts:
        raise ValueError(
            f"experts: indices from {expert_TLK.min()} to {expert_TLK.max()}; accepted are -1 to {experts - 1}"
        )

    def of(name: str, value: np.ndarray | None, shape: tuple[int, ...], otherwise: float) -> np.ndarray:
        found = np.full(shape, otherwise) if value is None else np.asarray(value)
        if found.shape != shape:
            raise ValueError(f"{name}={list(found.shape)}: accepted is {list(shape)}, as the experts are")
        if found.dtype.kind not in "biuf":
            raise ValueError(f"{name}={found.dtype}{list(shape)}: accepted are numbers")
        return found

    shape = (count,)
    sequence_T = of("sequences", sequence_T, shape, 0).astype(np.int32)
    document_T = of("documents", sequence_T if document_T is None else document_T, shape, 0).astype(np.int32)
    token_T = of("tokens", token_T, shape, -1).astype(np.int32)
    gate_TLK = of("gates", gate_TLK, expert_TLK.shape, np.nan)
    order = np.argsort(sequence_T, kind="stable")
    starts = np.searchsorted(sequence_T[order], sequence_T[order])
    position_T = np.empty(count, np.int32)
    position_T[order] = np.arange(count) - starts
    unknown, no_number = np.full(count, -1, np.int32), np.full(count, np.nan, np.float32)
    names = tuple(LayerName(stack, layer) for layer in range(layers))
    rows = [
        Layer(
            name, experts, document_T, sequence_T, position_T, token_T, unknown, unknown, unknown,
            expert_TLK[:, index], gate_TLK[:, index], expert_TLK[:, index] >= 0, no_number, no_number, no_number,
        )
        for index, name in enumerate(names)
    ]  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    if traces.parts(directory):
        raise ValueError(f"{directory}: it has a trace; accepted is another directory")
    if len(pieces):
        traces.write_tokens(directory, [str(piece) for piece in pieces])
    traces.write_part(directory / "part-00000.parquet", rows)
    info = traces.Info(
        names, experts, choices, system=system, tokens=count, complete=True, guessed=not num_experts
    )
    traces.write_info(directory, info)
    return info


def made(path: Path, directory: Path) -> Path:
    """``directory`` with the trace of a file, as `convert`; made once for each file as it is then, whole or not at all.

    Raises:
      ValueError: the file can't be read, or ``directory`` is there and was not made of a file.
    """
    status = path.stat() if path.is_file() else None  # of what is none `convert` says so
    of = json.dumps([str(path.absolute()), status.st_size, status.st_mtime_ns] if status else None)
    note, work = directory / MADE_OF, directory.with_name(f".{directory.name}.part")
    if note.exists() and note.read_text() == of:
        return directory
    if directory.exists() and not note.exists() and not _of_before(directory, path):
        raise ValueError(
            f"--trace={path}: {directory} is there and was not made of it; accepted is another --out, or that directory moved away"
        )
    shutil.rmtree(work, ignore_errors=True)
    convert(path, work)
    (work / MADE_OF).write_text(of)
    shutil.rmtree(directory, ignore_errors=True)
    return work.rename(directory)


def _of_before(directory: Path, path: Path) -> bool:
    """Whether a trace without a note is one that `convert` made of a file of this name: it may be made again."""
    return (directory / traces.INFO_FILE).exists() and traces.read_info(directory).system == path.name


def convert(path: Path, directory: Path) -> traces.Info:
    """The trace of a file: .npy with the experts alone, or .npz with the arrays of `ARRAYS`.

    Raises:
      ValueError: it can't be read, or has no such arrays.
    """
    try:
        found = np.load(path, allow_pickle=False)
        arrays = {"experts": found} if isinstance(found, np.ndarray) else dict(found)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"--trace={path}: cannot be read ({error}); accepted is .npz or .npy of numpy"
        ) from error
    if "experts" not in arrays:
        raise ValueError(f"--trace={path}: has {', '.join(arrays) or 'nothing'}; accepted is {ARRAYS}")
    num_experts = arrays.get("num_experts", np.int64(0))
    if "num_experts" in arrays and (
        num_experts.dtype.kind not in "iu" or num_experts.size != 1 or num_experts.item() < 1
    ):
        raise ValueError(f"--trace={path}: num_experts={num_experts}; accepted is an integer >= 1, or none")
    return write(
        directory,
        arrays["experts"],
        arrays.get("tokens"),
        arrays.get("gates"),
        arrays.get("sequences"),
        arrays.get("documents"),
        np.atleast_1d(arrays.get("pieces", ())),
        num_experts.item(),
        system=path.name,
    )
