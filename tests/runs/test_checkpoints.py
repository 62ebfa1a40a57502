"""Checkpoints: what is kept, what a wrong or broken one says, and that nothing is overwritten."""

import errno
import shutil
import signal
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchmoe.runs import integrity
from switchmoe.runs.checkpoints import CheckpointError, Checkpoints, write_json
from switchmoe.runs.signals import Stopped, stop_signals
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


def test_what_is_not_finite_is_never_the_best_and_of_equal_ones_the_newer_is(tmp_path):
    nan, inf = float("nan"), float("inf")
    for name, losses, kept in (
        ("nan", [nan, 2.0, nan, 3.0, 4.0], [2, 5]),
        ("infinite", [2.0, -inf, inf, 3.0, 4.0], [1, 5]),
        ("none is", [nan, inf, nan, nan, nan], [5]),
        ("equal", [2.0, 2.0, 2.0, 3.0, 4.0], [3, 5]),
        ("one", [2.0], [1]),
    ):
        steps = list(range(1, len(losses) + 1))
        assert saved(tmp_path / name, steps, losses, keep=1, keep_best=1).steps() == kept, name


def test_another_shape_is_refused_by_name(tmp_path):
    checkpoints = saved(tmp_path, [1])
    with pytest.raises(CheckpointError, match=r"params\.w has shape \(2, 4\) there, \(2, 9\) here"):
        checkpoints.restore(state(0, size=9), iterator())
    assert checkpoints.latest() == 1


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        Checkpoints(tmp_path, CheckpointSettings()).restore(state(0))


def test_a_signal_while_it_is_read_is_no_damage(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, [1])
    for name in ("restore", "item_metadata"):
        with monkeypatch.context() as patch, stop_signals():
            patch.setattr(checkpoints._manager, name, lambda *_, **__: signal.raise_signal(signal.SIGTERM))
            with pytest.raises(Stopped, match="stopped by SIGTERM before the first step"):
                checkpoints.restore(state(0))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def written(step_directory):
    """Files that are read, those of the items and their manifest."""
    return sorted(
        f for f in [*step_directory.glob("*/**/*"), step_directory / integrity.MANIFEST] if f.is_file()
    )


@pytest.mark.parametrize("harm", [truncate, empty, flip_a_bit, Path.unlink])
def test_damage_to_any_file_is_named(tmp_path, harm):
    saved(tmp_path, [1, 2], [2.0, 1.0]).close()
    for file in written(tmp_path / "2"):
        content = file.read_bytes()
        harm(file)
        if file.name == integrity.MANIFEST:  # absent, it says nothing; else it is damaged or names a file
            assert (integrity.damage(tmp_path / "2") is None) == (harm is Path.unlink)
        else:
            with pytest.raises(CheckpointError) as error:
                Checkpoints(tmp_path, CheckpointSettings())
            assert str(tmp_path / "2") in str(error.value) and str(file.relative_to(tmp_path / "2")) in str(
                error.value
            )
            assert "checkpoint.on_damage=previous" in str(error.value) and "\n" not in str(error.value)
        file.write_bytes(content)
    assert Checkpoints(tmp_path, CheckpointSettings()).latest() == 2


@pytest.mark.parametrize("part", ["state", "data", "metrics", "files.json"])
def test_the_good_one_before_a_damaged_one_is_used_when_asked_for(tmp_path, part):
    saved(tmp_path, [1, 2, 3], [2.0, 1.0, 3.0]).close()
    flip_a_bit(next(f for f in written(tmp_path / "3") if part in str(f.relative_to(tmp_path / "3"))))
    notes, counter = [], iterator()
    checkpoints = Checkpoints(tmp_path, CheckpointSettings(on_damage="previous"), notes.append)
    assert checkpoints.steps() == [2] and len(notes) == 1, "keep=2"
    assert f"{tmp_path / '3'} is damaged" in notes[0] and "from step 2" in notes[0]
    assert int(checkpoints.restore(state(0), counter)["step"]) == 2 and next(counter) == 20
    checkpoints.save(3, state(3), iterator(30), {}, None)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 3] and (tmp_path / "3.damaged" / "state").is_dir()
    assert int(Checkpoints(tmp_path, CheckpointSettings()).restore(state(0))["step"]) == 3


