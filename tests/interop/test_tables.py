"""Tables of names: the released models' tensors are all claimed, once, and every wrong file is told by name."""

import dataclasses
import itertools
import json
import math
import re
from pathlib import Path

import pytest

from switchmoe.interop import convert, decoders, t5, tables
from switchmoe.settings import from_config
from switchmoe.training import places, train_state

FILES = sorted((Path(__file__).parent.parent / "fixtures" / "checkpoints").glob("*.json"))
KNOWN = {file.stem: json.loads(file.read_text()) for file in FILES}
UNITS = {"GB": 1e9, "B": 1e9}


@pytest.mark.parametrize("coefficient", [0.0, 0.001, 0.02, 1 / 3])
@pytest.mark.parametrize(
    "kind, more, choices, sparse_layers",
    [
        ("mixtral", {}, 2, 32),
        ("olmoe", {}, 8, 16),
        ("qwen2_moe", {"mlp_only_layers": [0, 1, 2]}, 4, 21),
        ("qwen3_moe", {"decoder_sparse_step": 3}, 8, 8),
    ],
)
def test_the_balance_loss_of_a_layer_has_its_share_of_theirs(kind, more, choices, sparse_layers, coefficient):
    """Theirs is K at even loads, once over all layers; ours 1, summed over them. There and back it is their number."""

    def refuse(*told):
        raise AssertionError(told)

    config = decoders.DEFAULTS[kind] | more | {"model_type": kind, "router_aux_loss_coef": coefficient}
    config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    settings = from_config(decoders.read_config(config, refuse))
    assert len(settings.sparse_blocks("decoder")) == sparse_layers
    wanted = coefficient * choices / sparse_layers
    assert settings.moe.balance_loss_weight == pytest.approx(wanted, rel=1e-12)
    assert decoders.write_config(settings, refuse)["router_aux_loss_coef"] == coefficient


def expanded(patterns):
    """Names and shapes of patterns in which {a-b} or {a-b/step} stands for each number of a range."""
    found = {}
    for pattern, shape in patterns.items():
        parts = re.split(r"\{(\d+)-(\d+)(?:/(\d+))?\}", pattern)
        texts, ranges = parts[::4], list(zip(parts[1::4], parts[2::4], parts[3::4], strict=True))
        numbers = (range(int(a), int(b) + 1, int(step or 1)) for a, b, step in ranges)
        for chosen in itertools.product(*numbers):
            inner = "".join(text + str(number) for text, number in zip(texts, (*chosen, ""), strict=True))
            found[inner] = tuple(shape)
    return found


def settings_of(groups):
    data = {"vocab_size": groups["model"]["vocab_rows"] - 100, "input_length": 512}
    return from_config(groups | {"data": groups["data"] | data})


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_released_models_tensors_are_claimed_once_and_fill_every_parameter(file):
    """Without weights: names and shapes, derived from the config by `transformers` or seen, as the file says."""
    known = json.loads(file.read_text())
    shapes = expanded(known["tensors"])
    family, groups = convert.from_fields(known["config"], file.name)
    settings = settings_of(groups)
    moves = tables.moves(family, settings, shapes)
    assert len({(move.theirs, move.lead, move.entry.part) for move in moves}) == len(moves)
    assert {move.theirs for move in moves} == shapes.keys()
    filled = {}
    for move in moves:
        assert (move.ours, move.index) not in filled
        filled[move.ours, move.index] = math.prod(move.shape)
    sizes = dict.fromkeys(places.names(settings), 0)
    for (name, _), size in filled.items():
        sizes[name] += size
    assert sizes == {name: math.prod(shape) for name, shape in places.names(settings).items()}
    total = sum(map(math.prod, shapes.values()))
    assert sum(filled.values()) == total == known["parameters"] == train_state.parameter_counts(settings)[0]


def rounded(figure):
    """(number, how far the true one may be) of a figure such as "1.2 GB", or of a whole number."""
    if isinstance(figure, int):
        return figure, 0
    text, unit = figure.split()
    return float(text) * UNITS[unit], 0.5 * UNITS[unit] / 10 ** len(text.partition(".")[2])


