"""Updates that were left out because their loss or gradient was not finite."""

import itertools
from pathlib import Path

from switchmoe.runs.reporting import METRICS_FILE, read_metrics


class Skips:
    """The steps whose update was left out; a resumed run finds them in its metrics, where each has a record."""

    def __init__(self, workdir: Path, start: int):
        path = workdir / METRICS_FILE
        records = read_metrics(path) if path.exists() else []
        self._steps = {r["step"] for r in records if r.get("skipped") and r["step"] <= start}

    def add(self, step: int) -> None:
        self._steps.add(step)

    def in_a_row(self, step: int) -> int:
        """How many updates up to this step's, this one included, were left out without a break."""
        return next(n for n in itertools.count() if step - n not in self._steps)

    def updates_before(self, step: int) -> int:
        """Updates done when this step begins: what the optimizer's schedule counts."""
        return step - 1 - sum(skipped < step for skipped in self._steps)
