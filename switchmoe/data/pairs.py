"""Batches of pairs, inputs and targets, of a mixture of tasks: an endless, resumable iterator for training, fixed batches to evaluate.

An encoder-decoder's batch has `inputs` and `targets`, each row ended by EOS and padded with 0. A decoder alone has both in one row,
`targets`, with `segments` and `positions`, and `loss`, 1 where a token counts: those of the targets.

Letters: B rows a batch, T tasks.
"""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import grain.experimental
import numpy as np

from switchmoe.data.batches import Batch, stream_rows
from switchmoe.data.tasks import Example, Task, expanded
from switchmoe.data.vocabulary import Vocabulary
from switchmoe.settings import DataSettings, TaskSettings

HASHED = 10_000  # examples of a task, by which it is known again


def lengths(data: DataSettings, stacks: Sequence[str]) -> dict[str, int]:
    """Tokens of a row in each stack: `data.input_length`, `data.target_length`, or in a decoder alone both."""
    if "encoder" in stacks:
        return {"encoder": data.input_length, "decoder": data.target_length}
    return {"decoder": data.input_length + data.target_length}


def array_lengths(data: DataSettings, stacks: Sequence[str]) -> dict[str, int]:
    if "encoder" in stacks:
        return {"inputs": data.input_length, "targets": data.target_length}
    return dict.fromkeys(("targets", "segments", "positions", "loss"), data.input_length + data.target_length)


def shares(tasks: Sequence[Task], settings: TaskSettings) -> np.ndarray:
    """[T] A task's share of the rows: ``min(examples, ceiling) ** (1 / temperature)``, normalised (T5, 3.5.2), or as asked."""
    if settings.mixture == "rates":
        rates = zip(
            settings.rates.split(","), expanded(settings), strict=True
        )  # a mixture's is of all its tasks
        rate_T = np.array([float(rate) / len(names) for rate, names in rates for _ in names])
    elif settings.mixture == "equal":
        rate_T = np.ones(len(tasks))
    else:
        size_T = np.array([len(task.examples("train")) for task in tasks], float)
        rate_T = np.minimum(size_T, settings.ceiling or np.inf) ** (1 / settings.temperature)
    return rate_T / rate_T.sum()


class Encoder(NamedTuple):
    """Makes rows of examples."""

    data: DataSettings
    stacks: Sequence[str]
    vocabulary: Vocabulary

    def tokens(self, example: Example) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, without EOS, of which there is room for all: solved examples go one by one, the first first, then ends."""
        inputs = self.vocabulary.encode(example.inputs)
        for shot in reversed(example.shots):
            longer = np.concatenate([self.vocabulary.encode(shot), inputs])
            if len(longer) > self.data.input_length - 1:
                break
            inputs = longer
        targets = self.vocabulary.encode(example.targets)
        return inputs[: self.data.input_length - 1], targets[: self.data.target_length - 1]

    def prompt(self, example: Example) -> np.ndarray:
        """What is read before the answer: an encoder's inputs with EOS, or what a decoder alone begins with and the inputs."""
        inputs, _ = self.tokens(example)
        if "encoder" in self.stacks:
            return np.append(inputs, self.vocabulary.eos_id).astype(np.int32)
        return np.append([self.data.bos_id], inputs).astype(np.int32)

    def is_cut(self, example: Example) -> tuple[bool, bool]:
        """Whether inputs and targets are too long."""
        inputs, targets = self.tokens(example)
        whole = sum(len(self.vocabulary.encode(text)) for text in (*example.shots, example.inputs))
        return whole > len(inputs), len(self.vocabulary.encode(example.targets)) > len(targets)

    def batch(self, examples: Sequence[Example | None]) -> Batch:
        """A row for each example; None: padding."""
        names = array_lengths(self.data, self.stacks)
        found = {name: np.zeros((len(examples), length), np.int32) for name, length in names.items()}
        for row, example in enumerate(examples):
            if example is not None:
                self._fill(found, row, *self.tokens(example))
        return found

    def _fill(self, found: Batch, row: int, inputs: np.ndarray, targets: np.ndarray) -> None:
        end = self.vocabulary.eos_id
        if "encoder" in self.stacks:
            for name, tokens in (("inputs", inputs), ("targets", targets)):
                found[name][row, : len(tokens) + 1] = [*tokens, end]
            return
        whole = [*inputs, *targets, end]
        found["targets"][row, : len(whole)] = whole
        found["segments"][row, : len(whole)] = 1
        found["positions"][row, : len(whole)] = np.arange(len(whole))
        found["loss"][row, len(inputs) : len(whole)] = 1


