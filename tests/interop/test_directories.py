"""Directories of Hugging Face's as they are found: other names, places and configs."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_convert import QWEN, T5, header_of, make, run, shapes_of

from experiments import convert as command
from experiments import exits
from switchmoe.interop import check, convert
from switchmoe.runs import trained


def under(directory, name):
    """A directory of `make` with its embedding under another name."""
    with header_of(directory / "model.safetensors") as header:
        header[name] = header.pop("shared.weight")


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_an_embedding_under_a_stacks_name_is_the_embedding(tmp_path, stack):
    """Files of T5's such as madlad400's have no `shared.weight`; their own output stays their own."""
    there = make(tmp_path / "theirs", T5)
    under(tmp_path / "theirs", f"{stack}.embed_tokens.weight")
    assert run(f"--source={tmp_path / 'theirs'}", f"--target={tmp_path / 'run'}") == 0
    source = trained.find(str(tmp_path / "run"))
    params = trained.on_one_device(source, source.settings)
    np.testing.assert_array_equal(params["embedding"], there["shared.weight"])
    np.testing.assert_array_equal(params["output"], there["lm_head.weight"])


def test_a_stacks_embedding_that_is_not_the_others_is_refused(tmp_path, capsys):
    """Of two names without `shared.weight` neither is passed over."""
    shapes = shapes_of(T5)
    make(tmp_path / "theirs", T5, shapes=shapes | {"decoder.embed_tokens.weight": shapes["shared.weight"]})
    under(tmp_path / "theirs", "encoder.embed_tokens.weight")
    assert run(f"--source={tmp_path / 'theirs'}", f"--target={tmp_path / 'run'}") == exits.EXIT_BAD_INPUT
    said = "decoder.embed_tokens.weight: found with other values than encoder.embed_tokens.weight"
    assert said in capsys.readouterr().err


def test_a_model_in_a_folder_of_checkpoints_is_no_runs_step(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    make(tmp_path / "checkpoints" / "theirs", T5)
    assert run(f"--source={tmp_path / 'checkpoints' / 'theirs'}", f"--target={tmp_path / 'run'}") == 0
    for name in ("run", "run|0", "run/checkpoints/0"):
        assert convert.is_run(tmp_path / name)


def test_what_our_settings_do_not_have_of_a_config_comes_back(tmp_path):
    """Of a run that was converted; without the file that keeps it a directory is written as any run's."""
    fields = {"max_position_embeddings": 777, "eos_token_id": [5, 7], "pad_token_id": 3}
    make(tmp_path / "theirs", QWEN | fields)
    assert run(f"--source={tmp_path / 'theirs'}", f"--target={tmp_path / 'run'}") == 0
    assert run(f"--source={tmp_path / 'run'}", f"--target={tmp_path / 'back'}") == 0
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {field: written[field] for field in fields} == fields
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text())["eos_token_id"] == [5, 7]
    (tmp_path / "run" / "hugging_face.json").unlink()
    assert run(f"--source={tmp_path / 'run'}", f"--target={tmp_path / 'bare'}") == 0
    assert json.loads((tmp_path / "bare" / "config.json").read_text())["eos_token_id"] == 5


def test_a_model_that_memory_does_not_have_twice_is_not_checked(tmp_path, capsys, monkeypatch):
    """By default a line says so; asked for, it is refused before anything is written."""
    assert check.free_memory() > 10**6
    if Path("/proc/meminfo").exists():
        assert check.free_memory() < 10**15
    monkeypatch.setattr(check, "available", lambda: True)
    monkeypatch.setattr(check, "free_memory", lambda: 10**4)
    make(tmp_path / "theirs", T5)
    asked = ["convert", f"--source={tmp_path / 'theirs'}", f"--target={tmp_path / 'run'}"]
    assert command.main([*asked, "--check=True"]) == exits.EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert "--check=True: it takes 0.0 GB, 0.0 are free; accepted is --check=False" in error
    assert error.count("\n") == 1 and [path.name for path in tmp_path.iterdir()] == ["theirs"]
    assert command.main(asked) == 0
    assert "no check: it takes 0.0 GB, 0.0 are free" in capsys.readouterr().out
