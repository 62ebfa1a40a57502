"""A dense model made sparse gives what it gave, and its optimizer goes on."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from test_convert import T5, make

from experiments import convert as command
from experiments import exits
from switchmoe.model.transformer import Transformer
from switchmoe.runs import trained, upcycling
from switchmoe.settings import from_config, to_dict
from switchmoe.training import train_state
from switchmoe.training.train_state import TrainState

MODEL = dict(d_model=16, d_ff=24, d_kv=4, num_heads=2, num_layers=4, dtype="float32", init_scale=1.0)
DENSE = dict(
    model=MODEL, moe=dict(num_experts=1, jitter=0.0), data=dict(vocab_size=400, input_length=12, batch_size=4)
)
ALONE = DENSE | {
    "model": MODEL | dict(stacks="decoder_only"),
    "data": DENSE["data"] | dict(objective="causal_lm"),
}


def dense(config):
    settings = from_config(config)
    return settings, train_state.init_state(settings, train_state.optimizer(settings)).params


def saved(state):
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state))
    found = {"/".join(upcycling.path_keys(keys)): np.asarray(leaf) for keys, leaf in leaves}
    return upcycling.Saved(lambda name: found[name].shape, lambda name, index: found[name][index])


def sparse(settings, params, **how):
    how = upcycling.Upcycling(**({"experts": 4, "every": 2} | how))
    new = upcycling.settings_of(settings, how)
    return new, upcycling.Plan(settings, new, how, saved({"params": params})).parameters()


def loss(settings, params, train=False):
    rng = np.random.default_rng(0)
    batch = {"targets": jnp.asarray(rng.integers(2, 500, (4, 12)), jnp.int32)}
    if "encoder" in settings.stacks:
        batch["inputs"] = jnp.asarray(rng.integers(2, 500, (4, 12)), jnp.int32).at[1, 7:].set(0)
    rngs = {"router": jax.random.key(0), "dropout": jax.random.key(1)}
    (loss_BL, *_), _ = Transformer(settings, train).apply(
        {"params": params}, batch, method="token_losses", rngs=rngs
    )
    return float(jnp.mean(loss_BL))


def roomy(config):
    """With slots for every token."""
    return config | {"moe": config["moe"] | dict(capacity_factor=8.0, eval_capacity_factor=8.0)}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    "config, router",
    [(DENSE, "switch"), (DENSE, "top_k"), (DENSE, "expert_choice"), (ALONE, "switch"), (ALONE, "top_k")],
)
def test_the_first_loss_is_the_dense_models(config, router, train):
    """With one copy each and slots enough: top-1 with its gate divided out, two renormalised, expert choice."""
    settings, params = dense(roomy(config))
    new, made = sparse(settings, params, router=router)
    assert new.sparse and loss(new, made, train) == pytest.approx(loss(settings, params, train), abs=1e-5)


def test_gates_that_sum_to_one_in_value_keep_the_gradient_of_the_router():
    settings, params = dense(roomy(ALONE))
    new, made = sparse(settings, params, router="switch", noise=0.1)
    batch = {"targets": jnp.asarray(np.random.default_rng(0).integers(2, 500, (4, 12)), jnp.int32)}

    def total(params):
        (loss_BL, *_), _ = Transformer(new).apply({"params": params}, batch, method="token_losses")
        return jnp.mean(loss_BL)

    grads = flatten_dict(jax.grad(total)(made), sep="/")
    assert np.abs(grads["decoder/blocks/block_1/moe/router"]).max() > 0


def test_experts_are_copies_noise_and_parts_drawn_anew_make_them_differ():
    settings, params = dense(ALONE)
    flat = flatten_dict(params, sep="/")
    where = "decoder/blocks/block_1/moe/experts"
    _, copies = sparse(settings, params)
    copies = flatten_dict(copies, sep="/")
    for expert in range(4):
        for name in ("wi", "wi_gate", "wo"):
            wanted = flat[f"decoder/blocks/block_0/ff/{name}"][jnp.array([1, 3])]
            np.testing.assert_array_equal(copies[f"{where}/{name}"][:, expert], wanted)
    np.testing.assert_array_equal(
        copies["decoder/blocks/block_0/self/query"],
        flat["decoder/blocks/block_0/self/query"][jnp.array([0, 2])],
    )
    drawn = flatten_dict(sparse(settings, params, reinit=0.5)[1], sep="/")
    same = {name: drawn[f"{where}/{name}"] == copies[f"{where}/{name}"] for name in ("wi", "wi_gate", "wo")}
    kept = same["wi"].all(axis=2)  # [layers, experts, width]
    assert (kept.sum(axis=-1) == 12).all() and len({tuple(row) for row in kept.reshape(-1, 24)}) > 4
    np.testing.assert_array_equal(same["wi_gate"].all(axis=2), kept)
    np.testing.assert_array_equal(same["wo"].all(axis=3), kept)
    noisy = (
        flatten_dict(sparse(settings, params, noise=0.1)[1], sep="/")[f"{where}/wo"] - copies[f"{where}/wo"]
    )
    assert noisy.std() == pytest.approx(0.1 * copies[f"{where}/wo"].std(), rel=0.1)
    assert np.abs(noisy[:, 0] - noisy[:, 1]).max() > 0


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_an_experts_state_of_the_optimizer_is_the_feed_forwards(name, tmp_path):
    """An update with it, from the same gradient, is the dense model's."""
    config = ALONE | {
        "optimizer": dict(name=name, momentum=0.9 if name == "adafactor" else 0.0, learning_rate=0.1)
    }
    settings, params = dense(config)
    tx = train_state.optimizer(settings)
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), jnp.float32), params)
    _, state = tx.update(grads, tx.init(params), params)
    new, made = sparse(settings, params)
    plan = upcycling.Plan(
        settings, new, upcycling.Upcycling(experts=4), saved({"params": grads, "opt_state": state})
    )
    after, copied = plan.optimizer_state(), plan.parameters()
    wanted, _ = tx.update(grads, state, params)
    update, _ = train_state.optimizer(new).update(copied, after, made)
    update, wanted = flatten_dict(update, sep="/"), flatten_dict(wanted, sep="/")
    for expert in range(4):
        found = update["decoder/blocks/block_1/moe/experts/wo"][:, expert]
        np.testing.assert_allclose(
            found, wanted["decoder/blocks/block_0/ff/wo"][jnp.array([1, 3])], rtol=1e-5
        )
    np.testing.assert_allclose(update["embedding"], wanted["embedding"], rtol=1e-5)


