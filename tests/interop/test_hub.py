"""A hub's name, with a hub that is none: what is asked of it, and what a fault of it says."""

import sys
import types

import pytest
from test_convert import T5, make

from experiments import convert as command
from experiments import exits

NAME = "google/switch-base-8"


@pytest.fixture
def hub(monkeypatch):
    """What was asked: (name, revision, patterns); ``answer`` is called for each, with the count."""
    module = types.ModuleType("huggingface_hub")
    module.asked = []

    def snapshot_download(name, revision=None, allow_patterns=None):
        module.asked.append((name, revision, allow_patterns))
        return str(module.answer(len(module.asked)))

    module.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return module


def convert(tmp_path, monkeypatch, *more):
    monkeypatch.chdir(tmp_path)
    return command.main(["convert", f"--source={NAME}", "--target=run", "--check=False", *more])


@pytest.mark.parametrize("given, revision", [((), None), (("--revision=refs/pr/5",), "refs/pr/5")])
def test_a_revision_is_fetched_and_converted(hub, tmp_path, monkeypatch, given, revision):
    make(tmp_path / "snapshot", T5)
    hub.answer = lambda count: tmp_path / "snapshot"
    assert convert(tmp_path, monkeypatch, *given) == 0
    ((name, asked, patterns),) = hub.asked
    assert (name, asked) == (NAME, revision) and (tmp_path / "run" / "config.json").exists()
    assert {"*.safetensors", "*.json", "spiece.model"} == set(patterns)


def test_pickles_are_fetched_only_where_there_are_no_safetensors(hub, tmp_path, monkeypatch, capsys):
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "config.json").write_text("{}")

    def answer(count):
        assert count <= 2
        if count == 2:
            (tmp_path / "snapshot" / "pytorch_model.bin").write_bytes(b"old")
        return tmp_path / "snapshot"

    hub.answer = answer
    assert convert(tmp_path, monkeypatch, "--revision=main") == exits.EXIT_BAD_INPUT
    assert "model_type" in capsys.readouterr().err  # the directory that was fetched is the one that is read
    assert [revision for _, revision, _ in hub.asked] == ["main", "main"]
    assert "pytorch_model*" not in hub.asked[0][2] and "pytorch_model*" in hub.asked[1][2]


def test_a_hub_that_does_not_answer_is_one_line(hub, tmp_path, monkeypatch, capsys):
    def answer(count):
        raise ConnectionError("no such revision\nand a page of more")

    hub.answer = answer
    assert convert(tmp_path, monkeypatch, "--revision=nowhere") == exits.EXIT_BAD_INPUT
    error = capsys.readouterr().err
    said = f"--source={NAME}: nothing is there, and it can't be fetched (no such revision)"
    assert said in error and error.count("\n") == 1 and not list(tmp_path.iterdir())
