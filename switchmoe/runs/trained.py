"""A trained model: settings, parameters and vocabulary of a run, or of one of its steps."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from switchmoe.data.vocabulary import Vocabulary
from switchmoe.inference.offload.store import INDEX
from switchmoe.parallel import sharding
from switchmoe.runs import buckets, integrity, start
from switchmoe.settings import MeshSettings, Settings, from_config, to_dict
from switchmoe.training import train_state

# What a model's reader may choose; all else is the model itself, or what it was trained with.
READERS = {
    "model": ("dtype", "scan_unroll", "remat"),
    "moe": ("dispatch", "eval_capacity_factor", "eval_group_size"),
    "data": (
        *("source", "data_dir", "text_field", "documents", "validation_share", "train_split", "validation_split"),
        *("batch_size", "input_length", "target_length", "objective", "prefix", "noise_density"),
        *("mean_span_length", "split_field"),
    ),
    "mesh": tuple(field.name for field in dataclasses.fields(Settings().mesh)),
}  # fmt: skip


def dtype(source: "Source") -> str:
    """In which the parameters are saved: float32, or what a conversion gave them."""
    import orbax.checkpoint as ocp

    found = ocp.PyTreeCheckpointHandler().metadata(source.step / "state").tree["params"]
    return str(next(iter(flatten_dict(found).values())).dtype)


EXPERTS = "experts"  # of a run's directory: its experts in files, by step
ALONE = "alone"  # in such a step's index: the checkpoint does not have them


class Source(NamedTuple):
    """Where a model is."""

    step: epath.Path  # the directory of the checkpoint's step
    settings: Settings  # that it was trained with
    vocabulary: Vocabulary | None


def find(text: str, field: str = "--source") -> Source:
    """The model of ``--source`` (or another field): a run's directory, DIR|STEP or DIR/checkpoints/STEP.

    Raises:
      ValueError: there is none, its settings or vocabulary can't be read, or the vocabulary is another than it was trained with.
    """
    step = start.locate(text, field)
    directory = step.parent.parent
    file = directory / "config.json"
    try:
        settings = from_config(json.loads(file.read_text()))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{field}={text}: {file} is not a run's ({error}); accepted is {start.ACCEPTED}"
        ) from error
    path = start.vocabulary_of(step, field)
    found = Vocabulary.from_bytes(epath.Path(path).read_bytes(), path) if path else None
    return Source(step, settings, found)


def changed(settings: Settings, overrides: Mapping[str, Any]) -> Settings:
    """The settings with other values, of those that a model's reader may choose.

    Args:
      overrides: by ``group.field``.

    Raises:
      ValueError: another field, or a value that is not accepted.
    """
    groups = to_dict(settings)
    for name, value in overrides.items():
        group, _, field = name.partition(".")
        if field not in READERS.get(group, ()):
            known = ", ".join(f"{group}.{field}" for group, fields in READERS.items() for field in fields)
            raise ValueError(
                f"--config.{name}={value}: it is of the model or its training; accepted are {known}"
            )
        groups[group][field] = value
    # A stream more or less, parts of another text, and steps of the optimizer are nothing to a reader.
    groups["data"]["streams"], groups["train"]["accumulate"] = 0, 1
    if "data.source" in overrides:
        groups["data"]["parts"] = ""
    return from_config(groups)


def check(source: Source, needed: Callable[[str], bool] = lambda name: True) -> None:
    """Raises ValueError, one line: its step is damaged, of its state's files those that are ``needed``."""
    damage = integrity.damage(source.step, "state", needed)
    if damage:
        raise ValueError(f"--source={source.step}: it is damaged: {damage}; accepted is a good one")


def parameters(source: Source, settings: Settings, mesh: Mesh) -> Any:
    """The model's parameters, where the layout has them.

    Raises:
      ValueError: the step is damaged, or has its experts on disk alone.
    """
    if _alone(source.step.parent.parent / EXPERTS / source.step.name / INDEX):
        raise ValueError(
            f"--source={source.step}: its experts are on disk alone; accepted are experiments.generate and experiments.serve with"
            " --expert_memory=SIZE"
        )
    check(source)
    shapes = train_state.parameter_shapes(settings)
    boxes = train_state.abstract_variables(settings)["params"]
    where = train_state.state_shardings(shapes, boxes, settings, mesh)
    like = jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, where)
    return unflatten_dict(start.read_parameters(source.step, flatten_dict(like, sep="/")), sep="/")


def _alone(index: epath.Path) -> bool:
    """Whether the checkpoint lacks its experts, as far as the index can be read: who needs the experts' files alone refuses it."""
    try:
        return bool(json.loads(index.read_text())["of"][ALONE])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def on_one_device(source: Source, settings: Settings) -> Any:
    """The model's parameters, on the first device.

    Raises:
      ValueError: the step is damaged.
    """
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), sharding.AXES)
    return parameters(source, dataclasses.replace(settings, mesh=MeshSettings()), mesh)


def is_expert(name: str) -> bool:
    """Whether a parameter is an expert's."""
    return "/experts/" in name


def without_experts(source: Source, settings: Settings) -> Any:
    """The model's parameters but the experts', on the first device.

    A checkpoint that training wrote has several arrays in a file, and is checked whole.

    Raises:
      ValueError: a file that they are read from is damaged.
    """
    check(source, lambda file: not is_expert(file.replace(".", "/")))
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = flatten_dict(train_state.parameter_shapes(settings), sep="/")
    like = {
        name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where)
        for name, s in shapes.items()
        if not is_expert(name)
    }
    return unflatten_dict(start.read_parameters(source.step, like), sep="/")


def mean_parameters(source: Source, settings: Settings, mesh: Mesh, count: int) -> tuple[Any, list[int]]:
    """The mean of the parameters of the ``count`` newest checkpoints up to the source's step, and their steps.

    Raises:
      ValueError: there are fewer, or one is damaged.
    """
    if count == 1:
        return parameters(source, settings, mesh), [int(source.step.name)]
    there = source.step.parent
    numbers = sorted(step for step in buckets.complete_steps(there) if step <= int(source.step.name))
    steps = [there / str(number) for number in numbers[-count:]]
    if len(steps) < count:
        known = ", ".join(path.name for path in steps)
        raise ValueError(
            f"--average={count}: accepted is at most {len(steps)}, as checkpoints up to {source.step} are of the steps {known}"
        )
    total = None
    for path in steps:
        one = jax.tree.map(lambda p: p / count, parameters(source._replace(step=path), settings, mesh))
        total = one if total is None else jax.tree.map(jnp.add, total, one)
    return total, [int(path.name) for path in steps]
