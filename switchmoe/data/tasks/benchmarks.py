"""Public benchmarks through tfds, as T5 phrased them (1910.10683, section 2.4 and appendix D): GLUE, SuperGLUE, questions, summaries,
translation. A data set is read where it is prepared as array_record (`data.data_dir`); nothing is fetched.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from switchmoe.data import sources
from switchmoe.data.errors import DataError
from switchmoe.data.tasks.task import Example, Task
from switchmoe.settings import DataSettings

Record = dict[str, Any]
Make = Callable[[Record], Example]


class Benchmark(NamedTuple):
    dataset: str  # tfds's name
    make: Make
    metrics: tuple[str, ...]
    options: tuple[str, ...] = ()
    held_out: str = "validation"  # tfds's name of the split
    train: str = "train"
    averaged: bool = False  # the score is the mean of the metrics
    learnt: Callable[[Record], bool] | None = None  # of which records a model is taught; None: all
    kept: Callable[[Record], bool] | None = None  # the records that are asked at all; None: all


class Records(Sequence):
    """Examples made of a data set's records, or of those to ``keep``, when they are asked for."""

    def __init__(self, source: Any, make: Make, keep: Callable[[Record], bool] | None = None):
        self._source, self._make = source, make
        every = range(len(source))
        self._numbers = [n for n in every if keep(_plain(source[n]))] if keep else every

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return self._make(_plain(self._source[self._numbers[int(index)]]))


def _plain(value: Any) -> Any:
    """Text as str, numbers as Python's."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def task(name: str, data: DataSettings) -> Task:
    """Raises DataError: tfds has not prepared the data set, or it is not as expected."""
    found = BENCHMARKS[name]

    @functools.cache
    def examples(split: str) -> Sequence[Example]:
        builder = sources.tfds_builder(found.dataset, data.data_dir or sources.cache_directory(data))
        wanted = found.train if split == "train" else found.held_out
        try:
            source = builder.as_data_source(wanted, file_format="array_record")
            return Records(source, found.make, (found.learnt if split == "train" else None) or found.kept)
        except (KeyError, ValueError, OSError, RuntimeError) as error:
            raise DataError(
                f"task.names={name}: split {wanted} of {found.dataset} can't be read ({str(error).splitlines()[0]}); accepted is one"
                f" that is prepared: tfds build {found.dataset} --file_format=array_record, and data.data_dir"
            ) from error

    return Task(name, examples, found.metrics, found.options, averaged=found.averaged)


def classes(name: str, fields: Sequence[str], labels: Sequence[str]) -> Make:
    """``name field1: ... field2: ...`` -> the label's word."""

    def make(record: Record) -> Example:
        text = " ".join(f"{field}: {record[field]}" for field in fields)
        label = record["label"]
        return Example(f"{name} {text}", labels[label] if 0 <= label < len(labels) else "<unk>")

    return make


def _classes(
    dataset: str, name: str, fields: Sequence[str], labels: Sequence[str], metrics: Sequence[str] = ("accuracy",), held_out: str = "validation"
) -> Benchmark:  # fmt: skip
    make, averaged = classes(name, fields, labels), len(metrics) > 1
    return Benchmark(dataset, make, tuple(metrics), tuple(labels), held_out, averaged=averaged)


def similarity(record: Record) -> Example:
    """STS-B: a number from 0 to 5, rounded to a fifth, as text."""
    number = round(record["label"] * 5) / 5
    return Example(f"stsb sentence1: {record['sentence1']} sentence2: {record['sentence2']}", f"{number:.1f}")


def multirc(record: Record) -> Example:
    """``answers``: the judgement, and the question that it belongs to."""
    paragraph = re.sub(r"</?b>", "", record["paragraph"].replace("<br>", " "))
    text = f"multirc question: {record['question']} answer: {record['answer']} paragraph: {paragraph.strip()}"
    truth = ("False", "True")[record["label"]]
    return Example(text, truth, (truth, f"question {record['idx']['paragraph']}-{record['idx']['question']}"))


