"""Layouts on eight devices: the numbers of one device, the collectives of the theory, the bytes predicted."""

import collections
import dataclasses
import functools
import itertools
import math
import os
import re
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_training import batch as pairs
from test_training import optimizer, settings
from test_transformer import ALONE, packed

from switchmoe.parallel import sharding
from switchmoe.settings import OptimizerSettings
from switchmoe.training import train_state, train_step

REMATERIALIZED = "nvoluntary full rematerialization"
CASES = [(layout, False, "auto") for layout in sharding.LAYOUTS]
CASES += [(layout, True, "auto") for layout in ("data", "data_expert_model")]
CASES += [("data_model", True, "auto"), ("data_expert", True, "auto")]
CASES += [("data_expert", False, "einsum"), ("data_expert_model", False, "ragged")]
FIRST = ("data", False, "auto"), ("data_expert", False, "auto"), ("data_expert_model", True, "auto")
MARKED = [case if case in FIRST else pytest.param(*case, marks=pytest.mark.long) for case in CASES]
KINDS = ["encoder_decoder", "decoder_only"]
CONVERTED = "converted"  # so many slots a sequence, which padding takes too, dense blocks first, tuned with a mask a row


def case(layout="data", fsdp=False, dispatch="auto", kind="encoder_decoder", **mesh):
    """Dropout and jitter on; sizes that divide among eight devices along any axis."""
    model = dict(dropout_rate=0.1, num_heads=8, d_kv=4, num_layers=1)
    data = dict(batch_size=16)
    if kind == "decoder_only":
        model |= ALONE
        data |= dict(objective="causal_lm")
    moe = dict(num_experts=8, every=1, num_shared=1, jitter=0.1, dispatch=dispatch)
    if kind == CONVERTED:
        model |= dict(num_layers=2, shared_dropout=True)
        moe |= dict(dense_first=1, capacity=2, group_size=0, route_padding=True, unit_gates=True)
    mesh = dict(layout=layout, fsdp=fsdp) | mesh
    return settings(model, moe, mesh=mesh, data=data)


def lengths(s):
    return {"encoder": 12, "decoder": 6} if len(s.stacks) == 2 else {"decoder": 12}


def batch(s):
    return packed(16) if s.stacks == ("decoder",) else pairs(16)


def recorded(s):
    """The optimizer, with the last gradient in its state."""
    record = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda updates, *_: (updates, updates)
    )
    return optax.chain(record, optimizer(s))


def three_steps(step, state, data):
    """(state, metrics of the third, gradients of the first)."""
    state, _ = step(state, data)
    slopes = jax.device_get(state.opt_state[0])
    for _ in range(2):
        state, metrics = step(state, data)
    return state, metrics, slopes


def heard(action):
    """(what it returns, what XLA writes to standard error meanwhile)"""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            result = action()
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        file.seek(0)
        return result, file.read().decode(errors="replace")


@functools.cache
def trained(*arguments, **mesh):
    """What `three_steps` gives on the mesh, the compiled step, and what XLA said of it."""
    s = case(*arguments, **mesh)
    state = jax.device_get(first(arguments[3]))
    mesh = sharding.make_mesh(s.mesh)
    sharding.check(s, lengths(s), mesh.shape)
    where = train_state.state_shardings(state, train_state.abstract_variables(s)["params"], s, mesh)
    with jax.set_mesh(mesh), sharding.rules(s):
        state = jax.device_put(state, where)
        data = jax.device_put(batch(s), sharding.batch_sharding(mesh))
        step = functools.partial(train_step.train_step, settings=s, tx=recorded(s))
        step = jax.jit(step, donate_argnums=0, out_shardings=(where, None)).lower(state, data)
        step, said = heard(step.compile)
        return *three_steps(step, state, data), step, said


@functools.cache
def first(kind):
    s = case(kind=kind)
    return jax.jit(lambda: train_state.init_state(s, recorded(s)))()


@functools.cache
def alone(kind):
    """What `three_steps` gives without a mesh."""
    s = case(kind=kind)
    step = jax.jit(functools.partial(train_step.train_step, settings=s, tx=recorded(s)))
    return three_steps(step, first(kind), batch(s))


