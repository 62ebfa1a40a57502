"""What a conversion makes of a Switch with its vocabulary: everything takes it, and it goes back with it."""

import json

import numpy as np
import pytest
from test_convert import SWITCH, make
from test_files_of_others import WORDS

from experiments import analyze, convert, evaluate, exits, finetune, generate
from switchmoe.data import vocabulary
from switchmoe.interop import tokenizer
from switchmoe.runs import trained

pytestmark = pytest.mark.usefixtures("one_device")
LINES = [" ".join(np.random.default_rng(n).choice(WORDS, 6)) for n in range(150)]
ROWS = 400  # 300 pieces and 100 sentinels


def run(main, *arguments, code=0):
    assert main(["command", *map(str, arguments)]) == code


def converted(place, model_bytes, code=0):
    make(place / "theirs", SWITCH | {"vocab_size": ROWS})
    (place / "theirs" / "spiece.model").write_bytes(model_bytes)
    run(convert.main, f"--source={place / 'theirs'}", f"--target={place / 'run'}", "--check=False", code=code)
    return place / "run"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A directory with text.txt, task.jsonl, and a converted Switch."""
    place = tmp_path_factory.mktemp("taken")
    (place / "text.txt").write_text("\n".join(LINES))
    rows = [{"text": line, "label": ("cold", "warm")[n % 2]} for n, line in enumerate(LINES[:60])]
    (place / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    converted(place, vocabulary.train(LINES, 300))
    return place


def test_the_vocabulary_goes_into_the_run_and_back(files):
    there = (files / "theirs" / "spiece.model").read_bytes()
    model = trained.find(str(files / "run"))
    assert (files / "run" / "vocabulary.model").read_bytes() == there == model.vocabulary.model_bytes
    assert model.settings.data.vocab_size == 300 and model.settings.embedding_rows == ROWS
    run(convert.main, f"--source={files / 'run'}", f"--target={files / 'back'}", "--check=False")
    assert (files / "back" / "spiece.model").read_bytes() == there
    written = json.loads((files / "back" / tokenizer.FILE).read_text())
    assert len(written["model"]["vocab"]) == ROWS
    assert json.loads((files / "back" / "config.json").read_text())["vocab_size"] == ROWS


def test_a_model_of_merges_is_written_without_a_tokenizer_that_would_read_otherwise(tmp_path, monkeypatch):
    monkeypatch.setitem(vocabulary.TRAINER, "model_type", "bpe")
    model_bytes = vocabulary.train(LINES, 300)
    target = converted(tmp_path, model_bytes)
    run(convert.main, f"--source={target}", f"--target={tmp_path / 'back'}", "--check=False")
    assert (tmp_path / "back" / "spiece.model").read_bytes() == model_bytes
    assert not (tmp_path / "back" / tokenizer.FILE).exists()


def test_a_vocabulary_of_more_pieces_than_the_embedding_has_rows_is_refused(tmp_path, capsys):
    converted(tmp_path, vocabulary.train(LINES, ROWS + 10), code=exits.EXIT_BAD_INPUT)
    error = capsys.readouterr().err
    assert f"{tmp_path / 'theirs' / 'spiece.model'}: found 410 pieces, and 400 rows" in error
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_file_that_is_no_vocabulary_is_named(tmp_path, capsys):
    converted(tmp_path, b"", code=exits.EXIT_BAD_INPUT)
    error = capsys.readouterr().err
    assert str(tmp_path / "theirs" / "spiece.model") in error and error.count("\n") == 1


@pytest.mark.slow
def test_everything_takes_a_converted_model(files, tmp_path, capsys):
    source = f"--source={files / 'run'}"
    text = f"--config.data.source={files / 'text.txt'}"
    small = [text, "--config.data.input_length=16", "--config.data.batch_size=4"]
    run(generate.main, source, f"--prompt={WORDS[0]}", "--max_tokens=2")
    out = tmp_path / "figures.json"
    run(evaluate.main, source, *small, "--batches=2", f"--out={out}")
    assert np.isfinite(json.loads(out.read_text())["cross_entropy"])
    run(analyze.main, "routing", source, "--tokens=500", f"--out={tmp_path / 'routing'}", *small)
    assert list((tmp_path / "routing").iterdir())
    fields = [
        "--config.task.inputs={text}",
        "--config.task.targets={label}",
        "--config.data.validation_share=0.2",
    ]
    given = [
        f"--init={files / 'run'}",
        f"--task={files / 'task.jsonl'}",
        *fields,
        "--config.data.batch_size=4",
    ]
    run(finetune.main, *given, "--steps=1", f"--workdir={tmp_path / 'tuned'}")
    tuned = trained.find(str(tmp_path / "tuned"))
    assert tuned.settings.moe.num_experts == 3 and tuned.vocabulary.pieces == 300
