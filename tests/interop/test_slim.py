"""`experiments.slim`: what it writes is a run, of the bytes it claims, that every command takes; what chooses its experts."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from experiments import convert, distill, evaluate, exits, finetune, generate
from experiments import run as training
from experiments import slim as command
from switchmoe.analysis import sweeps
from switchmoe.data import vocabulary
from switchmoe.inference import generation
from switchmoe.interop import run_files, slim
from switchmoe.runs import integrity, measuring, slimming, trained
from switchmoe.settings import DistillSettings, from_config, to_dict
from switchmoe.training import places

pytestmark = pytest.mark.usefixtures("one_device")
EXPERTS, D, F = 4, 16, 24
WORDS = ["river", "people", "war", "music", "city", "north", "south", "light", "stone", "winter"]
CONFIG = {
    "model": dict(d_model=D, d_ff=F, d_kv=8, num_heads=2, num_layers=1, activation="relu", dtype="float32"),
    "moe": dict(num_experts=EXPERTS, every=1),
    "data": dict(vocab_size=300, batch_size=4, input_length=16),
    "train": dict(num_steps=3),
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A directory with text.txt, task.jsonl and, as a run of 3 steps, a model of random numbers."""
    directory, rng = tmp_path_factory.mktemp("slim"), np.random.default_rng(0)
    lines = [f"{n} {' '.join(rng.choice(WORDS, 6))} {chr(97 + n % 26)}" for n in range(150)]
    (directory / "text.txt").write_text("\n".join(lines))
    rows = [{"text": line, "label": ("cold", "warm")[n % 2]} for n, line in enumerate(lines[:60])]
    (directory / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": str(directory / "text.txt"), "validation_share": 0.2}
    settings = from_config(CONFIG | {"data": CONFIG["data"] | data})
    run = directory / "run"
    write_run(run, settings, vocabulary.train(lines, 300))
    return directory


def write_run(run, settings, model_bytes):
    rng, names = np.random.default_rng(1), places.names(settings)
    writer = run_files.Writer(
        run / "checkpoints" / "3", {name: (shape, 0) for name, shape in names.items()}, "float32"
    )
    for name, shape in names.items():
        leaf = rng.normal(0, 0.3, shape) if len(shape) > 2 or name == "embedding" else np.ones(shape)
        writer.write(name, (), leaf.astype(np.float32))
    (run / "checkpoints" / "3" / integrity.MANIFEST).write_text(json.dumps(writer.finish()))
    (run / "config.json").write_text(json.dumps(to_dict(settings)))
    (run / "vocabulary.model").write_bytes(model_bytes)


def params_of(path):
    model = trained.find(str(path))
    return flatten_dict(jax.device_get(trained.on_one_device(model, model.settings)), sep="/")


def made(files, target, use=None, **how):
    """Without measuring anything: an expert is used as much as its number in ``use`` says."""
    model, how = trained.find(str(files / "run")), slimming.Slimming(**how)
    layers = ("encoder/0", "decoder/0")
    count = lambda: {layer: np.array(use or [1.0, 3.0, 0.0, 2.0]) for layer in layers}  # noqa: E731
    slim.make(model, target, how, slim.asked(model, how, {}), count)
    return target


def run(main, *arguments, code=0):
    assert main(["command", *map(str, arguments)]) == code


@pytest.mark.parametrize("by", ["use", "merge"])
def test_with_all_experts_it_is_the_same_model_to_the_bit(files, tmp_path, by):
    there, found = params_of(files / "run"), params_of(made(files, tmp_path / "all", experts=EXPERTS, by=by))
    assert there.keys() == found.keys()
    # The list of the files is in an order that does not depend on the process.
    listed = json.loads((tmp_path / "all" / "checkpoints" / "3" / integrity.MANIFEST).read_text())
    rest = list(
        dict.fromkeys(file.split("/")[1] for file in listed if ".moe." not in file and "params" in file)
    )
    assert rest[-3:] == [f"params.{name.replace('/', '.')}" for name in there if "/moe/" not in name][-3:]
    for name in there:
        np.testing.assert_array_equal(found[name], there[name], err_msg=name)


def test_the_most_used_are_kept_as_they_are(files, tmp_path):
    there, found = params_of(files / "run"), params_of(made(files, tmp_path / "two", experts=2))
    for name, leaf in found.items():
        wanted = there[name]
        if "/experts/" in name:
            wanted = wanted[:, [1, 3]]
        elif name.endswith("moe/router"):
            wanted = wanted[..., [1, 3]]
        np.testing.assert_array_equal(leaf, wanted, err_msg=name)
    settings = trained.find(str(tmp_path / "two")).settings
    assert settings.moe.num_experts == 2 and not settings.moe.route_one
    made(files, tmp_path / "one", experts=1)
    assert trained.find(str(tmp_path / "one")).settings.moe.route_one
    told = json.loads((tmp_path / "two" / "slim.json").read_text())
    assert told["experts"] == {"encoder/0": [[1], [3]], "decoder/0": [[1], [3]]}


@pytest.mark.parametrize("bits, scales", [(8, 1), (4, 2)])
def test_integers_take_the_bytes_they_claim_on_disk_and_in_memory(files, tmp_path, bits, scales):
    target = made(files, tmp_path / "small", bits=bits)
    state = target / "checkpoints" / "3" / "state"
    moe = state / "params.encoder.blocks.block_0.moe.experts.wi"
    size = lambda path: sum(file.stat().st_size for file in path.iterdir() if file.name != ".zarray")  # noqa: E731
    assert size(moe) == EXPERTS * D * F * bits // 8
    assert size(moe.with_name(f"{moe.name}_scale")) == EXPERTS * scales * F * 4
    found, model = params_of(target), trained.find(str(target))
    arrays = sum(leaf.nbytes for leaf in found.values())
    every = sum(size(path) for path in state.iterdir() if path.is_dir())
    assert every == arrays
    assert found["encoder/blocks/block_0/moe/experts/wi"].dtype == np.int8
    settings = model.settings
    generator = generation.Generator(settings, trained.on_one_device(model, settings), tokens=2)
    held = [leaf for leaf in jax.tree.leaves(generator._params) if leaf.dtype == np.int8]
    assert sum(leaf.nbytes for leaf in held) == 2 * 2 * EXPERTS * D * F * bits // 8
    there = params_of(files / "run")
    for stack in ("encoder", "decoder"):
        for name in ("wi", "wo"):
            key = f"{stack}/blocks/block_0/moe/experts/{name}"
            made_of = slimming.integers({name: there[key][0]}, settings.moe)
            np.testing.assert_array_equal(found[key][0], made_of[name])


def test_a_quantised_model_is_held_and_generates_as_it_is_evaluated(files, tmp_path, capsys):
    """The likeliest tokens, one after the other, are those of a teacher-forced pass."""
    from switchmoe.model.transformer import Transformer

    model = trained.find(str(made(files, tmp_path / "small", bits=4, experts=2)))
    params = trained.on_one_device(model, model.settings)
    prompt = [17, 30, 41, 1]
    (answer,) = generation.Generator(model.settings, params, tokens=6)([prompt])
    targets = np.array([answer.ids], np.int32)
    forward = jax.jit(Transformer(model.settings).apply)
    logits_BLV, _ = forward({"params": params}, np.array([prompt], np.int32), targets)
    assert np.argmax(logits_BLV[0], axis=-1).tolist() == answer.ids


@pytest.mark.slow
def test_one_command_makes_a_run_that_everything_takes(files, tmp_path, capsys):
    target, text = tmp_path / "small", files / "text.txt"
    fields = [
        "--config.task.inputs={text}",
        "--config.task.targets={label}",
        "--config.task.options=cold,warm",
    ]
    more = [f"--task={files / 'task.jsonl'}", f"--text={text}", *fields, "--config.data.validation_share=0.2"]
    run(command.main, f"--source={files / 'run'}", f"--target={target}", "--experts=2", "--by=task", *more)
    _, small = json.loads((target / "table.json").read_text())["rows"]
    arrays = sum(leaf.nbytes for leaf in params_of(target).values())
    assert small["bytes_in_memory"] == small["bytes_on_disk"] == arrays
    assert (
        small["parameters"] == arrays // 4 and 0 <= small["score"] <= 100 and small["tokens_per_second"] > 0
    )
    use = json.loads((target / "use.json").read_text())
    kept = json.loads((target / "slim.json").read_text())["experts"]
    for layer, use_E in use.items():
        assert sorted(np.argsort(use_E)[-2:].tolist()) == sum(kept[layer], [])

    assert (target / "report.html").exists() and sweeps.read(target).loss == pytest.approx(small["loss"])
    out = tmp_path / "figures.json"
    run(evaluate.main, f"--source={target}", "--batches=16", f"--out={out}")
    assert json.loads(out.read_text())["cross_entropy"] == pytest.approx(small["loss"], rel=1e-5)
    run(generate.main, f"--source={target}", "--prompt=river", "--max_tokens=2")
    steps = [
        "--config.train.num_steps=1",
        "--config.train.eval_every=1",
        "--config.optimizer.schedule=constant",
    ]
    steps += [f"--config.init.checkpoint={target}", "--config.train.eval_batches=1"]
    run(training.main, f"--config=configs/from_run.py:{target}", f"--workdir={tmp_path / 'further'}", *steps)
    tuned = [f"--init={target}", f"--task={files / 'task.jsonl'}", "--config.data.batch_size=4", *fields]
    run(finetune.main, *tuned, "--steps=1", f"--workdir={tmp_path / 'tuned'}")
    assert trained.find(str(tmp_path / "tuned")).settings.moe.num_experts == 2


@pytest.mark.slow
def test_integers_teach(files, tmp_path):
    """The student has floats, and no experts."""
    target = made(files, tmp_path / "small", bits=8)
    steps = ["--config.train.num_steps=1", "--config.train.eval_every=1", "--config.train.eval_batches=1"]
    run(distill.main, f"--teacher={target}", f"--workdir={tmp_path / 'student'}", *steps)
    told = json.loads((tmp_path / "student" / "run.json").read_text())["distilled"]
    assert told["teacher"] == str(target) and np.isfinite(told["of_teacher"])
    assert trained.find(str(tmp_path / "student")).settings.moe.expert_bits == 0


def test_integers_are_measured_by_finetune_and_not_trained(files, tmp_path, capsys):
    target = made(files, tmp_path / "small", bits=8)
    fields = [
        "--config.task.inputs={text}",
        "--config.task.targets={label}",
        "--config.data.validation_share=0.2",
    ]
    given = [f"--init={target}", f"--task={files / 'task.jsonl'}", *fields, "--config.data.batch_size=4"]
    run(finetune.main, *given, "--steps=0", f"--workdir={tmp_path / 'measured'}")
    assert "score" in capsys.readouterr().out
    config = f"--config=configs/from_run.py:{target}"
    for asked, message in (
        ((finetune.main, *given, "--steps=2"), "moe.expert_bits=8: accepted in training is 0"),
        ((training.main, config), "moe.expert_bits=8: accepted in training is 0"),
        ((training.main, config, "--config.moe.expert_bits=0"), "is integers (moe.expert_bits) there"),
        ((convert.main, f"--source={target}", f"--target={tmp_path / 'out'}"), "moe.expert_bits=8: accepted for a Hugging Face"),
        ((command.main, f"--source={target}", f"--target={tmp_path / 'out'}", "--experts=2"), "its experts are integers of 8 bits"),
    ):  # fmt: skip
        where = [] if asked[0] in (convert.main, command.main) else [f"--workdir={tmp_path / 'trained'}"]
        run(*asked, *where, code=exits.EXIT_BAD_INPUT)
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "trained" / "config.json").exists() and not (tmp_path / "out").exists()


