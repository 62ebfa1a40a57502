"""Distils a model into a smaller one: ``python -m experiments.distill --teacher=DIR [--workdir=DIR] [--task=NAME[,NAME...]] [--config.GROUP.FIELD=VALUE ...]``

DIR is a run's directory, DIR|STEP, or a converted checkpoint. The student is its dense twin, or of any shape that
--config.model. says; it is trained on the teacher's text, on the teacher's tasks if that was fine-tuned, or on those of --task.

  --config.distill.weight=0.25      share of the loss that is the teacher's probabilities; 0: none
  --config.distill.init=True        begin with the teacher's parameters, of all that both have in one shape
  --config.distill.temperature=1.0
  --config.distill.top_k=0          K: write the teacher's K likeliest tokens once, and read them; 0: it runs beside the student
  --config.distill.baseline=DIR     a student's run without a teacher, to say how much of the teacher's gain is kept

The same command on the same directory goes on where it stopped. Exit codes: those of `experiments.run`.
"""

from collections.abc import Sequence
from pathlib import Path

from experiments import command_line, exits, process, run

COMMAND, CONFIG = "experiments.distill", "configs/distill.py"


def main(argv: Sequence[str]) -> int:
    if {"--help", "-h"} & set(argv[1:]):
        print(__doc__.strip())
        return 0
    return exits.guarded(COMMAND, lambda: _distill(list(argv)))


def _distill(argv: list[str]) -> int:
    own, rest = command_line.options(argv[1:], ("teacher", "task"))
    if not own["teacher"]:
        raise ValueError("no teacher; accepted is --teacher=, a run's directory")
    task = ["", "task:"][bool(own["task"])]
    given = [f"--config={CONFIG}:{task}{own['teacher']}"]
    given += [f"--config.task.names={own['task']}"] if own["task"] else []
    own_flags = ("--teacher=", "--task=")
    _, workdir = command_line.parse(["distill", *given, *rest], CONFIG, __doc__, True, own_flags)
    # The teacher's fields, of which the student's are, may have changed since.
    given += command_line.begun(workdir, ("train", "checkpoint", "model.shared_dropout"))
    settings, workdir = command_line.parse(["distill", *given, *rest], CONFIG, __doc__, True, own_flags)
    if own["task"]:
        process.keep_quiet()
        process.check_devices()
        from switchmoe.runs import task_data

        settings = task_data.fitted(settings, command_line.free_lengths(rest))
    code = run.carry_out(COMMAND, argv, settings, workdir)
    if code == 0 and "://" not in workdir:
        _tell(Path(workdir))
    return code


def _tell(workdir: Path) -> None:
    """What the student kept of its teacher, as lines."""
    from switchmoe.analysis import distilled
    from switchmoe.runs.rundir import read_run

    for name, value in distilled.rows(read_run(workdir)):
        print(f"{name}: {value}")


if __name__ == "__main__":
    process.use_huge_pages()
    exits.leave(COMMAND, main)
