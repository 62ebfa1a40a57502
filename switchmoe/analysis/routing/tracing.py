"""Traces of a model on a text: a forward pass of each batch, whose choices are written as it goes.

Letters: B sequences a batch, L tokens of a stack, N real ones of all sequences of a part.
"""

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from switchmoe.analysis.routing import traces
from switchmoe.analysis.routing.traces import Layer, LayerName
from switchmoe.data import batches, local_files, origins
from switchmoe.data.vocabulary import BLANK, Vocabulary
from switchmoe.model.transformer import Transformer, sparse_layer_names
from switchmoe.parallel import sharding
from switchmoe.runs import integrity, placing, trained
from switchmoe.settings import NUM_SENTINELS, Settings

PART_ROWS = 1_000_000  # tokens x layers of a part, about: 50 MB of one choice each; another is being written
ARRAY = {"encoder": "inputs", "decoder": "targets"}
_READ = ("source", "text_field", "documents", "batch_size", "input_length", "target_length", "objective", "prefix",
         "noise_density", "mean_span_length", "normalization", "bos_id", "validation_share", "split_field", "train_split",
         "validation_split", "data_dir")  # fmt: skip


class Text(NamedTuple):
    """What is read of `data.source`: ``tokens`` of all stacks together (0: all), whole sequences."""

    split: str = "all"
    label: str = ""
    tokens: int = 0
    share: float = 1.0  # of the documents


def write(
    source: trained.Source,
    settings: Settings,
    text: Text,
    directory: Path,
    probabilities: bool = False,
    told: Callable[[int], None] = lambda _: None,
) -> traces.Info:
    """The trace of the model on the text, in ``directory``; one that was stopped there goes on, a whole one is kept.

    Args:
      probabilities: writes the router's whole distribution as well.
      told: called with the tokens done so far.

    Raises:
      ValueError: the model has no router that chooses, no vocabulary, or ``directory`` has another trace.
    """
    if source.vocabulary is None:
        raise ValueError(f"--source={source.step}: it has no vocabulary; accepted is a run's directory")
    info = described(source, settings, text, probabilities)
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / traces.INFO_FILE).exists():
        known = traces.read_info(directory)
        different = traces.differing(known.identity, info.identity) + traces.differing(
            known.reading, info.reading
        )
        if different:
            raise ValueError(
                f"--out={directory.parent}: it has a trace of another model, text or setting ({', '.join(different)});"
                " accepted is another directory"
            )
        if known.complete:
            return known
    traces.write_tokens(directory, strings(source.vocabulary))
    traces.write_info(directory, info)
    documents = origins.labelled(settings.data, *text[:2], text.share)
    stream = origins.traced(settings.data, source.vocabulary, documents)
    done = _write_parts(source, settings, text, info, stream, directory, told)
    info = dataclasses.replace(info, tokens=done, complete=True)
    traces.write_info(directory, info)
    return info


def described(source: trained.Source, settings: Settings, text: Text, probabilities: bool) -> traces.Info:
    """What `trace.json` will say of it.

    Raises:
      ValueError: there is nothing to trace.
    """
    if not settings.sparse:
        raise ValueError(
            f"--source={source.step}: a dense model, it has no router; accepted is a run with experts"
        )
    if "soft" in (settings.moe.router, settings.moe.decoder_router):
        raise ValueError(
            f"moe.router={settings.moe.router}: it chooses nothing; accepted is a router that chooses"
        )
    data, vocabulary = settings.data, source.vocabulary
    reading = {name: getattr(data, name) for name in _READ} | text._asdict()
    reading |= {"vocabulary": vocabulary.sha256, "files": _files(data.source)}
    shapes = jax.eval_shape(*_abstract(settings, batches.lengths(data)))
    experts = [shapes[stack]["expert"].shape[-1] for stack in settings.sparse_stacks]
    model = {
        "moe": dataclasses.asdict(settings.moe),
        "dtype": settings.model.dtype,
        "probabilities": probabilities,
    }
    fingerprint = integrity.fingerprint(source.step)
    if fingerprint:
        model["checkpoint"] = fingerprint
    return traces.Info(
        layers=tuple(LayerName.parse(name) for name in sparse_layer_names(settings)),
        num_experts=settings.moe.total_experts,
        choices=max(experts),
        source=str(source.step),
        text=data.source,
        label=text.label,
        sentinels=(vocabulary.size - NUM_SENTINELS, vocabulary.size),
        reading=reading,
        identity={"step": os.path.abspath(source.step), **model},
    )


