"""Decoding from what was kept is teacher forcing, whoever is beside; what is drawn, and where it ends."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from test_transformer import apply, tiny

from switchmoe.inference import decoding
from switchmoe.inference.beams import beam_search
from switchmoe.inference.decoding import Choosing
from switchmoe.inference.generation import Generator, prompt_ids
from switchmoe.model.transformer import Transformer, without_limits
from switchmoe.routing import NOT_CAUSAL, ROUTERS
from switchmoe.training import train_state

NEVER_ENDS = Choosing(stop_ids=())
ROUTER = {
    "noisy_top_k": dict(choices=2),
    "hierarchical": dict(branches=2),
    "top_k": dict(choices=2, num_shared=1, shared_gate=True),
}
CAUSAL = [name for name in ROUTERS if name not in NOT_CAUSAL]
ALONE = dict(stacks="decoder_only", positions="rotary", num_kv_heads=1, qk_norm="head", attention_scale=0.0)


def settings(kind="encoder_decoder", router="switch", model=None, **moe):
    model = (ALONE if kind == "decoder_only" else {}) | (model or {})
    data = dict(vocab_size=300, batch_size=4, input_length=12)
    data["objective"] = "causal_lm" if kind == "decoder_only" else "span_corruption"
    return tiny(model, dict(router=router) | ROUTER.get(router, {}) | moe, data=data)


@functools.cache
def init(of):
    """Parameters away from the initial ones, of which some are zeros: what is left out would not show."""
    rng = np.random.default_rng(0)

    def value(shape, mean):
        return jnp.asarray(mean + rng.normal(0, 0.3, shape.shape), jnp.float32)

    return jax.tree.map(lambda s: value(s, 1.0 if s.ndim < 3 else 0.0), train_state.parameter_shapes(of))


def prompts(counts, seed=0, length=0):
    rng = np.random.default_rng(seed)
    rows = np.zeros((len(counts), length or max(counts)), np.int32)
    for row, count in enumerate(counts):
        rows[row, :count] = rng.integers(2, 300, count)
    return jnp.array(rows), jnp.array(counts, jnp.int32)


@functools.cache
def program(of, tokens, how):
    own, params = decoding.laid_out(of, init(of))
    return jax.jit(functools.partial(decoding.sample, tokens=tokens, settings=own, how=how)), params


def sample(of, prompt_BP, count_B, tokens, how=NEVER_ENDS, seeds=None):
    key_B = jax.vmap(jax.random.key)(jnp.arange(len(count_B)) if seeds is None else jnp.array(seeds))
    run, params = program(of, tokens, how)
    return run(params, prompt_BP, count_B, key_B)


def teacher_forced(of, prompt_BP, count_B, answer_BN):
    """Log-probabilities [B, N, V] of answers' tokens, of the whole decoder at once, nothing dropped."""
    own = dataclasses.replace(of, moe=without_limits(of.moe))
    run = jax.jit(Transformer(own).apply)
    if "encoder" in of.stacks:
        return jax.nn.log_softmax(run({"params": init(of)}, prompt_BP, answer_BN)[0])
    # The first of what a decoder alone reads is the 0 in front of its targets.
    rows = [
        [*p[1:n], *a]
        for p, n, a in zip(prompt_BP.tolist(), count_B.tolist(), answer_BN.tolist(), strict=True)
    ]
    targets = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, ids in enumerate(rows):
        targets[row, : len(ids)] = ids
    logits_BLV, _ = run({"params": init(of)}, None, jnp.array(targets))
    return jnp.stack(
        [
            jax.nn.log_softmax(logits_LV[n - 1 :][: answer_BN.shape[1]])
            for logits_LV, n in zip(logits_BLV, count_B.tolist(), strict=True)
        ]
    )


