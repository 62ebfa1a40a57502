"""The scripts that start jobs on several hosts: what they call, and how they answer the program's exit codes.

The services themselves are stood in for by small programs on PATH that note how they were called.
"""

import fcntl
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import yaml

from experiments import command_line

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
SHELL = sorted(path for path in SCRIPTS.iterdir() if path.read_text().startswith("#!"))
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "several_hosts.md")

# From the reference of `gcloud compute tpus`; --project, --quiet and --format go with every command.
GCLOUD = {
    "queued-resources create": {"--node-id", "--accelerator-type", "--runtime-version", "--zone"},
    "queued-resources describe": {"--zone"},
    "queued-resources delete": {"--zone", "--force", "--async"},
    "tpu-vm ssh": {"--zone", "--worker", "--command"},
}
GCLOUD_WIDE = {"--project", "--quiet", "--format"}
# From the manual of sbatch: those of its options that say what a job of this kind needs.
SBATCH = (
    "job-name nodes ntasks-per-node gpus-per-node cpus-per-task time output open-mode requeue signal".split()
)

NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}


def closed(required, **properties):
    return {
        "type": "object",
        "required": required.split(),
        "properties": properties,
        "additionalProperties": False,
    }


# Of JobSet's v1alpha2 custom resource: the fields used here. The Jobs inside are Kubernetes' own.
RULE = closed(
    "name action",
    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
    action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
    onJobFailureReasons={
        "type": "array",
        "items": {"enum": ["BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy"]},
    },
)
JOBSET = closed(
    "apiVersion kind metadata spec",
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=closed("name", name=NAME),
    spec=closed(
        "replicatedJobs",
        network=closed("", enableDNSHostnames={"type": "boolean"}, subdomain=NAME),
        failurePolicy=closed(
            "",
            maxRestarts={"type": "integer", "minimum": 0},
            restartStrategy={"enum": ["Recreate", "BlockingRecreate"]},
            rules={"type": "array", "items": RULE},
        ),
        replicatedJobs={
            "type": "array",
            "items": closed(
                "name template",
                name=NAME,
                replicas={"type": "integer", "minimum": 0},
                template=closed("spec", spec={"type": "object", "required": ["template"]}),
            ),
        },
    ),
)


def parse(arguments):
    return command_line.parse(["run", *arguments], "configs/quickstart.py", "", buckets=True)


def runs(text):
    """The arguments of each command in a text that starts a run; comment signs and line ends are taken out."""
    for line in re.sub(r"\\\n\s*#?", " ", text).splitlines():
        found = re.search(r"(?:-m experiments\.run|scripts/\S+) (--(?:config|workdir)[^`]*)", line)
        if found:
            yield shlex.split(found[1], comments=True)


class Stubs:
    """Programs that note their arguments and then do what a line of shell says."""

    def __init__(self, directory):
        self.bin = directory / "stubs"
        self.bin.mkdir()
        self.log = directory / "calls"
        self.environment = {"PATH": f"{self.bin}:/usr/bin:/bin", "HOME": str(directory), "LOG": str(self.log)}

    def add(self, name, body=":", path=None):
        path = path or self.bin / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # One write a record: some of them run at the same time.
        note = rf"""record=$(printf '%s\037' {name} "$@"); printf '%s\036' "$record" >>"$LOG" """
        path.write_text(f"#!/bin/bash\n{note}\n{body}\n")
        path.chmod(0o755)

    def codes(self, name, codes, path=None):
        """A program that ends with these codes, one after the other."""
        state = self.bin.parent / f"{name}.codes"
        state.write_text("".join(f"{code}\n" for code in codes))
        self.add(name, f'code=$(head -n 1 "{state}"); sed -i 1d "{state}"; exit "$code"', path)

    def calls(self, name=None):
        records = self.log.read_text().split("\036")[:-1] if self.log.exists() else []
        records = [record.split("\037")[:-1] for record in records]
        return [record[1:] if name else record for record in records if name in (None, record[0])]

    def run(self, *command, cwd, **environment):
        return subprocess.run(
            command, cwd=cwd, env=self.environment | environment, capture_output=True, text=True, timeout=30
        )


