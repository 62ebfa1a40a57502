"""What the papers' claims come to: the scorecard says what runs say, kept in a file or not; their times; what pilots ask for."""

import dataclasses
import json
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import test_paper
from test_paper import whole

from experiments import claims, exits
from experiments.claims import CLAIMS
from experiments.paper import __main__ as paper
from experiments.paper import finished, page, rates, scorecard, times
from experiments.sweep import study
from switchmoe.analysis import answers, sweeps, verdicts
from switchmoe.analysis.verdicts import HELD, NOT_HELD, NOT_RUN, UNDECIDED
from switchmoe.runs import rundir
from switchmoe.settings import to_dict

here = test_paper.here  # a fixture
MICRO = [
    "--config.data.batch_size=8",
    "--config.data.input_length=32",
    "--config.data.vocab_size=600",
    "--config.train.num_steps=6",
    "--config.train.log_every=2",
    "--config.train.eval_every=3",
    "--config.train.eval_batches=1",
]


def test_where_runs_were_timed_in_turn_the_others_have_no_times():
    def run(name, *seconds, first=1):
        nothing = dict.fromkeys((field.name for field in dataclasses.fields(sweeps.Run)), None)
        steps = np.arange(first, first + len(seconds))
        own = dict(name=name, step_T=steps, seconds_T=np.array(seconds), step_seconds=1.0)
        return sweeps.Run(**nothing | own)

    def seconds(**tables):
        swept = page._swept(
            types.SimpleNamespace(tables={claim: {"arm": arm} for claim, arm in tables.items()})
        )
        return {run.name: run.seconds_T.tolist() for run in swept}

    timed, own, same = run("E=1", 0.0, 9.0, first=0), run("E=2", 1.0, 2.0), run("E=1", 3.0, 6.0)
    assert seconds(figure1={0: timed}, dropless={0: own, 1: same, 2: None}) == {"E=1": [0.0, 9.0], "E=2": []}
    assert seconds(figure1={0: timed}, dropless={0: run("E=2", 7.0)}) == {"E=1": [0.0, 9.0], "E=2": []}
    assert seconds(dropless={0: own, 1: same}) == {"E=1": [3.0, 6.0], "E=2": [1.0, 2.0]}


def fabricate(directory, settings, losses, dropped=0.002):
    """A run that is done: held-out losses at its evaluations."""
    directory.mkdir(parents=True)
    steps = np.linspace(0, settings.train.num_steps, len(losses) + 1)[1:]
    layers = ["encoder/1"] if settings.sparse else []
    share = [1 / settings.moe.num_experts] * settings.moe.num_experts
    routing = {"layers": layers, "layer_fraction_dropped": [dropped], "layer_expert_load": [share]}
    records = [
        {
            "step": int(step),
            "split": split,
            "cross_entropy": loss,
            "step_seconds": 0.1,
            "tokens_per_second": 9.0,
        }
        | (routing if layers else {"layers": []})
        for step, loss in zip(steps, losses, strict=True)
        for split in ("train", "validation")
    ]
    if settings.task.names:
        records.append({"step": settings.train.num_steps, "split": answers.SPLIT, "score": 30.0 - losses[-1]})
    (directory / "config.json").write_text(json.dumps(to_dict(settings)))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (directory / "report.html").write_text("")
    rundir.update_run(
        directory, parameters=2_000_000, parameters_active=1_000_000, train_seconds=60.0, steps_timed=10, device="1 x cpu",
        machine="2 x a processor", versions={"jax": "0.10"}, commit="0123abc", documents={"train": 77},
        documents_sha256={"train": "f" * 64},
    )  # fmt: skip


def outcomes(directory):
    results = scorecard.read(directory, "tiny")
    return {claim.name: scorecard.judge(claim, results).outcome for claim in claims.tried("tiny")}


def fabricate_all(directory, loss):
    """The directory of a sweep in which runs end at ``loss(settings)``; None: diverged; "": not there."""
    found = whole("tiny", directory, *MICRO)
    directory.mkdir()
    (directory / "sweep.json").write_text(json.dumps(study.definition(found)))
    for run in found.runs:
        last = loss(run.settings)
        if last is None:
            (directory / run.name).mkdir()
            rundir.update_run(directory / run.name, not_finite=3)
        elif last != "":
            fabricate(directory / run.name, run.settings, (last + 2, last + 0.1, last))
    return found


