"""`experiments.offload`: what its studies write, and what is refused, in one line."""

import csv
import json

import numpy as np
import pytest

from experiments import exits
from experiments.offload.__main__ import main
from switchmoe.inference.offload.predict import Table


def run(capsys, *arguments):
    code = main(["offload", *map(str, arguments)])
    return code, capsys.readouterr()


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Arrays as a server gives them: 12 sequences, 3 layers, 2 of 8 experts; the next layer's are those of the one before, plus 1."""
    path = tmp_path_factory.mktemp("trace") / "experts.npz"
    first_TK = np.random.default_rng(0).permuted(np.tile(np.arange(8), (240, 1)), axis=1)[:, :2]
    expert_TLK = (first_TK[:, None] + np.arange(3)[None, :, None]) % 8
    np.savez(path, experts=expert_TLK, sequences=np.arange(240) // 20)
    return path


def test_curves_are_printed_and_written(experts, tmp_path, capsys):
    arguments = (
        f"--trace={experts}",
        "--record=1000",
        "--budgets=0.5,6KB,0",
        "--shuffles=1",
        f"--out={tmp_path}",
    )
    code, captured = run(capsys, "simulate", *arguments)
    assert code == 0, captured.err
    lines = captured.out.splitlines()
    assert lines[0].split() == ["budget", "bytes", "lru", "lfu", "lfru", "least_stale", "belady"]
    assert [line.split()[:2] for line in lines[1:4]] == [
        ["50.0%", "12,000"],
        ["25.0%", "6,000"],
        ["0.0%", "0"],
    ]
    rows = list(csv.DictReader((tmp_path / "simulate.csv").open()))
    assert len(rows) == 5 * 3 * 4
    found = json.loads((tmp_path / "simulate.json").read_text())
    assert (found["tokens"], found["record"], len(found["rows"])) == (240, 1000, len(rows))
    rates = {
        (row["policy"], row["budget_bytes"]): row["hit_rate"]
        for row in found["rows"]
        if row["layer"] == "all"
    }
    assert rates["lru", 0] == 0 and 0 < rates["lru", 12000] <= rates["belady", 12000] < 1
    assert (tmp_path / "simulate.png").read_bytes()[:4] == b"\x89PNG"
    trace = tmp_path / "trace"
    code, again = run(capsys, "simulate", f"--trace={trace}", *arguments[1:4], f"--out={tmp_path / 'again'}")
    assert code == 0 and again.out.splitlines()[:4] == lines[:4]


def test_a_table_is_learnt_and_tried(experts, tmp_path, capsys):
    """The first layer is chance, those after it are known from the one before."""
    out = tmp_path / "table.npz"
    arguments = "predict", f"--trace={experts}", f"--out={out}", "--order=1"
    code, captured = run(capsys, *arguments)
    assert code == 0, captured.err
    table = Table.load(out, layers=3, experts=8)
    assert table.scores(1, [[0, 3]]).argsort()[-2:].tolist() in ([1, 4], [4, 1])
    found = json.loads(out.with_suffix(".json").read_text())
    assert (found["tokens_learnt"], found["tokens_held_out"]) == (200, 40)
    first, next_ = found["rows"][0], found["rows"][3]
    assert next_["recall"] == next_["useful"] > 0.9 > 0.6 > next_["recall_of_shares"]
    assert first["recall"] == first["recall_of_shares"] < 0.6 and first["chance"] == 0.25
    assert captured.out.splitlines()[4].split()[:3] == ["decoder/1", "1", "K"]
    code, captured = run(capsys, *arguments)
    assert (
        code == exits.EXIT_BAD_INPUT and "accepted is a name that ends in .npz, and is free" in captured.err
    )


def test_a_second_file_of_arrays_is_not_taken_for_the_first_one(experts, tmp_path, capsys):
    other, out = tmp_path / "other.npy", tmp_path / "out"
    np.save(other, np.tile([0, 1], (30, 3, 1)))
    for path, tokens in ((experts, 240), (other, 30), (other, 30)):
        code, captured = run(capsys, "simulate", f"--trace={path}", "--shuffles=0", f"--out={out}")
        assert code == 0, captured.err
        assert json.loads((out / "simulate.json").read_text())["tokens"] == tokens
    np.save(other, np.tile([0, 1], (20, 3, 1)))  # the same name, another content
    assert run(capsys, "simulate", f"--trace={other}", "--shuffles=0", f"--out={out}")[0] == 0
    assert json.loads((out / "simulate.json").read_text())["tokens"] == 20
    (out / "trace" / "made_of.json").unlink()  # then it is somebody's own
    code, captured = run(capsys, "simulate", f"--trace={experts}", f"--out={out}")
    assert code == exits.EXIT_BAD_INPUT and f"{out / 'trace'} is there and was not made of it" in captured.err
    assert (out / "trace" / "trace.json").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["simulate"], "no trace; accepted is --trace=, a trace's directory"),
        (["simulate", "--trace=nowhere"], "--trace=nowhere: not a trace"),
        (["simulate", "--trace=nowhere.npz"], "--trace=nowhere.npz: cannot be read"),
        (["simulate", "--trace=t", "--budgets=2"], "--budgets=2: accepted are shares from 0 to 1, or sizes with a unit"),
        (["simulate", "--trace=t", "--budgets=-1MiB"], "--budgets=-1MiB"),
        (["simulate", "--trace=t", "--budgets=nan"], "--budgets=nan"),
        (["simulate", "--trace=t", "--budgets="], "argument --budgets=: accepted are --trace=VALUE"),
        (["simulate", "--trace=t", "--policies=lru,magic"], "--policies=magic: accepted are lru, lfu, lfru, least_stale, belady"),
        (["simulate", "--trace=t", "--record=0"], "--record=0: accepted is an integer >= 1"),
        (["simulate", "--trace=t", "--tokens=x"], "--tokens=x: accepted is an integer >= 0"),
        (["predict"], "no trace; accepted is --trace=, a trace's directory"),
        (["predict", "--trace=nowhere"], "--trace=nowhere: not a trace"),
        (["predict", "--trace=t", "--held_out=1"], "--held_out=1: accepted is a number above 0 and below 1"),
        (["predict", "--trace=t", "--order=4"], "--order=4: accepted is an integer from 0 to 3"),
        (["predict", "--trace=t", "--out=table"], "--out=table: accepted is a name that ends in .npz"),
        (["simulate", "--trace=t", "--heat=1"], "argument --heat=1: accepted are --trace=VALUE"),
    ],
)  # fmt: skip
def test_what_is_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, captured = run(capsys, *arguments)
    assert code == exits.EXIT_BAD_INPUT
    assert captured.err.startswith(f"experiments.offload {arguments[0]}: {message}")
    assert captured.err.count("\n") == 1 and not captured.out


