"""`report.html` of a run: one file with its figures, pictures, examples and settings, no links, no scripts."""

import base64
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from switchmoe.analysis import answers, distilled, parts, plots
from switchmoe.runs.reporting import METRICS_FILE, Record, duration, read_metrics
from switchmoe.runs.rundir import REPORT_FILE

MISSING = "not recorded"
MDASH = "\N{EM DASH}"
STARVED = 0.1  # an expert with less than this multiple of its fair share
SENTINEL = re.compile(r"<extra_id_(\d+)>")

CAPTIONS = {
    "loss": "Cross-entropy over the training steps. The unigram baseline knows the tokens' frequencies in the "
    "training targets and nothing else.",
    "expert_load": "Load per expert and sparse layer over the training steps, as multiples of the fair share 1/E. "
    "A panel's numbers are its least and its greatest load, on average over the last tenth of the run.",
    "routing": "Tokens dropped because their expert was full, and the entropy of the router's distribution over "
    "the experts: ln E where it has no preference, 0 where it is certain.",
    "parts": "Load per expert and part of the mixture at the last evaluation, in the last sparse layer of each stack.",
    "scores": "The tasks' metrics on held-out examples over the training steps.",
    "load_change": "Load per expert on the tasks' held-out inputs, before the first step and after the last one.",
    "confusion": "How often a class is taken for another: held-out examples, the option of the highest likelihood.",
    "speed": "Tokens per second and the share of the time in which the device waited for input.",
}

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 820px;
       margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
