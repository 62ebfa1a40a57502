"""The encoder-decoder: causality, padding, neighbours, depth by scanning, dense twin."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchmoe.model.transformer import Transformer, example_tokens, sparse_layer_names, unstacked
from switchmoe.routing import NOT_CAUSAL, ROUTERS
from switchmoe.settings import from_config
from switchmoe.training import train_state

MODEL = dict(d_model=16, d_ff=32, d_kv=8, num_heads=2, num_layers=2, dtype="float32", init_scale=1.0)
MOE = dict(num_experts=4, group_size=64, eval_capacity_factor=1.0, jitter=0.0)
DATA = dict(vocab_size=300, batch_size=4, input_length=12)


def tiny(model=None, moe=None, **groups):
    return from_config({"model": MODEL | (model or {}), "moe": MOE | (moe or {}), "data": DATA} | groups)


# What today's decoder-only mixtures have; the heads of keys and values as many as there are devices in tests of layouts.
ALONE = dict(
    stacks="decoder_only", positions="rotary", qk_norm="head", attention_scale=0.0, activation="swiglu"
)


def packed(batch=4, length=12, seed=0):
    """Rows of two documents, the second of which begins elsewhere in each row; the last row ends with padding."""
    targets = np.random.default_rng(seed).integers(2, 300, (batch, length))
    place = np.broadcast_to(np.arange(length), targets.shape)
    cut = 3 + np.arange(batch)[:, None] % 5
    targets[-1, -2:] = 0
    arrays = targets, 1 + (place >= cut), np.where(place < cut, place, place - cut)
    return dict(zip(("targets", "segments", "positions"), map(jnp.array, arrays), strict=True))


def alone(model=None, moe=None):
    return tiny(ALONE | (model or {}), moe, data=DATA | dict(objective="causal_lm"))


def example(batch=4, inputs=12, targets=6, seed=0):
    rng = np.random.default_rng(seed)
    return (
        jnp.array(rng.integers(2, 300, (batch, inputs))),
        jnp.array(rng.integers(2, 300, (batch, targets))),
    )


@functools.cache
def init(settings):
    tokens = example_tokens(settings)
    initialize = jax.jit(lambda: nn.unbox(Transformer(settings).init(jax.random.key(0), *tokens)))
    return {"params": initialize()["params"]}


@functools.partial(jax.jit, static_argnums=0)
def apply(settings, variables, *batch):
    return Transformer(settings).apply(variables, *batch)


@pytest.mark.parametrize("experts", [1, 4])
def test_decoder_is_causal(experts):
    """No later target changes an earlier logit, even when experts are full (factor 1)."""
    settings = tiny(moe=dict(num_experts=experts))
    variables, (inputs, targets) = init(settings), example()
    logits, _ = apply(settings, variables, inputs, targets)
    changed, _ = apply(settings, variables, inputs, targets.at[:, 3:].set(7))
    np.testing.assert_array_equal(logits[:, :4], changed[:, :4])  # position 3 reads targets 0 to 2
    assert float(jnp.abs(logits[:, 4:] - changed[:, 4:]).max()) > 1e-3


def test_evaluation_does_not_depend_on_the_neighbours():
    settings = tiny()
    variables, (inputs, targets) = init(settings), example()
    together, _ = apply(settings, variables, inputs, targets)
    alone, _ = apply(settings, variables, inputs[1:2], targets[1:2])
    np.testing.assert_allclose(together[1], alone[0], rtol=1e-5, atol=1e-5)


def test_training_groups_of_several_sequences_do():
    """What `group_shape` says: sequences of a training group compete for slots."""
    settings = tiny(moe=dict(capacity_factor=0.5))
    variables, (inputs, targets) = init(settings), example()
    model = Transformer(settings, train=True)
    apply_train = jax.jit(lambda i, t: model.apply(variables, i, t, rngs={"router": jax.random.key(0)})[0])
    changed = apply_train(inputs.at[0].set(9), targets)
    assert float(jnp.abs(apply_train(inputs, targets)[3] - changed[3]).max()) > 1e-4


def test_appended_padding_changes_no_logit_and_no_statistic():
    settings = tiny(moe=dict(eval_capacity_factor=4.0))
    variables, (inputs, targets) = init(settings), example()
    logits, aux = apply(settings, variables, inputs, targets)
    padded_logits, padded = apply(
        settings, variables, jnp.pad(inputs, ((0, 0), (0, 5))), jnp.pad(targets, ((0, 0), (0, 3)))
    )
    np.testing.assert_allclose(logits, padded_logits[:, :6], rtol=1e-4, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), aux, padded)


@pytest.mark.parametrize("unroll", [1, 2])
def test_remat_and_unrolling_change_nothing(unroll):
    variables, batch = init(tiny(dict(num_layers=4))), example()
    logits, _ = apply(tiny(dict(num_layers=4)), variables, *batch)
    other, _ = apply(tiny(dict(num_layers=4, remat=True, scan_unroll=unroll)), variables, *batch)
    np.testing.assert_allclose(logits, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make, remat", [(tiny, False), (tiny, True), (alone, True)])
def test_a_loop_over_blocks_is_the_scan(make, remat):
    """With the scan's parameters, a slice for each super-block, logits, aux and gradients are its own."""
    settings = make(dict(num_layers=4))
    loop = make(dict(num_layers=4, scan=False, remat=remat))
    params = init(settings)["params"]
    batch = (None, *packed().values()) if make is alone else example()

    def own(params: dict) -> dict:
        """The loop's parameters, from the scan's."""
        return unstacked(settings, params)[1]

    shapes = jax.eval_shape(Transformer(loop).init, jax.random.key(0), *example_tokens(loop))["params"]
    assert jax.tree.structure(own(params)) == jax.tree.structure(nn.unbox(shapes))

    def value(model: Transformer, params: dict) -> tuple:
        logits, aux = model.apply({"params": params}, *batch)
        return (logits**2).sum(), aux

    both = [
        jax.jit(jax.value_and_grad(functools.partial(value, Transformer(of)), has_aux=True))(given)
        for of, given in ((settings, params), (loop, own(params)))
    ]
    (scanned, scanned_gradient), (looped, looped_gradient) = both
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, scanned, looped)
    jax.tree.map(close, own(scanned_gradient), looped_gradient)


