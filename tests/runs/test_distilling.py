"""Distillation: what a student begins with and keeps, the teacher beside it or written, kills, tasks, refusals."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict
from test_finetuning import foreign_files
from test_run import DECODER_ONLY, TINY, finish, losses, wait_for_step

from experiments import distill as command
from experiments import run as pretraining
from experiments.exits import EXIT_BAD_INPUT
from switchmoe.parallel import sharding
from switchmoe.runs import distilling, text
from switchmoe.runs.parts import Context
from switchmoe.runs.reporting import read_metrics
from switchmoe.settings import from_config

pytestmark = pytest.mark.usefixtures("one_device")
KINDS = {"encoder_decoder": [], "decoder_only": DECODER_ONLY}
FEW = ["--config.train.num_steps=4", "--config.train.eval_every=4", "--config.train.log_every=1"]


@pytest.fixture(scope="module", params=KINDS)
def teacher(request, tmp_path_factory, environment):
    workdir = tmp_path_factory.mktemp("teacher") / "run"
    arguments = [f"--workdir={workdir}", *TINY, "--config.moe.every=2", *KINDS[request.param], *FEW]
    subprocess.run(
        [sys.executable, "-m", "experiments.run", *arguments],
        env=environment,
        check=True,
        capture_output=True,
    )
    return workdir


def distil(teacher, workdir, *more):
    return command.main(["distill", f"--teacher={teacher}", f"--workdir={workdir}", *more])


def saved(workdir, step):
    state = ocp.PyTreeCheckpointer().restore(workdir / "checkpoints" / str(step) / "state")
    return flatten_dict(state["params"], sep="/")


def test_a_student_begins_with_what_is_no_expert(teacher, tmp_path, capsys):
    more = [
        "--config.optimizer.learning_rate=1e-9",
        "--config.train.num_steps=1",
        "--config.train.eval_every=1",
    ]
    assert distil(teacher, tmp_path / "run", *more) == 0
    before, after = saved(teacher, 4), saved(tmp_path / "run", 1)
    np.testing.assert_allclose(after["embedding"], before["embedding"], atol=1e-6)
    # The teacher's two blocks are one super-block, the student's two of one block each: the second's experts have no heir.
    for stack in {name.split("/")[0] for name in before} - {"embedding"}:
        ours = f"{stack}/blocks/block_0"
        for number in range(after[f"{ours}/self/query"].shape[0]):
            repeat, block = divmod(number, 2)
            theirs = f"{stack}/blocks/block_{block}"
            same = np.allclose(
                after[f"{ours}/self/query"][number], before[f"{theirs}/self/query"][repeat], atol=1e-6
            )
            assert same
            if block == 0:
                np.testing.assert_allclose(
                    after[f"{ours}/ff/wi"][number], before[f"{theirs}/ff/wi"][repeat], atol=1e-6
                )
    found = json.loads((tmp_path / "run" / "run.json").read_text())
    assert found["init"]["teacher_step"] == found["init"]["step"] == 4
    assert re.search(r"parameters from the teacher: in \d+ of \d+ arrays", capsys.readouterr().out)


def test_what_is_kept_of_the_gain_is_told(teacher, tmp_path, capsys):
    base = [f"--config=configs/distill.py:{teacher}", "--config.distill.teacher="]
    assert pretraining.main(["run", f"--workdir={tmp_path / 'plain'}", *base, *FEW]) == 0
    more = [f"--config.distill.baseline={tmp_path / 'plain'}", *FEW]
    assert distil(teacher, tmp_path / "student", *more) == 0
    found = json.loads((tmp_path / "student" / "run.json").read_text())["distilled"]
    ends = {
        name: [r for r in read_metrics(path / "metrics.jsonl") if r["split"] == "validation"][-1][
            "cross_entropy"
        ]
        for name, path in (
            ("baseline", tmp_path / "plain"),
            ("student", tmp_path / "student"),
            ("teacher", teacher),
        )
    }
    for name, value in ends.items():
        assert found[f"of_{name}"] == pytest.approx(value, abs=2e-5), name
    gain = (ends["baseline"] - ends["student"]) / (ends["baseline"] - ends["teacher"])
    assert found["gain_kept"] == pytest.approx(gain, rel=1e-3)
    assert 0 < found["compression"] < 1
    assert found["parameters_of_teacher"] > found["parameters_of_student"]
    assert f"Of the teacher's gain kept: {found['gain_kept']:.1%}" in capsys.readouterr().out
    assert "<h2>Distillation</h2>" in (tmp_path / "student" / "report.html").read_text()


@pytest.mark.slow
def test_a_teacher_that_is_trained_on_later_changes_nothing(teacher, tmp_path):
    """Its number of steps, which the student's was taken from, and how often it saves."""
    shutil.copytree(teacher, tmp_path / "teacher")
    assert distil(tmp_path / "teacher", tmp_path / "run", "--config.train.log_every=2") == 0
    file = tmp_path / "teacher" / "config.json"
    config = json.loads(file.read_text())
    config["train"]["num_steps"], config["checkpoint"]["every"] = 8, 1
    file.write_text(json.dumps(config))
    begun = (tmp_path / "run" / "config.json").read_bytes()
    assert distil(tmp_path / "teacher", tmp_path / "run") == 0
    assert (tmp_path / "run" / "config.json").read_bytes() == begun
    assert json.loads(begun)["train"]["log_every"] == 2


