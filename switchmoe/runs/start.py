"""Where a run's first parameters come from: random numbers, or another run's checkpoint (`init`)."""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from switchmoe.parallel.sharding import path_keys
from switchmoe.runs import buckets, integrity, upcycling
from switchmoe.runs.parts import Context, Start
from switchmoe.runs.rundir import read_run
from switchmoe.settings import InitSettings, Settings, from_config
from switchmoe.training import optimizers, train_state
from switchmoe.training.train_state import TrainState

VOCABULARY_FILE = "vocabulary.model"
ACCEPTED = "a run's directory, DIR|STEP, or a step's directory, DIR/checkpoints/STEP"


class Beginning(NamedTuple):
    start: Start
    vocabulary: str = ""  # the file of the run that the parameters are from, if it has one


def beginning(context: Context) -> Beginning:
    """As ``init`` says; nothing is read of it where the run has a checkpoint of its own.

    Raises:
      ValueError: no checkpoint there, a damaged one, or one of another model; names the parameter.
    """
    init, teacher = context.settings.init, context.settings.distill.teacher
    if not init.checkpoint or context.begun:
        step = locate(teacher, "distill.teacher") if teacher and not context.begun else None
        return Beginning(Start(), vocabulary_of(step, "distill.teacher") if step else "")
    step = locate(init.checkpoint)
    saved = _saved_shapes(init, step)
    vocabulary = vocabulary_of(step)
    if init.upcycle:
        return Beginning(_upcycled(context, step, saved), vocabulary)
    taken = _taken(context.settings, saved)
    record = {"checkpoint": init.checkpoint, "step": int(step.name), "params": init.params}
    context.note(
        f"parameters from {step}: {len(taken)} of {len(_shapes(context.settings))} arrays"
        + (f"; {len(saved) - len(taken)} there are not used" if len(saved) > len(taken) else "")
    )

    def load(state: TrainState) -> TrainState:
        fresh = flatten_dict(state.params, sep="/")
        read = read_parameters(step, {name: fresh[name] for name in taken})
        state = state.replace(params=unflatten_dict(fresh | read, sep="/"))
        if not init.optimizer:
            return state
        return _goes_on(context, state, _optimizer(init, step, state.opt_state))

    return Beginning(Start(load, record), vocabulary)


def vocabulary_of(step: epath.Path, field: str = "init.checkpoint") -> str:
    """The vocabulary's file of the run that a step is of, "" if it has none.

    Raises:
      ValueError: it is not the one that the run was trained with, as far as its `run.json` says.
    """
    directory = step.parent.parent
    path = directory / VOCABULARY_FILE
    if not path.exists():
        return ""
    _check_content(path, directory, f"{field}={directory}: its {VOCABULARY_FILE}")
    return str(path)


def own_vocabulary(context: Context) -> Path | None:
    """The run's own copy, None where there is none yet.

    Raises:
      ValueError: it is not what the run began with, or `data.vocab` is not what the last start had, and of another content.
    """
    own, asked = context.workdir / VOCABULARY_FILE, context.settings.data.vocab
    if not own.exists():
        return None
    if _is_another(asked, context.workdir, own):
        raise ValueError(
            f"data.vocab={asked}: another vocabulary than the run in {context.workdir} began with; accepted is the same, or"
            " another --workdir"
        )
    _check_content(own, context.workdir, f"{own}: it")
    return own


def tuned_vocabulary(settings: Settings, file: str) -> str:
    """The vocabulary's file that a run on tasks reads with: ``file``, of the run that it begins or is taught with, else `data.vocab`.

    Raises:
      ValueError: `data.vocab` was said anew, and is another than that run's.
    """
    asked = settings.data.vocab
    if file and _is_another(asked, epath.Path(file).parent, epath.Path(file)):
        init = settings.init.checkpoint
        origin = f"init.checkpoint={init}" if init else f"distill.teacher={settings.distill.teacher}"
        raise ValueError(
            f"data.vocab={asked}: another vocabulary than {origin} was trained with; accepted is the same, or ''"
        )
    return file or asked


