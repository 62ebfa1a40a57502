"""Tries the papers' claims: ``python -m experiments.paper NAME... [--scale=NAME] [--workdir=DIR] [--kept=FILE] [--dry_run] [--config.GROUP.FIELD=VALUE ...]``

  --list      the claims, and what the others wait for
  NAME...     makes the runs that these claims need and that are not done, then says what they came to; all: of every claim
  power       makes pilot runs (dense and sparse, of seeds that no claim uses), then says how losses vary over seeds, and how
              many seeds and hours decide each claim: DIR/report/power.md
  rates       makes pilot runs of fine-tuning at a few rates (dense and sparse, of a seed that no claim uses), then says which has the
              lowest loss: DIR/report/rates.md
  times [NAME...] [--repeats=N]   times a step of the arms of claims about time, one after the other in each of N rounds (15), in
              a process for each seed: to be run on a machine that does nothing else, before report. DIR/times_SCALE.json, or
              beside --kept
  report      writes the scorecard of the runs in DIR: DIR/report/scorecard.html, scorecard.md and plots/*.png
  page [--results=DIR]   writes DIR/scorecard.md, a line a claim, from DIR/paper_SCALE/runs.jsonl of each scale (what --kept kept) and
              DIR/notes.md; DIR: experiments/results

--scale: tiny (the default, hours of two cores), laptop (a night), languages (a mixture, for the claims about one), small (a GPU),
base (the papers' own). A claim's runs, criterion and the papers' figures are in `experiments/claims`; the rule is `verdicts.RULE`. All claims of a
scale are one sweep in one directory (default: runs/paper_SCALE) and share runs; what `experiments.sweep` takes is taken here:
``--dry_run`` lists the runs with their time, overrides change the base of all runs, and the same command continues.
``--kept=FILE`` is a small file with a line a finished run, which outlives DIR: runs in it count as done, and each that is done
in DIR is added to it, at once.

Exit codes: those of `experiments.sweep` (a verdict is none of them); of report 0 done; 2 bad input; 4 a file that can't be
written or read.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from experiments import claims, command_line, exits
from experiments.claims import CLAIMS, SCALES
from experiments.paper import times

COMMANDS = ("power", "rates", "times", "report", "page")

RUNS = ("scale", "workdir", "kept")
TAKES = {
    "": RUNS,
    "power": RUNS,
    "rates": RUNS,
    "times": (*RUNS, "repeats"),
    "report": RUNS,
    "page": ("results",),
}  # options


class Arguments(NamedTuple):
    command: str  # one of COMMANDS, or "": to try claims
    names: list[str]
    scale: str
    workdir: Path
    kept: Path | None
    repeats: int
    results: Path
    rest: list[str]  # for the sweep


def main(argv: Sequence[str]) -> int:
    if {"--help", "-h"} & set(argv[1:]):
        print(__doc__.strip())
        return 0
    if list(argv[1:]) == ["--list"]:
        print(listing())
        return 0
    return exits.guarded("experiments.paper", lambda: _run(parse(argv[1:])))


def _run(arguments: Arguments) -> int:
    known = {"": _try, "power": _power, "rates": _rates, "times": _times, "report": _report, "page": _page}
    return known[arguments.command](arguments)


def parse(arguments: Sequence[str]) -> Arguments:
    """Names, scale and directory; the rest is the sweep's.

    Raises:
      ValueError: a claim or a scale that there is not, or a claim that can't be run; one line.
    """
    names, rest = [], []
    chosen = dict.fromkeys((*RUNS, "repeats", "results"), "")
    for argument in command_line.joined(arguments):
        name, equals, value = argument.lstrip("-").partition("=")
        if not argument.startswith("-"):
            names.append(argument)
        elif name == "config":
            raise ValueError(
                f"{argument}: the scale has its config; accepted is --scale=, one of {', '.join(SCALES)}"
            )
        elif name in chosen and equals:
            chosen[name] = value
        else:
            rest.append(argument)
    scale = chosen["scale"] or "tiny"
    if scale not in SCALES:
        raise ValueError(f"--scale={scale}: accepted is one of {', '.join(SCALES)}")
    command = names.pop(0) if names and names[0] in COMMANDS else ""
    names = _names(command, names, scale)
    others = [f"--{one}={value}" for one, value in chosen.items() if value and one not in TAKES[command]]
    others += rest if command in ("report", "page") else []
    others += ["--dry_run"] if command == "times" and "--dry_run" in rest else []
    if others:
        accepted = ", ".join(f"--{one}=" for one in TAKES[command])
        raise ValueError(f"{others[0]}: accepted with {command or 'claims'} are {accepted}")
    repeats = chosen["repeats"] or str(times.REPEATS)
    if not repeats.isdecimal() or int(repeats) < 3:
        raise ValueError(f"--repeats={repeats}: accepted is an integer >= 3, with times")
    kept = Path(chosen["kept"]) if chosen["kept"] else None
    workdir = Path(chosen["workdir"] or f"runs/paper_{scale}")
    results = Path(chosen["results"] or "experiments/results")
    return Arguments(command, names, scale, workdir, kept, int(repeats), results, rest)


def _names(command: str, names: Sequence[str], scale: str) -> list[str]:
    """The claims that are meant, each once."""
    runnable = [claim.name for claim in claims.tried(scale)]
    for name in names:
        if command not in ("", "times"):
            raise ValueError(f"{name}: accepted after {command} are options alone")
        if name not in ("all", *runnable):
            why = claims.why_not(CLAIMS[name], scale) if name in CLAIMS else "no such claim"
            raise ValueError(f"{name}: {why}; accepted are all, {', '.join((*COMMANDS, *runnable))}")
    if not (names or command):
        raise ValueError(f"no claim; accepted are --list, all, {', '.join(COMMANDS)}, or names of claims")
    return list(dict.fromkeys(runnable if "all" in names else names))


def listing() -> str:
    """A line for each claim: its name, source, and what it says or what is missing to run it."""
    width = max(map(len, CLAIMS))
    lines = []
    for claim in CLAIMS.values():
        lines.append(f"{claim.name.ljust(width)}  {claim.source}: {claim.says}")
        lines += [f"{'':{width}}  {claim.not_run}"] if claim.not_run else []
    return "\n".join(lines)


def _try(arguments: Arguments) -> int:
    """Runs the claims' part of the scale's sweep; prints the verdicts."""
    wanted = [run for name in arguments.names for run in claims.runs(CLAIMS[name], arguments.scale)]
    code, done = _make(arguments, claims.unique(wanted))
    if done:
        from experiments.paper import scorecard

        results = scorecard.read(arguments.workdir, arguments.scale, arguments.kept)
        for name in arguments.names:
            print(scorecard.told(CLAIMS[name], results))
    return code


def _sweep(arguments: Arguments) -> list[str]:
    """The command line of the scale's sweep."""
    where = [f"--config={SCALES[arguments.scale].config}", f"--workdir={arguments.workdir}"]
    return ["experiments.paper", *where, *arguments.rest]


