"""Conversions without torch: bits, types, memory, and wrong files."""

import contextlib
import json
import os
import time

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from experiments import convert as command
from experiments import exits
from switchmoe.interop import convert, shards, sources, tables
from switchmoe.runs import trained
from switchmoe.settings import from_config
from switchmoe.training import places

T5 = {
    "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "d_model": 16, "d_ff": 24, "d_kv": 4, "num_heads": 3,
    "num_layers": 2, "num_decoder_layers": 4, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    "vocab_size": 333,
}  # fmt: skip
SWITCH = {
    "model_type": "switch_transformers", "d_model": 16, "d_ff": 24, "d_kv": 4, "num_heads": 3, "num_layers": 4,
    "num_sparse_encoder_layers": 2, "num_decoder_layers": 2, "num_sparse_decoder_layers": 2, "num_experts": 3,
    "vocab_size": 333,
}  # fmt: skip
QWEN = {
    "model_type": "qwen2_moe", "hidden_size": 16, "intermediate_size": 40, "moe_intermediate_size": 12, "num_experts": 4,
    "shared_expert_intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3,
    "num_experts_per_tok": 2, "mlp_only_layers": [0], "vocab_size": 333,
}  # fmt: skip
CONFIGS = {"t5": T5, "switch": SWITCH, "qwen": QWEN}
EXPERT = "encoder.block.1.layer.1.mlp.experts.expert_2.wi.weight"


def shapes_of(config):
    family, groups = convert.from_fields(config, "config.json")
    groups["data"] |= {"vocab_size": 310}
    return {move.theirs: move.whole() for move in tables.moves(family, from_config(groups))}


