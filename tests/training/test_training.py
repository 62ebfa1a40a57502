"""The training step: what it minimises, and what must not change it."""

import dataclasses
import functools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from test_transformer import DATA, MODEL, MOE, apply, example

from switchmoe.model import output_loss
from switchmoe.settings import from_config
from switchmoe.training import objective, optimizers, train_state, train_step


def settings(model=None, moe=None, train=None, mesh=None, data=None, optimizer=None):
    groups = {
        "model": MODEL | (model or {}),
        "moe": MOE | {"group_size": 12} | (moe or {}),
        "data": DATA | {"batch_size": 8} | (data or {}),
        "optimizer": {"schedule": "constant", "learning_rate": 0.05} | (optimizer or {}),
        "train": train or {},
        "mesh": mesh or {},
    }
    return from_config(groups)


def batch(size=8, pad=True):
    inputs, targets = example(size, 12, 6)
    if pad:
        inputs, targets = inputs.at[1, 5:].set(0), targets.at[2, 2:].set(0)
    return {"inputs": inputs, "targets": targets}


def optimizer(s):
    return optimizers.create(s.optimizer, 10, train_state.axis_names(s))


def first_state(s):
    """Compiled once for all settings that begin alike."""
    moe = MOE | {"num_experts": s.moe.num_experts}
    optimizer = {"name": s.optimizer.name}
    return _first_state(
        from_config(dict(model=s.model.__dict__, moe=moe, data=DATA, optimizer=optimizer)), s.train.seed
    )


@functools.cache
def _first_state(s, seed):
    s = dataclasses.replace(s, train=dataclasses.replace(s.train, seed=seed))
    return jax.jit(lambda: train_state.init_state(s, optimizer(s)))()


evaluated = jax.jit(train_step.eval_step, static_argnums=2)


@functools.cache
def compiled_step(s):
    return jax.jit(functools.partial(train_step.train_step, settings=s, tx=optimizer(s)))


def after(s, steps, data):
    state = first_state(s)
    for _ in range(steps):
        state, metrics = compiled_step(s)(state, data)
    return state, metrics


