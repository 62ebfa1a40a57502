"""Checkpoints: what is kept, what a wrong or broken one says, and that nothing is overwritten."""

import errno
import shutil
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchmoe.checkpoints import CheckpointError, Checkpoints, write_json
from switchmoe.settings import CheckpointSettings


def iterator(position=0):
    counter = iter(grain.MapDataset.range(1000).to_iter_dataset())
    for _ in range(position):
        next(counter)
    return counter


def state(value, size=4):
    return {"step": jnp.array(value), "params": {"w": jnp.full((2, size), float(value))}}


def saved(directory, steps, losses=None, **fields):
    checkpoints = Checkpoints(directory, CheckpointSettings(**fields))
    for i, step in enumerate(steps):
        checkpoints.save(step, state(step), iterator(step * 10), {"a": 1}, losses[i] if losses else None)
    checkpoints.wait()
    return checkpoints


def test_state_and_iterator_come_back_as_one(tmp_path):
    saved(tmp_path, [3, 5]).close()
    counter = iterator()
    restored = Checkpoints(tmp_path, CheckpointSettings()).restore(state(0), counter)
    assert int(restored["step"]) == 5 and next(counter) == 50
    np.testing.assert_array_equal(restored["params"]["w"], state(5)["params"]["w"])


def test_saving_does_not_see_what_happens_to_the_state_afterwards(tmp_path):
    """The step donates its state: the buffers are overwritten while the save is under way."""
    checkpoints = Checkpoints(tmp_path, CheckpointSettings())
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    big = {"w": jnp.zeros((2000, 1000))}
    checkpoints.save(1, big, iterator(), {}, None)
    for _ in range(5):
        big = advance(big)
    jax.block_until_ready(big)
    checkpoints.wait()
    assert float(checkpoints.restore({"w": jnp.zeros((2000, 1000))})["w"].max()) == 0


def test_keeps_the_newest_and_the_best(tmp_path):
    checkpoints = saved(tmp_path, [1, 2, 3, 4, 5], [2.0, 1.0, 3.0, 4.0, 5.0], keep=2, keep_best=1)
    assert checkpoints.steps() == [2, 4, 5]
    checkpoints = saved(tmp_path / "newest", [1, 2, 3], [1.0, 2.0, 3.0], keep=1, keep_best=0)
    assert checkpoints.steps() == [3]


def test_another_shape_is_refused_by_name(tmp_path):
    checkpoints = saved(tmp_path, [1])
    with pytest.raises(CheckpointError, match=r"params\.w has shape \(2, 4\) there, \(2, 9\) here"):
        checkpoints.restore(state(0, size=9), iterator())
    assert checkpoints.latest() == 1


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        Checkpoints(tmp_path, CheckpointSettings()).restore(state(0))


@pytest.mark.parametrize("damage", ["truncate", "delete"])
def test_a_damaged_checkpoint_is_named_and_so_is_the_one_before(tmp_path, damage):
    saved(tmp_path, [1, 2]).close()
    files = [f for f in (tmp_path / "2" / "state").rglob("*") if f.is_file() and f.stat().st_size > 0]
    for file in files:
        file.write_bytes(b"") if damage == "truncate" else file.unlink()
    checkpoints = Checkpoints(tmp_path, CheckpointSettings())
    with pytest.raises(CheckpointError) as error:
        checkpoints.restore(state(0), iterator())
    assert str(tmp_path / "2") in str(error.value) and "\n" not in str(error.value)
    assert int(checkpoints.restore(state(0), iterator(), step=1)["step"]) == 1


def test_a_killed_save_leaves_the_step_before(tmp_path):
    saved(tmp_path, [1]).close()
    (tmp_path / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    assert Checkpoints(tmp_path, CheckpointSettings()).latest() == 1


def test_a_full_disk_names_the_last_complete_step(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, [1])

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(CheckpointError, match=r"No space left on device; last complete: 1"):
        checkpoints.save(2, state(2), iterator(), {}, None)


def test_a_disk_without_room_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, [1])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(CheckpointError, match=r"step 2 .* are free on that disk; last complete: 1"):
        checkpoints.save(2, state(2), iterator(), {}, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1"]


def test_json_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"good": 1})
    with pytest.raises(TypeError):
        write_json(path, {"bad": object()})

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError):
        write_json(path, {"good": 2})
    assert '"good": 1' in path.read_bytes().decode()
