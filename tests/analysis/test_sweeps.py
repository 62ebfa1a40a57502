import base64
import csv
import dataclasses
import json
import math
import re
import warnings

import numpy as np
import pytest

from experiments import analyze
from experiments.sweep import command
from switchmoe.analysis import scaling, sweep_plots, sweep_report, sweeps
from switchmoe.settings import (
    DataSettings,
    ModelSettings,
    MoESettings,
    OptimizerSettings,
    Settings,
    TrainSettings,
    to_dict,
)
from switchmoe.training import train_state

NUM_STEPS = 400
LAW = scaling.Law(-0.082, -0.108, 0.009, 1.2, 1.847, 314.478)


@pytest.fixture
def quick_memory(monkeypatch):
    """State bytes without tracing the models; `test_state_bytes_are_the_parameters_and_both_moments` has the real ones."""
    monkeypatch.setattr(sweeps, "state_bytes", lambda run: 12 * run.parameters)


def settings_of(experts=1, seed=0, router="switch", width=16):
    return Settings(
        model=ModelSettings(d_model=width, d_ff=32, d_kv=8, num_heads=2, num_layers=2, activation="relu"),
        moe=MoESettings(num_experts=experts, router=router),
        data=DataSettings(vocab_size=300, batch_size=8, input_length=32),
        train=TrainSettings(num_steps=NUM_STEPS, seed=seed, log_every=50, eval_every=100),
    )


