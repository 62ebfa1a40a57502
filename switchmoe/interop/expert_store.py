"""A run's experts in files of their own (`inference.offload.store`), and the model that is read from them.

They lie in ``RUN/experts/STEP``. They are written a kernel's part at a time: of a checkpoint that a conversion wrote, an expert's;
of one that training wrote a whole array is read at once, one kernel of all layers, as Orbax's chunk is that.
"""

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from switchmoe.inference.offload import model as offloaded
from switchmoe.inference.offload.layout import FORMS, Layer, numpy_type
from switchmoe.inference.offload.model import Paging
from switchmoe.inference.offload.runtime import Pager
from switchmoe.inference.offload.store import Store, Writer, begun, sizes
from switchmoe.interop import growing, run_files
from switchmoe.model.transformer import sparse_layer_names
from switchmoe.quantised import SCALE, quantise
from switchmoe.runs import buckets, integrity, slimming, start, trained
from switchmoe.runs.checkpoints import write_json
from switchmoe.settings import Settings, to_dict
from switchmoe.training import places

WRITTEN = "written.json"  # which kernels an unfinished store has
Told = Callable[[Callable[[], str]], AbstractContextManager]
Forms = Mapping[str, list[str]]  # of each layer's experts, by the layer's name


def directory(model: trained.Source) -> Path:
    """Where a step's experts are.

    Raises:
      ValueError: the run is in a bucket.
    """
    if buckets.is_bucket(model.step):
        raise ValueError(
            f"--source={model.step}: accepted with experts on disk is a run's directory on this machine"
        )
    return Path(model.step).parent.parent / trained.EXPERTS / model.step.name


def opened(
    model: trained.Source, settings: Settings, how: Paging, way: str, told: Told
) -> tuple[Settings, Any, Pager]:
    """(settings, parameters, what brings experts in) of a run; its store is written where there is none.

    Raises:
      ValueError: a dense model, one that can't be read so, or a store of another checkpoint; one line.
      OSError: files that can't be read or written.
    """
    if not settings.sparse:
        raise ValueError(
            f"--expert_memory={how.budget}: accepted with a model that has experts; --source is dense"
        )
    where = written(model, told)
    store = Store(where, way)
    if {name: store.of.get(name) for name in identity(model)} != identity(model):
        accepted = (
            f"the checkpoint that came with it, as the experts are in no other place than {where}"
            if store.of.get(trained.ALONE)
            else "that directory removed, then it is written anew"
        )
        raise ValueError(f"{where}: it is of another checkpoint; accepted is {accepted}")
    return offloaded.paged(settings, trained.without_experts(model, settings), store, how)


def written(model: trained.Source, told: Told) -> Path:
    """`directory`, in which the experts' files are written where there are none, as the run has them.

    Raises:
      ValueError: as `directory`, or the checkpoint is damaged; one line.
      OSError: files that can't be written.
    """
    where = directory(model)
    if not where.exists():
        trained.check(model)
        where.parent.mkdir(exist_ok=True)
        with growing.grown(where, {"of": identity(model)}) as work:
            _write(model, work, described(model.settings, own_forms(model)), identity(model), told)
    return where


def into_run(model: trained.Source, target: Path, forms: str | Forms, told: Told) -> str:
    """Writes a run's directory whose experts are on disk alone, in another form; returns what was written, in words.

    Args:
      forms: one of layout.FORMS; "": the run's own; or each expert's.

    Raises:
      ValueError: a model that can't be, a target that is there; one line.
    """
    source = model.settings
    if not source.sparse:
        raise ValueError("--source: it is dense; accepted is a model with experts")
    trained.check(model)
    wanted = own_forms(model) if not forms else alike(source, forms) if isinstance(forms, str) else forms
    if source.moe.expert_bits and wanted != own_forms(model):
        raise ValueError(
            f"--source: its experts are integers of {source.moe.expert_bits} bits; accepted is the model they were made of"
        )
    settings = _settings(source, wanted)
    layers = described(settings, wanted)
    with growing.grown(target, {"source": growing.step_identity(Path(model.step)), "forms": wanted}) as work:
        step = work / buckets.CHECKPOINTS / model.step.name
        _copy_the_rest(model, step)
        if model.vocabulary is not None:
            (work / start.VOCABULARY_FILE).write_bytes(model.vocabulary.model_bytes)
        chat = Path(model.step).parent.parent / "chat.json"
        if chat.exists():
            shutil.copyfile(chat, work / chat.name)
        write_json(work / "config.json", to_dict(settings))
        experts = work / trained.EXPERTS / model.step.name
        experts.mkdir(parents=True, exist_ok=True)
        _write(model, experts, layers, _manifest(step) | {trained.ALONE: True}, told)
    return f"{sum(len(layer.forms) for layer in layers)} experts of {len(layers)} layers, {sizes(layers) / 1e6:,.1f} MB"


