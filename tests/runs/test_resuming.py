"""What may differ when a run goes on, and directories of earlier versions."""

import dataclasses
import importlib.metadata
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from experiments import exits
from experiments import run as command
from experiments.sweep import __main__ as sweep
from experiments.sweep import study
from switchmoe.runs import lock, loop, resuming, rundir, start, task_data, telling, text
from switchmoe.runs.parts import Context
from switchmoe.runs.reporting import read_metrics
from switchmoe.settings import Settings, from_config, to_dict

OLD_RUN = Path(__file__).parents[1] / "fixtures" / "run_0.1.0.tar.xz"
ROOT = Path(__file__).parents[2]


# The table.


def test_every_field_has_a_rule_and_every_rule_a_field():
    assert resuming.RULES.keys() == resuming.flat(to_dict(Settings())).keys()
    assert {rule.kind for rule in resuming.RULES.values()} == {resuming.BITS, resuming.MAY, resuming.NOT}


def test_the_documents_table_is_the_rules():
    assert resuming.table() in (ROOT / "docs" / "resuming.md").read_text(encoding="utf-8")


def other(settings, name):
    """The settings' groups with another value of one field."""
    groups = to_dict(settings)
    group, field = name.split(".")
    value = groups[group][field]
    groups[group][field] = (
        (not value)
        if isinstance(value, bool)
        else value + 1
        if value != "" and not isinstance(value, str)
        else "x"
    )
    return groups


@pytest.mark.parametrize("name", resuming.RULES)
def test_what_may_differ_differs_and_what_may_not_is_refused_by_name(name):
    there = other(Settings(), name)
    if resuming.RULES[name].kind == resuming.NOT:
        with pytest.raises(ValueError) as error:
            resuming.compare(there, Settings(), "it has a run")
        assert f"{name} (" in str(error.value) and resuming.RULES[name].why in str(error.value)
        assert "\n" not in str(error.value)
    else:
        assert list(resuming.compare(there, Settings(), "it has a run").changed) == [name]


def test_more_steps_where_the_schedule_does_not_end_with_them():
    for schedule, message in (("constant", ""), ("warmup_cosine", "warmup_cosine ends there")):
        there = from_config({"optimizer": {"schedule": schedule}, "train": {"num_steps": 10}})
        asked = dataclasses.replace(there, train=dataclasses.replace(there.train, num_steps=20))
        if message:
            with pytest.raises(ValueError, match=message):
                resuming.compare(to_dict(there), asked, "it")
        else:
            assert resuming.compare(to_dict(there), asked, "it").changed == {"train.num_steps": (10, 20)}


def test_a_field_that_is_not_there_has_its_default():
    there = to_dict(Settings())
    del there["moe"]["balance_choices"], there["train"]["skip_nonfinite"]
    assert resuming.compare(there, Settings(), "it") == (["moe.balance_choices", "train.skip_nonfinite"], {})
    other = from_config({"moe": {"balance_choices": "first"}})
    with pytest.raises(ValueError, match="moe.balance_choices .all there, first asked"):
        resuming.compare(there, other, "it")
    there["moe"]["of_a_later_version"] = 3
    with pytest.raises(
        ValueError, match="moe.of_a_later_version .3 there, none asked: this version does not"
    ):
        resuming.compare(there, Settings(), "it")


# Runs.


@pytest.fixture
def old_run(tmp_path):
    """A run of 8 steps that version 0.1.0 wrote (jax 0.10), with the checkpoint of step 4 alone; its metrics are whole."""
    with tarfile.open(OLD_RUN) as file:
        file.extractall(tmp_path, filter="data")
    workdir = tmp_path / "run"
    return workdir, json.loads((workdir / "config.json").read_text()), read_metrics(workdir / "metrics.jsonl")


def arguments(config, **more):
    """The command line that asks for these settings."""
    fields = resuming.flat(config) | more
    return [f"--config.{name}={value}" for name, value in fields.items() if value != ""]


def contents(directory):
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != lock.LOCK_FILE)
    return {path: path.read_bytes() for path in files}


def go_on(workdir, config, capsys, **more):
    code = command.main(["run", f"--workdir={workdir}", *arguments(config, **more)])
    return code, capsys.readouterr()