def test_a_student_is_measured_by_a_task_without_its_teacher(files, tmp_path):
    """Which needs not be there any more."""
    model = trained.find(str(files / "run"))
    taught = dataclasses.replace(model.settings, distill=DistillSettings(teacher=str(tmp_path / "gone")))
    fields = {"task.inputs": "{text}", "task.targets": "{label}", "data.validation_share": 0.2}
    task, student = str(files / "task.jsonl"), model._replace(settings=taught)
    assert measuring.yardstick(student, "", task, fields, 1, tmp_path, print).counted


def test_so_many_batches_of_a_task(files, tmp_path):
    model, split = trained.find(str(files / "run")), {"data.validation_share": 0.5}
    fields = {"task.inputs": "{text}", "task.targets": "{label}"}
    for count, rows in ((1, 4), (2, 8)):
        ruler = measuring.yardstick(
            model, "", str(files / "task.jsonl"), split | fields, count, tmp_path, print
        )
        assert [sum(map(len, (b["inputs"] for b in part))) for part in (ruler.counted, ruler.held_out)] == [
            rows,
            rows,
        ]


def test_sentences_choose_as_wholes(files):
    """One that prefers an expert in most of its tokens counts once for it, however long it is."""
    model = trained.find(str(files / "run"))
    text = {"data.source": str(files / "text.txt"), "data.validation_share": 0.2}
    ruler = measuring.yardstick(model, "", "", text, 2, files / "none", print)
    tokens, wholes = (measuring.use(model, ruler, by) for by in (False, True))
    for layer in ("encoder/0", "decoder/0"):
        assert tokens[layer].sum() == pytest.approx(1, abs=1e-5)
        votes = wholes[layer] - tokens[layer] / 16
        np.testing.assert_allclose(votes * 8, np.round(votes * 8), atol=1e-5)
        assert votes.sum() == pytest.approx(1, abs=1e-5)
