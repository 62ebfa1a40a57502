"""What starts a job's processes tells them by variables: mistakes there get one line, and processes find each other."""

import re

import pytest

from switchmoe import distributed
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