def assert_decodes_as_forced(of, counts, tokens, padding=0, seed=0):
    """Each token is the best of what the whole decoder says, whoever is beside."""
    prompt_BP, count_B = prompts(counts, seed, max(counts) + padding)
    prompt_BP = prompt_BP.at[:, 0].set(0 if of.stacks == ("decoder",) else 9)
    found = sample(of, prompt_BP, count_B, tokens)
    log_prob_BNV = teacher_forced(of, prompt_BP, count_B, found.tokens_BN)
    chosen_BN = jnp.take_along_axis(log_prob_BNV, found.tokens_BN[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(chosen_BN, log_prob_BNV.max(-1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.score_B, chosen_BN.sum(-1), rtol=1e-4, atol=1e-4)
    others = sample(of, prompt_BP.at[1:].set(7)[::-1], count_B[::-1], tokens)
    np.testing.assert_array_equal(found.tokens_BN[0], others.tokens_BN[-1])
    np.testing.assert_allclose(found.score_B[0], others.score_B[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("router", CAUSAL)
@pytest.mark.parametrize("kind", ["encoder_decoder", "decoder_only"])
def test_each_token_is_the_best_by_teacher_forcing_whoever_is_beside(kind, router):
    """Also where evaluation has all sequences in one group, with too few slots; prompts of unequal lengths."""
    assert_decodes_as_forced(
        settings(kind, router, eval_group_size=64, eval_capacity_factor=0.5), [7, 3, 5], 6
    )


@pytest.mark.slow
@hypothesis.settings(max_examples=8)
@given(
    kind=st.sampled_from(["encoder_decoder", "decoder_only"]),
    router=st.sampled_from(CAUSAL),
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    tokens=st.integers(1, 7),
    padding=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_so_it_is_with_any_shape_and_padding(kind, router, counts, tokens, padding, seed):
    assert_decodes_as_forced(settings(kind, router), counts, tokens, padding, seed)


@pytest.mark.parametrize(
    "model",
    [
        dict(positions="relative", num_kv_heads=0),
        dict(qk_norm="all", qkv_bias=True, d_kv=6, num_kv_heads=2),
        dict(activation="swiglu", norm_eps=1e-3, num_layers=4, tie_embeddings=False),
    ],
)
def test_so_do_the_other_forms_of_attention(model):
    of = settings("decoder_only", model=model)
    prompt_BP, count_B = prompts([6, 2])
    prompt_BP = prompt_BP.at[:, 0].set(0)
    found = sample(of, prompt_BP, count_B, 5)
    log_prob_BNV = teacher_forced(of, prompt_BP, count_B, found.tokens_BN)
    np.testing.assert_array_equal(found.tokens_BN, log_prob_BNV.argmax(-1))


def test_an_encoder_whose_experts_choose_decodes_too():
    """Of two prompts beside each other neither matters to the other; the length to which both are padded does."""
    moe = dict(num_experts=8, eval_capacity_factor=1.25, eval_group_size=64)
    of = settings(router="expert_choice", decoder_router="switch", **moe)
    prompt_BP, count_B = prompts([12, 9, 12, 5], length=16)
    together = sample(of, prompt_BP, count_B, 6)
    others_BP = prompt_BP.at[1:].set(0).at[1:, :3].set(7)
    others = sample(of, others_BP, count_B.at[1:].set(3), 6)
    np.testing.assert_array_equal(together.tokens_BN[0], others.tokens_BN[0])
    np.testing.assert_allclose(together.score_B[0], others.score_B[0], rtol=1e-5)
    # Of 12 tokens in 16 an expert takes ceil(3 * 12 / 16) = 3, of 12 in 64 ceil(10 * 12 / 64) = 2.
    longer = sample(of, jnp.pad(prompt_BP, ((0, 0), (0, 48))), count_B, 6)
    assert abs(together.score_B[0] - longer.score_B[0]) > 1e-3


def test_stacks_of_other_depths_and_a_dense_decoder():
    of = settings(model=dict(num_layers=4, num_decoder_layers=2), every=2, offset=0, decoder_every=0)
    assert of.sparse_stacks == ("encoder",) and list(of.sparse_blocks("encoder")) == [0, 2]
    prompt_BP, count_B = prompts([5, 5])
    tokens_BN = sample(of, prompt_BP, count_B, 4).tokens_BN
    np.testing.assert_array_equal(tokens_BN, teacher_forced(of, prompt_BP, count_B, tokens_BN).argmax(-1))
    aux = jax.eval_shape(Transformer(of).apply, {"params": init(of)}, prompt_BP, tokens_BN)[1]
    assert aux["decoder"] == {} and aux["encoder"]["loss"].shape == (2,)


@pytest.mark.parametrize("kind", ["encoder_decoder", "decoder_only"])
def test_nothing_follows_the_end(kind):
    of = settings(kind)
    prompt_BP, count_B = prompts([5, 5])
    free = np.asarray(sample(of, prompt_BP, count_B, 6).tokens_BN)
    stop = int(free[0, 2])
    found = sample(of, prompt_BP, count_B, 6, Choosing(stop_ids=(1, stop)))
    for own, other in zip(np.asarray(found.tokens_BN), free, strict=True):
        ends = np.flatnonzero(other == stop)
        end = ends[0] + 1 if len(ends) else 6
        np.testing.assert_array_equal(own[:end], other[:end])
        assert (own[end:] == 0).all()
    assert found.tokens_BN.dtype == jnp.int32


def test_what_may_be_drawn_by_hand():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))

    def kept(top_k, top_p):
        return jnp.isfinite(decoding.limited(logits, top_k, top_p))[0].tolist()

    assert kept(0, 1.0) == [True] * 4
    assert kept(2, 1.0) == kept(0, 0.6) == kept(0, 0.79) == [True, True, False, False]
    assert kept(0, 0.5) == kept(1, 0.9) == kept(0, 0.01) == [True, False, False, False]
    assert kept(3, 0.9) == [True, True, True, False]  # 0.5 / 0.95 and 0.3 / 0.95 are below 0.9
    assert kept(2, 0.6) == [True, False, False, False]  # 0.5 / 0.8 is enough
    same = jnp.log(jnp.array([[0.3, 0.4, 0.3]]))
    assert jnp.isfinite(decoding.limited(same, 2, 1.0)).all(), "the second largest are two"


@pytest.mark.parametrize("heat", [1e-5, 1e-38, 1e-45])
def test_a_temperature_next_to_nothing_is_none(heat):
    """Logits divided by it would be infinite, which no draw takes."""
    logits, keys = jnp.array([[1.0, 9.0, 5.0, 30.0, 2.0]]), jax.random.split(jax.random.key(0), 1)
    for top_p in (1.0, 0.9):
        how = Choosing(temperature=heat, top_p=top_p)
        assert int(decoding._choose(logits, keys, jnp.int32(1), how)[0]) == 3


def test_draws_are_of_the_seed_and_no_neighbours():
    of = settings("decoder_only")
    prompt_BP, count_B = prompts([5, 5, 5])
    how = Choosing(temperature=5.0, stop_ids=())
    first = sample(of, prompt_BP, count_B, 8, how).tokens_BN
    np.testing.assert_array_equal(first, sample(of, prompt_BP, count_B, 8, how).tokens_BN)
    others = sample(of, prompt_BP[::-1], count_B, 8, how, seeds=[2, 1, 0]).tokens_BN
    np.testing.assert_array_equal(first, others[::-1])
    assert (first != sample(of, prompt_BP, count_B, 8, how, seeds=[7, 8, 9]).tokens_BN).any()
    nearly = sample(of, prompt_BP, count_B, 8, Choosing(temperature=1e-4, stop_ids=())).tokens_BN
    np.testing.assert_array_equal(nearly, sample(of, prompt_BP, count_B, 8).tokens_BN)


@pytest.mark.parametrize("kind", ["encoder_decoder", "decoder_only"])
def test_a_bfloat16_model_scores_as_its_float32_twin(kind):
    exact, half = settings(kind), settings(kind, model=dict(dtype="bfloat16"))
    prompt_BP, count_B = prompts([7, 12, 3])
    found = sample(half, prompt_BP, count_B, 6)
    log_prob_BNV = teacher_forced(exact, prompt_BP, count_B, found.tokens_BN)
    wanted_B = jnp.take_along_axis(log_prob_BNV, found.tokens_BN[..., None], axis=-1).sum(axis=(1, 2))
    np.testing.assert_allclose(found.score_B, wanted_B, rtol=0.05)


@pytest.mark.parametrize("penalty", [0.0, 2.0])
def test_as_many_beams_as_there_are_tokens_find_the_best_of_all_pairs(penalty):
    """All 512 + 511 * 512 continuations of two tokens or of one that ends, by teacher forcing."""
    of, stop = settings("decoder_only"), 1
    rows, prompt = of.embedding_rows, [0, 3, 4, 2]
    own, laid = decoding.laid_out(of, init(of))
    arguments = dict(tokens=2, settings=own, beams=rows, length_penalty=penalty, stop_ids=(stop,))
    search = jax.jit(functools.partial(beam_search, **arguments))
    found = search(laid, jnp.array([prompt]), jnp.array([4], jnp.int32))
    targets = jnp.array([[*prompt[1:], first, 2] for first in range(rows)])
    logits_BLV, _ = apply(of, {"params": init(of)}, None, targets)
    log_prob_BLV = jax.nn.log_softmax(logits_BLV)
    first_V = log_prob_BLV[2, 3]  # not of the row with a pad there
    pair_VV = (first_V[:, None] + log_prob_BLV[:, 4]) / 2**penalty
    pair_VV = pair_VV.at[stop].set(-jnp.inf)
    best = float(jnp.maximum(pair_VV.max(), first_V[stop]))
    tokens = (
        [stop, 0]
        if best == float(first_V[stop])
        else [int(i) for i in jnp.unravel_index(pair_VV.argmax(), pair_VV.shape)]
    )
    assert found.tokens_BN[0].tolist() == tokens
    np.testing.assert_allclose(found.score_B[0], best, rtol=1e-4)


def test_beams_do_not_see_their_neighbours():
    of = settings("encoder_decoder", "top_k")
    own, params = decoding.laid_out(of, init(of))
    prompt_BP, count_B = prompts([7, 3, 5])
    search = jax.jit(functools.partial(beam_search, tokens=6, settings=own, beams=3, stop_ids=(5, 9)))
    together = search(params, prompt_BP, count_B)
    others = search(params, prompt_BP[::-1].at[:2].set(7), count_B[::-1])
    np.testing.assert_array_equal(together.tokens_BN[0], others.tokens_BN[2])
    np.testing.assert_allclose(together.score_B[0], others.score_B[2], rtol=1e-5)


def test_rows_that_fill_a_batch_up_do_not_go_on():
    """They have ended before the first token, so the batch ends with its answers."""
    of = settings("decoder_only")
    prompt_BP, count_B = prompts([7, 3])
    none_B = count_B.at[1].set(0)
    found = sample(of, prompt_BP, none_B, 6)
    assert not found.tokens_BN[1].any() and found.score_B[1] == 0
    np.testing.assert_array_equal(found.tokens_BN[0], sample(of, prompt_BP, count_B, 6).tokens_BN[0])
    own, params = decoding.laid_out(of, init(of))
    search = jax.jit(functools.partial(beam_search, tokens=4, settings=own, beams=2, stop_ids=()))
    together, filled = search(params, prompt_BP, count_B), search(params, prompt_BP, none_B)
    np.testing.assert_array_equal(together.tokens_BN[0], filled.tokens_BN[0])


def test_a_generator_answers_in_order_whatever_the_batch():
    of = settings("decoder_only")
    asked, how = [[0, *range(3, 3 + n)] for n in (1, 20, 4)], Choosing(temperature=2.0)
    two = Generator(of, init(of), 5, how, batch_size=2)
    found, again = two(asked), Generator(of, init(of), 5, how, batch_size=3)(asked)
    assert [answer.ids for answer in found] == [answer.ids for answer in again]
    assert found[0].ids != found[2].ids
    with pytest.raises(ValueError, match="id 999: accepted is an integer from 0 to 511"):
        two([[0, 999]])
    with pytest.raises(ValueError, match="beams=2: accepted with a temperature is 1"):
        Generator(of, init(of), 5, how, beams=2)


def test_a_prompt_as_the_model_reads_it():
    class Letters:
        eos_id = 1

        def encode(self, text):
            return [ord(letter) for letter in text]

        def sentinel(self, index):
            return 1000 - index

    assert prompt_ids("ab", settings("decoder_only"), Letters()) == [0, 97, 98]
    assert prompt_ids("a<extra_id_1>b", settings(), Letters()) == [97, 999, 98, 1]
