"""Local files of text: lines, records and blocks, plain and packed; how they are split; a clear line for each that cannot be read."""

import bz2
import gzip
import json
import lzma
import os
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from test_sources import refusal, texts

from switchmoe.data import sources
from switchmoe.settings import DataSettings

LINES = [f"Document {n} is about the number {n}." for n in range(400)]


def local(tmp_path, name: str, content: str | bytes, **values) -> DataSettings:
    openers = {".gz": gzip.open, ".xz": lzma.open}
    with openers.get(os.path.splitext(name)[1], open)(tmp_path / name, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
    return DataSettings(source=str(tmp_path / name), **values)


def both(settings: DataSettings) -> list[str]:
    return [text for split in ("train", "validation") for text in texts(sources.load(settings, split))]


@pytest.mark.parametrize("packing", ["", ".gz", ".xz"])
def test_a_line_a_document(tmp_path, packing):
    settings = local(tmp_path, "a.txt" + packing, "\ufeff" + "\r\n\n".join(LINES))
    train, held_out = (texts(sources.load(settings, split)) for split in ("train", "validation"))
    assert sorted(train + held_out) == sorted(LINES)
    assert 5 <= len(held_out) <= 40
    assert train == [line for line in LINES if line in set(train)]  # in the files' order


@pytest.mark.parametrize("packing", ["", ".gz", ".xz"])
def test_a_json_record_a_line(tmp_path, packing):
    lines = [json.dumps({"id": n, "body": f" {text}\n"}) for n, text in enumerate(LINES)]
    settings = local(tmp_path, "a.jsonl" + packing, "\n".join(lines), text_field="body")
    assert sorted(both(settings)) == sorted(LINES)


def test_a_block_a_document(tmp_path):
    content = "one\n two\n\n \n\nthree\n\n\n" + "\n\n".join(LINES)
    settings = local(tmp_path, "a.txt", content, documents="block")
    assert sorted(both(settings)) == sorted(["one\n two", "three", *LINES])


def test_globs_join_files_and_the_split_is_by_document(tmp_path):
    (tmp_path / "deep").mkdir()
    local(tmp_path, "b.txt", "\n".join(LINES[:100]))
    local(tmp_path / "deep", "a.txt", "\n".join(LINES[100:]))
    whole = local(tmp_path, "whole.txt.gz", "\n".join(reversed(LINES)))
    globbed = DataSettings(source=str(tmp_path / "**" / "*.txt"))
    held_out = texts(sources.load(whole, "validation"))
    assert texts(sources.load(globbed, "validation")) == held_out  # whatever the order of the documents
    assert len(sources.load(globbed, "train")) + len(held_out) == 400
    larger = DataSettings(source=whole.source, validation_share=0.5)
    assert texts(sources.load(larger, "validation"))[: len(held_out)] == held_out


def test_the_fingerprint_follows_the_text(tmp_path):
    first = sources.load(local(tmp_path, "a.txt", "\n".join(LINES)), "train")
    assert sources.load(local(tmp_path, "b.txt", "\n".join(LINES)), "train").fingerprint == first.fingerprint
    changed = "\n".join(LINES).replace("Document", "document", 1)
    assert sources.load(local(tmp_path, "a.txt", changed), "train").fingerprint != first.fingerprint


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.xz", "a.jsonl.xz"])
@pytest.mark.parametrize("damage", ["truncated", "foreign", "flipped"])
def test_damaged_files_are_named(tmp_path, name, damage):
    content = "\n".join(json.dumps({"text": os.urandom(40).hex()}) for _ in range(500))
    settings = local(tmp_path, name, content)
    path = tmp_path / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes({"truncated": data[:-500], "foreign": b"not packed\n", "flipped": data}[damage])
    message = refusal(settings)
    assert str(path) in message and "line" in message


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.txt", b"fine\nna\xefve\n", ("a.txt, line 2", "UTF-8")),
        ("a.jsonl", '{"text": "a"}\n{"text": "b', ("a.jsonl, line 2", "not a JSON record")),
        ("a.jsonl", '{"text": "a"}\n' + "[" * 100_000, ("a.jsonl, line 2", "not a JSON record")),
        ("a.jsonl", '{"text": "a", "n": ' + "1" * 5000 + "}", ("a.jsonl, line 1", "not a JSON record")),
        ("a.jsonl", '{"text": "a"}\n["b"]', ("a.jsonl, line 2", "JSON object")),
        ("a.jsonl", '{"body": "a", "n": 1}', ("data.text_field=text", "line 1", "one of body")),
        ("a.jsonl", '{"text": null}', ("data.text_field=text", "line 1")),
        ("a.jsonl", '{"text": "\\ud800"}', ("line 1", "surrogate")),
        ("a.txt", "", ("no text",)),
        ("a.txt", "\n  \n", ("no text",)),
        ("a.txt", "only one", ("data.validation_share=0.05", "validation")),
    ],
)
def test_unusable_content_is_named(tmp_path, name, content, words):
    message = refusal(local(tmp_path, name, content), "validation")
    assert all(word in message for word in words), message


