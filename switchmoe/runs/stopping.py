"""Early stopping: a run is done when what it is judged by has not improved for `train.patience` evaluations."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from switchmoe.parallel import distributed
from switchmoe.runs.reporting import METRICS_FILE, read_metrics


class Patience:
    """The figure by which a run is judged, the less the better, at its evaluations.

    ``over``: ``allowed`` of them, or more, came after the best, of equal ones the first; never where 0 are allowed.
    """

    def __init__(self, allowed: int, found: list[tuple[int, float | None]]):
        """``found``: (step, figure) so far; None is no number, and no improvement."""
        self._allowed, self._found = allowed, list(found)

    def add(self, step: int, figure: float) -> None:
        self._found.append((step, figure))

    @property
    def over(self) -> bool:
        return bool(self._allowed and self._found) and len(self._found) - 1 - self._best >= self._allowed

    @property
    def record(self) -> dict[str, Any] | None:
        """For `run.json`: None where the run is not over. ``best_steps``: all of equal figures, of which ``best_step`` is the first."""
        if not self.over:
            return None
        figures, best = self._figures, self._best
        return {
            "step": self._found[-1][0],
            "best_step": self._found[best][0],
            "best_steps": [
                step for (step, _), f in zip(self._found, figures, strict=True) if f == figures[best]
            ],
            "patience": self._allowed,
        }

    @property
    def _figures(self) -> list[float]:
        return [
            figure if figure == figure and figure is not None else float("inf") for _, figure in self._found
        ]

    @property
    def _best(self) -> int:
        return self._figures.index(min(self._figures))


def ended_early(record: dict[str, Any], num_steps: int, place: str, saved: Iterable[int]) -> str:
    """A line on a run whose patience is over, of its `Patience.record` and the steps of its checkpoints."""
    kept = max(set(saved) & set(record.get("best_steps", [record["best_step"]])), default=None)
    best = (
        "the best was not saved (checkpoint.every, checkpoint.keep_best)"
        if kept is None
        else f"the best is {place}|{kept}"
    )
    return (
        f"finished at step {record['step']} of {num_steps}: no better than at step {record['best_step']}"
        f" for {record['patience']} evaluations (train.patience); {best}"
    )


def patience(allowed: int, workdir: Path, best: tuple[str, str], step: int) -> Patience:
    """What the records of a run that goes on from this step say; the same on all processes.

    Args:
      best: a judge's name, and one of its figures.
    """
    return Patience(allowed, distributed.gathered(_recorded(workdir, best, step))[0] if allowed else [])


def _recorded(workdir: Path, best: tuple[str, str], step: int) -> list[tuple[int, Any]]:
    path, (split, figure) = workdir / METRICS_FILE, best
    if not distributed.is_main() or not path.exists():
        return []
    return [
        (record["step"], record.get(figure))
        for record in read_metrics(path)
        if record["split"] == split and record["step"] <= step
    ]
