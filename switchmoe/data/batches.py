"""Batches of text: an endless, resumable iterator for training, a fixed list to evaluate.

Documents are tokenised, joined without a separator and cut into pieces of the raw length of which the objective
(`objectives`) makes inputs and targets, as T5 does; for a decoder alone (causal_lm) they are joined with EOS after each, so
that rows are packed without padding. A batch is a dictionary of int32 arrays [B, L]: `inputs` and `targets`, or `targets`,
`segments` and `positions`.

Letters: B sequences a batch, N sequences in all, L tokens, V vocabulary.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grain
import grain.experimental
import numpy as np

from switchmoe.data import objectives, prepared
from switchmoe.data.errors import DataError
from switchmoe.data.vocabulary import Vocabulary
from switchmoe.settings import DataSettings

WINDOW = 64  # documents of each stream among which those of a mixture's parts are shuffled
EVAL_SEED = 20170612  # the same held-out examples whatever the run's seed

Batch = dict[str, np.ndarray]


def lengths(settings: DataSettings) -> dict[str, int]:
    """Tokens of a sequence in each stack.

    Raises:
      DataError: as `objectives.lengths`.
    """
    found = objectives.lengths(settings)
    return ({"encoder": found.inputs} if found.inputs else {}) | {"decoder": found.targets}


def array_lengths(lengths: dict[str, int]) -> dict[str, int]:
    """Of a batch's arrays, by their names, from those of the stacks."""
    if "encoder" in lengths:
        return {"inputs": lengths["encoder"], "targets": lengths["decoder"]}
    return dict.fromkeys(("targets", "segments", "positions"), lengths["decoder"])


def tokens_of(text: str, settings: DataSettings, vocabulary: Vocabulary) -> np.ndarray:
    """A document's tokens, as they are joined; none of an empty one."""
    tokens = vocabulary.encode(text)
    if not (len(tokens) and objectives.OBJECTIVES[settings.objective].ends):
        return tokens
    return np.append(tokens, np.asarray(vocabulary.eos_id, tokens.dtype))


def target_length(settings: DataSettings) -> int:
    """Decoder tokens of a sequence."""
    return lengths(settings)["decoder"]


def real_tokens(settings: DataSettings) -> int:
    """Tokens of a sequence, of all stacks, that are no padding."""
    return objectives.lengths(settings).real


def document_order(
    documents: Sequence[str], seed: int, stream: int = 0, streams: int = 1, exponent: float = 1.0
) -> grain.MapDataset:
    """One stream's endless share of the documents, shuffled anew each epoch.

    Within an epoch the streams' shares are disjoint, and together they hold every document once. Where the documents are
    a mixture (`data.parts`) that holds for each part by itself, and a part's share of the order goes with its number of
    documents to the power ``exponent`` (mT5's sampling; 2010.11934, 3.1).
    """

    def endless(records: Sequence[str], *seeds: int) -> grain.MapDataset:
        # Grain adds the epoch to the seed: neighbouring seeds would share their epochs.
        (shuffle_seed,) = np.random.SeedSequence(seeds).generate_state(1)
        return grain.MapDataset.source(records).shuffle(int(shuffle_seed)).repeat()

    parts = getattr(documents, "parts", {})
    if not parts:
        return endless(documents, seed)[stream::streams]
    mixed = grain.MapDataset.mix(
        [
            endless(prepared.Reordered(documents, numbers), seed, number)  # of its own: parts may be aligned
            for number, numbers in enumerate(parts.values())
        ],
        [float(len(numbers)) ** exponent for numbers in parts.values()],
    )
    # Parts take turns in a fixed order, of which a stream would meet some alone.
    window, seed = WINDOW * streams, seed % 2**31  # grain adds the window's number
    return grain.experimental.WindowShuffleMapDataset(mixed, window_size=window, seed=seed)[stream::streams]


def stream_rows(settings: DataSettings) -> np.ndarray:
    """The rows of a global batch that each stream fills: [streams, rows of each], in order."""
    return np.arange(settings.batch_size).reshape(settings.streams or settings.batch_size, -1)


def repeated_rows(settings: DataSettings, documents: int) -> str:
    """A warning where rows of a batch read the same document at once, else ""."""
    streams = settings.streams or settings.batch_size
    if documents >= streams:
        return ""
    fewer = max(n for n in range(1, documents + 1) if settings.batch_size % n == 0)
    return (
        f"warning: {documents} documents for the {settings.batch_size} rows of a batch: with data.streams={settings.streams}"
        f" several rows hold the same text; data.streams={fewer} gives rows that differ (or cut the documents into smaller ones)"
    )