def widths(file: Path, settings: Settings) -> Forms:
    """Each expert's form, of a file that `experiments.offload widths` wrote: ``{"bits": {layer: [bits of each expert]}}``.

    Raises:
      ValueError: it is none, or another model's; one line.
    """
    accepted, bits = (
        "accepted is a file of experiments.offload widths of this model",
        {8: "int8", 4: "int4", 2: "int2"},
    )
    try:
        found = {
            name: [bits[int(n)] for n in of_layer]
            for name, of_layer in growing.read_json(file)["bits"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: it has no widths of experts ({error!r}); {accepted}") from error
    names, experts = sparse_layer_names(settings), settings.moe.total_experts
    if set(found) != set(names) or any(len(of_layer) != experts for of_layer in found.values()):
        raise ValueError(
            f"{file}: its layers are {', '.join(found)}; {accepted}, {', '.join(names)}, {experts} experts each"
        )
    return found


def own_forms(model: trained.Source) -> Forms:
    """As the run's checkpoint has them."""
    bits, kept = model.settings.moe.expert_bits, trained.dtype(model)
    return alike(model.settings, f"int{bits}" if bits else kept if kept in FORMS else "float32")


def identity(model: trained.Source) -> dict[str, Any]:
    """By which a step is known again, wherever it is copied to."""
    return _manifest(Path(model.step))


def _manifest(step: Path) -> dict[str, Any]:
    found = integrity.fingerprint(step)
    if not found:
        found = hashlib.sha256(json.dumps(growing.step_identity(step)).encode()).hexdigest()
    return {"step": step.name, "files": found}


def alike(settings: Settings, form: str) -> Forms:
    return {name: [form] * settings.moe.total_experts for name in sparse_layer_names(settings)}


def _settings(source: Settings, forms: Forms) -> Settings:
    """Those of a model of integers, where all experts are alike."""
    kinds = {form for layer in forms.values() for form in layer}
    bits = FORMS[kinds.pop()] if len(kinds) == 1 else 0
    if source.moe.expert_bits or bits not in (4, 8):
        return source
    return slimming.settings_of(source, slimming.Slimming(bits=bits), source.train.num_steps)


def described(settings: Settings, forms: Forms) -> list[Layer]:
    """Raises ValueError: widths that a form can't have."""
    bits, found = settings.moe.expert_bits, []
    turned = offloaded.is_apart(settings)
    shapes = places.names(settings)
    for name, parts in slimming.kernels(settings).items():
        kernels = []
        for kernel, (parameter, index) in parts.items():
            rows, *columns = shapes[parameter][len(index) + 1 :]
            if not kernel.endswith(SCALE):
                kernels.append((kernel, (rows * (8 // bits if bits else 1), math.prod(columns))))
        used = tuple(forms[name])
        for form in (form for form in FORMS if form in used and FORMS[form]):
            for kernel, (rows, _) in kernels:
                if rows % (8 // FORMS[form]):
                    raise ValueError(
                        f"{form} of {name}: accepted with kernels of a multiple of {8 // FORMS[form]} rows; {kernel} has {rows}"
                    )
        groups = tuple(
            (form, _group(settings, form, kernels)) for form in FORMS if form in used and FORMS[form]
        )
        integers = any(FORMS[form] for form in used)
        found.append(Layer(name, tuple(kernels), used, groups, turned and not integers))
    return found


def _group(settings: Settings, form: str, kernels: list[tuple[str, tuple[int, int]]]) -> int:
    """Rows that share a scale: the run's, or as `experiments.slim` chooses them."""
    if settings.moe.expert_bits == FORMS[form]:
        return settings.moe.expert_group
    return slimming.group_rows(FORMS[form], [rows for _, (rows, _) in kernels])


def _write(model: trained.Source, work: Path, layers: list[Layer], of: dict[str, Any], told: Told) -> None:
    file, there = work / WRITTEN, slimming.kernels(model.settings)
    done = json.loads(file.read_text()) if file.exists() and begun(work, layers) else []
    if not done:  # a file that is made anew has nothing of what an earlier process noted
        file.unlink(missing_ok=True)
    names = list(dict.fromkeys(name for parts in there.values() for name, _ in parts.values()))
    counter = growing.Counter(sizes(layers))
    writer = Writer(work, layers)
    with told(counter.state), contextlib.closing(writer):
        for name in names:
            reader = run_files.Reader(Path(model.step))
            for number, (layer, parts) in enumerate(zip(layers, there.values(), strict=True)):
                for kernel, (parameter, index) in parts.items():
                    if parameter != name:
                        continue
                    for expert in range(len(layer.forms)):
                        size = layer.record(expert).size // len(parts)
                        counter.add(size, kept=name in done)
                        if name not in done:
                            part = reader.read(f"params/{name}", (*index, expert))
                            writer.write(number, expert, lying(layer, expert, kernel, part))
            if name not in done:
                done.append(name)
                writer.sync()
                write_json(file, done)
        writer.finish(of)
    file.unlink()


def lying(layer: Layer, expert: int, kernel: str, part: np.ndarray) -> dict[str, np.ndarray]:
    """A checkpoint's part of an expert, as its record has it."""
    form, part = layer.forms[expert], part.reshape(len(part), -1)
    if not FORMS[form]:
        return {kernel: (part.T if layer.turned else part).astype(numpy_type(form))}
    if kernel.endswith(SCALE) or part.dtype == np.int8:
        return {kernel: part}
    codes, scale = quantise(part.astype(np.float32)[None], FORMS[form], dict(layer.groups)[form])
    return {kernel: codes[0], kernel + SCALE: scale[0]}


def _copy_the_rest(model: trained.Source, step: Path) -> None:
    """The checkpoint's parameters without the experts'."""
    settings, reader = model.settings, run_files.Reader(Path(model.step))
    found = {name: shape for name, shape in places.names(settings).items() if not trained.is_expert(name)}
    arrays = {name: (shape, len(next(places.places(settings, name))[2])) for name, shape in found.items()}
    writer = run_files.Writer(step, arrays, trained.dtype(model))
    for name in found:
        for _, _, index in places.places(settings, name):
            writer.write(name, index, reader.read(f"params/{name}", index))
    (step / integrity.MANIFEST).write_text(json.dumps(writer.finish(), indent=1))
