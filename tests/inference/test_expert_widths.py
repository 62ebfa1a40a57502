"""In which order experts are narrowed, by hand, and what the file says."""

import json

import numpy as np
import pytest

from switchmoe.inference.offload import widths
from switchmoe.interop import expert_store
from switchmoe.settings import from_config

BYTES_LW = np.array([[80, 40, 20]])


def test_the_next_move_is_the_one_that_costs_the_least_a_byte():
    """Expert 0 loses 4 and 2 in its moves (0.1 a byte each), expert 1 loses 8 and 1 (0.2, 0.05)."""
    assert widths.moves(np.array([[[0, 4, 6], [0, 8, 9]]]), BYTES_LW) == [(0, 0), (0, 0), (0, 1), (0, 1)]
    assert widths.moves(np.array([[[0, 4, 10], [0, 8, 9]]]), BYTES_LW) == [(0, 0), (0, 1), (0, 1), (0, 0)]


def test_a_layer_of_larger_experts_goes_first_where_losses_are_equal():
    assert widths.moves(np.array([[[0, 1, 2]], [[0, 1, 2]]]), np.array([[80, 40, 20], [800, 400, 200]]))[
        0
    ] == (1, 0)


def test_a_loss_that_falls_is_no_rise():
    assert widths.moves(np.array([[[5, 5, 5], [5, 4, 9]]]), BYTES_LW)[:3] == [(0, 0), (0, 0), (0, 1)]


def test_bits_after_so_many_moves():
    order = [(0, 1), (1, 0), (0, 1), (0, 0)]
    assert widths.after(order, 0, (2, 2)).tolist() == [[8, 8], [8, 8]]
    assert widths.after(order, 3, (2, 2)).tolist() == [[8, 2], [4, 8]]
    assert widths.after(order, 4, (2, 2)).tolist() == [[4, 2], [4, 8]]


@pytest.mark.parametrize(
    "bits, group, wanted", [(8, 0, 64 * 4 + 4 * 4), (4, 32, 32 * 4 + 2 * 4 * 4), (2, 0, 16 * 4 + 16)]
)
def test_bytes_of_an_expert(bits, group, wanted):
    """A kernel of 64 rows and 4 columns: codes, and a float32 for each column of a group."""
    assert widths.size([(64, 4)], bits, group) == wanted
    assert widths.size([(64, 4), (64, 4)], bits, group) == 2 * wanted


def test_the_file_says_what_a_store_takes(tmp_path):
    bits = {"encoder/1": [8, 2], "decoder/1": np.array([4, 4])}
    widths.save(tmp_path / "widths.json", bits)
    assert json.loads((tmp_path / "widths.json").read_text()) == {
        "bits": {"encoder/1": [8, 2], "decoder/1": [4, 4]}
    }
    assert len(list(tmp_path.iterdir())) == 1
    model = dict(d_model=8, d_ff=16, d_kv=4, num_heads=2, num_layers=2)
    settings = from_config({"model": model, "moe": dict(num_experts=2)})
    forms = expert_store.widths(tmp_path / "widths.json", settings)
    assert forms == {"encoder/1": ["int8", "int2"], "decoder/1": ["int4", "int4"]}