def test_the_scorecard_says_what_the_runs_say(tmp_path, capsys):
    """Of figure 12: two claims hold, one does not, of table 2 the third arm diverged, of others there are no runs."""

    def loss(settings):
        moe, noise = settings.moe, 0.01 * settings.train.seed
        if settings.model.d_model != 64 or moe.capacity_factor != 1.25 or moe.explore != "jitter":
            return ""
        if moe.router_dtype == "bfloat16":
            return None
        drawn = 0.02 * (settings.train.seed == 1) if moe.z_loss_weight else 0.0
        return (
            5.0 + noise + drawn - (0.1 if moe.num_experts in (2, 8) else -0.1 if moe.num_experts == 4 else 0)
        )

    out = tmp_path / "out"
    fabricate_all(out, loss)
    found = outcomes(out)
    assert {found[name] for name in ("figure6", "table11", "table1")} == {NOT_RUN}
    assert (found["figure12"], found["z_loss"], found["dropped_tokens"]) == (NOT_HELD, UNDECIDED, HELD)
    assert paper.main(["paper", "report", f"--workdir={out}"]) == 0
    assert capsys.readouterr().out.strip() == str(out / "report" / "scorecard.html")
    text = (out / "report" / "scorecard.md").read_text()
    page = (out / "report" / "scorecard.html").read_text()
    part = "loss of E=4 below dense |  | -0.1000 nats (-0.1000 to -0.1000) | 3 | did not hold |"
    assert part in text and "loss of selective below bfloat16 | 2.064 nats | +inf nats" in text
    for shown in (
        "2 x a processor (1 x cpu)", "0123abc", "jax 0.10", "train 77 documents, fingerprint ffffffffffff",
        f"python -m experiments.paper figure12 --scale=tiny --workdir={out} --config.data.batch_size=8",
        "3 diverged", "no matter of training runs",
    ):  # fmt: skip
        assert shown in text and shown in page, shown
    assert page.count("data:image/png;base64,") == 2 * sum(
        any(runs for runs in table.values()) for table in scorecard.read(out, "tiny").tables.values()
    )
    without_pictures = re.sub(r'base64,[^"]+', "", page)
    assert "http" not in without_pictures and "<script" not in page
    assert paper.main(["paper", "report", f"--workdir={out}", "--scale=small"]) == exits.EXIT_BAD_INPUT
    assert "not the runs of --scale=small" in capsys.readouterr().err


def test_each_seed_and_each_arm_is_a_run_of_its_own(tmp_path):
    """The table of a claim has what its own runs came to, by arm and seed."""
    alphas = {alpha: place for place, alpha in enumerate((1e-1, 1e-2, 1e-3, 1e-4, 1e-5))}
    out = tmp_path / "out"
    fabricate_all(
        out,
        lambda settings: 4.0 + alphas.get(settings.moe.balance_loss_weight, 0) + 0.1 * settings.train.seed,
    )
    table = scorecard.read(out, "tiny").tables["alpha"]
    for alpha, place in alphas.items():
        losses = [run.loss for run in table[f"alpha {alpha:g}"].values()]
        assert losses == pytest.approx([4.0 + place, 4.1 + place, 4.2 + place])
    assert (
        set(table["alpha 0.01"]) == {0, 1, 2}
        and len(scorecard.read(out, "tiny").tables["table3"]["0.1x"]) == 5
    )


