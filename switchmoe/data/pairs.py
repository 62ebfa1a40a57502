"""Batches of pairs, inputs and targets, of a mixture of tasks: an endless, resumable iterator for training, fixed batches to evaluate.

An encoder-decoder's batch has `inputs` and `targets`, each row ended by EOS and padded with 0. A decoder alone has both in one row,
`targets`, with `segments` and `positions`, and `loss`, 1 where a token counts: those of the targets. With `task.filled` or `task.packed` above 1 a row of
training holds several examples, which do not see each other; an encoder-decoder's has `input_segments`, `segments` and `positions`, too.

Letters: B rows a batch, R rows, S stacks, T tasks.
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
from switchmoe.data.tasks.task import spread
from switchmoe.data.vocabulary import Vocabulary
from switchmoe.settings import DataSettings, TaskSettings

HASHED = 10_000  # examples of a task, by which it is known again


def lengths(data: DataSettings, stacks: Sequence[str], fill: int = 0) -> dict[str, int]:
    """Tokens of a row in each stack: `data.input_length`, `data.target_length`, or in a decoder alone both; `TaskSettings.fill` times."""
    times = fill or 1
    if "encoder" in stacks:
        return {"encoder": times * data.input_length, "decoder": times * data.target_length}
    return {"decoder": times * (data.input_length + data.target_length)}


def array_lengths(data: DataSettings, stacks: Sequence[str], fill: int = 0) -> dict[str, int]:
    of = lengths(data, stacks, fill)
    if "encoder" not in stacks:
        return dict.fromkeys(("targets", "segments", "positions", "loss"), of["decoder"])
    found = {"inputs": of["encoder"], "targets": of["decoder"]}
    if fill:
        found |= {"input_segments": of["encoder"], "segments": of["decoder"], "positions": of["decoder"]}
    return found


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
        size_T = np.minimum(size_T, settings.ceiling or np.inf)
        scale = size_T.max() if settings.temperature < 1 else 1.0  # a power above 1 of a size might overflow
        rate_T = (size_T / scale) ** (1 / settings.temperature)
    return rate_T / rate_T.sum()


Pair = tuple[np.ndarray, np.ndarray]  # tokens of the inputs and of the targets, without EOS


class Encoder(NamedTuple):
    """Makes rows of examples."""

    data: DataSettings
    stacks: Sequence[str]
    vocabulary: Vocabulary

    def tokens(self, example: Example) -> Pair:
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
        return self.rows([[] if example is None else [self.tokens(example)] for example in examples], 0)

    def rows(self, rows: Sequence[Sequence[Pair]], fill: int) -> Batch:
        """A row for each sequence of pairs, `lengths` with ``fill``, in which they follow one another."""
        names = array_lengths(self.data, self.stacks, fill)
        found = {name: np.zeros((len(rows), length), np.int32) for name, length in names.items()}
        for row, pairs in enumerate(rows):
            used = dict.fromkeys(found, 0)
            for number, pair in enumerate(pairs, 1):
                for name, values in self._arrays(pair, number).items():
                    if name in found:
                        found[name][row, used[name] : used[name] + len(values)] = values
                        used[name] += len(values)
        return found

    def sizes(self, pair: Pair) -> tuple[int, int]:
        """Tokens of each stack, or of a decoder alone all and those of the targets, which are predicted."""
        inputs, targets = map(len, pair)
        return (inputs + 1 if "encoder" in self.stacks else inputs + targets + 1, targets + 1)

    def room(self, fill: int) -> tuple[int, int]:
        """For `sizes` in a row."""
        first, *rest = lengths(self.data, self.stacks, fill).values()
        return first, *(rest or [self.data.most_predicted(first)])

    def _arrays(self, pair: Pair, number: int) -> dict[str, Any]:
        """Of the pair of this number in its row."""
        inputs, targets = pair
        end = self.vocabulary.eos_id
        if "encoder" in self.stacks:
            read, whole = [*inputs, end], [*targets, end]
            own = {"inputs": read, "input_segments": [number] * len(read)}
        else:
            whole = [*inputs, *targets, end]
            own = {"loss": [0] * len(inputs) + [1] * (len(targets) + 1)}
        places = {"segments": [number] * len(whole), "positions": range(len(whole))}
        return own | {"targets": whole} | places


def train_batches(
    tasks: Sequence[Task], settings: TaskSettings, encoder: Encoder, seed: int, streams: Sequence[int] | None = None
) -> Any:  # fmt: skip
    """An endless iterator of the rows of global batches that these streams fill (`batches.stream_rows`).

    Each batch has of each task what its share leaves owing, in an order drawn anew; each task's examples come in an order drawn
    anew each epoch. State: batches done and each task's examples taken, the same for all streams.
    """
    rows = stream_rows(encoder.data)
    mine = list(range(len(rows))) if streams is None else list(streams)
    batches = _Mixture(tasks, settings, encoder, seed, mine, rows)
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
        self, tasks: Sequence[Task], settings: TaskSettings, encoder: Encoder, seed: int, mine: list[int], rows: np.ndarray
    ):  # fmt: skip
        super().__init__()
        self._examples = [task.examples("train") for task in tasks]
        self._share_T, self._fill = shares(tasks, settings), settings.fill
        self._encoder, self._seed = encoder, seed
        self._mine, self._rows = mine, rows
        self._batch, self._taken_T = 0, [0] * len(tasks)
        self._order = functools.lru_cache(maxsize=2 * len(tasks))(self._drawn)

    def __next__(self) -> Batch:
        size = self._rows.size
        rows = self._full() if self._fill else [[self._take(self._next())] for _ in range(size)]
        place = np.random.default_rng((self._seed, self._batch)).permutation(size)
        self._batch += 1
        mine = [rows[place[row]] for row in self._rows[self._mine].ravel()]
        if self._fill:
            return self._encoder.rows(mine, self._fill)
        return self._encoder.batch([example for (example,) in mine])

    def _full(self) -> list[list[Pair]]:
        """Pairs in the mixture's order, each in the first row that has room for it, up to the first that finds none."""
        rows: list[list[Pair]] = [[] for _ in range(self._rows.size)]
        left_RS = np.tile(self._encoder.room(self._fill), (len(rows), 1))
        while True:
            task = self._next()
            pair = self._encoder.tokens(self._example(task, self._taken_T[task]))
            sizes_S = self._encoder.sizes(pair)
            fits_R = (left_RS >= sizes_S).all(axis=1)
            if not fits_R.any():
                return rows
            row = int(np.argmax(fits_R))
            rows[row].append(pair)
            left_RS[row] -= sizes_S
            self._taken_T[task] += 1

    def _next(self) -> int:
        """The task that is owed most of the rows."""
        return int(np.argmax(self._share_T * (sum(self._taken_T) + 1) - self._taken_T))

    def _take(self, task: int) -> Example:
        self._taken_T[task] += 1
        return self._example(task, self._taken_T[task] - 1)

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


def filling(
    tasks: Sequence[Task], settings: TaskSettings, encoder: Encoder, seed: int, batches: int = 4
) -> tuple[float, float]:
    """(examples a row, the share of places that are padding) of the first batches of training."""
    rows = stream_rows(encoder.data)
    mixture = _MixtureIterator(tasks, settings, encoder, seed, list(range(len(rows))), rows)
    found = [next(mixture) for _ in range(batches)]
    names = found[0].keys() & {"inputs", "targets"}
    real, places = (
        sum(count(batch[name]) for batch in found for name in names) for count in (np.count_nonzero, np.size)
    )
    return sum(mixture.get_state()["0"]["taken"]) / (batches * rows.size), float(1 - real / places)


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
