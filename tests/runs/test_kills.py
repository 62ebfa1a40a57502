"""Kills at chosen moments: in a step, in a save, before its rename, in an evaluation, at the start. See test_faults."""

import contextlib
import json
import os
import random
import signal
import time

import pytest
from test_faults import assert_same_run, kind, newest_record, wait_until  # noqa: F401 (a fixture)
from test_run import finish, start

from switchmoe.runs import integrity

KILLED = [
    "--config.data.batch_size=32", "--config.train.num_steps=160", "--config.train.eval_every=9",
    "--config.train.eval_batches=20", "--config.checkpoint.every=16",
]  # fmt: skip
EVALUATE, SAVE = 9, 16
# Seconds within which a kill of that kind comes after its moment began.
MOMENTS = {"in a step": 0.05, "in a save": 0.05, "before the rename": 0, "in an evaluation": 0.2}

pytestmark = pytest.mark.faults


def steps_of(workdir):
    return [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]


def doing(workdir):
    """(moment, step) of what a run is at, from its files; a step's record is written during the next step.

    Between the record of a step that is to be evaluated and the evaluation's own record lies the evaluation;
    after one that is to be saved the save begins, which shows only when its directory is there.
    """
    for unfinished in (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"):
        with contextlib.suppress(OSError, ValueError):
            json.loads((unfinished / integrity.MANIFEST).read_bytes())
            return "before the rename", int(unfinished.name.split(".")[0])
        return "in a save", int(unfinished.name.split(".")[0])
    record = newest_record(workdir)
    step = record["step"]
    if record["split"] == "train" and step % EVALUATE == 0:
        return "in an evaluation", step
    return ("", step) if step % SAVE == 0 else ("in a step", step + 1)


def kill(process, workdir, moment, rng):
    """Kills the run at such a moment; returns its step.

    The process is stopped, what it is at is looked up while nothing moves, and unless that is the moment it goes on.
    """
    # Later than the first evaluation, before which the norm of the parameters is compiled.
    begun, started = max(steps_of(workdir), default=0), time.time()
    at, metrics = begun + rng.randint(EVALUATE + 1, 20), workdir / "metrics.jsonl"
    # Until a run that goes on writes its first record, the file may tell of steps that are to be done again.
    wait_until(process, lambda: metrics.exists() and metrics.stat().st_mtime > started)
    wait_until(process, lambda: newest_record(workdir)["step"] >= at)
    while True:
        wait_until(process, lambda: doing(workdir)[0] == moment)
        time.sleep(rng.uniform(0, MOMENTS[moment]))
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        found, step = doing(workdir)
        if found == moment:
            process.kill()
            process.communicate()
            return step
        process.send_signal(signal.SIGCONT)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, environment, kind):  # noqa: F811
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(start(workdir, environment, *KILLED))
    return workdir


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5), ids=lambda seed: f"run{seed}")
def test_sigkill(tmp_path, environment, undisturbed, table, seed):
    """In each of five runs at a moment of each of the four kinds, so twenty times, and while it starts."""
    broken, rng = tmp_path / "broken", random.Random(seed)
    process = start(broken, environment, *KILLED)
    time.sleep(rng.uniform(0.5, 5))
    process.kill()
    process.communicate()
    hit, repeated = [], 0
    for moment in rng.sample(list(MOMENTS), len(MOMENTS)):
        process = start(broken, environment, *KILLED)
        hit.append(f"{moment} ({kill(process, broken, moment, rng)})")
        repeated = max(repeated, newest_record(broken)["step"] - max(steps_of(broken), default=0))
    finish(start(broken, environment, *KILLED))
    assert_same_run(broken, undisturbed)
    assert not list((broken / "checkpoints").glob("*tmp*"))
    table(f"SIGKILL, seed {seed}: starting, {', '.join(hit)}", "the same command resumed each time; final state and all metrics bitwise those of the undisturbed run", f"nothing; at most {repeated} steps done again (checkpoint.every={SAVE})")  # fmt: skip
