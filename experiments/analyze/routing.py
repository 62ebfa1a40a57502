"""Traces what a model's routers choose on a text, and says what is in it: ``python -m experiments.analyze routing --source=RUN [--text=TEXT]``

RUN is a run's directory (its newest step), DIR|STEP or DIR/checkpoints/STEP. TEXT is as `data.source`: files, the embedded
text (wiki_vital_en), a tfds dataset; without it the run's own held-out text. Writes to --out (default: routing/ in the run's
directory; one that was stopped goes on where it stopped, a trace that is there is not made again):

  trace/           the trace (docs/routing_traces.md): every token's experts, by layer
  figures.json     all figures, each with its 95 % interval and what shuffled tokens give
  routing.html     one page: the text coloured by expert, tables, pictures; works offline
  plots/*.png      the pictures

  --trace=PLACE        reads a trace instead: its directory, or .npz / .npy of expert indices that a server gave
  --against=OTHER      beside it another run, checkpoint or trace on the same text: how far they agree, experts matched
  --saturation=True    overlap with the last checkpoint's routing, of each checkpoint that the run has
  --tokens=N           of the text, whole sequences (default 20000; 0: all)
  --share=S            of the documents, evenly (default 1): of files that are sorted, such as by language
  --label=FIELD        what documents are of: topic (embedded text), file, or a field of JSON records, such as lang
  --split=all|validation       the documents: as experiments.evaluate
  --probabilities=True         writes the routers' whole distributions as well
  --config.GROUP.FIELD=V       as experiments.evaluate

Exit codes: 0 done; 2 bad input; 4 a file that can't be written or read.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import command_line, exits, process

COMMAND = "experiments.analyze routing"
DEFAULTS = {
    "source": "", "text": "", "trace": "", "against": "", "saturation": "False", "out": "", "tokens": "20000", "share": "1",
    "label": "", "split": "", "probabilities": "False",
}  # fmt: skip


SHOWN = ("busiest", "dropped", "entropy", "token_information", "first_repeats", "matched_agreement")


@dataclasses.dataclass(frozen=True)
class Arguments:
    source: str
    text: str
    trace: str
    against: str
    saturation: bool
    out: Path | None
    tokens: int
    share: float
    label: str
    split: str
    probabilities: bool
    overrides: dict[str, Any]


def main(argv: Sequence[str]) -> int:
    """``argv[0]`` is the sub-command's name."""
    if {"--help", "-h"} & set(argv[1:]):
        print(__doc__.strip())
        return 0
    return exits.guarded(COMMAND, lambda: _analyse(parse(argv[1:])))


def parse(arguments: Sequence[str]) -> Arguments:
    """Raises ValueError, one line that names the argument, its value and what would be accepted."""
    overrides, found = command_line.values(arguments, DEFAULTS)
    if bool(found["source"]) == bool(found["trace"]):
        raise ValueError(f"--source={found['source']}: accepted is one of --source=RUN and --trace=PLACE")
    if found["text"] and "data.source" in overrides:
        raise ValueError(f"--text={found['text']}: accepted is it or --config.data.source, not both")
    if not found["tokens"].isdecimal():
        raise ValueError(f"--tokens={found['tokens']}: accepted is an integer >= 0")
    try:
        share = float(found["share"])
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ValueError(f"--share={found['share']}: accepted is a number above 0, at most 1")
    if found["split"] not in ("", "all", "validation"):
        raise ValueError(f"--split={found['split']}: accepted is all or validation")
    for name in ("saturation", "probabilities"):
        if found[name] not in ("True", "False", "true", "false"):
            raise ValueError(f"--{name}={found[name]}: accepted is True or False")
    if found["trace"]:
        _check_without_model(found, overrides)
    out = Path(found["out"]) if found["out"] else None
    if out and (out.is_file() or (out / "config.json").exists()):
        raise ValueError(f"--out={out}: accepted is a directory that is not a run's own")
    if found["text"]:
        overrides["data.source"] = found["text"]
    yes = {name: found[name].lower() == "true" for name in ("saturation", "probabilities")}
    given = found | yes | {"out": out, "tokens": int(found["tokens"]), "share": share}
    return Arguments(**given, overrides=overrides)


def _check_without_model(found: dict[str, str], overrides: dict[str, Any]) -> None:
    for name in ("text", "saturation", "tokens", "share", "label", "split", "probabilities"):
        if found[name] != DEFAULTS[name]:
            raise ValueError(
                f"--{name}={found[name]}: accepted with --source, not with a trace that is there"
            )
    if overrides:
        name, value = next(iter(overrides.items()))
        raise ValueError(f"--config.{name}={value}: accepted with --source, not with a trace that is there")


def _analyse(arguments: Arguments) -> int:
    from switchmoe.analysis.routing import traces

    if arguments.trace:
        out, directory = _given(arguments)
        saturation = None
        against = Path(arguments.against) if arguments.against else None
        if against and not (against / traces.INFO_FILE).exists():
            raise ValueError(f"--against={against}: accepted beside --trace is a trace's directory")
    else:
        process.check_devices()
        out, directory, against, saturation = _traced(arguments)
    bar = Bar("counting")
    _write(directory, against, saturation, out, bar)
    return 0