def write_run(path, settings, losses, step_seconds=0.5, dropped=0.1):
    """A run that is done: held-out losses at steps 100, 200, ..., training records every 50 steps."""
    path.mkdir(parents=True)
    experts = settings.moe.num_experts
    layers = ["encoder/1", "decoder/1"] if experts > 1 else []
    load_E = [0.05 / experts, (2 - 0.05) / experts, *[1 / experts] * (experts - 2)]
    routing = {
        "layers": layers,
        "layer_expert_load": [load_E for _ in layers],
    }
    records = []
    for step in range(50, 100 * len(losses) + 1, 50):
        share = dropped if step > 50 else 3 * dropped
        record = {"step": step, "split": "train", "cross_entropy": 5.0, "step_seconds": step_seconds}
        records.append(record | routing | {"layer_fraction_dropped": [share for _ in layers]})
        if step % 100 == 0:
            record = {"step": step, "split": "validation", "cross_entropy": losses[step // 100 - 1]}
            records.append(record | routing | {"layer_fraction_dropped": [0.0 for _ in layers]})
    size = 12 * settings.model.d_model**2
    active = size + settings.embedding_rows * settings.model.d_model
    counts = {"parameters": active + (experts - 1) * 100, "parameters_active": active}
    (path / "config.json").write_text(json.dumps(to_dict(settings)))
    (path / "run.json").write_text(json.dumps(counts | {"device": "1 x cpu", "versions": {"jax": "0.10"}}))
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_sweep(root, counts=(1, 2, 4, 8, 16, 32), seeds=(0,), **settings):
    for experts in counts:
        for seed in seeds:
            final = float(LAW.loss(3e5, experts)) + 0.003 * seed
            losses = [final + more for more in (1.5, 0.6, 0.2, 0.0)]
            chosen = settings_of(experts, seed, **settings)
            name = f"E{experts}-s{seed}-" + "-".join(map(str, settings.values()))
            write_run(root / name, chosen, losses, step_seconds=0.5 + 0.01 * experts)
    return root


@pytest.mark.parametrize(
    ("losses", "target", "step"),
    [
        ([5.0, 4.0, 3.0], 3.0, 300),  # at an evaluation
        ([5.0, 4.0, 3.0], 3.5, 250),  # between two
        ([5.0, 4.0, 3.0], 3.75, 225),
        ([5.0, 4.0, 3.0], 2.9, None),  # not reached
        ([5.0, 4.0, 3.0], 5.5, 100),  # before the first evaluation is not known: at it
        ([5.0, 4.0, 4.6, 3.0], 3.5, 350),  # falls from the lowest loss so far, 4.0, and not from 4.6
        ([5.0, 3.0, 4.0, 3.5], 3.0, 200),  # reached, though it is lost again
        ([5.0, 4.0, 4.0, 3.0], 4.0, 200),  # at once where it stays
        ([], 3.0, None),
    ],
)
def test_the_step_at_which_a_curve_reaches_a_loss(losses, target, step):
    assert sweeps.first_reached(np.arange(1, len(losses) + 1) * 100.0, np.array(losses), target) == step


def test_speed_ups_by_hand(tmp_path):
    write_run(tmp_path / "dense", settings_of(), [5.0, 4.6, 4.2, 4.0], step_seconds=0.5)
    write_run(tmp_path / "a", settings_of(2), [5.0, 4.2, 3.8, 3.7], step_seconds=1.0)  # at step 250
    write_run(tmp_path / "b", settings_of(2, seed=1), [4.4, 3.9, 3.8, 3.7], step_seconds=0.5)  # at step 180
    write_run(tmp_path / "c", settings_of(4), [5.0, 4.8, 4.7, 4.6])  # never
    write_run(tmp_path / "d", settings_of(8), [3.9, 3.8, 3.7, 3.6])  # by step 100
    write_run(tmp_path / "e", settings_of(16), [5.0, 4.5, 4.0, 3.9])  # at step 300
    write_run(tmp_path / "f", settings_of(16, seed=1), [5.0, 4.8, 4.6, 4.1])  # never
    (one,) = sweeps.group(sweeps.read_sweep(tmp_path).runs)
    assert sweeps.target(one.dense) == (4.0, 400, 200)
    two, four, eight, sixteen = sweeps.speed_ups(one)
    assert (two.experts, two.runs, two.reached, two.at_first) == (2, 2, 2, 0)
    fast = 400 / 180
    np.testing.assert_allclose(two.step, [(1.6 + fast) / 2, 1.6, fast])
    np.testing.assert_allclose(two.time, [(200 / 250 + 200 / 90) / 2, 200 / 250, 200 / 90])
    assert four == (4, 1, 0, 0, None, None)
    assert eight == (8, 1, 1, 1, (4, 4, 4), (4, 4, 4))
    assert (sixteen.runs, sixteen.reached) == (2, 1)
    line = sweep_report.speed_up_line(one, sixteen)
    assert line["step_mean"] is None and line["step_min"] == line["step_max"] == pytest.approx(4 / 3)


def test_the_target_is_the_mean_over_dense_seeds_of_their_lowest_loss(tmp_path):
    write_run(tmp_path / "a", settings_of(), [5.0, 4.0, 4.1, 4.2])
    write_run(tmp_path / "b", settings_of(seed=1), [5.0, 4.6, 4.4, 4.2])
    (one,) = sweeps.group(sweeps.read_sweep(tmp_path).runs)
    assert sweeps.target(one.dense) == (pytest.approx(4.1), 300, 150)
    assert sweeps.speed_ups(one) == []
    untimed = dataclasses.replace(one.dense[0], step_T=np.array([]), seconds_T=np.array([]))
    assert sweeps.target([untimed, one.dense[1]])[1:] == (300, 200), "seconds of the one that has times"


def test_a_spread_of_one_has_no_extent_and_of_none_is_none():
    assert sweeps.spread([2.0]) == (2.0, 2.0, 2.0)
    assert sweeps.spread([1.0, math.nan, 3.0]) == (2.0, 1.0, 3.0)
    assert sweeps.spread([math.nan]) is None


def test_what_a_run_tells(tmp_path):
    run = sweeps.read(write_run(tmp_path / "run", settings_of(4), [5, 4, 3.5, 3], 0.25, dropped=0.1))
    assert (run.experts, run.seed, run.loss) == (4, 0, 3.0)
    assert run.step_V.tolist() == [100, 200, 300, 400] and run.loss_V.tolist() == [5, 4, 3.5, 3]
    assert run.seconds_at(75.0) == pytest.approx(75 * 0.25) and run.step_seconds == 0.25
    assert run.routing == pytest.approx((0.3, 0.1, 0.0, 0.05, 1.95, 0.25))
    assert run.embeddings == 512 * 16  # 300 pieces and 100 sentinels, up to a multiple of 128


def test_times_follow_the_steps_between_records(tmp_path):
    path = write_run(tmp_path / "run", settings_of(), [5, 4, 3.5, 3])
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for record in lines:
        if record["split"] == "train":
            record["step_seconds"] = 1.0 if record["step"] <= 100 else 2.0
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
    assert sweeps.read(path).seconds_at([50, 100, 150, 400]).tolist() == [50, 100, 200, 700]


def damage(path, how):
    metrics = path / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    if how == "no config":
        (path / "config.json").unlink()
    elif how == "no metrics":
        metrics.unlink()
    elif how == "config of another":
        (path / "config.json").write_text('{"model": {"depth": 3}}')
    elif how == "config not JSON":
        (path / "config.json").write_text('{"model": ')
    elif how == "no run.json":
        (path / "run.json").unlink()
    elif how == "damaged run.json":
        (path / "run.json").write_text("[]")
    elif how == "unfinished":
        metrics.write_text("".join(lines[:6]))
    elif how == "failed at once":
        metrics.write_text(lines[0])
    elif how == "not a number":
        metrics.write_text(
            "".join(lines[:-1]) + re.sub(r'"cross_entropy": [\d.]+', '"cross_entropy": null', lines[-1])
        )
    elif how == "damaged line":
        metrics.write_text(lines[0] + "{broken\n" + "".join(lines[1:]))
    elif how == "not records":
        metrics.write_text('{"step": 400, "split": "validation", "cross_entropy": {}}\n')


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("no config", "no config.json: "),
        ("no metrics", "no metrics.jsonl: "),
        ("config of another", "its config.json is not a run's .*depth"),
        ("config not JSON", "its config.json is not a run's"),
        ("no run.json", "run.json does not tell parameters"),
        ("damaged run.json", r"run.json is damaged"),
        ("unfinished", "not done: the last evaluation is that of step 200 of 400"),
        ("failed at once", "no held-out loss"),
        ("not a number", "its held-out loss at step 400 is nan"),
        ("damaged line", r"metrics.jsonl, line 2: "),
        ("not records", "its metrics.jsonl is not a run's"),
    ],
)
def test_a_directory_that_is_not_a_finished_run_is_left_out_and_says_why(tmp_path, how, reason):
    write_run(tmp_path / "good", settings_of(), [5, 4, 3.5, 3])
    damage(write_run(tmp_path / "bad", settings_of(4), [5, 4, 3.5, 3]), how)
    (tmp_path / "file.json").write_text("{}")
    (tmp_path / ".hidden").mkdir()
    runs, left_out = sweeps.read_sweep(tmp_path)
    assert [run.name for run in runs] == ["good"] and list(left_out) == ["bad"]
    assert re.search(reason, left_out["bad"]) and "\n" not in left_out["bad"]