def train_batches(
    settings: DataSettings,
    vocabulary: Vocabulary,
    documents: Sequence[str],
    seed: int,
    streams: Sequence[int] | None = None,
) -> grain.DatasetIterator:
    """An endless iterator of the rows that ``streams`` fill, made ahead in a background thread.

    Documents go round the batch's `data.streams` streams, each of which joins and cuts its own. So the
    global batches depend on the arguments only, not on which process reads which stream; a process reads
    those of its rows. ``get_state`` / ``set_state`` resume exactly; the state is JSON and small, with an
    entry per stream: states of several iterators are joined by `joined_states`, and an iterator takes its
    own streams from a joined one. ``close`` ends the thread.

    Args:
      streams: None: all of them.

    Returns:
      an iterator of batches, with the lengths of `array_lengths`, of the
      rows `stream_rows(settings)[streams]`.

    Raises:
      DataError: no document has any token, or as `objectives.lengths`.
    """
    rows, objective = stream_rows(settings), objectives.OBJECTIVES[settings.objective]
    encode = functools.partial(tokens_of, settings=settings, vocabulary=vocabulary)
    count, raw_length = len(rows), objectives.lengths(settings).raw
    if not any(len(vocabulary.encode(text)) for text in _items(documents)):
        raise DataError(f"data.source={settings.source}: none of its {len(documents)} documents has any text")

    def pieces(stream: int) -> grain.IterDataset:
        # Threads hide a bucket's latency; on a local disk they only get in one another's way.
        threads = -(-16 // count) if "://" in settings.data_dir else 0
        read_options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=8 * threads)
        order = document_order(documents, seed, stream, count, settings.parts_exponent)
        tokens = order.map(encode)
        return _Pieces(tokens.to_iter_dataset(read_options), raw_length)

    mine = list(range(count) if streams is None else streams)

    def batch(number: int, tokens_BL: np.ndarray) -> Batch:
        # What is drawn is of the global batch, so that it does not depend on who reads which rows.
        draws = objective.draws(settings.batch_size, settings, np.random.default_rng((seed, number)))
        return objective.example(tokens_BL, draws[rows[mine].ravel()], settings, vocabulary)

    batches = _Streams({stream: pieces(stream) for stream in mine}, rows.shape[1], batch)
    return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=settings.prefetch))