@pytest.fixture
def stubs(tmp_path):
    return Stubs(tmp_path)


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shell_syntax(path):
    subprocess.run(["bash", "-n", path], check=True)
    assert os.access(path, os.X_OK)


def test_shellcheck_finds_nothing():
    command = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if command is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([command, *SHELL], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", [*SHELL, *DOCUMENTS], ids=lambda path: path.name)
def test_the_commands_shown_are_accepted(path):
    commands = list(runs(path.read_text(encoding="utf-8")))
    assert commands
    for arguments in commands:
        parse(arguments)


# scripts/tpu_vm.sh


def tpu_host(stubs, codes, installed=True):
    """A checkout with tpu_vm.sh, of which the program ends with these codes."""
    checkout = stubs.bin.parent / "checkout"
    (checkout / "scripts").mkdir(parents=True)
    shutil.copy(SCRIPTS / "tpu_vm.sh", checkout / "scripts")
    if installed:
        stubs.codes("python", codes, checkout / ".venv" / "bin" / "python")
        (checkout / ".venv" / "installed").touch()
    return checkout


@pytest.mark.parametrize(
    "codes, starts",
    [([0], 1), ([2], 1), ([3], 1), ([4], 1), ([75], 1), ([130], 1), ([5, 137, 5, 0], 4), ([5] * 25, 20)],
)
def test_tpu_host_starts_again_after_a_lost_process_only(stubs, codes, starts):
    checkout = tpu_host(stubs, codes)
    arguments = ["--workdir=/runs/a b", "--config.data.source=/data/*.txt"]
    done = stubs.run(checkout / "scripts" / "tpu_vm.sh", *arguments, cwd="/", RESTART_SECONDS="0")
    assert done.returncode == codes[starts - 1]
    assert stubs.calls() == [["python", "-m", "experiments.run", *arguments]] * starts


def test_tpu_host_installs_once(stubs):
    checkout = tpu_host(stubs, [], installed=False)
    stubs.add("python", path=checkout / "python")
    stubs.add("python3", 'if [[ $3 == venv ]]; then mkdir -p .venv/bin && cp python .venv/bin; fi')  # fmt: skip
    for _ in range(2):
        assert stubs.run(checkout / "scripts" / "tpu_vm.sh", cwd="/").returncode == 0
    assert [call[:3] for call in stubs.calls("python3")] == [
        ["-m", "pip", "install"],
        ["-m", "uv", "venv"],
        ["-m", "uv", "pip"],
    ]
    # Started as a module, uv takes the Python it runs in for the one to install into, unless told otherwise.
    assert stubs.calls("python3")[-1][-2:] == ["--python=.venv", ".[tpu,gcs]"]
    assert len(stubs.calls("python")) == 2


def test_tpu_host_refuses_a_second_run(stubs):
    checkout = tpu_host(stubs, [0])
    with open(checkout / "scripts" / "tpu_vm.sh") as script:
        fcntl.flock(script, fcntl.LOCK_EX)
        done = stubs.run(checkout / "scripts" / "tpu_vm.sh", cwd="/")
    assert (done.returncode, stubs.calls()) == (1, [])
    assert done.stderr == "tpu_vm.sh: a run is going on here already\n"


# scripts/tpu_pod.sh

POD = {
    "PROJECT": "project", "ZONE": "zone", "TYPE": "v5litepod-16", "RUNTIME": "v2-alpha-tpuv5-lite",
    "NFS": "10.0.0.2:/runs", "REPOSITORY": "https://host/switchmoe.git", "POLL_SECONDS": "0",
}  # fmt: skip


def pod(stubs, states, *arguments, **environment):
    """Runs tpu_pod.sh where `describe` answers with these states, and a command for all workers is run once."""
    host = stubs.bin.parent / "host"
    host.mkdir()
    states_left = stubs.bin.parent / "states"
    states_left.write_text("".join(f"{state}\n" for state in states))
    stubs.add("tpu_vm.sh", path=host / "tpu_vm.sh")
    stubs.add("git", "mkdir -p switchmoe/scripts && cp tpu_vm.sh switchmoe/scripts")
    stubs.add("mountpoint", "exit 1")
    stubs.add("sudo")
    stubs.add(
        "gcloud",
        f"""
        case "$*" in
          *describe*) state=$(head -n 1 "{states_left}"); sed -i 1d "{states_left}"
            [[ $state == none ]] && exit 1
            echo "$state" ;;
          *--worker=all*) for a; do case $a in --command=*) cd {host} && bash -c "${{a#--command=}}" ;; esac; done ;;
        esac
        """,
    )
    return stubs.run(SCRIPTS / "tpu_pod.sh", *arguments, cwd=host, **(POD | environment))


def gcloud_commands(stubs):
    """What gcloud was asked to do, each with its flags checked against the reference."""
    commands = []
    for call in stubs.calls("gcloud"):
        assert call[:2] == ["compute", "tpus"]
        command = " ".join(call[2:4])
        flags = {word.partition("=")[0] for word in call[5:]}
        assert flags <= GCLOUD[command] | GCLOUD_WIDE, call
        assert {"--project=project", "--zone=zone"} <= set(call)
        assert call[4] == "switchmoe"
        commands.append(command)
    return commands


@pytest.mark.parametrize("arguments", [[], ["--workdir=/runs/a b", "--config.data.source=/data/*.txt"]])
def test_tpu_pod_queues_waits_and_starts_every_host(stubs, arguments):
    done = pod(stubs, ["none", "none", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], *arguments)
    assert done.returncode == 0, done.stderr
    describe, ssh = "queued-resources describe", "tpu-vm ssh"
    assert gcloud_commands(stubs) == [
        describe, describe, "queued-resources create", describe, describe, describe, ssh, ssh,
    ]  # fmt: skip
    deadline = time.monotonic() + 10  # the host's command is started in the background
    while not stubs.calls("tpu_vm.sh") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert stubs.calls("tpu_vm.sh") == [arguments]
    assert stubs.calls("git") == [["clone", "-q", "https://host/switchmoe.git", "switchmoe"]]
    assert ["mount", "-t", "nfs", "10.0.0.2:/runs", "/runs"] in stubs.calls("sudo")


def test_tpu_pod_mounts_nothing_for_a_bucket(stubs):
    done = pod(stubs, ["none", "none", "ACTIVE"], "--workdir=gs://bucket/base", NFS="")
    assert done.returncode == 0, done.stderr
    deadline = time.monotonic() + 10
    while not stubs.calls("tpu_vm.sh") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert stubs.calls("tpu_vm.sh") == [["--workdir=gs://bucket/base"]] and stubs.calls("sudo") == []


def test_tpu_pod_queues_anew_for_a_slice_that_was_lost(stubs):
    done = pod(stubs, ["SUSPENDED", "none", "ACTIVE"])
    assert done.returncode == 0, done.stderr
    changes = [command for command in gcloud_commands(stubs) if "describe" not in command]
    assert changes == ["queued-resources delete", "queued-resources create", "tpu-vm ssh", "tpu-vm ssh"]


def test_tpu_pod_gives_up_on_a_failed_request(stubs):
    done = pod(stubs, ["none", "none", "WAITING_FOR_RESOURCES", "FAILED"])
    assert (done.returncode, done.stderr) == (1, "tpu_pod.sh: switchmoe is FAILED\n")
    assert "tpu-vm ssh" not in gcloud_commands(stubs)


@pytest.mark.parametrize("name", [name for name in POD if name not in ("POLL_SECONDS", "NFS")])
def test_tpu_pod_names_what_is_not_set(stubs, name):
    done = pod(stubs, [], **{name: ""})
    assert done.returncode != 0 and f" {name}: " in done.stderr
    assert stubs.calls() == []


# scripts/slurm.sbatch


def slurm(stubs, code, **environment):
    directory = stubs.bin.parent / "submitted"
    stubs.add("python", path=directory / ".venv" / "bin" / "python")
    stubs.add("scontrol")
    # After --kill-on-bad-exit and --cpus-per-task comes the command.
    stubs.add("srun", f'"${{@:3}}"; exit {code}')
    variables = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "32"}
    return stubs.run(SCRIPTS / "slurm.sbatch", "--workdir=/a b", cwd=directory, **(variables | environment))


