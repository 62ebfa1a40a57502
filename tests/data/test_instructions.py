"""Instructions: families, wordings and inverses, what is right, the split by title; solved examples before a question."""

import random
import re

import numpy as np
import pytest

from switchmoe.data import pairs, tasks
from switchmoe.data.errors import DataError
from switchmoe.data.tasks import Example, Task, embedded, few_shot, instructions
from switchmoe.data.tasks.wordings import INVERTED_WORDINGS, WORDINGS
from switchmoe.settings import DataSettings, TaskSettings

ALL = {task.name.removeprefix(instructions.PREFIX): task for task in instructions.tasks()}


def find(names, field="names", **settings):
    return tasks.find(TaskSettings(names=names, **settings), DataSettings(), field)


def sample(name, split, count=60):
    return pairs.spread(ALL[name].examples(split), count)


def test_there_are_families_enough_in_wordings_enough():
    assert len(instructions.FAMILIES) >= 8 and len(INVERTED_WORDINGS) >= 4
    assert instructions.FAMILIES.keys() == WORDINGS.keys()
    assert all(len(set(wordings)) >= 5 for wordings in WORDINGS.values())
    assert tasks.MIXTURES["instruct"] == tuple(task.name for task in find("instruct"))


@pytest.mark.parametrize("name", ALL)
def test_examples_are_the_same_each_time_and_each_record_comes_in_each_wording(name):
    again = {task.name: task for task in instructions.tasks()}[instructions.PREFIX + name]
    assert sample(name, "train") == pairs.spread(again.examples("train"), 60)
    examples = ALL[name].examples("train")
    wordings = {**WORDINGS, **{f"{one}_inverted": of for one, of in INVERTED_WORDINGS.items()}}[name]
    records = len(examples) // len(wordings)
    assert 6000 < records < 9600 and 350 < len(ALL[name].examples("validation")) < 560
    patterns = [re.sub(r"\\\{\w+\\\}", ".*", re.escape(wording)) for wording in wordings]
    of_one = [examples[5 + turn * records].inputs for turn in range(len(wordings))]
    for pattern in patterns:
        assert any(re.fullmatch(pattern, inputs, re.DOTALL) for inputs in of_one), pattern
    for example in sample(name, "train") + sample(name, "validation"):
        assert example.targets and (not ALL[name].options or example.targets in ALL[name].options)
        assert example.targets.strip() == example.targets


def test_answers_are_right():
    by_text = {
        record["title"]: record["text"] for split in tasks.SPLITS for record in embedded.records(split)
    }
    texts = " ".join(by_text.values())
    topic_of = {r["title"]: r["topic"] for split in tasks.SPLITS for r in embedded.records(split)}
    for gapped in (example.targets for example in sample("blank_inverted", "train", 20)):
        left, right = gapped.split("___")
        assert re.search(f"{re.escape(left)}[a-z]{{6,}}{re.escape(right)}", texts)
    for example in sample("blank", "train", 20):
        assert example.targets in example.inputs and example.inputs.count("___") in (1, 2)
    for example in sample("spelling", "validation", 20):
        wrong = [
            word for word in re.findall(r"[a-z]+", example.inputs) if sorted(word) == sorted(example.targets)
        ]
        assert example.targets in texts and set(wrong) - {example.targets}
    for example in sample("capitals", "train", 20):
        assert example.targets.lower() in example.inputs and example.targets in texts
    for example in sample("order", "train", 20):
        a, b = re.search(r"A: (.*) B: (.*)", example.inputs).groups()
        first, second = (a, b) if example.targets == "A" else (b, a)
        assert any(-1 < text.find(first[:20]) < text.find(second[:20]) for text in by_text.values())
    for record in pairs.spread(embedded.records("train"), 20):
        fields = instructions.FAMILIES["odd"].make(record, random.Random(0), "train")
        if fields:
            found = [topic_of[title] for title in fields["titles"].split("; ")]
            assert found.count(topic_of[fields["answer"]]) == 1 and len(set(found)) == 2 and len(found) == 4
    yes = np.mean([example.targets == "yes" for example in sample("matches", "train", 400)])
    first = np.mean([example.targets == "A" for example in sample("next", "train", 400)])
    assert 0.4 < yes < 0.6 and 0.4 < first < 0.6


@pytest.mark.parametrize(
    "name", ["instruct_next@2", "instruct_matches", "instruct_odd@1", "instruct_blank", "topic@2"]
)
def test_nothing_of_held_out_titles_is_read_in_training(name):
    (task,) = find(name)
    openings = {record["text"][:60] for record in embedded.records("validation")}
    openings |= {
        second[:60] for record in embedded.records("validation") for second in instructions.sentences(record["text"])[1:2]
        if len(second) > 60
    }  # fmt: skip
    read = "\n".join(example.prompt for example in pairs.spread(task.examples("train"), 150))
    assert not [opening for opening in openings if opening in read]
    held_out = "\n".join(example.inputs for example in task.examples("validation")[:20])
    assert any(opening in held_out for opening in openings) or "odd" in name