def test_a_run_that_patience_ended_is_read(tmp_path):
    path = write_run(tmp_path / "run", settings_of(), [5, 4])
    known = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(known | {"stopped_early": {"step": 200}}))
    assert sweeps.read(path).loss == 4.0


def test_a_torn_last_line_of_a_finished_run_does_no_harm(tmp_path):
    path = write_run(tmp_path / "run", settings_of(), [5, 4, 3.5, 3])
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4')
    assert sweeps.read(path).loss == 3.0


def test_groups_differ_in_what_a_sweep_varied_and_share_their_dense_runs(tmp_path):
    write_sweep(tmp_path, (1, 2), seeds=(0, 1))
    write_sweep(tmp_path, (2, 4), router="top_k")
    write_sweep(tmp_path, (1, 2), width=32)
    groups = sweeps.group(sweeps.read_sweep(tmp_path).runs)
    found = {one.label: {experts: len(runs) for experts, runs in one.cells.items()} for one in groups}
    assert found == {
        "d_model=16, router=switch": {1: 2, 2: 2},
        "d_model=16, router=top_k": {1: 2, 2: 1, 4: 1},
        "d_model=32, router=switch": {1: 1, 2: 1},
    }
    sizes = {(one.family, one.size) for one in groups}
    assert sizes == {("router=switch", 3072), ("router=switch", 12288), ("router=top_k", 3072)}