def assert_close(found, wanted, share):
    """To ``share`` of an array's largest value."""
    for a, b in zip(jax.tree.leaves(jax.device_get(found)), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=share, atol=share * max(float(jnp.abs(b).max()), 1e-6))


def collectives(step):
    kinds = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"
    return re.findall(rf"^.* ((?:{kinds})(?:-start)?)\((.*)$", step.as_text(), re.MULTILINE)


@pytest.mark.parametrize("kind", [*KINDS, pytest.param(CONVERTED, marks=pytest.mark.long)])
@pytest.mark.parametrize("layout, fsdp, dispatch", MARKED)
def test_a_layout_changes_no_number(layout, fsdp, dispatch, kind):
    """float32: gradients to 1e-4, loss to 1e-5, parameters to 1e-4 after three steps."""
    state, metrics, slopes, *_ = trained(layout, fsdp, dispatch, kind)
    wanted, wanted_metrics, wanted_slopes = alone(kind)
    assert_close(slopes, wanted_slopes, 1e-4)
    assert float(metrics["loss"]) == pytest.approx(float(wanted_metrics["loss"]), rel=1e-5)
    assert_close(metrics, wanted_metrics, 1e-4)
    assert_close(state.params, wanted.params, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout, fsdp, dispatch", MARKED)
def test_collectives_are_those_of_the_theory(layout, fsdp, dispatch, kind):
    """One or two stacks with a sparse layer each: 2 all-to-alls forward and 2 backward in each of them.

    What is gathered otherwise: the counts of the ragged back end, and with fsdp parameters, but never those
    of the experts along their own axis.
    """
    *_, step, said = trained(layout, fsdp, dispatch, kind)
    stacks = len(case(kind=kind).stacks)
    found = collections.Counter(kind for kind, _ in collectives(step))
    expert = "expert" in layout
    assert found["all-to-all"] == (4 * stacks if expert else 0)
    assert found["collective-permute"] == 0
    gathers = [line for line in step.as_text().splitlines() if " all-gather" in line]
    sizes = [math.prod(map(int, re.findall(r"\d+", re.search(r"\[([\d,]*)\]", g)[1]))) for g in gathers]
    tokens_D = 16 * 6 * 16  # the smaller of the stacks' activations
    if not fsdp:
        assert all(size < tokens_D for size in sizes), gathers
        assert len(gathers) == stacks * (dispatch == "ragged")
    else:
        assert max(sizes) <= 512 * 16, gathers  # the embedding
        kernels = [g for g in gathers if re.search(r"\[(1,)?8,(16,32|32,16|16,16)\]", g)]
        assert bool(kernels) != expert, kernels
    assert REMATERIALIZED not in said


def test_a_rematerialization_is_heard_where_there_is_one():
    """The check above can fail: no collective turns columns over one axis into rows over it and another."""
    mesh = sharding.make_mesh(case(layout="data_expert_model", data=2, expert=2, model=2).mesh)

    def turn(x):
        for spec in (jax.P(None, "model"), jax.P(("expert", "model"))):
            x = jax.lax.with_sharding_constraint(jnp.sin(x), jax.NamedSharding(mesh, spec))
        return x

    _, said = heard(jax.jit(turn).lower(jax.ShapeDtypeStruct((16, 16), jnp.float32)).compile)
    assert REMATERIALIZED in said


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fsdp", [False, True])
def test_tokens_over_data_while_experts_lie_apart(fsdp, kind):
    """2 x 2 x 2: the numbers of one device, and no more all-to-alls than without the data axis."""
    sizes = dict(data=2, expert=2, model=2)
    state, metrics, slopes, step, said = trained("data_expert_model", fsdp, "auto", kind, **sizes)
    wanted, wanted_metrics, wanted_slopes = alone(kind)
    assert_close(slopes, wanted_slopes, 1e-4)
    assert_close(metrics, wanted_metrics, 1e-4)
    assert_close(state.params, wanted.params, 1e-4)
    found = collections.Counter(kind for kind, _ in collectives(step))
    assert found["all-to-all"] == 4 * len(case(kind=kind).stacks) and found["collective-permute"] == 0
    assert REMATERIALIZED not in said


def bytes_of(tree):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_a_device_are_what_the_layout_predicts(kind):
    """Shares of experts, of widths and of all the rest, in eighths and by hand."""
    of = case(kind=kind)
    boxes = train_state.abstract_variables(of)["params"]
    names = train_state.axis_names(of)
    sizes = jax.tree.map(lambda box: 4 * box.value.size, boxes, is_leaf=lambda x: hasattr(x, "names"))
    flat = list(
        zip(
            jax.tree.leaves(names, is_leaf=lambda n: isinstance(n, tuple)),
            jax.tree.leaves(sizes),
            strict=True,
        )
    )
    wide = {"vocab", "heads", "mlp"}

    def predicted(expert, width, embed=lambda names: 1):
        return sum(
            size
            // (
                (expert if "expert" in n else 1)
                * (width if wide & set(n) else 1)
                * (embed(n) if "embed" in n else 1)
            )
            for n, size in flat
        )

    def on_each(layout, fsdp):
        return bytes_of(trained(layout, fsdp, "auto", kind)[0].params)

    assert on_each("data", False) == predicted(1, 1)
    assert on_each("model", False) == predicted(1, 8)
    assert on_each("data_model", False) == predicted(1, 2)
    assert on_each("data_expert", False) == predicted(8, 1)
    assert on_each("data_expert_model", False) == predicted(4, 2)
    assert on_each("data", True) == predicted(1, 1, lambda n: 8)
    both = predicted(4, 2, lambda n: 1 if "expert" in n else 4)
    assert on_each("data_expert_model", True) == both