def test_dense_twin_has_no_router():
    settings = tiny(moe=dict(num_experts=1))
    variables = init(settings)
    names = {key.key for path, _ in jax.tree_util.tree_leaves_with_path(variables) for key in path}
    assert not names & {"router", "moe", "experts"}
    _, aux = apply(settings, variables, *example())
    assert aux == {"encoder": {}, "decoder": {}}
    assert sparse_layer_names(settings) == []


def test_layer_names_follow_the_layer_axis():
    settings = tiny(dict(num_layers=4))
    assert sparse_layer_names(settings) == ["encoder/1", "encoder/3", "decoder/1", "decoder/3"]
    _, aux = apply(settings, init(settings), *example())
    assert aux["encoder"]["expert_load"].shape == (2, 4)


def test_untied_embeddings_have_their_own_output():
    tied, untied = init(tiny()), init(tiny(dict(tie_embeddings=False)))
    assert untied["params"]["output"].shape == untied["params"]["embedding"].shape
    assert "output" not in tied["params"]


def test_tied_logits_are_scaled():
    """At initialisation the logits of a tied model are of order 1, not of order sqrt(d_model)."""
    settings = tiny()
    logits, _ = apply(settings, init(settings), *example())
    assert 0.3 < float(logits.std()) < 3


def test_bf16_model_gives_float32_logits_and_parameters():
    settings = tiny(dict(dtype="bfloat16"))
    variables = init(settings)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    logits, aux = apply(settings, variables, *example())
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(aux)} == {jnp.dtype("float32")}


def test_expert_kernels_of_a_scanned_stack_keep_their_fan_in():
    params = init(tiny(dict(d_model=64, num_heads=4, num_layers=4), dict(num_experts=32)))["params"]
    wi = params["encoder"]["blocks"]["block_1"]["moe"]["experts"]["wi"]
    assert wi.shape == (2, 32, 64, 32)
    assert float(wi.std()) == pytest.approx(64**-0.5, rel=0.05)


def test_depth_adds_no_code():
    """The traced training step of 12 layers is as long as that of 4: layers are scanned."""

    def size(layers):
        settings = tiny(dict(num_layers=layers))
        shapes = jax.eval_shape(lambda: init(settings))
        return len(
            str(jax.make_jaxpr(lambda v: Transformer(settings).apply(v, *example()))(shapes)).splitlines()
        )

    assert size(12) == size(4)


def test_parameter_counts_by_hand():
    settings = tiny()
    attention, expert, norm = 4 * 16 * 2 * 8, 3 * 16 * 32, 16
    router = 16 * 4
    encoder = 2 * attention + expert + 4 * expert + router + 5 * norm
    decoder = 4 * attention + expert + 4 * expert + router + 7 * norm
    total = encoder + decoder + 2 * 2 * 32 + 512 * 16
    assert train_state.parameter_counts(settings) == (total, total - 2 * 3 * expert)