dl.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); gap: .6rem; }
dl.figures div { background: #f5f6f8; border-radius: 6px; padding: .5rem .8rem; }
dt { color: #555; font-size: .8rem; } dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
figure { margin: 1.5rem 0; } figure img { width: 100%; max-width: 800px; }
figcaption, p.note { color: #555; font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .2rem .6rem; border-bottom: 1px solid #e5e5e5; }
td { overflow-wrap: anywhere; white-space: pre-wrap; }
table.numbers td { white-space: nowrap; } table.numbers th { line-height: 1.2; }
table.numbers td, table.numbers th { text-align: right; padding: .2rem .4rem; font-size: .85rem; font-variant-numeric: tabular-nums; }
table.numbers td:first-child, table.numbers th:first-child { text-align: left; }
table.numbers thead tr:first-child th { text-align: center; }
blockquote { margin: .8rem 0; padding: .6rem 1rem; background: #f5f6f8; border-left: 3px solid #0072b2;
             white-space: pre-wrap; overflow-wrap: anywhere; }
mark { background: #fde3b0; border-radius: 3px; padding: 0 .15rem; font-size: .85em; white-space: nowrap; }
td.hit { background: #e3f1fb; }
details { margin: .5rem 0 1.5rem; font-size: .9rem; }
.groups { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 1rem; }
"""


def write_report(workdir: str | os.PathLike) -> Path:
    """Writes `plots/*.png` and `report.html` (at once, or not at all) from what a run left behind.

    What `run.json` and `config.json` do not tell, or where they are missing, is "not recorded".

    Returns:
      the path of `report.html`.

    Raises:
      FileNotFoundError: the directory has no `metrics.jsonl`.
      ValueError: a file of the run cannot be read; names it.
    """
    directory = Path(workdir)
    records = read_metrics(directory / METRICS_FILE)
    run, config = _read_json(directory / "run.json"), _read_json(directory / "config.json")
    pictures = plots.save_all(records, run, directory / "plots")
    if parts.names(records) and plots.layer_names(records):
        pictures.append(parts.save_loads(records, directory / "plots" / "parts.png"))
    pictures += answers.save_all(records, directory, directory / "plots")
    path = directory / REPORT_FILE
    write_whole(path, page(directory.resolve().name, records, run, config, pictures))
    return path


def write_whole(path: Path, text: str) -> None:
    """Writes a file at once, or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def page(
    name: str,
    records: Sequence[Record],
    run: dict[str, Any],
    config: dict[str, Any],
    pictures: Sequence[Path],
) -> str:
    """The report as HTML; `pictures` are PNG files, put into it."""
    sections = [
        f"<h1>{escape(name)}</h1>",
        tiles(headline(records, run, config)),
        "<h2>Training</h2>",
        *(picture(path, _caption(path.stem)) for path in pictures),
        "<h2>Routing by layer</h2>",
        _layers(records),
        *(
            ["<h2>Parts of the mixture</h2>", grid(parts.HEADS, rows)]
            if (rows := parts.rows(records))
            else []
        ),
        *(["<h2>Tasks</h2>", grid(answers.HEADS, rows)] if (rows := answers.rows(records)) else []),
        *(["<h2>Distillation</h2>", table(rows)] if (rows := distilled.rows(run)) else []),
        "<h2>Held-out examples</h2>",
        _examples(run.get("examples")),
        "<h2>Settings</h2>",
        _groups(config),
        "<h2>Versions</h2>",
        table(run["versions"].items()) if run.get("versions") else f"<p>{MISSING}</p>",
    ]
    return document(name, sections)


def _caption(name: str) -> str:
    return CAPTIONS["confusion" if name.startswith("confusion_") else name]


def document(title: str, sections: Iterable[str]) -> str:
    """A whole HTML page of sections that are HTML, in the reports' style."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def _early(run: dict[str, Any]) -> str:
    ended = run.get("stopped_early")
    return f", no better than at {ended['best_step']:,}" if ended else ""


def headline(records: Sequence[Record], run: dict[str, Any], config: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values (with units) of the figures that sum a run up; medians are over training records (`plots.median_of`)."""
    validation = next((record for record in reversed(records) if record["split"] == "validation"), {})
    steps = max((record["step"] for record in records), default=0)
    asked = config.get("train", {}).get("num_steps")
    cross_entropy, unigram = validation.get("cross_entropy"), run.get("unigram_cross_entropy")
    difference = None if None in (cross_entropy, unigram) else unigram - cross_entropy
    groups = [f"{stack} {tokens:,}" for stack, tokens in (run.get("group_tokens") or {}).items()]
    return [
        ("Validation cross-entropy", _show(cross_entropy, lambda x: f"{x:.3f} nats / token")),
        ("Validation perplexity", _show(validation.get("perplexity"), lambda x: f"{x:,.1f}")),
        ("Unigram baseline", _show(unigram, lambda x: f"{x:.3f} nats / token")),
        (
            "Against the baseline",
            _show(difference, lambda x: f"{abs(x):.3f} nats {'below' if x >= 0 else 'above'}"),
        ),
        ("Unknown pieces, held out", _show(run.get("unknown_pieces"), lambda x: f"{x:.2%}")),
        ("Parameters", _show(run.get("parameters"), count)),
        ("Parameters a token uses", _show(run.get("parameters_active"), count)),
        *_beginning(run),
        ("Steps", f"{steps:,}" + (f" of {asked:,}" if asked else "") + _early(run)),
        ("Median speed", _speed(records)),
        ("Median step time", _show(_median(records, "step_seconds"), _seconds)),
        (
            "Matrix-product peak, measured",
            _show(run.get("matmul_peak_flops"), lambda x: f"{x / 1e9:,.0f} GFLOP/s"),
        ),
        ("Share of that peak, median", _show(_median(records, "peak_share"), lambda x: f"{x:.1%}")),
        ("Waiting for input", _show(_input_wait(records, run), lambda x: f"{x:.2%} of the time")),
        ("Training time", _show(run.get("train_seconds"), duration)),
        ("Compile time", _show(run.get("compile_seconds"), _seconds)),
        ("Tokens per routing group", ", ".join(groups) if groups else MISSING),
        ("Platform", ", ".join(str(run[key]) for key in ("platform", "device") if key in run) or MISSING),
    ]


def _beginning(run: dict[str, Any]) -> list[tuple[str, str]]:
    """Where a run began and what it trains, if that is not random parameters and all of them."""
    found, init = [], run.get("init")
    if init and "checkpoint" in init:
        found.append(("Parameters from", f"{init['checkpoint']}, step {init['step']:,}"))
    if run.get("parameters_trained", run.get("parameters")) != run.get("parameters"):
        found.append(("Parameters trained", count(run["parameters_trained"])))
    return found


def _speed(records: Sequence[Record]) -> str:
    padded = _median(records, "padded_tokens_per_second")  # not there in a run of an earlier version
    speed = _show(_median(records, "tokens_per_second"), lambda x: f"{x:,.0f} tokens/s")
    return speed if padded is None else f"{speed} ({padded:,.0f} with padding)"


def fill_ins(text: str) -> dict[int, str]:
    """The text after each sentinel `<extra_id_k>` by k; the first one counts where k repeats.

    Spaces stay: a span that starts without one goes on with the word before its sentinel.
    """
    _, *parts = SENTINEL.split(text)
    found: dict[int, str] = {}
    for number, words in zip(parts[::2], parts[1::2], strict=True):
        found.setdefault(int(number), words)
    return found


def layer_rows(records: Sequence[Record], split: str) -> list[list[str]]:
    """Per layer: dropped, least and greatest load / fair share, experts starved, entropy (and / ln E).

    Means over the last tenth of the records of a training split, the last record of another. [] where
    no such record has sparse layers.
    """
    chosen = [record for record in records if record["split"] == split and record.get("layers")]
    if split != "train":
        chosen = chosen[-1:]
    if not chosen:
        return []
    dropped_L, load_LE, entropy_L = (
        plots.last_tenth(plots.layer_series(chosen, split, key)[1])
        for key in ("layer_fraction_dropped", "layer_expert_load", "layer_router_entropy")
    )
    num_experts = load_LE.shape[-1]
    return [
        [
            f"{dropped:.2%}",
            f"{load_E.min():.2f}",
            f"{load_E.max():.2f}",
            f"{(load_E < STARVED).sum()}",
            f"{entropy:.2f} ({entropy / (math.log(num_experts) or 1):.0%})",
        ]
        for dropped, load_E, entropy in zip(dropped_L, load_LE * num_experts, entropy_L, strict=True)
    ]


def _layers(records: Sequence[Record]) -> str:
    names = plots.layer_names(records)
    if not names:
        return "<p>This run has no sparse layers on record: a dense model has no router to report on.</p>"
    splits = {split: rows for split in ("train", "validation") if (rows := layer_rows(records, split))}
    heads = ["dropped", "min load", "max load", "starved", "entropy"]
    groups = "".join(f'<th colspan="{len(heads)}">{split}</th>' for split in splits)
    head = f"<tr><th></th>{groups}</tr><tr>{cells(['layer'] + heads * len(splits), 'th')}</tr>"
    rows = [
        f"<tr>{cells([name, *(cell for table in splits.values() for cell in table[index])])}</tr>"
        for index, name in enumerate(names)
    ]
    return (
        '<p class="note">At the end of the run: the mean over the last tenth of the training records, and the last '
        "validation. Loads are multiples of the fair share 1/E; a starved expert gets less than a tenth of it. Entropy is in nats, and as a share of ln E.</p>"
        f'<div class="wide"><table class="numbers"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _examples(examples: Sequence[dict[str, str]] | None) -> str:
    if not examples:
        return f"<p>{MISSING}</p>"
    pairs = [(fill_ins(example["target"]), fill_ins(example["prediction"])) for example in examples]
    if not any(target for target, _ in pairs):
        return (
            "<p>The beginnings of held-out texts, how they go on, and how the model goes on, one token after the other, "
            "each time the likeliest.</p>" + "".join(map(_continuation, itertools.count(1), examples))
        )
    spans = sum(len(target) for target, _ in pairs)
    hits = sum(_is_hit(target, prediction, k) for target, prediction in pairs for k in target)
    intro = (
        "<p>Spans of held-out text are replaced by sentinels; the model fills them in, one token after the other, "
        f"each time the likeliest. It has {hits} of these {spans} spans exactly right.</p>"
    )
    return intro + "".join(
        _example(number, example, *pair)
        for number, (example, pair) in enumerate(zip(examples, pairs, strict=True), start=1)
    )


def _continuation(number: int, example: dict[str, str]) -> str:
    rows = "".join(
        f"<tr><td>{name}</td><td>{_marked(example[key])}</td></tr>"
        for name, key in (("text", "target"), ("model", "prediction"))
    )
    return (
        f"<h3>Example {number}</h3><blockquote>{_marked(example['input'])}</blockquote>"
        f'<div class="wide"><table><tbody>{rows}</tbody></table></div>'
    )


def _example(number: int, example: dict[str, str], target: dict[int, str], prediction: dict[int, str]) -> str:
    rows = []
    for k in [*target, *(k for k in prediction if k not in target)]:
        hit = _is_hit(target, prediction, k)
        rows.append(
            f"<tr><td>{_marked(f'<extra_id_{k}>')}</td><td>{escape(target.get(k, MDASH))}</td>"
            f"<td{' class=hit' if hit else ''}>{escape(prediction.get(k, MDASH))}{' &#10003;' if hit else ''}</td></tr>"
        )
    return (
        f"<h3>Example {number}</h3><blockquote>{_marked(example['input'])}</blockquote>"
        f'<div class="wide"><table><thead><tr>{cells(["sentinel", "target", "model"], "th")}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        f"<details><summary>As written</summary><p>Target: {_marked(example['target'])}</p>"
        f"<p>Model: {_marked(example['prediction'])}</p></details>"
    )


def _is_hit(target: dict[int, str], prediction: dict[int, str], k: int) -> bool:
    return k in target and target[k] == prediction.get(k)


def _marked(text: str) -> str:
    return re.sub(r"&lt;extra_id_\d+&gt;", r"<mark>\g<0></mark>", escape(text))


def picture(path: Path, caption: str) -> str:
    """A PNG file with its caption, the file's bytes in the page."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    caption = escape(caption)
    return f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'


def tiles(entries: Iterable[tuple[str, str]]) -> str:
    """Names and values, side by side."""
    boxes = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in entries)
    return f'<dl class="figures">{boxes}</dl>'


def _groups(config: dict[str, Any]) -> str:
    if not config:
        return f"<p>{MISSING}</p>"
    tables = "".join(
        f"<div><h3>{escape(group)}</h3>{table((k, json.dumps(v, ensure_ascii=False)) for k, v in fields.items())}</div>"
        for group, fields in config.items()
    )
    return f'<div class="groups">{tables}</div>'


def table(rows: Iterable[tuple[Any, Any]]) -> str:
    """Rows of names and values, escaped."""
    return f"<table><tbody>{''.join(f'<tr>{cells(row)}</tr>' for row in rows)}</tbody></table>"


def grid(heads: Sequence[str], rows: Iterable[Sequence[Any]], style: str = "numbers") -> str:
    """A table with a row of headings, escaped."""
    body = "".join(f"<tr>{cells(row)}</tr>" for row in rows)
    head = f"<tr>{cells(heads, 'th')}</tr>"
    return f'<div class="wide"><table class="{style}"><tbody>{head}{body}</tbody></table></div>'


def cells(values: Iterable[Any], tag: str = "td") -> str:
    """The cells of a table's row, escaped."""
    return "".join(f"<{tag}>{escape(str(value))}</{tag}>" for value in values)


def _show(value: Any, write: Callable[[Any], str]) -> str:
    return MISSING if value is None else write(value)


def count(number: int) -> str:
    """`21.35 M` for 21,345,678."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:,}"


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _median(records: Sequence[Record], key: str) -> float | None:
    _, values = plots.series(records, "train", key)
    return plots.median_of(values)


def _input_wait(records: Sequence[Record], run: dict[str, Any]) -> float | None:
    """Share of the whole run's step time, from its sums where they are there, else the records' median."""
    if "input_wait_share" in run:
        return run["input_wait_share"]
    if run.get("train_seconds") and "input_wait_seconds" in run:
        return run["input_wait_seconds"] / run["train_seconds"]
    return _median(records, "input_wait_share")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not a JSON object")
    return found