def test_a_trace_without_sequences_is_refused(tmp_path, capsys):
    info = {"format": "switchmoe routing trace", "version": 1, "num_experts": 4, "choices": 1}
    for layers, message in (([{"stack": "decoder", "layer": 0}], "no row of decoder/0"), ([], "no layers")):
        (tmp_path / "trace.json").write_text(json.dumps(info | {"layers": layers}))
        code, captured = run(capsys, "simulate", f"--trace={tmp_path}")
        assert code == exits.EXIT_BAD_INPUT and message in captured.err and captured.err.count("\n") == 1


def test_what_cannot_be_written_is_a_file_error(experts, tmp_path, capsys):
    (tmp_path / "file").touch()
    code, captured = run(
        capsys, "simulate", f"--trace={experts}", "--shuffles=0", f"--out={tmp_path / 'file' / 'out'}"
    )
    assert code == exits.EXIT_IO and captured.err.count("\n") == 1


def test_a_study_that_is_not_there_is_named(capsys):
    for arguments, given in ((["magic"], "magic"), ([], "nothing")):
        code, captured = run(capsys, *arguments)
        assert code == exits.EXIT_BAD_INPUT and f"{given}: accepted is one of simulate" in captured.err
    assert run(capsys, "--help")[0] == run(capsys, "simulate", "--help")[0] == 0
