"""A group of text through every router and back end."""

import dataclasses

import jax
import numpy as np
import pytest

from switchmoe.analysis import playground
from switchmoe.dispatch.dispatchers import DISPATCHERS
from switchmoe.routing import ROUTERS
from switchmoe.settings import MoESettings

TOKENS, PADDING = 12, 2
MOE = MoESettings(num_experts=4, capacity_factor=1.0, router_init_stddev=0.5, jitter=0.0, branches=2)


@pytest.fixture(scope="module")
def group():
    ids_S = np.r_[np.arange(3, 3 + TOKENS - PADDING), np.zeros(PADDING, int)].astype(np.int32)
    x_SD = jax.random.normal(jax.random.key(1), (TOKENS, 8))
    return playground.Group(tuple("abcdefghij__"), ids_S, ids_S != 0, x_SD)


@pytest.fixture(scope="module")
def found(group):
    return playground.through(group, MOE)


@pytest.mark.parametrize("router", ROUTERS)
def test_the_routing_is_that_of_the_layers_own_figures(found, router):
    one = found[router]
    np.testing.assert_allclose(one.aux["expert_load"], one.routing.load_E[0], atol=1e-6)
    np.testing.assert_allclose(one.aux["fraction_dropped"], one.routing.fraction_dropped[0], atol=1e-6)
    assert float(one.routing.tokens[0]) == TOKENS - PADDING
    assert not np.asarray(one.y_SD)[-PADDING:].any()


@pytest.mark.parametrize("router", ["switch", "top_k", "expert_choice"])
def test_rows_hold_the_tokens_that_were_kept_whatever_the_back_end(group, router):
    moe = playground.of(router, MOE, TOKENS)
    each = playground.back_ends(group, moe)
    assert set(each) == set(DISPATCHERS)
    kept_SK = np.asarray(each["einsum"].routing.kept_SK[0])
    wanted = sorted(np.repeat(np.arange(TOKENS), kept_SK.sum(axis=1)))
    for name, one in each.items():
        rows_N = playground.rows_of(name, one.routing)
        assert sorted(rows_N[rows_N >= 0]) == wanted
        if name != "ragged":
            assert len(rows_N) == one.routing.capacity * MOE.num_experts


def test_back_ends_agree_and_soft_has_one_alone(group):
    lines = {line["router"]: line for line in playground.compared(group, MOE)}
    assert set(lines) == set(ROUTERS)
    assert [lines["soft"][name] for name in ("gather", "ragged")] == ["-", "-"]
    assert all(float(line["largest difference of outputs"]) < 1e-5 for line in lines.values())


def test_slots_take_drops_away_and_leave_the_losses(group):
    found = playground.reactions(group, MOE, "capacity_factor", [0.5, 1.0, 4.0], ["switch"])["switch"]
    assert found["fraction_dropped"][0] >= found["fraction_dropped"][1] >= found["fraction_dropped"][2] == 0
    assert found["fraction_dropped"][0] >= 0.3  # 8 slots for 10 tokens, and their experts are not even
    for name in ("balance_loss", "z_loss", "loss"):
        np.testing.assert_allclose(found[name], found[name][0], rtol=1e-6)


def test_jitter_moves_what_reads_the_input(group):
    found = playground.reactions(group, MOE, "jitter", [0.0, 0.9], ["switch", "hash"])
    assert found["switch"]["balance_loss"][0] != found["switch"]["balance_loss"][1]
    assert found["hash"]["fraction_dropped"][0] == found["hash"]["fraction_dropped"][1]


def test_a_weight_evens_the_load_out_and_none_leaves_it(group):
    still = dataclasses.replace(MOE, balance_loss_weight=0.0, z_loss_weight=0.0)
    assert len(set(playground.alone(group, still, 3)["balance_loss"])) == 1
    pulled = dataclasses.replace(still, balance_loss_weight=1.0)
    losses = playground.alone(group, pulled, 60, 0.5)["balance_loss"]
    assert losses[-1] < losses[0]


def test_pictures_have_a_panel_for_each(group, found):
    assert len(playground.who_goes_where(group, found).axes) == len(ROUTERS) + 1  # and the colours
    each = playground.back_ends(group, MOE)
    figure = playground.where_rows_lie(group, each)
    assert len(figure.axes) == len(DISPATCHERS)
    filled = [sum(len(text.get_text()) > 0 for text in axes.texts) for axes in figure.axes]
    assert set(filled) == {int(each["gather"].routing.kept_SK.sum())}
    values = [1.0, 2.0]
    reactions = playground.reactions(group, MOE, "capacity_factor", values, ["switch", "hash"])
    panels = playground.curves("factor", values, reactions).axes
    assert [len(axes.lines) for axes in panels] == [2] * 4


@pytest.mark.slow
def test_text_is_the_packaged_corpus():
    group = playground.text(sequences=2, length=24)
    assert len(group.pieces) == len(group.ids_S) == 48 and group.mask_S.all()
    np.testing.assert_allclose(np.square(group.x_SD).mean(axis=-1), 1, rtol=1e-3)
    assert any("extra_id" in piece for piece in group.pieces)
