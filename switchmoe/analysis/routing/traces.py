"""A routing trace: a directory of Parquet files with a row for each token and sparse layer, and what says how to read them.

    trace.json            `Info`: who chose, what, and whether the trace is complete
    tokens.json           the vocabulary: a string for each id ("\\u2581" is a blank); may be missing
    part-00000.parquet    rows of whole sequences, the layers one after the other (a row group each); `COLUMNS`

docs/routing_traces.md says it for those who write traces with other systems. The directory's parts are written one at a
time, each at once or not at all: what is there can be read, and a trace that was stopped goes on.

Letters: N tokens, K choices of a token, E experts.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_origin

import numpy as np

FORMAT, VERSION = "switchmoe routing trace", 1
INFO_FILE, TOKENS_FILE = "trace.json", "tokens.json"
FEED_FORWARD, ATTENTION = "feed_forward", "attention"
COLUMNS = {  # name: what it holds, of which type
    "document": "int32: number of the document, from 0",
    "sequence": "int32: number of the sequence that the model read at once, from 0",
    "position": "int32: place in the sequence, from 0",
    "token": "int32: the id that was read here, -1 unknown",
    "target": "int32: the id that was to be predicted here, -1 none",
    "predicted": "int32: the id that was likeliest here, -1 unknown",
    "label": "string: what the document is of (topic, language), null unknown",
    "stack": "string: encoder or decoder",
    "layer": "int16: number of the block in its stack, from 0",
    "part": "string: feed_forward or attention",
    "expert": "list of K int16: the chosen experts, best first, -1 where there are fewer",
    "gate": "list of K float32: what the expert's output was multiplied by; 0 if dropped; NaN unknown",
    "kept": "list of K bool: whether the choice found a slot",
    "margin": "float32: by how much the last choice is ahead of the best expert not chosen, in what is ranked; NaN unknown",
    "entropy": "float32: of the router's distribution, nats; NaN unknown",
    "confidence": "float32: the distribution's largest value; NaN unknown",
    "probability": "list of E float32: the distribution; the column is there on request",
}
LATER = {  # of an `Info`'s identity and reading: what traces of before lack
    "checkpoint", "validation_share", "split_field", "train_split", "validation_split", "data_dir",
}  # fmt: skip
REQUIRED = ("sequence", "position", "stack", "layer", "expert")


class LayerName(NamedTuple):
    """Of a sparse layer."""

    stack: str
    layer: int
    part: str = FEED_FORWARD

    def __str__(self) -> str:
        return f"{self.stack}/{self.layer}" + ("" if self.part == FEED_FORWARD else f"/{self.part}")

    @classmethod
    def parse(cls, text: str) -> "LayerName":
        """Of `transformer.sparse_layer_names`."""
        stack, layer, *part = text.split("/")
        return cls(stack, int(layer), *part)


@dataclasses.dataclass(frozen=True)
class Info:
    """What `trace.json` says.

    ``layers`` are in the order in which a token meets them; ``identity`` is all that the trace depends on, by name:
    another trace has the same tokens if its ``reading`` is the same.
    """

    layers: tuple[LayerName, ...]
    num_experts: int
    choices: int  # K, the longest list of a token's experts
    system: str = "switchmoe"
    source: str = ""
    text: str = ""
    label: str = ""  # what the labels are: topic, language
    sentinels: tuple[int, int] = (0, 0)  # ids from .. to, the latter left out
    reading: dict[str, Any] = dataclasses.field(default_factory=dict)
    identity: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokens: int = 0  # read by the model, all stacks
    complete: bool = False
    guessed: bool = False  # num_experts is the largest index and one, as nothing told of it


class Layer(NamedTuple):
    """One sparse layer's rows, in the order of sequences and positions. The docstrings of `COLUMNS` hold."""

    name: LayerName
    num_experts: int
    document_N: np.ndarray
    sequence_N: np.ndarray
    position_N: np.ndarray
    token_N: np.ndarray
    target_N: np.ndarray
    predicted_N: np.ndarray
    label_N: np.ndarray  # int32, number of the label in ``labels``, -1 without
    expert_NK: np.ndarray
    gate_NK: np.ndarray
    kept_NK: np.ndarray
    margin_N: np.ndarray
    entropy_N: np.ndarray
    confidence_N: np.ndarray
    probability_NE: np.ndarray | None = None
    labels: tuple[str, ...] = ()

    def take(self, rows: np.ndarray) -> "Layer":
        """Some of the rows, or all in another order."""
        own = {
            name: value[rows] for name, value in self._asdict().items() if name[-2:] in ("_N", "NK", "NE") and value is not None
        }  # fmt: skip
        return self._replace(**own)

    def of_choices(self, other: "Layer") -> "Layer":
        """These tokens with the other's choices."""
        names = ("expert_NK", "gate_NK", "kept_NK", "margin_N", "entropy_N", "confidence_N", "probability_NE")
        return self._replace(**{name: getattr(other, name) for name in names})


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of identities or readings that are not the same; of those in `LATER` one may lack what the other has."""
    names = {name for name in {**one, **other} if name not in LATER or name in one and name in other}
    return sorted(name for name in names if one.get(name) != other.get(name))


def write_info(directory: Path, info: Info) -> None:
    """At once, or not at all."""
    found = {"format": FORMAT, "version": VERSION} | dataclasses.asdict(info)
    found["layers"] = [layer._asdict() for layer in info.layers]
    _write(directory / INFO_FILE, json.dumps(found, indent=1).encode())


def write_tokens(directory: Path, tokens: Sequence[str]) -> None:
    _write(directory / TOKENS_FILE, json.dumps(list(tokens), ensure_ascii=False).encode("utf-8", "replace"))


def read_info(directory: str | os.PathLike) -> Info:
    """Raises ValueError: there is no trace, one of another kind, or a field is not of its type; null is a field left out."""
    path = Path(directory) / INFO_FILE
    accepted = f"accepted is a directory with a {INFO_FILE} of version {VERSION}, see docs/routing_traces.md"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if (found.pop("format"), found.pop("version")) != (FORMAT, VERSION):
            raise ValueError("another format or version")
        layers = tuple(LayerName(**layer) for layer in found.pop("layers"))
        known = {field.name for field in dataclasses.fields(Info)}
        info = Info(layers, **{name: of for name, of in found.items() if name in known and of is not None})
        info = dataclasses.replace(info, sentinels=tuple(info.sentinels))
        _check(info)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"--trace={directory}: not a trace ({error!r}); {accepted}") from error
    return info


def _check(info: Info) -> None:
    """Raises ValueError: a field is not of its type, or less than is possible."""
    for field in dataclasses.fields(info):
        kind, value = get_origin(field.type) or field.type, getattr(info, field.name)
        if not isinstance(value, int if kind is bool else kind):
            raise ValueError(f"{field.name}={value!r}, no {kind.__name__}")
    for name in ("num_experts", "choices"):
        if getattr(info, name) < 1:
            raise ValueError(f"{name}={getattr(info, name)}, less than 1")
    if [type(token) for token in info.sentinels] != [int, int]:
        raise ValueError(f"sentinels={list(info.sentinels)}, not two ids")
    for name in info.layers:
        if [type(value) for value in name] != [str, int, str]:
            raise ValueError(f"layers: {name._asdict()}, not a string, an integer and a string")


def read_tokens(directory: str | os.PathLike) -> list[str]:
    """The vocabulary's strings by id; [] where the trace has none."""
    path = Path(directory) / TOKENS_FILE
    if not path.exists():
        return []
    try:
        return [str(token) for token in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not JSON ({error}); accepted is a list of strings") from error


def parts(directory: str | os.PathLike) -> list[Path]:
    """The files of rows, in their order."""
    return sorted(Path(directory).glob("part-*.parquet"))


def write_part(path: Path, layers: Sequence[Layer], metadata: dict[str, str] | None = None) -> None:
    """A file of rows, a row group for each layer; at once, or not at all.

    Args:
      metadata: of the file, for whoever continues the trace.
    """
    import pyarrow.parquet

    temporary = path.with_name(f".{path.name}")
    writer = None
    for layer in layers:
        table = _table(layer)
        if writer is None:
            schema = table.schema.with_metadata(metadata or {})
            # Of what comes at random, dictionaries and statistics cost time and save nothing.
            few = [name for name in ("stack", "layer", "part", "label", "document") if name in schema.names]
            writer = pyarrow.parquet.ParquetWriter(temporary, schema, compression="zstd", use_dictionary=few)
        writer.write_table(table.cast(schema), row_group_size=max(1, len(table)))
    writer.close()
    os.replace(temporary, path)


def part_metadata(path: Path) -> dict[str, str]:
    """What `write_part` was given."""
    import pyarrow.parquet

    found = pyarrow.parquet.read_schema(path).metadata or {}
    return {name.decode(): value.decode() for name, value in found.items()}


def read_layer(directory: str | os.PathLike, name: LayerName, tokens: int = 0) -> Layer:
    """The rows of one sparse layer, the first ``tokens`` of them (0: all).

    Raises:
      ValueError: a column is missing or not of its type.
    """
    import pyarrow
    import pyarrow.parquet

    info = read_info(directory)
    wanted = [("stack", "=", name.stack), ("layer", "=", name.layer)]
    tables, rows = [], 0
    try:
        for path in parts(directory):
            names = pyarrow.parquet.read_schema(path).names
            missing = [column for column in REQUIRED if column not in names]
            if missing:
                raise ValueError(
                    f"{path}: no column {missing[0]}; accepted are those of docs/routing_traces.md"
                )
            part = [("part", "=", name.part)] if "part" in names else []
            tables.append(pyarrow.parquet.read_table(path, filters=wanted + part))
            rows += len(tables[-1])
            if tokens and rows >= tokens:
                break
        table = pyarrow.concat_tables(tables, promote_options="default") if tables else None
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--trace={directory}: cannot be read ({reason}); accepted is a complete one"
        ) from error
    if not rows:
        raise ValueError(
            f"--trace={directory}: no row of {name}; accepted is a trace with rows of each layer"
        )
    layer = _layer(table, name, info)
    order = np.lexsort((layer.position_N, layer.sequence_N))
    layer = layer if (np.diff(order) == 1).all() else layer.take(order)
    return layer.take(slice(tokens)) if tokens else layer


