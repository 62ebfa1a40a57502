"""Tasks: what their examples are, what files become, what is refused, and metrics on hand-made cases."""

import bz2
import gzip
import json
import lzma
import re
from pathlib import Path

import pytest

from switchmoe.data import tasks
from switchmoe.data.errors import DataError
from switchmoe.data.tasks import Example, Task, baselines, embedded, metrics
from switchmoe.data.wiki_vital_en import builder
from switchmoe.settings import DataSettings, TaskSettings


def find(names, data=None, **settings):
    return tasks.find(TaskSettings(names=names, **settings), data or DataSettings())


@pytest.mark.parametrize("name", ["topic", "description", "title"])
def test_embedded_tasks_are_split_by_title_and_come_in_the_same_order(name):
    (task,) = find(name)
    train, held_out = task.examples("train"), task.examples("validation")
    assert train == task.examples("train") and 8000 < len(train) < 9600 and 400 < len(held_out) < 560
    titles = {
        record["title"] for record in builder.records() if builder.split_of(record["title"]) == "validation"
    }
    if name == "title":
        assert {example.targets for example in held_out} == titles
    assert not {example.inputs for example in train} & {example.inputs for example in held_out}


def test_no_title_is_asked_for_where_it_can_be_read():
    """Neither with a small letter nor in capitals; a title within a longer word is no title."""
    for split in tasks.SPLITS:
        for inputs, title, *_ in tasks.TASKS["title"].examples(split):
            text = inputs.partition(": ")[2]
            assert not re.search(rf"(?<!\w){re.escape(title)}s?(?!\w)", text, re.IGNORECASE)
    assert (
        embedded.hidden("An accordion: ACCORDIONS of accordionists", "Accordion")
        == "An It: It of accordionists"
    )


def test_topics_are_eleven_classes_and_every_target_is_one():
    (task,) = find("topic")
    assert len(task.options) == 11 and {example.targets for example in task.examples("train")} == set(
        task.options
    )
    assert embedded.NO_TOPIC not in task.options


def write(path, text):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        file.write(text)
    return str(path)


ROWS = [
    {"text": f"so {n}, it is", "label": "even" if n % 2 == 0 else "odd", "score": n / 10} for n in range(40)
]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.jsonl", JSONL),
        ("a.jsonl.gz", JSONL),
        ("a.json", json.dumps(ROWS)),
        ("a.csv", "text,label,score\n" + "".join(f'"{r["text"]}",{r["label"]},{r["score"]}\n' for r in ROWS)),
        (
            "a.tsv",
            "text\tlabel\tscore\n" + "".join(f"{r['text']}\t{r['label']}\t{r['score']}\n" for r in ROWS),
        ),
    ],
)
def test_files_of_each_kind_give_the_same_examples(tmp_path, name, text):
    path = write(tmp_path / name, text)
    data = DataSettings(validation_share=0.3)
    (task,) = find(path, data, inputs="parity of {text}", targets="{label}", options="even,odd")
    train, held_out = task.examples("train"), task.examples("validation")
    assert len(train) + len(held_out) == 40 and 4 < len(held_out) < 20
    assert Example("parity of so 7, it is", "odd") in (*train, *held_out)
    assert task.metrics == ("accuracy",) and task.options == ("even", "odd")


def test_a_quote_in_a_tsv_is_a_letter_and_an_open_one_in_a_csv_is_refused(tmp_path):
    rows = [f"plain {n}" for n in range(30)]
    rows[6], rows[13] = '"He said so', 'x" was near'
    for name, delimiter in (("a.tsv", "\t"), ("a.csv", ",")):
        write(
            tmp_path / name,
            "".join(f"{row}{delimiter}1\n" for row in ["text", *rows]).replace("1", "label", 1),
        )
    form = dict(inputs="{text}", targets="{label}")
    (task,) = find(str(tmp_path / "a.tsv"), DataSettings(validation_share=0.3), **form)
    found = [example.inputs for split in tasks.SPLITS for example in task.examples(split)]
    assert sorted(found) == sorted(rows)
    with pytest.raises(DataError, match="a.csv: after row 7: .*accepted is a table"):
        find(str(tmp_path / "a.csv"), DataSettings(validation_share=0.3), **form)


def test_numbers_are_rounded_by_the_template(tmp_path):
    path = write(tmp_path / "a.jsonl", JSONL)
    (task,) = find(path, DataSettings(validation_share=0.3), inputs="{text}", targets="{score:.0f}")
    assert {example.targets for example in task.examples("train")} == {"0", "1", "2", "3", "4"}
    path = write(tmp_path / "b.jsonl", JSONL + json.dumps({"text": "just below", "score": -0.3}) + "\n")
    assert "-0" in _all_targets(path, "{score:.0f}") and "-0" not in _all_targets(path, "{score:z.0f}")


