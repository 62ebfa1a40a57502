"""Text whose every token is known to be of which document: for traces of what a model does with each.

Letters: B sequences a batch, L tokens.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from switchmoe.data import batches, local_files, objectives, prepared, sources
from switchmoe.data.errors import DataError
from switchmoe.data.vocabulary import Vocabulary
from switchmoe.settings import DataSettings

FILE, TOPIC = "file", "topic"
Labelled = tuple[str, str]  # a document and its label, "" without one


class Origin(NamedTuple):
    """A batch, and of each of its arrays the number of the document that a token is of, from 0; -1 of padding."""

    batch: batches.Batch
    document: dict[str, np.ndarray]  # int32 [B, L] by the array's name
    labels: list[str]  # of the documents met so far, by their numbers


def labelled(settings: DataSettings, split: str, label: str = "", share: float = 1.0) -> Iterator[Labelled]:
    """The documents of `data.source`, one at a time; of local files none is kept.

    Args:
      split: ``all`` of them, or those of ``validation``, held out of training.
      label: ``topic`` of the embedded corpus; of local files ``file`` (the file's name) or a field of their records.
      share: of the documents, evenly by a hash of their text.

    Raises:
      DataError: the text can't be read, or has no such label.
    """
    found = _documents(settings, split, label)
    # Another hash than that which holds documents out.
    return found if share >= 1 else (one for one in found if local_files.fraction(f"share {one[0]}") < share)


def _documents(settings: DataSettings, split: str, label: str) -> Iterator[Labelled]:
    if settings.source == sources.EMBEDDED:
        _refuse(label not in ("", TOPIC), label, settings, "topic")
        return _embedded(split, bool(label))
    if local_files.is_local(settings.source):
        return _local(settings, split, label)
    _refuse(bool(label), label, settings, "'' with a dataset of tfds")
    found = sources.load_splits(settings)
    names = prepared.SPLITS if split == "all" else [split]
    return ((found[name][index], "") for name in names for index in range(len(found[name])))


def traced(settings: DataSettings, vocabulary: Vocabulary, documents: Iterable[Labelled]) -> Iterator[Origin]:
    """The documents' batches in their order, the last one padded; as `batches.eval_batches` but a batch at a time.

    What is drawn depends on the batch's number alone, so that a reader may leave out batches that it has had.

    Raises:
      DataError: the documents do not fill one sequence, or as `objectives.lengths`.
    """
    raw, ends = objectives.lengths(settings).raw, objectives.OBJECTIVES[settings.objective].ends
    size, labels = raw * settings.batch_size, []
    tokens, owners, waiting, number = [], [], 0, 0
    for document, (text, label) in enumerate(documents):
        labels.append(label)
        tokens.append(batches.tokens_of(text, settings, vocabulary))
        owners.append(np.full(len(tokens[-1]), document, np.int32))
        waiting += len(tokens[-1])
        if waiting < size:
            continue
        joined = np.concatenate(tokens), np.concatenate(owners)
        while waiting >= size:
            yield _origin(settings, vocabulary, *(part[:size] for part in joined), number, labels)
            joined, waiting, number = tuple(part[size:] for part in joined), waiting - size, number + 1
        tokens, owners = [joined[0]], [joined[1]]
    rest = [np.concatenate(part) if part else np.zeros(0, np.int32) for part in (tokens, owners)]
    if ends and waiting:
        rest = [np.pad(rest[0], (0, -waiting % raw)), np.pad(rest[1], (0, -waiting % raw), "edge")]
    rows = len(rest[0]) // raw
    if rows:
        yield _origin(settings, vocabulary, *(part[: rows * raw] for part in rest), number, labels)
    elif not number:
        raise DataError(
            f"data.input_length={settings.input_length}: the {len(labels)} documents of {settings.source} do not fill one"
            f" sequence, {waiting} of {raw} tokens; accepted is a smaller one, or more text"
        )


def _origin(
    settings: DataSettings, vocabulary: Vocabulary, tokens_N: np.ndarray, owner_N: np.ndarray, number: int, labels: list[str]
) -> Origin:  # fmt: skip
    raw, objective = objectives.lengths(settings).raw, objectives.OBJECTIVES[settings.objective]
    rng = np.random.default_rng((batches.EVAL_SEED, number))
    draws = objective.draws(settings.batch_size, settings, rng)[: len(tokens_N) // raw]

    def made(values_N: np.ndarray) -> batches.Batch:
        return objective.example(values_N.reshape(-1, raw), draws, settings, vocabulary)

    # Numbers of documents go the tokens' way, above all ids: what is below was put in by the objective.
    batch, owners = made(tokens_N), made(owner_N + vocabulary.size)
    owned = {
        name: _filled(owners[name] - vocabulary.size, batch[name] != vocabulary.pad_id)
        for name in ("inputs", "targets")
        if name in batch
    }
    missing = ((0, settings.batch_size - len(draws)), (0, 0))
    batch = {name: np.pad(rows, missing) for name, rows in batch.items()}
    return Origin(
        batch, {name: np.pad(rows, missing, constant_values=-1) for name, rows in owned.items()}, labels
    )


def _filled(owner_BL: np.ndarray, real_BL: np.ndarray) -> np.ndarray:
    """What is no text (a sentinel, EOS) is of the document of the text before it, at a row's start of that after."""
    place_L = np.arange(owner_BL.shape[1])[None]
    text_BL = (owner_BL >= 0) & real_BL
    last_BL = np.maximum.accumulate(np.where(text_BL, place_L, -1), axis=1)
    first_B1 = text_BL.argmax(axis=1)[:, None]
    from_BL = np.where(last_BL < 0, first_B1, last_BL)
    return np.where(real_BL, np.take_along_axis(owner_BL, from_BL, axis=1), -1).astype(np.int32)


def _embedded(split: str, topics: bool) -> Iterator[Labelled]:
    from switchmoe.data.wiki_vital_en import builder

    # By their titles' hashes: as packaged, they are sorted by topic.
    for record in sorted(builder.records(), key=lambda record: local_files.fraction(record["title"])):
        if split in ("all", builder.split_of(record["title"])):
            yield record["text"], record["topic"] if topics else ""


def _local(settings: DataSettings, split: str, label: str) -> Iterator[Labelled]:
    paths = local_files.paths(settings.source)
    field = "" if label in ("", FILE) else label
    _refuse(
        bool(field and split != "all" and settings.split_field), label, settings, "'' where data.split_field holds records out"
    )  # fmt: skip
    names = local_files.part_names(paths, settings) if label == FILE else []
    asked = dataclasses.replace(settings, split_field=field or settings.split_field)
    keep: Callable[[float], bool] = lambda place: split == "all" or place < settings.validation_share  # noqa: E731
    try:
        for number, text, key in local_files.Reading(paths).keyed(asked):
            if keep(local_files.fraction(text if field else key)):
                yield text, names[number] if names else key if field else ""
    except DataError as error:
        raise DataError(
            str(error).replace("data.split_field=", "--label=") if field else str(error)
        ) from error


def _refuse(wrong: bool, label: str, settings: DataSettings, accepted: str) -> None:
    if wrong:
        raise DataError(f"--label={label}: not of {settings.source}; accepted is {accepted}")
