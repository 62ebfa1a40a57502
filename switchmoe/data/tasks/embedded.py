"""Tasks of the packaged Wikipedia summaries, split by title."""

import functools
import re
from collections.abc import Callable

from switchmoe.data.tasks.task import SPLITS, Example, Task
from switchmoe.data.wiki_vital_en import builder

OPENING = 600  # characters of a summary that a task shows
NO_TOPIC = "Uncategorized"


@functools.cache
def records(split: str) -> tuple[dict[str, str], ...]:
    return tuple(record for record in builder.records() if builder.split_of(record["title"]) == split)


def _task(
    name: str, make: Callable[[dict[str, str]], Example | None], metrics: tuple[str, ...], options: tuple[str, ...] = ()
) -> Task:  # fmt: skip
    @functools.cache
    def examples(split: str) -> tuple[Example, ...]:
        return tuple(example for record in records(split) if (example := make(record)))

    return Task(name, examples, metrics, options)


def _topic(record: dict[str, str]) -> Example | None:
    if record["topic"] == NO_TOPIC:
        return None
    return Example(f"topic of: {record['text'][:OPENING]}", record["topic"])


def _description(record: dict[str, str]) -> Example | None:
    if not record["short"]:
        return None
    return Example(f"describe: {record['title']}. {record['text'][:OPENING]}", record["short"])


def hidden(text: str, title: str) -> str:
    """The text with `It` wherever it has the title or its plural, in capitals or not: else the title would be copied."""
    return re.sub(rf"(?<!\w){re.escape(title)}(s|es)?(?!\w)", "It", text, flags=re.IGNORECASE)


def _title(record: dict[str, str]) -> Example:
    return Example(f"title of: {hidden(record['text'][:OPENING], record['title'])}", record["title"])


@functools.cache
def topics() -> tuple[str, ...]:
    """The classes of `topic`."""
    return tuple(sorted({record["topic"] for split in SPLITS for record in records(split)} - {NO_TOPIC}))


def tasks() -> list[Task]:
    return [
        _task("topic", _topic, ("accuracy", "macro_f1"), topics()),
        _task("description", _description, ("rouge_l", "rouge_1")),
        _task("title", _title, ("exact_match", "rouge_l")),
    ]
