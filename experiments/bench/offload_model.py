"""What `experiments.bench offload` measures: the synthetic model as a run's directory, and a case in a process of its own."""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments import expert_memory
from experiments.bench import tools
from experiments.bench.generate import model_settings
from switchmoe.data import progress
from switchmoe.inference.decoding import Choosing
from switchmoe.inference.generation import Generator
from switchmoe.inference.offload import model as offloaded
from switchmoe.inference.offload.predict import Table
from switchmoe.inference.offload.runtime import Pager, in_memory
from switchmoe.inference.offload.store import Store
from switchmoe.inference.serving.programs import Controls, Programs
from switchmoe.interop import expert_store, growing, run_files
from switchmoe.model.transformer import sparse_layer_names
from switchmoe.runs import integrity, slimming, trained
from switchmoe.runs.checkpoints import write_json
from switchmoe.settings import Settings, from_config, to_dict
from switchmoe.training import places

PROMPT = 32  # tokens
RESIDENT = "int4-resident"  # the form of a model of integers in its checkpoint
DRAWN = Choosing(temperature=1.0, stop_ids=())
HEAT = 1 << 20  # numbers of prompts that a table is learnt of, which no case measures


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def told(state: Any) -> Any:
    return progress.told(note, "writing", state)


def made(options: argparse.Namespace) -> Path:
    """The step's directory, with the stores of all forms; what is there stays."""
    from switchmoe.interop import slim  # here, as a case in a process of its own has no need of it

    if options.source:
        model = trained.find(options.source)
    else:
        settings = synthetic(options)
        names = [
            "qwen3_moe" if options.stacks == "decoder_only" else options.stacks,
            options.d_model,
            options.d_ff,
            options.layers,
            options.experts,
            f"{options.skew:g}",
        ]
        run = options.out / ("model-" + "-".join(map(str, names)))
        if not run.exists():
            _write(run, settings, options.skew)
        model = trained.find(str(run))
    step = Path(model.step)
    expert_store.written(model, told)
    for form in ("int4", "mixed"):
        target = _of_form(options.out, step, form)
        if not target.exists():
            expert_store.into_run(model, target, _mixed(model.settings) if form == "mixed" else form, told)
    resident, how = _of_form(options.out, step, RESIDENT), slimming.Slimming(bits=4)
    if not resident.exists():
        slim.make(model, resident, how, slim.asked(model, how, {}), dict)
    return step