def copa(record: Record) -> Example:
    fields = " ".join(f"{field}: {record[field]}" for field in ("choice1", "choice2", "premise", "question"))
    return Example(f"copa {fields}", ("choice1", "choice2")[record["label"]])


def record_task(record: Record) -> Example:
    """ReCoRD: a passage, a query with a gap, and the entities of which one fills it."""
    passage = re.sub(r"(\.|\?|\!|\"|\')\n@highlight\n", r"\1 ", record["passage"]).replace(
        "\n@highlight\n", ". "
    )
    text = f"record query: {record['query']} entities: {', '.join(record['entities'])} passage: {passage}"
    answers = tuple(dict.fromkeys(record["answers"]))
    return Example(text, answers[0], answers)


def wsc(record: Record) -> Example:
    """The pronoun between stars; the noun is written, and counts as said of what it stands for. ``answers``: noun, True or False."""
    words = record["text"].split(" ")
    # Of two records the index is a word or so off.
    same = (n for n, word in enumerate(words) if word == record["span2_text"])
    place = min(same, key=lambda n: abs(n - record["span2_index"]), default=record["span2_index"])
    words[place] = f"*{words[place]}*"
    return Example(
        f"wsc: {' '.join(words)}", record["span1_text"], (record["span1_text"], str(bool(record["label"])))
    )


def squad(record: Record) -> Example:
    answers = tuple(dict.fromkeys(record["answers"]["text"])) or ("no answer",)
    return Example(f"question: {record['question']} context: {record['context']}", answers[0], answers)


def summary(inputs: str, targets: str) -> Make:
    return lambda record: Example(f"summarize: {record[inputs]}", record[targets])


def winogrande(record: Record) -> Example:
    """Which of the two options fills the gap: ``option1`` or ``option2``."""
    options = record["option1"], record["option2"]
    text = f"winogrande sentence: {record['sentence']} option1: {options[0]} option2: {options[1]}"
    return Example(text, ("option1", "option2")[record["label"]] if record["label"] in (0, 1) else "<unk>")


def arc(record: Record) -> Example:
    """The letter of the right choice."""
    labels, texts = record["choices"]["label"], record["choices"]["text"]
    names = [chr(ord("A") + int(label)) if isinstance(label, int) else label for label in labels]
    choices = " ".join(f"({name}) {text}" for name, text in zip(names, texts, strict=False))
    key = record["answerKey"]
    return Example(
        f"arc question: {record['question']} choices: {choices}", names[key] if isinstance(key, int) else key
    )


def closed_book(name: str, answers: Callable[[Record], Sequence[str]]) -> Make:
    """A question without a text to read (2002.08910)."""

    def make(record: Record) -> Example:
        right = tuple(dict.fromkeys(answer for answer in answers(record) if answer)) or ("no answer",)
        return Example(f"{name} question: {record['question']}", right[0], right)

    return make


def translation(record: Record) -> Example:
    return Example(f"translate English to German: {record['en']}", record["de"])


def _short_answers(record: Record) -> list[str]:
    """NaturalQuestions' short answers; of yes and no the word."""
    found: list[str] = []
    notes = record["annotations"]
    for texts, answer in zip(notes["short_answers"]["text"], notes["yes_no_answer"], strict=False):
        found += texts if isinstance(texts, list) else [texts]
        found += [("no", "yes")[answer]] if answer in (0, 1) else []
    return found


def _trivia(record: Record) -> list[str]:
    return [record["answer"]["value"], *record["answer"]["aliases"]]


def _question_text(record: Record) -> Record:
    """NaturalQuestions has its question as a record."""
    question = record["question"]
    return record | {"question": question["text"] if isinstance(question, dict) else question}


