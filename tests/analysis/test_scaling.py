import math

import numpy as np
import pytest

from switchmoe.analysis import scaling
from switchmoe.analysis.scaling import PUBLISHED, Law, fit, published

EXPERTS = 2.0 ** np.arange(10)
S_BASE = PUBLISHED["S-BASE"]


def test_experts_saturate_from_e_start_to_e_max():
    law = Law(0.0, 1.0, 0.0, 0.0, e_start=2.0, e_max=100.0)  # the loss is the saturated count itself
    assert law.loss(1e6, 1) == pytest.approx(2.0)
    assert law.loss(1e6, 1e9) == pytest.approx(100.0, rel=1e-6)
    # 1 / (1 / (9 - 1 + 1 / (1/2 - 1/100)) + 1/100)
    assert law.loss(1e6, 9) == pytest.approx(1 / (1 / (8 + 1 / 0.49) + 0.01))


def test_the_published_law_gives_the_published_losses():
    # The model named 25M has 27.3M parameters without embeddings.
    np.testing.assert_allclose(S_BASE.loss(27.3e6, [1, 64, 512]), [3.043, 2.650, 2.513], atol=1e-3)
    rows = {row.experts: row.loss_final for row in published(25e6)}
    assert [rows[experts] for experts in (1, 64, 512)] == [3.0284, 2.6411, 2.4895]


def test_the_table_has_every_size_and_the_nearest_is_so_by_ratio():
    rows = published()
    assert sorted({row.size for row in rows}) == [15e6, 25e6, 55e6, 130e6, 370e6, 1300e6]
    assert len(rows) == 59  # 130M has no E=256
    for row in rows:
        assert 1.9 < row.loss_final < row.loss_10k < 3.6
    assert {row.size for row in published(200e6)} == {130e6}  # 1.54 times, and 370M is 1.85 times
    assert {row.size for row in published(3e5)} == {15e6}


def test_a_fit_of_the_published_losses_holds_the_published_coefficients():
    found = fit(*zip(*((row.size, row.experts, row.loss_final) for row in published()), strict=True))
    for name in ("a", "b", "c", "d", "E_start", "E_max"):
        low, high = found.intervals[name]
        assert low < S_BASE.values(1e6)[name] < high


@pytest.mark.parametrize("law", [*PUBLISHED.values()], ids=[*PUBLISHED])
@pytest.mark.parametrize("sizes", [[2e6], [15e6, 370e6]])
def test_a_fit_recovers_the_coefficients_of_losses_without_noise(law, sizes):
    size_R, experts_R = (grid.ravel() for grid in np.meshgrid(sizes, EXPERTS, indexing="ij"))
    found = fit(size_R, experts_R, law.loss(size_R, experts_R))
    assert set(found.values) == ({"b'", "d'"} if len(sizes) == 1 else set("abcd")) | {"E_start", "E_max"}
    for name, value in found.values.items():
        assert value == pytest.approx(law.values(sizes[0])[name], rel=1e-5)
    np.testing.assert_allclose(found.law.loss(size_R, experts_R), law.loss(size_R, experts_R), rtol=1e-9)
    assert any("one model size" in note for note in found.notes) == (len(sizes) == 1)


@pytest.mark.parametrize("sizes", [[2e6], [15e6, 55e6, 370e6]])
def test_intervals_hold_the_truth_in_about_the_nominal_share_of_trials(sizes):
    trials, rng = 60, np.random.default_rng(0)
    sizes = sizes * (3 if len(sizes) == 1 else 1)
    size_R, experts_R = (grid.ravel() for grid in np.meshgrid(sizes, EXPERTS, indexing="ij"))
    clean_R, truth = S_BASE.loss(size_R, experts_R), S_BASE.values(sizes[0])
    hits: dict[str, list[bool]] = {}
    for _ in range(trials):
        found = fit(size_R, experts_R, clean_R * 10 ** rng.normal(0, 5e-4, clean_R.shape), level=0.8)
        for name, (low, high) in found.intervals.items():
            hits.setdefault(name, []).append(low <= truth[name] <= high)
    # 80 % of 60 with a standard deviation of 5 %: 64 ... 96 %, neither all nor half of them.
    assert {name: 0.64 < np.mean(found) < 0.96 for name, found in hits.items()} == dict.fromkeys(hits, True)