def assert_close(a, b, rtol=1e-4, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def test_loss_is_cross_entropy_plus_the_sum_over_layers():
    """alpha and the z weight are per layer and the layers are summed, not averaged."""
    s = settings(
        dict(num_layers=4), dict(balance_loss_weight=0.1, z_loss_weight=0.2), dict(output_z_loss_weight=0.3)
    )
    _, metrics = after(s, 1, batch())
    assert len(metrics["layer_balance_loss"]) == 4
    for name in ("balance_loss", "z_loss"):
        assert metrics[name] == pytest.approx(float(metrics[f"layer_{name}"].sum()), rel=1e-5)
    auxiliary = 0.1 * metrics["balance_loss"] + 0.2 * metrics["z_loss"] + 0.3 * metrics["output_z_loss"]
    assert metrics["loss"] == pytest.approx(float(metrics["cross_entropy"] + auxiliary), rel=1e-5)
    assert metrics["balance_loss"] > 3.5  # four layers, about 1 each


def test_cross_entropy_is_the_mean_over_real_targets():
    s, data = settings(), batch()
    params = first_state(s).params
    sums, counts = evaluated(params, data, s)
    logits, _ = apply(s, {"params": params}, data["inputs"], data["targets"])
    nll, _ = output_loss.cross_entropy(logits, data["targets"])
    real = data["targets"] != 0
    expected = float(nll[real].mean())
    assert objective.summarize(sums, counts, s)["cross_entropy"] == pytest.approx(expected, rel=1e-5)
    assert expected == pytest.approx(math.log(512), abs=2)


def test_label_smoothing_is_minimised_and_not_told():
    moe = dict(jitter=0.0, capacity_factor=8.0, eval_capacity_factor=8.0, balance_loss_weight=0.0)
    s = settings(
        dict(dropout_rate=0.0),
        moe | dict(z_loss_weight=0.0),
        dict(label_smoothing=0.1, output_z_loss_weight=0.0),
    )
    data, params = batch(), first_state(s).params
    held_out = objective.summarize(*evaluated(params, data, s), s)
    _, training = after(s, 1, data)
    assert training["cross_entropy"] == pytest.approx(float(held_out["cross_entropy"]), rel=1e-5)
    logits, _ = apply(s, {"params": params}, data["inputs"], data["targets"])
    uniform = -jax.nn.log_softmax(logits)[data["targets"] != 0].mean()
    expected = 0.9 * held_out["cross_entropy"] + 0.1 * uniform
    assert training["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_the_gradients_norm_is_of_the_losss_alone():
    """A router_bias is moved by its load; the norm is that of all other gradients, which is what is clipped."""
    free = dict(router="loss_free", balance_loss_weight=0.0)
    s = settings(moe=free)
    frozen = settings(moe=free, train=dict(trainable="^(?!.*router_bias)"))
    norms = []
    for one in (s, frozen):
        tx = train_state.optimizer(one)
        state = jax.jit(lambda one=one, tx=tx: train_state.init_state(one, tx))()
        step = jax.jit(functools.partial(train_step.train_step, settings=one, tx=tx))
        norms.append(float(step(state, batch())[1]["grad_norm"]))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_layers_are_listed_encoder_first_in_training_and_evaluation():
    """What a compiled function returns has its dictionaries' entries sorted, the decoder before the encoder."""
    s, data = (
        settings(dict(dropout_rate=0.0), dict(jitter=0.0, capacity_factor=8.0, eval_capacity_factor=8.0)),
        batch(),
    )
    params = first_state(s).params
    _, aux = apply(s, {"params": params}, data["inputs"], data["targets"])
    wanted = jnp.concatenate([aux[stack]["z_loss"] for stack in ("encoder", "decoder")])
    assert abs(float(wanted[0] - wanted[1])) > 1e-2
    evaluation = objective.summarize(*evaluated(params, data, s), s)
    _, metrics = after(s, 1, data)
    for found in (evaluation, metrics):
        np.testing.assert_allclose(found["layer_z_loss"], wanted, rtol=1e-4)


def test_balance_does_not_cancel_between_layers():
    """Each layer has its own loss: two layers that collapse to different experts count as collapsed."""
    s = settings()
    layer = {"loss": jnp.array([0.0]), "balance_loss": jnp.array([4.0]), "z_loss": jnp.array([0.0])}
    rest = {"nll": jnp.array(0.0), "output_z": jnp.array(0.0), "correct": jnp.array(0.0)}
    sums = rest | {"encoder": layer, "decoder": layer}
    counts = {"encoder": jnp.array(1.0), "decoder": jnp.array(1.0)}
    assert objective.summarize(sums, counts, s)["balance_loss"] == 8.0


def test_accumulation_changes_nothing():
    """Loss, gradients and the updated parameters, with uneven padding; groups here are one sequence."""
    whole, metrics = after(settings(), 1, batch())
    split, split_metrics = after(settings(train=dict(accumulate=4)), 1, batch())
    assert_close(metrics, split_metrics)
    assert_close(whole.params, split.params, atol=1e-4)


def test_accumulation_changes_what_a_microbatch_drops_where_it_holds_no_whole_group():
    """Groups of all 8 sequences: one microbatch of 2 has an own capacity and own statistics."""
    moe = dict(group_size=96, capacity_factor=1.0)
    _, whole = after(settings(moe=moe), 1, batch())
    _, split = after(settings(moe=moe, train=dict(accumulate=4)), 1, batch())
    dropped, dropped_split = (metrics["layer_fraction_dropped"] for metrics in (whole, split))
    assert float(jnp.abs(dropped - dropped_split).max()) > 1e-3
    assert abs(float(whole["balance_loss"] - split["balance_loss"])) > 1e-3


@pytest.mark.long
def test_compile_time_does_not_grow_with_depth():
    """12 layers within 1.3 times 4 layers, in processor seconds."""

    def compile_seconds(layers):
        s = settings(dict(num_layers=layers, dropout_rate=0.11))  # no other test's: not in their cache
        state = jax.eval_shape(lambda: train_state.init_state(s, optimizer(s)))
        step = jax.jit(functools.partial(train_step.train_step, settings=s, tx=optimizer(s)))
        started = time.process_time()
        step.lower(state, batch()).compile()
        return time.process_time() - started

    _, deep, shallow = (compile_seconds(layers) for layers in (2, 12, 4))  # the first warms up
    assert deep < 1.3 * shallow


def test_padding_appended_to_the_batch_changes_no_metric():
    s = settings()
    data = batch()
    wider = {
        "inputs": jnp.pad(data["inputs"], ((0, 0), (0, 5))),
        "targets": jnp.pad(data["targets"], ((0, 0), (0, 4))),
    }
    params = first_state(s).params
    roomy = settings(moe=dict(eval_capacity_factor=4.0))
    plain = objective.summarize(*evaluated(params, data, roomy), roomy)
    padded = objective.summarize(*evaluated(params, wider, roomy), roomy)
    assert_close(plain, padded)


def test_same_seed_same_run_and_another_seed_another():
    data = batch()
    moe = dict(jitter=0.1)
    first, _ = after(settings(moe=moe), 2, data)
    again, _ = after(settings(moe=moe), 2, data)
    other, _ = after(settings(moe=moe, train=dict(seed=1)), 2, data)
    assert_close(first.params, again.params, rtol=0, atol=0)
    assert float(jnp.abs(first.params["embedding"] - other.params["embedding"]).max()) > 0.1


@pytest.mark.parametrize("optimizer_name", ["adafactor", "adamw"])
def test_it_learns_one_batch(optimizer_name):
    s = from_config(
        {
            "model": MODEL | {"d_model": 32, "d_ff": 64},
            "moe": MOE | {"group_size": 48},
            "data": DATA | {"batch_size": 8},
            "optimizer": {"name": optimizer_name, "schedule": "constant", "learning_rate": 0.03},
        }
    )
    state, first = after(s, 1, batch())
    for _ in range(60):
        state, metrics = compiled_step(s)(state, batch())
    assert float(metrics["cross_entropy"]) < 0.5 * float(first["cross_entropy"])


def overflowing(state):
    """Parameters of which the loss is not finite."""
    return state.replace(params=jax.tree.map(lambda p: p.at[(0,) * p.ndim].set(jnp.inf), state.params))


def test_an_update_that_is_not_finite_is_left_out_and_the_next_is_as_ever():
    skipping = settings(train=dict(skip_nonfinite=1))
    state, data = first_state(skipping), batch()
    broken, metrics = compiled_step(skipping)(overflowing(state), data)
    assert metrics["skipped"] == 1 and not math.isfinite(metrics["grad_norm"]) and broken.step == 1
    kept = jax.tree.map(np.array_equal, broken.replace(step=0), overflowing(state).replace(step=0))
    assert all(jax.tree.leaves(kept))
    state, metrics = after(skipping, 2, data)
    assert metrics["skipped"] == 0
    assert_close(state, after(settings(), 2, data)[0])


def test_skipping_is_not_in_the_program_where_it_is_off_and_copies_no_state_where_it_is_on():
    def step(s):
        function = functools.partial(train_step.train_step, settings=s, tx=optimizer(s))
        return jax.jit(function, donate_argnums=0).lower(first_state(s), batch())

    off, on = step(settings()), step(settings(train=dict(skip_nonfinite=3)))
    assert on.as_text().count("is_finite") == off.as_text().count("is_finite") + 2
    assert "skipped" not in off.out_info[1]
    size = sum(x.nbytes for x in jax.tree.leaves(first_state(settings())))
    off, on = (lowered.compile().memory_analysis() for lowered in (off, on))
    assert on.alias_size_in_bytes >= off.alias_size_in_bytes > 0.99 * size, "the state is updated in place"
    assert on.temp_size_in_bytes < off.temp_size_in_bytes + size / 4


@pytest.mark.long
def test_seeds_share_a_program_whose_key_is_an_argument_and_changes_nothing():
    """Also where the step draws: values are bitwise those of the key as a constant of the program."""
    seeds = [
        settings(moe=dict(jitter=0.1), model=dict(dropout_rate=0.1), train=dict(seed=seed)) for seed in (0, 1)
    ]
    keys = [jax.jit(jax.random.key)(np.uint32(s.train.seed)) for s in seeds]
    first = [jax.jit(functools.partial(train_state.init_state, s, optimizer(s))) for s in seeds]
    assert first[0].lower(keys[0]).as_text() == first[1].lower(keys[1]).as_text()
    state, data = first_state(seeds[1]), batch()
    steps = [jax.jit(functools.partial(train_step.train_step, settings=s, tx=optimizer(s))) for s in seeds]
    texts = [step.lower(state, data, key=key).as_text() for step, key in zip(steps, keys, strict=True)]
    assert texts[0] == texts[1]
    constant, argument = steps[1](state, data), steps[0](state, data, key=keys[1])
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, constant, argument)))
    assert argument[1]["loss"] != steps[0](state, data, key=keys[0])[1]["loss"]


