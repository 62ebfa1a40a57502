"""A task of files: two templates make of a record's fields what is read and what is to be written."""

import csv
import functools
import io
import json
import os
import string
from collections.abc import Iterator, Sequence
from typing import Any

from switchmoe.data import local_files
from switchmoe.data.errors import DataError
from switchmoe.data.tasks import metrics
from switchmoe.data.tasks.task import Example, Task
from switchmoe.settings import DataSettings, TaskSettings

KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
SUFFIXES = tuple(kind + packing for kind in KINDS for packing in local_files.PACKINGS)
ACCEPTED = (
    ".jsonl, .ndjson, .json (a list of records, or SQuAD's), .csv, .tsv (all also .gz, .xz, .bz2, .zst)"
)
FORMATTER = string.Formatter()
SQUAD = "question: {question} context: {context}"  # T5's (1910.10683, appendix D.15)


def is_files(name: str) -> bool:
    return name.endswith(SUFFIXES)


def paths(name: str, field: str = "names") -> list[str]:
    """The files of a glob. Raises DataError: there is none, or one that can't be read; ``field`` of `task` is where it was named."""
    return local_files.paths(name, SUFFIXES, ACCEPTED, f"task.{field}")


def task(name: str, settings: TaskSettings, data: DataSettings, field: str = "names") -> Task:
    """Of a glob of files. A record is held out by the hash of `data.split_field`, or of what is read.

    Raises:
      DataError: no files, one that can't be read, a field that a record lacks, no examples.
    """
    options = tuple(option.strip() for option in settings.options.split(",")) if settings.options else ()

    @functools.cache
    def examples(split: str) -> tuple[Example, ...]:
        held_out = split == "validation"
        return tuple(
            one
            for one, place in _all(name, settings, data, field)
            if (place < data.validation_share) == held_out
        )

    default = ("accuracy",) if options else ("exact_match", "f1")
    names = tuple(settings.metrics.split(",")) if settings.metrics else default
    _check_metrics(names, options, [one.right for one, _ in _all(name, settings, data, field)], settings)
    return Task(name, examples, names, options)


def _check_metrics(
    names: Sequence[str], options: Sequence[str], right: Sequence[tuple[str, ...]], settings: TaskSettings
) -> None:
    """Raises DataError: a metric that is made for other answers than these."""
    for name in names:
        if name in metrics.OWN:
            others = ", ".join(one for one in metrics.METRICS if one not in metrics.OWN)
            raise DataError(f"task.metrics={name}: of a benchmark's own answers; accepted are {others}")
        classes = set(options) or {answers[0] for answers in right}
        if name == "f1_positive" and not classes & set(metrics.POSITIVE):
            raise DataError(
                f"task.metrics={name}: none of task.options={settings.options!r} is the class that it is of;"
                f" accepted are options with one of {', '.join(metrics.POSITIVE)}, or macro_f1"
            )
        words = (answers[0] for answers in right if metrics.number(answers[0]) is None)
        if name in ("pearson", "spearman") and (word := next(words, None)) is not None:
            raise DataError(
                f"task.metrics={name}: the answer {word!r} is no number; accepted are those that are"
            )


@functools.cache
def _all(
    name: str, settings: TaskSettings, data: DataSettings, field: str
) -> tuple[tuple[Example, float], ...]:
    found, options = (
        [],
        {option.strip() for option in settings.options.split(",")} if settings.options else None,
    )
    for where, record in _records(name, field):
        answers = record.get("answers") if isinstance(record.get("answers"), tuple) else ()
        squad = bool(answers) and settings.inputs == TaskSettings().inputs
        inputs = _filled("inputs", SQUAD if squad else settings.inputs, record, where)
        targets = answers[0] if squad else _filled("targets", settings.targets, record, where)
        if options is not None and targets not in options:
            raise DataError(
                f"task.targets={settings.targets}: {where} gives {targets!r}; accepted is one of task.options={settings.options}"
            )
        key = (
            _filled("split_field", "{" + data.split_field + "}", record, where)
            if data.split_field
            else inputs
        )
        found.append((Example(inputs, targets, answers if squad else ()), local_files.fraction(key)))
    if not found:
        raise DataError(f"task.{field}={name}: no records; accepted are files with one or more")
    return tuple(found)