def _all_targets(path, template):
    (task,) = find(path, DataSettings(validation_share=0.3), inputs="{text}", targets=template)
    return {example.targets for split in tasks.SPLITS for example in task.examples(split)}


def test_squads_format_has_questions_with_all_their_answers(tmp_path):
    qas = [
        {
            "question": f"who {n}?",
            "id": str(n),
            "answers": [{"text": "Ann"}, {"text": "Ann B"}, {"text": "Ann"}],
        }
        for n in range(30)
    ]
    whole = {"data": [{"title": "t", "paragraphs": [{"context": "Ann B did.", "qas": qas}]}]}
    (task,) = find(write(tmp_path / "a.json", json.dumps(whole)), DataSettings(validation_share=0.3))
    example = task.examples("train")[0]
    assert example.inputs.startswith("question: who ") and example.inputs.endswith(" context: Ann B did.")
    assert (
        example.targets == "Ann"
        and example.right == ("Ann", "Ann B")
        and task.metrics == ("exact_match", "f1")
    )


@pytest.mark.parametrize(
    "content, settings, message",
    [
        (JSONL, dict(inputs="{body}", targets="{label}"), "task.inputs={body}: .*a.jsonl:1 has no field 'body'; accepted are text, label, score"),
        (JSONL, dict(inputs="{text}", targets="{label}", options="even,two"), "gives 'odd'; accepted is one of task.options=even,two"),
        (JSONL + "{\n", dict(inputs="{text}", targets="{label}"), "a.jsonl:41: no JSON"),
        ("", dict(inputs="{text}", targets="{label}"), "no records"),
        (JSONL, dict(inputs="{text}", targets="{label}", metrics="speed"), "task.metrics=speed: accepted are accuracy"),
        (JSONL, dict(inputs="{text:d}", targets="{label}"), "task.inputs={text:d}: .*a.jsonl:1: Unknown format code"),
        (JSONL, dict(inputs="{text.x}", targets="{label}"), "task.inputs={text.x}: .*a.jsonl:1: 'str' object has no attribute 'x'"),
        (JSONL, dict(inputs="{text}", targets="{label[x]}"), "task.targets={label.x.}: .*a.jsonl:1: string indices"),
        ('{"text": "a", "label": null}\n', dict(inputs="{text}", targets="{label}"), "task.targets={label}: .*a.jsonl:1: label is null; accepted is"),
        ('{"text": "a", "label": null}\n', dict(inputs="{text}", targets="{label:.0f}"), "a.jsonl:1: label is null; accepted is"),
        ('{"text": "a", "label": [1]}\n', dict(inputs="{text}", targets="{label:.0f}"), "a.jsonl:1: unsupported format string"),
        ('{"text": "\\ud800", "label": "b"}\n', dict(inputs="{text}", targets="{label}"), "a.jsonl:1: .*surrogates not allowed"),
        ("[" * 100_000, dict(inputs="{text}", targets="{label}"), "a.jsonl:1: no JSON"),
        (JSONL, dict(inputs="{text}", targets="{label}", options="even,odd", metrics="f1_positive"), "none of task.options='even,odd' is the class"),
        (JSONL, dict(inputs="{text}", targets="{label}", metrics="pearson"), "task.metrics=pearson: the answer 'even' is no number"),
        (JSONL, dict(inputs="{text}", targets="{label}", metrics="wsc"), "task.metrics=wsc: of a benchmark's own answers; accepted are accuracy"),
    ],
)  # fmt: skip
def test_what_files_lack_is_one_line(tmp_path, content, settings, message):
    path = write(tmp_path / "a.jsonl", content)
    with pytest.raises(DataError, match=message) as caught:
        find(path, DataSettings(validation_share=0.3), **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", "text,label\na,b\n" + 140_000 * "c" + ",d\n", "a.csv: after row 2: field larger than field limit"),
        ("a.json", '{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": [{"text": null}]}]}]}]}', "SQuAD's format without text in each answer"),
        ("a.json", '{"data": [{"paragraphs": [{"context": null, "qas": [{"question": "q", "answers": []}]}]}]}', "context is null; accepted is"),
    ],
)  # fmt: skip
def test_tables_and_squads_format_that_can_not_be_read_are_one_line(tmp_path, name, content, message):
    path, plain = write(tmp_path / name, content), dict(inputs="{text}", targets="{label}")
    with pytest.raises(DataError, match=message) as caught:
        find(path, DataSettings(validation_share=0.3), **(plain if name == "a.csv" else {}))
    assert "\n" not in str(caught.value)


def test_an_unknown_task_an_empty_split_and_a_missing_file_are_refused(tmp_path):
    with pytest.raises(
        DataError, match="task.names=topics: no such task; accepted are topic, description, title"
    ):
        find("topic,topics")
    path = write(tmp_path / "a.jsonl", JSONL)
    with pytest.raises(DataError, match="its split validation is empty"):
        find(path, DataSettings(validation_share=1e-6), inputs="{text}", targets="{label}")
    with pytest.raises(DataError, match="task.names=.*none.csv: no file matches"):
        find(str(tmp_path / "none.csv"))


