"""Benchmarks: T5's phrasing by hand, and every data set's records through tfds's mock."""

import types

import numpy as np
import pytest
import tensorflow_datasets as tfds

from switchmoe.data import tasks
from switchmoe.data.errors import DataError
from switchmoe.data.tasks import Example, Task, baselines, benchmarks, metrics
from switchmoe.data.tasks.benchmarks import BENCHMARKS
from switchmoe.settings import DataSettings, TaskSettings

# tfds makes these with TensorFlow, or not by their name alone; prepared ones are read without
UNMOCKED = {"boolq", "cb", "copa", "superglue_rte", "wic", "wsc", "wmt_en_de"}
NLI = {"premise": "p", "hypothesis": "h", "context": "c"}
PAIR = {
    "sentence1": "a",
    "sentence2": "b",
    "question1": "x",
    "question2": "y",
    "question": "q",
    "sentence": "s",
}
CHOICES = {"question": "q", "choices": {"label": [1, 0], "text": ["x", "y"]}, "answerKey": 1}
BY_HAND = {  # a record, what is read, what is to be written
    "cola": (PAIR | {"label": 1}, "cola sentence: s", "acceptable"),
    "sst2": (PAIR | {"label": 0}, "sst2 sentence: s", "negative"),
    "mrpc": (PAIR | {"label": 0}, "mrpc sentence1: a sentence2: b", "not_equivalent"),
    "qqp": (PAIR | {"label": 1}, "qqp question1: x question2: y", "duplicate"),
    "mnli": (
        {"premise": "A man sleeps.", "hypothesis": "He is awake.", "label": 2},
        "mnli hypothesis: He is awake. premise: A man sleeps.", "contradiction",
    ),
    "qnli": (PAIR | {"label": 1}, "qnli question: q sentence: s", "not_entailment"),
    "rte": (PAIR | {"label": 0}, "rte sentence1: a sentence2: b", "entailment"),
    "wnli": (PAIR | {"label": 0}, "wnli sentence1: a sentence2: b", "not_entailment"),
    "stsb": ({"sentence1": "a", "sentence2": "b", "label": 3.25}, "stsb sentence1: a sentence2: b", "3.2"),
    "boolq": ({"passage": "P.", "question": "is it", "label": 1}, "boolq passage: P. question: is it", "True"),
    "cb": (NLI | {"label": 2}, "cb hypothesis: h premise: p", "neutral"),
    "copa": (
        {"premise": "It rained.", "choice1": "wet", "choice2": "dry", "question": "effect", "label": 0},
        "copa choice1: wet choice2: dry premise: It rained. question: effect", "choice1",
    ),
    "multirc": (
        {"paragraph": "<b>Sent 1: </b>One.<br><b>Sent 2: </b>Two.<br>", "question": "q?", "answer": "a", "label": 0, "idx": {"paragraph": 3, "question": 5}},
        "multirc question: q? answer: a paragraph: Sent 1: One. Sent 2: Two.", "False",
    ),
    "superglue_rte": (NLI | {"label": 1}, "rte hypothesis: h premise: p", "not_entailment"),
    "wic": (
        {"sentence1": "a bank", "sentence2": "the bank", "word": "bank", "label": 1},
        "wic sentence1: a bank sentence2: the bank word: bank", "True",
    ),
    "wsc": (
        {"text": "Ann saw Eve as she left", "span1_text": "Ann", "span2_index": 5, "span2_text": "she", "label": 1},
        "wsc: Ann saw Eve as *she* left", "Ann",
    ),
    "record": (
        {"passage": "It is.\n@highlight\nMore", "query": "@placeholder is", "entities": ["A", "B"], "answers": ["B", "B"]},
        "record query: @placeholder is entities: A, B passage: It is. More", "B",
    ),
    "squad": (
        {"question": "who?", "context": "Ann B did.", "answers": {"text": ["Ann B", "Ann", "Ann B"]}},
        "question: who? context: Ann B did.", "Ann B",
    ),
    "anli_r1": (NLI | {"label": 0}, "anli hypothesis: h context: c", "entailment"),
    "anli_r2": (NLI | {"label": 1}, "anli hypothesis: h context: c", "neutral"),
    "anli_r3": (NLI | {"label": 2}, "anli hypothesis: h context: c", "contradiction"),
    "winogrande": (
        {"sentence": "Ann or Eve: _ won.", "option1": "Ann", "option2": "Eve", "label": 1},
        "winogrande sentence: Ann or Eve: _ won. option1: Ann option2: Eve", "option2",
    ),
    "arc_easy": (CHOICES, "arc question: q choices: (B) x (A) y", "B"),
    "arc_challenge": (CHOICES | {"answerKey": "E"}, "arc question: q choices: (B) x (A) y", "E"),
    "natural_questions": (
        {"question": {"text": "who"}, "annotations": {"short_answers": {"text": [["Ann"], []]}, "yes_no_answer": [-1, 1]}},
        "nq question: who", "Ann",
    ),
    "web_questions": ({"question": "who?", "answers": ["Ann", "Eve"]}, "wq question: who?", "Ann"),
    "trivia_qa": ({"question": "who?", "answer": {"value": "Ann", "aliases": ["Anna"]}}, "trivia question: who?", "Ann"),
    "cnn_dailymail": ({"article": "Long.", "highlights": "Short."}, "summarize: Long.", "Short."),
    "xsum": ({"document": "Long.", "summary": "Short."}, "summarize: Long.", "Short."),
    "wmt_en_de": ({"en": "That is good.", "de": "Das ist gut."}, "translate English to German: That is good.", "Das ist gut."),
}  # fmt: skip


