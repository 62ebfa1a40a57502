"""Sweeps: what a config's products make, what is refused before the first run, runs that fail, and kills."""

import csv
import fcntl
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import configs
from experiments import exits
from experiments.sweep import __main__ as sweep
from experiments.sweep import command, study
from switchmoe.runs import rundir
from switchmoe.runs.reporting import read_metrics
from switchmoe.settings import to_dict

BASE = """
from configs import quickstart

def get_config():
    config = quickstart.get_config()
    config.model.update(d_model=16, d_ff=16, d_kv=8, num_heads=2)
    config.moe.update(num_experts=4, group_size=256)
    config.data.update(batch_size=8, input_length=32, vocab_size=600)
    config.train.update(num_steps=24, log_every=1, eval_every=8, eval_batches=2)
    config.checkpoint.update(every=4)
    return config

def get_sweep():
    return {products}
"""
TWO = "[{'moe.num_experts': [1, 4]}]"


@pytest.fixture
def config(tmp_path):
    """Writes a sweep's config with the given products; returns the arguments that name it."""

    def write(products=TWO):
        path = tmp_path / "study.py"
        path.write_text(BASE.replace("{products}", products))
        return [f"--config={path}", f"--workdir={tmp_path / 'out'}"]

    return write


@pytest.fixture
def here(monkeypatch, one_device):
    """The survey in this very process, of one device."""
    monkeypatch.setattr(command, "_apart", lambda function, *arguments: function(*arguments))


def read(*arguments):
    return study.read(["sweep", *arguments], "A doc.")


def test_runs_are_the_products_in_order_named_by_their_overrides(config):
    products = "[{'moe.num_experts': [1]}, {'moe.num_experts': [2, 4], 'train.seed': [0, 1]}, {'data.source': ['c4/en']}]"
    found = read(*config(products), "--config.optimizer.learning_rate=0.5")
    assert [run.name for run in found.runs] == [
        "num_experts=1", "num_experts=2,seed=0", "num_experts=2,seed=1", "num_experts=4,seed=0",
        "num_experts=4,seed=1", "source=c4_en",
    ]  # fmt: skip
    assert found.runs[4].settings.moe.num_experts == 4 and found.runs[4].settings.train.seed == 1
    assert {run.settings.optimizer.learning_rate for run in found.runs} == {0.5}
    assert found.arguments[1:] == ["--config.optimizer.learning_rate=0.5"]


def test_fields_of_one_name_are_told_apart_by_their_groups(config):
    found = read(
        *config(
            "[{'mesh.model': [1], 'mesh.data': [1]}, {'model.d_ff': [8], 'checkpoint.every': [2], 'moe.every': [1]}]"
        )
    )
    assert [run.name for run in found.runs] == ["model=1,data=1", "d_ff=8,checkpoint.every=2,moe.every=1"]


