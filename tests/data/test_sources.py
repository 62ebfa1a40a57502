"""Corpora by name: the embedded one, tfds datasets, and a clear line for each that cannot be read. Files: test_local_files.py."""

import collections
import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from switchmoe.data import local_files, sources
from switchmoe.data.errors import DataError
from switchmoe.data.wiki_vital_en import builder as wiki
from switchmoe.settings import DataSettings


class Reviews(tfds.core.GeneratorBasedBuilder):
    """A small dataset with a test split and no validation split."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"review": tfds.features.Text(), "stars": tfds.features.Scalar(np.int32)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        del dl_manager
        return {name: self._generate_examples(name) for name in ("train", "test")}

    def _generate_examples(self, split):
        for n in range(10 if split == "train" else 4):
            yield f"{split}{n}", {"review": f"{split} review {n}", "stars": n}


class OnlyTrain(Reviews):
    def _split_generators(self, dl_manager):
        del dl_manager
        return {"train": self._generate_examples("train")}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A data_dir with the embedded corpus and the two small datasets."""
    data_dir = str(tmp_path_factory.mktemp("data"))
    sources.load(DataSettings(data_dir=data_dir), "train")
    for builder in (Reviews, OnlyTrain):
        builder(data_dir=data_dir, file_format="array_record").download_and_prepare(
            download_dir=str(tmp_path_factory.mktemp("downloads"))
        )
    return data_dir


def texts(documents) -> list[str]:
    return [documents[n] for n in range(len(documents))]


def refusal(settings: DataSettings, split: str = "train") -> str:
    with pytest.raises(DataError) as error:
        texts(sources.load(settings, split))
    assert "\n" not in str(error.value)
    return str(error.value)


# The embedded corpus.


def test_the_embedded_corpus_is_split_by_title_for_good():
    titles = [record["title"] for record in wiki.records()]
    counts = collections.Counter(map(wiki.split_of, titles))
    assert counts == {"train": 9501, "validation": 513}
    assert len(set(titles)) == 10014
    held_out = [title for title in titles if wiki.split_of(title) == "validation"]
    assert held_out[:3] == ["Adventures of Huckleberry Finn", "Analects", "Ancient Greek art"]


def test_the_embedded_corpus_is_prepared_on_first_use(prepared):
    settings = DataSettings(data_dir=prepared)
    splits = {split: texts(sources.load(settings, split)) for split in ("train", "validation")}
    assert {split: len(found) for split, found in splits.items()} == {"train": 9501, "validation": 513}
    assert not set(splits["train"]) & set(splits["validation"])
    assert sorted(splits["train"] + splits["validation"]) == sorted(
        record["text"] for record in wiki.records()
    )
    assert not [name for name in os.listdir(prepared) if name.startswith(".")]


def test_the_embedded_corpus_keeps_topic_and_description(prepared):
    source = tfds.builder("wiki_vital_en", data_dir=prepared).as_data_source("validation")
    stored = {record["title"]: record for record in wiki.records()}
    for record in (source[0], source[100]):
        fields = {name: value.decode() for name, value in record.items()}
        expected = stored[fields["title"]]
        assert fields["description"] == expected.pop("short")
        assert {name: fields[name] for name in expected} == expected
    topics = {source[n]["topic"].decode() for n in range(len(source))}
    assert len(topics) == 12 and "Mathematics" in topics
    titles = sources.load(DataSettings(data_dir=prepared, text_field="title"), "validation")
    assert {wiki.split_of(title) for title in texts(titles)} == {"validation"}


def test_preparing_is_silent_and_the_default_cache_follows_xdg(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert sources.cache_directory(DataSettings()) == str(tmp_path / "switchmoe")
    assert len(sources.load(DataSettings(), "validation")) == 513
    assert (tmp_path / "switchmoe" / "wiki_vital_en" / "1.0.0" / "dataset_info.json").exists()
    assert capfd.readouterr() == ("", "")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert sources.cache_directory(DataSettings()) == os.path.expanduser("~/.cache/switchmoe")


def test_two_processes_may_prepare_at_the_same_time(tmp_path):
    program = (
        "import sys; from switchmoe.data import sources; from switchmoe.settings import DataSettings;"
        "print(len(sources.load(DataSettings(data_dir=sys.argv[1]), 'train')))"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) for _ in range(2)]
    assert [process.communicate()[0] for process in running] == [b"9501\n", b"9501\n"]
    assert os.listdir(tmp_path) == ["wiki_vital_en"]


