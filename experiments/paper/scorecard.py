"""The scorecard: what the runs in a directory say of each claim, as text, Markdown and HTML."""

import html
import math
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import claims
from experiments.claims import CLAIMS, SCALES, Claim
from experiments.paper import finished, times
from switchmoe.analysis import intervals, plots, report, sweep_plots, sweeps, verdicts
from switchmoe.analysis.verdicts import Check, Finding, Table, Verdict
from switchmoe.runs.reporting import duration

COLOURS = (*sweep_plots.COLOURS, plots.GREY)
PART_HEADS = ["part of the claim", "the paper", "here, with 95 % interval", "seeds", "verdict"]
ARM_HEADS = ["runs", "the paper", "held-out loss", "st. dev.", "seeds", "dropped", "examples/s"]


class Results(NamedTuple):
    scale: str
    source: str  # of the text
    arguments: str  # of the command that made the runs, beside the claims' names
    tables: dict[str, Table]  # by claim
    origins: list[dict[str, Any]]  # `run.json` of the runs that are done or diverged
    seeds: list[int]
    clocks: dict[str, str]  # where steps were timed in turn, by the claims for which they were

    def command(self, names: str) -> str:
        return f"python -m experiments.paper {names} {self.arguments}"


def read(workdir: Path, scale: str, kept: Path | None = None) -> Results:
    """The runs of a scale's directory and of the file ``kept``, by claim.

    Raises:
      ValueError: as `finished.read`.
    """
    done, found = finished.read(workdir, scale, kept), times.read(times.place(workdir, scale, kept))
    tables, origins, clocks = {}, {}, {}
    for claim in claims.tried(scale):
        measured = times.newest(claim, scale, done.base, found)
        if measured:
            clocks[claim.name] = f"{measured['machine']}, commit {measured['commit']}"
        tables[claim.name] = {
            arm: {
                seed: times.timed(outcome[0], run, seed, measured)
                for seed in range(claims.seeds(claim, scale))
                if (outcome := done.run(run := claims.run_of(overrides, seed, scale)))
            }
            for arm, overrides in claim.arms(SCALES[scale]).items()
        }
        used = set(map(finished.key, claims.runs(claim, scale)))
        origins |= {found: origin for found, (_, origin) in done.runs.items() if found in used}
    seeds = sorted({seed for table in tables.values() for runs in table.values() for seed in runs})
    source, arguments = done.base["data"]["source"], _arguments(done.base, scale, workdir)
    return Results(scale, source, arguments, tables, list(origins.values()), seeds, clocks)


def _arguments(base: dict[str, Any], scale: str, workdir: Path) -> str:
    """Scale, directory and overrides of the base that the runs were made with."""
    words = [
        f"--scale={scale}",
        *([] if workdir == Path(f"runs/paper_{scale}") else [f"--workdir={workdir}"]),
    ]
    words += [
        f"--config.{field}={value}" for field, value in finished.changed(base, finished.plain(scale)).items()
    ]
    return " ".join(map(shlex.quote, words))


def judge(claim: Claim, results: Results) -> Verdict:
    scale, table = results.scale, results.tables[claim.name]
    return verdicts.verdict(
        claim.checks(SCALES[scale]), table, claims.seeds(claim, scale), claim.name in results.clocks
    )


def told(claim: Claim, results: Results) -> str:
    """The verdict as lines of text."""
    found = judge(claim, results)
    lines = [f"{claim.name} ({claim.source}): {found.outcome}"]
    for one in map(part, found.findings):
        says, paper, here, seeds, outcome = one
        lines.append(
            f"  {says}: {outcome}; {here}, {seeds} seeds" + (f"; the paper: {paper}" if paper else "")
        )
    return "\n".join(lines)


def part(finding: Finding) -> list[str]:
    """A line of `PART_HEADS`."""
    check: Check = finding.check
    if finding.interval is None:
        return [check.says, check.paper, report.MDASH, "0", finding.outcome]
    here = intervals.written(finding.interval, check.unit)
    return [check.says, check.paper, here, str(finding.interval.seeds), finding.outcome]


