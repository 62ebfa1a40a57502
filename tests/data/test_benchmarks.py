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
BY_HAND = {  # a record, what is read, what is to be written
    "mnli": (
        {"premise": "A man sleeps.", "hypothesis": "He is awake.", "label": 2},
        "mnli hypothesis: He is awake. premise: A man sleeps.", "contradiction",
    ),
    "stsb": ({"sentence1": "a", "sentence2": "b", "label": 3.25}, "stsb sentence1: a sentence2: b", "3.2"),
    "boolq": ({"passage": "P.", "question": "is it", "label": 1}, "boolq passage: P. question: is it", "True"),
    "cb": ({"premise": "p", "hypothesis": "h", "label": 2}, "cb hypothesis: h premise: p", "neutral"),
    "copa": (
        {"premise": "It rained.", "choice1": "wet", "choice2": "dry", "question": "effect", "label": 0},
        "copa choice1: wet choice2: dry premise: It rained. question: effect", "choice1",
    ),
    "multirc": (
        {"paragraph": "<b>Sent 1: </b>One.<br><b>Sent 2: </b>Two.<br>", "question": "q?", "answer": "a", "label": 0, "idx": {"paragraph": 3, "question": 5}},
        "multirc question: q? answer: a paragraph: Sent 1: One. Sent 2: Two.", "False",
    ),
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
    "arc_easy": (
        {"question": "q", "choices": {"label": [0, 1], "text": ["x", "y"]}, "answerKey": 1},
        "arc question: q choices: (A) x (B) y", "B",
    ),
    "natural_questions": (
        {"question": {"text": "who"}, "annotations": {"short_answers": {"text": [["Ann"], []]}, "yes_no_answer": [-1, 1]}},
        "nq question: who", "Ann",
    ),
    "wmt_en_de": ({"en": "That is good.", "de": "Das ist gut."}, "translate English to German: That is good.", "Das ist gut."),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_phrasing(name):
    record, inputs, targets = BY_HAND[name]
    example = BENCHMARKS[name].make(record)
    assert (example.inputs, example.targets) == (inputs, targets)
    if BENCHMARKS[name].options:
        assert targets in BENCHMARKS[name].options


def test_all_that_is_promised_is_there():
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
                    assert example.targets in (*task.options, "<unk>") or name.startswith("arc")


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
    builder = types.SimpleNamespace(as_data_source=lambda split, file_format: labelled)
    monkeypatch.setattr(benchmarks.sources, "tfds_builder", lambda *_: builder)
    task = benchmarks.task("wsc", DataSettings(data_dir="there"))
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
    builder = types.SimpleNamespace(as_data_source=lambda *_, **__: [record, record | {"annotations": none}])
    monkeypatch.setattr(benchmarks.sources, "tfds_builder", lambda *_: builder)
    task = benchmarks.task("natural_questions", DataSettings(data_dir="there"))
    assert [len(task.examples(split)) for split in tasks.SPLITS] == [1, 1]


def test_bytes_and_arrays_of_records_become_text_and_lists():
    record = {"a": b"x", "b": np.array([b"y", b"z"], object), "c": {"d": np.int64(3)}}
    assert benchmarks._plain(record) == {"a": "x", "b": ["y", "z"], "c": {"d": 3}}
