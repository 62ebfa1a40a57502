"""The order in which a trace's experts are needed, and the points of a curve, by hand."""

import dataclasses

import numpy as np
import pytest

from switchmoe.analysis.routing import arrays, caching, traces
from switchmoe.analysis.routing.traces import LayerName

ENCODER, DECODER, LAST = LayerName("encoder", 1), LayerName("decoder", 1), LayerName("decoder", 3)


def layer(name, sequence, position, expert):
    """Rows with nothing known but the choices."""
    count = len(sequence)
    integers = [np.array(sequence, np.int32), np.array(sequence, np.int32), np.array(position, np.int32)]
    unknown = np.full(count, np.nan, np.float32)
    expert_NK = np.array(expert, np.int32)
    return traces.Layer(
        name, 4, *integers, *[np.full(count, -1, np.int32)] * 4, expert_NK, np.ones(expert_NK.shape, np.float32),
        expert_NK >= 0, *[unknown] * 3,
    )  # fmt: skip


@pytest.fixture
def trace(tmp_path):
    """Two sequences of an encoder (two choices) and a decoder (one), the second one without an answer's second token."""
    info = traces.Info((ENCODER, DECODER, LAST), 4, 2, complete=True)
    traces.write_info(tmp_path, info)
    layers = [
        layer(ENCODER, [0, 0, 1], [0, 1, 0], [[3, 1], [1, 0], [2, -1]]),
        layer(DECODER, [0, 0, 1], [0, 1, 0], [[0, -1], [2, -1], [0, -1]]),
        layer(LAST, [0, 0, 1], [0, 1, 0], [[1, -1], [1, 3], [-1, -1]]),
    ]
    traces.write_part(tmp_path / "part-00000.parquet", layers)
    return tmp_path


def test_an_encoders_tokens_are_needed_at_once_and_a_decoders_one_by_one(trace):
    found = caching.visits(caching.read(trace))
    assert found == [
        (0, (0, 1, 3)),
        (1, (0,)), (2, (1,)), (1, (2,)), (2, (1, 3)),
        (0, (2,)),
        (1, (0,)),
    ]  # fmt: skip


def test_whole_sequences_are_read(trace):
    assert len(caching.read(trace, 1).sequence_T) == len(caching.read(trace, 4).sequence_T) == 4
    assert len(caching.read(trace, 5).sequence_T) == len(caching.read(trace).sequence_T) == 6


def test_tokens_that_a_layer_lacks_have_no_choice(tmp_path):
    traces.write_info(tmp_path, traces.Info((DECODER, LAST), 4, 1, complete=True))
    rows = [layer(DECODER, [0, 0], [0, 1], [[0], [1]]), layer(LAST, [0], [1], [[2]])]
    traces.write_part(tmp_path / "part-00000.parquet", rows)
    assert caching.read(tmp_path).expert_TLK[..., 0].tolist() == [[0, -1], [1, 2]]


def test_shuffled_tokens_have_the_same_choices_in_another_order(trace):
    tokens = caching.read(trace)
    mixed = [caching.shuffled(tokens, np.random.default_rng(seed)) for seed in range(9)]
    for at in range(3):
        own = sorted(tokens.expert_TLK[:, at].tolist())
        assert all(sorted(one.expert_TLK[:, at].tolist()) == own for one in mixed)
    assert all((one.expert_TLK[tokens.encoder_T, 1:] == -1).all() for one in mixed)
    assert any((one.expert_TLK != tokens.expert_TLK).any() for one in mixed)


def test_points_by_hand(trace):
    """Accesses 3 + 1, 3 and 3, where nothing but decoder/1's expert 0 and decoder/3's expert 1 comes again: bytes of 10 each."""
    tokens = caching.read(trace)
    points = caching.curves(tokens, [0, 120], ("lru", "belady"), record=10, shuffles=2)
    assert [(point.policy, point.budget, point.share) for point in points] == [
        ("lru", 0, 0), ("lru", 120, 1), ("belady", 0, 0), ("belady", 120, 1),
    ]  # fmt: skip
    for point in points:
        assert point.accesses.tolist() == [4, 3, 3, 10] and point.shuffled.shape == (2, 4)
        assert point.hits.tolist() == ([0, 1, 1, 2] if point.budget else [0, 0, 0, 0])
        assert point.read == 10 * (10 - point.hits[-1])
    rows = caching.rows(points, tokens.layers)
    assert [row["layer"] for row in rows[:4]] == ["encoder/1", "decoder/1", "decoder/3", "all"]
    assert (
        rows[7]["hit_rate"] == 0.2
        and rows[7]["shuffled_low"] <= rows[7]["shuffled"] <= rows[7]["shuffled_high"]
    )
    assert caching.table(points)[2][:3] == [
        "100.0%",
        "120",
        f"0.200 ({points[1].shuffled[:, -1].mean():.3f})",
    ]
    assert len(caching.picture(points, tokens.layers).axes) == 2


def test_a_layer_without_an_access_has_no_rate(trace):
    tokens = caching.read(trace)
    nothing = dataclasses.replace(
        tokens, expert_TLK=np.where(np.arange(3)[None, :, None] == 2, -1, tokens.expert_TLK)
    )
    (point,) = caching.curves(nothing, [40], ("lru",), shuffles=0)
    assert np.isnan(point.rates[2]) and "hit_rate" not in caching.rows([point], nothing.layers)[2]


def test_experts_that_stay_are_found_and_shuffled_ones_are_not(tmp_path):
    """Each sequence keeps its experts: 16 layers' worth of one expert each suffice."""
    expert_TL = np.repeat(np.random.default_rng(0).integers(0, 16, (20, 4)), 30, axis=0)
    np.savez(tmp_path / "experts.npz", experts=expert_TL[..., None], sequences=np.arange(600) // 30)
    arrays.convert(tmp_path / "experts.npz", tmp_path / "trace")
    (point,) = caching.curves(caching.read(tmp_path / "trace"), [4], ("lru",))
    assert point.rates[-1] > 0.95 and point.shuffled[:, -1].max() < 0.2
