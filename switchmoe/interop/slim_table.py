"""The table of slim models: as JSON, to which a command that goes on adds, as CSV, and as Markdown."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from switchmoe.interop import growing, slim
from switchmoe.interop.slim import Row
from switchmoe.runs.checkpoints import write_json

TABLE_FILE = "table.json"
HEADS = (
    "model",
    "experts",
    "parameters",
    "bytes on disk",
    "bytes in memory",
    "held-out loss",
    "task",
    "tokens/s",
)


class Table:
    """Rows by name, kept in a file.

    Args:
      asked: what they are of, and what they are measured on.
      alone: whether nothing but the table's own models may be in its directory.

    Raises:
      ValueError: the file is another one's.
    """

    def __init__(self, path: Path, asked: dict[str, Any], alone: bool):
        self._path, self._asked, self._rows = path, asked, {}
        if alone and (path.parent / "config.json").exists():
            raise ValueError(
                f"--target={path.parent}: a run's directory; accepted with --sweep is a name that is free"
            )
        if path.exists():
            known = growing.read_json(path)
            if slim.differing(known.get("asked", {}), asked):
                raise ValueError(
                    f"--target={path.parent}: the table there is of another model or another text; accepted is a name that is free"
                )
            self._rows = {row["model"]: Row(**row) for row in known["rows"]}

    def missing(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if name not in self._rows]

    def add(self, row: Row) -> None:
        """Writes all three files."""
        self._rows[row.model] = row
        rows = [row._asdict() for row in self._rows.values()]
        write_json(self._path, {"asked": self._asked, "rows": rows})
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=Row._fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self._path.with_suffix(".csv").write_text(text.getvalue(), encoding="utf-8")
        self._path.with_suffix(".md").write_text(self.markdown() + "\n", encoding="utf-8")

    def markdown(self) -> str:
        lines = [HEADS, ["---"] * len(HEADS), *map(_cells, self._rows.values())]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(row: Row) -> list[str]:
    numbers = [f"{value:,}" for value in (row.parameters, row.bytes_on_disk, row.bytes_in_memory)]
    score = "" if row.score is None else f"{row.score:.2f}"
    return [row.model, str(row.experts), *numbers, f"{row.loss:.4f}", score, f"{row.tokens_per_second:,.0f}"]