def _arm(claim: Claim, arm: str, runs: dict[int, sweeps.Run | None]) -> list[str]:
    """A line of ``ARM_HEADS``."""
    done = [run for run in runs.values() if run is not None]
    diverged = len(runs) - len(done)
    losses = [run.loss for run in done]
    loss = f"{np.mean(losses):.4f}" if losses else report.MDASH
    sparse = [verdicts.dropped(run) for run in done if run.routing]
    speeds = [run.settings.data.batch_size / run.step_seconds for run in done]
    speed = float(np.mean(speeds)) if done else math.nan
    return [
        arm,
        claim.paper.get(arm, ""),
        loss + (f", {diverged} diverged" if diverged else ""),
        f"{np.std(losses, ddof=1):.4f}" if len(losses) > 1 else "",
        str(len(runs)),
        f"{np.mean(sparse):.2%}" if sparse else "",
        "" if math.isnan(speed) else f"{speed:.4g}",
    ]


def write(workdir: Path, scale: str, kept: Path | None = None) -> Path:
    """Writes the scorecard, HTML and Markdown, each at once or not at all; returns the HTML's path.

    Raises:
      ValueError: as `read`.
    """
    results = read(workdir, scale, kept)
    directory = workdir / "report"
    (directory / "plots").mkdir(parents=True, exist_ok=True)
    found = judged(results)
    report.write_whole(directory / "scorecard.md", markdown(results, found))
    path = directory / "scorecard.html"
    report.write_whole(path, _page(results, found, _pictures(results, directory / "plots")))
    return path


def summary(results: Results, judged: dict[str, Verdict]) -> list[tuple[str, str]]:
    """Where the results come from."""
    outcomes = [found.outcome for found in judged.values()]
    kinds = (verdicts.HELD, verdicts.NOT_HELD, verdicts.UNDECIDED, verdicts.NOT_RUN)
    origins = results.origins

    def each(value) -> str:
        return "; ".join(sorted({str(value(one)) for one in origins if value(one)})) or report.MISSING

    def text(one: dict[str, Any]) -> str:
        hashes, counts = one.get("documents_sha256", {}), one.get("documents", {})
        parts = (
            f"{split} {counts.get(split, '?')} documents, fingerprint {sha[:12]}"
            for split, sha in hashes.items()
            if split in counts or not counts  # not of tasks, which are another text
        )
        told = ", ".join(parts)
        return f"{Path(results.source).name}: {told}" if told else ""

    return [
        ("Claims", ", ".join(f"{outcomes.count(kind)} {kind}" for kind in kinds)),
        (
            "Runs",
            f"{len(origins)}, {duration(sum(one.get('train_seconds', 0) for one in origins))} of training",
        ),
        ("Command", results.command("NAME...")),
        ("Steps timed in turn", _clocks(results)),
        ("Seeds", ", ".join(map(str, results.seeds)) or report.MISSING),
        ("Machine", each(lambda one: one.get("device") and f"{one.get('machine', '')} ({one['device']})")),
        ("Text", each(text)),
        ("Versions", each(lambda one: ", ".join(f"{k} {v}" for k, v in (one.get("versions") or {}).items()))),
        ("Commit", each(lambda one: one.get("commit", ""))),
    ]


def _clocks(results: Results) -> str:
    where = {
        place: [name for name, own in results.clocks.items() if own == place]
        for place in results.clocks.values()
    }
    told = "; ".join(f"{', '.join(names)}: {place}" for place, names in where.items())
    return told or "none: times are those of the runs themselves, with others beside them"


def _tables(claim: Claim, results: Results, found: Verdict) -> list[tuple[list[str], list[list[str]]]]:
    """(heads, rows) of a claim's parts and of its runs."""
    arms = [_arm(claim, arm, runs) for arm, runs in results.tables[claim.name].items()]
    return [(PART_HEADS, [part(finding) for finding in found.findings]), (ARM_HEADS, arms)]


