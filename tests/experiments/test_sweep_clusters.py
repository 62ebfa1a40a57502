"""Sweeps on a Ray cluster of two nodes, one of which is killed, and through submitit: as on this machine, bitwise."""

import importlib.util
import json
import os
import signal
import socket
import sys
import time

import pytest
import test_sweep
from test_sweep import computed, start, wait_for

from experiments.exits import EXIT_STOPPED
from experiments.launchers.node import NODE_FILE
from experiments.sweep import __main__ as sweep

config = test_sweep.config  # a fixture
SEEDS = "[{'train.seed': [0, 1, 2]}]"
NEEDS_RAY = "needs Ray: pip install '.[ray]'"
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def cluster(environment):
    """Two nodes of one CPU each, as processes on this machine, in the environment of a user's command."""
    pytest.importorskip("ray", reason=NEEDS_RAY)
    from ray.cluster_utils import Cluster

    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment | {"RAY_USAGE_STATS_ENABLED": "0"})
    try:
        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        found.add_node(num_cpus=1)
    finally:
        os.environ.clear()
        os.environ.update(before)
    yield found
    found.shutdown()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, environment):
    """What each run's metrics are in the sweep that was run on this machine, undisturbed."""
    directory = tmp_path_factory.mktemp("whole")
    path = directory / "study.py"
    path.write_text(test_sweep.BASE.replace("{products}", SEEDS))
    process = start([f"--config={path}", f"--workdir={directory / 'out'}"], environment, directory)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "3 of 3 runs done" in out, (out, err)
    return {name: computed(directory / "out" / name / "metrics.jsonl") for name in names()}


def needs_submitit():
    """Without importing it: its log would keep the stream that pytest captures, and outlive it."""
    if importlib.util.find_spec("submitit") is None:
        pytest.skip("needs submitit: pip install '.[slurm]'")


def names():
    return [f"seed={n}" for n in range(3)]


def logs(directory, name):
    return (directory / name / "log.txt").read_text()


def reached(path, text):
    return path.exists() and text in path.read_text()


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def parents(pid):
    """The process's ancestors."""
    while pid > 1:
        with open(f"/proc/{pid}/stat") as file:
            pid = int(file.read().rpartition(")")[2].split()[1])
        yield pid


def test_a_sweep_on_ray_outlives_a_node_and_equals_a_local_one(config, tmp_path, environment, cluster, whole):
    arguments = [*config(SEEDS), "--launcher=ray", f"--address={cluster.address}"]
    out = tmp_path / "out"
    process = start(arguments, environment, tmp_path)
    (node,) = cluster.worker_nodes
    raylet = node.all_processes["raylet"][0].process.pid
    deadline = time.monotonic() + 120
    while True:  # until a run on that node is past its first checkpoint
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        nodes = {path.parent.name: json.loads(path.read_text()) for path in out.glob(f"*/{NODE_FILE}")}
        lost = [name for name, where in nodes.items() if raylet in parents(where["parent"])]
        if lost and reached(out / lost[0] / "metrics.jsonl", '"step": 10,'):
            break
        time.sleep(0.01)
    cluster.remove_node(node, allow_graceful=False)
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 0 and "3 of 3 runs done" in stdout, (stdout, stderr)
    assert f"{lost[0]}  started again (1 of 2) after exit 5: experiments.sweep: lost: " in stdout
    assert not alive(nodes[lost[0]]["pid"]), "a run ends with the worker that started it"
    resumed = [logs(out, name).count("resuming from the checkpoint of step") for name in names()]
    assert resumed == [int(name in lost) for name in names()]
    assert {name: computed(out / name / "metrics.jsonl") for name in names()} == whole


