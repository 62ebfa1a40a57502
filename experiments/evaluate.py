"""Measures a trained model on a text: ``python -m experiments.evaluate --source=RUN [--config.data.source=TEXT] [--OPTION=VALUE ...]``

RUN is a run's directory (its newest step), DIR|STEP or DIR/checkpoints/STEP. The text is cut and asked as in the run's
own evaluation, with its vocabulary: cross-entropy, perplexity, accuracy, bits per byte of the target text as the model
sees it, and of each sparse layer drops, load and entropy.

  --split=all|validation   the documents: all of them, or those held out of training (the default for the run's own text)
  --batches=N              at most so many batches; 0 (the default): the whole text
  --average=N              the model whose parameters are the mean of those of the N newest checkpoints
  --out=FILE               writes the figures as JSON
  --config.GROUP.FIELD=V   what a reader may choose: where the text is and how it is cut, batch size, capacity at
                           evaluation, back end, type of the activations, mesh

Exit codes: 0 done; 2 bad input; 4 a file that can't be written or read.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import command_line, exits, process

OPTIONS = ("source", "split", "batches", "average", "out")


class Arguments(NamedTuple):
    source: str
    split: str
    batches: int
    average: int
    out: Path | None
    overrides: dict[str, Any]


def main(argv: Sequence[str]) -> int:
    if {"--help", "-h"} & set(argv[1:]):
        print(__doc__.strip())
        return 0
    return exits.guarded("experiments.evaluate", lambda: _evaluate(parse(argv[1:])))


def parse(arguments: Sequence[str]) -> Arguments:
    """Raises ValueError, one line that names the argument, its value and what would be accepted."""
    overrides, found = command_line.values(arguments, dict.fromkeys(OPTIONS, ""))
    if not found["source"]:
        raise ValueError("no model; accepted is --source=RUN")
    if found["split"] not in ("", "all", "validation"):
        raise ValueError(f"--split={found['split']}: accepted is all or validation")
    if not (found["batches"] or "0").isdecimal():
        raise ValueError(f"--batches={found['batches']}: accepted is an integer >= 0")
    average = found["average"] or "1"
    if not average.isdecimal() or int(average) < 1:
        raise ValueError(f"--average={average}: accepted is an integer >= 1")
    out = Path(found["out"]) if found["out"] else None
    if out and out.is_dir():
        raise ValueError(f"--out={out}: a directory; accepted is a file")
    batches = int(found["batches"] or 0)
    return Arguments(found["source"], found["split"], batches, int(average), out, overrides)


def _evaluate(arguments: Arguments) -> int:
    process.check_devices()
    from switchmoe.data import sources
    from switchmoe.runs import trained

    model = trained.find(arguments.source)
    if model.vocabulary is None:
        raise ValueError(f"--source={arguments.source}: it has no vocabulary; accepted is a run's directory")
    settings = trained.changed(model.settings, arguments.overrides)
    own = settings.data.source == model.settings.data.source
    split = arguments.split or ("validation" if own else "all")
    note = lambda text: print(text, file=sys.stderr)  # noqa: E731
    if split == "all":  # whatever is held out
        settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, split_field=""))
        documents = sources.load_whole(settings.data, note)
    else:
        documents = sources.load_splits(settings.data, note)["validation"]
    figures = measure(model, settings, documents, arguments.batches, note, arguments.average)
    figures = {"source": arguments.source, "text": settings.data.source, "split": split} | figures
    for line in told(figures):
        print(line)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(
    model: Any,
    settings: Any,
    documents: Sequence[str],
    count: int,
    note: Callable[[str], None],
    average: int = 1,
) -> dict[str, Any]:
    """The figures of a `trained.Source` on these documents, of which at most so many batches; 0: all.

    Args:
      average: checkpoints of which the parameters are the mean.
    """
    import jax
    import numpy as np

    from switchmoe.data import batches
    from switchmoe.data.progress import told as telling
    from switchmoe.model.transformer import sparse_layer_names
    from switchmoe.parallel import sharding
    from switchmoe.runs import judges, trained
    from switchmoe.training import objective

    with telling(note, "reading the text"):
        held_out = batches.eval_batches(settings.data, model.vocabulary, documents, count, padded=True)
    mesh = sharding.make_mesh(settings.mesh)
    sharding.check(settings, batches.lengths(settings.data), mesh.shape)
    with jax.set_mesh(mesh), sharding.rules(settings):
        params, steps = trained.mean_parameters(model, settings, mesh, average)
        judge = judges.HeldOut("text", held_out, objective.CROSS_ENTROPY, settings, mesh)
        state = lambda: f"{judge.done} of {len(held_out)} batches"  # noqa: E731
        with telling(note, "compiling and measuring", state, at_once=True):
            judge.compile(params)
            found = judge.figures(params)
    found = {name: np.asarray(value).tolist() for name, value in found.items()}
    targets_BL = np.concatenate([batch["targets"] for batch in held_out])
    tokens, size = int((targets_BL != 0).sum()), int(model.vocabulary.bytes_of_ids[targets_BL].sum())
    return {
        "step": int(model.step.name),
        "mean_of_steps": steps,
        "documents": len(documents),
        "sequences": int((targets_BL != 0).any(axis=1).sum()),
        "target_tokens": tokens,
        "target_bytes": size,
        "bits_per_byte": found["cross_entropy"] * tokens / max(size, 1) / math.log(2),
        "perplexity": math.exp(min(found["cross_entropy"], 700.0)),
        "layers": sparse_layer_names(settings),
        **found,
    }


def told(figures: dict[str, Any]) -> list[str]:
    """The figures as lines."""
    steps = ", ".join(map(str, figures["mean_of_steps"]))
    which = f"step {steps}" if len(figures["mean_of_steps"]) == 1 else f"mean of steps {steps}"
    lines = [
        f"{figures['source']} ({which}) on {figures['text']}: {figures['split']} of it, "
        f"{figures['documents']:,} documents, {figures['sequences']:,} sequences, {figures['target_tokens']:,} target tokens",
        f"cross-entropy {figures['cross_entropy']:.4f} nats a target token, perplexity {figures['perplexity']:,.2f}, "
        f"accuracy {figures['accuracy']:.2%}, {figures['bits_per_byte']:.4f} bits a byte of the targets' text",
    ]
    rows = zip(
        figures["layers"],
        figures.get("layer_fraction_dropped", []),
        figures.get("layer_expert_load", []),
        figures.get("layer_router_entropy", []),
        strict=False,
    )
    for layer, dropped, load_E, entropy in rows:
        low, high = (bound(load_E) * len(load_E) for bound in (min, max))
        lines.append(
            f"{layer}: dropped {dropped:.2%}, load {low:.2f} to {high:.2f} of a fair share, entropy {entropy:.3f} nats"
        )
    return lines


if __name__ == "__main__":
    exits.leave("experiments.evaluate", main)