def synthetic(options: argparse.Namespace) -> Settings:
    """A Switch Transformer, or a decoder alone that transformers has too: a Qwen3-MoE."""
    groups = to_dict(model_settings(options.experts, options.tiny))
    groups["model"] |= {
        "d_model": options.d_model, "d_ff": options.d_ff, "num_layers": options.layers, "d_kv": 64 if options.d_model >= 512 else 16,
        "num_heads": max(1, options.d_model // 64),
    }  # fmt: skip
    if options.stacks == "decoder_only":
        groups["model"] |= {
            "stacks": options.stacks, "positions": "rotary", "activation": "swiglu", "qk_norm": "head", "tie_embeddings": False,
            "scale_logits": False, "attention_scale": 0.0,
        }  # fmt: skip
        groups["moe"] |= {"router": "top_k", "choices": 2, "dropless": True, "every": 1}
        groups["data"] |= {"objective": "causal_lm"}
    groups["train"]["num_steps"] = 1
    return from_config(groups)


def _write(run: Path, settings: Settings, skew: float) -> None:
    """Random kernels of the size that a trained model's have, an expert's at a time."""
    shapes, rng = places.names(settings), np.random.default_rng(0)
    with growing.grown(run, {"model": to_dict(settings), "skew": skew}) as work:
        lead = {
            name: len(next(places.places(settings, name))[2]) + trained.is_expert(name) for name in shapes
        }
        step = work / "checkpoints" / "1"
        writer = run_files.Writer(
            step, {name: (shape, lead[name]) for name, shape in shapes.items()}, "float32"
        )
        for name, shape in shapes.items():
            for index in np.ndindex(*shape[: lead[name]]):
                writer.write(name, index, _drawn(rng, name, shape[lead[name] :], skew))
        (step / integrity.MANIFEST).write_text(json.dumps(writer.finish()))
        write_json(work / "config.json", to_dict(settings))


def _drawn(rng: np.random.Generator, name: str, shape: tuple[int, ...], skew: float) -> np.ndarray:
    if name.endswith(("scale", "_norm")):
        return np.ones(shape, np.float32)
    part = rng.standard_normal(shape, np.float32)
    if name.endswith("router"):  # the longer an expert's column, the more tokens choose it
        return (
            part
            / np.float32(shape[0] ** 0.5)
            * np.exp(skew * rng.standard_normal(shape[-1])).astype(np.float32)
        )
    return part * np.float32(0.3 if len(shape) < 2 else shape[-2] ** -0.5)


def _mixed(settings: Settings) -> dict[str, list[str]]:
    """Half of the experts of 4 bits, the others of 8, as a quality budget would have it; which ones does not matter to speed."""
    kinds = ("int8", "int4")
    return {
        name: [kinds[e % 2] for e in range(settings.moe.total_experts)]
        for name in sparse_layer_names(settings)
    }


def _of_form(out: Path, step: Path, form: str) -> Path:
    return step if form == "float32" else out / f"{_name(step)}-{form}"


def _name(step: Path) -> str:
    """The run's, and which step it is of a run that has others."""
    run = step.parent.parent.name
    return run if step.name == "1" else f"{run}-{step.name}"


def facts(step: Path) -> dict[str, Any]:
    settings = trained.find(str(step)).settings
    sizes = {name: 4 * int(np.prod(shape)) for name, shape in places.names(settings).items()}
    experts = sum(size for name, size in sizes.items() if trained.is_expert(name))
    return {
        "run": _name(step), "stacks": settings.stacks, "d_model": settings.model.d_model, "d_ff": settings.model.d_ff,
        "sparse_layers": len(sparse_layer_names(settings)), "experts": settings.moe.total_experts, "expert_bytes": experts,
        "other_bytes": sum(sizes.values()) - experts,
    }  # fmt: skip


def _prompts(settings: Settings, first: int, count: int) -> Iterator[np.ndarray]:
    for number in range(first, first + count):
        yield np.random.default_rng(number).integers(2, settings.data.vocab_size, PROMPT)


def learnt(asked: dict[str, Any]) -> dict[str, Any]:
    """Learns the table of what a resident model chooses in other answers than are measured; tells how its choices are spread."""
    model = trained.find(asked["model"])
    settings, params = model.settings, trained.on_one_device(model, model.settings)
    programs = Programs(settings, params, 1, PROMPT, asked["tokens"])
    names, chosen = sparse_layer_names(settings), []
    for number, prompt in enumerate(_prompts(settings, HEAT, 8 * asked["answers"])):
        prefilled, controls = programs.prefill(prompt.tolist()), Controls.empty(1)
        programs.insert(prefilled, 0)
        controls.key_BN[0] = programs.key(0, HEAT + number)
        controls.temperature_B[0], controls.position_B[0] = 1.0, programs.first_position(prefilled)
        for _ in range(asked["tokens"] - 1):
            chosen.append(programs.step(controls).expert_LBK[:, 0])
            controls.position_B[0] += 1
            controls.count_B[0] += 1
    told_TLK = np.stack(chosen)
    ahead = len(names) - told_TLK.shape[1]  # the encoder's layers, of which a new token has none
    whole_TLK = np.pad(told_TLK, ((0, 0), (ahead, 0), (0, 0)), constant_values=-1)
    Table.learn(whole_TLK, settings.moe.total_experts).save(Path(asked["out"]) / "table.npz")
    share_LE = np.stack(
        [
            np.bincount(layer.ravel(), minlength=settings.moe.total_experts)
            for layer in told_TLK.swapaxes(0, 1)
        ]
    )
    share_LE = -np.sort(-share_LE, axis=1) / share_LE.sum(axis=1, keepdims=True)
    quarter = max(1, settings.moe.total_experts // 4)
    again = (told_TLK[1:] == told_TLK[:-1]).mean()
    return {
        "tokens": len(told_TLK),
        "most_used_quarter": float(share_LE[:, :quarter].sum(axis=1).mean()),
        "same_as_before": float(again),
    }


def measured(asked: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second of one answer at a time, after as many others."""
    step = Path(asked["model"])
    form = RESIDENT if asked["form"] == "int4" and not asked["predictor"] else asked["form"]
    model = trained.find(str(_of_form(Path(asked["out"]), step, form)))
    if asked["predictor"] == "accelerate":
        return _accelerate(model, _of_form(Path(asked["out"]), step, "hf"), asked)
    pager, settings = None, model.settings
    if not asked["predictor"]:
        params = trained.on_one_device(model, settings)
    elif asked["predictor"] == "mapped":
        settings, params = _mapped(model)
    else:
        named = {
            "predictor": asked["predictor"],
            "expert_memory": str(asked["budget"]),
            "expert_reads": asked["way"],
            "expert_policy": asked["policy"],
        }
        if asked["predictor"] == "table":
            named["predictor"] = str(Path(asked["out"]) / "table.npz")
        settings, params, pager = expert_memory.opened(model, settings, *expert_memory.checked(named), note)
    checks = {"check": pager.check} if pager else {}
    generator = Generator(settings, params, asked["tokens"], DRAWN, batch_size=1, **checks)
    del params
    for number, prompt in enumerate(_prompts(settings, 0, asked["answers"])):
        generator([prompt.tolist()], number)
    before, answers = dataclasses.replace(pager.counts) if pager else None, []
    began = time.perf_counter()
    for number, prompt in enumerate(_prompts(settings, 1000, asked["answers"])):
        answers += [answer.ids for answer in generator([prompt.tolist()], 1000 + number)]
    seconds = time.perf_counter() - began
    tokens = asked["answers"] * asked["tokens"]
    return {"tokens_per_second": tokens / seconds, "answers": answers} | (
        _counted(pager, before, tokens, seconds) if pager else {}
    )


def _counted(pager: Pager, before: Any, tokens: int, seconds: float) -> dict[str, Any]:
    after = pager.counts
    hits, misses = after.hits - before.hits, after.misses - before.misses
    ahead, guessed = after.ahead - before.ahead, after.guessed - before.guessed
    return {
        "hits": hits / max(1, hits + misses), "megabytes_per_token": (after.read - before.read) / tokens / 1e6,
        "waited": (after.waited - before.waited) / seconds, "useful": (after.useful - before.useful) / ahead if ahead else None,
        "right": (after.right - before.right) / guessed if guessed else None, "ahead_megabytes_per_token": ahead / tokens / 1e6,
        "useful_megabytes_per_token": (after.useful - before.useful) / tokens / 1e6,
    }  # fmt: skip


class _Mapped:
    """All experts at their place in a map of the file: what comes in, and when, is the kernel's to say."""

    def __init__(self, store: Store):
        self.memory, self._store = self, store

    def array(self, layer: int) -> np.ndarray:
        first, size = self._store.place(layer, 0)
        whole = np.memmap(self._store.path(layer), np.uint8, "r", offset=first)
        return whole.reshape(-1, size)

    def __call__(self, layer: int, rows_E: Any, *_: Any) -> np.ndarray:
        return np.asarray(rows_E)

    def fits(self, layer: int, experts: int) -> None: ...


def _mapped(model: trained.Source) -> tuple[Settings, Any]:
    store, settings = Store(expert_store.directory(model), "pread"), model.settings
    layers = in_memory(store.layers, "float32", offloaded.is_apart(settings))
    params = trained.without_experts(model, settings)
    return offloaded.shelved(settings, params, _Mapped(store), layers)


def _accelerate(model: trained.Source, there: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """transformers with accelerate's disk offload, on the same weights, which are converted into ``there``."""
    try:
        import accelerate  # noqa: F401
        import torch
        import transformers
    except ImportError as error:
        return {"failed": f"skipped: {error.name} is not installed"}
    from switchmoe.interop import convert

    if not there.exists():
        convert.into_hugging_face(model, there, "float32", 10**9, told)
    torch.set_num_threads(tools.cores())
    kind = (
        transformers.AutoModelForCausalLM
        if model.settings.stacks == ("decoder",)
        else transformers.AutoModelForSeq2SeqLM
    )
    folder = there.with_name(f"{there.name}-offload")
    theirs = kind.from_pretrained(
        there, device_map="auto", max_memory={"cpu": asked["budget"]}, offload_folder=folder
    )
    seconds = 0.0
    for first, count in ((0, asked["answers"]), (1000, asked["answers"])):
        began = time.perf_counter()
        for prompt in _prompts(model.settings, first, count):
            inputs = torch.tensor(prompt[None])
            theirs.generate(
                inputs, max_new_tokens=asked["tokens"], min_new_tokens=asked["tokens"], do_sample=True
            )
        seconds = time.perf_counter() - began
    return {"tokens_per_second": asked["answers"] * asked["tokens"] / seconds, "answers": []}