def same_rows(one: Layer, other: Layer, columns: Sequence[str] = ("sequence_N", "position_N")) -> bool:
    """Whether the rows of two layers are of the same tokens, as these columns say."""
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in columns)


def check_rows(one: Layer, other: Layer) -> None:
    """Raises ValueError: two layers of a stack have not rows of the same tokens."""
    if not same_rows(one, other):
        raise ValueError(
            f"--trace: {other.name} has rows of other tokens than {one.name} ({len(other.token_N)} and {len(one.token_N)});"
            " accepted is a trace with a row of each token in each layer of its stack"
        )


def _table(layer: Layer) -> Any:
    import pyarrow as pa

    count = len(layer.sequence_N)

    def constant(text: str) -> pa.DictionaryArray:
        return pa.DictionaryArray.from_arrays(np.zeros(count, np.int32), [text])

    def lists(values: np.ndarray, kind: pa.DataType) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(
            pa.array(np.ascontiguousarray(values).ravel(), kind), values.shape[1]
        )

    plain = ("document", "sequence", "position", "token", "target", "predicted")
    columns = {name: pa.array(getattr(layer, f"{name}_N"), pa.int32()) for name in plain}
    labels = pa.array(np.maximum(layer.label_N, 0), pa.int32(), mask=layer.label_N < 0)
    columns["label"] = pa.DictionaryArray.from_arrays(labels, pa.array(layer.labels or ("",), pa.string()))
    columns |= {
        "stack": constant(layer.name.stack),
        "layer": pa.array(np.full(count, layer.name.layer), pa.int16()),
    }
    columns["part"] = constant(layer.name.part)
    columns["expert"] = lists(layer.expert_NK, pa.int16())
    columns["gate"] = lists(layer.gate_NK, pa.float32())
    columns["kept"] = lists(layer.kept_NK, pa.bool_())
    for name in ("margin", "entropy", "confidence"):
        columns[name] = pa.array(getattr(layer, f"{name}_N"), pa.float32())
    if layer.probability_NE is not None:
        columns["probability"] = lists(layer.probability_NE, pa.float32())
    return pa.table(columns)