def test_where_all_are_damaged_nothing_starts_anew(tmp_path):
    saved(tmp_path, [1, 2]).close()
    for step in "12":
        empty(tmp_path / step / "state" / "_METADATA")
    for on_damage in ("previous", "stop"):
        with pytest.raises(CheckpointError, match="No good one is left, nothing was changed"):
            Checkpoints(tmp_path, CheckpointSettings(on_damage=on_damage))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_an_older_one_that_orbax_could_not_open_is_named_too(tmp_path):
    saved(tmp_path, [1, 2], [1.0, 2.0]).close()
    empty(tmp_path / "1" / "metrics" / "metrics")
    with pytest.raises(CheckpointError, match="1 is damaged: metrics/metrics has 0 bytes instead of"):
        Checkpoints(tmp_path, CheckpointSettings())
    assert Checkpoints(tmp_path, CheckpointSettings(on_damage="previous")).steps() == [2]


def test_a_checkpoint_without_a_manifest_is_read_as_it_is(tmp_path):
    saved(tmp_path, [1]).close()
    (tmp_path / "1" / integrity.MANIFEST).unlink()
    assert int(Checkpoints(tmp_path, CheckpointSettings()).restore(state(0))["step"]) == 1
    shutil.rmtree(tmp_path / "1" / "data")
    with pytest.raises(CheckpointError, match="data/ is missing"):
        Checkpoints(tmp_path, CheckpointSettings())


def test_a_killed_save_leaves_the_step_before(tmp_path):
    saved(tmp_path, [1]).close()
    (tmp_path / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    assert Checkpoints(tmp_path, CheckpointSettings()).latest() == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1"], "its leftovers take no room"


def test_a_step_that_is_no_longer_kept_is_never_half_there(tmp_path):
    """It is renamed, then deleted: a kill in the meantime leaves nothing that could be taken for a step."""
    checkpoints = saved(tmp_path, [1, 2], [1.0, 2.0], keep=1, keep_best=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "removed"]
    assert integrity.damage(tmp_path / "removed" / "1") is None
    (tmp_path / "removed" / "1" / "metrics" / "metrics").unlink()
    assert Checkpoints(tmp_path, CheckpointSettings()).steps() == [2]
    checkpoints.save(3, state(3), iterator(), {}, 3.0)
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3"]


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


def fails(monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(integrity, "write_manifest", full)  # in the background, when all else is written


def test_a_save_that_fails_in_the_background_stops_or_is_warned_of(tmp_path, monkeypatch):
    notes = []
    for on_error in ("stop", "continue"):
        checkpoints = saved(tmp_path / on_error, [1], on_error=on_error)
        checkpoints._note = notes.append
        with monkeypatch.context() as patch:
            fails(patch)
            checkpoints.save(2, state(2), iterator(20), {}, None)
            with pytest.raises(CheckpointError, match=r"step 2 .* No space left on device; last complete: 1"):
                checkpoints.wait()
        assert sorted(path.name for path in (tmp_path / on_error).iterdir()) == ["1"]
        checkpoints.save(2, state(2), iterator(20), {}, None)
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]
    assert len(notes) == 1 and "continuing (checkpoint.on_error=continue)" in notes[0]


def test_a_failed_save_is_made_good_by_the_next(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, [1], on_error="continue", keep=1, keep_best=0)
    with monkeypatch.context() as patch:
        fails(patch)
        checkpoints.save(2, state(2), iterator(20), {}, None)
        checkpoints.save(3, state(3), iterator(30), {}, None)
        with pytest.raises(CheckpointError):
            checkpoints.wait()
        assert checkpoints.steps() == [1], "none is lost"
    checkpoints.save(4, state(4), iterator(40), {}, None)
    checkpoints.wait()
    assert checkpoints.steps() == [4]
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4"]


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
