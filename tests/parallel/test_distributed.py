"""Several processes on this machine as one job: its losses, its faults, its checkpoints on other meshes."""

import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent import futures

import jax
import numpy as np
import pytest
from test_run import DECODER_ONLY, losses, wait_for_step

from experiments import run as command
from switchmoe.parallel import distributed
from switchmoe.settings import MeshSettings

SMALL = [
    "--config.model.d_model=16", "--config.model.d_ff=16", "--config.model.d_kv=8", "--config.model.num_heads=2",
    "--config.moe.group_size=8", "--config.moe.jitter=0.01", "--config.model.dropout_rate=0.1",
    "--config.data.batch_size=8", "--config.data.input_length=32", "--config.data.vocab_size=600",
    "--config.data.streams=0", "--config.train.num_steps=24", "--config.train.log_every=1",
    "--config.train.eval_every=24", "--config.train.eval_batches=1", "--config.checkpoint.every=4",
    "--config.checkpoint.keep=9",
]  # fmt: skip
EXPERTS = "--config.mesh.layout=data_expert"
TEXT = ["--config.data.source=text.txt", "--config.data.vocab_size=300"]


class Job:
    """Processes of one job, of eight devices in all."""

    def __init__(self, workdir, environment, count, *arguments, of_one=(), before_one=(), one_in="."):
        """``of_one``: more arguments of the last one, ``before_one``: what starts it, ``one_in``: where."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        devices = f"--xla_force_host_platform_device_count={8 // count}"
        environment = environment | {"XLA_FLAGS": f"{devices} --xla_backend_optimization_level=0"}
        self.processes = [
            subprocess.Popen(
                [
                    *(before_one if index == count - 1 else ()),
                    *(sys.executable, "-m", "experiments.run", f"--workdir={workdir}", *SMALL, *arguments),
                    *(f"--config.mesh.coordinator={address}", f"--config.mesh.processes={count}"),
                    *(f"--config.mesh.process={index}", *(of_one if index == count - 1 else ())),
                ],
                env=environment,
                cwd=workdir.parent / (one_in if index == count - 1 else "."),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(count)
        ]
        # All are listened to from the start: one that nobody hears waits when its pipe is full.
        listening = futures.ThreadPoolExecutor(count)
        self.ends = [listening.submit(process.communicate, timeout=240) for process in self.processes]

    def finish(self, *codes):
        """The standard errors; ``codes``: the exit code of each process."""
        ends = [end.result() for end in self.ends]
        assert tuple(process.returncode for process in self.processes) == codes, ends
        return [err for _, err in ends]


@pytest.fixture(
    scope="module",
    params=["encoder_decoder", pytest.param("decoder_only", marks=pytest.mark.long)],
)
def kind(request):
    """What befalls a job befalls it with both kinds of models."""
    # A head of keys for each of the two shares of the widths.
    options = [*DECODER_ONLY, "--config.model.num_kv_heads=2"] if request.param == "decoder_only" else []
    SMALL.extend(options)
    yield request.param
    del SMALL[len(SMALL) - len(options) :]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, kind):
    """A run of one process, of eight devices, that nothing disturbs."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    assert command.main(["run", f"--workdir={workdir}", *SMALL, EXPERTS]) == 0
    return workdir


def assert_same_losses(workdir, whole):
    found, wanted = losses(workdir), losses(whole)
    assert [(r["step"], r["split"]) for r in found] == [(r["step"], r["split"]) for r in wanted]
    for a, b in zip(found, wanted, strict=True):
        for name in {"cross_entropy", "layer_expert_load", "grad_norm"} & b.keys():
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, err_msg=f"{name} of step {a['step']}")


@pytest.mark.long
def test_a_job_starts_from_another_runs_checkpoint_with_a_part_frozen(tmp_path, whole, user_environment):
    given = [EXPERTS, f"--config.init.checkpoint={whole}|8", "--config.train.trainable=experts|router"]
    assert command.main(["run", f"--workdir={tmp_path / 'alone'}", *SMALL, *given]) == 0
    Job(tmp_path / "job", user_environment, 2, *given).finish(0, 0)
    assert_same_losses(tmp_path / "job", tmp_path / "alone")
    assert losses(tmp_path / "job")[0]["loss"] < losses(whole)[0]["loss"]


