"""The distilled loss against its definition, a teacher that is the student, likeliest tokens alone, microbatches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchmoe.settings import from_config
from switchmoe.training import distillation, objective, train_state, train_step

GROUPS = {
    "model": dict(d_model=16, d_ff=16, d_kv=8, num_heads=2, num_layers=2, dtype="float32", init_scale=1.0),
    "moe": dict(num_experts=4, every=2, dropless=True, explore="argmax"),
    "data": dict(vocab_size=300, batch_size=4, input_length=8, target_length=6),
    "optimizer": dict(warmup_steps=10),
    "train": dict(output_z_loss_weight=0.0),
}
ALONE = {
    "model": GROUPS["model"] | dict(stacks="decoder_only"),
    "data": dict(vocab_size=300, batch_size=4, input_length=6, objective="causal_lm"),
}


def settings(distill=None, **groups):
    return from_config(GROUPS | groups | {"distill": dict(teacher="there", **(distill or {}))})


def parameters(s, seed):
    return train_state.init_state(s, train_state.optimizer(s), jax.random.key(seed)).params


def batch(s, seed=0):
    rng = np.random.default_rng(seed)
    found = {"targets": rng.integers(2, 20, (4, 6)).astype(np.int32)}
    found["targets"][0, 4:] = 0
    if "encoder" in s.stacks:
        return found | {"inputs": rng.integers(2, 20, (4, 8)).astype(np.int32)}
    return found | {
        "segments": (found["targets"] != 0).astype(np.int32),
        "positions": np.tile(np.arange(6, dtype=np.int32), (4, 1)),
    }


def loss(what, s, params, data, *constants):
    counts = what.counts(data)
    return what.summarize(what.sums(params, data, s, None, *constants), counts, s)


def log_softmax(params, s, data, temperature):
    logits, _ = objective.applied(params, data, s, None, method="batch_logits")
    return np.asarray(jax.nn.log_softmax(logits.astype(jnp.float64) / temperature))


@pytest.mark.parametrize("groups", [{}, ALONE], ids=["encoder_decoder", "decoder_only"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_loss_is_its_definition(groups, temperature):
    teacher = settings(**groups)
    student = settings(dict(weight=0.25, temperature=temperature), **groups, moe=dict(num_experts=1))
    ours, theirs, data = parameters(student, 1), parameters(teacher, 2), batch(student)
    found = loss(distillation.beside(teacher, lambda: theirs), student, ours, data, theirs)
    plain = objective.summarize(
        objective.token_sums(ours, data, student), objective.token_counts(data), student
    )
    p, q = (log_softmax(params, s, data, temperature) for params, s in ((theirs, teacher), (ours, student)))
    real = data["targets"] != 0
    soft = (-(np.exp(p) * q).sum(-1))[real].mean()
    assert found["soft_cross_entropy"] == pytest.approx(soft, rel=1e-5)
    assert found["cross_entropy"] == pytest.approx(float(plain["cross_entropy"]), rel=1e-5)
    expected = 0.75 * plain["cross_entropy"] + 0.25 * temperature**2 * soft
    assert found["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_a_teacher_that_is_the_student_teaches_nothing():
    same = settings(dict(weight=1.0, temperature=2.0))
    params, data = parameters(same, 0), batch(same)
    moe = dataclasses.replace(same.moe, balance_loss_weight=0.0, z_loss_weight=0.0)
    bare = dataclasses.replace(same, moe=moe)
    what = distillation.beside(bare, lambda: params)
    gradient, other = (
        jax.grad(lambda p, t=teacher: loss(what, bare, p, data, t)["loss"])(params)
        for teacher in (params, parameters(same, 1))
    )
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) < 1e-6
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(other)) > 1e-3


@pytest.mark.parametrize("groups", [{}, ALONE], ids=["encoder_decoder", "decoder_only"])
def test_likeliest_tokens(groups):
    teacher, student = settings(**groups), settings(dict(temperature=2.0), **groups)
    ours, theirs, data = parameters(student, 1), parameters(teacher, 2), batch(student)
    beside = loss(distillation.beside(teacher, lambda: theirs), student, ours, data, theirs)
    kept = {}
    for count in (student.embedding_rows, 3):
        rows = distillation.as_rows(
            *map(np.asarray, distillation.likeliest(theirs, data, teacher, 2.0, count))
        )
        assert all(value.dtype == np.int32 for value in rows.values())
        kept[count] = loss(distillation.kept(), student, ours, data | rows)
    whole, few = kept.values()
    assert whole["loss"] == pytest.approx(float(beside["loss"]), rel=1e-5)
    # Three tokens and the rest as one event, by hand
    p, q = (log_softmax(params, s, data, 2.0) for params, s in ((theirs, teacher), (ours, student)))
    first = np.argsort(-p, axis=-1)[..., :3]
    p, q = (np.exp(np.take_along_axis(value, first, -1)) for value in (p, q))
    by_hand = -(p * np.log(q)).sum(-1) - (1 - p.sum(-1)) * np.log(1 - q.sum(-1))
    assert few["soft_cross_entropy"] == pytest.approx(by_hand[data["targets"] != 0].mean(), rel=1e-4)


@pytest.mark.parametrize("gap", [1.0, 20.0, 60.0])
def test_a_student_sure_of_what_is_kept_learns_of_the_rest(gap):
    """The gradient of the logits is q - p: the rest's share of it -0.1, where a 1 - sum rounds to 0."""
    logits_BLV = jnp.zeros((1, 1, 8)).at[..., :2].set(gap)
    ids_BLK, log_p_BLK = jnp.array([[[0, 1]]]), jnp.log(jnp.array([[[0.6, 0.3]]]))

    def soft(logits_BLV):
        return distillation.soft_of_likeliest(jax.nn.log_softmax(logits_BLV), ids_BLK, log_p_BLK).sum()

    gradient_V = jax.grad(soft)(logits_BLV)[0, 0]
    q_V = jax.nn.softmax(logits_BLV)[0, 0]
    np.testing.assert_allclose(gradient_V[2:].sum(), q_V[2:].sum() - 0.1, rtol=1e-5)
    np.testing.assert_allclose(gradient_V[:2], q_V[:2] - np.array([0.6, 0.3]), rtol=1e-4, atol=1e-6)


