"""Plans against what XLA says of the compiled step: memory to 15 %, FLOPs to 5 %, collectives exactly."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from configs import switch_base, switch_c
from switchmoe.data.batches import array_lengths
from switchmoe.parallel import sharding
from switchmoe.planning import aot, communication, memory, planner
from switchmoe.settings import Settings, from_config
from switchmoe.training import objective, train_state

LENGTHS = {"encoder": 128, "decoder": 32}
PAPER = {"encoder": 512, "decoder": 114}


def small(model=None, moe=None, data=None, **groups) -> Settings:
    model = dict(d_model=64, d_ff=256, d_kv=16, num_heads=4, num_layers=4, dtype="float32") | (model or {})
    moe = dict(num_experts=8, group_size=256) | (moe or {})
    data = dict(batch_size=16, input_length=128, vocab_size=924) | (data or {})
    return from_config(dict(model=model, moe=moe, data=data, **groups))


ALONE = dict(stacks="decoder_only", positions="rotary", num_kv_heads=2, qk_norm="head", activation="swiglu")
WIDE = dict(d_model=256, d_ff=1024), dict(num_experts=32, group_size=128), dict(batch_size=32)
DROPLESS = dict(dropless=True, router="top_k", choices=2)
FINE = dict(ALONE, d_model=128, d_ff=128, num_layers=2, remat=True)
CASES = {
    "activations": (small(), 1),
    "remat": (small(dict(remat=True)), 1),
    "logits, microbatches": (small(data=dict(vocab_size=8000), train=dict(accumulate=2)), 1),
    "experts apart": (small(*WIDE, mesh=dict(layout="data_expert")), 8),
    "fsdp": (small(*WIDE, mesh=dict(layout="data", fsdp=True)), 8),
    "widths apart": (small(*WIDE, mesh=dict(layout="model")), 4),
    "shared, widths apart": (
        small(WIDE[0], WIDE[1] | dict(num_shared=2), WIDE[2], mesh=dict(layout="model")),
        4,
    ),
    "a decoder alone": (small(ALONE, data=dict(objective="causal_lm")), 1),
    "a deeper encoder": (small(dict(num_layers=8, num_decoder_layers=4), dict(decoder_every=4)), 1),
    "dropless, experts apart": (
        small(WIDE[0], WIDE[1] | DROPLESS, WIDE[2], mesh=dict(layout="data_expert")),
        8,
    ),
    "dropless, remat": (
        small(
            FINE,
            dict(num_experts=64, group_size=128, every=1) | DROPLESS | dict(choices=8),
            dict(batch_size=32, objective="causal_lm"),
            mesh=dict(layout="data_expert"),
        ),
        8,
    ),
}
# Blocks with empty rows are counted, not traced: of XLA's copies of them nothing is known.
LOOSE = dict.fromkeys(("dropless, experts apart", "dropless, remat"), 0.3)
if jax.__version_info__ < (0, 11):  # has 1,191 MB where 811 are estimated
    LOOSE["dropless, experts apart"] = 0.35
SOME = ("experts apart", "a decoder alone")


def lengths_of(settings):
    return {stack: LENGTHS["encoder" if len(settings.stacks) == 1 else stack] for stack in settings.stacks}


@functools.cache
def compiled(name):
    settings, devices = CASES[name]
    sizes, _ = sharding.axis_sizes(settings.mesh, devices)
    mesh = jax.make_mesh(
        sizes, sharding.AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:devices]
    )
    return aot.compile_step(settings, lengths_of(settings), mesh)


@pytest.mark.parametrize(
    "name", [name if name in SOME else pytest.param(name, marks=pytest.mark.long) for name in CASES]
)
def test_memory_is_xlas_within_15_percent(name):
    """Parameters, state and temporaries of a float32 step; a CPU computes bfloat16 in float32. See LOOSE."""
    settings, devices = CASES[name]
    estimated = planner.make(settings, lengths_of(settings), devices, 1, planner.DEVICES["v5p"]).memory
    assert estimated.peak == pytest.approx(aot.peak_bytes(compiled(name)), rel=LOOSE.get(name, 0.15))
    arguments = compiled(name).memory_analysis().argument_size_in_bytes
    assert estimated.parameters + estimated.optimizer + estimated.batch == pytest.approx(arguments, rel=1e-3)


def test_the_ragged_back_ends_empty_rows_take_memory():
    """Each of 4 devices may get all choices of 512 + 128 tokens: three times as many rows again, of two sparse layers."""
    settings = small(dict(d_ff=128), DROPLESS, mesh=dict(layout="data_expert"))
    alone, apart = (
        memory.estimate(settings, LENGTHS, dict(data=data, expert=4 // data, model=1)) for data in (4, 1)
    )
    empty = 3 * 2 * (4 * 128 + 4 * 32)
    assert apart.activations - alone.activations == 2 * empty * 4 * (2 * 64 + 3 * 128)
    assert apart.peak > alone.peak


def test_experts_width_is_divided_like_the_dense_layers():
    """Whether it is said for itself or not."""
    mesh = dict(data=1, expert=1, model=4)
    peaks = {
        memory.estimate(small(moe=dict(d_ff=width), mesh=dict(layout="model")), LENGTHS, mesh).peak
        for width in (0, 256)
    }
    assert len(peaks) == 1


def test_all_to_alls_are_those_compiled():
    """Two stacks with one sparse layer in the scan's body: its calls are written once for two repeats."""
    settings, devices = CASES["experts apart"]
    plan = planner.make(settings, LENGTHS, devices, 1, planner.DEVICES["v5p"])
    moved = next(t for t in plan.transfers if t.kind == "all-to-all")
    found = aot.collectives(compiled("experts apart").as_text())
    repeats = settings.model.num_layers // settings.moe.every
    assert moved.count == repeats * found["all-to-all"]["count"] == 16
    assert moved.ici == repeats * found["all-to-all"]["bytes"] * 7 / 8 and moved.dcn == 0