@pytest.mark.parametrize("name", KNOWN)
def test_a_released_models_size_is_the_published_one(name):
    """Parameters, and bytes in the type that the files have, as far as these are told; copies may be among the bytes."""
    known = KNOWN[name]
    size, item = known["parameters"], {"F32": 4, "BF16": 2}[known["dtype"]]
    assert known["published"] and known["published"].keys() <= {"parameters", "bytes"}
    if "parameters" in known["published"]:
        figure, off = rounded(known["published"]["parameters"])
        assert abs(size - figure) <= off
    if "bytes" in known["published"]:
        figure, off = rounded(known["published"]["bytes"])
        more = len(known["copies"]) * math.prod(known["tensors"]["shared.weight"]) * item
        assert size * item - off <= figure <= size * item + more + off


@pytest.mark.parametrize("name", KNOWN)
def test_each_file_says_what_was_seen_and_how_the_rest_was_derived(name):
    parts, known = {"config", "tensors", "dtype", "copies"}, KNOWN[name]
    assert known["name"] == name and set(known["seen"]) <= parts
    assert set(known["seen"]) == parts or len(known["derived"].split()) > 5


@pytest.mark.parametrize("name", [name for name in KNOWN if "copies" in KNOWN[name]])
def test_the_copies_that_a_switchs_files_have_are_recognised_and_no_others(name):
    """Of an untied one the output is no copy."""
    known = KNOWN[name]
    family, groups = convert.from_fields(known["config"], name)
    shapes = expanded(known["tensors"])
    there = shapes | dict.fromkeys(known["copies"], shapes["shared.weight"])
    found = tables.moves(family, settings_of(groups), there)
    copies = tables.copies(family, found, there)
    assert copies == dict.fromkeys(known["copies"], "shared.weight")
    assert copies.keys() == family.copies.keys() - {move.theirs for move in found}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_config_out_of_ours_is_theirs(file):
    """Read and written again: the fields that make the model are the same."""
    known = json.loads(file.read_text())["config"]
    family, groups = convert.from_fields(known, file.name)
    again, written = convert.to_fields(settings_of(groups))
    assert again.entries == family.entries
    also = {"mt5": {"model_type", "architectures"}}  # its model is T5's, with tie_word_embeddings false
    left_out = {
        "router_ignore_padding_tokens",
        "initializer_factor",
        "use_sliding_window",
        "clip_qkv",
        "pad_token_id",
    }
    left_out |= also.get(known["model_type"], set())
    if known["model_type"] == "olmoe":
        known = {name: value for name, value in known.items() if name != "bos_token_id"}
    for field in known.keys() - left_out:
        assert written[field] == known[field], field


def small(**moe):
    model = dict(d_model=16, d_ff=24, d_kv=4, num_heads=3, num_layers=4, activation="relu", vocab_rows=333)
    return from_config(dict(model=model, moe=dict(num_experts=3) | moe, data=dict(vocab_size=310)))


def written(family, settings):
    return {move.theirs: move.whole() for move in tables.moves(family, settings)}


def test_what_is_wrong_with_names_and_shapes_is_one_line_with_tensor_found_and_expected():
    settings, family = small(), t5.family(sparse=True, gated=False)
    good = written(family, settings)
    tables.moves(family, settings, good)
    expert = "encoder.block.1.layer.1.mlp.experts.expert_2.wi.weight"
    missing = {name: shape for name, shape in good.items() if name != expert}
    for shapes, said in (
        (missing, rf"^tensor {re.escape(expert)}: not found, expected with shape \(24, 16\)$"),
        (
            good | {expert: (16, 24)},
            rf"^tensor {re.escape(expert)}: found with shape \(16, 24\), expected \(24, 16\)$",
        ),
        (
            good | {"encoder.extra": (3,)},
            r"^tensor encoder.extra: found with shape \(3,\), expected are \d+ tensors of Switch",
        ),
        (
            good | {"lm_head.weight": (3, 3)},
            r"^tensor lm_head.weight: found with shape \(3, 3\), expected that of shared",
        ),
    ):
        with pytest.raises(tables.TableError, match=said):
            tables.moves(family, settings, shapes)
    unused = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": (32, 3)}
    copies = {"lm_head.weight": (333, 16), "encoder.embed_tokens.weight": (333, 16)}
    assert len(tables.moves(family, settings, good | unused | copies)) == len(
        tables.moves(family, settings, good)
    )


