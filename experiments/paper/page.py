"""The page that a reader opens: a line a claim, the best pictures, what is not decided and what that would cost."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from experiments import claims
from experiments.claims import SCALES, Claim
from experiments.paper import ahead, power, scorecard, times
from switchmoe.analysis import plots, report, scaling, sweep_plots, sweep_report, sweeps, verdicts
from switchmoe.analysis.verdicts import Finding, Verdict

# Claims whose runs differ in the number of experts; of the last one times are measured in turn.
SWEPT = ("figure1", "routed_law", "dropless", "figure5")
KEPT = "runs.jsonl"  # of a scale, in paper_SCALE
PAGE, NOTES = "scorecard.md", "notes.md"
HEADS = [
    "claim",
    "source",
    "verdict",
    "parts",
    "the part that decides it",
    "the paper",
    "here",
    "seeds x M tokens",
]
ORDER = (
    verdicts.NOT_HELD,
    verdicts.NOT_RUN,
    verdicts.UNDECIDED,
    verdicts.HELD,
)  # of the parts: which is shown


def write(results: Path) -> Path:
    """Writes the page and its pictures from the kept runs of each scale, and the notes beside them, into a directory.

    Raises:
      ValueError: no scale's runs are there, or they can't be read.
    """
    found = [scale for scale in SCALES if (results / f"paper_{scale}" / KEPT).exists()]
    if not found:
        raise ValueError(f"--results={results}: no paper_SCALE/{KEPT}; accepted is a directory with one")
    lines = ["# The papers' claims", ""]
    notes = results / NOTES
    lines += [notes.read_text(encoding="utf-8").strip(), ""] if notes.exists() else []
    lines += ["## The rule", "", verdicts.RULE, ""]
    decided: set[str] = set()
    for scale in found:
        directory = results / f"paper_{scale}"
        read = scorecard.read(directory, scale, directory / KEPT)
        # The runs were made elsewhere.
        own = f" --workdir={shlex.quote(str(directory))}"
        read = read._replace(arguments=read.arguments.replace(own, ""))
        judged = scorecard.judged(read)
        report.write_whole(directory / "scorecard.md", scorecard.markdown(read, judged))
        lines += _scale(directory, read, judged)
        decided |= {name for name, one in judged.items() if one.outcome in (verdicts.HELD, verdicts.NOT_HELD)}
    lines += ahead.section(found, decided)
    lines += ["## Not run at any scale", ""]
    waiting = [
        [
            claim.name,
            claim.source,
            claim.says,
            claim.not_run or f"tried at the scales {', '.join(scales)}, which have no runs here",
        ]
        for claim in claims.CLAIMS.values()
        if not set(scales := [one for one in SCALES if not claims.why_not(claim, one)]) & set(found)
    ]
    lines += scorecard.markdown_rows(["claim", "source", "says", "why"], waiting)
    path = results / PAGE
    report.write_whole(path, "\n".join(lines).rstrip() + "\n")
    return path


def _scale(directory: Path, results: scorecard.Results, judged: dict[str, Verdict]) -> list[str]:
    scale, summary = results.scale, scorecard.summary(results, judged)
    lines = [
        f"## Scale `{scale}`",
        "",
        *(f"- {name}: {value}" for name, value in summary),
        "",
    ]
    lines += scorecard.markdown_rows(
        HEADS, [_row(claims.CLAIMS[name], found, results) for name, found in judged.items()]
    )
    lines += [
        "",
        f"Every part and arm: [paper_{scale}/scorecard.md](paper_{scale}/scorecard.md).",
        "",
    ]
    lines += _pictures(directory, results)
    return lines + _costs(directory, results, judged)


def _row(claim: Claim, found: Verdict, results: scorecard.Results) -> list[str]:
    counts = [
        f"{number} {outcome}"
        for outcome in (verdicts.HELD, verdicts.NOT_HELD, verdicts.UNDECIDED, verdicts.NOT_RUN)
        if (number := sum(finding.outcome == outcome for finding in found.findings))
    ]
    shown = _deciding(found.findings)
    start = [claim.name, claim.source, found.outcome, ", ".join(counts)]
    if shown is None:
        return [*start, "", "", "", ""]
    says, paper, here, seeds, _ = scorecard.part(shown)
    arm = results.tables[claim.name][shown.check.arms[0]]
    done = [run for run in arm.values() if run]
    return [*start, says, paper, here, f"{seeds} x {power.millions(done[0]):.1f}" if done else seeds]


def _deciding(findings: Sequence[Finding]) -> Finding | None:
    """The first part of the worst outcome."""
    return next((one for outcome in ORDER for one in findings if one.outcome == outcome), None)


@plots.own_style
def _pictures(directory: Path, results: scorecard.Results) -> list[str]:
    """Lines with the pictures of the sweep over experts: loss, speed-up, and its law beside the published one."""
    found = sweeps.group(runs) if (runs := _swept(results)) else []
    groups = [one for one in found if one.dense and len(one.cells) >= 3]
    if not groups:
        return []
    fits, _ = sweep_report.fit_families(groups)
    made = {
        "loss_experts.png": (
            sweep_plots.loss_experts(groups, [None] * len(groups)),
            "held-out loss against experts",
        )
    }
    if any(map(sweeps.speed_ups, groups)):
        title = "speed-up to the dense model's loss against experts"
        made["speedups.png"] = (sweep_plots.speed_ups(groups), title)
    title = "loss over the dense model's against experts, beside the published law and models"
    made["published.png"] = (sweep_plots.published(groups, sweep_report.drawn(groups, fits)), title)
    lines = []
    for name, (figure, title) in made.items():
        figure.savefig(directory / name, dpi=plots.DPI)
        lines += [f"![{title}, mean and range over seeds]({directory.name}/{name})", ""]
    for one in groups:
        lines += [_sentences(one, fits.get(one.family)), ""]
    return lines


def _swept(results: scorecard.Results) -> list[sweeps.Run]:
    """Each run once, as it was timed in turn; where any was, the others have no times."""
    by_name: dict[str, sweeps.Run] = {}
    for claim in SWEPT:
        for arm in results.tables.get(claim, {}).values():
            for run in filter(None, arm.values()):
                if run.name not in by_name or times.in_turn(run):
                    by_name[run.name] = run
    if any(map(times.in_turn, by_name.values())):
        return [run if times.in_turn(run) else times.without(run) for run in by_name.values()]
    return [*by_name.values()]


def _sentences(one: sweeps.Group, fit: scaling.Fit | None) -> str:
    """How many tokens an expert sees, and the law that was fitted."""
    most = max(one.cells)
    run = one.cells[most][0]
    seen = power.millions(run) * run.settings.moe.total_choices
    told = f"{one.label}: of" if one.label else "Of"
    told += f" {power.millions(run):.1f} M tokens an expert of {most} sees {seen / most:.2f} M on average, one of 2 {seen / 2:.1f} M."
    if fit is None:
        return told
    theirs = scaling.PUBLISHED["S-BASE"].values(one.size)
    values = ", ".join(
        f"{name} {sweep_report.value(fit, name)}, S-BASE {theirs[name]:.3g}" for name in fit.values
    )
    notes = f" ({'; '.join(fit.notes)})" if fit.notes else ""
    return f"{told} The routed scaling law fitted to its {fit.runs} runs, beside the published one at this size: {values}{notes}."


def _costs(directory: Path, results: scorecard.Results, judged: Sequence[tuple[Claim, Verdict]]) -> list[str]:
    """What deciding the undecided parts costs, by the pilots' spread."""
    try:
        text, rows = power.table(directory, results.scale, directory / KEPT)
    except ValueError:
        return []
    report.write_whole(directory / "power.md", text)
    open_parts = {
        (name, finding.check.says)
        for name, verdict in judged.items()
        for finding in verdict.findings
        if finding.outcome in (verdicts.UNDECIDED, verdicts.NOT_RUN)
    }
    chosen = [row for row in rows if (row[0], row[1]) in open_parts]
    if not chosen:
        return []
    heading = "What deciding the rest costs, by the spread of the pilots ([power.md](paper_{}/power.md)):"
    return [heading.format(results.scale), "", *scorecard.markdown_rows(power.CLAIM_HEADS, chosen), ""]
