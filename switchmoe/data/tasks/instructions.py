"""Instructions made of the packaged summaries: families of tasks, each asked for in several wordings (Flan, 2109.01652; 2305.14705).

A family makes of a record the fields that its wordings show, and ``answer``. Its inverse gives the answer and asks for another
field (input inversion), a task of its own, NAME_inverted. What a prompt shows, a distractor, too, is of its own split alone.
"""

import functools
import random
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from switchmoe.data.tasks import embedded
from switchmoe.data.tasks.task import Example, Task
from switchmoe.data.tasks.wordings import INVERTED_WORDINGS, WORDINGS

PREFIX, INVERTED = "instruct_", "_inverted"
PASSAGE = 300  # characters: whole sentences, but of the first what there is room for
SENTENCE = 250  # characters of a sentence that is shown alone
CHOICES = 4
SENTENCE_END = re.compile(r"""(?:(?<=[a-z0-9)\]%][.!?])|(?<=[a-z0-9)\]%][.!?]")|(?<="[.!?]))\s+(?=[A-Z])""")
WORD = re.compile(r"\b[a-z]{6,}\b")

Record = dict[str, str]
Fields = dict[str, str]
Draw = random.Random


class Family(NamedTuple):
    """``make(record, draw, split)``: the fields; None, whatever is drawn, of a record that does not have them."""

    make: Callable[[Record, Draw, str], Fields | None]
    metrics: tuple[str, ...]
    options: tuple[str, ...] = ()
    inverse: tuple[str, tuple[str, ...]] | None = None  # the field that is asked for, and its metrics


@functools.cache
def sentences(text: str) -> tuple[str, ...]:
    return tuple(SENTENCE_END.split(text))


@functools.cache
def passage(text: str) -> str:
    found, *rest = sentences(text)
    for sentence in rest:
        if len(found) + len(sentence) >= PASSAGE:
            break
        found += f" {sentence}"
    return found[:PASSAGE]


@functools.cache
def words(text: str) -> tuple[str, ...]:
    return tuple(WORD.findall(text))


def _short(text: str) -> list[str]:
    return [sentence for sentence in sentences(text) if len(sentence) <= SENTENCE]


@functools.cache
def _by_topic(split: str) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in embedded.records(split):
        if record["topic"] != embedded.NO_TOPIC:
            found.setdefault(record["topic"], []).append(record)
    return found


def _another(record: Record, draw: Draw, split: str) -> Record:
    """Of the same topic."""
    others = _by_topic(split)[record["topic"]]
    found = draw.choice(others)
    return found if found["title"] != record["title"] else others[others.index(found) - 1]


def _lettered(draw: Draw, right: str, wrong: str) -> Fields:
    """The two as `a` and `b`, in an order that is drawn."""
    first = draw.random() < 0.5
    return {
        "a": right if first else wrong,
        "b": wrong if first else right,
        "answer": "A" if first else "B",
    }


def _topic(record: Record, draw: Draw, split: str) -> Fields | None:
    if record["topic"] == embedded.NO_TOPIC:
        return None
    return {
        "title": record["title"], "passage": passage(record["text"]), "sentence": sentences(record["text"])[0],
        "topics": ", ".join(embedded.topics()), "answer": record["topic"],
    }  # fmt: skip


def _description(record: Record, draw: Draw, split: str) -> Fields | None:
    if not record["short"]:
        return None
    return {"title": record["title"], "passage": passage(record["text"]), "answer": record["short"]}


def _title(record: Record, draw: Draw, split: str) -> Fields:
    """The title is hidden where the text has it."""
    return {
        "hidden": embedded.hidden(passage(record["text"]), record["title"]), "sentence": sentences(record["text"])[0],
        "answer": record["title"],
    }  # fmt: skip


def _matches(record: Record, draw: Draw, split: str) -> Fields | None:
    """A wrong title is one of the same topic."""
    if record["topic"] == embedded.NO_TOPIC:
        return None
    right = draw.random() < 0.5
    title = record["title"] if right else _another(record, draw, split)["title"]
    hidden = embedded.hidden(passage(record["text"]), record["title"])
    return {"title": title, "hidden": hidden, "answer": "yes" if right else "no"}


def _blank(record: Record, draw: Draw, split: str) -> Fields | None:
    """The word that is left out, where it stands first, is among words of other summaries."""
    sentence = next((one for one in _short(record["text"]) if WORD.search(one)), None)
    if sentence is None:
        return None
    first = {word[0]: word for word in reversed(list(WORD.finditer(sentence)))}
    found = draw.choice(list(first.values())[::-1])
    choices, records = [found[0]], embedded.records(split)
    while len(choices) < CHOICES:
        other = draw.choice(words(draw.choice(records)["text"]) or choices)
        if other not in sentence and other not in choices:
            choices.append(other)
    draw.shuffle(choices)
    gapped = f"{sentence[: found.start()]}___{sentence[found.end() :]}"
    return {"sentence": sentence, "gapped": gapped, "words": ", ".join(choices), "answer": found[0]}


def _order(record: Record, draw: Draw, split: str) -> Fields | None:
    first, second = (*sentences(record["text"]), "", "")[:2]
    if not second or max(len(first), len(second)) > SENTENCE:
        return None
    return _lettered(draw, first, second)


