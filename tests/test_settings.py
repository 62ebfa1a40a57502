"""Settings: every impossible value is refused in one line with field, value and what is accepted."""

import pytest

from switchmoe.model.moe_rules import without_effect
from switchmoe.parallel import sharding
from switchmoe.runs import telling
from switchmoe.settings import Settings, default_config, from_config, to_dict

LENGTHS = {"encoder": 512, "decoder": 114}

IMPOSSIBLE = [
    ({"model": {"num_heads": 0}}, "model.num_heads=0: accepted is an integer >= 1"),
    ({"model": {"activation": "swish"}}, "model.activation=swish: accepted is one of relu, geglu"),
    ({"model": {"dtype": "float16"}}, "model.dtype=float16: accepted is one of float32, bfloat16"),
    ({"model": {"num_layers": 0}}, "model.num_layers=0: accepted is an integer >= 1"),
    ({"model": {"dropout_rate": 1.0}}, "model.dropout_rate=1.0: accepted is a number >= 0 and < 1"),
    ({"model": {"d_model": "768"}}, "model.d_model=768: accepted is a value of type int"),
    ({"model": {"width": 3}}, "model.width=3: accepted is one of the fields d_model"),
    ({"modle": {}}, "modle={}: accepted is one of the groups model, moe"),
    ({"moe": {"capacity_factor": 0.0}}, "moe.capacity_factor=0.0: accepted is a number > 0"),
    ({"moe": {"capacity_factor": float("nan")}}, "moe.capacity_factor=nan: accepted is a finite number"),
    ({"moe": {"num_experts": 0}}, "moe.num_experts=0: accepted is an integer >= 1"),
    ({"moe": {"every": 5}}, "moe.every=5: accepted is a divisor of model.num_layers=12"),
    ({"moe": {"router": "best"}}, "moe.router=best: accepted is one of switch"),
    ({"moe": {"dispatch": "magic"}}, "moe.dispatch=magic: accepted is one of auto, einsum"),
    ({"data": {"batch_size": 0}}, "data.batch_size=0: accepted is an integer >= 1"),
    ({"data": {"noise_density": 1.5}}, "data.noise_density=1.5: accepted is a number between 0 and 1"),
    ({"optimizer": {"name": "sgd"}}, "optimizer.name=sgd: accepted is one of adafactor, adamw"),
    ({"train": {"accumulate": 3}}, "train.accumulate=3: accepted is a divisor of data.batch_size=128"),
    ({"train": {"seed": -1}}, "train.seed=-1: accepted is an integer >= 0"),
    ({"mesh": {"layout": "ring"}}, "mesh.layout=ring: accepted is one of data, model, data_model"),
    ({"checkpoint": {"keep": 0}}, "checkpoint.keep=0: accepted is an integer >= 1"),
]


def checked(config, devices=1):
    """`sharding.check` on so many devices."""
    settings = from_config(config)
    (sizes, _) = sharding.axis_sizes(settings.mesh, devices)
    return sharding.check(settings, LENGTHS, dict(zip(sharding.AXES, sizes, strict=True)))