def test_one_group_has_no_label(tmp_path):
    write_sweep(tmp_path, (1, 2, 4))
    (one,) = sweeps.group(sweeps.read_sweep(tmp_path).runs)
    assert one.label == one.family == "" and list(one.cells) == [1, 2, 4]


def test_state_bytes_are_the_parameters_and_both_moments(tmp_path):
    settings = dataclasses.replace(settings_of(), optimizer=OptimizerSettings(name="adamw"))
    run = sweeps.read(write_run(tmp_path / "run", settings, [5, 4, 3.5, 3]))
    arrays = 3 * 4 * train_state.parameter_counts(settings)[0]
    assert arrays <= sweeps.state_bytes(run) <= arrays + 64  # and counters


def run_analysis(*arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a layout that does not fit, a mean of nothing, ...
        return analyze.main(["analyze", *map(str, arguments)])


def rows_of(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_analysis_is_one_page_with_its_pictures_and_tables(tmp_path, capsys, quick_memory):
    write_sweep(tmp_path, seeds=(0, 1))
    damage(write_run(tmp_path / "<b>bad", settings_of(64), [5, 4, 3.5, 3]), "unfinished")
    (tmp_path / command.CACHE_DIR).mkdir()  # no run
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert run_analysis(tmp_path) == 0
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    out = tmp_path / "analysis"
    assert printed.out == f"{out / 'report.html'}\n" and printed.err.startswith(
        f"left out: {tmp_path / '<b>bad'}: "
    )
    assert {path: path.read_bytes() for path in before} == before
    assert {path.name for path in out.iterdir()} == {
        "fit.json",
        "plots",
        "points.csv",
        "report.html",
        "speedups.csv",
    }
    html = (out / "report.html").read_text(encoding="utf-8")
    images = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', html)]
    assert set(images) == {path.read_bytes() for path in (out / "plots").iterdir()} and len(images) == 7
    assert not re.search(r"https?://|\shref=|<script|<link|@import|url\(|<b>", html)
    assert "&lt;b&gt;bad" in html and "step 200 of 400" in html and "CC BY 4.0" in html
    points, ups = rows_of(out / "points.csv"), rows_of(out / "speedups.csv")
    assert len(points) == 12 and [row["num_experts"] for row in ups] == ["2", "4", "8", "16", "32"]
    assert float(points[0]["gain_over_dense"]) == pytest.approx(0.0015)  # E=1, seed 0: 0.003 below seed 1
    assert points[0]["load_max"] == "" and float(points[2]["load_max"]) > 1
    speeds = [float(row["step_mean"]) for row in ups]
    assert 1 < speeds[0] < speeds[-1]
    (found,) = json.loads((out / "fit.json").read_text())["fits"]
    low, high = found["coefficients"]["b'"]["interval"]
    assert low < LAW.values(3e5)["b'"] < high and found["runs"] == 12
    # A second time it reads the runs and not its own files.
    assert run_analysis(tmp_path) == 0 and (out / "report.html").read_text(encoding="utf-8") == html


def test_several_groups_and_no_dense_model_make_reports(tmp_path, quick_memory):
    write_sweep(tmp_path / "many", (1, 2, 4))
    write_sweep(tmp_path / "many", (2, 8), router="top_k")
    assert run_analysis(tmp_path / "many", f"--out={tmp_path / 'out'}") == 0
    assert len(list((tmp_path / "out" / "plots").iterdir())) == 9
    assert {row["group"] for row in rows_of(tmp_path / "out" / "speedups.csv")} == {
        "router=switch",
        "router=top_k",
    }
    write_sweep(tmp_path / "sparse", (2, 4))
    assert run_analysis(tmp_path / "sparse") == 0
    html = (tmp_path / "sparse" / "analysis" / "report.html").read_text(encoding="utf-8")
    assert "no dense model" in html and "at least 4 pairs" in html
    assert rows_of(tmp_path / "sparse" / "analysis" / "speedups.csv") == []


def test_a_dense_run_alone_and_a_run_without_times_make_reports(tmp_path, quick_memory):
    path = write_run(tmp_path / "dense", settings_of(), [5, 4, 3.5, 3])
    metrics = path / "metrics.jsonl"
    kept = [line for line in metrics.read_text().splitlines(keepends=True) if '"validation"' in line]
    metrics.write_text("".join(kept))
    assert run_analysis(tmp_path) == 0
    (point,) = rows_of(tmp_path / "analysis" / "points.csv")
    assert point["train_seconds"] == "" and point["loss"] == "3.0"


def test_what_is_not_reached_is_crossed_and_lower_bounds_are_marked(tmp_path):
    write_run(tmp_path / "dense", settings_of(), [5.0, 4.6, 4.2, 4.0])
    write_run(tmp_path / "c", settings_of(4), [5.0, 4.8, 4.7, 4.6])
    write_run(tmp_path / "d", settings_of(8), [3.9, 3.8, 3.7, 3.6])
    figure = sweep_plots.speed_ups(sweeps.group(sweeps.read_sweep(tmp_path).runs))
    for axes in figure.axes:
        assert [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "x"] == [4]
        assert "≥4.0" in [text.get_text() for text in axes.texts]


def test_names_of_lines_keep_their_order_and_a_distance():
    assert sweep_plots._apart([0.1, 0.5, 0.9], 0.1) == pytest.approx([0.1, 0.5, 0.9])
    assert sweep_plots._apart([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
    assert sweep_plots._apart([0.1, 0.5, 0.52, 0.59], 0.1) == pytest.approx(
        [0.1, 0.43666667, 0.53666667, 0.63666667]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "0 directories: accepted is one"),
        (["{dir}", "{dir}"], "2 directories: accepted is one"),
        (["{dir}/none"], "no such directory"),
        (["{dir}/empty"], "no run in it is done"),
        (["{dir}/run"], "no run in it is done"),
        (["{dir}", "--out="], "accepted is --out=DIR"),
        (["{dir}", "--fit=no"], "argument --fit=no: accepted are"),
        (["{dir}", "--out={dir}/file"], "file: accepted is a directory"),
        (["{dir}", "--out={dir}/run"], "neither a run's nor the sweep's own"),
        (["{dir}", "--out={dir}"], "neither a run's nor the sweep's own"),
    ],
)
def test_bad_input_gets_one_line_and_writes_nothing(tmp_path, capsys, arguments, message):
    write_run(tmp_path / "run", settings_of(), [5, 4, 3.5, 3])
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    assert run_analysis(*(argument.format(dir=tmp_path) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("experiments.analyze: ") and error.count("\n") == 1 and message in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("quick_memory")
@pytest.mark.parametrize("losses", [[4.0] * 4, [4.0], [math.nan, math.nan, 4.0], [1e30, 4.0]])
def test_equal_losses_decide_nothing_and_make_a_report(tmp_path, losses):
    """Runs that end alike, with curves of one point, of gaps, or from far away."""
    for experts in (1, 2, 4):
        chosen = settings_of(experts)
        steps = 100 * len(losses)
        chosen = dataclasses.replace(chosen, train=dataclasses.replace(chosen.train, num_steps=steps))
        write_run(tmp_path / f"E{experts}", chosen, losses)
    found = sweeps.read_sweep(tmp_path)
    (one,) = sweeps.group(found.runs)
    assert dict(sweep_report.headline(found, [one], {}))["Lowest held-out loss"] == "4.000 at E=1, 2, 4"
    assert sweep_report.write(found, tmp_path / "out", title="equal").exists()