@pytest.mark.long
@pytest.mark.parametrize("name", ["widths apart", "shared, widths apart"])
def test_sums_over_the_model_axis_are_those_compiled(name):
    """To 1 %: softmax's statistics and norms are left out. In the scans' bodies each is written once."""
    settings, devices = CASES[name]
    plan = planner.make(settings, LENGTHS, devices, 1, planner.DEVICES["v5p"])
    (moved,) = (t for t in plan.transfers if t.purpose == "split widths")
    outside = 4 * 256 * 32 * (128 + 32 + 32)  # the embeddings of both stacks, the output's input
    written = (moved.ici / (2 * 3 / 4) - outside) / 2 + outside
    found = aot.collectives(compiled(name).as_text())
    assert written == pytest.approx(found["all-reduce"]["bytes"], rel=0.01)


@pytest.mark.parametrize("experts", [1, 16])
def test_forward_flops_are_xlas_within_5_percent(experts):
    """Of Switch-Base's widths, the scan over layers unrolled: XLA counts its body once."""
    config = switch_base.get_config()
    config.model.update(num_layers=2, scan_unroll=2)
    config.moe.update(num_experts=experts, every=1)
    config.data.batch_size = 8
    settings = from_config(config)
    params = nn.unbox(train_state.abstract_variables(settings)["params"])
    batch = {
        name: jax.ShapeDtypeStruct((8, PAPER[stack]), jnp.int32)
        for name, stack in (("inputs", "encoder"), ("targets", "decoder"))
    }
    forward = jax.jit(lambda params, batch: objective.token_sums(params, batch, settings, jax.random.key(0)))
    counted = forward.lower(params, batch).compile().cost_analysis()["flops"]
    one = dict.fromkeys(sharding.AXES, 1)
    assert planner.hardware_flops(settings, PAPER, one) / 3 == pytest.approx(counted, rel=0.05)