def _filled(field: str, template: str, record: dict[str, Any], where: str) -> str:
    group = "data" if field == "split_field" else "task"
    try:
        for _, name, *_ in FORMATTER.parse(template):
            if name and FORMATTER.get_field(name, (), record)[0] is None:
                raise ValueError(f"{name} is null; accepted is a text or a number")
        text = template.format_map(record)
        text.encode()  # half of a surrogate pair is a ValueError
        return text
    except (KeyError, IndexError) as error:
        raise DataError(
            f"{group}.{field}={template}: {where} has no field {error}; accepted are {', '.join(map(str, record))}"
        ) from error
    except (
        ValueError,
        TypeError,
        AttributeError,
    ) as error:  # of a format or an attribute that a value has not
        raise DataError(f"{group}.{field}={template}: {where}: {error}") from error


def _records(name: str, field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it is, a record) of all files; of SQuAD's format a question with its context and ``answers``, a tuple."""
    for path in paths(name, field):
        try:
            yield from _of_file(path, f"task.{field}={name}")
        except _Foreign as error:
            raise DataError(f"task.{field}={name}: {error}") from error


class _Foreign(ValueError):
    """What a file holds, and what would be accepted."""


def _of_file(path: str, asked: str) -> Iterator[tuple[str, dict[str, Any]]]:
    kind = os.path.splitext(
        path.removesuffix(next((p for p in local_files.PACKINGS[1:] if path.endswith(p)), ""))
    )[1]
    with open(path, "rb") as file:
        if kind in (".jsonl", ".ndjson"):
            for number, line in local_files.lines(path, file, asked):
                if line.strip():
                    yield f"{path}:{number}", _record(line, f"{path}:{number}")
            return
        text = "\n".join(line for _, line in local_files.lines(path, file, asked))
    if kind == ".json":
        yield from _json(path, text)
    else:
        yield from _table(path, text, "\t" if kind == ".tsv" else ",")


def _table(path: str, text: str, delimiter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 1
    try:
        # A quote in a .tsv is a letter like others; one in a .csv that does not close where a field does is refused.
        quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
        rows = csv.DictReader(io.StringIO(text), delimiter=delimiter, quoting=quoting, strict=True)
        for number, row in enumerate(rows, 2):
            if None in row or None in row.values():
                raise _Foreign(
                    f"{path}:{number}: another number of columns than in line 1; accepted is a table"
                )
            yield f"{path}:{number}", row
    except csv.Error as error:
        raise _Foreign(f"{path}: after row {number}: {error}; accepted is a table, or .jsonl") from error


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _Foreign(f"{where}: no JSON ({error}); accepted is an object a line") from error
    if not isinstance(record, dict):
        raise _Foreign(f"{where}: {type(record).__name__}; accepted is a JSON object")
    return record


def _json(path: str, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _Foreign(
            f"{path}: no JSON ({error}); accepted is a list of records, or SQuAD's format"
        ) from error
    if isinstance(whole, dict) and isinstance(whole.get("data"), list):
        try:
            for article in whole["data"]:
                for paragraph in article["paragraphs"]:
                    for one in paragraph["qas"]:
                        answers = tuple(dict.fromkeys(answer["text"] for answer in one["answers"])) or (
                            "no answer",
                        )
                        if not all(isinstance(answer, str) for answer in answers):
                            raise TypeError("text in each answer")
                        record = {
                            "question": one["question"],
                            "context": paragraph["context"],
                            "title": article.get("title", ""),
                        }
                        yield f"{path}: {one.get('id', one['question'])}", record | {"answers": answers}
        except (KeyError, TypeError) as error:
            raise _Foreign(
                f"{path}: SQuAD's format without {error}; accepted is data/paragraphs/qas/answers/text"
            ) from error
    elif isinstance(whole, list) and all(isinstance(record, dict) for record in whole):
        yield from ((f"{path}: record {number}", record) for number, record in enumerate(whole))
    else:
        raise _Foreign(f"{path}: accepted is a list of records, or SQuAD's format")