def test_a_sweep_on_ray_is_stopped_with_all_states_saved(config, tmp_path, environment, cluster, whole):
    """On what is left of the cluster one run is under way and two wait; the run goes on where it was."""
    arguments = [*config(SEEDS), "--launcher=ray", f"--address={cluster.address}"]
    process = start(arguments, environment, tmp_path)
    wait_for(process, tmp_path / "out" / "seed=0" / "metrics.jsonl", '"step": 5,')
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == EXIT_STOPPED and "the same command continues" in stderr, (stdout, stderr)
    assert "stopped by SIGTERM after step" in logs(tmp_path / "out", "seed=0")
    assert "seed=2  queued" in stdout and not (tmp_path / "out" / "seed=2" / "config.json").exists()
    missing = start([*arguments, "--resources=CPU=1,GPU=1"], environment, tmp_path)
    wait_for_text(missing.stderr, "no node has CPU=1,GPU=1 now; runs wait for one")
    missing.send_signal(signal.SIGINT)
    assert missing.wait(120) == 130
    process = start(arguments, environment, tmp_path)
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, (stdout, stderr)
    assert {name: computed(tmp_path / "out" / name / "metrics.jsonl") for name in names()} == whole


def wait_for_text(stream, text):
    line = stream.readline()
    assert text in line, line


