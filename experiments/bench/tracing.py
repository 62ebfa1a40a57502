"""Measures tracing: ``python -m experiments.bench trace --source=RUN [--OPTION=VALUE ...]``

Writes a routing trace of the first --batches of a text (`experiments.analyze routing`), and evaluates the run on the same batches
(`experiments.evaluate`), in turn. Both read the text and the checkpoint anew each time; what they compile is compiled before.
Writes trace.json into --out and prints medians, and the median of the ratios within rounds.

Exit codes: 0 done; 2 bad input; 4 a file that can't be written or read.
"""

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

from experiments import exits, process
from experiments.bench import tools

EVALUATION, TRACING = "evaluation", "tracing"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = tools.Parser(
        "experiments.bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("trace",))
    parser.add_argument("--source", required=True, help="a run's directory")
    parser.add_argument("--text", default="", help="as data.source (the run's own, what is held out)")
    parser.add_argument("--batches", type=tools.at_least(1), default=24)
    parser.add_argument("--repeats", type=tools.at_least(3), default=7, help="rounds (7)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = parse(argv)
    return exits.guarded("experiments.bench", lambda: _measure(options, argv))


def _measure(options: argparse.Namespace, argv: list[str]) -> int:
    process.check_devices()
    from switchmoe.analysis import timing

    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        cases, facts = _cases(options, Path(directory))
        seconds = timing.measure(cases, options.repeats, warm_up=1)
    rows = [
        {"case": name} | timing.summary(times, seconds[EVALUATION]) | {"seconds": times.tolist()}
        for name, times in seconds.items()
    ]
    found = tools.origin(argv) | {"machine": tools.machine()} | facts | {"rows": rows}
    path = options.out / "trace.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        spread = f"({row['quartile_1_ms']:.0f} - {row['quartile_3_ms']:.0f})"
        print(f"{row['case']:11s} {row['median_ms']:9.0f} ms  {spread}  {row['ratio']:5.2f} x evaluation")
    print(path)
    return 0


def _cases(options: argparse.Namespace, directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both as calls, and what they read; each trace is in a directory of its own below ``directory``."""
    import jax

    from switchmoe.analysis.routing import tracing
    from switchmoe.analysis.timing import Case
    from switchmoe.data import batches, origins
    from switchmoe.parallel import sharding
    from switchmoe.runs import judges, trained
    from switchmoe.training import objective

    source = trained.find(options.source)
    if source.vocabulary is None:
        raise ValueError(f"--source={options.source}: it has no vocabulary; accepted is a run's directory")
    settings = trained.changed(source.settings, {"data.source": options.text} if options.text else {})
    split, mesh = ("all" if options.text else "validation"), sharding.make_mesh(settings.mesh)

    needed = _documents(options.batches, settings, source.vocabulary, split)

    def read() -> list[batches.Batch]:
        documents = [
            document for document, _ in itertools.islice(origins.labelled(settings.data, split), needed)
        ]
        return batches.eval_batches(settings.data, source.vocabulary, documents, options.batches, padded=True)

    def evaluated(like: judges.HeldOut | None = None) -> judges.HeldOut:
        with jax.set_mesh(mesh), sharding.rules(settings):
            judge = judges.HeldOut("text", read(), objective.CROSS_ENTROPY, settings, mesh, like)
            params = trained.parameters(source, settings, mesh)
            judge.compile(params)
            judge.figures(params)
        return judge

    arrays = [batch[name] for batch in read() for name in tracing.ARRAY.values() if name in batch]
    tokens = sum(int((array != 0).sum()) for array in arrays)
    compiled, text, number = evaluated(), tracing.Text(split, tokens=tokens), itertools.count()
    cases = {
        EVALUATION: Case(lambda: evaluated(compiled)),
        TRACING: Case(lambda: tracing.write(source, settings, text, directory / str(next(number)))),
    }
    return cases, {"tokens": tokens}


def _documents(count: int, settings: Any, vocabulary: Any, split: str) -> int:
    """Documents that so many batches are made of: a trace reads no more, so an evaluation shall not."""
    from switchmoe.data import batches, objectives, origins

    wanted, number = count * settings.data.batch_size * objectives.lengths(settings.data).raw, 0
    for document, _ in origins.labelled(settings.data, split):
        if wanted <= 0:
            break
        wanted -= len(batches.tokens_of(document, settings.data, vocabulary))
        number += 1
    return number