def _check_content(path: Path | epath.Path, run: Path | epath.Path, what: str) -> None:
    known = read_run(run).get("vocabulary_sha256")
    if known and hashlib.sha256(path.read_bytes()).hexdigest() != known:
        raise ValueError(
            f"{what} is another vocabulary than the run was trained with; accepted is the one of SHA-256 {known}"
        )


def _is_another(asked: str, run: Path | epath.Path, own: Path | epath.Path) -> bool:
    """Whether `data.vocab` is not what a run's config has, and of another content than the run's own copy.

    A file that is gone is not looked at: runs keep a copy, as files move.
    """
    config = run / "config.json"
    there = json.loads(config.read_text(encoding="utf-8"))["data"].get("vocab") if config.exists() else ""
    if not asked or asked == there:
        return False
    file = epath.Path(asked).expanduser()
    return file.exists() and file.read_bytes() != own.read_bytes()


def keep_vocabulary(workdir: Path, model_bytes: bytes) -> None:
    """The run's own copy, where it has none."""
    path = workdir / VOCABULARY_FILE
    if not path.exists():
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(model_bytes)
        temporary.replace(path)


def _upcycled(context: Context, step: epath.Path, saved: dict[str, tuple[int, ...]]) -> Start:
    """A dense model's parameters, copied to the experts, and with ``init.optimizer`` its optimizer's state."""
    settings, init = context.settings, context.settings.init
    try:
        dense = from_config(json.loads((step.parent.parent / "config.json").read_text()))
        upcycling.check(dense, settings, saved)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"init.checkpoint={init.checkpoint}: {error}; accepted with init.upcycle is a dense model's run"
        ) from error
    context.note(f"parameters from {step}, each feed-forward copied to {settings.moe.num_experts} experts")

    def load(state: TrainState) -> TrainState:
        tree = ocp.PyTreeCheckpointer().restore(step / "state")
        there = {"/".join(path_keys(path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

        def array(name: str) -> np.ndarray:
            if name not in there:
                raise ValueError(f"init.checkpoint={init.checkpoint}: no {name} is there")
            return np.asarray(there[name])

        saved = upcycling.Saved(lambda name: array(name).shape, lambda name, index: array(name)[index])
        plan = upcycling.Plan(dense, settings, upcycling.Upcycling(settings.moe.num_experts), saved)
        state = state.replace(params=jax.tree.map(_placed, state.params, plan.parameters()))
        if not init.optimizer:
            return state
        try:
            found = plan.optimizer_state()
        except ValueError as error:
            raise ValueError(
                f"init.optimizer=True: {step} has no state of this optimizer ({error}); accepted is False"
            ) from error
        return _goes_on(context, state, jax.tree.map(_placed, state.opt_state, found))

    return Start(load, {"checkpoint": init.checkpoint, "step": int(step.name), "upcycle": True})


def _goes_on(context: Context, state: TrainState, opt_state: Any) -> TrainState:
    """With the optimizer's state; warns where its place in the schedule is the end, as the rate is 0 from there on."""
    settings, done = context.settings, optimizers.updates(opt_state)
    rate = float(optimizers.schedule(settings.optimizer, settings.train.num_steps)(done))
    if rate == 0:
        context.note(
            f"warning: init.optimizer=True: {done} updates are done there, and optimizer.schedule={settings.optimizer.schedule} is 0"
            f" from train.num_steps={settings.train.num_steps} on: nothing is learnt; accepted are constant, rsqrt, or init.optimizer=False"
        )
    return state.replace(opt_state=opt_state)


def _placed(like: jax.Array, value: np.ndarray) -> jax.Array:
    """The value with the type and the place of ``like``."""
    value = np.asarray(value, like.dtype)
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: value[index])


def locate(text: str, field: str = "init.checkpoint") -> epath.Path:
    """The directory of the step that ``init.checkpoint`` (or another field) names; of a run the newest complete one.

    Raises:
      ValueError: there is none.
    """
    directory, bar, number = text.partition("|")
    path = epath.Path(directory).expanduser()
    path = path if "://" in directory else path.absolute()  # as Orbax asks
    if directory.startswith("s3://"):
        raise ValueError(f"{field}={text}: accepted is a directory or gs:// (Orbax reads no s3://)")
    if bar and not number.isdecimal():
        raise ValueError(f"{field}={text}: accepted is {ACCEPTED}")
    if not bar and path.name.isdecimal() and (path / "state").exists():
        return path
    inner = path / buckets.CHECKPOINTS
    steps = buckets.complete_steps(inner)
    wanted = int(number) if bar else max(steps, default=None)
    if wanted not in steps:
        has = f"it has the steps {', '.join(map(str, sorted(steps)))}" if steps else "no checkpoint is there"
        raise ValueError(f"{field}={text}: {has}; accepted is {ACCEPTED}")
    return inner / str(wanted)


def _saved_shapes(init: InitSettings, step: epath.Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters in a step, by name."""
    damage = integrity.damage(step, "state")
    if damage:
        raise ValueError(
            f"init.checkpoint={init.checkpoint}: {step} is damaged: {damage}; accepted is a good one"
        )
    try:
        found = ocp.PyTreeCheckpointHandler().metadata(step / "state").tree["params"]
    except Exception as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"init.checkpoint={init.checkpoint}: {step} can't be read ({line}); accepted is {ACCEPTED}"
        ) from error
    found = flatten_dict(found, sep="/")
    integers = [name for name, leaf in found.items() if leaf.dtype == np.int8]
    if integers:
        raise ValueError(
            f"init.checkpoint={init.checkpoint}: {integers[0]} is integers (moe.expert_bits) there; accepted is a float model's run"
        )
    return {name: tuple(leaf.shape) for name, leaf in found.items()}


def _shapes(settings: Settings) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's parameters, by name."""
    shapes = flatten_dict(train_state.parameter_shapes(settings), sep="/")
    return {name: leaf.shape for name, leaf in shapes.items()}


def _taken(settings: Settings, saved: dict[str, tuple[int, ...]]) -> list[str]:
    """The names of what is taken from the checkpoint.

    Raises:
      ValueError: there is nothing of that name, or it has another shape there.
    """
    ours, init = _shapes(settings), settings.init
    taken = [name for name in ours if re.search(init.params, name)]
    if not taken:
        raise ValueError(
            f"init.params={init.params}: no parameter has such a name; accepted is a regular expression that is"
            f" found in one, such as {_some(ours)}"
        )
    different = [name for name in taken if saved.get(name) != ours[name]]
    if different:
        first = different[0]
        raise ValueError(
            f"init.checkpoint={init.checkpoint}: {first} has shape {saved.get(first, 'none')} there, {ours[first]} here"
            f" ({len(different)} differ); accepted is a checkpoint of the same model, or in init.params a regular"
            " expression of what is to be taken"
        )
    return taken


def _some(names: Iterable[str]) -> str:
    return ", ".join(list(names)[:4])


def _optimizer(init: InitSettings, step: epath.Path, like: Any) -> Any:
    """The step's optimizer state, with the types and places of ``like``.

    Raises:
      ValueError: there is none, or one of another kind.
    """
    item = {"opt_state": jax.tree.map(ocp.utils.to_shape_dtype_struct, like)}
    arguments = ocp.args.PyTreeRestore(
        item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
    )
    try:
        return ocp.PyTreeCheckpointer().restore(step / "state", args=arguments)["opt_state"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"init.optimizer=True: {step} has no state of this optimizer and model ({str(error).splitlines()[0][:120]});"
            f" accepted is False, or a checkpoint (init.checkpoint={init.checkpoint}) of the same ones"
        ) from error


def read_parameters(step: epath.Path, like: dict[str, Any]) -> dict[str, Any]:
    """The step's parameters of these names, with the types and places of ``like``, arrays or their shapes."""
    item = {"params": unflatten_dict(jax.tree.map(ocp.utils.to_shape_dtype_struct, like), sep="/")}
    arguments = ocp.args.PyTreeRestore(
        item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
    )
    found = ocp.PyTreeCheckpointer().restore(step / "state", args=arguments)
    return flatten_dict(found["params"], sep="/")