def train_batches(
    tasks: Sequence[Task], settings: TaskSettings, encoder: Encoder, seed: int, streams: Sequence[int] | None = None
) -> Any:  # fmt: skip
    """An endless iterator of the rows of global batches that these streams fill (`batches.stream_rows`).

    Each batch has of each task what its share leaves owing, in an order drawn anew; each task's examples come in an order drawn
    anew each epoch. State: batches done and each task's examples taken, the same for all streams.
    """
    rows = stream_rows(encoder.data)
    mine = list(range(len(rows))) if streams is None else list(streams)
    batches = _Mixture(tasks, shares(tasks, settings), encoder, seed, mine, rows)
    return iter(
        grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=encoder.data.prefetch)
    )


class _Mixture(grain.IterDataset):
    def __init__(self, *arguments: Any):
        super().__init__()
        self._arguments = arguments

    def __iter__(self) -> grain.DatasetIterator:
        return _MixtureIterator(*self._arguments)


class _MixtureIterator(grain.DatasetIterator):
    def __init__(
        self, tasks: Sequence[Task], share_T: np.ndarray, encoder: Encoder, seed: int, mine: list[int], rows: np.ndarray
    ):  # fmt: skip
        super().__init__()
        self._examples = [task.examples("train") for task in tasks]
        self._share_T, self._encoder, self._seed = share_T, encoder, seed
        self._mine, self._rows = mine, rows
        self._batch, self._taken_T = 0, [0] * len(tasks)
        self._order = functools.lru_cache(maxsize=2 * len(tasks))(self._drawn)

    def __next__(self) -> Batch:
        size, owing_T = self._rows.size, np.array(self._taken_T, float)
        tasks = []
        for _ in range(size):
            task = int(np.argmax(self._share_T * (owing_T.sum() + 1) - owing_T))
            owing_T[task] += 1
            tasks.append(task)
        chosen: list[Example] = []
        for task in tasks:
            chosen.append(self._example(task, self._taken_T[task]))
            self._taken_T[task] += 1
        place = np.random.default_rng((self._seed, self._batch)).permutation(size)
        self._batch += 1
        mine = self._rows[self._mine].ravel()
        return self._encoder.batch([chosen[place[row]] for row in mine])

    def _example(self, task: int, number: int) -> Example:
        examples = self._examples[task]
        epoch, position = divmod(number, len(examples))
        return examples[self._order(task, epoch)[position]]

    def _drawn(self, task: int, epoch: int) -> np.ndarray:
        return np.random.default_rng((self._seed, task, epoch)).permutation(len(self._examples[task]))

    def get_state(self) -> dict[str, Any]:
        return {str(stream): {"batch": self._batch, "taken": list(self._taken_T)} for stream in self._mine}

    def set_state(self, state: dict[str, Any]) -> None:
        one = state[str(self._mine[0])]
        self._batch, self._taken_T = one["batch"], list(one["taken"])


def spread(examples: Sequence[Example], count: int) -> list[Example]:
    """So many of the examples, at equal distances: files are often sorted by class."""
    count = min(count, len(examples))
    return [examples[number * len(examples) // count] for number in range(count)]


def held_out(task: Task, settings: TaskSettings) -> Sequence[Example]:
    """`task.eval_examples` of a task's held-out examples."""
    found = task.examples("validation")
    return spread(found, settings.eval_examples or len(found))


def eval_batches(examples: Sequence[Example], encoder: Encoder) -> Iterator[tuple[Batch, int]]:
    """(a batch, its rows that are no padding) of all the examples, in their order."""
    size = encoder.data.batch_size
    for start in range(0, len(examples), size):
        part = list(examples[start : start + size])
        yield encoder.batch([*part, *[None] * (size - len(part))]), len(part)


def fingerprint(task: Task, split: str) -> str:
    """A hash of a task's examples, the first of them; solved ones before them are examples of the same task."""
    task = task.bare or task
    examples, found = task.examples(split), hashlib.sha256()
    found.update(f"{task.name} {len(examples)}".encode())
    for number in range(min(HASHED, len(examples))):
        found.update("\0".join(examples[number].right + (examples[number].inputs,)).encode())
    return found.hexdigest()


def fitting(
    tasks: Sequence[Task], vocabulary: Vocabulary, share: float = 0.99, sample: int = 1000
) -> tuple[int, int]:
    """Lengths of inputs and targets that hold this share of the examples, of so many of each task: multiples of 8."""
    counts = [
        [len(vocabulary.encode(text)) + 1 for text in (example.prompt, example.targets)]
        for task in tasks
        for example in spread(task.examples("train"), sample)
    ]
    longest = np.quantile(np.array(counts), share, axis=0, method="higher")
    return tuple(int(-(-length // 8) * 8) for length in longest)
