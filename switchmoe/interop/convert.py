"""Checkpoints from one form to another, a tensor at a time.

What is written grows in a directory beside the target, and is renamed to it when it is whole. So the target is there whole or
not at all, and a conversion that was killed goes on where it was.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from switchmoe.data.vocabulary import Vocabulary
from switchmoe.interop import decoders, growing, run_files, shards, sources, t5, tables, tokenizer
from switchmoe.interop.growing import Report
from switchmoe.interop.tables import LINEAR, Family, Move
from switchmoe.runs import integrity, start, trained
from switchmoe.runs.checkpoints import write_json
from switchmoe.settings import Settings, from_config, to_dict
from switchmoe.training import places

THREADS = 2
VOCABULARY = "spiece.model"  # what Hugging Face calls T5's
WRITTEN = "written"
KEPT = "hugging_face.json"  # of a run's directory: the config of what it was converted from
Told = Callable[[Callable[[], str]], Any]  # a context in which a function is asked how far it has got


class Model(NamedTuple):
    """What is to be converted."""

    settings: Settings
    family: Family
    source: sources.Source
    vocabulary: bytes | None = None
    config: dict[str, Any] | None = None  # Hugging Face's own


# What a source is.


def recognised(directory: Path) -> Model:
    """The model in a Hugging Face or a T5X directory.

    Raises:
      ValueError: neither, a config that our settings can't say, or names and shapes that are not its family's; one line.
    """
    if not directory.is_dir():
        raise ValueError(
            f"--source={directory}: not a directory; accepted is one of Hugging Face, T5X, or a run's"
        )
    if (directory / "config.json").exists():
        return _hugging_face(directory)
    source = sources.t5x(directory)

    def missing(name: str) -> Any:
        raise tables.TableError(f"tensor {name}: not found, expected in a T5X checkpoint")

    config = t5.t5x_config(source.shapes, missing)
    vocabulary = _vocabulary(directory)
    settings = _settings(config, directory, source, vocabulary)
    return Model(settings, t5.t5x_family(settings.model.gated), source, vocabulary)


def _hugging_face(directory: Path) -> Model:
    config = growing.read_json(directory / "config.json")
    family, groups = from_fields(config, str(directory / "config.json"))
    source = sources.hugging_face(directory)
    tensors, model = source.tensors, groups["model"]
    names = (entry.theirs for entry in family.entries if entry.ours == "embedding")
    embedding = next((name for name in names if name in tensors), "")  # without one `tables.moves` tells so
    if embedding:
        model["vocab_rows"] = tensors[embedding].shape[0]
        if model["vocab_rows"] != config["vocab_size"]:
            raise tables.TableError(
                f"tensor {embedding}: found with {model['vocab_rows']} rows, expected vocab_size={config['vocab_size']} of"
                " config.json"
            )
    if config["model_type"] in ("t5", "mt5"):  # what the config says is of the scale alone
        own = "lm_head.weight" in tensors and bool(embedding)
        own = own and not sources.same(tensors["lm_head.weight"], tensors[embedding])
        if own and model["scale_logits"]:
            raise tables.TableError(
                f"tensor lm_head.weight: found with other values than {embedding}, expected a copy of it"
            )
        model["tie_embeddings"] = not own
    vocabulary = _vocabulary(directory)
    return Model(_settings(groups, directory, source, vocabulary), family, source, vocabulary, config)


def _vocabulary(directory: Path) -> bytes | None:
    path = directory / VOCABULARY
    return path.read_bytes() if path.exists() else None


def from_fields(given: Mapping[str, Any], where: str) -> tuple[Family, dict[str, dict[str, Any]]]:
    """(family, our config by group) of a Hugging Face config.

    Raises:
      ValueError: another model, or one that our settings can't say; names the field.
    """
    kind = given.get("model_type")
    defaults = t5.DEFAULTS | decoders.DEFAULTS
    if not isinstance(kind, str) or kind not in defaults:
        raise ValueError(f"{where}: model_type={kind}: accepted is one of {', '.join(defaults)}")
    config = defaults[kind] | dict(given)
    for field, other in (("num_experts", "num_local_experts"), ("num_local_experts", "num_experts")):
        if other in given and field not in given and field in config:  # files have either name
            config[field] = given[other]

    def refuse(field: str, accepted: str) -> None:
        raise ValueError(f"{where}: {field}={config.get(field)}: accepted is {accepted}")

    is_t5 = kind in t5.CLASSES
    for field, default in defaults[kind].items():
        if config[field] is not None and not _of_kind(field, config[field], default):
            ends = field == "eos_token_id"
            refuse(
                field,
                "an id, or a list of them" if ends else f"of type {type(default).__name__}, as {default}",
            )
    try:
        groups = (t5 if is_t5 else decoders).read_config(config, refuse)
    except (TypeError, KeyError, ZeroDivisionError, AttributeError) as error:
        null = ", ".join(
            field
            for field, value in config.items()
            if value is None and defaults[kind].get(field) is not None
        )
        named = f" (null are {null})" if null else ""
        raise ValueError(
            f"{where}: a field that can't be read{named}: {type(error).__name__}: {error}; accepted is transformers' config"
        ) from error
    gated = groups["model"]["activation"] != "relu"
    family = t5.family(kind == "switch_transformers", gated) if is_t5 else decoders.FAMILIES[kind]
    groups["model"]["vocab_rows"] = config["vocab_size"]
    eos = config.get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) else eos
    first = config.get("decoder_start_token_id") if is_t5 else config.get("bos_token_id")
    if first is None:  # a decoder alone without one has documents that follow the end of another
        first = 0 if is_t5 or eos is None else eos
    groups["data"] |= {"eos_id": 1 if eos is None else eos, "bos_id": first}
    return family, groups


def _of_kind(field: str, value: Any, default: Any) -> bool:
    """Whether a config's value is of its default's type; of ends there may be several."""
    if field == "eos_token_id":
        ends = value if isinstance(value, list) else [value]
        return bool(ends) and all(type(end) is int for end in ends)
    if default is None:
        return True
    if isinstance(value, bool) or isinstance(default, bool):
        return type(value) is type(default)
    return isinstance(value, (int, float) if isinstance(default, float) else type(default))


def _settings(
    groups: dict[str, dict[str, Any]],
    directory: Path,
    source: sources.Source,
    vocabulary: bytes | None,
) -> Settings:
    rows, file = groups["model"]["vocab_rows"], directory / VOCABULARY
    pieces = min(max(300, rows - 100), rows)
    if vocabulary is not None:
        pieces = Vocabulary.from_bytes(vocabulary, str(file)).pieces
        if pieces > rows:
            raise ValueError(
                f"{file}: found {pieces:,} pieces, and {rows:,} rows of the embedding; accepted is the model's own"
            )
    groups["data"] |= {"vocab_size": pieces, "input_length": 512}
    dtypes = {tensor.dtype for tensor in source.tensors.values()}
    # float16 is held by float32 alone
    groups["model"]["dtype"] = "bfloat16" if dtypes == {"bfloat16"} else "float32"
    try:
        return from_config(groups)
    except ValueError as error:
        raise ValueError(f"--source={directory}: as settings of a run: {error}") from error


def is_run(directory: Path | str) -> bool:
    """A run's directory, or one of its steps."""
    path = Path(str(directory).partition("|")[0])
    step = path.parent.name == "checkpoints" and path.name.isdecimal() and (path / "state").exists()
    return step or (path / "checkpoints").is_dir()


