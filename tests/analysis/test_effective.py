"""Effective speed-ups: a curve of known coefficients, losses on it, before its end, beyond it, and below its floor."""

import dataclasses
import math

import numpy as np
import pytest

from switchmoe.analysis import effective
from switchmoe.analysis.sweeps import Run
from switchmoe.planning import flops
from switchmoe.settings import from_config

GROUPS = {
    "model": dict(d_model=16, d_ff=16, d_kv=8, num_heads=2, num_layers=2),
    "moe": dict(num_experts=1),
    "data": dict(vocab_size=300, batch_size=4, input_length=32, target_length=16),
}
C = np.geomspace(1e9, 1e12, 30)


def curve(c, floor=2.0, start=5e10, k=0.4):
    return floor + (c / start) ** -k


def test_a_known_curve_is_found():
    floor, log_start, k = effective.fit(C, curve(C))
    assert (floor, k) == (pytest.approx(2.0, abs=1e-3), pytest.approx(0.4, rel=1e-2))
    assert math.exp(log_start) == pytest.approx(5e10, rel=2e-2)
    for compute in (3e10, 1e12, 8e12):
        assert effective.dense_compute(C, curve(C), float(curve(compute))) == pytest.approx(compute, rel=2e-2)
    assert effective.dense_compute(C, curve(C), 1.5) == math.inf


def test_few_evaluations_are_refused():
    with pytest.raises(ValueError, match="3 evaluations; a fit takes at least four"):
        effective.fit(C[-3:], curve(C[-3:]))


def run(experts, losses):
    settings = from_config(GROUPS | {"moe": dict(num_experts=experts)})
    steps = np.arange(50.0, 1001.0, 50.0)
    fields = dict(
        parameters=1, parameters_active=1, step_T=steps, seconds_T=steps, step_seconds=1.0, routing=None
    )
    return Run("run", settings, step_V=steps, loss_V=losses(steps), device="cpu", versions={}, **fields)


def test_the_check_compares_compute_not_steps():
    dense = run(1, lambda s: curve(s, start=300.0))
    # Four experts reach at the end what the dense model would after 2,000 steps.
    sparse = run(4, lambda s: np.full(len(s), curve(2000.0, start=300.0)))
    found = effective.speed_up("E=4", "dense").interval({"E=4": {0: sparse}, "dense": {0: dense}})
    work = [flops.train_flops(one.settings, {"encoder": 32, "decoder": 16}) for one in (dense, sparse)]
    assert work[1] > work[0]  # the router's
    assert math.exp(found.mean) == pytest.approx(2.0 * work[0] / work[1], rel=2e-2)
    below = dataclasses.replace(sparse, loss_V=np.full(20, 1.0))
    assert (
        effective.speed_up("E=4", "dense").interval({"E=4": {0: below}, "dense": {0: dense}}).mean == math.inf
    )


def test_a_run_of_few_evaluations_tells_nothing():
    short = dataclasses.replace(
        run(1, lambda s: curve(s, start=300.0)), step_V=np.array([500.0, 1000.0]), loss_V=np.array([3.0, 2.9])
    )
    found = effective.speed_up("E=4", "dense").interval({"E=4": {0: short}, "dense": {0: short}})
    assert math.isnan(found.mean)