def of_records(monkeypatch, records):
    """tfds has these as each split of every data set."""
    builder = types.SimpleNamespace(as_data_source=lambda split, file_format: records)
    monkeypatch.setattr(benchmarks.sources, "tfds_builder", lambda *_: builder)
    return DataSettings(data_dir="there")


@pytest.mark.parametrize("name", BY_HAND)
def test_phrasing(name):
    record, inputs, targets = BY_HAND[name]
    example = BENCHMARKS[name].make(record)
    assert (example.inputs, example.targets) == (inputs, targets)
    if BENCHMARKS[name].options:
        assert targets in BENCHMARKS[name].options


def test_all_that_is_promised_is_there():
    assert BY_HAND.keys() == BENCHMARKS.keys()
    glue = {"cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"}
    superglue = {"boolq", "cb", "copa", "multirc", "record", "superglue_rte", "wic", "wsc"}
    others = {
        "squad",
        "cnn_dailymail",
        "xsum",
        "anli_r1",
        "anli_r2",
        "anli_r3",
        "winogrande",
        "arc_easy",
        "arc_challenge",
    }
    others |= {"natural_questions", "web_questions", "trivia_qa", "wmt_en_de"}
    assert set(BENCHMARKS) == glue | superglue | others
    assert all(name in metrics.METRICS for found in BENCHMARKS.values() for name in found.metrics)


@pytest.mark.parametrize("name", sorted(set(BENCHMARKS) - UNMOCKED))
def test_records_of_the_mock_become_examples(name, tmp_path):
    with tfds.testing.mock_data(num_examples=4):
        (task,) = tasks.find(TaskSettings(names=name), DataSettings(data_dir=str(tmp_path)))
        for split in tasks.SPLITS:
            found = task.examples(split)
            assert len(found) == 4 and len(found[:2]) == 2
            for example in found[:4]:
                assert isinstance(example.inputs, str) and isinstance(example.targets, str)
                assert all(isinstance(answer, str) for answer in example.right)
                if task.options:
                    assert example.targets in task.options


@pytest.mark.parametrize("name", sorted(UNMOCKED))
def test_records_that_are_not_mocked_become_examples(name, monkeypatch):
    """As tfds gives them: text as bytes, numbers as numpy's."""
    record, inputs, targets = BY_HAND[name]
    raw = {
        key: value.encode() if isinstance(value, str) else np.int64(value) for key, value in record.items()
    }
    (task,) = tasks.find(TaskSettings(names=name), of_records(monkeypatch, [raw, raw]))
    for split in tasks.SPLITS:
        assert [one[:2] for one in task.examples(split)] == [(inputs, targets)] * 2


@pytest.mark.parametrize("name", ["cola", "winogrande", "anli_r1"])
def test_a_record_without_an_answer_is_refused(name, monkeypatch):
    """Which `<unk>` would be taught of, as splits for a leader board have -1."""
    record, *_ = BY_HAND[name]
    data = of_records(monkeypatch, [record | {"label": -1}])
    for field in ("names", "held_out"):
        message = f"task.{field}={name}: a record of .* has the answer '<unk>'; accepted is one of"
        with pytest.raises(DataError, match=message) as error:
            tasks.find(TaskSettings(**{"names": "topic", field: name}), data, field)
        assert "\n" not in str(error.value)


