"""What starts a job's processes tells them by variables: mistakes there get one line, and processes find each other."""

import os
import re
import subprocess
import sys

import pytest

from switchmoe.parallel import distributed
from switchmoe.settings import MeshSettings


@pytest.mark.parametrize(
    "address, count, index, message",
    [
        ("localhost", 2, 0, "mesh.coordinator=localhost: accepted is auto, none, or HOST:PORT"),
        ("localhost:99999", 2, 0, "mesh.coordinator=localhost:99999: accepted is auto, none, or HOST:PORT"),
        ("localhost:8482", 2, 5, "mesh.process=5: accepted is an integer from 0 to 1"),
        ("localhost:8482", -1, 0, "mesh.processes=-1: accepted is an integer >= 1"),
    ],
)
def test_jaxs_variables_are_checked_as_the_settings_are(address, count, index, message):
    variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": count, "JAX_PROCESS_ID": index}
    with pytest.raises(ValueError, match=f"JAX_COORDINATOR_ADDRESS={address}, .* {re.escape(message)}"):
        distributed.job(MeshSettings(), {name: str(value) for name, value in variables.items()})


def test_mpirun_within_a_step_of_slurm_tells_of_more_than_the_step_does():
    variables = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1", "OMPI_COMM_WORLD_SIZE": "8"}
    assert distributed.job(MeshSettings(), variables | {"JAX_PLATFORMS": "cpu"}) == {}


JOIN = """
import jax
from switchmoe.parallel import distributed
from switchmoe.settings import MeshSettings
distributed.initialize(MeshSettings())
visible = jax.config.values["jax_cuda_visible_devices"]
print(jax.process_index(), jax.process_count(), jax.device_count(), visible)
"""


def slurm(index, nodes):
    return {
        "SLURM_JOB_ID": str(os.getpid()),  # the port follows from it
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index % (2 // nodes)),
    }


def open_mpi(index, nodes):
    return {
        "OMPI_MCA_orte_hnp_uri": f"{os.getpid() * 2**12}.0;tcp://127.0.0.1:1",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(2 // nodes),
        "OMPI_COMM_WORLD_RANK": str(index),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(index % (2 // nodes)),
    }


@pytest.mark.parametrize("nodes, gpus", [(2, ["all", "all"]), (1, ["0", "1"])], ids=["node", "GPU"])
@pytest.mark.parametrize("variables", [slurm, open_mpi])
def test_processes_find_each_other_and_their_devices(environment, variables, nodes, gpus):
    """As the variables tell: one process a node has all its GPUs, one of several has that of its number."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN],
            env=environment | variables(index, nodes),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    ends = [process.communicate(timeout=60) for process in processes]
    assert [out.split() for out, _ in ends] == [[str(i), "2", "2", gpus[i]] for i in range(2)], ends