ENTAILMENT = ("entailment", "not_entailment")
NLI = ("entailment", "neutral", "contradiction")
_natural = closed_book("nq", _short_answers)
BENCHMARKS = {
    # GLUE
    "cola": _classes("glue/cola", "cola", ["sentence"], ("unacceptable", "acceptable"), ("matthews",)),
    "sst2": _classes("glue/sst2", "sst2", ["sentence"], ("negative", "positive")),
    "mrpc": _classes("glue/mrpc", "mrpc", ["sentence1", "sentence2"], ("not_equivalent", "equivalent"), ("f1_positive", "accuracy")),
    "stsb": Benchmark("glue/stsb", similarity, ("pearson", "spearman"), averaged=True),
    "qqp": _classes("glue/qqp", "qqp", ["question1", "question2"], ("not_duplicate", "duplicate"), ("f1_positive", "accuracy")),
    "mnli": _classes("glue/mnli", "mnli", ["hypothesis", "premise"], NLI, held_out="validation_matched"),
    "qnli": _classes("glue/qnli", "qnli", ["question", "sentence"], ENTAILMENT),
    "rte": _classes("glue/rte", "rte", ["sentence1", "sentence2"], ENTAILMENT),
    "wnli": _classes("glue/wnli", "wnli", ["sentence1", "sentence2"], ("not_entailment", "entailment")),
    # SuperGLUE
    "boolq": _classes("super_glue/boolq", "boolq", ["passage", "question"], ("False", "True")),
    "cb": _classes("super_glue/cb", "cb", ["hypothesis", "premise"], ("entailment", "contradiction", "neutral"), ("macro_f1", "accuracy")),
    "copa": Benchmark("super_glue/copa", copa, ("accuracy",), ("choice1", "choice2")),
    "multirc": Benchmark("super_glue/multirc", multirc, ("f1_positive", "multirc_em"), ("False", "True"), averaged=True),
    "record": Benchmark("super_glue/record", record_task, ("f1", "exact_match"), averaged=True),
    "superglue_rte": _classes("super_glue/rte", "rte", ["hypothesis", "premise"], ENTAILMENT),
    "wic": _classes("super_glue/wic", "wic", ["sentence1", "sentence2", "word"], ("False", "True")),
    "wsc": Benchmark("super_glue/wsc.fixed", wsc, ("wsc",), learnt=lambda record: bool(record["label"])),  # else the noun is wrong
    # questions
    "squad": Benchmark("squad/v1.1", squad, ("f1", "exact_match")),
    **{
        f"anli_{n}": _classes(f"anli/{n}", "anli", ["hypothesis", "context"], NLI) for n in ("r1", "r2", "r3")
    },
    "winogrande": Benchmark("winogrande", winogrande, ("accuracy",), ("option1", "option2"), train="train_xl"),
    "arc_easy": Benchmark("ai2_arc/ARC-Easy", arc, ("accuracy",), ("A", "B", "C", "D", "E")),
    "arc_challenge": Benchmark("ai2_arc/ARC-Challenge", arc, ("accuracy",), ("A", "B", "C", "D", "E")),
    "natural_questions": Benchmark("natural_questions/default", lambda record: _natural(_question_text(record)), ("exact_match", "f1"), kept=lambda record: bool(_short_answers(record))),
    "web_questions": Benchmark("web_questions", closed_book("wq", lambda record: record["answers"]), ("exact_match", "f1"), held_out="test"),
    "trivia_qa": Benchmark("trivia_qa/unfiltered.nocontext", closed_book("trivia", _trivia), ("exact_match", "f1")),
    # summaries and translation
    "cnn_dailymail": Benchmark("cnn_dailymail", summary("article", "highlights"), ("rouge_2", "rouge_l", "rouge_1")),
    "xsum": Benchmark("xsum", summary("document", "summary"), ("rouge_2", "rouge_l", "rouge_1")),
    "wmt_en_de": Benchmark("wmt14_translate/de-en", translation, ("bleu",)),
}  # fmt: skip