def strings(vocabulary: Vocabulary) -> list[str]:
    """What each id is written as: its piece, its sentinel."""
    shown = []
    for token in range(vocabulary.size):
        text = vocabulary.decode([token]) if token >= vocabulary.pieces else vocabulary.piece(token)
        shown.append(text.replace(" ", BLANK))
    return shown


def choose(params: Any, batch: dict[str, jax.Array], settings: Settings, probabilities: bool = False) -> dict:
    """By stack `choices.told` [layers, B, L, ...] in narrow types, and of the decoder ``predicted`` [B, L]."""
    model = Transformer(settings, trace=True)
    predicted_BL, aux = model.apply({"params": params}, batch, method="predictions")
    found = {stack: dict(aux[stack]["trace"]) for stack in settings.sparse_stacks}
    for of in found.values():
        of["expert"] = of["expert"].astype(jnp.int16)
        if not probabilities:
            of.pop("probability")
    return found | {"predicted": predicted_BL}


_CHOOSE = jax.jit(choose, static_argnums=(2, 3))  # one program for all checkpoints of a run


def _abstract(settings: Settings, lengths: dict[str, int]) -> tuple[Callable, Any, Any]:
    from switchmoe.training import train_state

    rows = settings.data.batch_size
    batch = {
        name: jax.ShapeDtypeStruct((rows, of), np.int32)
        for name, of in batches.array_lengths(lengths).items()
    }
    return functools.partial(choose, settings=settings), train_state.parameter_shapes(settings), batch


def _write_parts(
    source: trained.Source, settings: Settings, text: Text, info: traces.Info, stream: Iterator[origins.Origin],
    directory: Path, told: Callable[[int], None],
) -> int:  # fmt: skip
    """Tokens written, of this call and of those before it."""
    there = traces.parts(directory)
    known = traces.part_metadata(there[-1]) if there else {}
    first, done = int(known.get("next", 0)), int(known.get("tokens", 0))
    part, rows = _Part(info), 0
    mesh = sharding.make_mesh(settings.mesh)
    sharding.check(settings, batches.lengths(settings.data), mesh.shape)
    with (
        jax.set_mesh(mesh), sharding.rules(settings), concurrent.futures.ThreadPoolExecutor(1) as writer
    ):  # fmt: skip
        pending = None
        for number, origin, found, used in _chosen(
            source, settings, stream, mesh, text.tokens, first, done, info
        ):
            done += part.add(number * settings.data.batch_size, origin, found, used, settings.data.bos_id)
            told(done)
            if part.rows() >= PART_ROWS:
                if pending:
                    pending.result()  # one part is written while the next is made, no more
                pending = writer.submit(part.write, directory, len(there) + rows, number + 1, done)
                part, rows = _Part(info), rows + 1
                last = number
        if pending:
            pending.result()
        if part.rows():
            last = number
            part.write(directory, len(there) + rows, last + 1, done)
    return done


def _chosen(
    source: trained.Source, settings: Settings, stream: Iterator[origins.Origin], mesh: Mesh, wanted: int, first: int,
    done: int, info: traces.Info,
) -> Iterator[tuple[int, origins.Origin, dict, int]]:  # fmt: skip
    """(number of the batch, the batch, `choose` of it, how many of its rows are wanted), the next one under way."""
    if wanted and done >= wanted:
        return
    params = trained.parameters(source, settings, mesh)
    probabilities, before = info.identity["probabilities"], None
    for number, origin in enumerate(stream):
        if number < first:
            continue
        real_B = sum((rows != 0).sum(axis=1) for name, rows in origin.batch.items() if name in ARRAY.values())
        used = len(real_B) if not wanted else int((done + np.cumsum(real_B) - real_B < wanted).sum())
        done += int(real_B[:used].sum())
        after = (
            number,
            origin,
            _CHOOSE(params, placing.whole(origin.batch, mesh), settings, probabilities),
            used,
        )
        if before:
            yield before[0], before[1], jax.device_get(before[2]), before[3]
        before = after
        if wanted and done >= wanted:
            break
    if before:
        yield before[0], before[1], jax.device_get(before[2]), before[3]


