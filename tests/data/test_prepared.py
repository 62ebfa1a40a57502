"""Local text that is kept as shards: the documents, order and fingerprint of the same text in memory, however it is cut."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from switchmoe.data import local_files, prepared, progress, sources
from switchmoe.data.errors import DataError
from switchmoe.settings import DataSettings

ROOT = Path(__file__).parents[2]
LINES = [f"Document {n} is about the number {n}, a \u00fc and little else." for n in range(3000)]


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("\n".join(LINES[:1700]), encoding="utf-8")
    records = [json.dumps({"text": text}) for text in LINES[1700:] + LINES[:50]]
    (tmp_path / "text" / "b.jsonl").write_text("\n".join(records), encoding="utf-8")
    return DataSettings(source=str(tmp_path / "text" / "*"), data_dir=str(tmp_path / "cache"))


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(prepared, "IN_MEMORY", 1000)
    monkeypatch.setattr(prepared, "SHARD", 20_000)


def texts(documents):
    return [documents[n] for n in range(len(documents))]


def loaded(settings, note=lambda _: None):
    found = sources.load_splits(settings, note)
    return {name: (texts(documents), documents.fingerprint) for name, documents in found.items()}


@pytest.fixture
def wanted(corpus):
    return loaded(corpus)


def test_shards_hold_what_memory_held(wanted, corpus, small_shards, tmp_path):
    notes = []
    assert loaded(corpus, notes.append) == wanted
    assert len(notes) == 1 and notes[0].startswith("preparing 0 MB of text in ")
    (directory,) = (path for path in (tmp_path / "cache" / "prepared").iterdir() if path.is_dir())
    assert len(list(directory.glob("train-*"))) > 5 and len(list(directory.glob("validation-*"))) > 3
    notes.clear()
    assert loaded(corpus, notes.append) == wanted and not notes, "prepared once"
    (tmp_path / "text").rename(tmp_path / "moved")
    moved = dataclasses.replace(corpus, source=str(tmp_path / "moved" / "*"))
    assert loaded(moved, notes.append) == wanted and not notes, "known by what the files hold"


def test_another_text_or_another_document_is_prepared_anew(corpus, small_shards, tmp_path):
    first = loaded(corpus)
    path = tmp_path / "text" / "a.txt"
    path.write_text(path.read_text(encoding="utf-8").replace("Document 7 ", "document 7 "), encoding="utf-8")
    second = loaded(corpus)
    assert second["train"][1] != first["train"][1] and "document 7 is about the number 7" in " ".join(
        second["train"][0]
    )
    loaded(dataclasses.replace(corpus, validation_share=0.5))
    assert len([path for path in (tmp_path / "cache" / "prepared").iterdir() if path.is_dir()]) == 3


@pytest.mark.parametrize("after", [1, 700, 1699, 1700, 2500])
def test_a_preparation_that_was_cut_short_goes_on(wanted, corpus, small_shards, monkeypatch, after):
    """What closed shards hold is not written again, wherever it stopped."""
    write, count = prepared._Shards.write, 0

    def killed(self, *arguments):
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt
        write(self, *arguments)

    monkeypatch.setattr(prepared._Shards, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        loaded(corpus)
    written = []

    def noted(self, file, text, place):
        written.append(text)
        write(self, file, text, place)

    monkeypatch.setattr(prepared._Shards, "write", noted)
    assert loaded(corpus) == wanted
    total = len(LINES) + 50
    assert total - after <= len(written) <= min(total, total - after + 400)


@pytest.mark.parametrize(
    "harm", [Path.unlink, lambda path: path.write_bytes(b""), lambda path: os.truncate(path, 50_000)]
)
def test_a_preparation_that_was_cut_short_and_damaged_begins_anew(
    wanted, corpus, small_shards, monkeypatch, harm
):
    write, count = prepared._Shards.write, iter(range(10**6))

    def killed(self, *arguments):
        if next(count) == 1500:
            raise KeyboardInterrupt
        write(self, *arguments)

    monkeypatch.setattr(prepared._Shards, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        loaded(corpus)
    monkeypatch.setattr(prepared._Shards, "write", write)
    (shard, *_) = sorted(Path(corpus.data_dir).glob("prepared/*/train-*"))
    harm(shard)
    assert loaded(corpus) == wanted


def test_a_disk_without_room_is_named(corpus, small_shards, monkeypatch):
    """The writer's own error is no OSError."""

    def full(*_):
        raise RuntimeError("write() failed: No space left on device")

    monkeypatch.setattr(prepared._Shards, "close", full)
    with pytest.raises(
        DataError, match="^data.data_dir=.*No space left.*accepted is a directory that can be written"
    ):
        loaded(corpus)


