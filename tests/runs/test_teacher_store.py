"""A teacher's store: one process writes it, and a disk without room for it is found before it is written."""

import errno
import os
import shutil
import types

import jax
import numpy as np
import pytest

from switchmoe.parallel import sharding
from switchmoe.runs import teacher_store
from switchmoe.runs.lock import InUse
from switchmoe.runs.parts import Context
from switchmoe.settings import from_config, to_dict

STEPS, ROWS, LENGTH, COUNT = 3, 2, 4, 2


class Counted:
    """Batches that are their number, from 1 on."""

    identity, lengths = {"train": "a hash"}, {"targets": LENGTH}

    def __init__(self):
        self.meanwhile = lambda number: None

    def batches(self, streams=None):
        return self

    def set_state(self, state):
        self.number = state["number"]

    def get_state(self):
        return {"number": self.number}

    def __next__(self):
        self.number += 1
        self.meanwhile(self.number)
        return self.number

    def close(self):
        pass


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Makes stores in one directory, of a teacher whose likeliest tokens are the batch's number."""

    def run(number):
        return np.full((ROWS, LENGTH, COUNT), number), np.zeros((ROWS, LENGTH, COUNT))

    monkeypatch.setattr(teacher_store.Kept, "_program", lambda _: run)
    settings = from_config(
        {
            "distill": {"teacher": "runs/teacher", "store": str(tmp_path / "store"), "top_k": COUNT},
            "train": {"num_steps": STEPS, "eval_every": 1},
            "data": to_dict(from_config({}))["data"] | {"batch_size": ROWS},
        }
    )
    mesh = sharding.make_mesh(settings.mesh, jax.devices()[:1])
    context = Context(settings, tmp_path, mesh, False, lambda _: None)

    def make():
        data = Counted()
        data.number = 0
        return teacher_store.Kept(data, context, "runs/teacher|1", settings, dict), data

    return make


def ids(kept):
    return np.load(kept.directory / "ids.npy")[:, 0, 0].tolist()


def test_a_second_process_is_refused_while_one_writes(store):
    first, data = store()
    refused = []

    def meanwhile(number):
        second, _ = store()
        with pytest.raises(InUse, match=f"distill.store={first.directory}: the writing of a store is under"):
            second._write()
        refused.append(number)

    data.meanwhile = meanwhile
    first._write()
    assert refused == [1, 2, 3] and ids(first) == [1, 2, 3]
    second, data = store()
    data.meanwhile = lambda number: pytest.fail("all of it is there")
    second._write()


def test_who_waited_for_the_lock_goes_on_where_the_other_stopped(store, monkeypatch):
    first, data = store()
    monkeypatch.setattr(teacher_store, "SAVED", 1)

    def killed(number):
        if number == 2:
            raise KeyboardInterrupt

    data.meanwhile = killed
    with pytest.raises(KeyboardInterrupt):
        first._write()
    second, data = store()
    seen = []
    data.meanwhile = seen.append
    second._write()
    assert seen == [2, 3] and ids(second) == [1, 2, 3]


@pytest.mark.parametrize("system", ["Linux", "macOS"])
def test_a_disk_without_room_is_found_before_anything_is_written(store, monkeypatch, system):
    def full(descriptor, start, size):
        assert (start, size) == (0, os.fstat(descriptor).st_size) and size > 0
        raise OSError(errno.ENOSPC, "No space left on device")

    if system == "Linux":
        monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    else:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10))
    kept, data = store()
    data.meanwhile = lambda number: pytest.fail("a step was asked for")
    with pytest.raises(OSError, match=r"no room for the teacher's likeliest tokens .*ids.npy"):
        kept._write()
    assert [path.name for path in kept.directory.iterdir()] == ["store.lock"]
