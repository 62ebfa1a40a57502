"""The pages of the site are true: what they add works, what they compute by hand is computed."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_layouts

from switchmoe import ModelSettings, MoELayer, MoESettings, settings
from switchmoe.data import batches, objectives, tasks
from switchmoe.data.tasks import metrics
from switchmoe.dispatch.dispatchers import DISPATCHERS
from switchmoe.parallel import sharding
from switchmoe.routing import ROUTERS, RouterSettings
from switchmoe.settings import DataSettings, TaskSettings

DOCS = Path(__file__).parents[1] / "docs"
TABLES = (ROUTERS, DISPATCHERS, objectives.OBJECTIVES, sharding.LAYOUTS, tasks.TASKS, metrics.METRICS)


def code(page):
    return "".join(
        re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text("utf-8"), re.DOTALL | re.MULTILINE)
    )


@pytest.fixture
def run(monkeypatch):
    """Runs a page's code; what it adds is gone after the test."""
    before, names = [dict(table) for table in TABLES], settings.data.OBJECTIVES
    yield lambda page: exec(compile(code(page), page, "exec"), {})
    settings.data.OBJECTIVES = names
    for table, kept in zip(TABLES, before, strict=True):
        table.clear()
        table.update(kept)


def layer(x_GSD, **moe):
    """(output, gradients) of a layer whose parameters do not depend on router and back end."""
    model = ModelSettings(d_model=8, d_ff=16, num_heads=2, dtype="float32", activation="relu")
    module = MoELayer(
        model, MoESettings(num_experts=4, capacity_factor=1.0, explore="argmax", **moe), train=True
    )
    variables = module.init({"params": jax.random.key(0), "router": jax.random.key(1)}, x_GSD)

    def loss(variables, x_GSD):
        y_GSD, aux = module.apply(variables, x_GSD, rngs={"router": jax.random.key(2)})
        return (y_GSD**2).sum() + aux["loss"], y_GSD

    (_, y_GSD), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(variables, x_GSD)
    return jax.device_get((y_GSD, gradients))


def equal(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def trained_as_alone(**changed):
    state, metrics_, slopes, *_ = test_layouts.trained.__wrapped__(*changed.values())
    wanted, wanted_metrics, wanted_slopes = test_layouts.alone("encoder_decoder")
    test_layouts.assert_close(slopes, wanted_slopes, 1e-4)
    assert float(metrics_["loss"]) == pytest.approx(float(wanted_metrics["loss"]), rel=1e-5)


def test_the_router(run):
    assert len(code("add_router.md").strip().splitlines()) <= 30
    run("add_router.md")
    logits_SE = jnp.log(
        jnp.array([[3.0, 1.0, 1 / 3], [1 / 3, 1.0, 3.0], [3.0, 1 / 3, 1.0]])
    )  # s: 3/4, 1/2, 1/4
    routing = ROUTERS["sigmoid_top_k"](
        logits_SE, jnp.ones(3, bool), None, RouterSettings(capacity=2, choices=2)
    )
    assert routing.expert_SK.tolist() == [[0, 1], [2, 1], [0, 2]]
    np.testing.assert_allclose(routing.gate_SK, [[0.6, 0.4]] * 3, rtol=1e-6)
    p_E = np.array([[3, 2, 1], [1, 2, 3], [3, 1, 2]]).mean(axis=0) / 6
    assert float(routing.losses["balance"]) == pytest.approx(3 * (p_E / 3).sum(), rel=1e-6)
    x_GSD = jax.random.normal(jax.random.key(3), (2, 12, 8))
    found = [
        layer(x_GSD, router="sigmoid_top_k", choices=2, dispatch=name)
        for name in ("einsum", "gather", "ragged")
    ]
    equal(found[0], found[1])
    equal(found[0], found[2])
    assert np.abs(found[0][1][0]["params"]["router"].value).max() > 0


def test_the_back_end(run):
    run("add_back_end.md")
    x_GSD = jax.random.normal(jax.random.key(3), (2, 12, 8))
    for more in ({"router": "switch"}, {"router": "top_k", "choices": 2}, {"router": "expert_choice"}):
        equal(layer(x_GSD, dispatch="scatter", **more), layer(x_GSD, dispatch="gather", **more))


@pytest.mark.long
def test_the_back_end_on_a_mesh(run):
    run("add_back_end.md")
    trained_as_alone(layout="data_expert", fsdp=False, dispatch="scatter", kind="encoder_decoder")


def test_the_layout(run):
    run("add_layout.md")
    assert sharding.axis_sizes(settings.MeshSettings(layout="expert_widths"), 8)[0] == (1, 4, 2)


@pytest.mark.long
def test_the_layout_changes_no_number(run):
    run("add_layout.md")
    trained_as_alone(layout="expert_widths", fsdp=False, dispatch="auto", kind="encoder_decoder")


class Words:
    eos_id = 1

    def encode(self, text):
        return np.array([int(word) for word in text.split()], np.int32)


def test_the_objective(run):
    run("add_objective.md")
    data = DataSettings(objective="deshuffling", batch_size=4, input_length=6)
    documents = [" ".join(str(10 * n + k) for k in range(2, 9)) for n in range(1, 40)]
    batch = next(batches.train_batches(data, Words(), documents, seed=0))
    assert batch["inputs"].shape == batch["targets"].shape == (4, 6)
    assert (batch["inputs"][:, -1] == 1).all() and (batch["targets"][:, -1] == 1).all()
    np.testing.assert_array_equal(np.sort(batch["inputs"], axis=1), np.sort(batch["targets"], axis=1))
    assert (batch["inputs"] != batch["targets"]).any()


def test_the_task(run):
    run("add_task.md")
    (task,) = tasks.find(TaskSettings(names="sum"), DataSettings())
    train, held_out = set(task.examples("train")), set(task.examples("validation"))
    assert len(train) + len(held_out) == 900 and not train & held_out
    assert metrics.METRICS["within_one"](["4", "7", "x"], [("5",), ("5",), ("5",)]) == pytest.approx(100 / 3)
