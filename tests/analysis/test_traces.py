"""Routing traces: what they hold is what the layer did, whose text it is, how they are written, stopped and read."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from test_transformer import apply, init, packed, tiny

from switchmoe.analysis.routing import arrays, page, summary, traces, tracing
from switchmoe.data import batches, origins, vocabulary
from switchmoe.data.errors import DataError
from switchmoe.runs import integrity, trained
from switchmoe.settings import DataSettings, from_config

WORDS = "river sea bed arm old long runs to the of and house stone road north south light water".split()
RANDOM = np.random.default_rng(0)
TEXTS = [" ".join(RANDOM.choice(WORDS, 40)) + "." for _ in range(60)]


@functools.cache
def words():
    return vocabulary.Vocabulary.from_bytes(vocabulary.train(TEXTS, 290))


@pytest.mark.parametrize("objective", ["span_corruption", "prefix_lm", "causal_lm"])
def test_every_token_is_of_the_document_that_it_was_written_in(objective):
    """Documents of one letter each: the letter says whose a token is."""
    texts = ["a" * 30, "b" * 30, "c" * 25]
    letters = vocabulary.Vocabulary.from_bytes(vocabulary.train([" ".join("abc") * 20], 263))
    data = DataSettings(objective=objective, input_length=12, target_length=8, batch_size=2)
    seen = set()
    for origin in origins.traced(data, letters, [(text, "") for text in texts]):
        for name, owner_BL in origin.document.items():
            ids_BL = origin.batch[name]
            assert ((owner_BL == -1) == (ids_BL == 0)).all()
            for token, owner in zip(ids_BL.ravel(), owner_BL.ravel(), strict=True):
                text = letters.decode([token]).strip()
                if text in ("a", "b", "c"):
                    assert "abc"[owner] == text
                    seen.add(text)
    assert seen >= {"a", "b"}


def test_batches_are_those_of_the_evaluation_and_can_be_left_out():
    data = DataSettings(objective="prefix_lm", prefix="full", input_length=10, target_length=6, batch_size=4)
    documents = [(text, "") for text in TEXTS]
    found = [origin.batch for origin in origins.traced(data, words(), documents)]
    wanted = batches.eval_batches(data, words(), TEXTS, padded=True)
    assert len(found) == len(wanted) > 3
    for one, other in zip(found, wanted, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
    with pytest.raises(DataError, match="data.input_length=500"):
        list(origins.traced(DataSettings(input_length=500), words(), documents[:1]))


def test_labels_of_the_packaged_text_and_of_files(tmp_path):
    topics = {label for _, label in origins.labelled(DataSettings(), "validation", "topic", share=0.3)}
    assert {"Geography", "History", "Technology"} <= topics
    path = tmp_path / "pages.jsonl"
    path.write_text('{"text": "eins", "lang": "de"}\n{"text": "one", "lang": "en"}\n')
    data = DataSettings(source=str(path))
    assert list(origins.labelled(data, "all", "lang")) == [("eins", "de"), ("one", "en")]
    assert list(origins.labelled(data, "all", "file")) == [("eins", "pages"), ("one", "pages")]
    with pytest.raises(DataError, match="--label=tongue: neither"):
        list(origins.labelled(data, "all", "tongue"))
    with pytest.raises(DataError, match="--label=lang: .*accepted is topic"):
        list(origins.labelled(DataSettings(), "all", "lang"))


@pytest.mark.parametrize("router, choices", [("top_k", 2), ("expert_choice", 1)])
def test_a_trace_tells_what_the_layers_metrics_sum_up(router, choices):
    moe = dict(router=router, choices=choices, num_experts=4)
    settings = tiny(moe=moe | (dict(decoder_router="switch") if router == "expert_choice" else {}))
    params = init(settings)["params"]
    batch = {
        "inputs": jax.random.randint(jax.random.key(1), (4, 12), 0, 300),
        "targets": packed(4, 6)["targets"],
    }
    batch["inputs"] = batch["inputs"].at[:, 10:].set(0)
    logits_BLV, aux = apply(settings, {"params": params}, batch["inputs"], batch["targets"])
    found = jax.jit(functools.partial(tracing.choose, settings=settings, probabilities=True))(params, batch)
    np.testing.assert_array_equal(found["predicted"], logits_BLV.argmax(-1))
    for stack, ids_BL in (("encoder", batch["inputs"]), ("decoder", batch["targets"])):
        real_BL = np.asarray(ids_BL) != 0
        for layer in range(len(found[stack]["expert"])):
            one = {name: np.asarray(value[layer])[real_BL] for name, value in found[stack].items()}
            chosen = one["expert"][one["expert"] >= 0]
            load_E = np.bincount(chosen, minlength=4) / len(chosen)
            np.testing.assert_allclose(load_E, aux[stack]["expert_load"][layer], atol=1e-6)
            np.testing.assert_allclose(one["entropy"].mean(), aux[stack]["router_entropy"][layer], atol=1e-5)
            np.testing.assert_allclose(one["confidence"], one["probability"].max(axis=-1))
            if router == "expert_choice" and stack == "encoder":
                assert np.isnan(one["margin"]).all() and (one["gate"][one["expert"] >= 0] > 0).all()
                continue
            dropped = 1 - one["kept"].mean()
            np.testing.assert_allclose(dropped, aux[stack]["fraction_dropped"][layer], atol=1e-6)
            assert (one["gate"][~one["kept"]] == 0).all() and (one["margin"] >= 0).all()
            if router != "expert_choice":
                best = np.sort(np.log(one["probability"]), axis=-1)[:, ::-1]
                width = one["expert"].shape[1]
                np.testing.assert_allclose(one["margin"], best[:, width - 1] - best[:, width], atol=1e-4)


def source(tmp_path, **groups):
    """A model with parameters at random, as `trained.find` would give it."""
    data = dict(
        source=str(tmp_path / "text.txt"), input_length=12, target_length=8, batch_size=4, vocab_size=300
    )
    settings = from_config(
        {"model": dict(d_model=16, d_ff=16, d_kv=8, num_heads=2, num_layers=2), "moe": dict(num_experts=4), "data": data} | groups
    )  # fmt: skip
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    return trained.Source(tmp_path / "1", settings, words())


@pytest.fixture
def one_model(monkeypatch, one_device):
    monkeypatch.setattr(trained, "parameters", lambda source, settings, mesh: init(settings)["params"])
    monkeypatch.setattr(tracing, "PART_ROWS", 400)


def rows(directory, info):
    return [traces.read_layer(directory, name) for name in info.layers]


def test_a_trace_that_was_stopped_goes_on_and_a_whole_one_stays(tmp_path, one_model):
    model, text, told = source(tmp_path), tracing.Text(tokens=900), []
    whole = tracing.write(model, model.settings, text, tmp_path / "whole", told=told.append)
    assert len(traces.parts(tmp_path / "whole")) > 2 and whole.complete and told == sorted(told)
    assert 900 <= whole.tokens == told[-1] < 920
    layers = rows(tmp_path / "whole", whole)
    assert sum(len(layers[i].token_N) for i in (0, 1)) == whole.tokens
    assert len({(s, p) for s, p in zip(layers[0].sequence_N, layers[0].position_N, strict=True)}) == len(
        layers[0].token_N
    )

    def stop(done):
        if done > 500:
            raise KeyboardInterrupt

    stopped = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        tracing.write(model, model.settings, text, stopped, told=stop)
    assert not traces.read_info(stopped).complete and traces.parts(stopped)
    again = []
    info = tracing.write(model, model.settings, text, stopped, told=again.append)
    assert info == whole and again[0] > told[0]
    for one, other in zip(rows(stopped, info), layers, strict=True):
        for name in one._fields[2:-2]:
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    tracing.write(model, model.settings, text, stopped, told=lambda done: pytest.fail("it was whole"))
    with pytest.raises(ValueError, match="another model, text or setting"):
        tracing.write(model, model.settings, tracing.Text(tokens=800), stopped)


def test_a_trace_of_another_checkpoint_or_share_of_the_text_is_not_kept(tmp_path, one_model):
    model, text, place = source(tmp_path), tracing.Text("validation", tokens=100), tmp_path / "t"
    data = dataclasses.replace(model.settings.data, validation_share=0.5)
    shared = dataclasses.replace(model.settings, data=data)
    (tmp_path / "1").mkdir()
    manifest = tmp_path / "1" / integrity.MANIFEST
    manifest.write_text("{}")
    whole = tracing.write(model, shared, text, place)
    assert tracing.write(model, shared, text, place) == whole
    other = dataclasses.replace(model.settings, data=dataclasses.replace(data, validation_share=0.4))
    with pytest.raises(ValueError, match=r"another model, text or setting \(validation_share\)"):
        tracing.write(model, other, text, place)
    manifest.write_text('{"state/other": [1, 2]}')  # trained again to the same step, in the same place
    with pytest.raises(ValueError, match=r"setting \(checkpoint\)"):
        tracing.write(model, shared, text, place)
    before = {name: {key: of for key, of in getattr(whole, name).items() if key not in traces.LATER} for name in ("identity", "reading")}  # fmt: skip
    traces.write_info(place, dataclasses.replace(whole, **before))
    assert tracing.write(model, other, text, place).tokens == whole.tokens


def test_a_batch_has_the_labels_of_its_own_documents():
    """Not of all that were read before it: of many documents that would cost more and more."""
    info = traces.Info((traces.LayerName("encoder", 0),), num_experts=2, choices=1, label="topic")
    ids_BL, document_BL = np.array([[5, 6, 7, 8]]), np.array([[4, 4, 2, 3]])
    origin = origins.Origin(
        {"inputs": ids_BL}, {"inputs": document_BL}, ["old", "older", "b", "", "a", "new"]
    )
    found = tracing._Part(info)._rows(origin, "inputs", 1, 0, *np.nonzero(ids_BL))
    assert found["labels"] == ("a", "b") and found["label_N"].tolist() == [0, 0, 1, -1]


def test_the_distribution_on_request_and_padded_lists(tmp_path, one_model):
    model = source(tmp_path, moe=dict(num_experts=4, router="expert_choice", decoder_router="switch"))
    info = tracing.write(model, model.settings, tracing.Text(tokens=300), tmp_path / "t", probabilities=True)
    encoder, decoder = (traces.read_layer(tmp_path / "t", name) for name in (info.layers[0], info.layers[-1]))
    np.testing.assert_allclose(decoder.probability_NE.sum(1), 1, atol=1e-5)
    assert info.choices == 4 and (decoder.expert_NK[:, 1:] == -1).all() and (encoder.target_N == -1).all()
    shifted = decoder.position_N[1:] > 0
    np.testing.assert_array_equal(decoder.token_N[1:][shifted], decoder.target_N[:-1][shifted])
    shown = traces.read_tokens(tmp_path / "t")
    assert shown[info.sentinels[1] - 1] == "<extra_id_0>" and len(shown) == words().size


@pytest.mark.parametrize("moe, message", [(dict(num_experts=1), "no router"), (dict(router="soft", decoder_router="switch"), "chooses nothing")])  # fmt: skip
def test_models_that_choose_nothing_are_refused(tmp_path, one_model, moe, message):
    model = source(tmp_path, moe=moe)
    with pytest.raises(ValueError, match=message):
        tracing.write(model, model.settings, tracing.Text(), tmp_path / "t")


def test_arrays_of_another_system(tmp_path):
    expert_TLK = np.array([[[0, 1], [2, 3]], [[1, 0], [3, -1]], [[2, 1], [0, 1]]])
    file = tmp_path / "experts.npz"
    np.savez(file, experts=expert_TLK, tokens=[5, 6, 5], sequences=[1, 0, 1], pieces=["a"] * 7)
    info = arrays.convert(file, tmp_path / "t")
    assert (info.num_experts, info.choices, len(info.layers), info.tokens) == (4, 2, 2, 3)
    first, second = rows(tmp_path / "t", info)
    np.testing.assert_array_equal(first.expert_NK, [[1, 0], [0, 1], [2, 1]])  # by request
    np.testing.assert_array_equal(second.position_N, [0, 0, 1])
    np.testing.assert_array_equal(second.kept_NK, [[True, False], [True, True], [True, True]])
    assert np.isnan(first.gate_NK).all() and traces.read_tokens(tmp_path / "t") == ["a"] * 7
    with pytest.raises(ValueError, match="experts=float64.*integer array"):
        arrays.write(tmp_path / "u", np.zeros((2, 2, 2)))
    with pytest.raises(ValueError, match=r"tokens=\[2\]: accepted is \[3\]"):
        arrays.write(tmp_path / "u", expert_TLK, token_T=np.zeros(2))
    assert info.guessed
    np.savez(file, experts=expert_TLK, num_experts=6)  # two that nothing went to
    info = arrays.convert(file, tmp_path / "six")
    assert (info.num_experts, info.guessed, traces.read_info(tmp_path / "six")) == (6, False, info)
    for wrong, message in (
        (0, "num_experts=0; accepted is an integer >= 1"),
        (3, "indices from -1 to 3"),
        ("8", "num_experts=8;"),
    ):
        np.savez(file, experts=expert_TLK, num_experts=wrong)
        with pytest.raises(ValueError, match=message):
            arrays.convert(file, tmp_path / "u")
    np.savez(file, other=expert_TLK)
    with pytest.raises(ValueError, match="has other; accepted is experts"):
        arrays.convert(file, tmp_path / "u")


@pytest.mark.parametrize(
    "sequence, position", [([0, 0], [0, 1]), ([0, 0, 0], [0, 1, 3]), ([0, 0, 1], [0, 1, 2])]
)
def test_layers_of_other_tokens_are_refused(tmp_path, sequence, position):
    """A layer that lacks a token, or has another one, beside one of tokens 0, 1, 2 of a sequence."""
    import pyarrow.parquet

    layers = (traces.LayerName("decoder", 0), traces.LayerName("decoder", 1))
    for name, rows in zip(layers, (([0] * 3, [0, 1, 2]), (sequence, position)), strict=True):
        count = len(rows[0])
        columns = {"sequence": rows[0], "position": rows[1], "stack": ["decoder"] * count, "layer": [name.layer] * count, "expert": [[0]] * count}  # fmt: skip
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / f"part-{name.layer}.parquet")
    info = traces.Info(layers, num_experts=2, choices=1)
    traces.write_info(tmp_path, info)
    for read in (summary.figures, lambda directory: page.explored(directory, info, [])):
        with pytest.raises(
            ValueError, match=r"decoder/1 has rows of other tokens than decoder/0 \(\d and 3\); accepted"
        ):
            read(tmp_path)


@pytest.mark.parametrize(
    "column, message",
    [
        ({"expert": [0, 1]}, "decoder/0: expert is int64; accepted is list of K int16: the chosen experts"),
        ({"expert": [["a"], ["b"]]}, "decoder/0: expert is list"),
        ({"sequence": ["a", "b"]}, "decoder/0: sequence is string; accepted is int32"),
        ({"kept": [[1], [0]]}, "decoder/0: kept is list"),
        ({"label": [[1], [0]]}, "decoder/0: label is list"),
    ],
)
def test_a_column_of_another_type_is_named(tmp_path, column, message):
    import pyarrow.parquet

    info = traces.Info((traces.LayerName("decoder", 0),), num_experts=2, choices=1)
    traces.write_info(tmp_path, info)
    rows = {
        "sequence": [0, 0],
        "position": [0, 1],
        "stack": ["decoder"] * 2,
        "layer": [0, 0],
        "expert": [[0], [1]],
    }
    pyarrow.parquet.write_table(pyarrow.table(rows | column), tmp_path / "part-0.parquet")
    with pytest.raises(ValueError, match=f"--trace: {message}"):
        traces.read_layer(tmp_path, info.layers[0])


@pytest.mark.parametrize(
    "field, message",
    [
        ({"num_experts": "8"}, "num_experts='8', no int"),
        ({"num_experts": 0}, "num_experts=0, less than 1"),
        ({"choices": 1.5}, "choices=1.5, no int"),
        ({"sentinels": [1]}, "sentinels=.1., not two ids"),
        ({"sentinels": 3}, "not iterable"),
        ({"layers": [{"stack": "decoder", "layer": "0"}]}, "layers: .*not a string, an integer"),
        ({"reading": []}, "reading=.., no dict"),
    ],
)
def test_a_field_of_another_type_is_named(tmp_path, field, message):
    info = traces.Info((traces.LayerName("decoder", 0),), num_experts=2, choices=1)
    traces.write_info(tmp_path, info)
    written = json.loads((tmp_path / "trace.json").read_text())
    (tmp_path / "trace.json").write_text(
        json.dumps(written | {"sentinels": None, "source": None, "complete": 0})
    )
    assert traces.read_info(tmp_path) == info  # null: it is not known
    (tmp_path / "trace.json").write_text(json.dumps(written | field))
    with pytest.raises(ValueError, match=f"not a trace .*{message}") as found:
        traces.read_info(tmp_path)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("damage", ["short", "flipped"])
def test_damaged_arrays_are_refused(tmp_path, damage):
    file = tmp_path / "experts.npz"
    np.savez(file, experts=np.zeros((1000, 2, 2), int))
    raw = file.read_bytes()
    file.write_bytes(raw[:-100] if damage == "short" else raw[:300] + b"\1" * 40 + raw[340:])
    with pytest.raises(ValueError, match="cannot be read"):
        arrays.convert(file, tmp_path / "t")
    np.savez(file, experts=np.zeros((3, 1, 1), int), sequences=["a", "b", "c"])
    with pytest.raises(ValueError, match="sequences=.*: accepted are numbers"):
        arrays.convert(file, tmp_path / "t")


def test_a_table_with_the_required_columns_alone_is_a_trace(tmp_path):
    import pyarrow.parquet

    table = pyarrow.table(
        {"sequence": [0, 0, 1], "position": [1, 0, 0], "stack": ["decoder"] * 3, "layer": [2, 2, 2], "expert": [[1], [0, 1], []]}
    )  # fmt: skip
    pyarrow.parquet.write_table(table, tmp_path / "part-0.parquet")
    info = traces.Info((traces.LayerName("decoder", 2),), num_experts=2, choices=2)
    traces.write_info(tmp_path, info)
    assert traces.read_info(tmp_path) == info
    layer = traces.read_layer(tmp_path, info.layers[0])
    np.testing.assert_array_equal(layer.expert_NK, [[0, 1], [1, -1], [-1, -1]])
    np.testing.assert_array_equal(layer.document_N, [0, 0, 1])
    with pytest.raises(ValueError, match="expert 1; accepted are 0 to 0"):
        traces.write_info(tmp_path, traces.Info(info.layers, 1, 2))
        traces.read_layer(tmp_path, info.layers[0])
    (tmp_path / "trace.json").write_text("{}")
    with pytest.raises(ValueError, match="not a trace"):
        traces.read_info(tmp_path)
