"""Launchers: their options, the loop that all share, and what holds wherever a run is started."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import test_sweep
from test_sweep import fabricate, read

from experiments.exits import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_LOST, EXIT_STOPPED
from experiments.launchers import choice, local, node
from experiments.launchers.order import LOG_FILE, Options, Order, spawn
from experiments.sweep import __main__ as sweep
from experiments.sweep import command, study
from switchmoe.runs.lock import InUse

config, here = test_sweep.config, test_sweep.here  # fixtures


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--launcher=condor"], "--launcher=condor: accepted are local, ray, slurm"),
        (["--launcher"], "--launcher: accepted is --launcher=VALUE"),
        (["--address=auto"], "--address=auto: accepted is with --launcher=ray or --launcher=slurm"),
        (["--launcher=ray", "--slurm.time=60"], "--slurm.time=60: accepted is with --launcher=slurm"),
        (["--launcher=ray", "--address="], "--address=: accepted is --address=VALUE"),
        (["--launcher=ray", "--retries=-1"], "--retries=-1: accepted is an integer >= 0"),
        (["--launcher=ray", "--resources=2"], "--resources=2: accepted are NAME=AMOUNT"),
        (["--launcher=ray", "--resources=CPU=two"], "--resources=CPU=two: accepted are NAME=AMOUNT"),
        (["--launcher=ray", "--resources=CPU=1,CPU=2"], "--resources=CPU=1,CPU=2: accepted are NAME=AMOUNT"),
        (["--resources=CPU=0.5"], "--resources=CPU=0.5: accepted with --launcher=local are CPU=1 to CPU="),
        (["--resources=CPU=1,GPU=1"], "--resources=CPU=1,GPU=1: accepted with --launcher=local are CPU=1 to CPU="),
        (["--resources=CPU=99999"], "--resources=CPU=99999: accepted with --launcher=local are CPU=1 to CPU="),
        (["--launcher=ray"], "--launcher=ray: ray is not installed; accepted is after pip install '.[ray]'"),
        (["--launcher", "slurm"], "submitit is not installed; accepted is after pip install '.[slurm]'"),
    ],
)  # fmt: skip
def test_mistakes_get_one_line(config, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)
    assert sweep.main(["sweep", *config(), *arguments]) == EXIT_BAD_INPUT
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()


def test_options_are_told_from_the_sweeps_own():
    arguments = [
        "--config=a.py",
        "--launcher=slurm",
        "--slurm.partition=gpu",
        "--dry_run",
        "--slurm.time",
        "90",
    ]
    options, others = choice.read([*arguments, "--resources=GPU=2,memory=1.5", "--slurm.exclusive=true"])
    assert others == ["--config=a.py", "--dry_run"]
    assert options.resources == {"CPU": 1.0, "GPU": 2.0, "memory": 1.5}
    assert options.slurm == {"partition": "gpu", "time": 90, "exclusive": True}


def test_on_this_machine_runs_side_by_side_have_cores_of_their_own(monkeypatch):
    cores, code = os.sched_getaffinity(0), "import os; print(*os.sched_getaffinity(0))"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    monkeypatch.setattr(
        local, "spawn", lambda *_, **__: subprocess.Popen([sys.executable, "-c", code], **pipes)
    )

    def had(job):
        assert job.wait(60) == 0
        return {int(core) for core in job._process.stdout.read().split()}

    alone = choice.create(Options(), Path("."))
    assert alone.at_once == 1 and had(alone.start(None)) == cores
    one_each = choice.create(Options(resources={"CPU": 1.0}), Path("."))
    assert one_each.at_once == len(cores)
    for _ in range(2):  # the second time on those that are free again
        found = [had(job) for job in [one_each.start(None) for _ in cores]]
        assert [len(one) for one in found] == [1] * len(cores) and set.union(*found) == cores
    assert os.sched_getaffinity(0) == cores


class Script:
    """A launcher whose jobs end as told: by run, the exit codes of its starts; 0 leaves a done run behind."""

    here, at_once = True, 2

    def __init__(self, found, codes, retries=1, during=lambda: None):
        self.runs = {run.name: run for run in found.runs}
        self.codes, self.retries, self.during = codes, retries, during
        self.under_way, self.most, self.stopped = set(), 0, []

    def start(self, order):
        job = ScriptedJob(self, order.workdir, self.codes[order.workdir.name].pop(0))
        self.under_way.add(job)
        self.most = max(self.most, len(self.under_way))
        return job


class ScriptedJob:
    queued = False

    def __init__(self, launcher, directory, code):
        self.launcher, self.directory, self.code = launcher, directory, code
        self.looks = 0

    def wait(self, seconds):
        self.looks += 1
        if self.looks == 1:
            self.launcher.during()
            return None
        self.launcher.under_way.remove(self)
        if self.code == 0:
            shutil.rmtree(self.directory, ignore_errors=True)  # of the start before
            fabricate(self.directory, self.launcher.runs[self.directory.name], 24)
        else:
            self.directory.mkdir(exist_ok=True)
            (self.directory / "log.txt").write_text("what it said last\n")
        return self.code

    def stop(self, number):
        self.launcher.stopped.append((self.directory.name, number))
        self.code = EXIT_STOPPED


@pytest.mark.usefixtures("here")
def test_lost_runs_are_started_again_so_often_and_failed_ones_are_not(config, capsys):
    found = read(*config("[{'train.seed': [0, 1, 2, 3]}]"))
    codes = {"seed=0": [2], "seed=1": [EXIT_LOST, 0], "seed=2": [-9, EXIT_STOPPED], "seed=3": [0]}
    launcher, done = Script(found, codes), []

    def each():
        done.append([run.name for run in found.runs if (found.workdir / run.name / "metrics.jsonl").exists()])

    assert command.run(found, launcher, each) == EXIT_FAILED
    out, err = capsys.readouterr()
    assert launcher.most == 2 and not any(codes.values())
    assert done == [["seed=1"], ["seed=1", "seed=3"]], "told as each is done"
    assert "seed=1  started again (1 of 1) after exit 5: what it said last" in out
    assert "2 of 4 runs done" in out and "seed=0 failed (exit 2): what it said last" in err
    assert "seed=2 failed (exit 75)" in err and err.count("\n") == 2
    with (found.workdir / "results.csv").open() as file:
        states = {one["run"]: one["state"] for one in csv.DictReader(file)}
    assert states == {"seed=0": "failed", "seed=1": "done", "seed=2": "failed", "seed=3": "done"}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("error", [OSError("no process"), ValueError("sbatch refused a job: too many")])
def test_a_run_that_can_not_be_started_does_not_stop_the_others(config, capsys, error):
    found = read(*config("[{'train.seed': [0, 1, 2]}]"))
    launcher = Script(found, {"seed=0": [0], "seed=2": [0]})
    start = launcher.start

    def refused(order):
        if order.workdir.name == "seed=1":
            raise error
        return start(order)

    launcher.start = refused
    assert command.run(found, launcher) == EXIT_FAILED
    out, err = capsys.readouterr()
    assert "2 of 3 runs done" in out and f"seed=1 can't start: {error}" in err


FURTHER = """[
    {'init.checkpoint': ['train.seed=0', 'train.seed=1'], 'optimizer.learning_rate': [0.5]},
    {'train.seed': [0, 1, 2]},
]"""


@pytest.mark.usefixtures("here")
def test_a_run_that_begins_with_another_is_started_after_it_if_that_is_done(config, capsys):
    found = read(*config(FURTHER))
    children = [run.name for run in found.runs[:2]]
    assert [list(run.parents.values()) for run in found.runs] == [["seed=0"], ["seed=1"], [], [], []]
    assert found.runs[1].settings.init.checkpoint == str(found.workdir / "seed=1")
    order = []
    launcher = Script(found, {"seed=0": [0], "seed=1": [2], "seed=2": [0], children[0]: [0]})
    start = launcher.start
    launcher.start = lambda one: order.append(one) or start(one)
    assert command.run(found, launcher) == EXIT_FAILED
    assert [one.workdir.name for one in order] == ["seed=0", "seed=1", children[0], "seed=2"]
    assert f"--config.init.checkpoint={found.workdir / 'seed=0'}" in order[2].arguments
    err = capsys.readouterr().err
    assert f"{children[1]} not started, as seed=1 failed" in err
    asked = study.read(["sweep", *config(FURTHER)], "A doc.", [found.runs[0].overrides])
    assert [run.name for run in asked.runs] == [children[0], "seed=0"]


@pytest.mark.usefixtures("here")
def test_a_signal_reaches_every_run_under_way_once_and_no_other_is_started(config, capsys):
    found = read(*config("[{'train.seed': [0, 1, 2]}]"))
    launcher = Script(found, {run.name: [0] for run in found.runs})
    sent = []
    launcher.during = lambda: sent or sent.append(signal.raise_signal(signal.SIGTERM))
    assert command.run(found, launcher) == EXIT_STOPPED
    assert launcher.stopped == [("seed=0", signal.SIGTERM), ("seed=1", signal.SIGTERM)]
    assert "the same command continues" in capsys.readouterr().err


@pytest.fixture
def order(tmp_path, monkeypatch):
    """An order whose run is a shell script's text, which ends with exit code 75 when SIGTERM comes."""
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\ntrap 'exit 75' TERM\necho began\nwhile :; do sleep 0.05; done\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(node, "POLL", 0.05)
    return Order([], Path("run"), tmp_path, tmp_path / "compiled")


def test_a_run_is_not_started_while_another_start_of_it_lives(order):
    """Also where whoever started it is gone: the lock is the run's own."""
    first = spawn(order, patience=1)
    with pytest.raises(InUse, match="run: a run is under way there .process"):
        spawn(order, patience=0)
    first.kill()
    first.communicate()
    second = spawn(order, patience=5)
    second.kill()
    second.communicate()


def test_what_the_sweep_asks_of_a_run_on_a_node_reaches_it(order):
    node.prepare(order)
    codes = []
    thread = threading.Thread(target=lambda: codes.append(node.Work(order)()))
    thread.start()
    for _ in range(200):
        if node.began(order) and "began" in (order.directory / LOG_FILE).read_text():
            break
        thread.join(0.05)
    node.ask(order, signal.SIGTERM)
    thread.join(20)
    assert codes == [EXIT_STOPPED]
    assert node.Work(order)() == EXIT_STOPPED, "asked before it was started"
    assert (order.directory / LOG_FILE).read_text().count("began") == 1


def test_a_node_without_the_shared_directory_is_named(order):
    with pytest.raises(RuntimeError, match=r"stop' \(the sweep's --workdir and current directory must be"):
        node.Work(order)()
