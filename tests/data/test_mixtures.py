"""Mixtures of files: shares by mT5's exponent, each part whole in each epoch, held out and measured by itself."""

import collections
import dataclasses
import json
import re

import pytest
from test_run import losses, run_here

from switchmoe.data import batches, prepared, sources
from switchmoe.data.errors import DataError
from switchmoe.settings import DataSettings

SIZES = {"de": 160, "en": 640, "fi": 40}


@pytest.fixture
def files(tmp_path):
    """A file a language; the pages with one id are there in each language that has so many."""
    for part, size in SIZES.items():
        rows = [
            {"id": number, "text": f"{part} {number} " + "word " * (20 + number % 7)}
            for number in range(size)
        ]
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSettings(source=f"{tmp_path}/*.jsonl", data_dir=str(tmp_path / "cache"), parts="file")


def names(documents, order):
    return [order[place].split()[0] for place in range(len(documents) and 4000)]


@pytest.mark.parametrize("exponent", [0.0, 0.2, 1.0])
def test_parts_are_read_by_their_documents_to_a_power(files, exponent):
    train = sources.load_splits(files)["train"]
    sizes = {part: len(numbers) for part, numbers in train.parts.items()}
    assert list(sizes) == list(SIZES) and sum(sizes.values()) == len(train)
    found = collections.Counter(names(train, batches.document_order(train, 0, exponent=exponent)))
    total = sum(size**exponent for size in sizes.values())
    for part, size in sizes.items():
        assert found[part] / 4000 == pytest.approx(size**exponent / total, rel=0.02)


def test_streams_meet_all_parts_and_together_each_document_once_an_epoch(files):
    train = sources.load_splits(files)["train"]
    streams = [batches.document_order(train, 3, stream, 8, exponent=0.0) for stream in range(8)]
    for order in streams:
        found = collections.Counter(names(train, order)[:300])
        assert len(found) == 3 and max(found.values()) < 2 * min(found.values())
    # 512 places of the order, a third of which are of the smallest part: some four epochs of it.
    smallest = [order[place] for place in range(64) for order in streams if order[place].startswith("fi")]
    counts = collections.Counter(smallest)
    assert len(counts) == len(train.parts["fi"]) and max(counts.values()) - min(counts.values()) <= 2


@pytest.mark.parametrize("split_field", ["", "id"])
def test_shards_have_the_parts_that_memory_has(files, monkeypatch, split_field):
    """Also where what was prepared first was cut short."""
    files = dataclasses.replace(files, split_field=split_field)
    inside = sources.load_splits(files)
    monkeypatch.setattr(prepared, "IN_MEMORY", 0)
    monkeypatch.setattr(prepared, "SHARD", 4000)
    writing, written = prepared._Shards.write, []

    def write(self, *arguments):
        written.append(arguments)
        if len(written) == 700:
            raise KeyboardInterrupt
        writing(self, *arguments)

    monkeypatch.setattr(prepared._Shards, "write", write)
    with pytest.raises(KeyboardInterrupt):
        sources.load_splits(files)
    outside = sources.load_splits(files)
    assert 700 < len(written) < 1500, "some of it was not written again"
    for split, documents in inside.items():
        assert outside[split].fingerprint == documents.fingerprint
        for part, numbers in documents.parts.items():
            one, other = (sources.part(found[split], part) for found in (inside, outside))
            assert [one[n] for n in range(len(numbers))] == [other[n] for n in range(len(other))]
            assert all(one[n].split()[0] == part for n in range(len(numbers)))


def test_a_page_is_held_out_in_all_languages_or_in_none(files):
    found = sources.load_splits(dataclasses.replace(files, split_field="id", validation_share=0.3))
    ids = {
        split: {re.search(r"\d+", documents[n])[0] for n in range(len(documents))}
        for split, documents in found.items()
    }
    assert not ids["train"] & ids["validation"]
    assert 0.2 < len(found["validation"]) / sum(SIZES.values()) < 0.4


def test_documents_that_move_to_another_file_are_another_text(files, tmp_path):
    before = sources.load_splits(files)
    (tmp_path / "de.jsonl").rename(tmp_path / "at.jsonl")
    after = sources.load_splits(files)
    assert before["train"].fingerprint != after["train"].fingerprint
    plain = dataclasses.replace(files, parts="")
    assert not sources.load_splits(plain)["train"].parts


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(split_field="page"), r"data.split_field=page: neither a string nor an integer in .*de.jsonl, line 1; accepted is a field"),
        (dict(validation_share=0.01), "data.parts=file: .* has no validation document; accepted are files with"),
        (dict(source="wiki_vital_en"), "data.parts=file: accepted with wiki_vital_en is '', or local files"),
    ],
)  # fmt: skip
def test_mistakes_are_named(files, change, message):
    with pytest.raises(DataError, match=message):
        sources.load_splits(dataclasses.replace(files, **change))


def test_files_of_one_name_and_text_without_fields(files, tmp_path):
    (tmp_path / "de.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match="two files are called de"):
        sources.load_splits(dataclasses.replace(files, source=f"{tmp_path}/de.*"))
    with pytest.raises(DataError, match="de.txt has no fields; accepted is '', or files of JSON records"):
        sources.load_splits(dataclasses.replace(files, source=f"{tmp_path}/de.txt", split_field="id"))


@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_an_exponent_lies_between_0_and_1(value):
    with pytest.raises(ValueError, match="data.parts_exponent=.*: accepted is a number from 0 to 1"):
        DataSettings(parts_exponent=value)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_run_tells_of_each_part(files, tmp_path, capsys):
    """Records, and in the report a table and a picture; padding of a small part's batch counts nowhere."""
    asked = [
        "--config.data.parts=file",
        "--config.data.validation_share=0.2",
        "--config.data.vocab_size=300",
        "--config.train.num_steps=8",
    ]
    workdir = tmp_path / "run"
    code, said = run_here(tmp_path, capsys, f"--config.data.source={files.source}", *asked)
    assert code == 0 and "validation/de" not in said.err
    records = [record for record in losses(workdir) if record["split"] != "train"]
    assert [record["split"] for record in records] == [
        "validation",
        *(f"validation/{part}" for part in SIZES),
    ]
    assert len({record["cross_entropy"] for record in records}) == 4
    page = (workdir / "report.html").read_text()
    assert "Parts of the mixture" in page and (workdir / "plots" / "parts.png").stat().st_size > 10_000