def test_a_converted_t5_becomes_sparse_and_a_sparse_model_is_refused(tmp_path, capsys):
    make(tmp_path / "theirs", T5)
    asked = [f"--source={tmp_path / 'theirs'}", f"--target={tmp_path / 'sparse'}", "--upcycle.experts=4"]
    assert command.main(["convert", *asked]) == 0
    told = capsys.readouterr()
    assert "without an optimizer's state" in told.err
    source = trained.find(str(tmp_path / "sparse"))
    params = trained.on_one_device(source, source.settings)
    assert params["decoder"]["blocks"]["block_1"]["moe"]["experts"]["wo"].shape == (2, 4, 24, 16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sparse", "theirs"]
    again = [f"--source={tmp_path / 'sparse'}", f"--target={tmp_path / 'more'}", "--upcycle.experts=4"]
    assert command.main(["convert", *again]) == exits.EXIT_BAD_INPUT
    assert "accepted is a dense model" in capsys.readouterr().err and not (tmp_path / "more").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_made_sparse_keeps_its_sources_type(dtype, tmp_path):
    make(tmp_path / "theirs", T5, dtype)
    asked = [f"--source={tmp_path / 'theirs'}", f"--target={tmp_path / 'sparse'}", "--upcycle.experts=2"]
    assert command.main(["convert", *asked]) == 0
    assert trained.dtype(trained.find(str(tmp_path / "sparse"))) == dtype


def test_experts_in_attention_have_no_dense_model_to_be_copies_of():
    settings = from_config(DENSE | {"moe": DENSE["moe"] | {"attention": True}})
    with pytest.raises(ValueError, match="moe.attention=True: accepted to upcycle is False"):
        upcycling.settings_of(settings, upcycling.Upcycling(experts=4))


@pytest.mark.parametrize(
    "option, accepted",
    [
        ("experts=1", "an integer >= 2"),
        ("every=0", "an integer >= 1"),
        ("every=3", "a divisor"),
        ("router=soft", "one of switch, top_k, expert_choice"),
        ("noise=-1", "a number >= 0"),
        ("reinit=2", "a number from 0 to 1"),
    ],
)
def test_a_wrong_option_is_one_line_and_leaves_nothing(tmp_path, option, accepted, capsys):
    make(tmp_path / "theirs", T5)
    asked = [f"--source={tmp_path / 'theirs'}", f"--target={tmp_path / 'sparse'}", "--upcycle.experts=4"]
    assert command.main(["convert", *asked, f"--upcycle.{option}"]) == exits.EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert accepted in error and error.count("\n") == 1
    assert not (tmp_path / "sparse").exists()


def dense_run(directory, optimizer):
    """A run's directory of one step; returns its settings and the state."""
    import orbax.checkpoint as ocp

    settings, params = dense(ALONE | {"optimizer": dict(name=optimizer, learning_rate=0.1)})
    tx = train_state.optimizer(settings)
    state = TrainState(jnp.int32(3), params, tx.update(params, tx.init(params), params)[1])
    place = directory / "checkpoints" / "3"
    ocp.Checkpointer(ocp.StandardCheckpointHandler()).save(place / "state", args=ocp.args.StandardSave(state))
    (place / "data").mkdir()
    (directory / "config.json").write_text(json.dumps(to_dict(settings)))
    return settings, state


@pytest.mark.parametrize("asked", ["True", "False"])
def test_the_optimizers_state_is_copied_or_left_by_the_command(asked, tmp_path, capsys):
    """Adafactor's, with its factored moments."""
    from switchmoe.interop import run_files

    settings, state = dense_run(tmp_path / "dense", "adafactor")
    given = [f"--source={tmp_path / 'dense'}", f"--target={tmp_path / 'sparse'}", "--upcycle.experts=4"]
    assert command.main(["convert", *given, f"--upcycle.optimizer={asked}"]) == 0
    assert ("the optimizer's state" in capsys.readouterr().err) == (asked == "True")
    there = [path.name for path in (tmp_path / "sparse/checkpoints/0/state").glob("opt_state.*")]
    if asked == "False":
        assert not there
        return
    source = trained.find(str(tmp_path / "sparse"))
    held = saved({"params": state.params, "opt_state": state.opt_state})
    wanted = upcycling.Plan(settings, source.settings, upcycling.Upcycling(experts=4), held).optimizer_state()
    reader, leaves = run_files.Reader(source.step), jax.tree_util.tree_leaves_with_path(wanted)
    assert len(there) == len(leaves)
    for keys, leaf in leaves:
        name = "/".join(("opt_state", *upcycling.path_keys(keys)))
        np.testing.assert_array_equal(reader.read(name, ()), leaf, err_msg=name)


def test_a_run_becomes_sparse_part_by_part_and_goes_on_after_a_stop(tmp_path, capsys, monkeypatch):
    """Its parameters and its optimizer's state are those that are made in memory, and a run begins with them."""
    from switchmoe.interop import run_files
    from switchmoe.runs import start

    settings, state = dense_run(tmp_path / "dense", "adamw")
    params = state.params
    asked = [f"--source={tmp_path / 'dense'}", f"--target={tmp_path / 'sparse'}", "--upcycle.experts=4"]
    write, written = run_files.Writer.write, []

    def stopped(writer, name, index, part):
        if len(written) == 9:
            raise KeyboardInterrupt
        written.append(part.nbytes)
        write(writer, name, index, part)

    monkeypatch.setattr(run_files.Writer, "write", stopped)
    assert command.main(["convert", *asked]) == exits.EXIT_INTERRUPTED
    monkeypatch.setattr(
        run_files.Writer, "write", lambda *args: written.append(args[3].nbytes) or write(*args)
    )
    assert command.main(["convert", *asked]) == 0
    told = capsys.readouterr()
    assert "with the optimizer's state" in told.err and "were there" in told.out
    source = trained.find(str(tmp_path / "sparse"))
    how = upcycling.Upcycling(experts=4)
    plan = upcycling.Plan(
        settings, source.settings, how, saved({"params": params, "opt_state": state.opt_state})
    )
    whole, made = plan.parameters(), plan.optimizer_state()
    assert sum(written) == sum(leaf.nbytes for leaf in jax.tree.leaves((whole, made))) + 4  # and the step
    layer = 4 * 24 * 16 * 4  # bytes of a kernel of its experts
    assert layer in written and 2 * layer not in written

    class Context:
        begun, note = False, staticmethod(print)
        init = {"checkpoint": str(tmp_path / "sparse"), "optimizer": True}
        settings = from_config(to_dict(source.settings) | {"init": init})

    new = train_state.init_state(source.settings, train_state.optimizer(source.settings))
    found = start.beginning(Context).start.load(new)
    for one, other in zip(
        jax.tree.leaves((found.params, found.opt_state)), jax.tree.leaves((whole, made)), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def watched(monkeypatch, act):
    """(stage, name, place) of each part that an upcycling writes; ``act(stage, count)`` comes before it."""
    from switchmoe.interop import run_files

    write, written = run_files.Writer.write, []
    counts = {stage: itertools.count(1) for stage in ("dense", "sparse")}  # two threads write

    def watching(writer, name, index, part):
        stage = "dense" if ".dense" in str(writer._state) else "sparse"
        act(stage, next(counts[stage]))
        written.append((stage, name, index))
        write(writer, name, index, part)

    monkeypatch.setattr(run_files.Writer, "write", watching)
    return written


@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_upcycling_anothers_model_goes_on_after_a_stop_in_either_stage(stage, tmp_path, monkeypatch):
    """With what it has; the result is that of a command that was never stopped."""
    make(tmp_path / "theirs", T5)
    asked = ["convert", f"--source={tmp_path / 'theirs'}", "--upcycle.experts=4", "--upcycle.noise=0.1"]
    assert command.main([*asked, f"--target={tmp_path / 'never'}"]) == 0

    def stop(at, count):
        if (at, count) == (stage, 5):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        before = watched(patch, stop)
        assert command.main([*asked, f"--target={tmp_path / 'stopped'}"]) == exits.EXIT_INTERRUPTED
    after = watched(monkeypatch, lambda *_: None)
    assert command.main([*asked, f"--target={tmp_path / 'stopped'}"]) == 0
    assert len(before) >= 4 and not set(before) & set(after)
    assert ("dense" in {stage for stage, *_ in after}) == (stage == "dense")
    manifests = [tmp_path / name / "checkpoints" / "0" / "files.json" for name in ("never", "stopped")]
    assert json.loads(manifests[0].read_text()) == json.loads(manifests[1].read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["never", "stopped", "theirs"]
    assert {path.name for path in (tmp_path / "stopped").iterdir()} == {"checkpoints", "config.json"}


@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_a_second_upcycling_to_the_same_place_leaves_the_first_its_files(
    stage, tmp_path, capsys, monkeypatch
):
    make(tmp_path / "theirs", T5)
    asked = [
        "convert",
        f"--source={tmp_path / 'theirs'}",
        f"--target={tmp_path / 'sparse'}",
        "--upcycle.experts=4",
    ]

    def second(at, count):
        if (at, count) == (stage, 3):
            ran.append(at)
            assert command.main(asked) == exits.EXIT_BAD_INPUT
            assert "a conversion is under way there" in capsys.readouterr().err

    ran, written = [], watched(monkeypatch, second)
    assert command.main(asked) == 0 and ran == [stage]
    assert len(set(written)) == len(written)


def test_a_run_goes_on_with_the_optimizers_state(tmp_path):
    """`init.optimizer`: with the moments, and the place in the schedule; refused where there is none."""
    import orbax.checkpoint as ocp

    from switchmoe.runs import start
    from switchmoe.training import optimizers

    settings, params = dense(ALONE)
    tx = train_state.optimizer(settings)
    state = TrainState(jnp.int32(1), params, tx.update(params, tx.init(params), params)[1])
    for step, saved in ((1, state), (2, TrainState(jnp.int32(2), params, {}))):
        place = tmp_path / "checkpoints" / str(step)
        ocp.Checkpointer(ocp.StandardCheckpointHandler()).save(
            place / "state", args=ocp.args.StandardSave(saved)
        )
        (place / "data").mkdir()

    class Context:
        begun, note = False, staticmethod(print)

    fresh = TrainState(jnp.int32(0), params, tx.init(params))
    for step in (1, 2):
        init = {"checkpoint": f"{tmp_path}|{step}", "optimizer": True}
        Context.settings = from_config(to_dict(settings) | {"init": init})
        load = start.beginning(Context).start.load
        if step == 1:
            found = load(fresh)
            assert optimizers.updates(found.opt_state) == 1 and int(found.step) == 0
            for one, other in zip(
                jax.tree.leaves(found.opt_state), jax.tree.leaves(state.opt_state), strict=True
            ):
                np.testing.assert_array_equal(one, other)
        else:
            with pytest.raises(ValueError, match="init.optimizer=True: .* has no state of this optimizer"):
                load(fresh)