def test_a_glob_that_matches_nothing_is_named(tmp_path):
    message = refusal(DataSettings(source=str(tmp_path / "*.txt")))
    assert "no file matches" in message and ".jsonl" in message


def packed(text: str, packing: str) -> bytes:
    data = text.encode()
    return {
        "": lambda: data,
        ".gz": lambda: gzip.compress(data[:99]) + gzip.compress(data[99:]),
        ".xz": lambda: lzma.compress(data),
        ".bz2": lambda: bz2.compress(data),
        ".zst": lambda: zstandard.compress(data[:99]) + zstandard.compress(data[99:]),  # several frames
    }[packing]()


@pytest.mark.parametrize("packing", ["", ".gz", ".xz", ".bz2", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".json", ".jsonl", ".ndjson", ".JSON"])
def test_every_kind_and_packing(tmp_path, kind, packing):
    lines = LINES if kind == ".txt" else [json.dumps({"text": text}) for text in LINES]
    path = tmp_path / f"c4-train.00000-of-01024{kind}{packing}"
    path.write_bytes(packed("\n".join(lines), packing))
    assert sorted(both(DataSettings(source=str(path)))) == sorted(LINES)


def test_parquet(tmp_path):
    path = tmp_path / "part-0.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": LINES, "id": range(400)}), path, row_group_size=50)
    assert sorted(both(DataSettings(source=str(path)))) == sorted(LINES)
    assert "data.text_field=body: not a text field of" in refusal(
        DataSettings(source=str(path), text_field="body")
    )
    assert "row 1; accepted" in refusal(DataSettings(source=str(path), text_field="id"))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert f"{path} cannot be read after row 0" in refusal(DataSettings(source=str(path)))


@pytest.mark.parametrize("packing", [".bz2", ".zst"])
def test_a_truncated_file_is_named(tmp_path, packing):
    path = tmp_path / f"a.txt{packing}"
    data = packed("\n".join(os.urandom(40).hex() for _ in range(500)), packing)
    path.write_bytes(data[: len(data) - 500])
    assert f"{path} cannot be read after line" in refusal(DataSettings(source=str(path)))


@pytest.mark.parametrize("packing", [".gz", ".xz", ".bz2", ".zst"])
def test_a_packed_file_without_a_byte_is_named(tmp_path, packing):
    """A download that failed, beside one that did not."""
    (tmp_path / "a.txt").write_text("\n".join(LINES))
    path = tmp_path / f"b.txt{packing}"
    path.touch()
    assert f"{path} cannot be read after line 0" in refusal(DataSettings(source=f"{tmp_path}/*"))


def test_a_file_whose_name_has_the_signs_of_a_glob(tmp_path):
    path = tmp_path / "c[1].txt"
    path.write_text("\n".join(LINES))
    assert sorted(both(DataSettings(source=str(path)))) == sorted(LINES)


def test_the_whole_text_is_read_as_it_is_asked_for(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("\n".join(LINES))
    read, one = [], sources.Documents.__getitem__
    monkeypatch.setattr(sources.Documents, "__getitem__", lambda self, n: read.append(n) or one(self, n))
    found = sources.load_whole(DataSettings(source=str(tmp_path / "a.txt")))
    assert len(found) == len(LINES) and not read
    assert found[0] and len(read) == 1
    assert sorted(found) == sorted(LINES) and found[-1] == found[len(LINES) - 1]
    with pytest.raises(IndexError):
        found[len(LINES)]


def test_a_package_that_a_file_needs_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(b"whatever")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert "pip install '.[zstd]'" in refusal(DataSettings(source=str(tmp_path / "a.jsonl.zst")))


@pytest.mark.parametrize(
    "content", ['[{"text": "a"},\n {"text": "b"}]', '{\n  "text": "a"\n}', '[{"text": "a"}]']
)
def test_json_that_is_no_record_a_line_says_what_to_do(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    assert "jq -c '.[]'" in refusal(DataSettings(source=str(tmp_path / "a.json")))


def test_what_is_no_file_of_text_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(LINES))
    assert "a directory; accepted is a glob" in refusal(DataSettings(source=str(tmp_path)))
    assert len(both(DataSettings(source=str(tmp_path / "*")))) == 400
    (tmp_path / "b.pdf").write_text("x")
    assert "b.pdf is of an unknown kind" in refusal(DataSettings(source=str(tmp_path / "*")))
    assert "no file matches" in refusal(DataSettings(source=str(tmp_path / "c.jsonl.lz4")))
    given = DataSettings(source=str(tmp_path / "a.txt"), train_split="train[:90%]")
    assert "data.train_split=train[:90%]: accepted with local files is ''" in refusal(given)