def test_wider_noise_makes_wider_intervals():
    rng = np.random.default_rng(1)
    noise_R, loss_R = rng.normal(0, 1, 10), S_BASE.loss(2e6, EXPERTS)
    quiet, loud = (fit([2e6] * 10, EXPERTS, loss_R * 10 ** (sd * noise_R)) for sd in (1e-4, 1e-3))
    low, high = (np.diff(found.intervals["b'"])[0] for found in (quiet, loud))
    assert 5 < high / low < 20


def test_a_saturation_that_is_not_seen_is_not_told():
    straight = fit([1e6] * 10, EXPERTS, 4 * (EXPERTS + 1) ** -0.05)
    assert straight.intervals["E_max"] is None
    assert straight.values["b'"] == pytest.approx(-0.05, abs=1e-3)
    assert any("E_max is not determined" in note for note in straight.notes)


def test_a_loss_that_rises_again_is_said_not_to_follow_the_law():
    falling = S_BASE.loss(2e6, EXPERTS) * np.exp(np.random.default_rng(0).normal(0, 0.002, len(EXPERTS)))
    rising = np.where(EXPERTS > 64, falling[0] * 1.02, falling)
    fits = [fit([2e6] * len(EXPERTS), EXPERTS, loss) for loss in (falling, rising)]
    assert ["b' is not below 0" in " ".join(one.notes) for one in fits] == [False, True]
    assert [one.falls for one in fits] == [True, False]


def test_of_several_sizes_too_a_loss_that_rises_is_said_not_to_follow_the_law():
    sizes = np.repeat([2e6, 2e7], len(EXPERTS))
    rise = 4 * np.tile(EXPERTS, 2) ** 0.005 * (sizes / 2e6) ** -0.05
    law = np.concatenate([S_BASE.loss(size, EXPERTS) for size in (2e6, 2e7)])
    fits = [fit(sizes, np.tile(EXPERTS, 2), loss) for loss in (law, rise)]
    assert [one.falls for one in fits] == [True, False]
    assert any("not below 0 at each of the sizes" in note for note in fits[1].notes)


def test_as_many_coefficients_as_runs_leave_no_intervals():
    found = fit([2e6] * 4, EXPERTS[[0, 3, 6, 9]], S_BASE.loss(2e6, EXPERTS[[0, 3, 6, 9]]))
    assert found.residual is None and set(found.intervals.values()) == {None}
    assert found.values["b'"] == pytest.approx(S_BASE.values(2e6)["b'"], rel=1e-3)


@pytest.mark.parametrize(
    ("size", "experts", "loss", "message"),
    [
        ([1e6] * 3, [1, 2, 4], [3, 2.9, 2.8], "at least 4 pairs .* there are 3 and 3"),
        ([1e6] * 6, [1, 1, 2, 2, 4, 4], [3] * 6, "there are 3 and 3"),
        ([1e6, 2e6] * 3, [1, 1, 2, 2, 4, 4], [3] * 6, "of 2 model sizes .* there are 6 and 3"),
        ([1e6] * 4, [1, 2, 4, 8], [3, 2.9, math.nan, 2.7], "finite losses above 0"),
        ([1e6] * 4, [1, 2, 4, 8], [3, 2.9, 0.0, 2.7], "finite losses above 0"),
    ],
)
def test_what_cannot_be_fitted_is_said(size, experts, loss, message):
    with pytest.raises(ValueError, match=message):
        fit(size, experts, loss)


def test_the_table_names_its_source():
    head = scaling.TABLE.read_text(encoding="utf-8").split("parameters,")[0]
    assert "Clark et al. 2022" in head and "DeepMind" in head and "CC BY 4.0" in head
