"""How an expert lies in its record, on disk and in memory: its kernels one after the other, of integers each with its scales.

Parts begin at multiples of 64 bytes and a record is whole pages, so that a disk reads straight to where a product reads.

Letters: E experts, D rows of a kernel (a product's inputs), F columns, N groups of rows.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import ml_dtypes
import numpy as np

from switchmoe.quantised import SCALE, shapes

FORMS = {"float32": 0, "bfloat16": 0, "int8": 8, "int4": 4, "int2": 2}  # bits, where they are integers
PAGE, ALIGNED = 4096, 64
_TYPES = {"bfloat16": ml_dtypes.bfloat16}


class Part(NamedTuple):
    """A kernel, or its scales."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes

    @property
    def size(self) -> int:
        return math.prod(self.shape) * numpy_type(self.dtype).itemsize

    def of(self, record: np.ndarray) -> np.ndarray:
        """Its view of a record's bytes."""
        raw = record[self.offset : self.offset + self.size]
        return raw.view(numpy_type(self.dtype)).reshape(self.shape)


class Record(NamedTuple):
    form: str
    parts: tuple[Part, ...]
    size: int  # bytes, whole pages

    def part(self, name: str) -> Part:
        return next(part for part in self.parts if part.name == name)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A sparse layer's experts.

    ``kernels``: name and (D, F); ``forms``: of each expert; ``groups``: of each form of integers, rows that share a scale,
    0: all; ``turned``: kernels lie as [F, D], as products of few rows read them.
    """

    name: str
    kernels: tuple[tuple[str, tuple[int, int]], ...]
    forms: tuple[str, ...]
    groups: tuple[tuple[str, int], ...] = ()
    turned: bool = False

    @functools.cached_property
    def records(self) -> dict[str, Record]:
        """By form, in the order of FORMS."""
        return {form: self._record(form) for form in FORMS if form in self.forms}

    def record(self, expert: int) -> Record:
        return self.records[self.forms[expert]]

    @functools.cached_property
    def stride(self) -> int:
        return max(record.size for record in self.records.values())

    def _record(self, form: str) -> Record:
        bits, group, parts, offset = FORMS[form], dict(self.groups).get(form, 0), [], 0
        for name, (rows, columns) in self.kernels:
            if bits:
                codes, scales = shapes((1, rows, columns), bits, group)
                kinds = [(name, "int8", codes[1:]), (name + SCALE, "float32", scales[1:])]
            else:
                kinds = [(name, form, (columns, rows) if self.turned else (rows, columns))]
            for kind in kinds:
                parts.append(Part(*kind, offset))
                offset = rounded(offset + parts[-1].size, ALIGNED)
        return Record(form, tuple(parts), rounded(offset, PAGE))

    def as_form(self, form: str) -> "Layer":
        """The same layer with its numbers, where they are not integers, in another type."""
        forms = tuple(old if FORMS[old] else form for old in self.forms)
        return dataclasses.replace(self, forms=forms)


def rounded(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def numpy_type(name: str) -> np.dtype:
    return np.dtype(_TYPES.get(name, name))
