"""The processes of one run, one a host: how they find each other, and what they say to each other.

With one process nothing here does anything. With several, each runs the same program on its own devices
and reads its own rows of a batch; the first (main) one writes logs and reports, for which, and for
checkpoints, all need the same directory.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from switchmoe.settings import MeshSettings

HEARTBEAT_TIMEOUT = 10  # seconds without a sign of life after which a process counts as lost
TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")


def job(settings: MeshSettings, environment: Mapping[str, str]) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` is to be told; None where there is but one process.

    With ``mesh.coordinator=auto`` the environment decides: ``JAX_COORDINATOR_ADDRESS`` with
    ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``; SLURM's or Open MPI's variables, where they tell of more than
    one task; a TPU, whose runtime knows its pod. JAX itself reads the last three.
    """
    if settings.coordinator == "none":
        return None
    if settings.coordinator != "auto":
        return _named(settings.coordinator, settings.processes, settings.process)
    if "JAX_COORDINATOR_ADDRESS" in environment:
        return _named(*_from_variables(environment))
    on_tpu = any(os.path.exists(path) for path in TPU_DEVICES) and environment.get("JAX_PLATFORMS") != "cpu"
    return {} if _tasks(environment) != "1" or on_tpu else None


def _from_variables(environment: Mapping[str, str]) -> tuple[str, int, int]:
    """JAX's three variables, which must be what `MeshSettings` takes: with others JAX fails, or waits in vain."""
    address, names = environment["JAX_COORDINATOR_ADDRESS"], ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    try:
        count, index = (int(environment[name]) for name in names)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"JAX_COORDINATOR_ADDRESS={address}: accepted beside it are {' and '.join(names)}, both integers"
        ) from error
    try:
        MeshSettings(coordinator=address, processes=count, process=index)
    except ValueError as error:
        said = f"JAX_COORDINATOR_ADDRESS={address}, {names[0]}={count}, {names[1]}={index}"
        raise ValueError(f"{said}: as {error}") from error
    return address, count, index


def _tasks(environment: Mapping[str, str]) -> str:
    return environment.get("OMPI_COMM_WORLD_SIZE", environment.get("SLURM_STEP_NUM_TASKS", "1"))


def _named(coordinator: str, count: int, index: int) -> dict[str, Any] | None:
    names = ("coordinator_address", "num_processes", "process_id")
    return dict(zip(names, (coordinator, count, index), strict=True)) if count > 1 else None


def _devices(environment: Mapping[str, str]) -> dict[str, list[int]]:
    """A host's only task has all of its devices; left alone, JAX takes the task's local number for the only one."""
    alone = environment.get("SLURM_STEP_NUM_NODES") == environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in environment:  # before SLURM's, which under mpirun are of its helpers
        alone = environment["OMPI_COMM_WORLD_LOCAL_SIZE"] == "1"
    return {"local_device_ids": []} if alone and "JAX_LOCAL_DEVICE_IDS" not in environment else {}


def initialize(settings: MeshSettings) -> None:
    """Joins the run's other processes; must come before all else that asks JAX for its devices.

    Raises:
      ValueError: the environment tells of several processes, but not where they are.
      jax.errors.JaxRuntimeError: the others did not come within five minutes.
    """
    arguments = job(settings, os.environ)
    if arguments is None:
        return
    try:
        jax.distributed.initialize(
            **arguments, **_devices(os.environ), heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT
        )
    except jax.errors.JaxRuntimeError:
        raise
    except (ValueError, RuntimeError) as error:
        # The latter of variables that JAX can't read, as Open MPI 5's.
        if _tasks(os.environ) != "1":
            raise ValueError(f"mesh.coordinator=auto: {error}; accepted is HOST:PORT of process 0") from error
        if isinstance(error, RuntimeError):
            raise
        # Else a TPU on its own, such as a notebook's, that nothing says is part of a pod.


def is_main() -> bool:
    return jax.process_index() == 0


def gathered(value: Any) -> list[Any]:
    """Every process's ``value``, which is JSON, by process; all must call."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(data)))
    padded = np.pad(data, (0, int(sizes.max()) - len(data)))
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes.ravel(), strict=True)]


def check_same(values: dict[str, Any]) -> None:
    """Refuses a run whose processes do not agree; all must call, and all raise.

    Raises:
      ValueError: names the first process that differs from the main one, and what differs.
    """
    first, *others = gathered(values)
    for index, other in enumerate(others, 1):
        different = [
            f"{name} ({other.get(name, 'none')} there, {first.get(name, 'none')} on process 0)"
            for name in sorted(first.keys() | other.keys())
            if first.get(name) != other.get(name)
        ]
        if different:
            raise ValueError(
                f"process {index} differs: {', '.join(different)}; accepted is the same on every process"
            )


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The others do what is inside when the main process has done it, and may find its result on disk.

    What a user can mend, a ValueError or an OSError, is raised by all where it is raised by one, so that all
    end alike and none of them as if another one had been lost.
    """
    error = None
    if not is_main():
        _agree(None)
    try:
        yield
    except (ValueError, OSError) as raised:
        error = raised
    if is_main():
        _agree(error)
        error = None
    _agree(error)


def _agree(error: Exception | None) -> None:
    """Raises what any process brings; all must call."""
    told = None if error is None else [isinstance(error, OSError), str(error)]
    for index, found in enumerate(gathered(told)):
        if found and index == jax.process_index():
            raise error
        if found:
            raise (OSError if found[0] else ValueError)(f"process {index}: {found[1]}")
