"""Fine-tuning: a task is learnt and judged, kills, both kinds of model, what is frozen, zero steps, refusals."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict
from test_run import DECODER_ONLY, TINY, finish, losses, wait_for_step

from experiments import finetune as command
from experiments import run as pretraining
from experiments.exits import EXIT_BAD_INPUT
from switchmoe.data import vocabulary
from switchmoe.runs import start
from switchmoe.runs.reporting import read_metrics
from switchmoe.settings import from_config
from switchmoe.training import train_state

pytestmark = pytest.mark.usefixtures("one_device")
KINDS = {"encoder_decoder": [], "decoder_only": DECODER_ONLY}


@pytest.fixture(scope="module", params=KINDS)
def pretrained(request, tmp_path_factory, environment):
    workdir = tmp_path_factory.mktemp("before") / "run"
    more = [*KINDS[request.param], "--config.train.num_steps=2", "--config.train.eval_every=2"]
    arguments = [sys.executable, "-m", "experiments.run", f"--workdir={workdir}", *TINY, *more]
    subprocess.run(arguments, env=environment, check=True, capture_output=True)
    return workdir


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Records whose class is told by a word of the text."""
    rng = np.random.default_rng(0)
    words = ["river", "people", "war", "music", "city"]
    path = tmp_path_factory.mktemp("texts") / "colours.jsonl"
    rows = []
    for n in range(300):
        kind = n % 2
        text = " ".join([*rng.choice(words, 3), ("north", "south")[kind]])
        rows.append({"text": f"{n} {text}", "label": ("cold", "warm")[kind]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(pretrained, colours, workdir, *more):
    return [
        "finetune", f"--init={pretrained}", f"--task={colours}", "--config.task.inputs={text}", "--config.task.targets={label}",
        "--config.task.options=cold,warm", "--config.data.validation_share=0.2", f"--workdir={workdir}",
        "--config.data.batch_size=16", "--config.train.log_every=5", "--config.optimizer.learning_rate=0.01", *more,
    ]  # fmt: skip


def foreign_files(directory):
    """Files of other formats than their names say, or than tasks have."""
    (directory / "notes.txt").write_text("cold\n")
    for name in ("picture.jsonl", "picture.csv"):
        (directory / name).write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR")


def test_a_task_is_learnt_judged_and_reported(pretrained, colours, tmp_path, capsys):
    steps = ["--steps=120", "--config.train.eval_every=40", "--config.checkpoint.every=40"]
    assert command.main(arguments(pretrained, colours, tmp_path / "run", *steps)) == 0
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    found = [record for record in records if record["split"] == "tasks"]
    assert [record["step"] for record in found] == [40, 80, 120]
    name = f"{colours}/ranked"
    assert found[-1][name] > 95 and found[-1]["shortfall"] == 100 - found[-1]["score"]
    answers = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    right = np.mean([answer["prediction"] == answer["targets"] for answer in answers])
    assert 100 * right == pytest.approx(found[-1][f"{colours}/accuracy"])
    assert {answer["ranked"] for answer in answers} == {"cold", "warm"}
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["scores"]["score"] == found[-1]["score"]
    examples = 300 - len(answers)
    assert run["tasks"] == {
        str(colours): {
            "examples": examples, "share": 1, "epochs": pytest.approx(120 * 16 / examples), "inputs_cut": 0, "targets_cut": 0,
        }
    }  # fmt: skip
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["model"]["dropout_rate"], config["moe"]["expert_dropout_rate"]) == (0.1, 0.4)
    for picture in ("scores", "confusion_colours"):
        assert (tmp_path / "run" / "plots" / f"{picture}.png").exists()
    report = (tmp_path / "run" / "report.html").read_text()
    assert "<h2>Tasks</h2>" in report
    shown = report.partition(f"{answers[0]['inputs']}</blockquote>")[2].partition("</table>")[0]
    assert f"<td>model</td><td>{answers[0]['prediction']}</td>" in shown
    assert "in 120 steps; too long and cut: 0.0% of the inputs" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_from_before_shared_masks_goes_on_without_them(pretrained, colours, tmp_path, capsys):
    workdir, own = tmp_path / "run", "--config.model.shared_dropout="
    short = lambda steps, *more: arguments(pretrained, colours, workdir, f"--steps={steps}", *more)  # noqa: E731
    assert command.main(short(2, f"{own}False")) == 0
    config = json.loads((workdir / "config.json").read_text())
    assert config["model"].pop("shared_dropout") is False
    (workdir / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert command.main(short(3, f"{own}True")) == 2
    assert "model.shared_dropout (False there, True asked" in capsys.readouterr().err
    for steps in (3, 4):  # the first of them writes down what was lacking
        assert command.main(short(steps)) == 0
        config = json.loads((workdir / "config.json").read_text())
        assert config["model"]["shared_dropout"] is False
    assert command.main(arguments(pretrained, colours, tmp_path / "new", "--steps=1")) == 0
    assert json.loads((tmp_path / "new" / "config.json").read_text())["model"]["shared_dropout"] is True


def test_without_steps_the_model_is_measured_as_it_is(pretrained, colours, tmp_path, capsys):
    told = []
    fewer = ["--config.task.held_out=topic", "--config.task.eval_examples=16", "--config.task.filled=True"]
    for place, more in (("a", ["--steps=0"]), ("b", ["--steps=0", *fewer])):
        assert command.main(arguments(pretrained, colours, tmp_path / place, *more)) == 0
        told.append(capsys.readouterr().out)
    assert f"{colours}/ranked" in told[0] and "topic" not in told[0]
    assert "topic/ranked" in told[1]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["predictions.jsonl"]
    answers = [list(map(json.loads, (tmp_path / place / "predictions.jsonl").open())) for place in "ab"]
    assert len(answers[1]) == 32
    of = {answer["inputs"]: answer["prediction"] for answer in answers[0]}  # however many are asked at once
    assert all(of[answer["inputs"]] == answer["prediction"] for answer in answers[1][:16])


@pytest.mark.parametrize("subset", ["non_moe", pytest.param("router", marks=pytest.mark.slow)])
def test_what_is_frozen_has_no_state_and_stays(pretrained, colours, tmp_path, capsys, subset):
    more = [
        "--steps=3",
        "--config.train.eval_every=3",
        f"--config.train.trainable={subset}",
        "--config.task.eval_examples=16",
        "--config.data.input_length=8",
    ]
    assert command.main(arguments(pretrained, colours, tmp_path / "run", *more)) == 0
    before, after = (
        flatten_dict(ocp.PyTreeCheckpointer().restore(path / "state")["params"], sep="/")
        for path in (pretrained / "checkpoints" / "2", tmp_path / "run" / "checkpoints" / "3")
    )
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved and moved <= {name for name in before if ("/moe/" in name) == (subset == "router")}
    assert all("router" in name for name in moved) == (subset == "router")
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["tasks"][str(colours)]["inputs_cut"] > 0.05
    assert f"warning: {colours}: many are cut; data.input_length and" in capsys.readouterr().out


def test_subsets_are_those_of_st_moe():
    names = {
        "embedding", "encoder/blocks/block_1/moe/experts/wi", "encoder/blocks/block_1/moe/router", "decoder/blocks/block_0/ff/wo",
        "decoder/blocks/block_0/cross/query", "decoder/blocks/block_0/self_norm/scale",
    }  # fmt: skip
    import re

    found = {
        subset: {name for name in names if re.search(pattern, name)}
        for subset, pattern in train_state.SUBSETS.items()
    }
    assert found["all"] == names
    assert found["non_moe"] | found["moe_only"] == names and not found["non_moe"] & found["moe_only"]
    assert found["attention"] == {"decoder/blocks/block_0/cross/query"}
    assert found["router"] == {"encoder/blocks/block_1/moe/router"}
    assert found["ffn"] == {name for name in names if "/ff/" in name or "/moe/" in name}


@pytest.mark.parametrize(
    "more, message",
    [
        (
            ["--task=sentiments"],
            "task.names=sentiments: no such task; accepted are topic, description, title",
        ),
        (["--config.task.options=cold,hot"], "gives 'warm'; accepted is one of task.options=cold,hot"),
        (["--config.data.validation_share=1e-6"], "its split validation is empty; accepted is a task with"),
        (["--task={tmp}/notes.txt"], "notes.txt: no such task; accepted are"),
        (["--task={tmp}/*.jsonl"], "picture.jsonl, line 1: not UTF-8 text"),
        (["--task={tmp}/picture.csv"], "picture.csv, line 1: not UTF-8 text"),
        (["--config.task.held_out={tmp}/none.csv"], "task.held_out={tmp}/none.csv: no file matches"),
        (["--config.task.inputs={body}"], "has no field 'body'"),
        (["--steps=many"], "--steps=many: accepted is an integer >= 0"),
        (["--init=/nowhere"], "no checkpoint is there"),
        (["--task="], "no task; accepted is --task="),
        (["--config.task.rates=1"], "task.rates=1: accepted is numbers with task.mixture=rates"),
        (["--config.train.trainable=gate"], "train.trainable=gate: no parameter has such a name"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(pretrained, colours, tmp_path, capsys, more, message):
    foreign_files(tmp_path)
    more, message = (
        [argument.replace("{tmp}", str(tmp_path)) for argument in more],
        message.replace("{tmp}", str(tmp_path)),
    )
    assert command.main(arguments(pretrained, colours, tmp_path / "run", *more)) == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Vocabularies that no model here has, of fewer ids than it has rows, and of more."""
    words = [f"{a}{b}{c} " * 2 for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvwxyz"]
    directory = tmp_path_factory.mktemp("others")
    for name, size in (("few", 400), ("many", 900)):
        (directory / name).write_bytes(vocabulary.train(words, size))
    return directory


def test_another_vocabulary_than_the_models_own_is_refused(pretrained, colours, others, tmp_path, capsys):
    own = pretrained / "vocabulary.model"
    shutil.copytree(pretrained, tmp_path / "swapped")
    shutil.copyfile(others / "few", tmp_path / "swapped" / "vocabulary.model")
    shutil.copytree(pretrained, tmp_path / "bare")
    (tmp_path / "bare" / "vocabulary.model").unlink()
    shutil.copyfile(own, tmp_path / "same.model")
    given = "--config.data.vocab="
    refused = {
        "its vocabulary.model is another vocabulary than the run was trained with": (tmp_path / "swapped",),
        "few: another vocabulary than init.checkpoint=": (pretrained, f"{given}{others / 'few'}"),
        "it has no vocabulary; accepted is a run that has one": (tmp_path / "bare",),
        "ids; accepted is the vocabulary of a model of 768 rows": (tmp_path / "bare", f"{given}{others / 'many'}"),
        "data.eos_id=3: accepted is 1": (pretrained, "--config.data.eos_id=3"),
    }  # fmt: skip
    for message, (init, *more) in refused.items():
        code = command.main(arguments(init, colours, tmp_path / "run", *more, "--steps=1"))
        error = capsys.readouterr().err
        assert code == EXIT_BAD_INPUT and message in error and error.count("\n") == 1, error
        assert not (tmp_path / "run" / "config.json").exists()
    # The same is taken under another name, and what the source itself was trained with is not looked at.
    config = json.loads((tmp_path / "bare" / "config.json").read_text())
    config["data"]["vocab"] = str(others / "few")
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
    shutil.copyfile(own, tmp_path / "bare" / "vocabulary.model")
    for init, vocab in ((pretrained, tmp_path / "same.model"), (tmp_path / "bare", others / "few")):
        settings = from_config(
            {**json.loads((init / "config.json").read_text()), "init": {"checkpoint": str(init)}}
        )
        settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, vocab=str(vocab)))
        file = str(init / "vocabulary.model")
        assert start.tuned_vocabulary(settings, file) == file


@pytest.mark.slow
def test_killed_it_goes_on_to_the_bit(pretrained, colours, tmp_path, environment):
    def begin(workdir):
        more = [
            "--steps=24",
            "--config.train.eval_every=8",
            "--config.checkpoint.every=4",
            "--config.train.log_every=1",
        ]
        argv = [
            sys.executable,
            "-m",
            "experiments.finetune",
            *arguments(pretrained, colours, workdir, *more)[1:],
        ]
        return subprocess.Popen(
            argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    finish(begin(tmp_path / "whole"))
    process = begin(tmp_path / "broken")
    wait_for_step(process, tmp_path / "broken", 14)  # a checkpoint is there by then
    process.send_signal(signal.SIGKILL)
    process.communicate()
    out, _ = finish(begin(tmp_path / "broken"))
    assert "resuming from the checkpoint of step" in out
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    files = [(tmp_path / name / "predictions.jsonl").read_text() for name in ("broken", "whole")]
    assert files[0] == files[1]
    last = [
        ocp.PyTreeCheckpointer().restore(tmp_path / name / "checkpoints" / "24" / "state")["params"]
        for name in ("broken", "whole")
    ]
    jax.tree.map(np.testing.assert_array_equal, *last)
    assert pretraining.main(["run", f"--workdir={tmp_path / 'whole'}", *TINY]) == EXIT_BAD_INPUT
