"""What `experiments.slim` refuses, in one line, leaving nothing: bad input, a wrong vocabulary, a target that is there."""

import json
import shutil

import pytest
import test_slim
from test_slim import run

from experiments import convert, exits
from experiments import slim as command
from switchmoe.data import vocabulary

pytestmark = pytest.mark.usefixtures("one_device")
files = test_slim.files  # a fixture


def bad(text, target, *more):
    return [f"--source={text}/run", f"--target={target}", *more]


@pytest.mark.parametrize(
    "more, message",
    [
        ([], "nothing to do; accepted is --experts=K, --bits=8, --bits=4 or --sweep"),
        (["--experts=9"], "--experts=9: accepted is an integer from 1 to the model's 4"),
        (["--experts=x"], "--experts=x: accepted is an integer >= 0"),
        (["--experts=2", "--by=best"], "--by=best: accepted is one of use, merge, task"),
        (["--experts=2", "--by=task"], "--by=task: accepted with --task=NAME"),
        (["--bits=2"], "--bits=2: accepted is 8 or 4"),
        (["--bits=8", "--sweep"], "--bits=8: accepted without --sweep"),
        (["--experts=2", "--group=4"], "--group=4: accepted with --bits=8, --bits=4 or --sweep"),
        (["--bits=8", "--task=nothing"], "task.names=nothing: no such task"),
        (["--bits=8", "--text={}/none*.txt"], "data.source="),
        (["--bits=8", "--text={}/run/config.json"], "config.json"),
        (["--bits=8", "--task={}/text.txt"], "text.txt: no such task; accepted are"),
        (["--bits=8", "--task={}/task.jsonl", "--config.task.inputs={{text}}", "--config.task.targets={{label}}", "--config.task.options=cold,hot"], "gives 'warm'; accepted is one of task.options=cold,hot"),
        (["--bits=8", "--task={}/task.jsonl", "--config.task.inputs={{text}}", "--config.task.targets={{label}}", "--config.data.validation_share=0.000001"], "its split validation is empty"),
        (["--bits=8", "--config.task.inputs=x"], "--config.task.inputs=x: accepted are task's other fields, with --task="),
        (["--bits=8", "--config.moe.num_experts=3"], "--config.moe.num_experts=3: it is of the model or its training"),
        (["--weights=8"], "argument --weights=8 (did you mean --config.distill.weight=?): accepted are --source="),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(files, tmp_path, capsys, more, message):
    run(
        command.main, *bad(files, tmp_path / "x", *(m.format(files) for m in more)), code=exits.EXIT_BAD_INPUT
    )
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out, captured.err
    assert not list(tmp_path.iterdir())


def test_a_target_in_the_source_is_refused(files, capsys):
    run(command.main, *bad(files, files / "run" / "checkpoints" / "9", "--bits=8"), code=exits.EXIT_BAD_INPUT)
    assert "it lies in --source; accepted is a name outside" in capsys.readouterr().err


def test_another_models_vocabulary_and_a_target_that_is_there_are_refused(files, tmp_path, capsys):
    shutil.copytree(files / "run", tmp_path / "run")
    many = vocabulary.train(
        [f"{a}{b}{c} " * 2 for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvwxyz"], 500
    )
    own = (tmp_path / "run" / "vocabulary.model").read_bytes()
    sha = vocabulary.Vocabulary.from_bytes(many).sha256
    (tmp_path / "run" / "run.json").write_text(json.dumps({"vocabulary_sha256": sha}))
    taken_out = [f"--source={tmp_path / 'run'}", f"--target={tmp_path / 'x'}"]
    for model_bytes, given, message in (
        (many, (command.main, "--bits=8"), "a vocabulary of 600 ids, another model's; accepted is a run with its own"),
        (own, (command.main, "--bits=8"), f"is another vocabulary than the run was trained with; accepted is the one of SHA-256 {sha}"),
        (own, (convert.main,), "its vocabulary.model is another vocabulary than"),
        (own, (convert.main, "--upcycle.experts=2"), "its vocabulary.model is another vocabulary than"),
    ):  # fmt: skip
        (tmp_path / "run" / "vocabulary.model").write_bytes(model_bytes)
        run(given[0], *taken_out, *given[1:], code=exits.EXIT_BAD_INPUT)
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    (tmp_path / "run" / "run.json").unlink()
    (tmp_path / "run" / "vocabulary.model").unlink()
    run(command.main, *bad(tmp_path, tmp_path / "x", "--bits=8"), code=exits.EXIT_BAD_INPUT)
    assert "it has no vocabulary" in capsys.readouterr().err
    run(command.main, *bad(files, tmp_path / "run", "--bits=8"), code=exits.EXIT_BAD_INPUT)
    assert "it is there and no slim model" in capsys.readouterr().err