def test_what_tfds_does_not_know_is_named_as_a_task(monkeypatch):
    def unknown(*_):
        raise AssertionError("no anli\nat all")

    monkeypatch.setattr(benchmarks.sources, "tfds_builder", unknown)
    with pytest.raises(
        DataError, match=r"^task.names=anli_r1: .*of anli/r1 can't be read \(no anli\); accepted"
    ):
        tasks.find(TaskSettings(names="anli_r1"), DataSettings(data_dir="there"))


def test_scores_of_two_metrics_are_their_mean_in_glue_and_superglue():
    averaged = {name for name, one in BENCHMARKS.items() if one.averaged}
    assert averaged == {"mrpc", "qqp", "stsb", "cb", "multirc", "record"}
    rows = [Example("good words", label) for label in ("True", "False", "False", "False")]
    for mean, score in ((True, 37.5), (False, 0.0)):  # to answer False always: an F1 of 0, 75 % right
        task = Task("a", lambda split: rows, ("f1_positive", "accuracy"), ("True", "False"), averaged=mean)
        assert baselines.scores(task, rows)["majority"] == score


def test_of_wsc_what_is_true_is_learnt_and_all_is_judged(monkeypatch):
    """Of a false record the noun is the wrong one to write."""
    record, _, _ = BY_HAND["wsc"]
    labelled = [record | {"label": label, "span1_text": f"Ann {n}"} for n, label in enumerate((1, 0, 0, 1))]
    task = benchmarks.task("wsc", of_records(monkeypatch, labelled))
    assert [one.targets for one in task.examples("train")] == ["Ann 0", "Ann 3"]
    assert [one.right[1] for one in task.examples("validation")] == ["True", "False", "False", "True"]


def test_what_is_not_prepared_says_how_to_prepare_it(tmp_path):
    with pytest.raises(
        DataError, match="task.names=rte: split train of glue/rte can't be read.*tfds build glue/rte"
    ):
        tasks.find(TaskSettings(names="rte"), DataSettings(data_dir=str(tmp_path)))


def test_metrics_of_the_benchmarks():
    right = [("True",), ("True",), ("False",)]
    assert metrics.f1_positive(["True", "False", "True"], right) == 50
    numbers = [(f"{n / 5:.1f}",) for n in range(5)]
    assert metrics.pearson([answer for (answer,) in numbers], numbers) == pytest.approx(100)
    assert metrics.spearman(["0.0", "x", "0.1", "3.0", "5.0"], numbers) > 90
    assert metrics.pearson(["1.0"] * 5, numbers) == 0
    below = [(f"{n / 2}",) for n in range(-4, 0)]
    assert metrics.pearson([answer for (answer,) in below], below) == pytest.approx(100)
    nouns = [
        ("the tall man", "True"),
        ("Ann", "False"),
        ("Eve", "True"),
        ("Bob 's hat", "True"),
        ("Ann", "False"),
    ]
    assert metrics.wsc(["man", "Bob", "", "Bob", ""], nouns) == pytest.approx(40)


def test_what_is_no_class_is_wrong_of_f1():
    assert metrics.f1_positive(["True", "?"], [("True",), ("False",)]) == pytest.approx(200 / 3)


def test_multirc_asks_for_all_answers_of_a_question():
    """Of two questions with four answers one answer each is judged wrong."""
    make = BENCHMARKS["multirc"].make
    record, _, _ = BY_HAND["multirc"]
    examples = [
        make(record | {"label": n % 2, "idx": {"paragraph": 0, "question": n // 4}}) for n in range(8)
    ]
    answers = [example.targets for example in examples]
    right = [example.right for example in examples]
    assert metrics.multirc_em(answers, right) == 100
    assert metrics.accuracy(answers, right) == 100
    assert metrics.multirc_em(["True", *answers[1:]], right) == 50
    assert metrics.multirc_em(["True", *answers[1:7], "False"], right) == 0


def test_questions_without_an_answer_are_not_asked(monkeypatch):
    record, _, _ = BY_HAND["natural_questions"]
    none = {"short_answers": {"text": [[], []]}, "yes_no_answer": [-1, -1]}
    data = of_records(monkeypatch, [record, record | {"annotations": none}])
    task = benchmarks.task("natural_questions", data)
    assert [len(task.examples(split)) for split in tasks.SPLITS] == [1, 1]


def test_bytes_and_arrays_of_records_become_text_and_lists():
    record = {"a": b"x", "b": np.array([b"y", b"z"], object), "c": {"d": np.int64(3)}}
    assert benchmarks._plain(record) == {"a": "x", "b": ["y", "z"], "c": {"d": 3}}
