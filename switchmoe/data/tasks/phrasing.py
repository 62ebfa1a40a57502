"""What a public benchmark is, and the phrasing that most of those with classes share (T5, 1910.10683, section 2.4)."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from switchmoe.data.tasks.task import Example

Record = dict[str, Any]
Make = Callable[[Record], Example]


class Benchmark(NamedTuple):
    dataset: str  # tfds's name
    make: Make
    metrics: tuple[str, ...]
    options: tuple[str, ...] = ()
    held_out: str = "validation"  # tfds's name of the split
    train: str = "train"
    averaged: bool = False  # the score is the mean of the metrics
    learnt: Callable[[Record], bool] | None = None  # of which records a model is taught; None: all
    kept: Callable[[Record], bool] | None = None  # the records that are asked at all; None: all


def classes(name: str, fields: Sequence[str], labels: Sequence[str]) -> Make:
    """``name field1: ... field2: ...`` -> the label's word, `<unk>` of a label that is none."""

    def make(record: Record) -> Example:
        text = " ".join(f"{field}: {record[field]}" for field in fields)
        label = record["label"]
        return Example(f"{name} {text}", labels[label] if 0 <= label < len(labels) else "<unk>")

    return make


def benchmark(
    dataset: str, name: str, fields: Sequence[str], labels: Sequence[str], metrics: Sequence[str] = ("accuracy",), held_out: str = "validation"
) -> Benchmark:  # fmt: skip
    """One of `classes`; of several metrics the score is their mean."""
    make, averaged = classes(name, fields, labels), len(metrics) > 1
    return Benchmark(dataset, make, tuple(metrics), tuple(labels), held_out, averaged=averaged)
