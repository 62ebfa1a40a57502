"""What people have set for other work neither changes a run's results in silence nor ends it in a traceback."""

import json
import os
import subprocess
import sys

import pytest

from experiments import exits, process
from switchmoe.data import sources
from switchmoe.runs.reporting import read_metrics
from switchmoe.settings import DataSettings

TINY = [
    "--config.model.d_model=16", "--config.model.d_ff=16", "--config.model.d_kv=8", "--config.model.num_heads=2",
    "--config.model.num_layers=1", "--config.moe.num_experts=2", "--config.moe.group_size=64",
    "--config.data.batch_size=4", "--config.data.input_length=16", "--config.data.vocab_size=500",
    "--config.train.num_steps=2", "--config.train.eval_batches=1",
]  # fmt: skip


def go(tmp_path, environment, name="run", **variables):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.run", f"--workdir={tmp_path / name}", *TINY],
        env=environment | variables, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done


def figures(workdir):
    return [(r["loss"], r["cross_entropy"]) for r in read_metrics(workdir / "metrics.jsonl")]


@pytest.mark.slow
def test_what_would_change_the_results_is_left_out_and_named(tmp_path, environment):
    """All at once: each of them alone changed a draw or a precision, or ended the run."""
    variables = {
        "JAX_ENABLE_X64": "1", "JAX_DEFAULT_PRNG_IMPL": "rbg", "JAX_RANDOM_SEED_OFFSET": "7", "JAX_THREEFRY_PARTITIONABLE": "0",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_DISABLE_JIT": "1", "JAX_TRANSFER_GUARD": "disallow",
        "PYTHONWARNINGS": "error",
    }  # fmt: skip
    others = {
        "MPLBACKEND": "nonsense", "TMPDIR": "/nowhere", "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "TERM": "dumb",
        "PYTHONOPTIMIZE": "1", "COLUMNS": "0", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "4",
    }  # fmt: skip
    assert go(tmp_path, environment, "plain").returncode == 0
    done = go(tmp_path, environment, "odd", **variables, **others)
    assert done.returncode == 0, done.stderr
    assert figures(tmp_path / "odd") == figures(tmp_path / "plain")
    said = [line for line in done.stderr.splitlines() if "is ignored" in line]
    assert len(said) == len(variables)
    assert "experiments.run: JAX_RANDOM_SEED_OFFSET=7 is ignored (all random numbers would differ)" in said


@pytest.mark.slow
def test_what_changes_the_last_digits_is_told_and_kept(tmp_path, environment):
    done = go(tmp_path, environment, JAX_DEFAULT_MATMUL_PRECISION="highest")
    assert done.returncode == 0
    assert "environment: JAX_DEFAULT_MATMUL_PRECISION=highest (the last digits" in done.stdout
    kept = json.loads((tmp_path / "run" / "run.json").read_text())["environment"]
    assert kept["JAX_DEFAULT_MATMUL_PRECISION"] == "highest" and "XLA_FLAGS" in kept


def test_a_platform_that_is_not_here_gets_one_line(tmp_path, environment):
    done = go(tmp_path, environment, JAX_PLATFORMS="nonsense")
    assert done.returncode == exits.EXIT_BAD_INPUT and done.stderr.count("\n") == 1
    assert "JAX_PLATFORMS=nonsense: " in done.stderr and "accepted is cpu" in done.stderr


def test_a_home_that_cannot_be_written_gets_one_line(tmp_path, environment):
    given = {name: value for name, value in environment.items() if name != "XDG_CACHE_HOME"}
    done = go(tmp_path, given, HOME="/proc/nobody")
    assert done.returncode == exits.EXIT_BAD_INPUT
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("experiments.run: "))
    assert "data.data_dir=/proc/nobody/.cache/switchmoe: wiki_vital_en cannot be prepared there" in line


def test_the_list_is_of_variables_that_are_gone_before_jax_reads_them(monkeypatch, capsys):
    for name in process.IGNORED:
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(process.warnings, "resetwarnings", lambda: None)
    monkeypatch.setattr(process.warnings, "simplefilter", lambda *_: None)
    monkeypatch.setattr(sys, "stdout", sys.__stdout__)
    process.settle("experiments.x")
    assert not process.IGNORED.keys() & os.environ.keys()
    err = capsys.readouterr().err
    assert all(
        f"experiments.x: {name}=1 is ignored ({why})\n" in err for name, why in process.IGNORED.items()
    )


def test_a_relative_cache_home_is_none(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
    assert sources.cache_directory(DataSettings()) == os.path.expanduser("~/.cache/switchmoe")