@pytest.mark.parametrize(
    "code, restarts, requeued",
    [
        (0, 0, False), (2, 0, False), (3, 0, False), (4, 0, False), (130, 0, False),
        (5, 0, True), (75, 0, True), (137, 49, True), (75, 50, False),
    ],
)  # fmt: skip
def test_slurm_queues_again_what_can_go_on(stubs, code, restarts, requeued):
    done = slurm(stubs, code, SLURM_RESTART_COUNT=str(restarts))
    assert done.returncode == code
    assert stubs.calls("scontrol") == ([["requeue", "7"]] if requeued else [])
    assert stubs.calls("python") == [["-m", "experiments.run", "--workdir=/a b"]]
    assert stubs.calls("srun")[0][:2] == ["--kill-on-bad-exit=0", "--cpus-per-task=32"]


def test_slurm_says_what_to_install(stubs):
    done = stubs.run(SCRIPTS / "slurm.sbatch", cwd=stubs.bin)
    assert done.returncode == 2 and "has no .venv/bin/python" in done.stderr


def test_slurm_options():
    options = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", (SCRIPTS / "slurm.sbatch").read_text(), re.M)
    values = dict(options)
    assert [name for name, _ in options if name not in SBATCH] == []
    assert values["ntasks-per-node"] == "1"  # one process a node
    # The log goes on after a requeue; SIGTERM goes to the processes and not to the shell, which has to requeue.
    assert "requeue" in values and values["open-mode"] == "append"
    assert re.fullmatch(r"TERM@\d+", values["signal"])


