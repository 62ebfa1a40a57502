"""Answers judged by hand: options of unequal length, what the best checkpoint is chosen by."""

import types

import jax
import numpy as np
import pytest

from switchmoe.data import pairs
from switchmoe.data.tasks import Example, Task
from switchmoe.inference import generation
from switchmoe.model.transformer import Transformer
from switchmoe.parallel import sharding
from switchmoe.runs.finetuning import Answers, row_nll
from switchmoe.settings import default_config, from_config
from switchmoe.training import train_state

pytestmark = pytest.mark.usefixtures("one_device")
COSTS = {"a": 0.9, "b": 0.5}  # nats of a token, by letter; its end costs as much


class Letters:
    """A vocabulary of letters: a is 10."""

    eos_id, pad_id, size = 1, 0, 40

    def encode(self, text):
        return np.array([ord(letter) - 87 for letter in text], np.int32)


def answers(written, trained, held_out=()):
    """Of a model that writes ``written[task]``, and to whom letters cost `COSTS`."""
    config = default_config()
    config.data.update(batch_size=2, input_length=8, target_length=8, streams=0)
    settings = from_config(config)
    measured = [*trained, *held_out]
    data = types.SimpleNamespace(
        trained=list(trained),
        measured=measured,
        held_out={task.name: task.examples("validation") for task in measured},
        cut_held_out={task.name: np.zeros((len(task.examples("validation")), 2), bool) for task in measured},
        encoder=pairs.Encoder(settings.data, settings.stacks, Letters()),
    )
    found = Answers(data, settings, sharding.make_mesh(settings.mesh))
    costs = np.zeros(40)
    costs[[10, 11]] = COSTS["a"], COSTS["b"]

    def nll(params, batch):
        targets = np.asarray(batch["targets"])
        return costs[targets].sum(axis=1) + costs[targets[:, 0]]

    texts = iter([written[task.name] for task in measured])
    found._nll, found._written = nll, lambda params, examples: next(texts)
    found._encode = lambda *given: None
    return found


def task(name, *targets, options=(), metrics=("accuracy",), **more):
    found = tuple(Example("c", target) for target in targets)
    return Task(name, lambda split: found, metrics, options, **more)


def test_of_options_the_longest_is_not_the_least_likely():
    """a: 2 tokens of 0.9 nats, 1.8; bbbb: 5 of 0.5, 2.5. The sum prefers the short one, the mean the long one."""
    found = answers({"one": ["a", "a", "b"]}, [task("one", "a", "bbbb", "bbbb", options=("a", "bbbb"))])
    figures = found.figures(None)
    assert (figures["one/ranked"], figures["one/ranked_mean"]) == pytest.approx((100 / 3, 200 / 3))
    assert [(one["ranked"], one["ranked_mean"]) for one in found.answers["one"]] == [("a", "bbbb")] * 3


def test_the_score_of_an_averaged_task_is_its_metrics_mean():
    """3 of 4 are right; of the one True none is found, an F1 of 0."""
    judged = task("one", "True", *["False"] * 3, metrics=("f1_positive", "accuracy"), averaged=True)
    assert answers({"one": ["False"] * 4}, [judged]).figures(None)["score"] == 37.5


def test_held_out_tasks_do_not_decide_which_checkpoint_is_best():
    """Three of four are right of the task that is trained on, none of the other: `score` has both, `shortfall` the first."""
    written = {"one": ["a", "a", "a", "b"], "other": ["b"]}
    figures = answers(written, [task("one", *"aaaa")], [task("other", "a")]).figures(None)
    assert (figures["score"], figures["shortfall"]) == (37.5, 25.0)


def test_capacity_is_of_likelihoods_and_answers_have_none():
    """One slot an expert at 0.01 of a fair share: what is dropped moves the loss of a row, and no token that is written."""
    model = {"d_model": 8, "d_ff": 16, "d_kv": 4, "num_heads": 2, "num_layers": 1, "dtype": "float32"}
    data = {"input_length": 12, "target_length": 6, "vocab_size": 300}
    few, many = (
        from_config({"model": model, "data": data, "moe": {"num_experts": 4, "every": 1, "eval_capacity_factor": factor}})
        for factor in (0.01, 8.0)
    )  # fmt: skip
    rng = np.random.default_rng(0)
    shapes = train_state.parameter_shapes(few)
    params = jax.tree.map(lambda s: np.asarray(rng.normal(0, 0.5, s.shape), np.float32), shapes)
    rows_BP, count_B = rng.integers(3, 300, (4, 12)).astype(np.int32), np.full(4, 12, np.int32)
    batch = {"inputs": rows_BP, "targets": rows_BP[:, :6]}
    greedy, nll = jax.jit(generation.greedy, static_argnums=(3, 4)), jax.jit(row_nll, static_argnums=2)
    texts = [greedy(params, rows_BP, count_B, 6, settings) for settings in (few, many)]
    np.testing.assert_array_equal(*texts)
    low, high = (np.asarray(nll(params, batch, settings)) for settings in (few, many))
    assert np.abs(low - high).max() > 0.01
    encoded, _ = Transformer(few).apply({"params": params}, rows_BP, method="encode")
    np.testing.assert_allclose(nll(params, batch | {"encoded": encoded}, few), low, rtol=1e-6)
    assert np.abs(nll(params, batch | {"encoded": -encoded}, few) - low).max() > 0.01, "it is read again"