@pytest.mark.parametrize(
    "products, more, message",
    [
        ("[{'moe.num_expert': [4]}]", [], "run num_expert=4: moe.num_expert=4: accepted is one of the fields"),
        ("[{'mow.num_experts': [4]}]", [], "run num_experts=4: mow="),
        ("[{'moe.num_experts': [4, '8']}]", [], "run num_experts=8: moe.num_experts=8: accepted is a value of type int"),
        ("[{'moe.num_experts': [1, 0]}]", [], "run num_experts=0: moe.num_experts=0: accepted is an integer >= 1"),
        ("[{'moe.num_experts': [1, 512]}]", [], "run num_experts=512: moe.num_experts=512: accepted is at most"),
        ("[{'moe.router': ['switch', 'soft']}]", [], "run router=soft: moe.router=soft: accepted is in a decoder"),
        ("[{'moe.choices': [2]}]", [], "run choices=2: moe.choices=2: accepted is 1 with the router switch"),
        ("[{'data.target_length': [3]}]", [], "run target_length=3: data.target_length=3"),
        ("[{'train.seed': [0, 0]}]", [], "two runs seed=0"),
        ("[]", [], "get_sweep()=[]: accepted is a list"),
        ("[{'train.seed': 3}]", [], "'train.seed': 3: accepted is 'group.field': [values]"),
        ("[{'seed': [3]}]", [], "'seed': [3]: accepted is 'group.field': [values]"),
        (TWO, ["--config.moe.num_experts=2"], "--config.moe.num_experts=2: accepted are fields that the sweep does not vary"),
        (TWO, ["--config.moe.num_expert=2"], "did you mean num_experts?"),
        (TWO, ["--config=configs/quickstart.py"], "no sweep; accepted is a config with get_sweep()"),
        (TWO, ["--config=configs/sweeps/nothing.py"], "no such file"),
        (TWO, ["--dryrun"], "argument --dryrun (did you mean --dry_run?): accepted are"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("here")
def test_mistakes_get_one_line_before_the_first_run(config, tmp_path, capsys, products, more, message):
    assert sweep.main(["sweep", *config(products), *more]) == exits.EXIT_BAD_INPUT
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("here")
def test_a_sweep_may_end_at_one_expert_whatever_the_router(config, capsys):
    arguments = config(
        "[{'moe.num_experts': [1, 4], 'moe.router': ['top_k', 'noisy_top_k'], 'moe.choices': [2]}]"
    )
    assert sweep.main(["sweep", *arguments, "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "num_experts=1,router=top_k,choices=2: without effect: moe.router, moe.choices" in out
    assert "num_experts=4,router=top_k,choices=2: without" not in out


@pytest.mark.usefixtures("here")
def test_a_dry_run_lists_and_writes_nothing(config, tmp_path, capsys):
    assert sweep.main(["sweep", *config(), "--dry_run"]) == 0
    header, dense, sparse, total = capsys.readouterr().out.splitlines()
    assert header.split("  ")[0] == "run" and "predicted" not in dense
    assert dense.startswith("num_experts=1 ") and sparse.startswith("num_experts=4 ")
    assert "2 runs" in total and "at an assumed 30% of the" in total
    assert not (tmp_path / "out").exists()


def fabricate(directory, run, steps, seconds=2.0, load=(0.5, 0.3, 0.2, 0.0)):
    """What a run of so many steps leaves behind."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(to_dict(run.settings)))
    sparse = {"layers": ["encoder/1"], "layer_fraction_dropped": [0.25], "layer_expert_load": [list(load)]}
    records = [
        {"step": step, "split": split, "cross_entropy": loss, "tokens_per_second": 9.0, "step_seconds": 0.1}
        | sparse
        for step, split, loss in (
            (1, "train", 6.0),
            (8, "validation", 4.0),
            (steps, "train", 5.0),
            (steps, "validation", 4.5),
        )
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    rundir.update_run(directory, train_seconds=seconds, steps_timed=steps)
    if steps == run.settings.train.num_steps:
        (directory / "report.html").write_text("")


@pytest.mark.usefixtures("here")
def test_an_error_in_a_users_sweep_gets_one_line(config, capsys):
    assert sweep.main(["sweep", *config("[{'moe.num_experts': [2 // 0]}]")]) == exits.EXIT_BAD_INPUT
    err = capsys.readouterr().err
    assert "get_sweep(): ZeroDivisionError: " in err and err.count("\n") == 1


@pytest.mark.usefixtures("here")
def test_a_directory_of_another_sweep_is_refused_and_one_may_grow(config, tmp_path, capsys):
    found = read(*config())
    found.workdir.mkdir()
    path = found.workdir / "sweep.json"
    path.write_text(json.dumps(study.definition(found)))
    study.check_directory(read(*config("[{'moe.num_experts': [1, 2, 4]}]")))
    others = config("[{'moe.num_experts': [1]}]")
    assert sweep.main(["sweep", *others, "--config.data.batch_size=16"]) == exits.EXIT_BAD_INPUT
    assert "data.batch_size (8 there, 16 asked: the saved position" in capsys.readouterr().err
    assert sweep.main(["sweep", *others]) == exits.EXIT_BAD_INPUT
    assert "run num_experts=4 ({'moe.num_experts': 4} there, none asked)" in capsys.readouterr().err
    path.unlink()
    fabricate(found.workdir / "num_experts=4", found.runs[0], 24)  # another run's settings under this name
    assert sweep.main(["sweep", *config()]) == exits.EXIT_BAD_INPUT
    assert "moe.num_experts (1 there, 4 asked: it is another model)" in capsys.readouterr().err
    path.write_text("[")
    assert sweep.main(["sweep", *config()]) == exits.EXIT_BAD_INPUT
    assert "sweep.json is damaged" in capsys.readouterr().err and path.read_text() == "["


@pytest.mark.usefixtures("here")
def test_two_sweeps_on_one_directory_are_refused(config, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / "sweep.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert sweep.main(["sweep", *config()]) == exits.EXIT_BAD_INPUT
    assert "another sweep is under way there" in capsys.readouterr().err
    assert not (tmp_path / "out" / "sweep.json").exists()


@pytest.mark.usefixtures("here")
def test_done_runs_are_skipped_and_a_failed_one_does_not_stop_the_others(config, capsys, monkeypatch):
    """A run's text is missing: it fails with a line, the one after it is reached, the done one stays."""
    monkeypatch.delenv("XLA_FLAGS")  # the run is a user's command, of one device
    arguments = config("[{'data.source': ['/nowhere/a.txt']}, {'moe.num_experts': [1]}]")
    found = read(*arguments)
    fabricate(found.workdir / found.runs[1].name, found.runs[1], 24)
    before = (found.workdir / "num_experts=1" / "metrics.jsonl").read_text()
    assert sweep.main(["sweep", *arguments]) == exits.EXIT_FAILED
    out, err = capsys.readouterr()
    assert "1 of 2 runs done" in out and "num_experts=1          done step 24/24" in out and "\x1b" not in out
    assert (
        "source=_nowhere_a.txt failed (exit 2): experiments.run: data.source=/nowhere/a.txt: no file" in err
    )
    assert err.count("\n") == 1 and (found.workdir / "num_experts=1" / "metrics.jsonl").read_text() == before
    with (found.workdir / "results.csv").open() as file:
        assert [one["state"] for one in csv.DictReader(file)] == ["failed", "done"]


@pytest.mark.usefixtures("one_device")
def test_the_sweeps_that_come_with_the_package_are_valid_and_say_how_to_run_them():
    directory = Path(configs.__file__).parent / "sweeps"
    names = sorted(path.stem for path in directory.glob("[a-z]*.py"))
    assert names == ["experts_base", "experts_small", "experts_tiny", "finetune_rates", "paper_search"]
    for name in names:
        found = read(f"--config=configs/sweeps/{name}.py")
        assert found.workdir == Path(f"runs/{name}")
        same = {
            (
                run.settings.data,
                run.settings.moe.group_size,
                run.settings.moe.capacity_factor,
                run.settings.train,
            )
            for run in found.runs
        }
        several = ("finetune_rates", "paper_search")
        assert len(same) == 1 or name in several, "the same text, batches, groups and steps for all"
        assert f"--config=configs/sweeps/{name}.py" in (directory / f"{name}.py").read_text()
        study.survey(found.runs[-1:], measure=False)
    rates = read("--config=configs/sweeps/finetune_rates.py")
    tuned = [run for run in rates.runs if run.settings.task.names]
    rows = [run.settings.train.num_steps * run.settings.data.batch_size for run in tuned]
    assert len(tuned) == 18 and len(set(rows)) == 1, "each reads as many examples"
    for run in tuned:
        before = f"num_experts={run.settings.moe.num_experts}"
        assert run.parents == {"init.checkpoint": before}
        assert run.settings.moe.expert_dropout_rate == (0.4 if run.settings.moe.num_experts > 1 else 0)


def start(arguments, environment, directory):
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.sweep", *arguments],
        env=environment, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(process, path, text):
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.005)
    raise AssertionError(f"{text} never came: {process.communicate()}")


def computed(path):
    timed = {
        "step_seconds",
        "tokens_per_second",
        "padded_tokens_per_second",
        "input_wait_share",
        "peak_share",
        "seconds",
    }
    return [{k: v for k, v in record.items() if k not in timed} for record in read_metrics(path)]


@pytest.mark.long
def test_a_sweep_killed_stopped_and_continued_ends_like_an_undisturbed_one(config, tmp_path, environment):
    """SIGKILL in the first run, SIGTERM and Ctrl-C in the second: bitwise the same in the end, nothing twice."""
    arguments = config()
    whole = start([*arguments, f"--workdir={tmp_path / 'whole'}"], environment, tmp_path)
    out, err = whole.communicate(timeout=300)
    assert whole.returncode == 0 and "2 of 2 runs done" in out, (out, err)
    first, second = (tmp_path / "out" / f"num_experts={n}" / "metrics.jsonl" for n in (1, 4))

    process = start(arguments, environment, tmp_path)
    wait_for(process, first, '"step": 14,')
    process.kill()
    process.communicate()
    for number, code, step in ((signal.SIGTERM, 75, 4), (signal.SIGINT, 130, 9)):
        process = start(arguments, environment, tmp_path)
        wait_for(process, second, f'"step": {step},')
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
        assert process.returncode == code and "the same command continues" in err, (out, err)
    process = start(arguments, environment, tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "num_experts=1  running" not in out, (out, err)
    logs = [(tmp_path / "out" / f"num_experts={n}" / "log.txt").read_text() for n in (1, 4)]
    assert [log.count("resuming from the checkpoint of step") for log in logs] == [1, 2]
    for path in (first, second):
        assert computed(path) == computed(tmp_path / "whole" / path.parent.name / path.name)


@pytest.mark.long
def test_another_seed_compiles_nothing_new(config, tmp_path, environment):
    """Jitter and dropout draw in the step: the key is an argument of the program that the first seed left."""
    kept = environment | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    programs, losses = [], []
    for seeds in ([0], [0, 1]):
        arguments = config(f"[{{'train.seed': {seeds}}}]")
        drawn = ["--config.moe.jitter=0.01", "--config.model.dropout_rate=0.1"]
        process = start([*arguments, *drawn, "--config.train.num_steps=4"], kept, tmp_path)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, (out, err)
        programs.append({path.name for path in (tmp_path / "compiled").glob("*-cache")})
        losses.append(
            read_metrics(tmp_path / "out" / f"seed={seeds[-1]}" / "metrics.jsonl")[0]["cross_entropy"]
        )
    assert programs[0] == programs[1] and any("train_step" in name for name in programs[0])
    assert losses[0] != losses[1]
