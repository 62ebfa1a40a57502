"""Files of other code bases: torch's zip format without torch, and T5X's zarr leaves."""

import io
import json
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest
from test_convert import SWITCH, T5, make, run

from experiments import convert as command
from experiments import exits
from switchmoe.data import vocabulary
from switchmoe.interop import check, sources, torch_files

WORDS = [f"{a}{b}{c} {c}{a}" for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvwxyz"]


def tensors_of(file):
    return {name: tensor.read((), slice(None)) for name, tensor in sources.torch_zip(file).items()}


class Torch:
    """Writes torch's zip files: modules of its names stand in for it while a pickle is made."""

    def __init__(self, monkeypatch):
        self.modules = {name: types.ModuleType(name) for name in ("torch", "torch._utils", "os_like")}
        for name, module in self.modules.items():
            monkeypatch.setitem(sys.modules, name, module)

        def _rebuild_tensor_v2(*_):
            raise AssertionError("only its name is written")

        def _rebuild_parameter(*_):
            raise AssertionError("only its name is written")

        for function in (_rebuild_tensor_v2, _rebuild_parameter):
            function.__module__, function.__qualname__ = "torch._utils", function.__name__
            setattr(self.modules["torch._utils"], function.__name__, function)
        for name in ("FloatStorage", "BFloat16Storage", "LongStorage"):
            storage = type(name, (), {"__module__": "torch"})
            setattr(self.modules["torch"], name, storage)

    def save(self, path, state, more=None, compression=zipfile.ZIP_STORED):
        """``state``: (array, strides in elements or None, whether a parameter) by name; arrays of one object share a storage."""
        torch, arrays = self.modules["torch"], {}
        names = {"float32": "FloatStorage", "bfloat16": "BFloat16Storage", "int64": "LongStorage"}

        class Tensor:
            def __init__(self, value, strides, parameter):
                self.value, self.strides, self.parameter = value, strides, parameter

            def __reduce__(self):
                key = str(list(arrays).index(id(self.value)))
                kind = getattr(torch, names[self.value.dtype.name])
                shape = self.value.shape if self.strides is None else self.value.shape[::-1]
                steps = self.strides or tuple(s // self.value.itemsize for s in self.value.strides)
                inner = (Storage(kind, key, self.value.size), 0, shape, steps, False, None)
                found = (sys.modules["torch._utils"]._rebuild_tensor_v2, inner)
                if not self.parameter:
                    return found
                return sys.modules["torch._utils"]._rebuild_parameter, (
                    Tensor(self.value, self.strides, False),
                    True,
                    None,
                )

        class Storage:
            def __init__(self, *pid):
                self.pid = pid

        class Pickler(pickle.Pickler):
            def persistent_id(self, obj):
                return (
                    ("storage", obj.pid[0], obj.pid[1], "cpu", obj.pid[2])
                    if isinstance(obj, Storage)
                    else None
                )

        for value, _, _ in state.values():
            arrays.setdefault(id(value), value)
        stream = io.BytesIO()
        Pickler(stream, 2).dump({name: Tensor(*given) for name, given in state.items()} | (more or {}))
        with zipfile.ZipFile(path, "w", compression) as opened:
            opened.writestr("archive/data.pkl", stream.getvalue())
            opened.writestr("archive/byteorder", "little")
            for key, value in enumerate(arrays.values()):
                opened.writestr(f"archive/data/{key}", value.tobytes())
        return path


@pytest.fixture
def torch(monkeypatch):
    return Torch(monkeypatch)


def test_a_zip_of_torch_is_read_without_it(torch, tmp_path):
    """A shared storage, a transposed view, a parameter, bfloat16."""
    rng = np.random.default_rng(0)
    one, half = rng.standard_normal((3, 4), np.float32), rng.standard_normal((2, 5)).astype("bfloat16")
    state = {
        "a": (one, None, False),
        "b": (one, None, True),
        "t": (one, (1, 4), False),
        "h": (half, None, False),
    }
    found = tensors_of(torch.save(tmp_path / "x.bin", state))
    for name, wanted in {"a": one, "b": one, "t": one.T, "h": half}.items():
        np.testing.assert_array_equal(found[name], wanted)
    part = sources.torch_zip(tmp_path / "x.bin")["a"].read((1,), slice(1, 3))
    np.testing.assert_array_equal(part, one[1, 1:3])


def test_a_directory_of_pickles_becomes_a_run(torch, tmp_path):
    """In two shards with an index; the same as of safetensors."""
    there = make(tmp_path / "theirs", SWITCH)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text(json.dumps(SWITCH))
    names, index = sorted(there), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save(tmp_path / "pickled" / file, {name: (there[name], None, False) for name in part})
        index |= dict.fromkeys(part, file)
    text = json.dumps({"weight_map": index})
    (tmp_path / "pickled" / "pytorch_model.bin.index.json").write_text(text)
    for name in ("theirs", "pickled"):
        assert run(f"--source={tmp_path / name}", f"--target={tmp_path / name}-run") == 0
    manifests = [
        json.loads((tmp_path / f"{name}-run" / "checkpoints" / "0" / "files.json").read_text())
        for name in ("theirs", "pickled")
    ]
    assert manifests[0] == manifests[1]


class Bad:
    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize("how", ["code", "old", "short", "compressed", "no tensors", "beyond"])
def test_what_is_no_state_of_tensors_is_refused_and_nothing_of_it_runs(torch, tmp_path, how, capsys):
    file, value = tmp_path / "pytorch_model.bin", np.ones((3, 4), np.float32)
    state = {"a": (value, None, False)}
    said = {
        "code": "names __builtin__.print, which is not run",
        "old": "not a zip file",
        "short": "not a zip file, or cut short",
        "compressed": "uncompressed",
        "no tensors": "no dictionary of tensors",
        "beyond": "reaches beyond its storage",
    }[how]
    if how == "old":
        file.write_bytes(pickle.dumps({"a": 1}))
    elif how == "beyond":
        torch.save(file, {"a": (value, (100, 1), False)})
    else:
        more = {"code": {"b": Bad()}, "no tensors": {"b": 3}}.get(how)
        torch.save(file, state, more, zipfile.ZIP_DEFLATED if how == "compressed" else zipfile.ZIP_STORED)
    if how == "short":
        file.write_bytes(file.read_bytes()[:-30])
    (tmp_path / "config.json").write_text(json.dumps(SWITCH))
    assert run(f"--source={tmp_path}", f"--target={tmp_path / 'run'}") == exits.EXIT_BAD_INPUT
    told = capsys.readouterr()
    assert said in told.err and told.err.count("\n") == 1 and "must not run" not in told.out


@pytest.mark.parametrize(
    "module, name",
    [("os", "system"), ("torch._utils", "_rebuild_sparse_tensor"), ("torch.storage", "_load_from_bytes")],
)
def test_a_handful_of_names_is_admitted_and_others_are_told(module, name):
    stream = f"c{module}\n{name}\n.".encode()
    with pytest.raises(torch_files.PickleError, match=f"names {module}.{name}"):
        torch_files._Unpickler(io.BytesIO(stream)).load()


TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x0ctQ"  # 12 float32


def zipped(file, raw, compression=zipfile.ZIP_STORED):
    """A file of torch's with this pickle and a storage of 12 numbers."""
    with zipfile.ZipFile(file, "w") as opened:
        opened.writestr("archive/data.pkl", raw, compression)
        opened.writestr("archive/data/0", bytes(48))
    return file


def pickled(storage=STORAGE, offset=b"K\x00", shape=b"K\x03K\x04\x86", strides=b"K\x04K\x01\x86", before=b""):
    return (
        b"\x80\x02}X\x01\x00\x00\x00a" + before + TENSOR + b"(" + storage + offset + shape + strides + b"tRs."
    )


@pytest.mark.parametrize(
    "raw, said",
    [
        (pickled(storage=b"N"), "other things than a storage and sizes"),
        (pickled(shape=b"X\x01\x00\x00\x00aX\x01\x00\x00\x00b\x86"), "other things than a storage and sizes"),
        (pickled(strides=b"K\x01\x85"), "other things than a storage and sizes"),
        (pickled(offset=b"J\xff\xff\xff\xff"), "other things than a storage and sizes"),
        (pickled(shape=b"N"), "can't be read"),
        (pickled(before=b"Nr\xff\xff\xff\x010"), "numbers an object 33,554,431"),
        (pickled(before=TENSOR + b"N}X\x0c\x00\x00\x00__defaults__)s\x86b0"), "can't be read"),
        (pickled(storage=b"(X\x01\x00\x00\x00ytQ"), "accepted are storages"),
        (b"\x80\x02}K\x01" + TENSOR + b"(" + STORAGE + b"K\x00))tRs.", "no dictionary of tensors"),
        (b"\xff", "can't be read"),
        (b"", "can't be read"),
    ],
)
def test_a_pickle_that_is_no_state_is_one_line(raw, said, tmp_path):
    """Among them one that asks for half a gigabyte with five bytes, and one that changes what the next file would be read with."""
    np.testing.assert_array_equal(tensors_of(zipped(tmp_path / "good.bin", pickled()))["a"], np.zeros((3, 4)))
    with pytest.raises(sources.SourceError, match=said) as error:
        sources.torch_zip(zipped(tmp_path / "bad.bin", raw))
    assert "\n" not in str(error.value)
    sources.torch_zip(tmp_path / "good.bin")


@pytest.mark.parametrize("how", ["deflated", "encrypted", "method", "broken", "header"])
def test_a_zip_that_torch_does_not_write_is_one_line(how, tmp_path):
    """A deflated pickle is not unpacked: its size is what the file's writer likes."""
    compression = zipfile.ZIP_DEFLATED if how in ("deflated", "broken") else zipfile.ZIP_STORED
    file = zipped(tmp_path / "bad.bin", pickled(), compression)
    raw = bytearray(file.read_bytes())
    first, last = raw.index(b"PK\x01\x02"), raw.rindex(b"PK\x01\x02")
    if how == "encrypted":
        raw[6] |= 1
        raw[first + 8] |= 1
    elif how == "method":
        raw[8] = raw[first + 10] = 77
    elif how == "broken":
        raw[30 + len("archive/data.pkl")] ^= 0xFF
    elif how == "header":
        raw[last + 42 : last + 46] = (len(raw) - 10).to_bytes(4, "little")  # of the storage, behind the end
    file.write_bytes(raw)
    with pytest.raises(
        sources.SourceError, match="uncompressed" if how != "header" else "can't be read|cut short"
    ):
        sources.torch_zip(file)


def test_a_header_of_any_size_is_not_read(tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    file.write_bytes((101).to_bytes(8, "little") + b"{}" + b" " * 99)
    assert sources.safetensors(file) == {}
    monkeypatch.setattr(sources, "LARGEST_HEADER", 100)
    with pytest.raises(sources.SourceError, match="not a safetensors file"):
        sources.safetensors(file)


def t5x_names(there, config=SWITCH, axes=3):
    """T5X's names and layout of a model that `make` made: by hand, from Hugging Face's.

    Args:
      axes: of a query's kernel; flaxformer's has one for the heads.
    """
    found = {"token_embedder.embedding": there["shared.weight"]}
    if "lm_head.weight" in there:
        found["decoder.logits_dense.kernel"] = there["lm_head.weight"].T
    dense, names = (
        ("mlp", ("wi", "wo")) if "num_experts" in config else ("DenseReluDense", ("wi_0", "wi_1", "wo"))
    )
    for stack, own, ff in (("encoder", "attention", 1), ("decoder", "self_attention", 2)):
        theirs = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        found[f"{stack}.relpos_bias.rel_embedding"] = there[theirs].T
        found[f"{stack}.{stack}_norm.scale"] = there[f"{stack}.final_layer_norm.weight"]
        for n in range(config["num_layers" if stack == "encoder" else "num_decoder_layers"]):
            block, layer = f"{stack}.block.{n}.layer", f"{stack}.layers_{n}"
            kinds = [(own, f"{block}.0.SelfAttention", f"{block}.0", f"pre_{own}")]
            if stack == "decoder":
                cross = f"{block}.1.EncDecAttention", f"{block}.1", "pre_cross_attention"
                kinds.append(("encoder_decoder_attention", *cross))
            for name, attention, norm, before in kinds:
                for a, b in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
                    kernel = there[f"{attention}.{b}.weight"].T
                    apart = a == "query" and axes == 3
                    found[f"{layer}.{name}.{a}.kernel"] = kernel.reshape(16, 3, 4) if apart else kernel
                found[f"{layer}.{before}_layer_norm.scale"] = there[f"{norm}.layer_norm.weight"]
            found[f"{layer}.pre_mlp_layer_norm.scale"] = there[f"{block}.{ff}.layer_norm.weight"]
            router = f"{block}.{ff}.mlp.router.classifier.weight"
            if router in there:
                found[f"{layer}.mlp.router.router_weights.w.kernel"] = there[router].T
            for a in names:
                if router in there:
                    experts = [there[f"{block}.{ff}.mlp.experts.expert_{e}.{a}.weight"].T for e in range(3)]
                    found[f"{layer}.mlp.expert.{a}.kernel"] = np.stack(experts)
                else:
                    found[f"{layer}.mlp.{a}.kernel"] = there[f"{block}.{ff}.{dense}.{a}.weight"].T
    return {f"target.{name}": value for name, value in found.items()}


def write_t5x(directory, arrays):
    import tensorstore

    directory.mkdir()
    for name, value in arrays.items():
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{directory / name}/"}}
        spec |= {
            "metadata": {"compressor": {"id": "gzip", "level": 1}},
            "dtype": str(value.dtype),
            "create": True,
        }
        tensorstore.open(spec, shape=value.shape).result().write(value).result()
    (directory / "checkpoint").write_bytes(b"msgpack")


SPARSE_APART = SWITCH | {"num_decoder_layers": 4, "num_sparse_decoder_layers": 1}


@pytest.mark.parametrize(
    "config, axes",
    [(SWITCH, 3), (SWITCH, 2), (SPARSE_APART, 3), (T5, 2), (T5, 3)],
    ids=["switch", "two axes", "one sparse block in the decoder", "t5 1.1", "t5 1.1, three axes"],
)
def test_a_t5x_checkpoint_is_the_same_model_as_hugging_faces(config, axes, tmp_path):
    """Of T5 1.1 gated feed-forwards, unequal stacks, and an output of its own; the vocabulary that lies beside it is the run's."""
    import jax
    from flax.traverse_util import flatten_dict

    from switchmoe.runs import trained

    there = make(tmp_path / "theirs", config)
    write_t5x(tmp_path / "t5x", t5x_names(there, config, axes))
    model_bytes = vocabulary.train(WORDS, 300)
    (tmp_path / "t5x" / "spiece.model").write_bytes(model_bytes)
    found = {}
    for name in ("theirs", "t5x"):
        assert run(f"--source={tmp_path / name}", f"--target={tmp_path / name}-run") == 0
        source = trained.find(f"{tmp_path / name}-run")
        found[name] = flatten_dict(jax.device_get(trained.on_one_device(source, source.settings)), sep="/")
    assert source.vocabulary.model_bytes == model_bytes and source.settings.data.vocab_size == 300
    if config is not T5:
        assert source.settings.moe.jitter == 0.0 and source.settings.moe.group_size == 8192  # Flaxformer's
    assert found["theirs"].keys() == found["t5x"].keys()
    for name, value in found["theirs"].items():
        np.testing.assert_array_equal(found["t5x"][name], value)


def test_scanned_layers_are_refused(tmp_path, capsys):
    """T5X's other layout: the layers along the second axis of one array."""
    there = t5x_names(make(tmp_path / "theirs", T5), T5)
    scanned = {name: value for name, value in there.items() if ".layers_" not in name}
    query = there["target.encoder.layers_0.attention.query.kernel"]
    scanned["target.encoder.encoder.attention.query.kernel"] = np.stack([query, query], axis=1)
    write_t5x(tmp_path / "t5x", scanned)
    assert run(f"--source={tmp_path / 't5x'}", f"--target={tmp_path / 'run'}") == exits.EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert (
        "tensor target.encoder.layers_0.attention.query.kernel: not found" in error and error.count("\n") == 1
    )


def test_a_check_of_t5x_that_is_asked_for_is_refused_before_anything_is_written(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(check, "available", lambda: True)
    write_t5x(tmp_path / "t5x", t5x_names(make(tmp_path / "theirs", SWITCH)))
    asked = ["convert", f"--source={tmp_path / 't5x'}", f"--target={tmp_path / 'run'}"]
    assert command.main([*asked, "--check=True"]) == exits.EXIT_BAD_INPUT
    assert "--check=True: transformers reads no T5X checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert command.main(asked) == 0
    assert "no check: transformers reads no T5X checkpoint" in capsys.readouterr().out


def test_a_t5x_leaf_that_is_missing_is_told(tmp_path, capsys):
    there = t5x_names(make(tmp_path / "theirs", SWITCH))
    lost = "target.decoder.layers_1.mlp.expert.wo.kernel"
    write_t5x(tmp_path / "t5x", {name: value for name, value in there.items() if name != lost})
    assert run(f"--source={tmp_path / 't5x'}", f"--target={tmp_path / 'run'}") == exits.EXIT_BAD_INPUT
    assert f"tensor {lost}: not found, expected with shape (3, 24, 16)" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["gone", "cut"])
def test_a_t5x_chunk_that_is_gone_or_cut_is_named_and_nothing_is_left(tmp_path, fault, capsys):
    there = make(tmp_path / "theirs", SWITCH)
    write_t5x(tmp_path / "t5x", t5x_names(there))
    leaf = tmp_path / "t5x" / "target.encoder.layers_0.mlp.wi.kernel"
    (chunk,) = [path for path in leaf.iterdir() if not path.name.startswith(".")]
    chunk.unlink() if fault == "gone" else chunk.write_bytes(chunk.read_bytes()[:40])
    assert run(f"--source={tmp_path / 't5x'}", f"--target={tmp_path / 'run'}") == exits.EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert (
        "tensor target.encoder.layers_0.mlp.wi.kernel: a part can't be read" in error
        and error.count("\n") == 1
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t5x", "theirs"]