@pytest.mark.long
@pytest.mark.faults
def test_a_job_killed_and_stopped_and_moved_ends_like_one_undisturbed_process(
    tmp_path, whole, user_environment, capsys, table
):
    """2 x 4 devices: SIGKILL of a process after step 5, SIGTERM of the other one after step 9, each time the
    same command again. Its checkpoint of step 9 or 10 then goes on in 4 slices of 2 devices and, on another
    layout, in one process. A repeated or skipped document would change the losses.
    """
    workdir = tmp_path / "run"
    job = Job(workdir, user_environment, 2, EXPERTS)
    wait_for_step(job.processes[0], workdir, 6)
    job.processes[1].kill()
    killed = time.monotonic()
    errors = job.finish(command.EXIT_LOST, -signal.SIGKILL)
    ended = time.monotonic() - killed
    assert ended < 30
    assert re.fullmatch(
        r"experiments.run: process 1 of this job was lost, .*; start the same command on every host again.*\n",
        errors[0],
    )

    job = Job(workdir, user_environment, 2, EXPERTS)
    wait_for_step(job.processes[0], workdir, 9)
    job.processes[1].terminate()
    errors = job.finish(command.EXIT_STOPPED, command.EXIT_STOPPED)
    assert all(re.search(r"stopped by SIGTERM after step \d+, saved", error) for error in errors)
    steps = {int(path.name) for path in (workdir / "checkpoints").iterdir()}
    stopped = max(steps)
    assert 9 <= stopped < 24 and steps >= {4, 8}, "saved once, by all together"

    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(workdir, elsewhere)
    slices = "--config.mesh.dcn_data=4"  # a process counts as a slice: experts lie apart within, data across
    Job(workdir, user_environment, 4, EXPERTS, slices).finish(0, 0, 0, 0)
    assert_same_losses(workdir, whole)

    capsys.readouterr()
    assert command.main(["run", f"--workdir={elsewhere}", *SMALL, "--config.mesh.layout=data_model"]) == 0
    assert f"resuming from the checkpoint of step {stopped}" in capsys.readouterr().out
    assert_same_losses(elsewhere, whole)
    table("SIGKILL of one of two processes", f"the other one named it and ended {ended:.0f} s later, exit 5; started again, its losses are those of one undisturbed process", "nothing; at most 4 steps done again (checkpoint.every=4)")  # fmt: skip
    table("SIGTERM to one of two processes", "saved once, both leave, exit 75; goes on with 4 processes, or 1 and another layout", "nothing")  # fmt: skip


@pytest.mark.long
@pytest.mark.faults
@pytest.mark.usefixtures("kind")
def test_a_save_that_fails_on_one_process_ends_the_job(tmp_path, user_environment, table):
    """Whatever checkpoint.on_error: the others wait for it, and are ended. It can write no file over 1 KiB."""
    (tmp_path / "text.txt").write_text(
        "".join(f"document {n} of {n * 7919 % 1000} words\n" for n in range(900))
    )
    limited = ["bash", "-c", 'ulimit -f 1; exec "$@"', "bash"]
    small = ["--config.model.num_layers=1", "--config.moe.num_experts=1", "--config.mesh.fsdp=True"]
    going_on = "--config.checkpoint.on_error=continue"
    job = Job(tmp_path / "run", user_environment, 2, *TEXT, *small, going_on, before_one=limited)
    job.processes[1].wait(240)
    left = time.monotonic()
    errors = job.finish(command.EXIT_LOST, command.EXIT_IO)
    ended = time.monotonic() - left
    assert ended < 30
    assert "process 1 of this job was lost" in errors[0].splitlines()[-1]
    assert "can't be written" not in errors[0]
    assert "Traceback" not in errors[1]
    said = errors[1].splitlines()[-1]
    assert "the checkpoint of step 4 can't be written" in said and "last complete: none" in said
    assert not [path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()]
    table("a save fails on one of two processes", f"at the next save that one says so, exit 4, whatever checkpoint.on_error; the other one ended {ended:.0f} s later, exit 5", "the steps after the last checkpoint")  # fmt: skip


@pytest.mark.long
@pytest.mark.faults
@pytest.mark.usefixtures("kind")
def test_sigterm_while_a_job_compiles(tmp_path, user_environment):
    job = Job(tmp_path / "run", user_environment, 2, EXPERTS)
    while not (tmp_path / "run" / "config.json").exists():
        assert job.processes[0].poll() is None
        time.sleep(0.01)
    job.processes[1].terminate()
    for error in job.finish(command.EXIT_STOPPED, command.EXIT_STOPPED):
        assert "stopped by SIGTERM" in error.splitlines()[-1]


