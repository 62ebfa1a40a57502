"""Fine-tunes a model on tasks: ``python -m experiments.finetune --init=DIR --task=NAME[,NAME...] [--workdir=DIR] [--config.GROUP.FIELD=VALUE ...]``

DIR is a run's directory, DIR|STEP, or a converted checkpoint. The tasks are topic, description and title (of the packaged
summaries), instruct (a mixture of instructions of them), public benchmarks, or a glob of .jsonl, .json (SQuAD's format, too), .csv or .tsv files with --config.task.inputs and
--config.task.targets, templates of their fields. Beside a run's files there are predictions.jsonl and the tasks' metrics.

  --steps=N   of training; 0: measures the model as it is, and writes no run
  --config.task.shots=K   solved examples before each question that is measured; --task=NAME@K: in training, too
  --config.task.packed=N   several examples in a row of training, which is N times as long
  --config.task.filled=True   as many as fit in a row as long as one example may be
  --config.train.patience=N   done after N evaluations whose score is no better than the best
  --config.train.trainable=all|non_moe|moe_only|attention|ffn|router   or a regular expression: what is trained

The same command on the same directory goes on where it stopped. Exit codes: those of `experiments.run`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import command_line, exits, process, run

COMMAND, CONFIG = "experiments.finetune", "configs/finetune.py"


def main(argv: Sequence[str]) -> int:
    if {"--help", "-h"} & set(argv[1:]):
        print(__doc__.strip())
        return 0
    return exits.guarded(COMMAND, lambda: _finetune(list(argv)))


def _finetune(argv: list[str]) -> int:
    own, rest = command_line.options(argv[1:], ("init", "task", "steps"))
    for name, what in (("init", "a run's directory"), ("task", "a task's name, or several with commas")):
        if not own[name]:
            raise ValueError(f"no {name}; accepted is --{name}=, {what}")
    if not (own["steps"] or "0").isdecimal():
        raise ValueError(f"--steps={own['steps']}: accepted is an integer >= 0")
    trains = own["steps"] == "" or int(own["steps"]) > 0
    given = [f"--config={CONFIG}:{own['init']}", f"--config.task.names={own['task']}"]
    given += [f"--config.train.num_steps={own['steps']}"] if own["steps"] and trains else []
    own_flags = ("--init=", "--task=", "--steps=")
    _, workdir = command_line.parse(["finetune", *given, *rest], CONFIG, __doc__, trains, own_flags)
    given += command_line.begun(workdir, ("model.shared_dropout",))  # older runs have it not
    settings, workdir = command_line.parse(["finetune", *given, *rest], CONFIG, __doc__, trains, own_flags)
    process.keep_quiet()
    process.check_devices()
    from switchmoe.runs import finetuning, task_data

    settings = task_data.fitted(settings, command_line.free_lengths(rest))
    if trains:
        return run.carry_out(COMMAND, argv, settings, workdir)
    for line in finetuning.measured(settings, Path(workdir), lambda text: print(text, file=sys.stderr)):
        print(line)
    return 0


if __name__ == "__main__":
    process.use_huge_pages()
    exits.leave(COMMAND, main)
