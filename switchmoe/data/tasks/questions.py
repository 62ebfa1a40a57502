"""Questions with a text, with choices, and from memory alone; and ANLI, whose texts are made to be hard (1910.14599)."""

from collections.abc import Callable, Sequence

from switchmoe.data.tasks.glue import NLI
from switchmoe.data.tasks.phrasing import Benchmark, Make, Record, benchmark
from switchmoe.data.tasks.task import Example


def squad(record: Record) -> Example:
    answers = tuple(dict.fromkeys(record["answers"]["text"])) or ("no answer",)
    return Example(f"question: {record['question']} context: {record['context']}", answers[0], answers)


def winogrande(record: Record) -> Example:
    """Which of the two options fills the gap: ``option1`` or ``option2``."""
    options = record["option1"], record["option2"]
    text = f"winogrande sentence: {record['sentence']} option1: {options[0]} option2: {options[1]}"
    return Example(text, ("option1", "option2")[record["label"]] if record["label"] in (0, 1) else "<unk>")


def arc(record: Record) -> Example:
    """The letter of the right choice."""

    def letter(label: int | str) -> str:
        return chr(ord("A") + label) if isinstance(label, int) else label

    labels, texts = record["choices"]["label"], record["choices"]["text"]
    choices = " ".join(f"({letter(label)}) {text}" for label, text in zip(labels, texts, strict=False))
    return Example(f"arc question: {record['question']} choices: {choices}", letter(record["answerKey"]))


def closed_book(name: str, answers: Callable[[Record], Sequence[str]]) -> Make:
    """A question without a text to read (2002.08910)."""

    def make(record: Record) -> Example:
        right = tuple(dict.fromkeys(answer for answer in answers(record) if answer)) or ("no answer",)
        return Example(f"{name} question: {record['question']}", right[0], right)

    return make


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


_natural = closed_book("nq", _short_answers)
QUESTIONS = {
    "squad": Benchmark("squad/v1.1", squad, ("f1", "exact_match")),
    **{
        f"anli_{n}": benchmark(f"anli/{n}", "anli", ["hypothesis", "context"], NLI) for n in ("r1", "r2", "r3")
    },
    "winogrande": Benchmark("winogrande", winogrande, ("accuracy",), ("option1", "option2"), train="train_xl"),
    "arc_easy": Benchmark("ai2_arc/ARC-Easy", arc, ("accuracy",), ("A", "B", "C", "D", "E")),
    "arc_challenge": Benchmark("ai2_arc/ARC-Challenge", arc, ("accuracy",), ("A", "B", "C", "D", "E")),
    "natural_questions": Benchmark("natural_questions/default", lambda record: _natural(_question_text(record)), ("exact_match", "f1"), kept=lambda record: bool(_short_answers(record))),
    "web_questions": Benchmark("web_questions", closed_book("wq", lambda record: record["answers"]), ("exact_match", "f1"), held_out="test"),
    "trivia_qa": Benchmark("trivia_qa/unfiltered.nocontext", closed_book("trivia", _trivia), ("exact_match", "f1")),
}  # fmt: skip