ROUTERS = {  # routers and options by what they cost
    "switch": {},
    "top_k": dict(router="top_k", choices=2),
    "noisy_top_k": dict(router="noisy_top_k", choices=2),
    "hierarchical": dict(router="hierarchical", choices=4, branches=4),
    "hash": dict(router="hash"),
    "sinkhorn": dict(router="sinkhorn"),
    "loss_free": dict(router="loss_free", choices=2, score="sigmoid"),
    "expert_choice": dict(router="expert_choice", decoder_router="top_k"),
    "soft": dict(router="soft", decoder_router="hash", slots=48),
    "soft, few slots": dict(router="soft", decoder_router="hash", slots=2),
    "shared": dict(num_shared=2),
    "finer": dict(granularity=4, num_shared=2),
    "attention": dict(attention=True, choices=2, router="top_k"),
    "attention, soft": dict(attention=True, router="soft", decoder_router="switch", slots=8),
    "masks": dict(dispatch="einsum"),
    "masks, attention": dict(dispatch="einsum", attention=True),
    "a decoder alone": dict(router="top_k", choices=2, num_shared=1, shared_gate=True),
}


def counted_flops(settings):
    """(XLA's count of a forward pass, the estimate with empty slots and masks, the model's own)."""
    lengths = {
        stack: settings.data.input_length if stack == settings.stacks[0] else 64 for stack in settings.stacks
    }
    params = nn.unbox(train_state.abstract_variables(settings)["params"])
    batch = {
        name: jax.ShapeDtypeStruct((settings.data.batch_size, length), jnp.int32)
        for name, length in array_lengths(lengths).items()
    }
    forward = jax.jit(lambda params, batch: objective.token_sums(params, batch, settings, jax.random.key(0)))
    found = forward.lower(params, batch).compile().cost_analysis()["flops"]
    hardware = planner.hardware_flops(settings, lengths, dict.fromkeys(sharding.AXES, 1)) / 3
    own = settings.data.batch_size * sum(planner.flops.forward_flops(settings, lengths).values())
    return found, hardware, own


@pytest.mark.parametrize("name", ROUTERS)
def test_every_routers_flops_are_xlas_within_5_percent(name):
    """A fifth more slots than choices; and at factor 1 the model's own, which has no empty slots."""
    model = dict(d_model=384, d_ff=1024, d_kv=64, num_heads=6, num_layers=1)
    moe = dict(num_experts=8, every=1, group_size=256, jitter=0.0) | ROUTERS[name]
    data = dict(batch_size=4, input_length=128, vocab_size=4000)
    if name == "a decoder alone":
        model |= ALONE | dict(num_kv_heads=2)
        data |= dict(objective="causal_lm")
    for factor in (1.25, 1.0):
        settings = small(model, moe | {"capacity_factor": factor}, data)
        found, hardware, own = counted_flops(settings)
        assert hardware == pytest.approx(found, rel=0.05)
    if settings.moe.dispatch != "einsum":
        assert own == pytest.approx(found, rel=0.05)


def test_what_a_router_costs():
    """Of the encoder alone: no product for a hash, two kernels for noisy top-k, slots and their mixing for soft."""

    def parts(**moe):
        settings = small(moe=dict(decoder_router="hash", every=1) | moe)
        return planner.flops.forward_flops(settings, {"encoder": settings.data.input_length, "decoder": 32})

    layers, tokens, d, experts = 4, 128, 64, 8
    kernel = 2.0 * layers * tokens * d * experts
    expert = 2.0 * layers * 3 * 64 * 256
    assert parts(router="switch")["router"] == parts(router="sinkhorn")["router"] == kernel
    assert parts(router="hash")["router"] == 0
    assert parts(router="noisy_top_k", choices=2)["router"] == 2 * kernel
    assert parts(router="hierarchical", choices=4, branches=2)["router"] == kernel * 10 / 8
    soft = parts(router="soft", slots=3)  # a group is two sequences: 24 slots for 256 tokens
    assert soft["router"] == 3 * kernel
    assert soft["more_experts"] == pytest.approx((24 / 2 - tokens) * expert)
    assert soft["mixing"] == 2.0 * layers * 2 * tokens * 24 * d
    assert parts(router="switch")["mixing"] == parts(router="switch")["more_experts"] == 0
    assert parts(router="expert_choice", capacity_factor=2.0)["more_experts"] == tokens * expert
    assert parts(router="top_k", num_shared=1, choices=2)["more_experts"] == 2 * (tokens + 32) * expert