def _make(arguments: Arguments, wanted: list[dict]) -> tuple[int, bool]:
    """(exit code of the sweep of these runs, whether it went to its end); what is done is kept."""
    from experiments.paper import finished
    from experiments.sweep import command

    argv = _sweep(arguments)
    missing = finished.missing(wanted, argv, __doc__, arguments.scale, arguments.kept)
    if len(missing) < len(wanted):
        print(f"{len(wanted) - len(missing)} of {len(wanted)} runs are in {arguments.kept}")
    dry_run = "--dry_run" in arguments.rest

    def keep() -> None:
        if arguments.kept and not dry_run:
            finished.update(arguments.kept, arguments.workdir, arguments.scale)

    def keep_if_possible() -> None:  # while others run; what hinders it now is told in the end
        with contextlib.suppress(OSError, ValueError):
            keep()

    code = command.command(argv, __doc__, missing, keep_if_possible) if missing else 0
    keep()
    return code, not dry_run and code in (0, exits.EXIT_FAILED)


def _power(arguments: Arguments) -> int:
    code, done = _make(arguments, list(claims.pilots(arguments.scale).values()))
    if done:
        from experiments.paper import power

        text, path = power.write(arguments.workdir, arguments.scale, arguments.kept)
        print(f"{text}\n{path}")
    return code


def _rates(arguments: Arguments) -> int:
    wanted = claims.rate_runs(arguments.scale)
    if not wanted:
        others = [name for name in SCALES if claims.rate_pilots(name)]
        raise ValueError(
            f"--scale={arguments.scale}: nothing is tuned there; accepted are {', '.join(others)}"
        )
    code, done = _make(arguments, wanted)
    if done:
        from experiments.paper import rates

        text, path = rates.write(arguments.workdir, arguments.scale, arguments.kept)
        print(f"{text}\n{path}")
    return code


def _times(arguments: Arguments) -> int:
    from experiments.paper import finished
    from experiments.sweep import study
    from switchmoe.settings import to_dict

    chosen = [CLAIMS[name] for name in arguments.names] or claims.tried(arguments.scale)
    wanted = claims.unique([arm for claim in chosen for arm in times.arms(claim, arguments.scale)])
    if not wanted:
        raise ValueError(
            f"{', '.join(arguments.names) or f'--scale={arguments.scale}'}: nothing about time; accepted are claims about it, or no name"
        )
    base = study.read(_sweep(arguments), __doc__, ()).base
    finished.check_base(base, arguments.workdir, arguments.scale, arguments.kept)
    path = times.place(arguments.workdir, arguments.scale, arguments.kept)
    seeds = max(
        claims.seeds(claim, arguments.scale) for claim in chosen if times.arms(claim, arguments.scale)
    )
    times.measure(to_dict(base), wanted, seeds, arguments.repeats, path)
    print(path)
    return 0


def _page(arguments: Arguments) -> int:
    from experiments.paper import page

    print(page.write(arguments.results))
    return 0


def _report(arguments: Arguments) -> int:
    from experiments.paper import finished, scorecard

    if arguments.kept:
        finished.update(arguments.kept, arguments.workdir, arguments.scale)
    print(scorecard.write(arguments.workdir, arguments.scale, arguments.kept))
    return 0


if __name__ == "__main__":
    exits.leave("experiments.paper", main)
