# ruff: noqa: F401, F811 - `colours` is a fixture of another file
"""How fine-tuning ends: early, again, after a kill; the experts' load before and after; solved examples when it is measured."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from test_finetuning import arguments, colours
from test_run import TINY, losses

from experiments import finetune as command
from experiments.exits import EXIT_BAD_INPUT
from switchmoe.runs.stopping import Patience, ended_early

pytestmark = pytest.mark.usefixtures("one_device")
STEPS = [
    "--steps=40",
    "--config.train.eval_every=2",
    "--config.checkpoint.every=2",
    "--config.train.patience=2",
    "--config.checkpoint.keep=3",
]
STILL = [*STEPS, "--config.optimizer.learning_rate=1e-12"]  # so that no score changes


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, environment):
    workdir = tmp_path_factory.mktemp("before") / "run"
    more = ["--config.train.num_steps=2", "--config.train.eval_every=2"]
    arguments = [sys.executable, "-m", "experiments.run", f"--workdir={workdir}", *TINY, *more]
    subprocess.run(arguments, env=environment, check=True, capture_output=True)
    return workdir


def carry_out(pretrained, colours, workdir, environment):
    """In a process of its own: the bits depend on its devices."""
    argv = [
        sys.executable,
        "-m",
        "experiments.finetune",
        *arguments(pretrained, colours, workdir, *STILL)[1:],
    ]
    subprocess.run(argv, env=environment, check=True, capture_output=True)
    return workdir


@pytest.fixture(scope="module")
def still(pretrained, colours, tmp_path_factory, environment):
    return carry_out(pretrained, colours, tmp_path_factory.mktemp("still") / "run", environment)


def run_json(workdir):
    return json.loads((workdir / "run.json").read_text())


@pytest.mark.parametrize(
    "figures, over, best",
    [
        ([], False, None),
        ([3.0], False, None),
        ([3.0, 3.0], False, None),
        ([3.0, 3.0, 4.0], True, 10),  # of equal ones the first
        ([3.0, 4.0, 2.0], False, None),
        ([3.0, 2.0, 2.5, 2.5], True, 20),
        ([None, float("nan"), 5.0, 6.0], False, None),
        ([2.0, None, None], True, 10),
    ],
)
def test_patience_by_hand(figures, over, best):
    found = [(10 * number, figure) for number, figure in enumerate(figures, 1)]
    waits = Patience(2, found[:-1])
    for one in found[-1:]:
        waits.add(*one)
    assert waits.over == over and not Patience(0, found).over
    ended = waits.record or {"best_steps": []}
    of_the_best = (
        [step for step, figure in found if figure == min(f for f in figures if f is not None)] if over else []
    )
    assert ended.pop("best_steps") == of_the_best
    assert ended == ({"step": 10 * len(figures), "best_step": best, "patience": 2} if over else {})


@pytest.mark.parametrize(
    "saved, said",
    [
        ([2, 4, 6], "the best is runs/a|4"),  # of equal ones the newest that is there, which BestN keeps
        ([2, 8], "the best is runs/a|2"),
        ([8], "the best was not saved (checkpoint.every, checkpoint.keep_best)"),
    ],
)
def test_the_best_that_is_named_is_there(saved, said):
    waits = Patience(3, [(2, 1.0), (4, 1.0), (6, 2.0), (8, 2.0)])
    assert ended_early(waits.record, 40, "runs/a", saved).endswith(f"(train.patience); {said}")
    of_an_earlier_version = {"step": 8, "best_step": 2, "patience": 3}
    assert ("|2" in ended_early(of_an_earlier_version, 40, "runs/a", saved)) == (2 in saved)


@pytest.mark.slow
def test_it_is_done_when_the_score_is_no_better(still, pretrained, colours, capsys):
    assert run_json(still)["stopped_early"] == {
        "step": 6, "best_step": 2, "best_steps": [2, 4, 6], "patience": 2,
    }  # fmt: skip
    assert {path.name for path in (still / "checkpoints").iterdir() if path.name.isdigit()} == {"2", "4", "6"}
    assert "6 of 40, no better than at 2" in (still / "report.html").read_text()
    before = losses(still)
    assert max(record["step"] for record in before) == 6
    assert command.main(arguments(pretrained, colours, still, *STILL)) == 0
    told = capsys.readouterr().out
    assert (
        "nothing to do" in told
        and "finished at step 6 of 40: no better than at step 2 for 2 evaluations" in told
    )
    assert losses(still) == before and (still / "report.html").exists()


@pytest.mark.slow
def test_the_best_that_is_named_is_a_checkpoint(pretrained, colours, tmp_path, capsys):
    more = [*STILL, "--config.checkpoint.keep=1"]
    assert command.main(arguments(pretrained, colours, tmp_path / "run", *more)) == 0
    named = capsys.readouterr().out.split("the best is ")[1].split()[0]
    assert named == f"{tmp_path / 'run'}|6" and (tmp_path / "run" / "checkpoints" / "6").is_dir()


@pytest.mark.slow
def test_killed_before_the_end_was_saved_it_ends_at_the_same_step(
    still, pretrained, colours, tmp_path, environment
):
    shutil.copytree(still, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    carry_out(pretrained, colours, tmp_path / "run", environment)
    assert losses(tmp_path / "run") == losses(still)
    assert run_json(tmp_path / "run")["stopped_early"] == run_json(still)["stopped_early"]


@pytest.mark.slow
def test_without_patience_it_goes_on(still, pretrained, colours, tmp_path):
    shutil.copytree(still, tmp_path / "run")
    more = [*STILL, "--steps=8", "--config.train.patience=0"]
    assert command.main(arguments(pretrained, colours, tmp_path / "run", *more)) == 0
    assert max(record["step"] for record in losses(tmp_path / "run")) == 8
    assert run_json(tmp_path / "run")["stopped_early"] is None


@pytest.mark.slow
def test_the_load_of_experts_before_and_after(still, pretrained, colours, tmp_path):
    load = run_json(still)["expert_load"]
    assert load["layers"] == ["encoder/0", "encoder/1", "decoder/0", "decoder/1"]
    before, after = (np.array(load[when]) for when in ("before", "after"))
    assert before.shape == (len(load["layers"]), 4)
    np.testing.assert_allclose(before.sum(axis=1), 1, atol=1e-3)
    np.testing.assert_allclose(before, after)
    assert (still / "plots" / "load_change.png").exists()
    more = [
        "--steps=10",
        "--config.train.eval_every=10",
        "--config.optimizer.learning_rate=0.03",
        "--config.task.packed=3",
    ]
    assert command.main(arguments(pretrained, colours, tmp_path / "run", *more)) == 0
    assert run_json(tmp_path / "run")["examples_a_row"] > 2
    other = run_json(tmp_path / "run")["expert_load"]
    np.testing.assert_allclose(other["before"], before)
    last = [record for record in losses(tmp_path / "run") if record["split"] == "validation"][-1]
    np.testing.assert_allclose(other["after"], last["layer_expert_load"], atol=1e-4)
    assert np.abs(np.array(other["after"]) - before).max() > 0.01


@pytest.mark.slow
def test_solved_examples_when_a_model_is_measured(pretrained, colours, tmp_path, capsys):
    more = [
        "--steps=0",
        "--config.task.shots=2",
        "--config.task.held_out=instruct_odd@1",
        "--config.task.eval_examples=8",
    ]
    assert command.main(arguments(pretrained, colours, tmp_path / "run", *more)) == 0
    told = capsys.readouterr().out
    assert f"{colours}@2/ranked" in told and "instruct_odd@1/accuracy" in told
    answers = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert [answer["inputs"].count("Question: ") for answer in answers] == [3] * 8 + [2] * 8
    assert all(answer["inputs"].endswith("\nAnswer:") for answer in answers)
    short = [*more, "--config.data.input_length=24"]
    assert command.main(arguments(pretrained, colours, tmp_path / "short", *short)) == 0
    assert f"{colours}@2, held out: too long and cut: 100.0% of the inputs" in capsys.readouterr().err
    assert all(json.loads(line)["cut"] for line in (tmp_path / "short" / "predictions.jsonl").open())
    assert command.main(arguments(pretrained, colours, "gs://bucket/run", *more)) == EXIT_BAD_INPUT
    assert "--workdir=gs://bucket/run: accepted is a directory" in capsys.readouterr().err
    assert command.main(arguments(pretrained, colours, pretrained, *more)) == EXIT_BAD_INPUT
    assert "a run's directory, whose predictions.jsonl would be lost" in capsys.readouterr().err
