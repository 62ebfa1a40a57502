"""Tasks by name. A user adds one: ``TASKS["mine"] = Task("mine", examples, ("exact_match",))``."""

from switchmoe.data.errors import DataError
from switchmoe.data.tasks import benchmarks, embedded, files, metrics
from switchmoe.data.tasks.benchmarks import BENCHMARKS
from switchmoe.data.tasks.task import SPLITS, Example, Task
from switchmoe.settings import DataSettings, TaskSettings

TASKS: dict[str, Task] = {task.name: task for task in embedded.tasks()}


def find(settings: TaskSettings, data: DataSettings, field: str = "names") -> list[Task]:
    """Those of `task.names`, or of another field, in their order.

    Raises:
      DataError: a task or a metric that there is not; one without examples; one line.
    """
    found = []
    for name in (part.strip() for part in getattr(settings, field).split(",")):
        if name in TASKS:
            found.append(TASKS[name])
        elif name in BENCHMARKS:
            found.append(benchmarks.task(name, data))
        elif files.is_files(name):
            found.append(files.task(name, settings, data))
        else:
            raise DataError(
                f"task.{field}={name}: no such task; accepted are {', '.join((*TASKS, *BENCHMARKS))}, and globs of files that end in {files.ACCEPTED}"
            )
    for task in found:
        for name in task.metrics:
            if name not in metrics.METRICS:
                raise DataError(f"task.metrics={name}: accepted are {', '.join(metrics.METRICS)}")
        for split in SPLITS:
            if not task.examples(split):
                raise DataError(
                    f"task.{field}={task.name}: its split {split} is empty; accepted is a task with examples in both"
                )
    return found


__all__ = ["SPLITS", "TASKS", "Example", "Task", "find"]
