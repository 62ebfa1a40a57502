# ruff: noqa: F401, F811 - `colours` is a fixture of another file
"""How fine-tuning ends: early, again, after a kill; the experts' load before and after; solved examples when it is measured."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from test_finetuning import arguments, colours
from test_run import TINY, losses

from experiments import distill
from experiments import finetune as command
from experiments.exits import EXIT_BAD_INPUT
from switchmoe.data import tasks
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


@pytest.mark.slow
def test_the_file_of_the_docs_with_a_task_of_its_own(pretrained, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "fine_tuning.md").read_text()
    (tmp_path / "even.py").write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1])
    given = [f"--init={pretrained}", f"--workdir={tmp_path / 'even'}", "--steps=0"]
    monkeypatch.setattr(sys, "argv", ["even.py", *given, "--config.task.eval_examples=8"])
    monkeypatch.setattr(tasks, "TASKS", dict(tasks.TASKS))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(tmp_path / "even.py"), run_name="__main__")
    assert ended.value.code == 0 and "even/ranked " in capsys.readouterr().out
    assert len((tmp_path / "even" / "predictions.jsonl").read_text().splitlines()) == 8


@pytest.mark.slow
def test_a_tuned_model_is_tuned_on_another_task_with_its_optimizer_and_teaches_its_own(still, tmp_path):
    more = ["--config.task.eval_examples=8", "--config.data.batch_size=4", "--config.train.eval_every=1"]
    begun = [f"--init={still}", "--task=topic", "--steps=1", "--config.init.optimizer=True", "--config.data.input_length=32"]  # fmt: skip
    assert command.main(["finetune", *begun, *more, f"--workdir={tmp_path / 'topic'}"]) == 0
    assert set(run_json(tmp_path / "topic")["tasks"]) == {"topic"}
    updates = [
        counts(ocp.PyTreeCheckpointer().restore(path / "state")["opt_state"])
        for path in (still / "checkpoints" / "6", tmp_path / "topic" / "checkpoints" / "1")
    ]
    assert updates == [{6}, {7}]
    taught = [f"--teacher={still}", f"--workdir={tmp_path / 'taught'}", "--config.train.num_steps=1", *more]
    assert distill.main(["distill", *taught]) == 0
    found = run_json(tmp_path / "taught")
    assert list(found["tasks"]) == list(run_json(still)["tasks"]), "its own tasks, as nothing else was said"
    assert found["distilled"]["figure"] == "tasks/shortfall"


def counts(opt_state):
    """How many updates an optimizer's state says that it has made, wherever it says so."""
    flat = jax.tree_util.tree_leaves_with_path(opt_state)
    return {int(leaf.max()) for path, leaf in flat if "count" in str(path[-1])}
