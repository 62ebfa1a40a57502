"""What a sweep tells of its runs: results of done, unfinished and waiting ones, predictions, and the live table."""

import csv
import os

import pytest
import test_sweep
from test_sweep import fabricate, read

from experiments.sweep import outcomes, study
from experiments.sweep.study import Cost
from switchmoe.runs import rundir

config, here = test_sweep.config, test_sweep.here  # fixtures


def results(found, cost):
    return [outcomes.result(found.workdir / run.name, run, cost) for run in found.runs]


def test_results_of_done_unfinished_and_waiting_runs(config):
    found = read(*config("[{'moe.num_experts': [4]}, {'train.seed': [1, 2]}]"))
    for run, steps in zip(found.runs, (24, 16), strict=False):
        fabricate(found.workdir / run.name, run, steps)
    outcomes.write(found, results(found, Cost(100, 50, 3.0, 10, 15)))
    with (found.workdir / "results.csv").open() as file:
        done, unfinished, waiting = csv.DictReader(file)
    assert list(done)[:4] == ["run", "state", "moe.num_experts", "train.seed"]
    assert [one["state"] for one in (done, unfinished, waiting)] == ["done", "unfinished", "waiting"]
    figures = {
        "cross_entropy": 4.5, "best_cross_entropy": 4.0, "dropped": 0.25, "load_min": 0.0, "load_max": 2.0,
        "step": 24, "tokens": 240, "flops": 72, "seconds": 2.0, "tokens_per_second": 120.0, "parameters": 100,
        "padded_tokens_per_second": 180.0,
    }  # fmt: skip
    assert {name: float(done[name]) for name in figures} == pytest.approx(figures)
    assert (unfinished["train.seed"], unfinished["moe.num_experts"], waiting["cross_entropy"]) == (
        "1",
        "",
        "",
    )
    assert [path.name for path in found.workdir.glob("*.tmp")] == []


def test_a_run_that_patience_ended_is_done(config):
    found = read(*config("[{'moe.num_experts': [4]}]"))
    (run,) = found.runs
    there = found.workdir / run.name
    fabricate(there, run, 16)
    (there / "report.html").write_text("")
    for stopped, state in ((None, "unfinished"), ({"step": 16, "best_step": 8, "patience": 1}, "done")):
        rundir.update_run(there, stopped_early=stopped)
        (one,) = results(found, Cost(100, 50, 3.0, 10, 15))
        assert (one["state"], one["step"]) == (state, 16)


@pytest.mark.parametrize("saved, state", [((), "done"), ((16, 24), "done"), ((8, 16), "unfinished")])
def test_a_run_whose_last_checkpoint_was_not_saved_is_not_done(config, saved, state):
    """Its report is written before; a run whose checkpoints were all removed stays done."""
    found = read(*config("[{'moe.num_experts': [4]}]"))
    (run,) = found.runs
    fabricate(found.workdir / run.name, run, 24)
    for step in saved:
        (found.workdir / run.name / "checkpoints" / str(step)).mkdir(parents=True)
    (one,) = results(found, Cost(100, 50, 3.0, 10, 15))
    assert one["state"] == state


def test_a_done_run_that_says_no_time_has_its_line(config):
    found = read(*config("[{'moe.num_experts': [4]}]"))
    done = {"state": "done", "seconds": None, "tokens_per_second": None}
    assert "num_experts=4" in study.table(found, [Cost(100, 50, 3.0, 10, 15)], 1e9, [done])


def test_a_prediction_goes_by_the_done_run_nearest_in_size(config):
    """Of two done runs at 10 % and 40 % of the peak, the one with about as many parameters counts."""
    found = read(*config("[{'moe.num_experts': [1, 2, 4]}]"))
    costs = [Cost(size, 1, 1000.0, 10, 10) for size in (10, 90, 100)]
    done = [{"state": "done", "seconds": 1.0, "tokens_per_second": rate} for rate in (4.0, 1.0)]
    waiting = {"state": "waiting", "seconds": None, "tokens_per_second": None}
    text = study.table(found, costs, 1000.0, [done[0], waiting, done[1]])
    assert text.splitlines()[2].split()[-1] == "4m00s"  # 24 steps x 1000 FLOPs / (1000 x 0.1)
    assert "at the 40%, 10% of done runs" in text


def test_a_run_whose_figures_are_no_numbers_has_its_line(config):
    found = read(*config("[{'moe.num_experts': [4]}]"))
    run = found.runs[0]
    fabricate(found.workdir / run.name, run, 16, load=(None, 0.5, 0.5, None))
    path = found.workdir / run.name / "metrics.jsonl"
    path.write_text(path.read_text().replace("0.25", "NaN").replace("9.0", "Infinity").replace("5.0", "NaN"))
    one = outcomes.result(found.workdir / run.name, run, Cost(100, 50, 3.0, 10, 10))
    assert (one["load_min"], one["load_max"], one["dropped"]) == (2.0, 2.0, None)
    assert "loss nan  held out 4.500  nan tokens/s" in outcomes.status(
        found.workdir / run.name, run, "running"
    )


@pytest.mark.usefixtures("here")
def test_padding_is_counted_apart(config):
    """24 steps of 8 sequences: 32 input tokens, 8 that span corruption writes, 120 of padding."""
    found = read(*config("[{'moe.num_experts': [4]}]"), "--config.data.target_length=128")
    costs, _ = study.survey(found.runs, measure=False)
    assert (costs[0].tokens, costs[0].places) == (8 * (32 + 8), 8 * (32 + 128))
    text = study.table(found, costs, 1e9, results(found, costs[0]))
    assert f"{24 * 320 / 1e6:.1f} M ({24 * 1280 / 1e6:.1f} M padded)" in text


class Terminal:
    """A stream that says it is a terminal."""

    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def flush(self):
        pass

    def write(self, text):
        self.text += text


def test_the_live_table_is_rewritten_in_place_and_fits(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(outcomes.shutil, "get_terminal_size", lambda: os.terminal_size((20, 4)))
    names = [f"seed={n}" for n in range(9)]
    stream = Terminal()
    table = outcomes.Table(names, stream)
    table.show(dict.fromkeys(names, "waiting for a long time"), "seed=5")
    first, stream.text = stream.text, ""
    table.show(dict.fromkeys(names, "done"), "seed=5")
    assert first.count("\n") == 3 and "seed=5  waiting for" in first and "\x1b[3A" not in first
    assert stream.text.startswith("\x1b[3A") and "seed=5  done" in stream.text
    assert all(len(line.removeprefix("\r\x1b[2K")) < 20 for line in first.split("\n"))