def supervised(environment, directory, module, *arguments):
    code = (
        f"import sys; from experiments import supervisor; sys.exit(supervisor.run({module!r}, {arguments!r}))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment | {"PYTHONUNBUFFERED": "1"},
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_sigterm_before_a_process_has_begun_to_notice_it(tmp_path, user_environment):
    """A server stands for it, which ends by the signal itself."""
    parent = supervised(user_environment, tmp_path, "http.server", "--bind", "localhost", "0")
    assert "Serving" in parent.stdout.readline()
    parent.terminate()
    _, err = parent.communicate(timeout=60)
    assert parent.returncode == command.EXIT_STOPPED
    assert err == "http.server: stopped by SIGTERM before the first step\n"


def test_what_a_failing_process_says_after_its_runtime_is_shown(tmp_path, user_environment):
    noise = "import sys; print('E1125 coordination_service_agent.cc: noise', file=sys.stderr)\n"
    (tmp_path / "failing.py").write_text(noise + "raise RuntimeError('its own reason')")
    parent = supervised(user_environment, tmp_path, "failing")
    _, err = parent.communicate(timeout=60)
    assert parent.returncode == 1 and err.endswith("RuntimeError: its own reason\n")


@pytest.mark.parametrize(
    "mistake, said",
    [
        pytest.param(
            dict(of_one=["--config.moe.z_loss_weight=0.5"]),
            ["process 1 differs: moe.z_loss_weight (0.5 there, 0.0 on process 0)"] * 2,
            marks=pytest.mark.slow,
        ),
        pytest.param(dict(one_in="other"), ["process 1 differs: train ("] * 2, marks=pytest.mark.long),
        pytest.param(
            dict(one_in="none"),
            ["process 1: data.source=text.txt: ", "experiments.run: data.source=text.txt: "],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            dict(of_one=[], source="--config.data.source=*.jsonl"),
            ["experiments.run: data.source=*.jsonl: ", "process 0: data.source=*.jsonl: "],
            marks=pytest.mark.long,
        ),
    ],
    ids=["other settings", "other text", "no text on one", "no text on any"],
)
@pytest.mark.faults
@pytest.mark.usefixtures("kind")
def test_a_mistake_of_one_process_is_refused_by_all_at_start(
    tmp_path, user_environment, mistake, said, table, request
):
    for number, name in enumerate(["none", ".", "other"]):
        (tmp_path / name).mkdir(exist_ok=True)
        lines = (f"{number} document {n} of some {n * 7919 % 1000} words\n" for n in range(900 * number))
        (tmp_path / name / "text.txt").write_text("".join(lines))
    (tmp_path / "none" / "text.txt").unlink()
    job = Job(tmp_path / "run", user_environment, 2, *TEXT, mistake.pop("source", TEXT[0]), **mistake)
    for error, words in zip(job.finish(*[command.EXIT_BAD_INPUT] * 2), said, strict=True):
        assert words in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
    table(
        f"two processes: {request.node.callspec.id}", "refused by both at start and named, exit 2", "nothing"
    )


def test_versions_are_part_of_what_must_agree(monkeypatch):
    there = {"jax": "0.10.2", "flax": "0.12.8", "moe.num_experts": 8}
    monkeypatch.setattr(distributed, "gathered", lambda value: [value, value, there])
    distributed.check_same(there)
    with pytest.raises(
        ValueError, match=r"process 2 differs: jax \(0.10.2 there, 0.12.0 on process 0\); accepted"
    ):
        distributed.check_same(there | {"jax": "0.12.0"})


@pytest.mark.parametrize(
    "mesh, environment, told",
    [
        ({}, {}, None),
        ({}, {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({}, {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "4"}, {}),
        ({}, {"OMPI_COMM_WORLD_SIZE": "2"}, {}),
        ({"coordinator": "none"}, {"OMPI_COMM_WORLD_SIZE": "2"}, None),
        ({"coordinator": "a:1", "processes": 1, "process": 0}, {}, None),
        (
            {"coordinator": "a:1", "processes": 3, "process": 2},
            {"OMPI_COMM_WORLD_SIZE": "2"},
            {"coordinator_address": "a:1", "num_processes": 3, "process_id": 2},
        ),
        (
            {},
            {"JAX_COORDINATOR_ADDRESS": "b:2", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            {"coordinator_address": "b:2", "num_processes": 2, "process_id": 1},
        ),
    ],
)
def test_how_a_process_finds_its_job(mesh, environment, told):
    assert distributed.job(MeshSettings(**mesh), environment | {"JAX_PLATFORMS": "cpu"}) == told


def test_variables_that_do_not_tell_enough():
    with pytest.raises(
        ValueError, match="JAX_COORDINATOR_ADDRESS=b:2: accepted beside it are JAX_NUM_PROCESSES"
    ):
        distributed.job(MeshSettings(), {"JAX_COORDINATOR_ADDRESS": "b:2", "JAX_PROCESS_ID": "1"})


def test_a_launcher_that_jax_cannot_read_gets_one_line(monkeypatch):
    """JAX 0.12 raises RuntimeError without Open MPI 4's variable; others that do not come are not the launcher's fault."""
    failure = RuntimeError("OMPI_MCA_orte_hnp_uri is not set")

    def initialize(**_):
        raise failure

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    with pytest.raises(
        ValueError, match="mesh.coordinator=auto: OMPI_MCA.*; accepted is HOST:PORT of process 0"
    ):
        distributed.initialize(MeshSettings())
    failure = jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
    with pytest.raises(jax.errors.JaxRuntimeError):
        distributed.initialize(MeshSettings())


@pytest.mark.parametrize(
    "mesh, message",
    [
        (dict(processes=2), "mesh.processes=2: accepted is a number with mesh.coordinator=HOST:PORT"),
        (dict(coordinator="host"), "mesh.coordinator=host: accepted is auto, none, or HOST:PORT"),
        (dict(coordinator="host:99999"), "mesh.coordinator=host:99999: accepted is auto, none, or HOST:PORT"),
        (dict(coordinator="host:1"), "mesh.processes=0: accepted is an integer >= 1"),
        (
            dict(coordinator="host:1", processes=2, process=2),
            "mesh.process=2: accepted is an integer from 0 to 1",
        ),
    ],
)
def test_mistakes_about_the_job(mesh, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MeshSettings(**mesh)