# scripts/jobset.yaml


@pytest.fixture(scope="module")
def jobset():
    return yaml.safe_load((SCRIPTS / "jobset.yaml").read_text())


def test_jobset_is_valid(jobset):
    jsonschema.Draft202012Validator(JOBSET).validate(jobset)


def test_the_job_in_the_jobset_is_valid(jobset):
    kubernetes = pytest.importorskip("kubernetes_validate")
    for replicated in jobset["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, **replicated["template"]}
        kubernetes.validate(job, kubernetes.latest_version(), strict=True)


def test_jobset_starts_one_process_a_pod_that_know_each_other(jobset):
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert container["command"][:3] == ["python", "-m", "experiments.run"]
    assert spec["completionMode"] == "Indexed" and job["replicas"] == 1
    hosts = spec["completions"]
    assert spec["parallelism"] == hosts
    for index in range(hosts):
        arguments = [word.replace("$(JOB_COMPLETION_INDEX)", str(index)) for word in container["command"][3:]]
        settings, workdir = parse(arguments)
        assert (settings.mesh.process, settings.mesh.processes) == (index, hosts)
        host, _, port = settings.mesh.coordinator.partition(":")
        name = jobset["metadata"]["name"]
        assert host == f"{name}-{job['name']}-0-0.{name}" and port.isdecimal()
        assert any(workdir.startswith(mount["mountPath"]) for mount in container["volumeMounts"])


def test_jobset_starts_again_unless_it_is_hopeless(jobset):
    policy = jobset["spec"]["failurePolicy"]
    (rule,) = policy["rules"]
    assert policy["maxRestarts"] > 0
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    spec = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert spec["backoffLimit"] == 0 and spec["template"]["spec"]["restartPolicy"] == "Never"
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule == {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2, 3]}}
