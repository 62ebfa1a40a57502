"""Learns to foretell the next layer's experts from a routing trace: ``python -m experiments.offload predict --trace=TRACE [--OPTION=VALUE ...]``

TRACE is a trace's directory (docs/routing_traces.md), or .npz / .npy of expert indices that a server gave. From most of its
documents EdgeMoE's table is learnt: how often each expert came, given the choices of the sparse layers before. On the
others it is tried: of each layer the recall and the useful share of 1, 2 and 3 times as many guesses as a token has choices, beside those
of the layer's shares alone and of chance. Writes

  FILE           the table, which generate and serve take as --predictor=FILE
  FILE's .json   the figures

  --held_out=SHARE   of the documents, evenly spread (0.2); sequences where documents are not known
  --order=N          how many sparse layers before are looked at, 0 to 3 (2, as in EdgeMoE)
  --tokens=N         of the trace, whole sequences (0: all)
  --out=FILE         a name that is free (offload/experts.npz in the trace's directory)

Exit codes: 0 done; 2 bad input; 4 a file that can't be written or read.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.analyze.routing import Bar
from experiments.command_line import aligned
from experiments.offload import reading

DEFAULTS = {"trace": "", "held_out": "0.2", "order": "2", "tokens": "0", "out": ""}


def parse(arguments: Sequence[str]) -> dict[str, Any]:
    """The options. Raises ValueError, one line that names the argument, its value and what would be accepted."""
    found: dict[str, Any] = reading.values(arguments, DEFAULTS, {"trace": reading.PLACE})
    for name in ("order", "tokens"):
        found[name] = reading.whole(name, found[name], 0)
    if found["order"] > 3:
        raise ValueError(f"--order={found['order']}: accepted is an integer from 0 to 3")
    try:
        share = float(found["held_out"])
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise ValueError(f"--held_out={found['held_out']}: accepted is a number above 0 and below 1")
    place = Path(found["trace"])
    out = Path(found["out"]) if found["out"] else reading.beside(place) / "experts.npz"
    for path in (out, out.with_suffix(".json")):
        if out.suffix != ".npz" or path.exists():
            raise ValueError(
                f"--out={out}: accepted is a name that ends in .npz, and is free with .json in its place"
            )
    return found | {"trace": place, "held_out": share, "out": out}


def run(options: dict[str, Any]) -> int:
    # Counting needs no accelerator, and one in use by a run would be waited for.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from switchmoe.analysis import report
    from switchmoe.analysis.routing import caching, foretelling
    from switchmoe.inference.offload.predict import Table

    out, bar = options["out"], Bar("predicting")
    tokens = caching.read(reading.trace(options["trace"], out.parent), options["tokens"])
    learnt, held_out = foretelling.split(tokens, options["held_out"])
    table = Table.learn(learnt.expert_TLK, tokens.num_experts, options["order"])
    found = foretelling.measure(table, held_out, bar.says)
    bar.end()
    out.parent.mkdir(parents=True, exist_ok=True)
    about = {"trace": str(options["trace"]), "order": options["order"], "held_out": options["held_out"]}
    about |= {"tokens_learnt": len(learnt.sequence_T), "tokens_held_out": len(held_out.sequence_T)}
    about |= {"rows": [right._asdict() for right in found]}
    report.write_whole(out.with_suffix(".json"), json.dumps(about, indent=1) + "\n")
    table.save(out)
    lines = [["layer", "guesses", "recall", "useful", "recall of shares", "useful of shares", "chance"]]
    for right in found:
        numbers = right.recall, right.useful, right.recall_of_shares, right.useful_of_shares, right.chance
        lines.append([right.layer, f"{right.times} K", *(f"{number:.3f}" for number in numbers)])
    print(aligned(lines))
    print(f"{out}: {out.stat().st_size:,} bytes")
    return 0
