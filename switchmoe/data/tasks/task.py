"""A task: text in, text out, and how answers are judged."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

SPLITS = ("train", "validation")


class Example(NamedTuple):
    """What a model reads, and what it should write."""

    inputs: str
    targets: str
    answers: tuple[str, ...] = ()  # all that are right, where several are; (): the targets alone
    shots: tuple[str, ...] = ()  # solved examples that are read before (`few_shot`)

    @property
    def right(self) -> tuple[str, ...]:
        return self.answers or (self.targets,)

    @property
    def prompt(self) -> str:
        """All that is read."""
        return "".join((*self.shots, self.inputs))


def spread(examples: Sequence[Example], count: int) -> list[Example]:
    """So many of the examples, at equal distances: files are often sorted by class."""
    count = min(count, len(examples))
    return [examples[number * len(examples) // count] for number in range(count)]


@dataclasses.dataclass(frozen=True)
class Task:
    """``examples(split)`` gives those of `train` or `validation`, the same each time and in the same order.

    ``metrics`` are names in `metrics.METRICS`, of which the first is the task's score, or with ``averaged`` their mean, as GLUE and
    SuperGLUE have it for tasks of two. ``options`` are the classes, where
    there are some: then an answer is the likeliest of them as well (rank classification). ``bare`` is the task without the
    solved examples before its questions, where it has some.
    """

    name: str
    examples: Callable[[str], Sequence[Example]]
    metrics: tuple[str, ...]
    options: tuple[str, ...] = ()
    bare: "Task | None" = None
    averaged: bool = False

    @property
    def scored(self) -> tuple[str, ...]:
        """The metrics whose mean is the task's score."""
        return self.metrics if self.averaged else self.metrics[:1]