# Into a run's directory.


def into_run(model: Model, target: Path, dtype: str, told: Told) -> Report:
    """Writes a run's directory of one step, 0, with parameters alone: what `init.checkpoint` and readers of models take.

    Args:
      dtype: of the parameters and the activations; "": the source's.
      told: a context in which a function is asked for how far it has got.

    Raises:
      ValueError: tensors that are not the family's, a target that is there; nothing is left at ``target``.
    """
    source, began = model.source, time.monotonic()
    found = tables.moves(model.family, model.settings, source.shapes)
    for copy, of in tables.copies(model.family, found, source.shapes).items():
        if not sources.same(source.tensors[copy], source.tensors[of]):
            raise tables.TableError(
                f"tensor {copy}: found with other values than {of}, expected a copy of it"
            )
    kept = dtype or model.settings.model.dtype
    settings = from_config(
        to_dict(model.settings) | {"model": to_dict(model.settings)["model"] | {"dtype": kept}}
    )
    asked = {"files": [growing.identity(file) for file in source.files], "dtype": kept}
    with growing.grown(target, asked) as work:
        step = work / "checkpoints" / "0"
        writer = run_files.Writer(step, run_files.parts(found, places.names(settings)), kept)
        total = sum(math.prod(move.shape) for move in found) * np.dtype(kept).itemsize
        counter = growing.Counter(total, began)

        def one(move: Move) -> None:
            size = math.prod(move.shape) * np.dtype(kept).itemsize
            there = writer.has(move.ours, move.index)
            if not there:
                part = source.tensors[move.theirs].read(move.lead, move.rows())
                part = part if part.dtype == np.dtype(kept) else part.astype(kept)
                if move.entry.form == LINEAR:
                    part = run_files.transposed(part)
                writer.write(move.ours, move.index, part.reshape(move.shape))
            counter.add(size, there)

        with told(counter.state):
            _each(one, found)
        checksums = writer.finish()
        (step / integrity.MANIFEST).write_text(json.dumps(checksums, indent=1))
        if model.vocabulary is not None:
            (work / start.VOCABULARY_FILE).write_bytes(model.vocabulary)
        if model.config:
            write_json(work / KEPT, model.config)
        write_json(work / "config.json", to_dict(settings))
    return counter.report(len({move.theirs for move in found}))