class _Part:
    """Rows of one file: what batches had of each layer."""

    def __init__(self, info: traces.Info):
        self._info = info
        self._found: dict[LayerName, list[Layer]] = {name: [] for name in info.layers}

    def rows(self) -> int:
        return sum(len(piece.sequence_N) for pieces in self._found.values() for piece in pieces)

    def add(self, first: int, origin: origins.Origin, found: dict, used: int, bos_id: int) -> int:
        """The first ``used`` rows of a batch, whose sequences are numbered from ``first``; returns the tokens in them."""
        tokens = 0
        for stack in ("encoder", "decoder"):
            array = ARRAY[stack]
            if array not in origin.batch:
                continue
            ids_BL = origin.batch[array][:used]
            row_N, position_N = np.nonzero(ids_BL)
            tokens += len(row_N)
            if stack not in found:
                continue
            rows = self._rows(origin, array, used, bos_id, row_N, position_N)
            rows["sequence_N"] = (row_N + first).astype(np.int32)
            if array == "targets":
                rows["predicted_N"] = found["predicted"][row_N, position_N]
            mine = [name for name in self._info.layers if name.stack == stack]
            for index, name in enumerate(mine):
                self._found[name].append(self._layer(name, rows, found[stack], index, row_N, position_N))
        return tokens

    def _rows(
        self, origin: origins.Origin, array: str, used: int, bos_id: int, row_N: np.ndarray, position_N: np.ndarray
    ) -> dict[str, Any]:  # fmt: skip
        ids_BL, none_N = origin.batch[array][:used], np.full(len(row_N), -1, np.int32)
        read_BL = ids_BL
        if array == "targets":
            read_BL = np.pad(ids_BL[:, :-1], ((0, 0), (1, 0)), constant_values=bos_id)
            if "positions" in origin.batch:
                read_BL = np.where(origin.batch["positions"][:used] == 0, bos_id, read_BL)
        document_N = origin.document[array][row_N, position_N]
        # Of these documents alone: `origin.labels` has all that there were before.
        here_D, number_N = np.unique(document_N, return_inverse=True)
        label_D = [
            origin.labels[document] if document >= 0 and self._info.label else "" for document in here_D
        ]
        names = sorted(set(filter(None, label_D)))
        numbers = {name: number for number, name in enumerate(names)}
        return {
            "document_N": document_N,
            "position_N": position_N.astype(np.int32),
            "token_N": read_BL[row_N, position_N],
            "target_N": ids_BL[row_N, position_N] if array == "targets" else none_N,
            "predicted_N": none_N,
            "label_N": np.array([numbers.get(label, -1) for label in label_D], np.int32)[number_N],
            "labels": tuple(names),
        }

    def _layer(
        self, name: LayerName, rows: dict, found: dict, index: int, row_N: np.ndarray, position_N: np.ndarray
    ) -> Layer:  # fmt: skip
        def of(what: str) -> np.ndarray:
            return found[what][index][row_N, position_N]

        choices = self._info.choices
        expert_NK, gate_NK, kept_NK = of("expert"), of("gate"), of("kept")
        more = ((0, 0), (0, choices - expert_NK.shape[1]))
        own = {
            "expert_NK": np.pad(expert_NK, more, constant_values=-1),
            "gate_NK": np.pad(gate_NK, more),
            "kept_NK": np.pad(kept_NK, more),
            "probability_NE": of("probability") if "probability" in found else None,
        } | {f"{what}_N": of(what) for what in ("margin", "entropy", "confidence")}
        return Layer(name=name, num_experts=self._info.num_experts, **rows, **own)

    def write(self, directory: Path, number: int, following: int, tokens: int) -> None:
        """As the part of this number; ``following`` is the first batch after it, ``tokens`` those up to its end."""
        path = directory / f"part-{number:05d}.parquet"
        layers = [_joined(pieces) for pieces in self._found.values()]
        traces.write_part(path, layers, {"next": str(following), "tokens": str(tokens)})


def _joined(pieces: list[Layer]) -> Layer:
    labels = tuple(sorted(set().union(*(piece.labels for piece in pieces))))
    numbers = {name: number for number, name in enumerate(labels)}
    arrays = {}
    for name in pieces[0]._fields[2:-1]:
        values = [getattr(piece, name) for piece in pieces]
        if name == "label_N":  # batches know more labels as they go
            own = (np.array([numbers[text] for text in piece.labels] + [-1], np.int32) for piece in pieces)
            values = [of[value] for of, value in zip(own, values, strict=True)]
        arrays[name] = None if values[0] is None else np.concatenate(values)
    return pieces[0]._replace(labels=labels, **arrays)


def _files(source: str) -> list[list]:
    """Names, sizes and times of local files, which tell that a text has changed."""
    if not local_files.is_local(source):
        return []
    found = [(path, os.stat(path)) for path in local_files.paths(source)]
    return [[os.path.abspath(path), stat.st_size, stat.st_mtime_ns] for path, stat in found]
