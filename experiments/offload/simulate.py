"""Simulates a cache of experts along a routing trace: ``python -m experiments.offload simulate --trace=TRACE [--OPTION=VALUE ...]``

TRACE is a trace's directory (docs/routing_traces.md), or .npz / .npy of expert indices that a server gave. Prints the share of
accesses whose expert was there, by budget and policy, with what shuffled tokens give, and writes to --out:

  simulate.csv, simulate.json   a line for each policy, budget and layer
  simulate.png                  a picture

  --policies=NAME,...    lru, lfu, lfru, least_stale, belady (all): docs/offload.md says what they are
  --budgets=SIZE,...     shares of all experts' bytes, or with --record bytes, such as 512MiB (0.05,0.1,0.2,0.3,0.5,0.75)
  --record=BYTES         of an expert (1: budgets in bytes are then numbers of experts)
  --tokens=N             of the trace, whole sequences (10000; 0: all)
  --shuffles=N           of the tokens, for the baseline (3)
  --out=DIR              (offload/ in the trace's directory)

Exit codes: 0 done; 2 bad input; 4 a file that can't be written or read.
"""

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.analyze.routing import Bar
from experiments.command_line import UNITS, aligned, size
from experiments.offload import reading

DEFAULTS = {
    "trace": "", "policies": "", "budgets": "0.05,0.1,0.2,0.3,0.5,0.75", "record": "1", "tokens": "10000", "shuffles": "3", "out": "",
}  # fmt: skip


def parse(arguments: Sequence[str]) -> dict[str, Any]:
    """The options. Raises ValueError, one line that names the argument, its value and what would be accepted."""
    found: dict[str, Any] = reading.values(arguments, DEFAULTS, {"trace": reading.PLACE})
    found["record"] = reading.whole("record", found["record"], 1)
    for name in ("tokens", "shuffles"):
        found[name] = reading.whole(name, found[name], 0)
    found["budgets"] = [_budget(text) for text in found["budgets"].split(",")]
    place = Path(found["trace"])
    out = Path(found["out"]) if found["out"] else reading.beside(place)
    if out.is_file() or (out / "config.json").exists():
        raise ValueError(f"--out={out}: accepted is a directory that is not a run's own")
    return found | {"trace": place, "out": out}


def _budget(text: str) -> tuple[float, bool]:
    """(size, whether it is a share)."""
    try:
        if text[-1:].isalpha():
            return size(text), False
        number = float(text)
        if 0 <= number <= 1:
            return number, True
    except ValueError:
        pass
    raise ValueError(
        f"--budgets={text}: accepted are shares from 0 to 1, or sizes with a unit of {', '.join(UNITS)}"
    )


def run(options: dict[str, Any]) -> int:
    # A simulation needs no accelerator, and one in use by a run would be waited for.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from switchmoe.analysis import plots, report
    from switchmoe.analysis.routing import caching

    policies = options["policies"].split(",") if options["policies"] else list(caching.POLICIES)
    unknown = [name for name in policies if name not in caching.POLICIES]
    if unknown:
        raise ValueError(f"--policies={unknown[0]}: accepted are {', '.join(caching.POLICIES)}")
    out = options["out"]
    bar = Bar("simulating")
    tokens = caching.read(reading.trace(options["trace"], out), options["tokens"])
    whole = len(tokens.layers) * tokens.num_experts * options["record"]
    budgets = [int(size * whole) if share else int(size) for size, share in options["budgets"]]
    budgets = list(dict.fromkeys(budgets))
    points = caching.curves(
        tokens, budgets, list(dict.fromkeys(policies)), options["record"], options["shuffles"], bar.says
    )
    bar.end()
    rows = caching.rows(points, tokens.layers)
    out.mkdir(parents=True, exist_ok=True)
    about = {"trace": str(options["trace"]), "tokens": len(tokens.sequence_T), "experts": tokens.num_experts}
    about |= {"record": options["record"], "shuffles": options["shuffles"]}
    report.write_whole(out / "simulate.json", json.dumps(about | {"rows": rows}, indent=1) + "\n")
    text = io.StringIO()
    writer = csv.DictWriter(text, max(rows, key=len), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    report.write_whole(out / "simulate.csv", text.getvalue())
    caching.picture(points, tokens.layers).savefig(out / "simulate.png", dpi=plots.DPI)
    print(aligned(caching.table(points)))
    print(out / "simulate.png")
    return 0