def test_held_out_files_are_named_by_their_field(tmp_path):
    for name, message in ((str(tmp_path / "none.csv"), "no file matches"), (write(tmp_path / "a.csv", "a\n"), "no records")):  # fmt: skip
        settings = TaskSettings(names="topic", held_out=name, inputs="{a}", targets="{a}")
        with pytest.raises(DataError, match=f"^task.held_out={re.escape(name)}: {message}"):
            tasks.find(settings, DataSettings(), "held_out")


@pytest.mark.parametrize("split", tasks.SPLITS)
def test_a_tasks_own_answers_are_among_its_options(monkeypatch, split):
    rows = [Example(str(n), "no" if n % 7 else "never") for n in range(300)]
    examples = lambda asked: rows if asked == split else rows[1:2]  # noqa: E731
    monkeypatch.setitem(tasks.TASKS, "t", Task("t", examples, ("accuracy",), ("yes", "no")))
    message = f"task.names=t: an example of its split {split} has the answer 'never'; accepted is one of its options yes, no"
    with pytest.raises(DataError, match=message):
        find("t")


@pytest.mark.parametrize("packing", [".xz", ".bz2", ".zst"])
def test_a_glob_of_packed_files_is_all_of_them(tmp_path, packing):
    if packing == ".zst":
        opener = pytest.importorskip("zstandard").open
    else:
        opener = {".xz": lzma.open, ".bz2": bz2.open}[packing]
    lines = JSONL.splitlines(keepends=True)
    for name, part in (("a", lines[:25]), ("b", lines[25:])):
        with opener(tmp_path / f"{name}.jsonl{packing}", "wt", encoding="utf-8") as file:
            file.write("".join(part))
    form = dict(inputs="{text}", targets="{label}")
    (task,) = find(str(tmp_path / f"*.jsonl{packing}"), DataSettings(validation_share=0.3), **form)
    found = [example.inputs for split in tasks.SPLITS for example in task.examples(split)]
    assert sorted(found) == sorted(row["text"] for row in ROWS)


def test_metrics_by_hand():
    """SQuAD's script: articles, punctuation and case are set aside; F1 of the shared words, best of the answers."""
    right = [("the Eiffel Tower",), ("in 1889", "1889"), ("Gustave",)]
    found = ["Eiffel tower.", "1889", "Eiffel Gustave"]
    assert metrics.exact_match(found, right) == pytest.approx(200 / 3)
    assert metrics.f1(found, right) == pytest.approx(100 * (1 + 1 + 2 / 3) / 3)
    assert metrics.accuracy([" a ", "b"], [("a",), ("c",)]) == 50


def test_libraries_metrics():
    # a: precision 1/2, recall 1; b: 1, 1/2; so each class has F1 of 2/3
    assert metrics.macro_f1(["a", "a", "b"], [("a",), ("b",), ("b",)]) == pytest.approx(200 / 3)
    assert metrics.matthews(["a", "b"], [("a",), ("b",)]) == pytest.approx(100)
    # longest common subsequence of 2 among 3 and 2 words: P 2/3, R 1
    assert metrics.rouge_l(["city of France"], [("city France",)]) == pytest.approx(80)
    assert metrics.rouge_1(["x", "city"], [("city",), ("town", "city")]) == pytest.approx(50)
    pytest.importorskip("sacrebleu")
    assert metrics.bleu(["the cat sat on the mat"], [("the cat sat on the mat", "a cat")]) == pytest.approx(
        100
    )


def test_the_walk_through_of_the_docs_adds_a_task():
    page = (Path(__file__).parents[2] / "docs" / "fine_tuning.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    exec(code, {})
    try:
        (task,) = find("even")
        assert task.examples("train")[3] == Example("is 3 even?", "no")
    finally:
        del tasks.TASKS["even"]


def test_baselines_by_hand():
    """Two thirds of the classes are `a`, told by a word that words alone find."""
    rows = [
        Example(f"t: {'red' if n % 3 else 'blue'} house {n % 7}", "a" if n % 3 else "b") for n in range(90)
    ]
    task = Task("t", lambda split: rows, ("accuracy",), ("a", "b"))
    found = baselines.scores(task, rows[:30])
    assert found["majority"] == pytest.approx(200 / 3)
    assert found["TF-IDF"] == 100
    chinese = [
        Example(f"t: \u6771\u4eac{n}", row.targets) for n, row in enumerate(rows)
    ]  # no word comes twice
    assert list(baselines.scores(Task("t", lambda split: chinese, ("accuracy",), ("a", "b")), rows)) == [
        "majority"
    ]
    texts = [Example("describe: one two three four five six", "one two three four five")]
    assert baselines.scores(Task("t", lambda split: texts, ("exact_match",)), texts) == {
        "first five words": 100
    }
