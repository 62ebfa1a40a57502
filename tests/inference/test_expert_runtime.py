"""Experts on disk: the same bits as with all of them in memory; what is read, what waits, and what can't be."""

import ctypes
import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expert_files import as_integers, asks, until, without_experts, write
from flax.traverse_util import flatten_dict, unflatten_dict
from test_decoding import init, settings

from switchmoe.inference import decoding
from switchmoe.inference.decoding import Choosing
from switchmoe.inference.generation import Generator
from switchmoe.inference.offload import memory
from switchmoe.inference.offload import model as offloaded
from switchmoe.inference.offload.model import Paging, paged
from switchmoe.inference.offload.runtime import in_memory
from switchmoe.inference.offload.shelf import Lying
from switchmoe.inference.offload.store import Store, StoreError
from switchmoe.inference.serving.programs import Controls, Programs
from switchmoe.model.moe import ON_DISK

pytestmark = pytest.mark.usefixtures("one_device")
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
HOW = {
    "greedy": dict(how=Choosing(stop_ids=())),
    "sampled": dict(how=Choosing(temperature=1.0, top_k=20, stop_ids=())),
    "beams": dict(beams=2),
}
MODELS = {  # kind, router, settings of moe and model, how; at most 16 experts are apart, each an array
    "top_k, shared, apart": ("decoder_only", "top_k", dict(), dict(), "greedy"),
    "top 1, many": ("encoder_decoder", "switch", dict(num_experts=20), dict(), "greedy"),
    "bfloat16, apart": ("encoder_decoder", "switch", dict(), dict(dtype="bfloat16"), "sampled"),
    "not scanned, gated, many": ("decoder_only", "top_k", dict(num_experts=20), dict(scan=False, activation="swiglu"), "beams"),
    "attention": ("decoder_only", "switch", dict(attention=True), dict(), "greedy"),
    "expert choice": ("encoder_decoder", "expert_choice", dict(decoder_router="switch"), dict(), "greedy"),
    "hash": ("decoder_only", "hash", dict(), dict(), "greedy"),
}  # fmt: skip


def model(name):
    kind, router, moe, own, _ = MODELS[name]
    return settings(kind, router, dict(num_layers=2) | own, **moe)


def share(layers, part):
    """A budget: so much of all experts' bytes, and what the largest layer needs at least."""
    whole = [sum(layer.record(e).size for e in range(len(layer.forms))) for layer in layers]
    return max(int(part * sum(whole)), max(whole))


def on_disk(of, params, directory, part=0.7, predictor="none", form="float32", **how):
    layers = write(of, params, directory, form)
    memory = in_memory(layers, decoding.as_computed(of).model.dtype, False)
    return paged(
        of, without_experts(params), Store(directory), Paging(share(memory, part), predictor=predictor, **how)
    )


SLOW = ("attention", "hash", "expert choice", "not scanned, gated, many")  # each compiles a model of its own


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in MODELS]
)
def test_answers_are_those_of_all_experts_in_memory(name, tmp_path):
    of, how = model(name), HOW[MODELS[name][-1]]
    params = init(of)
    predictor = "router" if of.moe.router in ("switch", "top_k") else "none"
    own, held, pager = on_disk(of, params, tmp_path / "experts", predictor=predictor)
    found, wanted = Generator(own, held, 6, check=pager.check, **how), Generator(of, params, 6, **how)
    for prompts in (PROMPTS, PROMPTS[:1])[: 2 if name == "top 1, many" else 1]:
        assert found(prompts) == wanted(prompts)
    counts = pager.counts
    assert counts.misses > 0 and counts.read > 0 and counts.hits > 0, str(counts)


def test_only_a_program_with_a_budget_calls_the_host(tmp_path):
    """So without one nothing is slower."""
    of = model("top 1, many")
    params = init(of)
    own, held, pager = on_disk(of, params, tmp_path / "experts", predictor="router")

    def calls(generator):
        ids_BP, count_B = np.zeros((1, 16), np.int32), np.ones(1, np.int32)
        lowered = generator._program.lower(generator._params, ids_BP, count_B, count_B)
        return lowered.as_text().count("callback")

    assert calls(Generator(own, held, 4, check=pager.check)) and not calls(Generator(of, params, 4))