@contextlib.contextmanager
def _of_its_type(table: Any, name: LayerName, column: str) -> Iterator[None]:
    """Raises ValueError where a column is not what `COLUMNS` says."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, TypeError) as error:
        kind = table.schema.field(column).type
        raise ValueError(f"--trace: {name}: {column} is {kind}; accepted is {COLUMNS[column]}") from error


def _layer(table: Any, name: LayerName, info: Info) -> Layer:
    import pyarrow as pa

    def numbers(column: str, missing: float, kind: type) -> np.ndarray:
        if column not in table.column_names:
            return np.full(len(table), missing, kind)
        with _of_its_type(table, name, column):
            return table[column].fill_null(missing).to_numpy().astype(kind)

    def lists(column: str, missing: float, kind: type, width: int) -> np.ndarray:
        if column not in table.column_names:
            return np.full((len(table), width), missing, kind)
        joined = table[column].combine_chunks()
        with _of_its_type(table, name, column):
            sizes = pa.compute.list_value_length(joined).fill_null(0).to_numpy()
            flat = joined.flatten().fill_null(missing).to_numpy(zero_copy_only=False).astype(kind)
        if (sizes == width).all():
            return flat.reshape(-1, width)
        if sizes.max() > width:
            raise ValueError(f"{name}: a list of {sizes.max()} in {column}; accepted is at most {width}")
        found = np.full((len(table), width), missing, kind)
        found[np.arange(width)[None] < sizes[:, None]] = flat
        return found

    expert_NK = lists("expert", -1, np.int32, info.choices)
    if expert_NK.max() >= info.num_experts or expert_NK.min() < -1:
        raise ValueError(f"{name}: expert {expert_NK.max()}; accepted are 0 to {info.num_experts - 1}, or -1")
    labels: tuple[str, ...] = ()
    label_N = np.full(len(table), -1, np.int32)
    if "label" in table.column_names:
        with _of_its_type(table, name, "label"):
            texts = table["label"].cast(pa.string()).combine_chunks().dictionary_encode()
        label_N = texts.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32)
        labels = tuple(texts.dictionary.to_pylist())
    sequence_N = numbers("sequence", 0, np.int32)
    return Layer(
        name,
        info.num_experts,
        numbers("document", 0, np.int32) if "document" in table.column_names else sequence_N,
        sequence_N,
        *(numbers(column, -1, np.int32) for column in ("position", "token", "target", "predicted")),
        label_N,
        expert_NK,
        lists("gate", np.nan, np.float32, info.choices),
        lists("kept", True, bool, info.choices) & (expert_NK >= 0),
        *(numbers(column, np.nan, np.float32) for column in ("margin", "entropy", "confidence")),
        lists("probability", 0.0, np.float32, info.num_experts)
        if "probability" in table.column_names
        else None,
        labels,
    )


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