def make(directory, config, dtype="float32", limit=5 * 10**9, shapes=None, keep=True, seed=0):
    """A Hugging Face directory with random tensors, as their own writer would write it; returns the tensors, if asked to keep them."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    shapes = shapes_of(config) if shapes is None else shapes
    rng, found = np.random.default_rng(seed), {}
    writer = shards.Writer(directory, shapes, dtype, limit)
    for name, shape in shapes.items():
        tensor = rng.standard_normal(shape, np.float32).astype(dtype)
        writer.write(name, tensor)
        if keep:
            found[name] = tensor
    return found


@contextlib.contextmanager
def header_of(file):
    """A safetensors file's, to change."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    yield header
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def run(*arguments):
    return command.main(["convert", *arguments, "--check=False"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", CONFIGS)
def test_there_and_back_every_tensor_has_its_bits(tmp_path, config, dtype, capsys):
    """In shards as well as whole."""
    there = make(tmp_path / "theirs", CONFIGS[config], dtype, limit=20_000)
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    assert run(f"--source={tmp_path / 'theirs'}", f"--target={tmp_path / 'run'}") == 0
    assert run(f"--source={tmp_path / 'run'}", f"--target={tmp_path / 'back'}", "--shard=100KB") == 0
    assert "MB/s" in capsys.readouterr().out
    back = sources.hugging_face(tmp_path / "back").tensors
    copies = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    assert back.keys() - copies == there.keys()
    for name, tensor in back.items():
        if name in there:
            assert tensor.dtype == dtype
            np.testing.assert_array_equal(tensor.read((), slice(None)), there[name])
    assert max(file.stat().st_size for file in (tmp_path / "back").glob("*.safetensors")) < 110_000
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == dtype


def test_a_parameter_lies_where_the_model_reads_it(tmp_path):
    """By hand: an expert's kernel is theirs transposed, a head's share of the query as well."""
    there = make(tmp_path / "theirs", SWITCH)
    assert run(f"--source={tmp_path / 'theirs'}", f"--target={tmp_path / 'run'}") == 0
    source = trained.find(str(tmp_path / "run"))
    params = trained.on_one_device(source, source.settings)
    expert = params["encoder"]["blocks"]["block_1"]["moe"]["experts"]["wi"][0, 2]
    np.testing.assert_array_equal(expert, there[EXPERT].T)
    query = params["decoder"]["blocks"]["block_0"]["self"]["query"][1]
    theirs = there["decoder.block.1.layer.0.SelfAttention.q.weight"]
    np.testing.assert_array_equal(query[:, 2], theirs[8:12].T)
    assert jax.tree.leaves(params)[0].dtype == np.float32


def test_what_is_written_is_of_the_type_asked(tmp_path):
    make(tmp_path / "theirs", SWITCH)
    assert run(f"--source={tmp_path / 'theirs'}", f"--target={tmp_path / 'run'}", "--dtype=bfloat16") == 0
    assert trained.find(str(tmp_path / "run")).settings.model.dtype == "bfloat16"
    leaf = next((tmp_path / "run" / "checkpoints" / "0" / "state").glob("*.wi/.zarray"))
    assert json.loads(leaf.read_text())["dtype"] == "bfloat16"


def test_what_is_written_back_is_of_the_type_asked(tmp_path):
    """Tensors and config.json, rounded; without the option as the run has them."""
    there = make(tmp_path / "theirs", SWITCH)
    assert run(f"--source={tmp_path / 'theirs'}", f"--target={tmp_path / 'run'}") == 0
    for option, dtype in (("--dtype=bfloat16", "bfloat16"), ("--shard=5GB", "float32")):
        assert run(f"--source={tmp_path / 'run'}", f"--target={tmp_path / dtype}", option) == 0
        config = json.loads((tmp_path / dtype / "config.json").read_text())
        assert (config["dtype"], config["torch_dtype"]) == (dtype, dtype)
        back = sources.hugging_face(tmp_path / dtype).tensors
        assert {tensor.dtype for tensor in back.values()} == {dtype}
        np.testing.assert_array_equal(back[EXPERT].read((), slice(None)), there[EXPERT].astype(dtype))


@pytest.mark.parametrize("way", ["in", "out"])
def test_the_closing_lines_seconds_are_those_of_all_that_was_read(tmp_path, way, monkeypatch):
    """The files' checksums, and the copies that are compared, too."""

    def slow(of):
        def act(*arguments):
            time.sleep(0.5)
            return of(*arguments)

        return act

    shapes = shapes_of(T5)
    make(tmp_path / "theirs", T5, shapes=shapes)
    told = contextlib.nullcontext
    monkeypatch.setattr(tables, "copies", slow(tables.copies))
    report = convert.into_run(convert.recognised(tmp_path / "theirs"), tmp_path / "run", "", told)
    if way == "out":
        monkeypatch.setattr(trained, "check", slow(trained.check))
        model = trained.find(str(tmp_path / "run"))
        report = convert.into_hugging_face(model, tmp_path / "back", "", 10**9, told)
    assert report.seconds >= 0.5


def test_a_run_begins_with_a_converted_model(tmp_path):
    """`init.checkpoint` takes the directory: the parameters are the converted ones."""
    from switchmoe.runs import start
    from switchmoe.settings import to_dict
    from switchmoe.training import train_state

    there = make(tmp_path / "theirs", SWITCH)
    assert run(f"--source={tmp_path / 'theirs'}", f"--target={tmp_path / 'run'}") == 0
    settings = trained.find(str(tmp_path / "run")).settings
    settings = from_config(to_dict(settings) | {"init": {"checkpoint": str(tmp_path / "run")}})

    class Context:
        begun, note = False, staticmethod(print)

    Context.settings = settings
    state = train_state.init_state(settings, train_state.optimizer(settings))
    params = flatten_dict(start.beginning(Context).start.load(state).params, sep="/")
    np.testing.assert_array_equal(params["embedding"], there["shared.weight"])
    assert len(params) == len(places.names(settings))


def test_a_step_that_a_run_saved_becomes_theirs(tmp_path):
    """Orbax has it in one database and whole arrays."""
    import orbax.checkpoint as ocp

    there = make(tmp_path / "theirs", T5)
    assert run(f"--source={tmp_path / 'theirs'}", f"--target={tmp_path / 'run'}") == 0
    source = trained.find(str(tmp_path / "run"))
    params = trained.on_one_device(source, source.settings)
    step = tmp_path / "run" / "checkpoints" / "7"
    ocp.StandardCheckpointer().save(step / "state", {"params": params})
    time.sleep(0.5)
    (step / "data").mkdir()
    assert (step / "state" / "manifest.ocdbt").exists()
    assert run(f"--source={tmp_path / 'run'}", f"--target={tmp_path / 'back'}") == 0
    for name, tensor in sources.hugging_face(tmp_path / "back").tensors.items():
        np.testing.assert_array_equal(tensor.read((), slice(None)), there[name])


# What goes wrong.


def spoiled(directory, how):
    """Damages a directory of `make`; returns what the one line must say."""
    whole, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if how == "cut short":  # within the last tensor but one, which is the first that is not whole
        file = sorted(directory.glob("model-*"))[1]
        with header_of(file) as header:
            *_, first, last = [name for name in header if name != "__metadata__"]
            missing = header[last]["data_offsets"][1] - header[first]["data_offsets"][1] + 1
        size = file.stat().st_size
        os.truncate(file, size - missing)
        return f"tensor {first}: found cut short in {file}: it has {size - missing:,} bytes, expected {size:,} by"
    if how == "too long":
        file = sorted(directory.glob("model-*"))[1]
        os.truncate(file, file.stat().st_size + 1)
        return f"{file}: it has {file.stat().st_size:,} bytes, expected {file.stat().st_size - 1:,} by its header"
    if how == "no shard":
        file = sorted(directory.glob("model-*"))[1]
        named = json.loads(index.read_text())["weight_map"]
        first = next(name for name in named if named[name] == file.name)
        file.unlink()
        return f"tensor {first}: not found, expected in {file.name}, which {index} names and is not there"
    if how == "index":
        index.write_text("{}")
        return "not an index"
    if how == "not in the index":
        known = json.loads(index.read_text())
        del known["weight_map"][EXPERT]
        index.write_text(json.dumps(known))
        return f"tensor {EXPERT}: found in"
    if how == "config":
        (directory / "config.json").write_text("{")
        return "config.json: can't be read"
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    shapes = shapes_of(SWITCH)
    if how == "missing":
        del shapes[EXPERT]
        return _rewritten(directory, shapes), f"tensor {EXPERT}: not found, expected with shape (24, 16)"
    if how == "unknown":
        return _rewritten(
            directory, shapes | {"more.weight": (3,)}
        ), "tensor more.weight: found with shape (3,), expected"
    if how == "shape":
        return _rewritten(
            directory, shapes | {EXPERT: (16, 24)}
        ), f"tensor {EXPERT}: found with shape (16, 24), expected (24, 16)"
    if how == "none":
        return "no weights"
    assert how == "dtype"
    _rewritten(directory, shapes)
    raw = whole.read_bytes()
    whole.write_bytes(raw.replace(b'"dtype":"F32"', b'"dtype":"I32"', 1))
    return "found with dtype I32"


def _rewritten(directory, shapes):
    writer = shards.Writer(directory, shapes, "float32", 10**9)
    for name, shape in shapes.items():
        writer.write(name, np.ones(shape, np.float32))


@pytest.mark.parametrize(
    "how",
    [
        "cut short",
        "too long",
        "no shard",
        "index",
        "not in the index",
        "config",
        "missing",
        "unknown",
        "shape",
        "none",
        "dtype",
    ],
)
def test_a_wrong_file_is_one_line_and_leaves_nothing(tmp_path, how, capsys):
    make(tmp_path / "theirs", SWITCH, limit=20_000)
    said = spoiled(tmp_path / "theirs", how)
    said = said[1] if isinstance(said, tuple) else said
    code = run(f"--source={tmp_path / 'theirs'}", f"--target={tmp_path / 'run'}")
    error = capsys.readouterr().err
    assert code == exits.EXIT_BAD_INPUT and said in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_copy_that_is_none_is_refused(tmp_path, capsys):
    """A file that has `lm_head.weight` though its embeddings are tied."""
    shapes = shapes_of(SWITCH)
    make(tmp_path / "theirs", SWITCH, shapes=shapes | {"lm_head.weight": shapes["shared.weight"]})
    assert run(f"--source={tmp_path / 'theirs'}", f"--target={tmp_path / 'run'}") == exits.EXIT_BAD_INPUT
    assert "lm_head.weight: found with other values than shared.weight" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "no source"),
        (["--source=x"], "no target"),
        (["--source=/nowhere", "--target=t"], "nothing is there"),
        (["--source=.", "--target=t", "--dtype=float64"], "one of float32, bfloat16"),
        (["--source=.", "--target=t", "--shard=big"], "a size such as 5GB"),
        (["--source=.", "--target=t", "--wrong=1"], "argument --wrong=1: accepted are --source="),
        (["--source=.", "--target=t", "--upcycle.every=2"], "--upcycle.experts"),
        (["--source=.", "--target=t", "--upcycle.experts=many"], "an integer"),
        (["--source=.", "--target=t", "--revision=main"], "accepted with a hub's name"),
        (["--source=.", "--target=."], "no T5X parameters"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.main(["convert", *arguments]) == exits.EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_target_that_is_there_is_left_alone(tmp_path, capsys):
    make(tmp_path / "theirs", SWITCH)
    (tmp_path / "run").mkdir()
    assert run(f"--source={tmp_path / 'theirs'}", f"--target={tmp_path / 'run'}") == exits.EXIT_BAD_INPUT
    assert "it is there" in capsys.readouterr().err and not list((tmp_path / "run").iterdir())


def test_upcycling_never_takes_what_another_source_left(tmp_path, capsys):
    from switchmoe.runs import trained as library

    dense = {name: make(tmp_path / name, T5, seed=seed) for name, seed in (("one", 0), ("two", 1))}
    target = f"--target={tmp_path / 'run'}"
    wrong = ["convert", f"--source={tmp_path / 'one'}", target, "--upcycle.experts=2", "--upcycle.every=3"]
    assert command.main(wrong) == exits.EXIT_BAD_INPUT
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    good = ["convert", f"--source={tmp_path / 'two'}", target, "--upcycle.experts=2", "--upcycle.every=2"]
    assert command.main([*good, "--dtype=bfloat16"]) == 0
    source = library.find(str(tmp_path / "run"))
    assert source.settings.model.dtype == "bfloat16"
    params = flatten_dict(library.on_one_device(source, source.settings), sep="/")
    wanted = dense["two"]["shared.weight"].astype("bfloat16").astype(np.float32)
    np.testing.assert_array_equal(np.asarray(params["embedding"], np.float32), wanted)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tolerance=nan"], "--tolerance=nan: accepted is a number above 0"),
        (["--tolerance=-1"], "--tolerance=-1: accepted is a number above 0"),
        (["--upcycle.experts=2", "--tolerance=1"], "accepted without --upcycle"),
        (["--upcycle.experts=2", "--upcycle.noise=inf"], "--upcycle.noise=inf: accepted is a number >= 0"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(tmp_path, arguments, message, capsys):
    make(tmp_path / "theirs", T5)
    asked = ["convert", f"--source={tmp_path / 'theirs'}", f"--target={tmp_path / 'run'}", *arguments]
    assert command.main(asked) == exits.EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_half_precision_comes_back_with_its_values(tmp_path):
    there = make(tmp_path / "theirs", T5, "float16")
    assert run(f"--source={tmp_path / 'theirs'}", f"--target={tmp_path / 'run'}") == 0
    assert run(f"--source={tmp_path / 'run'}", f"--target={tmp_path / 'back'}") == 0
    for name, tensor in sources.hugging_face(tmp_path / "back").tensors.items():
        if name in there:
            np.testing.assert_array_equal(tensor.read((), slice(None)), there[name].astype(np.float32))


@pytest.mark.parametrize("shape", [[333.0, 16], [-333, -16], "wide"])
def test_a_header_with_other_shapes_than_numbers_is_one_line(tmp_path, shape, capsys):
    make(tmp_path / "theirs", T5)
    with header_of(tmp_path / "theirs" / "model.safetensors") as header:
        header["shared.weight"]["shape"] = shape
    assert run(f"--source={tmp_path / 'theirs'}", f"--target={tmp_path / 'run'}") == exits.EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert "safetensors" in error and error.count("\n") == 1