def test_the_routers_prediction_is_right_where_a_layer_reads_what_the_one_before_did(tmp_path, monkeypatch):
    """Blocks that add nothing and norms that are alike: then the next layer's router says what it will choose."""
    of = settings("decoder_only", "top_k", dict(num_layers=4), num_experts=20)
    params = unflatten_dict(
        {
            name: value * 0 if name[-1] in ("out", "wo") else value * 0 + 1 if name[-1] == "scale" else value
            for name, value in flatten_dict(init(of)).items()
        }
    )
    own, held, pager = on_disk(of, params, tmp_path / "experts", predictor="router")
    foresee = pager._foresee

    def read_ahead(*given):
        foresee(*given)
        until(lambda: not pager._ahead and not pager._reading)

    monkeypatch.setattr(pager, "_foresee", read_ahead)
    programs, controls = Programs(own, held, 2, 8, 6, pager.check), Controls.empty(2)
    programs.insert(prefilled := programs.prefill(PROMPTS[0]), 0)
    before = dataclasses.replace(pager.counts)
    controls.position_B[0] = programs.first_position(prefilled)
    programs.step(controls)
    after = pager.counts
    assert after.right - before.right == after.guessed - before.guessed > 0
    assert after.ahead >= after.useful > 0
    assert f"{after.right} of {after.guessed} foreseen asked for" in str(after)


@pytest.mark.parametrize("bits", [8, 4])
def test_integers_are_those_of_a_model_of_integers(bits, tmp_path):
    of = model("top 1, many")
    params = init(of)
    group = 8 if bits == 4 else 0
    slim = dataclasses.replace(of, moe=dataclasses.replace(of.moe, expert_bits=bits, expert_group=group))
    integers = as_integers(slim, params)
    wanted = Generator(slim, integers, 6, **HOW["greedy"])(PROMPTS)
    own, held, pager = on_disk(slim, integers, tmp_path / "own", form=f"int{bits}")
    assert Generator(own, held, 6, check=pager.check, **HOW["greedy"])(PROMPTS) == wanted
    for layer in pager._layers:  # they stay integers in memory, of so many bits
        part, weights = layer.record(0).part("wi"), np.prod(dict(layer.kernels)["wi"])
        assert part.dtype == "int8" and 8 * part.size == bits * weights


def test_bfloat16_on_disk_is_the_model_of_rounded_experts(tmp_path):
    of = model("top 1, many")
    params = init(of)
    own, held, pager = on_disk(of, params, tmp_path / "experts", form="bfloat16")
    rounded = unflatten_dict(
        {
            name: value.astype(jnp.bfloat16).astype(jnp.float32) if "experts" in name else value
            for name, value in flatten_dict(params).items()
        }
    )
    wanted = Generator(of, rounded, 6, **HOW["greedy"])(PROMPTS)
    assert Generator(own, held, 6, check=pager.check, **HOW["greedy"])(PROMPTS) == wanted
    assert pager._store.layers[0].record(0).size < pager._layers[0].record(0).size  # read as half the bytes


def test_each_expert_of_its_own_width_is_its_own_kernel(tmp_path):
    """A layer's experts of several forms: those of float32 are exact, those of integers what their codes say."""
    of = model("top 1, many")
    params, experts = init(of), of.moe.total_experts
    names = [f"{stack}/1" for stack in ("encoder", "decoder")]
    forms = {name: [("float32", "int8", "int4", "int2")[e % 4] for e in range(experts)] for name in names}
    layers = write(of, params, tmp_path / "mixed", kept_forms=forms)
    own, held, pager = paged(
        of, without_experts(params), Store(tmp_path / "mixed"), Paging(share(layers, 0.5))
    )
    shelf = held["decoder"]["blocks_0"]["block_1"]["moe"][ON_DISK]
    kernel_EDF = Lying(shelf.memory, None, "wi", shelf.layer, jnp.float32)
    pager(1, asks(0, 1, 2, 3))
    exact_EDF = np.asarray(params["decoder"]["blocks"]["block_1"]["moe"]["experts"]["wi"][0])
    for expert, most in ((0, 0.0), (1, 0.01), (2, 0.15), (3, 0.6)):
        off = np.abs(np.asarray(jax.jit(kernel_EDF.__getitem__)(expert)) - exact_EDF[expert]).max()
        assert off <= most and (off > 0) == (expert > 0)
    pager.check()
    assert len(Generator(own, held, 4, check=pager.check, **HOW["greedy"])(PROMPTS)) == 3


