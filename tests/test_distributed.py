"""Several processes on this machine as one job: its losses, its faults, its checkpoints on other meshes."""

import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from test_run import losses, wait_for_step

from experiments import run as command
from switchmoe import distributed
from switchmoe.settings import MeshSettings

SMALL = [
    "--config.model.d_model=16", "--config.model.d_ff=16", "--config.model.d_kv=8", "--config.model.num_heads=2",
    "--config.moe.group_size=8", "--config.moe.jitter=0.01", "--config.model.dropout_rate=0.1",
    "--config.data.batch_size=8", "--config.data.input_length=32", "--config.data.vocab_size=600",
    "--config.data.streams=0", "--config.train.num_steps=14", "--config.train.log_every=1",
    "--config.train.eval_every=14", "--config.train.eval_batches=1", "--config.checkpoint.every=4",
    "--config.checkpoint.keep=9",
]  # fmt: skip
EXPERTS = "--config.mesh.layout=data_expert"


class Job:
    """Processes of one job, of eight devices in all."""

    def __init__(self, workdir, environment, count, *arguments, of_one=()):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        devices = f"--xla_force_host_platform_device_count={8 // count}"
        environment = environment | {"XLA_FLAGS": f"{devices} --xla_backend_optimization_level=0"}
        self.processes = [
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "experiments.run", f"--workdir={workdir}", *SMALL, *arguments),
                    *(f"--config.mesh.coordinator={address}", f"--config.mesh.processes={count}"),
                    *(f"--config.mesh.process={index}", *(of_one if index == count - 1 else ())),
                ],
                env=environment,
                cwd=workdir.parent,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(count)
        ]

    def finish(self, *codes):
        """The standard errors; ``codes``: the exit code of each process."""
        ends = [process.communicate(timeout=240) for process in self.processes]
        assert tuple(process.returncode for process in self.processes) == codes, ends
        return [err for _, err in ends]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
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
def test_a_job_killed_and_stopped_and_moved_ends_like_one_undisturbed_process(
    tmp_path, whole, user_environment, capsys
):
    """2 x 4 devices: SIGKILL of a process after step 5, SIGTERM of the other one after step 9, each time the
    same command again. Its checkpoint of step 9 or 10 then goes on in 4 x 2 devices and, on another layout,
    in one process. A repeated or skipped document would change the losses.
    """
    workdir = tmp_path / "run"
    job = Job(workdir, user_environment, 2, EXPERTS)
    wait_for_step(job.processes[0], workdir, 6)
    job.processes[1].kill()
    killed = time.monotonic()
    errors = job.finish(command.EXIT_LOST, -signal.SIGKILL)
    assert time.monotonic() - killed < 30
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
    assert 9 <= stopped < 14 and steps >= {4, 8}, "saved once, by all together"

    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(workdir, elsewhere)
    Job(workdir, user_environment, 4, EXPERTS).finish(0, 0, 0, 0)
    assert_same_losses(workdir, whole)

    capsys.readouterr()
    assert command.main(["run", f"--workdir={elsewhere}", *SMALL, "--config.mesh.layout=data_model"]) == 0
    assert f"resuming from the checkpoint of step {stopped}" in capsys.readouterr().out
    assert_same_losses(elsewhere, whole)


@pytest.mark.slow
def test_a_process_that_differs_is_refused_at_start(tmp_path, user_environment):
    job = Job(tmp_path / "run", user_environment, 2, of_one=["--config.moe.z_loss_weight=0.5"])
    for error in job.finish(command.EXIT_BAD_INPUT, command.EXIT_BAD_INPUT):
        assert "process 1 differs: moe.z_loss_weight (0.5 there, 0.0 on process 0)" in error
        assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


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
