"""Few-shot prompts: solved examples of the same task before a question."""

import dataclasses
import functools
import random
from collections.abc import Sequence
from typing import Any

from switchmoe.data.errors import DataError
from switchmoe.data.tasks.task import Example, Task

SIGN = "@"  # topic@2: the task topic, with two solved examples before each question


def parted(name: str) -> tuple[str, int]:
    """(the task's own name, solved examples): ``topic@2`` -> ``topic``, 2; 0 where none are asked for."""
    own, sign, count = name.rpartition(SIGN)
    return (own, int(count)) if sign and count.isdecimal() else (name, 0)


def with_shots(task: Task, count: int, asked: str) -> Task:
    """The task `NAME@count`: before each question so many of the training examples, drawn for it once and for all.

    A held-out question has training examples before it, too; a training example is never before itself.

    Raises:
      DataError: the task has too few training examples; begins with what was ``asked`` for, FIELD=VALUE.
    """
    if not count:
        return task
    train = len(task.examples("train"))
    if train <= count:
        raise DataError(
            f"{asked}: {task.name} has {train} training examples; accepted are fewer solved ones than that"
        )
    examples = functools.cache(functools.partial(_Shown, task, count))
    return dataclasses.replace(task, name=f"{task.name}{SIGN}{count}", examples=examples, bare=task)


class _Shown(Sequence):
    """Made when they are asked for."""

    def __init__(self, task: Task, count: int, split: str):
        self._examples, self._train = task.examples(split), task.examples("train")
        self._key, self._count, self._split = f"{task.name} {split}", count, split

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        drawn = random.Random(f"{self._key} {number}").sample(range(len(self._train)), self._count + 1)
        own = number if self._split == "train" else -1
        shots = [self._train[other] for other in drawn if other != own][: self._count]
        example: Example = self._examples[number]
        texts = tuple(f"Question: {shot.inputs}\nAnswer: {shot.targets}\n\n" for shot in shots)
        return example._replace(inputs=f"Question: {example.inputs}\nAnswer:", shots=texts)