def test_a_servers_answers_are_those_of_all_experts_in_memory(tmp_path):
    of = model("top 1, many")
    params = init(of)
    own, held, pager = on_disk(of, params, tmp_path / "experts", predictor="router")

    def answers(programs):
        controls, found = Controls.empty(2), []
        for slot, prompt in enumerate(PROMPTS[:2]):
            prefilled = programs.prefill(prompt)
            programs.insert(prefilled, slot)
            controls.position_B[slot] = programs.first_position(prefilled)
        for _ in range(4):
            stepped = programs.step(controls)
            found.append((stepped.token_B.tolist(), stepped.log_prob_B.tolist(), stepped.expert_LBK.tolist()))
            controls.position_B[:] += 1
        return found

    limits = 2, 8, 6
    assert answers(Programs(own, held, *limits, pager.check)) == answers(Programs(of, params, *limits))


def test_a_budget_too_small_is_refused_with_the_least_that_works(tmp_path):
    of = model("top 1, many")
    params = init(of)
    layers = write(of, params, tmp_path / "experts")
    store, size = Store(tmp_path / "experts"), layers[0].record(0).size
    with pytest.raises(
        ValueError,
        match=rf"--expert_memory=10: encoder/1 may need 1 experts at once; accepted is {size} bytes",
    ):
        paged(of, without_experts(params), store, Paging(10))
    own, held, pager = paged(of, without_experts(params), store, Paging(3 * size))
    with pytest.raises(
        ValueError, match=f"encoder/1 may need 16 experts at once; accepted is {16 * size} bytes or more"
    ):
        Generator(own, held, 4, check=pager.check)(PROMPTS[:1])
    with pytest.raises(ValueError, match=f"encoder/1 may need 20 experts at once; accepted is {20 * size}"):
        pager.holds(256)
    own, held, pager = paged(of, without_experts(params), store, Paging(16 * size))
    wanted = Generator(of, params, 4, **HOW["greedy"])(PROMPTS[:1])
    found = Generator(own, held, 4, check=pager.check, batch_size=1, **HOW["greedy"])
    assert found(PROMPTS[:1]) == wanted
    with pytest.raises(
        ValueError, match="encoder/1 may need 20 experts at once"
    ):  # of the second prompt's 17 tokens
        next(found.batches([PROMPTS[0], [5] * 17]))


def test_another_system_than_linux_is_refused_in_a_line(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())  # as macOS has it: without mremap
    spec = importlib.util.find_spec(memory.__name__)
    elsewhere = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(elsewhere)
    assert memory.available() and not elsewhere.available()
    monkeypatch.setattr(offloaded, "available", elsewhere.available)
    with pytest.raises(ValueError, match="--expert_memory=9: accepted on Linux; here is linux"):
        Paging(9)


def test_a_damaged_expert_ends_the_answer_with_its_name(tmp_path):
    of = model("top 1, many")
    params = init(of)
    own, held, pager = on_disk(of, params, tmp_path / "experts")
    raw = bytearray((tmp_path / "experts" / "decoder.1.experts").read_bytes())
    for expert in range(20):
        raw[pager._store.place(1, expert)[0] + 9] ^= 1
    (tmp_path / "experts" / "decoder.1.experts").write_bytes(raw)
    with pytest.raises(StoreError, match=r"expert \d+ of decoder/1 in .*decoder\.1\.experts is damaged"):
        Generator(own, held, 4, check=pager.check)(PROMPTS)