def test_losing_the_race_to_prepare_is_no_error(tmp_path, monkeypatch):
    original = wiki.WikiVitalEn.download_and_prepare

    def slow(self, **arguments):
        monkeypatch.setattr(wiki.WikiVitalEn, "download_and_prepare", original)
        sources.prepare_embedded(str(tmp_path))
        original(self, **arguments)

    monkeypatch.setattr(wiki.WikiVitalEn, "download_and_prepare", slow)
    assert len(sources.load(DataSettings(data_dir=str(tmp_path)), "train")) == 9501
    assert os.listdir(tmp_path) == ["wiki_vital_en"]


def test_what_stops_the_preparation_leaves_nothing_half_made(tmp_path, monkeypatch):
    def full(self, **arguments):
        os.makedirs(self.data_path)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(wiki.WikiVitalEn, "download_and_prepare", full)
        message = refusal(DataSettings(data_dir=str(tmp_path)))
    assert f"data.data_dir={tmp_path}" in message and "No space left on device" in message
    # Killed, it leaves its temporary directory behind, which nothing looks at.
    (tmp_path / ".wiki_vital_en-killed" / "wiki_vital_en").mkdir(parents=True)
    assert len(sources.load(DataSettings(data_dir=str(tmp_path)), "validation")) == 513


def test_a_data_dir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    assert f"data.data_dir={tmp_path}/file" in refusal(DataSettings(data_dir=str(tmp_path / "file")))


def test_a_truncated_embedded_corpus_is_named(tmp_path):
    settings = DataSettings(data_dir=str(tmp_path))
    sources.prepare_embedded(str(tmp_path))
    for path in tmp_path.rglob("*train.array_record*"):
        os.truncate(path, 5000)
    message = refusal(settings)
    assert str(tmp_path / "wiki_vital_en") in message and "prepare it again" in message


# Other tfds datasets.


def test_c4_by_name_through_the_mock_of_tfds(tmp_path):
    with tfds.testing.mock_data(num_examples=7):
        documents = sources.load(DataSettings(source="c4/en", data_dir=str(tmp_path)), "train")
        found = texts(documents)
    assert len(found) == 7 and all(isinstance(text, str) and text for text in found)


def test_unprepared_c4_says_how_to_prepare_it(tmp_path):
    message = refusal(DataSettings(source="c4/en", data_dir=str(tmp_path)))
    assert "data.source=c4/en: not prepared" in message
    assert f"tfds build c4/en --file_format=array_record --data_dir={tmp_path}" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "source", ["no_such_corpus", "c4/xx", "c4/en:9.9.9", "not a name", "c4/", "text.csv"]
)
def test_unknown_names_are_refused(tmp_path, source):
    message = refusal(DataSettings(source=source, data_dir=str(tmp_path)))
    assert message.startswith(f"data.source={source}: ") and "accepted is" in message


def test_a_dataset_of_ones_own_is_read_by_name(prepared):
    settings = DataSettings(source="reviews", data_dir=prepared, text_field="review")
    assert sorted(texts(sources.load(settings, "train"))) == [f"train review {n}" for n in range(10)]
    held_out = sources.load(settings, "validation")  # it has none: its test split
    assert sorted(texts(held_out)) == [f"test review {n}" for n in range(4)]
    assert held_out.fingerprint != sources.load(settings, "train").fingerprint


def test_fields_and_splits_that_a_dataset_lacks_are_named(prepared):
    message = refusal(DataSettings(source="reviews", data_dir=prepared))
    assert "data.text_field=text" in message and "review, stars" in message
    message = refusal(DataSettings(source="reviews", data_dir=prepared, text_field="stars"))
    assert "data.text_field=stars" in message and "not text" in message