def _given(arguments: Arguments) -> tuple[Path, Path]:
    """(where to write, the trace): of what is there."""
    from switchmoe.analysis.routing import arrays, traces

    place = Path(arguments.trace)
    out = arguments.out or (place.with_suffix("") if place.suffix in arrays.SUFFIXES else place) / "routing"
    if place.suffix not in arrays.SUFFIXES:
        traces.read_info(place)
        return out, place
    return out, of_arrays(place, out / "trace")


def of_arrays(place: Path, directory: Path) -> Path:
    """`arrays.made`, and says where the number of experts is a guess."""
    from switchmoe.analysis.routing import arrays, traces

    info = traces.read_info(arrays.made(place, directory))
    if info.guessed:
        print(
            f"--trace={place}: {info.num_experts} experts are guessed, of the largest index; num_experts in an .npz tells of them",
            file=sys.stderr,
        )
    return directory


def _traced(arguments: Arguments) -> tuple[Path, Path, Path | None, dict | None]:
    """(where to write, the trace, that beside it, the saturation)."""
    from switchmoe.analysis.routing import summary, traces, tracing
    from switchmoe.runs import buckets, trained

    source = trained.find(arguments.source)
    settings = trained.changed(source.settings, arguments.overrides)
    own = settings.data.source == source.settings.data.source
    split = arguments.split or ("validation" if own else "all")
    text = tracing.Text(split, arguments.label, arguments.tokens, arguments.share)
    out = arguments.out or Path(source.step.parent.parent) / "routing"

    def trace(model: Any, settings: Any, directory: Path, what: str) -> Path:
        bar = Bar(what, text.tokens)
        tracing.write(model, settings, text, directory, arguments.probabilities, bar.at)
        bar.end()
        return directory

    directory = trace(source, settings, out / "trace", "tracing")
    against, saturation = None, None
    if arguments.against and (Path(arguments.against) / traces.INFO_FILE).exists():
        against = Path(arguments.against)
    elif arguments.against:
        try:
            other = trained.find(arguments.against)
        except ValueError as error:
            raise ValueError(str(error).replace("--source=", "--against=", 1)) from error
        theirs = trained.changed(other.settings, arguments.overrides)
        theirs = dataclasses.replace(theirs, data=settings.data)
        against = trace(other, theirs, out / "against", f"tracing {arguments.against}")
    if arguments.saturation:
        there = source.step.parent
        steps = sorted(step for step in buckets.complete_steps(there) if step <= int(source.step.name))
        if len(steps) < 2:
            raise ValueError(
                f"--saturation=True: {there} has {len(steps)} checkpoint up to {source.step.name}; accepted is a run with more"
                " (checkpoint.keep)"
            )
        places = {
            step: trace(
                source._replace(step=there / str(step)), settings, out / "steps" / str(step), f"step {step}"
            )
            for step in steps
        }
        saturation = summary.saturation(places, Bar("comparing").says)
    return out, directory, against, saturation


def _write(directory: Path, against: Path | None, saturation: dict | None, out: Path, bar: "Bar") -> None:
    from switchmoe.analysis import report
    from switchmoe.analysis.routing import page, pictures, summary

    found = summary.figures(directory, bar.says, against)
    bar.end()
    out.mkdir(parents=True, exist_ok=True)
    drawn = pictures.save_all(found, out / "plots", saturation)
    figures = {"says": found["says"], "units": found["units"], "layers": found["layers"]}
    figures |= {"saturation": saturation} if saturation else {}
    report.write_whole(out / "figures.json", json.dumps(summary.plain(figures), indent=1) + "\n")
    report.write_whole(out / "routing.html", page.page(directory, found, drawn, saturation))
    for line in table(found):
        print(line)
    print(out / "routing.html")


def table(found: dict[str, Any]) -> list[str]:
    """The figures that say most, a line a layer: of each its value and, in parentheses, that of shuffled tokens."""
    from switchmoe.analysis.routing import summary

    names = [name for name in SHOWN if any(name in of for of in found["layers"].values())]
    rows = [["layer", *map(summary.shown, names)], ["", *(found["units"][name] for name in names)]]
    for layer, of in found["layers"].items():
        rows.append([layer, *(summary.brief(of.get(name)) for name in names)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return [*lines, "in parentheses: tokens shuffled; 95 % intervals and the other figures are on the page"]


class Bar:
    """How far work has got: a bar that moves on a terminal, elsewhere a line every ten seconds."""

    EVERY, WIDTH = 10.0, 30

    def __init__(self, what: str, total: int = 0):
        self._what, self._total = what, total
        self._began = self._told = time.monotonic()
        self._moving = sys.stderr.isatty()

    def at(self, done: int) -> None:
        """So many tokens."""
        share = min(1.0, done / self._total) if self._total else 0.0
        filled = round(share * self.WIDTH)
        of = f" of {self._total:,}" if self._total else ""
        bar = f"[{'#' * filled}{'.' * (self.WIDTH - filled)}] " if self._total else ""
        self.says(f"{bar}{done:,}{of} tokens, {time.monotonic() - self._began:.0f} s")

    def says(self, text: str) -> None:
        if self._moving:
            print(f"\r\x1b[K{self._what}: {text}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self._told >= self.EVERY:
            self._told = time.monotonic()
            print(f"{self._what}: {text}", file=sys.stderr)

    def end(self) -> None:
        if self._moving:
            print(file=sys.stderr)