@pytest.mark.parametrize("seed", [0, 7, 2**31 - 1, 2**31, 2**32 - 1])
def test_a_seed_as_an_argument_is_the_same_key(seed):
    key = jax.jit(jax.random.key)(np.uint32(seed))
    assert np.array_equal(jax.random.key_data(key), jax.random.key_data(jax.random.key(seed)))


@pytest.mark.parametrize("name, accumulate", [("adafactor", 1), ("adamw", 2)])
def test_what_is_frozen_stays_and_the_rest_moves_as_if_all_were_trained(name, accumulate):
    """The optimizer sees each matrix for itself, so that what is trained moves as it would with the others."""
    fields = {"train": {"accumulate": accumulate}, "optimizer": {"name": name}}
    whole = settings(**fields)
    part = settings(**(fields | {"train": {"accumulate": accumulate, "trainable": "experts|router"}}))
    after, norms = {}, {}
    for s in (whole, part):
        tx = train_state.optimizer(s)
        state = jax.jit(functools.partial(train_state.init_state, s, tx))()
        before = flatten_dict(state.params, sep="/")
        step = jax.jit(functools.partial(train_step.train_step, settings=s, tx=tx))
        state, metrics = step(state, batch())
        after[s], norms[s] = flatten_dict(state.params, sep="/"), metrics["grad_norm"]
    assert 0 < norms[part] < norms[whole]
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments <= 2 * train_state.trained_count(part)
    for parameter, value in before.items():
        trained = "experts" in parameter or "router" in parameter
        assert np.array_equal(after[part][parameter], value) != trained, parameter
        if trained:
            np.testing.assert_allclose(after[part][parameter], after[whole][parameter], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("moe", [{}, dict(attention=True, num_shared=1, shared_gate=True)], ids=str)
def test_a_parameter_is_of_the_sparse_layers_or_not(moe):
    """Attention's experts and shared experts are of them."""
    names = train_state.parameter_names(settings(moe=moe))
    found = {
        subset: {
            name for name in names if train_state.is_trained(name, settings(train=dict(trainable=subset)))
        }
        for subset in train_state.SUBSETS
    }
    moe_only = {name for name in names if "moe" in name}
    assert found["moe_only"] == moe_only and found["non_moe"] == set(names) - moe_only
    assert found["router"] == {name for name in names if name.endswith("router")}
    assert not found["attention"] & found["ffn"]
    assert found["attention"] | found["ffn"] >= moe_only
    assert len(found["router"]) == 2 * (2 if moe else 1)


def test_parts_of_the_parameters_are_put_together_again():
    s = settings(train={"trainable": "decoder"})
    params = train_state.init_state(s, train_state.optimizer(s)).params
    trained, frozen = train_state.split(params, s)
    assert not jax.tree.leaves(trained["encoder"]) and not jax.tree.leaves(frozen["decoder"])
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, train_state.merge(trained, frozen), params))


def test_a_dense_model_and_its_sparse_twin_begin_with_the_same_parameters_but_for_the_experts():
    """Whatever the number of experts: what has one name and shape is drawn from one key."""

    def parameters(experts):
        s = settings(moe=dict(num_experts=experts, every=1))
        params = jax.jit(lambda: train_state.init_state(s, optimizer(s)))().params
        return {
            jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        }

    dense, sparse = parameters(1), parameters(4)
    shared = dense.keys() & sparse.keys()
    assert shared == {name for name in dense if "['ff']" not in name}
    assert sparse.keys() - shared == {name for name in sparse if "['moe']" in name}
    for name in shared:
        np.testing.assert_array_equal(dense[name], sparse[name], err_msg=name)