def names(documents) -> set[str]:
    return set(texts(documents))


def test_a_dataset_with_train_alone_holds_out_by_hash(prepared):
    """Disjoint, all of it, the same again, and a document's side does not depend on the share of the others."""
    given = DataSettings(source="only_train", data_dir=prepared, text_field="review", validation_share=0.4)
    both = sources.load_splits(given)
    train, held_out = names(both["train"]), names(both["validation"])
    assert not train & held_out and train | held_out == {f"train review {n}" for n in range(10)}
    wanted = {text for text in train | held_out if local_files.fraction(text) < 0.4}
    assert held_out == wanted and 0 < len(held_out) < 10
    again = sources.load_splits(given)
    assert {k: texts(v) for k, v in again.items()} == {k: texts(v) for k, v in both.items()}
    assert {k: v.fingerprint for k, v in again.items()} == {k: v.fingerprint for k, v in both.items()}
    assert both["train"].fingerprint != both["validation"].fingerprint
    larger = sources.load_splits(dataclasses.replace(given, validation_share=0.7))
    assert held_out <= names(larger["validation"])
    message = refusal(dataclasses.replace(given, validation_share=1e-9), "validation")
    assert "data.validation_share=1e-09: leaves no validation document" in message


def test_parts_of_splits(prepared):
    def load(**splits):
        given = DataSettings(source="reviews", data_dir=prepared, text_field="review", **splits)
        return {name: texts(documents) for name, documents in sources.load_splits(given).items()}

    whole = load()
    parts = load(train_split="train[:80%]", validation_split="train[80%:]")
    assert parts["train"] + parts["validation"] == whole["train"] and len(parts["validation"]) == 2
    assert load(train_split="train[2:5]") == {"train": whole["train"][2:5], "validation": whole["validation"]}
    assert (
        load(train_split="train+test[:2]", validation_split="test[2:]")["train"][10:]
        == whole["validation"][:2]
    )
    given = DataSettings(
        source="only_train",
        data_dir=prepared,
        text_field="review",
        train_split="train[:60%]",
        validation_share=0.4,
    )
    held_out = sources.load_splits(given)
    assert len(held_out["train"]) + len(held_out["validation"]) == 6
    for splits, message in (
        (dict(train_split="train[:90%]", validation_split="train[80%:]"), "shares documents with data.train_split=train[:90%]"),
        (dict(validation_split="train"), "data.validation_split=train: shares documents"),
        (dict(train_split="trian"), "data.train_split=trian: Unknown split 'trian'"),
        (dict(validation_split="test[:5"), "data.validation_split=test[:5: "),
    ):  # fmt: skip
        given = DataSettings(source="reviews", data_dir=prepared, text_field="review", **splits)
        with pytest.raises(DataError) as error:
            sources.load_splits(given)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_another_file_format_says_how_to_convert_it(tmp_path):
    Reviews(data_dir=str(tmp_path), file_format="array_record").download_and_prepare(
        download_dir=str(tmp_path / "downloads")
    )
    (info,) = tmp_path.glob("reviews/*/dataset_info.json")
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    message = refusal(DataSettings(source="reviews", data_dir=str(tmp_path), text_field="review"))
    assert "holds tfrecord" in message and "convert_format" in message


def test_a_damaged_description_is_named(tmp_path):
    Reviews(data_dir=str(tmp_path), file_format="array_record").download_and_prepare(
        download_dir=str(tmp_path / "downloads")
    )
    (info,) = tmp_path.glob("reviews/*/dataset_info.json")
    info.write_text("")
    message = refusal(DataSettings(source="reviews", data_dir=str(tmp_path), text_field="review"))
    assert f"description of the dataset in {tmp_path} is damaged" in message


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    message = refusal(DataSettings(source="c4/en", data_dir=str(tmp_path)))
    assert "tensorflow_datasets" in message and "missing" in message


def test_only_two_splits_exist(prepared):
    with pytest.raises(DataError, match="train, validation"):
        sources.load(DataSettings(data_dir=prepared), "test")