def test_label_smoothing_is_minimised_and_not_told():
    s = settings(dict(weight=0.25), train=dict(output_z_loss_weight=0.0, label_smoothing=0.1))
    moe = dataclasses.replace(s.moe, balance_loss_weight=0.0, z_loss_weight=0.0, jitter=0.0)
    s = dataclasses.replace(s, moe=moe, model=dataclasses.replace(s.model, dropout_rate=0.0))
    ours, theirs, data = parameters(s, 1), parameters(s, 2), batch(s)
    what = distillation.beside(s, lambda: theirs)
    counts = what.counts(data)
    held_out, training = (
        what.summarize(what.sums(ours, data, s, key, theirs), counts, s) for key in (None, jax.random.key(0))
    )
    for name in ("cross_entropy", "soft_cross_entropy", "accuracy"):
        assert training[name] == pytest.approx(float(held_out[name]), rel=1e-5)
    uniform = -log_softmax(ours, s, data, 1.0).mean(-1)[data["targets"] != 0].mean()
    hard = 0.9 * held_out["cross_entropy"] + 0.1 * uniform
    expected = 0.75 * hard + 0.25 * held_out["soft_cross_entropy"]
    assert training["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_microbatches_and_the_teachers_parameters_as_an_argument():
    teacher = settings()
    student = settings(dict(weight=0.5), moe=dict(num_experts=1))
    theirs, data = parameters(teacher, 2), batch(student)
    what, states = distillation.beside(teacher, lambda: theirs), []
    for parts in (1, 2):
        s = dataclasses.replace(student, train=dataclasses.replace(student.train, accumulate=parts))
        tx = train_state.optimizer(s)
        step = jax.jit(functools.partial(train_step.train_step, settings=s, tx=tx, objective=what))
        state, metrics = step(train_state.init_state(s, tx), data, constants=what.constants())
        states.append(state.params)
        assert np.isfinite(metrics["soft_cross_entropy"])
    one, two = map(jax.tree.leaves, states)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize(
    "distill, message",
    [
        (dict(weight=1.5), "distill.weight=1.5: accepted is a number from 0 to 1"),
        (dict(temperature=0.0), "distill.temperature=0.0: accepted is a number > 0"),
        (dict(top_k=600), "distill.top_k=600: accepted is at most the 512 rows"),
        (dict(store="there"), "distill.store=there: accepted is '' without distill.top_k"),
    ],
)
def test_refused(distill, message):
    with pytest.raises(ValueError, match=message):
        settings(distill)