def test_hardware_flops_count_empty_slots_and_recomputation():
    settings = small(dict(activation="relu"), dict(capacity_factor=2.0, group_size=128))
    one = dict.fromkeys(sharding.AXES, 1)
    row = 4 * 64 * 256  # two products of 64 x 256
    empty = 2 * 16 * (128 + 32)  # factor 2 on 16 sequences: as many empty slots as tokens, two layers a stack
    from_model = planner.flops.train_flops(settings, {"encoder": settings.data.input_length, "decoder": 32})
    assert planner.hardware_flops(settings, LENGTHS, one) == from_model + 3 * empty * row
    remat = small(dict(activation="relu", remat=True), dict(capacity_factor=2.0, group_size=128))
    assert planner.hardware_flops(remat, LENGTHS, one) == pytest.approx(
        4 / 3 * (from_model + 3 * empty * row)
    )


def test_bytes_by_link_class():
    """8 devices in each of 4 slices: a gather moves its slice's part across, an all-to-all most of it."""
    inner, outer = dict(data=1, expert=8, model=1), dict(data=4, expert=1, model=1)
    assert communication._gather(800, ["expert"], inner, outer) == (700, 0)
    assert communication._all_reduce(800, ["data", "expert"], inner, outer) == (1400, 150)
    across = small(*WIDE, mesh=dict(layout="data_expert", expert=2, data=1, dcn_data=1, dcn_expert=4))
    plan = planner.make(across, LENGTHS, 8, 4, planner.DEVICES["v5p"])
    (moved,) = (t for t in plan.transfers if t.kind == "all-to-all")
    assert moved.dcn / moved.ici == pytest.approx((3 / 4) / (7 / 8 - 3 / 4))


def test_switch_c_is_planned_without_allocating_it():
    """1571B parameters: with experts apart a device has its own and what is not of experts."""
    config = switch_c.get_config()
    config.data.batch_size = 16384
    config.mesh.layout = "data_expert"
    settings = from_config(config)
    total, _ = train_state.parameter_counts(settings)
    parameters, optimizer = memory.state_bytes(settings, dict(data=1, expert=512, model=1))
    experts = 2 * 15 * 2048 * 2 * 2080 * 6144
    assert parameters == 4 * (experts // 512 + total - experts)
    assert optimizer < 0.01 * parameters  # Adafactor's factors


def test_what_is_frozen_has_neither_gradients_nor_moments():
    part = small(train=dict(trainable="experts|router"))
    all_of_it, less = (memory.estimate(s, LENGTHS, dict(data=1, expert=1, model=1)) for s in (small(), part))
    assert less.parameters == all_of_it.parameters == all_of_it.gradients
    assert less.gradients == 4 * train_state.trained_count(part) < all_of_it.gradients
    assert less.optimizer < all_of_it.optimizer and less.peak < all_of_it.peak


def test_frozen_parameters_gradients_are_not_sent():
    """Of routers alone 4 bytes an expert and width, four layers, around 8 devices; and fewer devices may do."""
    full, part = (
        small(*WIDE, mesh=dict(layout="data"), train=dict(trainable=which)) for which in ("", "router")
    )
    device = planner.DEVICES["v5p"]
    sent = [
        sum(t.ici for t in planner.make(s, LENGTHS, 8, 1, device).transfers if t.purpose == "gradients")
        for s in (full, part)
    ]
    assert sent[1] == 2 * 7 / 8 * 4 * (4 * 32 * 256) < sent[0] / 100
    gathered = dataclasses.replace(part, mesh=dataclasses.replace(part.mesh, fsdp=True))
    moved = {t.kind: t.ici for t in planner.make(gathered, LENGTHS, 8, 1, device).transfers}
    assert moved["reduce-scatter"] < moved["all-gather"] / 100


def test_slices_are_no_larger_than_the_devices_have(capsys):
    """Eight GPUs a host: what does not fit on them is not planned as one NVLink domain of more."""
    device = planner.DEVICES["h100"]
    settings = small(WIDE[0], WIDE[1] | dict(group_size=64), WIDE[2], mesh=dict(layout="data_expert"))
    assert planner.make(settings, LENGTHS, 16, 2, device).outer["data"] == 2
    found = planner.smallest(settings, LENGTHS, device, 1e5)
    assert found == (None, "8 devices: 0 GiB; a slice has no more than 8")
    with pytest.raises(ValueError, match="at most 8 a slice"):
        planner.make(settings, LENGTHS, 16, 1, device)