@pytest.mark.parametrize("router", [name for name in ROUTERS if name not in NOT_CAUSAL])
@pytest.mark.parametrize("positions", ["rotary", "relative"])
def test_a_document_is_the_same_alone_in_its_row(router, positions):
    """No attention across documents and, at evaluation, no experts' slots: whatever comes before or after."""
    if positions == "relative" and router != "switch":
        pytest.skip("positions are no router's business")
    moe = dict(router=router, eval_capacity_factor=0.25)
    moe |= {"noisy_top_k": dict(choices=2), "hierarchical": dict(branches=2)}.get(router, {})
    settings, batch = alone(dict(positions=positions), moe), packed()
    variables = init(settings)
    logits, _ = apply(settings, variables, None, *batch.values())
    second = batch["segments"] == 2
    changed = batch | {"targets": jnp.where(second, batch["targets"], 7)}
    others, _ = apply(settings, variables, None, *changed.values())
    np.testing.assert_allclose(logits[second], others[second], rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(logits[~second] - others[~second]).max()) > 1e-2
    row = {
        name: jnp.roll(value[:1], -3, axis=1) for name, value in batch.items()
    }  # its second document first
    row["targets"] = row["targets"].at[:, 9:].set(0)
    moved, _ = apply(settings, variables, None, *row.values())
    np.testing.assert_allclose(logits[0, 3:], moved[0, :9], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dispatch", ["einsum", "gather", "ragged"])
def test_a_decoder_alone_is_causal_and_the_same_with_every_back_end(dispatch):
    """In training, with too few slots: no later token changes an earlier logit."""
    settings = alone(moe=dict(dispatch=dispatch, capacity_factor=0.5, group_size=12))
    variables, batch = init(settings), packed()

    @jax.jit
    def run(batch, dispatched=settings):
        model = Transformer(dispatched, train=True)
        arrays = (batch[name] for name in ("targets", "segments", "positions"))  # jit sorts a dictionary
        return model.apply(variables, None, *arrays, rngs={"router": jax.random.key(0)})[0]

    logits = run(batch)
    changed = run(batch | {"targets": batch["targets"].at[:, 8:].set(7)})
    np.testing.assert_allclose(
        logits[:, :9], changed[:, :9], rtol=1e-5, atol=1e-5
    )  # position 9 reads target 8
    assert float(jnp.abs(logits[:, 9:] - changed[:, 9:]).max()) > 1e-3
    plain = alone(moe=dict(dispatch="einsum", capacity_factor=0.5, group_size=12))
    np.testing.assert_allclose(logits, run.__wrapped__(batch, plain), rtol=1e-4, atol=1e-4)


def test_which_blocks_are_sparse():
    def names(layers=4, model=None, **moe):
        return sparse_layer_names(tiny(dict(num_layers=layers) | (model or {}), moe))

    assert names(every=4, offset=1) == ["encoder/1", "decoder/1"]  # Hugging Face's i % step == 1
    assert names(every=1) == [f"{stack}/{n}" for stack in ("encoder", "decoder") for n in range(4)]
    assert names(decoder_every=4) == ["encoder/1", "encoder/3", "decoder/3"]
    assert names(decoder_every=4, decoder_offset=0) == ["encoder/1", "encoder/3", "decoder/0"]
    assert names(every=0, decoder_every=2) == ["decoder/1", "decoder/3"]
    assert names(every=0) == []
    assert names(model=dict(num_decoder_layers=2)) == ["encoder/1", "encoder/3", "decoder/1"]
    assert sparse_layer_names(alone(dict(num_layers=4), dict(offset=0))) == ["decoder/0", "decoder/2"]
    for bad, message in (
        (dict(every=3), "moe.every=3: accepted is a divisor of model.num_layers=4"),
        (dict(decoder_every=3), "moe.decoder_every=3: accepted is a divisor of model.num_layers=4"),
        (dict(offset=2), "moe.offset=2: accepted is an integer from -2 to 1"),
        (dict(every=0, offset=1), "moe.offset=1: accepted is an integer from"),
    ):
        with pytest.raises(ValueError, match=message):
            names(**bad)


def test_stacks_and_objectives_go_together():
    for make, objective, message in (
        (tiny, "causal_lm", "accepted is span_corruption, prefix_lm with encoder_decoder"),
        (alone, "prefix_lm", "accepted is causal_lm with decoder_only"),
    ):
        with pytest.raises(ValueError, match=f"data.objective={objective}: {message}"):
            make().__class__(
                **{field: getattr(make(), field) for field in ("model", "moe")}
                | {"data": dataclasses.replace(make().data, objective=objective)}
            )
