"""`experiments.slim` again: stopped or killed it goes on to the same bytes, and what is there is not made or measured twice."""

import json
import os
import signal
import subprocess
import sys

import pytest
import test_slim
from test_slim import EXPERTS, made, run

from experiments import convert, exits
from experiments import slim as command
from switchmoe.analysis import report
from switchmoe.interop import slim, slim_table
from switchmoe.runs import measuring, slimming, trained
from switchmoe.runs.reporting import read_metrics

pytestmark = pytest.mark.usefixtures("one_device")
files = test_slim.files  # a fixture


def contents(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_the_same_command_again_measures_what_is_missing_alone(files, tmp_path, capsys, monkeypatch):
    target, measured = tmp_path / "small", []

    def measure(name, model, ruler, is_slim):
        measured.append(name)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return slim.Row(name, model.settings.moe.num_experts, 1, 2, 3, 4.5, None, 6.0)

    monkeypatch.setattr(slim, "measured", measure)
    monkeypatch.setattr(report, "write_report", lambda path: None)
    argv = [f"--source={files / 'run'}", f"--target={target}", "--experts=2", "--by=merge", "--batches=2"]
    run(command.main, *argv, code=exits.EXIT_INTERRUPTED)
    before = {name: raw for name, raw in contents(target).items() if "table" not in name}
    for _ in range(2):
        capsys.readouterr()
        run(command.main, *argv)
    assert measured == ["source", "small", "small"]
    assert {name: raw for name, raw in contents(target).items() if "table" not in name} == before
    assert capsys.readouterr().out == (target / "table.md").read_text()
    assert (target / "table.csv").read_text().splitlines()[2].startswith("small,2,1,2,3,4.5,,6.0")
    run(command.main, *argv, "--align=none", code=exits.EXIT_BAD_INPUT)
    error = capsys.readouterr().err
    assert "another slim model is there (align differ)" in error and error.count("\n") == 1
    written = (files / "text.txt").stat()
    os.utime(files / "text.txt", ns=(written.st_atime_ns, written.st_mtime_ns + 1))
    run(command.main, *argv, code=exits.EXIT_BAD_INPUT)
    assert "another slim model is there (counted differ)" in capsys.readouterr().err
    os.utime(files / "text.txt", ns=(written.st_atime_ns, written.st_mtime_ns))
    run(convert.main, f"--source={target}", f"--target={tmp_path / 'theirs'}", "--check=False")
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["num_experts"] == 2


@pytest.mark.parametrize("moment", ["count", "layer", "end"])
def test_stopped_it_goes_on_to_the_same_bytes(files, tmp_path, monkeypatch, moment):
    whole = made(files, tmp_path / "whole" / "x", experts=2, by="merge", bits=4)
    *place, call = {
        "count": (slim, "_used", 1),
        "layer": (slimming, "integers", 2),
        "end": (slim, "write_json", 3),
    }[moment]
    original, calls = getattr(*place), []

    def stopped(*arguments):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(*place, stopped)
    target = tmp_path / "broken" / "x"
    with pytest.raises(KeyboardInterrupt):
        made(files, target, experts=2, by="merge", bits=4)
    assert not target.exists()
    monkeypatch.setattr(*place, original)
    other = [0.0, 0.0, 5.0, 6.0] if moment != "count" else None  # what was counted is not counted again
    made(files, target, use=other, experts=2, by="merge", bits=4)
    assert contents(target) == contents(whole)
    assert [path.name for path in target.parent.iterdir()] == ["x"]


# The command, killed as soon as a function was called so often.
KILLED = """
import importlib, os, signal, sys
module, name, call, *argv = sys.argv[1:]
owner, _, function = name.rpartition(".")
place = importlib.import_module(module)
place = getattr(place, owner) if owner else place
original, calls = getattr(place, function), []

def killed(*arguments, **named):
    found = original(*arguments, **named)
    calls.append(1)
    if len(calls) == int(call):
        os.kill(os.getpid(), signal.SIGKILL)
    return found

setattr(place, function, killed)
from experiments import slim
from switchmoe.runs import measuring

measuring.speed = lambda *_: 1.0  # which differs from run to run, and takes a program of its own
sys.exit(slim.main(["slim", *argv]))
"""


@pytest.mark.slow
def test_killed_twice_it_goes_on_to_the_same_bytes_and_figures(files, tmp_path, environment):
    """In the middle of the parameters, and when a model was measured and its row not yet written."""
    argv = [f"--source={files / 'run'}", "--experts=2", "--by=merge", "--bits=8", "--batches=1"]

    def carry_out(target, *place):
        more = [*place, *argv, f"--target={target}"]
        return subprocess.run([sys.executable, "-c", KILLED, *more], env=environment, capture_output=True)

    whole, broken = tmp_path / "whole" / "x", tmp_path / "broken" / "x"
    never = ("switchmoe.interop.run_files", "Writer.write", "1000000")
    assert carry_out(whole, *never).returncode == 0
    for place in (
        ("switchmoe.interop.run_files", "Writer.write", "5"),
        ("switchmoe.interop.slim", "measured", "2"),
    ):
        assert carry_out(broken, *place).returncode == -signal.SIGKILL
    assert broken.exists() and len(json.loads((broken / "table.json").read_text())["rows"]) == 1
    assert carry_out(broken, *never).returncode == 0
    assert [path.name for path in broken.parent.iterdir()] == ["x"]
    rows = [json.loads((path / "table.json").read_text())["rows"] for path in (whole, broken)]
    assert rows[0] == rows[1] and len(rows[0]) == 2
    dated = ("report.html", "run.json", "metrics.jsonl", "tensorboard/")  # say when they were written
    one, other = (
        {name: raw for name, raw in contents(path).items() if not name.startswith(dated)}
        for path in (whole, broken)
    )
    assert one == other
    figures = [
        [(record["split"], record["cross_entropy"]) for record in read_metrics(path / "metrics.jsonl")]
        for path in (whole, broken)
    ]
    assert figures[0] == figures[1] and len(figures[0]) == 2


@pytest.mark.slow
def test_a_sweep_has_them_all_and_does_nothing_twice(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measuring, "speed", lambda *_: 1.0)  # a program of each, which other tests run
    monkeypatch.setattr(report, "write_report", lambda path: None)
    fields = [
        "--config.task.inputs={text}",
        "--config.task.targets={label}",
        "--config.data.validation_share=0.2",
    ]
    argv = [f"--source={files / 'run'}", f"--target={tmp_path / 'all'}", "--sweep", f"--task={files / 'task.jsonl'}", *fields]  # fmt: skip
    run(command.main, *argv, "--batches=1")
    names = {path.name for path in (tmp_path / "all").iterdir() if path.is_dir()}
    assert names == set(slimming.sweep(2, "hungarian", -1, True)) and len(names) == 11
    rows = json.loads((tmp_path / "all" / "table.json").read_text())["rows"]
    assert [row["model"] for row in rows][0] == "source" and {row["model"] for row in rows} == names | {
        "source"
    }
    size = {row["model"]: row["bytes_on_disk"] for row in rows}
    assert size["pruned_2_int4"] < size["pruned_2_int8"] < size["pruned_2"] < size["source"]
    for row in rows[1:]:
        settings = trained.find(str(tmp_path / "all" / row["model"])).settings
        assert settings.moe.num_experts == row["experts"] == (2 if "_2" in row["model"] else EXPERTS)
        assert str(settings.moe.expert_bits or "") == row["model"].partition("int")[2]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "all").rglob("*")}
    capsys.readouterr()
    run(command.main, *argv, "--batches=1")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "all").rglob("*")} == before
    assert capsys.readouterr().out == (tmp_path / "all" / "table.md").read_text()