@pytest.mark.parametrize(
    "address", ["auto", "there", "127.0.0.1:99999", "127.0.0.1:{closed}", "ray://127.0.0.1:{closed}"]
)
def test_an_address_without_a_cluster_gets_one_line(config, capsys, monkeypatch, address):
    pytest.importorskip("ray", reason=NEEDS_RAY)
    monkeypatch.setenv("RAY_TMPDIR", "/nonexistent")  # where `auto` would find a cluster of this machine
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = address.format(closed=unused.getsockname()[1])
        began = time.monotonic()
        assert sweep.main(["sweep", *config(), "--launcher=ray", f"--address={address}"]) == 2
    err = capsys.readouterr().err
    assert f"--address={address}: accepted are auto, local, HOST:PORT" in err and err.count("\n") == 1, err
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--address=there"], "--address=there: accepted with --launcher=slurm are auto and local"),
        ([], "--launcher=slurm: no sbatch on PATH"),
        (["--address=local", "--slurm.partitoin=gpu"], "--slurm.partitoin=gpu: accepted are account, "),
        (["--address=local", "--slurm.nodes=2"], "--slurm.nodes=2: accepted are account, "),
        (["--address=local", "--slurm.time=1:00"], "--slurm.time=1:00: accepted is a whole number of minutes"),
        (["--address=local", "--resources=TPU=4"], "--resources=TPU=4: accepted with --launcher=slurm are"),
    ],
)  # fmt: skip
def test_what_slurm_does_not_take_gets_one_line(config, tmp_path, environment, arguments, message):
    needs_submitit()
    process = start([*config(), "--launcher=slurm", *arguments], environment, tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert message in err and err.count("\n") == 1, err


def test_a_sweep_through_submitit_is_queued_again_and_equals_a_local_one(
    config, tmp_path, environment, whole
):
    """The signal that SLURM sends before a time limit: the run saves its state, and continues from there."""
    needs_submitit()
    out = tmp_path / "out"
    arguments = [*config(SEEDS), "--launcher=slurm", "--address=local"]
    process = start(arguments, environment, tmp_path)
    wait_for(process, out / "seed=1" / "metrics.jsonl", '"step": 6,')
    os.kill(json.loads((out / "seed=1" / NODE_FILE).read_text())["parent"], signal.SIGUSR2)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0 and "3 of 3 runs done" in stdout, (stdout, stderr)
    assert "stopped by SIGTERM after step" in logs(out, "seed=1")
    resumed = [logs(out, name).count("resuming from the checkpoint of step") for name in names()]
    assert resumed == [0, 1, 0] and "started again" not in stdout
    assert {name: computed(out / name / "metrics.jsonl") for name in names()} == whole


def test_a_sweep_through_submitit_is_stopped_with_all_states_saved(config, tmp_path, environment):
    needs_submitit()
    process = start(
        [*config("[{'train.seed': [0]}]"), "--launcher=slurm", "--address=local"], environment, tmp_path
    )
    wait_for(process, tmp_path / "out" / "seed=0" / "metrics.jsonl", '"step": 6,')
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == EXIT_STOPPED and "the same command continues" in stderr, (stdout, stderr)
    assert "stopped by SIGTERM after step" in logs(tmp_path / "out", "seed=0")


# sbatch, srun, sacct, scancel and scontrol: one job at a time, in the order in which they came.
STAND_IN = """#!{python}
import os, pathlib, signal, subprocess, sys, time

room, command, arguments = pathlib.Path("{room}"), pathlib.Path(sys.argv[0]).name, sys.argv[1:]


def states():
    return {{int(path.stem): path.read_text() for path in room.glob("*.state")}}


def become(job, state):
    path = room / f"{{job}}.new"
    path.write_text(state)
    path.rename(room / f"{{job}}.state")


if command == "sbatch":
    job = len(states()) + 1
    become(job, "PENDING")
    attend = [sys.executable, str(room / "attend"), str(job), arguments[-1]]
    with open(room / f"{{job}}.out", "a") as out:
        subprocess.Popen(attend, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    print("Submitted batch job", job)
elif command == "attend":
    job = int(arguments[0])
    while states()[job] in ("PENDING", "REQUEUED"):
        if any(state == "RUNNING" or other < job and state == "PENDING" for other, state in states().items()):
            time.sleep(0.1)
            continue
        become(job, "RUNNING")
        code = subprocess.call(["bash", arguments[1]], env=os.environ | {{"SLURM_JOB_ID": str(job)}})
        if states()[job] == "RUNNING":
            become(job, "FAILED" if code else "COMPLETED")
elif command == "srun":
    first = next(n for n, argument in enumerate(arguments) if "python" in pathlib.Path(argument).name)
    os.execv(arguments[first], arguments[first:])
elif command == "sacct":
    print("JobID|State|NodeList")
    for job in arguments:
        if job.isdecimal() and int(job) in states():
            print(f"{{job}}|{{states()[int(job)]}}|here")
elif command == "scontrol":
    become(arguments[-1], "REQUEUED")
elif command == "scancel":
    become(arguments[-1], "CANCELLED by 0")
"""


@pytest.fixture
def slurm(tmp_path, environment):
    """(environment with a SLURM that is stood in for, the function that says what states its jobs are in)."""
    room = tmp_path / "slurm"
    room.mkdir()
    for name in ("sbatch", "attend", "srun", "sacct", "scancel", "scontrol"):
        (room / name).write_text(STAND_IN.format(python=sys.executable, room=room))
        (room / name).chmod(0o755)
    path = f"{room}{os.pathsep}{environment['PATH']}"
    return environment | {"PATH": path}, lambda: [
        (room / f"{n + 1}.state").read_text() for n in range(len(list(room.glob("*.state"))))
    ]


def test_a_killed_sweep_finds_its_slurm_jobs_which_are_queued_again_at_a_time_limit(
    config, tmp_path, slurm, whole
):
    needs_submitit()
    environment, states = slurm
    arguments, out = [*config(SEEDS), "--launcher=slurm"], tmp_path / "out"
    process = start(arguments, environment, tmp_path)
    wait_for(process, out / "seed=0" / "metrics.jsonl", '"step": 2,')
    process.kill()
    process.communicate()
    process = start(arguments, environment, tmp_path)
    wait_for(process, out / "seed=1" / "metrics.jsonl", '"step": 6,')
    os.kill(json.loads((out / "seed=1" / NODE_FILE).read_text())["parent"], signal.SIGUSR2)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0 and "3 of 3 runs done" in stdout, (stdout, stderr)
    assert states() == ["COMPLETED"] * 3, "no run was submitted twice"
    resumed = [logs(out, name).count("resuming from the checkpoint of step") for name in names()]
    assert resumed == [0, 1, 0] and "started again" not in stdout
    assert {name: computed(out / name / "metrics.jsonl") for name in names()} == whole


def test_a_stopped_sweep_takes_its_slurm_jobs_back(config, tmp_path, slurm):
    needs_submitit()
    environment, states = slurm
    process = start([*config(SEEDS), "--launcher=slurm", "--slurm.partition=cpu"], environment, tmp_path)
    wait_for(process, tmp_path / "out" / "seed=0" / "metrics.jsonl", '"step": 6,')
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == EXIT_STOPPED and "the same command continues" in stderr, (stdout, stderr)
    assert "stopped by SIGTERM after step" in logs(tmp_path / "out", "seed=0")
    assert states()[1:] == ["CANCELLED by 0"] * 2 and "seed=2  queued" in stdout
    (script,) = {
        path.read_text()
        for path in (tmp_path / "out" / "slurm").glob("*.sh")
        if "partition" in path.read_text()
    }
    assert "--partition=cpu" in script and "--time=60" in script