@pytest.mark.parametrize("kind", KINDS)
def test_moments_take_twice_the_bytes_of_their_parameters_on_each_device(kind):
    adamw = dataclasses.replace(case(kind=kind), optimizer=OptimizerSettings(name="adamw"))
    state = jax.eval_shape(functools.partial(train_state.init_state, adamw, optimizer(adamw)))
    boxes = train_state.abstract_variables(adamw)["params"]
    for layout, fsdp in itertools.product(sharding.LAYOUTS, (False, True)):
        s = case(layout, fsdp, kind=kind)
        where = train_state.state_shardings(state, boxes, s, sharding.make_mesh(s.mesh))

        def local(part, where=where):
            leaves = jax.tree.leaves(getattr(state, part)), jax.tree.leaves(getattr(where, part))
            return sum(
                4 * math.prod(at.shard_shape(x.shape)) for x, at in zip(*leaves, strict=True) if x.ndim
            )

        assert local("opt_state") == 2 * local("params"), (layout, fsdp)


@pytest.mark.parametrize("kind", KINDS)
def test_adding_a_layout_is_adding_a_table(monkeypatch, kind):
    """Experts over all but two devices, which have half of each width of them and no other width."""
    rules = (*sharding.TOKENS, *sharding.EXPERTS, ("mlp", "model"))
    new = sharding.Layout(rules, {"data": 1, "expert": -1, "model": 2})
    monkeypatch.setitem(sharding.LAYOUTS, "expert_widths", new)
    s = case("expert_widths", kind=kind)
    mesh = sharding.make_mesh(s.mesh)
    sharding.check(s, lengths(s), mesh.shape)
    state = train_state.sharded_state(s, optimizer(s), mesh)
    shapes = {
        jax.tree_util.keystr(path): leaf.sharding.shard_shape(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
    }
    (wi,) = {shape for key, shape in shapes.items() if "'experts'" in key and "'wi'" in key}
    (query,) = {shape for key, shape in shapes.items() if "'query'" in key}
    assert wi == (1, 2, 16, 16) and query == (1, 16, 8, 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "momentum"), [("adafactor", 0.0), ("adafactor", 0.9), ("adamw", 0.0)])