@pytest.mark.parametrize("weight, top_k, stays", [(0.25, 0, True), (0.25, 4, False), (0.0, 0, False)])
def test_a_teacher_stays_in_memory_only_beside_its_student(tmp_path, monkeypatch, weight, top_k, stays):
    settings = from_config({"distill": {"teacher": "runs/t", "weight": weight, "top_k": top_k}})
    source = distilling.trained.Source(tmp_path / "4", settings, None)
    monkeypatch.setattr(distilling.trained, "find", lambda *_: source)
    monkeypatch.setattr(distilling.trained, "parameters", lambda *_: object())
    mesh = sharding.make_mesh(settings.mesh)
    context = Context(settings, tmp_path, mesh, False, print)
    found = distilling.Teacher(context, text.lengths(settings))
    assert (found.parameters() is found.parameters()) == stays


@pytest.mark.slow
def test_all_of_the_teachers_tokens_written_are_the_teacher_beside(teacher, tmp_path, capsys):
    beside, kept = tmp_path / "beside", tmp_path / "kept"
    assert distil(teacher, beside, *FEW) == 0
    store = [f"--config.distill.store={tmp_path / 'store'}", "--config.distill.top_k=768"]
    assert distil(teacher, kept, *store, *FEW) == 0
    rows = [
        [r["soft_cross_entropy"] for r in read_metrics(path / "metrics.jsonl") if r["split"] == "train"]
        for path in (beside, kept)
    ]
    np.testing.assert_allclose(*rows, rtol=2e-3)  # of logarithms in float16
    assert re.search(r"768 likeliest tokens of each: [\d.]+ MB in", capsys.readouterr().out)
    written = (tmp_path / "store" / "teacher.json").stat().st_mtime_ns
    assert distil(teacher, tmp_path / "again", *store, *FEW, "--config.distill.weight=0.5") == 0
    assert (tmp_path / "store" / "teacher.json").stat().st_mtime_ns == written
    assert distil(teacher, tmp_path / "other", *store, *FEW, "--config.train.seed=1") == EXIT_BAD_INPUT
    assert "it is of another seed (0 there)" in capsys.readouterr().err
    assert (
        distil(teacher, tmp_path / "other", *store, *FEW, "--config.data.noise_density=0.3") == EXIT_BAD_INPUT
    )
    assert re.search("it is of another .*setting of data or task; accepted", capsys.readouterr().err)


@pytest.mark.slow
def test_a_dense_teacher_and_a_student_of_another_shape(teacher, tmp_path):
    more = ["--config.model.d_ff=8", "--config.distill.weight=1.0", "--config.distill.temperature=2.0"]
    assert distil(teacher, tmp_path / "first", *FEW) == 0
    assert distil(tmp_path / "first", tmp_path / "second", *more, *FEW) == 0
    assert saved(tmp_path / "second", 4)["decoder/blocks/block_0/ff/wi"].shape[-1] == 8