def _score(judged: dict[str, Verdict]) -> list[list[str]]:
    rows = []
    for name, found in judged.items():
        for place, one in enumerate(map(part, found.findings)):
            says, paper, here, seeds, outcome = one
            claim = [name, CLAIMS[name].source, found.outcome] if place == 0 else ["", "", ""]
            rows.append([*claim, says, paper, here, seeds, outcome])
    return rows


SCORE_HEADS = ["claim", "source", "verdict", *PART_HEADS[:4], "of the part"]


def judged(results: Results) -> dict[str, Verdict]:
    """The verdicts of the scale's claims by name."""
    return {claim.name: judge(claim, results) for claim in claims.tried(results.scale)}


def markdown(results: Results, judged: dict[str, Verdict]) -> str:
    """The scorecard as Markdown."""
    lines = [f"# The papers' claims at scale `{results.scale}`", ""]
    lines += [f"- {name}: {value}" for name, value in summary(results, judged)]
    lines += ["", verdicts.RULE, "", *markdown_rows(SCORE_HEADS, _score(judged))]
    for name, found in judged.items():
        claim = CLAIMS[name]
        if found.outcome == verdicts.NOT_RUN and not any(results.tables[name].values()):
            continue
        lines += ["", f"## {name}: {found.outcome}", "", f"{claim.source}: {claim.says}", ""]
        lines += [f"At small scale: {claim.expected}", "", f"    {results.command(name)}"]
        for heads, rows in _tables(claim, results, found):
            lines += ["", *markdown_rows(heads, rows)]
    lines += [
        "",
        "## Not run",
        "",
        *markdown_rows(["claim", "source", "says", "why"], _not_run(results.scale)),
    ]
    return "\n".join(lines) + "\n"


def _not_run(scale: str) -> list[list[str]]:
    return [
        [one.name, one.source, one.says, why]
        for one in CLAIMS.values()
        if (why := claims.why_not(one, scale))
    ]


def markdown_rows(heads: Sequence[str], found: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table in Markdown."""
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *found)]


def _page(results: Results, judged: dict[str, Verdict], pictures: dict[str, list[Path]]) -> str:
    sections = [
        f"<h1>The papers' claims at scale {results.scale}</h1>",
        report.table(summary(results, judged)),
        f'<p class="note">{html.escape(verdicts.RULE)}</p>',
        report.grid(SCORE_HEADS, _score(judged), style="score"),
    ]
    for name, found in judged.items():
        claim = CLAIMS[name]
        sections += [
            f"<h2>{name}: {found.outcome}</h2>",
            f"<p>{html.escape(f'{claim.source}: {claim.says}')}</p>",
            f'<p class="note">{html.escape(f"At small scale: {claim.expected}")}</p>',
            f"<p><code>{html.escape(results.command(name))}</code></p>",
            *(
                report.grid(heads, rows, style="score" if heads is PART_HEADS else "numbers")
                for heads, rows in _tables(claim, results, found)
            ),
            *(
                report.picture(path, f"{name}: held-out loss, mean and range over seeds.")
                for path in pictures.get(name, [])
            ),
        ]
    sections += [
        "<h2>Not run</h2>",
        report.grid(["claim", "source", "says", "why"], _not_run(results.scale), style="score"),
    ]
    return report.document(f"Claims at scale {results.scale}", sections)


@plots.own_style
def _pictures(results: Results, directory: Path) -> dict[str, list[Path]]:
    """For each claim with runs: held-out loss against steps and against time."""
    saved: dict[str, list[Path]] = {}
    for name, table in results.tables.items():
        done = {arm: [run for run in runs.values() if run is not None] for arm, runs in table.items()}
        named = {
            arm: (runs, COLOURS[place % len(COLOURS)])
            for place, (arm, runs) in enumerate(done.items())
            if runs
        }
        timed = sweep_plots.timed(run for runs, _ in named.values() for run in runs)
        for against in ("steps", *(["time"] if timed else [])) if named else ():
            saved.setdefault(name, []).append(directory / f"{name}_{against}.png")
            sweep_plots.curves(named, against, None).savefig(saved[name][-1], dpi=plots.DPI)
    return saved
