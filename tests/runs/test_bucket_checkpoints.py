"""Checkpoints of runs in buckets: kept as on a disk, complete with their last object, damaged, and set aside."""

import json
import time

import jax.numpy as jnp
import numpy as np
import pytest
import test_buckets
from etils import epath
from test_buckets import opened
from test_checkpoints import iterator, saved, state

from switchmoe.runs import buckets, integrity
from switchmoe.runs.checkpoints import CheckpointError, Checkpoints
from switchmoe.settings import CheckpointSettings

servers, gs_place, s3_place = test_buckets.servers, test_buckets.gs_place, test_buckets.s3_place  # fixtures


def test_checkpoints_in_a_bucket_are_kept_as_on_a_disk(gs_place):
    directory = epath.Path(gs_place) / "checkpoints"
    kept = saved(directory, [1, 2, 3, 4, 5], [2.0, 1.0, 3.0, 4.0, 5.0], keep=2, keep_best=1)
    assert kept.steps() == [2, 4, 5]
    counter = iterator()
    found = kept.restore(state(0), counter)
    assert int(found["step"]) == 5 and next(counter) == 50
    kept.close()


def test_a_step_without_its_marker_is_none_and_is_removed(gs_place):
    """What a kill leaves: all files of step 3 but the last."""
    directory = epath.Path(gs_place) / "checkpoints"
    saved(directory, [1, 3]).close()
    (directory / "3" / buckets.COMMIT).unlink()
    again = Checkpoints(directory, CheckpointSettings())
    assert again.latest() == 1 and not (directory / "3").exists()
    again.save(3, state(3), iterator(30), {}, None)
    again.wait()
    assert again.latest() == 3 and int(again.restore(state(0))["step"]) == 3
    again.close()


@pytest.mark.parametrize("harm", ["gone", "cut"])
def test_damage_in_a_bucket_is_named_and_the_one_before_is_used_when_asked_for(gs_place, harm):
    directory = epath.Path(gs_place) / "checkpoints"
    saved(directory, [1, 2]).close()
    names = json.loads((directory / "2" / integrity.MANIFEST).read_text())
    name = max((name for name in names if name.startswith("state/")), key=lambda name: names[name][0])
    if harm == "gone":
        (directory / "2" / name).unlink()
    else:
        (directory / "2" / name).write_bytes(b"short")
    with pytest.raises(CheckpointError, match=f"checkpoint .*/2 is damaged: {name} .*Nothing was changed"):
        Checkpoints(directory, CheckpointSettings())
    told = []
    found = Checkpoints(directory, CheckpointSettings(on_damage="previous"), told.append)
    assert found.latest() == 1 and "Kept as *.damaged" in told[0]
    assert any(path.name == "2.damaged" for path in directory.iterdir())
    found.close()


def test_a_staged_step_is_complete_with_its_last_object(servers, monkeypatch):
    place = f"s3://bucket/{time.monotonic_ns()}"
    there = opened(place)
    saved(there.checkpoints, [1, 2, 3], keep=2, keep_best=0).close()
    copy, copied = buckets._copy, []

    def cut_short(here, path):
        copied.append(path)
        if len(copied) > 5:
            raise OSError("gone")
        copy(here, path)

    monkeypatch.setattr(buckets, "_copy", cut_short)
    with pytest.raises(buckets.Unreachable):
        there.push_steps()
    remote = epath.Path(place) / "checkpoints"
    assert [path.name for path in remote.iterdir()] == ["2"] and buckets.complete_steps(remote) == set()
    monkeypatch.undo()
    there.push_steps()
    assert buckets.complete_steps(remote) == {2, 3}
    again = Checkpoints(there.checkpoints, CheckpointSettings(keep=1, keep_best=0))
    again.save(4, state(4), iterator(40), {}, None)
    again.wait()
    again.close()
    there.push_steps()
    assert buckets.complete_steps(remote) == {4} and [path.name for path in remote.iterdir()] == ["4"]
    there.close()
    elsewhere = opened(place)
    found = Checkpoints(elsewhere.checkpoints, CheckpointSettings()).restore(state(0))
    np.testing.assert_array_equal(found["params"]["w"], jnp.full((2, 4), 4.0))
    elsewhere.close()


def reopened(there):
    """With what `there` has copied, as at the next start."""
    there.push_steps()
    there.close()
    return opened(there.name)


def test_the_best_staged_step_outlives_another_start(s3_place):
    there = opened(s3_place)
    saved(there.checkpoints, [1, 2, 3], [2.0, 1.0, 3.0], keep=1, keep_best=1).close()
    again = reopened(there)
    saved(again.checkpoints, [4], [4.0], keep=1, keep_best=1).close()
    last = reopened(again)
    assert buckets.complete_steps(last.checkpoints) == {2, 4}
    assert buckets.complete_steps(epath.Path(s3_place) / "checkpoints") == {2, 4}
    last.close()


def test_a_damaged_staged_step_is_set_aside_there_and_written_anew(s3_place):
    there, remote = opened(s3_place), epath.Path(s3_place) / "checkpoints"
    saved(there.checkpoints, [1, 2], keep=2).close()
    again = reopened(there)
    again.close()
    (remote / "2" / "data" / "metadata").write_bytes(b"damaged")
    again = opened(s3_place)
    with pytest.raises(CheckpointError, match=r"2 is damaged: data/metadata .*accepted is .*previous"):
        Checkpoints(again.checkpoints, CheckpointSettings())
    settings = CheckpointSettings(on_damage="previous")
    found = Checkpoints(again.checkpoints, settings)
    assert found.latest() == 1
    found.save(2, state(7), iterator(20), {}, None)
    found.close()
    last = reopened(again)
    assert (remote / "2.damaged" / "data" / "metadata").read_bytes() == b"damaged"
    found = Checkpoints(last.checkpoints, settings)
    assert found.latest() == 2 and int(found.restore(state(0))["step"]) == 7
    found.close()
    last.close()