def test_titles_that_distract_are_of_the_same_split():
    titles = {record["title"] for record in embedded.records("validation")}
    for example in sample("odd", "train", 200):
        assert not titles & set(re.split(r"; |\? |: ", example.inputs.removesuffix(".")))


def test_a_family_that_is_held_out_is_not_trained_on_nor_inverted():
    trained = {task.name for task in find("instruct,instruct@2", held_out="instruct_topic,instruct_blank@3")}
    assert "instruct_odd" in trained and "instruct_odd@2" in trained
    assert not [name for name in trained if "topic" in name or "blank" in name]
    found = find("instruct", "held_out", held_out="instruct_topic,instruct_blank@3")
    assert [task.name for task in found] == ["instruct_topic", "instruct_blank@3"]
    for names, held_out in (
        ("topic", "topic@2"),
        ("instruct_topic,instruct_odd", "instruct_topic"),
        ("instruct_title_inverted@2", "instruct_title"),
        ("topic,instruct", "instruct_topic"),
        ("instruct_question", "description"),
    ):
        with pytest.raises(DataError, match="of a family that task.held_out=.* keeps from training"):
            find(names, held_out=held_out)
    left = {task.name for task in find("instruct", held_out="instruct_topic_inverted,description")}
    assert not {"instruct_topic", "instruct_question", "instruct_description"} & left and len(left) > 8
    with pytest.raises(DataError, match="nothing is left of task.names=instruct to train on"):
        find("instruct", held_out=",".join(f"instruct_{name}" for name in instructions.FAMILIES))


def test_a_mixtures_rate_is_of_all_its_tasks():
    settings = TaskSettings(names="topic,instruct", mixture="rates", rates="1,3")
    share_T = pairs.shares(tasks.find(settings, DataSettings()), settings)
    np.testing.assert_allclose(share_T, [0.25] + [0.75 / len(ALL)] * len(ALL))


def letters(count=9, name="t"):
    train = tuple(Example(f"q{n}", f"a{n}") for n in range(count))
    held_out = tuple(Example(f"v{n}", f"w{n}") for n in range(4))
    return Task(name, lambda split: train if split == "train" else held_out, ("accuracy",))


def test_solved_examples_are_of_training_and_not_the_question_itself():
    shown = few_shot.with_shots(letters(), 3, "task.shots=3")
    assert shown.name == "t@3" and len(shown.examples("train")) == 9
    for split, mark in (("train", "q"), ("validation", "v")):
        for number, example in enumerate(shown.examples(split)):
            assert example.inputs == f"Question: {mark}{number}\nAnswer:" and len(set(example.shots)) == 3
            for shot in example.shots:
                (question, answer) = re.fullmatch(r"Question: q(\d)\nAnswer: a(\d)\n\n", shot).groups()
                assert question == answer and (mark == "v" or int(question) != number)
    drawn = [example.shots for example in shown.examples("validation")]
    assert len(set(drawn)) > 1
    again = few_shot.with_shots(letters(), 3, "").examples("validation")
    assert drawn == [example.shots for example in again]
    assert pairs.fingerprint(shown, "train") == pairs.fingerprint(letters(), "train")
    with pytest.raises(DataError, match="^task.shots=9: t has 9 training examples; accepted are fewer"):
        few_shot.with_shots(letters(), 9, "task.shots=9")


class Characters:
    eos_id, pad_id, size = 1, 0, 200

    def encode(self, text):
        return np.array([ord(letter) for letter in text], np.int32)


def test_where_there_is_no_room_solved_examples_go_and_the_question_stays():
    example = Example("qqqq", "a", shots=("1111", "22"))
    read = {}
    for length in (11, 10, 7, 5, 4):
        data = DataSettings(batch_size=4, input_length=length, target_length=4)
        encoder = pairs.Encoder(data, ("encoder", "decoder"), Characters())
        read[length] = "".join(map(chr, encoder.prompt(example)[:-1])), encoder.is_cut(example)[0]
    assert read == {
        11: ("111122qqqq", False), 10: ("22qqqq", True), 7: ("22qqqq", True), 5: ("qqqq", True), 4: ("qqq", True)
    }  # fmt: skip


def test_names_with_counts():
    assert few_shot.parted("topic@2") == ("topic", 2) and few_shot.parted("topic") == ("topic", 0)
    assert few_shot.parted("a@b.jsonl") == ("a@b.jsonl", 0) and few_shot.parted("a@b.csv@3") == ("a@b.csv", 3)
    with pytest.raises(DataError, match="task.names=topics: no such task"):
        find("topics@2")