def test_a_parameter_that_a_family_does_not_have_is_told():
    with pytest.raises(
        tables.TableError, match="parameter decoder/blocks/block_1/moe/shared.*SwitchTransformers has nothing"
    ):
        tables.moves(t5.family(sparse=True, gated=False), small(num_shared=1))


@pytest.mark.parametrize(
    "field, value, accepted",
    [
        ("num_sparse_encoder_layers", 3, "divides 14 or 13"),
        ("router_bias", True, "false"),
        ("router_dtype", "float16", "float32 or bfloat16"),
        ("pad_token_id", 3, "0"),
        ("num_sparse_decoder_layers", 5, "if and only if the encoder's does"),
        ("num_experts", 0, "1 or more"),
        ("dense_act_fn", "swish", "relu"),
        ("dense_act_fn", "gated-gelu", "relu"),
        ("d_model", "wide", "of type int, as 768"),
        ("dropout_rate", "abc", "of type float"),
        ("tie_word_embeddings", 1, "of type bool"),
    ],
)
def test_a_switch_config_that_cannot_be_said_is_refused_by_field(field, value, accepted):
    config = {"model_type": "switch_transformers", "num_layers": 12, "num_decoder_layers": 12, field: value}
    if field == "num_sparse_encoder_layers":
        config["num_layers"] = 14
    if field == "num_sparse_decoder_layers":  # 1, 3, ... 9 of 11 blocks, beside 1, 3, ... 11 of 12
        config |= {"num_decoder_layers": 11, "num_sparse_encoder_layers": 6}
    with pytest.raises(ValueError, match=f"{field}.*{accepted}"):
        settings_of(convert.from_fields(config, "config.json")[1])