@pytest.mark.usefixtures("one_device")
def test_a_directory_of_an_earlier_version_goes_on(old_run, capsys):
    workdir, config, wanted = old_run
    assert "balance_choices" not in config["moe"]
    code, captured = go_on(workdir, config, capsys)
    assert code == 0, captured.err
    assert "resuming from the checkpoint of step 4" in captured.out
    assert (
        "this run began with an earlier version; " in captured.out and "moe.balance_choices" in captured.out
    )
    found = read_metrics(workdir / "metrics.jsonl")
    assert [(r["step"], r["split"]) for r in found] == [(r["step"], r["split"]) for r in wanted]
    for here, there in zip(found, wanted, strict=True):
        for name in ("loss", "cross_entropy", "z_loss", "layer_expert_load"):
            np.testing.assert_allclose(here[name], there[name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert (workdir / "report.html").exists()
    there = json.loads((workdir / "config.json").read_text())
    assert there["moe"]["balance_choices"] == "all", "what it lacked is now said"


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_what_is_only_told_or_kept_may_change_and_the_bits_stay(old_run, capsys, tmp_path):
    workdir, config, _ = old_run
    changed = {
        "data.prefetch": 2, "train.log_every": 3, "train.eval_every": 2, "checkpoint.every": 3, "checkpoint.keep": 5,
        "data.data_dir": tmp_path / "moved", "train.skip_nonfinite": 1,
    }  # fmt: skip
    known = json.loads((workdir / "run.json").read_text())
    known["versions"]["jax"] = "0.9.0"
    (workdir / "run.json").write_text(json.dumps(known))
    code, captured = go_on(workdir, config, capsys, **changed)
    assert code == 0, captured.err
    assert (
        "settings changed since the last start: " in captured.out and "data.prefetch (8 -> 2)" in captured.out
    )
    noted = json.loads((workdir / "run.json").read_text())["changed"]
    assert noted[0]["step"] == 4 and noted[0]["train.log_every"] == [1, 3]
    assert noted[0].keys() & resuming.RULES.keys() == changed.keys()
    assert noted[0]["versions.jax"] == ["0.9.0", importlib.metadata.version("jax")]
    assert f"versions.jax (0.9.0 -> {importlib.metadata.version('jax')})" in captured.out
    assert sorted(int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()) == [
        4,
        6,
        8,
    ]
    last = {r["split"]: r for r in read_metrics(workdir / "metrics.jsonl") if r["step"] == 8}
    code, _ = go_on(workdir, config, capsys)  # and back again: nothing is left to do
    assert code == 0
    assert {r["split"]: r for r in read_metrics(workdir / "metrics.jsonl") if r["step"] == 8} == last


@pytest.mark.usefixtures("one_device")
def test_a_start_that_dies_while_it_compiles_has_noted_what_it_changed(old_run, capsys, monkeypatch):
    workdir, config, _ = old_run

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "Programs", die)
    for _ in range(2):
        assert go_on(workdir, config, capsys, **{"train.log_every": 3})[0] == exits.EXIT_INTERRUPTED
    noted = json.loads((workdir / "run.json").read_text())["changed"]
    assert len(noted) == 1 and noted[0]["step"] == 4 and noted[0]["train.log_every"] == [1, 3]
    assert json.loads((workdir / "config.json").read_text())["train"]["log_every"] == 3
    file = next((workdir / "checkpoints" / "4" / "data").iterdir())
    file.write_bytes(b"")
    before = contents(workdir)
    code, captured = go_on(workdir, config, capsys)
    assert code == exits.EXIT_IO and "nothing was changed" in captured.err
    assert contents(workdir) == before, "config.json and run.json among them"


@pytest.mark.usefixtures("one_device")
def test_training_time_is_counted_through_a_kill(old_run, capsys, monkeypatch):
    """A checkpoint at 4, another at 6, killed in step 7."""
    workdir, config, _ = old_run
    rundir.update_run(workdir, steps_timed=4)
    read = loop._Loop._read

    def killed(self, step, metrics):
        if step == 7:
            raise KeyboardInterrupt
        read(self, step, metrics)

    every = {"checkpoint.every": 2}
    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "_read", killed)
        assert go_on(workdir, config, capsys, **every)[0] == exits.EXIT_INTERRUPTED
    assert rundir.read_run(workdir)["steps_timed"] == 6
    code, captured = go_on(workdir, config, capsys, **every)
    assert code == 0 and "resuming from the checkpoint of step 6" in captured.out
    assert rundir.read_run(workdir)["steps_timed"] == config["train"]["num_steps"] == 8


def test_what_of_code_and_machine_is_not_as_it_was():
    there = {
        "versions": {"jax": "1", "flax": "2"},
        "machine": "a",
        "environment": {"XLA_FLAGS": "x"},
        "seen": 1,
    }
    here = {"versions": {"jax": "3", "flax": "2"}, "machine": "b", "environment": {}, "commit": "c"}
    assert telling.moved(there, here) == {
        "environment.XLA_FLAGS": ("x", "none"), "machine": ("a", "b"), "versions.jax": ("1", "3"),
    }  # fmt: skip
    assert telling.moved({}, here) == telling.moved(here, here) == {}