TEXT = {"text": "a.txt", "files": [["a.txt", 3, 7]]}


def test_a_table_goes_on_and_is_of_one_model_and_text(tmp_path):
    row = slim.Row("int8", 4, 1000, 500, 480, 3.25, None, 12345.6)
    table = slim_table.Table(tmp_path / "table.json", {"source": 1, "counted": TEXT}, True)
    table.add(row)
    again = slim_table.Table(tmp_path / "table.json", {"source": 1, "counted": TEXT}, True)
    assert again.missing(["int8", "int4"]) == ["int4"]
    assert "| int8 | 4 | 1,000 | 500 | 480 | 3.2500 |  | 12,346 |" in again.markdown()
    with pytest.raises(ValueError, match="the table there is of another model or another text"):
        slim_table.Table(tmp_path / "table.json", {"source": 2, "counted": TEXT}, True)
    with pytest.raises(ValueError, match="the table there is of another model or another text"):
        slim_table.Table(
            tmp_path / "table.json", {"source": 1, "counted": TEXT | {"files": [["a.txt", 4, 8]]}}, True
        )
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="a run's directory; accepted with --sweep is a name that is free"):
        slim_table.Table(tmp_path / "table.json", {"source": 1, "counted": TEXT}, True)
    names = slimming.sweep(2, "hungarian", -1, True)
    assert {"pruned_2", "merged_2", "task_2", "int8", "int4", "merged_2_int4"} < names.keys() and len(
        names
    ) == 11