@pytest.mark.usefixtures("here")
def test_a_claim_whose_runs_are_done_is_judged_and_nothing_is_run_again(tmp_path, capsys):
    out = tmp_path / "out"
    fabricate_all(
        out, lambda settings: 4.0 - 0.1 * (settings.moe.z_loss_weight > 0) + 0.1 * settings.train.seed
    )
    assert paper.main(["paper", "z_loss", f"--workdir={out}", *MICRO]) == 0
    text = capsys.readouterr().out
    assert "6 of 6 runs done" in text and "running" not in text
    assert "z_loss (ST-MoE, Table 4): held\n" in text
    assert "+0.1000 nats (+0.1000 to +0.1000), 3 seeds; the paper: 0.014 nats" in text
    assert paper.main(["paper", "z_loss", "--dry_run", f"--workdir={out}", *MICRO]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and all("(done)" in line for line in lines[1:7])
    assert paper.main(["paper", "no_token_left_behind", f"--workdir={out}", *MICRO]) == 0
    assert "no_token_left_behind (Switch, app. B): " in capsys.readouterr().out, (
        "another claim, the same directory"
    )
    assert paper.main(["paper", "z_loss", f"--workdir={out}"]) == exits.EXIT_BAD_INPUT
    assert "holds another sweep" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_runs_that_are_kept_in_a_file_outlive_their_directories(tmp_path, capsys):
    """The same verdict and report from the file alone; it grows, and runs of another base are refused."""
    out, kept = tmp_path / "out", tmp_path / "results" / "paper_tiny" / "runs.jsonl"

    def loss(settings):
        better = 0.1 * (settings.moe.z_loss_weight > 0)
        return None if settings.moe.router_dtype == "bfloat16" else 4 + settings.train.seed - better

    fabricate_all(out, loss)
    assert paper.main(["paper", "report", f"--workdir={out}", f"--kept={kept}"]) == 0
    assert str(tmp_path) not in kept.read_text()
    asked = ["z_loss", "table2", f"--kept={kept}", *MICRO]
    results = scorecard.read(out, "tiny")
    told = [line for name in asked[:2] for line in scorecard.told(CLAIMS[name], results).splitlines()]
    capsys.readouterr()
    elsewhere = tmp_path / "elsewhere"
    assert paper.main(["paper", *asked, f"--workdir={elsewhere}"]) == 0
    again = capsys.readouterr().out.splitlines()
    assert again[0] == f"12 of 12 runs are in {kept}" and again[1:] == told and not elsewhere.exists()
    before = kept.read_bytes()
    for directory in (out, elsewhere):
        assert paper.main(["paper", "report", f"--kept={kept}", f"--workdir={directory}"]) == 0
    first, second = ((directory / "report" / "scorecard.md").read_text() for directory in (out, elsewhere))
    assert first.replace(str(out), str(elsewhere)) == second
    assert kept.read_bytes() == before
    fabricate_all(tmp_path / "again", lambda settings: 9 - settings.moe.z_loss_weight)
    assert paper.main(["paper", "report", f"--kept={kept}", f"--workdir={tmp_path / 'again'}"]) == 0
    assert kept.read_bytes() == before, "what was kept first counts"
    (tmp_path / "results" / "notes.md").write_text("How the scale was chosen.")
    assert paper.main(["paper", "page", f"--results={tmp_path / 'results'}"]) == 0
    page = (tmp_path / "results" / "scorecard.md").read_text()
    assert (
        "How the scale was chosen." in page
        and page.count(verdicts.RULE) == 1
        and "| z_loss | ST-MoE, Table 4 | held | 1 held | loss of z-loss" in page
    )
    assert "+0.1000 nats (+0.1000 to +0.1000) | 3 x 0.0 |" in page and "| table4 | Switch, Table 4 |" in page
    for picture in ("loss_experts.png", "speedups.png"):
        assert f"(paper_tiny/{picture})" in page and (kept.parent / picture).stat().st_size > 10_000
    ahead = page.partition("## What a larger machine should run next")[2].partition("\n## ")[0]
    assert "| small: runs | small: FLOPs | small: time | base: runs |" in ahead
    assert "| table2 |" in ahead and "| z_loss |" not in ahead and "| figure7 |" not in ahead
    assert (
        "What deciding the rest costs" in page
        and "| figure1 | loss of E=2 below dense | smallest worth" in page
    )
    for wrong in ("--config.train.num_steps=12", "--config.data.batch_size=16"):
        assert paper.main(["paper", "alpha", f"--kept={kept}", f"--workdir={elsewhere}", *MICRO, wrong]) == 2
        err = capsys.readouterr().err
        assert wrong.split(".", 1)[1].split("=")[0] in err and err.count("\n") == 1
    assert paper.main(["paper", "report", "--scale=laptop", f"--kept={kept}", f"--workdir={elsewhere}"]) == 2
    assert "it is of --scale=tiny); accepted is a file of its own" in capsys.readouterr().err
    assert paper.main(["paper", "report", "--scale=laptop", f"--workdir={out}"]) == 2
    assert "not the runs of --scale=laptop" in capsys.readouterr().err
    kept.write_text(before.decode().replace("f" * 64, "e" * 64, 1))
    assert paper.main(["paper", "report", f"--kept={kept}", f"--workdir={elsewhere}"]) == 2
    assert "runs of 2 texts" in capsys.readouterr().err
    kept.write_text("")
    assert finished.missing([{}], [], "", "tiny", kept) == [{}]
    kept.write_text(before.decode() + "{}\n")
    assert paper.main(["paper", "report", f"--kept={kept}", f"--workdir={out}"]) == 2
    assert "not a run that this command kept" in capsys.readouterr().err


@pytest.mark.usefixtures("here")
def test_times_that_are_measured_take_the_place_of_those_of_the_runs(tmp_path, capsys):
    """Each seed has rounds of its own: here the sparse steps are 1.5, 2 and 2.5 times as fast."""
    out = tmp_path / "out"
    fabricate_all(out, lambda settings: 4.0 + settings.train.seed)
    arms = times.arms(CLAIMS["table10"], "tiny")
    assert [arm.get("moe.attention", False) for arm in arms] == [False, True]
    plain, both = '{"moe.num_experts": 16}', '{"moe.attention": true, "moe.num_experts": 16}'
    base = study.read_definition(out)["base"]
    slow = [[1.5, 9.0, 1.4], [2.0] * 3, [2.5] * 3]
    measured = {
        "machine": "2 x a clock",
        "commit": "77",
        "base": base,
        "seconds": {plain: [[1.0] * 3] * 3, both: slow},
    }
    path = times.place(out, "tiny", None)
    path.write_text(json.dumps([measured]))
    results = scorecard.read(out, "tiny")
    (part,) = (f for f in scorecard.judge(CLAIMS["table10"], results).findings if f.check.timed)
    assert np.exp(part.interval.mean) == pytest.approx((1.5 * 2 * 2.5) ** (1 / 3))
    assert results.clocks == {"table10": "2 x a clock, commit 77"}, "figure 5 has other arms as well"
    claim = CLAIMS["table10"]
    speeds = {arm: scorecard._arm(claim, arm, runs)[-1] for arm, runs in results.tables["table10"].items()}
    assert [arm for arm, speed in speeds.items() if speed] == [
        "feed-forward, float32",
        "with attention, float32",
    ]
    other = finished.merged(base, {"model.d_model": 32})
    path.write_text(json.dumps([measured | {"base": other}]))
    assert scorecard.read(out, "tiny").clocks == {}
    options = [f"--workdir={out}", "--config.data.documents=block"]
    assert paper.main(["paper", "times", *options]) == exits.EXIT_BAD_INPUT
    assert "differ from those that are asked in" in capsys.readouterr().err
    path.write_text("{}")
    assert paper.main(["paper", "report", f"--workdir={out}"]) == exits.EXIT_BAD_INPUT
    assert "times_tiny.json: not what `times` writes" in capsys.readouterr().err


@pytest.mark.slow
def test_steps_of_arms_are_timed_in_turn(tmp_path, capsys):
    """Each of as many rounds as were asked for; the directory needs no runs."""
    options = [f"--workdir={tmp_path}", "--repeats=3", *MICRO]
    for number in (1, 2):
        assert paper.main(["paper", "times", "table10", *options]) == 0
        path = times.place(tmp_path, "tiny", None)
        assert capsys.readouterr().out.strip() == str(path)
        assert len(times.read(path)) == number
    for seconds in times.read(path)[-1]["seconds"].values():
        assert np.array(seconds).shape == (3, 3) and np.min(seconds) > 0


@pytest.mark.usefixtures("here")
def test_power_says_seeds_and_hours_from_pilots(tmp_path, capsys):
    """Pilots of seeds that no claim uses; differences vary by 0.01, and between two sparse arms by a tenth of that."""
    used = {seed for claim in CLAIMS.values() for seed in range(claim.seeds)}
    assert not used & set(claims.PILOT_SEEDS)
    out, noise = tmp_path / "out", {100: 0.01, 101: -0.01, 102: 0.0, 103: 0.0}

    def loss(settings):
        seed = settings.train.seed
        share = 0.9 if settings.moe.explore == "argmax" else 1.0
        sparse = share * noise.get(seed, 0) - 0.1 if settings.sparse else 0.0
        return 4.0 + sparse + seed if seed in noise else ""

    fabricate_all(out, loss)
    assert paper.main(["paper", "power", f"--workdir={out}", *MICRO]) == 0
    text = (out / "report" / "power.md").read_text()
    assert text in capsys.readouterr().out
    assert "dense: seeds 100, 101, 102, 103; sparse: seeds 100, 101, 102, 103; argmax: seeds 100" in text
    assert "| 6 | 1 | +0.1000 | 0.0082 | 1.8239 |" in text
    assert re.search(r"\| 6 \| 1 \| [+-]0.0000 \| 0.0008 \| ", text)
    row = next(
        line for line in text.splitlines() if line.startswith("| table1 | loss of Switch 1.25 below T5")
    )
    assert row.split("|")[3:5] == [" the paper's ", " 0.178 "]
    assert "| table2 | loss of selective within 0.005 nats of float32 | none | 0 |" in text
    dense, sparse = (
        next(
            int(line.split("|")[5]) for line in text.splitlines() if part in line and "smallest worth" in line
        )
        for part in ("loss of E=2 below dense", "loss of E=4 below E=2")
    )
    assert dense > 10 and sparse == 3
    seeds, hours = (cell.strip() for cell in row.split("|")[5:7])
    assert int(seeds) == 3 and float(hours) < 0.1
    assert paper.main(["paper", "power", "--scale=small", f"--workdir={out}"]) == exits.EXIT_BAD_INPUT


@pytest.mark.usefixtures("here")
def test_rates_says_which_has_the_lowest_loss_of_both_models(tmp_path, capsys):
    """The dense model alone would take a higher rate; instructions want the lowest. Its seed is no claim's."""
    out, used = tmp_path / "out", {seed for claim in CLAIMS.values() for seed in range(claim.seeds)}

    def loss(settings):
        rate, dense = settings.optimizer.learning_rate, not settings.sparse
        if settings.train.seed != claims.RATES_SEED:
            return 4.0
        if "instruct" in settings.task.names:
            return 5.0 + rate
        return 3.0 - (rate if dense else 0) + abs(rate - 1e-2) * 10

    found = fabricate_all(out, loss)
    pilots = {run.settings.train.seed for run in found.runs} - used - set(claims.PILOT_SEEDS)
    assert pilots == {claims.RATES_SEED, claims.RATES_SEED + 1}, "it begins with a run of another seed"
    assert paper.main(["paper", "rates", f"--workdir={out}", *MICRO]) == 0
    text = (out / "report" / "rates.md").read_text()
    assert text in capsys.readouterr().out
    assert "| topics | 0.01 | 2.9900 | 27.0 | 3.0000 | 27.0 | 2.9950 |" in text
    assert "topics 0.01; instructions 0.003." in text
    of_pilots = [run for run in found.runs if run.settings.train.seed == claims.RATES_SEED]
    worst = next(run for run in of_pilots if run.settings.optimizer.learning_rate == 3e-2)
    (out / worst.name / "metrics.jsonl").unlink()
    with pytest.raises(
        ValueError, match=r"learning_rate=0.03.* is not done; accepted is after all of them are"
    ):
        rates.write(out, "tiny")
    rundir.update_run(out / worst.name, not_finite=3)
    assert "| topics | 0.03 | diverged |  | 3.2000 | 26.8 | inf |" in rates.write(out, "tiny")[0]
    for run in of_pilots:
        (out / run.name / "metrics.jsonl").unlink(missing_ok=True)
        rundir.update_run(out / run.name, not_finite=3)
    assert "topics none; instructions none." in rates.write(out, "tiny")[0]
    assert paper.main(["paper", "rates", "--scale=languages", f"--workdir={out}"]) == exits.EXIT_BAD_INPUT
    assert "nothing is tuned there; accepted are tiny, laptop, small, base" in capsys.readouterr().err


@pytest.mark.long
def test_a_claim_from_runs_to_verdict(tmp_path, monkeypatch, environment):
    """Few steps of few seeds: both runs are made, and decide nothing; the same command again runs nothing."""
    out = tmp_path / "out"
    program = (
        "import dataclasses, sys\n"
        "from experiments import claims\n"
        "from experiments.paper import __main__ as paper\n"
        "claims.CLAIMS['z_loss'] = dataclasses.replace(claims.CLAIMS['z_loss'], seeds=1)\n"
        "claims.SCALES['tiny'] = dataclasses.replace(claims.SCALES['tiny'], seeds=1)\n"
        "sys.exit(paper.main(sys.argv))"
    )
    command = [sys.executable, "-c", program, "z_loss", f"--workdir={out}", *MICRO]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 runs done" in done.stdout and f"z_loss (ST-MoE, Table 4): {UNDECIDED}" in done.stdout
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and "running" not in again.stdout
    known = rundir.read_run(out / "num_experts=16,seed=0")
    assert known["documents"]["train"] > known["documents"]["validation"] > 0 and known["machine"]
    assert len(list(out.glob("*/metrics.jsonl"))) == 2
