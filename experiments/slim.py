"""Makes a trained model smaller, and measures what that costs: ``python -m experiments.slim --source=RUN --target=DIR [--OPTION=VALUE ...]``

RUN is a run's directory with experts (its newest step), DIR|STEP or DIR/checkpoints/STEP. DIR becomes a run's directory with
fewer experts, integers for their weights, or both, which evaluate, generate, finetune and init.checkpoint take (integers
are not trained, so finetune with --steps=0). A table compares it with RUN: parameters, bytes on disk and in memory, held-out loss, the task's score, generated tokens a second.

  --experts=K                  experts kept in each layer
  --by=use|merge|task          the K most used | all, of which the others are averaged into these | those that the task's
                               sentences go to as wholes: a sub-network for the task (use)
  --align=hungarian|greedy|none   how an expert's units are matched to another's before they are averaged (hungarian)
  --bits=8|4                   the experts' weights are integers, two a byte if of 4 bits, on disk and in memory
  --group=N                    rows of a kernel that share scales, 0: all (all of 8 bits; of 4 bits 32, or what divides the widths)
  --sweep                      DIR becomes a directory of them all: pruned, merged, for the task, and so on, and their table
  --text=TEXT                  on which use is counted (its training part) and loss is measured: as data.source (the run's own)
  --task=NAME[,NAME...]        tasks, as experiments.finetune has them: use is counted on them, loss measured if there is no
                               --text, and their metrics
  --batches=N                  at most so many of each split; 0: all (16)
  --config.GROUP.FIELD=V       how the text is read, as in experiments.evaluate, and fields of task

Beside a run's files DIR has slim.json (of which experts each is made), use.json, table.json, .csv and .md. The same command
goes on after a kill. Exit codes: 0 done; 2 bad input; 4 a file that can't be written or read.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import command_line, exits, process

COMMAND = "experiments.slim"
SOURCE = "source"  # its row of the table
OPTIONS = {  # with their defaults
    "source": "", "target": "", "experts": 0, "by": "use", "align": "hungarian", "bits": 0, "group": -1, "text": "", "task": "", "batches": 16,
}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    if {"--help", "-h"} & set(argv[1:]):
        print(__doc__.strip())
        return 0
    return exits.guarded(COMMAND, lambda: _slim(*parse(argv[1:])))


def parse(arguments: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(options, overrides of the config). Raises ValueError, one line that names the argument and what would be accepted."""
    overrides, given = command_line.values(arguments, dict.fromkeys(OPTIONS, ""), flags=("sweep",))
    found: dict[str, Any] = {**OPTIONS, "sweep": given.pop("sweep")}
    for name, value in given.items():
        if value and isinstance(OPTIONS[name], int) and not value.isdecimal():
            raise ValueError(f"--{name}={value}: accepted is an integer >= 0")
        found[name] = type(OPTIONS[name])(value) if value else OPTIONS[name]
    for name, what in (("source", "a run with experts"), ("target", "a directory's name that is free")):
        if not found[name]:
            raise ValueError(f"no {name}; accepted is --{name}=, {what}")
    if found["by"] != "use" and (found["sweep"] or not found["experts"]):
        raise ValueError(f"--by={found['by']}: accepted with --experts=, without --sweep")
    if found["by"] == "task" and not found["task"]:
        raise ValueError("--by=task: accepted with --task=NAME")
    if found["group"] >= 0 and not (found["bits"] or found["sweep"]):
        raise ValueError(f"--group={found['group']}: accepted with --bits=8, --bits=4 or --sweep")
    if found["bits"] and found["sweep"]:
        raise ValueError(f"--bits={found['bits']}: accepted without --sweep, which has both")
    if not (found["experts"] or found["bits"] or found["sweep"]):
        raise ValueError("nothing to do; accepted is --experts=K, --bits=8, --bits=4 or --sweep")
    unknown = [n for n in overrides if n.startswith("task.") and (n == "task.names" or not found["task"])]
    if unknown:
        raise ValueError(
            f"--config.{unknown[0]}={overrides[unknown[0]]}: accepted are task's other fields, with --task="
        )
    return found, overrides


def _slim(options: dict[str, Any], overrides: dict[str, Any]) -> int:
    process.keep_quiet()
    process.check_devices()
    from switchmoe.analysis import report
    from switchmoe.interop import slim, slim_table
    from switchmoe.runs import measuring, slimming, trained

    note = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    model, target = trained.find(options["source"]), Path(options["target"]).expanduser()
    if Path(model.step).parent.parent.absolute() in target.absolute().parents:
        raise ValueError(f"--target={target}: it lies in --source; accepted is a name outside")
    limits = options["text"], options["task"], overrides, options["batches"]
    counted = slim.counted_on(model, *limits)
    whole = target / slim_table.TABLE_FILE
    members = {
        target: slimming.Slimming(*(options[name] for name in ("experts", "by", "align", "bits", "group")))
    }
    if options["sweep"]:
        kept = options["experts"] or max(1, model.settings.moe.num_experts // 2)
        found = slimming.sweep(kept, options["align"], options["group"], bool(options["task"]))
        members = {target / name: how for name, how in found.items()}
    wanted = {path: slim.asked(model, how, counted) for path, how in members.items()}
    for how in members.values():  # before anything is read or written
        slimming.settings_of(model.settings, how, 1)
    there = {path: slim.is_there(path, wanted[path]) for path in members}
    table = slim_table.Table(whole, {"source": slim.identity(model), "counted": counted}, options["sweep"])
    if not table.missing([SOURCE, *(path.name for path in members)]) and all(there.values()):
        print(table.markdown())
        return 0
    ruler = measuring.yardstick(model, *limits, target, note)
    rows = {SOURCE: (model, None)}
    for path, how in members.items():
        if not there[path]:
            note(f"making {path}")
            slim.make(
                model, path, how, wanted[path], lambda how=how: measuring.use(model, ruler, how.by == "task")
            )
        rows[path.name] = trained.find(str(path)), path
    for name in table.missing(rows):
        source, path = rows[name]
        note(f"measuring {name}")
        row = slim.measured(name, source, ruler, path)
        if path:
            report.write_report(path)
        table.add(row)
    print(table.markdown())
    return 0


if __name__ == "__main__":
    exits.leave(COMMAND, main)