def test_state_lies_where_its_parameter_lies(name, momentum, kind):
    """Moments like the parameter, factors without the axis that they sum over; never across experts."""
    model = dict(d_model=128, d_ff=256, num_heads=4, d_kv=64)
    model, data = (model | ALONE, dict(objective="causal_lm")) if kind == "decoder_only" else (model, {})
    moe, mesh = dict(num_experts=4), dict(layout="data_expert_model", fsdp=True, data=1, expert=2, model=4)
    s = settings(model, moe, mesh=mesh, data=data, optimizer=dict(name=name, momentum=momentum))
    state = jax.eval_shape(functools.partial(train_state.init_state, s, optimizer(s)))
    mesh = sharding.make_mesh(s.mesh)
    where = train_state.state_shardings(state, train_state.abstract_variables(s)["params"], s, mesh)
    specs = {
        jax.tree_util.keystr(path): (leaf.shape, at.shard_shape(leaf.shape))
        for (path, leaf), at in zip(
            jax.tree_util.tree_leaves_with_path(state.opt_state),
            jax.tree.leaves(where.opt_state),
            strict=True,
        )
    }
    of_experts = {key: shapes for key, shapes in specs.items() if "'experts'" in key and "'wi'" in key}
    assert all(local[1] == full[1] // 2 for full, local in of_experts.values())
    found = {local for full, local in of_experts.values() if math.prod(full) > 100}
    moments = {(1, 2, 128, 64)} if name == "adamw" or momentum else set()
    assert found == moments | ({(1, 2, 128), (1, 2, 64)} if name == "adafactor" else set())
    query = {local for key, (full, local) in specs.items() if "'query'" in key and math.prod(full) > 100}
    moments = {(1, 64, 64)} if momentum else set()  # Adafactor's matrix: heads and their width are one axis
    assert query == ({(1, 64, 1, 64)} if name == "adamw" else {(1, 64)} | moments)


def test_axis_sizes_fill_within_a_slice_and_across_slices():
    def sizes(devices, slices=1, **mesh):
        return sharding.axis_sizes(case(**mesh).mesh, devices, slices)

    assert sizes(8) == ((8, 1, 1), (1, 1, 1))
    assert sizes(32, layout="data_model") == ((16, 1, 2), (1, 1, 1))
    assert sizes(32, layout="data_expert_model", expert=4, data=-1) == ((4, 4, 2), (1, 1, 1))
    assert sizes(32, 4, layout="data_expert") == ((1, 8, 1), (4, 1, 1))
    assert sizes(32, 4, layout="data_expert", dcn_expert=2) == ((1, 8, 1), (2, 2, 1))


@pytest.mark.parametrize(
    ("sizes", "slices", "said"),
    [(dict(model=4), 1, "mesh.model=4"), (dict(dcn_data=1, dcn_model=2), 2, "mesh.dcn_model=2")],
)
@pytest.mark.parametrize("layout", ["data", "data_expert"])
def test_devices_along_an_axis_without_a_use_are_refused(layout, sizes, slices, said):
    """Each would do all of the others' work."""
    said += rf": accepted with mesh.layout={layout} is 0 or 1 \(nothing lies along model\)"
    with pytest.raises(ValueError, match=said):
        sharding.axis_sizes(case(layout, **sizes).mesh, 8, slices)
    assert sharding.axis_sizes(case(layout, model=1).mesh, 8)


class Chip:
    """What JAX knows of a TPU's device when it lays out a mesh."""

    platform, core_on_chip = "tpu", 0

    def __init__(self, number, coords, slice_index, kind):
        self.id, self.coords, self.slice_index, self.device_kind = number, coords, slice_index, kind
        self.process_index = number // 4


@pytest.mark.parametrize("layout", ["data_model", "data_expert_model"])
@pytest.mark.parametrize(
    ("kind", "torus", "slices"),
    [
        ("TPU v4", (4, 4, 4), 1),
        ("TPU v5", (4, 4, 4), 1),  # v5p
        ("TPU v6 lite", (4, 4, 1), 1),
        ("TPU v6 lite", (8, 8, 1), 1),
        ("TPU v5 lite", (4, 4, 1), 2),  # v5e
    ],
)
def test_a_mesh_may_divide_an_axis_of_the_torus(kind, torus, slices, layout):
    """Two axes of the mesh on one of the slice, where 2 devices along `model` are half of it."""
    places = [(n, coords) for n in range(slices) for coords in np.ndindex(torus)]
    chips = [Chip(number, coords, n, kind) for number, (n, coords) in enumerate(places)]
    mesh = sharding.make_mesh(case(layout).mesh, chips)
    assert sorted(chip.id for chip in mesh.devices.flat) == list(range(len(chips)))
    assert mesh.shape["model"] == 2 and mesh.size == len(chips)
    assert all(len({chip.slice_index for chip in pair}) == 1 for pair in mesh.devices.reshape(-1, 2))