@pytest.mark.slow
def test_on_a_task(teacher, tmp_path):
    more = ["--config.task.eval_examples=8", "--config.data.input_length=32", "--config.data.batch_size=8"]
    assert distil(teacher, tmp_path / "run", "--task=topic", *more, *FEW) == 0
    found = json.loads((tmp_path / "run" / "run.json").read_text())
    assert found["distilled"]["figure"] == "tasks/shortfall"
    assert found["distilled"]["of_student"] == pytest.approx(100 - found["scores"]["topic/accuracy"])
    assert (tmp_path / "run" / "predictions.jsonl").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        (["--teacher="], "no teacher; accepted is --teacher=, a run's directory"),
        (["--teacher=/nowhere"], "no checkpoint is there"),
        (["--config.model.vocab_rows=1024"], "model.vocab_rows is 768 there and 1024 here"),
        (["--config.model.d_model=24"], "distill.init=True: no parameter of distill.teacher="),
        (["--config.distill.baseline=/nowhere"], "distill.baseline=/nowhere: no run"),
        (["--config.data.bos_id=2"], "data.bos_id is 0 there and 2 here"),
        (["--task=nothing"], "task.names=nothing: no such task"),
        (["--task={tmp}/rows.csv", "--config.task.options=yes,no"], "gives 'maybe'; accepted is one of task.options=yes,no"),
        (["--task={tmp}/rows.csv", "--config.data.validation_share=1e-6"], "its split validation is empty"),
        (["--task={tmp}/notes.txt"], "notes.txt: no such task; accepted are"),
        (["--task={tmp}/picture.jsonl"], "picture.jsonl, line 1: not UTF-8 text"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_writes_nothing(teacher, tmp_path, capsys, more, message):
    foreign_files(tmp_path)
    rows = "".join(f"{n} things,{('yes', 'no', 'maybe')[n % 3]}\n" for n in range(30))
    (tmp_path / "rows.csv").write_text(f"a,b\n{rows}")
    more = [argument.replace("{tmp}", str(tmp_path)) for argument in more]
    if "--task=" in more[0]:
        more += ["--config.task.inputs={a}", "--config.task.targets={b}"]
    if "d_model" in more[0]:  # all shapes but those of the position biases differ
        more = [*more, "--config.model.num_heads=1", "--config.model.positions=rotary"]
    assert distil(teacher, tmp_path / "run", *FEW, *more) == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
def test_another_vocabulary_is_refused(teacher, tmp_path, capsys):
    more = ["--config.data.vocab_size=601", "--config.train.num_steps=1", "--config.train.eval_every=1"]
    assert pretraining.main(["run", f"--workdir={tmp_path / 'other'}", *TINY, *more]) == 0
    other = f"--config.data.vocab={tmp_path / 'other' / 'vocabulary.model'}"
    assert distil(teacher, tmp_path / "run", other, "--config.data.vocab_size=601", *FEW) == EXIT_BAD_INPUT
    assert "its vocabulary is another than the run's; accepted is the same" in capsys.readouterr().err
    assert distil(teacher, tmp_path / "run", other, "--task=topic", *FEW) == EXIT_BAD_INPUT
    assert f"another vocabulary than distill.teacher={teacher} was trained with" in capsys.readouterr().err
    shutil.copytree(teacher, tmp_path / "swapped")
    shutil.copyfile(tmp_path / "other" / "vocabulary.model", tmp_path / "swapped" / "vocabulary.model")
    for more in ([], ["--task=topic"]):
        assert distil(tmp_path / "swapped", tmp_path / "run", *more, *FEW) == EXIT_BAD_INPUT
        assert f"distill.teacher={tmp_path / 'swapped'}: its vocabulary.model is" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["beside", "written"])
def test_killed_it_goes_on_to_the_bit(teacher, tmp_path, environment, mode):
    more = ["--config.distill.top_k=16"] if mode == "written" else []
    steps = ["--config.train.num_steps=60", "--config.train.eval_every=30", "--config.checkpoint.every=4", "--config.train.log_every=1"]  # fmt: skip

    def begin(workdir):
        argv = [
            sys.executable,
            "-m",
            "experiments.distill",
            f"--teacher={teacher}",
            f"--workdir={workdir}",
            *more,
            *steps,
        ]
        return subprocess.Popen(
            argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    finish(begin(tmp_path / "whole"))
    broken = tmp_path / "broken"
    process = begin(broken)
    if mode == "written":
        while process.poll() is None and not (broken / "teacher" / "teacher.json").exists():
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        process = begin(broken)
    wait_for_step(process, broken, 14)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    out, _ = finish(begin(broken))
    assert "resuming from the checkpoint of step" in out
    assert losses(broken) == losses(tmp_path / "whole")
    here, there = saved(broken, 60), saved(tmp_path / "whole", 60)
    assert here.keys() == there.keys() and all(np.array_equal(here[name], there[name]) for name in here)
    if mode == "written":
        one, two = (np.load(path / "teacher" / "ids.npy") for path in (broken, tmp_path / "whole"))
        np.testing.assert_array_equal(one, two)