@pytest.mark.parametrize(
    "kind, field, value",
    [
        ("mixtral", "sliding_window", 4096),
        ("mixtral", "hidden_act", "gelu"),
        ("olmoe", "clip_qkv", 8.0),
        ("olmoe", "attention_bias", True),
        ("qwen3_moe", "rope_parameters", {"rope_type": "yarn", "factor": 4.0}),
        ("qwen3_moe", "rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("qwen3_moe", "rope_parameters", [1]),
        ("mixtral", "eos_token_id", []),
        ("mixtral", "hidden_size", [16]),
        ("qwen2_moe", "eos_token_id", ["end"]),
        ("qwen3_moe", "mlp_only_layers", [3]),
        ("qwen3_moe", "mlp_only_layers", list(range(24))),
        ("qwen2_moe", "decoder_sparse_step", 5),
        ("qwen2_moe", "shared_expert_intermediate_size", 1000),
        ("qwen2_moe", "layer_types", ["sliding_attention"]),
        ("llama", "model_type", "llama"),
        ("llama", "model_type", ["t5"]),
    ],
)
def test_a_decoders_config_that_cannot_be_said_is_refused_by_field(kind, field, value):
    with pytest.raises(ValueError, match=rf"config.json: {field}=.*: accepted is"):
        convert.from_fields({"model_type": kind, field: value}, "config.json")


def test_dense_blocks_first_and_a_step_are_refused_together():
    given = {"model_type": "qwen3_moe", "mlp_only_layers": [0], "decoder_sparse_step": 2}
    with pytest.raises(ValueError, match=r"mlp_only_layers=\[0\]: accepted is none, or the first ones with"):
        convert.from_fields(given, "config.json")


@pytest.mark.parametrize("kind, unit", [("mixtral", True), ("olmoe", True), ("olmoe", False)])
def test_a_single_choices_gate_is_one_or_its_probability_both_ways(kind, unit):
    """Theirs divides it by itself where gates are renormalised; `moe.renormalize` leaves it as it is, `moe.unit_gates` does so."""
    given = {"model_type": kind, "num_experts_per_tok": 1, "norm_topk_prob": unit, "vocab_size": 999}
    settings = settings_of(convert.from_fields(given, "config.json")[1])
    assert settings.moe.unit_gates == unit
    assert convert.to_fields(settings)[1].get("norm_topk_prob", True) == unit
    if kind == "mixtral":
        other = dataclasses.replace(settings, moe=dataclasses.replace(settings.moe, unit_gates=False))
        with pytest.raises(ValueError, match="moe.unit_gates=False.*is True with MixtralForCausalLM"):
            convert.to_fields(other)


@pytest.mark.parametrize(
    "length, factor, experts, slots",
    [(96, 1.26, 12, 11), (512, 1.2501, 8, 81), (114, 1.1, 5, 26), (100, 1.1, 10, 11)],
)
def test_their_slots_are_those_of_a_sequence_of_the_runs_length(length, factor, experts, slots):
    """ceil(length * factor / experts), by hand."""
    settings = small(num_experts=experts, eval_capacity_factor=factor)
    data = dataclasses.replace(settings.data, input_length=length, target_length=length)
    assert convert.to_fields(dataclasses.replace(settings, data=data))[1]["expert_capacity"] == slots


@pytest.mark.parametrize(
    "kind, field, value",
    [
        ("t5", "feed_forward_proj", "gelu"),
        ("t5", "pad_token_id", 1),
        ("mt5", "pad_token_id", 1),
        ("mt5", "feed_forward_proj", "gated-relu"),
    ],
)
def test_a_t5_config_that_cannot_be_said_is_refused_by_field(kind, field, value):
    with pytest.raises(ValueError, match=rf"config.json: {field}={value}: accepted is"):
        convert.from_fields({"model_type": kind, field: value}, "config.json")


@pytest.mark.parametrize(
    "group, field, value",
    [
        ("moe", "num_shared", 1),
        ("moe", "router", "top_k"),
        ("moe", "granularity", 2),
        ("moe", "unit_gates", True),
        ("moe", "d_ff", 16),
        ("moe", "attention", True),
        ("model", "positions", "rotary"),
        ("model", "qk_norm", "head"),
        ("model", "qkv_bias", True),
        ("model", "attention_scale", 0.5),
        ("model", "num_kv_heads", 1),
        ("model", "activation", "geglu"),
    ],
)
def test_our_settings_that_a_switch_cannot_say_are_refused_by_field(group, field, value):
    settings = small()
    group_of = dataclasses.replace(getattr(settings, group), **{field: value})
    with pytest.raises(ValueError, match=rf"^{group}.{field}=.*accepted for a Hugging Face directory is"):
        convert.to_fields(dataclasses.replace(settings, **{group: group_of}))


def test_sparse_blocks_where_a_switch_has_none_are_refused():
    with pytest.raises(ValueError, match=r"^moe.offset=2: accepted for a Hugging Face directory is"):
        convert.to_fields(small(every=4, offset=2))


@pytest.mark.parametrize(
    "kind, group, field, value",
    [
        ("mixtral", "model", "positions", "relative"),
        ("mixtral", "model", "activation", "geglu"),
        ("mixtral", "model", "attention_scale", 0.5),
        ("mixtral", "moe", "dropless", False),
        ("mixtral", "moe", "router", "switch"),
        ("mixtral", "moe", "granularity", 2),
        ("mixtral", "moe", "every", 2),
        ("mixtral", "moe", "renormalize", False),
        ("olmoe", "moe", "dense_first", 1),
        ("olmoe", "model", "d_kv", 48),
        ("olmoe", "moe", "shared_gate", True),
        ("qwen2_moe", "model", "d_kv", 48),
        ("qwen2_moe", "moe", "num_shared", 0),
        ("qwen2_moe", "moe", "shared_gate", False),
        ("qwen3_moe", "moe", "unit_gates", True),
    ],
)
def test_our_settings_that_a_decoder_cannot_say_are_refused_by_field(kind, group, field, value):
    settings = settings_of(convert.from_fields({"model_type": kind}, "config.json")[1])
    group_of = dataclasses.replace(getattr(settings, group), **{field: value})
    with pytest.raises(ValueError, match=rf"^{group}.{field}=.*accepted for a Hugging Face directory is"):
        convert.to_fields(dataclasses.replace(settings, **{group: group_of}))


def test_a_dense_decoder_alone_is_refused():
    settings = settings_of(convert.from_fields({"model_type": "mixtral"}, "config.json")[1])
    dense = dataclasses.replace(settings.moe, num_experts=1)
    with pytest.raises(ValueError, match=r"^moe.num_experts=1: .* 2 or more in a decoder alone"):
        convert.to_fields(dataclasses.replace(settings, moe=dense))
