"""Public benchmarks through tfds: a data set is read where it is prepared as array_record (`data.data_dir`); nothing is fetched.

How each is phrased is a file a family: `glue`, `super_glue`, `questions`, `summaries`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from switchmoe.data import sources
from switchmoe.data.errors import DataError
from switchmoe.data.tasks.glue import GLUE
from switchmoe.data.tasks.phrasing import Benchmark, Make, Record
from switchmoe.data.tasks.questions import QUESTIONS
from switchmoe.data.tasks.summaries import SUMMARIES, TRANSLATIONS
from switchmoe.data.tasks.super_glue import SUPER_GLUE
from switchmoe.data.tasks.task import Example, Task
from switchmoe.settings import DataSettings

BENCHMARKS: dict[str, Benchmark] = GLUE | SUPER_GLUE | QUESTIONS | SUMMARIES | TRANSLATIONS


class Records(Sequence):
    """Examples made of a data set's records, or of those to ``keep``, when they are asked for."""

    def __init__(self, source: Any, make: Make, keep: Callable[[Record], bool] | None = None):
        self._source, self._make = source, make
        every = range(len(source))
        self._numbers = [n for n in every if keep(_plain(source[n]))] if keep else every

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return self._make(_plain(self._source[self._numbers[int(index)]]))


def _plain(value: Any) -> Any:
    """Text as str, numbers as Python's."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def task(name: str, data: DataSettings, field: str = "names") -> Task:
    """Raises DataError: tfds has not prepared the data set, or it is not as expected; ``field`` of `task` is where it was named."""
    found, asked = BENCHMARKS[name], f"task.{field}={name}"

    @functools.cache
    def examples(split: str) -> Sequence[Example]:
        wanted = found.train if split == "train" else found.held_out
        try:
            builder = sources.tfds_builder(found.dataset, data.data_dir or sources.cache_directory(data))
            source = builder.as_data_source(wanted, file_format="array_record")
            keep = (found.learnt if split == "train" else None) or found.kept
            return Records(source, _checked(found, asked), keep)
        except (ImportError, KeyError, ValueError, AssertionError, OSError, RuntimeError) as error:
            raise DataError(
                f"{asked}: split {wanted} of {found.dataset} can't be read ({sources.first_line(error)}); accepted is one"
                f" that is prepared: tfds build {found.dataset} --file_format=array_record, and data.data_dir"
            ) from error

    return Task(name, examples, found.metrics, found.options, averaged=found.averaged)


def _checked(found: Benchmark, asked: str) -> Make:
    """Its phrasing, that raises DataError of a record without one of the answers: it would be taught as a word."""

    def make(record: Record) -> Example:
        example = found.make(record)
        if found.options and example.targets not in found.options:
            raise DataError(
                f"{asked}: a record of {found.dataset} has the answer {example.targets!r}; accepted is one of"
                f" {', '.join(found.options)}, as splits with answers have"
            )
        return example

    return make
