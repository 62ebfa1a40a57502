"""Tasks by name. A user adds one: ``TASKS["mine"] = Task("mine", examples, ("exact_match",))``."""

from switchmoe.data.errors import DataError
from switchmoe.data.tasks import benchmarks, embedded, few_shot, files, instructions, metrics
from switchmoe.data.tasks.benchmarks import BENCHMARKS
from switchmoe.data.tasks.task import SPLITS, Example, Task, spread
from switchmoe.settings import DataSettings, TaskSettings

CHECKED = 100  # examples of each split of a task with options

TASKS: dict[str, Task] = {task.name: task for task in (*embedded.tasks(), *instructions.tasks())}
MIXTURES: dict[str, tuple[str, ...]] = {"instruct": tuple(task.name for task in instructions.tasks())}


def expanded(settings: TaskSettings, field: str = "names") -> list[list[str]]:
    """For each of the names its tasks: itself, or of a mixture all but those of a family that is held out."""
    held_out = held_out_families(settings) if field == "names" else set()
    found = []
    for name in _names(getattr(settings, field)):
        own, shots = few_shot.parted(name)
        suffix = f"{few_shot.SIGN}{shots}" if shots else ""
        members = [one for one in MIXTURES.get(own, ()) if instructions.family(one) not in held_out]
        found.append([f"{one}{suffix}" for one in members] if own in MIXTURES else [name])
    return found


def held_out_families(settings: TaskSettings) -> set[str]:
    """Of `task.held_out`: with a task its inverse, and what asks for the same in other words, is not trained on."""
    names = (few_shot.parted(name)[0] for parts in expanded(settings, "held_out") for name in parts)
    return {instructions.family(name) for name in names if name}


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def find(settings: TaskSettings, data: DataSettings, field: str = "names") -> list[Task]:
    """Those of `task.names`, or of another field, in their order.

    Raises:
      DataError: a task or a metric that there is not; one without examples; one line.
    """
    found = []
    held_out = held_out_families(settings) if field == "names" else set()
    for full in (name for names in expanded(settings, field) for name in names):
        name, shots = few_shot.parted(full)
        if instructions.family(name) in held_out:
            raise DataError(
                f"task.{field}={full}: of a family that task.held_out={settings.held_out} keeps from training; accepted is another"
                " task, or another task.held_out"
            )
        if name in TASKS:
            task = TASKS[name]
        elif name in BENCHMARKS:
            task = benchmarks.task(name, data, field)
        elif files.is_files(name):
            task = files.task(name, settings, data, field)
        else:
            accepted = ", ".join((*(one for one in TASKS if one not in MIXTURES["instruct"]), *MIXTURES))
            raise DataError(
                f"task.{field}={name}: no such task; accepted are {accepted}, {', '.join(MIXTURES['instruct'])},"
                f" {', '.join(BENCHMARKS)}, and globs of files that end in {files.ACCEPTED}"
            )
        _check(task, field)
        found.append(few_shot.with_shots(task, shots, f"task.{field}={full}"))
    if not found:
        raise DataError(
            f"task.held_out={settings.held_out}: nothing is left of task.{field}={settings.names} to train on;"
            " accepted is a part of its families"
        )
    return found


def _check(task: Task, field: str) -> None:
    for name in task.metrics:
        metrics.check(name)
    for split in SPLITS:
        if not task.examples(split):
            raise DataError(
                f"task.{field}={task.name}: its split {split} is empty; accepted is a task with examples in both"
            )
        if not task.options:
            continue
        for example in spread(task.examples(split), CHECKED):
            if example.targets not in task.options:
                raise DataError(
                    f"task.{field}={task.name}: an example of its split {split} has the answer {example.targets!r}; accepted is one"
                    f" of its options {', '.join(task.options)}"
                )


__all__ = ["MIXTURES", "SPLITS", "TASKS", "Example", "Task", "expanded", "few_shot", "find"]
