"""A run's checkpoint read in parts: what is in memory is a layer's share of an array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchmoe.interop import run_files
from switchmoe.parallel.sharding import path_keys
from switchmoe.runs import checkpoints
from switchmoe.settings import CheckpointSettings, from_config
from switchmoe.training import train_state
from switchmoe.training.places import places

CONFIG = dict(
    model=dict(d_model=16, d_ff=24, d_kv=4, num_heads=2, num_layers=6),
    moe=dict(num_experts=4, every=2),
    data=dict(vocab_size=400),
    optimizer=dict(name="adafactor"),
)


class Iterator:
    def get_state(self):
        return {"position": 0}


def saved(directory):
    """A run's step, as the loop saves it, and its parameters and optimizer's state by name."""
    settings = from_config(CONFIG)
    state = train_state.init_state(settings, train_state.optimizer(settings))
    keys = iter(jax.random.split(jax.random.key(0), 500))
    drawn = lambda leaf: jax.random.normal(next(keys), leaf.shape) if leaf.dtype == jnp.float32 else leaf  # noqa: E731
    state = jax.tree.map(drawn, state)
    run = checkpoints.Checkpoints(directory, CheckpointSettings())
    run.save(3, state, Iterator(), {}, None)
    run.wait()
    restored = run.restore(jax.tree.map(jnp.zeros_like, state), step=3)
    run.close()
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state))
    return settings, {"/".join(path_keys(path)): leaf for path, leaf in leaves}


LAYER = 4 * 16 * 24 * 4  # bytes of a kernel of one layer's experts


@pytest.mark.parametrize(
    "apart, most",
    [(1, 0), (LAYER // 3, LAYER), (checkpoints.APART, 3 * LAYER)],
    ids=["expert", "layer", "whole"],
)
def test_a_run_is_read_part_by_part_and_one_of_whole_arrays_as_well(tmp_path, apart, most, monkeypatch):
    """What is held: nothing of larger models, whose experts are chunks of their own; a layer; and all of three, as before."""
    monkeypatch.setattr(checkpoints, "APART", apart)
    settings, there = saved(tmp_path)
    reader, held = run_files.Reader(tmp_path / "3"), 0
    for name, value in there.items():
        if not name.startswith("params/"):
            continue
        for _, _, index in places(settings, name.removeprefix("params/")):
            experts = range(value.shape[len(index)]) if "experts" in name else [None]
            for expert in experts:
                part = index if expert is None else (*index, expert)
                np.testing.assert_array_equal(reader.read(name, part), value[part], err_msg=name)
                values = reader._held[1]
                held = max(held, 0 if values is None else values.nbytes)
    assert held == most


def test_a_thousand_chunks_are_in_some_files(tmp_path, monkeypatch):
    """How many differs from save to save: 24 to 32 were seen, whole arrays or chunks."""
    monkeypatch.setattr(checkpoints, "APART", 1)  # a chunk for each layer and each expert: 1,017
    saved(tmp_path)
    assert sum(path.is_file() for path in (tmp_path / "3").rglob("*")) < 100