@pytest.mark.usefixtures("one_device")
def test_refusals_on_the_way_change_nothing(old_run, capsys):
    workdir, config, _ = old_run
    before = (workdir / "config.json").read_text()
    for more, message in (
        (
            {"train.num_steps": 10},
            "train.num_steps (8 there, 10 asked: optimizer.schedule=warmup_cosine ends there",
        ),
        ({"data.batch_size": 4}, "data.batch_size (8 there, 4 asked: the saved position"),
        ({"moe.capacity_factor": 2.0}, "moe.capacity_factor (1.25 there, 2.0 asked: tokens would go"),
    ):
        code, captured = go_on(workdir, config, capsys, **more)
        assert code == exits.EXIT_BAD_INPUT and message in captured.err and captured.err.count("\n") == 1
        assert (workdir / "config.json").read_text() == before
    config["optimizer"]["schedule"] = "constant"
    (workdir / "config.json").write_text(json.dumps(config))
    code, captured = go_on(workdir, config, capsys, **{"train.num_steps": 3})
    assert code == exits.EXIT_BAD_INPUT and "is at step 4; accepted is that or more" in captured.err
    (workdir / "run.json").unlink()
    code, captured = go_on(workdir, config, capsys, **{"data.data_dir": "/elsewhere"})
    assert code == exits.EXIT_BAD_INPUT and "does not say what text its run began with" in captured.err


def test_a_run_of_which_nothing_is_saved_may_be_deleted(old_run):
    workdir, config, _ = old_run
    config["train"]["seed"] += 1
    with pytest.raises(ValueError, match=r"may change\)$"):
        rundir.check(workdir, from_config(config))
    (workdir / "checkpoints" / "4").rename(workdir / "checkpoints" / "4.orbax-checkpoint-tmp")
    with pytest.raises(ValueError, match="no step of it is saved: it may be deleted$"):
        rundir.check(workdir, from_config(config))


def test_another_vocabulary_at_a_resume_is_refused_and_the_same_elsewhere_is_not(old_run, tmp_path):
    workdir, config, _ = old_run
    own, moved, other = workdir / "vocabulary.model", tmp_path / "moved.model", tmp_path / "other.model"
    moved.write_bytes(own.read_bytes())
    other.write_bytes(own.read_bytes() + b"more")

    def context(vocab):
        config["data"]["vocab"] = str(vocab)
        return Context(from_config(config), workdir, None, True, print)

    for vocab in ("", moved, tmp_path / "gone.model"):
        assert start.own_vocabulary(context(vocab)) == own
    for kind in (
        lambda found: text._vocabulary(found, [], ""),
        lambda found: task_data._vocabulary(found, ""),
    ):
        with pytest.raises(
            ValueError, match=f"data.vocab={other}: another vocabulary than the run in {workdir}"
        ):
            kind(context(other))
    (workdir / "config.json").write_text(json.dumps(config))
    assert start.own_vocabulary(context(other)) == own, "as the last start had it, which kept its own copy"


def test_a_copy_of_the_vocabulary_that_is_not_what_the_run_began_with_is_refused(old_run):
    workdir, config, _ = old_run
    context = Context(from_config(config), workdir, None, True, print)
    rundir.update_run(workdir, vocabulary_sha256="0" * 64)
    for kind in (
        lambda: text._vocabulary(context, [], ""),
        lambda: task_data._vocabulary(context, ""),
    ):
        with pytest.raises(ValueError, match="is another vocabulary than the run .*of SHA-256 0000"):
            kind()


def test_a_sweep_of_an_earlier_version_goes_on(tmp_path):
    file = tmp_path / "study.py"
    file.write_text(
        "from configs import quickstart\nget_config = quickstart.get_config\n"
        "def get_sweep():\n    return [{'moe.num_experts': [1, 2]}]\n"
    )
    given = ["sweep", f"--config={file}", f"--workdir={tmp_path / 'out'}"]
    found = study.read(given, "A doc.")
    definition = study.definition(found)
    for groups in (definition["base"], *(to_dict(run.settings) for run in found.runs)):
        del groups["moe"]["balance_choices"], groups["checkpoint"]["on_damage"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sweep.json").write_text(json.dumps(definition))
    study.check_directory(found)
    study.check_directory(study.read([*given, "--config.checkpoint.keep=7"], "A doc."))
    assert sweep.main([*given, "--config.moe.balance_choices=first"]) == exits.EXIT_BAD_INPUT