@pytest.mark.parametrize("config, message", IMPOSSIBLE, ids=[m.split(":")[0] for _, m in IMPOSSIBLE])
def test_impossible_values_are_refused(config, message):
    with pytest.raises(ValueError) as error:
        checked(config)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "config, devices, message",
    [
        (
            {},
            3,
            "data.batch_size=128: accepted is a multiple of 3 (3 shards of the tokens x train.accumulate=1)",
        ),
        ({"moe": {"group_size": 100, "num_experts": 101}}, 1, "moe.num_experts=101: accepted is at most"),
        (
            {"moe": {"group_size": 65536}},
            8,
            "moe.group_size=65536: accepted is a size that gives each stack",
        ),
        (
            {"moe": {"num_experts": 6}, "mesh": {"layout": "data_expert"}},
            8,
            "moe.num_experts=6: accepted with mesh.layout=data_expert is a multiple of the 8 devices",
        ),
        (
            {"mesh": {"data": 3}},
            8,
            "mesh: data 3 x expert 1 x model 1: accepted are sizes whose product is the 8",
        ),
        ({"mesh": {"data": -1, "model": -1}}, 8, "mesh.model=-1: accepted is one axis that fills"),
        ({"mesh": {"dcn_model": 2}}, 8, "accepted are sizes whose product is the 1 slices"),
        ({"mesh": {"layout": "model"}}, 16, "model.num_heads: 12 along the axis heads; accepted with mesh"),
        (
            {"mesh": {"layout": "model"}, "model": {"vocab_rows": 33001}},
            2,
            "model.vocab_rows: 33001 along the axis vocab",
        ),
        (
            {"mesh": {"layout": "model"}, "moe": {"granularity": 1024, "num_experts": 2}},
            4,
            "model.d_ff / moe.granularity=1024: 2 along the axis mlp",
        ),
        (
            {"mesh": {"layout": "model"}, "moe": {"d_ff": 34}},
            4,
            "moe.d_ff: 34 along the axis mlp",
        ),
        ({"mesh": {"fsdp": True}, "model": {"d_model": 36}}, 8, "model.d_model: 36 along the axis embed"),
    ],
)
def test_what_the_mesh_or_the_groups_cannot_hold(config, devices, message):
    with pytest.raises(ValueError) as error:
        checked(config, devices)
    assert message in str(error.value)


@pytest.mark.parametrize("layout, devices", [("data", 1), ("data_expert", 8), ("data_expert_model", 8)])
@pytest.mark.parametrize(
    "moe",
    [
        {"router": "top_k", "choices": 2},
        {"router": "noisy_top_k"},
        {"router": "noisy_top_k", "choices": 4},
        {"router": "hierarchical", "choices": 4, "branches": 4},
        {"router": "expert_choice"},
        {"router": "soft", "dispatch": "gather", "slots": 4},
        {"explore": "sample", "granularity": 5, "every": 5},
        {"num_shared": 2, "dropless": True, "dispatch": "einsum", "attention": True},
    ],
    ids=str,
)
def test_one_expert_is_dense_whatever_the_routers_fields(moe, layout, devices):
    config = {"moe": moe | {"num_experts": 1}, "mesh": {"layout": layout}}
    assert checked(config, devices) == {}
    assert set(without_effect(from_config(config).moe)) == set(moe)


def test_fields_without_effect_are_named():
    def idle(**moe):
        return without_effect(from_config({"moe": moe}).moe)

    assert idle() == []
    assert idle(branches=4, slots=2, score="sigmoid", choice_threshold=0.2, jitter=0.1) == [
        "choice_threshold", "score", "branches", "slots"
    ]  # fmt: skip
    assert idle(router="hierarchical", branches=4, choices=4) == []
    assert idle(router="soft", decoder_router="loss_free", slots=2, score="sigmoid") == []
    assert idle(explore="argmax", jitter=0.1) == ["jitter"]
    assert idle(dropless=True, capacity_factor=2.0, reroute=2) == ["capacity_factor", "reroute"]
    alone = {"priority": True, "reroute": 2, "route_padding": True}
    assert idle(**alone) == []
    assert set(without_effect(from_config({"moe": alone}).moe, ("decoder",))) == set(alone)
    assert idle(router="hash", z_loss_weight=1.0, balance_loss_weight=1.0) == [
        "balance_loss_weight", "z_loss_weight"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "balance, parts, told", [("global", 4, True), ("global", 1, False), ("group", 4, False)]
)
def test_a_start_tells_over_what_a_global_balance_loss_is(balance, parts, told):
    settings = from_config({"moe": {"balance": balance}, "train": {"accumulate": parts}})
    lines = telling._model(settings, ["encoder/1"], 2, 1, 2)
    assert any("balance=global: over each of the 4 microbatches" in line for line in lines) == told


def test_check_returns_the_tokens_of_a_group():
    assert checked({}) == {"encoder": 4096, "decoder": 3648}


def test_defaults_round_trip():
    assert from_config(default_config()) == Settings()
    assert from_config(to_dict(Settings())) == Settings()


def test_whole_numbers_are_good_for_float_fields():
    assert from_config({"moe": {"capacity_factor": 2}}).moe.capacity_factor == 2.0


def test_t5s_embedding_rows():
    assert from_config({}).embedding_rows == 32128