def _each(action: Callable[[Move], None], found: Iterable[Move]) -> None:
    """Two at a time; the first error ends it."""
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for _ in pool.map(action, found):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# Into a Hugging Face directory.


def to_fields(settings: Settings) -> tuple[Family, dict[str, Any]]:
    """(family, their config) of a run's settings.

    Raises:
      ValueError: theirs can't say it; names the field.
    """

    def refuse(field: str, value: Any, accepted: Any) -> None:
        raise ValueError(f"{field}={value}: accepted for a Hugging Face directory is {accepted}")

    if settings.moe.expert_bits:
        refuse("moe.expert_bits", settings.moe.expert_bits, 0)
    if settings.stacks == ("decoder",):
        return decoders.FAMILIES[decoders.kind_of(settings)], decoders.write_config(settings, refuse)
    return t5.family(settings.sparse, settings.model.gated), t5.write_config(settings, refuse)


def into_hugging_face(model: trained.Source, target: Path, dtype: str, limit: int, told: Told) -> Report:
    """Writes a directory that `from_pretrained` loads: config.json, generation_config.json, safetensors, the vocabulary.

    Args:
      dtype: of the tensors; "": float32, as runs have them, or the type a conversion gave them.
      limit: bytes of a shard.

    Raises:
      ValueError: settings that theirs can't say, a damaged step, a target that is there.
    """
    settings, began = model.settings, time.monotonic()
    family, config = to_fields(settings)
    config |= _kept(Path(model.step).parent.parent / KEPT, config["model_type"])
    trained.check(model)
    found = tables.moves(family, settings)
    reader = run_files.Reader(Path(model.step))
    kept = dtype or str(reader.read(f"params/{found[0].ours}", found[0].index).dtype)
    asked = {
        "files": growing.step_identity(Path(model.step)),
        "dtype": kept,
        "limit": limit,
    }
    with growing.grown(target, asked) as work:
        copied = t5.written_copies(settings)
        shapes = {move.theirs: move.whole() for move in found}
        shapes |= {copy: shapes[of] for copy, of in copied.items()}
        shapes = dict(sorted(shapes.items(), key=lambda item: natural(item[0])))
        writer = shards.Writer(work, shapes, kept, limit)
        counter = growing.Counter(writer.total, began)
        log = work / WRITTEN  # a byte a move that is done
        done = log.stat().st_size if log.exists() else 0
        with told(counter.state), log.open("ab", buffering=0) as written:
            for number, move in enumerate(found):  # one parameter after the other, as `Reader` keeps one
                names = move.theirs, *(copy for copy, of in copied.items() if of == move.theirs)
                size = len(names) * math.prod(move.shape) * np.dtype(kept).itemsize
                if number >= done:
                    part = reader.read(f"params/{move.ours}", move.index).astype(kept)
                    if move.entry.form == LINEAR:
                        part = run_files.transposed(part.reshape(math.prod(move.shape[: move.inputs]), -1))
                    for name in names:
                        writer.write(name, part, _first(move))
                    written.write(b".")
                counter.add(size, number < done)
        log.unlink()
        ids = {
            name: config[name]
            for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
            if name in config
        }
        versions = {"torch_dtype": kept, "dtype": kept}
        for name, fields in (("config.json", config | versions), ("generation_config.json", ids)):
            write_json(work / name, fields)
        if model.vocabulary is not None:
            alone = "encoder" not in settings.stacks
            (work / VOCABULARY).write_bytes(model.vocabulary.model_bytes)
            ends = (settings.data.bos_id, None) if alone else (None, settings.data.eos_id)
            for name, content in (tokenizer.files(model.vocabulary, *ends) or {}).items():
                write_json(work / name, content)
    return counter.report(len(shapes))


def _kept(file: Path, kind: str) -> dict[str, Any]:
    """What our settings do not have of the config that a converted model came with."""
    theirs = growing.read_json(file) if file.exists() else {}
    fields = (
        ("max_position_embeddings", "eos_token_id", "pad_token_id")
        if theirs.get("model_type") == kind
        else ()
    )
    return {field: theirs[field] for field in fields if field in theirs}


def _first(move: Move) -> int:
    """The place of the move's part in their tensor, in elements."""
    inner = math.prod(move.whole()[len(move.lead) :])
    return (move.lead[0] * inner if move.lead else 0) + move.entry.part * (inner // move.entry.parts)


def natural(name: str) -> list[tuple[int, str]]:
    """Names in the order of the numbers in them."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.replace("_", ".").split(".")]
