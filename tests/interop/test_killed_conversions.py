"""A conversion that is killed goes on with the same command, and its memory is a few tensors."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from test_convert import SWITCH, T5, make, run

from experiments import convert as command
from experiments import exits
from experiments.bench.offload import Group
from switchmoe.interop import sources

SLOW = """
import os, signal, sys
from experiments import convert
from switchmoe.interop import run_files, shards
done = [0]
for writer in (run_files.Writer, shards.Writer):
    def write(self, *arguments, write=writer.write):
        write(self, *arguments)
        done[0] += 1
        if done[0] == 20:
            os.kill(os.getpid(), signal.SIGKILL)
    writer.write = write
sys.exit(convert.main(sys.argv))
"""


def test_a_killed_upcycling_goes_on_with_the_same_command(tmp_path, environment, capsys):
    """A run's, part by part: what was done is kept, and the result is that of a command that was never killed."""
    make(tmp_path / "theirs", T5)
    assert run(f"--source={tmp_path / 'theirs'}", f"--target={tmp_path / 'run'}") == 0
    asked = [f"--source={tmp_path / 'run'}", "--upcycle.experts=2", "--upcycle.noise=0.1"]
    again = [*asked, f"--target={tmp_path / 'sparse'}"]
    killed = subprocess.run(
        [sys.executable, "-c", SLOW, *again], env=environment, capture_output=True, timeout=120
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "sparse").exists()
    assert command.main(["convert", *again, "--upcycle.experts=3"]) == exits.EXIT_BAD_INPUT
    assert "another conversion is half done" in capsys.readouterr().err
    assert command.main(["convert", *again]) == 0
    assert "were there" in capsys.readouterr().out
    assert command.main(["convert", *asked, f"--target={tmp_path / 'never'}"]) == 0
    manifests = [tmp_path / name / "checkpoints" / "0" / "files.json" for name in ("sparse", "never")]
    assert json.loads(manifests[0].read_text()) == json.loads(manifests[1].read_text())


@pytest.mark.parametrize("way", ["in", "out"])
def test_a_killed_conversion_goes_on_with_the_same_command(tmp_path, way, environment, capsys):
    """What was done is kept and not done again; another conversion to the same place is refused."""
    there = make(tmp_path / "theirs", SWITCH)
    if way == "out":
        assert run(f"--source={tmp_path / 'theirs'}", f"--target={tmp_path / 'run'}") == 0
    source, target = ("theirs", "run") if way == "in" else ("run", "back")
    asked = [f"--source={tmp_path / source}", f"--target={tmp_path / target}", "--check=False"]
    killed = subprocess.run(
        [sys.executable, "-c", SLOW, *asked], env=environment, capture_output=True, timeout=120
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / target).exists()
    assert run(*asked[:2], "--dtype=bfloat16") == exits.EXIT_BAD_INPUT
    assert "another conversion is half done" in capsys.readouterr().err
    assert run(*asked[:2]) == 0
    assert "were there" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    if way == "in":
        assert run(f"--source={tmp_path / 'run'}", f"--target={tmp_path / 'back'}") == 0
    for name, tensor in sources.hugging_face(tmp_path / "back").tensors.items():
        np.testing.assert_array_equal(tensor.read((), slice(None)), there[name])


MEASURED = """
import resource, sys
import jax, orbax.checkpoint, tensorstore  # what they take is not the conversion's
from experiments import convert
from switchmoe.interop import check, convert as library
jax.devices()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
code = convert.main(sys.argv)
print("grown", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
sys.exit(code)
"""


@pytest.mark.slow
def test_memory_is_a_few_tensors_whatever_the_models_size(tmp_path, environment):
    """400 MB there and back, or the megabytes that CONVERT_MB says: the process grows by less than 100 MB, or by twelve of the largest
    tensors. With CONVERT_LIMIT_MB it is in a memory cgroup of so many (that takes root), is killed once, and goes on."""
    limit, group, enters = int(os.environ.get("CONVERT_LIMIT_MB", 0)) * 10**6, None, None
    if limit:
        group = Group.made(limit)
        procs = group.path / "cgroup.procs"
        enters = lambda: procs.write_text(str(os.getpid()))  # noqa: E731
    size = int(os.environ.get("CONVERT_MB", 400))
    config = SWITCH | {"d_model": 256, "d_ff": 4096, "num_decoder_layers": 4}
    config |= {"d_model": 1024, "d_ff": 4096} if size > 2000 else {}
    expert = 2 * 4 * config["d_model"] * config["d_ff"] / 1e6
    config["num_experts"] = round(
        (size / expert - 4) / 4
    )  # in each of four sparse blocks, beside four dense ones
    make(tmp_path / "theirs", config, limit=10**9, keep=False)
    assert sum(file.stat().st_size for file in (tmp_path / "theirs").iterdir()) > 0.95e6 * size
    allowed = max(100, 12 * 4 * config["d_model"] * config["d_ff"] / 2**20)
    for source, target in (("theirs", "run"), ("run", "back")):
        asked = [f"--source={tmp_path / source}", f"--target={tmp_path / target}", "--check=False"]
        how = dict(env=environment, capture_output=True, text=True, timeout=300, preexec_fn=enters)
        if group:
            group.begin()
            killed = subprocess.run([sys.executable, "-c", SLOW, *asked], **how)
            assert killed.returncode == -signal.SIGKILL and not (tmp_path / target).exists(), killed.stderr
        done = subprocess.run([sys.executable, "-c", MEASURED, *asked], **how)
        assert done.returncode == 0, done.stderr
        print(done.stdout)
        if group:
            assert "were there" in done.stdout
            print(f"peak {group.peak():,} bytes of memory and page cache, limit {limit:,}")
            assert 0 < group.peak() <= limit
        assert int(done.stdout.split("grown ")[1]) < allowed * 1024  # ru_maxrss is in KiB on Linux


def test_another_runs_files_under_the_same_name_are_not_gone_on_with(tmp_path, environment, capsys):
    """A conversion out that was killed, and the run made anew meanwhile."""
    for name, seed in (("one", 0), ("two", 1)):
        make(tmp_path / name, SWITCH, seed=seed)
    assert run(f"--source={tmp_path / 'one'}", f"--target={tmp_path / 'run'}") == 0
    asked = [f"--source={tmp_path / 'run'}", f"--target={tmp_path / 'back'}", "--check=False"]
    subprocess.run([sys.executable, "-c", SLOW, *asked], env=environment, capture_output=True, timeout=120)
    shutil.rmtree(tmp_path / "run")
    assert run(f"--source={tmp_path / 'two'}", f"--target={tmp_path / 'run'}") == 0
    assert run(*asked[:2]) == exits.EXIT_BAD_INPUT
    assert "another conversion is half done" in capsys.readouterr().err
