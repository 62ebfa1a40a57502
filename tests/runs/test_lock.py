"""Two processes in one run's directory: a lock is named, dies with its process, and is taken before anything is touched."""

import os
import signal
import subprocess
import sys

import pytest
import test_resuming
from test_resuming import ROOT, arguments, go_on

from experiments import exits
from switchmoe.runs import lock
from switchmoe.runs.reporting import read_metrics
from switchmoe.settings import from_config, to_dict

old_run = test_resuming.old_run  # a fixture


def test_a_lock_is_held_named_and_let_go_of(tmp_path):
    first, second = lock.Lock(tmp_path), lock.Lock(tmp_path)
    first.take()
    first.take()
    with pytest.raises(
        lock.InUse, match=f"process {os.getpid()} on .*; accepted is another directory"
    ) as error:
        second.take()
    assert "\n" not in str(error.value)
    first.close()
    second.take()
    second.close()


def test_a_lock_dies_with_its_process(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from switchmoe.runs.lock import Lock\n"
        "lock = Lock(Path(sys.argv[1])); lock.take(); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(lock.InUse, match=f"process {holder.pid} on "):
        lock.Lock(tmp_path).take()
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    lock.Lock(tmp_path).take()


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch):
    def unable(*_):
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", unable)
    told = []
    lock.Lock(tmp_path, told.append).take()
    assert (
        len(told) == 1 and "can't be locked (No locks available): do not start a second one there" in told[0]
    )


@pytest.mark.usefixtures("one_device")
def test_a_second_run_is_refused_before_it_touches_anything(old_run, capsys):
    workdir, config, _ = old_run
    under_way = workdir / "checkpoints" / "8.orbax-checkpoint-tmp"
    under_way.mkdir()
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    holder = lock.Lock(workdir)
    holder.take()
    code, captured = go_on(workdir, config, capsys)
    assert code == exits.EXIT_BAD_INPUT and captured.err.count("\n") == 1
    assert (
        f"experiments.run: --workdir={workdir}: a run is under way there (process {os.getpid()} on"
        in captured.err
    )
    holder.close()
    after = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    del after[workdir / lock.LOCK_FILE]
    assert after == before and under_way.is_dir()


@pytest.mark.slow
def test_two_runs_that_start_at_once(tmp_path, environment):
    """Of two commands on a new directory one trains to its end, the other is refused, whoever is first."""
    config = to_dict(
        from_config(
            {
                "model": dict(d_model=16, d_ff=16, d_kv=8, num_heads=2, num_layers=1, dtype="float32"),
                "moe": dict(num_experts=2, every=1),
                "data": dict(batch_size=4, input_length=16, vocab_size=400),
                "train": dict(num_steps=300, log_every=50, eval_every=150, eval_batches=1),
                "checkpoint": dict(every=20),
            }
        )
    )
    line = [sys.executable, "-m", "experiments.run", f"--workdir={tmp_path / 'run'}", *arguments(config)]
    both = [
        subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ends = sorted((process.wait(300), process.communicate()[1]) for process in both)
    assert [code for code, _ in ends] == [0, exits.EXIT_BAD_INPUT], ends
    assert "a run is under way there (process" in ends[1][1]
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 300
    again = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
