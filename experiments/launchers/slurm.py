"""A sweep's runs as SLURM jobs, through submitit: ``--launcher=slurm --slurm.partition=gpu --slurm.time=240``

``--resources`` are those of one run: CPU (cpus_per_task), GPU (gpus_per_node), memory (GiB, mem_gb).
``--slurm.NAME=VALUE`` are submitit's other parameters of sbatch: time (minutes, 60 unless given), partition, account, qos, gres,
constraint, ... ``--address=local`` starts them as processes on this machine instead, for a try.

At its time limit or when preempted a run saves its state, and its job is queued again.
"""

import json
import shutil
import sys
import time
from pathlib import Path

import submitit

from experiments.exits import EXIT_FAILED, EXIT_LOST, EXIT_STOPPED
from experiments.launchers.node import Work, ask, began, look_again, note, prepare
from experiments.launchers.order import Options, Order
from switchmoe.runs.checkpoints import write_json

RESOURCES = {"CPU": "cpus_per_task", "GPU": "gpus_per_node", "memory": "mem_gb"}
# What would make several processes of a run, has another place, or is no single value.
NOT_TAKEN = {"nodes", "ntasks_per_node", "cpus_per_task", "gpus_per_node", "mem", "map_count", "array_parallelism"} | {
    "additional_parameters", "setup", "srun_args", "job_name"
}  # fmt: skip
REQUEUES = 50  # at time limits
FOLDER = "slurm"  # of the sweep's directory: scripts and logs of the jobs
JOB_FILE = "slurm.json"  # of a run's directory: the job that it was given


class Slurm:
    """Raises ValueError where there is no SLURM, or a parameter is not submitit's."""

    here, at_once = False, sys.maxsize

    def __init__(self, options: Options, workdir: Path):
        self.retries = options.retries
        cluster = {"auto": "slurm", "local": "local"}.get(options.address)
        if cluster is None:
            raise ValueError(
                f"--address={options.address}: accepted with --launcher=slurm are auto and local"
            )
        if cluster == "slurm" and not shutil.which("sbatch"):
            raise ValueError("--launcher=slurm: no sbatch on PATH; accepted is a node that submits jobs")
        parameters = _parameters(options)
        folder = workdir.absolute() / FOLDER
        self._cluster = cluster
        self._executor = submitit.AutoExecutor(folder, cluster=cluster, slurm_max_num_timeout=REQUEUES)
        self._executor.update_parameters(**parameters)

    def start(self, order: Order) -> "_Job":
        """Submits a job, or finds the one that a sweep which was killed submitted."""
        path = order.directory / JOB_FILE
        if self._cluster == "slurm" and path.exists():
            job = submitit.SlurmJob(
                self._executor.folder, json.loads(path.read_text(encoding="utf-8"))["job"]
            )
            if not job.done(force_check=True):
                return _Job(order, job)
        prepare(order)
        try:
            job = self._executor.submit(_Work(order))
        except submitit.core.utils.FailedJobError as error:
            lines = [line for line in str(error).splitlines() if "sbatch: " in line]
            raise ValueError(f"sbatch refused a job: {lines[-1] if lines else error}") from None
        write_json(path, {"job": job.job_id})
        return _Job(order, job)

    def close(self) -> None:
        """Nothing is left open."""


def _parameters(options: Options) -> dict:
    allowed = submitit.SlurmExecutor._valid_parameters() - NOT_TAKEN
    for name, value in options.slurm.items():
        if name not in allowed:
            raise ValueError(f"--slurm.{name}={value}: accepted are {', '.join(sorted(allowed))}")
        if name == "time" and not isinstance(value, int):
            raise ValueError(f"--slurm.time={value}: accepted is a whole number of minutes")
    for name, amount in options.resources.items():
        if name not in RESOURCES or amount != int(amount):
            raise ValueError(
                f"--resources={name}={amount:g}: accepted with --launcher=slurm are whole CPU, GPU and memory (GiB);"
                " what else sbatch takes is --slurm.NAME=VALUE"
            )
    asked = {RESOURCES[name]: int(amount) for name, amount in options.resources.items()}
    asked |= {"timeout_min" if name == "time" else f"slurm_{name}": v for name, v in options.slurm.items()}
    return {"name": "switchmoe", "timeout_min": 60} | asked


class _Work(Work):
    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Called by submitit in its signal handler, before it has the job queued again."""
        self.end()
        return submitit.helpers.DelayedSubmission(_Work(self.order))


class _Job:
    def __init__(self, order: Order, job: submitit.Job):
        self._order, self._job, self._stopped = order, job, False

    @property
    def queued(self) -> bool:
        return not began(self._order)

    def wait(self, seconds: float) -> int | None:
        if self._stopped and self.queued:
            self._job.cancel(check=False)
        if not self._job.done():
            time.sleep(seconds)
            return None
        try:
            code = self._job.result()
        except submitit.core.utils.FailedJobError as error:
            return self._failed(str(error))
        except submitit.core.utils.UncompletedJobError:
            if self._stopped:
                return EXIT_STOPPED
            if self._job.state.startswith("CANCELLED"):
                return self._failed(f"its SLURM job {self._job.job_id} was cancelled")
            note(self._order, f"lost: SLURM job {self._job.job_id} ended in state {self._job.state}")
            return EXIT_LOST
        look_again(self._order)
        return code

    def _failed(self, text: str) -> int:
        lines = [line for line in text.splitlines() if "Error: " in line]
        note(self._order, lines[-1] if lines else text.splitlines()[0])
        return EXIT_FAILED

    def stop(self, number: int) -> None:
        self._stopped = True
        ask(self._order, number)