def joined_states(states: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The state of the iterator that reads all the streams of the iterators whose ``states`` these are."""
    return {stream: state for part in states for stream, state in part.items()}


def eval_batches(
    settings: DataSettings,
    vocabulary: Vocabulary,
    documents: Sequence[str],
    num_batches: int = 0,
    padded: bool = False,
) -> list[Batch]:
    """The first ``num_batches`` full batches of the documents, in their order: always the same ones.

    All processes get the same, global batches. Fewer come back where the documents hold no more.

    Args:
      num_batches: 0: all that the documents hold.
      padded: fills the last batch up with rows of padding; with `causal_lm` the last row as well.

    Raises:
      DataError: the documents do not fill one batch, or where it is padded one sequence.
    """
    raw_length, objective = objectives.lengths(settings).raw, objectives.OBJECTIVES[settings.objective]
    wanted = num_batches * settings.batch_size * raw_length or math.inf
    parts, total = [], 0
    for text in _items(documents):
        parts.append(tokens_of(text, settings, vocabulary))
        total += len(parts[-1])
        if total >= wanted:
            break
    tokens_N = np.concatenate(parts)[: int(min(total, wanted))] if parts else np.zeros(0, np.int32)
    if padded and objective.ends:  # after a document's end padding is nobody's
        tokens_N = np.pad(tokens_N, (0, -len(tokens_N) % raw_length))
    sequences = len(tokens_N) // raw_length
    full = sequences // settings.batch_size
    if not (sequences if padded else full):
        raise DataError(
            f"data.batch_size={settings.batch_size}: the {len(documents)} validation documents of "
            f"{settings.source} fill {sequences} sequences of {raw_length} tokens; accepted is "
            + (f"at most {sequences}" if sequences else "a smaller data.input_length, or more text")
        )
    rows = sequences if padded else full * settings.batch_size
    pieces_NL = tokens_N[: rows * raw_length].reshape(-1, raw_length)
    draws = objective.draws(len(pieces_NL), settings, np.random.default_rng(EVAL_SEED))
    joined = objective.example(pieces_NL, draws, settings, vocabulary)
    missing = -len(pieces_NL) % settings.batch_size
    joined = {name: np.pad(rows, ((0, missing), (0, 0))) for name, rows in joined.items()}
    starts = range(0, len(pieces_NL), settings.batch_size)
    return [{name: rows[n : n + settings.batch_size] for name, rows in joined.items()} for n in starts]


def unigram_cross_entropy(
    train: Iterable[Batch], evaluation: Iterable[Batch], vocab_size: int, num_batches: int
) -> float:
    """Cross-entropy of a model that knows only how frequent tokens are: a baseline.

    ``p(v) = (n_v + 1) / (n + V)``, counted over the target tokens of the first ``num_batches`` batches of
    ``train`` (a fresh iterator, as they are consumed), applied to the target tokens of ``evaluation``;
    pads count nowhere.

    Returns:
      nats per target token.
    """
    counts_V = np.ones(vocab_size)
    for batch in itertools.islice(train, num_batches):
        counts_V += _target_counts(batch, vocab_size)
    seen_V = sum(_target_counts(batch, vocab_size) for batch in evaluation)
    # The pad's row keeps its 1: it is an id like any other, only never seen.
    return float(-(seen_V @ np.log(counts_V / counts_V.sum())) / seen_V.sum())


def rare_shares(evaluation: Iterable[Batch], vocabulary: Vocabulary) -> dict[str, float]:
    """Shares of a text's pieces that say nothing of it: ``unknown``, and ``bytes`` of characters without a piece.

    Counted over the batches, without padding, sentinels, EOS and bare blanks: in a language that a vocabulary does not
    know, a text is blanks and unknown pieces by turns.
    """
    counts_V = np.zeros(vocabulary.size, np.int64)
    for batch in evaluation:
        for tokens in (batch[name] for name in ("inputs", "targets") if name in batch):
            counts_V += np.bincount(tokens.ravel(), minlength=vocabulary.size)
    counts_V[[vocabulary.pad_id, vocabulary.eos_id, *vocabulary.blank_ids]] = 0
    counts_V = counts_V[: vocabulary.pieces]
    total = max(1, counts_V.sum())
    rare = {"unknown": counts_V[vocabulary.unk_id], "bytes": counts_V[vocabulary.byte_ids].sum()}
    return {name: float(count / total) for name, count in rare.items()}


def _target_counts(batch: Batch, vocab_size: int) -> np.ndarray:
    targets = batch["targets"]
    return np.bincount(targets[targets != Vocabulary.pad_id], minlength=vocab_size)


def _items(documents: Sequence[str]) -> Iterator[str]:
    return (documents[position] for position in range(len(documents)))


class _Streams(grain.IterDataset):
    """Puts ``rows`` pieces of each stream below one another; ``batch`` makes a batch of its number and them.

    All rows at once: one by one, most of the time would go into calls of NumPy.
    """

    def __init__(
        self, streams: dict[int, grain.IterDataset], rows: int, batch: Callable[[int, np.ndarray], Batch]
    ):
        super().__init__(list(streams.values()))
        self._streams, self._arguments = streams, (rows, batch)

    def __iter__(self) -> grain.DatasetIterator:
        return _StreamsIterator(
            {stream: iter(parent) for stream, parent in self._streams.items()}, *self._arguments
        )


class _StreamsIterator(grain.DatasetIterator):
    """Each stream's state has the number of the next batch, the same for all: states can be joined."""

    def __init__(
        self, streams: dict[int, grain.DatasetIterator], rows: int, batch: Callable[[int, np.ndarray], Batch]
    ):
        super().__init__(list(streams.values()))
        self._streams, self._rows, self._batch = streams, rows, batch
        self._number = 0

    def __next__(self) -> Batch:
        pieces = [next(stream) for stream in self._streams.values() for _ in range(self._rows)]
        self._number += 1
        return self._batch(self._number - 1, np.stack(pieces))

    def get_state(self) -> dict[str, Any]:
        return {
            str(stream): {"batch": self._number, "pieces": pieces.get_state()}
            for stream, pieces in self._streams.items()
        }

    def set_state(self, state: dict[str, Any]) -> None:
        for stream, pieces in self._streams.items():
            pieces.set_state(state[str(stream)]["pieces"])
            self._number = state[str(stream)]["batch"]


class _Pieces(grain.IterDataset):
    """Joins arrays of tokens and cuts the stream into pieces of one length."""

    def __init__(self, parent: grain.IterDataset, length: int):
        super().__init__(parent)
        self._length = length

    def __iter__(self) -> grain.DatasetIterator:
        return _PieceIterator(iter(self._parent), self._length)


class _PieceIterator(grain.DatasetIterator):
    """Its state is the parent's before the document that is open, and how much of that is used.

    Grain's own ConcatThenSplitIterDataset is not used: it marks "no document is open" with a tuple, which
    is a list after the JSON of a checkpoint, and then a document is lost.
    """

    def __init__(self, parent: grain.DatasetIterator, length: int):
        super().__init__(parent)
        self._length = length
        self._before = parent.get_state()
        self._document = np.zeros(0, np.int32)
        self._used = 0

    def __next__(self) -> np.ndarray:
        parts, missing = [], self._length
        while missing:
            if self._used == len(self._document):
                self._before = self._parent.get_state()
                self._document, self._used = next(self._parent), 0
            parts.append(self._document[self._used : self._used + missing])
            self._used += len(parts[-1])
            missing -= len(parts[-1])
        return np.concatenate(parts)

    def get_state(self) -> dict[str, Any]:
        if self._used == len(self._document):
            return {"parent": self._parent.get_state(), "used": 0}
        return {"parent": self._before, "used": self._used}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._before, self._used = state["parent"], state["used"]
        self._document = next(self._parent) if self._used else np.zeros(0, np.int32)