def test_files_are_told_apart_only_where_parts_are_asked_for(corpus, small_shards):
    for kept in ("shards", "memory"):
        found = prepared.splits(corpus, corpus.data_dir)
        apart = prepared.splits(dataclasses.replace(corpus, parts="file"), corpus.data_dir)
        assert kept == "memory" or found["train"].files == ()
        for split, file in ((name, file) for name in apart for file in (0, 1)):
            texts = {apart[split].records[int(n)] for n in apart[split].files[file]}
            texts = {text.decode() if isinstance(text, bytes) else text for text in texts}
            assert texts and texts <= set(LINES[:1700] if file == 0 else LINES[1700:] + LINES[:50])
        prepared.IN_MEMORY = 10**9


@pytest.mark.slow
def test_killed_and_two_at_a_time(wanted, corpus, tmp_path):
    program = (
        "import sys, time; from switchmoe.data import prepared, sources; from switchmoe.settings import DataSettings\n"
        "prepared.IN_MEMORY, prepared.SHARD = 1000, 20_000\n"
        "write = prepared._Shards.write\n"
        "prepared._Shards.write = lambda *given: (time.sleep(0.001), write(*given))\n"
        "found = sources.load_splits(DataSettings(source=sys.argv[1], data_dir=sys.argv[2]))\n"
        "print(*(documents.fingerprint for documents in found.values()))"
    )
    line = [sys.executable, "-c", program, corpus.source, corpus.data_dir]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def start():
        return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True)

    first = start()
    while first.poll() is None and not list(tmp_path.glob("cache/prepared/*/journal.json")):
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert not list(tmp_path.glob("cache/prepared/*/done.json")) and list(
        tmp_path.glob("cache/prepared/*/journal.json")
    )
    found = [process.communicate(timeout=120)[0].split() for process in [start(), start()]]
    assert found == [[wanted["train"][1], wanted["validation"][1]]] * 2


def test_progress_is_told(corpus, small_shards, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.01)
    write = prepared._Shards.write
    monkeypatch.setattr(prepared._Shards, "write", lambda *given: (time.sleep(2e-5), write(*given)))
    notes = []
    loaded(corpus, notes.append)
    assert any(
        note.startswith("preparing text: 0.00 of 0.00 GB, ") and note.endswith("s so far") for note in notes
    )


def test_a_cache_that_cannot_be_written_is_named(corpus, small_shards, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(
        DataError, match="data.data_dir=.*cache: text of 0 MB cannot be prepared there"
    ) as error:
        loaded(corpus)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("harm", ["a shard is gone", "done.json is cut", "order.npy is cut"])
def test_damage_to_what_was_prepared_is_named(corpus, small_shards, tmp_path, harm):
    loaded(corpus)
    (directory,) = (path for path in (tmp_path / "cache" / "prepared").iterdir() if path.is_dir())
    if harm == "a shard is gone":
        (directory / "train-00001.array_record").unlink()
    else:
        os.truncate(directory / harm.split()[0], 20)
    with pytest.raises(DataError) as error:
        loaded(corpus)
    assert f"{directory} is damaged" in str(error.value) and "\n" not in str(error.value)


def test_a_packed_file_that_grows_in_memory_is_kept_as_shards(tmp_path, monkeypatch):
    import gzip

    monkeypatch.setattr(prepared, "IN_MEMORY", 100_000)
    (tmp_path / "a.txt.gz").write_bytes(
        gzip.compress("\n".join(f"{n} " + "word " * 100 for n in range(500)).encode())
    )
    assert (tmp_path / "a.txt.gz").stat().st_size < 25_000
    loaded(DataSettings(source=str(tmp_path / "a.txt.gz"), data_dir=str(tmp_path / "cache")))
    assert list(tmp_path.glob("cache/prepared/*/done.json"))


def test_small_text_is_read_once(corpus, monkeypatch):
    read, opened = local_files.Reading.documents, []
    monkeypatch.setattr(
        local_files.Reading,
        "documents",
        lambda self, *given, **more: opened.append(1) or read(self, *given, **more),
    )
    loaded(corpus)
    assert opened == [1]


MEMORY = """
import resource, sys
from switchmoe.data import prepared, sources
from switchmoe.settings import DataSettings
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
sources.load_splits(DataSettings(source=sys.argv[1], data_dir=sys.argv[3]))
before = peak()
found = sources.load_splits(DataSettings(source=sys.argv[2], data_dir=sys.argv[3]))["train"]
for n in range(0, len(found), 7): found[n]
print(peak() - before)
"""


@pytest.mark.long
def test_memory_does_not_grow_with_the_text(tmp_path):
    """480 MB of text take under 80 MB more than 48 MB do."""
    for name, lines in (("small.txt", 40_000), ("large.txt", 400_000)):
        with (tmp_path / name).open("w", encoding="utf-8") as file:
            for n in range(lines):
                file.write(
                    f"{n:07d} "
                    + f"a line of a hundred bytes, number {n * 7919 % 1_000_003}, and so on. " * 18
                    + "\n"
                )
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path / "small.txt", tmp_path / "large.txt", tmp_path / "cache"],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True, timeout=900,
    )  # fmt: skip
    assert int(done.stdout) < 80e6
