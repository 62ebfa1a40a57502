"""A dense model made sparse gives what it gave, and its optimizer goes on."""

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
from switchmoe.settings import from_config
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


def reader(params):
    return flatten_dict({"params": jax.device_get(params)}, sep="/").__getitem__


def sparse(settings, params, **how):
    how = upcycling.Upcycling(**({"experts": 4, "every": 2} | how))
    new = upcycling.settings_of(settings, how)
    return new, upcycling.parameters(settings, new, how, reader(params))


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

    def read(path):
        leaves = jax.tree_util.tree_leaves_with_path(state)
        found = {"opt_state/" + "/".join(upcycling.path_keys(keys)): leaf for keys, leaf in leaves}
        return np.asarray(found[path])

    how = upcycling.Upcycling(experts=4)
    after = upcycling.optimizer_state(settings, new, made, read)
    copied = upcycling.parameters(settings, new, how, reader(grads))
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


def test_a_run_goes_on_with_the_optimizers_state(tmp_path):
    """`init.optimizer`: with the moments, and the place in the schedule; refused where there is none."""
    import orbax.checkpoint as ocp

    from switchmoe.runs import start
    from switchmoe.settings import to_dict
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
