"""`experiments.evaluate`: the run's own figures again, another text's, bits per byte, and what is refused."""

import json
import math

import jax
import numpy as np
import pytest
from test_run import finish, start

from experiments import evaluate, exits
from switchmoe.data import batches, vocabulary
from switchmoe.parallel import sharding
from switchmoe.runs.reporting import read_metrics
from switchmoe.runs.trained import find, mean_parameters, parameters
from switchmoe.settings import DataSettings

pytestmark = pytest.mark.usefixtures("one_device")
SENTENCES = [f"The {a} {b} of the {c} river runs to the sea." for a in ("long", "old") for b in ("bed", "arm") for c in ("Nile", "Don", "Po")]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory, environment):
    workdir = tmp_path_factory.mktemp("evaluate") / "run"
    finish(start(workdir, environment, "--config.train.num_steps=10"))
    return workdir


def run(capsys, *arguments):
    code = evaluate.main(["evaluate", *arguments])
    return code, capsys.readouterr()


def test_the_runs_own_held_out_text_gives_the_runs_own_figures(trained, tmp_path, capsys):
    code, captured = run(capsys, f"--source={trained}", "--batches=2", f"--out={tmp_path / 'figures.json'}")
    assert code == 0, captured.err
    (*_, wanted) = read_metrics(trained / "metrics.jsonl")
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["step"] == wanted["step"] == 10 and found["split"] == "validation"
    for name in ("cross_entropy", "accuracy", "perplexity", "layer_expert_load", "layer_fraction_dropped"):
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-6, err_msg=name)
    assert f"cross-entropy {wanted['cross_entropy']:.4f} nats" in captured.out
    assert all(f"{layer}: dropped" in captured.out for layer in wanted["layers"])


def test_the_mean_of_the_last_checkpoints_parameters(trained, tmp_path, capsys):
    out = tmp_path / "figures.json"
    code, captured = run(capsys, f"--source={trained}", "--batches=1", "--average=2", f"--out={out}")
    assert code == 0, captured.err
    assert "(mean of steps 5, 10)" in captured.out
    assert json.loads(out.read_text())["mean_of_steps"] == [5, 10]
    model = find(str(trained))
    mesh = sharding.make_mesh(model.settings.mesh)
    found, _ = mean_parameters(model, model.settings, mesh, 2)
    one, other = (parameters(find(f"{trained}|{step}"), model.settings, mesh) for step in (5, 10))
    for mean, a, b in zip(*map(jax.tree.leaves, (found, one, other)), strict=True):
        np.testing.assert_allclose(mean, (a + b) / 2, rtol=1e-6)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))


def test_another_text_is_measured_whole_whatever_the_batch(trained, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES))
    given = [
        f"--source={trained}|5",
        f"--config.data.source={tmp_path / 'text.txt'}",
        "--config.moe.eval_group_size=0",
    ]
    figures = []
    for number in (2, 3, 16):
        out = tmp_path / f"{number}.json"
        code, captured = run(capsys, *given, f"--config.data.batch_size={number}", f"--out={out}")
        assert code == 0, captured.err
        figures.append(json.loads(out.read_text()))
    first = figures[0]
    assert first["step"] == 5 and first["split"] == "all" and first["documents"] == len(SENTENCES)
    assert first["sequences"] > 3
    assert first["bits_per_byte"] == pytest.approx(
        first["cross_entropy"] * first["target_tokens"] / first["target_bytes"] / math.log(2)
    )
    for other in figures[1:]:
        assert other["cross_entropy"] == pytest.approx(first["cross_entropy"], rel=1e-5)
        assert other["target_bytes"] == first["target_bytes"]


@pytest.fixture
def words(trained):
    return vocabulary.Vocabulary.from_bytes((trained / "vocabulary.model").read_bytes())


def test_bytes_of_pieces_are_those_of_the_text(words):
    for text in (*SENTENCES, "Öl und \u4e2d", "a"):
        ids = words.encode(text)
        assert words.bytes_of_ids[ids].sum() == len(text.encode()) + 1, "a blank is put before it"
    assert words.bytes_of_ids[[words.pad_id, words.eos_id, words.sentinel(0), words.sentinel(99)]].sum() == 0


def test_a_padded_last_batch_has_what_was_left_out(words):
    settings = DataSettings(vocab_size=600, batch_size=5, input_length=16)
    full = batches.eval_batches(settings, words, SENTENCES)
    padded = batches.eval_batches(settings, words, SENTENCES, padded=True)
    assert len(padded) == len(full) + 1
    for one, other in zip(full, padded, strict=False):
        assert np.array_equal(one["inputs"], other["inputs"]) and np.array_equal(
            one["targets"], other["targets"]
        )
    real = (padded[-1]["inputs"] != 0).any(axis=1)
    assert 0 < real.sum() < 5 and not padded[-1]["targets"][~real].any()


def test_a_decoder_alone_is_measured_on_all_of_a_text_however_short(words):
    settings = DataSettings(vocab_size=600, batch_size=2, input_length=64, objective="causal_lm")
    found = batches.eval_batches(settings, words, SENTENCES[:1], padded=True)
    ids = [*words.encode(SENTENCES[0]), words.eos_id]
    targets = np.concatenate([batch["targets"] for batch in found]).ravel()
    assert targets[: len(ids)].tolist() == ids and not targets[len(ids) :].any()
    whole = batches.eval_batches(settings, words, SENTENCES, padded=True)
    tokens = sum(len(words.encode(text)) + 1 for text in SENTENCES)
    assert sum((batch["targets"] != 0).sum() for batch in whole) == tokens


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "no model; accepted is --source=RUN"),
        (["--source=/nowhere"], "--source=/nowhere: no checkpoint is there"),
        (["--source={}", "--split=train"], "--split=train: accepted is all or validation"),
        (["--source={}", "--batches=-1"], "--batches=-1: accepted is an integer >= 0"),
        (
            ["--source={}", "--config.model.d_ff=8"],
            "--config.model.d_ff=8: it is of the model or its training",
        ),
        (
            ["--source={}", "--config.data.batch_size=x"],
            "--config.data.batch_size=x: accepted is a value of type int",
        ),
        (["--source={}", "--config.data.size=3"], "config.data has no field size"),
        (["--source={}", "--config.data.source=/no/*.txt"], "data.source=/no/*.txt: "),
        (["--source={}", "--average=0"], "--average=0: accepted is an integer >= 1"),
        (["--source={}", "--average=3"], "--average=3: accepted is at most 2, as checkpoints up to"),
        (
            ["--source={}", "--steps=3"],
            "argument --steps=3 (did you mean --config.train.num_steps=?): accepted are --source=",
        ),
    ],
)
def test_bad_input_gets_one_line(trained, capsys, arguments, message):
    code, captured = run(capsys, *(argument.format(trained) for argument in arguments))
    assert code == exits.EXIT_BAD_INPUT and message in captured.err, captured.err
    assert captured.err.count("\n") == 1 and not captured.out