def _next(record: Record, draw: Draw, split: str) -> Fields | None:
    """The wrong continuation is another summary's second sentence, of the same topic."""
    fields = _order(record, draw, split)
    if fields is None or record["topic"] == embedded.NO_TOPIC:
        return None
    first, right = sentences(record["text"])[:2]
    others = [_another(record, draw, split) for _ in range(CHOICES)]
    wrong = next((found[1] for other in others if len(found := _short(other["text"])) > 1), None)
    wrong = wrong or sentences(others[0]["text"])[0][:SENTENCE]
    return {"sentence": first, **_lettered(draw, right, wrong)}


def _odd(record: Record, draw: Draw, split: str) -> Fields | None:
    """One title of a topic among those of another."""
    if record["topic"] == embedded.NO_TOPIC:
        return None
    topic = draw.choice([one for one in sorted(_by_topic(split)) if one != record["topic"]])
    titles = [one["title"] for one in draw.sample(_by_topic(split)[topic], CHOICES - 1)] + [record["title"]]
    draw.shuffle(titles)
    return {"titles": "; ".join(titles), "answer": record["title"]}


def _spelling(record: Record, draw: Draw, split: str) -> Fields | None:
    """Two neighbouring letters inside a word have changed places."""
    candidates = [
        (sentence, word, place)
        for sentence in _short(record["text"])[:1]
        for word in WORD.finditer(sentence)
        for place in range(1, len(word[0]) - 2)
        if word[0][place] != word[0][place + 1]
    ]
    if not candidates:
        return None
    sentence, word, place = draw.choice(candidates)
    at = word.start() + place
    wrong = sentence[:at] + sentence[at + 1] + sentence[at] + sentence[at + 2 :]
    return {"sentence": wrong, "answer": word[0]}


def _capitals(record: Record, draw: Draw, split: str) -> Fields | None:
    sentence = next(iter(_short(record["text"])), None)
    return sentence and {"lower": sentence.lower(), "answer": sentence}


LETTERS = ("A", "B")
FAMILIES = {
    "topic": Family(_topic, ("accuracy", "macro_f1"), embedded.topics(), ("sentence", ("rouge_l",))),
    "description": Family(_description, ("rouge_l", "rouge_1"), inverse=("title", ("exact_match", "rouge_l"))),
    "title": Family(_title, ("exact_match", "rouge_l"), inverse=("sentence", ("rouge_l",))),
    "question": Family(_description, ("rouge_l", "rouge_1")),
    "matches": Family(_matches, ("accuracy",), ("yes", "no")),
    "blank": Family(_blank, ("accuracy",), inverse=("gapped", ("accuracy", "rouge_l"))),
    "order": Family(_order, ("accuracy",), LETTERS),
    "next": Family(_next, ("accuracy",), LETTERS),
    "odd": Family(_odd, ("accuracy",)),
    "spelling": Family(_spelling, ("accuracy",)),
    "capitals": Family(_capitals, ("accuracy",), inverse=("lower", ("accuracy",))),
}  # fmt: skip


class Prompts(Sequence):
    """A family's examples, made when they are asked for: in training each record in each wording, held out in one of them.

    Letters: R records, W wordings. Example n is of record n mod R. What is drawn for it depends on the family, the record's title and
    the wording alone.
    """

    def __init__(self, name: str, family: Family, asked: str, wordings: Sequence[str], split: str):
        self._name, self._make, self._asked = name, family.make, asked
        self._wordings, self._split = wordings, split
        self._records = [one for one in embedded.records(split) if family.make(one, random.Random(0), split)]

    def __len__(self) -> int:
        return len(self._records) * (len(self._wordings) if self._split == "train" else 1)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        turn, number = divmod(range(len(self))[index], len(self._records))
        record = self._records[number]
        wording = (turn + zlib.crc32(record["title"].encode())) % len(self._wordings)
        draw = random.Random(f"{self._name} {record['title']} {wording}")
        fields = self._make(record, draw, self._split)
        return Example(self._wordings[wording].format_map(fields), fields[self._asked])


def family(name: str) -> str:
    """What a task is about, by which it is held out: that of an inverse and of the plain task too; a question is of descriptions,
    and of GLUE and SuperGLUE both have RTE and the Winograd schemas.
    """
    own = name.removesuffix(INVERTED).removeprefix(PREFIX)
    return {"question": "description", "superglue_rte": "rte", "wnli": "wsc"}.get(own, own)


def tasks() -> list[Task]:
    """`instruct_NAME` of each family, and `instruct_NAME_inverted` where it has an inverse."""
    found = []
    for name, family in FAMILIES.items():
        found.append(_task(name, family, "answer", WORDINGS[name], family.metrics))
        if family.inverse:
            asked, metrics = family.inverse
            found.append(_task(f"{name}{INVERTED}", family, asked, INVERTED_WORDINGS[name], metrics))
    return found


def _task(name: str, family: Family, asked: str, wordings: Sequence[str], metrics: tuple[str, ...]) -> Task:
    examples = functools.cache(functools.partial(Prompts, name, family, asked, wordings))
    return Task(PREFIX + name, examples, metrics, family.options if asked == "answer" else ())
